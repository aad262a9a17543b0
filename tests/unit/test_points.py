"""Points of an answer: their sums are spec's scores, and each is what its two logits say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.canonical.points import fingerprint_points, margin_points
from poip_chain.errors import InvalidInput
from poip_chain.spec import sampler, scores

SEED = b"\x09" * 32


@settings(max_examples=40)
@given(
    st.integers(12, 400),
    st.integers(1, 4),
    st.sampled_from([0, 1, 300, 1000, 100_000]),
    st.sampled_from([1, 2**16, 2**20, 2**31 - 1]),
    st.randoms(use_true_random=False),
)
def test_sums_are_specs(vocabulary: int, positions: int, temperature: int, spread: int, rng: random.Random) -> None:
    logits = np.array(
        [[rng.randrange(-spread, spread + 1) for _ in range(vocabulary)] for _ in range(positions)], np.int32
    )
    rows = logits.tolist()
    honest = [sampler.sample(row, SEED, i, temperature) for i, row in enumerate(rows)]
    output = [token if rng.random() < 0.4 else rng.randrange(vocabulary) for token in honest]
    dead_zone = rng.choice((0, 100, 2**17))
    points = margin_points(logits, output, SEED, temperature, dead_zone)
    assert [p.position for p in points] == sorted({p.position for p in points})
    margins = [scores.margin(row, output[i], SEED, i, temperature) for i, row in enumerate(rows)]
    assert {p.position: p.value for p in points} == {i: m for i, m in enumerate(margins) if m}
    for p in points:
        assert (p.token, p.logit) == (honest[p.position], rows[p.position][honest[p.position]])
        assert p.claimed_logit == rows[p.position][output[p.position]]
        assert p.term == scores.margin_term(p.value, dead_zone)

    entries = [stated(row, output[i], rng) for i, row in enumerate(rows)]
    tolerance = rng.choice((0, 5, 300))
    found = fingerprint_points(logits, output, entries, dead_zone, tolerance)
    assert [(p.position, p.token) for p in found] == sorted({(p.position, p.token) for p in found})
    for i, row in enumerate(rows):
        wanted = scores.fingerprint(row, output[i], entries[i], dead_zone, tolerance)
        assert sum(p.term for p in found if p.position == i) == wanted
    for p in found:
        assert p.term > 0 and (p.logit, p.claimed_logit) == (
            rows[p.position][p.token],
            rows[p.position][output[p.position]],
        )


def stated(row: list[int], chosen: int, rng: random.Random) -> list[tuple[int, int]]:
    """Eight entries near the truth, some far from it."""
    others = [token for token in range(len(row)) if token != chosen]
    best = sorted(others, key=lambda token: -row[token])[:6]
    tokens = best + rng.sample([token for token in others if token not in best], 2)
    values = [
        scores.canonical_value(row[t], row[chosen]) + rng.choice((0, 0, 1, -700)) * rng.randrange(50) for t in tokens
    ]
    clamped = [max(scores.VALUE_MIN, min(scores.VALUE_MAX, value)) for value in values]
    return sorted(zip(tokens, clamped, strict=True), key=lambda entry: (-entry[1], entry[0]))


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.full((1, 20), 5, np.int32)
    logits[0, 3] = 4
    (point,) = margin_points(logits, [3], SEED, 0, 0)
    assert (point.token, point.value, point.logit, point.claimed_logit) == (0, 1, 5, 4)
    assert margin_points(logits, [7], SEED, 0, 0) == []


def test_what_does_not_fit_is_refused() -> None:
    logits = np.zeros((2, 20), np.int32)
    entries = [[(token, 0) for token in range(1, 9)]] * 2
    for output, seed, temperature in (([1], SEED, 0), ([1, 20], SEED, 0), ([1, 2], b"", 0), ([1, 2], SEED, -1)):
        with pytest.raises(InvalidInput):
            margin_points(logits, output, seed, temperature, 0)
    for output, given_entries in (([0, 0], entries[:1]), ([0, 1], entries), ([0, 20], entries)):
        with pytest.raises(InvalidInput):
            fingerprint_points(logits, output, given_entries, 0, 0)
