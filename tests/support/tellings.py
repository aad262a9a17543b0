"""What the sides of a dispute say about one answer of a small model: its canonical trace, or a falsified one.

A `Story` is an answer with its honest trace. A `Telling` is what one side says: the story with changed leaves, or changed
leaves in the trees into which cells are opened, and all trees hashed. Knows no contract.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from poip_chain.spec.dispute import Descent, Node, cell_of
from poip_chain.spec.merkle import merkle_levels
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import Cell, Referee
from poip_chain.spec.trace import WIDE, Layout, Op, decode, encode
from poip_chain.spec.transcript import id_leaves
from tests.support.referee_steps import Trees, sub_leaf, sub_leaf_count, whole_trees
from tests.support.trace_inputs import TraceInputs
from tests.vectors.generate_canonical import ODD, ODD_TOKENS, TOKENS, integer_weights, traced
from tests.vectors.generate_numeric import TINY


@dataclass(frozen=True)
class Story:
    """A model, the ids of one answer, and the canonical trace of it."""

    config: ModelConfig
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    leaves: tuple[bytes, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.config, len(self.prompt), len(self.output))

    @property
    def weights_root(self) -> bytes:
        return _weight_trees(self.config).levels["weights"][-1][0]


@cache
def story(config: ModelConfig = TINY) -> Story:
    """TINY: 261 leaves. ODD: 3,452, with more than one block of everything."""
    tokens, outputs = (ODD_TOKENS, 2) if config == ODD else (TOKENS, 2)
    leaves = tuple(traced(config, tokens, outputs))
    prompt = len(tokens) - outputs + 1
    return Story(config, tokens[:prompt], (*tokens[prompt:], 1), leaves)


@cache
def _weight_trees(config: ModelConfig) -> Trees:
    layout = Layout(config, 1, 1)
    return whole_trees(TraceInputs(layout, integer_weights(config, 5), (0,), []).rows, [b""], random.Random(1))


class Telling:
    """What one side says: leaves of the trace, and of the trees of cells."""

    def __init__(self, told: Story, leaves: Mapping[int, bytes] | None = None) -> None:
        self.story, self.layout = told, told.layout
        self.leaves = list(told.leaves)
        for index, leaf in (leaves or {}).items():
            self.leaves[index] = leaf
        self.inputs = TraceInputs(
            self.layout, integer_weights(told.config, 5), [*told.prompt, *told.output], self.leaves
        )
        self.referee = Referee(self.layout, self.inputs)
        weights = _weight_trees(told.config)
        self.trees = Trees(random.Random(2))
        self.trees.levels = dict(weights.levels)
        self.trees.levels["trace"] = [list(level) for level in merkle_levels(self.leaves)]
        self.trees.levels["prompt"] = [list(level) for level in merkle_levels(id_leaves(told.prompt))]
        self.trees.levels["output"] = [list(level) for level in merkle_levels(id_leaves(told.output))]
        self.subs: dict[int, list[bytes]] = {}
        self.sub_changes: dict[int, dict[int, bytes]] = {}

    @property
    def root(self) -> bytes:
        return self.trees.levels["trace"][-1][0]

    def open(self, cell: int) -> list[bytes]:
        """The leaves of a cell's tree, computed from this telling's trace, with this telling's changes."""
        if cell not in self.subs:
            at = Cell(*cell_of(cell))
            self.inputs.open(self.referee, at)
            leaves = [sub_leaf(self.referee, at, i) for i in range(sub_leaf_count(self.referee, at))]
            for index, leaf in self.sub_changes.get(cell, {}).items():
                leaves[index] = leaf
            attention = self.layout.locate(at.index).tensor.op is Op.ATTENTION
            for index, leaf in enumerate(leaves):
                if attention:
                    self.inputs.subs[at, index] = leaf
                else:
                    for i, value in enumerate(decode(leaf, True)):
                        self.inputs.sums[at, 16 * index + i] = value
            self.subs[cell] = leaves
            self.trees.levels[at] = [list(level) for level in merkle_levels(leaves)]
        return self.subs[cell]

    def tree(self, cell: int) -> tuple[Descent, list[bytes], list[list[bytes]]]:
        """(shape, leaves, levels) of the trace (0) or of a cell's tree."""
        if cell == 0:
            return Descent(len(self.leaves)), self.leaves, self.trees.levels["trace"]
        leaves = self.open(cell)
        return Descent(len(leaves)), leaves, self.trees.levels[Cell(*cell_of(cell))]

    def shown(self, cell: int, node: Node) -> list[bytes]:
        """What this side shows, or would, at a node: hashes, or leaves."""
        tree, leaves, levels = self.tree(cell)
        nodes = tree.shown(node)
        if tree.shows_leaves(node):
            return [leaves[n.index] for n in nodes]
        return [levels[n.level][n.index] for n in nodes]

    def logit(self, position: int, token: int) -> int:
        leaf = self.layout.index(Op.LOGITS, 0, position, token)
        return decode(self.leaves[leaf], False)[token % 32]

    def changed(self, leaf: int, element: int, by: int = 1) -> bytes:
        """A leaf with one element off."""
        wide = self.layout.locate(leaf).tensor.op in WIDE
        values = list(decode(self.leaves[leaf], wide))
        values[element] += by
        return encode(values, wide)
