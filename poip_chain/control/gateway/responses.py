"""OpenAI answers: one JSON body, or server-sent events with heartbeats, from what `Gateway.answer` yields.

The answer is produced by a task of its own, so that heartbeats can be sent while nothing comes, and so that a client
that leaves cancels it. A status other than 200 is possible until the first bytes are sent; after that an error is an
event of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from poip_chain.control.gateway.asks import Ask
from poip_chain.control.gateway.errors import ApiError, error_body
from poip_chain.control.gateway.serving import Done, Gateway, Piece, log
from poip_chain.control.gateway.store import ApiKey
from poip_chain.errors import PoipError

QUEUE_ITEMS = 256
"""A client that reads slowly holds the node back after this many pieces."""
HEARTBEAT = b": heartbeat\n\n"
RECEIPT_HEADER = "x-poip-receipt"

Item = Piece | Done | PoipError


class _Production:
    """An answer in the making: a queue filled by a task."""

    def __init__(self, gateway: Gateway, ask: Ask, key: ApiKey | None) -> None:
        self._gateway, self._ask, self._key = gateway, ask, key
        self._queue: asyncio.Queue[Item] = asyncio.Queue(QUEUE_ITEMS)
        gateway.running += 1
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        try:
            async with aclosing(self._gateway.answer(self._ask, self._key)) as items:
                async for item in items:
                    await self._queue.put(item)
        except PoipError as error:
            await self._queue.put(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # must reach the client as an error, not as a stream that never ends
            log.error("unexpected error", kind=type(error).__name__)
            await self._queue.put(PoipError("an unexpected error"))

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._gateway.running -= 1

    async def next(self, timeout: float | None = None) -> Item | None:
        """The next item; None after `timeout` seconds of silence."""
        try:
            async with asyncio.timeout(timeout):
                return await self._queue.get()
        except TimeoutError:
            return None

    async def stop(self) -> None:
        """Cancel if it still runs."""
        self._task.cancel()
        # Not `await self._task`: Starlette's cancel scope cancels us again and again, that would reach through to the
        # task, and its second cancellation would keep it from closing the connection to the node.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({self._task})


async def answer_response(gateway: Gateway, ask: Ask, key: ApiKey | None, http: Request) -> Response:
    """The response to a validated request. Raises PoipError if no node takes it."""
    production = _Production(gateway, ask, key)
    envelope = _Envelope(ask)
    if not ask.stream:
        return await _whole(production, envelope, http)
    # Most refusals come within one heartbeat, and then the status can still tell.
    try:
        first = await production.next(gateway.settings.heartbeat)
    except asyncio.CancelledError:
        await production.stop()
        raise
    if isinstance(first, PoipError):
        await production.stop()
        raise first
    events = _events(production, envelope, first, gateway.settings.heartbeat)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return _Stream(production, events, headers)


class _Stream(StreamingResponse):
    """Ends the production with the response, even if the client leaves before the first byte."""

    def __init__(self, production: _Production, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._production = production

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._production.stop()


async def _whole(production: _Production, envelope: _Envelope, http: Request) -> Response:
    leaving = asyncio.create_task(_disconnected(http))
    collecting = asyncio.create_task(_collect(production))
    try:
        await asyncio.wait({leaving, collecting}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ApiError(499, "client_left", "the client has left.")
        text, done = collecting.result()
    finally:
        for task in (leaving, collecting):
            task.cancel()
        await production.stop()
    headers = {} if done.header is None else {RECEIPT_HEADER: done.header}
    return JSONResponse(envelope.whole(text, done), headers=headers)


async def _collect(production: _Production) -> tuple[str, Done]:
    pieces = []
    while True:
        item = await production.next()
        if isinstance(item, Piece):
            pieces.append(item.text)
        elif isinstance(item, Done):
            return "".join(pieces), item
        elif item is not None:
            raise item


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    production: _Production, envelope: _Envelope, first: Item | None, heartbeat: float
) -> AsyncIterator[bytes]:
    try:
        if first is None:
            yield HEARTBEAT
            first = await production.next(heartbeat)
        item = first
        if envelope.ask.chat:
            yield _event(envelope.opening())
        while True:
            if item is None:
                yield HEARTBEAT
            elif isinstance(item, Piece):
                yield _event(envelope.piece(item.text))
            elif isinstance(item, Done):
                for chunk in envelope.closing(item):
                    yield _event(chunk)
                yield b"data: [DONE]\n\n"
                return
            else:
                yield _event(error_body(item))
                return
            item = await production.next(heartbeat)
    finally:
        await production.stop()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class _Envelope:
    """The JSON around an answer's text."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._created = int(time.time())
        self._id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """A complete answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": done.finish_reason, "logprobs": None}
        if self.ask.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        body = self._body("chat.completion" if self.ask.chat else "text_completion", [choice])
        return {**body, "usage": _usage(done), "poip": _poip(done)}

    def opening(self) -> dict[str, Any]:
        """The first chunk of a chat."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"content": text}, None)

    def closing(self, done: Done) -> list[dict[str, Any]]:
        """The last chunk, with the proof, and the usage chunk if the client asked for one."""
        chunks = [{**self._chunk({}, done.finish_reason), "poip": _poip(done)}]
        if self.ask.include_usage:
            chunks.append({**self._body(self._kind(), []), "usage": _usage(done)})
        return chunks

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self.ask.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        body = self._body(self._kind(), [choice])
        return {**body, "usage": None} if self.ask.include_usage else body

    def _kind(self) -> str:
        return "chat.completion.chunk" if self.ask.chat else "text_completion"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.ask.model.name,
            "choices": choices,
        }


def _usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def _poip(done: Done) -> dict[str, Any]:
    return {"proof": done.proof, "node": done.node, "request_hash": "0x" + done.request_hash.hex()}
