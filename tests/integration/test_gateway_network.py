"""The gateway as a process over real nodes, contracts and a devnet; the engine alone is scripted.

From an OpenAI request to earned money, `poip verify` at each stage, and kill -9 of the gateway at every named step.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from poip_chain.chain.keys import create
from poip_chain.cli.main import run as poip
from poip_chain.control.faults import CRASH_POINTS
from poip_chain.control.verify import Expected, verify_proof
from poip_chain.control.view import NetworkView
from poip_chain.spec.objects import Receipt
from tests.engines.node_kit import key_of
from tests.integration.gateway_world import ESCROW, MODEL, GatewayProcess, running_gateway_world
from tests.integration.node_world import PASSWORD, POIP, NodeProcess, World, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MESSAGES: Any = [{"role": "user", "content": "Hi!"}]

Parts = tuple[World, NodeProcess, GatewayProcess]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with running_gateway_world(tmp_path_factory.mktemp("gateway")) as (world, nodes, gateway):
        world.interval(0.3)
        yield world, nodes[0], gateway


def ask(gateway: GatewayProcess, **options: Any) -> Any:
    with gateway.sdk() as sdk:
        return sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, **options)


def receipts_of(node: NodeProcess, gateway: GatewayProcess) -> list[Receipt]:
    return [receipt for receipt in node.receipts() if receipt.payer == gateway.key.address]


def settled(world: World, node: NodeProcess, gateway: GatewayProcess) -> bool:
    """Nothing is open, every receipt of the node is accepted, vouched for and accounted to the API key, once."""
    live = gateway.ledger_rows("SELECT count(*) FROM attempts WHERE state IN ('open', 'abandoned')")[0][0]
    undelivered = gateway.ledger_rows("SELECT count(*) FROM vouchers WHERE delivered = 0")[0][0]
    total = sum(receipt.fee for receipt in receipts_of(node, gateway))
    accepted = int(gateway.ledger_rows("SELECT accepted FROM accounts")[0][0])
    return (live, undelivered, accepted) == (0, 0, total) and gateway.spent() == (total, 0)


def story(node: NodeProcess, gateway: GatewayProcess) -> str:
    """What `settled` looks at, and both logs, for a failure."""
    attempts = gateway.ledger_rows("SELECT request_hash, state, reason FROM attempts ORDER BY rowid DESC LIMIT 6")
    vouchers = gateway.ledger_rows("SELECT count(*), sum(delivered) FROM vouchers")
    accounts = gateway.ledger_rows("SELECT * FROM accounts")
    fees = [receipt.fee for receipt in receipts_of(node, gateway)]
    facts = f"{attempts=}\n{vouchers=}\n{accounts=}\n{fees=} {sum(fees)=}\n{gateway.spent()=}"
    return f"all is settled\n{facts}\ngateway: {gateway.log()[-3000:]}\nnode: {node.log()[-2000:]}"


def collected(world: World, node: NodeProcess, gateway: GatewayProcess) -> bool:
    total = sum(receipt.fee for receipt in receipts_of(node, gateway))
    return world.network.vault.settled(gateway.key.address, node.address) == total


def test_from_a_question_to_earned_money(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world, node, gateway = parts
    gateway.start()
    assert world.network.vault.escrow(gateway.key.address, node.address).balance == ESCROW
    answer = ask(gateway, extra_body={"poip_user_nonce": "07" * 32})
    text = answer.choices[0].message.content
    with gateway.sdk() as sdk:
        stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, seed=3, stream=True)
        chunks = list(stream)
    again = ask(gateway, seed=3)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == again.choices[0].message.content, "the same seed gives the same answer"
    assert chunks[-1].poip["proof"]["receipt"]["request_hash"] != again.poip["proof"]["receipt"]["request_hash"]

    proof = answer.poip["proof"]
    view = NetworkView(world.network)
    expected = Expected(messages=MESSAGES, answer=text, user_nonce=b"\x07" * 32)
    report = verify_proof(proof, view, tokenizer_dir=gateway.model, expected=expected)
    assert report.ok, report.failed
    wait_until(lambda: verify_proof(proof, view).status == "final", 90, "the batch becomes final")
    wait_until(lambda: settled(world, node, gateway), 60, "all is settled")
    wait_until(lambda: collected(world, node, gateway), 60, "the vouchers are collected")
    wait_until(lambda: world.network.vault.earned(node.address) > 0, 60, "the node has earned")

    saved = tmp_path / "answer.json"
    saved.write_text(answer.to_json())
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps(MESSAGES))
    common = ["--rpc", world.rpc_url, "--deployment", str(world.deployment_path)]
    options = ["--messages", str(messages), "--model", str(gateway.model), "--user-nonce", "0x" + "07" * 32]
    assert poip(["verify", str(saved), *common, *options, "--require-final"]) == 0
    said = capsys.readouterr().out
    assert "Verified: what was checked holds. The receipt is final." in said and "NOT checked" not in said
    messages.write_text(json.dumps([{"role": "user", "content": "Ho!"}]))
    assert poip(["verify", str(saved), *common, *options, "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in document["checks"] if check["result"] == "failed"] == ["prompt"]
    forged = json.loads(answer.to_json())
    forged["poip"]["proof"]["receipt"]["fee"] = "1"
    saved.write_text(json.dumps(forged))
    assert poip(["verify", str(saved), *common]) == 4
    assert "NOT VERIFIED" in capsys.readouterr().out
    assert poip(["verify", str(saved), "--rpc", "http://127.0.0.1:9", "--deployment", str(world.deployment_path)]) == 3
    assert gateway.stop() == 0


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_kill_9_at_every_step_loses_nothing_and_pays_nothing_twice(parts: Parts, point: str) -> None:
    world, node, gateway = parts
    before = len(receipts_of(node, gateway))
    wanted = 0
    if "move" in point:
        # Nothing is deposited for a node that has enough: make it want more each time.
        wanted = ESCROW * (2 + CRASH_POINTS.index(point))
        gateway.settings.update(escrow_per_node=str(wanted), escrow_low_water=str(wanted - POIP // 2))
        gateway.start(point, wait=False)
    else:
        gateway.start(point)
        with gateway.sdk() as sdk, pytest.raises(openai.APIError):
            for _ in sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, stream=True):
                pass
            # The answer may be complete before the vouchers go: the process dies a moment later.
            wait_until(gateway.ended, 30, "the crash")
            raise openai.APIConnectionError(request=None)  # type: ignore[arg-type]
    wait_until(gateway.ended, 60, lambda: f"the crash; log: {gateway.log()[-2000:]}")
    assert gateway.process.exitcode == -9
    gateway.start()
    text = ask(gateway).choices[0].message.content
    assert text is not None
    if point in ("gateway_reserved", "gateway_opened"):
        # The node never heard of it: it is given up when its deadline has passed.
        world.pass_time(200)
    wait_until(lambda: settled(world, node, gateway), 90, lambda: story(node, gateway))
    after = receipts_of(node, gateway)
    lost = point in ("gateway_reserved", "gateway_opened") or "move" in point
    assert len(after) - before == (1 if lost else 2)
    wait_until(lambda: collected(world, node, gateway), 60, "the vouchers are collected")
    if "move" in point:
        escrow = world.network.vault.escrow(gateway.key.address, node.address)
        total = sum(receipt.fee for receipt in after)
        assert wanted - POIP // 2 <= escrow.balance <= wanted, "deposited once"
        wallet = world.network.token.balance(gateway.key.address)
        assert wallet + escrow.balance + total == 100 * POIP
    assert gateway.stop() == 0


def test_a_node_that_is_killed_mid_stream_is_reported_and_not_paid(parts: Parts) -> None:
    world, node, gateway = parts
    gateway.start()
    world.engine.pace(0.2)
    failed: list[openai.APIError] = []

    def work() -> None:
        try:
            ask(gateway, stream=False)
        except openai.APIError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: world.engine.stats()["running"] == 1, 60, "the answer has begun")
    node.kill()
    thread.join(60)
    assert len(failed) == 1
    world.engine.pace(0.0)
    node.start()
    wait_until(gateway.ready, 60, "the node is back")
    wait_until(lambda: ask_succeeds(gateway), 60, "the node is no longer benched")
    wait_until(lambda: settled(world, node, gateway), 90, lambda: story(node, gateway))
    assert gateway.stop() == 0


def test_poip_request_asks_pays_and_is_verified(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who signs for himself, on the command line, against the same node."""
    world, node, gateway = parts
    key = key_of("user of the command line")
    create(tmp_path / "keys" / "me.json", PASSWORD, key=key, light=True)
    monkeypatch.setenv("POIP_PASSWORD", PASSWORD)
    place = ["--rpc", world.rpc_url, "--deployment", str(world.deployment_path), "--data", str(tmp_path)]
    common = [*place, "--key", "me"]
    saved = tmp_path / "answer.json"
    model = ["--model", str(gateway.model), "--model-id", "0x" + gateway.model_id.hex()]
    send = [
        "request",
        "send",
        "Hi!",
        *model,
        "--max-tokens",
        "40",
        "--save",
        str(saved),
        *common,
    ]
    assert poip([*send, "--yes"]) == 3
    assert "escrow with it has 0 wei free" in capsys.readouterr().err
    world.send(world.network.vault.deposit(key.address, node.address, POIP))
    assert poip([*send, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["node"] == node.address
    assert poip([*send, "--yes", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(saved.read_text())["proof"] == document["proof"]
    request_hash = document["proof"]["receipt"]["request_hash"]
    assert poip(["request", "show", request_hash, *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attempts"][0]["state"] == "checked"
    assert poip(["request", "settle", *common]) == 0
    assert poip(["verify", str(saved), "--model", str(gateway.model), *place]) == 0
    assert "Verified" in capsys.readouterr().out
    fee = int(document["fee"])
    wait_until(lambda: world.network.vault.settled(key.address, node.address) == fee, 60, "the node collects")


def ask_succeeds(gateway: GatewayProcess) -> bool:
    try:
        return bool(ask(gateway))
    except openai.APIStatusError:
        return False
