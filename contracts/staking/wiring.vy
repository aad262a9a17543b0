# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Who may call the registry: the log, the slashers, and when it takes newcomers
@license AGPL-3.0-only
@dev Administration of NodeRegistry. The owner sets it up, seals it, and afterwards can only name slashers that wait.
"""

from ..governance import parameter_names
from snekmate.auth import ownable
from . import stakes

uses: ownable
uses: stakes

# The part of the commitment log that this contract calls.
interface Log:
    def next_seq(node: address) -> uint64: view


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


MAX_PAUSE: constant(uint256) = 14 * 86400

# The wiring word: the commitment log in bits 0..159 and whether the contract is sealed in bit 160.
ADDRESS_MASK: constant(uint256) = 2**160 - 1
SEALED: constant(uint256) = 2**160

intake_paused_until: public(uint64)
_wiring: uint256
_slashers: HashMap[address, uint64]


@deploy
def __init__():
    pass


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
            2 * unbonding_period, so that nobody's stake is seized under rules it could not leave: stake that a batch
            locks now is free after the batch's longest case, which Parameters keeps within one unbonding_period.
    """
    ownable._check_owner()
    assert slasher != empty(address), "registry: slasher is zero"
    old_active_at: uint64 = self._slashers[slasher]
    assert (old_active_at != 0) != allowed, "registry: slasher unchanged"
    new_active_at: uint64 = 0
    if allowed:
        active_at: uint256 = block.timestamp
        if self._wiring & SEALED != 0:
            active_at += 2 * stakes._parameter(parameter_names.UNBONDING_PERIOD)
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


@internal
@view
def _check_intake():
    assert self._wiring & SEALED != 0, "registry: not sealed"
    assert block.timestamp >= convert(self.intake_paused_until, uint256), "registry: intake is paused"


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
