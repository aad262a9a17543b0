"""The geometry of a descent: every way down a tree ends at its leaves, and every pick proves itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec.dispute import (
    LEVELS,
    MAX_SHOWN,
    Descent,
    Node,
    cell_number,
    cell_of,
    first_difference,
    fold,
    path_within,
)
from poip_chain.spec.merkle import MAX_LEAVES, leaf_hash, merkle_levels


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(1, 5000), st.randoms(use_true_random=False))
def test_every_descent_ends_at_its_leaf(count: int, rng: random.Random) -> None:
    leaves = [i.to_bytes(4, "big") for i in range(count)]
    levels, tree = merkle_levels(leaves), Descent(count)
    assert tree.height == len(levels) - 1 and [tree.size(level) for level in range(len(levels))] == list(
        map(len, levels)
    )
    target, node, moves = rng.randrange(count), tree.root, 0
    while True:
        shown = tree.shown(node)
        hashes = [levels[n.level][n.index] for n in shown]
        assert len(shown) <= MAX_SHOWN and fold(hashes) == levels[node.level][node.index]
        low = shown[0].level
        offset = (target >> low) - shown[0].index
        picked = shown[offset]
        path = path_within(hashes, offset)
        assert tree.climb(picked, hashes[offset], node.level, path) == levels[node.level][node.index]
        assert path == [levels[n.level][n.index] for n in tree.siblings(picked, node.level)]
        moves += 1
        if tree.shows_leaves(node):
            break
        node = picked
    assert picked == Node(0, target) and hashes[offset] == leaf_hash(leaves[target])
    assert moves == max(1, -(-tree.height // LEVELS))


def test_the_trace_of_a_small_model() -> None:
    tree = Descent(5_156_096)
    assert tree.height == 23 and len(tree.shown(tree.root)) == 40
    assert [len(tree.shown(Node(level, 3))) for level in (17, 11, 5)] == [64, 64, 32]
    assert len(tree.shown(Node(17, tree.size(17) - 1))) == tree.size(11) - 64 * (tree.size(17) - 1)
    assert Descent(MAX_LEAVES).height == 32 and Descent(1).height == 0


def test_a_wrong_path_gives_another_node_or_is_refused() -> None:
    rng = random.Random(1)
    levels, tree = merkle_levels([bytes([i]) for i in range(100)]), Descent(100)
    node = Node(1, 17)
    hashes = [levels[1][n.index] for n in tree.shown(tree.root)]
    path = path_within(hashes, 17)
    assert tree.climb(node, hashes[17], 7, path) == levels[7][0]
    assert tree.climb(node, hashes[18], 7, path) != levels[7][0] != tree.climb(Node(1, 16), hashes[17], 7, path)
    for wrong in (path[:-1], [*path, bytes(32)]):
        with pytest.raises(InvalidInput, match="this path has"):
            tree.climb(node, hashes[17], 7, wrong)
    with pytest.raises(InvalidInput, match="levels up"):
        Descent(10**6).siblings(Node(0, 0), 7)
    with pytest.raises(InvalidInput, match="no node 50"):
        tree.climb(Node(1, 50), hashes[17], 7, path)
    assert tree.climb(node, rng.randbytes(32), 7, path) != levels[7][0]


def test_differences_are_the_first() -> None:
    assert first_difference([b"a", b"b", b"c"], [b"a", b"x", b"y"]) == 1
    assert first_difference([b"a"], [b"a"]) is None
    with pytest.raises(InvalidInput, match="2 nodes were shown where 1 stand"):
        first_difference([b"a", b"b"], [b"a"])


def test_cells_have_numbers_of_their_own() -> None:
    assert cell_number(0, 0) == 1 and cell_number(MAX_LEAVES - 1, 31) < 2**40
    assert cell_of(cell_number(77, 13)) == (77, 13)
    for leaf, element in ((-1, 0), (MAX_LEAVES, 0), (0, 32), (0, -1)):
        with pytest.raises(InvalidInput, match="no leaf"):
            cell_number(leaf, element)


def test_trees_and_moves_have_a_size() -> None:
    for count in (0, -1, MAX_LEAVES + 1):
        with pytest.raises(InvalidInput, match=r"1 to 2\*\*32 leaves"):
            Descent(count)
    for nodes in ([], [bytes(32)] * 65):
        with pytest.raises(InvalidInput, match="1 to 64 nodes"):
            fold(nodes)
    for offset in (-1, 3):
        with pytest.raises(InvalidInput, match="no node"):
            path_within([bytes(32)] * 3, offset)
    for node in (Node(8, 0), Node(-1, 0), Node(0, 100)):
        with pytest.raises(InvalidInput, match="no node"):
            Descent(100).shown(node)
