"""`poip gateway`, `poip chat` and `poip receipt` against a gateway over scripted nodes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from poip_chain.cli.main import run as poip
from poip_chain.control.gateway.store import GatewayStore
from poip_chain.spec.objects import Receipt
from tests.engines.gateway_kit import MODEL, GatewayKit, running_gateway
from tests.engines.scripted_chain import ScriptedChain
from tests.engines.scripted_node import Fault, ScriptedNode
from tests.integration.test_gateway_openai import HELLO, MESSAGES, say


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatewayKit]:
    chain = ScriptedChain()
    monkeypatch.setenv("POIP_DATA", str(tmp_path / "data"))
    with running_gateway(tmp_path / "gateway", chain, [ScriptedNode(chain)]) as kit:
        say(kit, HELLO)
        monkeypatch.setenv("POIP_API_KEY", kit.api_key)
        yield kit


def test_chat_streams_and_saves_a_proof(kit: GatewayKit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "answer.json"
    assert poip(["chat", "Hi!", "--url", kit.url, "--max-tokens", "100", "--save", str(saved)]) == 0
    assert capsys.readouterr().out.strip() == HELLO
    document = json.loads(saved.read_text())
    assert document["messages"] == MESSAGES and document["answer"] == HELLO
    assert document["proof"]["user_nonce"] == document["user_nonce"]
    assert poip(["receipt", "show", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert kit.node.address in shown and "ended by" in shown
    assert poip(["receipt", "show", str(saved), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    receipt: Receipt = Receipt.from_json(data["receipt"])
    assert data["receipt_hash"] == "0x" + receipt.struct_hash().hex()
    header = tmp_path / "header.txt"
    short = {name: value for name, value in document["proof"].items() if name != "transcript"}
    header.write_text(base64.urlsafe_b64encode(json.dumps(short).encode()).decode().rstrip("=") + "\n")
    assert poip(["receipt", "show", str(header), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == data


def test_chat_as_json_and_as_a_conversation(
    kit: GatewayKit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert poip(["chat", "Hi!", "--url", kit.url, "--max-tokens", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == HELLO
    lines = iter(["one", "two", ""])
    monkeypatch.setattr("click.prompt", lambda *_, **__: next(lines))
    assert poip(["chat", "--url", kit.url, "--system", "Be brief.", "--max-tokens", "100"]) == 0
    tokenizer = kit.gateway.catalogue.models[0].tokenizer
    asked = tokenizer.decode(kit.node.received[-1]["prompt_ids"])
    for part in ("Be brief.", "one", HELLO, "two"):
        assert part in asked


def test_chat_says_what_is_wrong(
    kit: GatewayKit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert poip(["chat", "Hi!", "--url", "http://127.0.0.1:9"]) == 3
    assert "poip gateway run" in capsys.readouterr().err
    assert poip(["chat", "Hi!", "--url", kit.url, "--model", "gpt-7"]) == 1
    assert "gpt-7" in capsys.readouterr().err
    assert poip(["chat", "Hi!", "--url", kit.url, "--temperature", "0.01"]) == 1
    kit.node.faults.append(Fault(stop_after=3))
    assert poip(["chat", "Hi!", "--url", kit.url, "--max-tokens", "100"]) == 3
    assert "after 3 tokens" in capsys.readouterr().err
    monkeypatch.setenv("POIP_API_KEY", "poip-wrong")
    assert poip(["chat", "Hi!", "--url", kit.url]) == 1
    shown = capsys.readouterr()
    assert "API key" in shown.err and "poip-wrong" not in shown.err + shown.out


def test_api_keys(kit: GatewayKit, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert poip(["gateway", "key", "new", "alice", "--cap", "1.5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["cap"] == str(15 * 10**17)
    store = GatewayStore(tmp_path / "data" / "gateway" / "gateway.db")
    key = store.authenticate(made["api_key"])
    assert key is not None and key.name == "alice"
    assert poip(["gateway", "key", "list"]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "1.5 POIP" in listed and made["api_key"] not in listed
    assert poip(["gateway", "key", "revoke", made["id"]]) == 0
    assert store.authenticate(made["api_key"]) is None
    store.close()
    assert poip(["gateway", "key", "revoke", "nobody"]) == 1


def test_nodes(kit: GatewayKit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert poip(["gateway", "nodes", "--url", kit.url]) == 0
    assert kit.node.address in capsys.readouterr().out
    monkeypatch.delenv("POIP_API_KEY")
    assert poip(["gateway", "nodes", "--url", kit.url]) == 1
    assert "POIP_API_KEY" in capsys.readouterr().err


def test_a_gateway_without_a_model_does_not_start(kit: GatewayKit, capsys: pytest.CaptureFixture[str]) -> None:
    assert poip(["gateway", "run"]) == 1
    assert "models" in capsys.readouterr().err
    assert poip(["gateway", "run", "--model", "/nowhere"]) == 1
    assert "poip model prepare" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", '{"poip": {}}', "[]", "not base64!", "eyJ", '{"a": 1, "a": 2}'])
def test_files_without_a_proof(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert poip(["receipt", "show", str(path)]) == 1
    assert "Error" in capsys.readouterr().err
    assert poip(["receipt", "show", str(tmp_path / "nothing.json")]) == 1


def test_the_models_page_is_what_chat_uses(kit: GatewayKit) -> None:
    headers = {"authorization": f"Bearer {kit.api_key}"}
    assert httpx.get(f"{kit.url}/v1/models", headers=headers).json()["data"][0]["id"] == MODEL
