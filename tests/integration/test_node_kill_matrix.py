"""kill -9 of the node at every named step of a request's life, on a chain with interval blocks.

Each case starts the node so that it kills itself (SIGKILL) at one point, does what a client would do, starts the node
again, and lets everything end. Then nothing may be lost, nothing paid twice, and no sequence number used twice.
The engine is the scripted one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from poip_chain.service.node.faults import CRASH_POINTS
from poip_chain.spec.objects import Receipt
from tests.integration.node_world import NodeProcess, World, running_world, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[NodeProcess]:
    """One node for all cases: what a case leaves behind must not trouble the next one."""
    made = world.add_node("node")
    world.interval(0.3)
    yield made
    made.kill()


class Witness:
    """Remembers every receipt that ever left the node, and finds contradictions."""

    def __init__(self) -> None:
        self.by_seq: dict[int, bytes] = {}
        self.by_request: dict[bytes, bytes] = {}

    def see(self, receipt: Receipt) -> None:
        for seen, name in ((self.by_seq, receipt.seq), (self.by_request, receipt.request_hash)):
            content = seen.setdefault(name, receipt.struct_hash())  # type: ignore[attr-defined]
            assert content == receipt.struct_hash(), f"equivocation at {name!r}"


WITNESS = Witness()


def settle(world: World, node: NodeProcess) -> None:
    """Wait until every receipt is committed, final, paid and settled, and compare all sums with the chain."""
    for receipt in node.receipts():
        WITNESS.see(receipt)

    def done() -> bool:
        unbatched = node.rows("SELECT count(*) FROM receipts WHERE first_seq IS NULL")[0][0]
        batches = {row[0] for row in node.rows("SELECT state FROM batches")}
        shares = {row[0] for row in node.rows("SELECT state FROM collections")}
        return unbatched == 0 and batches == {"final"} and shares == {"settled"}

    wait_until(done, 120, lambda: f"everything settles; log: {node.log()[-3000:]}")
    receipts = node.receipts()
    payer, vault, log = node.client.address, world.network.vault, world.network.log
    total = sum(receipt.fee for receipt in receipts)
    assert [receipt.seq for receipt in receipts] == list(range(len(receipts)))
    assert len({receipt.request_hash for receipt in receipts}) == len(receipts)
    assert receipts[-1].node_cum == receipts[-1].payer_cum == total
    assert log.next_seq(node.address) == len(receipts)
    assert log.node_cum(node.address) == total
    assert vault.settled(payer, node.address) == total
    assert vault.escrow(payer, node.address).balance == 10**18 - total
    buckets = [vault.bucket(i, payer) for i in range(1, log.batch_count() + 1)]
    assert sum(buckets) == 0
    # One per cent of each settled bucket, rounded down, is the protocol's.
    assert vault.earned(node.address) + vault.treasury_due() == total


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_kill_at(world: World, node: NodeProcess, point: str) -> None:
    node.start(f"{point}:2" if point == "mid_stream" else point)
    first, second = node.client.body((21, 22, 23)), node.client.body((31, 32))
    before: Receipt | None = None
    for body in (first, second):
        receipt = node.ask(body)
        if receipt is not None:
            WITNESS.see(receipt)
            before = receipt
            node.pay(receipt)
    node.wait_crashed(120)

    node.start()
    for body in (first, second):
        receipt = node.ask(body)
        assert receipt is not None, node.log()[-3000:]
        WITNESS.see(receipt)
        assert node.pay(receipt)
    if before is not None:
        assert before in node.receipts()
    settle(world, node)
    node.kill()


def test_kill_from_outside_in_the_middle_of_a_stream(world: World, node: NodeProcess) -> None:
    """The engine is asked to stop, nothing is signed, and the retry gives the same answer."""
    node.start()
    world.engine.pace(0.05)
    body = node.client.body((41, 42, 43, 44))
    stream = threading.Thread(target=node.ask, args=(body,))
    stream.start()
    aborted = world.engine.stats()["aborted"]
    wait_until(lambda: world.engine.stats()["running"] == 1, 30, "the engine runs")
    node.kill()
    stream.join()
    wait_until(lambda: world.engine.stats()["aborted"] == aborted + 1, 30, "the engine notices")
    world.engine.pace(0)
    count = len(node.receipts())
    node.start()
    assert node.fetch(body).status_code == 404
    receipt = node.ask(body)
    assert receipt is not None and receipt.seq == count
    assert node.pay(receipt)
    settle(world, node)
    # An orderly end is no crash, and leaves the file to the next process.
    assert node.stop() == 0
    node.start()
    assert node.ask(body) == receipt
    node.kill()
