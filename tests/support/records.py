"""Right answers of any length with their batch, for tests of the proof layer that need no chain."""

from __future__ import annotations

from typing import Any

from poip_chain.proof.fetch import Record
from poip_chain.proof.publication import CHUNK, Answer, Chunk
from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.objects import Batch, FinishReason, Part, Receipt, Request, SamplingParams
from poip_chain.spec.transcript import Transcript, prompt_root, statement_hash
from poip_chain.spec.types import Address

NODE = Address("0x1111111111111111111111111111111111111111")
PAYER = Address("0x3333333333333333333333333333333333333333")
STATEMENT = "script"


def record(prompt_tokens: int = 5, output_tokens: int = 3, seq: int = 0, **transcript_changes: Any) -> Record:
    """A record whose hashes all fit, unless the transcript is changed (the receipt commits to the change)."""
    params = SamplingParams(0)
    prompt_ids = tuple(range(20, 20 + prompt_tokens))
    output_ids = tuple(300 + i % 600 for i in range(output_tokens))
    reason = FinishReason.LENGTH if output_tokens else FinishReason.CANCELLED
    request = Request(
        client=PAYER,
        node=NODE,
        model_id=b"m" * 32,
        profile_version=1,
        prompt_root=prompt_root(prompt_ids),
        prompt_tokens=prompt_tokens,
        params_hash=params.params_hash(),
        max_tokens=max(output_tokens, 1),
        input_price=1,
        output_price=2,
        client_seed=b"s" * 32,
        client_nonce=seq.to_bytes(32, "big"),
        deadline=2000,
    )
    fields: dict[str, Any] = {
        "request_hash": request.struct_hash(),
        "finish_reason": int(reason),
        "engine_statement": STATEMENT,
        "prompt_ids": prompt_ids,
        "output_ids": output_ids,
        "fingerprints": tuple(tuple((i, -i) for i in range(8)) for _ in output_ids),
        **transcript_changes,
    }
    transcript = Transcript(**fields)
    fee = request.fee(output_tokens)
    receipt = Receipt(
        NODE, seq, request.struct_hash(), b"m" * 32, transcript.root(), output_tokens, int(reason), fee, PAYER,
        fee, fee, 1000,
    )  # fmt: skip
    return Record(request, b"\x11" * 65, params, receipt, transcript, statement_hash(transcript.engine_statement))


def batch_of(*records: Record) -> Batch:
    """A batch of these records' receipts."""
    root = merkle_root([r.receipt.struct_hash() for r in records])
    total = sum(r.receipt.fee for r in records)
    return Batch(7, NODE, b"m" * 32, 1, root, 0, len(records), total, total, 5, 10**6, 1, 7, 1000, 1100)


def served(found: Record) -> dict[str, Any]:
    """What a node serves of a record."""
    document = found.to_json()
    del document["statement_hash"]
    return document


def published(found: Record, records: tuple[Record, ...] | None = None) -> dict[Chunk, Answer]:
    """All answers that bring a record onto the chain, chunk by chunk."""
    leaves = [r.receipt.struct_hash() for r in records or (found,)]
    proof = tuple(merkle_proof(leaves, [leaves.index(found.receipt.struct_hash())]))
    answers = {}
    for part in Part:
        whole = found.transcript.leaves(part)
        for first in range(0, max(len(whole), 1), CHUNK):
            chunk = tuple(whole[first : first + CHUNK])
            answers[part, first] = Answer(found.receipt, found.request, found.params, found.roots(), chunk, proof)
    return answers


__all__ = ["NODE", "PAYER", "batch_of", "published", "record", "served"]
