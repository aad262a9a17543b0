"""Steps for the contracts of the referee: what a cell reads, opened and proven, with the value that the spec gives.

The spec decides what is read: a step is first run on harmless values by a recorder, then on the real ones. Trees are
either whole (a trace in memory) or sparse: hashes beside the opened leaves are drawn at random and the root follows, so a
step of a model of any size costs a few hashes. Knows the arguments of `Referee.compute`, no EVM.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec import weights as w
from poip_chain.spec.merkle import merkle_levels, root_from_proof
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import LINEAR, AttentionCell, Cell, Inputs, Referee, SumCell, weight_row
from poip_chain.spec.trace import WIDE, Layout, Op, encode
from poip_chain.spec.transcript import id_leaves

COMPUTE = keccak(
    b"compute((uint32,uint32,uint32,uint32,uint32,uint32,uint32,uint32,uint64,uint64,bytes32,bool,bool,bool,bool),"
    b"(uint256,uint256,bytes32,bytes32,bytes32,bytes32),bytes32,(uint256,uint256,bool,uint256,uint256),"
    b"(bytes,bytes,bytes32[]))"
)[:4]
_ONES = {True: encode([1] * 16, True), False: encode([1] * 32, False)}


@dataclass(frozen=True, slots=True)
class Step:
    """A cell of the trace, or of the tree into which it is opened: `ITraceMap.Step`."""

    leaf: int
    element: int
    inside: bool = False
    sub_leaf: int = 0
    sub_element: int = 0

    @property
    def cell(self) -> Cell:
        return Cell(self.leaf, self.element)

    def values(self) -> tuple[int, int, bool, int, int]:
        return self.leaf, self.element, self.inside, self.sub_leaf, self.sub_element


def compute(referee: Referee, step: Step) -> int:
    """The spec's value of a step. Raises InvalidInput as the spec does."""
    if not step.inside:
        return referee.compute(step.cell)
    if referee.layout.locate(step.leaf).tensor.op is Op.ATTENTION:
        return referee.compute_attention(AttentionCell(step.cell, step.sub_leaf, step.sub_element))
    return referee.compute_sum(SumCell(step.cell, 16 * step.sub_leaf + step.sub_element))


class Recorder:
    """Answers with harmless values and notes what was asked."""

    def __init__(self, layout: Layout, tokens: Inputs) -> None:
        self.layout, self.tokens = layout, tokens
        self.leaves: set[int] = set()
        self.subs: set[int] = set()
        self.rows: dict[int, set[int]] = {}
        self.position: int | None = None

    def leaf(self, index: int) -> bytes:
        self.leaves.add(index)
        return _ONES[self.layout.locate(index).tensor.op in WIDE]

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        self.subs.add(index)
        return _ONES[not Referee(self.layout, self).attention_parts(cell).narrow(index)]

    def partial_sum(self, cell: Cell, segment: int) -> int:
        self.subs.add(segment // 16)
        return 1

    def exponent(self, row: int) -> int:
        self.rows.setdefault(row, set())
        return -14

    def segment(self, row: int, segment: int) -> bytes:
        self.rows.setdefault(row, set()).add(segment)
        size = row_bytes(self.layout.config, row) - w.SEGMENT_BYTES * segment
        return bytes(min(w.SEGMENT_BYTES, size))

    def token(self, position: int) -> int:
        self.position = position
        return self.tokens.token(position)


def row_count(config: ModelConfig) -> int:
    """Rows of weights_root."""
    return weight_row(config, "rope", 0, config.max_positions)


def row_bytes(config: ModelConfig, row: int) -> int:
    """The bytes of a row of weights_root."""
    if row >= weight_row(config, "rope", 0, 0):
        return 4 * config.head_dim
    if row < config.vocab_size or row >= weight_row(config, "final_norm", 0, 0):
        return 2 * config.hidden_size
    per_layer = weight_row(config, "input_norm", 1, 0) - config.vocab_size
    inside = (row - config.vocab_size) % per_layer
    for rows, columns in _layer_shapes(config):
        if inside < rows:
            return 2 * columns
        inside -= rows
    raise AssertionError("a row outside of the layers")


@lru_cache(maxsize=64)
def _layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    one = w.tensor_plan(dataclasses.replace(config, num_layers=1))
    return [(plan.rows, plan.columns) for plan in one if "." in plan.name]


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
    layout, config = referee.layout, referee.config
    recorder = Recorder(layout, referee.inputs)
    compute(Referee(layout, recorder), step)
    try:
        value: int | None = compute(referee, step)
    except InvalidInput:
        value = None
    result = Opening(config, layout.prompt_tokens, layout.output_tokens, step, value)
    if recorder.leaves:
        leaves = {i: referee.inputs.leaf(i) for i in sorted(recorder.leaves)}
        result.trace_root, proof = trees.prove("trace", leaves, layout.count)
        result.leaves += b"".join(leaves.values())
        result.proof += proof
    if recorder.subs:
        subs = {i: sub_leaf(referee, step.cell, i) for i in sorted(recorder.subs)}
        result.sub_root, proof = trees.prove(step.cell, subs, sub_leaf_count(referee, step.cell))
        result.leaves += b"".join(subs.values())
        result.proof += proof
    if recorder.rows:
        hashed: dict[int, bytes] = {}
        for row, wanted in sorted(recorder.rows.items()):
            size = row_bytes(config, row)
            segments = {i: referee.inputs.segment(row, i) for i in sorted(wanted)}
            head = referee.inputs.exponent(row).to_bytes(2, "little", signed=True)
            count = -(-size // w.SEGMENT_BYTES)
            if segments:
                root, proof = trees.prove(("row", row), segments, count)
                result.proof += proof
                result.rows += head + b"".join(segments.values())
            else:
                levels = trees.levels.get(("row", row))
                root = levels[-1][0] if levels else trees.rng.randbytes(32)
                result.rows += head + root
            hashed[row] = head + root
        result.weights_root, proof = trees.prove("weights", hashed, row_count(config))
        result.proof += proof
    if recorder.position is not None:
        in_prompt = recorder.position < layout.prompt_tokens
        first, count = (0, layout.prompt_tokens) if in_prompt else (layout.prompt_tokens, layout.output_tokens)
        index = (recorder.position - first) // 32
        end = first + min(count, 32 * index + 32)
        (leaf,) = id_leaves([_safe(referee.inputs, p) for p in range(first + 32 * index, end)])
        root, proof = trees.prove("prompt" if in_prompt else "output", {index: leaf}, -(-count // 32))
        result.leaves, result.proof = leaf, result.proof + proof
        if in_prompt:
            result.prompt_root = root
        else:
            result.output_root = root
    return result


def _safe(inputs: Inputs, position: int) -> int:
    try:
        return inputs.token(position)
    except IndexError:
        return 0  # the last output token is never fed back; a test that gives none still has its leaf


def sub_leaf_count(referee: Referee, cell: Cell) -> int:
    """Leaves of the tree into which a linear or attention cell is opened."""
    if referee.layout.locate(cell.index).tensor.op is Op.ATTENTION:
        return referee.attention_parts(cell).count
    return -(-referee.segments(cell) // 16)


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
        size = row_bytes(self.layout.config, row) - w.SEGMENT_BYTES * segment
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
    referee = Referee(layout, Recorder(layout, None))  # type: ignore[arg-type]
    cell = Cell(leaf, element)
    if op in LINEAR:
        number = rng.randrange(referee.segments(cell))
        return Step(leaf, element, True, number // 16, number % 16)
    parts = referee.attention_parts(cell)
    starts = [0, parts.maxima, parts.weights, parts.sums, parts.products, parts.count]
    part = rng.randrange(5)
    sub_leaf_index = rng.randrange(starts[part], starts[part + 1])
    return Step(leaf, element, True, sub_leaf_index, rng.randrange(32 if part == 2 else 16))
