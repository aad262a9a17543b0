"""The descent through a trace's tree in a dispute: where a contest can stand, what a reveal brings, how a pick is proven.

Level 0 are the leaves; a level has half the nodes of the one below, rounded up, and an odd last node is promoted. A
contest stands at one node. A reveal shows the nodes six levels below it, in order; where six levels or fewer are left it
brings the leaves themselves. The contester names the first that differs from its own, and stands there next. So every
input of what is left at the end was agreed.

    5,156,096 leaves: height 23; reveals at levels 23, 17, 11 (64 hashes, 40 in the first) and 5 (32 leaves of 128 bytes)

A linear or attention cell is opened into a tree of its own (`referee.py`) and descended in the same way. `cell_number`
names it among all trees of one accusation; the trace itself is 0.

contracts/disputes/descent.vy is the second writing. This file knows trees; no traces, no clocks, no chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec.merkle import MAX_LEAVES, inner_hash
from poip_chain.spec.types import Hash32

LEVELS = 6
"""Levels that one move goes down."""
MAX_SHOWN = 1 << LEVELS
TRACE = 0
"""The number of the trace's own tree."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a tree: `index` in its level, level 0 being the leaves."""

    level: int
    index: int


@dataclass(frozen=True, slots=True)
class Descent:
    """The shape of a tree of `count` leaves, 1 to 2**32. Raises InvalidInput for another count."""

    count: int

    def __post_init__(self) -> None:
        if not 0 < self.count <= MAX_LEAVES:
            raise InvalidInput(f"a tree has 1 to 2**32 leaves, not {self.count}.")

    @property
    def height(self) -> int:
        """The root's level."""
        return (self.count - 1).bit_length()

    @property
    def root(self) -> Node:
        """Where every descent begins."""
        return Node(self.height, 0)

    def size(self, level: int) -> int:
        """Nodes of a level."""
        return -(-self.count >> level)

    def shows_leaves(self, node: Node) -> bool:
        """Whether a reveal at `node` brings leaves instead of hashes."""
        return node.level <= LEVELS

    def shown(self, node: Node) -> list[Node]:
        """What a reveal at `node` shows, in order. Raises InvalidInput if the tree has no such node."""
        self._check(node)
        low = max(0, node.level - LEVELS)
        first = node.index << (node.level - low)
        end = min(first + (1 << (node.level - low)), self.size(low))
        return [Node(low, index) for index in range(first, end)]

    def siblings(self, node: Node, high: int) -> list[Node]:
        """The nodes that prove `node` into its ancestor at level `high`, from below upwards. Raises InvalidInput."""
        self._check(node)
        if not node.level <= high <= min(node.level + LEVELS, self.height):
            raise InvalidInput(f"a path from level {node.level} leads at most {LEVELS} levels up, not to {high}.")
        found = []
        for level in range(node.level, high):
            sibling = (node.index >> (level - node.level)) ^ 1
            if sibling < self.size(level):
                found.append(Node(level, sibling))
        return found

    def climb(self, node: Node, value: bytes, high: int, path: Sequence[bytes]) -> Hash32:
        """The ancestor of `node` at level `high` that its hash and the siblings' give. Raises InvalidInput if their number
        is wrong."""
        siblings = self.siblings(node, high)
        if len(siblings) != len(path):
            raise InvalidInput(f"this path has {len(siblings)} hashes, not {len(path)}.")
        result = Hash32(value)
        for sibling, other in zip(siblings, path, strict=True):
            result = inner_hash(other, result) if sibling.index % 2 == 0 else inner_hash(result, other)
        return result

    def _check(self, node: Node) -> None:
        if not 0 <= node.level <= self.height or not 0 <= node.index < self.size(node.level):
            raise InvalidInput(f"a tree of {self.count} leaves has no node {node.index} at level {node.level}.")


def fold(nodes: Sequence[bytes]) -> Hash32:
    """The node above a whole run of shown nodes. Raises InvalidInput if there are none, or more than a move shows."""
    if not 0 < len(nodes) <= MAX_SHOWN:
        raise InvalidInput(f"a move shows 1 to {MAX_SHOWN} nodes, not {len(nodes)}.")
    level = [Hash32(node) for node in nodes]
    while len(level) > 1:
        parents = [inner_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = parents + level[len(parents) * 2 :]
    return level[0]


def path_within(nodes: Sequence[bytes], offset: int) -> list[Hash32]:
    """The siblings of shown node number `offset`, from below upwards, out of the whole run. Raises InvalidInput."""
    if not 0 <= offset < len(nodes) <= MAX_SHOWN:
        raise InvalidInput(f"there is no node {offset} among {len(nodes)} shown.")
    level, path = [Hash32(node) for node in nodes], []
    while len(level) > 1:
        if offset ^ 1 < len(level):
            path.append(level[offset ^ 1])
        parents = [inner_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level, offset = parents + level[len(parents) * 2 :], offset // 2
    return path


def first_difference(shown: Sequence[bytes], own: Sequence[bytes]) -> int | None:
    """The number of the first shown node or leaf that is not one's own; None if all are. Raises InvalidInput."""
    if len(shown) != len(own):
        raise InvalidInput(f"{len(shown)} nodes were shown where {len(own)} stand.")
    return next((i for i, (theirs, ours) in enumerate(zip(shown, own, strict=True)) if theirs != ours), None)


def asked_cell(terms_hash: bytes, cell: int) -> Hash32:
    """What the accuser names with the top of a cell's tree: keccak(hash of the accusation's terms || cell).

    Nothing proves what is shown there. Without this a reorganisation could put it under another cell.
    """
    return Hash32(keccak(terms_hash + cell.to_bytes(32, "big")))


def cell_number(leaf: int, element: int) -> int:
    """The number of the tree into which a cell is opened. Raises InvalidInput."""
    if not 0 <= leaf < MAX_LEAVES or not 0 <= element < 32:
        raise InvalidInput(f"a trace has no leaf {leaf} with an element {element}.")
    return 1 + 32 * leaf + element


def cell_of(number: int) -> tuple[int, int]:
    """(leaf, element) of a numbered tree that is not the trace's own."""
    return divmod(number - 1, 32)
