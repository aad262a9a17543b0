"""A node process on a real chain, with everything around it failing: engine, client, RPC endpoint, the chain's past.

The engine is the scripted one. The chain makes interval blocks.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from poip_chain.chain.keys import create
from poip_chain.control.client import Answer, KeySigner, NodeClient
from poip_chain.control.ledger import Ledger
from poip_chain.control.view import NetworkView
from poip_chain.economic.onboarding import proof_of_possession
from poip_chain.economic.types import CaseStatus
from poip_chain.spec.objects import (
    Batch,
    FinishReason,
    Part,
    ProofOfPossession,
    Receipt,
    Request,
    SamplingParams,
    audit_draws,
)
from tests.engines.node_kit import PROFILE, key_of
from tests.integration.node_world import HTTP, PASSWORD, ROOT, NodeProcess, World, running_world, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # Long enough for a challenge to be filed before it ends; what only waits lets the time pass.
    windows = {"challenge_window": 300, "thaw_period": 400, "unbonding_period": 500}
    with running_world(tmp_path_factory.mktemp("world"), **windows) as made:
        made.send(made.network.token.approve(made.network.availability.address, 10**30))
        made.interval(0.3)
        yield made


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[NodeProcess]:
    """A node that stays up; tests leave it and the engine working."""
    made = world.add_node("node", stall_timeout=6.0)
    made.start()
    yield made
    made.kill()


def settled(world: World, node: NodeProcess) -> None:
    """Wait until all is final and paid; compare with the chain."""

    passed = 0.0

    def done() -> bool:
        nonlocal passed
        if time.monotonic() - passed > 1:
            world.pass_time(100)
            passed = time.monotonic()
        rest = node.rows("SELECT count(*) FROM receipts WHERE first_seq IS NULL")[0][0]
        batches = {row[0] for row in node.rows("SELECT state FROM batches")}
        return (
            rest == 0
            and batches == {"final"}
            and {r[0] for r in node.rows("SELECT state FROM collections")} == {"settled"}
        )

    wait_until(done, 90, lambda: f"everything settles; log: {node.log()[-2500:]}")
    total = sum(receipt.fee for receipt in node.receipts())
    vault = world.network.vault
    assert world.network.log.next_seq(node.address) == len(node.receipts())
    assert vault.settled(node.client.address, node.address) == total
    assert vault.escrow(node.client.address, node.address).balance == 10**18 - total


def paid(node: NodeProcess, prompt: tuple[int, ...] = (51, 52)) -> Receipt:
    receipt = node.ask(node.client.body(prompt))
    assert receipt is not None, node.log()[-2500:]
    assert node.pay(receipt)
    return receipt


@pytest.mark.parametrize(
    ("fault", "after", "code"),
    [
        ("stall", 0, "unavailable"),
        ("stall", 3, "unavailable"),
        ("break", 0, "unavailable"),
        ("break", 3, "unavailable"),
        ("wrong_id", 0, "input_mismatch"),  # at the first position this is how a refused input looks
        ("wrong_id", 3, "integrity_error"),
        ("vocabulary", 0, "integrity_error"),
        ("vocabulary", 3, "integrity_error"),
        ("wrong_prompt", 0, "input_mismatch"),
        ("refuse_input", 0, "input_mismatch"),
        ("error", 0, "unavailable"),
    ],
)
def test_engine_faults(world: World, node: NodeProcess, fault: str, after: int, code: str) -> None:
    """Whatever the engine does, nothing is signed that should not be, and the next request is served."""
    before = node.receipts()
    body = node.client.body((61, 62, 63))
    world.engine.fault(fault, after)
    try:
        response = HTTP.post(f"{node.url}/v1/requests", json=body)
    finally:
        world.engine.fault("none")
    if response.status_code == 200:
        last = [block for block in response.text.split("\n\n") if block.startswith("event:")][-1]
        assert last.startswith("event: error")
        error = json.loads(last.split("data: ", 1)[1])["error"]
        assert response.text.count("event: token") == after
    else:
        error = response.json()["error"]
        assert after == 0
    assert error["code"] == code
    assert node.receipts() == before
    assert node.fetch(body).status_code == 404
    receipt = node.ask(body)
    assert receipt is not None and receipt.seq == len(before)
    assert node.pay(receipt)


def test_an_engine_process_that_dies_and_comes_back(world: World, node: NodeProcess) -> None:
    body = node.client.body((71, 72))
    world.engine.fault("die", 2)
    assert node.ask(body) is None
    assert HTTP.get(f"{node.url}/healthz").status_code == 503
    refused = HTTP.post(f"{node.url}/v1/requests", json=body)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    world.engine.process.wait(10)
    world.engine.start()
    receipt = node.ask(body)
    assert receipt is not None and node.pay(receipt)
    assert HTTP.get(f"{node.url}/healthz").status_code == 200


def test_a_client_that_aborts_owes_and_pays_for_what_it_got(world: World, node: NodeProcess) -> None:
    aborted = world.engine.stats()["aborted"]
    world.engine.pace(0.05)
    body = node.client.body((81, 82, 83, 84, 85))
    with HTTP.stream("POST", f"{node.url}/v1/requests", json=body) as response:
        lines, seen = response.iter_lines(), 0
        while seen < 3:
            seen += next(lines).startswith("event: token")
    found = wait_until(lambda: r if (r := node.fetch(body)).status_code == 200 else None, 20, "the cancelled receipt")
    world.engine.pace(0)
    wait_until(lambda: world.engine.stats()["aborted"] > aborted, 20, "the engine notices")
    receipt: Receipt = Receipt.from_json(found.json()["receipt"])
    assert receipt.finish_reason == FinishReason.CANCELLED and receipt.output_tokens >= 3
    assert node.ask(body) == receipt
    assert node.pay(receipt)  # a voucher that names it: else it could not be collected
    settled(world, node)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_reorganisation_of_three_blocks(world: World, node: NodeProcess, dropped: bool) -> None:
    """The commitment vanishes, with its transaction or without; it comes back once, and is paid once."""
    count = len(node.rows("SELECT 1 FROM batches"))
    paid(node), paid(node)

    def committed() -> Any:
        rows = node.rows("SELECT batch FROM batches WHERE state = 'committed' ORDER BY first_seq DESC")
        return rows and json.loads(rows[0][0])["block_number"]

    block = wait_until(committed, 60, "the commitment")
    depth = world.chain.block_number() - block + 1
    result = world.chain.request("devnet_reorg", max(depth, 3), dropped)
    assert int(result["ancestorNumber"], 16) < block
    settled(world, node)
    assert len(node.rows("SELECT 1 FROM batches")) > count


class Wire:
    """A TCP line to the chain that can be cut."""

    def __init__(self, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rsplit(":", 1)[1].strip("/")))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = False
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, near, far:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            try:
                while True:
                    for key, _ in selector.select():
                        data = key.fileobj.recv(65_536)  # type: ignore[union-attr]
                        if not data or self.cut:
                            return
                        key.data.sendall(data)
            except OSError:
                return

    def sever(self) -> None:
        """Close everything and let nothing through."""
        self.cut = True
        for line in self._open:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._open = []

    def mend(self) -> None:
        """Let connections through again."""
        self.cut = False

    def close(self) -> None:
        """End."""
        self.sever()
        self._listener.close()


def test_the_rpc_endpoint_goes_away_and_comes_back(world: World) -> None:
    wire = Wire(world.rpc_url)
    node = world.add_node("wired", rpc_url=wire.url, escrow_cache=0.0, rpc_timeout=3.0)
    node.start()
    body = node.client.body()
    receipt = paid(node)
    wire.sever()
    refused = HTTP.post(f"{node.url}/v1/requests", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    # What was signed is served without a chain, and vouchers are taken.
    assert node.ask(node.client.body((51, 52), nonce=b"n" * 32)) is None
    assert node.pay(receipt)
    wait_until(lambda: HTTP.get(f"{node.url}/healthz").json()["status"] == "down", 20, "the node sees it")
    assert "poip_node_chain_up 0.0" in HTTP.get(f"{node.url}/metrics").text
    wire.mend()
    second = node.ask(body)
    assert second is not None and node.pay(second)
    settled(world, node)
    wait_until(lambda: HTTP.get(f"{node.url}/healthz").json()["status"] == "ok", 20, "the node recovers")
    node.kill()
    wire.close()


def batch_of(node: NodeProcess, batch_id: int) -> Batch:
    row = node.rows(f"SELECT batch FROM batches WHERE batch_id = {batch_id}")[0]
    return Batch.from_json(json.loads(row[0]))  # type: ignore[no-any-return]


def test_challenges_on_chain_are_answered(world: World, node: NodeProcess) -> None:
    """All three parts, and a part that is shorter than what is asked for."""
    prompt = tuple(range(100, 140))
    receipts = [paid(node, prompt), paid(node, prompt)]

    def committed() -> Any:
        rows = node.rows(
            f"SELECT b.batch_id FROM batches b JOIN receipts r USING(first_seq) WHERE r.seq = {receipts[0].seq}"
        )
        return rows and rows[0][0]

    batch = batch_of(node, wait_until(committed, 60, "the commitment"))
    delay = world.network.parameters.value_at("beacon_delay", batch.parameters_version)
    wait_until(lambda: world.chain.block_number() >= batch.block_number + delay, 20, "the beacon's block")
    world.send(world.network.log.submit_beacon(world.chain.raw_header(batch.block_number + delay)))
    draw = audit_draws(batch.count, batch.audit_rate_ppm) - 1
    availability = world.network.availability
    first = availability.read("challenge_count") + 1
    for part, first_leaf in ((Part.PROMPT, 0), (Part.OUTPUT, 0), (Part.FINGERPRINT, 0), (Part.OUTPUT, 8)):
        world.send(availability.challenge(batch, draw, part, first_leaf))
    ids = range(first, first + 4)

    def all_answered() -> bool:
        return all(CaseStatus(availability.read("challenge_info", i)[6]) is CaseStatus.ANSWERED for i in ids)

    wait_until(all_answered, 60, lambda: f"the answers; log: {node.log()[-2500:]}")
    # The transcript is public now, without any signature.
    index = next(i for i in range(batch.count) if world.network.log.is_selected(batch, i))
    assert HTTP.get(f"{node.url}/v1/batches/{batch.id}/transcripts/{index}").status_code == 200
    settled(world, node)


def test_a_demand_is_met_at_once(world: World) -> None:
    node = world.add_node("slow", batch_count=1000, batch_age=100_000.0)
    node.start()
    receipt = paid(node)
    signature = bytes.fromhex(
        HTTP.get(f"{node.url}/v1/requests/0x{receipt.request_hash.hex()}").json()["signature"][2:]
    )
    assert world.network.log.next_seq(node.address) == 0
    world.send(world.network.availability.demand_commit(receipt, signature))
    free = world.network.registry.free_stake(node.address)
    wait_until(lambda: world.network.log.next_seq(node.address) == 1, 60, "the commitment")
    terms = world.network.parameters.lock_terms()
    assert free - world.network.registry.free_stake(node.address) == terms.lock(receipt.fee) > 0
    settled(world, node)
    node.kill()


def test_the_demos_cheat_is_convicted(world: World) -> None:
    """withhold_after=0 hides every audited transcript, over HTTP and on chain."""
    node = world.add_node("cheat", misbehave="withhold_after=0")
    node.start()
    paid(node), paid(node)
    wait_until(lambda: node.rows("SELECT 1 FROM batches WHERE state = 'committed'"), 60, "the commitment")
    batch = batch_of(node, node.rows("SELECT batch_id FROM batches")[0][0])
    # A block's hash is known to contracts from the next block on.
    wait_until(lambda: world.chain.block_number() >= batch.block_number + 2, 20, "the block after the beacon's")
    world.send(world.network.log.submit_beacon(world.chain.raw_header(batch.block_number + 1)))
    index = next(i for i in range(batch.count) if world.network.log.is_selected(batch, i))
    assert HTTP.get(f"{node.url}/v1/batches/{batch.id}/transcripts/{index}").status_code == 503
    availability = world.network.availability
    world.send(availability.challenge(batch, 0, Part.OUTPUT, 0))
    number = availability.read("challenge_count")
    deadline = availability.read("challenge_info", number)[5]
    world.pass_time(deadline - world.chain.timestamp() + 1)
    wait_until(lambda: world.chain.timestamp() > deadline, 60, "the deadline")
    world.send(availability.resolve(number, batch))
    wait_until(lambda: node.rows("SELECT 1 FROM batches WHERE state = 'convicted'"), 30, "the node sees it")
    assert world.network.registry.info(node.address).jailed_until > 0
    node.kill()


def run_command(node: NodeProcess, **settings: str) -> subprocess.Popen[bytes]:
    """The node by its command line, on the settings of its last start and those of its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "poip_chain.service.node", "--config", str(node.folder / "node.toml")],
        cwd=ROOT,
        env={**os.environ, "POIP_PASSWORD": PASSWORD, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_command_line(world: World) -> None:
    """Starts, serves, ends in order on SIGTERM; refuses a second process, a lost database and a foreign key."""
    node = world.add_node("command", batch_count=1)
    node.start()
    assert node.stop() == 0
    process = run_command(node)
    wait_until(node.up, 90, "the node starts")
    paid(node)
    wait_until(lambda: world.network.log.next_seq(node.address) == 1, 60, "the commitment")
    second = run_command(node)
    _, errors = second.communicate(timeout=90)
    assert second.returncode == 1 and b"node.port" in errors and b"Traceback" not in errors
    second = run_command(node, POIP_NODE_PORT="0")
    _, errors = second.communicate(timeout=90)
    assert second.returncode == 1 and b"another process uses" in errors and b"Traceback" not in errors
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert lines and all({"event", "level", "timestamp"} <= set(line) for line in lines)

    (node.folder / "node.db").rename(node.folder / "node.lost")
    for name in ("node.db-wal", "node.db-shm"):
        (node.folder / name).unlink(missing_ok=True)
    third = run_command(node)
    _, errors = third.communicate(timeout=90)
    assert third.returncode == 1
    assert b"do not start this node again" in errors and b"Traceback" not in errors


def test_a_scrape_names_nobody(node: NodeProcess) -> None:
    text = HTTP.get(f"{node.url}/metrics").text
    assert "0x" not in text
    assert all(line.startswith(("#", "poip_node_")) for line in text.splitlines())


def test_the_client_library_and_the_node_agree(world: World, tmp_path: Path) -> None:
    """NodeClient against a node that wants strangers to pay first: prepaid, streamed, checked, paid."""
    node = world.add_node("strict", new_client_credit=0)
    node.start()
    signer, view = KeySigner(node.client.key.private_key), NetworkView(world.network)

    async def scenario() -> list[Receipt]:
        vault = view.vault_domain
        ledger = Ledger(tmp_path / "ledger.db", signer.address, vault, lambda voucher: signer.sign(voucher, vault))
        receipts = []
        async with httpx.AsyncClient(trust_env=False) as http:
            client = NodeClient(http, signer, view, ledger)
            for number in range(2):
                body = node.client.body((91, 92, 93 + number))
                request, params = Request.from_json(body["request"]), SamplingParams.from_json(body["params"])
                signed = client.sign(request, params, tuple(body["prompt_ids"]))
                items = [item async for item in client.stream(node.address, node.url, signed, PROFILE)]
                answer = items[-1]
                assert isinstance(answer, Answer)
                assert [item.token_id for item in items[:-1]] == list(answer.transcript.output_ids)
                assert await asyncio.to_thread(node.ask, body) == answer.receipt
                receipts.append(answer.receipt)
            await client.step(view.profile)
            await client.aclose()
        ledger.close()
        return receipts

    assert asyncio.run(scenario()) == node.receipts()
    settled(world, node)
    node.kill()


def test_a_running_node_signs_nothing_that_belongs_to_its_new_key(world: World) -> None:
    """What the old key signs from there on would be void as soon as the rotation takes effect."""
    node = world.add_node("rotated")
    node.start()
    paid(node)
    new, operator = key_of("new key of rotated"), world.operator.address
    deadline = world.chain.timestamp() + 600
    proof = proof_of_possession(world.network, operator, new, ProofOfPossession.NODE_KEY, deadline)
    world.send(world.network.registry.rotate_node_key(node.address, new.address, 2, deadline, proof))
    wait_until(lambda: node.rows("SELECT next_seq FROM key_limits") == [(2,)], 60, "the node sees the rotation")
    paid(node)
    refused = HTTP.post(f"{node.url}/v1/requests", json=node.client.body((51, 52)), timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "key_rotated")
    node.kill()
    old = (node.folder / "key.json").read_bytes()
    create(node.folder / "new.json", PASSWORD, key=new, light=True)
    (node.folder / "new.json").replace(node.folder / "key.json")
    world.fund(new.address)
    world.pass_time(world.network.parameters.value("key_rotation_delay") + 1)
    node.settings["node"] = node.address
    node.start()
    assert node.ended() and "it waits to be committed" in node.log(), "its old key's receipts come first"
    new_key = (node.folder / "key.json").read_bytes()
    (node.folder / "key.json").write_bytes(old)
    node.start()
    wait_until(lambda: world.network.log.next_seq(node.address) == 2, 60, "the old key commits its own")
    node.kill()
    (node.folder / "key.json").write_bytes(new_key)
    node.start()
    paid(node)
    settled(world, node)
    node.kill()


def test_node_status(world: World, node: NodeProcess) -> None:
    """`poip node status` asks node and chain; a node that is not there is exit code 3."""

    def status(url: str, *more: str) -> subprocess.CompletedProcess[str]:
        common = ["--rpc", world.rpc_url, "--deployment", str(world.deployment_path)]
        command = [sys.executable, "-m", "poip_chain.cli", "node", "status", "--url", url, *common, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)

    shown = status(node.url, "--json")
    assert shown.returncode == 0, shown.stderr
    data = json.loads(shown.stdout)
    assert data["node"] == node.address and data["health"]["status"] == "ok"
    assert data["info"]["next_seq"] == data["health"]["receipts"] == len(node.receipts())
    assert "withdrawable" in status(node.url).stdout
    absent = status("http://127.0.0.1:1")
    assert absent.returncode == 3 and "Traceback" not in absent.stderr
