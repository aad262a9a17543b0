"""What a profile catches and what it risks: verdicts on the measured receipts, and the tables of docs/calibration.md.

Knows scores and profiles; nothing of engines, folders or how the limits came about.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.economic.profiles import profile_to_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration.data import Data
from poip_chain.proof.calibration.limits import WIDEN, Limits, Row, fingerprint_terms, limits, margin_terms
from poip_chain.proof.calibration.prompts import CONTENTS
from poip_chain.proof.calibration.statistics import clopper_pearson
from poip_chain.spec import scores
from poip_chain.spec.objects import Profile
from poip_chain.spec.scores import Scores, Verdict

GRID = (16, 32, 64, 128, 256, 512, 1024, 2048)
POWERS = (0.9, 0.99)
COMPOSED = 400
"""Answers longer than the measured ones are composed of whole measured ones, so many times."""
MAX_POINTS = 16
LOGIT = 65536


@dataclass(frozen=True, slots=True)
class Honesty:
    """What the limits would have done to honest receipts that they were not made from: counts, and the probability of an
    accusation with its 95 % confidence interval (Clopper-Pearson)."""

    receipts: int
    fraud: int
    cannot_tell: int
    accusation: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """One cheat. means: of a token, margin in logits and fingerprint in 1/64 nat, above the dead zones. power: share of
    answers convicted by length. needed: tokens for each of POWERS, None where one receipt does not convict it. points: how
    many points an accusation needs at the first of these lengths (median), None likewise."""

    name: str
    text: str
    tokens: int
    margin_mean: float
    fingerprint_mean: float
    power: dict[int, float]
    needed: tuple[int | None, ...]
    points: int | None


def verdicts(data: Data, profile: Profile) -> list[Verdict]:
    """The verdict on each receipt, from the raw terms."""
    margins, fingerprints = _terms(data, profile)
    raw, first = data.arrays["margin"], data.first
    return [
        _verdict(margins[a:b], raw[a:b], fingerprints[a:b], profile)
        for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


def _terms(data: Data, profile: Profile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        margin_terms(data.arrays["margin"], profile.margin_dead_zone),
        fingerprint_terms(data, profile.fingerprint_dead_zone, profile.fingerprint_tolerance),
    )


def _verdict(
    margins: NDArray[np.float64], raw: NDArray[Any], fingerprints: NDArray[np.float64], profile: Profile
) -> Verdict:
    sums = Scores(len(margins), int(margins.sum()), int(raw.max()), int(fingerprints.sum()))
    return scores.verdict(sums, profile)


def honesty(data: Data, base: Profile, widen: float = WIDEN) -> Honesty:
    """Verdicts on each half of the receipts under limits made from the other half."""
    half = np.arange(data.receipts) % 2 == 0
    found: list[Verdict] = []
    for mask in (half, ~half):
        try:
            profile = limits(data.select(mask), base, widen).profile
        except InvalidInput:  # half of a small run is too little to make limits from
            profile = limits(data, base, widen).profile
        found += verdicts(data.select(~mask), profile)
    fraud = sum(v is Verdict.FRAUD for v in found)
    return Honesty(
        receipts=len(found),
        fraud=fraud,
        cannot_tell=sum(v is Verdict.CANNOT_TELL for v in found),
        accusation=clopper_pearson(fraud, len(found)),
    )


def detection(name: str, text: str, data: Data, profile: Profile, honest_fingerprint: bool = False) -> Detection:
    """How long an answer of a cheat must be for one receipt to convict it.

    honest_fingerprint: the cheat states fingerprints of an honest prefill, so only margins can speak against it.
    """
    if honest_fingerprint:
        arrays = dict(data.arrays)
        arrays["listed"], arrays["unlisted"] = np.zeros_like(arrays["listed"]), np.zeros_like(arrays["unlisted"])
        data = Data(arrays)
    margins, fingerprints = _terms(data, profile)
    power = {n: _power(data, margins, fingerprints, profile, n) for n in GRID if n <= profile.max_context}
    needed = tuple(next((n for n, share in power.items() if share >= level), None) for level in POWERS)
    return Detection(
        name=name,
        text=text,
        tokens=data.tokens,
        margin_mean=float(margins.mean()) / LOGIT,
        fingerprint_mean=float(fingerprints.mean()),
        power=power,
        needed=needed,
        points=None if needed[0] is None else _points(data, profile, needed[0]),
    )


def _answers(data: Data, length: int) -> list[NDArray[np.int64]]:
    """Positions that make answers of `length` tokens: windows of measured receipts, or several receipts in a row."""
    first, tokens = data.first, data.arrays["tokens"]
    spans = [np.arange(first[i], first[i + 1]) for i in range(data.receipts)]
    if length <= int(tokens.min()):
        return [span[k : k + length] for span in spans for k in range(0, len(span) - length + 1, length)]
    rng = np.random.default_rng(1)
    each = -(-length // int(tokens.min()))
    picks = rng.integers(0, data.receipts, (COMPOSED, each))
    return [np.concatenate([spans[i] for i in row])[:length] for row in picks]


def _power(
    data: Data, margins: NDArray[np.float64], fingerprints: NDArray[np.float64], profile: Profile, length: int
) -> float:
    raw = data.arrays["margin"]
    answers = _answers(data, length)
    caught = sum(_verdict(margins[at], raw[at], fingerprints[at], profile) is Verdict.FRAUD for at in answers)
    return caught / len(answers)


def _points(data: Data, profile: Profile, length: int) -> int | None:
    """The fewest points that convict, median over the convicted answers of this length."""
    counts = []
    margin_limit = scores.threshold(profile.margin_table, length)
    fingerprint_limit = scores.threshold(profile.fingerprint_table, length)
    listed = np.maximum(0, np.abs(data.arrays["listed"].astype(np.int64)) - profile.fingerprint_dead_zone)
    unlisted = np.maximum(0, data.arrays["unlisted"].astype(np.int64) - profile.fingerprint_tolerance)
    margins = margin_terms(data.arrays["margin"], profile.margin_dead_zone)
    for at in _answers(data, length):
        if data.arrays["margin"][at].max() > profile.margin_hard_limit:
            counts.append(1)
            continue
        each = np.concatenate([listed[at].ravel(), unlisted[at].ravel()])
        found = [
            count
            for terms, limit in ((margins[at], margin_limit), (each, fingerprint_limit))
            if limit is not None and (count := _fewest(terms, limit)) is not None
        ]
        if found:
            counts.append(min(found))
    return int(np.median(counts)) if counts else None


def _fewest(terms: NDArray[Any], limit: int) -> int | None:
    sums = np.cumsum(np.sort(terms)[::-1])
    over = np.flatnonzero(sums > limit)
    return int(over[0]) + 1 if len(over) else None


@dataclass(frozen=True)
class Report:
    """Everything that a calibration found."""

    header: Mapping[str, Any]
    limits: Limits
    honesty: Honesty
    receipts: int
    tokens: int
    widen: float
    margin_largest: dict[str, float]
    early_stop: tuple[float, float]
    detections: tuple[Detection, ...]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        rows = [dataclasses.asdict(row) for row in self.limits.rows]
        return {
            "header": dict(self.header),
            "receipts": self.receipts,
            "tokens": self.tokens,
            "widen": self.widen,
            "profile": profile_to_json(self.limits.profile),
            "rows": [_finite(row) for row in rows],
            "honesty": dataclasses.asdict(self.honesty),
            "largest_honest_margin": self.margin_largest,
            "early_stop": {"median_margin": self.early_stop[0], "share_above_hard_limit": self.early_stop[1]},
            "detections": [dataclasses.asdict(found) for found in self.detections],
        }

    def to_markdown(self) -> str:
        """The tables of docs/calibration.md."""
        profile = self.limits.profile
        low, high = self.honesty.accusation
        parts = [
            f"Model `{self.header.get('model_id')}`, engine {self.header.get('engine')}, {self.receipts} honest receipts, "
            f"{self.tokens:,} tokens; limits widened by {self.widen:g}.",
            "",
            f"Dead zones: margin {profile.margin_dead_zone / LOGIT:.3f} logits, fingerprint "
            f"{profile.fingerprint_dead_zone} (stated) and {profile.fingerprint_tolerance} (not stated) in 1/64 nat.",
            "",
            _table(
                ["rule", "length", "receipts", "honest mean", "worst class", "its upper mean", "largest seen", "scale",
                 "excesses", "worth", "variation", "from", "limit"],
                [_limit_cells(row) for row in self.limits.rows],
            ),
            "",
            f"Honest receipts judged by limits made from the other half: {self.honesty.receipts}; fraud "
            f"{self.honesty.fraud}, cannot tell {self.honesty.cannot_tell}. Probability of an accusation, 95 % confidence: "
            f"{low:.2g} to {high:.2g}.",
            "",
            "Largest honest margin, logits: "
            + ", ".join(f"{name} {value:.2f}" for name, value in self.margin_largest.items())
            + ".",
            "",
            f"A false end of text: median margin {self.early_stop[0]:.1f} logits; "
            f"{100 * self.early_stop[1]:.1f} % of positions above the hard limit.",
            "",
            _table(
                ["cheat", "tokens", "margin a token", "fingerprint a token", *(f"at {n}" for n in GRID),
                 *(f"tokens for {level:.0%}" for level in POWERS), "points"],
                [_detection_cells(found) for found in self.detections],
            ),
        ]  # fmt: skip
        return "\n".join(parts) + "\n"


def report(
    header: Mapping[str, Any],
    honest: Data,
    cheats: Sequence[tuple[str, str, Data, bool]],
    base: Profile,
    widen: float = WIDEN,
) -> Report:
    """Limits, what they risk and what they catch. cheats: (name, text, scores, whether fingerprints are honest ones)."""
    found = limits(honest, base, widen)
    searched = np.repeat(honest.arrays["content"] == CONTENTS.index("searched"), honest.arrays["tokens"])
    margins = honest.arrays["margin"]
    largest = {
        "plain seeds": float(margins[~searched].max(initial=0)) / LOGIT,
        "searched seeds": float(margins[searched].max(initial=0)) / LOGIT,
        "any seed (bound)": float(honest.arrays["free"].max(initial=0)) / LOGIT,
    }
    ending = honest.arrays["ending"]
    return Report(
        header=header,
        limits=found,
        honesty=honesty(honest, base, widen),
        receipts=honest.receipts,
        tokens=honest.tokens,
        widen=widen,
        margin_largest=largest,
        early_stop=(float(np.median(ending)) / LOGIT, float((ending > found.profile.margin_hard_limit).mean())),
        detections=tuple(detection(name, text, data, found.profile, kept) for name, text, data, kept in cheats),
    )


def _limit_cells(row: Row) -> list[str]:
    unit = 1 if row.score == "fingerprint" else LOGIT

    def number(value: float) -> str:
        return f"{value / unit:.4g}"

    return [
        row.score, str(row.length or "any"), str(row.receipts), number(row.mean), row.worst_class, number(row.worst_mean),
        number(row.largest), number(row.tail.scale), str(row.tail.excesses),
        str(row.tail.worth),
        "-" if math.isnan(row.tail.variation) else f"{row.tail.variation:.2f}", row.tail.group, number(row.limit),
    ]  # fmt: skip


def _detection_cells(found: Detection) -> list[str]:
    never = "one receipt does not convict it"
    points = "-" if found.points is None else f"{found.points}" + (f" (> {MAX_POINTS})" * (found.points > MAX_POINTS))
    return [
        found.text, str(found.tokens), f"{found.margin_mean:.4f}", f"{found.fingerprint_mean:.2f}",
        *(f"{found.power[n]:.2f}" if n in found.power else "-" for n in GRID),
        *(never if n is None else str(n) for n in found.needed), points,
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON."""
    variation = row["tail"]["variation"]
    row["tail"]["variation"] = None if math.isnan(variation) else variation
    return row
