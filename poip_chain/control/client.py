"""`NodeClient`: what anyone does who asks an inference node directly - sign, send, stream, check, pay, recover.

It trusts a node for nothing: every event is validated and bounded, the receipt and the transcript are checked against
what was signed (checks.py), and only then does the ledger sign a voucher. What a broken stream leaves open is settled
later by `step`. Text, tokenizers and the choice of a node belong to others.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from eth_keys.datatypes import PrivateKey

from poip_chain.control.checks import (
    BadAnswer,
    SignedRequest,
    params_checks,
    receipt_checks,
    require,
    transcript_checks,
)
from poip_chain.control.faults import crash_point
from poip_chain.control.ledger import Attempt, Ledger, SignedVoucher
from poip_chain.control.wire import MAX_EVENT_BYTES, MAX_MESSAGE, ServerEvent, error_body, server_events
from poip_chain.errors import InvalidInput, InvalidSignature, PoipError, Refused, Unavailable
from poip_chain.spec.eip712 import Domain, TypedStruct, parse_hex
from poip_chain.spec.objects import Profile, Receipt, Request, SamplingParams
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address

VOID_SLACK_SECONDS = 60
"""A request without a receipt is given up this long after its deadline."""
MAX_ERROR_BYTES = 64 * 2**10
REFUSALS = frozenset({400, 401, 402, 403, 404, 408, 409, 410, 413, 422, 429, 503})
"""Statuses by which a node says that it does not take a request. Any other failure may hide a request that runs."""


class Signer(Protocol):
    """Holds a key and signs protocol objects."""

    @property
    def address(self) -> Address:
        """The key's address."""

    def sign(self, struct: TypedStruct, domain: Domain) -> bytes:
        """A 65-byte EIP-712 signature."""


class KeySigner:
    """A Signer with the private key in memory."""

    def __init__(self, private_key: PrivateKey) -> None:
        self._key = private_key
        self._address = Address(private_key.public_key.to_checksum_address())

    @property
    def address(self) -> Address:
        """See Signer."""
        return self._address

    def sign(self, struct: TypedStruct, domain: Domain) -> bytes:
        """See Signer."""
        return struct.sign(domain, self._key)


@dataclass(frozen=True, slots=True)
class Escrow:
    """The vault's figures for (payer, node), in wei: usable escrow, and what was ever collected."""

    available: int
    settled: int


class ClientChain(Protocol):
    """What a client asks a chain. All calls block and raise Unavailable if the chain does not answer."""

    @property
    def log_domain(self) -> Domain:
        """Domain of requests and receipts."""

    @property
    def vault_domain(self) -> Domain:
        """Domain of vouchers."""

    def signing_key(self, node: Address, seq: int) -> Address:
        """The key whose signature on receipt `seq` of `node` is valid."""

    def escrow(self, payer: Address, node: Address) -> Escrow:
        """Escrow of `payer` with `node`."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. first_token: until the first token; between_tokens: silence in a stream; call: one short call."""

    connect: float = 5.0
    first_token: float = 60.0
    between_tokens: float = 30.0
    call: float = 10.0


@dataclass(frozen=True, slots=True)
class Token:
    """One output token, as the node streamed it."""

    index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer that passed every check. `state` is "checked", or "unpaid" for one that came too late."""

    signed: SignedRequest
    receipt: Receipt
    signature: bytes
    transcript: Transcript
    node_url: str
    state: str = "checked"

    def evidence(self, log_domain: Domain) -> dict[str, Any]:
        """The short proof: everything but the transcript (docs/architecture.md, "Proof that rides with an answer")."""
        return {
            "receipt": self.receipt.to_json(),
            "signature": "0x" + self.signature.hex(),
            "request": self.signed.request.to_json(),
            "params": self.signed.params.to_json(),
            "request_signature": "0x" + self.signed.signature.hex(),
            "chain_id": log_domain.chain_id,
            "log": log_domain.verifying_contract,
            "node_url": self.node_url,
        }

    def proof(
        self, log_domain: Domain, *, gateway_nonce: bytes | None = None, user_nonce: bytes | None = None
    ) -> dict[str, Any]:
        """The whole proof, which `poip verify` checks."""
        return {
            **self.evidence(log_domain),
            "transcript": self.transcript.to_json(),
            "gateway_nonce": None if gateway_nonce is None else "0x" + gateway_nonce.hex(),
            "user_nonce": None if user_nonce is None else "0x" + user_nonce.hex(),
        }


class NodeRefused(Refused):
    """A node said, before the first byte, that it does not take the request. `reason` is the node's error code."""

    def __init__(self, node: Address, status: int, reason: str, message: str) -> None:
        super().__init__(f"node {node} does not take the request ({reason}): {message}")
        self.node_status = status
        self.reason = reason


class StreamBroken(Unavailable):
    """The node went silent, disconnected or sent garbage. `tokens` is how many tokens had come."""

    code = "node_stopped"

    def __init__(self, node: Address, what: str, tokens: int) -> None:
        super().__init__(f"node {node} {what}, after {tokens} tokens.", hint="Another node may be asked.")
        self.tokens = tokens


@dataclass
class NodeClient:
    """See the module's docstring. One instance per key; safe for many concurrent requests in one event loop."""

    http: httpx.AsyncClient
    signer: Signer
    chain: ClientChain
    ledger: Ledger
    timeouts: Timeouts = field(default_factory=Timeouts)
    allow_prepaid: bool = True
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._active: set[tuple[bytes, Address]] = set()
        self._deliveries: defaultdict[Address, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    def sign(self, request: Request, params: SamplingParams, prompt_ids: tuple[int, ...]) -> SignedRequest:
        """Sign a request with this client's key."""
        return SignedRequest(request, params, self.signer.sign(request, self.chain.log_domain), prompt_ids)

    async def stream(
        self, node: Address, url: str, signed: SignedRequest, profile: Profile
    ) -> AsyncGenerator[Token | Answer, None]:
        """Send a request and yield its tokens, then one Answer. Close the generator to cancel, then call `recover`.

        Raises InsufficientFunds or Refused before anything is sent; NodeRefused (nothing is owed); StreamBroken (what
        may be owed stays open in the ledger); BadAnswer (the node broke a rule: it is blocked and gets no voucher).
        """
        escrow = await asyncio.to_thread(self.chain.escrow, self.signer.address, node)
        attempt = (signed.request_hash, node)
        self._active.add(attempt)
        try:
            await asyncio.to_thread(
                self.ledger.open,
                signed,
                node,
                url,
                available=escrow.available,
                settled=escrow.settled,
                now=int(self.clock()),
            )
            crash_point("gateway_opened")
            voucher: SignedVoucher | None = None
            while True:
                try:
                    async for item in self._post(node, url, signed, profile, voucher):
                        yield item
                    return
                except NodeRefused as error:
                    if voucher is None and self.allow_prepaid and _wants_payment(error):
                        await self.deliver_vouchers(node)
                        voucher = await asyncio.to_thread(self.ledger.prepay, *attempt)
                        continue
                    await asyncio.to_thread(self.ledger.refused, *attempt, str(error))
                    raise
        finally:
            self._active.discard(attempt)

    async def abandon(self, signed: SignedRequest, node: Address, reason: str) -> str:
        """Give an attempt up before asking another node: a receipt that `node` still makes is kept and not paid.

        Returns the attempt's state: "checked" if its receipt came first and is paid (see Ledger.abandon).
        """
        return await asyncio.to_thread(self.ledger.abandon, signed.request_hash, node, reason)

    # --- one exchange ------------------------------------------------------------------------------------------

    async def _post(
        self, node: Address, url: str, signed: SignedRequest, profile: Profile, voucher: SignedVoucher | None
    ) -> AsyncIterator[Token | Answer]:
        body = {**signed.to_json(), "voucher": _voucher_body(voucher)}
        received: list[int] = []
        limits = self.timeouts
        timeout = httpx.Timeout(limits.first_token, connect=limits.connect)
        loop = asyncio.get_running_loop()
        # Heartbeats do not move the clock: a node that only says that it is alive is not answering.
        silent_until = loop.time() + limits.first_token
        try:
            async with self.http.stream("POST", f"{url}/v1/requests", json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    raise await _refusal(node, response)
                if voucher is not None:
                    await asyncio.to_thread(self.ledger.delivered, voucher.id)
                events = server_events(response.aiter_bytes())
                while True:
                    async with asyncio.timeout_at(silent_until):
                        event = await anext(events, None)
                    if event is None:
                        raise StreamBroken(node, "ended the stream without a receipt", len(received))
                    if event.name == "token":
                        token = _token(event, len(received), signed, profile)
                        received.append(token.token_id)
                        crash_point("gateway_first_token")
                        silent_until = loop.time() + limits.between_tokens
                        yield token
                    elif event.name == "receipt":
                        answer = await self._settle(node, url, signed, profile, event.json(), received)
                        for index in range(len(received), len(answer.transcript.output_ids)):
                            yield Token(index, answer.transcript.output_ids[index])
                        yield answer
                        return
                    elif event.name == "error":
                        code, message = error_body(event.data.encode())
                        raise StreamBroken(node, f"reported a failure ({code}: {message})", len(received))
                    elif event.name:
                        raise InvalidInput(f"unknown event {event.name[:40]!r}")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NodeRefused(node, 0, "unreachable", f"{url} accepts no connection ({_text(error)}).") from error
        except TimeoutError as error:
            raise StreamBroken(node, "was silent for too long", len(received)) from error
        except InvalidInput as error:
            raise StreamBroken(node, f"sent a malformed event ({_text(error)})", len(received)) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise StreamBroken(node, f"broke the connection ({_text(error)})", len(received)) from error

    async def _settle(
        self,
        node: Address,
        url: str,
        signed: SignedRequest,
        profile: Profile,
        payload: dict[str, Any],
        received: list[int],
    ) -> Answer:
        """Check a receipt event and account for it. Raises BadAnswer, after blocking the node."""
        receipt: Receipt | None = None
        signature = b""
        try:
            if set(payload) != {"receipt", "signature", "transcript"}:
                raise BadAnswer("receipt event", f"its fields are {sorted(payload)[:8]}.")
            receipt, signature = await self._receipt(node, payload)
            transcript = Transcript.from_json(payload["transcript"])
            answer = Answer(signed, receipt, signature, transcript, url)
            await asyncio.to_thread(_check_answer, answer, profile, tuple(received))
            crash_point("gateway_receipt_checked")
            state, vouchers = await asyncio.to_thread(self.ledger.accept, receipt, signature)
            crash_point("gateway_accepted")
        except (BadAnswer, InvalidInput) as error:
            reason = str(error)
            await asyncio.to_thread(
                self.ledger.reject, signed.request_hash, node, reason, receipt if signature else None, signature
            )
            if isinstance(error, BadAnswer):
                raise
            raise BadAnswer("format", f"node {node} sent a malformed receipt: {reason}") from error
        if vouchers:
            self._spawn(self.deliver_vouchers(node))
        return Answer(signed, receipt, signature, transcript, url, state)

    async def _receipt(self, node: Address, payload: dict[str, Any]) -> tuple[Receipt, bytes]:
        """Receipt and signature from a node's JSON, by the key that is valid for its seq. Raises InvalidInput."""
        receipt: Receipt = Receipt.from_json(payload.get("receipt"))
        signature = parse_hex(payload.get("signature"), "signature", 65)
        if receipt.node != node:
            raise BadAnswer("node", f"the receipt is by {receipt.node}, the request went to {node}.")
        signer = receipt.recover(self.chain.log_domain, signature)
        expected = await asyncio.to_thread(self.chain.signing_key, node, receipt.seq)
        if signer != expected:
            raise InvalidSignature(f"the receipt is signed by {signer}; the key of {node} for it is {expected}.")
        return receipt, signature

    # --- after a break -----------------------------------------------------------------------------------------

    async def recover(
        self, attempt: Attempt, profile: Profile, *, url: str | None = None, wait: float = 0.0
    ) -> Answer | None:
        """Ask a node what became of an attempt, for at most `wait` seconds while it still runs, and settle it.

        None if there is nothing to settle yet, or nothing to pay. Raises Unavailable if the node does not answer,
        BadAnswer if what it holds breaks a rule.
        """
        where, loop = url or attempt.url, asyncio.get_running_loop()
        until = loop.time() + wait
        while True:
            status, payload = await self._get(f"{where}/v1/requests/0x{attempt.request_hash.hex()}")
            if status != 409 or loop.time() >= until:
                break
            await asyncio.sleep(min(0.1, max(0.0, until - loop.time())))
        late = self.clock() > attempt.deadline + VOID_SLACK_SECONDS
        if status == 404 and (late or attempt.state == "abandoned"):
            # What was given up is not paid in any case, so nothing is gained by waiting for its deadline.
            why = "no receipt by the deadline" if late else "given up, and the node knows nothing of it"
            await asyncio.to_thread(self.ledger.void, attempt.request_hash, attempt.node, why)
        if status != 200:
            return None
        signed = await asyncio.to_thread(self.ledger.body, attempt.request_hash)
        if signed is None:
            raise Refused(f"this key never signed request 0x{attempt.request_hash.hex()}.")
        if attempt.state == "abandoned" or not signed.prompt_ids:
            await self._keep_unpaid(attempt, signed, profile, payload)
            return None
        # The same signed request again brings the stored receipt, with the transcript that lets us check it.
        try:
            async for item in self._post(attempt.node, where, signed, profile, None):
                if isinstance(item, Answer):
                    return item
        except NodeRefused as error:
            if late:
                await self.abandon(signed, attempt.node, f"no transcript by the deadline: {error}")
        return None

    async def _keep_unpaid(
        self, attempt: Attempt, signed: SignedRequest, profile: Profile, payload: dict[str, Any]
    ) -> None:
        receipt: Receipt | None = None
        signature = b""
        try:
            receipt, signature = await self._receipt(attempt.node, payload)
            require(receipt_checks(signed.request, profile, receipt))
            await asyncio.to_thread(self.ledger.accept, receipt, signature)
        except (BadAnswer, InvalidInput) as error:
            await asyncio.to_thread(
                self.ledger.reject, attempt.request_hash, attempt.node, str(error), receipt, signature
            )
            raise

    async def step(
        self, profile_of: Callable[[bytes, int], Profile], url_of: Callable[[Address], str | None] | None = None
    ) -> list[str]:
        """One round of settling what earlier streams left open, and of handing over vouchers. Idempotent.

        `profile_of(model_id, version)` blocks; `url_of` gives a node's present URL. Returns what did not work, to log.
        """
        troubles = []
        for attempt in await asyncio.to_thread(self.ledger.attempts, "open", "abandoned"):
            if (attempt.request_hash, attempt.node) in self._active:
                continue
            try:
                signed = await asyncio.to_thread(self.ledger.body, attempt.request_hash)
                if signed is None:
                    continue
                request = signed.request
                profile = await asyncio.to_thread(profile_of, request.model_id, request.profile_version)
                await self.recover(attempt, profile, url=url_of(attempt.node) if url_of else None)
            except PoipError as error:
                troubles.append(str(error))
        await self.deliver_vouchers(url_of=url_of)
        return troubles

    async def deliver_vouchers(
        self, node: Address | None = None, *, url_of: Callable[[Address], str | None] | None = None
    ) -> int:
        """Hand over vouchers that no node has acknowledged yet, in order per node. Returns how many were taken."""
        waiting = await asyncio.to_thread(self.ledger.undelivered, node)
        taken = 0
        for address in dict.fromkeys(voucher.node for voucher in waiting):
            url = url_of(address) if url_of else None
            # One delivery at a time per node, so that the node sees them once each and in order.
            async with self._deliveries[address]:
                for voucher in await asyncio.to_thread(self.ledger.undelivered, address):
                    if not await self._deliver(voucher, url or voucher.url):
                        break
                    taken += 1
        return taken

    async def _deliver(self, voucher: SignedVoucher, url: str) -> bool:
        """Whether the node took the voucher, or refused it for good."""
        try:
            status, payload = await self._call("POST", f"{url}/v1/vouchers", voucher.to_json())
        except Unavailable:
            return False
        if status in (200, 204):
            crash_point("gateway_voucher_taken")
            await asyncio.to_thread(self.ledger.delivered, voucher.id)
            return True
        if 400 <= status < 500 and status not in (408, 429):
            note = f"refused with {status}: {str(payload)[:MAX_MESSAGE]}"
            await asyncio.to_thread(self.ledger.delivered, voucher.id, note)
            return True
        return False

    async def aclose(self) -> None:
        """Wait for vouchers on their way. The ledger and the HTTP client are the caller's to close."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _get(self, url: str) -> tuple[int, dict[str, Any]]:
        return await self._call("GET", url, None)

    async def _call(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        return await call_json(self.http, method, url, body, self.timeouts.call)


async def call_json(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    body: dict[str, Any] | None,
    timeout: float,
    limit: int = MAX_EVENT_BYTES,
) -> tuple[int, dict[str, Any]]:
    """One bounded exchange with a node: (status, JSON object or {}). Raises Unavailable."""
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout), http.stream(method, url, json=body, timeout=timeout) as response:
            async for chunk in response.aiter_bytes():
                raw += chunk
                if len(raw) > limit:
                    raise Unavailable(f"{url} sent more than {limit} bytes.")
        return response.status_code, parse_json_object(bytes(raw)) if raw else {}
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, TimeoutError, InvalidInput) as error:
        raise Unavailable(f"{url} does not answer properly ({_text(error)}).") from error


def _check_answer(answer: Answer, profile: Profile, received: tuple[int, ...]) -> None:
    """Every rule of checks.py, and that the transcript is what was streamed. Raises BadAnswer."""
    signed, receipt, transcript = answer.signed, answer.receipt, answer.transcript
    require(receipt_checks(signed.request, profile, receipt))
    require(params_checks(signed.request, signed.params, profile))
    if transcript.prompt_ids != signed.prompt_ids:
        raise BadAnswer("transcript prompt", "the transcript's prompt ids are not those that were signed.")
    if transcript.output_ids[: len(received)] != received:
        raise BadAnswer("stream", "the transcript's output ids are not those that were streamed.")
    require(transcript_checks(signed.request, signed.params, profile, receipt, transcript))


def _token(event: ServerEvent, index: int, signed: SignedRequest, profile: Profile) -> Token:
    data = event.json()
    position, token_id = data.get("i"), data.get("id")
    if set(data) != {"i", "id"} or type(position) is not int or type(token_id) is not int or position != index:
        raise InvalidInput(f"token event {str(data)[:80]} where number {index} belongs")
    if not 0 <= token_id < profile.vocab_size:
        raise InvalidInput(f"token id {token_id} is outside the vocabulary of {profile.vocab_size}")
    if index >= signed.request.max_tokens:
        raise InvalidInput(f"more than max_tokens = {signed.request.max_tokens} tokens")
    return Token(index, token_id)


async def _refusal(node: Address, response: httpx.Response) -> PoipError:
    raw = bytearray()
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > MAX_ERROR_BYTES:
            break
    code, message = error_body(bytes(raw))
    if response.status_code not in REFUSALS or code == "in_progress":
        return StreamBroken(node, f"answered {response.status_code} ({code}: {message})", 0)
    return NodeRefused(node, response.status_code, code, message)


def _wants_payment(error: NodeRefused) -> bool:
    return error.node_status == 402 and error.reason in ("voucher_due", "prepayment_required")


def _voucher_body(voucher: SignedVoucher | None) -> dict[str, Any] | None:
    if voucher is None:
        return None
    return {**voucher.voucher.to_json(), "signature": "0x" + voucher.signature.hex()}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE]


__all__ = [
    "Answer",
    "ClientChain",
    "Escrow",
    "KeySigner",
    "NodeClient",
    "NodeRefused",
    "Signer",
    "StreamBroken",
    "Timeouts",
    "Token",
    "call_json",
]
