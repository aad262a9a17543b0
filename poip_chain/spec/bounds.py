"""The exactness bound of a model: no sum of its forward pass can leave the words that engines and contracts use.

Canonical arithmetic is exact only while nothing overflows. The bounds follow from the dimensions, the clamps of
`canonical.py` and the integer weights, which are public: they hold for every input, not for the inputs that were tried.
They are recomputed before a model is registered; `check_bounds` refuses a model that breaks one, with its name.

    every sum of products over a block of BLOCK columns   < 2**53   a float64 matrix product is exact in any order
    every whole sum of products                           < 2**61   int64, with room for the rounding
    residual stream, summed over all layers               < 2**62
    norm outputs                                          < 2**31   int32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

from poip_chain.errors import InvalidInput
from poip_chain.spec import canonical as c
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.weights import TensorPlan, tensor_plan

BLOCK = 4096
"""Columns that an engine may sum in float64 before it adds in int64. Feed-forwards are deeper than that, and the worst
case over all of them would exceed 2**53 for models that are perfectly tame block by block."""
KEY_BLOCK = 4096
"""Keys that an engine may sum in float64: 2**12 * 2**20 * V_LIMIT < 2**53."""
EXACT = 2**53
WHOLE = 2**61
STREAM = 2**62
MAX_HIDDEN = 8192
"""Squares of 48 bits sum to less than 2**62 (`canonical.norm_scale`)."""
MAX_HEAD_DIM = 512
"""512 * QK_LIMIT**2 < 2**53."""
MAX_POSITIONS = 2**17
"""See `canonical.attend`."""
MAX_OUTPUTS = 2**17
MAX_LAYERS = 1024
MAX_EPS_E12 = 10**10

_LINEAR = {
    "q": (c.NORM_BITS, c.NORM_BITS),
    "k": (c.NORM_BITS, c.NORM_BITS),
    "v": (c.NORM_BITS, c.V_BITS),
    "o": (c.ATTENTION_BITS, c.RESIDUAL_BITS),
    "gate": (c.NORM_BITS, c.GATE_BITS),
    "up": (c.NORM_BITS, c.GATE_BITS),
    "down": (c.HIDDEN_BITS, c.RESIDUAL_BITS),
    "head": (c.NORM_BITS, c.LOGIT_BITS),
}
"""Fraction bits in and out of each linear layer."""
ATTENTION_LIMIT = 16 * c.V_LIMIT
"""An attention output is a weighted mean of v, in units 16 times finer."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What the bounds need of one row: its exponent, its largest |W|, the sum of |W|, and the largest such sum over a
    block of BLOCK columns (from column 0 on).
    """

    exponent: int
    largest: int
    total: int
    block: int


def extent(exponent: int, integers: Sequence[int]) -> Extent:
    """The extent of a row. A fast engine computes the same four numbers by its own means."""
    sums = [sum(map(abs, integers[i : i + BLOCK])) for i in range(0, len(integers), BLOCK)]
    return Extent(exponent, max(map(abs, integers), default=0), sum(sums), max(sums, default=0))


def check_dimensions(config: ModelConfig) -> None:
    """Raises InvalidInput, naming the dimension and its range, if the arithmetic is not defined for it."""
    limits = {
        "hidden_size": (1, MAX_HIDDEN),
        "intermediate_size": (1, MAX_OUTPUTS),
        "num_layers": (1, MAX_LAYERS),
        "num_heads": (1, 1024),
        "num_kv_heads": (1, 1024),
        "head_dim": (2, MAX_HEAD_DIM),
        "vocab_size": (1, 2**31),
        "max_positions": (1, MAX_POSITIONS),
        "rms_norm_eps_e12": (1, MAX_EPS_E12),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InvalidInput(f"{name} is {value}; canonical arithmetic version 1 is defined for {low} to {high}.")
    if config.head_dim % 2:
        raise InvalidInput(f"head_dim is {config.head_dim}; rotary embeddings need an even one.")
    if config.num_heads % config.num_kv_heads:
        raise InvalidInput(f"{config.num_heads} heads cannot share {config.num_kv_heads} heads of keys evenly.")
    if config.num_heads * config.head_dim > MAX_OUTPUTS:
        raise InvalidInput(
            f"num_heads * head_dim is {config.num_heads * config.head_dim}; canonical arithmetic version 1 is defined for "
            f"up to {MAX_OUTPUTS}."
        )
    if config.qk_norm and c.norm_epsilon(config.rms_norm_eps_e12, config.head_dim, c.NORM_BITS, 0) < 1:
        raise InvalidInput(
            "rms_norm_eps is too small for QK-norm in units of 2**-32: a row of zeros would divide by 0."
        )


def check_bounds(config: ModelConfig, extents: Callable[[TensorPlan], Iterable[Extent]]) -> dict[str, int]:
    """The worst case of every sum of products, by tensor name. `extents` gives a tensor's rows in order.

    Raises InvalidInput naming tensor, row and bound if the model breaks one.
    """
    check_dimensions(config)
    worst: dict[str, int] = {}
    limits: dict[str, int] = {}  # largest |input| of the linear layers that follow
    stream = 0
    embedding: list[Extent] = []
    for plan in tensor_plan(config):
        kind = plan.name.rpartition(".")[2]
        if kind == "rope":
            continue
        rows = list(extents(plan))
        if len(rows) != plan.rows:
            raise InvalidInput(f"tensor {plan.name} has {len(rows)} rows of extents, not {plan.rows}.")
        if kind == "embed":
            stream = _embedding(plan, rows)
            embedding = rows
        elif kind in ("input_norm", "post_norm", "final_norm", "q_norm", "k_norm"):
            limits[kind] = _norm(plan, rows[0])
            if kind == "final_norm" and config.tied_embeddings:
                tied = TensorPlan("embed", plan.source, config.vocab_size, config.hidden_size)
                worst["logits"], _ = _linear(tied, embedding, "head", limits[kind])
        elif kind.endswith("_bias"):
            largest = _bias(plan, rows[0])
            stream += largest if kind == "down_bias" else 0
        else:
            limit = {
                "o": ATTENTION_LIMIT,
                "down": c.HIDDEN_LIMIT,
                "gate": limits.get("post_norm", 0),
                "up": limits.get("post_norm", 0),
                "head": limits.get("final_norm", 0),
            }.get(kind, limits.get("input_norm", 0))
            worst["logits" if kind == "head" else plan.name], change = _linear(plan, rows, kind, limit)
            if kind in ("o", "down"):
                stream += change
                _require(stream < STREAM, plan, "residual stream", stream, STREAM)
    return worst


def _embedding(plan: TensorPlan, rows: Sequence[Extent]) -> int:
    largest = max(abs(c.embed(row.largest, min(row.exponent, 64))) for row in rows)
    _require(largest < 2**56, plan, "residual stream after the embedding", largest, 2**56)
    return largest


def _norm(plan: TensorPlan, row: Extent) -> int:
    """The largest output of a norm: no element exceeds sqrt(columns) times the root mean square."""
    normalised = sqrt_columns(plan.columns) + 1
    largest = c.rsh(normalised * row.largest, c.RESIDUAL_BITS - min(row.exponent, 64) - c.NORM_BITS) + 1
    _require(largest < 2**31, plan, "norm output", largest, 2**31)
    return largest


def sqrt_columns(columns: int) -> int:
    """sqrt(columns) in units of 2**-20, floored: the largest normalised element is at most one more."""
    return isqrt(columns << 2 * c.RESIDUAL_BITS)


def _linear(plan: TensorPlan, rows: Sequence[Extent], kind: str, limit: int) -> tuple[int, int]:
    """(largest |sum of products|, largest |output| in its unit) of a linear layer with inputs up to `limit`."""
    bits_in, bits_out = _LINEAR[kind]
    worst = change = 0
    for number, row in enumerate(rows):
        block, whole = row.block * limit, row.total * limit
        if block >= EXACT or whole >= WHOLE:
            name, value, bound = ("block sum", block, EXACT) if block >= EXACT else ("sum", whole, WHOLE)
            _require(False, plan, f"{name} of row {number}", value, bound)
        shift = bits_in - row.exponent - bits_out
        if shift < 0 and row.total:
            raise InvalidInput(
                f"tensor {plan.name}, row {number}: its exponent {row.exponent} is above {bits_in - bits_out}; weights "
                "of that size have no canonical form."
            )
        worst = max(worst, whole)
        change = max(change, c.rsh(whole, max(0, shift)) + 1)
    return worst, change


def _bias(plan: TensorPlan, row: Extent) -> int:
    """The largest bias in units of 2**-20, the finest of any output that has one."""
    largest = row.largest << max(0, c.RESIDUAL_BITS + min(row.exponent, 64))
    _require(largest < 2**50, plan, "bias", largest, 2**50)
    return largest


def _require(holds: bool, plan: TensorPlan, what: str, value: int, bound: int) -> None:
    if not holds:
        raise InvalidInput(
            f"tensor {plan.name}: the {what} can reach {value} (2**{value.bit_length()}), not below the bound of "
            f"2**{bound.bit_length() - 1}. This model cannot be judged exactly and cannot be registered."
        )
