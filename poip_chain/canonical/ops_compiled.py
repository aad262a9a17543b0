"""The steps of `ops_plain` compiled: same names, arguments and bits. Imported only where numba is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical.compiled import compiled, inlined
from poip_chain.spec import canonical as c

I64 = NDArray[np.int64]
Array = NDArray[Any]

_C0, _C1, _C2, _C3, _C4, _C5, _C6 = c.EXP_COEFFICIENTS
_LOG2E, _EXP_LIMIT = c.LOG2E, c.EXP_LIMIT
_QK_LIMIT, _HIDDEN_LIMIT = c.QK_LIMIT, c.HIDDEN_LIMIT
_DISTANCE_LIMIT = float(c.DISTANCE_LIMIT)
_STAT_COLUMNS = c.STAT_COLUMNS
_ROPE_SHIFT = c.NORM_BITS + 30 - c.QK_BITS
_ATTEND_SHIFT = c.ATTENTION_BITS - c.V_BITS + 1
_HIDDEN_SHIFT = 2 * c.GATE_BITS - c.HIDDEN_BITS
_ONE = np.int64(1)


@compiled
def finish(sums: Array, shift: I64, bias: I64, limit: int, out: Array) -> None:
    """See ops_plain."""
    rows, columns = sums.shape
    for t in range(rows):
        for n in range(columns):
            s = shift[n]
            value = ((np.int64(sums[t, n]) + ((_ONE << s) >> 1)) >> s) + bias[n]
            out[t, n] = min(max(value, -limit), limit)


@compiled
def add(sums: Array, shift: I64, bias: I64, h: I64, out: I64) -> None:
    """See ops_plain."""
    rows, columns = sums.shape
    for t in range(rows):
        for n in range(columns):
            s = shift[n]
            out[t, n] = h[t, n] + ((np.int64(sums[t, n]) + ((_ONE << s) >> 1)) >> s) + bias[n]


@inlined
def _bit_length(x: Any) -> Any:
    n = 0
    while x > 0:
        x >>= 1
        n += 1
    return n


@inlined
def _isqrt(x: Any) -> Any:
    # The root of a 62-bit number as float64 is off by at most one.
    r = np.int64(np.sqrt(np.float64(x)))
    while r * r > x:
        r -= 1
    while (r + 1) * (r + 1) <= x:
        r += 1
    return r


@compiled
def rms_norm(
    h: Array, epsilon: int, root: int, gains: I64, gain_shift: int, limit: int, out: Array, maxima: I64, sums: I64
) -> None:
    """See ops_plain."""
    rows, columns = h.shape
    for t in range(rows):
        largest = np.int64(0)
        for start in range(0, columns, _STAT_COLUMNS):
            for i in range(start, min(columns, start + _STAT_COLUMNS)):
                largest = max(largest, abs(np.int64(h[t, i])))
            maxima[t, start // _STAT_COLUMNS] = largest
        shift = max(0, _bit_length(largest) - 24)
        half = (_ONE << shift) >> 1
        total = np.int64(epsilon) >> (2 * shift)
        for start in range(0, columns, _STAT_COLUMNS):
            for i in range(start, min(columns, start + _STAT_COLUMNS)):
                q = (np.int64(h[t, i]) + half) >> shift
                total += q * q
            sums[t, start // _STAT_COLUMNS] = total
        twice = 62 - _bit_length(total)
        twice -= twice & 1
        scale = (np.int64(root) << 36) // _isqrt(total << twice)
        down = 36 - twice // 2
        round_down = _ONE << (down - 1)
        round_gain = (_ONE << gain_shift) >> 1 if gain_shift > 0 else np.int64(0)
        for i in range(columns):
            y = (((np.int64(h[t, i]) + half) >> shift) * scale + round_down) >> down
            z = y * gains[i]
            z = (z + round_gain) >> gain_shift if gain_shift > 0 else z << -gain_shift
            out[t, i] = min(max(z, -limit), limit)


@compiled
def rope(x: Array, heads: int, table: Array, out: Array) -> None:
    """See ops_plain."""
    rows = x.shape[0]
    head = x.shape[1] // heads
    half = head // 2
    rounding = _ONE << (_ROPE_SHIFT - 1)
    for t in range(rows):
        for start in range(0, heads * head, head):
            for i in range(half):
                x0, x1 = np.int64(x[t, start + i]), np.int64(x[t, start + half + i])
                cosine, sine = np.int64(table[t, i]), np.int64(table[t, half + i])
                a = (x0 * cosine - x1 * sine + rounding) >> _ROPE_SHIFT
                b = (x1 * cosine + x0 * sine + rounding) >> _ROPE_SHIFT
                out[t, start + i] = min(max(a, -_QK_LIMIT), _QK_LIMIT)
                out[t, start + half + i] = min(max(b, -_QK_LIMIT), _QK_LIMIT)


@inlined
def _polynomial(f: Any) -> Any:
    r = np.int64(_C6)
    r = _C5 + ((r * f) >> 30)
    r = _C4 + ((r * f) >> 30)
    r = _C3 + ((r * f) >> 30)
    r = _C2 + ((r * f) >> 30)
    r = _C1 + ((r * f) >> 30)
    return _C0 + ((r * f) >> 30)


@compiled
def softmax(scores: Array, first: int, group: int, multiplier: int, totals: I64) -> None:
    """See ops_plain."""
    rows, keys = scores.shape
    for row in range(rows):
        seen = first + row // group + 1
        largest = scores[row, 0]
        for j in range(1, seen):
            largest = max(largest, scores[row, j])
        total = np.int64(0)
        for j in range(seen):
            distance = np.int64(min(largest - scores[row, j], _DISTANCE_LIMIT))
            z: Any = min((distance * multiplier) >> 34, np.int64(_EXP_LIMIT)) * _LOG2E
            r = _polynomial((z >> 20) & ((1 << 30) - 1))
            s = min((z >> 50) + 10, 40)
            weight = (r + (_ONE << (s - 1))) >> s
            total += weight
            scores[row, j] = weight
        for j in range(seen, keys):
            scores[row, j] = 0
        totals[row] = total


@compiled
def attend(products: Array, totals: I64, out: Array) -> None:
    """See ops_plain."""
    rows, columns = products.shape
    for row in range(rows):
        total = totals[row]
        for i in range(columns):
            out[row, i] = ((np.int64(products[row, i]) << _ATTEND_SHIFT) + total) // (2 * total)


@compiled
def swiglu(gate: Array, up: Array, out: Array) -> None:
    """See ops_plain."""
    rows, columns = gate.shape
    one = _ONE << 30
    for t in range(rows):
        for n in range(columns):
            g = np.int64(gate[t, n])
            z: Any = min(abs(g) << 4, np.int64(_EXP_LIMIT)) * _LOG2E
            e = _polynomial((z >> 20) & ((1 << 30) - 1)) >> min(z >> 50, 40)
            sigma = ((_ONE << 60) if g >= 0 else e << 30) // (one + e)
            silu = (g * sigma + (1 << 29)) >> 30
            value = (silu * np.int64(up[t, n]) + (_ONE << (_HIDDEN_SHIFT - 1))) >> _HIDDEN_SHIFT
            out[t, n] = min(max(value, -_HIDDEN_LIMIT), _HIDDEN_LIMIT)
