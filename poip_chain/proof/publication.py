"""Read an answer out of the leaves that a node was made to publish on chain, chunk by chunk.

A challenge asks for one chunk: at most 8 leaves of one part. The first answer brings receipt and request too, so from
then on it is known how many chunks there are. Knows the Availability contract's event, not how it is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from poip_chain.proof.fetch import Record
from poip_chain.spec.objects import Part, Receipt, Request, SamplingParams
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript, leaf_count, parse_fingerprints

CHUNK = 8
"""Leaves in one challenge (Availability)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered challenge, as the event carries it; the contract has checked every hash."""

    receipt: Receipt
    request: Request
    params: SamplingParams
    roots: TranscriptRoots
    leaves: tuple[bytes, ...]
    receipt_proof: tuple[bytes, ...]

    @classmethod
    def from_event(cls, args: Mapping[str, Any]) -> Answer:
        """From the arguments of an `Answered` event."""
        return cls(
            receipt=Receipt(**args["receipt"]),
            request=Request(**args["request"]),
            params=_params(args["params"]),
            roots=TranscriptRoots(**args["roots"]),
            leaves=tuple(bytes(leaf) for leaf in args["leaves"]),
            receipt_proof=tuple(bytes(node) for node in args["receipt_proof"]),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        roots = self.roots
        hashes = (
            roots.request_hash,
            roots.statement_hash,
            roots.prompt_root,
            roots.output_root,
            roots.fingerprint_root,
        )
        return {
            "receipt": self.receipt.to_json(),
            "request": self.request.to_json(),
            "params": self.params.to_json(),
            "finish_reason": roots.finish_reason,
            "roots": [value.hex() for value in hashes],
            "leaves": [leaf.hex() for leaf in self.leaves],
            "receipt_proof": [node.hex() for node in self.receipt_proof],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """The inverse of `to_json`, for what our own store returns."""
        request_hash, statement, prompt, output, fingerprint = (bytes.fromhex(value) for value in data["roots"])
        return cls(
            receipt=Receipt.from_json(data["receipt"]),
            request=Request.from_json(data["request"]),
            params=_params(data["params"]),
            roots=TranscriptRoots(request_hash, data["finish_reason"], statement, prompt, output, fingerprint),
            leaves=tuple(bytes.fromhex(leaf) for leaf in data["leaves"]),
            receipt_proof=tuple(bytes.fromhex(node) for node in data["receipt_proof"]),
        )


def _params(values: Mapping[str, Any]) -> SamplingParams:
    """Parameters as the chain has them, unchecked.

    A node may have committed to some that no SamplingParams allows (stop ids out of order): that is an offence to be
    shown to the contract as it stands, and no reason to stumble over the event.
    """
    params = object.__new__(SamplingParams)
    for name in ("temperature_milli", "top_p_milli", "top_k", "ignore_eos"):
        object.__setattr__(params, name, values[name])
    object.__setattr__(params, "stop_token_ids", tuple(values["stop_token_ids"]))
    return params


Chunk = tuple[Part, int]
"""(part, index of its first leaf, a multiple of 8)."""
FIRST_CHUNK: Chunk = (Part.OUTPUT, 0)
CHUNKS_AT_ONCE = 64
"""Enough for a whole record of 2,048 tokens."""


def missing_chunks(answers: Mapping[Chunk, Answer]) -> list[Chunk]:
    """The next chunks to ask for: the first alone while nothing is known, none if everything is published.

    At most CHUNKS_AT_ONCE, however many tokens the receipt claims.
    """
    if not answers:
        return [FIRST_CHUNK]
    known = next(iter(answers.values()))
    chunks = ((part, first) for part in Part for first in range(0, leaf_count(part, _tokens(known, part)), CHUNK))
    return list(islice((chunk for chunk in chunks if chunk not in answers), CHUNKS_AT_ONCE))


def published_leaves(answers: Mapping[Chunk, Answer]) -> dict[Part, list[bytes]]:
    """The leaves, in order, of those parts that are published whole. A part without tokens is always whole."""
    known = next(iter(answers.values()))
    whole = {}
    for part in Part:
        count = leaf_count(part, _tokens(known, part))
        if count > CHUNK * len(answers):
            continue
        chunks = [answers.get((part, first)) for first in range(0, count, CHUNK)]
        leaves = [leaf for answer in chunks if answer is not None for leaf in answer.leaves]
        if None not in chunks and len(leaves) == count:
            whole[part] = leaves
    return whole


def _tokens(known: Answer, part: Part) -> int:
    return known.request.prompt_tokens if part is Part.PROMPT else known.receipt.output_tokens


def assemble(answers: Mapping[Chunk, Answer]) -> Record:
    """The whole record of an answer whose leaves show no fault; call it when no chunk is missing."""
    known = next(iter(answers.values()))
    leaves = published_leaves(answers)
    data = {part: b"".join(leaves[part]) for part in Part}
    prompt_ids, output_ids = (
        tuple(int.from_bytes(data[part][i : i + 4], "little") for i in range(0, len(data[part]), 4))
        for part in (Part.PROMPT, Part.OUTPUT)
    )
    transcript = Transcript(
        request_hash=known.roots.request_hash,
        finish_reason=known.roots.finish_reason,
        engine_statement="",
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        fingerprints=parse_fingerprints(data[Part.FINGERPRINT]),
    )
    return Record(known.request, b"", known.params, known.receipt, transcript, known.roots.statement_hash)
