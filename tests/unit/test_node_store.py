"""The node's database: one receipt per number and per request, whatever happens, and what it refuses to open over."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.outbox_store import OutboxStore
from poip_chain.chain.private_files import prepare_private
from poip_chain.errors import ConfigurationError, IntegrityError, NotFound
from poip_chain.proof.database import Database
from poip_chain.service.node.schema import BatchState, Record, StoredReceipt
from poip_chain.service.node.store import Draft, Store
from poip_chain.spec.objects import Batch, Receipt, Voucher
from poip_chain.spec.types import ZERO_HASH
from tests.engines.model_chain import CHAIN_ID, LOG
from tests.engines.node_kit import key_of

NODE = key_of("node").address
PAYER, OTHER = key_of("payer").address, key_of("other").address
RECORD = Record("{}", b"s" * 65, "{}", b"t")


def sign(receipt: Receipt) -> bytes:
    return receipt.struct_hash() + b"signature"


def draft(name: int, fee: int = 10, payer: Any = PAYER, **changes: Any) -> Draft:
    values: dict[str, Any] = {
        "request_hash": name.to_bytes(32, "big"),
        "model_id": b"m" * 32,
        "profile_version": 1,
        "transcript_root": bytes(32),
        "output_tokens": 1,
        "finish_reason": 0,
        "fee": fee,
        "payer": payer,
        "issued_at": 1000,
    }
    return Draft(**{**values, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store(tmp_path / "node.db", node=NODE, chain_id=CHAIN_ID, log=LOG)
    yield opened
    opened.close()


def issue(store: Store, name: int, fee: int = 10, payer: Any = PAYER, **changes: Any) -> StoredReceipt:
    return store.issue(draft(name, fee, payer, **changes), RECORD, sign)


def test_numbers_and_totals_run_on(store: Store) -> None:
    receipts = [issue(store, 1, 10).receipt, issue(store, 2, 5, OTHER).receipt, issue(store, 3, 7).receipt]
    assert [r.seq for r in receipts] == [0, 1, 2]
    assert [r.node_cum for r in receipts] == [10, 15, 22]
    assert [r.payer_cum for r in receipts] == [10, 5, 17]
    assert store.payer_cum(PAYER) == 17 and store.payer_cum(OTHER) == 5
    assert [store.node_cum_before(i) for i in range(4)] == [0, 10, 15, 22]


def test_a_request_has_one_receipt(store: Store) -> None:
    first = issue(store, 1)
    again = issue(store, 1, 99, output_tokens=55)
    assert again == first
    assert store.next_seq() == 1


def test_a_signer_that_fails_leaves_no_trace(store: Store) -> None:
    def broken(_: Receipt) -> bytes:
        raise RuntimeError("no key")

    with pytest.raises(RuntimeError):
        store.issue(draft(1), RECORD, broken)
    assert store.next_seq() == 0
    assert issue(store, 2).receipt.seq == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE receipts SET signature = x'00'",
        "UPDATE receipts SET seq = 9",
        "UPDATE receipts SET receipt = '{}'",
        "DELETE FROM receipts",
        "INSERT INTO receipts SELECT 5, request_hash, x'01', payer, fee, payer_cum, node_cum, profile_version, receipt, "
        "signature, NULL FROM receipts",
        "INSERT INTO receipts SELECT seq, x'02', x'03', payer, fee, payer_cum, node_cum, profile_version, receipt, "
        "signature, NULL FROM receipts",
    ],
)
def test_signed_rows_cannot_be_touched(store: Store, statement: str) -> None:
    issue(store, 1)
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as db:
        db.execute(statement)
    assert store.receipt_at(0) is not None


def test_concurrent_writers_share_one_sequence(store: Store) -> None:
    def write(start: int) -> None:
        for name in range(start, start + 20):
            issue(store, name)

    threads = [threading.Thread(target=write, args=(1000 * k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = store.rows("SELECT seq, node_cum FROM receipts ORDER BY seq")
    assert [row[0] for row in rows] == list(range(80))
    assert [int(row[1]) for row in rows] == [10 * (i + 1) for i in range(80)]


def test_a_restart_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "node.db", node=NODE, chain_id=CHAIN_ID, log=LOG)
    first = issue(store, 1)
    store.close()
    store = Store(tmp_path / "node.db", node=NODE, chain_id=CHAIN_ID, log=LOG)
    assert store.receipt_of(first.receipt.request_hash) == first
    assert issue(store, 2).receipt.seq == 1
    store.close()


def test_only_one_process_may_use_it(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another process"):
        Store(tmp_path / "node.db", node=NODE, chain_id=CHAIN_ID, log=LOG)


@pytest.mark.parametrize("changes", [{"node": OTHER}, {"chain_id": 1}, {"log": OTHER}])
def test_it_belongs_to_one_node_and_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    identity = {"node": NODE, "chain_id": CHAIN_ID, "log": LOG}
    Store(tmp_path / "node.db", **identity).close()  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="belongs to another"):
        Store(tmp_path / "node.db", **{**identity, **changes})
    # The refused opening has let go of the lock.
    Store(tmp_path / "node.db", **identity).close()  # type: ignore[arg-type]


def test_a_chain_that_knows_more_stops_the_node(store: Store) -> None:
    issue(store, 1)
    store.check_against_chain(0, 0)
    store.check_against_chain(1, 10)
    with pytest.raises(IntegrityError, match="up to number 1, this database only up to 0") as caught:
        store.check_against_chain(2, 20)
    assert "do not start this node again" in caught.value.hint
    with pytest.raises(IntegrityError, match="different histories"):
        store.check_against_chain(1, 11)


def test_batches_take_the_oldest_of_one_model(store: Store) -> None:
    for name in range(3):
        issue(store, name)
    issue(store, 3, profile_version=2)
    assert store.compose(maximum=8, now=1, due=lambda count, oldest: count > 3) is None
    first = store.compose(maximum=2, now=1, due=lambda count, oldest: True)
    second = store.compose(maximum=8, now=1, due=lambda count, oldest: True)
    third = store.compose(maximum=8, now=1, due=lambda count, oldest: True)
    assert first and second and third
    assert [(b.first_seq, b.count, b.total_fee, b.profile_version) for b in (first, second, third)] == [
        (0, 2, 20, 1),
        (2, 1, 10, 1),
        (3, 1, 10, 2),
    ]
    assert store.compose(maximum=8, now=1, due=lambda count, oldest: True) is None
    assert [r.receipt.seq for r in store.receipts_in(first)] == [0, 1]
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as db:
        db.execute("UPDATE batches SET root = x'00'")


def committed(store: Store, first_seq: int, **changes: Any) -> Batch:
    own = store.batch_at(first_seq)
    assert own is not None
    batch = Batch(7, NODE, own.model_id, 1, own.root, own.first_seq, own.count, own.total_fee, 0, 0, 1, 0, 1, 1, 2)
    changed: Batch = batch.replace(**changes)
    return changed


def test_a_commitment_must_be_ours(store: Store) -> None:
    issue(store, 1)
    store.compose(maximum=8, now=1, due=lambda count, oldest: True)
    with pytest.raises(IntegrityError, match="did not compose"):
        store.set_committed(committed(store, 0, root=b"x" * 32))
    store.set_committed(committed(store, 0))
    found = store.batch_of_id(7)
    assert found is not None and found.state is BatchState.COMMITTED
    store.set_removed(0)
    assert store.batch_of_id(7) is None
    assert [b.state for b in store.batches(BatchState.COMPOSED)] == [BatchState.COMPOSED]


def test_transcripts_go_when_their_batch_has_long_ended(store: Store) -> None:
    issue(store, 1)
    store.compose(maximum=8, now=1, due=lambda count, oldest: True)
    issue(store, 2)
    store.set_committed(committed(store, 0))
    assert store.prune(10**9) == 0
    store.set_ended(7, BatchState.FINAL, 5000)
    assert store.prune(5000) == 0
    assert store.prune(5001) == 1
    with pytest.raises(NotFound):
        store.record_of(0)
    assert store.record_of(1) == RECORD
    assert store.receipt_at(0) is not None


def test_vouchers_keep_the_best_per_receipt(store: Store) -> None:
    first, second = issue(store, 1).receipt, issue(store, 2).receipt

    def add(cumulative: int, name: bytes) -> bool:
        return store.add_voucher(Voucher(PAYER, NODE, cumulative, name), b"v" * 65)

    assert add(20, second.struct_hash())
    assert add(10, first.struct_hash())  # late, but good for its own receipt
    assert not add(10, first.struct_hash())
    assert not add(9, first.struct_hash())
    assert store.paid(PAYER) == 20
    assert add(25, ZERO_HASH)
    assert store.paid(PAYER) == 25
    found = store.vouchers_for(PAYER, [first.struct_hash()])
    assert {(v.voucher.cumulative, v.voucher.last_receipt_hash) for v in found} == {
        (10, first.struct_hash()),
        (25, ZERO_HASH),
    }
    assert store.unpaid(PAYER, 9) == []
    assert store.paid(OTHER) == 0


# ------------------------------------------------------------------ who may read it


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}


@pytest.mark.usefixtures("usual_umask")
def test_nobody_else_can_read_what_is_kept(tmp_path: Path) -> None:
    """Prompts and answers, what is to be sent, what a watchtower found: with SQLite's own files beside each database."""
    data = tmp_path / "above" / "data"
    store = Store(data / "node.db", node=key_of("node").address, chain_id=CHAIN_ID, log=LOG)
    outbox = OutboxStore(data / "outbox.db", "the node")
    database = Database(data / "watchtower.db")
    found = modes(data)
    assert {"node.db", "node.db-wal", "node.lock", "outbox.db", "outbox.db.lock", "watchtower.db"} <= set(found)
    assert set(found.values()) == {0o600}, found
    assert data.stat().st_mode & 0o777 == 0o700
    for made in (store, outbox, database):
        made.close()


@pytest.mark.usefixtures("usual_umask")
def test_files_that_others_could_read_are_closed_to_them(tmp_path: Path) -> None:
    for name in ("node.db", "node.db-wal", "node.db-shm"):
        (tmp_path / name).write_bytes(b"kept")
    tmp_path.chmod(0o755)
    prepare_private(tmp_path / "node.db")
    assert set(modes(tmp_path).values()) == {0o600}
    assert (tmp_path / "node.db").read_bytes() == b"kept"
    assert tmp_path.stat().st_mode & 0o777 == 0o755, "a directory that was there is its owner's business"
