# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Position-indexed Merkle proofs
@custom:contract-name merkle
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/merkle.py:
            leaf = keccak(0x00 || bytes)      inner = keccak(0x01 || left || right)
        Order is evidence, so pairs are never sorted. An odd node at the end of a level is promoted unchanged. A tree
        does not commit to its own size: every function takes the leaf count from whoever committed to the root.
        A multi-leaf proof lists the missing siblings level by level from the leaves up, left to right within a level.
        A badly shaped proof reverts; a well-shaped wrong one gives a wrong root. Stateless.
"""

# Enough for one challenge's chunk of leaves and for its proof in a tree of 2**32 leaves.
MAX_INDICES: constant(uint256) = 8
MAX_PROOF: constant(uint256) = 64
_MAX_DEPTH: constant(uint256) = 32


@internal
@pure
def _leaf_of_hash(data: bytes32) -> bytes32:
    """
    @dev The leaf that holds 32 bytes, such as a receipt's struct hash.
    """
    return keccak256(concat(0x00, data))


@internal
@pure
def _leaf(data: Bytes[512]) -> bytes32:
    """
    @dev The leaf that holds `data`.
    """
    return keccak256(concat(0x00, data))


@internal
@pure
def _inner(left: bytes32, right: bytes32) -> bytes32:
    return keccak256(concat(0x01, left, right))


@internal
@pure
def _root_of_one(leaf: bytes32, index: uint256, count: uint256, proof: DynArray[bytes32, 32]) -> bytes32:
    """
    @dev The root that `proof` gives for a leaf hash at `index` among `count` leaves (1 to 2**32).
    """
    assert count <= 2**32, "merkle: too many leaves"
    assert index < count, "merkle: index is outside the tree"
    node: bytes32 = leaf
    position: uint256 = index
    size: uint256 = count
    used: uint256 = 0
    for _: uint256 in range(_MAX_DEPTH):
        if size == 1:
            break
        if (position ^ 1) < size:
            assert used < len(proof), "merkle: proof is too short"
            if position & 1 == 1:
                node = self._inner(proof[used], node)
            else:
                node = self._inner(node, proof[used])
            used += 1
        position = position >> 1
        size = (size + 1) >> 1
    assert used == len(proof), "merkle: proof is too long"
    return node


@internal
@pure
def _root_of_many(
    leaves: DynArray[bytes32, MAX_INDICES],
    indices: DynArray[uint256, MAX_INDICES],
    count: uint256,
    proof: DynArray[bytes32, MAX_PROOF],
) -> bytes32:
    """
    @dev The root that `proof` gives for leaf hashes at strictly increasing `indices` among `count` leaves.
    """
    assert count <= 2**32, "merkle: too many leaves"
    known: uint256 = len(indices)
    assert known != 0 and known == len(leaves), "merkle: one leaf per index"
    nodes: DynArray[bytes32, MAX_INDICES] = leaves
    positions: DynArray[uint256, MAX_INDICES] = indices
    for i: uint256 in range(1, MAX_INDICES):
        if i < known:
            assert positions[i - 1] < positions[i], "merkle: indices must increase"
    assert positions[known - 1] < count, "merkle: index is outside the tree"

    size: uint256 = count
    used: uint256 = 0
    for _: uint256 in range(_MAX_DEPTH):
        if size == 1:
            break
        # The parents overwrite the front of the lists: a level never has more nodes than the one below.
        parents: uint256 = 0
        i: uint256 = 0
        for _step: uint256 in range(MAX_INDICES):
            if i == known:
                break
            position: uint256 = positions[i]
            node: bytes32 = nodes[i]
            i += 1
            paired: bool = False
            if position & 1 == 0 and i < known:
                paired = positions[i] == position + 1
            if paired:
                node = self._inner(node, nodes[i])
                i += 1
            elif (position ^ 1) < size:
                assert used < len(proof), "merkle: proof is too short"
                if position & 1 == 1:
                    node = self._inner(proof[used], node)
                else:
                    node = self._inner(node, proof[used])
                used += 1
            nodes[parents] = node
            positions[parents] = position >> 1
            parents += 1
        known = parents
        size = (size + 1) >> 1
    assert used == len(proof), "merkle: proof is too long"
    return nodes[0]
