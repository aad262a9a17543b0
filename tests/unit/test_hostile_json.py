"""Whoever sends or writes us JSON cannot end the process by nesting it: every reader refuses in its own terms.

Where the recursion limit is high (web3 raises it), a reader without a bound would not fail these tests but kill them;
so they run with Python's usual limit, at which it fails with a RecursionError.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import poip_chain
from poip_chain.canonical.weights import SafeTensors, read_config
from poip_chain.chain.deployment import Deployment
from poip_chain.chain.keys import address_of
from poip_chain.chain.rpc import Chain
from poip_chain.cli.commands.chat import _first_model
from poip_chain.cli.commands.gateway import nodes
from poip_chain.cli.commands.model import _read_profile
from poip_chain.errors import PoipError
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.fetch import NodeReader
from poip_chain.proof.reexecution import Answer, EngineSource
from poip_chain.service.engine import model
from poip_chain.service.engine.client import EngineClient
from poip_chain.service.engine.tokenizer import Tokenizer
from tests.engines.serving import serving
from tests.support.records import batch_of, record

PACKAGE = Path(poip_chain.__file__).parent
DEEP = '{"a":' * 2_000  # short enough for every bound of size

# Files that read with Python's own parser, and why they may: each reads only what this program wrote itself.
OWN_JSON = {
    "spec/strict_json.py": "after it has measured the depth",
    "chain/artifacts.py": "its cache of compiled contracts",
    "chain/devnet/ledger.py": "the devnet's database",
    "chain/devnet/overrides.py": "the devnet's database",
    "chain/follower.py": "the follower's database",
    "chain/outbox_store.py": "the outbox's database",
    "canonical/weights.py": "its cache of canonical weights",
    "cli/local/processes.py": "the list of processes that `poip up` has started",
    "control/ledger.py": "the gateway's database: objects that were parsed before",
    "proof/accusations.py": "the watchtower's database: its own claims",
    "proof/cases.py": "the watchtower's database",
    "proof/store.py": "the watchtower's database: objects that were parsed before",
    "service/engine/default_model.py": "the model that was just converted",
    "service/node/receipts.py": "the node's database: objects that were parsed before",
    "service/node/store.py": "the node's database: objects that were parsed before",
}
"""A new reader of what others send or write belongs to poip_chain.spec.strict_json, not into this list."""


@pytest.fixture(autouse=True)
def usual_recursion_limit() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.fixture(scope="module")
def deep_server() -> Iterator[str]:
    async def deep(request: Request) -> Response:
        return Response(DEEP, media_type="application/json")

    with serving(Starlette(routes=[Route("/{path:path}", deep, methods=["GET", "POST"])])) as url:
        yield url


def engine_info(url: str) -> Any:
    async def ask() -> Any:
        client = EngineClient(url, "model")
        try:
            return await client.model_info()
        finally:
            await client.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "ask",
    [
        lambda url: Chain(url).block_number(),
        lambda url: Chain(url).logs({}),
        engine_info,
        lambda url: list(EngineSource(url).rows([Answer((1,), (2,))])),
        lambda url: NodeReader(url, 5).receipts(batch_of(record())),
        _first_model,
        lambda url: nodes.callback.__wrapped__(None, url),  # type: ignore[union-attr]
    ],
    ids=["rpc", "logs", "engine", "re-execution", "node", "chat", "gateway"],
)
def test_answers(deep_server: str, ask: Callable[[str], Any]) -> None:
    with pytest.raises(PoipError):
        ask(deep_server)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("deployment.json", Deployment.load),
        ("key.json", address_of),
        ("profile.json", _read_profile),
        ("evidence.json", Evidence.read),
        ("config.json", lambda path: model.model_config(path.parent)),
        ("config.json", lambda path: read_config(path.parent)),
        ("tokenizer_config.json", lambda path: model.chat_template(path.parent)),
        ("tokenizer_config.json", lambda path: Tokenizer(path.parent)),
    ],
)
def test_files(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / name
    path.write_text(DEEP)
    path.chmod(0o600)
    with pytest.raises(PoipError):
        read(path)


def test_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(PoipError):
        SafeTensors(tmp_path)


def test_pythons_own_parser_reads_only_what_we_wrote() -> None:
    pattern = re.compile(r"\bjson\.loads?\(|\b(?:response|reply|answer)\.json\(\)|raw_decode|JSONDecoder|orjson")
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text("utf-8"))
    }
    assert found == set(OWN_JSON)
