"""A gateway process on top of the node tests' small real network: devnet, contracts, scripted engine, node processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from poip_chain.chain.keys import create
from poip_chain.control.gateway.store import GatewayStore
from poip_chain.service.engine.model import chat_template, tokenizer_hash
from poip_chain.spec.objects import ModelSpec
from tests.engines.node_kit import PROFILE, key_of
from tests.engines.tiny_tokenizer import write_tokenizer
from tests.integration.node_world import (
    CONFIG,
    HTTP,
    PASSWORD,
    POIP,
    NodeProcess,
    World,
    _free_port,
    running_world,
    wait_until,
)

MODEL = "tiny"
ESCROW = POIP
_FORKS = multiprocessing.get_context("forkserver")


def run_gateway(config: Path, log: Path, environment: dict[str, str]) -> None:
    """The body of a forked gateway process: as `python -m poip_chain.control.gateway`, with its output in a file."""
    from poip_chain.control.gateway.__main__ import main

    os.environ.update(environment)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main(["--config", str(config)]))


class GatewayProcess:
    """A gateway as a process, with a key of its own that owns tokens and coins and no escrow yet."""

    def __init__(self, world: World, model: Path, model_id: bytes, **settings: Any) -> None:
        self.world, self.model, self.settings = world, model, settings
        self.folder = world.folder / "gateway"
        self.folder.mkdir()
        self.key = key_of(f"gateway of {world.folder}")
        create(self.folder / "key.json", PASSWORD, key=self.key, light=True)
        world.fund(self.key.address)
        world.send(world.network.token.transfer(self.key.address, 100 * POIP))
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model_id = model_id
        store = GatewayStore(self.folder / "gateway.db")
        self.api_key = store.create_key("tests", None, 0)[1]
        store.close()
        self.process: Any = None

    def start(self, crash_at: str = "", *, wait: bool = True) -> None:
        """Start it, to be killed at a crash point if one is named; one that a failed test left behind goes first."""
        self.kill()
        values = {
            "rpc_url": self.world.rpc_url,
            "deployment": str(self.world.deployment_path),
            "data": str(self.folder),
            "key": str(self.folder / "key.json"),
            "port": self.port,
            "escrow_per_node": str(ESCROW),
            "refresh_interval": 0.5,
            "settle_interval": 0.5,
            "request_lifetime": 60,
            "first_token_timeout": 20,
            **self.settings,
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
        lines.append(
            f"models = [{{ name = {json.dumps(MODEL)}, directory = {json.dumps(str(self.model))}, "
            f"model_id = {json.dumps('0x' + self.model_id.hex())} }}]\n"
        )
        config = self.folder / "gateway.toml"
        config.write_text("".join(lines))
        environment = {"POIP_PASSWORD": PASSWORD, "POIP_ALLOW_CRASH_POINTS": "1", "POIP_CRASH_AT": crash_at}
        self.process = _FORKS.Process(
            target=run_gateway, args=(config, self.folder / "gateway.log", environment), daemon=True
        )
        self.process.start()
        if wait:
            wait_until(lambda: self.ready() or self.ended(), 90, lambda: f"the gateway is ready; log: {self.log()}")

    def ready(self) -> bool:
        """Whether it has a node with escrow."""
        with contextlib.suppress(Exception):
            return HTTP.get(f"{self.url}/healthz", timeout=5).status_code == 200
        return False

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process is None or self.process.exitcode is not None

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def stop(self) -> int | None:
        """SIGTERM; the exit status."""
        self.process.terminate()
        self.process.join(60)
        status: int | None = self.process.exitcode
        return status

    def log(self) -> str:
        """What it wrote."""
        path = self.folder / "gateway.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def sdk(self) -> openai.OpenAI:
        """An OpenAI client for it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=60)

    def ledger_rows(self, sql: str) -> list[Any]:
        """Read its ledger from outside."""
        path = self.folder / "ledger.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as db:
            return db.execute(sql).fetchall()

    def spent(self) -> tuple[int, int]:
        """What its one API key has spent, and what is reserved; wei."""
        store = GatewayStore(self.folder / "gateway.db")
        (key,) = store.api_keys()
        store.close()
        return key.spent, key.open


def register_tiny_model(world: World, folder: Path) -> tuple[Path, bytes]:
    """Register a model whose tokenizer is the tiny one; nodes that are added later offer it. (directory, model id)."""
    from eth_hash.auto import keccak

    directory = write_tokenizer(folder / MODEL)
    spec = ModelSpec(
        b"w" * 32, tokenizer_hash(directory), keccak(chat_template(directory).encode()), CONFIG.config_hash()
    )
    world.send(world.network.models.register(spec, CONFIG, "test"))
    world.send(world.network.models.add_profile(spec.model_id(), PROFILE))
    world.model_id = spec.model_id()
    return directory, bytes(spec.model_id())


@contextlib.contextmanager
def running_gateway_world(
    folder: Path, nodes: int = 1, **settings: Any
) -> Iterator[tuple[World, list[NodeProcess], GatewayProcess]]:
    """World, started nodes that are reachable by the registry, and a gateway that is not started yet."""
    with running_world(folder) as world:
        directory, model_id = register_tiny_model(world, folder)
        made = [world.add_node(f"node{number}") for number in range(nodes)]
        for node in made:
            world.send(world.network.registry.set_endpoint(node.address, node.url))
            node.start()
        gateway = GatewayProcess(world, directory, model_id, **settings)
        try:
            yield world, made, gateway
        finally:
            gateway.kill()
