# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title A node's stake: active, locked, unbonding, jailed, slashed
@license AGPL-3.0-only
@dev The accounting behind NodeRegistry, which decides who may call what. Every amount is in wei of the token and below
     2**96, which the token's supply guarantees.

     `locked` is the exact sum of the locks of pending batches. A slash takes active stake without touching it, so it can
     exceed the active stake for a while; free stake is then zero, not negative. (Lowering it with the slash would let
     the release of one batch free stake that another batch still counts on.)
"""

from ..governance import parameter_names
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from ..interfaces import IPoipToken

event Staked:
    node: indexed(address)
    account: indexed(address)
    amount: uint256
    active: uint256


event Unbonding:
    node: indexed(address)
    id: uint64
    amount: uint256
    withdrawable_at: uint64


event UnbondingCancelled:
    node: indexed(address)
    id: uint64
    amount: uint256


event StakeWithdrawn:
    node: indexed(address)
    payout: indexed(address)
    amount: uint256


event StakeLocked:
    node: indexed(address)
    amount: uint256
    locked: uint256


event StakeUnlocked:
    node: indexed(address)
    amount: uint256
    locked: uint256


event Slashed:
    node: indexed(address)
    slasher: indexed(address)
    reason: indexed(bytes32)
    evidence: bytes32
    beneficiary: address
    taken: uint256
    paid: uint256
    burned: uint256


event Jailed:
    node: indexed(address)
    until: uint64


event Unjailed:
    node: indexed(address)


event RewardClaimed:
    account: indexed(address)
    amount: uint256


PPM: constant(uint256) = 10**6
MAX_UNBONDINGS: constant(uint256) = 32

# The stake word, all that a lock reads of a node: active stake in bits 0..95, locked stake in bits 96..191, the second
# from which the operator may end the jail in bits 192..231 (zero: not jailed), two flags above.
AMOUNT_MASK: constant(uint256) = 2**96 - 1
LOCKED_SHIFT: constant(uint256) = 96
JAIL_SHIFT: constant(uint256) = 192
JAIL_MASK: constant(uint256) = 2**40 - 1
REGISTERED: constant(uint256) = 2**232
DEREGISTERED: constant(uint256) = 2**233

# An unbonding's word: amount in bits 0..95, the second from which it may leave in bits 96..159, its id in 160..223.
# The totals' word: the sum of the amounts in bits 0..95, the next id in bits 160..223.
TIME_SHIFT: constant(uint256) = 96
ID_SHIFT: constant(uint256) = 160
MASK_64: constant(uint256) = 2**64 - 1

TOKEN: immutable(IPoipToken)
PARAMETERS: immutable(IParameters)

rewards: public(HashMap[address, uint256])
total_staked: public(uint256)
total_rewards: public(uint256)
_stakes: HashMap[address, uint256]
_unbonding_totals: HashMap[address, uint256]
_unbondings: HashMap[address, DynArray[uint256, MAX_UNBONDINGS]]


@deploy
def __init__(token: address, parameters: address):
    TOKEN = IPoipToken(token)
    PARAMETERS = IParameters(parameters)


# Views -----------------------------------------------------------------------------------------------------------------


@external
@view
def unbondings(node: address) -> DynArray[INodeRegistry.Unbonding, MAX_UNBONDINGS]:
    """
    @notice The stake of `node` that is on its way out, the oldest first. It can still be slashed.
    """
    result: DynArray[INodeRegistry.Unbonding, MAX_UNBONDINGS] = []
    for entry: uint256 in self._unbondings[node]:
        result.append(
            INodeRegistry.Unbonding(
                id=convert(entry >> ID_SHIFT, uint64),
                amount=entry & AMOUNT_MASK,
                withdrawable_at=convert((entry >> TIME_SHIFT) & MASK_64, uint64),
            )
        )
    return result


@external
@view
def free_stake(node: address) -> uint256:
    """
    @notice Active stake of `node` that no pending batch has locked.
    """
    return self._free(self._stakes[node])


@external
@view
def is_active(node: address) -> bool:
    """
    @notice Whether `node` may take new requests: in service, not jailed, with at least the minimum stake. What it signed
            before, it commits as long as it is in service and its free stake covers the lock.
    """
    word: uint256 = self._stakes[node]
    if not self._in_service(word) or self._jailed_until(word) != 0:
        return False
    return self._active(word) >= self._parameter(parameter_names.MINIMUM_STAKE)


@internal
@pure
def _active(word: uint256) -> uint256:
    return word & AMOUNT_MASK


@internal
@pure
def _locked(word: uint256) -> uint256:
    return (word >> LOCKED_SHIFT) & AMOUNT_MASK


@internal
@pure
def _free(word: uint256) -> uint256:
    active: uint256 = self._active(word)
    return active - min(active, self._locked(word))


@internal
@pure
def _jailed_until(word: uint256) -> uint256:
    return (word >> JAIL_SHIFT) & JAIL_MASK


@internal
@pure
def _in_service(word: uint256) -> bool:
    return word & (REGISTERED | DEREGISTERED) == REGISTERED


@internal
@view
def _parameter(name: bytes32) -> uint256:
    return staticcall PARAMETERS.value(name)


@internal
@view
def _unbonding(node: address) -> uint256:
    return self._unbonding_totals[node] & AMOUNT_MASK


@internal
@pure
def _check_service(word: uint256):
    assert self._in_service(word), "stakes: node not in service"


@internal
@view
def _check_minimum(active: uint256):
    assert active >= self._parameter(parameter_names.MINIMUM_STAKE), "stakes: below minimum stake"


# In and out ------------------------------------------------------------------------------------------------------------


@internal
def _stake(node: address, account: address, amount: uint256):
    """
    @dev Takes `amount` from `account` by its allowance. Touches neither locks nor unbondings nor the jail.
    """
    word: uint256 = self._stakes[node]
    self._check_service(word)
    assert amount > 0, "stakes: zero amount"
    active: uint256 = self._active(word) + amount
    assert active <= AMOUNT_MASK, "stakes: amount too large"
    self._stakes[node] = word + amount
    self.total_staked += amount
    log Staked(node=node, account=account, amount=amount, active=active)
    assert extcall TOKEN.transferFrom(account, self, amount), "stakes: transfer failed"


@internal
def _unbond(node: address, amount: uint256) -> uint64:
    """
    @dev Starts the way out of free stake. The queue stays in order of time even if the period was shortened since.
    """
    word: uint256 = self._stakes[node]
    assert amount > 0, "stakes: zero amount"
    assert amount <= self._free(word), "stakes: not enough free stake"
    count: uint256 = len(self._unbondings[node])
    assert count < MAX_UNBONDINGS, "stakes: too many unbondings"
    withdrawable_at: uint256 = block.timestamp + self._parameter(parameter_names.UNBONDING_PERIOD)
    if count > 0:
        withdrawable_at = max(withdrawable_at, (self._unbondings[node][count - 1] >> TIME_SHIFT) & MASK_64)
    totals: uint256 = self._unbonding_totals[node]
    id: uint256 = totals >> ID_SHIFT
    self._stakes[node] = word - amount
    self._unbonding_totals[node] = totals + amount + (1 << ID_SHIFT)
    self._unbondings[node].append((id << ID_SHIFT) | (withdrawable_at << TIME_SHIFT) | amount)
    log Unbonding(
        node=node, id=convert(id, uint64), amount=amount, withdrawable_at=convert(withdrawable_at, uint64)
    )
    return convert(id, uint64)


@internal
def _cancel_unbond(node: address, id: uint64):
    word: uint256 = self._stakes[node]
    self._check_service(word)
    amount: uint256 = 0
    kept: DynArray[uint256, MAX_UNBONDINGS] = []
    for entry: uint256 in self._unbondings[node]:
        if entry >> ID_SHIFT == convert(id, uint256):
            amount = entry & AMOUNT_MASK
        else:
            kept.append(entry)
    assert amount > 0, "stakes: no such unbonding"
    self._unbondings[node] = kept
    self._unbonding_totals[node] -= amount
    self._stakes[node] = word + amount
    log UnbondingCancelled(node=node, id=id, amount=amount)


@internal
def _withdraw(node: address, payout: address, maximum_count: uint256) -> uint256:
    """
    @dev Pays out at most `maximum_count` unbondings whose time has come, the oldest first.
    """
    amount: uint256 = 0
    count: uint256 = 0
    kept: DynArray[uint256, MAX_UNBONDINGS] = []
    for entry: uint256 in self._unbondings[node]:
        if count < maximum_count and (entry >> TIME_SHIFT) & MASK_64 <= block.timestamp:
            amount += entry & AMOUNT_MASK
            count += 1
        else:
            kept.append(entry)
    assert amount > 0, "stakes: nothing to withdraw yet"
    self._unbondings[node] = kept
    self._unbonding_totals[node] -= amount
    self.total_staked -= amount
    log StakeWithdrawn(node=node, payout=payout, amount=amount)
    self._pay(payout, amount)
    return amount


@internal
def _claim_reward(account: address) -> uint256:
    amount: uint256 = self.rewards[account]
    assert amount > 0, "stakes: no reward"
    self.rewards[account] = 0
    self.total_rewards -= amount
    log RewardClaimed(account=account, amount=amount)
    self._pay(account, amount)
    return amount


@internal
def _pay(account: address, amount: uint256):
    assert extcall TOKEN.transfer(account, amount), "stakes: transfer failed"


# Locks -----------------------------------------------------------------------------------------------------------------


@internal
def _lock(node: address, amount: uint256):
    """
    @dev Needs free stake alone. A jail and a minimum stake that rose stop new service, not the commitment of what the
         node signed before: refusing that would make its signed receipts a fault that it cannot avoid.
    """
    word: uint256 = self._stakes[node]
    self._check_service(word)
    active: uint256 = self._active(word)
    locked: uint256 = self._locked(word) + amount
    assert locked <= active, "stakes: not enough free stake"
    self._stakes[node] = word + (amount << LOCKED_SHIFT)
    log StakeLocked(node=node, amount=amount, locked=locked)


@internal
def _unlock(node: address, amount: uint256):
    """
    @dev Total: releases no more than is locked.
    """
    word: uint256 = self._stakes[node]
    locked: uint256 = self._locked(word)
    released: uint256 = min(amount, locked)
    if released == 0:
        return
    self._stakes[node] = word - (released << LOCKED_SHIFT)
    log StakeUnlocked(node=node, amount=released, locked=locked - released)


# Loss ------------------------------------------------------------------------------------------------------------------


@internal
def _slash(
    node: address,
    amount: uint256,
    beneficiary: address,
    reward: uint256,
    reason: bytes32,
    evidence: bytes32,
) -> (uint256, uint256):
    """
    @dev Total: whatever the node's state, it takes what is there, up to `amount`. Returns (taken, paid).
    """
    word: uint256 = self._stakes[node]
    if word & REGISTERED == 0:
        return 0, 0
    active: uint256 = self._active(word)
    taken: uint256 = min(amount, active + self._unbonding(node))
    from_active: uint256 = min(taken, active)
    if taken > from_active:
        self._cut_unbondings(node, taken - from_active)
    paid: uint256 = 0
    if beneficiary != empty(address):
        paid = min(reward, taken * self._parameter(parameter_names.REWARD_SHARE) // PPM)
    self.rewards[beneficiary] += paid
    self.total_rewards += paid
    self.total_staked -= taken
    log Slashed(
        node=node,
        slasher=msg.sender,
        reason=reason,
        evidence=evidence,
        beneficiary=beneficiary,
        taken=taken,
        paid=paid,
        burned=taken - paid,
    )
    self._stakes[node] = self._jail(node, word - from_active)
    if taken > paid:
        extcall TOKEN.burn(taken - paid)
    return taken, paid


@internal
def _slash_share(
    node: address, share_ppm: uint256, beneficiary: address, reason: bytes32, evidence: bytes32
) -> (uint256, uint256):
    """
    @dev Takes a share of all the node has, rounded up so that no stake is too small to lose something.
    """
    stake: uint256 = self._active(self._stakes[node]) + self._unbonding(node)
    amount: uint256 = (stake * share_ppm + PPM - 1) // PPM
    return self._slash(node, amount, beneficiary, amount, reason, evidence)


@internal
def _cut_unbondings(node: address, cut: uint256):
    """
    @dev Takes `cut` (at most their sum) pro rata. Each share is rounded down and what is left over falls on the later
         ones; the last takes the exact rest. Entries that reach zero are dropped.
    """
    totals: uint256 = self._unbonding_totals[node]
    total_left: uint256 = totals & AMOUNT_MASK
    cut_left: uint256 = cut
    kept: DynArray[uint256, MAX_UNBONDINGS] = []
    for entry: uint256 in self._unbondings[node]:
        amount: uint256 = entry & AMOUNT_MASK
        share: uint256 = amount * cut_left // total_left
        total_left -= amount
        cut_left -= share
        if share < amount:
            kept.append(entry - share)
    self._unbondings[node] = kept
    self._unbonding_totals[node] = totals - cut


@internal
def _jail(node: address, word: uint256) -> uint256:
    """
    @dev The stake word with the jail set; a new slash never shortens an old jail.
    """
    until: uint256 = block.timestamp + self._parameter(parameter_names.JAIL_PERIOD)
    until = max(until, self._jailed_until(word))
    log Jailed(node=node, until=convert(until, uint64))
    return (word & ~(JAIL_MASK << JAIL_SHIFT)) | (until << JAIL_SHIFT)


@internal
def _unjail(node: address):
    word: uint256 = self._stakes[node]
    until: uint256 = self._jailed_until(word)
    assert until != 0, "stakes: node not jailed"
    assert block.timestamp >= until, "stakes: jail period not over"
    self._check_minimum(self._active(word))
    self._stakes[node] = word & ~(JAIL_MASK << JAIL_SHIFT)
    log Unjailed(node=node)
