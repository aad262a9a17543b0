"""A whole network on this machine: devnet, contracts, engines, nodes, gateway, watchtower, each its own process.

Used by `poip demo` and `poip up`. One of the nodes is a cheat on purpose: it serves degraded weights under the true
model's name, hands over its first audited transcript and withholds later ones; accused, it contests to the last step.
`start_liar` adds somebody who accuses an honest one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from poip_chain.chain.deployment import Deployment, deploy
from poip_chain.chain.keys import Key, create_development_key, development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain
from poip_chain.cli.local.processes import Program, Supervisor, in_own_process, preferred_port
from poip_chain.economic.money import TOKEN
from poip_chain.economic.network import Network
from poip_chain.economic.onboarding import register_call, stake_call
from poip_chain.economic.profiles import deployment_settings, model_profile
from poip_chain.economic.types import Offer
from poip_chain.service.engine.model import ModelHashes, prepare, prepare_default

MODEL_NAME = "smollm2-135m-instruct"
MAX_CONTEXT = 1024
SEQUENCES = 2
"""Requests that one engine runs at a time. Three engines with room for more would not fit into 10 GB in float32."""
STAKE = 1_000 * TOKEN
INPUT_PRICE = 2 * 10**13
OUTPUT_PRICE = 10**14
DEGRADATION = "int4"
CHEAT_PRICE_PERCENT = 90
"""The cheat undercuts the others: that is what serving a cheaper model is for."""
ESCROW_PER_NODE = 50 * TOKEN
BOND_BUDGET = 25 * TOKEN
BATCH_AGE = 5.0
DEPLOYER, GATEWAY, WATCHTOWER, FIRST_OPERATOR, LIAR = 0, 1, 2, 3, 6

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LocalNode:
    """One node of the local network. `degradation` '' for an honest one."""

    name: str
    operator: Key
    node_key: Key
    port: int
    engine_port: int
    model: Path
    degradation: str

    @property
    def url(self) -> str:
        """Where the node serves."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Liar:
    """`ready` exists once its engine is open; it accuses the answer in the file `evidence` when that is there."""

    ready: Path
    evidence: Path


class LocalNetwork:
    """See the module's docstring. `directory` is made anew; `tell` gets a line for each step."""

    def __init__(self, directory: Path, tell: Tell) -> None:
        self.directory = directory.absolute()
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        self._tell = tell
        self.supervisor = Supervisor(self.directory)
        self.rpc_url = f"http://127.0.0.1:{preferred_port(8545)}"
        self.gateway_url = f"http://127.0.0.1:{preferred_port(8800)}"
        self.deployment_path = self.directory / "deployment.json"
        self.nodes: list[LocalNode] = []
        self.hashes: ModelHashes | None = None
        self.network: Network | None = None

    def start(self, models: Path, model: Path | None = None) -> Network:
        """Bring everything up and return once the gateway answers. `models` is where prepared models are kept.

        Raises Unavailable with the end of a log if a process does not come up.
        """
        devnet = self._devnet()
        self.supervisor.start(devnet)
        with ThreadPoolExecutor(1, "deploy") as beside:
            # Compiling the contracts takes half a minute of one core, preparing the model more than a minute of another.
            deployed = beside.submit(self._deploy, devnet)
            true_model = (model or models / MODEL_NAME).absolute()
            cheap_model = models / f"{true_model.name}-{DEGRADATION}"
            self._tell(f"preparing the model {true_model.name}")
            in_own_process(_make_models, true_model, model is None, cheap_model, tell=self._tell)
            self.hashes = prepare(true_model)
            self._tell(f"  model id 0x{self.hashes.model_id.hex()}")
            self._make_nodes(true_model, cheap_model)
            engines = [self._engine(node) for node in self.nodes]
            self._tell("starting three vLLM engines (they take one to three minutes)")
            for engine in engines:
                self.supervisor.start(engine)
            network = deployed.result()
        self._register(network)
        self.supervisor.wait(engines, self._ready)
        services = [*(self._node(node) for node in self.nodes), self._gateway(), self._watchtower(true_model)]
        for program in services:
            self.supervisor.start(program)
        self.supervisor.wait(services, self._ready)
        self._write_summary()
        return network

    def _ready(self, name: str, seconds: float) -> None:
        self._tell(f"  {name} is ready ({seconds:.0f} s)")

    def _make_nodes(self, true_model: Path, cheap_model: Path) -> None:
        for number, (name, model, degradation) in enumerate(
            (("alpha", true_model, ""), ("bravo", true_model, ""), ("cheat", cheap_model, DEGRADATION))
        ):
            self.nodes.append(
                LocalNode(
                    name=name,
                    operator=development_key(FIRST_OPERATOR + number),
                    node_key=create_development_key(self._keys / f"{name}.json"),
                    port=preferred_port(8701 + number),
                    engine_port=preferred_port(8601 + number),
                    model=model,
                    degradation=degradation,
                )
            )

    @property
    def _keys(self) -> Path:
        return self.directory / "keys"

    def _devnet(self) -> Program:
        port = self.rpc_url.rsplit(":", 1)[1]
        arguments = ["--port", port, "--db", str(self.directory / "devnet.db"), "--block-time", "1"]
        return Program("devnet", [sys.executable, "-m", "poip_chain.chain.devnet", *arguments], ready_port=int(port))

    def _engine(self, node: LocalNode) -> Program:
        arguments = [
            "--model", str(node.model), "--port", str(node.engine_port), "--max-model-len", str(MAX_CONTEXT),
            "--max-num-seqs", str(SEQUENCES), "--kv-cache-tokens", str(SEQUENCES * MAX_CONTEXT),
            "--log-file", str(self.supervisor.log_path(f"engine-{node.name}-vllm")),
        ]  # fmt: skip
        return Program(
            f"engine-{node.name}",
            [sys.executable, "-m", "poip_chain.service.engine.server", *arguments],
            ready_url=f"http://127.0.0.1:{node.engine_port}/health",
            ready_timeout=480.0,
        )

    def _deploy(self, devnet: Program) -> Network:
        self.supervisor.wait([devnet], self._ready)
        self._tell("compiling and deploying the contracts")
        settings = deployment_settings("devnet")
        with Chain(self.rpc_url) as chain:
            deploy(chain, development_key(DEPLOYER), settings, self.deployment_path)
        self._tell("the contracts are deployed")
        self.network = Network(Chain(self.rpc_url), Deployment.load(self.deployment_path))
        return self.network

    def outbox(self, key: Key) -> Outbox:
        """The outbox of one of the network's own keys."""
        assert self.network is not None
        return Outbox(self.network.chain, key, self.directory / "outbox" / f"{key.address}.db")

    def _register(self, network: Network) -> None:
        assert self.hashes is not None
        self._tell("registering the model and three nodes, each with its stake")
        profile = model_profile(self.hashes.config, self.hashes.end_token_ids, MAX_CONTEXT)
        with self.outbox(development_key(DEPLOYER)) as outbox:
            outbox.execute(network.models.register(self.hashes.spec, self.hashes.config, ""), "model")
            outbox.execute(network.models.add_profile(self.hashes.model_id, profile), "profile")
            for node in self.nodes:
                # Node keys send batches; the chain's own coin pays for that.
                outbox.execute(_coins(node.node_key), f"coins:{node.name}")
        for node in self.nodes:
            peer_key = create_development_key(self._keys / f"{node.name}-peer.json")
            percent = CHEAT_PRICE_PERCENT if node.degradation else 100
            offer = Offer(self.hashes.model_id, 1, INPUT_PRICE * percent // 100, OUTPUT_PRICE * percent // 100)
            operator = node.operator
            with self.outbox(operator) as outbox:
                register = register_call(network, operator.address, node.node_key, peer_key, operator.address, node.url)
                outbox.execute(register, f"register:{node.name}")
                outbox.execute(stake_call(network, operator, node.node_key.address, STAKE), f"stake:{node.name}")
                outbox.execute(network.registry.set_offer(node.node_key.address, offer), f"offer:{node.name}")

    def _node(self, node: LocalNode) -> Program:
        directory = self.directory / "nodes" / node.name
        directory.mkdir(parents=True)
        settings = {
            "rpc_url": self.rpc_url,
            "deployment": str(self.deployment_path),
            "data": str(directory),
            "key": str(self._keys / f"{node.name}.json"),
            "port": node.port,
            "engine_url": f"http://127.0.0.1:{node.engine_port}",
            "capacity": SEQUENCES,
            "batch_age": BATCH_AGE,
            "withdraw_threshold": 1,
            "misbehave": "withhold_after=1,contest" if node.degradation else "none",
            # In court the cheat, too, needs the model that it claims to serve.
            "court": {"model": str(self.nodes[0].model)},
        }
        return self._configured(f"node-{node.name}", "poip_chain.service.node", settings, f"{node.url}/healthz")

    def _gateway(self) -> Program:
        create_development_key(self._keys / "gateway.json", GATEWAY)
        settings = {
            "rpc_url": self.rpc_url,
            "deployment": str(self.deployment_path),
            "data": str(self.directory / "gateway"),
            "key": str(self._keys / "gateway.json"),
            "port": int(self.gateway_url.rsplit(":", 1)[1]),
            "require_api_key": False,
            "escrow_per_node": str(ESCROW_PER_NODE),
            "refresh_interval": 2.0,
            "default_max_tokens": 64,
            "models": [{"name": MODEL_NAME, "directory": str(self.nodes[0].model)}],
        }
        return self._configured("gateway", "poip_chain.control.gateway", settings, f"{self.gateway_url}/healthz")

    def _configured(self, name: str, module: str, settings: dict[str, object], ready_url: str) -> Program:
        path = self.directory / "settings" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))
        return Program(name, [sys.executable, "-m", module, "--config", str(path)], ready_url=ready_url)

    def _watchtower(self, true_model: Path) -> Program:
        create_development_key(self._keys / "watchtower.json", WATCHTOWER)
        arguments = [
            "watch", "run", "--rpc", self.rpc_url, "--deployment", str(self.deployment_path),
            "--data", str(self.directory), "--key", str(self._keys / "watchtower.json"), "--mode", "defend",
            "--model", str(true_model), "--bond-budget", f"{BOND_BUDGET} wei", "--keep-open",
        ]  # fmt: skip
        return Program("watchtower", [sys.executable, "-m", "poip_chain.cli", *arguments])

    def start_liar(self) -> Liar:
        """Start somebody who will accuse an honest answer with invented numbers."""
        create_development_key(self._keys / "liar.json", LIAR)
        directory = self.directory / "liar"
        directory.mkdir()
        liar = Liar(directory / "ready", directory / "evidence.json")
        arguments = [
            "--rpc", self.rpc_url, "--deployment", str(self.deployment_path), "--data", str(directory),
            "--key", str(self._keys / "liar.json"), "--model", str(self.nodes[0].model), "--evidence", str(liar.evidence),
        ]  # fmt: skip
        command = [sys.executable, "-m", "poip_chain.cli.local.liar", *arguments]
        self.supervisor.start(Program("liar", command, ends=True))
        return liar

    def _write_summary(self) -> None:
        summary = {
            "rpc_url": self.rpc_url,
            "gateway_url": f"{self.gateway_url}/v1",
            "model": MODEL_NAME,
            "deployment": str(self.deployment_path),
            "nodes": {node.name: {"node": node.node_key.address, "url": node.url} for node in self.nodes},
        }
        (self.directory / "network.json").write_text(json.dumps(summary, indent=2) + "\n")


def _make_models(true_model: Path, is_default: bool, cheap_model: Path, tell: Tell) -> None:
    """Both model directories, as far as they are not there yet."""
    from poip_chain.service.engine.checkpoint import degrade  # imports torch

    def step(text: str) -> None:
        tell(f"  {text}")

    (prepare_default if is_default else prepare)(true_model, step)
    if not cheap_model.exists():
        tell(f"degrading a copy of the model to {DEGRADATION}, for the cheat")
        degrade(true_model, cheap_model, DEGRADATION)


def _coins(key: Key) -> Call:
    return Call(key.address, b"", "coins for gas", value=10**20)


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
