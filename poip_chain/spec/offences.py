"""The faults that are judged at once (protocol section 6): what a receipt, a pair of receipts or a transcript shows.

`contracts/disputes/faults.vy` is the second writing: the same rules in the same order, so both report the same fault.
This file must not know where evidence comes from: signatures and Merkle proofs are checked before. Where params or
profile cannot be shown (None), the rules that need them are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

from eth_hash.auto import keccak

from poip_chain.spec.objects import Batch, FinishReason, Part, Profile, Receipt, Request, SamplingParams
from poip_chain.spec.transcript import (
    ENTRIES_PER_POSITION,
    ENTRY_BYTES,
    IDS_PER_LEAF,
    POSITION_BYTES,
    Transcript,
    header_hash,
    leaf_count,
    leaf_size,
    statement_hash,
    transcript_root,
)
from poip_chain.spec.types import ZERO_ADDRESS, ZERO_HASH, Hash32

NO_PART = 255
"""The `part` of evidence that needs no leaf: header and roots alone."""


class Fault(IntEnum):
    """Codes as the contracts and their events give them."""

    FEE = 1
    MAX_TOKENS = 2
    DEADLINE = 3
    MODEL = 4
    PROFILE = 5
    NODE = 6
    PAYER = 7
    CONTEXT = 8
    SHORT_LENGTH = 9
    EMPTY = 10
    FINISH_REASON = 11
    CUMULATIVE = 12
    PARAMETERS = 13
    SEQUENCE = 14
    BATCH_TOTAL = 15
    NODE_TOTAL = 16
    PAYER_TOTAL = 17
    TOKEN_ID = 18
    LEAF_SIZE = 19
    EARLY_END = 20
    HEADER = 21
    PROMPT_ROOT = 22
    MISSING_END = 23
    FINGERPRINT = 24
    EQUIVOCATION = 25
    WITHHOLDING = 26
    COMPUTATION = 27


@dataclass(frozen=True, slots=True)
class TranscriptRoots:
    """What a transcript_root commits to, field for field as the contracts take it."""

    request_hash: bytes
    finish_reason: int
    statement_hash: bytes
    prompt_root: bytes
    output_root: bytes
    fingerprint_root: bytes

    @classmethod
    def of(cls, transcript: Transcript) -> TranscriptRoots:
        """The roots of a whole transcript."""
        return cls(
            transcript.request_hash,
            transcript.finish_reason,
            statement_hash(transcript.engine_statement),
            *transcript.part_roots(),
        )

    def transcript_root(self) -> Hash32:
        """The receipt's transcript_root."""
        header = header_hash(self.request_hash, self.finish_reason, self.statement_hash)
        return transcript_root(header, self.prompt_root, self.output_root, self.fingerprint_root)

    def part_root(self, part: Part) -> bytes:
        """The Merkle root of one part."""
        return (self.prompt_root, self.output_root, self.fingerprint_root)[part]

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it."""
        return (
            self.request_hash,
            self.finish_reason,
            self.statement_hash,
            self.prompt_root,
            self.output_root,
            self.fingerprint_root,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a receipt stands: at `index` of `batch`."""

    batch: Batch
    index: int


@dataclass(frozen=True, slots=True)
class TranscriptFault:
    """A fault and the least evidence for it: one leaf, or none (part = NO_PART, leaf_index = 0)."""

    fault: Fault
    part: int
    leaf_index: int


def params_fault(
    temperature_milli: int,
    top_p_milli: int,
    top_k: int,
    stop_token_ids: tuple[int, ...],
    profile: Profile | None,
) -> bool:
    """Whether sampling parameters are not served, or outside the profile. Takes fields: bad ones build no object."""
    if top_p_milli != 1000 or top_k != 0:
        return True
    # Greedy decoding (0) is always within the profile.
    served = profile is None or profile.min_temperature_milli <= temperature_milli <= profile.max_temperature_milli
    if temperature_milli != 0 and not served:
        return True
    if any(b <= a for a, b in pairwise(stop_token_ids)):
        return True
    return profile is not None and any(token_id >= profile.vocab_size for token_id in stop_token_ids)


def receipt_fault(
    receipt: Receipt,
    request: Request,
    params: SamplingParams | None,
    profile: Profile | None,
    batch: Batch | None = None,
) -> Fault | None:
    """The first fault that a receipt shows beside its request.

    request is the one that receipt.request_hash names; params those that request.params_hash names; profile that of the
    request's model and version; batch the one that holds the receipt, None for an uncommitted one.
    """
    output = receipt.output_tokens
    rules: Iterator[tuple[bool, Fault]] = iter(
        [
            (receipt.fee != request.fee(output), Fault.FEE),
            (output > request.max_tokens, Fault.MAX_TOKENS),
            (receipt.issued_at > request.deadline, Fault.DEADLINE),
            (receipt.model_id != request.model_id, Fault.MODEL),
            (batch is not None and receipt.model_id != batch.model_id, Fault.MODEL),
            (batch is not None and request.profile_version != batch.profile_version, Fault.PROFILE),
            (request.node not in (ZERO_ADDRESS, receipt.node), Fault.NODE),
            (batch is not None and receipt.node != batch.node, Fault.NODE),
            (receipt.payer != request.client, Fault.PAYER),
            (request.prompt_tokens == 0, Fault.CONTEXT),
            (profile is not None and request.prompt_tokens + output > profile.max_context, Fault.CONTEXT),
            (receipt.finish_reason == FinishReason.LENGTH and output < request.max_tokens, Fault.SHORT_LENGTH),
            (output == 0 and receipt.finish_reason != FinishReason.CANCELLED, Fault.EMPTY),
            (receipt.finish_reason > FinishReason.CANCELLED, Fault.FINISH_REASON),
            (receipt.fee > min(receipt.node_cum, receipt.payer_cum), Fault.CUMULATIVE),
            (
                params is not None
                and params_fault(
                    params.temperature_milli, params.top_p_milli, params.top_k, params.stop_token_ids, profile
                ),
                Fault.PARAMETERS,
            ),
        ]
    )
    return next((fault for broken, fault in rules if broken), None)


def place_fault(receipt: Receipt, place: Place) -> Fault | None:
    """The first fault that a committed receipt shows at its place in its batch, without its request."""
    batch, index = place.batch, place.index
    start, batch_start = receipt.node_cum - receipt.fee, batch.node_cum - batch.total_fee
    rules = [
        (receipt.model_id != batch.model_id, Fault.MODEL),
        (receipt.node != batch.node, Fault.NODE),
        (receipt.finish_reason > FinishReason.CANCELLED, Fault.FINISH_REASON),
        (receipt.fee > min(receipt.node_cum, receipt.payer_cum), Fault.CUMULATIVE),
        (receipt.seq != batch.first_seq + index, Fault.SEQUENCE),
        (index + 1 == batch.count and receipt.node_cum != batch.node_cum, Fault.BATCH_TOTAL),
        # The receipt's interval of the node's running total lies within the batch's.
        (receipt.node_cum > batch.node_cum or start < batch_start, Fault.BATCH_TOTAL),
        (index == 0 and start != batch_start, Fault.BATCH_TOTAL),
    ]
    return next((fault for broken, fault in rules if broken), None)


def sequence_fault(a: Receipt, b: Receipt, a_place: Place | None = None, b_place: Place | None = None) -> Fault | None:
    """The first fault that two receipts of one node show side by side, or one receipt (a = b) at its place.

    The places matter only for a = b, and for a receipt that names another node than the one that committed it: such a
    receipt is no evidence against either in a pair. The caller orders the pair: only a.seq < b.seq shows a fault.
    """
    if a == b:
        place = b_place or a_place
        return place_fault(b, place) if place is not None else None
    if a.node != b.node or a.seq >= b.seq:
        return None
    if any(place is not None and place.batch.node != a.node for place in (a_place, b_place)):
        return None
    reached = a.node_cum + b.fee
    if b.node_cum < reached or (a.seq + 1 == b.seq and b.node_cum != reached):
        return Fault.NODE_TOTAL
    if a.payer == b.payer and b.payer_cum < a.payer_cum + b.fee:
        return Fault.PAYER_TOTAL
    return None


def is_equivocation(a: Receipt, b: Receipt) -> bool:
    """Whether two receipts cannot both be true: same node, same seq or same request, different content."""
    same = a.seq == b.seq or a.request_hash == b.request_hash
    return a.node == b.node and same and a.struct_hash() != b.struct_hash()


def roots_fault(receipt: Receipt, request: Request, roots: TranscriptRoots) -> Fault | None:
    """The first fault that a transcript's header and roots show. A root is zero if and only if its part is empty."""
    if (roots.request_hash, roots.finish_reason) != (receipt.request_hash, receipt.finish_reason):
        return Fault.HEADER
    if roots.prompt_root != request.prompt_root:
        return Fault.PROMPT_ROOT
    for part in (Part.OUTPUT, Part.FINGERPRINT, Part.PROMPT):
        if (roots.part_root(part) == ZERO_HASH) != (tokens_of(receipt, request, part) == 0):
            return Fault.LEAF_SIZE
    return None


def tokens_of(receipt: Receipt, request: Request, part: Part) -> int:
    """How many tokens a part of the transcript covers."""
    return request.prompt_tokens if part is Part.PROMPT else receipt.output_tokens


def leaf_fault(
    receipt: Receipt,
    request: Request,
    params: SamplingParams | None,
    profile: Profile | None,
    part: Part,
    leaf_index: int,
    leaf: bytes,
) -> Fault | None:
    """The first fault that one leaf shows; it stands at leaf_index < leaf_count of the part's tree."""
    tokens = tokens_of(receipt, request, part)
    if len(leaf) != leaf_size(part, leaf_index, tokens):
        return Fault.LEAF_SIZE
    if part is Part.FINGERPRINT:
        return _fingerprint_fault(leaf, profile)
    if profile is None:
        return None
    ids = [int.from_bytes(leaf[i : i + 4], "little") for i in range(0, len(leaf), 4)]
    if any(token_id >= profile.vocab_size for token_id in ids):
        return Fault.TOKEN_ID
    if part is Part.PROMPT or params is None:
        return None
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else profile.end_token_ids)}
    for position, token_id in enumerate(ids, start=leaf_index * IDS_PER_LEAF):
        last = position + 1 == tokens
        if token_id in ends and not last:
            return Fault.EARLY_END
        if last and token_id not in ends and receipt.finish_reason == FinishReason.STOP:
            return Fault.MISSING_END
    return None


def _fingerprint_fault(leaf: bytes, profile: Profile | None) -> Fault | None:
    """Each position states 8 distinct ids by value descending, then id ascending."""
    for start in range(0, len(leaf), POSITION_BYTES):
        ids: list[int] = []
        previous = (0, 0)
        for i in range(ENTRIES_PER_POSITION):
            entry = leaf[start + i * ENTRY_BYTES : start + (i + 1) * ENTRY_BYTES]
            token_id = int.from_bytes(entry[:4], "little")
            order = (-int.from_bytes(entry[4:], "little", signed=True), token_id)
            if profile is not None and token_id >= profile.vocab_size:
                return Fault.TOKEN_ID
            if i and (order <= previous or token_id in ids):
                return Fault.FINGERPRINT
            ids.append(token_id)
            previous = order
    return None


def transcript_faults(
    receipt: Receipt,
    request: Request,
    params: SamplingParams | None,
    profile: Profile | None,
    transcript: Transcript,
) -> list[TranscriptFault]:
    """All faults of a whole transcript, each with the leaf that proves it.

    The transcript is the one that receipt.transcript_root names. A wrong header or root hides what comes after it, as
    it does in the contract. Leaves past what request and receipt allow cannot be proven and are not looked at; a
    transcript that lacks leaves is withholding, which only an availability challenge shows.
    """
    fault = roots_fault(receipt, request, TranscriptRoots.of(transcript))
    if fault is not None:
        return [TranscriptFault(fault, NO_PART, 0)]
    found = []
    for part in Part:
        leaves = transcript.leaves(part)
        for index, leaf in enumerate(leaves[: leaf_count(part, tokens_of(receipt, request, part))]):
            fault = leaf_fault(receipt, request, params, profile, part, index, leaf)
            if fault is not None:
                found.append(TranscriptFault(fault, part, index))
    return found


def evidence_hash(a_hash: bytes, b_hash: bytes) -> Hash32:
    """How the contracts name a pair of receipts in a sentence: keccak of the two struct hashes in order."""
    return Hash32(keccak(a_hash + b_hash))


__all__ = [
    "NO_PART",
    "Fault",
    "Place",
    "TranscriptFault",
    "TranscriptRoots",
    "evidence_hash",
    "is_equivocation",
    "leaf_fault",
    "params_fault",
    "place_fault",
    "receipt_fault",
    "roots_fault",
    "sequence_fault",
    "tokens_of",
    "transcript_faults",
]
