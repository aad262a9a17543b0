# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Opened inputs of a step and their proofs
@custom:contract-name openings
@license AGPL-3.0-only
@notice Checks that bytes stand where a step reads them. Every tree is one of commitments/merkle.vy and is proven by one
        multi-leaf proof in its order; the proofs of a step follow each other in one list and each takes what it needs.
        Stateless; knows leaf numbers, not what they hold.
"""

# Of one step: most leaves, and hashes beside them. Three leaves or two runs that straddle the middle of a tree of 2**32
# leaves take 128, a row of weights fewer than 40 more where fewer leaves are read.
_MAX_LEAVES: constant(uint256) = 32
_MAX_PROOF: constant(uint256) = 160
_MAX_DEPTH: constant(uint256) = 32
_LEAF_BYTES: constant(uint256) = 128
_SEGMENT_BYTES: constant(uint256) = 256


@internal
@pure
def _root(
    hashes: DynArray[bytes32, _MAX_LEAVES],
    indices: DynArray[uint256, _MAX_LEAVES],
    count: uint256,
    proof: DynArray[bytes32, _MAX_PROOF],
    start: uint256,
) -> (bytes32, uint256):
    """
    @dev The root that the proof from `start` on gives for leaf hashes at increasing indices among `count` leaves, and
         where it ends.
    """
    known: uint256 = len(hashes)
    nodes: DynArray[bytes32, _MAX_LEAVES] = hashes
    positions: DynArray[uint256, _MAX_LEAVES] = indices
    for i: uint256 in range(1, _MAX_LEAVES):
        if i >= known:
            break
        assert positions[i - 1] < positions[i], "referee: indices must increase"
    assert positions[known - 1] < count, "referee: index is outside the tree"
    size: uint256 = count
    used: uint256 = start
    given: uint256 = len(proof)
    for _: uint256 in range(_MAX_DEPTH):
        if size == 1:
            break
        # The parents overwrite the front of the lists: a level never has more nodes than the one below.
        parents: uint256 = 0
        i: uint256 = 0
        for _step: uint256 in range(_MAX_LEAVES):
            if i == known:
                break
            position: uint256 = positions[i]
            node: bytes32 = nodes[i]
            i = unsafe_add(i, 1)
            if position & 1 == 1:
                assert used < given, "referee: proof is too short"
                node = keccak256(concat(0x01, proof[used], node))
                used = unsafe_add(used, 1)
            elif unsafe_add(position, 1) < size:
                paired: bool = False
                if i < known:
                    paired = positions[i] == unsafe_add(position, 1)
                if paired:
                    node = keccak256(concat(0x01, node, nodes[i]))
                    i = unsafe_add(i, 1)
                else:
                    assert used < given, "referee: proof is too short"
                    node = keccak256(concat(0x01, node, proof[used]))
                    used = unsafe_add(used, 1)
            nodes[parents] = node
            positions[parents] = position >> 1
            parents = unsafe_add(parents, 1)
        known = parents
        size = unsafe_add(size, 1) >> 1
    return nodes[0], used


@internal
@pure
def _hashes(leaves: Bytes[4096], offset: uint256, many: uint256) -> DynArray[bytes32, _MAX_LEAVES]:
    """
    @dev The hashes of leaves of 128 bytes from `offset` on.
    """
    hashes: DynArray[bytes32, _MAX_LEAVES] = []
    at: uint256 = offset
    for _: uint256 in range(many, bound=_MAX_LEAVES):
        hashes.append(keccak256(concat(0x00, slice(leaves, at, _LEAF_BYTES))))
        at += _LEAF_BYTES
    return hashes


@internal
@pure
def _indices(first: uint256[3], many: uint256[3]) -> DynArray[uint256, _MAX_LEAVES]:
    """
    @dev Runs of `many` from `first` on, one after the other.
    """
    indices: DynArray[uint256, _MAX_LEAVES] = []
    for run: uint256 in range(3):
        for i: uint256 in range(many[run], bound=_MAX_LEAVES):
            indices.append(first[run] + i)
    return indices


@internal
@pure
def _segment_bytes(size: uint256, number: uint256) -> uint256:
    """
    @dev The length of a segment of a row of `size` bytes: only the last is shorter than 256.
    """
    return min(_SEGMENT_BYTES, size - _SEGMENT_BYTES * number)


@internal
@pure
def _segment_count(size: uint256) -> uint256:
    return (size + _SEGMENT_BYTES - 1) // _SEGMENT_BYTES


@internal
@pure
def _root_of_nodes(nodes: DynArray[bytes32, 64]) -> bytes32:
    """
    @dev The node above a run of nodes of one level: up to six levels up. The run must start at a multiple of 64 (or be
         the whole level) and be shorter than 64 only where the level ends.
    """
    level: DynArray[bytes32, 64] = nodes
    size: uint256 = len(nodes)
    assert size != 0, "referee: no nodes"
    for _: uint256 in range(6):
        if size == 1:
            break
        at: uint256 = 0
        if size & 3 == 0:
            # Two levels at once: half the loads and stores of a whole run of 64. No index leaves the list.
            size = size >> 2
            for i: uint256 in range(size, bound=16):
                left: bytes32 = keccak256(concat(0x01, level[at], level[unsafe_add(at, 1)]))
                right: bytes32 = keccak256(concat(0x01, level[unsafe_add(at, 2)], level[unsafe_add(at, 3)]))
                level[i] = keccak256(concat(0x01, left, right))
                at = unsafe_add(at, 4)
            continue
        for i: uint256 in range(size >> 1, bound=32):
            level[i] = keccak256(concat(0x01, level[at], level[unsafe_add(at, 1)]))
            at = unsafe_add(at, 2)
        if size & 1 == 1:
            level[size >> 1] = level[size - 1]
        size = (size + 1) >> 1
    return level[0]
