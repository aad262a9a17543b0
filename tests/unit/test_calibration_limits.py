"""Raw terms against the spec's scores, and profiles from synthetic noise: they hold, are ordered, and catch cheats."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.economic.profiles import model_profile, profile_from_json, profile_to_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration.collect import Plan, seed_of
from poip_chain.proof.calibration.data import Data, Scored
from poip_chain.proof.calibration.limits import DeadZones, Limits, dead_zones, fingerprint_terms, limits, windows
from poip_chain.proof.calibration.prompts import CONTENTS
from poip_chain.proof.calibration.report import detection, honesty, report, verdicts
from poip_chain.proof.calibration.terms import position_terms
from poip_chain.service.engine.client import EngineToken, fingerprint_entries
from poip_chain.spec import sampler, scores
from poip_chain.spec.objects import Profile
from poip_chain.spec.scores import Verdict
from tests.vectors.generate_numeric import TINY

pytestmark = pytest.mark.slow

LOGIT = 65536
BASE: Profile = dataclasses.replace(model_profile(TINY, (2,), 2048), vocab_size=49_152)
VOCABULARY = 30


def synthetic(receipts: int, seed: int, noise: float = 0.05, shift: float = 0.0, tokens: int = 128) -> Data:
    """Receipts of five contents and four temperatures. noise: logits, of a receipt's own level; shift: a cheat's margin a
    token, in logits."""
    rng = np.random.default_rng(seed)
    scored = []
    for i in range(receipts):
        content, temperature = i % 5, (0, 300, 700, 1000)[i // 5 % 4]
        level = noise * (1 + 0.3 * rng.random())
        free = rng.exponential(level * LOGIT, tokens) + rng.exponential(shift * LOGIT, tokens)
        margin = np.where(rng.random(tokens) < (0.1 if shift == 0 else 0.8), free, 0)
        wide = rng.normal(0, (level + shift) * 64, (tokens, 8))
        scored.append(
            Scored(
                content=content,
                temperature=temperature,
                seed=bytes(32),
                prompt_ids=(1,),
                output_ids=(1,) * tokens,
                margin=margin.astype(np.int32),
                free=free.astype(np.int32),
                ending=np.full(tokens, 20 * LOGIT, np.int32),
                listed=np.rint(wide).astype(np.int16),
                unlisted=np.sort(np.rint(wide - 3), axis=1)[:, ::-1].astype(np.int16),
            )
        )
    return Data.of(scored)


@pytest.fixture(scope="module")
def honest() -> Data:
    return synthetic(240, 1)


@pytest.fixture(scope="module")
def found(honest: Data) -> Limits:
    return limits(honest, BASE, widen=1.0)


# Raw terms


@given(
    st.lists(st.integers(-12 * LOGIT, 12 * LOGIT), min_size=VOCABULARY, max_size=VOCABULARY),
    st.lists(st.integers(-40_000, 40_000), min_size=VOCABULARY, max_size=VOCABULARY),
    st.integers(0, VOCABULARY - 1),
    st.sampled_from([0, 100, 700, 2000]),
    st.integers(0, 40),
    st.integers(0, 40),
)
@settings(max_examples=80)
def test_raw_terms_make_the_scores_of_the_spec(
    logits: list[int], errors: list[int], chosen: int, temperature: int, zone: int, tolerance: int
) -> None:
    """Whatever the dead zones: as long as no more than eight unlisted tokens count, which honest noise never exceeds."""
    engine = [(logit + error) / LOGIT for logit, error in zip(logits, errors, strict=True)]
    top = sorted(((i, value) for i, value in enumerate(engine)), key=lambda entry: -entry[1])[:9]
    token = EngineToken(chosen, engine[chosen], tuple(top))
    seed, position = bytes(range(32)), 5
    margin, free, ending, listed, unlisted = position_terms(
        np.array(logits, np.int32), token, seed, position, temperature, (3,)
    )
    assert margin == scores.margin(logits, chosen, seed, position, temperature)
    assert ending == scores.margin(logits, 3, seed, position, temperature)
    assert free >= margin
    data = Data.of([Scored(0, 0, bytes(32), (1,), (chosen,), *(np.array([x]) for x in (margin, free, ending)),
                           np.array([listed]), np.array([unlisted]))])  # fmt: skip
    whole = scores.fingerprint(logits, chosen, fingerprint_entries(token), zone, tolerance)
    ours = int(fingerprint_terms(data, zone, tolerance)[0])
    assert ours == whole if unlisted[-1] <= tolerance else ours <= whole


@given(
    st.lists(st.integers(-3 * LOGIT, 3 * LOGIT), min_size=9, max_size=9),
    st.lists(st.integers(-9000, 9000), min_size=9, max_size=9),
    st.sampled_from([300, 1000, 2000]),
)
@settings(max_examples=40)
def test_no_seed_gives_an_honest_engine_more_than_the_free_term(
    logits: list[int], errors: list[int], temperature: int
) -> None:
    engine = [logit + error for logit, error in zip(logits, errors, strict=True)]
    listed = tuple((i, value / LOGIT) for i, value in enumerate(engine))
    for number in range(20):
        seed = number.to_bytes(32, "big")
        chosen = sampler.sample(engine, seed, 0, temperature)
        token = EngineToken(chosen, engine[chosen] / LOGIT, listed)
        margin, free, *_ = position_terms(np.array(logits, np.int32), token, seed, 0, temperature, (1,))
        errors_of = [error - errors[chosen] for error in errors]
        assert margin <= max(errors_of) - min(errors_of) + 1
        assert margin <= free <= max(errors) - min(errors) + 1


# Limits


def test_limits_hold_on_fresh_receipts_and_rows_are_ordered(found: Limits) -> None:
    profile = found.profile
    assert [row.tokens for row in profile.margin_table] == [16, 32, 64]
    for table in (profile.margin_table, profile.fingerprint_table):
        assert all(a.limit <= b.limit for a, b in pairwise(table)), "a longer answer may reach less"
        assert all(a.limit / a.tokens >= b.limit / b.tokens for a, b in pairwise(table)), "the mean rises with length"
    assert profile.margin_hard_limit > profile.margin_dead_zone
    fresh = synthetic(1000, 2)
    assert Verdict.FRAUD not in verdicts(fresh, profile)
    for row in found.rows:
        assert row.limit > row.largest and row.worst_mean >= row.mean > 0
        assert row.tail.worth >= 10 and row.receipts == 240


def test_the_profile_is_one_that_can_be_registered(found: Limits) -> None:
    text = json.dumps(profile_to_json(found.profile), default=dataclasses.asdict)
    assert profile_from_json(json.loads(text)) == found.profile
    assert Profile.from_values(found.profile.values()) == found.profile
    kept = ("max_context", "vocab_size", "dtype", "end_token_ids", "min_temperature_milli", "max_temperature_milli")
    assert all(getattr(found.profile, name) == getattr(BASE, name) for name in kept)


def test_more_noise_or_more_widening_never_lowers_a_limit(honest: Data, found: Limits) -> None:
    zones = dead_zones(honest)
    louder = limits(synthetic(240, 1, noise=0.1), BASE, 1.0, zones)
    wider = limits(honest, BASE, 1.5, zones)
    for one, two, three in zip(found.rows, louder.rows, wider.rows, strict=True):
        assert two.limit > one.limit
        assert three.limit == pytest.approx(1.5 * one.limit, rel=0.01)
    assert dead_zones(synthetic(240, 1, noise=0.1)).margin > zones.margin
    assert dataclasses.astuple(zones) > (0, 0, -1)


def test_no_term_of_an_honest_sum_is_missing(honest: Data) -> None:
    """Only eight unlisted tokens are kept: where all eight count, a ninth could."""
    flat = Data({name: array.copy() for name, array in honest.arrays.items()})
    flat.arrays["unlisted"][77] = 40
    assert dead_zones(honest).unlisted < 40 == dead_zones(flat).unlisted


def test_a_plan_has_every_content_at_every_temperature() -> None:
    plan = Plan.of(BASE, seed=1, tokens=8_000)
    assert plan.temperatures == (0, 100, 300, 700, 1000, 2000)
    jobs = plan.jobs()
    assert [job.index for job in jobs] == list(range(len(jobs))) and len(jobs) % plan.batch == 0
    assert sum(job.tokens for job in jobs) >= 8_000 > sum(job.tokens for job in jobs[: -plan.batch])
    round_ = [(job.content, job.temperature_milli) for job in jobs[: len(CONTENTS) * 6]]
    assert set(round_) == {(content, t) for content in CONTENTS for t in plan.temperatures}
    assert {job.tokens for job in jobs} == {64, 128, 256}
    assert len({seed_of(plan, job) for job in jobs}) == len(jobs)
    longer = Plan.of(BASE, seed=1, tokens=20_000)
    assert longer.jobs()[: len(jobs)] == jobs, "a longer run does not continue a shorter one"
    assert Plan.of(BASE, seed=2, tokens=8_000).jobs() != jobs
    narrow = dataclasses.replace(BASE, min_temperature_milli=500, max_temperature_milli=900)
    assert Plan.of(narrow, 1, 100).temperatures == (0, 500, 700, 900)


def test_one_loud_content_decides(honest: Data, found: Limits) -> None:
    loud = Data({name: array.copy() for name, array in honest.arrays.items()})
    rows = np.repeat(loud.arrays["content"] == 3, loud.arrays["tokens"])
    loud.arrays["free"][rows] *= 4
    zones = dead_zones(honest)
    after = limits(loud, BASE, 1.0, zones)
    assert all(b.limit > a.limit for a, b in zip(found.rows, after.rows, strict=True) if a.score != "fingerprint")
    assert after.rows[0].worst_class.startswith("data"), after.rows[0]


def test_too_little_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too few"):
        limits(synthetic(20, 1), BASE)
    with pytest.raises(InvalidInput, match="too few"):
        limits(synthetic(200, 1, tokens=20), BASE)


def test_windows_stand_side_by_side_in_each_receipt() -> None:
    data = synthetic(2, 1, tokens=10)
    receipts, sums = windows(data, np.arange(20.0), 4)
    assert receipts.tolist() == [0, 0, 1, 1]
    assert sums.tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 10 + 11 + 12 + 13, 14 + 15 + 16 + 17]
    assert all(len(found) == 0 for found in windows(data, np.arange(20.0), 11))


# What they catch


def test_detection_and_honesty(honest: Data, found: Limits) -> None:
    strong = detection("strong", "strong", synthetic(18, 3, shift=1.0), found.profile)
    weak = detection("weak", "weak", synthetic(18, 3, shift=0.001), found.profile)
    assert strong.needed == (16, 16) and strong.points is not None and 1 <= strong.points <= 16
    assert weak.needed == (None, None) and weak.points is None
    assert strong.power[2048] == 1.0 and list(strong.power) == sorted(strong.power)
    kept = detection("kept", "kept", synthetic(18, 3, shift=1.0), found.profile, honest_fingerprint=True)
    assert kept.fingerprint_mean == 0 and kept.margin_mean == strong.margin_mean
    risk = honesty(honest, BASE, 1.0)
    assert risk.receipts == 240 and risk.fraud == 0
    assert risk.accusation == (0.0, pytest.approx(3.69 / 240, rel=0.02))


def test_the_report_is_json_and_tables(honest: Data) -> None:
    cheats = [("strong", "strong", synthetic(18, 3, shift=1.0), False), ("kept", "kept", synthetic(18, 3), True)]
    made = report({"model_id": "0xab", "engine": "none"}, honest, cheats, BASE)
    data: dict[str, Any] = json.loads(json.dumps(made.to_json(), default=dataclasses.asdict, allow_nan=False))
    assert data["tokens"] == 240 * 128 and len(data["rows"]) == 7 and len(data["detections"]) == 2
    assert data["early_stop"] == {"median_margin": 20.0, "share_above_hard_limit": 1.0}
    text = made.to_markdown()
    assert "one receipt does not convict it" in text and "0xab" in text
    widths = {
        line.count("|") for line in text.splitlines() if line.startswith("| cheat") or line.startswith("| strong")
    }
    assert len(widths) == 1


# Files


def test_a_file_is_read_back_or_refused(tmp_path: Path, honest: Data) -> None:
    path = tmp_path / "scores.npz"
    honest.save(path)
    again = Data.load(path)
    assert all(np.array_equal(again.arrays[name], honest.arrays[name]) for name in honest.arrays)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.npz"]
    whole = path.read_bytes()
    for damage in (b"", b"PK", whole[: len(whole) // 2], whole[:200] + b"\xff" * 80 + whole[280:]):
        path.write_bytes(damage)
        with pytest.raises(InvalidInput, match="holds no scores"):
            Data.load(path)
    broken = Data({**honest.arrays, "margin": honest.arrays["margin"][:-1]})
    broken.save(path)
    with pytest.raises(InvalidInput, match="margin"):
        Data.load(path)
    wrong = Data({**honest.arrays, "listed": honest.arrays["listed"].astype(np.int32)})
    wrong.save(path)
    with pytest.raises(InvalidInput, match="listed"):
        Data.load(path)


def test_joining_and_selecting(honest: Data) -> None:
    half = honest.arrays["temperature"] == 700
    one, two = honest.select(half), honest.select(~half)
    assert one.receipts + two.receipts == honest.receipts and one.tokens + two.tokens == honest.tokens
    joined = Data.join([one, two])
    assert joined.tokens == honest.tokens and int(joined.arrays["free"].sum()) == int(honest.arrays["free"].sum())
    assert Data.join([]).receipts == 0 and Data.of([]).tokens == 0
    assert DeadZones(0, 0, 0) != dead_zones(honest)
