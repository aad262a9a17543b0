"""The normative sampler: Gumbel-max over integers (protocol section 12, canonical arithmetic version 1).

    token i = argmax over v of  1000 * logit(v) + T_milli * g(key_i, v)      ties: the lowest id

`logit` and `g` are integers in units of 2**-16, T_milli is the temperature in thousandths, key_i comes from
the request's seed and the position i of the output token, counted from 0. T_milli = 0 is greedy decoding.

Every operation is on integers that fit in a signed 64-bit word (the hash: an unsigned one, wrapping), so
Python, numpy, torch and the contracts compute the same bits. This file is plain and slow; the fast twin is
service/engine/noise.py.

Noise. h is a 32-bit hash of (key, token); u = (h + 1/2) / 2**32 lies strictly between 0 and 1; g = -ln(-ln u). The
error of `gumbel` is below 2**-16 (worst seen 2**-16.49, of which 2**-17 is the final rounding; every 16th of the
2**32 inputs and both ends were compared with libm, tests repeat a sample against mpmath), and it never decreases as h
grows (all 2**32 inputs were run). The reason:

* `_ln` is non-decreasing: within an octave it is a constant minus a polynomial with non-negative coefficients
  in the distance to the octave's upper end, evaluated by Horner steps `r = c + (r * f >> 30)`, each of which
  is monotone in a non-negative f; at an octave's seam the polynomial's value at 1 is exactly LN2, so nothing
  jumps back.
* The branch u >= 1/2 subtracts `_ln` and another such polynomial, both growing with 1 - u; the branch u < 1/2
  applies `_ln` twice. That leaves the one seam at u = 1/2, which a test checks.
"""

from __future__ import annotations

from collections.abc import Sequence

from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput

SEED_BYTES = 32
MAX_POSITION = 2**32 - 1
MAX_TEMPERATURE_MILLI = 100_000
"""Bound of the arithmetic, not a policy: a profile allows far less. Keeps `noised` below 2**48 in
magnitude."""
MAX_LOGIT_Q16 = 2**36
"""Logits are clamped to +-2**20 before sampling: far outside what a model gives, far inside int64."""

GUMBEL_MIN = -205_127
"""gumbel(0): about -3.1300."""
GUMBEL_MAX = 1_499_061
"""gumbel(2**32 - 1): about 22.8739. A logit more than T * (GUMBEL_MAX - GUMBEL_MIN) below the best cannot
win."""

_MASK = 2**64 - 1
# The increment and the two multipliers of splitmix64 (Steele, Lea, Flood 2014): full avalanche in two rounds.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

LN2 = 744_261_118
"""ln 2 in units of 2**-30, rounded to nearest."""

# -ln(1 - s/2) for s in [0, 1] in units of 2**-30: coefficients of s**1 .. s**12. The first eleven are those
# of the power series, floor(2**30 / (k * 2**k)); the last one takes up the whole tail, so that the sum is
# exactly LN2 (no jump at a seam). The error, sum over k > 12 of (s**12 - s**k) / (k * 2**k), stays below
# 2**-20.
LN_COEFFICIENTS = (
    536_870_912, 134_217_728, 44_739_242, 16_777_216, 6_710_886, 2_796_202,
    1_198_372, 524_288, 233_016, 104_857, 47_662, 40_737,
)  # fmt: skip

# ln(-ln(1 - s/2) / (s/2)) for s in [0, 1] in units of 2**-30: coefficients of s**1 .. s**9. Power series q(k)
# / 2**k with q = 1/2, 5/24, 1/8, 251/2880, 19/288, ... (all positive), floored; the last one makes the sum
# ln(2 ln 2) at s = 1.
TAIL_COEFFICIENTS = (
    268_435_456, 55_924_053, 16_777_216, 5_848_723, 2_213_660, 882_458, 364_574, 154_595, 120_131,
)  # fmt: skip


def position_key(seed: bytes, position: int) -> int:
    """The 64-bit key of output position `position` (from 0): first 8 bytes of keccak(seed || uint32
    position), big-endian.

    Raises InvalidInput if the seed is not 32 bytes or the position not a uint32.
    """
    if len(seed) != SEED_BYTES:
        raise InvalidInput(f"a sampler seed has {SEED_BYTES} bytes, not {len(seed)}.")
    if not 0 <= position <= MAX_POSITION:
        raise InvalidInput(f"an output position is a uint32, not {position}.")
    return int.from_bytes(keccak(seed + position.to_bytes(4, "big"))[:8], "big")


def uniform_bits(key: int, token: int) -> int:
    """The 32 random bits of `token` under a position's key: the top half of the splitmix64 finaliser's
    output.
    """
    z = (key + (token + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return (z ^ (z >> 31)) >> 32


def gumbel(bits: int) -> int:
    """-ln(-ln((bits + 1/2) / 2**32)) in units of 2**-16, for 0 <= bits < 2**32; error below 2**-16,
    non-decreasing.
    """
    if not 0 <= bits < 2**32:
        raise InvalidInput(f"uniform bits are a uint32, not {bits}.")
    if bits >= 2**31:
        # u >= 1/2: -ln u loses all precision near u = 1, so work from d = 1 - u = x / 2**33, which is exact:
        # -ln u = d * exp(tail(2d)), and s = 2d in units of 2**-30 is x >> 2.
        x = 2 * (2**32 - 1 - bits) + 1
        g = 33 * LN2 - _ln(x) - _polynomial(TAIL_COEFFICIENTS, x >> 2)
    else:
        # u < 1/2: y = -ln u in units of 2**-30 lies between ln 2 and 22.9.
        y = 33 * LN2 - _ln(2 * bits + 1)
        g = 30 * LN2 - _ln(y)
    return (g + 2**13) >> 14


def noised(logit_q16: int, temperature_milli: int, gumbel_q16: int) -> int:
    """1000 * logit + T_milli * g: the quantity that the sampler maximises, in units of 2**-16 / 1000."""
    return 1000 * logit_q16 + temperature_milli * gumbel_q16


def quantise_logit(logit: float) -> int:
    """An engine's floating-point logit in units of 2**-16: round half to even, clamped to +-MAX_LOGIT_Q16,
    NaN lowest.
    """
    if logit != logit:
        return -MAX_LOGIT_Q16
    limit = MAX_LOGIT_Q16 / 65536
    return round(min(max(logit, -limit), limit) * 65536)


def sample(logits_q16: Sequence[int], seed: bytes, position: int, temperature_milli: int) -> int:
    """The token that an honest node outputs at `position`, given integer logits of the whole vocabulary.

    Raises InvalidInput if there are no logits, or the seed, position or temperature is out of range.
    """
    if not logits_q16:
        raise InvalidInput("sampling needs at least one logit.")
    if not 0 <= temperature_milli <= MAX_TEMPERATURE_MILLI:
        raise InvalidInput(f"temperature_milli is 0 to {MAX_TEMPERATURE_MILLI}, not {temperature_milli}.")
    key = position_key(seed, position)

    def score(token: int) -> int:
        return noised(logits_q16[token], temperature_milli, gumbel(uniform_bits(key, token)))

    return max(range(len(logits_q16)), key=lambda token: (score(token), -token))


def _ln(x: int) -> int:
    """ln x in units of 2**-30 for 1 <= x < 2**36, non-decreasing, error below 2**-19."""
    k = x.bit_length() - 1
    mantissa = x << (30 - k) if k <= 30 else x >> (k - 30)
    distance = 2**31 - mantissa  # (2 - m) in units of 2**-30, so that ln m = ln 2 + ln(1 - distance / 2)
    return (k + 1) * LN2 - _polynomial(LN_COEFFICIENTS, distance)


def _polynomial(coefficients: Sequence[int], s: int) -> int:
    """The sum of coefficient k times s**k, k from 1, for s in [0, 2**30] in units of 2**-30. All products <
    2**61.
    """
    r = 0
    for coefficient in reversed(coefficients):
        r = coefficient + ((r * s) >> 30)
    return (r * s) >> 30
