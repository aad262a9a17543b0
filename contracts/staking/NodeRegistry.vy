# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Nodes, their keys and their stake
@license AGPL-3.0-only
@notice A node is an operator's machine that answers requests. It is named by its first node key's address for good. Its
        stake backs its answers: the commitment log locks a part of it for each batch, and slashers take of it what an
        offence costs. Modules: keys, stakes, records, offer_list, wiring.
@custom:security Three keys with separate rights: the operator owns the stake, the node key signs receipts, the peer key
                 is a network identity. No call by a third party changes a node's locks, unbondings or keys. Stake that
                 is leaving stays within reach until `unbonding_period` is over. A slash is a total function of the
                 node's state, pays out at most `reward_share` of what it took, and burns the rest. A slasher named
                 after `seal` is active only after stake staked today could have left. Views can be called by the log
                 while it holds its own lock, except `committer` and `node_info`, which call the log.
@custom:kill `pause_intake` stops new registrations, stake and offers for at most 14 days at a time. Withdrawals, locks,
             answers and slashes cannot be stopped.
"""

from ..governance import parameter_names
from ..interfaces import IModelRegistry
from ..interfaces import INodeRegistry
from snekmate.auth import ownable
from snekmate.auth import ownable_2step
from snekmate.utils import eip712_domain_separator
from . import keys
from . import offer_list
from . import records
from . import stakes
from . import wiring

implements: INodeRegistry

initializes: ownable
initializes: ownable_2step[ownable := ownable]
initializes: eip712_domain_separator
initializes: keys[eip712_domain_separator := eip712_domain_separator]
initializes: stakes
initializes: offer_list
initializes: records[keys := keys]
initializes: wiring[ownable := ownable, stakes := stakes]

exports: (
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
    eip712_domain_separator.eip712Domain,
    keys.node_of_key,
    keys.signing_key,
    stakes.rewards,
    stakes.total_staked,
    stakes.total_rewards,
    stakes.unbondings,
    stakes.free_stake,
    stakes.is_active,
    offer_list.offers,
    records.pending_operator,
    records.set_endpoint,
    records.set_payout,
    records.transfer_operator,
    records.accept_operator,
    records.node_count,
    records.node_at,
    records.operator_of,
    records.payout_of,
    wiring.intake_paused_until,
    wiring.initialize,
    wiring.seal,
    wiring.set_slasher,
    wiring.pause_intake,
    wiring.slasher_active_at,
    wiring.log_address,
    wiring.is_sealed,
)

event Deregistered:
    node: indexed(address)


event SurplusSwept:
    to: indexed(address)
    amount: uint256


MODELS: immutable(IModelRegistry)


@deploy
def __init__(token: address, parameters: address, models: address):
    """
    @notice The deployer becomes owner, names the log and the first slashers, and then seals.
    """
    ownable.__init__()
    ownable_2step.__init__()
    eip712_domain_separator.__init__("PoIP", "1")
    keys.__init__()
    stakes.__init__(token, parameters)
    offer_list.__init__()
    records.__init__()
    wiring.__init__()
    MODELS = IModelRegistry(models)


# Administration --------------------------------------------------------------------------------------------------------


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
def sweep_surplus(to: address) -> uint256:
    """
    @notice Send tokens that were transferred here by mistake, beyond all stake and rewards, to `to`. Owner only.
    """
    ownable._check_owner()
    amount: uint256 = staticcall stakes.TOKEN.balanceOf(self) - self._held()
    assert amount > 0, "registry: no surplus"
    log SurplusSwept(to=to, amount=amount)
    stakes._pay(to, amount)
    return amount


# Nodes and keys --------------------------------------------------------------------------------------------------------


@external
def register(
    node_key: address,
    payout: address,
    peer_key: address,
    endpoint: String[256],
    deadline: uint64,
    node_signature: Bytes[65],
    peer_signature: Bytes[65],
):
    """
    @notice Register a node; the caller becomes its operator. Both keys sign EIP-712
            `ProofOfPossession(operator, key, role, deadline)` in this contract's domain.
    @param node_key Signs receipts and sends batches; names the node for good.
    @param payout Receives earnings and withdrawn stake.
    @param peer_key The node's network identity.
    @param endpoint Where clients reach the node.
    @param deadline Of both signatures, in Unix seconds.
    """
    wiring._check_intake()
    keys._check_unbound(msg.sender)
    limit: uint256 = convert(deadline, uint256)
    keys._bind(node_key, node_key, keys.ROLE_NODE, msg.sender, limit, node_signature)
    keys._bind(node_key, peer_key, keys.ROLE_PEER, msg.sender, limit, peer_signature)
    stakes._stakes[node_key] = stakes.REGISTERED
    share: uint32 = convert(stakes._parameter(parameter_names.FIXED_SLASH_SHARE), uint32)
    records._add(node_key, msg.sender, payout, peer_key, endpoint, share)


@external
def rotate_node_key(node: address, new_key: address, next_seq: uint64, deadline: uint64, signature: Bytes[65]):
    """
    @notice Let `new_key` sign the receipts from `next_seq` on, after key_rotation_delay. Operator only. Until then the
            old key signs all; choose `next_seq` above what will be committed in the meantime.
    @param next_seq Not below the log's next seq of the node, nor below that of an earlier rotation.
    @param signature The new key's `ProofOfPossession(operator, new_key, 1, deadline)`.
    """
    records._check_operator(node)
    assert next_seq >= wiring._next_seq(node), "registry: next_seq is committed"
    keys._bind(node, new_key, keys.ROLE_NODE, msg.sender, convert(deadline, uint256), signature)
    delay: uint256 = stakes._parameter(parameter_names.KEY_ROTATION_DELAY)
    keys._rotate(node, new_key, convert(next_seq, uint256), block.timestamp + delay)


@external
def deregister(node: address):
    """
    @notice Take the node out of service for good; all its stake starts to unbond. No batch may be pending. Operator only.
    """
    records._check_operator(node)
    word: uint256 = stakes._stakes[node]
    stakes._check_service(word)
    assert stakes._locked(word) == 0, "registry: batches are pending"
    offer_list._remove_all(node)
    active: uint256 = stakes._active(word)
    if active > 0:
        stakes._unbond(node, active)
    stakes._stakes[node] |= stakes.DEREGISTERED
    records._records[node].deregistered_at = convert(block.timestamp, uint64)
    log Deregistered(node=node)


# Stake -----------------------------------------------------------------------------------------------------------------


@external
def stake(node: address, amount: uint256):
    """
    @notice Add `amount` wei of the caller's tokens (by allowance) to the node's stake. It belongs to the node's operator.
    """
    wiring._check_intake()
    stakes._stake(node, msg.sender, amount)


@external
def stake_with_permit(node: address, amount: uint256, deadline: uint256, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Like `stake`, with the caller's EIP-2612 permit for exactly `amount`.
    """
    wiring._check_intake()
    # Whoever sees the permit may send it first; then it fails here, and the allowance that it gave is there all the same.
    success: bool = raw_call(
        stakes.TOKEN.address,
        abi_encode(
            msg.sender,
            self,
            amount,
            deadline,
            v,
            r,
            s,
            method_id=method_id("permit(address,address,uint256,uint256,uint8,bytes32,bytes32)"),
        ),
        revert_on_failure=False,
    )
    stakes._stake(node, msg.sender, amount)


@external
def unbond(node: address, amount: uint256) -> uint64:
    """
    @notice Start to take `amount` wei of free stake out; it can be withdrawn after unbonding_period. Operator only.
    @return The unbonding's id.
    """
    records._check_operator(node)
    return stakes._unbond(node, amount)


@external
def cancel_unbond(node: address, id: uint64):
    """
    @notice Put an unbonding back into the active stake. Operator only.
    """
    records._check_operator(node)
    stakes._cancel_unbond(node, id)


@external
def withdraw(node: address, maximum_count: uint256) -> uint256:
    """
    @notice Pay out up to `maximum_count` unbondings whose time has come to the node's payout address; anyone may call.
    @return The amount in wei.
    """
    return stakes._withdraw(node, records._records[node].payout, maximum_count)


@external
def claim_reward() -> uint256:
    """
    @notice Pay out the caller's rewards for slashes.
    @return The amount in wei.
    """
    return stakes._claim_reward(msg.sender)


@external
def unjail(node: address):
    """
    @notice End the jail after its period, with at least the minimum stake. Operator only.
    """
    records._check_operator(node)
    stakes._unjail(node)


# For the log and the slashers ------------------------------------------------------------------------------------------


@external
def lock(node: address, amount: uint256):
    """
    @notice Lock free stake for a batch. The commitment log only.
    """
    wiring._check_log()
    stakes._lock(node, amount)


@external
def unlock(node: address, amount: uint256):
    """
    @notice Release the lock of a batch. The commitment log only; never fails because of the node's state.
    """
    wiring._check_log()
    stakes._unlock(node, amount)


@external
def slash(
    node: address, amount: uint256, beneficiary: address, reward: uint256, reason: bytes32, evidence: bytes32
) -> (uint256, uint256):
    """
    @notice Take up to `amount` wei of stake, active first, then what is unbonding; jail the node. Active slashers only.
    @param beneficiary Is credited `reward`, at most reward_share of what was taken; zero for nobody. The rest is burned.
    @return (taken, paid) in wei.
    """
    wiring._check_slasher()
    return stakes._slash(node, amount, beneficiary, reward, reason, evidence)


@external
def slash_fixed(node: address, beneficiary: address, reason: bytes32, evidence: bytes32) -> (uint256, uint256):
    """
    @notice Take the share of stake pinned at registration, rounded up; jail the node. Active slashers only.
    @param beneficiary Is credited reward_share of what was taken; zero for nobody. The rest is burned.
    @return (taken, paid) in wei.
    """
    wiring._check_slasher()
    share: uint256 = convert(records._records[node].fixed_slash_ppm, uint256)
    return stakes._slash_share(node, share, beneficiary, reason, evidence)


# Offers ----------------------------------------------------------------------------------------------------------------


@external
def set_offer(
    node: address, model_id: bytes32, profile_version: uint32, input_price: uint128, output_price: uint128
):
    """
    @notice Offer a model at prices in wei per token, or change the offer for it. Operator or node key.
    """
    wiring._check_intake()
    self._check_operator_or_key(node)
    stakes._check_service(stakes._stakes[node])
    assert staticcall MODELS.is_servable(model_id, profile_version), "registry: model not servable"
    minimum: uint256 = stakes._parameter(parameter_names.MINIMUM_INPUT_PRICE)
    assert convert(input_price, uint256) >= minimum, "registry: input price too low"
    minimum = stakes._parameter(parameter_names.MINIMUM_OUTPUT_PRICE)
    assert convert(output_price, uint256) >= minimum, "registry: output price too low"
    offer_list._set(
        node,
        INodeRegistry.Offer(
            model_id=model_id, profile_version=profile_version, input_price=input_price, output_price=output_price
        ),
    )


@external
def remove_offer(node: address, model_id: bytes32):
    """
    @notice Withdraw the offer for a model. Operator or node key.
    """
    self._check_operator_or_key(node)
    offer_list._remove(node, model_id)


# Views -----------------------------------------------------------------------------------------------------------------


@external
@view
def node_info(node: address) -> INodeRegistry.NodeInfo:
    """
    @notice All that is known of a node; all zero for an unknown one. `locked` may exceed `active` after a slash.
    """
    record: records.Record = records._records[node]
    word: uint256 = stakes._stakes[node]
    return INodeRegistry.NodeInfo(
        operator=record.operator,
        payout=record.payout,
        node_key=self._committer(node),
        peer_key=record.peer_key,
        endpoint=records._endpoints[node],
        active=stakes._active(word),
        unbonding=stakes._unbonding(node),
        locked=stakes._locked(word),
        jailed_until=convert(stakes._jailed_until(word), uint64),
        registered_at=record.registered_at,
        deregistered_at=record.deregistered_at,
        fixed_slash_ppm=record.fixed_slash_ppm,
    )


@external
@view
def committer(node: address) -> address:
    """
    @notice The key that may send the node's next batch: signing_key(node, log.next_seq(node)).
    """
    return self._committer(node)


@external
@view
def total_held() -> uint256:
    """
    @notice Stake and unclaimed rewards together; the contract's token balance is never below it.
    """
    return self._held()


# Checks ----------------------------------------------------------------------------------------------------------------


@internal
@view
def _check_operator_or_key(node: address):
    if msg.sender != records._records[node].operator:
        assert msg.sender == self._committer(node), "registry: not operator or key"


@internal
@view
def _committer(node: address) -> address:
    return keys._signing_key(node, convert(wiring._next_seq(node), uint256))


@internal
@view
def _held() -> uint256:
    return stakes.total_staked + stakes.total_rewards
