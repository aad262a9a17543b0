"""The watchtower's memory: batches seen, audits under way and done, bonds that stand, receipts observed.

SQLite in WAL mode; every method is one transaction, so a kill at any point leaves a state that `step()` goes on from.
It knows nothing of the chain or of nodes.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from poip_chain.proof.publication import Answer, Chunk
from poip_chain.spec.objects import Batch, Part, Receipt

DATABASE = "watchtower.db"
SCHEMA = """
CREATE TABLE IF NOT EXISTS batches(
    id INTEGER PRIMARY KEY, node TEXT NOT NULL, batch TEXT NOT NULL, status TEXT NOT NULL, state TEXT NOT NULL,
    beacon TEXT, receipts TEXT, attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS audits(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, state TEXT NOT NULL, verdict TEXT, detail TEXT,
    evidence TEXT, attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0,
    PRIMARY KEY(batch_id, position));
CREATE TABLE IF NOT EXISTS challenges(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, chunk TEXT NOT NULL, challenge_id INTEGER,
    bond TEXT NOT NULL, state TEXT NOT NULL, deadline INTEGER, PRIMARY KEY(batch_id, position, chunk));
CREATE TABLE IF NOT EXISTS answers(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, chunk TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY(batch_id, position, chunk));
CREATE TABLE IF NOT EXISTS observed(
    node TEXT NOT NULL, seq INTEGER NOT NULL, request_hash TEXT NOT NULL, struct_hash TEXT NOT NULL,
    receipt TEXT NOT NULL, signature TEXT, batch_id INTEGER, position INTEGER,
    PRIMARY KEY(node, struct_hash));
CREATE INDEX IF NOT EXISTS observed_seq ON observed(node, seq);
CREATE INDEX IF NOT EXISTS observed_request ON observed(node, request_hash);
CREATE TABLE IF NOT EXISTS filings(
    key TEXT PRIMARY KEY, batch_id INTEGER, kind TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL);
"""
FORGOTTEN_WITH_BATCH = (("batches", "id"), ("audits", "batch_id"), ("challenges", "batch_id"), ("answers", "batch_id"))


class BatchState(StrEnum):
    """What the watchtower has done with a batch."""

    NEW = "new"
    RECEIPTS = "receipts"
    SELECTED = "selected"
    DONE = "done"


class AuditState(StrEnum):
    """What the watchtower has done with a selected receipt."""

    FETCH = "fetch"
    CHALLENGED = "challenged"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as remembered. `status` is the chain's: pending, final, convicted or removed (by a reorg)."""

    batch: Batch
    status: str
    state: BatchState
    beacon: bytes | None
    receipts: list[dict[str, Any]] | None
    attempts: int
    next_try: float


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One selected receipt. `detail` is JSON with numbers and findings, `evidence` the path of its file."""

    batch_id: int
    position: int
    state: AuditState
    verdict: str | None
    detail: dict[str, Any]
    evidence: str | None
    attempts: int
    next_try: float


@dataclass(frozen=True, slots=True)
class Observed:
    """A signed receipt that was seen somewhere; `batch_id` and `position` if it is committed."""

    receipt: Receipt
    signature: bytes
    batch_id: int | None
    position: int | None


class WatchtowerStore:
    """See the module's docstring. Safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # batches

    def add_batch(self, batch: Batch) -> None:
        """Remember a committed batch. A different batch under a known id (after a reorg) replaces it and its audits."""
        body = json.dumps(batch.to_json())
        with self._transaction() as db:
            known = db.execute("SELECT batch FROM batches WHERE id=?", (batch.id,)).fetchone()
            if known is not None and known["batch"] == body:
                db.execute("UPDATE batches SET status='pending' WHERE id=? AND status='removed'", (batch.id,))
                return
            self._forget(db, batch.id)
            db.execute(
                "INSERT INTO batches(id,node,batch,status,state) VALUES(?,?,?,?,?)",
                (batch.id, batch.node, body, "pending", BatchState.NEW),
            )

    @staticmethod
    def _forget(db: sqlite3.Connection, batch_id: int) -> None:
        for table, column in FORGOTTEN_WITH_BATCH:
            db.execute(f"DELETE FROM {table} WHERE {column}=?", (batch_id,))
        db.execute("UPDATE observed SET batch_id=NULL, position=NULL WHERE batch_id=?", (batch_id,))

    def set_batch_status(self, batch_id: int, status: str) -> None:
        """Record what the chain says of a batch."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET status=? WHERE id=?", (status, batch_id))

    def set_receipts(
        self, batch_id: int, receipts: list[dict[str, Any]], state: BatchState = BatchState.RECEIPTS
    ) -> None:
        """Keep the batch's receipts, whose root has been checked, and index them for equivocation."""
        with self._transaction() as db:
            db.execute(
                "UPDATE batches SET receipts=?, state=?, attempts=0, next_try=0 WHERE id=?",
                (json.dumps(receipts), state, batch_id),
            )
            for position, entry in enumerate(receipts):
                self._observe(db, Receipt.from_json(entry["receipt"]), entry["signature"], batch_id, position)

    def set_selected(self, batch_id: int, beacon: bytes, positions: list[int]) -> None:
        """Record the beacon and open one audit for each selected receipt."""
        with self._transaction() as db:
            db.execute(
                "UPDATE batches SET beacon=?, state=? WHERE id=?",
                ("0x" + beacon.hex(), BatchState.SELECTED, batch_id),
            )
            db.executemany(
                "INSERT OR IGNORE INTO audits(batch_id,position,state,detail) VALUES(?,?,?,'{}')",
                [(batch_id, position, AuditState.FETCH) for position in positions],
            )

    def finish_batch(self, batch_id: int) -> None:
        """No audit of the batch is open any more."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET state=? WHERE id=?", (BatchState.DONE, batch_id))

    def delay_batch(self, batch_id: int, until: float) -> None:
        """Count a failed attempt and try again after `until` (Unix seconds)."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET attempts=attempts+1, next_try=? WHERE id=?", (until, batch_id))

    def batches(self, state: BatchState | None = None) -> list[BatchRow]:
        """All batches, or those in one state, oldest first."""
        if state is None:
            rows = self._rows("SELECT * FROM batches ORDER BY id")
        else:
            rows = self._rows("SELECT * FROM batches WHERE state=? ORDER BY id", state)
        return [self._batch_row(row) for row in rows]

    def batch(self, batch_id: int) -> BatchRow | None:
        """One batch, or None."""
        rows = self._rows("SELECT * FROM batches WHERE id=?", batch_id)
        return self._batch_row(rows[0]) if rows else None

    @staticmethod
    def _batch_row(row: sqlite3.Row) -> BatchRow:
        return BatchRow(
            batch=Batch.from_json(json.loads(row["batch"])),
            status=row["status"],
            state=BatchState(row["state"]),
            beacon=bytes.fromhex(row["beacon"][2:]) if row["beacon"] else None,
            receipts=json.loads(row["receipts"]) if row["receipts"] else None,
            attempts=row["attempts"],
            next_try=row["next_try"],
        )

    # audits

    def audits(self, state: AuditState | None = None, batch_id: int | None = None) -> list[AuditRow]:
        """Audits, optionally of one state or one batch, oldest first."""
        rows = self._rows(
            "SELECT * FROM audits WHERE (?1 IS NULL OR state=?1) AND (?2 IS NULL OR batch_id=?2)"
            " ORDER BY batch_id, position",
            state,
            batch_id,
        )
        return [
            AuditRow(
                batch_id=row["batch_id"],
                position=row["position"],
                state=AuditState(row["state"]),
                verdict=row["verdict"],
                detail=json.loads(row["detail"]),
                evidence=row["evidence"],
                attempts=row["attempts"],
                next_try=row["next_try"],
            )
            for row in rows
        ]

    def finish_audit(
        self, batch_id: int, position: int, verdict: str, detail: dict[str, Any], evidence: Path | None
    ) -> None:
        """Close an audit with its verdict."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET state=?, verdict=?, detail=?, evidence=? WHERE batch_id=? AND position=?",
                (
                    AuditState.DONE,
                    verdict,
                    json.dumps(detail),
                    str(evidence) if evidence else None,
                    batch_id,
                    position,
                ),
            )

    def delay_audit(self, batch_id: int, position: int, until: float) -> None:
        """Count a failed attempt and try again after `until` (Unix seconds)."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET attempts=attempts+1, next_try=? WHERE batch_id=? AND position=?",
                (until, batch_id, position),
            )

    def set_audit_state(self, batch_id: int, position: int, state: AuditState) -> None:
        """Move an open audit between fetching and waiting for an answer on chain."""
        with self._transaction() as db:
            db.execute("UPDATE audits SET state=? WHERE batch_id=? AND position=?", (state, batch_id, position))

    # challenges and bonds

    def reserve_bond(self, batch_id: int, position: int, chunk: Chunk, bond: int, budget: int) -> bool:
        """Reserve `bond` for a challenge unless the bonds that stand would exceed `budget`. True if reserved.

        The reservation is written before the transaction is sent: the budget holds over a kill in between.
        """
        with self._transaction() as db:
            key = (batch_id, position, _chunk_text(chunk))
            if db.execute("SELECT 1 FROM challenges WHERE batch_id=? AND position=? AND chunk=?", key).fetchone():
                return True
            standing = db.execute("SELECT bond FROM challenges WHERE state IN ('reserved','open')").fetchall()
            if sum(int(row["bond"]) for row in standing) + bond > budget:
                return False
            db.execute("INSERT INTO challenges VALUES(?,?,?,NULL,?,'reserved',NULL)", (*key, str(bond)))
            return True

    def release_bond(self, batch_id: int, position: int, chunk: Chunk) -> None:
        """Drop a reservation whose transaction was never accepted."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM challenges WHERE batch_id=? AND position=? AND chunk=? AND state='reserved'",
                (batch_id, position, _chunk_text(chunk)),
            )

    def open_challenge(self, batch_id: int, position: int, chunk: Chunk, challenge_id: int, deadline: int) -> None:
        """A challenge is on chain: ours, or (with no bond of ours) somebody else's."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO challenges VALUES(?,?,?,?,'0','open',?) ON CONFLICT DO UPDATE SET"
                " challenge_id=excluded.challenge_id, state='open', deadline=excluded.deadline",
                (batch_id, position, _chunk_text(chunk), challenge_id, deadline),
            )

    def close_challenge(self, challenge_id: int, state: str) -> dict[str, Any] | None:
        """A challenge ended: answered or resolved. Its row, None if it is not known."""
        with self._transaction() as db:
            db.execute("UPDATE challenges SET state=? WHERE challenge_id=?", (state, challenge_id))
            row = db.execute("SELECT * FROM challenges WHERE challenge_id=?", (challenge_id,)).fetchone()
            return None if row is None else dict(row)

    def challenges(self, batch_id: int | None = None, position: int | None = None) -> list[dict[str, Any]]:
        """All challenges, or those of one receipt."""
        rows = self._rows(
            "SELECT * FROM challenges WHERE (?1 IS NULL OR batch_id=?1) AND (?2 IS NULL OR position=?2)"
            " ORDER BY batch_id, position",
            batch_id,
            position,
        )
        return [dict(row) for row in rows]

    def add_answer(self, batch_id: int, position: int, chunk: str, answer: Answer) -> None:
        """Keep what was published on chain; `chunk` as the challenge's row has it."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO answers VALUES(?,?,?,?)",
                (batch_id, position, chunk, json.dumps(answer.to_json())),
            )

    def answers(self, batch_id: int, position: int) -> dict[Chunk, Answer]:
        """What was published on chain of one receipt's record, by chunk."""
        rows = self._rows("SELECT * FROM answers WHERE batch_id=? AND position=?", batch_id, position)
        return {parse_chunk(row["chunk"]): Answer.from_json(json.loads(row["answer"])) for row in rows}

    # receipts observed

    def observe(self, receipt: Receipt, signature: bytes) -> None:
        """Remember a receipt that somebody handed in (its signature has been checked)."""
        with self._transaction() as db:
            self._observe(db, receipt, "0x" + signature.hex(), None, None)

    @staticmethod
    def _observe(
        db: sqlite3.Connection, receipt: Receipt, signature: str, batch_id: int | None, position: int | None
    ) -> None:
        db.execute(
            "INSERT INTO observed(node,seq,request_hash,struct_hash,receipt,signature,batch_id,position)"
            " VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(node,struct_hash) DO UPDATE SET"
            " batch_id=COALESCE(excluded.batch_id,batch_id), position=COALESCE(excluded.position,position)",
            (
                receipt.node,
                receipt.seq,
                receipt.request_hash.hex(),
                receipt.struct_hash().hex(),
                json.dumps(receipt.to_json()),
                signature,
                batch_id,
                position,
            ),
        )

    def equivocations(self) -> list[tuple[Observed, Observed]]:
        """Pairs of different receipts with the same (node, seq) or the same (node, request_hash)."""
        rows = self._rows(
            "SELECT a.rowid AS a, b.rowid AS b FROM observed a JOIN observed b ON a.node=b.node AND a.rowid<b.rowid"
            " AND (a.seq=b.seq OR a.request_hash=b.request_hash)"
        )
        return [(self._observed(row["a"]), self._observed(row["b"])) for row in rows]

    def _observed(self, rowid: int) -> Observed:
        row = self._rows("SELECT * FROM observed WHERE rowid=?", rowid)[0]
        return Observed(
            receipt=Receipt.from_json(json.loads(row["receipt"])),
            signature=bytes.fromhex(row["signature"][2:]),
            batch_id=row["batch_id"],
            position=row["position"],
        )

    # filings

    def add_filing(self, key: str, batch_id: int | None, kind: str, state: str, detail: dict[str, Any]) -> bool:
        """Record an offence to file once; False if it is known already."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO filings(key,batch_id,kind,state,detail) VALUES(?,?,?,?,?)",
                (key, batch_id, kind, state, json.dumps(detail)),
            )
            return cursor.rowcount == 1

    def set_filing(self, key: str, state: str) -> None:
        """Move a filing on: found, proposed, sent, done or refused."""
        with self._transaction() as db:
            db.execute("UPDATE filings SET state=? WHERE key=?", (state, key))

    def filings(self) -> list[dict[str, Any]]:
        """All filings."""
        return [
            {**dict(row), "detail": json.loads(row["detail"])}
            for row in self._rows("SELECT * FROM filings ORDER BY rowid")
        ]


@contextmanager
def open_store(data: Path) -> Iterator[WatchtowerStore]:
    """The store in a watchtower's data directory; it may be open in a running watchtower at the same time."""
    store = WatchtowerStore(data / DATABASE)
    try:
        yield store
    finally:
        store.close()


def _chunk_text(chunk: Chunk) -> str:
    return f"{int(chunk[0])}:{chunk[1]}"


def parse_chunk(text: str) -> Chunk:
    """The inverse of a chunk's form in the database."""
    part, first_leaf = text.split(":")
    return Part(int(part)), int(first_leaf)
