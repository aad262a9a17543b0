"""Canonical integer weights and the tree whose root names them (canonical arithmetic version 1, "Weights").

A model's float weights become rows of int16 with one power-of-two exponent a row; the rows of all tensors, in one
fixed order, are the leaves of one position-indexed Merkle tree: `weights_root`.

    row            e = floor(log2 max|w|) - 14;  W = round-half-even(w * 2**-e), so that w is about W * 2**e.
                   If a |W| would exceed 32,640, e is one larger. (bf16 weights never do; the bound keeps sums of
                   products inside 53 bits.) A row of zeros has e = 0.
    segment        256 bytes of a row: 128 columns of int16, little-endian (64 of int32 for RoPE); the last may be
                   shorter
    row's leaf     int16 e, little-endian || Merkle root of the row's segments: 34 bytes
    weights_root   Merkle root of all rows' leaves, in the order of `tensor_plan`

Segments let a contract open 128 columns of a row instead of all of them. All leaf counts follow from the model's
dimensions, so an index says which row of which tensor it is, and nobody can relabel a leaf.

Norm gains, biases and QK-norm gains are rows of their own, with one exponent each. RoPE tables are rows of int32 with
the exponent -30, one per position: head_dim/2 cosines, then as many sines, each rounded to the nearest multiple of
2**-30 from the exact value (`rope_rows`): no machine's libm takes part.

Slow on purpose. The fast twin is service/engine/fast_weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from poip_chain.errors import InvalidInput
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling, scaling_hash
from poip_chain.spec.types import Hash32

MAX_WEIGHT = 32_640
"""255/256 of 2**15: the largest magnitude that a bfloat16 row reaches."""
MANTISSA_SHIFT = 14
SEGMENT_BYTES = 256
ROW_LEAF_BYTES = 34
ROPE_EXPONENT = -30
MIN_EXPONENT, MAX_EXPONENT = -(2**15), 2**15 - 1

_ROPE_BITS = 160
"""Working precision of the RoPE tables. After 2**20 rotations the error is below 2**-135, far from 2**-31."""
_DECIMAL = Context(prec=80)

Row = Sequence[float]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor in the tree. `source` is its name in the checkpoint, empty for the RoPE tables."""

    name: str
    source: str
    rows: int
    columns: int


def tensor_plan(config: ModelConfig) -> list[TensorPlan]:
    """All tensors of a model in the order of the tree. Vectors are one row. Optional ones appear if the config has
    them.
    """
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    plan = [TensorPlan("embed", "model.embed_tokens.weight", config.vocab_size, hidden)]
    for layer in range(config.num_layers):
        source = f"model.layers.{layer}."

        def add(name: str, path: str, rows: int, columns: int, layer: int = layer, source: str = source) -> None:
            plan.append(TensorPlan(f"{layer}.{name}", source + path, rows, columns))

        add("input_norm", "input_layernorm.weight", 1, hidden)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            add(name, f"self_attn.{name}_proj.weight", rows, hidden)
            if config.attention_bias:
                add(f"{name}_bias", f"self_attn.{name}_proj.bias", 1, rows)
        if config.qk_norm:
            add("q_norm", "self_attn.q_norm.weight", 1, head)
            add("k_norm", "self_attn.k_norm.weight", 1, head)
        add("o", "self_attn.o_proj.weight", hidden, queries)
        add("post_norm", "post_attention_layernorm.weight", 1, hidden)
        for name, rows, columns in (
            ("gate", config.intermediate_size, hidden),
            ("up", config.intermediate_size, hidden),
            ("down", hidden, config.intermediate_size),
        ):
            add(name, f"mlp.{name}_proj.weight", rows, columns)
            if config.mlp_bias:
                add(f"{name}_bias", f"mlp.{name}_proj.bias", 1, rows)
    plan.append(TensorPlan("final_norm", "model.norm.weight", 1, hidden))
    if not config.tied_embeddings:
        plan.append(TensorPlan("head", "lm_head.weight", config.vocab_size, hidden))
    plan.append(TensorPlan("rope", "", config.max_positions, head))
    return plan


def quantise_row(row: Row) -> tuple[int, list[int]]:
    """A row of float weights as (exponent e, integers W): see the module's docstring.

    Raises InvalidInput if a weight is infinite or not a number.
    """
    values = [float(w) for w in row]
    if not all(math.isfinite(w) for w in values):
        raise InvalidInput("a weight is infinite or not a number: such a model has no canonical form.")
    largest = max((abs(w) for w in values), default=0.0)
    if largest == 0.0:
        return 0, [0] * len(values)
    exponent = math.frexp(largest)[1] - 1 - MANTISSA_SHIFT
    integers = _scaled(values, exponent)
    if max(map(abs, integers)) > MAX_WEIGHT:
        exponent += 1
        integers = _scaled(values, exponent)
    return exponent, integers


def _scaled(values: list[float], exponent: int) -> list[int]:
    # Fractions are exact and round() takes halves to even.
    return [round(Fraction(w) / Fraction(2) ** exponent) for w in values]


def row_leaf(exponent: int, integers: Sequence[int], width: int = 2) -> bytes:
    """The leaf of a row: 34 bytes. `width` is 2 bytes an integer for weights, 4 for RoPE tables.

    Raises InvalidInput if an integer or the exponent does not fit.
    """
    try:
        data = b"".join(w.to_bytes(width, "little", signed=True) for w in integers)
        head = exponent.to_bytes(2, "little", signed=True)
    except OverflowError as error:
        raise InvalidInput(f"a weight or exponent of a row does not fit its {8 * width} or 16 bits.") from error
    return head + merkle_root([data[i : i + SEGMENT_BYTES] for i in range(0, len(data), SEGMENT_BYTES)])


def weights_root(
    config: ModelConfig, tensors: Mapping[str, Sequence[Row]], scaling: RopeScaling | None = None
) -> Hash32:
    """The root over all rows of a model. `tensors` maps checkpoint names to rows (a vector is one row).

    Raises InvalidInput if a tensor is missing or has another shape than the dimensions say, or `scaling` is not the
    rope_scaling entry that the config names.
    """
    leaves: list[bytes] = []
    for tensor in tensor_plan(config):
        if not tensor.source:
            leaves.extend(row_leaf(ROPE_EXPONENT, row, 4) for row in rope_rows(config, scaling))
            continue
        rows = tensors.get(tensor.source)
        if rows is None:
            raise InvalidInput(f"the checkpoint has no tensor {tensor.source}.")
        if len(rows) != tensor.rows or any(len(row) != tensor.columns for row in rows):
            raise InvalidInput(f"tensor {tensor.source} is not of shape {tensor.rows} x {tensor.columns}.")
        leaves.extend(row_leaf(*quantise_row(row)) for row in rows)
    return merkle_root(leaves)


def row_index(config: ModelConfig, name: str, row: int) -> int:
    """Where row `row` of the tensor `name` stands among the tree's leaves. Raises InvalidInput if there is none."""
    start = 0
    for tensor in tensor_plan(config):
        if tensor.name == name:
            if not 0 <= row < tensor.rows:
                raise InvalidInput(f"tensor {name} has {tensor.rows} rows; there is no row {row}.")
            return start + row
        start += tensor.rows
    raise InvalidInput(f"this model has no tensor named {name!r}.")


def rope_rows(config: ModelConfig, scaling: RopeScaling | None = None) -> Iterator[list[int]]:
    """The RoPE tables, one row per position from 0: head_dim/2 cosines, then sines, in units of 2**-30.

    Frequency i is rope_theta ** (-2 i / head_dim), then scaled where the model's RoPE is. Position p turns by p times
    that angle: each position is one rotation after the one before, in fixed point of 160 bits, so the rounding to 30 bits
    is that of the exact value.
    Raises InvalidInput if `scaling` is not the rope_scaling entry that the config names.
    """
    if scaling_hash(scaling) != config.rope_scaling_hash:
        raise InvalidInput("the RoPE scaling given is not the one that the model's config names by its hash.")
    half = config.head_dim // 2
    angles = [_angle(config.rope_theta, 2 * i, config.head_dim) for i in range(half)]
    steps = [_cos_sin(scaling.scale(angle) if scaling else angle) for angle in angles]
    state = [(1 << _ROPE_BITS, 0)] * half
    cut = _ROPE_BITS + ROPE_EXPONENT
    for _ in range(config.max_positions):
        yield [(c + (1 << (cut - 1))) >> cut for c, _ in state] + [(s + (1 << (cut - 1))) >> cut for _, s in state]
        state = [
            ((c * dc - s * ds) >> _ROPE_BITS, (s * dc + c * ds) >> _ROPE_BITS)
            for (c, s), (dc, ds) in zip(state, steps, strict=True)
        ]


def _angle(theta: int, numerator: int, denominator: int) -> int:
    """theta ** (-numerator / denominator) in units of 2**-160. Decimal's ln and exp are correctly rounded."""
    power = _DECIMAL.divide(Decimal(-numerator), Decimal(denominator))
    value = _DECIMAL.exp(_DECIMAL.multiply(power, _DECIMAL.ln(Decimal(theta))))
    return int(_DECIMAL.to_integral_value(_DECIMAL.multiply(value, Decimal(1 << _ROPE_BITS))))


def _cos_sin(angle: int) -> tuple[int, int]:
    """Cosine and sine of an angle in [0, 1], all in units of 2**-160, by their Taylor series."""
    one = 1 << _ROPE_BITS
    sums = [0, 0]
    term = one
    k = 0
    while term:
        sums[k % 2] += -term if k % 4 >= 2 else term
        k += 1
        term = (term * angle >> _ROPE_BITS) // k
    return sums[0], sums[1]
