# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Delegated votes with a history
@license AGPL-3.0-only
@notice ERC-5805 votes on an ERC-6372 clock of block timestamps (`mode=timestamp`). An account's tokens count for the
        delegate that it names, and for nobody until it names one (itself, usually).
@dev The token calls `_move_votes` on every path that moves a balance and `_record_supply` on every path that changes the
     supply. A checkpoint is one word: the time in the upper 48 bits, the votes in the lower 208.
"""

from snekmate.tokens import erc20
from snekmate.utils import ecdsa

uses: erc20

event DelegateChanged:
    delegator: indexed(address)
    fromDelegate: indexed(address)
    toDelegate: indexed(address)


event DelegateVotesChanged:
    delegate: indexed(address)
    previousVotes: uint256
    newVotes: uint256


_DELEGATION_TYPE_HASH: constant(bytes32) = keccak256("Delegation(address delegatee,uint256 nonce,uint256 expiry)")
_VOTES_BITS: constant(uint256) = 208
_VOTES_MASK: constant(uint256) = 2**208 - 1
# A binary search over 2**40 checkpoints takes 40 steps; more cannot be written.
_SEARCH_STEPS: constant(uint256) = 40
# The supply's history is kept as that of the zero address, which can be nobody's delegate.
_SUPPLY: constant(address) = empty(address)

delegates: public(HashMap[address, address])
_checkpoint_count: HashMap[address, uint256]
_checkpoints: HashMap[address, HashMap[uint256, uint256]]


@deploy
def __init__():
    pass


@external
def delegate(delegatee: address):
    """
    @notice Let the caller's tokens, those held and those to come, count for `delegatee`; zero for nobody.
    """
    self._delegate(msg.sender, delegatee)


@external
def delegateBySig(delegatee: address, nonce: uint256, expiry: uint256, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Delegate for the signer of an ERC-5805 `Delegation`, with the nonce that `permit` uses too.
    @param expiry The last second at which the signature is good.
    """
    assert block.timestamp <= expiry, "votes: signature expired"
    digest: bytes32 = erc20.eip712_domain_separator._hash_typed_data_v4(
        keccak256(abi_encode(_DELEGATION_TYPE_HASH, delegatee, nonce, expiry))
    )
    signer: address = ecdsa._recover_vrs(digest, convert(v, uint256), convert(r, uint256), convert(s, uint256))
    assert nonce == erc20.nonces[signer], "votes: invalid nonce"
    erc20.nonces[signer] = nonce + 1
    self._delegate(signer, delegatee)


@external
@view
def clock() -> uint48:
    """
    @notice The present time point: the block's timestamp (ERC-6372).
    """
    return convert(block.timestamp, uint48)


@external
@view
def CLOCK_MODE() -> String[14]:
    """
    @notice What `clock` counts (ERC-6372).
    """
    return "mode=timestamp"


@external
@view
def getVotes(account: address) -> uint256:
    """
    @notice The votes delegated to `account` now.
    """
    return self._latest(account)


@external
@view
def getPastVotes(account: address, timepoint: uint256) -> uint256:
    """
    @notice The votes that `account` had at the end of second `timepoint`, which must have passed.
    """
    assert timepoint < block.timestamp, "votes: timepoint not past"
    # The supply's history is not an account's.
    if account == _SUPPLY:
        return 0
    return self._at(account, timepoint)


@external
@view
def getPastTotalSupply(timepoint: uint256) -> uint256:
    """
    @notice The token supply at the end of second `timepoint`, which must have passed.
    """
    assert timepoint < block.timestamp, "votes: timepoint not past"
    return self._at(_SUPPLY, timepoint)


@external
@view
def numCheckpoints(account: address) -> uint256:
    """
    @notice How many changes of `account`'s votes are recorded.
    """
    if account == _SUPPLY:
        return 0
    return self._checkpoint_count[account]


@external
@view
def checkpoint(account: address, index: uint256) -> (uint48, uint208):
    """
    @notice The time and the votes of the `index`-th recorded change of `account`'s votes.
    """
    assert account != _SUPPLY and index < self._checkpoint_count[account], "votes: no such checkpoint"
    word: uint256 = self._checkpoints[account][index]
    return convert(word >> _VOTES_BITS, uint48), convert(word & _VOTES_MASK, uint208)


@internal
def _delegate(account: address, delegatee: address):
    previous: address = self.delegates[account]
    self.delegates[account] = delegatee
    log DelegateChanged(delegator=account, fromDelegate=previous, toDelegate=delegatee)
    self._shift(previous, delegatee, erc20.balanceOf[account])


@internal
def _move_votes(owner: address, to: address, amount: uint256):
    """
    @dev To be called after every transfer, mint (owner zero) and burn (to zero). The zero address delegates to nobody.
    """
    self._shift(self.delegates[owner], self.delegates[to], amount)


@internal
def _record_supply():
    self._write(_SUPPLY, erc20.totalSupply)


@internal
def _shift(source: address, target: address, amount: uint256):
    if source == target or amount == 0:
        return
    if source != empty(address):
        before: uint256 = self._latest(source)
        self._write(source, before - amount)
        log DelegateVotesChanged(delegate=source, previousVotes=before, newVotes=before - amount)
    if target != empty(address):
        before: uint256 = self._latest(target)
        self._write(target, before + amount)
        log DelegateVotesChanged(delegate=target, previousVotes=before, newVotes=before + amount)


@internal
def _write(account: address, votes: uint256):
    count: uint256 = self._checkpoint_count[account]
    word: uint256 = (block.timestamp << _VOTES_BITS) | votes
    if count > 0 and self._checkpoints[account][count - 1] >> _VOTES_BITS == block.timestamp:
        self._checkpoints[account][count - 1] = word
        return
    self._checkpoints[account][count] = word
    self._checkpoint_count[account] = count + 1


@internal
@view
def _latest(account: address) -> uint256:
    count: uint256 = self._checkpoint_count[account]
    if count == 0:
        return 0
    return self._checkpoints[account][count - 1] & _VOTES_MASK


@internal
@view
def _at(account: address, timepoint: uint256) -> uint256:
    # Invariant: checkpoints below `low` are not later than `timepoint`, those from `high` on are.
    low: uint256 = 0
    high: uint256 = self._checkpoint_count[account]
    for _: uint256 in range(_SEARCH_STEPS):
        if low == high:
            break
        middle: uint256 = (low + high) // 2
        if self._checkpoints[account][middle] >> _VOTES_BITS <= timepoint:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return 0
    return self._checkpoints[account][low - 1] & _VOTES_MASK
