"""`poip verify`: checks the proof that came with an answer against a chain, trusting neither gateway nor node.

Everything is recomputed from the proof and compared with what the chain says; the node is asked only for the leaves of
the batch that it committed, at the endpoint that the registry names, and they must hash to the committed root. What
cannot be checked is reported as such and never as good. Nothing here proves that the model was computed correctly: the
audits of the network do that, and a batch that became final has passed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from poip_chain.control.checks import (
    Check,
    judged,
    params_checks,
    receipt_checks,
    transcript_checks,
)
from poip_chain.control.view import BatchState, ChainView
from poip_chain.errors import InvalidInput, InvalidSignature, NotFound, PoipError
from poip_chain.proof.fetch import NodeReader
from poip_chain.service.engine.tokenizer import Tokenizer, conversation
from poip_chain.spec.eip712 import checked, parse_hex
from poip_chain.spec.objects import (
    Batch,
    Profile,
    Receipt,
    Request,
    SamplingParams,
    client_seed_from_integer,
    client_seed_from_nonces,
)
from poip_chain.spec.transcript import Transcript, prompt_root
from poip_chain.spec.types import Address

MAX_PROOF_BYTES = 16 * 2**20
FETCH_SECONDS = 20.0
REQUIRED = frozenset({"receipt", "signature", "request", "params", "request_signature", "chain_id", "log"})
OPTIONAL = frozenset({"transcript", "gateway_nonce", "user_nonce", "node_url"})


class BatchReader(Protocol):
    """Reads the leaves of a batch, checked against its root. NodeReader is one."""

    def receipts(self, batch: Batch) -> list[dict[str, Any]]:
        """`{"receipt", "signature"}` of every receipt in order."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A parsed proof. `transcript` is None in the short form that the response header carries."""

    receipt: Receipt
    signature: bytes
    request: Request
    params: SamplingParams
    request_signature: bytes
    chain_id: int
    log: Address
    transcript: Transcript | None
    gateway_nonce: bytes | None
    user_nonce: bytes | None

    @classmethod
    def from_json(cls, data: Any) -> Proof:
        """Parse the `poip.proof` field of an answer, or the content of its header. Raises InvalidInput."""
        if not isinstance(data, dict) or not REQUIRED <= set(data) <= REQUIRED | OPTIONAL:
            raise InvalidInput(
                f"a proof must be a JSON object with the fields {sorted(REQUIRED)}.",
                hint="Give the `poip.proof` field of an answer, or the whole answer.",
            )
        transcript = data.get("transcript")
        return cls(
            receipt=Receipt.from_json(data["receipt"]),
            signature=parse_hex(data["signature"], "signature", 65),
            request=Request.from_json(data["request"]),
            params=SamplingParams.from_json(data["params"]),
            request_signature=parse_hex(data["request_signature"], "request_signature", 65),
            chain_id=checked("uint64", data["chain_id"], "chain_id"),
            log=checked("address", data["log"], "log"),
            transcript=None if transcript is None else Transcript.from_json(transcript),
            gateway_nonce=_nonce(data, "gateway_nonce"),
            user_nonce=_nonce(data, "user_nonce"),
        )


@dataclass(frozen=True)
class Expected:
    """What the user knows himself, to hold the proof against. None: not given, so not checked.

    messages: the chat as it was sent; prompt: the text of a completion; answer: the text that was received; seed or
    user_nonce: as sent with the request.
    """

    messages: Sequence[Any] | None = None
    prompt: str | None = None
    answer: str | None = None
    seed: int | None = None
    user_nonce: bytes | None = None


@dataclass
class Report:
    """All checks in order, and where the receipt stands: "final", "pending", "convicted" or "not committed"."""

    checks: list[Check] = field(default_factory=list)
    status: str = "unknown"
    batch_id: int | None = None
    window_end: int | None = None

    @property
    def ok(self) -> bool:
        """No check failed. Look at `unchecked` for what could not be checked."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.result == "failed"]

    @property
    def unchecked(self) -> list[Check]:
        """The checks that could not be made."""
        return [check for check in self.checks if check.result == "not checked"]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "ok": self.ok,
            "status": self.status,
            "batch_id": self.batch_id,
            "window_end": self.window_end,
            "checks": [check.to_json() for check in self.checks],
        }


def verify_proof(
    proof: Any,
    chain: ChainView,
    messages: Sequence[Any] | None = None,
    tokenizer_dir: Path | None = None,
    *,
    expected: Expected | None = None,
    reader: Callable[[str], BatchReader] = lambda endpoint: NodeReader(endpoint, FETCH_SECONDS),
) -> Report:
    """Check a proof (JSON) against `chain`. `messages` is short for Expected(messages=...).

    `tokenizer_dir`: a directory with the model's tokenizer files, needed to check prompt and answer text; they are used
    only if they have the registered hashes. Raises Unavailable if the chain does not answer; everything that is wrong
    with the proof is a failed check of the report.
    """
    expected = expected or Expected(messages=messages)
    report = Report()
    try:
        parsed = Proof.from_json(proof)
    except InvalidInput as error:
        report.checks.append(Check("format", "failed", str(error)))
        return report
    report.checks.append(Check("format", "ok", "the proof is complete and well formed"))
    same_chain = judged("chain", parsed.chain_id == chain.chain_id, f"proof {parsed.chain_id}, chain {chain.chain_id}")
    ours = chain.log_domain.verifying_contract
    same_log = judged("commitment log", parsed.log == ours, f"proof {parsed.log}, deployment {ours}")
    report.checks += [same_chain, same_log]
    if report.failed:
        return report
    report.checks += _signature_checks(parsed, chain)
    profile = _profile(parsed, chain, report)
    if profile is not None:
        report.checks += receipt_checks(parsed.request, profile, parsed.receipt)
        report.checks += params_checks(parsed.request, parsed.params, profile)
        if parsed.transcript is None:
            report.checks.append(
                Check("transcript", "not checked", "the proof has none (the header's short form leaves it out)")
            )
        else:
            report.checks += transcript_checks(
                parsed.request, parsed.params, profile, parsed.receipt, parsed.transcript
            )
    report.checks.append(_client_seed_check(parsed, expected))
    report.checks += _text_checks(parsed, chain, expected, tokenizer_dir)
    _commitment_checks(parsed, chain, reader, report)
    return report


def _signature_checks(proof: Proof, chain: ChainView) -> Iterator[Check]:
    yield _signed_by("request signature", proof.request, proof.request_signature, proof.request.client, chain)
    node = proof.receipt.node
    try:
        registered = chain.node(node)
        key = chain.signing_key(node, proof.receipt.seq)
    except NotFound as error:
        yield Check("node registered", "failed", str(error))
        return
    state = "active" if registered.active else registered.inactive_reason
    yield Check("node registered", "ok", f"{node}, now {state}")
    yield _signed_by("receipt signature", proof.receipt, proof.signature, key, chain)


def _signed_by(name: str, signed: Request | Receipt, signature: bytes, key: Address, chain: ChainView) -> Check:
    try:
        signer = signed.recover(chain.log_domain, signature)
    except InvalidSignature as error:
        return Check(name, "failed", str(error))
    return judged(name, signer == key, f"signed by {signer}, must be {key}")


def _profile(proof: Proof, chain: ChainView, report: Report) -> Profile | None:
    request = proof.request
    try:
        chain.model_spec(request.model_id)
        profile = chain.profile(request.model_id, request.profile_version)
    except NotFound as error:
        report.checks.append(Check("model registered", "failed", str(error)))
        return None
    detail = f"model 0x{request.model_id.hex()}, profile {request.profile_version}"
    report.checks.append(Check("model registered", "ok", detail))
    return profile


def _client_seed_check(proof: Proof, expected: Expected) -> Check:
    """Whether the seed is bound to what the user chose, so that nobody picked it to get a certain answer."""
    name, seed = "client seed", proof.request.client_seed
    if expected.seed is not None:
        return judged(name, seed == client_seed_from_integer(expected.seed), f"must come from seed {expected.seed}")
    if expected.user_nonce is None and proof.user_nonce is None:
        return Check(name, "not checked", "the request had neither seed nor user nonce: the gateway chose it")
    if expected.user_nonce is not None and proof.user_nonce != expected.user_nonce:
        return Check(name, "failed", "the proof does not carry your user nonce")
    if proof.user_nonce is None or proof.gateway_nonce is None:
        return Check(name, "failed", "the proof lacks one of the two nonces")
    derived = client_seed_from_nonces(proof.user_nonce, proof.gateway_nonce)
    detail = "keccak(user nonce || gateway nonce)"
    if expected.user_nonce is None:
        detail += "; compare the user nonce with yours: it is the gateway's word here"
    return judged(name, seed == derived, detail)


def _text_checks(proof: Proof, chain: ChainView, expected: Expected, tokenizer_dir: Path | None) -> Iterator[Check]:
    """The user's own prompt and the text that he received, against the ids that were signed."""
    asked = expected.messages is not None or expected.prompt is not None
    if not asked:
        yield Check("prompt", "not checked", "give your messages (--messages) to check that the node got your question")
    if expected.answer is None:
        yield Check("answer text", "not checked", "give the text that you received to check it")
    if not asked and expected.answer is None:
        return
    if tokenizer_dir is None:
        yield Check(
            "tokenizer",
            "not checked",
            "question and answer are compared only with --model",
        )
        return
    try:
        tokenizer = Tokenizer.load(tokenizer_dir, chain.model_spec(proof.request.model_id))
    except PoipError as error:
        yield Check("tokenizer", "failed", str(error))
        return
    yield Check("tokenizer", "ok", f"the files in {tokenizer_dir} have the registered hashes")
    if asked:
        try:
            if expected.messages is not None:
                ids = tokenizer.encode_chat(conversation(list(expected.messages)))
            else:
                ids = tokenizer.encode_text(expected.prompt or "")
        except InvalidInput as error:
            yield Check("prompt", "failed", str(error))
        else:
            root = prompt_root(ids)
            same = root == proof.request.prompt_root and len(ids) == proof.request.prompt_tokens
            yield judged("prompt", same, f"your prompt has {len(ids)} tokens and root 0x{root.hex()}")
    if expected.answer is not None:
        yield _answer_check(proof, tokenizer, expected.answer)


def _answer_check(proof: Proof, tokenizer: Tokenizer, answer: str) -> Check:
    if proof.transcript is None:
        return Check("answer text", "not checked", "the proof has no transcript")
    ids = list(proof.transcript.output_ids)
    if ids and ids[-1] in proof.params.stop_token_ids:
        ids.pop()  # a stop id ends the answer and is no part of its text
    text = tokenizer.decode(ids)
    if text == answer:
        return Check("answer text", "ok", f"{len(answer)} characters are what the signed token ids say")
    if text.startswith(answer):
        return Check("answer text", "ok", f"{len(answer)} characters, cut from {len(text)} (a stop string does that)")
    return Check("answer text", "failed", "the text is not what the signed token ids say")


def _commitment_checks(proof: Proof, chain: ChainView, reader: Callable[[str], BatchReader], report: Report) -> None:
    """Whether the receipt is in a committed batch, and how that batch stands."""
    receipt = proof.receipt
    found = chain.find_batch(receipt.node, receipt.seq)
    if found is None:
        report.status = "not committed"
        detail = f"no batch of {receipt.node} covers receipt {receipt.seq} yet; try again later, or demand it"
        report.checks.append(Check("committed", "not checked", detail))
        return
    batch, state = found
    report.batch_id, report.window_end, report.status = batch.id, batch.window_end, str(state)
    report.checks.append(_inclusion_check(batch, receipt, chain, reader))
    same = (batch.model_id, batch.profile_version) == (receipt.model_id, proof.request.profile_version)
    report.checks.append(judged("batch model", same, f"batch {batch.id} is of profile {batch.profile_version}"))
    if state is BatchState.CONVICTED:
        detail = f"batch {batch.id} was convicted: the node cheated in it, its fees go back to the payers"
        report.checks.append(Check("finality", "failed", detail))
    elif state is BatchState.FINAL:
        report.checks.append(Check("finality", "ok", f"batch {batch.id} is final"))
    else:
        detail = (
            f"batch {batch.id} is pending: its window ends at {batch.window_end} (Unix time), later if it is disputed"
        )
        report.checks.append(Check("finality", "not checked", detail))


def _inclusion_check(batch: Batch, receipt: Receipt, chain: ChainView, reader: Callable[[str], BatchReader]) -> Check:
    name, index = "committed", receipt.seq - batch.first_seq
    try:
        leaves = reader(chain.node(receipt.node).endpoint).receipts(batch)
        leaf: Receipt = Receipt.from_json(leaves[index]["receipt"])
    except (PoipError, LookupError, TypeError) as error:
        return Check(
            name, "not checked", f"batch {batch.id} covers the receipt, but its leaves cannot be read: {error}"
        )
    if leaf.struct_hash() != receipt.struct_hash():
        return Check(name, "failed", f"leaf {index} of batch {batch.id} is another receipt: this one is not committed")
    return Check(name, "ok", f"leaf {index} of batch {batch.id}, root 0x{batch.root.hex()}")


def _nonce(data: dict[str, Any], name: str) -> bytes | None:
    value = data.get(name)
    return None if value is None else parse_hex(value, name, 32)
