"""The outbox against a real node process: kill -9 in the middle of a send, an endpoint that goes away, stuck and foreign
transactions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from poip_chain.chain.artifacts import Artifact, compile_source
from poip_chain.chain.devnet.testing import DevnetProcess, running_devnet
from poip_chain.chain.keys import development_key
from poip_chain.chain.outbox import FeePolicy, Outbox, State
from poip_chain.chain.rpc import Call, Chain
from poip_chain.chain.signing import Fees, created_address, sign_transaction
from poip_chain.errors import Refused, TransactionFailed, Unavailable

KEY, CREATOR = development_key(1), development_key(9)
COUNTER = """
# pragma version 0.4.3
# pragma evm-version cancun

count: public(uint256)
of: public(HashMap[uint256, uint256])

@external
def add(number: uint256):
    assert number != 13, "counter: unlucky"
    self.count += 1
    self.of[number] += 1
"""


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return compile_source(COUNTER)


class Counter:
    """The contract above on a chain: each number should be added once."""

    def __init__(self, url: str, artifact: Artifact, folder: Path) -> None:
        self.chain = Chain(url)
        with Outbox(self.chain, CREATOR, folder / "creator.db") as outbox:
            receipt = outbox.execute(Call(None, artifact.bytecode, "create"), "create")
            self.creation_nonce = outbox.status("create").nonce
        assert receipt.contract_address is not None
        self.address = receipt.contract_address
        self.contract = self.chain.contract_at(artifact.abi, self.address)

    def add(self, number: int) -> Call:
        data = bytes.fromhex(self.contract.encode_abi("add", [number])[2:])
        return Call(self.address, data, f"add {number}")

    def added(self, number: int) -> int:
        return int(self.chain.read(self.contract.functions.of(number)))

    def count(self) -> int:
        return int(self.chain.read(self.contract.functions.count()))


@pytest.fixture(scope="module")
def devnet() -> Iterator[str]:
    with running_devnet() as url:
        yield url


@pytest.fixture
def counter(devnet: str, artifact: Artifact, tmp_path: Path) -> Iterator[Counter]:
    """A fresh contract on a node that all tests share."""
    counter = Counter(devnet, artifact, tmp_path)
    yield counter
    counter.chain.request("evm_setAutomine", True)
    counter.chain.close()


def test_sends_reverts_and_restarts(counter: Counter, tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with Outbox(counter.chain, KEY, path) as outbox:
        receipt = outbox.execute(counter.add(1), "one")
        assert receipt.status and receipt.fee > 0
        with pytest.raises(TransactionFailed, match="counter: unlucky"):
            outbox.send(counter.add(13), "unlucky")
        assert not outbox.known("unlucky")
    with Outbox(counter.chain, KEY, path) as outbox:
        assert outbox.send(counter.add(1), "one") == receipt.hash
        outbox.execute(counter.add(2), "two")
    assert (counter.added(1), counter.added(2), counter.count()) == (1, 1, 2)


# A process that adds 0..99, printing each number once its send has returned. It is killed at some point.
SENDER = """
import sys
from pathlib import Path
from poip_chain.chain.keys import development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain

url, path, target = sys.argv[1:4]
chain = Chain(url)
with Outbox(chain, development_key(1), Path(path)) as outbox:
    print("ready", flush=True)
    for number in range(100):
        data = bytes.fromhex(sys.argv[4]) + number.to_bytes(32, "big")
        outbox.send(Call(target, data, f"add {number}"), f"add:{number}")
        print(number, flush=True)
"""


def selector(counter: Counter) -> str:
    return counter.add(0).data[:4].hex()


def start_sender(counter: Counter, path: Path, url: str | None = None) -> subprocess.Popen[str]:
    arguments = [url or counter.chain.url, str(path), counter.address, selector(counter)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen(
        [sys.executable, "-c", SENDER, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("block_time", [None, 0.3])
def test_kill_in_the_middle_of_sends(artifact: Artifact, tmp_path: Path, block_time: float | None) -> None:
    """Killed between any two instructions: what was promised is sent once, and nothing else."""
    path = tmp_path / "outbox.db"
    with running_devnet(block_time=block_time) as url:
        counter = Counter(url, artifact, tmp_path)
        promised = 0
        for lines in (1, 3):
            process = start_sender(counter, path)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            seen = [int(process.stdout.readline()) for _ in range(promised + lines)]
            process.send_signal(signal.SIGKILL)
            seen += [int(line) for line in process.stdout.read().split()]
            process.wait()
            process.stdout.close()
            promised = max(seen) + 1
        with Outbox(counter.chain, KEY, path) as outbox:
            # One more may have been stored in the moment of the kill; whether it was sent or not, it is finished now.
            stored = [number for number in range(100) if outbox.known(f"add:{number}")]
            assert stored == list(range(len(stored))) and promised <= len(stored) <= promised + 1
            for number in stored:
                outbox.wait(f"add:{number}", 30)
            outbox.execute(counter.add(77), "after", 30)
        assert all(counter.added(number) == 1 for number in stored)
        assert counter.count() == len(stored) + 1
        assert counter.chain.transaction_count(KEY.address) == len(stored) + 1
        counter.chain.close()


class Gate:
    """A proxy in front of the node that can be killed in the middle of an exchange, before or after it is forwarded."""

    def __init__(self, target: str) -> None:
        self.forward, self.answer = True, True
        self.forwarded = threading.Event()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sending = b"eth_sendRawTransaction" in body
                if sending and not gate.forward:
                    return
                reply = httpx.post(target, content=body, headers={"content-type": "application/json"}).content
                if sending:
                    gate.forwarded.set()
                    if not gate.answer:
                        return
                self.send_response(200)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def gate(counter: Counter) -> Iterator[Gate]:
    gate = Gate(counter.chain.url)
    yield gate
    gate.close()


@pytest.mark.parametrize("forwarded", [True, False], ids=["after it arrived", "before it arrived"])
def test_the_exchange_breaks_off_at_the_hand_over(
    counter: Counter, gate: Gate, tmp_path: Path, forwarded: bool
) -> None:
    with contextlib.closing(Chain(gate.url)) as chain, Outbox(chain, KEY, tmp_path / "outbox.db") as outbox:
        gate.forward, gate.answer = forwarded, False
        sent = outbox.send(counter.add(1), "one")
        assert counter.added(1) == int(forwarded)
        gate.forward = gate.answer = True
        assert outbox.wait("one", 10).hash == sent
    assert counter.added(1) == 1


def test_the_node_goes_away_and_comes_back(artifact: Artifact, tmp_path: Path) -> None:
    database, path = tmp_path / "chain.db", tmp_path / "outbox.db"
    node = DevnetProcess(db=database)
    try:
        counter = Counter(node.url, artifact, tmp_path)
        with Outbox(counter.chain, KEY, path) as outbox:
            outbox.send(counter.add(1), "one")
            node.kill()
            with pytest.raises(Unavailable):
                outbox.step()
            with pytest.raises(Unavailable):
                outbox.send(counter.add(2), "two")
            assert not outbox.known("two")
            # The same address again: the outbox's connection goes on as if nothing had happened.
            port = node.url.rpartition(":")[2]
            again = DevnetProcess(db=database, arguments=("--port", port))
            try:
                assert again.url == node.url
                outbox.execute(counter.add(2), "two")
                assert outbox.wait("one", 10).status
                assert (counter.added(1), counter.added(2)) == (1, 1)
            finally:
                counter.chain.close()
                again.close()
    finally:
        node.close()


def test_a_stuck_transaction_is_bumped_within_the_bound(counter: Counter, tmp_path: Path) -> None:
    """Without blocks nothing is mined; each replacement must be one that the node's own mempool rules accept."""
    counter.chain.request("evm_setAutomine", False)
    clock = [1000.0]
    fees = FeePolicy(bump_after=10, max_bumps=3)
    with Outbox(counter.chain, KEY, tmp_path / "outbox.db", fees=fees, clock=lambda: clock[0]) as outbox:
        outbox.send(counter.add(1), "one")
        for _ in range(6):
            clock[0] += 11
            outbox.step()
            assert outbox.status("one").error == ""
        transaction = outbox.status("one")
        assert len(transaction.attempts) == 4
        assert len({attempt.hash for attempt in transaction.attempts}) == 4
        counter.chain.request("evm_mine")
        outbox.step()
        mined = outbox.status("one")
        assert mined.state is State.MINED and mined.hash == transaction.attempts[-1].hash
    assert counter.added(1) == 1


def test_a_nonce_that_something_else_used(counter: Counter, tmp_path: Path) -> None:
    chain = counter.chain
    chain.request("evm_setAutomine", False)
    with Outbox(chain, KEY, tmp_path / "outbox.db", finality_blocks=2, rebroadcast_after=0.0) as outbox:
        outbox.send(counter.add(1), "one")
        nonce = outbox.status("one").nonce
        # Somebody has a copy of the key and pays more for the same nonce.
        fees = Fees(50 * 10**9, 40 * 10**9)
        chain.send_raw(sign_transaction(KEY, chain.chain_id, counter.add(5), nonce, 200_000, fees))
        chain.request("evm_mine")
        outbox.step()
        assert (counter.added(1), counter.added(5)) == (0, 1)
        assert outbox.status("one").state is State.OPEN and outbox.status("one").nonce == nonce
        for _ in range(2):
            chain.request("evm_mine")
        outbox.step()
        assert outbox.status("one").nonce == nonce + 1
        chain.request("evm_mine")
        assert outbox.wait("one", 10).status
    assert (counter.added(1), counter.added(5)) == (1, 1)


def test_reorganised_away_and_sent_again(counter: Counter, tmp_path: Path) -> None:
    chain = counter.chain
    with Outbox(chain, KEY, tmp_path / "outbox.db", rebroadcast_after=0.0) as outbox:
        first = outbox.execute(counter.add(1), "one")
        chain.request("devnet_reorg", 1, True)
        assert counter.added(1) == 0
        second = outbox.wait("one", 10)
        if second.block_hash == first.block_hash:
            outbox.step()
            second = outbox.wait("one", 10)
        assert second.hash == first.hash and second.block_hash != first.block_hash
    assert counter.added(1) == 1


def test_two_processes_with_one_key(counter: Counter, tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with Outbox(counter.chain, KEY, path):
        process = start_sender(counter, path)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and output == ""
    with pytest.raises(Refused), Outbox(counter.chain, KEY, path), Outbox(counter.chain, KEY, path):
        pass


def test_addresses_are_predicted(counter: Counter) -> None:
    assert created_address(CREATOR.address, counter.creation_nonce) == counter.address
