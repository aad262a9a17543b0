"""What an accuser may name of an answer: every point of it that adds to a score, in the court's integers.

The fast twin of `spec.scores`, point by point: at most one margin a position (the token that the sampler chooses), and
each listed or unlisted token whose fingerprint term is above zero. All terms are >= 0, so any part of them is a lower
bound; which part an accusation names is not decided here. Knows logits and ids, no trees and no claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from poip_chain.errors import InvalidInput
from poip_chain.spec import sampler, scores

Logits = NDArray[np.int32]
Int64 = NDArray[np.int64]

CUT = 7 * 65536
"""Noise, in 2**-16, that one token in a thousand exceeds: only those, and tokens near the best logit, can be chosen."""


@dataclass(frozen=True, slots=True)
class ScoredPoint:
    """One point: `logit` of `token` and `claimed_logit` of the claimed token at an output position, in 2**-16, and what it
    adds to its sum. value: of a margin, before the dead zone; of a fingerprint point, its term."""

    position: int
    token: int
    logit: int
    claimed_logit: int
    value: int
    term: int


def margin_points(
    logits: Logits, output: Sequence[int], seed: bytes, temperature_milli: int, dead_zone: int
) -> list[ScoredPoint]:
    """The margin of each position at which the claimed token is not the sampler's, in order of positions.

    logits: int32 [output tokens, vocabulary]. Raises InvalidInput if counts, ids, seed or temperature do not fit.
    """
    _check(logits, output)
    if not 0 <= temperature_milli <= sampler.MAX_TEMPERATURE_MILLI:
        raise InvalidInput(f"temperature_milli is 0 to {sampler.MAX_TEMPERATURE_MILLI}, not {temperature_milli}.")
    points = []
    for position, claimed in enumerate(output):
        row = logits[position]
        key = sampler.position_key(seed, position)
        best, at_best = _best(row, key, temperature_milli)
        margin = scores.margin_between(at_best, _noised(int(row[claimed]), key, claimed, temperature_milli))
        if margin:
            term = scores.margin_term(margin, dead_zone)
            points.append(ScoredPoint(position, best, int(row[best]), int(row[claimed]), margin, term))
    return points


def fingerprint_points(
    logits: Logits,
    output: Sequence[int],
    fingerprints: Sequence[Sequence[scores.FingerprintEntry]],
    dead_zone: int,
    tolerance: int,
) -> list[ScoredPoint]:
    """Every token whose fingerprint term is above zero, in order of (position, token).

    logits: int32 [output tokens, vocabulary]. Raises InvalidInput if counts or ids do not fit, or entries are not well
    formed: `spec.scores.check_entries`.
    """
    _check(logits, output)
    if len(fingerprints) != len(output):
        raise InvalidInput(f"{len(fingerprints)} fingerprints for {len(output)} output tokens.")
    points = []
    half = 1 << (scores.NAT_SHIFT - 1)
    for position, (claimed, entries) in enumerate(zip(output, fingerprints, strict=True)):
        scores.check_entries(entries, claimed, logits.shape[1])
        row = logits[position].astype(np.int64)
        at_claimed = int(row[claimed])
        values = np.clip((row - at_claimed + half) >> scores.NAT_SHIFT, scores.VALUE_MIN, scores.VALUE_MAX)
        lowest = min(stated for _, stated in entries)
        terms = np.maximum(values - lowest - tolerance, 0)
        terms[claimed] = 0
        for token, stated in entries:
            terms[token] = scores.listed_term(stated, int(values[token]), dead_zone)
        for token in np.flatnonzero(terms).tolist():
            term = int(terms[token])
            points.append(ScoredPoint(position, token, int(row[token]), at_claimed, term, term))
    return points


def _check(logits: Logits, output: Sequence[int]) -> None:
    if logits.ndim != 2 or len(logits) != len(output):
        raise InvalidInput(f"logits of shape {logits.shape} for {len(output)} output tokens.")
    if any(not 0 <= token < logits.shape[1] for token in output):
        raise InvalidInput(f"output ids are 0 to {logits.shape[1] - 1}.")


def _noised(logit: int, key: int, token: int, temperature_milli: int) -> int:
    return sampler.noised(logit, temperature_milli, sampler.gumbel(sampler.uniform_bits(key, token)))


def _best(row: Logits, key: int, temperature_milli: int) -> tuple[int, int]:
    """(the token that the sampler chooses, its noised logit).

    The token with the largest logit reaches some score. One with noise below CUT reaches it only with a logit near the
    best; noise of CUT and more takes large random bits. So a few hundred tokens contain the winner.
    """
    values = 1000 * row.astype(np.int64)
    top = int(values.argmax())
    bound = _noised(int(row[top]), key, top, temperature_milli) - temperature_milli * CUT
    ids = np.flatnonzero((values >= bound) | (_uniform_bits(key, len(row)) >= _smallest_bits()))
    found = [_noised(int(row[token]), key, token, temperature_milli) for token in ids.tolist()]
    at = max(range(len(found)), key=lambda i: (found[i], -i))
    return int(ids[at]), found[at]


def _uniform_bits(key: int, count: int) -> Int64:
    """`spec.sampler.uniform_bits` of tokens 0 .. count."""
    thirty, twenty_seven, thirty_one, thirty_two = (np.uint64(n) for n in (30, 27, 31, 32))
    z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(sampler._GOLDEN)
    z = (z ^ (z >> thirty)) * np.uint64(sampler._MIX_1)
    z = (z ^ (z >> twenty_seven)) * np.uint64(sampler._MIX_2)
    result: Int64 = ((z ^ (z >> thirty_one)) >> thirty_two).astype(np.int64)
    return result


@lru_cache(maxsize=1)
def _smallest_bits() -> int:
    """The smallest bits whose noise is CUT or more: `gumbel` never decreases."""
    low, high = 0, 2**32 - 1
    while low < high:
        middle = (low + high) // 2
        if sampler.gumbel(middle) >= CUT:
            high = middle
        else:
            low = middle + 1
    return low
