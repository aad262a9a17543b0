"""merkle.vy against the specification: the vectors, random trees, and the same refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec.merkle import merkle_proof, merkle_root, root_from_proof

TESTS = Path(__file__).parent.parent
VECTORS = json.loads((TESTS / "vectors" / "merkle.json").read_text())


@pytest.fixture(scope="module")
def merkle() -> Any:
    return boa.load(str(TESTS / "contracts" / "harness" / "merkle_harness.vy"))


def unhex(text: str) -> bytes:
    return bytes.fromhex(text[2:])


@pytest.mark.parametrize("tree", VECTORS[1:], ids=lambda tree: f"{len(tree['leaves'])}_leaves")
def test_vectors(merkle: Any, tree: dict[str, Any]) -> None:
    leaves = [unhex(leaf) for leaf in tree["leaves"]]
    for case in tree["proofs"]:
        indices, proof = case["indices"], [unhex(node) for node in case["proof"]]
        chosen = [leaves[i] for i in indices]
        assert merkle.root_of_many(chosen, indices, len(leaves), proof) == unhex(tree["root"])
        if len(indices) == 1:
            assert merkle.root_of_one(chosen[0], indices[0], len(leaves), proof) == unhex(tree["root"])


@st.composite
def hostile_proofs(draw: Any) -> tuple[list[bytes], list[int], int, list[bytes]]:
    """Right proofs and ones with wrong counts, indices and lengths."""
    leaves = draw(st.lists(st.binary(max_size=40), min_size=1, max_size=24))
    indices = sorted(draw(st.sets(st.integers(0, len(leaves) - 1), min_size=1, max_size=8)))
    proof = merkle_proof(leaves, indices)
    chosen = [leaves[i] for i in indices]
    count = len(leaves)
    change = draw(st.sampled_from(["none", "none", "count", "indices", "shorter", "longer", "leaves"]))
    if change == "count":
        count = draw(st.integers(0, 2**32 + 1))
    elif change == "indices":
        indices = draw(st.lists(st.integers(0, 2**33), min_size=len(indices), max_size=len(indices)))
    elif change == "shorter":
        proof = proof[:-1]
    elif change == "longer":
        proof = [*proof, bytes(32)]
    elif change == "leaves":
        chosen = chosen[:-1]
    return chosen, indices, count, list(proof)


@settings(max_examples=120)
@given(hostile_proofs())
def test_same_roots_and_refusals(merkle: Any, case: tuple[list[bytes], list[int], int, list[bytes]]) -> None:
    chosen, indices, count, proof = case
    try:
        expected = root_from_proof(chosen, indices, count, proof)
    except InvalidInput:
        with boa.reverts():
            merkle.root_of_many(chosen, indices, count, proof)
        if len(chosen) == len(indices) == 1:
            with boa.reverts():
                merkle.root_of_one(chosen[0], indices[0], count, proof)
        return
    assert merkle.root_of_many(chosen, indices, count, proof) == expected
    if len(indices) == 1:
        assert merkle.root_of_one(chosen[0], indices[0], count, proof) == expected


def test_receipt_leaf_is_the_struct_hash(merkle: Any) -> None:
    hashes = [bytes([i]) * 32 for i in range(3)]
    proof = merkle_proof(hashes, [1])
    assert merkle.root_of_hash(hashes[1], 1, 3, proof) == merkle_root(hashes)


@pytest.mark.parametrize(
    ("count", "index", "proof", "reason"),
    [
        (0, 0, [], "merkle: index is outside the tree"),
        (2**32 + 1, 0, [], "merkle: too many leaves"),
        (3, 3, [], "merkle: index is outside the tree"),
        (2, 0, [], "merkle: proof is too short"),
        (1, 0, [bytes(32)], "merkle: proof is too long"),
    ],
)
def test_reasons(merkle: Any, count: int, index: int, proof: list[bytes], reason: str) -> None:
    with boa.reverts(reason):
        merkle.root_of_one(b"a", index, count, proof)
    with boa.reverts(reason):
        merkle.root_of_many([b"a"], [index], count, proof)


def test_largest_tree(merkle: Any) -> None:
    proof = [bytes([i]) * 32 for i in range(32)]
    expected = root_from_proof([b"leaf"], [2**32 - 1], 2**32, proof)
    assert merkle.root_of_one(b"leaf", 2**32 - 1, 2**32, proof) == expected
    assert merkle.root_of_many([b"leaf"], [2**32 - 1], 2**32, proof) == expected
