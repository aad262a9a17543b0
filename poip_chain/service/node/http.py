"""The node's HTTP API (docs/architecture.md): translates between HTTP and `Node`.

Every body is bounded in size and time before it is parsed. It decides nothing about requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from poip_chain.errors import InvalidInput, NotFound, PoipError
from poip_chain.service.node.admission import MAX_BODY_BYTES, parse_submission, parse_voucher
from poip_chain.service.node.answers import ACCESS_HEADER
from poip_chain.service.node.execution import ErrorEvent, Event, Job, ReceiptEvent, TokenEvent
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.node import Node, Stored
from poip_chain.service.node.receipts import receipt_json
from poip_chain.service.node.refusals import RequestRefused, error_body
from poip_chain.service.node.schema import StoredReceipt
from poip_chain.spec.eip712 import parse_hex
from poip_chain.spec.strict_json import parse_json
from poip_chain.spec.transcript import Transcript

log = structlog.get_logger("poip.node")

HEARTBEAT = b": working\n\n"


def create_app(node: Node) -> FastAPI:
    """The ASGI application of a node."""
    app = FastAPI(title="PoIP node", openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(PoipError)
    async def refused(_: Request, error: PoipError) -> Response:
        return _refusal(node, error)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        kind = NotFound("there is no such path.") if error.status_code == 404 else None
        return _refusal(node, kind or RequestRefused(error.status_code, "invalid_request", str(error.detail)))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        log.error("request handler failed", error=f"{type(error).__name__}: {error}"[:300])
        return _refusal(node, PoipError("the node failed on this request."))

    @app.get("/v1/info")
    async def info() -> Response:
        return JSONResponse(await asyncio.to_thread(node.info))

    @app.post("/v1/requests")
    async def requests(request: Request) -> Response:
        body = await _body(request, node.settings.body_timeout)
        # In a thread: four megabytes of JSON would hold up every stream.
        outcome = await node.submit(await asyncio.to_thread(lambda: parse_submission(parse_json(body))))
        if isinstance(outcome, Stored):
            return _stream(_one_receipt(outcome))
        # Failures that show before the first token get a proper status.
        first = await _next(outcome, node.settings.heartbeat)
        if isinstance(first, ErrorEvent):
            raise first.error
        return _stream(_events(outcome, first, node.settings.heartbeat))

    @app.get("/v1/requests/{request_hash}")
    async def receipt(request_hash: str) -> Response:
        stored = await asyncio.to_thread(node.receipt, parse_hex(request_hash, "request_hash", 32))
        return JSONResponse(receipt_json(stored))

    @app.post("/v1/vouchers")
    async def vouchers(request: Request) -> Response:
        body = await _body(request, node.settings.body_timeout)
        await asyncio.to_thread(node.accept_voucher, parse_voucher(parse_json(body), flat=False))
        return Response(status_code=204)

    @app.get("/v1/batches/{batch_id}/receipts")
    async def batch_receipts(batch_id: str) -> Response:
        found = await asyncio.to_thread(node.transcripts.batch_receipts, _number(batch_id))
        return JSONResponse(found)

    @app.get("/v1/batches/{batch_id}/transcripts/{index}")
    async def transcript(batch_id: str, index: str, request: Request) -> Response:
        access = request.headers.get(ACCESS_HEADER)
        found = await asyncio.to_thread(node.transcripts.transcript, _number(batch_id), _number(index), access)
        return JSONResponse(found)

    @app.get("/healthz")
    async def healthz() -> Response:
        health = await node.health()
        return JSONResponse(health, status_code=503 if health["status"] == "down" else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await asyncio.to_thread(node.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _refusal(node: Node, error: PoipError) -> Response:
    node.metrics.refusals.labels(code=error.code).inc()
    headers = {}
    retry_after = getattr(error, "retry_after", None) or (5 if error.status == 503 else None)
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _body(request: Request, timeout: float) -> bytes:
    """The whole body, at most MAX_BODY_BYTES and within `timeout` seconds. Raises RequestRefused."""
    too_large = RequestRefused(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes.")
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and (len(stated) > 10 or int(stated) > MAX_BODY_BYTES):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise RequestRefused(408, "slow_body", f"the body did not arrive within {timeout:.0f} s.") from error
    return bytes(body)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidInput(f"{text[:40]!r} is not a number.")
    return int(text)


def _stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _receipt_event(stored: StoredReceipt, transcript: Transcript) -> bytes:
    return _event("receipt", {**receipt_json(stored), "transcript": transcript.to_json()})


async def _one_receipt(answer: Stored) -> AsyncIterator[bytes]:
    yield _receipt_event(answer.stored, answer.transcript)


async def _next(job: Job, timeout: float) -> Event | None:
    """The job's next event; None if there was none for `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            return await job.events.get()
    except TimeoutError:
        return None


async def _events(job: Job, event: Event | None, heartbeat: float) -> AsyncIterator[bytes]:
    """The job's events as a stream, the first one given. If the client goes away, the job is cancelled."""
    try:
        while True:
            if event is None:
                yield HEARTBEAT
            elif isinstance(event, TokenEvent):
                yield _event("token", {"i": event.index, "id": event.token_id})
            elif isinstance(event, ReceiptEvent):
                data = await asyncio.to_thread(_receipt_event, event.stored, event.transcript)
                yield data
                crash_point("after_release")
                return
            else:
                yield _event("error", error_body(event.error))
                return
            event = await _next(job, heartbeat)
    finally:
        job.cancel()
