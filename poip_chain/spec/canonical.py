"""Canonical arithmetic, version 1: every step of a Llama-architecture forward pass, in integers.

Exact integer sums do not depend on their order, so any machine, library or number of threads gives the same bits, and
a contract can recompute any single element. Each function here is one step on plain ints; `forward.py` strings them
together, `referee.py` says which inputs each element needs. The fast engine and the contracts are the second writings.
This file knows no model, no tokens and no trace.

A real number x is held as the integer round(x * 2**F); F is the number of *fraction bits* of its kind:

    residual stream 20 (int64)     norm output, pre-RoPE q and k, gate, up, attention output, logits 16
    attention weights 20           q and k after RoPE, v 12           feed-forward hidden 14

Ranges. Every function states its own. They rest on clamps stated here and on bounds of the model's weights that
`bounds.py` checks at registration; under them no intermediate leaves a signed 64-bit word. Sums of products
stay below 2**53 in blocks of `bounds.BLOCK` terms, so that a float64 matrix product, in any order, is exact too.

`>>` is the arithmetic shift (floor). The only divisions are floors by positive numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

RESIDUAL_BITS = 20
NORM_BITS = 16
QK_BITS = 12
V_BITS = 12
WEIGHT_BITS = 20
ATTENTION_BITS = 16
GATE_BITS = 16
HIDDEN_BITS = 14
LOGIT_BITS = 16

LINEAR_QK_LIMIT = 2**26
"""q and k before RoPE: +-1024. Beside RoPE's 2**30 a product stays below 2**56. Trained biases of keys reach some
hundreds (Qwen2), so a tighter clamp would change such models."""
QK_LIMIT = 2**22 - 1
"""q and k after RoPE: +-1024, so that 512 products of two of them sum to less than 2**53."""
V_LIMIT = 2**21 - 1
"""v: +-512. With weights up to 2**20, 2**12 keys stay below 2**53, and 2**17 keys times 32 below 2**63 (`attend`)."""
GATE_LIMIT = 2**30 - 1
"""gate and up: +-16,384. Keeps both products of `swiglu` below 2**60."""
HIDDEN_LIMIT = 2**27 - 1
"""Feed-forward hidden values: +-8,192. Rows of `down` have the largest sums; this keeps them inside the bounds."""
LOGIT_LIMIT = 2**31 - 1
"""Logits: +-32,768, what an int32 holds."""

STAT_COLUMNS = 128
"""Columns that one running maximum or sum of squares covers: 8 leaves of 16 int64."""

LOG2E = 1_549_082_005
"""log2(e) in units of 2**-30, rounded to nearest. Over d <= 32 its error of 2**-31.6 shifts log2 by less than 2**-26."""
EXP_LIMIT = 2**25
"""exp(-32) and below is 0 wherever an exponential is used: 2**-46 against weights of 2**-20 and sigmoids of 2**-30."""
EXP_COEFFICIENTS = (1_073_741_824, -744_260_975, 257_938_938, -59_583_045, 10_286_509, -1_369_790, 117_454)
"""2**-f on [0, 1], degree 6, in units of 2**-30: least squares on 64 Chebyshev nodes (largest error 1e-8), the
constant set to exactly 1 so that exp(0) = 1 and the largest attention weight is exactly 2**20. One degree less errs by
2e-7, close to a weight's own rounding of 2**-21; one more gains nothing that a weight or a sigmoid would keep."""

DISTANCE_LIMIT = 2**33
"""Score distances beyond 512 (before the division by sqrt(head_dim)) have weight 0 for every head size up to 1,024:
512 / sqrt(1024) = 16 nats, and 2**20 * exp(-16) < 1/2. Keeps `distance * multiplier` below 2**63."""


def rsh(x: int, s: int) -> int:
    """x * 2**-s rounded to nearest, halves upwards; for s <= 0 the exact x << -s."""
    return (x + (1 << (s - 1))) >> s if s > 0 else x << -s


def clamp(x: int, limit: int) -> int:
    """x, moved into [-limit, limit]."""
    return max(-limit, min(limit, x))


# Embedding and linear layers


def embed(weight: int, exponent: int) -> int:
    """One element of the residual stream from an embedding row. |result| < 2**(36 + exponent), at least 0 or 1."""
    return rsh(weight, -(RESIDUAL_BITS + exponent))


def dot(weights: Sequence[int], x: Sequence[int]) -> int:
    """The exact sum of products. |result| <= sum |weights| * max |x|: `bounds.py` checks that this is < 2**61."""
    return sum(w * v for w, v in zip(weights, x, strict=True))


def linear(total: int, exponent: int, bits_in: int, bits_out: int, bias: tuple[int, int] | None = None) -> int:
    """An output element from its exact sum: one rounding to `bits_out`, then the bias (integer, exponent) in the same
    unit.

    The bias is added after the rounding: in the sum's own unit, 2**(exponent - bits_in), a row of tiny weights would
    push it out of every word, and engines can hold it as one more vector of outputs. Range: |total| >> shift, plus
    2**(15 + bias exponent + bits_out), both below 2**61 by `bounds.py`. An engine may cap the shift at 62: as
    |total| < 2**61, the result is 0 either way.
    """
    result = rsh(total, bits_in - exponent - bits_out)
    return result if bias is None else result + rsh(bias[0], -(bits_out + bias[1]))


# RMSNorm


def norm_shift(largest: int) -> int:
    """How far a row with this largest magnitude is shifted down, so that its squares have at most 48 bits. 0 to 39."""
    return max(0, largest.bit_length() - 24)


def norm_square(h: int, shift: int) -> int:
    """One term of the sum of squares: the shifted element, |q| <= 2**24, squared."""
    q = rsh(h, shift)
    return q * q


def norm_epsilon(eps_e12: int, columns: int, bits: int, shift: int) -> int:
    """What the sum of squares starts from: eps * columns in units of 2**(-2 bits), rounded to nearest, shifted down.

    At most 2**47 for eps <= 0.01 and 8,192 columns of 20 bits. At least 1 where the shift is 0 and eps >= 1e-12 (bits
    20); with a positive shift the squares alone are at least 2**46: no row divides by zero.
    """
    return ((eps_e12 * columns << 2 * bits) + 5 * 10**11) // 10**12 >> 2 * shift


def norm_scale(total: int, columns: int) -> tuple[int, int]:
    """(multiplier R, shift) with q * R >> shift = q * sqrt(columns / total) in units of 2**-20.

    total: 1 <= total < 2**62 (8,192 columns of 2**48, and epsilon). total << t lies in [2**60, 2**62), its root in
    [2**30, 2**31); sqrt(columns) <= 2**6.5 has 20 fraction bits, so R's dividend is below 2**63 and R < 2**33.
    R carries a relative error below 2**-20 / sqrt(columns) + 2**-25. The shift is 5 to 36.
    """
    t = 62 - total.bit_length()
    t -= t & 1
    return (isqrt(columns << 40) << 36) // isqrt(total << t), 36 - t // 2


def norm_element(h: int, shift: int, scale: tuple[int, int], gain: int, gain_exponent: int) -> int:
    """One element of the norm's output in units of 2**-16.

    |q * R| < 2**57.5; the normalised |y| <= isqrt(columns << 40) + 1 < 2**27 (no element exceeds sqrt(columns) times
    the root mean square); |y * gain| < 2**42. `bounds.py` checks that the result fits an int32 for the model's gains.
    """
    y = rsh(rsh(h, shift) * scale[0], scale[1])
    return rsh(y * gain, RESIDUAL_BITS - gain_exponent - NORM_BITS)


def rms_norm(row: Sequence[int], bits: int, eps_e12: int, gains: Sequence[int], gain_exponent: int) -> list[int]:
    """RMSNorm of one row of `bits` fraction bits, |row| < 2**63; the scale of the row cancels except in eps."""
    shift = norm_shift(max(abs(h) for h in row))
    total = norm_epsilon(eps_e12, len(row), bits, shift) + sum(norm_square(h, shift) for h in row)
    scale = norm_scale(total, len(row))
    return [norm_element(h, shift, scale, gain, gain_exponent) for h, gain in zip(row, gains, strict=True)]


# Attention


def rope(x0: int, x1: int, cosine: int, sine: int) -> tuple[int, int]:
    """Rotates one pair, |x| <= 2**26 in units of 2**-16, by a committed angle in units of 2**-30, to 12 bits.

    Sums < 2**57.1. A rotation can lengthen one coordinate to sqrt 2 of the limit: clamped to +-QK_LIMIT.
    """
    s = NORM_BITS + 30 - QK_BITS
    return clamp(rsh(x0 * cosine - x1 * sine, s), QK_LIMIT), clamp(rsh(x1 * cosine + x0 * sine, s), QK_LIMIT)


def score_multiplier(head_dim: int) -> int:
    """2**30 / sqrt(head_dim), rounded to nearest. A power of two for head sizes 16, 64, 256; at most 2**30."""
    return (isqrt((1 << 62) // head_dim) + 1) >> 1


def exp_negative(d: int) -> tuple[int, int]:
    """exp(-d) for d >= 0 in units of 2**-20 as (r, n): r * 2**-(30 + n), 2**29 <= r <= 2**30, 0 <= n <= 46.

    d is clamped to EXP_LIMIT; d * LOG2E < 2**56, its integer part is n, its fraction f keeps 30 bits. All Horner
    products are below 2**60. The relative error is below 2**-26 for d < EXP_LIMIT.
    """
    z = min(d, EXP_LIMIT) * LOG2E
    f = (z >> 20) & (2**30 - 1)
    r = 0
    for coefficient in reversed(EXP_COEFFICIENTS):
        r = coefficient + ((r * f) >> 30)
    return r, z >> 50


def attention_weight(distance: int, multiplier: int) -> int:
    """exp(-distance / sqrt(head_dim)), distance >= 0 = largest score minus this score in units of 2**-24: 0 to 2**20 in
    units of 2**-20.

    The distance (< 2**54) is clamped, so its product with the multiplier is below 2**63. The shift is at most 40: from
    there on the weight is 0, and a 64-bit shift stays defined.
    """
    d = (min(distance, DISTANCE_LIMIT) * multiplier) >> 34
    r, n = exp_negative(d)
    return rsh(r, min(n + 10, 40))


def softmax(scores: Sequence[int], multiplier: int) -> tuple[int, list[int], int]:
    """(largest score m, weights, their sum L) of one row of scores in units of 2**-24, |score| < 2**53.

    2**20 <= L <= 2**37 for up to 2**17 keys: the largest score has weight exactly 2**20. No weight is divided; `attend`
    divides once.
    """
    m = max(scores)
    weights = [attention_weight(m - s, multiplier) for s in scores]
    return m, weights, sum(weights)


def attend(products: int, total: int) -> int:
    """One attention output in units of 2**-16: sum of weight * v over sum of weights, rounded to nearest, halves up.

    |products| <= total * V_LIMIT, so 32 * |products| + total < 2**63 for up to 2**17 keys, and |result| <= 16 * V_LIMIT
    < 2**25: a weighted mean.
    """
    return ((products << (ATTENTION_BITS - V_BITS + 1)) + total) // (2 * total)


# Feed-forward


def swiglu(gate: int, up: int) -> int:
    """silu(gate) * up in units of 2**-14 from both in units of 2**-16, |gate|, |up| <= GATE_LIMIT.

    sigma = 1 / (1 + exp(-|gate|)), or 1 minus it for a negative gate, in units of 2**-30, from exp in [0, 2**30]: the
    dividend is at most 2**60. |gate * sigma| <= 2**60, |silu| < 2**30, |silu * up| < 2**60.
    """
    r, n = exp_negative(abs(gate) << 4)
    e = r >> min(n, 40)
    sigma = ((1 << 60) if gate >= 0 else e << 30) // ((1 << 30) + e)
    silu = rsh(gate * sigma, 30)
    return clamp(rsh(silu * up, 2 * GATE_BITS - HIDDEN_BITS), HIDDEN_LIMIT)
