"""From raw scores to a profile: dead zones, the hard limit, and the two tables of limits by length.

Every limit is a `statistics.Tail` taken at its share of FALSE_CONVICTION, times `widen`. Margins enter as their
seed-free terms, so no choice of seed by the client is assumed away. docs/calibration.md has the reasons.
Knows arrays; nothing of engines and folders.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.errors import InvalidInput
from poip_chain.proof.calibration.data import Data
from poip_chain.proof.calibration.prompts import CONTENTS
from poip_chain.proof.calibration.statistics import MIN_EXCESSES, Tail, bootstrap_upper_mean, tail
from poip_chain.spec.objects import MAX_TABLE_ROWS, Profile, ThresholdRow

FALSE_CONVICTION = 1e-9
"""Of one honest receipt, by any of the three rules."""
RULES = 3
"""The hard limit, the margin table, the fingerprint table: each gets a third."""
CONFIDENCE = 0.99
LENGTHS = (16, 32, 64, 128, 256, 512)
MIN_RECEIPTS = 40
"""A row needs so many receipts of twice its length."""
DEAD_ZONE_SHARE = 0.01
"""Of positions, in the worst content or at the worst temperature, whose noise lies above a dead zone."""
HARD_WINDOW = 16
MARGIN_STEP = 1024
"""Margins' dead zone and limits are rounded up to 1/64 logit."""
WIDEN = 1.5
"""Limits grow by this factor until a model's noise was measured on the GPUs that serve it, too."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeadZones:
    """margin in 2**-16 logits; listed and unlisted in 1/64 nat."""

    margin: int
    listed: int
    unlisted: int


@dataclass(frozen=True, slots=True)
class Row:
    """One limit with what it rests on. length 0: the hard limit of a single margin. mean and worst_mean: of the honest
    sums, over all receipts and the upper confidence mean of the worst class; largest: seen; limit: in the score's unit."""

    score: str
    length: int
    receipts: int
    mean: float
    worst_class: str
    worst_mean: float
    largest: float
    tail: Tail
    limit: int


@dataclass(frozen=True)
class Limits:
    """A profile's numbers with their reasons."""

    profile: Profile
    rows: tuple[Row, ...]


def margin_terms(values: NDArray[Any], dead_zone: int) -> Floats:
    """The part of margins above the dead zone."""
    terms: Floats = np.maximum(0, values.astype(np.int64) - dead_zone).astype(np.float64)
    return terms


def fingerprint_terms(data: Data, listed_zone: int, unlisted_zone: int) -> Floats:
    """The fingerprint term of each position."""
    listed = np.maximum(0, np.abs(data.arrays["listed"].astype(np.int64)) - listed_zone).sum(axis=1)
    unlisted = np.maximum(0, data.arrays["unlisted"].astype(np.int64) - unlisted_zone).sum(axis=1)
    terms: Floats = (listed + unlisted).astype(np.float64)
    return terms


def groups(data: Data) -> list[tuple[str, NDArray[np.bool_]]]:
    """The receipts of each content, and of each temperature: the groups whose noise may differ."""
    found = []
    for content in np.unique(data.arrays["content"]):
        found.append((CONTENTS[int(content)], data.arrays["content"] == content))
    for temperature in np.unique(data.arrays["temperature"]):
        found.append((f"T={temperature / 1000:g}", data.arrays["temperature"] == temperature))
    return found


def dead_zones(data: Data) -> DeadZones:
    """The noise that all but DEAD_ZONE_SHARE of the positions stay below, in the worst group.

    For tokens that were not stated it is at least the largest eighth value: only eight are kept, so that above it no term
    of an honest sum is missing.
    """
    margin = listed = unlisted = 0.0
    for _, mask in groups(data):
        rows = np.repeat(mask, data.arrays["tokens"])
        level = 1 - DEAD_ZONE_SHARE
        margin = max(margin, float(np.quantile(data.arrays["free"][rows], level)))
        listed = max(listed, float(np.quantile(np.abs(data.arrays["listed"][rows].astype(np.int64)), level)))
        unlisted = max(unlisted, float(np.quantile(data.arrays["unlisted"][rows].max(axis=1), level)))
    complete = int(data.arrays["unlisted"][:, -1].max(initial=0))
    return DeadZones(_up(margin, MARGIN_STEP), math.ceil(listed), max(0, math.ceil(unlisted), complete))


def windows(data: Data, terms: Floats, length: int) -> tuple[NDArray[np.int64], Floats]:
    """(receipt, sum) of each window of `length` positions; windows stand side by side from a receipt's first position."""
    tokens, first = data.arrays["tokens"], data.first
    receipts, sums = [np.empty(0, np.int64)], [np.empty(0)]
    for i in np.flatnonzero(tokens >= length).tolist():
        count = int(tokens[i]) // length
        sums.append(terms[first[i] : first[i] + count * length].reshape(count, length).sum(axis=1))
        receipts.append(np.full(count, i))
    return np.concatenate(receipts), np.concatenate(sums)


def worst_class(data: Data, receipts: NDArray[np.int64], values: Floats, rng: np.random.Generator) -> tuple[str, float]:
    """The content x temperature with the largest upper confidence mean of `values`, resampling receipts."""
    counts = np.bincount(receipts, minlength=data.receipts)
    have = np.flatnonzero(counts)
    means = np.bincount(receipts, weights=values, minlength=data.receipts)[have] / counts[have]
    contents, temperatures = data.arrays["content"][have], data.arrays["temperature"][have]
    classes = sorted(set(zip(contents.tolist(), temperatures.tolist(), strict=True)))
    worst = ("", -1.0)
    for content, temperature in classes:
        chosen = means[(contents == content) & (temperatures == temperature)]
        upper = bootstrap_upper_mean(chosen, (1 - CONFIDENCE) / len(classes), rng)
        if upper > worst[1]:
            worst = (f"{CONTENTS[content]}, T={temperature / 1000:g}", upper)
    return worst


def limits(data: Data, base: Profile, widen: float = WIDEN, zones: DeadZones | None = None) -> Limits:
    """The profile for honest noise as `data` shows it, and the reason of each number.

    base: everything else of the profile. zones: to set the dead zones by hand. Raises InvalidInput if there are too few
    receipts for a single row.
    """
    rng = np.random.default_rng(0)
    zones = zones or dead_zones(data)
    usable = [n for n in LENGTHS if int((data.arrays["tokens"] >= 2 * n).sum()) >= MIN_RECEIPTS][:MAX_TABLE_ROWS]
    if not usable:
        raise InvalidInput(
            f"{data.receipts} receipts are too few: {MIN_RECEIPTS} of at least {2 * LENGTHS[0]} tokens are needed.",
            hint="Collect more tokens.",
        )
    each = FALSE_CONVICTION / RULES
    margin = margin_terms(data.arrays["free"], zones.margin)
    fingerprint = fingerprint_terms(data, zones.listed, zones.unlisted)
    rows: list[Row] = []
    tables: dict[str, tuple[ThresholdRow, ...]] = {}
    for name, terms, unit in (("margin", margin, MARGIN_STEP), ("fingerprint", fingerprint, 1)):
        lengths = [n for n in usable if _weighs(data, terms, n)] or usable[:1]
        # The last row also judges every longer answer, as windows of its length to twice that (see docs).
        shares = [each / (max(1, base.max_context // n) if n == lengths[-1] else 1) for n in lengths]
        made = [_row(data, name, terms, n, share, widen, unit, rng) for n, share in zip(lengths, shares, strict=True)]
        made = _ordered(made, unit)
        rows += made
        tables[name] = tuple(ThresholdRow(row.length, row.limit) for row in made)
    hard = _hard(data, zones.margin, each / -(-base.max_context // HARD_WINDOW), widen, rng)
    rows.append(hard)
    profile = dataclasses.replace(
        base,
        margin_dead_zone=zones.margin,
        margin_hard_limit=hard.limit,
        margin_table=tables["margin"],
        fingerprint_dead_zone=zones.listed,
        fingerprint_tolerance=zones.unlisted,
        fingerprint_table=tables["fingerprint"],
    )
    return Limits(profile, tuple(rows))


def _weighs(data: Data, terms: Floats, n: int) -> bool:
    """Whether there are enough sums of n terms for a row of its own; else the row before it serves, scaled."""
    receipts, sums = windows(data, terms, n)
    return tail(sums, receipts, [], 0.0, 0.0, 1 - CONFIDENCE).worth >= MIN_EXCESSES


def _row(
    data: Data, name: str, terms: Floats, n: int, share: float, widen: float, unit: int, rng: np.random.Generator
) -> Row:
    """The limit of one row: the profile scales it per token up to the next row, so it must hold for those lengths too."""
    single = _single_scale(terms)
    receipts, sums = windows(data, terms, n)
    worst, upper = worst_class(data, receipts, sums, rng)
    chosen = _tail(data, receipts, sums, upper, single)
    needed = chosen.limit(share)
    for longer in (3 * n // 2, 2 * n):
        far_receipts, far_sums = windows(data, terms, longer)
        if len(np.unique(far_receipts)) >= MIN_RECEIPTS:
            _, far_upper = worst_class(data, far_receipts, far_sums, rng)
            far = _tail(data, far_receipts, far_sums, far_upper, single)
            if far.limit(share) * n / longer > needed:
                chosen, needed = far, far.limit(share) * n / longer
    return Row(
        score=name,
        length=n,
        receipts=len(np.unique(receipts)),
        mean=float(sums.mean()),
        worst_class=worst,
        worst_mean=upper,
        largest=float(sums.max()),
        tail=chosen,
        limit=_up(widen * needed, unit),
    )


def _ordered(rows: list[Row], unit: int) -> list[Row]:
    """Raise limits so that no longer answer is allowed a higher mean, and none a smaller sum, than a shorter one: the
    profile reads its table on that understanding."""
    found = list(rows)
    for i in range(len(found) - 2, -1, -1):
        least = found[i + 1].limit * found[i].length / found[i + 1].length
        found[i] = dataclasses.replace(found[i], limit=max(found[i].limit, _up(least, unit)))
    for i in range(1, len(found)):
        found[i] = dataclasses.replace(found[i], limit=max(found[i].limit, found[i - 1].limit))
    return found


def _hard(data: Data, dead_zone: int, share: float, widen: float, rng: np.random.Generator) -> Row:
    """The hard limit of a single margin, from the largest of each window of HARD_WINDOW positions. `share` is that of one
    window: a longest answer is so many of them."""
    tokens, first = data.arrays["tokens"], data.first
    found_receipts, found_values = [], []
    for i in range(data.receipts):
        starts = np.arange(first[i], first[i + 1], HARD_WINDOW)
        found_values.append(np.maximum.reduceat(data.arrays["free"][: first[i + 1]].astype(np.float64), starts))
        found_receipts.append(np.full(len(starts), i))
    receipts, largest = np.concatenate(found_receipts), np.concatenate(found_values)
    worst, upper = worst_class(data, receipts, largest, rng)
    found = _tail(data, receipts, largest, upper, 0.0)
    return Row(
        score="hard limit",
        length=0,
        receipts=len(tokens),
        mean=float(largest.mean()),
        worst_class=worst,
        worst_mean=upper,
        largest=float(largest.max()),
        tail=found,
        limit=max(_up(widen * found.limit(share), MARGIN_STEP), dead_zone + MARGIN_STEP),
    )


def _tail(data: Data, receipts: NDArray[np.int64], values: Floats, floor: float, least_scale: float) -> Tail:
    suspects = [(name, chosen[receipts]) for name, chosen in groups(data)]
    return tail(values, receipts, suspects, floor, least_scale, 1 - CONFIDENCE)


def _single_scale(terms: Floats) -> float:
    """The mean of the positive terms: one position's tail is the least that a sum's tail can have."""
    positive = terms[terms > 0]
    return float(positive.mean()) if len(positive) else 1.0


def _up(value: float, unit: int) -> int:
    return unit * math.ceil(value / unit)
