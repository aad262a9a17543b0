"""The one-step referee: any single element of a trace, recomputed from the few leaves and weights that it depends on.

A dispute over a trace ends at one *cell*: one element of one leaf, the first in which two traces differ. `compute` gives
the cell's right value and reads nothing but what is before it: leaves of the same trace, segments of weight rows, one
token id. It decides by itself what it reads, from the cell's place and the model's dimensions; nobody can relabel a
leaf. The contracts of the court are the second writing of this file.

    cell                      what it reads                                                          (leaves, segments)
    embed                     token id; one segment of the embedding row it names                                0, 1
    *_max                     the block's 8 leaves of the residual stream; the cell before                        8, 0
    *_sum                     the same; the row's last maximum                                                    9, 0
    *_norm                    one leaf of the residual stream; last maximum, last sum; gain                       3, 1
    q_norm, k_norm            the head's row (head_dim / 32 leaves); gain                                  <=    16, 1
    q_rope, k_rope            one or two leaves of the head's row; cosine, sine                                2, 1-2
    hidden                    gate, up                                                                           2, 0
    q k v gate up logits      last partial sum; the row's exponent; bias                                       0, 0-1
    middle, output            the same; one leaf of the residual stream                                        1, 0-1
    attention                 last running sum and product of its sub-trace                                      2, 0

A padding cell is 0 and reads nothing.

**Partial sums.** A linear element is opened into its running sums of products, one int64 per 128 input columns, written
out (8 bytes each: 112 of them for a depth of 14,336). Sum s is sum s - 1 plus one weight segment (256 bytes) times 4
leaves. The element itself follows the last sum, so it need not be posted again and cannot differ from the leaf.

**Attention sub-trace.** One element (t, head, column) of `attention` is opened into a tree of leaves of the same form
over keys 0..t in blocks of 32, b = t // 32 + 1 of them:

    scores    int64   2 b leaves           q . k_j; reads the heads' rows of q and k_j    (head_dim / 32 leaves each)
    maxima    int64   ceil(b / 16)         running maximum over blocks                    (2 leaves, the cell before)
    weights   int32   b                    exp of (score - last maximum)                  (2 leaves)
    sums      int64   ceil(b / 16)         running sum of weights over blocks             (1 leaf, the cell before)
    products  int64   ceil(b / 16)         running sum of weight * v                      (2 leaves, the cell before)

The element itself, the division of the last product by the last sum, stands in the main trace after them. Keys after t
are 0 in scores and weights and do not take part in maxima. 51 leaves at 512 keys: one reveal of six levels opens it.

"The cell before" in the same leaf is read from the contested leaf as opened: whoever contests names the first cell that
differs, so the cells before it are agreed. A contester who names a later one may be given inputs that no forward pass
has (a sum of squares of 0, a score above the maximum): such a step is refused, not computed.

This file knows no game, no proofs and no contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from poip_chain.errors import InvalidInput
from poip_chain.spec import canonical as c
from poip_chain.spec import weights as w
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.trace import WIDE, Layout, Op, Place, decode, encode

SEGMENT_COLUMNS = w.SEGMENT_BYTES // 2
ROPE_SEGMENT_COLUMNS = w.SEGMENT_BYTES // 4
KEYS = 32
"""Keys in a block of an attention sub-trace: one leaf of weights, one leaf of a column of v."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Element `element` (padding included) of leaf `index` of the main trace."""

    index: int
    element: int


@dataclass(frozen=True, slots=True)
class SumCell:
    """Running sum number `segment` of a linear cell."""

    cell: Cell
    segment: int


@dataclass(frozen=True, slots=True)
class AttentionCell:
    """Element `element` of leaf `index` of the sub-trace of an attention cell."""

    cell: Cell
    index: int
    element: int


class Inputs(Protocol):
    """What a step is given. Whoever runs a step proves each answer, or computes it; a contract checks the proofs."""

    def leaf(self, index: int) -> bytes:
        """A leaf of the main trace: 128 bytes."""

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        """A leaf of the sub-trace of an attention cell: 128 bytes."""

    def partial_sum(self, cell: Cell, segment: int) -> int:
        """A running sum of a linear cell, int64."""

    def exponent(self, row: int) -> int:
        """The exponent of a row of weights_root, by its index among the tree's leaves."""

    def segment(self, row: int, segment: int) -> bytes:
        """256 bytes (or a row's shorter rest) of a row."""

    def token(self, position: int) -> int:
        """The token id at a position of the forward pass: prompt, then output."""


# Where weights stand


@lru_cache(maxsize=64)
def _row_plan(config: ModelConfig) -> tuple[dict[str, int], dict[str, int], int, int]:
    """(offset in a layer, rows) of each tensor of a layer, rows of a layer, rows before the first layer."""
    offsets: dict[str, int] = {}
    counts: dict[str, int] = {}
    at = 0
    for plan in w.tensor_plan(replace(config, num_layers=1)):
        layer, _, name = plan.name.rpartition(".")
        if layer:
            offsets[name], counts[name] = at, plan.rows
            at += plan.rows
    return offsets, counts, at, config.vocab_size


def weight_row(config: ModelConfig, name: str, layer: int, row: int) -> int:
    """`weights.row_index` without a list of all tensors: a few additions, as a contract does it. `name` without layer."""
    offsets, _, per_layer, first = _row_plan(config)
    if name in offsets:
        return first + layer * per_layer + offsets[name] + row
    if name == "embed" or (name == "head" and config.tied_embeddings):
        return row
    after = first + config.num_layers * per_layer
    if name == "final_norm":
        return after
    if name == "head":
        return after + 1 + row
    return after + 1 + (0 if config.tied_embeddings else config.vocab_size) + row


# Linear cells


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear tensor: weights, input tensor, fraction bits, clamp (None: it adds to the residual stream)."""

    weight: str
    source: Op
    bits_in: int
    bits_out: int
    limit: int | None


LINEAR: dict[Op, _Linear] = {
    Op.Q: _Linear("q", Op.INPUT_NORM, c.NORM_BITS, c.NORM_BITS, c.LINEAR_QK_LIMIT),
    Op.K: _Linear("k", Op.INPUT_NORM, c.NORM_BITS, c.NORM_BITS, c.LINEAR_QK_LIMIT),
    Op.V: _Linear("v", Op.INPUT_NORM, c.NORM_BITS, c.V_BITS, c.V_LIMIT),
    Op.MIDDLE: _Linear("o", Op.ATTENTION, c.ATTENTION_BITS, c.RESIDUAL_BITS, None),
    Op.GATE: _Linear("gate", Op.POST_NORM, c.NORM_BITS, c.GATE_BITS, c.GATE_LIMIT),
    Op.UP: _Linear("up", Op.POST_NORM, c.NORM_BITS, c.GATE_BITS, c.GATE_LIMIT),
    Op.OUTPUT: _Linear("down", Op.HIDDEN, c.HIDDEN_BITS, c.RESIDUAL_BITS, None),
    Op.LOGITS: _Linear("head", Op.FINAL_NORM, c.NORM_BITS, c.LOGIT_BITS, c.LOGIT_LIMIT),
}
_NORMS = {Op.INPUT_MAX: "input_norm", Op.POST_MAX: "post_norm", Op.FINAL_MAX: "final_norm"}
"""The first of the three tensors of each norm: maxima, sums, output follow each other."""


class Referee:
    """Recomputes cells of one trace. `layout` gives the dimensions; `inputs` whatever a cell reads."""

    def __init__(self, layout: Layout, inputs: Inputs) -> None:
        self.layout, self.config, self.inputs = layout, layout.config, inputs

    # Main trace

    def compute(self, cell: Cell) -> int:
        """The right value of a cell, given that what it reads is right. Raises InvalidInput if there is no such cell."""
        place = self.layout.locate(cell.index)
        op, column = place.tensor.op, place.column + cell.element
        if not 0 <= cell.element < place.tensor.per_leaf:
            raise InvalidInput(f"a leaf of {place.tensor.name} has no element {cell.element}.")
        if cell.element >= place.count:
            return 0
        if op in LINEAR:
            return self._finish_linear(cell, place, column)
        if op is Op.ATTENTION:
            parts = self.attention_parts(cell)
            total = self._sub_last(cell, parts.sums, parts.blocks)
            _possible(total >= 1)
            return c.attend(self._sub_last(cell, parts.products, parts.blocks), total)
        if op is Op.EMBED:
            token = self.inputs.token(place.row)
            if not 0 <= token < self.config.vocab_size:
                raise InvalidInput(f"token {token} is outside the vocabulary of {self.config.vocab_size}.")
            row = weight_row(self.config, "embed", 0, token)
            return c.embed(self._weight(row, column), self.inputs.exponent(row))
        if op is Op.HIDDEN:
            layer = place.tensor.layer
            return c.swiglu(
                self._value(Op.GATE, layer, place.row, column), self._value(Op.UP, layer, place.row, column)
            )
        if op in (Op.Q_ROPE, Op.K_ROPE):
            return self._rope(place, column)
        if op in (Op.Q_NORM, Op.K_NORM):
            return self._head_norm(place, column)
        return self._norm(place, column)

    def leaf(self, index: int) -> bytes:
        """A whole leaf, each cell from what it reads; linear and attention cells from their given partial results."""
        tensor = self.layout.locate(index).tensor
        cells = [self.compute(Cell(index, element)) for element in range(tensor.per_leaf)]
        return encode(cells, tensor.op in WIDE)

    def _value(self, op: Op, layer: int, row: int, column: int) -> int:
        tensor_leaf = self.inputs.leaf(self.layout.index(op, layer, row, column))
        values = decode(tensor_leaf, op in WIDE)
        return values[column % len(values)]

    def _values(self, op: Op, layer: int, row: int, first: int, count: int) -> list[int]:
        """Columns first .. first + count of a row; `first` is a leaf's first column."""
        step = 16 if op in WIDE else 32
        values: list[int] = []
        for column in range(first, first + count, step):
            values.extend(decode(self.inputs.leaf(self.layout.index(op, layer, row, column)), op in WIDE))
        return values[:count]

    def _weight(self, row: int, column: int, width: int = 2) -> int:
        per_segment = w.SEGMENT_BYTES // width
        data = self.inputs.segment(row, column // per_segment)
        at = column % per_segment * width
        return int.from_bytes(data[at : at + width], "little", signed=True)

    def _stream(self, op: Op, layer: int) -> tuple[Op, int]:
        """The residual stream (tensor, layer) that a norm or an addition reads."""
        if Op.POST_MAX <= op <= Op.OUTPUT:
            return Op.MIDDLE, layer
        if op >= Op.FINAL_MAX:
            return Op.OUTPUT, self.config.num_layers - 1
        return (Op.OUTPUT, layer - 1) if layer else (Op.EMBED, 0)

    def _norm(self, place: Place, column: int) -> int:
        op, layer, config = place.tensor.op, place.tensor.layer, self.config
        base = max(first for first in _NORMS if first <= op)
        kind = op - base  # 0 maximum, 1 sum, 2 output
        position = place.row + (self.layout.first_logit_position if base is Op.FINAL_MAX else 0)
        source, source_layer = self._stream(op, layer)
        blocks = self.layout.tensor(base, layer).columns
        if kind == 2:
            shift = self._shift(base, layer, place.row, blocks)
            total = self._value(Op(base + 1), layer, place.row, blocks - 1)
            _possible(1 <= total < 2**62)
            row = weight_row(config, _NORMS[base], layer, 0)
            h = self._value(source, source_layer, position, column)
            scale = c.norm_scale(total, config.hidden_size)
            return c.norm_element(h, shift, scale, self._weight(row, column), self.inputs.exponent(row))
        first = column * c.STAT_COLUMNS
        count = min(c.STAT_COLUMNS, config.hidden_size - first)
        before = self._value(op, layer, place.row, column - 1) if column else None
        h_values = self._values(source, source_layer, position, first, count)
        if kind == 0:
            return max([abs(h) for h in h_values] + ([] if before is None else [before]))
        shift = self._shift(base, layer, place.row, blocks)
        if before is None:
            before = c.norm_epsilon(config.rms_norm_eps_e12, config.hidden_size, c.RESIDUAL_BITS, shift)
        return before + sum(c.norm_square(h, shift) for h in h_values)

    def _shift(self, base: Op, layer: int, row: int, blocks: int) -> int:
        """The shift that the last running maximum of a row gives."""
        largest = self._value(base, layer, row, blocks - 1)
        _possible(largest >= 0)
        return c.norm_shift(largest)

    def _head_norm(self, place: Place, column: int) -> int:
        op, layer, config = place.tensor.op, place.tensor.layer, self.config
        source, name = (Op.Q, "q_norm") if op is Op.Q_NORM else (Op.K, "k_norm")
        values = self._values(source, layer, place.row, 0, config.head_dim)
        row = weight_row(config, name, layer, 0)
        shift = c.norm_shift(max(map(abs, values)))
        total = c.norm_epsilon(config.rms_norm_eps_e12, config.head_dim, c.NORM_BITS, shift)
        scale = c.norm_scale(total + sum(c.norm_square(h, shift) for h in values), config.head_dim)
        gain = self._weight(row, column)
        return c.clamp(c.norm_element(values[column], shift, scale, gain, self.inputs.exponent(row)), c.LINEAR_QK_LIMIT)

    def _rope(self, place: Place, column: int) -> int:
        op, layer, half = place.tensor.op, place.tensor.layer, self.config.head_dim // 2
        if op is Op.Q_ROPE:
            source, heads = Op.Q_NORM if self.config.qk_norm else Op.Q, self.config.num_heads
        else:
            source, heads = Op.K_NORM if self.config.qk_norm else Op.K, self.config.num_kv_heads
        row = weight_row(self.config, "rope", 0, place.row // heads)
        pair = column % half
        x0, x1 = (self._value(source, layer, place.row, i) for i in (pair, half + pair))
        return c.rope(x0, x1, self._weight(row, pair, 4), self._weight(row, half + pair, 4))[column // half]

    # Linear cells

    def _linear_place(self, cell: Cell) -> tuple[_Linear, Place, int, int]:
        """(its kind, its place, output column = row of the weights, position = row of the input tensor)."""
        place = self.layout.locate(cell.index)
        op, column = place.tensor.op, place.column + cell.element
        if op not in LINEAR or cell.element >= place.count:
            raise InvalidInput(f"leaf {cell.index}, element {cell.element} is not a linear element.")
        if op is Op.V:
            return LINEAR[op], place, place.row, column
        if op in (Op.Q, Op.K):
            position, head = divmod(place.row, self.config.num_heads if op is Op.Q else self.config.num_kv_heads)
            return LINEAR[op], place, head * self.config.head_dim + column, position
        return LINEAR[op], place, column, place.row

    def segments(self, cell: Cell) -> int:
        """How many running sums a linear cell has."""
        linear, place, _, _ = self._linear_place(cell)
        return -(-self.layout.tensor(linear.source, place.tensor.layer).columns // SEGMENT_COLUMNS)

    def compute_sum(self, cell: SumCell) -> int:
        """The right running sum: the one before plus one segment of weights times 4 leaves of the input."""
        linear, place, output, position = self._linear_place(cell.cell)
        if not 0 <= cell.segment < self.segments(cell.cell):
            raise InvalidInput(f"this linear element has no running sum {cell.segment}.")
        layer = place.tensor.layer
        first = cell.segment * SEGMENT_COLUMNS
        count = min(SEGMENT_COLUMNS, self.layout.tensor(linear.source, layer).columns - first)
        data = self.inputs.segment(weight_row(self.config, linear.weight, layer, output), cell.segment)
        integers = [int.from_bytes(data[i : i + 2], "little", signed=True) for i in range(0, len(data), 2)]
        before = self.inputs.partial_sum(cell.cell, cell.segment - 1) if cell.segment else 0
        return before + c.dot(integers, self._values(linear.source, layer, position, first, count))

    def _finish_linear(self, cell: Cell, place: Place, column: int) -> int:
        linear, _, output, position = self._linear_place(cell)
        layer = place.tensor.layer
        total = self.inputs.partial_sum(cell, self.segments(cell) - 1)
        exponent = self.inputs.exponent(weight_row(self.config, linear.weight, layer, output))
        bias = None
        if linear.weight + "_bias" in _row_plan(self.config)[0]:
            row = weight_row(self.config, linear.weight + "_bias", layer, 0)
            bias = self._weight(row, output), self.inputs.exponent(row)
        value = c.linear(total, exponent, linear.bits_in, linear.bits_out, bias)
        if linear.limit is not None:
            return c.clamp(value, linear.limit)
        source, source_layer = self._stream(place.tensor.op, layer)
        return self._value(source, source_layer, position, column) + value

    # Attention sub-trace

    def attention_parts(self, cell: Cell) -> AttentionParts:
        """The shape of the sub-trace of an attention cell. Raises InvalidInput if the cell is of another kind."""
        place = self.layout.locate(cell.index)
        if place.tensor.op is not Op.ATTENTION or cell.element >= place.count:
            raise InvalidInput(f"leaf {cell.index}, element {cell.element} is not an attention output.")
        query, column = divmod(place.column + cell.element, self.config.head_dim)
        return AttentionParts(place.tensor.layer, place.row, query, column)

    def compute_attention(self, cell: AttentionCell) -> int:
        """The right value of a cell of an attention sub-trace. Raises InvalidInput if there is no such cell."""
        parts = self.attention_parts(cell.cell)
        if not 0 <= cell.index < parts.count or not 0 <= cell.element < (32 if parts.narrow(cell.index) else 16):
            raise InvalidInput(f"a sub-trace of {parts.count} leaves has no cell {cell.index}, {cell.element}.")
        if cell.index < parts.maxima:
            return self._score(parts, 16 * cell.index + cell.element)
        if cell.index < parts.weights:
            return self._maximum(cell, parts, 16 * (cell.index - parts.maxima) + cell.element)
        if cell.index < parts.sums:
            key = KEYS * (cell.index - parts.weights) + cell.element
            if key > parts.position:
                return 0
            score = decode(self.inputs.sub_leaf(cell.cell, key // 16), True)[key % 16]
            distance = self._sub_last(cell.cell, parts.maxima, parts.blocks) - score
            _possible(distance >= 0)
            return c.attention_weight(distance, c.score_multiplier(self.config.head_dim))
        if cell.index < parts.products:
            block = 16 * (cell.index - parts.sums) + cell.element
            if block >= parts.blocks:
                return 0
            weights = decode(self.inputs.sub_leaf(cell.cell, parts.weights + block), False)
            return self._sub_before(cell, parts.sums, block) + sum(weights)
        block = 16 * (cell.index - parts.products) + cell.element
        if block >= parts.blocks:
            return 0
        weights = decode(self.inputs.sub_leaf(cell.cell, parts.weights + block), False)
        row = parts.query // (self.config.num_heads // self.config.num_kv_heads) * self.config.head_dim + parts.column
        values = decode(self.inputs.leaf(self.layout.index(Op.V, parts.layer, row, KEYS * block)), False)
        return self._sub_before(cell, parts.products, block) + c.dot(weights, values)

    def _score(self, parts: AttentionParts, key: int) -> int:
        if key > parts.position:
            return 0
        config, head = self.config, self.config.head_dim
        shared = config.num_heads // config.num_kv_heads
        q = self._values(Op.Q_ROPE, parts.layer, parts.position * config.num_heads + parts.query, 0, head)
        k_row = key * config.num_kv_heads + parts.query // shared
        return c.dot(q, self._values(Op.K_ROPE, parts.layer, k_row, 0, head))

    def _maximum(self, cell: AttentionCell, parts: AttentionParts, block: int) -> int:
        if block >= parts.blocks:
            return 0
        scores: list[int] = []
        for index in (2 * block, 2 * block + 1):
            scores.extend(decode(self.inputs.sub_leaf(cell.cell, index), True))
        scores = scores[: parts.position + 1 - KEYS * block]
        return max(scores + ([self._sub_value(cell.cell, parts.maxima, block - 1)] if block else []))

    def _sub_value(self, cell: Cell, start: int, number: int) -> int:
        """An int64 of a part of the sub-trace."""
        return decode(self.inputs.sub_leaf(cell, start + number // 16), True)[number % 16]

    def _sub_before(self, cell: AttentionCell, start: int, block: int) -> int:
        return self._sub_value(cell.cell, start, block - 1) if block else 0

    def _sub_last(self, cell: Cell, start: int, blocks: int) -> int:
        return self._sub_value(cell, start, blocks - 1)


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """An attention cell's layer, position t, head of q and column in it, and the first leaves of its sub-trace's parts."""

    layer: int
    position: int
    query: int
    column: int

    @property
    def blocks(self) -> int:
        """Blocks of 32 keys."""
        return self.position // KEYS + 1

    @property
    def maxima(self) -> int:
        """First leaf of the maxima; scores start at 0."""
        return 2 * self.blocks

    @property
    def weights(self) -> int:
        """First leaf of the weights."""
        return self.maxima + -(-self.blocks // 16)

    @property
    def sums(self) -> int:
        """First leaf of the running sums."""
        return self.weights + self.blocks

    @property
    def products(self) -> int:
        """First leaf of the running products."""
        return self.sums + -(-self.blocks // 16)

    @property
    def count(self) -> int:
        """All leaves."""
        return self.products + -(-self.blocks // 16)

    def narrow(self, index: int) -> bool:
        """Whether a leaf holds int32: the weights do."""
        return self.weights <= index < self.sums


def _possible(holds: bool) -> None:
    if not holds:
        raise InvalidInput("a step's inputs are not those of any forward pass: an earlier leaf is the first false one.")


def build_attention(referee: Referee, cell: Cell, store: Callable[[int, bytes], None]) -> list[bytes]:
    """All leaves of an attention cell's sub-trace in order; each is given to `store` before the next one reads it.

    A running value reads the one before in its own leaf, so leaves are stored after each of their cells.
    """
    parts = referee.attention_parts(cell)
    leaves: list[bytes] = []
    for index in range(parts.count):
        narrow = parts.narrow(index)
        values: list[int] = []
        for element in range(32 if narrow else 16):
            values.append(referee.compute_attention(AttentionCell(cell, index, element)))
            store(index, encode(values, not narrow))
        leaves.append(encode(values, not narrow))
    return leaves


def running_sums(referee: Referee, cell: Cell, store: Callable[[int, int], None]) -> Sequence[int]:
    """All running sums of a linear cell; each is given to `store` before the next one reads it."""
    sums = []
    for segment in range(referee.segments(cell)):
        sums.append(referee.compute_sum(SumCell(cell, segment)))
        store(segment, sums[-1])
    return sums
