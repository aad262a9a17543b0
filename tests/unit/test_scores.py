"""Scores and verdicts: known values, monotone in what is claimed, and the table's rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec import sampler, scores
from poip_chain.spec.objects import Profile, ThresholdRow
from poip_chain.spec.scores import Scores, Verdict
from tests.vectors.generate_numeric import render, scores_vectors

SEED = bytes(range(32))
LOGIT = 65536
PROFILE = Profile(
    max_context=2048,
    vocab_size=100,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    min_temperature_milli=0,
    max_temperature_milli=2000,
    end_token_ids=(2,),
    margin_dead_zone=LOGIT // 4,
    margin_hard_limit=3 * LOGIT,
    margin_table=(ThresholdRow(16, 2 * LOGIT), ThresholdRow(128, 8 * LOGIT)),
    fingerprint_dead_zone=16,
    fingerprint_tolerance=16,
    fingerprint_table=(ThresholdRow(16, 100), ThresholdRow(128, 400)),
)

logit_rows = st.lists(st.integers(-30 * LOGIT, 30 * LOGIT), min_size=2, max_size=30)


def test_margin_by_hand() -> None:
    assert scores.margin([3 * LOGIT, LOGIT, 0], 1, SEED, 0, 0) == 2 * LOGIT
    assert scores.margin([3 * LOGIT, 3 * LOGIT], 1, SEED, 0, 0) == 0, "a tie is no offence"
    assert scores.margin_between(1999, 0) == 1, "rounded down, for the accused"
    assert scores.margin_between(-5, 0) == 0
    assert scores.margin_term(10, 4) == 6 and scores.margin_term(3, 4) == 0


@given(logit_rows, st.integers(0, 2000), st.integers(0, 100))
def test_the_samplers_choice_has_no_margin_and_no_token_a_negative_one(
    logits: list[int], temperature: int, position: int
) -> None:
    best = sampler.sample(logits, SEED, position, temperature)
    assert scores.margin(logits, best, SEED, position, temperature) == 0
    assert all(scores.margin(logits, token, SEED, position, temperature) >= 0 for token in range(len(logits)))


@given(logit_rows, st.integers(0, 2000), st.integers(0, LOGIT), st.integers(0, 1000))
def test_an_honest_margin_is_bounded_by_twice_the_logit_noise(
    logits: list[int], temperature: int, bound: int, shift: int
) -> None:
    """The seed-free bound behind the dead zone: |noise| <= bound on each logit gives a margin <= 2 * bound."""
    noisy = [logit + (shift * (i + 1) * 7919) % (2 * bound + 1) - bound for i, logit in enumerate(logits)]
    chosen = sampler.sample(noisy, SEED, 0, temperature)
    assert scores.margin(logits, chosen, SEED, 0, temperature) <= 2 * bound


def test_fingerprint_by_hand() -> None:
    logits = [0, 1024 * 10, 1024 * 20, 1024 * 30, 511, 512]
    assert scores.canonical_value(511, 0) == 0 and scores.canonical_value(512, 0) == 1
    assert scores.canonical_value(-512, 0) == 0 and scores.canonical_value(-513, 0) == -1
    # Chosen 0. Stated: 3 as 30 (exact), 2 as 15 (5 off, 3 above the dead zone). Unlisted: 1 at 10, below 15; 4, 5 lower.
    assert scores.fingerprint(logits, 0, [(3, 30), (2, 15)], dead_zone=2, tolerance=0) == 3
    # Leaving out token 3 and stating token 1 instead: 3 outranks the lowest stated by 20, less the tolerance.
    assert scores.fingerprint(logits, 0, [(2, 20), (1, 10)], dead_zone=2, tolerance=6) == 14


def test_fingerprint_values_saturate_on_both_sides() -> None:
    assert scores.canonical_value(2**36, 0) == 32767
    assert scores.canonical_value(-(2**36), 0) == -32768


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([], "no entries"),
        ([(7, 1)], "out of range"),
        ([(0, 1)], "names the chosen"),
        ([(1, 40_000)], "out of range"),
        ([(1, 5), (1, 4)], "twice"),
        ([(1, 4), (2, 5)], "ordered"),
        ([(2, 5), (1, 5)], "ordered"),
    ],
)
def test_malformed_fingerprints_are_refused(entries: list[tuple[int, int]], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        scores.fingerprint([0, 1, 2], 0, entries, 0, 0)


def test_threshold_steps_and_scales() -> None:
    table = PROFILE.fingerprint_table
    assert scores.threshold(table, 15) is None
    assert scores.threshold(table, 16) == 100
    assert scores.threshold(table, 17) == 107, "106.25, rounded up"
    assert scores.threshold(table, 127) == 794
    assert scores.threshold(table, 128) == 400
    assert scores.threshold(table, 256) == 800
    assert scores.threshold((), 1000) is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.HONEST),
        ({"margin_sum": 8 * LOGIT}, Verdict.CANNOT_TELL),
        ({"margin_sum": 8 * LOGIT + 1}, Verdict.FRAUD),
        ({"margin_max": 3 * LOGIT + 1}, Verdict.FRAUD),
        ({"margin_max": 3 * LOGIT}, Verdict.CANNOT_TELL),
        ({"margin_max": 3 * LOGIT // 2}, Verdict.HONEST),
        ({"fingerprint_sum": 401}, Verdict.FRAUD),
        ({"fingerprint_sum": 400}, Verdict.CANNOT_TELL),
        ({"fingerprint_sum": 200}, Verdict.HONEST),
        # Below the first length only the hard rule convicts.
        ({"tokens": 15, "fingerprint_sum": 10_000}, Verdict.CANNOT_TELL),
        ({"tokens": 15, "fingerprint_sum": 50}, Verdict.HONEST),
        ({"tokens": 1, "margin_max": 3 * LOGIT + 1}, Verdict.FRAUD),
    ],
)
def test_verdicts_at_their_borders(changes: dict[str, int], verdict: Verdict) -> None:
    base = Scores(tokens=128, margin_sum=0, margin_max=0, fingerprint_sum=0)
    assert scores.verdict(dataclasses.replace(base, **changes), PROFILE) is verdict


def test_vectors_are_what_the_spec_gives() -> None:
    path = Path(__file__).resolve().parent.parent / "vectors" / "scores.json"
    assert path.read_text() == render(scores_vectors())
