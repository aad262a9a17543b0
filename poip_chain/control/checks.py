"""What a client can check of a node's answer on its own, rule by rule: the receipt against the request that was signed,
and the transcript against the receipt. Used by the client before it pays and by `poip verify` long after.

Pure functions over spec objects: no network, no storage, no chain. Whether the receipt's signer is the node, and
whether the receipt was committed, are the callers' questions. Nothing here proves that the model computed the tokens:
that is what audits are for. The seed check shows only that the answer agrees with the fingerprint that the node stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from poip_chain.errors import IntegrityError, InvalidInput
from poip_chain.spec.objects import FinishReason, Profile, Receipt, Request, SamplingParams
from poip_chain.spec.sampler import gumbel, position_key, uniform_bits
from poip_chain.spec.transcript import ENTRIES_PER_POSITION, MAX_STATEMENT_BYTES, Transcript, prompt_root
from poip_chain.spec.types import Hash32

Result = Literal["ok", "failed", "not checked"]

INT16_MAX = 2**15 - 1
INT16_MIN = -(2**15)
FINGERPRINT_STEP_Q16 = 65536 // 64
"""One unit of a fingerprint value (1/64 nat) in the sampler's units of 2**-16."""


@dataclass(frozen=True, slots=True)
class Check:
    """One named check and how it came out. `detail` says what was compared, or why it could not be."""

    name: str
    result: Result
    detail: str

    def to_json(self) -> dict[str, str]:
        """The three fields as JSON."""
        return {"name": self.name, "result": self.result, "detail": self.detail}


class BadAnswer(IntegrityError):
    """A node's answer breaks a rule. `name` is the check that failed."""

    code = "bad_answer"

    def __init__(self, name: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.name = name


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request as it goes to a node: the order, its parameters, the prompt's token ids and the client's signature.

    `prompt_ids` may be empty for a request that is settled and whose prompt was forgotten.
    """

    request: Request
    params: SamplingParams
    signature: bytes
    prompt_ids: tuple[int, ...]

    @property
    def request_hash(self) -> Hash32:
        """The EIP-712 hashStruct that names the request."""
        return self.request.struct_hash()

    def max_fee(self) -> int:
        """The most that the answer can cost, in wei."""
        return self.request.fee(self.request.max_tokens)

    def to_json(self) -> dict[str, Any]:
        """The body of POST /v1/requests, without a voucher."""
        return {
            "request": self.request.to_json(),
            "params": self.params.to_json(),
            "signature": "0x" + self.signature.hex(),
            "prompt_ids": list(self.prompt_ids),
        }


def require(checks: Iterator[Check]) -> None:
    """Raise BadAnswer at the first check that failed."""
    for check in checks:
        if check.result == "failed":
            raise BadAnswer(check.name, f"the node's answer fails the check '{check.name}': {check.detail}")


def judged(name: str, passed: bool, detail: str) -> Check:
    """A check that could be made."""
    return Check(name, "ok" if passed else "failed", detail)


def receipt_checks(request: Request, profile: Profile, receipt: Receipt) -> Iterator[Check]:
    """The receipt against the signed request: identity, counts, fee rule, times, totals (protocol sections 3 and 6)."""
    request_hash = request.struct_hash()
    yield judged(
        "request",
        receipt.request_hash == request_hash,
        f"the receipt names request 0x{receipt.request_hash.hex()}, the signed one is 0x{request_hash.hex()}",
    )
    yield judged(
        "node",
        int(request.node, 16) == 0 or request.node == receipt.node,
        f"the request is for {'any node' if int(request.node, 16) == 0 else request.node}, answered by {receipt.node}",
    )
    yield judged("payer", receipt.payer == request.client, f"payer {receipt.payer}, client {request.client}")
    yield judged("model", receipt.model_id == request.model_id, f"model 0x{receipt.model_id.hex()}")
    known = receipt.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED)
    yield judged("finish reason", known, f"finish_reason {receipt.finish_reason}")
    counts = (
        f"{request.prompt_tokens} prompt and {receipt.output_tokens} output tokens, max_tokens {request.max_tokens}, "
        f"context {profile.max_context}, finish_reason {receipt.finish_reason}"
    )
    yield judged(
        "counts",
        receipt.output_tokens <= request.max_tokens
        and request.prompt_tokens >= 1
        and request.prompt_tokens + receipt.output_tokens <= profile.max_context
        and (receipt.output_tokens > 0 or receipt.finish_reason == FinishReason.CANCELLED)
        and (receipt.finish_reason != FinishReason.LENGTH or receipt.output_tokens == request.max_tokens),
        counts,
    )
    fee = request.fee(receipt.output_tokens)
    yield judged("fee", receipt.fee == fee, f"the receipt takes {receipt.fee} wei, the fee rule gives {fee} wei")
    yield judged(
        "totals",
        receipt.fee <= receipt.payer_cum and receipt.fee <= receipt.node_cum,
        f"fee {receipt.fee}, payer_cum {receipt.payer_cum}, node_cum {receipt.node_cum}",
    )
    yield judged(
        "deadline",
        receipt.issued_at <= request.deadline,
        f"issued at {receipt.issued_at}, deadline {request.deadline}",
    )


def params_checks(request: Request, params: SamplingParams, profile: Profile) -> Iterator[Check]:
    """The parameters against the request's params_hash and the profile's range."""
    yield judged(
        "parameters", params.params_hash() == request.params_hash, f"params_hash 0x{request.params_hash.hex()}"
    )
    temperature = params.temperature_milli
    allowed = temperature == 0 or profile.min_temperature_milli <= temperature <= profile.max_temperature_milli
    served = allowed and params.top_p_milli == 1000 and params.top_k == 0
    in_vocabulary = all(token_id < profile.vocab_size for token_id in params.stop_token_ids)
    yield judged(
        "parameter range",
        served and in_vocabulary,
        f"temperature {temperature}/1000 (profile: 0 or {profile.min_temperature_milli} to "
        f"{profile.max_temperature_milli}), top_p {params.top_p_milli}/1000, top_k {params.top_k}",
    )


def transcript_checks(
    request: Request, params: SamplingParams, profile: Profile, receipt: Receipt, transcript: Transcript
) -> Iterator[Check]:
    """The transcript against request and receipt: header, roots, ids, early or missing end, fingerprint, seed."""
    yield judged(
        "transcript header",
        transcript.request_hash == receipt.request_hash
        and transcript.finish_reason == receipt.finish_reason
        and len(transcript.engine_statement.encode(errors="replace")) <= MAX_STATEMENT_BYTES,
        f"request 0x{transcript.request_hash.hex()}, finish_reason {transcript.finish_reason}",
    )
    root = prompt_root(transcript.prompt_ids)
    yield judged(
        "transcript prompt",
        root == request.prompt_root and len(transcript.prompt_ids) == request.prompt_tokens,
        f"{len(transcript.prompt_ids)} prompt ids with root 0x{root.hex()}",
    )
    yield judged(
        "transcript counts",
        len(transcript.output_ids) == receipt.output_tokens == len(transcript.fingerprints),
        f"{len(transcript.output_ids)} ids and {len(transcript.fingerprints)} fingerprints for "
        f"{receipt.output_tokens} output tokens",
    )
    ids = transcript.output_ids
    highest = max((*transcript.prompt_ids, *ids), default=0)
    yield judged("vocabulary", highest < profile.vocab_size, f"highest id {highest}, vocabulary {profile.vocab_size}")
    yield _end_check(params, profile, receipt.finish_reason, ids)
    yield _fingerprint_check(profile, transcript)
    try:
        stated = transcript.root()
    except InvalidInput as error:
        yield judged("transcript root", False, str(error))
        return
    yield judged(
        "transcript root",
        stated == receipt.transcript_root,
        f"the transcript hashes to 0x{stated.hex()}, the receipt says 0x{receipt.transcript_root.hex()}",
    )
    yield _seed_check(request, params, transcript)


def end_ids(params: SamplingParams, profile: Profile) -> set[int]:
    """The ids that end an answer: stop ids always, the profile's end ids unless `ignore_eos`."""
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(profile.end_token_ids))


def _end_check(params: SamplingParams, profile: Profile, finish_reason: int, ids: Sequence[int]) -> Check:
    ends = end_ids(params, profile)
    early = next((i for i, token_id in enumerate(ids[:-1]) if token_id in ends), None)
    if early is not None:
        return judged("end of answer", False, f"id {ids[early]} at position {early} ends an answer, but more follow")
    if finish_reason == FinishReason.STOP:
        last = ids[-1] if ids else None
        return judged("end of answer", last in ends, f"finish_reason stop with last id {last}")
    return judged("end of answer", True, "no end id before the last position")


def _fingerprint_check(profile: Profile, transcript: Transcript) -> Check:
    """Ids distinct, in the vocabulary, without the chosen one; ordered by value descending, then id ascending."""
    for position, (chosen, entries) in enumerate(zip(transcript.output_ids, transcript.fingerprints, strict=False)):
        ids = [token_id for token_id, _ in entries]
        order = [(-value, token_id) for token_id, value in entries]
        if (
            len(entries) != ENTRIES_PER_POSITION
            or len(set(ids)) != len(ids)
            or chosen in ids
            or order != sorted(order)
            or max(ids) >= profile.vocab_size
        ):
            return judged("fingerprint", False, f"the fingerprint of position {position} is not well formed")
    return judged("fingerprint", True, f"{len(transcript.fingerprints)} positions of {ENTRIES_PER_POSITION} entries")


def _seed_check(request: Request, params: SamplingParams, transcript: Transcript) -> Check:
    """By the node's own fingerprint, the seed must make the chosen token win at every position.

    The values are rounded to 1/64 nat, so one step of slack is given; saturated values say nothing and are passed over.
    """
    seed, temperature = request.seed(), params.temperature_milli
    for position, (chosen, entries) in enumerate(zip(transcript.output_ids, transcript.fingerprints, strict=False)):
        key = position_key(seed, position)
        base = temperature * gumbel(uniform_bits(key, chosen)) if temperature else 0
        for token_id, value in entries:
            if value in (INT16_MAX, INT16_MIN):
                continue
            noise = temperature * gumbel(uniform_bits(key, token_id)) if temperature else 0
            if 1000 * (value - 1) * FINGERPRINT_STEP_Q16 + noise > base:
                return judged(
                    "seed",
                    False,
                    f"at position {position} the seed prefers id {token_id} over the chosen {chosen} by the node's "
                    "own stated logits",
                )
    return judged("seed", True, f"seed 0x{seed.hex()} agrees with the stated logits at every position")
