"""The node's process: parts made from settings, HTTP server, background loop, orderly end.

`run(settings)` blocks until SIGTERM or SIGINT. At the end running requests are finished as cancelled and get their
receipts; a kill at any point loses nothing either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.keys import Key, load, password_from
from poip_chain.chain.listening import bound_socket
from poip_chain.chain.rpc import Chain
from poip_chain.economic.network import Network
from poip_chain.errors import ConfigurationError, Unavailable
from poip_chain.service.engine.client import EngineClient
from poip_chain.service.node.admission import Served
from poip_chain.service.node.chainport import NetworkChain
from poip_chain.service.node.court import Defence, open_defence
from poip_chain.service.node.http import create_app
from poip_chain.service.node.jobs import Loop
from poip_chain.service.node.node import Node, choose_served, patiently
from poip_chain.service.node.settings import NodeSettings
from poip_chain.service.node.store import Store
from poip_chain.spec.eip712 import checked
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.node")

DRAIN_SECONDS = 20.0


def configure_logs() -> None:
    """JSON lines on standard error: time, level, event, fields. Prompts and tokens are never among the fields."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def run(settings: NodeSettings) -> None:
    """Run a node until SIGTERM or SIGINT. Raises PoipError if it cannot start, or had to stop to protect its stake."""
    configure_logs()
    with contextlib.ExitStack() as stack:
        key = load(settings.key, password_from(settings.password_file))
        name = Address(checked("address", settings.node, "node")) if settings.node else key.address
        deployment = Deployment.load(settings.deployment)
        listener = stack.enter_context(bound_socket(settings.host, settings.port, "node"))
        network = Network(Chain(settings.rpc_url, settings.rpc_timeout), deployment)
        patiently(network.check, settings.startup_timeout)
        store = Store(
            settings.data / "node.db",
            node=name,
            chain_id=deployment.chain_id,
            log=network.domain("log").verifying_contract,
        )
        stack.callback(store.close)
        chain = NetworkChain(
            network,
            key,
            name,
            settings.data,
            confirmations=settings.confirmations,
            outbox_path=(settings.outbox or settings.data / "outbox") / f"{key.address}.db",
        )
        stack.callback(chain.close)
        served = patiently(lambda: choose_served(settings, chain), settings.startup_timeout)
        defence = open_defence(settings, network, chain.outbox, store, name)
        asyncio.run(_serve(settings, store, chain, served, key, listener, defence))


async def _serve(
    settings: NodeSettings,
    store: Store,
    chain: NetworkChain,
    served: Served,
    key: Key,
    listener: socket.socket,
    defence: Defence | None,
) -> None:
    async with EngineClient(
        settings.engine_url,
        settings.engine_model,
        read_timeout_seconds=settings.stall_timeout,
        max_connections=settings.capacity + 8,
    ) as engine:
        statement = await _engine_statement(engine, settings.startup_timeout, served.profile.max_context)
        node = Node(
            settings=settings,
            chain=chain,
            engine=engine,
            engine_statement=statement,
            store=store,
            key=key,
            served=served,
            defence=defence,
        )
        await asyncio.to_thread(patiently, node.check_start, settings.startup_timeout)
        server = _Server(
            uvicorn.Config(
                create_app(node),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(DRAIN_SECONDS),
            ),
            listener,
        )
        asyncio_loop = asyncio.get_running_loop()

        def stop() -> None:
            asyncio_loop.call_soon_threadsafe(server.end)

        loops = [Loop(node.jobs, settings.poll_interval, stop)]
        if defence is not None:
            loops.append(Loop(defence, settings.poll_interval, stop, "poip-node-court"))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio_loop.add_signal_handler(number, server.end)
        log.info("node starts", node=node.served.node, port=settings.port, next_seq=store.next_seq())
        if settings.withhold_after is not None:
            log.warning("MISBEHAVING ON PURPOSE: transcripts will be withheld", after=settings.withhold_after)
        if settings.contests_everything:
            log.warning("MISBEHAVING ON PURPOSE: every accusation will be contested with a false trace")
        for loop in loops:
            loop.start()
        try:
            await server.serve_until_end(node)
        finally:
            for loop in loops:
                await asyncio.to_thread(loop.stop)
        if node.jobs.fatal is not None:
            raise node.jobs.fatal


async def _engine_statement(engine: EngineClient, timeout: float, max_context: int) -> str:
    """Wait for the engine and read what it is. Raises Unavailable, or ConfigurationError."""
    until = asyncio.get_running_loop().time() + timeout
    information = None
    while information is None:
        try:
            information = await engine.model_info()
        except Unavailable as error:
            if asyncio.get_running_loop().time() > until:
                raise
            log.info("waiting for the engine", error=str(error)[:200])
            await asyncio.sleep(0.5)
    if information.max_model_len < max_context:
        raise ConfigurationError(
            f"the engine's context is {information.max_model_len} tokens, the profile's {max_context}.",
            hint="Start the engine with a --max-model-len of at least the profile's max_context.",
        )
    return information.statement


class _Server(uvicorn.Server):
    """uvicorn, ended by us: running requests are finished as cancelled and receipted before connections close."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener
        self._ended = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process has its own."""
        yield

    def end(self) -> None:
        """Begin to stop."""
        self._ended.set()

    async def serve_until_end(self, node: Node) -> None:
        """Serve until `end`; then drain the node and close."""
        serving = asyncio.ensure_future(self.serve(sockets=[self._listener]))
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        await node.executor.drain(DRAIN_SECONDS)
        self.should_exit = True
        ended.cancel()
        await serving
