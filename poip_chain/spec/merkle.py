"""Position-indexed Merkle trees over byte strings (protocol section 3).

    leaf  = keccak(0x00 || bytes)        inner = keccak(0x01 || left || right)

Order is evidence, so pairs are never sorted. An odd node at the end of a level is promoted unchanged. The empty tree
has the root bytes32(0). A tree does not commit to its own size: whoever commits to a root commits to the leaf count
beside it, and every check here takes that count.

A multi-leaf proof lists the missing sibling hashes level by level from the leaves up, left to right within a level.
A proof for one leaf is the same thing with one index. `contracts/commitments/merkle.vy` is the second writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec.types import ZERO_HASH, Hash32

MAX_LEAVES = 2**32


def leaf_hash(data: bytes) -> Hash32:
    """The hash of a leaf that holds `data` (any length)."""
    return Hash32(keccak(b"\x00" + data))


def inner_hash(left: bytes, right: bytes) -> Hash32:
    """The hash of an inner node over two 32-byte children."""
    return Hash32(keccak(b"\x01" + left + right))


def merkle_levels(leaves: Sequence[bytes]) -> list[list[Hash32]]:
    """All levels of the tree over `leaves`, leaf hashes first, the root's level (one node) last; [] if empty."""
    if not leaves:
        return []
    level = [leaf_hash(leaf) for leaf in leaves]
    levels = [level]
    while len(level) > 1:
        parents = [inner_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            parents.append(level[-1])
        levels.append(parents)
        level = parents
    return levels


def merkle_root(leaves: Sequence[bytes]) -> Hash32:
    """The root over `leaves` in order; bytes32(0) if there are none."""
    levels = merkle_levels(leaves)
    return levels[-1][0] if levels else ZERO_HASH


def merkle_proof(leaves: Sequence[bytes], indices: Sequence[int]) -> list[Hash32]:
    """The proof that the leaves at `indices` (strictly increasing) belong to the tree over `leaves`.

    Raises InvalidInput if an index is out of range or the indices do not increase.
    """
    _check_indices(indices, len(leaves))
    proof: list[Hash32] = []
    known = list(indices)
    for level in merkle_levels(leaves)[:-1]:
        for i in known:
            sibling = i ^ 1
            if sibling < len(level) and sibling not in known:
                proof.append(level[sibling])
        known = sorted({i // 2 for i in known})
    return proof


def root_from_proof(leaves: Sequence[bytes], indices: Sequence[int], count: int, proof: Sequence[bytes]) -> Hash32:
    """The root that `proof` gives for `leaves` standing at `indices` (strictly increasing) among `count` leaves.

    Raises InvalidInput if the shape is wrong: no leaf, an index out of range, a proof too short or too long, or a
    sibling that is not 32 bytes. A wrong but well-shaped proof gives a wrong root: compare it.
    """
    _check_indices(indices, count)
    if len(leaves) != len(indices):
        raise InvalidInput(f"{len(leaves)} leaves for {len(indices)} indices: a proof needs one leaf per index.")
    if any(len(node) != 32 for node in proof):
        raise InvalidInput("every hash of a Merkle proof must be 32 bytes.")
    nodes = [(i, leaf_hash(leaf)) for i, leaf in zip(indices, leaves, strict=True)]
    siblings = iter(proof)
    size = count
    while size > 1:
        parents: list[tuple[int, Hash32]] = []
        position = 0
        while position < len(nodes):
            i, node = nodes[position]
            position += 1
            if i % 2 == 0 and position < len(nodes) and nodes[position][0] == i + 1:
                node = inner_hash(node, nodes[position][1])
                position += 1
            elif (i ^ 1) < size:
                sibling = next(siblings, None)
                if sibling is None:
                    raise InvalidInput("the Merkle proof is too short for these indices and this leaf count.")
                node = inner_hash(sibling, node) if i % 2 else inner_hash(node, sibling)
            parents.append((i // 2, node))
        nodes = parents
        size = (size + 1) // 2
    if next(siblings, None) is not None:
        raise InvalidInput("the Merkle proof is too long for these indices and this leaf count.")
    return nodes[0][1]


def verify_proof(
    root: bytes, leaves: Sequence[bytes], indices: Sequence[int], count: int, proof: Sequence[bytes]
) -> bool:
    """Whether `leaves` stand at `indices` in the tree of `count` leaves with this root. Never raises on bad shapes."""
    try:
        return root_from_proof(leaves, indices, count, proof) == root
    except InvalidInput:
        return False


def _check_indices(indices: Sequence[int], count: int) -> None:
    if not 0 < count <= MAX_LEAVES:
        raise InvalidInput(f"a Merkle proof needs a tree of 1 to 2**32 leaves, not {count}.")
    if not indices:
        raise InvalidInput("a Merkle proof needs at least one index.")
    if any(b <= a for a, b in pairwise(indices)):
        raise InvalidInput("the indices of a Merkle proof must strictly increase.")
    if indices[0] < 0 or indices[-1] >= count:
        raise InvalidInput(f"index {indices[-1]} is outside a tree of {count} leaves.")
