"""Steps for the contracts of the referee: what a cell reads, opened and proven, with the value that the spec gives.

`canonical.opening` opens a step; here is what it opens from. Trees are either whole (a trace in memory) or sparse: hashes
beside the opened leaves are drawn at random and the root follows, so a step of a model of any size costs a few hashes.
Knows the arguments of `Referee.compute`, no EVM.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak

from poip_chain.canonical import opening
from poip_chain.canonical.opening import Step
from poip_chain.errors import InvalidInput
from poip_chain.spec import weights as w
from poip_chain.spec.merkle import merkle_levels, root_from_proof
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import LINEAR, Cell, Inputs, Referee
from poip_chain.spec.trace import WIDE, Layout, Op, encode
from poip_chain.spec.transcript import id_leaves

COMPUTE = keccak(
    b"compute((uint32,uint32,uint32,uint32,uint32,uint32,uint32,uint32,uint64,uint64,bytes32,bool,bool,bool,bool),"
    b"(uint256,uint256,bytes32,bytes32,bytes32,bytes32),bytes32,(uint256,uint256,bool,uint256,uint256),"
    b"(bytes,bytes,bytes32[]))"
)[:4]


class Trees:
    """Proofs of opened leaves. Whole trees where `levels` has them by name; others are completed at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.levels: dict[object, list[list[bytes]]] = {}

    def prove(self, name: object, leaves: dict[int, bytes], count: int) -> tuple[bytes, list[bytes]]:
        """(root, proof) of the leaves at their indices among `count`."""
        levels = self.levels.get(name)
        known, size, level, proof = sorted(leaves), count, 0, []
        while size > 1:
            standing = set(known)
            for i in known:
                if (i ^ 1) < size and i ^ 1 not in standing:
                    proof.append(levels[level][i ^ 1] if levels else self.rng.randbytes(32))
            known = sorted({i // 2 for i in known})
            size, level = (size + 1) // 2, level + 1
        indices = sorted(leaves)
        if levels:
            return levels[-1][0], proof
        return root_from_proof([leaves[i] for i in indices], indices, count, proof), proof


@dataclass
class Opening:
    """The arguments of `Referee.compute`, changeable, and the right value (None: the spec refuses the step)."""

    config: ModelConfig
    prompt_tokens: int
    output_tokens: int
    step: Step
    value: int | None
    trace_root: bytes = bytes(32)
    weights_root: bytes = bytes(32)
    prompt_root: bytes = bytes(32)
    output_root: bytes = bytes(32)
    sub_root: bytes = bytes(32)
    leaves: bytes = b""
    rows: bytes = b""
    proof: list[bytes] = field(default_factory=list)

    @property
    def opened_bytes(self) -> bytes:
        """What a move must carry."""
        return self.leaves + self.rows + b"".join(self.proof)

    def arguments(self) -> tuple[object, ...]:
        trace = (self.prompt_tokens, self.output_tokens, self.trace_root, self.weights_root)
        return (
            self.config.values(),
            (*trace, self.prompt_root, self.output_root),
            self.sub_root,
            self.step.values(),
            (self.leaves, self.rows, self.proof),
        )

    def calldata(self) -> bytes:
        """A call of `compute`, by hand: an ABI encoder takes longer than the step."""
        head = abi_encode(list(self.config.ABI.values()), list(self.config.values()))
        words = [self.prompt_tokens, self.output_tokens, self.trace_root, self.weights_root, self.prompt_root]
        words += [self.output_root, self.sub_root, *self.step.values(), 15 * 32 + 6 * 32 + 32 + 5 * 32 + 32]
        tails = [_counted(self.leaves, len(self.leaves)), _counted(self.rows, len(self.rows))]
        offsets = [96, 96 + len(tails[0]), 96 + len(tails[0]) + len(tails[1])]
        tails.append(_counted(b"".join(self.proof), len(self.proof)))
        return COMPUTE + head + b"".join(map(_word, [*words, *offsets])) + b"".join(tails)


def _word(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else int(value).to_bytes(32, "big")


def _counted(data: bytes, count: int) -> bytes:
    return _word(count) + data + bytes(-len(data) % 32)


def open_step(referee: Referee, step: Step, trees: Trees) -> Opening:
    """What a step needs, proven. Raises InvalidInput if there is no such cell."""
    layout = referee.layout
    source = _Source(referee, trees)
    opened = opening.open_step(layout, step, source)
    try:
        value: int | None = opening.compute(referee, step)
    except InvalidInput:
        value = None
    result = Opening(referee.config, layout.prompt_tokens, layout.output_tokens, step, value)
    result.leaves, result.rows, result.proof = opened.values()
    for name, root in source.roots.items():
        setattr(result, f"{'sub' if name == 'cell' else name}_root", root)
    return result


class _Source:
    """A referee's inputs as what a step is opened from; notes the roots that the proofs give."""

    def __init__(self, referee: Referee, trees: Trees) -> None:
        self.referee, self.inputs, self.trees = referee, referee.inputs, trees
        self.leaf, self.partial_sum = self.inputs.leaf, self.inputs.partial_sum
        self.exponent, self.segment, self.token = self.inputs.exponent, self.inputs.segment, self.inputs.token
        self.roots: dict[str, bytes] = {}
        self.row_roots: dict[int, bytes] = {}
        self.cell = Cell(0, 0)

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        self.cell = cell
        return sub_leaf(self.referee, cell, index)

    def ids_leaf(self, tree: str, index: int) -> bytes:
        layout = self.referee.layout
        first, count = (0, layout.prompt_tokens) if tree == "prompt" else (layout.prompt_tokens, layout.output_tokens)
        end = first + min(count, 32 * index + 32)
        (leaf,) = id_leaves([_safe(self.inputs, p) for p in range(first + 32 * index, end)])
        return leaf

    def row_root(self, row: int) -> bytes:
        if row not in self.row_roots:
            levels = self.trees.levels.get(("row", row))
            self.row_roots[row] = levels[-1][0] if levels else self.trees.rng.randbytes(32)
        return self.row_roots[row]

    def prove(self, tree: opening.TreeName, leaves: Mapping[int, bytes], count: int) -> list[bytes]:
        root, proof = self.trees.prove(self.cell if tree == "cell" else tree, dict(leaves), count)
        if isinstance(tree, tuple):
            self.row_roots[tree[1]] = root
        else:
            self.roots[tree] = root
        return proof


def _safe(inputs: Inputs, position: int) -> int:
    try:
        return inputs.token(position)
    except IndexError:
        return 0  # the last output token is never fed back; a test that gives none still has its leaf


def sub_leaf_count(referee: Referee, cell: Cell) -> int:
    """Leaves of the tree into which a linear or attention cell is opened."""
    return opening.sub_leaf_count(referee.layout, cell)


def sub_leaf(referee: Referee, cell: Cell, index: int) -> bytes:
    """A leaf of that tree."""
    if referee.layout.locate(cell.index).tensor.op is Op.ATTENTION:
        return referee.inputs.sub_leaf(cell, index)
    sums = range(16 * index, min(16 * index + 16, referee.segments(cell)))
    return encode([referee.inputs.partial_sum(cell, s) for s in sums], True)


def whole_trees(rows: Sequence[tuple[int, bytes]], leaves: Sequence[bytes], rng: random.Random) -> Trees:
    """Trees of a trace and of weights that are all in memory; token trees are completed at random."""
    trees = Trees(rng)
    trees.levels["trace"] = [list(level) for level in merkle_levels(leaves)]
    hashed = []
    for number, (exponent, data) in enumerate(rows):
        segments = [data[i : i + w.SEGMENT_BYTES] for i in range(0, len(data), w.SEGMENT_BYTES)]
        levels = trees.levels["row", number] = [list(level) for level in merkle_levels(segments)]
        hashed.append(exponent.to_bytes(2, "little", signed=True) + levels[-1][0])
    trees.levels["weights"] = [list(level) for level in merkle_levels(hashed)]
    return trees


class RandomInputs:
    """Inputs of any trace of any model, drawn when asked for: mostly what a forward pass could hold, at times extremes.

    `wild` is the share of leaves that hold any 32- or 64-bit numbers.
    """

    def __init__(self, layout: Layout, rng: random.Random, wild: float = 0.1) -> None:
        self.layout, self.rng, self.wild = layout, rng, wild
        self.kept: dict[object, bytes] = {}
        self.numbers: dict[object, int] = {}

    def leaf(self, index: int) -> bytes:
        place = self.layout.locate(index)
        op = place.tensor.op
        positive = op.name.endswith(("_MAX", "_SUM"))
        bits = 61 if op.name.endswith("_SUM") else self.rng.choice((18, 26, 40)) if op in WIDE else _NARROW.get(op, 30)
        return self._leaf(("leaf", index), op in WIDE, bits, positive, place.count)

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        parts = Referee(self.layout, self).attention_parts(cell)
        if parts.narrow(index):
            return self._leaf((cell, index), False, 20, True, 32)
        if index >= parts.products:
            return self._leaf((cell, index), True, 41, False, 16)
        if index >= parts.maxima:
            return self._leaf((cell, index), True, 28 if index >= parts.sums else 30, True, 16)
        return self._leaf((cell, index), True, 29, False, 16)

    def partial_sum(self, cell: Cell, segment: int) -> int:
        return self.numbers.setdefault((cell, segment), self._number(self.rng.choice((45, 60, 63)), False))

    def exponent(self, row: int) -> int:
        wide = self.rng.random() < self.wild / 10
        drawn = self.rng.randrange(-400, 40) if wide else self.rng.randrange(-22, -8)
        return self.numbers.setdefault(("exponent", row), drawn)

    def segment(self, row: int, segment: int) -> bytes:
        size = opening.row_bytes(self.layout.config, row) - w.SEGMENT_BYTES * segment
        drawn = self.rng.randbytes(min(w.SEGMENT_BYTES, size))
        return self.kept.setdefault((row, segment), drawn)

    def token(self, position: int) -> int:
        return self.numbers.setdefault(("token", position), self.rng.randrange(self.layout.config.vocab_size))

    def _leaf(self, name: object, wide: bool, bits: int, positive: bool, count: int) -> bytes:
        if name not in self.kept:
            most = 16 if wide else 32
            if self.rng.random() < self.wild:
                drawn = self.rng.randbytes(128)
                if self.rng.random() < 0.5:
                    edges = (0, 1, -1, 2 ** (63 if wide else 31) - 1, -(2 ** (63 if wide else 31)))
                    drawn = encode([self.rng.choice(edges) for _ in range(most)], wide)
            else:
                drawn = encode([self._number(bits, positive) for _ in range(min(most, count))], wide)
            self.kept[name] = drawn
        return self.kept[name]

    def _number(self, bits: int, positive: bool) -> int:
        drawn = self.rng.getrandbits(bits)
        return drawn if positive or self.rng.random() < 0.5 else -drawn


_NARROW = {Op.Q: 26, Op.K: 26, Op.Q_NORM: 26, Op.K_NORM: 26, Op.Q_ROPE: 22, Op.K_ROPE: 22, Op.V: 21, Op.HIDDEN: 27}
_NARROW |= {Op.GATE: 22, Op.UP: 22, Op.INPUT_NORM: 22, Op.POST_NORM: 22, Op.FINAL_NORM: 22, Op.ATTENTION: 25}


def random_step(layout: Layout, op: Op, rng: random.Random, inside: bool) -> Step:
    """A random cell of a tensor; inside of it, where asked and the tensor's cells are opened."""
    tensor = layout.tensor(op, rng.randrange(layout.config.num_layers))
    if op in (Op.EMBED, *range(Op.FINAL_MAX, Op.LOGITS + 1)):
        tensor = layout.tensor(op)
    leaf = tensor.start + rng.randrange(tensor.leaves)
    place = layout.locate(leaf)
    opened = op in LINEAR or op is Op.ATTENTION
    padding = not inside and rng.random() < 0.05
    element = rng.randrange(tensor.per_leaf if padding else place.count)
    if not (inside and opened):
        return Step(leaf, element)
    referee = Referee(layout, RandomInputs(layout, rng))
    cell = Cell(leaf, element)
    if op in LINEAR:
        number = rng.randrange(referee.segments(cell))
        return Step(leaf, element, True, number // 16, number % 16)
    parts = referee.attention_parts(cell)
    starts = [0, parts.maxima, parts.weights, parts.sums, parts.products, parts.count]
    part = rng.randrange(5)
    sub_leaf_index = rng.randrange(starts[part], starts[part + 1])
    return Step(leaf, element, True, sub_leaf_index, rng.randrange(32 if part == 2 else 16))
