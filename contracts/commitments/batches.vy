# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title What the commitment log remembers of batches and nodes: one storage slot each
@custom:contract-name batches
@license AGPL-3.0-only
@notice Batch slot: the highest 240 bits of keccak(abi.encode(Batch)), 2 bits of status, 14 bits of open cases. Whoever
        acts on a batch passes its struct, which the hash pins. Node slot: 64 bits of next seq, 24 bits of audit rate
        raise in ppm, 168 bits of running total of fees.
"""

from ..disputes import objects

ABSENT: constant(uint256) = 0
PENDING: constant(uint256) = 1
FINAL: constant(uint256) = 2
CONVICTED: constant(uint256) = 3

_CASES_MASK: constant(uint256) = 2**14 - 1
_STATE_MASK: constant(uint256) = 2**16 - 1
_SEQ_MASK: constant(uint256) = 2**64 - 1
_RAISE_MASK: constant(uint256) = 2**24 - 1

batch_count: uint256
_batches: HashMap[uint256, uint256]
_nodes: HashMap[address, uint256]


@deploy
def __init__():
    pass


@internal
def _new_id() -> uint64:
    """
    @dev Ids count from 1: id 0 means "no batch" in evidence.
    """
    self.batch_count += 1
    return convert(self.batch_count, uint64)


@internal
def _store(batch: objects.Batch):
    """
    @dev Remember a new batch as pending.
    """
    self._batches[convert(batch.id, uint256)] = self._pinned(batch) | (PENDING << 14)


@internal
@view
def _status_of(batch: objects.Batch) -> uint256:
    """
    @dev The status of this very batch; ABSENT if another one or none stands under its id.
    """
    slot: uint256 = self._batches[convert(batch.id, uint256)]
    if slot == 0 or (slot & ~_STATE_MASK) != self._pinned(batch):
        return ABSENT
    return (slot & _STATE_MASK) >> 14


@internal
@view
def _status(batch_id: uint64) -> uint256:
    return (self._batches[convert(batch_id, uint256)] & _STATE_MASK) >> 14


@internal
@view
def _open_cases(batch_id: uint64) -> uint256:
    return self._batches[convert(batch_id, uint256)] & _CASES_MASK


@internal
def _set_status(batch_id: uint64, status: uint256):
    """
    @dev Keeps the hash and the count of open cases.
    """
    slot: uint256 = self._batches[convert(batch_id, uint256)]
    self._batches[convert(batch_id, uint256)] = (slot & ~(3 << 14)) | (status << 14)


@internal
def _add_case(batch_id: uint64):
    slot: uint256 = self._batches[convert(batch_id, uint256)]
    assert slot & _CASES_MASK < _CASES_MASK, "log: too many open cases"
    self._batches[convert(batch_id, uint256)] = slot + 1


@internal
def _remove_case(batch_id: uint64):
    """
    @dev The caller has checked that a case is open.
    """
    assert self._open_cases(batch_id) != 0, "log: no open case"
    self._batches[convert(batch_id, uint256)] -= 1


@internal
@view
def _node(node: address) -> (uint256, uint256, uint256):
    """
    @dev (next seq, audit rate raise in ppm, running total of fees).
    """
    slot: uint256 = self._nodes[node]
    return slot & _SEQ_MASK, (slot >> 64) & _RAISE_MASK, slot >> 88


@internal
def _set_node(node: address, next_seq: uint256, audit_raise: uint256, node_cum: uint256):
    assert next_seq <= _SEQ_MASK, "log: seq does not fit"
    assert node_cum < 2**168, "log: total of fees does not fit"
    self._nodes[node] = next_seq | (audit_raise << 64) | (node_cum << 88)


@internal
@pure
def _pinned(batch: objects.Batch) -> uint256:
    return convert(objects._batch_hash(batch), uint256) & ~_STATE_MASK
