"""The watchtower's SQLite file: its tables, and how they are read and written.

WAL mode; every write is one transaction, so a kill at any point leaves a state that the next round goes on from. What
the tables mean is told where they are used: `accusations.py`, `cases.py` (challenges, answers, filings) and `store.py`
(the rest).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poip_chain.chain.private_files import prepare_private

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches(
    id INTEGER PRIMARY KEY, node TEXT NOT NULL, batch TEXT NOT NULL, status TEXT NOT NULL, state TEXT NOT NULL,
    window_end INTEGER NOT NULL, beacon TEXT, receipts TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_state ON batches(state);
CREATE TABLE IF NOT EXISTS audits(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, state TEXT NOT NULL, verdict TEXT, detail TEXT NOT NULL,
    evidence TEXT, attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0,
    PRIMARY KEY(batch_id, position));
CREATE INDEX IF NOT EXISTS audits_state ON audits(state);
CREATE TABLE IF NOT EXISTS challenges(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, chunk TEXT NOT NULL, challenge_id INTEGER,
    bond TEXT NOT NULL, state TEXT NOT NULL, deadline INTEGER, sent_key TEXT, PRIMARY KEY(batch_id, position, chunk));
CREATE INDEX IF NOT EXISTS challenges_state ON challenges(state);
CREATE INDEX IF NOT EXISTS challenges_id ON challenges(challenge_id);
CREATE TABLE IF NOT EXISTS answers(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, chunk TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY(batch_id, position, chunk));
CREATE TABLE IF NOT EXISTS observed(
    id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, seq INTEGER NOT NULL, request_hash TEXT NOT NULL,
    struct_hash TEXT NOT NULL, issued_at INTEGER NOT NULL, receipt TEXT NOT NULL, signature TEXT NOT NULL,
    batch_id INTEGER, position INTEGER, UNIQUE(node, struct_hash));
CREATE INDEX IF NOT EXISTS observed_seq ON observed(node, seq);
CREATE INDEX IF NOT EXISTS observed_request ON observed(node, request_hash);
CREATE INDEX IF NOT EXISTS observed_batch ON observed(batch_id);
CREATE TABLE IF NOT EXISTS contradictions(
    a INTEGER NOT NULL, b INTEGER NOT NULL, state TEXT NOT NULL, PRIMARY KEY(a, b));
CREATE INDEX IF NOT EXISTS contradictions_state ON contradictions(state);
CREATE TABLE IF NOT EXISTS filings(
    key TEXT PRIMARY KEY, batch_id INTEGER, kind TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL,
    call TEXT, attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS filings_state ON filings(state);
CREATE TABLE IF NOT EXISTS accusations(
    batch_id INTEGER NOT NULL, position INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '', accusation TEXT, bond TEXT NOT NULL DEFAULT '0', claim TEXT,
    detail TEXT NOT NULL DEFAULT '{}', ended_at INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(batch_id, position, attempt));
CREATE INDEX IF NOT EXISTS accusations_state ON accusations(state);
CREATE TABLE IF NOT EXISTS notes(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
LOCK_SECONDS = 30.0
"""How long to wait for another process (`poip watch submit`) that writes."""


class Database:
    """One connection, safe to use from several threads of one process; other processes may have the file open, too."""

    def __init__(self, path: Path) -> None:
        prepare_private(path)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=LOCK_SECONDS)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the database. Nothing is lost by it."""
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

    def note(self, name: str) -> str | None:
        """A small value kept under a name."""
        rows = self._rows("SELECT value FROM notes WHERE name=?", name)
        return str(rows[0]["value"]) if rows else None

    def set_note(self, name: str, value: str) -> None:
        """Keep a small value under a name."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES(?,?)", (name, value))
