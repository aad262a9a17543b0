"""From an `Ask` to text: choose a node, sign, stream, detokenise, stop, retry, account for it, hand over the proof.

One `Gateway` per process. It holds no HTTP of its own; app.py puts the OpenAI API on top. Prompts and answers are never
logged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from poip_chain.control.checks import BadAnswer, SignedRequest, end_ids
from poip_chain.control.client import Answer, Escrow, NodeClient, NodeRefused, StreamBroken
from poip_chain.control.faults import crash_point
from poip_chain.control.gateway.asks import Ask
from poip_chain.control.gateway.catalogue import Catalogue
from poip_chain.control.gateway.errors import ApiError
from poip_chain.control.gateway.escrow import EscrowManager
from poip_chain.control.gateway.metrics import Metrics
from poip_chain.control.gateway.settings import GatewaySettings
from poip_chain.control.gateway.store import ApiKey, GatewayStore
from poip_chain.control.nodes import Choice, Need, NodeDirectory, NoNode
from poip_chain.control.view import ChainView
from poip_chain.errors import InsufficientFunds, PoipError, Refused, Unavailable
from poip_chain.service.engine.tokenizer import StopStrings
from poip_chain.spec.objects import FinishReason, Request
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.gateway")

FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "length"}
"""OpenAI's names. A node may end an answer as cancelled when it shuts down or the deadline comes: it is incomplete."""
LATE_RECEIPT_SECONDS = 10.0
NODE_CODES = frozenset(
    {
        "busy",
        "voucher_due",
        "insufficient_escrow",
        "deadline_passed",
        "engine_unavailable",
        "price_too_low",
        "unreachable",
    }
)
"""Refusals that are counted by name; a node's other words must not become labels."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. `proof` and `header` are None where the node has not delivered its receipt yet."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    proof: dict[str, Any] | None
    header: str | None
    request_hash: bytes
    node: Address


@dataclass
class _Try:
    """One request at one node, as it goes on."""

    signed: SignedRequest
    choice: Choice
    answer: Answer | None = None
    finish_reason: str = ""
    tokens: int = 0


@dataclass
class Gateway:
    """See the module's docstring."""

    settings: GatewaySettings
    chain: ChainView
    client: NodeClient
    directory: NodeDirectory
    catalogue: Catalogue
    store: GatewayStore
    metrics: Metrics
    escrow: EscrowManager | None = None
    clock: Callable[[], float] = time.time
    running: int = 0
    _escrows: dict[Address, Escrow] = field(default_factory=dict)
    _live: set[bytes] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # --- answering ---------------------------------------------------------------------------------------------

    async def answer(self, ask: Ask, key: ApiKey | None) -> AsyncGenerator[Piece | Done, None]:
        """Yield the answer's text, then one Done. Another node is asked as long as nothing was yielded.

        An answer that is not streamed comes as one Piece, so it can be retried until its end. Closing the generator
        cancels; what was produced until then is paid for later. Raises ApiError or another PoipError.
        """
        need = Need(ask.model.model_id, ask.model.profile_version, len(ask.prompt_ids), ask.max_tokens)
        tried: dict[Address, str] = {}
        failure: PoipError | None = None
        for _ in range(self.settings.max_attempts):
            try:
                choice = await self._choose(need, tried)
            except NoNode as error:
                raise _unanswered(failure or error) from error
            tried[choice.node] = "already tried for this request"
            signed = await asyncio.to_thread(self._signed, ask, choice)
            attempt, yielded, held = _Try(signed, choice), False, ""
            with self._kept_open(signed):
                await asyncio.to_thread(self._reserve, signed, key)
                try:
                    async with aclosing(self._attempt(ask, attempt)) as pieces:
                        async for text in pieces:
                            if ask.stream:
                                yielded = True
                                yield Piece(text)
                            else:
                                held += text
                except (NodeRefused, InsufficientFunds, StreamBroken, BadAnswer, Refused) as error:
                    failure = error
                    self.metrics.node_failures.labels(reason=_reason(error)).inc()
                    log.warning("attempt failed", node=choice.node, code=_reason(error), streamed=yielded)
                    if yielded or not await self._given_up(ask, attempt):
                        self._settle_soon(signed, choice, ask)
                        raise _unanswered(error) from error
                    continue
                except BaseException:  # the client has left
                    self._settle_soon(signed, choice, ask)
                    raise
            if held:
                yield Piece(held)
            yield await self._done(ask, attempt)
            return
        raise _unanswered(failure or Unavailable("no node answered."))

    @contextmanager
    def _kept_open(self, signed: SignedRequest) -> Iterator[None]:
        """From before money is set aside until the attempt is over: settling must not close its spending meanwhile."""
        self._live.add(signed.request_hash)
        try:
            yield
        finally:
            self._live.discard(signed.request_hash)

    async def _given_up(self, ask: Ask, attempt: _Try) -> bool:
        """Whether a failed attempt will not be paid, so that another node may be asked; False if it is paid already."""
        signed, node = attempt.signed, attempt.choice.node
        # Given up before its receipt is asked for: one that came first has been paid.
        if await self.client.abandon(signed, node, "another node is asked") == "checked":
            return False
        self._settle_soon(signed, attempt.choice, ask)
        # A receipt that still comes is not paid, so the key's cap is free for the next node. What this node may hold
        # against the escrow stays reserved in the ledger until its fate is known.
        await asyncio.to_thread(self.store.close_spend, signed.request_hash, 0)
        return True

    async def _choose(self, need: Need, tried: dict[Address, str]) -> Choice:
        free, barred = await self._free_escrow()
        return self.directory.choose(need, barred={**barred, **tried}, free_escrow=free)

    async def _free_escrow(self) -> tuple[dict[Address, int], dict[Address, str]]:
        """What is not spoken for with each node, and the nodes that this key does not deal with."""
        free = {node: escrow.available for node, escrow in self._escrows.items()}
        barred: dict[Address, str] = {}
        for account in await asyncio.to_thread(self.client.ledger.accounts):
            if account.blocked:
                barred[account.node] = f"blocked after a wrong answer: {account.blocked}"
            if (escrow := self._escrows.get(account.node)) is not None:
                free[account.node] = escrow.available - account.committed(escrow.settled)
        return free, barred

    def _signed(self, ask: Ask, choice: Choice) -> SignedRequest:
        """The question, signed for one node: no other may answer it, so nobody can pass it on at our cost.

        The seed is the same at every node, and so is an honest answer.
        """
        request = Request(
            client=self.client.signer.address,
            node=choice.node,
            model_id=ask.model.model_id,
            profile_version=ask.model.profile_version,
            prompt_root=prompt_root(ask.prompt_ids),
            prompt_tokens=len(ask.prompt_ids),
            params_hash=ask.params.params_hash(),
            max_tokens=ask.max_tokens,
            input_price=choice.offer.input_price,
            output_price=choice.offer.output_price,
            client_seed=ask.client_seed,
            client_nonce=secrets.token_bytes(32),
            deadline=int(self.clock() + self.settings.request_lifetime),
        )
        return self.client.sign(request, ask.params, ask.prompt_ids)

    def _reserve(self, signed: SignedRequest, key: ApiKey | None) -> None:
        """Set aside what a request may cost. Raises InsufficientFunds if the key's cap does not allow it."""
        if key is not None:
            self.store.reserve(key.id, signed.request_hash, signed.max_fee())
            crash_point("gateway_reserved")

    async def _attempt(self, ask: Ask, attempt: _Try) -> AsyncGenerator[str, None]:
        """The text of one node's answer; fills in `attempt`. Pays, or leaves it to be settled later."""
        signed, choice = attempt.signed, attempt.choice
        ends = end_ids(ask.params, ask.model.profile)
        detokenizer, stops = ask.model.tokenizer.detokenizer(), StopStrings(ask.stop)
        begun, first_token = time.monotonic(), None
        self.directory.started(choice.node)
        try:
            async with aclosing(self.client.stream(choice.node, choice.url, signed, ask.model.profile)) as stream:
                async for item in stream:
                    if isinstance(item, Answer):
                        attempt.answer = item
                        break
                    first_token = first_token or time.monotonic() - begun
                    attempt.tokens += 1
                    text = "" if item.token_id in ends else stops.push(detokenizer.push(item.token_id))
                    if text:
                        yield text
                    if stops.found:
                        break
            if attempt.answer is not None and attempt.answer.state != "checked":
                raise StreamBroken(choice.node, "answered a request that was given up", attempt.tokens)
            if not stops.found and (text := stops.push(detokenizer.finish()) + stops.finish()):
                yield text
            if attempt.answer is None:
                attempt.answer = await self._receipt_of_cancelled(signed, choice, ask)
            attempt.finish_reason = _finish_reason(attempt, stopped=stops.found)
            if _cut_short(attempt, stopped=stops.found):
                self.directory.failed(choice.node, "ended an answer early")
            else:
                self.directory.succeeded(choice.node, first_token or 0.0, time.monotonic() - begun, attempt.tokens)
            if first_token is not None:
                self.metrics.first_token_seconds.observe(first_token)
        except (PoipError, asyncio.CancelledError, GeneratorExit) as error:
            blame = isinstance(error, PoipError) and not isinstance(error, InsufficientFunds | ApiError)
            self.directory.failed(choice.node, _reason(error), blame=blame)
            raise

    async def _receipt_of_cancelled(self, signed: SignedRequest, choice: Choice, ask: Ask) -> Answer | None:
        """After a stop string: the receipt for what was produced, if the node has it in time."""
        attempt = await asyncio.to_thread(self.client.ledger.attempt, signed.request_hash, choice.node)
        if attempt is None:
            return None
        try:
            return await self.client.recover(attempt, ask.model.profile, wait=self.settings.receipt_wait)
        except Unavailable as error:
            log.warning("receipt not fetched", node=choice.node, error=str(error)[:200])
            return None

    async def _done(self, ask: Ask, attempt: _Try) -> Done:
        signed, answer = attempt.signed, attempt.answer
        tokens = attempt.tokens if answer is None else answer.receipt.output_tokens
        if answer is not None:
            await asyncio.to_thread(self.store.close_spend, signed.request_hash, answer.receipt.fee)
        domain, nonces = self.chain.log_domain, {"gateway_nonce": ask.gateway_nonce, "user_nonce": ask.user_nonce}
        self.metrics.tokens.labels(kind="prompt").inc(len(ask.prompt_ids))
        self.metrics.tokens.labels(kind="completion").inc(tokens)
        return Done(
            finish_reason=attempt.finish_reason,
            prompt_tokens=len(ask.prompt_ids),
            completion_tokens=tokens,
            proof=None if answer is None else answer.proof(domain, **nonces),
            header=None if answer is None else _header(answer.evidence(domain)),
            request_hash=signed.request_hash,
            node=attempt.choice.node,
        )

    # --- in the background -------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Look at registry, nodes and escrow. Raises Unavailable without a chain."""
        await self.directory.refresh()
        await self._read_escrows()
        standings = self.directory.standings()
        usable = sum(1 for standing in standings if not standing.unfit)
        self.metrics.nodes.labels(state="usable").set(usable)
        self.metrics.nodes.labels(state="unfit").set(len(standings) - usable)

    async def _read_escrows(self) -> None:
        payer = self.client.signer.address
        nodes = [standing.node.address for standing in self.directory.standings()]

        def read() -> dict[Address, Escrow]:
            return {node: self.chain.escrow(payer, node) for node in nodes}

        self._escrows = await asyncio.to_thread(read)

    async def settle(self) -> None:
        """One round of settling: receipts that are still owed, vouchers, spending. Idempotent."""
        for trouble in await self.client.step(self.chain.profile, self.directory.url):
            log.warning("not settled yet", error=trouble[:300])
        await asyncio.to_thread(self._close_spending)
        self.metrics.open_attempts.set(len(await asyncio.to_thread(self.client.ledger.attempts, "open", "abandoned")))

    async def tend_escrow(self) -> bool:
        """One round of keeping escrow where it is needed; whether a move is under way. Raises Unavailable."""
        if self.escrow is None:
            return False
        standings = self.directory.standings()
        usable = [standing.node.address for standing in standings if not standing.unfit]
        known = [standing.node.address for standing in standings]
        said = await asyncio.to_thread(self.escrow.step, usable, known)
        for line in said:
            log.info("escrow", what=line)
        if said:
            await self._read_escrows()
        # An empty directory is one that was not read yet: look again soon.
        return bool(said) or self.escrow.under_way or not standings

    async def usable_nodes(self) -> int:
        """How many nodes could take a request now: live, not blocked, with escrow left."""
        free, barred = await self._free_escrow()
        return sum(
            1
            for standing in self.directory.standings()
            if not standing.unfit and standing.node.address not in barred and free.get(standing.node.address, 0) > 0
        )

    def _close_spending(self) -> None:
        for request_hash in self.store.open_requests():
            if request_hash in self._live:
                continue
            attempts = self.client.ledger.of_request(request_hash)
            paid = next((attempt.receipt for attempt in attempts if attempt.state == "checked"), None)
            if paid is not None:
                self.store.close_spend(request_hash, paid.fee)
            elif all(attempt.state != "open" for attempt in attempts):
                self.store.close_spend(request_hash, 0)

    def _settle_soon(self, signed: SignedRequest, choice: Choice, ask: Ask) -> None:
        """The client has left or the node has stopped: ask for the receipt now rather than in the next round."""

        async def settle() -> None:
            attempt = await asyncio.to_thread(self.client.ledger.attempt, signed.request_hash, choice.node)
            if attempt is not None and attempt.state in ("open", "abandoned"):
                try:
                    await self.client.recover(attempt, ask.model.profile, wait=LATE_RECEIPT_SECONDS)
                except PoipError as error:
                    log.info("receipt not fetched yet", node=choice.node, error=str(error)[:200])

        self._spawn(settle())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Finish what is under way in the background."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LATE_RECEIPT_SECONDS)
        await self.client.aclose()


def _finish_reason(attempt: _Try, *, stopped: bool) -> str:
    if stopped or attempt.answer is None:
        return "stop"
    return FINISH[FinishReason(attempt.answer.receipt.finish_reason)]


def _cut_short(attempt: _Try, *, stopped: bool) -> bool:
    """Whether the node ended the answer itself before it was complete."""
    return (
        not stopped and attempt.answer is not None and (attempt.answer.receipt.finish_reason == FinishReason.CANCELLED)
    )


def _reason(error: BaseException) -> str:
    """A short code for logs and metrics; texts may quote what a node or a client sent."""
    if isinstance(error, NodeRefused):
        return error.reason if error.reason in NODE_CODES else "refused"
    return error.code if isinstance(error, PoipError) else "client_left"


def _unanswered(error: PoipError) -> PoipError:
    """What the client is told when no node answered: its own mistakes as such, everything else as 502 or 503."""
    if isinstance(error, NodeRefused) and error.node_status in (400, 413):
        return ApiError(400, error.reason, error.message)
    if isinstance(error, BadAnswer):
        return ApiError(502, "bad_answer", "the node's answer did not pass the checks; it is not paid.")
    if isinstance(error, StreamBroken):
        return ApiError(502, "node_stopped", error.message, hint="Send the request again.")
    if isinstance(error, NoNode):
        return error
    return ApiError(503, "no_node_available", f"no node could take the request: {error.message}")


def _header(evidence: dict[str, Any]) -> str:
    text = json.dumps(evidence, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
