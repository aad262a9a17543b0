"""The node's memory (SQLite): receipts, transcripts, batches, vouchers, and what was done with them.

One rule above all: a receipt is signed and stored in one transaction, before anybody sees it, and neither its sequence
number nor its request can ever get a second one. A crash before the commit leaves no trace; after it, the same receipt
is handed out again. It knows nothing of HTTP, engines or chains.

WAL with synchronous=FULL: what `issue` returned survives a power failure. One process at a time (file lock).
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.chain.private_files import PRIVATE_DIRECTORY, prepare_private
from poip_chain.errors import ConfigurationError, IntegrityError, NotFound
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    BatchState,
    Record,
    StoredBatch,
    StoredReceipt,
    StoredVoucher,
    Uncommitted,
)
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import Batch, Receipt, Voucher
from poip_chain.spec.types import ZERO_HASH, Address

_RECEIPT = "receipt, signature, profile_version, first_seq"
_BATCH = "first_seq, count, total_fee, root, model_id, profile_version, composed_at, state, batch"


@dataclass(frozen=True, slots=True)
class Draft:
    """A receipt without what only the store can know: seq and the running totals."""

    request_hash: bytes
    model_id: bytes
    profile_version: int
    transcript_root: bytes
    output_tokens: int
    finish_reason: int
    fee: int
    payer: Address
    issued_at: int


class Store:
    """The database of one node. Safe for the threads of one process. `path` is the database file.

    Raises ConfigurationError if another process holds it or it belongs to another node, chain or log.
    """

    def __init__(self, path: Path, *, node: Address, chain_id: int, log: Address) -> None:
        self.node = node
        path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        self._lock_file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise ConfigurationError(
                f"another process uses {path}.",
                hint="Two nodes with one key would sign two receipts for one number. Stop the other one first.",
            ) from error
        prepare_private(path)
        self._db = self._connect(path)
        self._reader = self._connect(path)
        self._lock, self._read_lock = threading.RLock(), threading.Lock()
        self._db.executescript(SCHEMA)
        identity = {"schema": str(SCHEMA_VERSION), "node": node, "chain_id": str(chain_id), "log": log}
        with self.transaction() as db:
            for name, value in identity.items():
                db.execute("INSERT OR IGNORE INTO meta VALUES(?, ?)", (name, value))
            found = dict(db.execute("SELECT name, value FROM meta").fetchall())
        if differing := {k: found[k] for k, v in identity.items() if found[k] != v}:
            self.close()
            raise ConfigurationError(
                f"{path} belongs to another network or node: {differing} there, "
                f"{ {k: identity[k] for k in differing} } in the settings.",
                hint="Choose another data directory; keep this file, it holds signed receipts.",
            )

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def close(self) -> None:
        """Close the database and free it for another process."""
        with self._lock, self._read_lock:
            self._reader.close()
            self._db.close()
            os.close(self._lock_file)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; the commit is on disk when the block ends without an exception."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """Read what is committed."""
        with self._read_lock:
            return self._reader.execute(sql, values).fetchall()

    def set_key_limit(self, key: Address, next_seq: int | None) -> None:
        """Receipts from `next_seq` on are another key's than `key`; None: a reorganisation undid that."""
        with self.transaction() as db:
            db.execute("DELETE FROM key_limits WHERE key = ?", (key,))
            if next_seq is not None:
                db.execute("INSERT INTO key_limits VALUES(?, ?)", (key, next_seq))

    def key_limit(self, key: Address) -> int | None:
        """The first receipt number that is no longer `key`'s; None while all are."""
        rows = self.rows("SELECT next_seq FROM key_limits WHERE key = ?", key)
        return int(rows[0][0]) if rows else None

    # ---------------------------------------------------------------- receipts

    def issue(self, draft: Draft, record: Record, sign: Callable[[Receipt], bytes]) -> StoredReceipt:
        """Number, sign and store a receipt in one transaction; the stored one if the request already has one.

        `sign` must be a pure function of the receipt. Raises whatever `sign` or SQLite raises; then nothing was stored.
        """
        with self.transaction() as db:
            existing = db.execute(f"SELECT {_RECEIPT} FROM receipts WHERE request_hash = ?", (draft.request_hash,))
            if (row := existing.fetchone()) is not None:
                return _receipt(row)
            last = db.execute("SELECT seq, node_cum FROM receipts ORDER BY seq DESC LIMIT 1").fetchone()
            seq, node_cum = (last[0] + 1, int(last[1])) if last else (0, 0)
            receipt = Receipt(
                node=self.node,
                seq=seq,
                request_hash=draft.request_hash,
                model_id=draft.model_id,
                transcript_root=draft.transcript_root,
                output_tokens=draft.output_tokens,
                finish_reason=draft.finish_reason,
                fee=draft.fee,
                payer=draft.payer,
                payer_cum=_payer_cum(db, draft.payer) + draft.fee,
                node_cum=node_cum + draft.fee,
                issued_at=draft.issued_at,
            )
            signature = sign(receipt)
            db.execute(
                "INSERT INTO receipts VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    seq,
                    draft.request_hash,
                    receipt.struct_hash(),
                    receipt.payer,
                    str(receipt.fee),
                    str(receipt.payer_cum),
                    str(receipt.node_cum),
                    draft.profile_version,
                    json.dumps(receipt.to_json()),
                    signature,
                ),
            )
            db.execute(
                "INSERT INTO transcripts VALUES(?, ?, ?, ?, ?)",
                (seq, record.request, record.request_signature, record.params, record.transcript),
            )
            crash_point("inside_sign")
        return StoredReceipt(receipt, signature, draft.profile_version, None)

    def receipt_of(self, request_hash: bytes) -> StoredReceipt | None:
        """The receipt of a request, if one was signed."""
        rows = self.rows(f"SELECT {_RECEIPT} FROM receipts WHERE request_hash = ?", request_hash)
        return _receipt(rows[0]) if rows else None

    def receipt_at(self, seq: int) -> StoredReceipt | None:
        """The receipt with this number."""
        rows = self.rows(f"SELECT {_RECEIPT} FROM receipts WHERE seq = ?", seq)
        return _receipt(rows[0]) if rows else None

    def record_of(self, seq: int) -> Record:
        """Request, parameters and transcript of receipt `seq`. Raises NotFound if pruned or never there."""
        rows = self.rows("SELECT request, request_signature, params, transcript FROM transcripts WHERE seq = ?", seq)
        if not rows:
            raise NotFound(f"the transcript of receipt {seq} is no longer kept.")
        return Record(*rows[0])

    def next_seq(self) -> int:
        """The number that the next receipt gets."""
        return int(self.rows("SELECT coalesce(max(seq) + 1, 0) FROM receipts")[0][0])

    def node_cum_before(self, seq: int) -> int:
        """The node's running total before receipt `seq`, 0 <= seq <= next_seq. Raises NotFound beyond."""
        if seq == 0:
            return 0
        rows = self.rows("SELECT node_cum FROM receipts WHERE seq = ?", seq - 1)
        if not rows:
            raise NotFound(f"receipt {seq - 1} is not in this database.")
        return int(rows[0][0])

    def payer_cum(self, payer: Address) -> int:
        """The payer's running total with this node."""
        with self._read_lock:
            return _payer_cum(self._reader, payer)

    def totals(self) -> tuple[int, int, int]:
        """(receipts signed, sum of their fees in wei, receipts in no batch)."""
        seq = self.next_seq()
        unbatched = self.rows("SELECT count(*) FROM receipts WHERE first_seq IS NULL")[0][0]
        return seq, self.node_cum_before(seq), int(unbatched)

    def uncommitted(self, chain_next_seq: int) -> Uncommitted:
        """What the chain does not cover yet, given the first receipt number that it does not cover."""
        # In this order: receipts that are put into a batch in between are counted twice, never not at all.
        loose = self.rows("SELECT min(seq), count(*) FROM receipts WHERE first_seq IS NULL")[0]
        fees = 0 if loose[0] is None else self.node_cum_before(loose[0] + loose[1]) - self.node_cum_before(loose[0])
        composed = self.rows("SELECT total_fee FROM batches WHERE first_seq >= ?", chain_next_seq)
        return Uncommitted(tuple(int(row[0]) for row in composed), fees, int(loose[1]))

    def unpaid(self, payer: Address, limit: int) -> list[bytes]:
        """Request hashes of the payer's oldest receipts beyond what its vouchers cover, at most `limit`, in order."""
        paid = self.paid(payer)
        rows = self.rows(
            "SELECT request_hash, payer_cum FROM receipts WHERE payer = ? ORDER BY seq DESC LIMIT ?", payer, 10_000
        )
        hashes = [row[0] for row in rows if int(row[1]) > paid]
        return hashes[::-1][:limit]

    def check_against_chain(self, chain_next_seq: int, chain_node_cum: int) -> None:
        """Refuse to go on if the chain holds receipts of this node that this database does not.

        Signing from such a database would give second receipts for used numbers: the node would convict itself.
        Raises IntegrityError.
        """
        advice = (
            "Restore the newest copy of the node's data directory. If it is lost, do not start this node again: "
            "deregister it, wait until its stake is free, and register a new node with a new key."
        )
        if chain_next_seq > self.next_seq():
            raise IntegrityError(
                f"the chain has receipts of node {self.node} up to number {chain_next_seq - 1}, this database only "
                f"up to {self.next_seq() - 1}: it is lost, an old copy, or another data directory is meant.",
                hint=advice,
            )
        ours = self.node_cum_before(chain_next_seq)
        if chain_node_cum != ours:
            raise IntegrityError(
                f"before receipt {chain_next_seq} the chain has a running total of {chain_node_cum} wei, this database "
                f"{ours}: they come from different histories.",
                hint=advice,
            )

    # ---------------------------------------------------------------- vouchers

    def add_voucher(self, voucher: Voucher, signature: bytes) -> bool:
        """Keep a (checked) voucher if it promises more than what is kept for the same receipt. True if it was news."""
        with self.transaction() as db:
            key = (voucher.payer, voucher.last_receipt_hash)
            row = db.execute("SELECT cumulative FROM vouchers WHERE payer = ? AND receipt_hash = ?", key).fetchone()
            if row is not None and int(row[0]) >= voucher.cumulative:
                return False
            db.execute("INSERT OR REPLACE INTO vouchers VALUES(?, ?, ?, ?)", (*key, str(voucher.cumulative), signature))
            best = db.execute("SELECT paid FROM payers WHERE payer = ?", (voucher.payer,)).fetchone()
            if best is None or int(best[0]) < voucher.cumulative:
                db.execute(
                    "INSERT OR REPLACE INTO payers VALUES(?, ?, ?)",
                    (voucher.payer, str(voucher.cumulative), voucher.last_receipt_hash),
                )
            # A payer who pays late after all: what was given up is looked at again.
            db.execute(
                "UPDATE collections SET state = 'due' WHERE payer = ? AND state = 'void' AND first_seq IN "
                "(SELECT first_seq FROM batches WHERE state != 'convicted')",
                (voucher.payer,),
            )
        return True

    def paid(self, payer: Address) -> int:
        """The most that the payer's vouchers promise, in wei; 0 if it never gave one."""
        rows = self.rows("SELECT paid FROM payers WHERE payer = ?", payer)
        return int(rows[0][0]) if rows else 0

    def receipt_payer(self, struct_hash: bytes) -> tuple[Address, int] | None:
        """(payer, payer_cum) of the receipt with this struct hash."""
        rows = self.rows("SELECT payer, payer_cum FROM receipts WHERE struct_hash = ?", struct_hash)
        return (Address(rows[0][0]), int(rows[0][1])) if rows else None

    def vouchers_for(self, payer: Address, receipt_hashes: Sequence[bytes]) -> list[StoredVoucher]:
        """The payer's vouchers that may pay receipts with these struct hashes: the best one, the prepaid one, and those
        that name one of the receipts."""
        best = self.rows("SELECT receipt_hash FROM payers WHERE payer = ?", payer)
        found = []
        for receipt_hash in {ZERO_HASH, *receipt_hashes, *(row[0] for row in best)}:
            rows = self.rows(
                "SELECT cumulative, signature FROM vouchers WHERE payer = ? AND receipt_hash = ?", payer, receipt_hash
            )
            for cumulative, signature in rows:
                found.append(StoredVoucher(Voucher(payer, self.node, int(cumulative), receipt_hash), signature))
        return found

    # ---------------------------------------------------------------- batches

    def compose(self, *, maximum: int, now: int, due: Callable[[int, int], bool]) -> StoredBatch | None:
        """Put the oldest receipts that are in no batch into one, if `due(count, oldest issued_at)`; None otherwise.

        A batch holds 1 to `maximum` receipts of one model and profile version. What was composed is stored before it is
        sent anywhere, so the same first_seq always gets the same batch.
        """
        with self.transaction() as db:
            rows = db.execute(
                f"SELECT {_RECEIPT} FROM receipts WHERE first_seq IS NULL ORDER BY seq LIMIT ?", (maximum,)
            ).fetchall()
            if not rows:
                return None
            receipts = [_receipt(row) for row in rows]
            head = receipts[0]
            for i, stored in enumerate(receipts):
                if (stored.receipt.model_id, stored.profile_version) != (head.receipt.model_id, head.profile_version):
                    receipts = receipts[:i]
                    break
            if not due(len(receipts), head.receipt.issued_at):
                return None
            first = head.receipt.seq
            if [r.receipt.seq for r in receipts] != list(range(first, first + len(receipts))):
                raise IntegrityError(f"there are gaps after receipt {first}.", hint="Restore the data directory.")
            return _insert_batch(db, receipts, now)

    def cut(self, first_seq: int, count: int) -> StoredBatch:
        """Shorten a composed batch to its first `count` receipts; the others are composed as a batch of their own.

        Only for one that was never sent. Returns the shorter one. Raises IntegrityError unless it is composed and has
        more than `count` receipts.
        """
        with self.transaction() as db:
            row = db.execute(f"SELECT {_BATCH} FROM batches WHERE first_seq = ?", (first_seq,)).fetchone()
            whole = _batch(row) if row else None
            if whole is None or whole.state is not BatchState.COMPOSED or not 0 < count < whole.count:
                raise IntegrityError(f"there is no composed batch from receipt {first_seq} on to cut after {count}.")
            rows = db.execute(
                f"SELECT {_RECEIPT} FROM receipts WHERE first_seq = ? ORDER BY seq", (first_seq,)
            ).fetchall()
            receipts = [_receipt(row) for row in rows]
            db.execute("UPDATE receipts SET first_seq = NULL WHERE first_seq = ?", (first_seq,))
            db.execute("DELETE FROM collections WHERE first_seq = ?", (first_seq,))
            db.execute("DELETE FROM batches WHERE first_seq = ?", (first_seq,))
            _insert_batch(db, receipts[count:], whole.composed_at)
            return _insert_batch(db, receipts[:count], whole.composed_at)

    def batches(self, *states: BatchState) -> list[StoredBatch]:
        """All batches in these states, oldest first."""
        marks = ", ".join("?" * len(states))
        rows = self.rows(f"SELECT {_BATCH} FROM batches WHERE state IN ({marks}) ORDER BY first_seq", *states)
        return [_batch(row) for row in rows]

    def batch_at(self, first_seq: int) -> StoredBatch | None:
        """The batch whose first receipt has this number."""
        rows = self.rows(f"SELECT {_BATCH} FROM batches WHERE first_seq = ?", first_seq)
        return _batch(rows[0]) if rows else None

    def batch_of_id(self, batch_id: int) -> StoredBatch | None:
        """The batch with this number on chain."""
        rows = self.rows(f"SELECT {_BATCH} FROM batches WHERE batch_id = ?", batch_id)
        return _batch(rows[0]) if rows else None

    def receipts_in(self, batch: StoredBatch) -> list[StoredReceipt]:
        """The receipts of a batch in order."""
        rows = self.rows(f"SELECT {_RECEIPT} FROM receipts WHERE first_seq = ? ORDER BY seq", batch.first_seq)
        return [_receipt(row) for row in rows]

    def set_committed(self, batch: Batch) -> None:
        """Note that the chain holds this batch. Raises IntegrityError if it is not the one composed here."""
        with self.transaction() as db:
            row = db.execute(f"SELECT {_BATCH} FROM batches WHERE first_seq = ?", (batch.first_seq,)).fetchone()
            ours = _batch(row) if row else None
            if ours is None or (ours.root, ours.count, ours.total_fee) != (batch.root, batch.count, batch.total_fee):
                raise IntegrityError(
                    f"the chain has a batch of node {self.node} from receipt {batch.first_seq} on that this database "
                    "did not compose.",
                    hint="Another process signs with this key. Stop it; restore the newest data directory.",
                )
            db.execute(
                "UPDATE batches SET state = ?, batch_id = ?, batch = ?, ended_at = NULL WHERE first_seq = ?",
                (BatchState.COMMITTED, batch.id, json.dumps(batch.to_json()), batch.first_seq),
            )

    def set_removed(self, first_seq: int) -> None:
        """Note that a reorganisation took the commitment away: it must be sent again."""
        with self.transaction() as db:
            db.execute(
                "UPDATE batches SET state = ?, batch_id = NULL, batch = NULL, ended_at = NULL WHERE first_seq = ?",
                (BatchState.COMPOSED, first_seq),
            )
            # Whatever was collected for the batch went with it.
            db.execute("UPDATE collections SET state = 'due' WHERE first_seq = ? AND low != high", (first_seq,))

    def set_ended(self, batch_id: int, state: BatchState, now: int) -> None:
        """Note that a batch became FINAL or CONVICTED, or (COMMITTED) that a reorganisation undid that.

        An interval of a convicted batch that has not been collected will never be: it becomes void.
        """
        with self.transaction() as db:
            ended = None if state is BatchState.COMMITTED else now
            db.execute("UPDATE batches SET state = ?, ended_at = ? WHERE batch_id = ?", (state, ended, batch_id))
            which = "first_seq = (SELECT first_seq FROM batches WHERE batch_id = ?)"
            if state is BatchState.CONVICTED:
                db.execute(f"UPDATE collections SET state = 'void' WHERE state != 'settled' AND {which}", (batch_id,))
            elif state is BatchState.COMMITTED:
                # Whatever is no longer due will be found to be so when it is looked at again.
                db.execute(f"UPDATE collections SET state = 'due' WHERE {which} AND low != high", (batch_id,))

    def prune(self, before: int) -> int:
        """Drop the transcripts of batches that ended before this time. Returns how many."""
        with self.transaction() as db:
            cursor = db.execute(
                "DELETE FROM transcripts WHERE seq IN (SELECT r.seq FROM receipts r JOIN batches b "
                "ON b.first_seq = r.first_seq WHERE b.ended_at < ?)",
                (before,),
            )
            return cursor.rowcount


def _insert_batch(db: sqlite3.Connection, receipts: Sequence[StoredReceipt], now: int) -> StoredBatch:
    """Compose these receipts, and what their payers owe for them."""
    head, first = receipts[0], receipts[0].receipt.seq
    composed = StoredBatch(
        first_seq=first,
        count=len(receipts),
        total_fee=sum(r.receipt.fee for r in receipts),
        root=merkle_root([r.receipt.struct_hash() for r in receipts]),
        model_id=head.receipt.model_id,
        profile_version=head.profile_version,
        composed_at=now,
        state=BatchState.COMPOSED,
        batch=None,
    )
    db.execute(
        "INSERT INTO batches(first_seq, count, total_fee, root, model_id, profile_version, composed_at, state) "
        "VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
        (
            first,
            composed.count,
            str(composed.total_fee),
            composed.root,
            composed.model_id,
            composed.profile_version,
            now,
            BatchState.COMPOSED,
        ),
    )
    db.execute("UPDATE receipts SET first_seq = ? WHERE seq BETWEEN ? AND ?", (first, first, first + len(receipts) - 1))
    for payer in {r.receipt.payer for r in receipts}:
        own = [r.receipt for r in receipts if r.receipt.payer == payer]
        low, high = own[0].payer_cum - own[0].fee, own[-1].payer_cum
        state = "due" if high > low else "settled"
        db.execute("INSERT INTO collections VALUES(?, ?, ?, ?, ?)", (first, payer, str(low), str(high), state))
    return composed


def _payer_cum(db: sqlite3.Connection, payer: Address) -> int:
    row = db.execute("SELECT payer_cum FROM receipts WHERE payer = ? ORDER BY seq DESC LIMIT 1", (payer,)).fetchone()
    return int(row[0]) if row else 0


def _receipt(row: Any) -> StoredReceipt:
    receipt: Receipt = Receipt.from_json(json.loads(row[0]))
    return StoredReceipt(receipt, row[1], row[2], row[3])


def _batch(row: Any) -> StoredBatch:
    on_chain = Batch.from_json(json.loads(row[8])) if row[8] else None
    return StoredBatch(row[0], row[1], int(row[2]), row[3], row[4], row[5], row[6], BatchState(row[7]), on_chain)
