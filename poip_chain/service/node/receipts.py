"""From a finished answer to a signed, stored receipt.

The one place where the node key signs receipts. It knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eth_keys.datatypes import PrivateKey

from poip_chain.errors import IntegrityError
from poip_chain.service.node.admission import Submission
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import Record, StoredReceipt
from poip_chain.service.node.store import Draft, Store
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import FinishReason, Receipt, Request, SamplingParams
from poip_chain.spec.transcript import FingerprintEntry, Transcript

MAX_PACKED_TRANSCRIPT = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine produced for a submission."""

    output_ids: tuple[int, ...]
    fingerprints: tuple[tuple[FingerprintEntry, ...], ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class FullRecord:
    """A stored answer, parsed."""

    request: Request
    request_signature: bytes
    params: SamplingParams
    transcript: Transcript


class ReceiptWriter:
    """Signs and stores receipts with one node key. `clock` gives Unix seconds."""

    def __init__(self, store: Store, private_key: PrivateKey, log_domain: Domain, clock: Callable[[], float]) -> None:
        self._store, self._key, self._domain, self._clock = store, private_key, log_domain, clock

    def write(self, submission: Submission, answer: Answer, engine_statement: str) -> tuple[StoredReceipt, Transcript]:
        """The receipt and transcript of an answer, stored durably; those stored before if the request has some.

        Raises RequestRefused if the deadline has passed (a receipt dated after it would be an offence), and
        IntegrityError if the answer breaks the request; then nothing is signed.
        """
        request = submission.request
        _check_answer(submission, answer)
        issued_at = int(self._clock())
        if issued_at > request.deadline:
            raise RequestRefused(
                408, "deadline_passed", f"the deadline {request.deadline} passed before the answer was complete."
            )
        transcript = Transcript(
            request_hash=submission.request_hash,
            finish_reason=int(answer.finish_reason),
            engine_statement=engine_statement,
            prompt_ids=submission.prompt_ids,
            output_ids=answer.output_ids,
            fingerprints=answer.fingerprints,
        )
        draft = Draft(
            request_hash=submission.request_hash,
            model_id=request.model_id,
            profile_version=request.profile_version,
            transcript_root=transcript.root(),
            output_tokens=len(answer.output_ids),
            finish_reason=int(answer.finish_reason),
            fee=request.fee(len(answer.output_ids)),
            payer=request.client,
            issued_at=issued_at,
        )
        record = Record(
            request=json.dumps(request.to_json()),
            request_signature=submission.signature,
            params=json.dumps(submission.params.to_json()),
            transcript=pack(transcript.to_json()),
        )
        crash_point("before_sign")
        stored = self._store.issue(draft, record, self._sign)
        crash_point("after_sign")
        if stored.receipt.transcript_root != draft.transcript_root:
            return stored, read_record(self._store, stored.receipt.seq).transcript
        return stored, transcript

    def _sign(self, receipt: Receipt) -> bytes:
        return receipt.sign(self._domain, self._key)


def _check_answer(submission: Submission, answer: Answer) -> None:
    """The last look before signing: what is signed here must not be an offence."""
    request, count = submission.request, len(answer.output_ids)
    reason = answer.finish_reason
    wrong = ""
    if count != len(answer.fingerprints):
        wrong = f"{count} tokens but {len(answer.fingerprints)} fingerprints"
    elif count > request.max_tokens or count == 0:
        wrong = f"{count} tokens of at most {request.max_tokens}"
    elif reason is FinishReason.LENGTH and count != request.max_tokens:
        wrong = f"finish reason length after {count} of {request.max_tokens} tokens"
    if wrong:
        raise IntegrityError(f"the engine's answer has {wrong}: nothing was signed.")


def read_record(store: Store, seq: int) -> FullRecord:
    """The stored answer of receipt `seq`. Raises NotFound if it is no longer kept."""
    record = store.record_of(seq)
    return FullRecord(
        request=Request.from_json(json.loads(record.request)),
        request_signature=record.request_signature,
        params=SamplingParams.from_json(json.loads(record.params)),
        transcript=Transcript.from_json(unpack(record.transcript)),
    )


def receipt_json(stored: StoredReceipt) -> dict[str, Any]:
    """`{"receipt", "signature"}` as the HTTP API gives it."""
    return {"receipt": stored.receipt.to_json(), "signature": "0x" + stored.signature.hex()}


def record_json(stored: StoredReceipt, record: FullRecord) -> dict[str, Any]:
    """Everything about an answer, as auditors get it."""
    return {
        "request": record.request.to_json(),
        "request_signature": "0x" + record.request_signature.hex(),
        "params": record.params.to_json(),
        **receipt_json(stored),
        "transcript": record.transcript.to_json(),
    }


def pack(value: dict[str, Any]) -> bytes:
    """JSON, compressed: transcripts are most of the database."""
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`. Raises IntegrityError if the stored bytes are damaged."""
    try:
        unpacker = zlib.decompressobj()
        return json.loads(unpacker.decompress(data, MAX_PACKED_TRANSCRIPT))
    except (zlib.error, ValueError) as error:
        raise IntegrityError("a stored transcript is damaged.", hint="Restore the node's data directory.") from error
