"""`poip doctor`: every check sound and faulty; each fault comes with what to do about it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.keys import address_of, create_development_key
from poip_chain.cli import main
from poip_chain.cli.context import Context
from poip_chain.cli.diagnosis import LOW_COINS, MAX_CLOCK_SKEW, PORTS, Diagnosis, examine
from poip_chain.economic.types import NodeInfo
from poip_chain.errors import ConfigurationError, NotFound, PoipError, Unavailable
from poip_chain.service.engine.model import RECORD, prepare
from poip_chain.spec.types import Address
from tests.engines.serving import serving
from tests.support.tiny_model import write_tiny_model

NODE = Address("0x1111111111111111111111111111111111111111")
POIP = 10**18


@dataclass
class Parts:
    """Plays chain and network; each field is what the one or the other says."""

    away: PoipError | None = None
    mismatch: PoipError | None = None
    behind: float = 0.0
    coins: int = 10**18
    tokens: int = 5 * POIP
    node: Address | None = None
    active: bool = True
    jailed_until: int = 0
    left_at: int = 0
    registered: bool = True
    models: list[bytes] = field(default_factory=list)
    peer_key: Address = NODE
    url: str = "http://chain"
    chain_id: int = 31337

    def block_number(self) -> int:
        if self.away is not None:
            raise self.away
        return 7

    def timestamp(self) -> int:
        return int(time.time() - self.behind)

    def balance(self, _: Address) -> int:
        return self.coins

    @property
    def deployment(self) -> Any:
        if self.mismatch is not None:
            raise self.mismatch
        return self

    @property
    def addresses(self) -> dict[str, Address]:
        return {"PoipToken": NODE}

    def nodes(self) -> list[Address]:
        return [] if self.node is None else [self.node]

    def node_of_key(self, _: Address) -> Address | None:
        return self.node

    def is_active(self, _: Address) -> bool:
        return self.active

    def info(self, node: Address) -> NodeInfo:
        if not self.registered:
            raise NotFound(f"there is no node {node}.")
        values: dict[str, Any] = dict.fromkeys(NodeInfo.__dataclass_fields__, 0)
        values.update(
            peer_key=self.peer_key,
            active=100 * POIP,
            locked=POIP,
            jailed_until=self.jailed_until,
            deregistered_at=self.left_at,
        )
        return NodeInfo(**values)

    def model_ids(self) -> list[bytes]:
        return self.models


class Tokens:
    """The token's client."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def balance(self, _: Address) -> int:
        return self.parts.tokens


class Network:
    """What a context's network is here."""

    def __init__(self, parts: Parts) -> None:
        self.token, self.registry, self.models, self.chain, self._parts = Tokens(parts), parts, parts, parts, parts

    @property
    def deployment(self) -> Any:
        return self._parts.deployment


@pytest.fixture(autouse=True)
def ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports that nobody uses in place of the programs' own, and no settings from outside."""
    for name in PORTS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            monkeypatch.setitem(PORTS, name, probe.getsockname()[1])
    monkeypatch.delenv("POIP_CONFIG", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    create_development_key(tmp_path / "keys" / "operator.json")
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    prepare(directory)
    return directory


def diagnose(data: Path, parts: Parts, model: Path | None = None, engine: str | None = None) -> dict[str, Diagnosis]:
    """All checks by name; what holds for every one of them is asserted here."""
    context = Context(flags={"data": data})
    context.__dict__.update(chain=parts, network=Network(parts))
    found = list(examine(context, model, engine))
    assert len({one.name for one in found}) == len(found)
    for one in found:
        assert one.detail, one
        assert bool(one.fix) == (one.state in ("warning", "failed")), one
        assert one.to_json() == {"name": one.name, "state": one.state, "detail": one.detail, "fix": one.fix}
    return {one.name: one for one in found}


def test_all_is_well(data: Path, prepared: Path) -> None:
    parts = Parts(models=[prepare(prepared).model_id])

    async def healthy(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/health"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with serving(healthy) as url:
        found = diagnose(data, parts, prepared, url + "/")
    assert list(found) == [
        "chain", "contracts", "clock", "key operator", "funds of operator",
        "port of the node", "port of the gateway", "port of the engine", "model", "engine",
    ]  # fmt: skip
    assert {one.state for one in found.values()} == {"ok"}
    assert "31337" in found["chain"].detail and "recomputed" in found["model"].detail


@pytest.mark.parametrize("error", [Unavailable("away."), Unavailable("away.", hint="Wait."), OSError("away")])
def test_no_chain(data: Path, error: Any) -> None:
    found = diagnose(data, Parts(away=error))
    assert found["chain"].state == "failed" and "away" in found["chain"].detail
    assert found["chain"].fix == (getattr(error, "hint", "") or found["chain"].fix)
    assert [found[name].state for name in ("contracts", "clock")] == ["not checked"] * 2
    # What does not need the chain is looked at all the same.
    assert found["key operator"].state == "ok" and "port of the node" in found and "funds of operator" not in found


@pytest.mark.parametrize("hint", ["", "Give the right --rpc."])
def test_another_chain_or_deployment(data: Path, hint: str) -> None:
    found = diagnose(data, Parts(mismatch=ConfigurationError("another chain.", hint=hint)))
    assert (found["contracts"].state, found["contracts"].detail) == ("failed", "another chain.")
    assert found["contracts"].fix == hint or "--deployment" in found["contracts"].fix
    assert found["chain"].state == "ok" and "funds of operator" not in found


@pytest.mark.parametrize(
    ("behind", "words"), [(MAX_CLOCK_SKEW + 60, "s behind this clock"), (-MAX_CLOCK_SKEW - 60, "s ahead of it")]
)
def test_a_clock_that_is_off(data: Path, behind: float, words: str) -> None:
    clock = diagnose(data, Parts(behind=behind))["clock"]
    assert clock.state == "warning" and words in clock.detail and "NTP" in clock.fix
    assert diagnose(data, Parts(behind=behind / 10))["clock"].state == "ok"


def test_no_keys(tmp_path: Path) -> None:
    found = diagnose(tmp_path, Parts())
    assert found["keys"].state == "warning" and "poip key new" in found["keys"].fix


@pytest.mark.parametrize("name", ["operator.json", "operator.password"])
def test_a_key_that_others_can_read(data: Path, name: str) -> None:
    secret = data / "keys" / name
    secret.chmod(0o640)
    key = diagnose(data, Parts())["key operator"]
    assert key.state == "failed" and "0640" in key.detail and key.fix == f"chmod 600 {secret}"
    secret.chmod(0o600)
    assert diagnose(data, Parts())["key operator"].state == "ok"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"address": "12"}'])
def test_a_damaged_key_does_not_hide_the_others(data: Path, text: str) -> None:
    broken = data / "keys" / "broken.json"
    broken.write_text(text)
    broken.chmod(0o600)
    found = diagnose(data, Parts())
    assert found["key broken"].state == "failed" and str(broken) in found["key broken"].fix
    assert found["key operator"].state == found["funds of operator"].state == "ok"
    assert "funds of broken" not in found and "port of the engine" in found


def test_no_coins_for_gas(data: Path) -> None:
    funds = diagnose(data, Parts(coins=LOW_COINS - 1))["funds of operator"]
    assert funds.state == "warning" and "pays for gas" in funds.fix
    assert diagnose(data, Parts(coins=LOW_COINS))["funds of operator"].state == "ok"


def test_peer_keys_need_no_gas(data: Path) -> None:
    """They send nothing: known by a registered node, or before that by their name."""
    for name in ("peer", "alpha-peer", "peer0", "other", "speer"):
        create_development_key(data / "keys" / f"{name}.json")
    found = diagnose(data, Parts(coins=0))
    states = {name: found[f"funds of {name}"].state for name in ("peer", "alpha-peer", "peer0", "other", "speer")}
    assert states == {"peer": "ok", "alpha-peer": "ok", "peer0": "ok", "other": "warning", "speer": "warning"}
    assert "no gas" in found["funds of peer"].detail

    class OfOneNode(Parts):
        def nodes(self) -> list[Address]:
            return [NODE]

    other = address_of(data / "keys" / "other.json")
    found = diagnose(data, OfOneNode(coins=0, peer_key=other))
    assert found["funds of other"].state == "ok" and found["funds of operator"].state == "warning"
    # A node key is one whatever it is called.
    assert diagnose(data, Parts(coins=0, node=NODE))["funds of peer"].state == "warning"


def test_a_node_that_may_not_work(data: Path) -> None:
    funds = diagnose(data, Parts(node=NODE))["funds of operator"]
    assert funds.state == "ok" and "active" in funds.detail and "100 POIP" in funds.detail
    jailed = int(time.time()) + 1000
    funds = diagnose(data, Parts(node=NODE, active=False, jailed_until=jailed))["funds of operator"]
    assert funds.state == "warning" and f"jailed until {jailed}" in funds.detail and "poip node unjail" in funds.fix
    funds = diagnose(data, Parts(node=NODE, left_at=1))["funds of operator"]
    assert funds.state == "warning" and "has left" in funds.detail and "new node" in funds.fix
    funds = diagnose(data, Parts(node=NODE, registered=False))["funds of operator"]
    assert funds.state == "failed" and "there is no node" in funds.detail


@pytest.mark.parametrize("program", sorted(PORTS))
def test_a_taken_port(data: Path, program: str) -> None:
    with socket.create_server(("127.0.0.1", PORTS[program])):
        found = diagnose(data, Parts())
    taken = found[f"port of the {program}"]
    assert taken.state == "warning" and str(PORTS[program]) in taken.detail and "--port" in taken.fix
    assert [one.state for name, one in found.items() if name.startswith("port")].count("ok") == 2


def test_the_settings_ports_are_looked_at(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (data / "poip.toml").write_text(f'[gateway]\nport = {port}\nescrow_per_node = "1"\n')
        assert diagnose(data, Parts())["port of the gateway"].state == "warning"
    (data / "poip.toml").write_text("[gateway]\nport = 70000\n")
    found = diagnose(data, Parts())["port of the gateway"]
    assert found.state == "failed" and "gateway.port = 70000" in found.detail


def test_a_model_that_differs_from_its_record(data: Path, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    hashes = prepare(directory)
    parts = Parts(models=[hashes.model_id])
    assert diagnose(data, parts, directory)["model"].state == "ok"
    assert "poip model register" in diagnose(data, Parts(), directory)["model"].fix
    (directory / "chat_template.jinja").write_text("{{ other }}")
    model = diagnose(data, parts, directory)["model"]
    assert model.state == "failed" and "changed after" in model.fix and "0x" + hashes.model_id.hex() in model.detail
    (directory / RECORD).write_text("{")
    assert "poip model prepare" in diagnose(data, parts, directory)["model"].fix
    missing = diagnose(data, parts, tmp_path / "nowhere")["model"]
    assert missing.state == "failed" and "nowhere" in missing.detail


def test_an_engine_that_is_not_there_or_not_ready(data: Path) -> None:
    async def starting(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with serving(starting) as url:
        engine = diagnose(data, Parts(), engine=url)["engine"]
    assert engine.state == "failed" and "503" in engine.detail and "ready" in engine.fix
    for wrong in (f"http://127.0.0.1:{PORTS['engine']}", "127.0.0.1:8000", "http://[::1", "http://x:port"):
        engine = diagnose(data, Parts(), engine=wrong)["engine"]
        assert engine.state == "failed" and "poip engine serve" in engine.fix, wrong


# The command


@pytest.fixture
def capture(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    capsys.readouterr()
    yield capsys


def test_the_commands_exit_code_and_json(data: Path, capture: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--data", str(data), "--rpc", f"http://127.0.0.1:{PORTS['engine']}"]
    assert main.run(["doctor", *nowhere, "--json"]) == 4
    shown = capture.readouterr()
    found = {row["name"]: row for row in json.loads(shown.out)["checks"]}
    assert found["chain"]["state"] == "failed" and found["chain"]["fix"] and found["key operator"]["state"] == "ok"
    assert set(found["chain"]) == {"name", "state", "detail", "fix"}
    assert shown.err.strip() == "Error: failed: chain."
    assert main.run(["doctor", *nowhere]) == 4
    shown = capture.readouterr()
    assert found["chain"]["fix"].split()[0] in shown.out and "Traceback" not in shown.err


def test_warnings_alone_are_no_failure(
    tmp_path: Path, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warned = [Diagnosis("clock", "warning", "off", "NTP"), Diagnosis("chain", "ok", "there")]
    monkeypatch.setattr("poip_chain.cli.diagnosis.examine", lambda *_: iter(warned))
    assert main.run(["doctor", "--data", str(tmp_path), "--json"]) == 0
    assert json.loads(capture.readouterr().out) == {"checks": [one.to_json() for one in warned]}
    assert main.run(["doctor", "--data", str(tmp_path)]) == 0
    assert "NTP" in capture.readouterr().out
