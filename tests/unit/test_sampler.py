"""The integer sampler: accuracy, monotonicity, vectors, and its fast twin."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.service.engine import noise
from poip_chain.spec import sampler
from tests.vectors.generate_numeric import EDGE_BITS, render, sampler_vectors

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
BITS = st.integers(0, 2**32 - 1)
TEMPERATURES = (0, 1, 30, 300, 700, 1000, 2000, sampler.MAX_TEMPERATURE_MILLI)


def exact(bits: int) -> mpmath.mpf:
    """-ln(-ln u) with 40 digits."""
    with mpmath.workdps(40):
        u = (mpmath.mpf(bits) + mpmath.mpf(1) / 2) / 2**32
        return -mpmath.log(-mpmath.log(u))


@pytest.mark.parametrize("bits", EDGE_BITS)
def test_gumbel_is_accurate_at_the_ends_and_powers_of_two(bits: int) -> None:
    assert abs(mpmath.mpf(sampler.gumbel(bits)) / 65536 - exact(bits)) < mpmath.mpf(2) ** -16


@given(BITS)
def test_gumbel_is_accurate_anywhere(bits: int) -> None:
    assert abs(mpmath.mpf(sampler.gumbel(bits)) / 65536 - exact(bits)) < mpmath.mpf(2) ** -16


def test_gumbel_never_decreases_at_seams() -> None:
    """Each place where a branch or an octave of a logarithm ends, 2,000 inputs to both sides."""
    for seam in [2**31] + [2**k for k in range(12, 32)] + [2**32 - 2**k for k in range(12, 31)]:
        start = max(0, seam - 2000)
        values = noise.gumbel_array(np.arange(start, min(2**32, seam + 2000), dtype=np.int64))
        assert (np.diff(values) >= 0).all(), seam


@given(BITS, BITS)
def test_gumbel_never_decreases(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert sampler.gumbel(low) <= sampler.gumbel(high)


def test_bounds_are_those_of_the_ends() -> None:
    assert sampler.gumbel(0) == sampler.GUMBEL_MIN
    assert sampler.gumbel(2**32 - 1) == sampler.GUMBEL_MAX


def test_polynomials_meet_their_seams() -> None:
    """The two conditions of the monotonicity proof: coefficients >= 0, and the octave's polynomial sums to ln 2."""
    assert min(sampler.LN_COEFFICIENTS + sampler.TAIL_COEFFICIENTS) >= 0
    assert sum(sampler.LN_COEFFICIENTS) == sampler.LN2 == round(math.log(2) * 2**30)
    assert sum(sampler.TAIL_COEFFICIENTS) == round(math.log(2 * math.log(2)) * 2**30)


def test_noise_has_gumbel_moments() -> None:
    """Mean 0.5772, variance pi**2 / 6: would fail if the hash were biased or the sign wrong."""
    keys = np.full(200_000, sampler.position_key(bytes(32), 3), dtype=np.uint64)
    values = noise.gumbel_array(noise.uniform_bits_array(keys, np.arange(200_000))) / 65536
    assert abs(values.mean() - 0.5772) < 0.015
    assert abs(values.var() - math.pi**2 / 6) < 0.03


def test_sampling_follows_the_softmax() -> None:
    logits = [0, 65536, 2 * 65536]
    counts = [0, 0, 0]
    for position in range(6000):
        counts[sampler.sample(logits, bytes(32), position, 1000)] += 1
    weights = [math.exp(x) for x in (0, 1, 2)]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / 6000 - weight / sum(weights)) < 0.025


def test_greedy_and_ties_take_the_lowest_id() -> None:
    assert sampler.sample([5, 9, 9, 1], bytes(32), 0, 0) == 1
    assert sampler.quantise_logit(float("nan")) == -sampler.MAX_LOGIT_Q16
    assert sampler.quantise_logit(float("inf")) == sampler.MAX_LOGIT_Q16
    assert [sampler.quantise_logit(x / 131072) for x in (1, 3, -1)] == [0, 2, 0]


def test_refusals_name_the_value() -> None:
    with pytest.raises(InvalidInput, match="32 bytes, not 31"):
        sampler.position_key(bytes(31), 0)
    with pytest.raises(InvalidInput, match="uint32"):
        sampler.position_key(bytes(32), 2**32)
    with pytest.raises(InvalidInput, match="temperature_milli"):
        sampler.sample([1], bytes(32), 0, -1)
    with pytest.raises(InvalidInput, match="at least one logit"):
        sampler.sample([], bytes(32), 0, 0)
    with pytest.raises(InvalidInput, match="uint32"):
        sampler.gumbel(2**32)


def test_vectors_are_what_the_spec_gives() -> None:
    assert (VECTORS / "sampler.json").read_text() == render(sampler_vectors())


def test_vectors_hold_for_the_fast_twin() -> None:
    vectors = json.loads((VECTORS / "sampler.json").read_text())
    bits, values = np.array(vectors["gumbel"], dtype=np.int64).T
    assert (noise.gumbel_array(bits) == values).all()
    cases = vectors["uniform_bits"]["cases"]
    keys = np.full(len(cases), int(vectors["uniform_bits"]["key"]), dtype=np.uint64)
    got = noise.uniform_bits_array(keys, np.array([c["token"] for c in cases], dtype=np.int64))
    assert got.tolist() == [c["bits"] for c in cases]


def hostile_rows(rng: random.Random, size: int) -> torch.Tensor:
    """Three rows of logits: of any spread, with ties (bfloat16), masked, and sometimes not finite."""
    logits = torch.tensor([[rng.gauss(0, rng.choice([0.01, 1, 6])) for _ in range(size)] for _ in range(3)])
    logits = logits.to(torch.bfloat16).float()
    kind = rng.randrange(4)
    if kind == 0:
        logits[:, ::3] = float("-inf")
    elif kind == 1:
        logits[0, 5], logits[1, 7], logits[1, 9] = float("nan"), float("inf"), float("inf")
        logits[2] = float("-inf")
    elif kind == 2:
        logits = logits * 1e6
    return logits


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", range(24))
def test_fast_twin_samples_the_same_tokens(case: int, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of finding candidates, against the plain definition over the whole row."""
    rng = random.Random(case)
    logits = hostile_rows(rng, 400)
    temperature = TEMPERATURES[case % len(TEMPERATURES)]
    seeds = [rng.randbytes(32) for _ in range(3)]
    keys = [sampler.position_key(seed, case) for seed in seeds]
    if on_device:
        monkeypatch.setattr(noise.GumbelSampler, "_candidates_on_host", noise.GumbelSampler._candidates_on_device)
    before = logits.clone()
    got = noise.GumbelSampler().sample(logits, [0, 1, 2], keys, [temperature] * 3)
    want = [
        sampler.sample([sampler.quantise_logit(x) for x in row], seed, case, temperature)
        for row, seed in zip(logits.tolist(), seeds, strict=True)
    ]
    assert got == want
    assert torch.equal(torch.nan_to_num(logits), torch.nan_to_num(before)), "the logits were changed"


def test_fast_twin_takes_some_rows_in_any_order() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    keys, temperatures = [1, 2, 3, 4], [0, 500, 700, 2000]
    fast = noise.GumbelSampler()
    every = fast.sample(logits, [0, 1, 2, 3], keys, temperatures)
    assert fast.sample(logits, [3, 1], [keys[3], keys[1]], [temperatures[3], temperatures[1]]) == [every[3], every[1]]
    assert fast.sample(logits, [], [], []) == []
