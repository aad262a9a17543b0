"""Merkle trees and multi-leaf proofs: the vectors, every shape of small trees, and hostile proofs."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from eth_hash.auto import keccak
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec.merkle import (
    inner_hash,
    leaf_hash,
    merkle_levels,
    merkle_proof,
    merkle_root,
    root_from_proof,
    verify_proof,
)

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "merkle.json").read_text())


def unhex(text: str) -> bytes:
    return bytes.fromhex(text[2:])


@st.composite
def chosen_leaves(draw: Any) -> tuple[list[bytes], list[int]]:
    leaves = draw(st.lists(st.binary(max_size=70), min_size=1, max_size=40))
    indices = draw(st.sets(st.integers(0, len(leaves) - 1), min_size=1))
    return leaves, sorted(indices)


@pytest.mark.parametrize("tree", VECTORS, ids=lambda tree: f"{len(tree['leaves'])}_leaves")
def test_vectors(tree: dict[str, Any]) -> None:
    leaves = [unhex(leaf) for leaf in tree["leaves"]]
    assert merkle_root(leaves) == unhex(tree["root"])
    for case in tree["proofs"]:
        proof = [unhex(node) for node in case["proof"]]
        indices = case["indices"]
        assert merkle_proof(leaves, indices) == proof
        assert root_from_proof([leaves[i] for i in indices], indices, len(leaves), proof) == unhex(tree["root"])


def test_definitions() -> None:
    assert merkle_root([]) == bytes(32)
    assert merkle_root([b"a"]) == leaf_hash(b"a") == keccak(b"\x00a")
    a, b, c = (leaf_hash(x) for x in (b"a", b"b", b"c"))
    assert inner_hash(a, b) == keccak(b"\x01" + a + b)
    assert merkle_root([b"a", b"b", b"c"]) == inner_hash(inner_hash(a, b), c), "the odd node is promoted"
    assert merkle_levels([b"a", b"b", b"c"])[1][1] == c


def test_every_selection_of_small_trees() -> None:
    for count in range(1, 10):
        leaves = [bytes([i]) for i in range(count)]
        root = merkle_root(leaves)
        for size in range(1, count + 1):
            for indices in combinations(range(count), size):
                proof = merkle_proof(leaves, indices)
                assert root_from_proof([leaves[i] for i in indices], indices, count, proof) == root


@given(chosen_leaves())
def test_round_trip(case: tuple[list[bytes], list[int]]) -> None:
    leaves, indices = case
    proof = merkle_proof(leaves, indices)
    assert verify_proof(merkle_root(leaves), [leaves[i] for i in indices], indices, len(leaves), proof)


@given(chosen_leaves(), st.data())
def test_another_leaf_index_or_sibling_is_refused(case: tuple[list[bytes], list[int]], data: st.DataObject) -> None:
    leaves, indices = case
    root, proof = merkle_root(leaves), merkle_proof(leaves, indices)
    chosen = [leaves[i] for i in indices]
    at = data.draw(st.integers(0, len(chosen) - 1))
    assert not verify_proof(root, [*chosen[:at], chosen[at] + b"!", *chosen[at + 1 :]], indices, len(leaves), proof)
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        assert not verify_proof(root, chosen, indices, len(leaves), [*proof[:at], bytes(32), *proof[at + 1 :]])
        assert not verify_proof(root, chosen, indices, len(leaves), proof[:-1])
    assert not verify_proof(root, chosen, indices, len(leaves), [*proof, bytes(32)])


def test_order_is_evidence() -> None:
    assert merkle_root([b"a", b"b"]) != merkle_root([b"b", b"a"])
    proof = merkle_proof([b"a", b"b"], [0])
    assert not verify_proof(merkle_root([b"a", b"b"]), [b"a"], [1], 2, proof)


def test_an_inner_node_is_no_leaf() -> None:
    leaves = [b"a", b"b"]
    inner = leaf_hash(b"a") + leaf_hash(b"b")
    assert merkle_root([inner]) != merkle_root(leaves)
    assert merkle_root([b"\x01" + inner]) != merkle_root(leaves)


@pytest.mark.parametrize(
    ("leaves", "indices", "count", "proof", "message"),
    [
        ([b"a"], [0], 0, [], "1 to 2\\*\\*32 leaves"),
        ([b"a"], [0], 2**32 + 1, [], "1 to 2\\*\\*32 leaves"),
        ([], [], 1, [], "at least one index"),
        ([b"a", b"b"], [1, 0], 2, [], "strictly increase"),
        ([b"a", b"b"], [0, 0], 2, [], "strictly increase"),
        ([b"a"], [1], 1, [], "outside a tree of 1 leaves"),
        ([b"a"], [-1], 1, [], "outside"),
        ([b"a", b"b"], [0], 2, [bytes(32)], "one leaf per index"),
        ([b"a"], [0], 2, [], "too short"),
        ([b"a"], [0], 1, [bytes(32)], "too long"),
        ([b"a"], [0], 2, [bytes(31)], "32 bytes"),
    ],
)
def test_bad_shapes(leaves: list[bytes], indices: list[int], count: int, proof: list[bytes], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        root_from_proof(leaves, indices, count, proof)
    assert not verify_proof(bytes(32), leaves, indices, count, proof)
