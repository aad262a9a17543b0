"""The chain-side commands as a user runs them, against a real node: JSON in, exit codes out, money where it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.rpc import Chain
from poip_chain.cli import main
from poip_chain.economic.parameters import DEVNET_PARAMETERS

POIP = 10**18


class Terminal:
    """Runs commands in one data directory."""

    def __init__(self, data: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.url, self.capsys = data, url, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = main.run([*arguments, "--data", str(self.data), "--rpc", self.url])
        shown = self.capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    def json(self, *arguments: str) -> Any:
        code, out, err = self.run(*arguments, "--json")
        assert code == 0, out + err
        return json.loads(out)

    def fails(self, code: int, *arguments: str) -> str:
        """The error's message and hint."""
        found, out, err = self.run(*arguments, "--json")
        assert found == code, out + err
        error = json.loads(out)["error"]
        return f"{error['message']} {error['hint']}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A node and a data directory with a deployment and keys."""
    data = tmp_path_factory.mktemp("data")
    with running_devnet() as url:
        common = ["--data", str(data), "--rpc", url]
        assert main.run(["deploy", "--profile", "devnet", *common]) == 0
        for name, account in (("operator", 1), ("client", 2), ("helper", 3)):
            assert main.run(["key", "new", name, "--development", "--account", str(account), *common]) == 0
        for name in ("node", "peer"):
            assert main.run(["key", "new", name, "--development", *common]) == 0
        register = ["node", "register", "--key", "operator", "--node-key", "node", "--peer-key", "peer"]
        assert main.run([*register, "--endpoint", "http://127.0.0.1:9", "--stake", "100", "--yes", *common]) == 0
        yield data, url


@pytest.fixture
def terminal(world: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> Terminal:
    capsys.readouterr()
    return Terminal(*world, capsys)


def test_deploy_again_does_nothing(terminal: Terminal) -> None:
    with Chain(terminal.url) as chain:
        before = chain.block_number()
        found = terminal.json("deploy", "--profile", "devnet")
        assert chain.block_number() == before
    assert found["addresses"]["PoipToken"].startswith("0x") and found["chain_id"] == 31337


def test_keys(terminal: Terminal) -> None:
    names = {key["name"]: key for key in terminal.json("key", "list")["keys"]}
    assert {"deployer", "operator", "client", "node", "peer"} <= set(names)
    assert all(key["problem"] == "" for key in names.values())
    shown = terminal.json("key", "show", "operator")
    assert shown["address"] == names["operator"]["address"] == "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
    assert "exists already" in terminal.fails(1, "key", "new", "operator", "--password-file", str(password(terminal)))
    made = terminal.json("key", "new", "cold", "--password-file", str(password(terminal)))
    assert terminal.json("key", "show", "cold")["tokens"] == "0" and made["name"] == "cold"
    terminal.data.joinpath("keys", "cold.json").unlink()


def password(terminal: Terminal) -> Path:
    from poip_chain.chain.keys import write_private

    path = terminal.data / "password"
    if not path.exists():
        write_private(path, "long enough\n")
    return path


def test_transfer_preview_and_sending(terminal: Terminal) -> None:
    before = int(terminal.json("token", "balance", "helper")["tokens"])
    transfer = ["token", "transfer", "helper", "1.5 POIP", "--key", "client"]
    preview = terminal.json(*transfer, "--dry-run")
    (transaction,) = preview["transactions"]
    assert transaction["data"].startswith("0xa9059cbb") and int(transaction["highest_cost"]) > 0
    assert int(terminal.json("token", "balance", "helper")["tokens"]) == before
    assert "--yes" in terminal.fails(1, *transfer)
    assert int(terminal.json("token", "balance", "helper")["tokens"]) == before
    done = terminal.json(*transfer, "--yes")
    assert done["amount"] == str(3 * POIP // 2) and done["transactions"][0]["gas_used"] > 21_000
    assert int(terminal.json("token", "balance", "helper")["tokens"]) == before + 3 * POIP // 2


def test_more_than_there_is_names_the_balance_and_the_way_out(terminal: Terminal) -> None:
    """Before anything is asked or sent; `poor` has 3 tokens."""
    terminal.json("key", "new", "poor", "--development")
    try:
        address = terminal.json("key", "show", "poor")["address"]
        terminal.json("token", "transfer", "poor", "3", "--key", "client", "--yes")
        register = ["node", "register", "--key", "poor", "--node-key", "helper", "--peer-key", "client"]
        for line in (
            ["stake", "add", "node", "5", "--key", "poor"],
            ["stake", "add", "node", "5", "--key", "poor", "--yes"],
            ["stake", "add", "node", "5", "--key", "poor", "--dry-run"],
            ["funds", "deposit", "node", "5", "--key", "poor"],
            ["token", "transfer", "helper", "5", "--key", "poor"],
            [*register, "--endpoint", "http://127.0.0.1:9", "--stake", "5"],
        ):
            error = terminal.fails(1, *line)
            assert f"5 POIP is more than {address} has: its balance is 3 POIP" in error, line
            assert "2 POIP more" in error and f"poip token transfer {address}" in error
        assert terminal.json("token", "balance", "poor")["tokens"] == str(3 * POIP)
    finally:
        for file in terminal.data.joinpath("keys").glob("poor.*"):
            file.unlink()


def test_usage_errors(terminal: Terminal) -> None:
    assert "amount" in terminal.fails(2, "token", "transfer", "helper", "five", "--key", "client")
    assert "neither an address nor a key" in terminal.fails(1, "token", "transfer", "nobody", "5", "--key", "client")
    assert "which key?" in terminal.fails(1, "token", "transfer", "helper", "5")


def test_node_stake_and_offer(terminal: Terminal) -> None:
    (node,) = terminal.json("node", "list")["nodes"]
    assert node["state"] == "active" and int(node["stake"]) >= 100 * POIP - 1
    terminal.json("stake", "add", "node", "20", "--key", "helper", "--yes")
    terminal.json("stake", "unbond", "node", "5", "--key", "operator", "--yes")
    shown = terminal.json("stake", "show", "node")
    assert (int(shown["active"]), int(shown["free"])) == (115 * POIP, 115 * POIP)
    (unbonding,) = shown["unbonding"]
    assert "nothing to withdraw" in terminal.fails(1, "stake", "withdraw", "node", "--key", "operator", "--yes")
    terminal.json("stake", "cancel", "node", str(unbonding["id"]), "--key", "operator")
    assert int(terminal.json("stake", "show", "node")["active"]) == 120 * POIP
    # Not the operator, more than there is, an unknown node.
    terminal.fails(1, "stake", "unbond", "node", "5", "--key", "client", "--yes")
    terminal.fails(1, "stake", "unbond", "node", "500", "--key", "operator", "--yes")
    assert "there is no node" in terminal.fails(1, "stake", "show", "client")
    offer = ["node", "offer", "node", "--model", "0x" + "11" * 32, "--key", "operator"]
    assert "refused" in terminal.fails(1, *offer)
    assert "whole number of wei" in terminal.fails(1, *offer, "--input-price", "1 wei")
    terminal.json("node", "endpoint", "node", "http://127.0.0.1:10", "--key", "operator")
    assert terminal.json("node", "list")["nodes"][0]["endpoint"] == "http://127.0.0.1:10"
    assert "--next-seq" in terminal.fails(3, "node", "rotate-key", "node", "--new-key", "helper", "--key", "operator")


def test_funds_add_up(terminal: Terminal) -> None:
    def total(name: str) -> int:
        shown = terminal.json("funds", "show", name)
        assert sum(int(place["amount"]) for place in shown["places"]) == int(shown["total"])
        return int(shown["total"])

    before = total("client")
    terminal.json("funds", "deposit", "node", "7", "--key", "client", "--yes")
    terminal.json("funds", "thaw", "node", "2", "--key", "client", "--yes")
    assert total("client") == before
    places = {place["place"].split(" with ")[0]: place for place in terminal.json("funds", "show", "client")["places"]}
    assert places["escrow"]["amount"] == str(5 * POIP) and places["thawing escrow"]["amount"] == str(2 * POIP)
    node = terminal.json("node", "list")["nodes"][0]["node"]
    terminal.fails(1, "funds", "withdraw", "--escrow", "node", "--key", "client", "--yes")
    (thaw,) = (parameter.value for parameter in DEVNET_PARAMETERS if parameter.name == "thaw_period")
    with Chain(terminal.url) as chain:
        # Automined blocks may run ahead of the clock: the time is set, not added to it.
        chain.request("evm_setNextBlockTimestamp", chain.timestamp() + thaw + 1)
        chain.request("evm_mine")
    done = terminal.json("funds", "withdraw", "--escrow", "node", "--key", "client", "--yes")
    assert done["amounts"] == {f"escrow with {node}": str(2 * POIP)}
    assert total("client") == before
    assert "nothing to withdraw" in terminal.fails(1, "funds", "withdraw", "--rewards", "--key", "client", "--yes")
    terminal.json("funds", "thaw", "node", "1", "--key", "client", "--yes")
    terminal.json("funds", "thaw", "node", "0", "--key", "client", "--yes")
    assert total("client") == before


def test_parameters(terminal: Terminal) -> None:
    listed = {entry["name"]: entry for entry in terminal.json("params", "list")["parameters"]}
    (window,) = (parameter.value for parameter in DEVNET_PARAMETERS if parameter.name == "challenge_window")
    assert listed["challenge_window"]["value"] == str(window) and listed["audit_rate"]["unit"] == "ppm"
    assert "below minimum" in terminal.fails(1, "params", "set", "audit_rate", "1", "--key", "deployer", "--yes")
    terminal.fails(1, "params", "set", "audit_rate", "200000", "--key", "client", "--yes")
    terminal.json("params", "set", "audit_rate", "200000", "--key", "deployer", "--yes")
    assert terminal.json("params", "show", "audit_rate")["value"] == "200000"
    assert "poip params list" in terminal.fails(1, "params", "show", "nothing")


def test_batches_and_models_of_an_empty_network(terminal: Terminal) -> None:
    assert terminal.json("batch", "list") == {"batches": []}
    assert "no batch 1" in terminal.fails(1, "batch", "show", "1")
    assert terminal.json("model", "list") == {"models": []}
    terminal.fails(1, "model", "show", "0x" + "11" * 32)


def test_settings_with_their_sources(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POIP_RPC_TIMEOUT", "4")
    settings = terminal.json("config")["settings"]
    assert settings["rpc_url"] == {"value": terminal.url, "source": "flag"}
    assert settings["rpc_timeout"] == {"value": "4.0", "source": "environment POIP_RPC_TIMEOUT"}
    assert terminal.json("config", "node")["settings"]["rpc_url"] == {"value": terminal.url, "source": "flag"}


def test_trouble_is_told_apart(terminal: Terminal, tmp_path: Path) -> None:
    nowhere = ["--rpc", "http://127.0.0.1:9"]
    assert main.run(["node", "list", "--data", str(terminal.data), *nowhere]) == 3
    assert "does not answer" in terminal.capsys.readouterr().err
    assert main.run(["node", "list", "--data", str(tmp_path), "--rpc", terminal.url]) == 1
    error = terminal.capsys.readouterr().err
    # Most who see this have a network already, in another directory.
    assert "poip deploy" in error and "--data" in error and "POIP_DATA" in error and "make up" in error
    assert str(tmp_path / "deployment.json") in error
    body = json.loads((terminal.data / "deployment.json").read_text())
    (tmp_path / "deployment.json").write_text(json.dumps({**body, "genesis": "0x" + "00" * 32}))
    assert main.run(["node", "list", "--data", str(tmp_path), "--rpc", terminal.url]) == 1
    assert "another chain" in terminal.capsys.readouterr().err
    assert main.run(["node", "list", "--rpc", "ftp://x", "--data", str(terminal.data)]) == 1


def test_tables_for_people(terminal: Terminal) -> None:
    for arguments in (
        ("node", "list"),
        ("stake", "show", "node"),
        ("funds", "show", "client"),
        ("params", "list"),
        ("params", "show", "audit_rate"),
        ("token", "balance", "client"),
        ("key", "list"),
        ("config",),
        ("token", "transfer", "helper", "1", "--key", "client", "--dry-run"),
    ):
        code, out, _ = terminal.run(*arguments)
        assert code == 0 and out.strip(), arguments
