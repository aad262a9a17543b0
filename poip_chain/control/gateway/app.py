"""The gateway's process and its HTTP face: the OpenAI API over `Gateway`.

    POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/{model}
    GET /poip/v1/nodes     what the gateway knows of each node, and why it would not choose it
    GET /healthz, GET /metrics

`run(settings)` blocks until SIGTERM or SIGINT. Bodies are bounded and parsed here, strictly; keys, prompts and answers
are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.endpoints import DEVELOPMENT_CHAIN, node_transport
from poip_chain.chain.keys import Key, load, password_from
from poip_chain.chain.listening import bound_socket
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.control.client import KeySigner, NodeClient, Timeouts
from poip_chain.control.gateway.asks import Ask, chat_ask, completion_ask
from poip_chain.control.gateway.catalogue import Catalogue, ServedModel, load_catalogue
from poip_chain.control.gateway.errors import ApiError, error_response
from poip_chain.control.gateway.escrow import EscrowManager, EscrowPolicy, OutboxTreasury
from poip_chain.control.gateway.metrics import Metrics
from poip_chain.control.gateway.responses import answer_response
from poip_chain.control.gateway.serving import Gateway
from poip_chain.control.gateway.settings import GatewaySettings
from poip_chain.control.gateway.store import ApiKey, GatewayStore
from poip_chain.control.ledger import Ledger
from poip_chain.control.nodes import NodeDirectory
from poip_chain.control.view import ChainView, NetworkView
from poip_chain.economic.network import Network
from poip_chain.errors import InvalidInput, PoipError, Unavailable
from poip_chain.spec.objects import Voucher
from poip_chain.spec.strict_json import parse_json_object

log = structlog.get_logger("poip.gateway")

KEEPALIVE_SECONDS = 2.0
"""Shorter than servers keep idle connections, so that a request is not sent into one that is just being closed."""
DRAIN_SECONDS = 15
TOKENISING_THREADS = 2
BUSY_SECONDS = 0.5
"""Between rounds of a background job that has more to do."""

MakeAsk = Callable[[dict[str, Any], Catalogue, int], Ask]


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="PoIP gateway", docs_url=None, redoc_url=None, openapi_url=None)
    settings, metrics = gateway.settings, gateway.metrics
    # Threads of their own: long texts must not keep running streams from the threads that account for them.
    tokenising = ThreadPoolExecutor(TOKENISING_THREADS, thread_name_prefix="tokenise")

    async def authenticated(http: Request) -> ApiKey | None:
        header = http.headers.get("authorization", "")
        scheme, _, token = header.partition(" ")
        key = None
        if scheme.lower() == "bearer" and token:
            key = await asyncio.to_thread(gateway.store.authenticate, token.strip())
        if key is None and settings.require_api_key:
            raise ApiError(
                401,
                "invalid_api_key",
                "no valid API key was given.",
                hint="Send `Authorization: Bearer <key>`; `poip gateway key new` makes one.",
            )
        return key

    async def guarded(http: Request, endpoint: str, work: Callable[[], Awaitable[Response]]) -> Response:
        """Run a handler; every deliberate error becomes an OpenAI error body."""
        begun = time.monotonic()
        try:
            response = await work()
        except PoipError as error:
            response = error_response(error)
            if response.status_code >= 500:
                log.warning("request failed", endpoint=endpoint, code=error.code, status=response.status_code)
        except Exception as error:  # the last line of defence: an unforeseen fault must not show its insides
            log.error("unexpected error", endpoint=endpoint, kind=type(error).__name__)
            response = error_response(PoipError("an unexpected error"))
        metrics.requests.labels(endpoint=endpoint, status=str(response.status_code)).inc()
        metrics.response_seconds.observe(time.monotonic() - begun)
        return response

    async def complete(http: Request, make: MakeAsk) -> Response:
        key = await authenticated(http)
        body = await read_body(http, settings.max_body_bytes, settings.body_timeout)
        if gateway.running >= settings.max_concurrent:
            raise ApiError(429, "busy", f"the gateway serves {settings.max_concurrent} requests already.")
        # The place is taken before the text is looked at: tokenising is work, too. The answer takes it over.
        gateway.running += 1
        try:
            loop, tokens = asyncio.get_running_loop(), settings.default_max_tokens
            ask = await loop.run_in_executor(tokenising, make, body, gateway.catalogue, tokens)
        finally:
            gateway.running -= 1
        return await answer_response(gateway, ask, key, http)

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        return await guarded(http, "chat", lambda: complete(http, chat_ask))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await guarded(http, "completions", lambda: complete(http, completion_ask))

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        async def work() -> Response:
            await authenticated(http)
            data = [_model_json(gateway, model) for model in gateway.catalogue.models]
            return JSONResponse({"object": "list", "data": data})

        return await guarded(http, "models", work)

    @app.get("/v1/models/{name:path}")
    async def model(http: Request, name: str) -> Response:
        async def work() -> Response:
            await authenticated(http)
            return JSONResponse(_model_json(gateway, gateway.catalogue.get(name)))

        return await guarded(http, "models", work)

    @app.get("/poip/v1/nodes")
    async def nodes(http: Request) -> Response:
        async def work() -> Response:
            await authenticated(http)
            return JSONResponse({"nodes": await asyncio.to_thread(_nodes_json, gateway)})

        return await guarded(http, "nodes", work)

    @app.get("/healthz")
    async def health() -> Response:
        usable = await gateway.usable_nodes()
        status = {"status": "ok" if usable else "no usable node with escrow", "usable_nodes": usable}
        return JSONResponse(status, 200 if usable else 503)

    @app.get("/metrics")
    async def exposition() -> Response:
        metrics.running.set(gateway.running)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(404)
    async def unknown_path(http: Request, _: Exception) -> Response:
        return error_response(ApiError(404, "unknown_url", f"there is no {http.method} {http.url.path[:100]} here."))

    @app.exception_handler(405)
    async def wrong_method(http: Request, _: Exception) -> Response:
        return error_response(
            ApiError(405, "method_not_allowed", f"{http.url.path[:100]} does not take {http.method}.")
        )

    return app


async def read_body(http: Request, limit: int, timeout: float) -> dict[str, Any]:
    """The JSON object in a request's body. Raises ApiError for one that is too large, too slow or malformed."""
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in http.stream():
                raw += chunk
                if len(raw) > limit:
                    raise ApiError(413, "request_too_large", f"the body is larger than {limit} bytes.")
    except TimeoutError:
        raise ApiError(408, "request_timeout", f"the body did not come within {timeout:g} seconds.") from None
    except ClientDisconnect:
        raise ApiError(400, "invalid_request", "the body is incomplete.") from None
    try:
        return parse_json_object(bytes(raw))
    except InvalidInput as error:
        raise ApiError(400, "invalid_json", error.message) from None


def _model_json(gateway: Gateway, model: ServedModel) -> dict[str, Any]:
    offers = [
        offer
        for standing in gateway.directory.standings()
        if not standing.unfit
        for offer in standing.node.offers
        if (offer.model_id, offer.profile_version) == (model.model_id, model.profile_version)
    ]
    cheapest = min(offers, key=lambda offer: offer.input_price + offer.output_price, default=None)
    profile = model.profile
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "poip",
        "poip": {
            "model_id": "0x" + model.model_id.hex(),
            "profile_version": model.profile_version,
            "max_context": profile.max_context,
            "temperature": {"min": profile.min_temperature_milli / 1000, "max": profile.max_temperature_milli / 1000},
            "nodes": len(offers),
            "input_price": None if cheapest is None else str(cheapest.input_price),
            "output_price": None if cheapest is None else str(cheapest.output_price),
        },
    }


def _nodes_json(gateway: Gateway) -> list[dict[str, Any]]:
    now = gateway.directory.clock()
    rows = []
    for standing in gateway.directory.standings():
        account = gateway.client.ledger.account(standing.node.address)
        reason = account.blocked and f"blocked after a wrong answer: {account.blocked}"
        reason = reason or standing.unfit or (standing.last_failure if standing.benched_until > now else "")
        rows.append(
            {
                "node": standing.node.address,
                "endpoint": standing.node.endpoint,
                "why_not_chosen": reason or None,
                "running": standing.running,
                "capacity": standing.capacity,
                "success_ratio": round(standing.success, 4),
                "first_token_seconds": standing.first_token,
                "seconds_per_token": standing.per_token,
                "accepted": str(account.accepted),
                "promised": str(account.signed),
            }
        )
    return rows


# --- the process -----------------------------------------------------------------------------------------------


def run(settings: GatewaySettings) -> None:
    """Run a gateway until SIGTERM or SIGINT. Raises PoipError if it cannot start."""
    configure_logs()
    with contextlib.ExitStack() as stack:
        key = load(settings.key, password_from(settings.password_file))
        deployment = Deployment.load(settings.deployment)
        listener = stack.enter_context(bound_socket(settings.host, settings.port, "gateway"))
        chain = Chain(settings.rpc_url, settings.rpc_timeout)
        stack.callback(chain.close)
        network = Network(chain, deployment)
        _patiently(network.check, settings.startup_timeout)
        view = NetworkView(network)
        catalogue = _patiently(lambda: load_catalogue(view, settings.models), settings.startup_timeout)
        store = GatewayStore(settings.data / "gateway.db")
        stack.callback(store.close)
        ledger = open_ledger(settings.data / "ledger.db", key, view)
        stack.callback(ledger.close)
        escrow = None
        if settings.escrow_per_node:
            outbox = _patiently(
                lambda: Outbox(chain, key, settings.data / "outbox" / f"{key.address}.db"), settings.startup_timeout
            )
            stack.callback(outbox.close)
            low = settings.escrow_low_water
            policy = EscrowPolicy(
                target=settings.escrow_per_node,
                low_water=settings.escrow_per_node // 2 if low is None else low,
                total=settings.escrow_total,
                thaw_after=settings.escrow_thaw_after,
            )
            treasury = OutboxTreasury(view, outbox, key)
            escrow = EscrowManager(
                settings.data / "escrow.db",
                treasury,
                ledger,
                policy,
                lambda node: view.forget_escrow(key.address, node),
            )
            stack.callback(escrow.close)
        asyncio.run(_serve(settings, view, catalogue, store, ledger, key, escrow, listener))


def open_ledger(path: Path, key: Key, view: ChainView) -> Ledger:
    """The ledger of a key, which signs vouchers for it."""
    signer = KeySigner(key.private_key)

    def sign(voucher: Voucher) -> bytes:
        return signer.sign(voucher, view.vault_domain)

    return Ledger(path, key.address, view.vault_domain, sign)


def private_endpoints(settings: GatewaySettings, view: ChainView) -> bool:
    """Whether nodes at private addresses are called."""
    wanted = settings.private_endpoints
    return view.chain_id == DEVELOPMENT_CHAIN if wanted is None else wanted


def http_client(private_allowed: bool) -> httpx.AsyncClient:
    """The HTTP client for nodes: no redirects, no proxies or cookies from the environment, few idle connections."""
    limits = httpx.Limits(max_connections=1024, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_SECONDS)
    transport = node_transport(private_allowed, limits=limits)
    return httpx.AsyncClient(transport=transport, follow_redirects=False, trust_env=False)


def make_gateway(
    settings: GatewaySettings,
    view: ChainView,
    catalogue: Catalogue,
    store: GatewayStore,
    ledger: Ledger,
    signer: KeySigner,
    http: httpx.AsyncClient,
    escrow: EscrowManager | None = None,
    clock: Callable[[], float] = time.time,
) -> Gateway:
    """Put a gateway together from its parts."""
    timeouts = Timeouts(
        connect=settings.connect_timeout,
        first_token=settings.first_token_timeout,
        between_tokens=settings.token_timeout,
        call=min(10.0, settings.token_timeout),
    )
    return Gateway(
        settings=settings,
        chain=view,
        client=NodeClient(http, signer, view, ledger, timeouts, settings.allow_prepaid, clock),
        directory=NodeDirectory(view, http, private_endpoints(settings, view)),
        catalogue=catalogue,
        store=store,
        metrics=Metrics(),
        escrow=escrow,
        clock=clock,
    )


async def _serve(
    settings: GatewaySettings,
    view: NetworkView,
    catalogue: Catalogue,
    store: GatewayStore,
    ledger: Ledger,
    key: Key,
    escrow: EscrowManager | None,
    listener: socket.socket,
) -> None:
    async with http_client(private_endpoints(settings, view)) as http:
        clock = await ChainClock.of(view)
        gateway = make_gateway(
            settings, view, catalogue, store, ledger, KeySigner(key.private_key), http, escrow, clock
        )
        config = uvicorn.Config(
            create_app(gateway),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        server = _Server(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.end)
        log.info("gateway starts", address=key.address, port=settings.port, models=len(catalogue.models))
        jobs = [
            asyncio.create_task(_repeat("refresh", gateway.refresh, settings.refresh_interval)),
            asyncio.create_task(_repeat("settle", gateway.settle, settings.settle_interval)),
            asyncio.create_task(_repeat("escrow", gateway.tend_escrow, settings.settle_interval)),
            asyncio.create_task(_repeat("clock", clock.step, settings.refresh_interval)),
        ]
        try:
            await server.serve(sockets=[listener])
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await gateway.aclose()


class ChainClock:
    """The later of wall clock and chain time, in Unix seconds: nodes date requests by it (a devnet may run ahead)."""

    def __init__(self, view: ChainView, lead: float) -> None:
        self._view, self._lead = view, lead

    @classmethod
    async def of(cls, view: ChainView) -> ChainClock:
        """A clock that has been set."""
        clock = cls(view, 0.0)
        with contextlib.suppress(Unavailable):
            await clock.step()
        return clock

    async def step(self) -> None:
        """Look at the chain's time again."""
        self._lead = max(0.0, await asyncio.to_thread(self._view.timestamp) - time.time())

    def __call__(self) -> float:
        return time.time() + self._lead


async def _repeat(name: str, step: Callable[[], Awaitable[bool | None]], interval: float) -> None:
    """Call `step` for ever, soon again if it says that more is to do. A fault of one round is logged and survived."""
    while True:
        pause = interval
        try:
            if await step():
                pause = min(interval, BUSY_SECONDS)
        except PoipError as error:
            log.warning("background round failed", job=name, code=error.code, error=str(error)[:300])
        except Exception as error:
            log.error("background round failed", job=name, kind=type(error).__name__, error=str(error)[:300])
        await asyncio.sleep(pause)


def _patiently(work: Callable[[], Any], timeout: float) -> Any:
    """Call `work` until the chain answers. Raises Unavailable after `timeout` seconds."""
    until = time.monotonic() + timeout
    while True:
        try:
            return work()
        except Unavailable as error:
            if time.monotonic() >= until:
                raise
            log.info("waiting for the chain", error=str(error)[:200])
            time.sleep(0.5)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process has its own."""
        yield

    def end(self) -> None:
        """Begin to stop."""
        self.should_exit = True


def configure_logs() -> None:
    """JSON lines on standard error: time, level, event, fields. Keys, prompts and answers are never among the fields."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
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
