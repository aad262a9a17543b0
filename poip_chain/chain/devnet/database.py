"""A key-value store in one SQLite file, with a commit per block. Knows bytes only.

Writes gather in memory and reach the file in one transaction (`commit`), or are forgotten (`discard`): whenever the
process dies, the file holds the state after some whole block.
"""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from eth.db.backends.base import BaseDB

from poip_chain.errors import ConfigurationError, IntegrityError

CACHE_BYTES = 64 * 1024 * 1024


class Database(BaseDB):
    """A mapping of bytes to bytes for py-evm. `path` None keeps it in memory.

    One writer at a time, any number of readers. Readers that hold no lock may only ask for keys whose value never
    changes (trie nodes, code, headers by hash): those are the hash of what they name.

    Raises ConfigurationError if the file cannot be opened or another process has it, IntegrityError if it is damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._pending: dict[bytes, bytes | None] = {}
        self._cache: dict[bytes, bytes] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path or ":memory:", isolation_level=None, check_same_thread=False, timeout=0.5
            )
            # Exclusive: a second devnet on the same file is refused at once, and no shared-memory file is needed.
            self._connection.execute("pragma locking_mode=exclusive")
            self._connection.execute("pragma journal_mode=wal")
            self._connection.execute("pragma synchronous=normal")
            self._connection.execute("begin immediate")
            self._connection.execute("create table if not exists entry(key blob primary key, value blob) without rowid")
            self._connection.execute("commit")
        except sqlite3.OperationalError as error:
            raise ConfigurationError(
                f"the devnet's database {path} cannot be opened: {error}.",
                hint="Is another devnet running on it, and is the directory writable?",
            ) from error
        except sqlite3.DatabaseError as error:
            raise IntegrityError(
                f"{path} is no devnet database, or it is damaged: {error}.",
                hint="Start with another file, or remove this one to start a new chain.",
            ) from error

    def __getitem__(self, key: bytes) -> bytes:
        if key in self._pending:
            value = self._pending[key]
            if value is None:
                raise KeyError(key)
            return value
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        with self._lock:
            row = self._connection.execute("select value from entry where key = ?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            self._remember(key, row[0])
        return bytes(row[0])

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._pending[key] = bytes(value)

    def __delitem__(self, key: bytes) -> None:
        self[key]  # deleting what does not exist is an error, as in every mapping
        self._pending[key] = None

    def _exists(self, key: bytes) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def scan(self, first: bytes, last: bytes) -> list[tuple[bytes, bytes]]:
        """Committed entries with first <= key <= last, in the order of their keys."""
        with self._lock:
            return self._connection.execute(
                "select key, value from entry where key between ? and ? order by key", (first, last)
            ).fetchall()

    def commit(self) -> None:
        """Write everything since the last commit in one transaction."""
        if not self._pending:
            return
        with self._lock:
            stored = [(key, value) for key, value in self._pending.items() if value is not None]
            removed = [(key,) for key, value in self._pending.items() if value is None]
            self._connection.execute("begin immediate")
            try:
                self._connection.executemany("insert or replace into entry values (?, ?)", stored)
                self._connection.executemany("delete from entry where key = ?", removed)
                self._connection.execute("commit")
            except BaseException:
                self._connection.execute("rollback")
                raise
            for key, value in stored:
                self._remember(key, value)
            for (key,) in removed:
                self._cache.pop(key, None)
            self._pending = {}

    def discard(self) -> None:
        """Forget everything since the last commit."""
        self._pending = {}

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        with self._lock:
            self._connection.close()

    def _remember(self, key: bytes, value: bytes) -> None:
        if self._cached_bytes > CACHE_BYTES:
            self._cache = {}
            self._cached_bytes = 0
        self._cache[key] = value
        # A rough sum suffices: keys that are written again count twice, which only empties the cache earlier.
        self._cached_bytes += len(key) + len(value) + 150
