"""What a node operator does on chain, through the command line: models, offers, new keys, jail, leaving."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.keys import Key, development_key, load, password_from
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.cli import main
from poip_chain.cli.settings import load_section
from poip_chain.economic.network import Network
from poip_chain.economic.parameters import DEVNET_PARAMETERS
from poip_chain.economic.types import Evidence, Offer
from poip_chain.service.node.schema import Record
from poip_chain.service.node.settings import NodeSettings
from poip_chain.service.node.store import Draft, Store
from poip_chain.spec.types import Address
from tests.engines.serving import serving
from tests.integration.test_cli_chain import POIP, Terminal
from tests.support.records import record
from tests.support.tiny_model import CONFIG, write_tiny_model
from tests.unit.test_readme import blocks

SECONDS = {parameter.name: parameter.value for parameter in DEVNET_PARAMETERS}
UNBONDING, JAIL, ROTATION = (SECONDS[name] for name in ("unbonding_period", "jail_period", "key_rotation_delay"))


class World(Terminal):
    """A terminal, and a look at the chain beside it."""

    chain: Chain
    network: Network
    model: Path

    def address(self, name: str) -> Address:
        """Of a key in the data directory."""
        return self.key(name).address

    def key(self, name: str) -> Key:
        """Opened."""
        return load(self.data / "keys" / f"{name}.json", password_from())

    def pass_time(self, seconds: int) -> None:
        """Automined blocks may run ahead of the clock: the time is set, not added to it."""
        self.chain.request("evm_setNextBlockTimestamp", self.chain.timestamp() + seconds)
        self.chain.request("evm_mine")

    def model_id(self) -> str:
        """Of the world's model, registered with its first profile if it was not there."""
        return str(self.json("model", "register", str(self.model), "--key", "deployer", "--yes")["model_id"])


def node_keys(number: int) -> list[str]:
    return [f"node{number}", f"peer{number}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A deployment, an operator with two staked nodes (node0, node1) and a client."""
    data = tmp_path_factory.mktemp("data")
    write_tiny_model(data / "model")
    with running_devnet() as url:
        common = ["--data", str(data), "--rpc", url]
        assert main.run(["deploy", "--profile", "devnet", *common]) == 0
        for name, account in (("operator", 1), ("client", 2)):
            assert main.run(["key", "new", name, "--development", "--account", str(account), *common]) == 0
        for name in (*node_keys(0), *node_keys(1), "new0", "new1"):
            assert main.run(["key", "new", name, "--development", *common]) == 0
        for number in (0, 1):
            node, peer = node_keys(number)
            line = ["node", "register", "--key", "operator", "--node-key", node, "--peer-key", peer, "--yes", *common]
            assert main.run([*line, "--endpoint", "http://127.0.0.1:9", "--stake", "100"]) == 0
        yield data, url


@pytest.fixture
def world(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> Iterator[World]:
    capsys.readouterr()
    world = World(*made, capsys)
    with Chain(world.url) as chain:
        world.chain = chain
        world.network = Network(chain, Deployment.load(world.data / "deployment.json"))
        world.model = world.data / "model"
        yield world


# ------------------------------------------------------------------------------------------------- models and offers


def test_models_and_their_profiles(world: World, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "other", seed=2)
    register = ["model", "register", str(directory), "--key", "deployer"]
    preview = world.json(*register, "--dry-run")
    assert len(preview["transactions"]) == 2 and world.network.models.model_ids() == []
    assert "--yes" in world.fails(1, *register)
    # The list is an allow-list: only its owner adds to it.
    world.fails(1, "model", "register", str(directory), "--key", "client", "--yes")
    made = world.json(*register, "--max-context", "8", "--uri", "https://example.org", "--yes")
    assert made["profile_version"] == 1 and len(made["transactions"]) == 2
    again = world.json(*register, "--max-context", "8", "--yes")
    assert again == {**made, "transactions": []}
    shown = world.json("model", "show", made["model_id"])
    assert shown["config"]["hidden_size"] == CONFIG.hidden_size and shown["profiles"]["1"]["max_context"] == 8
    assert shown["offers"] == []
    assert made["model_id"] in {row["model_id"] for row in world.json("model", "list")["models"]}
    # A profile from a file is added beside the first, once.
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({**shown["profiles"]["1"], "max_context": 4}))
    second = world.json(*register, "--profile", str(profile), "--yes")
    assert (second["profile_version"], len(second["transactions"])) == (2, 1)
    assert world.json(*register, "--profile", str(profile), "--yes")["transactions"] == []
    assert world.json("model", "show", made["model_id"])["profiles"]["2"]["max_context"] == 4
    for text, message in (
        ("{", "profile.json holds no profile: this is not valid JSON"),
        ("{}", "exactly the fields"),
        ("[" * 70_000, "too large"),
    ):
        profile.write_text(text)
        assert message in world.fails(1, *register, "--profile", str(profile), "--yes")
    world.fails(1, *register, "--profile", str(tmp_path / "absent.json"), "--yes")
    assert "config.json" in world.fails(1, "model", "register", str(tmp_path), "--key", "deployer", "--yes")
    for arguments in (("model", "list"), ("model", "show", made["model_id"])):
        code, out, _ = world.run(*arguments)
        assert code == 0 and made["model_id"] in out
    assert world.network.models.profile_count(bytes.fromhex(made["model_id"][2:])) == 2


def test_offers_are_added_changed_and_removed(world: World) -> None:
    model = world.model_id()
    node = world.address("node0")
    offer = ["node", "offer", "node0", "--model", model, "--key", "operator"]

    def offers() -> list[Offer]:
        return world.network.registry.offers(node)

    world.json(*offer, "--input-price", "2", "--output-price", "6 POIP", "--dry-run")
    assert offers() == []
    done = world.json(*offer, "--input-price", "2", "--output-price", "6 POIP")
    assert (done["input_price"], done["output_price"]) == (str(2 * POIP // 10**6), str(6 * POIP // 10**6))
    (found,) = offers()
    assert (found.profile_version, found.input_price, found.output_price) == (1, 2 * 10**12, 6 * 10**12)
    assert world.json("model", "show", model)["offers"][0]["node"] == node
    assert [row["node"] for row in world.json("node", "list", "--model", model)["nodes"]] == [node]
    # Changed, not added; and by the node key as well.
    world.chain.request("anvil_setBalance", node, hex(10**18))
    world.json(*offer[:-1], "node0", "--input-price", "3", "--output-price", "7")
    (found,) = offers()
    assert (found.input_price, found.output_price) == (3 * 10**12, 7 * 10**12)
    before = offers()
    world.fails(1, *offer[:-1], "client", "--output-price", "1")
    world.fails(1, *offer, "--profile", "9")
    assert "whole number of wei" in world.fails(1, *offer, "--output-price", "1 wei")
    assert "amount" in world.fails(2, *offer, "--output-price", "much")
    for line in (offer, ["node", "unjail", "client", *offer[-2:]], ["node", "endpoint", "client", "x", *offer[-2:]]):
        assert "there is no node" in world.fails(1, *line[:2], "client", *line[3:])
    assert offers() == before
    assert world.fails(1, *offer[:-1], "client", "--remove")
    world.json(*offer, "--remove")
    assert offers() == [] and world.json("node", "list", "--model", model)["nodes"] == []
    assert "refused" in world.fails(1, *offer, "--remove")


# -------------------------------------------------------------------------------------------------------- node keys


def store_of(world: World, node: str, folder: Path) -> Store:
    """A node's database."""
    domain = world.network.domain("log")
    return Store(
        folder / "node" / "node.db",
        node=world.address(node),
        chain_id=domain.chain_id,
        log=domain.verifying_contract,
    )


def sign_receipts(world: World, store: Store, node: str, count: int) -> None:
    """As the node does, without a request behind them."""
    key, domain = world.key(node), world.network.domain("log")
    for _ in range(count):
        number = store.next_seq()
        draft = Draft(number.to_bytes(32, "big"), b"m" * 32, 1, b"t" * 32, 3, 0, 10, world.address("client"), 1)
        store.issue(draft, Record("{}", b"", "{}", b""), lambda receipt: receipt.sign(domain, key.private_key))


def rotation(world: World, node: str, new: str) -> list[str]:
    return ["node", "rotate-key", node, "--new-key", new, "--key", "operator"]


def test_rotation_spares_what_is_signed_and_not_committed(world: World) -> None:
    node, old, new = world.address("node0"), world.address("node0"), world.address("new0")
    rotate = rotation(world, "node0", "new0")
    store = store_of(world, "node0", world.data)
    sign_receipts(world, store, "node0", 3)
    assert world.network.log.next_seq(node) == 0
    # The node runs: the number is not fixed. The chain alone would say 0 and void all three.
    text = world.fails(1, *rotate)
    assert "number 3" in text and "Stop the node" in text and "--next-seq" in text
    sign_receipts(world, store, "node0", 1)
    # Named by hand, too low: refused although the contract would take it, whether or not the node runs.
    assert "--next-seq 4" in world.fails(1, *rotate, "--next-seq", "3")
    store.close()
    assert "--next-seq 4" in world.fails(1, *rotate, "--next-seq", "0")
    preview = world.json(*rotate, "--dry-run")
    assert (preview["next_seq"], preview["delay"]) == (4, ROTATION)
    world.fails(1, *rotate[:-1], "client")
    code, out, err = world.run(*rotate, "--json")
    done = json.loads(out)
    assert code == 0 and (done["next_seq"], done["new_key"], done["node"]) == (4, new, node)
    assert f"In {ROTATION} seconds" in err and f"node.node = {node}" in err

    def signers() -> list[Address]:
        return [world.network.registry.signing_key(node, seq) for seq in (0, 3, 4, 100)]

    assert signers() == [old] * 4
    assert "pending" in world.fails(1, *rotation(world, "node0", "new1"))
    world.pass_time(ROTATION + 1)
    assert signers() == [old, old, new, new] and world.network.registry.node_of_key(new) == node
    # The name stays; a key is bound once.
    assert "already bound" in world.fails(1, *rotate)
    assert world.json("node", "list")["nodes"][0]["node"] == node


def test_rotation_without_the_nodes_database_guesses_nothing(world: World, tmp_path: Path) -> None:
    rotate = rotation(world, "node1", "new1")
    before = world.chain.block_number()
    # Another node's database is in this data directory: it says nothing about node1.
    assert (world.data / "node" / "node.db").exists()
    text = world.fails(3, *rotate)
    assert "--next-seq" in text and "--data" in text
    info: dict[str, Any] = {"node": world.address("node1"), "next_seq": 7, "running": 2}
    with answering(lambda: info) as url:
        world.json("node", "endpoint", "node1", url, "--key", "operator")
        before += 1
        text = world.fails(1, *rotate)
        assert "number 7" in text and "2 requests" in text and "more than 9" in text
        for wrong in ({"node": world.address("node0")}, {"next_seq": -1}, {"next_seq": "7"}, {"running": True}):
            info = {"node": world.address("node1"), "next_seq": 7, "running": 2, **wrong}
            assert "--next-seq" in world.fails(1, *rotate), wrong
        info = {"node": world.address("node1")}
        assert "--next-seq" in world.fails(3, *rotate)
        info = {"pad": "x" * 70_000}
        assert "more than" in world.fails(1, *rotate)
    assert world.chain.block_number() == before
    assert world.network.registry.signing_key(world.address("node1"), 10**6) == world.address("node1")
    # The node's directory can be anywhere: the settings name it.
    store_of(world, "node1", tmp_path / "elsewhere").close()
    config = tmp_path / "poip.toml"
    config.write_text('[node]\ndata = "elsewhere/node"\n')
    assert world.json(*rotate, "--config", str(config), "--dry-run")["next_seq"] == 0
    (tmp_path / "elsewhere" / "node" / "node.db").write_bytes(b"not a database" * 100)
    assert "cannot be read" in world.fails(1, *rotate, "--config", str(config))
    # Named, it is believed: there is nothing here to check it by.
    assert world.json(*rotate, "--next-seq", "50", "--dry-run")["next_seq"] == 50
    assert "2**56" not in world.fails(2, *rotate, "--next-seq", str(2**56))


@contextlib.contextmanager
def answering(document: Callable[[], dict[str, Any]]) -> Iterator[str]:
    """A server that answers every question with a document."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(_: Request) -> JSONResponse:
        return JSONResponse(document())

    with serving(Starlette(routes=[Route("/{path:path}", answer)])) as url:
        yield url


# --------------------------------------------------------------------------------------------------- stake and jail


def test_stake_leaves_after_its_time_and_not_before(world: World) -> None:
    def wallet() -> int:
        return int(world.json("token", "balance", "operator")["tokens"])

    withdraw = ["stake", "withdraw", "node1", "--key", "operator"]
    active = int(world.json("stake", "show", "node1")["active"])
    preview = world.json("stake", "unbond", "node1", "5", "--key", "operator", "--dry-run")
    assert preview["amount"] == str(5 * POIP)
    assert "--yes" in world.fails(1, "stake", "unbond", "node1", "5", "--key", "operator")
    for amount in ("5", "7"):
        world.json("stake", "unbond", "node1", amount, "--key", "operator", "--yes")
    shown = world.json("stake", "show", "node1")
    assert (int(shown["active"]), len(shown["unbonding"])) == (active - 12 * POIP, 2)
    world.json("stake", "cancel", "node1", str(shown["unbonding"][1]["id"]), "--key", "operator")
    world.fails(1, "stake", "cancel", "node1", str(shown["unbonding"][1]["id"]), "--key", "operator")
    assert "nothing to withdraw" in world.fails(1, *withdraw, "--yes")
    world.pass_time(UNBONDING + 1)
    assert "--yes" in world.fails(1, *withdraw)
    before = wallet()
    # Anyone may send it; it goes to the payout address.
    done = world.json("stake", "withdraw", "node1", "--key", "client", "--yes")
    assert done["payout"] == world.address("operator") and wallet() == before + 5 * POIP
    shown = world.json("stake", "show", "node1")
    assert (int(shown["active"]), shown["unbonding"]) == (active - 5 * POIP, [])
    assert "nothing to withdraw" in world.fails(1, *withdraw, "--yes")


def convict(world: World, node: str) -> None:
    """Show two receipts for one number, which costs a node a share of its stake."""
    domain, key = world.network.domain("log"), world.key(node)
    one = record().receipt.replace(node=key.address, issued_at=world.chain.timestamp(), seq=10**6)
    two = one.replace(output_tokens=one.output_tokens + 1)
    sides = [Evidence(signature=receipt.sign(domain, key.private_key)) for receipt in (one, two)]
    call = world.network.offences.prove_equivocation(one, sides[0], two, sides[1])
    with Outbox(world.chain, development_key(5), world.data / "challenger.db") as outbox:
        outbox.execute(call, f"convict {node}", 60)


def test_unjail_after_the_jail_period(world: World) -> None:
    unjail = ["node", "unjail", "node1", "--key", "operator"]

    def state() -> str:
        states = {row["node"]: row["state"] for row in world.json("node", "list")["nodes"]}
        return str(states[world.address("node1")])

    assert "not jailed" in world.fails(1, *unjail)
    stake = int(world.json("stake", "show", "node1")["active"])
    convict(world, "node1")
    assert state() == "jailed" and int(world.json("stake", "show", "node1")["active"]) < stake
    assert "jail period not over" in world.fails(1, *unjail)
    world.pass_time(JAIL + 1)
    world.fails(1, *unjail[:-1], "client")
    assert state() != "active"
    assert world.json(*unjail, "--dry-run")["node"] == world.address("node1") and state() != "active"
    world.json(*unjail)
    assert state() == "active"


def test_deregister_is_for_good(world: World) -> None:
    leave = ["node", "deregister", "node1", "--key", "operator"]
    model, node = world.model_id(), world.address("node1")
    offer = ["node", "offer", "node1", "--model", model, "--key", "operator", "--output-price", "1"]
    world.json(*offer)
    stake = int(world.json("stake", "show", "node1")["active"])
    assert stake > 0 and world.json(*leave, "--dry-run")["node"] == node
    assert "--yes" in world.fails(1, *leave)
    world.fails(1, *leave[:-1], "client", "--yes")
    assert len(world.network.registry.offers(node)) == 1
    world.json(*leave, "--yes")
    rows = {row["node"]: row for row in world.json("node", "list")["nodes"]}
    assert (rows[node]["state"], rows[node]["offers"]) == ("left", 0)
    shown = world.json("stake", "show", "node1")
    assert shown["active"] == "0" and sum(int(u["amount"]) for u in shown["unbonding"]) == stake
    world.fails(1, *leave, "--yes")
    world.fails(1, *offer)
    world.fails(1, "stake", "add", "node1", "5", "--key", "client", "--yes")
    before = int(world.json("token", "balance", "operator")["tokens"])
    world.pass_time(UNBONDING + 1)
    world.json("stake", "withdraw", "node1", "--key", "operator", "--yes")
    assert int(world.json("token", "balance", "operator")["tokens"]) == before + stake
    assert int(world.json("stake", "show", "node1")["active"]) == 0


# ----------------------------------------------------------------------------------------------------------- README


def readme_steps(first: str) -> list[list[str]]:
    """The arguments of each command in the README's block that begins with `first`."""
    (block,) = [text for name, text in blocks("") if name == "README.md" and text.startswith(first)]
    assert all(line.startswith("poip ") for line in block.splitlines())
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_the_readmes_operator_steps(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, in a home of its own: only the model differs, and the contracts are there already."""
    deployed, url = made
    home = tmp_path / "home"
    model = write_tiny_model(home / ".poip" / "models" / "smollm2-135m-instruct", seed=3)
    shutil.copy(deployed / "deployment.json", home / ".poip" / "deployment.json")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("POIP_RPC_URL", url)
    monkeypatch.delenv("POIP_DATA", raising=False)
    printed: dict[str, Any] = {}
    for given in readme_steps("poip deploy --profile devnet"):
        step = [os.path.expanduser(word) for word in given]
        if step[:2] == ["model", "prepare"]:
            step.append(str(model))
        if step[:2] == ["node", "offer"]:
            step[step.index("--model") + 1] = printed["model prepare"]["model_id"]
        if step[:2] in (["model", "register"], ["stake", "add"]):
            step.append("--yes")
        code = main.run([*step, "--json"])
        shown = capsys.readouterr()
        assert code == 0, (step, shown)
        printed[" ".join(step[:2])] = json.loads(shown.out)
    nodes = {row["node"]: row for row in printed["node list"]["nodes"]}
    node = nodes[printed["node register"]["node"]]
    assert (node["state"], node["offers"], node["stake"]) == ("active", 1, str(1000 * POIP))
    # A newcomer is not sent after warnings that mean nothing. (This chain's clock was moved by the tests before.)
    wrong = {check["name"] for check in printed["doctor"]["checks"] if check["state"] != "ok"}
    assert wrong <= {"clock", *(f"port of the {program}" for program in ("node", "gateway", "engine"))}
    # The settings file fits this node: what is missing is the engine.
    (text,) = [text for name, text in blocks("toml") if name == "README.md"]
    config = tmp_path / "node.toml"
    config.write_text(text)
    settings = load_section(NodeSettings, "node", config).values
    assert settings.endpoint == node["endpoint"] == f"http://127.0.0.1:{settings.port}"
    assert Deployment.load(settings.deployment).complete and settings.court.model == model
    assert settings.key.expanduser().is_file()
    engine, run = readme_steps("poip engine serve")
    assert engine[:2] == ["engine", "serve"] and run == ["node", "run", "--config", "node.toml"]


# ----------------------------------------------------------------------------------------------------------- doctor


def test_doctor_passes_on_a_sound_network(world: World) -> None:
    """Last: it looks at what the tests before have made."""
    world.model_id()
    code, out, err = world.run("doctor", "--model", str(world.model), "--json")
    found = {row["name"]: row for row in json.loads(out)["checks"]}
    assert code == 0 and err == "", out
    assert all(set(row) == {"name", "state", "detail", "fix"} for row in found.values())
    assert all(row["fix"] for row in found.values() if row["state"] != "ok")
    assert all(not row["fix"] for row in found.values() if row["state"] == "ok")
    for name in ("chain", "contracts", "model", "key operator", "key node0", "funds of operator"):
        assert found[name]["state"] == "ok", found[name]
    assert "has left" in found["funds of node1"]["detail"] and "new node" in found["funds of node1"]["fix"]
