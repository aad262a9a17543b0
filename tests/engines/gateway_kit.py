"""A gateway over scripted nodes and a scripted chain, served on a real port, for tests of the OpenAI API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI

from poip_chain.control.client import KeySigner
from poip_chain.control.gateway.app import configure_logs, create_app, http_client, make_gateway, private_endpoints
from poip_chain.control.gateway.catalogue import Catalogue, ServedModel
from poip_chain.control.gateway.serving import Gateway
from poip_chain.control.gateway.settings import GatewaySettings, ModelEntry
from poip_chain.control.gateway.store import GatewayStore
from poip_chain.control.ledger import Ledger
from poip_chain.service.engine.tokenizer import Tokenizer
from tests.engines.scripted_chain import MODEL_ID, PROFILE, ScriptedChain
from tests.engines.scripted_node import ScriptedNode, private_key
from tests.engines.serving import serving
from tests.engines.tiny_tokenizer import write_tokenizer

T = TypeVar("T")
MODEL = "tiny"
GATEWAY = KeySigner(private_key("gateway"))


@dataclass
class GatewayKit:
    """Parts of a running gateway. `run` executes a coroutine in the gateway's own event loop and returns its result."""

    chain: ScriptedChain
    nodes: list[ScriptedNode]
    gateway: Gateway
    url: str
    api_key: str
    loop: asyncio.AbstractEventLoop = field(repr=False)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    @property
    def node(self) -> ScriptedNode:
        return self.nodes[0]

    def new_key(self, name: str, cap: int | None = None) -> str:
        return self.gateway.store.create_key(name, cap, 0)[1]


def gateway_settings(path: Path, **changes: Any) -> GatewaySettings:
    """Settings with short waits; nothing in them is read but what the parts below use."""
    values: dict[str, Any] = {
        "rpc_url": "http://127.0.0.1:1",
        "deployment": path / "deployment.json",
        "data": path,
        "key": path / "key.json",
        "models": (ModelEntry(name=MODEL, directory=path),),
        "first_token_timeout": 5,
        "token_timeout": 5,
        "connect_timeout": 2,
        "receipt_wait": 5,
        "heartbeat": 5,
        **changes,
    }
    return GatewaySettings(**values)


@contextmanager
def running_gateway(
    path: Path, chain: ScriptedChain, nodes: list[ScriptedNode], *, escrow: int = 10**6, **changes: Any
) -> Iterator[GatewayKit]:
    """Serve a gateway over `nodes`, which this starts; each gets an escrow of `escrow` wei."""
    tokenizer = Tokenizer(write_tokenizer(path / "tokenizer"))
    catalogue = Catalogue([ServedModel(MODEL, bytes(MODEL_ID), 1, PROFILE, tokenizer)])
    settings = gateway_settings(path, **changes)
    ready = threading.Event()
    parts: dict[str, Any] = {}
    configure_logs()
    with ExitStack() as stack:
        stack.callback(structlog.reset_defaults)
        for node in nodes:
            stack.enter_context(node.running())
            chain.fund(GATEWAY.address, node.address, escrow)
        store = GatewayStore(path / "gateway.db")
        stack.callback(store.close)
        domain = chain.vault_domain
        ledger = Ledger(path / "ledger.db", GATEWAY.address, domain, lambda voucher: GATEWAY.sign(voucher, domain))
        stack.callback(ledger.close)
        api_key = store.create_key("tests", None, 0)[1]

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with http_client(private_endpoints(settings, chain)) as http:
                gateway = make_gateway(
                    settings, chain, catalogue, store, ledger, GATEWAY, http, clock=lambda: float(chain.now)
                )
                await gateway.refresh()
                parts.update(gateway=gateway, loop=asyncio.get_running_loop(), app=create_app(gateway))
                ready.set()
                yield
                await gateway.aclose()

        outer = FastAPI(lifespan=lifespan)

        async def forward(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await outer(scope, receive, send)
            else:
                await parts["app"](scope, receive, send)

        url = stack.enter_context(serving(forward, lifespan="on"))
        assert ready.wait(10)
        yield GatewayKit(chain, nodes, parts["gateway"], url, api_key, parts["loop"])
