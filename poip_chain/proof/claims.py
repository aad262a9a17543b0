"""What an accusation of an answer can rest on: its score in the court's arithmetic, and the shortest list of points that
convicts it. Knows evidence and a canonical trace; no chain, no bonds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from poip_chain.canonical.moves import Player
from poip_chain.canonical.points import ScoredPoint, fingerprint_points, margin_points
from poip_chain.errors import InvalidInput
from poip_chain.proof.evidence import Evidence
from poip_chain.spec import scores
from poip_chain.spec.accusation import Claim, Point, Term, cheapest_points, score
from poip_chain.spec.scores import Scores, Verdict


@dataclass(frozen=True, slots=True)
class Grounds:
    """`claim` is None where there are none; `reason` says why then. detail: the canonical sums, for people; margins in
    2**-16 logits, fingerprint in 1/64 nat."""

    claim: Claim | None
    reason: str
    detail: dict[str, Any]


def grounds_of(evidence: Evidence, player: Player) -> Grounds:
    """What an answer can be accused with. `player` holds its canonical trace."""
    record, profile = evidence.record, evidence.profile
    output, temperature = record.transcript.output_ids, record.params.temperature_milli
    logits = player.trace.logits
    margins = margin_points(logits, output, record.request.seed(), temperature, profile.margin_dead_zone)
    zones = (profile.fingerprint_dead_zone, profile.fingerprint_tolerance)
    try:
        fingerprints = fingerprint_points(logits, output, record.transcript.fingerprints, *zones)
    except InvalidInput:
        fingerprints = []  # not well formed, which is a fault that is judged at once
    sums = Scores(
        tokens=len(output),
        margin_sum=sum(point.term for point in margins),
        margin_max=max((point.value for point in margins), default=0),
        fingerprint_sum=sum(point.term for point in fingerprints),
    )
    detail: dict[str, Any] = {
        "canonical_margin_sum": sums.margin_sum,
        "canonical_margin_max": sums.margin_max,
        "canonical_fingerprint_sum": sums.fingerprint_sum,
    }
    verdict = scores.verdict(sums, profile)
    if verdict is not Verdict.FRAUD:
        return Grounds(None, f"the canonical engine does not confirm the verdict: {verdict}", detail)
    points = cheapest_points(map(_term, margins), map(_term, fingerprints), len(output), profile)
    if points is None:
        return Grounds(None, "no list of points that one claim can hold passes a limit", detail)
    claim = Claim.of(
        record.receipt,
        evidence.position,
        evidence.receipt_proof,
        record.request,
        record.params,
        record.transcript,
        player.root,
        points,
    )
    scored = score(evidence.batch, claim, profile, player.rows.root)
    if not scored.convicts:
        return Grounds(None, "the points found do not convict", detail)
    return Grounds(claim, "", detail | {"points": len(points.margins) + len(points.fingerprints)})


def _term(found: ScoredPoint) -> Term:
    return Term(Point(found.position, found.token, found.logit, found.claimed_logit), found.value)
