"""Evidence files: what is written is read back, and a file that was tampered with is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poip_chain.economic.profiles import profile_from_json, profile_to_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.audit import BatchReceipts
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.publication import assemble
from poip_chain.proof.scoring import judge
from tests.engines.node_kit import PROFILE
from tests.support.records import batch_of, published, record

RECORDS = tuple(record(seq=seq, output_tokens=3 + seq) for seq in range(5))


def evidence(position: int = 2) -> Evidence:
    batch = batch_of(*RECORDS)
    place = BatchReceipts(batch, [r.receipt for r in RECORDS]).evidence(position)
    return Evidence(
        31337, batch.node, batch, position, list(place.proof), PROFILE, RECORDS[position], {"verdict": "fraud"}
    )


@pytest.mark.parametrize("position", range(5))
def test_a_file_is_read_back_as_it_was_written(tmp_path: Path, position: int) -> None:
    path = evidence(position).write(tmp_path / "deep" / "case.json")
    assert Evidence.read(path) == evidence(position)
    assert not list(path.parent.glob("*.tmp"))
    assert "poip audit run --evidence case.json" in path.read_text()


def test_an_answer_published_on_chain_makes_a_file_too(tmp_path: Path) -> None:
    """It has the statement's hash without its text, and no signature of the request."""
    case = evidence()
    again = assemble(published(case.record, RECORDS))
    path = Evidence(1, case.log, case.batch, 2, case.receipt_proof, PROFILE, again, {}).write(tmp_path / "case.json")
    assert Evidence.read(path).record == again


def test_the_profile_survives_json() -> None:
    assert profile_from_json(json.loads(json.dumps(profile_to_json(PROFILE)))) == PROFILE


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "another token": put("record", "transcript", "output_ids", 0, value=999),
    "another fee": put("record", "receipt", "fee", value="1"),
    "another seed": put("record", "request", "client_seed", value="0x" + "00" * 32),
    "another temperature": put("record", "params", "temperature_milli", value=700),
    "another position": put("position", value=1),
    "a position outside": put("position", value=99),
    "a negative position": put("position", value=-1),
    "a fraction": put("position", value=2.0),
    "infinity": put("chain_id", value=float("inf")),
    "another root": put("batch", "root", value="0x" + "00" * 32),
    "no proof": put("receipt_proof", value=[]),
    "a long proof": put("receipt_proof", value=["0x" + "00" * 32] * 70),
    "another version": put("version", value=2),
    "a profile with text": put("profile", "dtype", value=5),
    "a profile with an extra field": put("profile", "more", value=5),
    "a profile without a table": put("profile", "margin_table", value=None),
    "no record": put("record", value=None),
    "a result that is a number": put("result", value=3),
    "half a character": put("record", "transcript", "engine_statement", value="\ud800"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_is_refused(tmp_path: Path, name: str) -> None:
    path = evidence().write(tmp_path / "case.json")
    document = json.loads(path.read_text())
    TAMPERED[name](document)
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidInput):
        Evidence.read(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{}", "[" * 100_000, '{"version": 1}', "\x00", "9" * 5000])
def test_what_is_no_evidence_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(InvalidInput):
        Evidence.read(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        Evidence.read(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput):
        Evidence.read(tmp_path / "binary")


def test_an_answer_without_all_its_fingerprints_is_not_executed() -> None:
    """Such a record never passes the checks before; the judge does not rely on it."""
    short = record(output_tokens=9, fingerprints=tuple(tuple((i, -i) for i in range(8)) for _ in range(8)))

    class Never:
        name = "never"

        def rows(self, answers: Any) -> Any:
            raise AssertionError("nothing is executed")

    with pytest.raises(InvalidInput, match="one fingerprint"):
        judge([short], PROFILE, Never())
