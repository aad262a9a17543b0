# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The geometry of a descent through a trace's tree
@custom:contract-name descent
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/dispute.py. Level 0 are the leaves; a level has half the nodes of the one
        below, rounded up, and an odd last node is promoted. A move goes down six levels at once. Stateless; knows trees,
        no traces.
"""

LEVELS: constant(uint256) = 6
_MAX_HEIGHT: constant(uint256) = 32


@internal
@pure
def _size(count: uint256, level: uint256) -> uint256:
    """
    @dev Nodes of a level of a tree of `count` leaves.
    """
    return (count + (1 << level) - 1) >> level


@internal
@pure
def _height(count: uint256) -> uint256:
    """
    @dev The root's level, for 1 to 2**32 leaves.
    """
    for level: uint256 in range(_MAX_HEIGHT):
        if count <= 1 << level:
            return level
    return _MAX_HEIGHT


@internal
@pure
def _below(level: uint256) -> uint256:
    """
    @dev The level that a reveal of a node at `level` shows.
    """
    if level <= LEVELS:
        return 0
    return level - LEVELS


@internal
@pure
def _many(count: uint256, level: uint256, index: uint256) -> uint256:
    """
    @dev How many nodes a reveal of a node shows.
    """
    below: uint256 = self._below(level)
    first: uint256 = index << (level - below)
    return min(1 << (level - below), self._size(count, below) - first)


@internal
@pure
def _climb(
    count: uint256, low: uint256, index: uint256, node: bytes32, high: uint256, path: DynArray[bytes32, LEVELS]
) -> bytes32:
    """
    @dev The node at level `high` above the node at `index` of level `low`, by the siblings from below upwards.
    """
    assert index < self._size(count, low), "court: no such node"
    result: bytes32 = node
    at: uint256 = index
    used: uint256 = 0
    given: uint256 = len(path)
    for level: uint256 in range(low, high, bound=LEVELS):
        if at ^ 1 < self._size(count, level):
            assert used < given, "court: path is too short"
            if at & 1 == 1:
                result = keccak256(concat(0x01, path[used], result))
            else:
                result = keccak256(concat(0x01, result, path[used]))
            used = unsafe_add(used, 1)
        at = at >> 1
    assert used == given, "court: path is too long"
    return result
