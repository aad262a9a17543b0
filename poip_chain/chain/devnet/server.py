"""The node as a process: JSON-RPC over HTTP and WebSocket on one port. Knows no method's meaning."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from eth import EVM_RECURSION_LIMIT
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from poip_chain.chain.devnet import anvil
from poip_chain.chain.devnet.chain import ChainEvent, Devnet
from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.chain.devnet.errors import InvalidParams, LimitExceeded, ParseError, RpcError, Unsupported
from poip_chain.chain.devnet.filters import FilterRegistry
from poip_chain.chain.devnet.methods_dev import DevMethods
from poip_chain.chain.devnet.methods_eth import EthMethods
from poip_chain.chain.devnet.params import LogCriteria, log_criteria, mapping
from poip_chain.chain.devnet.producer import BlockProducer
from poip_chain.chain.devnet.rpc import MAX_REQUEST_BYTES, Dispatcher, encode, error_response, parse
from poip_chain.chain.devnet.views import header_view, hex_bytes, matching_logs
from poip_chain.errors import ConfigurationError

log = logging.getLogger(__name__)

MAX_WAITING_MESSAGES = 10_000
MAX_SUBSCRIPTIONS = 100
THREAD_STACK_BYTES = 64 * 1024 * 1024
# Pages from elsewhere must not reach a node that signs with funded keys; tools on this machine may.
LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_JSON = "application/json"


class Node:
    """A chain, its block producer and the methods that it answers."""

    def __init__(self, config: DevnetConfig) -> None:
        self.devnet = Devnet(config)
        self.producer = BlockProducer(self.devnet, config.block_time)
        filters = FilterRegistry()
        self.devnet.listen(filters.on_event)
        self.dispatcher = Dispatcher(
            EthMethods(self.devnet, filters), DevMethods(self.devnet, self.producer.set_interval)
        )

    def start(self) -> None:
        """Begin to seal blocks."""
        self.producer.start()

    def stop(self) -> None:
        """Seal no more and close the database."""
        self.producer.stop()
        self.devnet.close()


def run(config: DevnetConfig) -> None:
    """Run a node until SIGINT or SIGTERM.

    Raises ConfigurationError if the port is taken, the database does not fit or the backend is not installed.
    """
    if config.backend == "anvil":
        anvil.run(config)
        return
    # 1024 nested calls of the machine need many Python frames, and room for them on the stack of each thread.
    sys.setrecursionlimit(EVM_RECURSION_LIMIT)
    threading.stack_size(THREAD_STACK_BYTES)
    with listening_socket(config) as listener:
        node = Node(config)
        host, port = listener.getsockname()[:2]
        url = f"http://{host}:{port}"

        def ready() -> None:
            node.start()
            log.info("devnet with chain id %d answers at %s", config.chain_id, url)
            if config.ready_file is not None:
                write_ready_file(config.ready_file, url)

        try:
            serve(application(node, on_start=ready), listener)
        finally:
            node.stop()


def listening_socket(config: DevnetConfig) -> socket.socket:
    """A socket on the configured address. Raises ConfigurationError if it is taken."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{config.host}:{config.port} cannot be used: {error.strerror}.",
            hint="Is another devnet running? Choose another port, or 0 for any free one.",
        ) from error
    return listener


def write_ready_file(path: Path, url: str) -> None:
    """Say where the node answers; whoever reads the file never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(url + "\n")
    os.replace(partial, path)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until a signal comes."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=MAX_REQUEST_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    # The server passes the signal that ended it on to the handler that was there before: the default one would end
    # the process before the database is closed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(uvicorn.Server(settings).serve(sockets=[listener]))


def application(node: Node, on_start: Callable[[], None]) -> Starlette:
    """The ASGI application of a node."""

    async def http(request: Request) -> Response:
        if not _origin_allowed(request.headers.get("origin")):
            return Response(status_code=403)
        try:
            body = await _bounded_body(request)
        except LimitExceeded as error:
            return Response(encode(error_response(None, error)), status_code=413, media_type=_JSON)
        except ClientDisconnect:
            return Response(status_code=400)
        answer = await run_in_threadpool(node.dispatcher.answer_text, body)
        return Response(answer, media_type=_JSON)

    async def websocket(connection: WebSocket) -> None:
        if not _origin_allowed(connection.headers.get("origin")):
            await connection.close(code=1008)
            return
        await connection.accept()
        await _Session(node, connection).run()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        on_start()
        yield

    return Starlette(
        routes=[Route("/", http, methods=["POST"]), WebSocketRoute("/", websocket)],
        lifespan=lifespan,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origin_regex=LOCAL_ORIGIN,
                allow_methods=["POST"],
                allow_headers=["content-type"],
            )
        ],
    )


def _origin_allowed(origin: str | None) -> bool:
    return origin is None or re.fullmatch(LOCAL_ORIGIN, origin) is not None


async def _bounded_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            raise LimitExceeded(f"the request is larger than {MAX_REQUEST_BYTES} bytes")
    return bytes(body)


class _Session:
    """One WebSocket connection: requests in order, and the subscriptions made on it."""

    def __init__(self, node: Node, connection: WebSocket) -> None:
        self._node = node
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[str | None] = asyncio.Queue()
        self._subscriptions: dict[str, tuple[str, LogCriteria | None]] = {}
        self._guard = threading.Lock()

    async def run(self) -> None:
        self._node.devnet.listen(self._on_event)
        sender = asyncio.create_task(self._send())
        try:
            while True:
                message = await self._connection.receive()
                if message["type"] == "websocket.disconnect":
                    break
                # Some clients send their JSON in binary frames.
                content = message.get("text")
                await self._handle(message.get("bytes") or b"" if content is None else content)
        except (WebSocketDisconnect, RuntimeError):
            pass  # closed while it was being read
        finally:
            self._node.devnet.unlisten(self._on_event)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender

    async def _handle(self, content: str | bytes) -> None:
        try:
            request = parse(content)
        except ParseError as error:
            self._outgoing.put_nowait(encode(error_response(None, error)))
            return
        if isinstance(request, dict) and request.get("method") in ("eth_subscribe", "eth_unsubscribe"):
            self._answer_own(request)
            return
        answer = await run_in_threadpool(self._node.dispatcher.answer, request)
        if answer:
            self._outgoing.put_nowait(answer)

    def _answer_own(self, request: dict[str, Any]) -> None:
        identifier, parameters = request.get("id"), request.get("params")
        try:
            if not isinstance(parameters, list) or not parameters:
                raise InvalidParams("params must be an array that is not empty")
            if request["method"] == "eth_unsubscribe":
                with self._guard:
                    result: object = self._subscriptions.pop(str(parameters[0]), None) is not None
                answer: dict[str, Any] = {"jsonrpc": "2.0", "id": identifier, "result": result}
                self._outgoing.put_nowait(encode(answer))
                return
            kind, criteria = _subscription(parameters)
            name = hex(secrets.randbits(120) | 1 << 120)
            with self._guard:
                if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
                    raise LimitExceeded(f"a connection has at most {MAX_SUBSCRIPTIONS} subscriptions")
                # The answer stands in the queue before the first notification can.
                self._outgoing.put_nowait(encode({"jsonrpc": "2.0", "id": identifier, "result": name}))
                self._subscriptions[name] = (kind, criteria)
        except RpcError as error:
            self._outgoing.put_nowait(encode(error_response(identifier, error)))

    def _on_event(self, event: ChainEvent) -> None:
        with self._guard:
            subscriptions = tuple(self._subscriptions.items())
        for name, (kind, criteria) in subscriptions:
            for result in _news(event, kind, criteria):
                notification = {
                    "jsonrpc": "2.0",
                    "method": "eth_subscription",
                    "params": {"subscription": name, "result": result},
                }
                self._loop.call_soon_threadsafe(self._push, encode(notification))

    def _push(self, text: str) -> None:
        if self._outgoing.qsize() < MAX_WAITING_MESSAGES:
            self._outgoing.put_nowait(text)
        elif self._outgoing.qsize() == MAX_WAITING_MESSAGES:
            self._outgoing.put_nowait(None)  # too slow to follow: better no connection than a gap

    async def _send(self) -> None:
        while True:
            text = await self._outgoing.get()
            if text is None:
                await self._connection.close(code=1013, reason="too slow to follow")
                return
            await self._connection.send_text(text)


def _subscription(parameters: list[Any]) -> tuple[str, LogCriteria | None]:
    kind = parameters[0]
    if kind == "logs":
        return "logs", log_criteria(mapping(parameters[1] if len(parameters) > 1 else {}, "filter"))
    if kind in ("newHeads", "newPendingTransactions"):
        return str(kind), None
    raise Unsupported(f"no subscription to {str(kind)[:50]!r}; newHeads, logs and newPendingTransactions exist")


def _news(event: ChainEvent, kind: str, criteria: LogCriteria | None) -> list[Any]:
    if kind == "newHeads":
        return [header_view(sealed.header) for sealed in event.added]
    if kind == "newPendingTransactions":
        return [hex_bytes(transaction.hash) for transaction in event.pending]
    assert criteria is not None
    return [
        log_view
        for gone, blocks in ((True, event.removed), (False, event.added))
        for sealed in blocks
        for log_view in matching_logs(sealed, criteria, removed=gone)
    ]
