"""The limits that ship are those that follow from the scores that ship (docs/calibration.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poip_chain.economic.profiles import CALIBRATED_MODEL, model_profile, profile_from_json
from poip_chain.proof.calibration.data import Data
from poip_chain.proof.calibration.limits import limits
from poip_chain.proof.calibration.report import verdicts
from poip_chain.spec.scores import Verdict
from tests.vectors.generate_canonical import SMOLLM

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "data" / "calibration"
SHIPPED = model_profile(SMOLLM, (2,), 2048)


@pytest.fixture(scope="module")
def honest() -> Data:
    return Data.load(MEASURED / "scores" / "honest.npz")


def test_they_are_the_published_ones() -> None:
    assert profile_from_json(json.loads((MEASURED / "profile.json").read_text())) == SHIPPED
    header = json.loads((MEASURED / "scores" / "header.json").read_text())
    assert bytes.fromhex(header["model_id"][2:]) == CALIBRATED_MODEL


def test_they_follow_from_the_scores(honest: Data) -> None:
    assert (honest.receipts, honest.tokens) == (416, 53_504)
    assert limits(honest, SHIPPED).profile == SHIPPED


def test_they_accuse_nobody_honest(honest: Data) -> None:
    assert set(verdicts(honest, SHIPPED)) == {Verdict.HONEST}
