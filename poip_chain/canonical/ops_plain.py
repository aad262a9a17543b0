"""Element-wise steps on numpy arrays: what runs without numba, and what the compiled steps are compared with.

Shapes: T positions, N columns; `h` is the residual stream, int64. Outputs are written into the last arguments.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.spec import canonical as c

I64 = NDArray[np.int64]
Array = NDArray[Any]


def finish(sums: Array, shift: I64, bias: I64, limit: int, out: Array) -> None:
    """Sums of products [T, N] rounded by `shift` [N] (0 to 62), plus bias, clamped to +-limit."""
    out[...] = np.clip(_round(sums, shift) + bias, -limit, limit)


def add(sums: Array, shift: I64, bias: I64, h: I64, out: I64) -> None:
    """The same without a clamp, added to the residual stream."""
    out[...] = h + _round(sums, shift) + bias


def _round(sums: Array, shift: I64) -> I64:
    rounded: I64 = (sums.astype(np.int64) + ((np.int64(1) << shift) >> 1)) >> shift
    return rounded


def rms_norm(
    h: Array, epsilon: int, root: int, gains: I64, gain_shift: int, limit: int, out: Array, maxima: I64, sums: I64
) -> None:
    """Rows of h normalised; `epsilon` at shift 0, `root` = isqrt(columns << 40); running statistics per 128 columns."""
    rows, columns = h.shape
    wide = h.astype(np.int64)
    size = np.abs(wide)
    blocks = range(0, columns, c.STAT_COLUMNS)
    maxima[...] = np.maximum.accumulate(
        np.stack([size[:, i : i + c.STAT_COLUMNS].max(axis=1) for i in blocks], axis=1), axis=1
    )
    for t in range(rows):
        shift = c.norm_shift(int(maxima[t, -1]))
        half = (1 << shift) >> 1
        q = (wide[t] + half) >> shift
        squares = q * q
        parts = [squares[i : i + c.STAT_COLUMNS].sum() for i in blocks]
        sums[t] = (epsilon >> 2 * shift) + np.cumsum(parts)
        scale, down = norm_scale(int(sums[t, -1]), root)
        y = (q * scale + (1 << (down - 1))) >> down
        out[t] = np.clip(_shifted(y * gains, gain_shift), -limit, limit)


def norm_scale(total: int, root: int) -> tuple[int, int]:
    """`spec.canonical.norm_scale` with the root of the columns given."""
    t = 62 - total.bit_length()
    t -= t & 1
    return (root << 36) // isqrt(total << t), 36 - t // 2


def _shifted(x: I64, s: int) -> I64:
    return (x + (1 << (s - 1))) >> s if s > 0 else x << -s


def rope(x: Array, heads: int, table: Array, out: Array) -> None:
    """x, out int32 [T, heads * head_dim], table int32 [T, head_dim]: cosines, then sines."""
    rows, head = x.shape[0], x.shape[1] // heads
    half = head // 2
    pairs = x.reshape(rows, heads, 2, half).astype(np.int64)
    cosine, sine = (table[:, None, i : i + half].astype(np.int64) for i in (0, half))
    shift = c.NORM_BITS + 30 - c.QK_BITS
    first = (pairs[:, :, 0] * cosine - pairs[:, :, 1] * sine + (1 << (shift - 1))) >> shift
    second = (pairs[:, :, 1] * cosine + pairs[:, :, 0] * sine + (1 << (shift - 1))) >> shift
    both = np.stack([first, second], axis=2).reshape(rows, heads * head)
    out[...] = np.clip(both, -c.QK_LIMIT, c.QK_LIMIT)


def exp_negative(d: I64) -> tuple[I64, I64]:
    """`spec.canonical.exp_negative` of an array."""
    z = np.minimum(d, c.EXP_LIMIT) * c.LOG2E
    f = (z >> 20) & (2**30 - 1)
    r = np.zeros_like(f)
    for coefficient in reversed(c.EXP_COEFFICIENTS):
        r = coefficient + ((r * f) >> 30)
    return r, z >> 50


def softmax(scores: Array, first: int, group: int, multiplier: int, totals: I64) -> None:
    """Scores float64 [rows, keys] to weights in place; row r stands at position first + r // group and sees keys up to
    it. `totals` [rows] are the sums of weights."""
    rows, keys = scores.shape
    position = first + np.arange(rows) // group
    hidden = np.arange(keys)[None, :] > position[:, None]
    largest = np.where(hidden, -np.inf, scores).max(axis=1, keepdims=True)
    distance = np.where(hidden, 0, np.minimum(largest - scores, c.DISTANCE_LIMIT)).astype(np.int64)
    r, n = exp_negative((distance * multiplier) >> 34)
    s = np.minimum(n + 10, 40)
    weights = np.where(hidden, 0, (r + (np.int64(1) << (s - 1))) >> s)
    totals[...] = weights.sum(axis=1)
    scores[...] = weights


def attend(products: Array, totals: I64, out: Array) -> None:
    """products [rows, head_dim] over totals [rows], rounded, into out int32 [rows, head_dim]."""
    total = totals[:, None]
    out[...] = ((products.astype(np.int64) << (c.ATTENTION_BITS - c.V_BITS + 1)) + total) // (2 * total)


def swiglu(gate: Array, up: Array, out: Array) -> None:
    """gate, up, out int32 [T, N]."""
    g = gate.astype(np.int64)
    r, n = exp_negative(np.abs(g) << 4)
    e = r >> np.minimum(n, 40)
    sigma = np.where(g >= 0, np.int64(1 << 60), e << 30) // ((1 << 30) + e)
    silu = (g * sigma + (1 << 29)) >> 30
    s = 2 * c.GATE_BITS - c.HIDDEN_BITS
    out[...] = np.clip((silu * up + (1 << (s - 1))) >> s, -c.HIDDEN_LIMIT, c.HIDDEN_LIMIT)
