"""Blocks by the clock, time travel, snapshots, reorganisations, and what is left after kill -9."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from web3 import Web3

from poip_chain.chain.devnet.testing import DevnetProcess, running_devnet
from poip_chain.errors import Unavailable
from tests.integration.devnet_probe import deploy, local_node, rpc


def client(url: str) -> Web3:
    return Web3(Web3.HTTPProvider(url))


def wait_for_block(w3: Web3, number: int) -> None:
    deadline = time.monotonic() + 30
    while w3.eth.block_number < number:
        assert time.monotonic() < deadline, "no blocks come"
        time.sleep(0.05)


def test_interval_blocks_follow_the_clock_and_may_be_empty() -> None:
    with running_devnet(block_time=1) as url:
        w3 = client(url)
        wait_for_block(w3, 1)
        start = w3.eth.block_number
        wait_for_block(w3, start + 4)
        blocks = [w3.eth.get_block(start + index) for index in range(5)]
        times = [block["timestamp"] for block in blocks]
        assert times == sorted(set(times))
        assert abs(w3.eth.get_block("latest")["timestamp"] - time.time()) < 2.5
        assert all(block["transactions"] == [] for block in blocks)
        rpc(w3, "evm_increaseTime", 3600)
        wait_for_block(w3, w3.eth.block_number + 2)
        assert abs(w3.eth.get_block("latest")["timestamp"] - time.time() - 3600) < 2.5
        # Ten transactions of one sender, the last nonce first: all in order as soon as the gap is filled.
        sender, other = w3.eth.accounts[:2]
        hashes = [
            w3.eth.send_transaction({"from": sender, "to": other, "value": 1, "nonce": nonce, "gas": 21_000})  # type: ignore[typeddict-item]
            for nonce in reversed(range(10))
        ]
        receipts = [w3.eth.wait_for_transaction_receipt(one, poll_latency=0.05) for one in hashes]
        assert all(receipt["status"] == 1 for receipt in receipts)
        places = [(receipt["blockNumber"], receipt["transactionIndex"]) for receipt in receipts]
        assert places == sorted(places, reverse=True)


def test_slow_calls_do_not_stop_the_blocks() -> None:
    with local_node(block_time=1.0, automine=False) as w3:
        probe = deploy(w3, w3.eth.accounts[0])
        before = w3.eth.block_number
        begun = time.monotonic()
        slow = threading.Thread(target=lambda: probe.functions.spin(40_000).call({"gas": 50_000_000}))
        slow.start()
        quickest = min(_seconds(lambda: w3.eth.block_number) for _ in range(5))
        slow.join()
        passed = time.monotonic() - begun
        assert passed > 2, "the call was too quick to show anything"
        assert w3.eth.block_number - before >= int(passed / 2)
        assert quickest < 1


def _seconds(action: object) -> float:
    begun = time.monotonic()
    action()  # type: ignore[operator]
    return time.monotonic() - begun


def test_mining_modes_can_be_changed() -> None:
    with local_node() as w3:
        rpc(w3, "evm_setAutomine", False)
        waiting = w3.eth.send_transaction({"from": w3.eth.accounts[0], "to": w3.eth.accounts[1]})
        assert rpc(w3, "txpool_status") == {"pending": "0x1", "queued": "0x0"}
        assert rpc(w3, "eth_getTransactionReceipt", waiting.to_0x_hex()) is None
        rpc(w3, "evm_setIntervalMining", 1)
        wait_for_block(w3, 2)
        assert w3.eth.get_transaction_receipt(waiting)["status"] == 1
        rpc(w3, "evm_setIntervalMining", 0)
        stopped = w3.eth.block_number
        time.sleep(1.5)
        assert w3.eth.block_number == stopped
        w3.eth.send_transaction({"from": w3.eth.accounts[0], "to": w3.eth.accounts[1]})
        rpc(w3, "evm_setAutomine", True)
        assert w3.eth.block_number == stopped + 1


def test_snapshot_and_revert_restore_head_clock_and_pool() -> None:
    with local_node() as w3:
        sender, other = w3.eth.accounts[:2]
        probe = deploy(w3, sender)
        probe.functions.store(1, 5).transact({"from": sender})
        block, head = w3.eth.block_number, w3.eth.get_block("latest")["hash"]
        first = rpc(w3, "evm_snapshot")
        rpc(w3, "evm_increaseTime", 1000)
        gone = probe.functions.store(1, 6).transact({"from": sender})
        second = rpc(w3, "evm_snapshot")
        rpc(w3, "evm_setAutomine", False)
        w3.eth.send_transaction({"from": sender, "to": other})
        rpc(w3, "evm_setAutomine", False)
        assert rpc(w3, "evm_revert", first) is True
        assert (w3.eth.block_number, w3.eth.get_block("latest")["hash"]) == (block, head)
        assert probe.functions.values(1).call() == 5
        assert rpc(w3, "eth_getTransactionReceipt", gone.to_0x_hex()) is None
        assert len(probe.events.Stored().get_logs(from_block=0)) == 1
        assert rpc(w3, "txpool_status")["pending"] == "0x0"
        assert rpc(w3, "evm_revert", second) is False
        assert rpc(w3, "evm_revert", first) is False
        rpc(w3, "evm_mine")
        assert abs(w3.eth.get_block("latest")["timestamp"] - time.time()) < 100
        assert w3.eth.get_block("latest")["parentHash"] == head


def test_next_timestamp_is_exact_and_time_goes_on_from_it() -> None:
    with local_node() as w3:
        wanted = w3.eth.get_block("latest")["timestamp"] + 100_000
        rpc(w3, "evm_setNextBlockTimestamp", wanted)
        rpc(w3, "evm_mine")
        assert w3.eth.get_block("latest")["timestamp"] == wanted
        rpc(w3, "evm_mine")
        assert wanted < w3.eth.get_block("latest")["timestamp"] < wanted + 60
        rpc(w3, "evm_mine", {"timestamp": wanted + 500, "blocks": 2})
        assert w3.eth.get_block(w3.eth.block_number - 1)["timestamp"] == wanted + 500
        for past in (wanted, 0):
            with pytest.raises(ValueError, match="must be above"):
                rpc(w3, "evm_setNextBlockTimestamp", past)
        rpc(w3, "anvil_mine", 3, 60)
        newest = w3.eth.block_number
        times = [w3.eth.get_block(newest - back)["timestamp"] for back in (1, 0)]
        assert times[1] - times[0] == 60


@pytest.mark.parametrize("drop", [False, True])
def test_reorganisation_of_three_blocks(drop: bool) -> None:
    with local_node() as w3:
        sender = w3.eth.accounts[0]
        probe = deploy(w3, sender)
        rpc(w3, "evm_mine")
        hashes = [probe.functions.store(key, key + 1).transact({"from": sender}) for key in range(3)]
        head = w3.eth.block_number
        old = [w3.eth.get_block(head - back) for back in range(3)]
        ancestor = w3.eth.get_block(head - 3)
        done = rpc(w3, "devnet_reorg", 3, drop)
        assert done["oldHead"] == old[0]["hash"].to_0x_hex()
        assert done["ancestor"] == ancestor["hash"].to_0x_hex()
        assert w3.eth.block_number == head
        new = [w3.eth.get_block(head - back) for back in range(3)]
        assert [block["timestamp"] for block in new] == [block["timestamp"] for block in old]
        assert not {block["hash"] for block in new} & {block["hash"] for block in old}
        assert new[2]["parentHash"] == ancestor["hash"]
        assert all(block["transactions"] == [] for block in new)
        # A replaced block can still be asked for by its hash, as with any node.
        assert w3.eth.get_block(old[0]["hash"])["hash"] == old[0]["hash"]
        assert all(rpc(w3, "eth_getTransactionReceipt", one.to_0x_hex()) is None for one in hashes)
        assert probe.functions.values(1).call() == 0
        assert probe.events.Stored().get_logs(from_block=0) == []
        assert done["returned"] == ([] if drop else [one.to_0x_hex() for one in hashes])
        rpc(w3, "evm_mine")
        included = w3.eth.get_block("latest")["transactions"]
        assert included == ([] if drop else hashes)
        assert probe.functions.values(1).call() == (0 if drop else 2)


def test_everything_is_there_again_after_kill_9(tmp_path: Path) -> None:
    db = tmp_path / "chain.db"
    node = DevnetProcess(db=db)
    w3 = client(node.url)
    sender = w3.eth.accounts[0]
    probe = deploy(w3, sender)
    rpc(w3, "evm_increaseTime", 50_000)
    receipt = w3.eth.wait_for_transaction_receipt(probe.functions.store(4, 44).transact({"from": sender}))
    rpc(w3, "devnet_reorg", 1)
    rpc(w3, "evm_mine")
    balance, head = w3.eth.get_balance(sender), w3.eth.get_block("latest", True)
    node.kill()
    node.close()
    with running_devnet(db=db) as url:
        again = client(url)
        assert again.eth.get_block("latest", True) == head
        assert again.eth.get_balance(sender) == balance
        stored = again.eth.contract(address=probe.address, abi=probe.abi)
        assert stored.functions.values(4).call() == 44
        assert stored.functions.values(4).call(block_identifier=head["number"] - 1) == 0
        assert len(stored.events.Stored().get_logs(from_block=0)) == 1
        assert again.eth.get_transaction_receipt(receipt["transactionHash"])["blockHash"] == head["hash"]
        again.eth.send_transaction({"from": sender, "to": sender})
        assert again.eth.get_block("latest")["timestamp"] >= int(time.time()) + 49_990
        assert again.eth.get_block("latest")["parentHash"] == head["hash"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_while_blocks_are_being_sealed(tmp_path: Path) -> None:
    """At random moments under load: what was once reported as sealed is there again, whole and linked."""
    db = tmp_path / "chain.db"
    known: dict[int, bytes] = {}
    for round_number in range(6):
        node = DevnetProcess(db=db)
        w3 = client(node.url)
        sender, other = w3.eth.accounts[:2]
        for number, block_hash in known.items():
            assert w3.eth.get_block(number)["hash"] == block_hash
        head = w3.eth.block_number
        assert head >= max(known, default=0)
        for number in range(max(1, head - 20), head + 1):
            block = w3.eth.get_block(number, True)
            assert block["parentHash"] == w3.eth.get_block(number - 1)["hash"]
            for transaction in block["transactions"]:
                assert w3.eth.get_transaction_receipt(transaction["hash"])["status"] == 1  # type: ignore[index]
        assert w3.eth.get_transaction_count(sender) == w3.eth.get_balance(other) - 10_000 * 10**18
        killer = threading.Timer(0.1 + 0.23 * round_number, node.kill)
        try:
            while True:
                receipt = w3.eth.get_transaction_receipt(
                    w3.eth.send_transaction({"from": sender, "to": other, "value": 1, "gas": 21_000})  # type: ignore[typeddict-item]
                )
                known[receipt["blockNumber"]] = receipt["blockHash"]
                if killer.ident is None:  # not started yet; a dead one may have killed already
                    killer.start()
        except (OSError, ValueError):
            pass  # the connection broke: it was killed
        killer.join()
        node.close()
    assert len(known) >= 12
    with sqlite3.connect(db) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_while_blocks_come_by_the_clock(tmp_path: Path) -> None:
    """What was seen in a block stays; what only waited is gone, as from any node's pool, and may be sent again."""
    db = tmp_path / "chain.db"
    seen: dict[int, bytes] = {}
    sent: list[str] = []  # by nonce
    for round_number in range(5):
        node = DevnetProcess(block_time=0.2, db=db)
        w3 = client(node.url)
        sender, other = w3.eth.accounts[:2]

        def send(nonce: int, w3: Web3 = w3, sender: str = sender, other: str = other) -> str:
            fields = {"from": sender, "to": other, "value": 1, "gas": 21_000, "gasPrice": 10**11, "nonce": nonce}
            return w3.eth.send_transaction(fields).to_0x_hex()  # type: ignore[arg-type]

        assert rpc(w3, "txpool_status") == {"pending": "0x0", "queued": "0x0"}
        for number, block_hash in seen.items():
            assert w3.eth.get_block(number)["hash"] == block_hash
        head = w3.eth.block_number
        assert head >= max(seen, default=0)
        for number in range(max(1, head - 30), head + 1):
            assert w3.eth.get_block(number)["parentHash"] == w3.eth.get_block(number - 1)["hash"]
        # The state is that of the blocks: each transfer once, and no other.
        done = w3.eth.get_transaction_count(sender)
        assert done <= len(sent) and done == w3.eth.get_balance(other) - 10_000 * 10**18
        for nonce, one in list(enumerate(sent))[max(0, done - 20) :]:
            receipt = rpc(w3, "eth_getTransactionReceipt", one)
            assert (receipt is not None) == (nonce < done)
        assert [send(nonce) for nonce in range(done, len(sent))] == sent[done:], "the same transactions again"
        wait_for_block(w3, head + 2)  # blocks go on by themselves
        for one in sent[done:]:
            assert w3.eth.wait_for_transaction_receipt(one, poll_latency=0.05)["status"] == 1  # type: ignore[arg-type]
        killer = threading.Timer(0.3 + 0.17 * round_number, node.kill)
        killer.start()
        try:
            while True:
                sent.append(send(len(sent)))
                block = w3.eth.get_block("latest")
                seen[block["number"]] = block["hash"]
        except (OSError, ValueError):
            pass  # the connection broke: it was killed
        killer.join()
        node.close()
    assert len(seen) >= 5
    with sqlite3.connect(db) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


def test_kill_9_before_the_next_block(tmp_path: Path) -> None:
    """What only waited is gone with the process that held it, and is taken again under the same nonce."""
    db = tmp_path / "chain.db"
    node = DevnetProcess(block_time=3600, db=db)
    w3 = client(node.url)
    fields = {"from": w3.eth.accounts[0], "to": w3.eth.accounts[1], "value": 1, "gas": 21_000, "gasPrice": 10**11}
    waiting = [w3.eth.send_transaction({**fields, "nonce": nonce}) for nonce in range(3)]  # type: ignore[typeddict-item]
    assert rpc(w3, "txpool_status") == {"pending": "0x3", "queued": "0x0"}
    node.kill()
    node.close()
    with DevnetProcess(block_time=0.2, db=db) as again:
        w3 = client(again.url)
        assert rpc(w3, "txpool_status") == {"pending": "0x0", "queued": "0x0"}
        assert w3.eth.get_transaction_count(fields["from"]) == 0  # type: ignore[arg-type]
        for nonce, one in enumerate(waiting):
            assert w3.eth.send_transaction({**fields, "nonce": nonce}) == one  # type: ignore[typeddict-item]
        for one in waiting:
            assert w3.eth.wait_for_transaction_receipt(one, poll_latency=0.05)["status"] == 1


def test_sigterm_ends_it_in_order(tmp_path: Path) -> None:
    db = tmp_path / "chain.db"
    with DevnetProcess(block_time=0.2, db=db) as node:
        wait_for_block(client(node.url), 2)
        assert node.terminate() == 0
        assert "Traceback" not in node.log_tail()
    assert [path.name for path in tmp_path.iterdir()] == ["chain.db"], "the write-ahead log was folded in"


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    db = tmp_path / "chain.db"
    with running_devnet(db=db), pytest.raises(Unavailable, match="Is another devnet running"):
        DevnetProcess(db=db)
