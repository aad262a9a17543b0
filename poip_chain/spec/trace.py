"""The trace of a canonical forward pass: which tensors are committed, and where in the tree each element stands.

A leaf is always 128 bytes: 32 int32 or 16 int64, little-endian two's complement, in columns of one row of one tensor.
A row is padded with zeros to whole leaves. 128 bytes with their domain byte are one block of keccak. The tree is that
of `merkle.py` over all leaves in execution order; a move that reveals 64 nodes six levels down is a run of its nodes.

    embed        int64  [T][hidden]             logits rows: R = output tokens, the last R positions
    for each layer:
      input_max, input_sum    int64  [T][ceil(hidden / 128)]   running maximum of |h|, running sum of squares
      input_norm              int32  [T][hidden]
      q, k                    int32  [T x heads][head_dim], [T x kv heads][head_dim]        before RoPE
      v                       int32  [kv heads x head_dim][T]                            a row is one column of v
      q_norm, k_norm          as q and k, with QK-norm only
      q_rope, k_rope          as q and k
      attention               int32  [T][heads x head_dim]
      middle                  int64  [T][hidden]              residual stream after attention
      post_max, post_sum, post_norm                           as input_*
      gate, up, hidden        int32  [T][intermediate]
      output                  int64  [T][hidden]              residual stream after the feed-forward
    final_max, final_sum, final_norm                          [R]
    logits       int32  [R][vocab]

Order. Layer by layer, and in a layer op by op, all positions together. Every input of an element stands before it, so
at the first leaf in which two traces differ all inputs are agreed. Position by position would do so too, but not with v
committed by columns: 32 keys of one column are one leaf, which cannot be complete before its 32 positions are. With v by
columns a step of the weighted sum over 32 keys reads two leaves instead of 33 with as many paths (by estimate 40 kB of
calldata less). It is also the order in which an engine's matrix products produce the values, so a prefill hashes as it
goes and a player that defends recomputes one layer.

Size. Linear in T: scores and weights of attention, which grow with T squared, are not here; they are opened on demand
for one element of one row (`referee.py`). So are the partial sums of a linear element.

Heads. Rows of q and k are padded head by head, so that a dot product over a head reads whole leaves. Rows of the
attention output are not: its reader, the output projection, runs over all heads.

Index arithmetic is two divisions (layer; row) and a walk over at most 19 sizes, each a product of stored dimensions:
a contract repeats it without tables. This file knows dimensions only; no weights, no arithmetic of the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from poip_chain.errors import InvalidInput
from poip_chain.spec.canonical import STAT_COLUMNS
from poip_chain.spec.merkle import MAX_LEAVES, merkle_root
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.types import Hash32

LEAF_BYTES = 128


class Op(IntEnum):
    """The committed tensors in execution order. The contracts use the same numbers."""

    EMBED = 0
    INPUT_MAX = 1
    INPUT_SUM = 2
    INPUT_NORM = 3
    Q = 4
    K = 5
    V = 6
    Q_NORM = 7
    K_NORM = 8
    Q_ROPE = 9
    K_ROPE = 10
    ATTENTION = 11
    MIDDLE = 12
    POST_MAX = 13
    POST_SUM = 14
    POST_NORM = 15
    GATE = 16
    UP = 17
    HIDDEN = 18
    OUTPUT = 19
    FINAL_MAX = 20
    FINAL_SUM = 21
    FINAL_NORM = 22
    LOGITS = 23


WIDE = frozenset(
    {
        Op.EMBED, Op.MIDDLE, Op.OUTPUT, Op.INPUT_MAX, Op.INPUT_SUM, Op.POST_MAX, Op.POST_SUM, Op.FINAL_MAX, Op.FINAL_SUM,
    }
)  # fmt: skip
"""Tensors of int64; the others are int32. The residual stream has no clamp, and statistics are sums of squares."""

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in the trace. `start` is its first leaf; `layer` is 0 outside of the layers."""

    op: Op
    layer: int
    start: int
    rows: int
    columns: int

    @property
    def per_leaf(self) -> int:
        """Elements in a leaf."""
        return per_leaf(self.op)

    @property
    def row_leaves(self) -> int:
        """Leaves in a row."""
        return -(-self.columns // self.per_leaf)

    @property
    def leaves(self) -> int:
        """Leaves of the tensor."""
        return self.rows * self.row_leaves

    @property
    def name(self) -> str:
        """As `forward.py` names it: "embed", "3.q_rope", "logits"."""
        name = self.op.name.lower()
        return f"{self.layer}.{name}" if Op.EMBED < self.op < Op.FINAL_MAX else name


@dataclass(frozen=True, slots=True)
class Place:
    """Where a leaf stands: `count` elements of a row from `column` on; the rest of the leaf is zero."""

    tensor: Tensor
    row: int
    column: int
    count: int


@dataclass(frozen=True)
class Layout:
    """The trace of a forward pass over prompt_tokens + output_tokens - 1 positions, logits for the last output_tokens.

    Raises InvalidInput if a count is not positive, the context longer than the model's, or the tree too large.
    """

    config: ModelConfig
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise InvalidInput(f"a trace has prompt and output: not {self.prompt_tokens} and {self.output_tokens}.")
        if self.positions > self.config.max_positions:
            raise InvalidInput(f"{self.positions} positions are more than the model's {self.config.max_positions}.")
        if self.count > MAX_LEAVES:
            raise InvalidInput(f"this trace would have {self.count} leaves; a tree holds at most 2**32.")

    @property
    def positions(self) -> int:
        """T: the positions that are computed. The last output token is not fed back."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def first_logit_position(self) -> int:
        """The position whose logits choose the first output token."""
        return self.prompt_tokens - 1

    @cached_property
    def embed(self) -> Tensor:
        """The first tensor."""
        return Tensor(Op.EMBED, 0, 0, self.positions, self.config.hidden_size)

    @cached_property
    def layer_tensors(self) -> list[Tensor]:
        """The tensors of a layer, each `start` counted from the layer's first leaf. Absent ones have no rows."""
        c, t = self.config, self.positions
        stats = -(-c.hidden_size // STAT_COLUMNS)
        queries, keys, head = c.num_heads, c.num_kv_heads, c.head_dim
        normed = 1 if c.qk_norm else 0
        shapes = [
            (Op.INPUT_MAX, t, stats),
            (Op.INPUT_SUM, t, stats),
            (Op.INPUT_NORM, t, c.hidden_size),
            (Op.Q, t * queries, head),
            (Op.K, t * keys, head),
            (Op.V, keys * head, t),
            (Op.Q_NORM, t * queries * normed, head),
            (Op.K_NORM, t * keys * normed, head),
            (Op.Q_ROPE, t * queries, head),
            (Op.K_ROPE, t * keys, head),
            (Op.ATTENTION, t, queries * head),
            (Op.MIDDLE, t, c.hidden_size),
            (Op.POST_MAX, t, stats),
            (Op.POST_SUM, t, stats),
            (Op.POST_NORM, t, c.hidden_size),
            (Op.GATE, t, c.intermediate_size),
            (Op.UP, t, c.intermediate_size),
            (Op.HIDDEN, t, c.intermediate_size),
            (Op.OUTPUT, t, c.hidden_size),
        ]
        return _stacked(shapes, 0)

    @cached_property
    def layer_leaves(self) -> int:
        """Leaves of one layer."""
        return sum(tensor.leaves for tensor in self.layer_tensors)

    @cached_property
    def final_tensors(self) -> list[Tensor]:
        """The tensors after the last layer."""
        c, rows = self.config, self.output_tokens
        stats = -(-c.hidden_size // STAT_COLUMNS)
        shapes = [
            (Op.FINAL_MAX, rows, stats),
            (Op.FINAL_SUM, rows, stats),
            (Op.FINAL_NORM, rows, c.hidden_size),
            (Op.LOGITS, rows, c.vocab_size),
        ]
        return _stacked(shapes, self.embed.leaves + c.num_layers * self.layer_leaves)

    @cached_property
    def count(self) -> int:
        """All leaves."""
        last = self.final_tensors[-1]
        return last.start + last.leaves

    def tensors(self) -> list[Tensor]:
        """All tensors in order, those without rows left out."""
        layers = [self.tensor(t.op, n) for n in range(self.config.num_layers) for t in self.layer_tensors if t.rows]
        return [self.embed, *layers, *self.final_tensors]

    def tensor(self, op: Op, layer: int = 0) -> Tensor:
        """One tensor. Raises InvalidInput if there is no such layer."""
        if op is Op.EMBED:
            return self.embed
        if op >= Op.FINAL_MAX:
            return self.final_tensors[op - Op.FINAL_MAX]
        if not 0 <= layer < self.config.num_layers:
            raise InvalidInput(f"there is no layer {layer} among {self.config.num_layers}.")
        inside = self.layer_tensors[op - Op.INPUT_MAX]
        start = self.embed.leaves + layer * self.layer_leaves + inside.start
        return Tensor(op, layer, start, inside.rows, inside.columns)

    def locate(self, index: int) -> Place:
        """What leaf `index` holds. Raises InvalidInput if the trace has no such leaf."""
        if not 0 <= index < self.count:
            raise InvalidInput(f"leaf {index} is outside a trace of {self.count} leaves.")
        tensor = self._tensor_at(index)
        row, leaf = divmod(index - tensor.start, tensor.row_leaves)
        column = leaf * tensor.per_leaf
        return Place(tensor, row, column, min(tensor.per_leaf, tensor.columns - column))

    def _tensor_at(self, index: int) -> Tensor:
        if index < self.embed.leaves:
            return self.embed
        layer, inside = divmod(index - self.embed.leaves, self.layer_leaves)
        if layer < self.config.num_layers:
            op = next(t.op for t in self.layer_tensors if inside < t.start + t.leaves)
            return self.tensor(op, layer)
        return next(t for t in self.final_tensors if index < t.start + t.leaves)

    def index(self, op: Op, layer: int, row: int, column: int) -> int:
        """The leaf that holds an element. Raises InvalidInput if the tensor has no such element."""
        tensor = self.tensor(op, layer)
        if not (0 <= row < tensor.rows and 0 <= column < tensor.columns):
            raise InvalidInput(f"{tensor.name} has {tensor.rows} rows of {tensor.columns}, not ({row}, {column}).")
        return tensor.start + row * tensor.row_leaves + column // tensor.per_leaf


def check_context(config: ModelConfig, max_context: int) -> None:
    """That every answer of up to max_context tokens, prompt included, has a trace that a tree can hold.

    One that is longer could not be accused. Raises InvalidInput, naming the longest context that fits.
    """
    # A prompt of one token and the rest of output: all positions have logits.
    if max_context > 1 and not _fits(config, max_context - 1):
        longest = bisect_left(range(1, max_context), True, key=lambda outputs: not _fits(config, outputs))
        raise InvalidInput(
            f"answers of {max_context} tokens would have traces of more than 2**32 leaves, too large for the court; "
            f"with this model max_context can be up to {longest + 1}."
        )


def _fits(config: ModelConfig, outputs: int) -> bool:
    try:
        Layout(config, 1, outputs)
    except InvalidInput:
        return False
    return True


def per_leaf(op: Op) -> int:
    """How many elements of a tensor a leaf holds: 16 or 32."""
    return 16 if op in WIDE else 32


def encode(values: Sequence[int], wide: bool) -> bytes:
    """A leaf from up to 16 (wide) or 32 values. Raises InvalidInput if they are too many or too large."""
    width = 8 if wide else 4
    try:
        data = b"".join(v.to_bytes(width, "little", signed=True) for v in values)
    except OverflowError as error:
        raise InvalidInput(f"a value of the trace does not fit {8 * width} bits.") from error
    if len(data) > LEAF_BYTES:
        raise InvalidInput(f"a leaf has {LEAF_BYTES} bytes, not {len(data)}.")
    return data.ljust(LEAF_BYTES, b"\0")


def decode(leaf: bytes, wide: bool) -> list[int]:
    """All 16 or 32 values of a leaf, padding included. Raises InvalidInput if it is not 128 bytes."""
    if len(leaf) != LEAF_BYTES:
        raise InvalidInput(f"a leaf has {LEAF_BYTES} bytes, not {len(leaf)}.")
    width = 8 if wide else 4
    return [int.from_bytes(leaf[i : i + width], "little", signed=True) for i in range(0, LEAF_BYTES, width)]


def row_leaves(row: Sequence[int], wide: bool) -> list[bytes]:
    """A row as leaves."""
    step = 16 if wide else 32
    return [encode(row[i : i + step], wide) for i in range(0, len(row), step)]


def trace_leaves(layout: Layout, values: Mapping[str, Rows]) -> list[bytes]:
    """All leaves of a trace. `values` maps tensor names to rows, as `forward.forward` gives them.

    Raises InvalidInput if a tensor is missing or of another shape.
    """
    leaves: list[bytes] = []
    for tensor in layout.tensors():
        rows = values.get(tensor.name, ())
        if len(rows) != tensor.rows or any(len(row) != tensor.columns for row in rows):
            raise InvalidInput(f"{tensor.name} of this trace is not of shape {tensor.rows} x {tensor.columns}.")
        for row in rows:
            leaves.extend(row_leaves(row, tensor.op in WIDE))
    return leaves


def trace_root(layout: Layout, values: Mapping[str, Rows]) -> Hash32:
    """The root of a trace: see the module's docstring."""
    return merkle_root(trace_leaves(layout, values))


def _stacked(shapes: Sequence[tuple[Op, int, int]], start: int) -> list[Tensor]:
    tensors = []
    for op, rows, columns in shapes:
        tensors.append(Tensor(op, 0, start, rows, columns))
        start += tensors[-1].leaves
    return tensors
