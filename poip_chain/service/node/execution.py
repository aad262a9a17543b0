"""Running requests: engine tokens in, stream events and one receipt out.

A job is independent of the connection that started it: a client that goes away cancels it, and the receipt for what was
produced is written all the same. Lives in one asyncio event loop; blocking writes go to threads. It knows no HTTP.

Nothing about a running request is on disk before its receipt: after a crash it is as if the request had never come, and
a retry gives the same tokens, because the sampler is deterministic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import structlog

from poip_chain.errors import IntegrityError, PoipError, Unavailable
from poip_chain.service.engine.client import EngineToken, fingerprint_entries
from poip_chain.service.node.admission import Submission
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.metrics import NodeMetrics
from poip_chain.service.node.receipts import Answer, ReceiptWriter
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import StoredReceipt
from poip_chain.spec.objects import FinishReason, Profile
from poip_chain.spec.transcript import FingerprintEntry, Transcript
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.node")

DEADLINE_MARGIN = 1.0
"""Seconds before a request's deadline at which its answer is ended, so that the receipt is not dated after it."""
RETRY_AFTER = 2


class Engine(Protocol):
    """What the node needs of an engine; service/engine/client.py has the real one."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: bytes,
        temperature_milli: int,
        max_tokens: int,
        prompt_root: bytes,
        end_token_ids: Collection[int],
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[EngineToken]:
        """Stream the answer; closing the iterator aborts the request."""

    async def health(self) -> bool:
        """Whether it can serve."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One output token."""

    index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class ReceiptEvent:
    """The answer is complete, signed and stored."""

    stored: StoredReceipt
    transcript: Transcript


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The answer failed; nothing was signed, the request may be sent again."""

    error: PoipError


Event = TokenEvent | ReceiptEvent | ErrorEvent


@dataclass
class Job:
    """One running request. `events` ends with a ReceiptEvent or an ErrorEvent."""

    submission: Submission
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """The client has gone: end the answer here."""
        self.cancelled.set()


class Executor:
    """The node's running requests."""

    def __init__(
        self,
        *,
        engine: Engine,
        engine_statement: str,
        writer: ReceiptWriter,
        profile: Profile,
        capacity: int,
        stall_timeout: float,
        metrics: NodeMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._statement, self._writer = engine, engine_statement, writer
        self._profile, self._capacity, self._stall = profile, capacity, stall_timeout
        self._metrics, self._clock = metrics, clock
        self._jobs: dict[bytes, Job] = {}
        self._draining = False

    def running(self) -> int:
        """How many requests run."""
        return len(self._jobs)

    def is_running(self, request_hash: bytes) -> bool:
        """Whether this request runs now."""
        return request_hash in self._jobs

    def running_fee(self, payer: Address) -> int:
        """What the payer's running requests may cost at most, wei."""
        return sum(j.submission.max_fee for j in self._jobs.values() if j.submission.request.client == payer)

    def running_fees(self) -> int:
        """What all running requests may cost at most, wei."""
        return sum(j.submission.max_fee for j in self._jobs.values())

    def check_room(self, submission: Submission) -> None:
        """Raises RequestRefused (409 or 429) if the request runs already or there is no room."""
        if submission.request_hash in self._jobs:
            raise RequestRefused(409, "in_progress", "this request is being answered now.", retry_after=RETRY_AFTER)
        if self._draining:
            raise RequestRefused(503, "stopping", "this node is stopping.", retry_after=30)
        if len(self._jobs) >= self._capacity:
            raise RequestRefused(
                429, "busy", f"all {self._capacity} places of this node are taken.", retry_after=RETRY_AFTER
            )

    def start(self, submission: Submission) -> Job:
        """Run a request that was admitted. Call without awaiting anything after the checks."""
        self.check_room(submission)
        job = Job(submission)
        self._jobs[submission.request_hash] = job
        job.task = asyncio.get_running_loop().create_task(self._run(job))
        return job

    async def drain(self, timeout: float) -> None:
        """Take no more requests; end the running ones as cancelled and wait until their receipts are stored."""
        self._draining = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for job in self._jobs.values():
            job.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    async def _run(self, job: Job) -> None:
        outcome = "failed"
        submission = job.submission
        try:
            crash_point("admitted")
            answer = await self._answer(job)
            if answer is None:
                outcome = "abandoned"
                job.events.put_nowait(ErrorEvent(RequestRefused(499, "cancelled", "cancelled before the first token.")))
                return
            stored, transcript = await asyncio.to_thread(self._writer.write, submission, answer, self._statement)
            outcome = answer.finish_reason.name.lower()
            self._metrics.answered(submission.request.prompt_tokens, len(answer.output_ids))
            log.info("receipt", seq=stored.receipt.seq, tokens=stored.receipt.output_tokens, finish_reason=outcome)
            job.events.put_nowait(ReceiptEvent(stored, transcript))
        except PoipError as error:
            outcome = error.code
            log.warning("request failed", request=submission.request_hash.hex(), code=outcome, error=str(error)[:300])
            job.events.put_nowait(ErrorEvent(error))
        except Exception as error:
            log.exception("request failed", request=submission.request_hash.hex())
            job.events.put_nowait(ErrorEvent(IntegrityError(f"the node failed: {type(error).__name__}.")))
            raise
        finally:
            del self._jobs[submission.request_hash]
            self._metrics.requests.labels(outcome=outcome).inc()

    async def _answer(self, job: Job) -> Answer | None:
        """The engine's answer; None if the client left before the first token. Raises PoipError if the engine fails."""
        request, params = job.submission.request, job.submission.params
        stream = self._engine.generate(
            job.submission.prompt_ids,
            seed=request.seed(),
            temperature_milli=params.temperature_milli,
            max_tokens=request.max_tokens,
            prompt_root=request.prompt_root,
            end_token_ids=self._profile.end_token_ids,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        )
        last_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._profile.end_token_ids))
        ids: list[int] = []
        fingerprints: list[tuple[FingerprintEntry, ...]] = []
        reason: FinishReason | None = None
        gone = asyncio.create_task(job.cancelled.wait())
        try:
            while reason is None:
                token = await self._next(stream, gone, request.deadline)
                if token is None:
                    reason = FinishReason.CANCELLED
                    break
                self._check(token)
                ids.append(token.token_id)
                fingerprints.append(fingerprint_entries(token))
                job.events.put_nowait(TokenEvent(len(ids) - 1, token.token_id))
                crash_point("first_token" if len(ids) == 1 else "mid_stream")
                if token.token_id in last_ids:
                    reason = FinishReason.STOP
                elif len(ids) == request.max_tokens:
                    reason = FinishReason.LENGTH
        finally:
            gone.cancel()
            if isinstance(stream, AsyncGenerator):
                with suppress(PoipError, RuntimeError):
                    await stream.aclose()
        return Answer(tuple(ids), tuple(fingerprints), reason) if ids else None

    async def _next(
        self, stream: AsyncIterator[EngineToken], gone: asyncio.Task[Literal[True]], deadline: int
    ) -> EngineToken | None:
        """The next token; None if the client left or the deadline came. Raises Unavailable if the engine is silent."""
        left = deadline - DEADLINE_MARGIN - self._clock()
        if gone.done() or left <= 0:
            return None
        step = asyncio.create_task(_anext(stream))
        try:
            both: set[asyncio.Task[Any]] = {step, gone}
            await asyncio.wait(both, timeout=min(self._stall, left), return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                return step.result()
            if gone.done() or left <= self._stall:
                return None
            raise Unavailable(
                f"the engine has sent nothing for {self._stall:.0f} s.", hint="Nothing was signed; try again."
            )
        finally:
            if not step.done():
                step.cancel()
                with suppress(asyncio.CancelledError, PoipError):
                    await step

    def _check(self, token: EngineToken) -> None:
        """What would be an offence in a transcript must not get into one, whatever the engine says."""
        listed = [token.token_id, *(token_id for token_id, _ in token.top)]
        if max(listed) >= (size := self._profile.vocab_size):
            raise IntegrityError(f"the engine gave id {max(listed)}, outside the vocabulary of {size}.")
        if len(set(listed[1:])) != len(listed) - 1:
            raise IntegrityError("the engine listed a token twice.")


async def _anext(stream: AsyncIterator[EngineToken]) -> EngineToken:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise Unavailable("the engine ended its answer early.", hint="Nothing was signed; try again.") from None
