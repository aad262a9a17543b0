"""The statistics behind a profile's limits: confidence limits, and a bound of a sum's far tail from a few hundred receipts.

Pure arithmetic over arrays; knows neither receipts nor models. docs/calibration.md argues for the assumptions; they are

1.  Receipts are independent of each other. Positions and windows of one receipt need not be: how uncertain an estimate is,
    is judged by how much whole receipts differ.
2.  Far out, the tail of the statistic falls at least as fast as an exponential: for x > u,
    P(X > x | X > u) <= exp(-(x - u) / scale), `scale` being the mean excess over u. The mean excess is estimated at
    several u; a tail that is heavier than exponential shows as a mean excess that grows with u, and the largest counts.

The chance to exceed u at all is taken as 1. So the bound holds for whoever picks the content that is worst for u, as long
as the tail beyond u is no longer than that of the worst content that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from poip_chain.errors import InvalidInput

Floats = NDArray[np.float64]

TAIL_SHARES = (0.2, 0.1, 0.05)
"""The mean excess is estimated over the values that these shares of all values exceed."""
MIN_EXCESSES = 10
MIN_GROUP_EXCESSES = 25
"""All values together, or a group of them, have a say in the scale if their excesses are worth so many independent ones.
Fewer bound it by nothing useful: the limit from 10 is three times the mean. A group with few still counts among all."""
_EXACT_SHAPE = 150
"""Beyond it Wilson and Hilferty's approximation of an Erlang quantile is good to four digits."""
_BISECTIONS = 80
"""Halvings of an interval of at most some thousand: to within 1e-20."""


def erlang_cdf(shape: int, x: float) -> float:
    """P(sum of `shape` independent unit exponentials <= x), shape >= 1."""
    if x <= 0:
        return 0.0
    # 1 - sum over i < shape of e**-x x**i / i!, summed as logarithms: x may be some thousand.
    logs = [i * math.log(x) - x - math.lgamma(i + 1) for i in range(shape)]
    top = max(logs)
    return max(0.0, 1.0 - math.exp(top) * math.fsum(math.exp(value - top) for value in logs))


@cache
def erlang_quantile(shape: int, probability: float) -> float:
    """The x with erlang_cdf(shape, x) = probability, 0 < probability < 1."""
    if shape > _EXACT_SHAPE:
        third = 1 - 1 / (9 * shape) + NormalDist().inv_cdf(probability) / (3 * math.sqrt(shape))
        return shape * float(third**3)
    low, high = 0.0, shape + 40.0 * math.sqrt(shape) + 800.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if erlang_cdf(shape, middle) < probability:
            low = middle
        else:
            high = middle
    return low


def scale_upper(excesses: Floats, receipts: NDArray[np.int64], alpha: float) -> tuple[float, int]:
    """(upper confidence limit (1 - alpha) of the mean excess, how many independent excesses the sample is worth).

    receipts: which receipt each excess is from. For k independent exponential excesses 2 * sum / mean is chi-square with 2k
    degrees of freedom, so sum / (alpha quantile of an Erlang(k)) is exact. Excesses of one receipt depend on each other:
    k is what gives the mean the variance that the receipts show, and never more than the count. Raises InvalidInput for no
    excess.
    """
    count = len(excesses)
    if not count:
        raise InvalidInput("the scale of a tail cannot be estimated from no excess.")
    mean = float(excesses.mean())
    _, place = np.unique(receipts, return_inverse=True)
    off = np.bincount(place, weights=excesses - mean)
    worth = 1
    if len(off) > 1 and mean > 0:
        variance = len(off) / (len(off) - 1) * float((off**2).sum()) / count**2
        worth = count if variance * count <= mean**2 else max(1, int(mean**2 / variance))
    return mean * worth / erlang_quantile(worth, alpha), worth


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(at most k of n)."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
        for i in range(k + 1)
    ]
    top = max(logs)
    return min(1.0, math.exp(top) * math.fsum(math.exp(value - top) for value in logs))


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided confidence interval of a probability after k of n. For k = 0 the upper end is about 3.7 / n
    (the rule of three gives the one-sided 3 / n). Raises InvalidInput unless 0 <= k <= n, n >= 1."""
    if not 0 <= k <= n or n < 1:
        raise InvalidInput(f"{k} of {n} is no count.")
    half = (1 - confidence) / 2

    def solve(count: int, level: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if _binomial_cdf(count, n, middle) > level:
                low = middle
            else:
                high = middle
        return low

    lower = 0.0 if k == 0 else solve(k - 1, 1 - half)
    upper = 1.0 if k == n else solve(k, half)
    return lower, upper


def bootstrap_upper_mean(values: Floats, alpha: float, rng: np.random.Generator, resamples: int = 1000) -> float:
    """Upper confidence limit (1 - alpha) of the mean of `values`, one per receipt, by resampling receipts."""
    if len(values) == 0:
        raise InvalidInput("a mean of no receipts was asked for.")
    picks = rng.integers(0, len(values), (resamples, len(values)))
    return float(np.quantile(values[picks].mean(axis=1), 1 - alpha))


@dataclass(frozen=True, slots=True)
class Tail:
    """An exponential bound of a statistic: P(X > x) <= exp(-(x - start) / scale) for x >= start.

    excesses: how many values the scale rests on, worth: how many independent ones they are worth. variation: coefficient
    of variation of the excesses, 1 for an exponential, above it for a heavier tail. group: whose values gave the scale.
    """

    start: float
    scale: float
    excesses: int
    worth: int
    variation: float
    group: str

    def limit(self, probability: float) -> float:
        """The x that is exceeded with at most this probability."""
        return self.start + self.scale * math.log(1 / probability)


def tail(
    values: Floats,
    receipts: NDArray[np.int64],
    groups: Sequence[tuple[str, NDArray[np.bool_]]],
    floor: float,
    least_scale: float,
    alpha: float,
) -> Tail:
    """The exponential bound of one statistic.

    values: >= 0, any number from each receipt. receipts: which receipt each value is from. groups: named subsets of the
    values, as masks; each is a suspect for the longest tail, beside all values together. floor: the least start (an upper
    confidence mean of the worst class). least_scale: the least scale. alpha: divided evenly among all estimates made here,
    so that all hold at once with confidence 1 - alpha. The bound returned is the one of the largest limit at 1e-9.
    Raises InvalidInput for no value.
    """
    if not len(values):
        raise InvalidInput("a tail cannot be estimated from no receipt.")
    everything = ("all", np.ones(len(values), dtype=bool))
    starts = sorted({float(np.quantile(values, 1 - share)) for share in TAIL_SHARES})
    each = alpha / (len(starts) * (len(groups) + 1))
    best: Tail | None = None
    least: Tail | None = None
    for start in starts:
        for name, mask in (everything, *groups):
            beyond = mask & (values > start)
            if not beyond.any():
                continue
            excesses = values[beyond] - start
            upper, worth = scale_upper(excesses, receipts[beyond], each)
            variation = float(excesses.std() / excesses.mean())
            found = Tail(max(floor, start), max(least_scale, upper), len(excesses), worth, variation, name)
            if name == everything[0] and (least is None or worth > least.worth):
                least = found
            if worth < (MIN_EXCESSES if name == everything[0] else MIN_GROUP_EXCESSES):
                continue
            if best is None or found.limit(1e-9) > best.limit(1e-9):
                best = found
    # Too few excesses give a very wide bound, but one that holds; none at all leave the floor and the least scale.
    return best or least or Tail(max(floor, float(values.max())), least_scale, 0, 0, math.nan, "none")
