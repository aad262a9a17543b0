"""Score answers against recomputed logits: the fast twin of spec/scores.py over whole logit rows.

Knows rows and profiles, nothing of nodes or the chain. Tested against the spec on random rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poip_chain.errors import InvalidInput
from poip_chain.proof.fetch import Record
from poip_chain.proof.reexecution import Answer, LogitSource, Row
from poip_chain.service.engine.noise import gumbel_array, uniform_bits_array
from poip_chain.spec import scores
from poip_chain.spec.objects import Profile
from poip_chain.spec.sampler import position_key
from poip_chain.spec.scores import Scores, Verdict


@dataclass(frozen=True, slots=True)
class PositionScore:
    """One output position: margin in 2**-16 logits before the dead zone, fingerprint term in 1/64 nat after it."""

    margin: int
    fingerprint: int
    best_token: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """What re-execution says of one answer."""

    scores: Scores
    verdict: Verdict
    positions: tuple[PositionScore, ...]
    source: str


def judge(records: Sequence[Record], profile: Profile, source: LogitSource) -> list[Judgement]:
    """Re-execute answers, batched where that helps, and judge each.

    Raises InvalidInput if a record has no output, ids outside the vocabulary, or fingerprints for another number of
    positions: such answers are malformed, and are judged without re-execution (spec/offences.py).
    """
    answers = []
    for record in records:
        ids = (*record.transcript.prompt_ids, *record.transcript.output_ids)
        if not record.transcript.prompt_ids or not record.transcript.output_ids or max(ids) >= profile.vocab_size:
            raise InvalidInput("an answer without tokens, or with ids outside the vocabulary, cannot be re-executed.")
        if len(record.transcript.fingerprints) != len(record.transcript.output_ids):
            raise InvalidInput("an answer is re-executed with one fingerprint for each output token.")
        answers.append(Answer(record.transcript.prompt_ids, record.transcript.output_ids))
    found: list[list[PositionScore]] = [[] for _ in records]
    for i, position, row in source.rows(answers):
        found[i].append(score_position(records[i], position, row, profile))
    return [_judgement(positions, profile, source.name) for positions in found]


def score_position(record: Record, position: int, row: Row, profile: Profile) -> PositionScore:
    """Both scores at one output position; over the listed tokens only where the row is not full (a lower bound)."""
    chosen = record.transcript.output_ids[position]
    ids = np.arange(len(row.values), dtype=np.int64) if row.ids is None else row.ids
    temperature = record.params.temperature_milli
    key = position_key(record.request.seed(), position)
    noised = 1000 * row.values
    if temperature:
        keys = np.full(len(ids), key, dtype=np.uint64)
        noised = noised + temperature * gumbel_array(uniform_bits_array(keys, ids))
    best = int(np.argmax(noised))  # the first maximum: ids ascend, so ties go to the lowest id
    at_chosen = int(np.searchsorted(ids, chosen))
    margin = scores.margin_between(int(noised[best]), int(noised[at_chosen]))
    fingerprint = _fingerprint(record.transcript.fingerprints[position], ids, row, at_chosen, profile)
    return PositionScore(margin, fingerprint, int(ids[best]))


def _fingerprint(
    entries: Sequence[tuple[int, int]],
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    row: Row,
    at_chosen: int,
    profile: Profile,
) -> int:
    difference = row.values - row.values[at_chosen]
    half = 1 << (scores.NAT_SHIFT - 1)
    canonical = np.clip((difference + half) >> scores.NAT_SHIFT, scores.VALUE_MIN, scores.VALUE_MAX)
    places = np.searchsorted(ids, [token for token, _ in entries])
    total, listed = 0, [at_chosen]
    for (token, stated), place in zip(entries, places, strict=True):
        # A first-stage row may not hold a stated token; its term is then left out, which can only lower the sum.
        if place < len(ids) and ids[place] == token:
            total += scores.listed_term(stated, int(canonical[place]), profile.fingerprint_dead_zone)
            listed.append(int(place))
    lowest = min(value for _, value in entries)
    excess = canonical - lowest - profile.fingerprint_tolerance
    excess[listed] = 0
    return total + int(excess[excess > 0].sum())


def _judgement(positions: Sequence[PositionScore], profile: Profile, source: str) -> Judgement:
    sums = Scores(
        tokens=len(positions),
        margin_sum=sum(scores.margin_term(p.margin, profile.margin_dead_zone) for p in positions),
        margin_max=max(p.margin for p in positions),
        fingerprint_sum=sum(p.fingerprint for p in positions),
    )
    return Judgement(sums, scores.verdict(sums, profile), tuple(positions), source)
