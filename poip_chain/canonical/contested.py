"""An opponent's tree, as far as one knows it: what it has shown, and all that agrees with one's own.

A contester proves inputs into the accuser's tree, of which it holds a root and the reveals of the descent. Whatever
stands left of the first difference is agreed, so inputs are one's own; but their Merkle paths end beside the way down,
where the accuser's nodes are needed. Each reveal gives 64 of them with all nodes between: the levels of two reveals meet,
so every node beside the way down is known. A subtree whose top equals one's own is one's own throughout: hashes do not
collide. What is neither cannot be known, and asking for it is refused with the reason.

Knows trees and leaves, not what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from poip_chain.canonical.opening import prove
from poip_chain.canonical.trace import Trace
from poip_chain.errors import InvalidInput
from poip_chain.spec.dispute import Descent, Node, first_difference, path_within
from poip_chain.spec.merkle import inner_hash, leaf_hash, merkle_levels
from poip_chain.spec.trace import LEAF_BYTES
from poip_chain.spec.types import Hash32


class Tree(Protocol):
    """A whole tree of one's own. `tail`: bytes of the last leaf that mean something."""

    shape: Descent
    tail: int

    def leaf(self, index: int) -> bytes:
        """128 bytes."""

    def nodes(self, level: int, first: int, count: int) -> Sequence[Hash32]:
        """Neighbouring nodes of a level."""


class TraceTree:
    """The tree of a whole trace, computed where it is asked for."""

    def __init__(self, trace: Trace) -> None:
        self.shape, self.tail, self._trace = Descent(trace.layout.count), LEAF_BYTES, trace

    def leaf(self, index: int) -> bytes:
        """A leaf."""
        return self._trace.leaf(index)

    def nodes(self, level: int, first: int, count: int) -> list[Hash32]:
        """Neighbouring nodes of a level."""
        return self._trace.nodes(level, first, count)


class MemoryTree:
    """A small tree that is all in memory: of a cell."""

    def __init__(self, leaves: Sequence[bytes], tail: int = LEAF_BYTES) -> None:
        self.shape, self.tail = Descent(len(leaves)), tail
        self._leaves, self._levels = list(leaves), merkle_levels(leaves)

    @property
    def root(self) -> Hash32:
        """The tree's root."""
        return self._levels[-1][0]

    def leaf(self, index: int) -> bytes:
        """A leaf."""
        return self._leaves[index]

    def nodes(self, level: int, first: int, count: int) -> list[Hash32]:
        """Neighbouring nodes of a level."""
        return self._levels[level][first : first + count]


def reveal(tree: Tree, node: Node) -> list[bytes]:
    """What a reveal at a node shows: up to 64 hashes, or leaves of 128 bytes where six levels or fewer are left.

    Raises InvalidInput if the tree has no such node.
    """
    shown = tree.shape.shown(node)
    if tree.shape.shows_leaves(node):
        return [tree.leaf(n.index) for n in shown]
    return list(tree.nodes(shown[0].level, shown[0].index, len(shown)))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first shown node or leaf that is not one's own: where it stands, what was shown and what one has there, and its
    siblings from below upwards to the node at which it was shown."""

    node: Node
    shown: bytes
    own: bytes
    path: tuple[Hash32, ...]


class ContestedTree:
    """The opponent's tree beside one's own. `root` is None where it is not stated but follows from the first reveal."""

    def __init__(self, own: Tree, root: bytes | None) -> None:
        self.own, self.shape = own, own.shape
        self._shown: dict[Node, tuple[bytes, ...]] = {}
        self._nodes: dict[Node, Hash32] = {} if root is None else {self.shape.root: Hash32(root)}
        self._leaves: dict[int, bytes] = {}

    @property
    def root(self) -> Hash32 | None:
        """The opponent's root, if it is known."""
        return self._nodes.get(self.shape.root)

    def add(self, node: Node, shown: Sequence[bytes]) -> None:
        """Take in a reveal; those above it come first. Raises InvalidInput if it does not hash to the opponent's node, is
        of the wrong shape, or nothing was shown above it."""
        places, is_leaf = self.shape.shown(node), self.shape.shows_leaves(node)
        size = LEAF_BYTES if is_leaf else 32
        if len(shown) != len(places) or any(len(part) != size for part in shown):
            raise InvalidInput(f"a reveal at this node shows {len(places)} times {size} bytes.")
        level = [leaf_hash(leaf) for leaf in shown] if is_leaf else [Hash32(part) for part in shown]
        low, first = places[0].level, places[0].index
        found: dict[Node, Hash32] = {}
        for height in range(low, node.level + 1):
            found.update({Node(height, first + i): value for i, value in enumerate(level)})
            pairs = [inner_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            level, first = pairs + level[len(pairs) * 2 :], first // 2
        stated = self._nodes.get(node)
        if stated is None and node != self.shape.root:
            raise InvalidInput(
                f"node {node.index} of level {node.level} was not shown yet: reveals are taken downwards."
            )
        if stated is not None and stated != found[node]:
            raise InvalidInput(f"what was shown does not hash to node {node.index} of level {node.level}.")
        self._nodes.update(found)
        self._shown[node] = tuple(bytes(part) for part in shown)
        if is_leaf:
            self._leaves.update({n.index: bytes(leaf) for n, leaf in zip(places, shown, strict=True)})

    def is_shown(self, node: Node) -> bool:
        """Whether a reveal at this node was taken in."""
        return node in self._shown

    def agrees(self, node: Node) -> bool:
        """Whether all below a node is known to be as in one's own tree."""
        above = node
        while above not in self._nodes:
            if above.level >= self.shape.height:
                return False
            above = Node(above.level + 1, above.index // 2)
        return self._nodes[above] == self.own.nodes(above.level, above.index, 1)[0]

    def hash(self, level: int, index: int) -> Hash32:
        """A node of the opponent's tree. Raises InvalidInput if it cannot be known."""
        node = Node(level, index)
        if node in self._nodes:
            return self._nodes[node]
        self._check_known(node)
        return self.own.nodes(level, index, 1)[0]

    def leaf(self, index: int) -> bytes:
        """A leaf of the opponent's tree. Raises InvalidInput if it cannot be known."""
        if index not in self._leaves:
            self._check_known(Node(0, index))
            return self.own.leaf(index)
        return self._leaves[index]

    def prove(self, indices: Sequence[int]) -> list[Hash32]:
        """The multi-leaf proof of leaves against the opponent's root. Raises InvalidInput if a node cannot be known."""
        return prove(self.hash, indices, self.shape.count)

    def difference(self, node: Node) -> Difference | None:
        """The first thing shown at a node that is not one's own; None if all is. Raises InvalidInput if nothing was shown.

        Of the last leaf only what means something counts: bytes after a cell's last running sum are no step's result.
        """
        if node not in self._shown:
            raise InvalidInput(f"nothing was shown at node {node.index} of level {node.level}: the accuser is to move.")
        theirs, own, places = self._shown[node], reveal(self.own, node), self.shape.shown(node)
        cut = self.own.tail if self.shape.shows_leaves(node) and places[-1].index == self.shape.count - 1 else None
        offset = first_difference([*theirs[:-1], theirs[-1][:cut]], [*own[:-1], own[-1][:cut]])
        if offset is None:
            return None
        hashes = [self._nodes[place] for place in places]
        return Difference(places[offset], theirs[offset], own[offset], tuple(path_within(hashes, offset)))

    def _check_known(self, node: Node) -> None:
        if not self.agrees(node):
            raise InvalidInput(
                f"the opponent's tree is not one's own above node {node.index} of level {node.level}, and what stands "
                "there was not shown: only what is before the first difference can be opened."
            )
