"""Whether a request is served: parsing, the checks that need nothing but the request, and the client's credit.

Pure functions over parsed values; no clock, no database and no chain are asked here. Each refusal has a status and a
code (docs/architecture.md, "Node HTTP API").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from poip_chain.errors import InvalidInput, InvalidSignature
from poip_chain.service.node.ports import Backing
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import Uncommitted
from poip_chain.spec.eip712 import Domain, parse_hex
from poip_chain.spec.objects import Profile, Request, SamplingParams, Voucher
from poip_chain.spec.transcript import checked_ids, prompt_root
from poip_chain.spec.types import ZERO_ADDRESS, Address, Hash32

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_TOTAL = 2**168
"""The log keeps a node's running total below this; no honest sum of fees comes near it."""
STAKE_RETRY_AFTER = 30
"""Seconds after which a client may ask a node again whose stake is taken; batches become final by and by."""
MIN_TIME_LEFT = 2
"""Seconds before its deadline at which a request is no longer begun: a receipt must not be dated after the deadline."""


@dataclass(frozen=True, slots=True)
class Served:
    """What this node serves, and under which name. Prices in wei per token."""

    node: Address
    model_id: bytes
    profile_version: int
    profile: Profile
    input_price: int
    output_price: int
    log_domain: Domain
    vault_domain: Domain

    def full_context_fee(self) -> int:
        """The most that one request can cost, wei."""
        return self.profile.max_context * max(self.input_price, self.output_price)


@dataclass(frozen=True, slots=True)
class SignedVoucher:
    """A voucher as it came in."""

    voucher: Voucher
    signature: bytes


@dataclass(frozen=True, slots=True)
class Submission:
    """A parsed POST /v1/requests. `request_hash` is the request's struct hash."""

    request: Request
    signature: bytes
    params: SamplingParams
    prompt_ids: tuple[int, ...]
    voucher: SignedVoucher | None
    request_hash: Hash32

    @property
    def max_fee(self) -> int:
        """What the request costs at most, wei."""
        return self.request.fee(self.request.max_tokens)


@dataclass(frozen=True, slots=True)
class Credit:
    """Limits on what a payer may owe; wei."""

    known: int
    new: int
    prepaid: int


@dataclass(frozen=True, slots=True)
class Account:
    """How a payer stands: its running total, the most its vouchers promise, what its running requests may still cost,
    and its escrow; wei."""

    payer_cum: int
    paid: int
    running: int
    available: int
    settled: int


def parse_voucher(data: Any, *, name: str = "voucher", flat: bool) -> SignedVoucher:
    """`{"voucher": {...}, "signature"}` or, if `flat`, its fields with `signature` among them. Raises InvalidInput."""
    if not isinstance(data, dict):
        raise InvalidInput(f"{name} must be a JSON object.")
    if flat:
        fields = {key: value for key, value in data.items() if key != "signature"}
    else:
        if set(data) != {"voucher", "signature"}:
            raise InvalidInput("the body must hold exactly 'voucher' and 'signature'.")
        fields = data["voucher"]
    return SignedVoucher(Voucher.from_json(fields), parse_hex(data.get("signature"), "signature", 65))


def parse_submission(data: Any) -> Submission:
    """A POST /v1/requests body, checked in form only. Raises InvalidInput."""
    required, optional = {"request", "params", "signature", "prompt_ids"}, {"voucher"}
    if not isinstance(data, dict) or not required <= set(data) <= required | optional:
        raise InvalidInput(f"the body must be a JSON object with {sorted(required)} and, if wanted, 'voucher'.")
    request: Request = Request.from_json(data["request"])
    ids = data["prompt_ids"]
    if isinstance(ids, list) and len(ids) != request.prompt_tokens:
        # Compared before anything is hashed: the signed count bounds the work.
        raise InvalidInput(f"prompt_ids holds {len(ids)} ids; the request's prompt_tokens is {request.prompt_tokens}.")
    voucher = data.get("voucher")
    return Submission(
        request=request,
        signature=parse_hex(data["signature"], "signature", 65),
        params=SamplingParams.from_json(data["params"]),
        prompt_ids=checked_ids(ids, "prompt_ids"),
        voucher=None if voucher is None else parse_voucher(voucher, flat=True),
        request_hash=request.struct_hash(),
    )


def check_submission(submission: Submission, served: Served) -> None:
    """All checks that depend on neither clock nor state. Raises RequestRefused or InvalidSignature."""
    request, profile = submission.request, served.profile
    if request.node not in (served.node, ZERO_ADDRESS):
        _bad("wrong_node", f"the request is for node {request.node}; this is {served.node}.", "node")
    if request.model_id != served.model_id:
        raise RequestRefused(
            404, "model_not_found", f"this node serves model 0x{served.model_id.hex()}, no other.",
            param="model_id",
        )  # fmt: skip
    if request.profile_version != served.profile_version:
        raise RequestRefused(
            404, "model_not_found",
            f"this node serves profile version {served.profile_version} of the model, not {request.profile_version}.",
            param="profile_version",
        )  # fmt: skip
    if request.prompt_tokens < 1 or request.max_tokens < 1:
        _bad("invalid_request", "prompt_tokens and max_tokens must be at least 1.", "max_tokens")
    total = request.prompt_tokens + request.max_tokens
    if total > profile.max_context:
        _bad(
            "context_length_exceeded",
            f"prompt and answer of {request.prompt_tokens} + {request.max_tokens} = {total} tokens exceed the context "
            f"of {profile.max_context}.",
            "max_tokens",
        )
    if (signer := request.recover(served.log_domain, submission.signature)) != request.client:
        raise InvalidSignature(
            f"the request is signed by {signer} for this chain and commitment log, not by its client {request.client}.",
            hint=f"Sign with chain id {served.log_domain.chain_id} and verifyingContract "
            f"{served.log_domain.verifying_contract}.",
        )
    _check_params(submission, profile)
    if max(submission.prompt_ids) >= profile.vocab_size:
        _bad(
            "vocabulary",
            f"prompt id {max(submission.prompt_ids)} is outside the vocabulary of {profile.vocab_size}.",
            "prompt_ids",
        )
    if prompt_root(submission.prompt_ids) != request.prompt_root:
        _bad("prompt_mismatch", "prompt_ids do not hash to the request's prompt_root.", "prompt_ids")
    if request.input_price < served.input_price or request.output_price < served.output_price:
        raise RequestRefused(
            402, "price_too_low",
            f"this node asks {served.input_price} wei per prompt token and {served.output_price} per answer token; the "
            f"request offers {request.input_price} and {request.output_price}.",
            param="input_price",
        )  # fmt: skip


def _check_params(submission: Submission, profile: Profile) -> None:
    params = submission.params
    if params.params_hash() != submission.request.params_hash:
        _bad("params_mismatch", "params do not hash to the request's params_hash.", "params")
    low, high = profile.min_temperature_milli, profile.max_temperature_milli
    if params.temperature_milli != 0 and not low <= params.temperature_milli <= high:
        _bad(
            "unsupported_parameter",
            f"temperature_milli must be 0 (greedy) or {low} to {high}, not {params.temperature_milli}.",
            "temperature",
        )
    if params.top_p_milli != 1000:
        _bad("unsupported_parameter", "top_p is not supported: leave it at 1 (top_p_milli = 1000).", "top_p")
    if params.top_k != 0:
        _bad("unsupported_parameter", "top_k is not supported: leave it at 0.", "top_k")
    if any(token_id >= profile.vocab_size for token_id in params.stop_token_ids):
        _bad("vocabulary", f"a stop token id is outside the vocabulary of {profile.vocab_size}.", "stop_token_ids")


def check_deadline(request: Request, now: int) -> None:
    """Refuse a request that would be dated too late. `now` in Unix seconds."""
    if now + MIN_TIME_LEFT > request.deadline:
        raise RequestRefused(
            408, "deadline_passed", f"the request's deadline {request.deadline} has passed or is too near (now {now}).",
            hint="Sign a new request with a later deadline.", param="deadline",
        )  # fmt: skip


def check_credit(submission: Submission, account: Account, credit: Credit) -> None:
    """Whether escrow and vouchers cover the request. Raises RequestRefused (402).

    Escrow must cover all that is not settled plus the most that this and the running requests may cost. A payer with
    history (it has paid for something delivered) may owe up to `credit.known` for finished answers and running requests;
    any other may owe `credit.new` in all, this request included. A prepaid voucher counts in both cases.
    """
    needed = account.payer_cum - account.settled + account.running + submission.max_fee
    if account.payer_cum + account.running + submission.max_fee >= MAX_TOTAL or needed > account.available:
        raise RequestRefused(
            402, "insufficient_escrow",
            f"the request may cost {submission.max_fee} wei and {needed - submission.max_fee} are spoken for, but the "
            f"client's escrow with this node has {account.available}.",
            hint="Deposit more with `poip funds deposit`, or ask for fewer tokens.",
            details={"needed": str(needed), "available": str(account.available)},
        )  # fmt: skip
    known = min(account.paid, account.payer_cum) > 0
    owed = account.payer_cum - account.paid + account.running + (0 if known else submission.max_fee)
    if owed > (credit.known if known else credit.new):
        raise RequestRefused(
            402, "voucher_due",
            f"the client owes vouchers for {owed} wei, more than this node allows.",
            hint="Send a voucher for what was delivered, or a prepaid one with the request.",
            details={
                "owed": str(owed),
                "payer_cum": str(account.payer_cum),
                "prepaid_voucher": str(account.payer_cum + account.running + submission.max_fee),
            },
        )  # fmt: skip


def check_backing(
    submission: Submission,
    served: Served,
    backing: Backing,
    uncommitted: Uncommitted,
    *,
    running: int,
    running_fees: int,
    batch_count: int,
) -> None:
    """Whether the node's stake carries the request. Raises RequestRefused (402 for its prices, 503 for the stake).

    A receipt that cannot be committed costs a node a share of its stake, and what a batch locks grows with its fees: a
    client could ruin an honest node by paying too much. So nobody may pay more than the registry's offer, and the stake
    must carry all that is signed, running (`running` requests of `running_fees` wei at most) and asked for here. A
    batch takes up to `batch_count` receipts; each running request may end in a batch of its own.
    """
    request = submission.request
    offers = [
        (offer.input_price, offer.output_price)
        for offer in backing.offers
        if (bytes(offer.model_id), offer.profile_version) == (served.model_id, served.profile_version)
    ]
    # Clients sign the registry's prices; the settings may ask less, and the offer may have been raised meanwhile.
    highest_input = max([served.input_price, *(price for price, _ in offers)])
    highest_output = max([served.output_price, *(price for _, price in offers)])
    if request.input_price > highest_input or request.output_price > highest_output:
        raise RequestRefused(
            402, "price_too_high",
            f"this node takes at most {highest_input} wei per prompt token and {highest_output} per answer token; the "
            f"request offers {request.input_price} and {request.output_price}.",
            hint="Sign the prices of the node's offer: higher fees would lock more of its stake.",
            param="input_price" if request.input_price > highest_input else "output_price",
        )  # fmt: skip
    terms = backing.terms
    locks = sum(terms.lock(fee) for fee in uncommitted.batch_fees)
    batches = -(-uncommitted.loose_count // batch_count) + running + 1
    locks += terms.most(uncommitted.loose_fees + running_fees + submission.max_fee, batches)
    if locks > backing.free_stake:
        raise RequestRefused(
            503, "stake_busy",
            f"what this node has signed and runs may lock {locks} wei of stake with this request, but only "
            f"{backing.free_stake} are free.",
            hint="Ask for fewer tokens or another node; stake becomes free as batches become final.",
            retry_after=STAKE_RETRY_AFTER,
        )  # fmt: skip


def _bad(code: str, message: str, param: str) -> NoReturn:
    raise RequestRefused(400, code, message, param=param)
