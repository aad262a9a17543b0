"""Writes scoring.json beside this file, from the specification: `python tests/vectors/generate_scoring.py`.

Accusers' claims with what they come to: hashes, commitment, sums, and whether they convict. Structs are lists of their
fields in the contracts' order; bytes are hex, addresses hex after 0x. A test checks that the file is what the spec gives.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))

from poip_chain.spec import accusation  # noqa: E402
from poip_chain.spec.objects import Profile  # noqa: E402
from poip_chain.spec.types import Address  # noqa: E402
from tests.support.claims import PROFILE, Answered, answered, one_margin_each, random_points  # noqa: E402
from tests.vectors.generate_numeric import render  # noqa: E402

FILE = "scoring.json"
ACCUSER = Address("0x3333333333333333333333333333333333333333")
WEIGHTS_ROOT, SALT = b"\x09" * 32, b"\x07" * 32
SHAPES = ((1, 1, 0, 0), (5, 3, 9, 1), (33, 8, 20, 700), (64, 16, 0, 700), (64, 0, 16, 2000), (100, 20, 20, 100))
"""(output tokens, margin points, fingerprint points, temperature)."""


def plain(value: Any) -> Any:
    """Bytes as hex without 0x, tuples as lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def from_plain(value: Any) -> Any:
    """The inverse of `plain`, for what a contract takes."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if isinstance(value, str) and not value.startswith("0x"):
        return bytes.fromhex(value)
    return value


def case(answer: Answered, points: accusation.Points, profile: Profile) -> dict[str, Any]:
    """One claim and what it comes to."""
    claim = answer.claim(points)
    scored = accusation.score(answer.batch, claim, profile, WEIGHTS_ROOT)
    return {
        "batch": plain(answer.batch.values()),
        "profile": plain(profile.values()),
        "claim": plain(claim.values()),
        "points_hash": plain(points.points_hash()),
        "claim_hash": plain(claim.claim_hash()),
        "commitment": plain(claim.commitment(SALT, ACCUSER)),
        "scored": plain([getattr(scored, field.name) for field in dataclasses.fields(scored)]),
    }


def scoring_vectors() -> dict[str, Any]:
    """All cases."""
    rng, cases = random.Random(11), []
    for outputs, margins, fingerprints, temperature in SHAPES:
        answer = answered(rng, outputs, temperature_milli=temperature)
        cases.append(case(answer, random_points(rng, answer, margins, fingerprints), PROFILE))
    answer = answered(rng, 64)
    cases.append(case(answer, one_margin_each(rng, answer, 4, True), PROFILE))
    cases.append(case(answer, accusation.Points(), PROFILE))
    return {"salt": plain(SALT), "accuser": ACCUSER, "weights_root": plain(WEIGHTS_ROOT), "cases": cases}


if __name__ == "__main__":
    (HERE / FILE).write_text(render(scoring_vectors()))
    print(f"wrote {HERE / FILE}")
