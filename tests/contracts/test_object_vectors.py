"""objects.vy against the vectors: struct hashes, transcript roots, signers, and the log's audit selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boa
import pytest

from poip_chain.spec.eip712 import SECP256K1_N
from poip_chain.spec.objects import Batch, Receipt, Request, SamplingParams, Voucher
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript
from tests.contracts import system
from tests.contracts.system import HARNESS

FOLDER = Path(__file__).parent.parent / "vectors"
OBJECTS = json.loads((FOLDER / "objects.json").read_text())
TRANSCRIPTS = json.loads((FOLDER / "transcript.json").read_text())
KINDS = {"request": Request, "receipt": Receipt, "voucher": Voucher}
SIGNED = [(kind, case) for kind in KINDS for case in OBJECTS[kind]]
ZERO = "0x" + "00" * 20


@pytest.fixture(scope="module")
def objects() -> Any:
    return system.load(HARNESS / "objects_harness.vy")


def unhex(text: str) -> bytes:
    return bytes.fromhex(text[2:])


@pytest.mark.parametrize(("kind", "case"), SIGNED)
def test_struct_hashes(objects: Any, kind: str, case: dict[str, Any]) -> None:
    item = KINDS[kind].from_json(case["object"])
    assert getattr(objects, f"{kind}_hash")(item.values()) == unhex(case["struct_hash"])


@pytest.mark.parametrize(("kind", "case"), SIGNED)
def test_signers(objects: Any, kind: str, case: dict[str, Any]) -> None:
    domain = OBJECTS["domain"]
    struct_hash, signature = unhex(case["struct_hash"]), unhex(case["signature"])
    contract = domain["verifying_contract"]
    boa.env.evm.patch.chain_id = domain["chain_id"]
    assert objects.domain_separator(contract) == unhex(domain["separator"])
    assert objects.signer(struct_hash, contract, signature) == case["signer"]
    assert objects.signer(struct_hash, case["signer"], signature) != case["signer"], "another contract"
    boa.env.evm.patch.chain_id = domain["chain_id"] + 1
    assert objects.signer(struct_hash, contract, signature) != case["signer"], "another chain"


def test_signatures_have_one_form(objects: Any) -> None:
    case, contract = OBJECTS["receipt"][0], OBJECTS["domain"]["verifying_contract"]
    boa.env.evm.patch.chain_id = OBJECTS["domain"]["chain_id"]
    struct_hash, signature = unhex(case["struct_hash"]), unhex(case["signature"])
    s, v = int.from_bytes(signature[32:64], "big"), signature[64]
    high = signature[:32] + (SECP256K1_N - s).to_bytes(32, "big") + bytes([55 - v])
    compact = signature[:32] + (s | ((v - 27) << 255)).to_bytes(32, "big")
    for bad in (b"", signature[:64], compact, signature[:64] + bytes([v - 27]), high, bytes(65)):
        assert objects.signer(struct_hash, contract, bad) == ZERO


def test_params_and_batches(objects: Any) -> None:
    for case in OBJECTS["params"]:
        assert objects.params_hash(SamplingParams.from_json(case["object"]).values()) == unhex(case["params_hash"])
    for case in OBJECTS["batch"]:
        assert objects.batch_hash(Batch.from_json(case["object"]).values()) == unhex(case["abi_hash"])


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_transcript_roots(objects: Any, case: dict[str, Any]) -> None:
    transcript = Transcript.from_json(case["transcript"])
    assert transcript.to_json() == case["transcript"]
    assert transcript.header_hash() == unhex(case["header_hash"])
    assert transcript.root() == unhex(case["transcript_root"])
    assert objects.transcript_root(TranscriptRoots.of(transcript).values()) == unhex(case["transcript_root"])
