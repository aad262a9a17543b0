"""Traces that lie: an element, a leaf, a node or a cell's tree is false, what follows is recomputed or is not.

`Lie` (of the package) falsifies an element in the engine, so that all that reads it follows. `LyingTrace` falsifies what a
player says: it holds all leaves and nodes, so small models only. Knows no game.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from poip_chain.canonical import weights as canonical_weights
from poip_chain.canonical.model import CanonicalModel
from poip_chain.canonical.opening import SUMS_PER_LEAF
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weight_tree import WeightTree
from poip_chain.service.court.lies import Lie, LyingModel
from poip_chain.spec.merkle import inner_hash, merkle_levels
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import Cell, Referee, build_attention
from poip_chain.spec.trace import WIDE, Op, decode, encode
from poip_chain.spec.types import Hash32
from tests.vectors.generate_canonical import integer_weights


@cache
def model(config: ModelConfig, lie: Lie | None = None) -> CanonicalModel:
    """The engine over `integer_weights(config, 5)`, honest or not."""
    weights = canonical_weights.from_rows(config, integer_weights(config, 5).rows)
    if lie is None:
        return CanonicalModel(weights, 1, "float64")
    return LyingModel.over(CanonicalModel(weights, 1, "float64"), lie)


@cache
def weight_tree(config: ModelConfig) -> WeightTree:
    """The tree of its weights."""
    return WeightTree(model(config).weights)


@dataclass
class Changes:
    """What a LyingTrace says instead: leaves by index, nodes by (level, index), running sums and sub-traces by cell."""

    leaves: Mapping[int, bytes] = field(default_factory=dict)
    nodes: Mapping[tuple[int, int], bytes] = field(default_factory=dict)
    sums: Mapping[Cell, list[int]] = field(default_factory=dict)
    subs: Mapping[Cell, list[bytes]] = field(default_factory=dict)


class LyingTrace(Trace):
    """A trace with changes, its root rebuilt over them."""

    def __init__(self, model: CanonicalModel, tokens: Sequence[int], output_tokens: int, changes: Changes) -> None:
        super().__init__(model, tokens, output_tokens)
        self.changes = changes
        leaves = [super(LyingTrace, self).leaf(i) for i in range(self.layout.count)]
        for index, leaf in changes.leaves.items():
            leaves[index] = leaf
        self.leaves, self.levels = leaves, merkle_levels(leaves)
        for (level, index), node in sorted(changes.nodes.items()):
            self.levels[level][index] = Hash32(node)
            for height in range(level, len(self.levels) - 1):
                pair, index = self.levels[height][index & ~1 : (index & ~1) + 2], index // 2
                self.levels[height + 1][index] = inner_hash(*pair) if len(pair) == 2 else pair[0]
        self.root = self.levels[-1][0]

    def leaf(self, index: int) -> bytes:
        return self.leaves[index]

    def nodes(self, level: int, first: int, count: int) -> list[Hash32]:
        return self.levels[level][first : first + count]

    def partial_sums(self, cell: Cell) -> list[int]:
        return self.changes.sums.get(cell) or super().partial_sums(cell)

    def attention(self, cell: Cell) -> list[bytes]:
        return self.changes.subs.get(cell) or super().attention(cell)


def changed_leaf(trace: Trace, index: int, element: int, by: int = 1) -> bytes:
    """A leaf of a trace with one element off, padding included."""
    wide = trace.layout.locate(index).tensor.op in WIDE
    values = decode(trace.leaf(index), wide)
    values[element] += by
    return encode(values, wide)


class _Inside:
    """A trace's inputs with another tree of one cell."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.leaf, self.token = trace.leaf, trace.token
        self.exponent, self.segment = trace.exponent, trace.segment
        self.sums: list[int] = []
        self.subs: dict[int, bytes] = {}

    def partial_sum(self, _cell: Cell, segment: int) -> int:
        return self.sums[segment]

    def sub_leaf(self, _cell: Cell, index: int) -> bytes:
        return self.subs[index]


def consistent_lie(trace: Trace, cell: Cell, number: int, element: int, by: int) -> Changes:
    """A cell whose own tree is off by `by` at one place; the rest of the tree and the cell follow from that.

    Where the cell's value comes out as it was, it is made one larger: then it does not follow. Raises InvalidInput if
    what follows is impossible.
    """
    inside = _Inside(trace)
    referee = Referee(trace.layout, inside)
    place = trace.layout.locate(cell.index)
    if place.tensor.op is Op.ATTENTION:
        parts = referee.attention_parts(cell)
        told = [0] * parts.count

        def store(index: int, leaf: bytes) -> None:
            # A leaf is stored after each of its elements: what comes later reads the false one.
            told[index] += 1
            values = decode(leaf, not parts.narrow(index))
            if index == number and told[index] > element:
                values[element] += by
            inside.subs[index] = encode(values, not parts.narrow(index))

        build_attention(referee, cell, store)
        changes = Changes(subs={cell: [inside.subs[i] for i in range(parts.count)]})
    else:
        at = SUMS_PER_LEAF * number + element
        sums = trace.partial_sums(cell)
        inside.sums = sums[:at] + [value + by for value in sums[at:]]
        changes = Changes(sums={cell: inside.sums})
    values = decode(trace.leaf(cell.index), place.tensor.op in WIDE)
    before, value = values[cell.element], referee.compute(cell)
    values[cell.element] = value if value != before else before + 1
    changes.leaves = {cell.index: encode(values, place.tensor.op in WIDE)}
    return changes
