"""A small real network for the node's integration tests: devnet process, contracts, a scripted engine, node processes.

Everything runs as its own process and is killed at the end. The engine is the scripted one (tests/engines/scripted.py).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from poip_chain.chain.deployment import Deployment, deploy
from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.keys import Key, create, development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain
from poip_chain.economic.network import Network
from poip_chain.economic.onboarding import register_call, stake_call
from poip_chain.economic.profiles import deployment_settings
from poip_chain.economic.types import Offer
from poip_chain.service.node.admission import Served
from poip_chain.spec.objects import ModelConfig, ModelSpec, Profile, Receipt
from poip_chain.spec.types import Address
from tests.engines.node_kit import INPUT_PRICE, OUTPUT_PRICE, PROFILE, Client, key_of, request_hash

ROOT = Path(__file__).resolve().parents[2]
# Nodes are forked from a process that has the imports done: a start takes a fraction of a second instead of some.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["poip_chain.service.node.app"])
# One client for all polling: building one costs a tenth of a second, for a TLS context that is never used. It keeps no
# connection open, so it need not be closed.
HTTP = httpx.Client(verify=False, trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
PASSWORD = "test only"
POIP = 10**18
WINDOWS = {
    "challenge_window": 6,
    "response_window": 20,
    "unbonding_period": 100,
    "thaw_period": 80,
    "jail_period": 5,
    "key_rotation_delay": 5,
    "beacon_delay": 1,
    "audit_rate": 500_000,
    "minimum_stake": 10 * POIP,
    "evidence_window": 600,
    "reveal_window": 5,
    "contest_window": 5,
    "dispute_clock": 12,
}
CONFIG = ModelConfig(64, 128, 2, 4, 2, 16, 1000, 256, 10**7, 10_000, bytes(32), True, False, False, False)
SPEC = ModelSpec(b"w" * 32, b"t" * 32, b"c" * 32, CONFIG.config_hash())


@dataclass(frozen=True)
class RegisteredModel:
    """What is registered on chain as the world's one model."""

    spec: ModelSpec
    config: ModelConfig
    profile: Profile


TINY = RegisteredModel(SPEC, CONFIG, PROFILE)
"""The scripted engine's."""


def wait_until(condition: Callable[[], Any], timeout: float = 60.0, what: str | Callable[[], str] = "") -> Any:
    """The first true value of `condition`; fails the test after `timeout` seconds, with `what` as it is then."""
    until = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"not within {timeout:.0f} s: {what() if callable(what) else what or condition}")
        time.sleep(0.05)


def run_node(config: Path, log: Path, environment: dict[str, str]) -> None:
    """The body of a forked node process: as `python -m poip_chain.service.node`, with its output in a file."""
    from poip_chain.service.node.__main__ import main

    os.environ.update(environment)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main(["--config", str(config)]))


class EngineProcess:
    """The scripted engine as a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start (again, on the same port)."""
        ready = self._folder / "engine.port"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.engines.scripted", "--port", str(self.port), "--port-file", str(ready)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(ready.exists, 60, "the engine starts")

    def fault(self, name: str, after: int = 0) -> None:
        """Switch a fault on, or off with 'none'."""
        HTTP.post(f"{self.url}/faults", json={"fault": name, "after": after}).raise_for_status()

    def pace(self, seconds: float) -> None:
        """Pause before each token."""
        HTTP.post(f"{self.url}/pace", json={"seconds": seconds}).raise_for_status()

    def stats(self) -> dict[str, int]:
        """Counters."""
        counters: dict[str, int] = HTTP.get(f"{self.url}/stats").json()
        return counters

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


@dataclass
class NodeProcess:
    """A node as a process: started, crashed and started again on the same data."""

    world: World
    key: Key
    folder: Path
    settings: dict[str, Any]
    process: Any = None
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(
            self.world.served(self.key.address), key_of(f"client of {self.folder.name}"), int(time.time())
        )

    @property
    def address(self) -> Address:
        """The node's name."""
        return self.key.address

    def start(self, crash_at: str = "", *, wait: bool = True) -> None:
        """Start it, to be killed at a crash point if one is named."""
        values = {
            "rpc_url": self.world.rpc_url,
            "deployment": str(self.world.deployment_path),
            "data": str(self.folder),
            "key": str(self.folder / "key.json"),
            "port": self.port,
            "engine_url": self.world.engine.url,
            "batch_count": 2,
            "batch_age": 2.0,
            "poll_interval": 0.2,
            "retry_delay": 0.5,
            "finality_blocks": 1,
            "voucher_patience": 600.0,
            "startup_timeout": 60.0,
            **self.settings,
        }
        config = self.folder / "node.toml"
        config.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in values.items()))
        environment = {"POIP_PASSWORD": PASSWORD, "POIP_ALLOW_CRASH_POINTS": "1", "POIP_CRASH_AT": crash_at}
        self.process = FORKS.Process(target=run_node, args=(config, self.folder / "node.log", environment), daemon=True)
        self.process.start()
        if wait:
            wait_until(lambda: self.up() or self.ended(), 90, "the node starts")

    def up(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.HTTPError):
            return HTTP.get(f"{self.url}/v1/info", timeout=5).status_code == 200
        return False

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process is None or self.process.exitcode is not None

    def wait_crashed(self, timeout: float = 60.0) -> None:
        """Wait for the crash point."""
        assert self.process is not None
        wait_until(self.ended, timeout, f"the crash; log: {self.log()[-1500:]}")
        assert self.process.exitcode == -signal.SIGKILL, self.log()[-3000:]

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def stop(self) -> int | None:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.terminate()
        self.process.join(60)
        status: int | None = self.process.exitcode
        return status

    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "node.log").read_text(errors="replace")

    def rows(self, sql: str) -> list[Any]:
        """Read its database from outside."""
        path = self.folder / "node.db"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as db:
            return db.execute(sql).fetchall()

    def receipts(self) -> list[Receipt]:
        """All receipts in its database."""
        return [Receipt.from_json(json.loads(row[0])) for row in self.rows("SELECT receipt FROM receipts ORDER BY seq")]

    def ask(self, body: dict[str, Any]) -> Receipt | None:
        """Send a request; its receipt, or None if the node went away or failed."""
        try:
            response = HTTP.post(f"{self.url}/v1/requests", json=body, timeout=60)
        except httpx.HTTPError:
            return None
        if response.status_code != 200:
            return None
        for block in response.text.split("\n\n"):
            if block.startswith("event: receipt"):
                return Receipt.from_json(json.loads(block.split("data: ", 1)[1])["receipt"])  # type: ignore[no-any-return]
        return None

    def pay(self, receipt: Receipt) -> bool:
        """Give the voucher for a receipt; False if the node went away."""
        try:
            voucher = self.client.voucher(receipt.payer_cum, receipt)
            return HTTP.post(f"{self.url}/v1/vouchers", json=voucher, timeout=30).status_code == 204
        except httpx.HTTPError:
            return False

    def fetch(self, body: dict[str, Any]) -> httpx.Response:
        """GET the receipt of a request."""
        return HTTP.get(f"{self.url}/v1/requests/0x{request_hash(body).hex()}", timeout=30)


class World:
    """See the module's docstring. The contracts are deployed with a block per transaction first."""

    def __init__(
        self, rpc_url: str, folder: Path, windows: dict[str, int], model: RegisteredModel, engine: Any
    ) -> None:
        self.rpc_url, self.folder, self.model = rpc_url, folder, model
        self.chain = Chain(rpc_url, timeout=30)
        self.operator = development_key(0)
        self.deployment_path = folder / "deployment.json"
        settings = deployment_settings("standard", values={**WINDOWS, **windows})
        self.deployment: Deployment = deploy(
            self.chain, self.operator, settings, self.deployment_path, outbox_path=folder / "operator.db", timeout=120
        )
        self.network = Network(self.chain, self.deployment)
        self.outbox = Outbox(self.chain, self.operator, folder / "operator.db")
        self._calls = 0
        self.model_id = model.spec.model_id()
        self.send(self.network.models.register(model.spec, model.config, "test"))
        self.send(self.network.models.add_profile(self.model_id, model.profile))
        self.send(self.network.token.approve(self.network.vault.address, 10**30))
        self.engine = engine or EngineProcess(folder)
        self.nodes: list[NodeProcess] = []

    def send(self, call: Call) -> None:
        """The operator's transaction, mined."""
        self._calls += 1
        self.outbox.execute(call, f"test:{self._calls}", 120)

    def served(self, node: Address) -> Served:
        """What every node here serves."""
        domains = self.network.domain("log"), self.network.domain("vault")
        return Served(node, self.model_id, 1, self.model.profile, INPUT_PRICE, OUTPUT_PRICE, *domains)

    def fund(self, address: Address) -> None:
        """Coins for gas."""
        self.chain.request("anvil_setBalance", address, hex(1000 * 10**18))

    def add_node(self, name: str, **settings: Any) -> NodeProcess:
        """Register, stake and offer; deposit for its client. Not started yet."""
        folder = self.folder / name
        folder.mkdir()
        key = key_of(f"{name} of {self.folder}")
        create(folder / "key.json", PASSWORD, key=key, light=True)
        peer = key_of(f"peer {name} of {self.folder}")
        self.fund(key.address)
        self.send(register_call(self.network, self.operator.address, key, peer, self.operator.address, "http://x"))
        self.send(stake_call(self.network, self.operator, key.address, 1000 * POIP))
        self.send(self.network.registry.set_offer(key.address, Offer(self.model_id, 1, INPUT_PRICE, OUTPUT_PRICE)))
        node = NodeProcess(self, key, folder, settings)
        self.send(self.network.vault.deposit(node.client.address, key.address, POIP))
        self.nodes.append(node)
        return node

    def interval(self, seconds: float) -> None:
        """Blocks at this pace from now on, empty ones too; 0: one for each transaction."""
        if seconds:
            self.chain.request("evm_setIntervalMining", seconds)
        else:
            self.chain.request("evm_setAutomine", True)

    def pass_time(self, seconds: int) -> None:
        """Let chain time run ahead."""
        self.chain.request("evm_increaseTime", seconds)

    def close(self) -> None:
        """End all processes."""
        for node in self.nodes:
            node.kill()
        self.engine.close()
        self.outbox.close()
        self.chain.close()


@contextlib.contextmanager
def running_world(
    folder: Path, *, model: RegisteredModel = TINY, engine: Any = None, **windows: int
) -> Iterator[World]:
    """A world that lives as long as the block; blocks come one per transaction until `interval` is called.

    engine: something with `url` and `close()` in place of the scripted engine. windows: parameters other than WINDOWS.
    """
    with running_devnet() as url:
        world = World(url, folder, windows, model, engine)
        try:
            yield world
        finally:
            world.close()


def _toml(value: Any) -> str:
    """A value as TOML writes it; a dictionary as an inline table."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(entry)}" for name, entry in value.items()) + "}"
    return json.dumps(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
