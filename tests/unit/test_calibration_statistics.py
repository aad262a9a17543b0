"""The bounds behind a profile's limits, against distributions whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration.statistics import (
    bootstrap_upper_mean,
    clopper_pearson,
    erlang_cdf,
    erlang_quantile,
    scale_upper,
    tail,
)

Floats = np.ndarray


def test_erlang_against_published_chi_square_quantiles() -> None:
    # chi-square with 2k degrees of freedom is twice an Erlang(k).
    for degrees, level, quantile in (
        (2, 0.05, 0.10259),
        (10, 0.05, 3.94030),
        (20, 0.01, 8.26040),
        (100, 0.95, 124.342),
    ):
        assert 2 * erlang_quantile(degrees // 2, level) == pytest.approx(quantile, rel=1e-4)
    assert erlang_cdf(1, 2.0) == pytest.approx(1 - math.exp(-2))
    assert erlang_cdf(3, 0.0) == 0.0 and erlang_cdf(2000, 4000.0) == pytest.approx(1.0)


def test_clopper_pearson_against_published_values() -> None:
    low, high = clopper_pearson(5, 10)
    assert (low, high) == (pytest.approx(0.18709, abs=1e-4), pytest.approx(0.81291, abs=1e-4))
    low, high = clopper_pearson(0, 10)
    assert low == 0.0 and high == pytest.approx(0.30850, abs=1e-4)
    assert clopper_pearson(10, 10)[1] == 1.0
    # One-sided 95 % after nothing in n: the rule of three.
    assert clopper_pearson(0, 1000, confidence=0.90)[1] == pytest.approx(3 / 1000, rel=0.01)
    for k, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(InvalidInput):
            clopper_pearson(k, n)


@given(st.integers(0, 60), st.integers(1, 60))
@settings(max_examples=50)
def test_the_interval_holds_the_share_seen(k: int, n: int) -> None:
    k = min(k, n)
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def one_each(values: Floats) -> np.ndarray:
    """Every value from a receipt of its own."""
    return np.arange(len(values))


def test_the_upper_scale_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    below = sum(scale_upper(rng.exponential(2.0, 12), np.arange(12), 0.05)[0] < 2.0 for _ in range(1000))
    # 5 % of 1000 is 50, standard deviation 7; judging by the spread seen may only make it safer.
    assert below < 75
    with pytest.raises(InvalidInput):
        scale_upper(np.empty(0), np.empty(0, np.int64), 0.05)


def test_dependent_excesses_are_worth_less() -> None:
    """Ten excesses a receipt that are all alike are worth one, and the limit covers as for one."""
    rng = np.random.default_rng(9)
    below = 0
    for _ in range(300):
        levels = rng.exponential(2.0, 40)
        upper, worth = scale_upper(np.repeat(levels, 10), np.repeat(np.arange(40), 10), 0.05)
        below += upper < 2.0
        assert worth <= 130
    assert below < 300 * 0.12
    alone = scale_upper(rng.exponential(2.0, 400), np.arange(400), 0.05)
    assert alone[1] > 250 and alone[0] < 2.5


def test_resampling_receipts_gives_the_mean_an_upper_limit() -> None:
    rng = np.random.default_rng(4)
    below = 0
    for _ in range(150):
        values = rng.gamma(2.0, 3.0, 60)
        below += bootstrap_upper_mean(values, 0.05, rng, resamples=400) < 6.0
    assert below < 150 * 0.12, "the bootstrap is far from its level"
    assert bootstrap_upper_mean(np.full(5, 7.0), 0.01, rng) == 7.0
    with pytest.raises(InvalidInput):
        bootstrap_upper_mean(np.empty(0), 0.01, rng)


def _independent(rng: np.random.Generator, receipts: int) -> Floats:
    return np.asarray(rng.exponential(1.0, receipts))


def _sums(rng: np.random.Generator, receipts: int) -> Floats:
    return np.asarray(rng.exponential(1.0, (receipts, 16)).sum(axis=1))


def _correlated(rng: np.random.Generator, receipts: int) -> Floats:
    """Positions share their receipt's level: a naive bound over positions would be far too low here."""
    level = rng.exponential(1.0, receipts)
    return np.asarray((level[:, None] * rng.exponential(1.0, (receipts, 64)) / 64).sum(axis=1))


def _mostly_zero(rng: np.random.Generator, receipts: int) -> Floats:
    return np.asarray(np.where(rng.random(receipts) < 0.15, rng.exponential(5.0, receipts), 0.0))


@pytest.mark.parametrize("draw", [_independent, _sums, _correlated, _mostly_zero])
def test_the_tail_bound_holds_far_beyond_what_was_seen(draw: Callable[[np.random.Generator, int], Floats]) -> None:
    """Limits for one in 10,000 from 300 receipts each, against fresh ones; 10 calibrations, none too low."""
    rng = np.random.default_rng(5)
    fresh = np.sort(np.concatenate([draw(rng, 20_000) for _ in range(20)]))
    for _ in range(10):
        values = draw(rng, 300)
        found = tail(values, one_each(values), [], 0.0, 1e-6, 0.01)
        limit = found.limit(1e-4)
        share = 1 - np.searchsorted(fresh, limit, side="right") / len(fresh)
        assert share <= 1e-4, f"{share} exceed the limit {limit} of scale {found.scale} from {found.start}"
        assert limit < 6 * np.quantile(fresh, 1 - 1e-4) + 1, "the bound is uselessly wide"


def test_positions_taken_for_independent_would_fail_where_receipts_do_not() -> None:
    """Why the unit is the receipt: with shared levels, a bound that resamples positions is exceeded often."""
    rng = np.random.default_rng(6)
    level = rng.exponential(1.0, 300)
    positions = level[:, None] * rng.exponential(1.0, (300, 64)) / 64
    shuffled = rng.permutation(positions.ravel()).reshape(300, 64).sum(axis=1)
    fresh = _correlated(rng, 20_000)
    naive, ours = (tail(sums, one_each(sums), [], 0.0, 1e-6, 0.01) for sums in (shuffled, positions.sum(axis=1)))
    assert (fresh > naive.limit(1e-3)).mean() > 0.01
    assert (fresh > ours.limit(1e-3)).mean() <= 1e-3


def test_a_group_with_a_longer_tail_decides() -> None:
    rng = np.random.default_rng(7)
    values = np.concatenate([rng.exponential(1.0, 300), rng.exponential(6.0, 40)])
    loud = np.arange(340) >= 300
    alone = tail(values[:300], one_each(values[:300]), [], 0.0, 1e-6, 0.01)
    found = tail(values, one_each(values), [("quiet", ~loud), ("loud", loud)], 0.0, 1e-6, 0.01)
    assert found.group in ("loud", "all") and found.limit(1e-9) > 3 * alone.limit(1e-9)
    fresh = rng.exponential(6.0, 200_000)
    assert (fresh > found.limit(1e-3)).mean() <= 1e-3, "the loudest content is not safe"


def test_floors_are_kept_and_nothing_comes_of_nothing() -> None:
    zero = tail(np.zeros(100), one_each(np.zeros(100)), [], 2.5, 0.5, 0.01)
    assert (zero.start, zero.scale, zero.excesses, zero.group) == (2.5, 0.5, 0, "none")
    assert zero.limit(1e-9) == pytest.approx(2.5 + 0.5 * math.log(1e9))
    assert tail(np.full(100, 9.0), one_each(np.zeros(100)), [], 0.0, 0.5, 0.01).start == 9.0
    with pytest.raises(InvalidInput):
        tail(np.empty(0), one_each(np.empty(0)), [], 0.0, 0.5, 0.01)


@given(st.floats(1e-12, 0.5), st.floats(1.01, 1000))
@settings(max_examples=30)
def test_a_rarer_event_has_a_higher_limit(probability: float, factor: float) -> None:
    values = np.random.default_rng(8).exponential(1.0, 100)
    found = tail(values, one_each(values), [], 0.0, 1e-6, 0.01)
    assert found.limit(probability / factor) > found.limit(probability)
