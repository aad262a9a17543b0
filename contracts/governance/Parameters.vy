# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Every protocol number
@license AGPL-3.0-only
@notice Holds each number with its unit and hard bounds. A change makes a new revision; every old revision stays
        readable, so a batch is always judged by the numbers that stood when it was committed.
@custom:security Names, bounds and units are fixed at deployment. The relations between periods that keep stake and
                 escrow in reach of the longest case are checked at deployment and after every change. It calls nothing.
@custom:kill None. The owner changes values within their bounds only, and never those that are already pinned.
"""

from ..interfaces import IParameters
from snekmate.auth import ownable
from snekmate.auth import ownable_2step
from . import parameter_names

implements: IParameters

initializes: ownable
initializes: ownable_2step[ownable := ownable]

exports: (
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
)

struct Parameter:
    name: bytes32
    value: uint256
    minimum: uint256
    maximum: uint256
    unit: String[32]


struct Bounds:
    minimum: uint256
    maximum: uint256
    unit: String[32]


event ParameterChanged:
    name: indexed(bytes32)
    old_value: uint256
    new_value: uint256
    revision: uint256


PPM: constant(uint256) = 10**6
MAX_NAMES: constant(uint256) = 64

# A word of history: presence in bit 255, the revision of the change in bits 192..254, the value in the lower 192.
VALUE_BITS: constant(uint256) = 192
VALUE_MASK: constant(uint256) = 2**192 - 1
REVISION_MASK: constant(uint256) = 2**63 - 1
PRESENT: constant(uint256) = 2**255
# Revisions fit 32 bits in a batch, so a history cannot be longer than 2**32 and 33 steps find any entry.
MAX_REVISION: constant(uint256) = 2**32 - 1
SEARCH_STEPS: constant(uint256) = 33

# The word of `batch_terms`, from the lowest bit: minimum_lock, challenge_window, three rates and the revision.
LOCK_BITS: constant(uint256) = 96
EASED_UNTIL: constant(uint256) = 160
WINDOW_BITS: constant(uint256) = 32
RATE_BITS: constant(uint256) = 24

_names: DynArray[bytes32, MAX_NAMES]
_bounds: HashMap[bytes32, Bounds]
_current: HashMap[bytes32, uint256]
_history: HashMap[bytes32, HashMap[uint256, uint256]]
_history_length: HashMap[bytes32, uint256]
_terms: uint256
# The easiest lock of the last challenge_window: minimum_lock in bits 0..95, the divisor of the value at risk in bits
# 96..159, until when it counts in bits 160..223.
_eased: uint256
_revision: uint256


@deploy
def __init__(parameters: DynArray[Parameter, MAX_NAMES]):
    """
    @notice Set up all parameters; the deployer becomes owner.
    @param parameters Distinct names (ASCII, left-aligned), each with minimum <= value <= maximum < 2**192.
    """
    ownable.__init__()
    ownable_2step.__init__()
    for parameter: Parameter in parameters:
        assert parameter.name != empty(bytes32), "parameters: empty name"
        assert self._current[parameter.name] == 0, "parameters: duplicate name"
        assert parameter.maximum <= VALUE_MASK, "parameters: maximum too large"
        self._names.append(parameter.name)
        self._bounds[parameter.name] = Bounds(
            minimum=parameter.minimum, maximum=parameter.maximum, unit=parameter.unit
        )
        self._check_bounds(parameter.name, parameter.value)
        self._write(parameter.name, parameter.value, 0)
        log ParameterChanged(name=parameter.name, old_value=0, new_value=parameter.value, revision=0)
    self._check_relations()
    self._pack_terms()


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
def set_value(name: bytes32, new_value: uint256):
    """
    @notice Change a parameter within its bounds; makes a new revision. Owner only.
    @param name The parameter's name, ASCII, left-aligned in 32 bytes.
    """
    ownable._check_owner()
    old_value: uint256 = self._value(name)
    self._check_bounds(name, new_value)
    revision: uint256 = self._revision + 1
    assert revision <= MAX_REVISION, "parameters: too many revisions"
    self._revision = revision
    self._write(name, new_value, revision)
    self._check_relations()
    old_terms: uint256 = self._terms
    self._pack_terms()
    self._ease(old_terms)
    log ParameterChanged(name=name, old_value=old_value, new_value=new_value, revision=revision)


@external
@view
def value(name: bytes32) -> uint256:
    """
    @notice The present value of a parameter. Reverts for an unknown name.
    """
    return self._value(name)


@external
@view
def value_at(name: bytes32, at_revision: uint256) -> uint256:
    """
    @notice The value that a parameter had in revision `at_revision`. Reverts for a revision still to come.
    """
    assert at_revision <= self._revision, "parameters: unknown revision"
    word: uint256 = self._current[name]
    assert word != 0, "parameters: unknown name"
    if (word >> VALUE_BITS) & REVISION_MASK <= at_revision:
        return word & VALUE_MASK
    # Invariant: entries below `low` are not later than the revision, those from `high` on are; entry 0 has revision 0.
    low: uint256 = 1
    high: uint256 = self._history_length[name]
    for _: uint256 in range(SEARCH_STEPS):
        if low == high:
            break
        middle: uint256 = (low + high) // 2
        if (self._history[name][middle] >> VALUE_BITS) & REVISION_MASK <= at_revision:
            low = middle + 1
        else:
            high = middle
    return self._history[name][low - 1] & VALUE_MASK


@external
@view
def revision() -> uint256:
    """
    @notice How many changes were made since deployment; revision 0 is the deployment itself.
    """
    return self._revision


@external
@view
def batch_terms() -> IParameters.BatchTerms:
    """
    @notice The revision and the values that a batch commitment needs. Stake is locked by the easiest numbers of the last
            challenge_window: what a node signed before a change, it must be able to commit with the stake it counted on.
    """
    terms: IParameters.BatchTerms = self._unpacked(self._terms)
    eased: uint256 = self._eased
    if block.timestamp < eased >> EASED_UNTIL:
        terms.eased_lock = min(terms.eased_lock, eased & ((1 << LOCK_BITS) - 1))
        terms.eased_divisor = max(terms.eased_divisor, (eased >> LOCK_BITS) & (2**64 - 1))
    return terms


@external
@view
def describe(name: bytes32) -> (uint256, uint256, uint256, String[32]):
    """
    @notice (value, minimum, maximum, unit) of a parameter. Reverts for an unknown name.
    """
    bounds: Bounds = self._bounds[name]
    return self._value(name), bounds.minimum, bounds.maximum, bounds.unit


@external
@view
def names() -> DynArray[bytes32, MAX_NAMES]:
    """
    @notice All names, in the order of deployment.
    """
    return self._names


@internal
@view
def _value(name: bytes32) -> uint256:
    word: uint256 = self._current[name]
    assert word != 0, "parameters: unknown name"
    return word & VALUE_MASK


@internal
def _write(name: bytes32, new_value: uint256, revision: uint256):
    word: uint256 = PRESENT | (revision << VALUE_BITS) | new_value
    length: uint256 = self._history_length[name]
    self._history[name][length] = word
    self._history_length[name] = length + 1
    self._current[name] = word


@internal
@view
def _check_bounds(name: bytes32, new_value: uint256):
    assert self._bounds[name].minimum <= new_value, "parameters: below minimum"
    assert new_value <= self._bounds[name].maximum, "parameters: above maximum"


@internal
@view
def _check_relations():
    """
    @dev Stake and escrow must stay in reach for as long as a case about them can be opened and answered: a challenge at
         the window's end is answered one response_window later and keeps the window open for another one, at whose end
         an accusation may begin.
    """
    longest: uint256 = self._value(parameter_names.CHALLENGE_WINDOW)
    longest += 2 * self._value(parameter_names.RESPONSE_WINDOW)
    longest += self._value(parameter_names.REVEAL_WINDOW) + self._value(parameter_names.CONTEST_WINDOW)
    longest += 2 * self._value(parameter_names.DISPUTE_CLOCK)
    assert self._value(parameter_names.UNBONDING_PERIOD) >= longest, "parameters: unbonding_period too short"
    assert self._value(parameter_names.THAW_PERIOD) >= longest, "parameters: thaw_period too short"


@internal
@pure
def _unpacked(word: uint256) -> IParameters.BatchTerms:
    """
    @dev The terms of a word, with the lock that follows from them alone.
    """
    rates: uint256 = word >> (LOCK_BITS + WINDOW_BITS)
    rate_mask: uint256 = (1 << RATE_BITS) - 1
    audit_rate: uint256 = rates & rate_mask
    detection_power: uint256 = (rates >> RATE_BITS) & rate_mask
    reward_share: uint256 = (rates >> (2 * RATE_BITS)) & rate_mask
    minimum_lock: uint256 = word & ((1 << LOCK_BITS) - 1)
    return IParameters.BatchTerms(
        revision=rates >> (3 * RATE_BITS),
        audit_rate=audit_rate,
        detection_power=detection_power,
        reward_share=reward_share,
        challenge_window=(word >> LOCK_BITS) & ((1 << WINDOW_BITS) - 1),
        minimum_lock=minimum_lock,
        eased_lock=minimum_lock,
        eased_divisor=audit_rate * detection_power * (PPM - reward_share),
    )


@internal
def _ease(old_word: uint256):
    """
    @dev Where the present terms lock more than those of `old_word`, these count for one challenge_window more. Lock and
         divisor count each by itself: after several changes a lock may be easier than any of the terms made it.
    """
    old: IParameters.BatchTerms = self._unpacked(old_word)
    new: IParameters.BatchTerms = self._unpacked(self._terms)
    if new.minimum_lock <= old.minimum_lock and new.eased_divisor >= old.eased_divisor:
        return
    lock: uint256 = old.minimum_lock
    divisor: uint256 = old.eased_divisor
    eased: uint256 = self._eased
    if block.timestamp < eased >> EASED_UNTIL:
        lock = min(lock, eased & ((1 << LOCK_BITS) - 1))
        divisor = max(divisor, (eased >> LOCK_BITS) & (2**64 - 1))
    until: uint256 = block.timestamp + old.challenge_window
    self._eased = (until << EASED_UNTIL) | (divisor << LOCK_BITS) | lock


@internal
def _pack_terms():
    rates: uint256 = self._revision
    order: bytes32[3] = [parameter_names.REWARD_SHARE, parameter_names.DETECTION_POWER, parameter_names.AUDIT_RATE]
    for name: bytes32 in order:
        rate: uint256 = self._value(name)
        assert rate <= PPM, "parameters: rate above 100 percent"
        rates = (rates << RATE_BITS) | rate
    window: uint256 = self._value(parameter_names.CHALLENGE_WINDOW)
    lock: uint256 = self._value(parameter_names.MINIMUM_LOCK)
    assert window < 1 << WINDOW_BITS and lock < 1 << LOCK_BITS, "parameters: terms out of range"
    self._terms = (rates << (LOCK_BITS + WINDOW_BITS)) | (window << LOCK_BITS) | lock
