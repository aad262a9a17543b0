# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Nodes, their keys and their stake
@license AGPL-3.0-only
@notice A node is an operator's machine that answers requests. It is named by its first node key's address for good. Its
        stake backs its answers: the commitment log locks a part of it for each batch, and slashers take of it what an
        offence costs. Modules: keys, stakes, offer_list.
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
from . import stakes

implements: INodeRegistry

initializes: ownable
initializes: ownable_2step[ownable := ownable]
initializes: eip712_domain_separator
initializes: keys[eip712_domain_separator := eip712_domain_separator]
initializes: stakes
initializes: offer_list

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
)

# The part of the commitment log that this contract calls.
interface Log:
    def next_seq(node: address) -> uint64: view


struct Record:
    operator: address
    payout: address
    peer_key: address
    registered_at: uint64
    deregistered_at: uint64
    fixed_slash_ppm: uint32


event NodeRegistered:
    node: indexed(address)
    operator: indexed(address)
    payout: address
    peer_key: address
    endpoint: String[256]
    fixed_slash_ppm: uint32


event EndpointChanged:
    node: indexed(address)
    old_endpoint: String[256]
    new_endpoint: String[256]


event PayoutChanged:
    node: indexed(address)
    old_payout: address
    new_payout: address


event OperatorTransferStarted:
    node: indexed(address)
    operator: indexed(address)
    new_operator: indexed(address)


event OperatorTransferred:
    node: indexed(address)
    old_operator: indexed(address)
    new_operator: indexed(address)


event Deregistered:
    node: indexed(address)


event SlasherSet:
    slasher: indexed(address)
    old_active_at: uint64
    new_active_at: uint64


event Initialized:
    log_address: indexed(address)


event Sealed:
    pass


event IntakePaused:
    old_until: uint64
    new_until: uint64


event SurplusSwept:
    to: indexed(address)
    amount: uint256


MAX_PAUSE: constant(uint256) = 14 * 86400

# The wiring word: the commitment log in bits 0..159 and whether the contract is sealed in bit 160.
ADDRESS_MASK: constant(uint256) = 2**160 - 1
SEALED: constant(uint256) = 2**160

MODELS: immutable(IModelRegistry)

pending_operator: public(HashMap[address, address])
intake_paused_until: public(uint64)
_wiring: uint256
_records: HashMap[address, Record]
_endpoints: HashMap[address, String[256]]
_nodes: HashMap[uint256, address]
_node_count: uint256
_slashers: HashMap[address, uint64]


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
    MODELS = IModelRegistry(models)


# Set-up and administration ---------------------------------------------------------------------------------------------


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "1.0.0"


@external
def initialize(log_address: address):
    """
    @notice Name the commitment log, once. Owner only.
    """
    ownable._check_owner()
    assert log_address != empty(address), "registry: log is zero"
    assert self._wiring == 0, "registry: already initialized"
    self._wiring = convert(log_address, uint256)
    log Initialized(log_address=log_address)


@external
def seal():
    """
    @notice End the set-up: from now on stake comes in and a new slasher waits. Owner only.
    """
    ownable._check_owner()
    wiring: uint256 = self._wiring
    assert wiring != 0 and wiring & SEALED == 0, "registry: nothing to seal"
    self._wiring = wiring | SEALED
    log Sealed()


@external
def set_slasher(slasher: address, allowed: bool):
    """
    @notice Name a slasher or dismiss one. Owner only. Before `seal` it is active at once; afterwards only after
            unbonding_period + 2 * challenge_window, so that nobody's stake is seized under rules it could not leave.
    """
    ownable._check_owner()
    assert slasher != empty(address), "registry: slasher is zero"
    old_active_at: uint64 = self._slashers[slasher]
    assert (old_active_at != 0) != allowed, "registry: slasher unchanged"
    new_active_at: uint64 = 0
    if allowed:
        active_at: uint256 = block.timestamp
        if self._wiring & SEALED != 0:
            active_at += stakes._parameter(parameter_names.UNBONDING_PERIOD)
            active_at += 2 * stakes._parameter(parameter_names.CHALLENGE_WINDOW)
        new_active_at = convert(active_at, uint64)
    self._slashers[slasher] = new_active_at
    log SlasherSet(slasher=slasher, old_active_at=old_active_at, new_active_at=new_active_at)


@external
def pause_intake(duration: uint256):
    """
    @notice Refuse registrations, stake and offers for `duration` seconds from now, at most 14 days; 0 ends it. Owner only.
    """
    ownable._check_owner()
    assert duration <= MAX_PAUSE, "registry: pause too long"
    old_until: uint64 = self.intake_paused_until
    self.intake_paused_until = convert(block.timestamp + duration, uint64)
    log IntakePaused(old_until=old_until, new_until=self.intake_paused_until)


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
    self._check_intake()
    self._check_payout(payout)
    keys._check_unbound(msg.sender)
    limit: uint256 = convert(deadline, uint256)
    keys._bind(node_key, node_key, keys.ROLE_NODE, msg.sender, limit, node_signature)
    keys._bind(node_key, peer_key, keys.ROLE_PEER, msg.sender, limit, peer_signature)
    share: uint32 = convert(stakes._parameter(parameter_names.FIXED_SLASH_SHARE), uint32)
    stakes._stakes[node_key] = stakes.REGISTERED
    self._records[node_key] = Record(
        operator=msg.sender,
        payout=payout,
        peer_key=peer_key,
        registered_at=convert(block.timestamp, uint64),
        deregistered_at=0,
        fixed_slash_ppm=share,
    )
    self._endpoints[node_key] = endpoint
    self._nodes[self._node_count] = node_key
    self._node_count += 1
    log NodeRegistered(
        node=node_key, operator=msg.sender, payout=payout, peer_key=peer_key, endpoint=endpoint, fixed_slash_ppm=share
    )


@external
def set_endpoint(node: address, endpoint: String[256]):
    """
    @notice Change where clients reach the node. Operator only.
    """
    self._check_operator(node)
    log EndpointChanged(node=node, old_endpoint=self._endpoints[node], new_endpoint=endpoint)
    self._endpoints[node] = endpoint


@external
def set_payout(node: address, payout: address):
    """
    @notice Change who receives the node's earnings and withdrawn stake. Operator only.
    """
    self._check_operator(node)
    self._check_payout(payout)
    log PayoutChanged(node=node, old_payout=self._records[node].payout, new_payout=payout)
    self._records[node].payout = payout


@external
def transfer_operator(node: address, new_operator: address):
    """
    @notice Offer the node to a new operator, who must accept; zero withdraws the offer. Operator only.
    """
    self._check_operator(node)
    self.pending_operator[node] = new_operator
    log OperatorTransferStarted(node=node, operator=msg.sender, new_operator=new_operator)


@external
def accept_operator(node: address):
    """
    @notice Become the operator of a node that was offered to the caller.
    """
    assert self.pending_operator[node] == msg.sender, "registry: not the next operator"
    keys._check_unbound(msg.sender)
    log OperatorTransferred(node=node, old_operator=self._records[node].operator, new_operator=msg.sender)
    self.pending_operator[node] = empty(address)
    self._records[node].operator = msg.sender


@external
def rotate_node_key(node: address, new_key: address, next_seq: uint64, deadline: uint64, signature: Bytes[65]):
    """
    @notice Let `new_key` sign the receipts from `next_seq` on, after key_rotation_delay. Operator only. Until then the
            old key signs all; choose `next_seq` above what will be committed in the meantime.
    @param next_seq Not below the log's next seq of the node, nor below that of an earlier rotation.
    @param signature The new key's `ProofOfPossession(operator, new_key, 1, deadline)`.
    """
    self._check_operator(node)
    assert next_seq >= self._next_seq(node), "registry: next_seq is committed"
    keys._bind(node, new_key, keys.ROLE_NODE, msg.sender, convert(deadline, uint256), signature)
    delay: uint256 = stakes._parameter(parameter_names.KEY_ROTATION_DELAY)
    keys._rotate(node, new_key, convert(next_seq, uint256), block.timestamp + delay)


@external
def deregister(node: address):
    """
    @notice Take the node out of service for good; all its stake starts to unbond. No batch may be pending. Operator only.
    """
    self._check_operator(node)
    word: uint256 = stakes._stakes[node]
    stakes._check_service(word)
    assert stakes._locked(word) == 0, "registry: batches are pending"
    offer_list._remove_all(node)
    active: uint256 = stakes._active(word)
    if active > 0:
        stakes._unbond(node, active)
    stakes._stakes[node] |= stakes.DEREGISTERED
    self._records[node].deregistered_at = convert(block.timestamp, uint64)
    log Deregistered(node=node)


# Stake -----------------------------------------------------------------------------------------------------------------


@external
def stake(node: address, amount: uint256):
    """
    @notice Add `amount` wei of the caller's tokens (by allowance) to the node's stake. It belongs to the node's operator.
    """
    self._check_intake()
    stakes._stake(node, msg.sender, amount)


@external
def stake_with_permit(node: address, amount: uint256, deadline: uint256, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Like `stake`, with the caller's EIP-2612 permit for exactly `amount`.
    """
    self._check_intake()
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
    self._check_operator(node)
    return stakes._unbond(node, amount)


@external
def cancel_unbond(node: address, id: uint64):
    """
    @notice Put an unbonding back into the active stake. Operator only.
    """
    self._check_operator(node)
    stakes._cancel_unbond(node, id)


@external
def withdraw(node: address, maximum_count: uint256) -> uint256:
    """
    @notice Pay out up to `maximum_count` unbondings whose time has come to the node's payout address; anyone may call.
    @return The amount in wei.
    """
    return stakes._withdraw(node, self._records[node].payout, maximum_count)


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
    self._check_operator(node)
    stakes._unjail(node)


# For the log and the slashers ------------------------------------------------------------------------------------------


@external
def lock(node: address, amount: uint256):
    """
    @notice Lock free stake for a batch. The commitment log only.
    """
    self._check_log()
    stakes._lock(node, amount)


@external
def unlock(node: address, amount: uint256):
    """
    @notice Release the lock of a batch. The commitment log only; never fails because of the node's state.
    """
    self._check_log()
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
    self._check_slasher()
    return stakes._slash(node, amount, beneficiary, reward, reason, evidence)


@external
def slash_fixed(node: address, beneficiary: address, reason: bytes32, evidence: bytes32) -> (uint256, uint256):
    """
    @notice Take the share of stake pinned at registration, rounded up; jail the node. Active slashers only.
    @param beneficiary Is credited reward_share of what was taken; zero for nobody. The rest is burned.
    @return (taken, paid) in wei.
    """
    self._check_slasher()
    share: uint256 = convert(self._records[node].fixed_slash_ppm, uint256)
    return stakes._slash_share(node, share, beneficiary, reason, evidence)


# Offers ----------------------------------------------------------------------------------------------------------------


@external
def set_offer(
    node: address, model_id: bytes32, profile_version: uint32, input_price: uint128, output_price: uint128
):
    """
    @notice Offer a model at prices in wei per token, or change the offer for it. Operator or node key.
    """
    self._check_intake()
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
def node_count() -> uint256:
    """
    @notice How many nodes were ever registered.
    """
    return self._node_count


@external
@view
def node_at(index: uint256) -> address:
    """
    @notice The `index`-th node, in order of registration.
    """
    assert index < self._node_count, "registry: no such index"
    return self._nodes[index]


@external
@view
def node_info(node: address) -> INodeRegistry.NodeInfo:
    """
    @notice All that is known of a node; all zero for an unknown one. `locked` may exceed `active` after a slash.
    """
    record: Record = self._records[node]
    word: uint256 = stakes._stakes[node]
    return INodeRegistry.NodeInfo(
        operator=record.operator,
        payout=record.payout,
        node_key=self._committer(node),
        peer_key=record.peer_key,
        endpoint=self._endpoints[node],
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
def operator_of(node: address) -> address:
    """
    @notice The node's operator, or zero for an unknown node.
    """
    return self._records[node].operator


@external
@view
def payout_of(node: address) -> address:
    """
    @notice Who receives the node's earnings and withdrawn stake, or zero for an unknown node.
    """
    return self._records[node].payout


@external
@view
def slasher_active_at(slasher: address) -> uint64:
    """
    @notice From when on `slasher` may slash, in Unix seconds; 0 if it may not.
    """
    return self._slashers[slasher]


@external
@view
def log_address() -> address:
    """
    @notice The commitment log, or zero before `initialize`.
    """
    return self._log_address()


@external
@view
def is_sealed() -> bool:
    """
    @notice Whether the set-up is over.
    """
    return self._wiring & SEALED != 0


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
def _check_intake():
    assert self._wiring & SEALED != 0, "registry: not sealed"
    assert block.timestamp >= convert(self.intake_paused_until, uint256), "registry: intake is paused"


@internal
@view
def _check_payout(payout: address):
    assert payout != empty(address) and payout != self, "registry: payout out of range"


@internal
@view
def _check_operator(node: address):
    assert msg.sender == self._records[node].operator, "registry: not the operator"


@internal
@view
def _check_operator_or_key(node: address):
    if msg.sender != self._records[node].operator:
        assert msg.sender == self._committer(node), "registry: not operator or key"


@internal
@view
def _check_log():
    assert msg.sender == self._log_address(), "registry: not the log"


@internal
@view
def _check_slasher():
    active_at: uint64 = self._slashers[msg.sender]
    assert active_at != 0, "registry: not a slasher"
    assert block.timestamp >= convert(active_at, uint256), "registry: slasher not active yet"


@internal
@view
def _log_address() -> address:
    return convert(self._wiring & ADDRESS_MASK, address)


@internal
@view
def _next_seq(node: address) -> uint64:
    log_address: address = self._log_address()
    if log_address == empty(address):
        return 0
    return staticcall Log(log_address).next_seq(node)


@internal
@view
def _committer(node: address) -> address:
    return keys._signing_key(node, convert(self._next_seq(node), uint256))


@internal
@view
def _held() -> uint256:
    return stakes.total_staked + stakes.total_rewards
