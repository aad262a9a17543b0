"""The watchtower's memory: batches seen, audits under way and done, receipts observed, and (cases.py) what it does
about them.

It knows nothing of the chain or of nodes. What is large is dropped by `prune` once nobody can be punished by it any
more; one short row for each batch and audit stays.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from poip_chain.proof.cases import CaseStore, Challenge, Filing, FilingState
from poip_chain.spec.objects import Batch, Receipt

__all__ = [
    "AuditRow",
    "AuditState",
    "BatchRow",
    "BatchState",
    "Challenge",
    "Filing",
    "FilingState",
    "Observed",
    "WatchtowerStore",
    "open_store",
]

DATABASE = "watchtower.db"
NOTE = "not_challenged"
"""Where an audit's detail says why a withheld record is not challenged."""
FORGOTTEN_WITH_BATCH = (("batches", "id"), ("audits", "batch_id"), ("challenges", "batch_id"), ("answers", "batch_id"))
MAX_CONTRADICTIONS = 8
"""Pairs that one receipt is compared in: a node that signs more contradicting receipts is convicted by the first."""


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
    """A batch as remembered. `status` is the chain's: pending, final, convicted or removed (by a reorg).

    `has_receipts`: whether its receipts are kept; `WatchtowerStore.receipts` loads them.
    """

    batch: Batch
    status: str
    state: BatchState
    beacon: bytes | None
    has_receipts: bool
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
    """A signed receipt that was seen somewhere; `batch_id` and `position` if it is committed by the node it names."""

    id: int
    receipt: Receipt
    signature: bytes
    batch_id: int | None
    position: int | None


class WatchtowerStore(CaseStore):
    """See the module's docstring. Safe to use from several threads of one process."""

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
                "INSERT INTO batches(id,node,batch,status,state,window_end) VALUES(?,?,?,?,?,?)",
                (batch.id, batch.node, body, "pending", BatchState.NEW, batch.window_end),
            )

    @staticmethod
    def _forget(db: sqlite3.Connection, batch_id: int) -> None:
        for table, column in FORGOTTEN_WITH_BATCH:
            db.execute(f"DELETE FROM {table} WHERE {column}=?", (batch_id,))
        # A claim that is stored may be under way: it ends when that is known.
        db.execute("DELETE FROM accusations WHERE batch_id=? AND state NOT IN ('standing','ended')", (batch_id,))
        # What contradicted a receipt of the batch is judged again, without the batch.
        for side in ("a", "b"):
            db.execute(
                f"UPDATE contradictions SET state='new' WHERE {side} IN (SELECT id FROM observed WHERE batch_id=?)",
                (batch_id,),
            )
        db.execute("UPDATE observed SET batch_id=NULL, position=NULL WHERE batch_id=?", (batch_id,))
        db.execute(
            "UPDATE filings SET state='moot' WHERE batch_id=? AND state IN ('found','proposed','sent')", (batch_id,)
        )

    def set_batch_status(self, batch_id: int, status: str) -> None:
        """Record what the chain says of a batch."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET status=? WHERE id=?", (status, batch_id))

    def set_receipts(
        self, batch_id: int, receipts: list[dict[str, Any]], state: BatchState = BatchState.RECEIPTS
    ) -> None:
        """Keep the batch's receipts, whose root has been checked, and index them for equivocation.

        A receipt that names another node than the batch's is no evidence against that node, and is not indexed.
        """
        with self._transaction() as db:
            row = db.execute(
                "UPDATE batches SET receipts=?, state=?, attempts=0, next_try=0 WHERE id=? RETURNING node",
                (json.dumps(receipts), state, batch_id),
            ).fetchone()
            if row is None:
                return
            for position, entry in enumerate(receipts):
                receipt = Receipt.from_json(entry["receipt"])
                if receipt.node == row["node"]:
                    self._observe(db, receipt, entry["signature"], batch_id, position)

    def set_selected(self, batch_id: int, beacon: bytes, positions: Sequence[int]) -> None:
        """Record the beacon and have exactly these receipts audited; what was found out already is kept."""
        with self._transaction() as db:
            db.execute(
                "UPDATE batches SET beacon=?, state=? WHERE id=?",
                ("0x" + beacon.hex(), BatchState.SELECTED, batch_id),
            )
            self._keep_audits(db, batch_id, positions)
            db.executemany(
                "INSERT OR IGNORE INTO audits(batch_id,position,state,detail) VALUES(?,?,?,'{}')",
                [(batch_id, position, AuditState.FETCH) for position in positions],
            )

    def unselect(self, batch_id: int) -> None:
        """A reorganisation took the batch's beacon away: it is drawn again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE batches SET beacon=NULL, state=CASE WHEN receipts IS NULL THEN ? ELSE ? END WHERE id=?",
                (BatchState.NEW, BatchState.RECEIPTS, batch_id),
            )
            self._keep_audits(db, batch_id, [])

    @staticmethod
    def _keep_audits(db: sqlite3.Connection, batch_id: int, positions: Sequence[int]) -> None:
        rows = db.execute("SELECT position FROM audits WHERE batch_id=? AND state<>'done'", (batch_id,)).fetchall()
        dropped = {row["position"] for row in rows} - set(positions)
        db.executemany(
            "DELETE FROM audits WHERE batch_id=? AND position=?", [(batch_id, position) for position in dropped]
        )

    def finish_batch(self, batch_id: int) -> None:
        """No audit of the batch is open any more."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET state=? WHERE id=?", (BatchState.DONE, batch_id))

    def delay_batch(self, batch_id: int, until: float) -> None:
        """Count a failed attempt and try again after `until` (chain time, Unix seconds)."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET attempts=attempts+1, next_try=? WHERE id=?", (until, batch_id))

    def batches(self, state: BatchState | None = None, *, status: str | None = None) -> list[BatchRow]:
        """All batches, or those in one state or of one status, oldest first."""
        rows = self._rows(
            _BATCH + " WHERE (?1 IS NULL OR state=?1) AND (?2 IS NULL OR status=?2) ORDER BY id", state, status
        )
        return [_batch_row(row) for row in rows]

    def batch(self, batch_id: int) -> BatchRow | None:
        """One batch, or None."""
        rows = self._rows(_BATCH + " WHERE id=?", batch_id)
        return _batch_row(rows[0]) if rows else None

    def receipts(self, batch_id: int) -> list[Receipt] | None:
        """The batch's receipts in order, None if they are not known (or not kept any more)."""
        rows = self._rows("SELECT receipts FROM batches WHERE id=?", batch_id)
        if not rows or rows[0]["receipts"] is None:
            return None
        return [Receipt.from_json(entry["receipt"]) for entry in json.loads(rows[0]["receipts"])]

    # audits

    def audits(
        self, state: AuditState | None = None, batch_id: int | None = None, *, due: float | None = None
    ) -> list[AuditRow]:
        """Audits, optionally of one state or one batch, or whose next try is not later than `due`; oldest first."""
        rows = self._rows(
            "SELECT * FROM audits WHERE (?1 IS NULL OR state=?1) AND (?2 IS NULL OR batch_id=?2)"
            " AND (?3 IS NULL OR next_try<=?3) ORDER BY batch_id, position",
            state,
            batch_id,
            due,
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
        self, batch_id: int, position: int, verdict: str, detail: dict[str, Any], evidence: Path | None = None
    ) -> None:
        """Close an open audit with its verdict; one that is closed already keeps the one it has."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET state=?, verdict=?, detail=?, evidence=?"
                " WHERE batch_id=? AND position=? AND state<>'done'",
                (AuditState.DONE, verdict, json.dumps(detail), str(evidence) if evidence else None, batch_id, position),
            )

    def delay_audit(self, batch_id: int, position: int, until: float, *, failed: bool = True) -> None:
        """Try again after `until` (chain time, Unix seconds); the node has `failed` once more, or it was not its doing."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET attempts=attempts+?, next_try=? WHERE batch_id=? AND position=?",
                (int(failed), until, batch_id, position),
            )

    def note_audit(self, batch_id: int, position: int, note: str | None) -> None:
        """Keep with an open audit why nothing is done about it; None: no more."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET detail=? WHERE batch_id=? AND position=? AND state<>'done'",
                (json.dumps({} if note is None else {NOTE: note}), batch_id, position),
            )

    def move_audit(self, batch_id: int, position: int, before: AuditState, after: AuditState) -> None:
        """Move an audit that is in state `before`; any other is left alone."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET state=?, next_try=0 WHERE batch_id=? AND position=? AND state=?",
                (after, batch_id, position, before),
            )

    def reopen_audit(self, batch_id: int, position: int, verdict: str) -> None:
        """A reorganisation took the ground of this verdict away: the audit waits for the chain again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE audits SET state=?, verdict=NULL, detail='{}' WHERE batch_id=? AND position=? AND verdict=?",
                (AuditState.CHALLENGED, batch_id, position, verdict),
            )

    # receipts observed

    def observe(self, receipt: Receipt, signature: bytes, now: int = 0) -> None:
        """Remember a receipt that somebody handed in (its signature has been checked) at `now`, Unix seconds.

        What is old is reckoned from then, if its own date is earlier: that is the node's statement, and a receipt is
        evidence until it is committed.
        """
        with self._transaction() as db:
            self._observe(db, receipt, "0x" + signature.hex(), None, None, now)

    @staticmethod
    def _observe(
        db: sqlite3.Connection,
        receipt: Receipt,
        signature: str,
        batch_id: int | None,
        position: int | None,
        now: int = 0,
    ) -> None:
        # A signature that came with a batch is unchecked and never takes the place of a checked one.
        row = db.execute(
            "INSERT INTO observed(node,seq,request_hash,struct_hash,issued_at,receipt,signature,batch_id,position)"
            " VALUES(?,?,?,?,?,?,?,?,?) ON CONFLICT(node,struct_hash) DO UPDATE SET"
            " signature=CASE WHEN excluded.batch_id IS NULL THEN excluded.signature ELSE signature END,"
            " batch_id=COALESCE(excluded.batch_id,batch_id), position=COALESCE(excluded.position,position)"
            " RETURNING id",
            (
                receipt.node,
                # SQLite's integers have 63 bits; such numbers are only compared, and never committed.
                min(receipt.seq, 2**63 - 1),
                receipt.request_hash.hex(),
                receipt.struct_hash().hex(),
                min(max(receipt.issued_at, now), 2**63 - 1),
                json.dumps(receipt.to_json()),
                signature,
                batch_id,
                position,
            ),
        ).fetchone()
        number = row["id"]
        others = db.execute(
            "SELECT id FROM observed WHERE node=?1 AND seq=?2 AND id<>?4"
            " UNION SELECT id FROM observed WHERE node=?1 AND request_hash=?3 AND id<>?4 ORDER BY id LIMIT ?5",
            (
                receipt.node,
                min(receipt.seq, 2**63 - 1),
                receipt.request_hash.hex(),
                number,
                MAX_CONTRADICTIONS,
            ),
        ).fetchall()
        db.executemany(
            "INSERT OR IGNORE INTO contradictions VALUES(?,?,'new')",
            [tuple(sorted((number, other["id"]))) for other in others],
        )

    def equivocations(self, *, unjudged: bool = False) -> list[tuple[Observed, Observed]]:
        """Pairs of different receipts with the same (node, seq) or the same (node, request_hash)."""
        rows = self._rows("SELECT a, b FROM contradictions" + (" WHERE state='new'" if unjudged else ""))
        pairs = [(self._observed(row["a"]), self._observed(row["b"])) for row in rows]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def judged(self, a: Observed, b: Observed) -> None:
        """The pair is dealt with."""
        with self._transaction() as db:
            db.execute("UPDATE contradictions SET state='judged' WHERE a=? AND b=?", (a.id, b.id))

    def _observed(self, number: int) -> Observed | None:
        rows = self._rows("SELECT * FROM observed WHERE id=?", number)
        if not rows:
            return None
        return Observed(
            id=number,
            receipt=Receipt.from_json(json.loads(rows[0]["receipt"])),
            signature=bytes.fromhex(rows[0]["signature"][2:]),
            batch_id=rows[0]["batch_id"],
            position=rows[0]["position"],
        )

    # what is old

    def prune(self, now: int, evidence_window: int) -> None:
        """Drop what nobody can be punished by any more.

        Receipts of settled batches and receipts handed in go `evidence_window` seconds after the batch's window or
        their own issue, or when they were handed in if that was later; published answers go with their batch's
        receipts, and batches that a reorganisation took away go whole. So go claims that are over. Evidence files are
        not touched.
        """
        limit = now - evidence_window
        old = "SELECT id FROM batches WHERE state='done' AND status IN ('final','convicted') AND window_end<?"
        with self._transaction() as db:
            db.execute(f"DELETE FROM answers WHERE batch_id IN ({old})", (limit,))
            db.execute(f"DELETE FROM observed WHERE batch_id IN ({old})", (limit,))
            db.execute("UPDATE accusations SET claim=NULL WHERE state='ended' AND ended_at<?", (limit,))
            db.execute("DELETE FROM observed WHERE batch_id IS NULL AND issued_at<?", (limit,))
            db.execute(
                "DELETE FROM contradictions WHERE a NOT IN (SELECT id FROM observed)"
                " OR b NOT IN (SELECT id FROM observed)"
            )
            db.execute(f"UPDATE batches SET receipts=NULL WHERE receipts IS NOT NULL AND id IN ({old})", (limit,))
            removed = db.execute("SELECT id FROM batches WHERE status='removed' AND window_end<?", (limit,)).fetchall()
            for row in removed:
                self._forget(db, row["id"])


_BATCH = (
    "SELECT id, batch, status, state, beacon, receipts IS NOT NULL AS has_receipts, attempts, next_try FROM batches"
)


def _batch_row(row: sqlite3.Row) -> BatchRow:
    return BatchRow(
        batch=Batch.from_json(json.loads(row["batch"])),
        status=row["status"],
        state=BatchState(row["state"]),
        beacon=bytes.fromhex(row["beacon"][2:]) if row["beacon"] else None,
        has_receipts=bool(row["has_receipts"]),
        attempts=row["attempts"],
        next_try=row["next_try"],
    )


@contextmanager
def open_store(data: Path) -> Iterator[WatchtowerStore]:
    """The store in a watchtower's data directory; it may be open in a running watchtower at the same time."""
    store = WatchtowerStore(data / DATABASE)
    try:
        yield store
    finally:
        store.close()
