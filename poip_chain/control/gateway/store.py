"""The gateway's own database: API keys (hashed) and what each has spent.

A key is `poip-<id>-<secret>`: the id finds the row, the secret has 256 random bits, so one SHA-256 of it is enough to
keep, and it is compared in constant time. Spending is bound to the request: a row is written with the most that it may
cost before the request is signed, and closed with the fee of its receipt. Knows no HTTP and no chain.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.errors import InsufficientFunds, InvalidInput, NotFound

SCHEMA = """
CREATE TABLE IF NOT EXISTS api_keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, secret_hash BLOB NOT NULL, cap TEXT, created_at INTEGER NOT NULL,
    revoked_at INTEGER, closed_spend TEXT NOT NULL DEFAULT '0');
CREATE TABLE IF NOT EXISTS open_spend (
    request_hash TEXT NOT NULL, key_id TEXT NOT NULL REFERENCES api_keys, most TEXT NOT NULL,
    PRIMARY KEY (request_hash, key_id));
"""
PREFIX = "poip"
ID_BYTES = 6
SECRET_BYTES = 32
_NOBODY = hashlib.sha256(b"no such key").digest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret. Amounts in wei; `cap` None means no limit; `open` is reserved for running requests."""

    id: str
    name: str
    cap: int | None
    spent: int
    open: int
    created_at: int
    revoked_at: int | None

    def to_json(self) -> dict[str, Any]:
        """JSON form, amounts as decimal strings."""
        return {
            "id": self.id,
            "name": self.name,
            "cap": None if self.cap is None else str(self.cap),
            "spent": str(self.spent),
            "open": str(self.open),
            "created_at": self.created_at,
            "revoked_at": self.revoked_at,
        }


class GatewayStore:
    """See the module's docstring. Several processes may open it: the CLI adds keys while a gateway runs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        os.chmod(path, 0o600)
        self._db.row_factory = sqlite3.Row
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;" + SCHEMA)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    # --- keys --------------------------------------------------------------------------------------------------

    def create_key(self, name: str, cap: int | None, now: int) -> tuple[ApiKey, str]:
        """A new key and its text, which is shown this once and never stored. `cap` in wei."""
        if not name or len(name) > 100 or not name.isprintable():
            raise InvalidInput("an API key's name has 1 to 100 printable characters.")
        if cap is not None and cap < 0:
            raise InvalidInput(f"a spend cap is not negative, but {cap}.")
        key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO api_keys (id, name, secret_hash, cap, created_at) VALUES (?, ?, ?, ?, ?)",
                (key_id, name, _hash(secret), None if cap is None else str(cap), now),
            )
            return self._key(key_id), f"{PREFIX}-{key_id}-{secret}"

    def api_keys(self) -> list[ApiKey]:
        """All keys, oldest first."""
        with self._mutex:
            rows = self._db.execute("SELECT id FROM api_keys ORDER BY created_at, id").fetchall()
            return [self._key(row["id"]) for row in rows]

    def revoke_key(self, key_id: str, now: int) -> ApiKey:
        """End a key. Raises NotFound."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, ?) WHERE id = ?", (now, key_id)
            ).rowcount
            if not changed:
                raise NotFound(f"there is no API key with the id {key_id!r:.40}.", hint="`poip gateway key list`")
            return self._key(key_id)

    def authenticate(self, text: str) -> ApiKey | None:
        """The key that `text` is, None if it is none or revoked. Takes the same steps in every case."""
        parts = text.split("-") if len(text) <= 200 else []
        key_id, secret = (parts[1], parts[2]) if len(parts) == 3 and parts[0] == PREFIX else ("", "")
        with self._mutex:
            row = self._db.execute("SELECT * FROM api_keys WHERE id = ?", (key_id,)).fetchone()
            same = hmac.compare_digest(_hash(secret), bytes(row["secret_hash"]) if row else _NOBODY)
            return self._key(key_id) if row and same and row["revoked_at"] is None else None

    # --- spending ----------------------------------------------------------------------------------------------

    def reserve(self, key_id: str, request_hash: bytes, most: int) -> None:
        """Set aside what a request may cost. Raises InsufficientFunds if the key's cap does not allow it."""
        with self._transaction() as db:
            key = self._key(key_id)
            if key.cap is not None and key.spent + key.open + most > key.cap:
                left = max(0, key.cap - key.spent - key.open)
                raise InsufficientFunds(
                    f"this API key may spend {left} wei more, the request may cost {most}.",
                    hint="Ask for fewer tokens, or have the key's cap raised.",
                )
            db.execute("INSERT OR REPLACE INTO open_spend VALUES (?, ?, ?)", (request_hash.hex(), key_id, str(most)))

    def close_spend(self, request_hash: bytes, fee: int) -> None:
        """A request cost `fee` in the end (0: nothing). Idempotent."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM open_spend WHERE request_hash = ?", (request_hash.hex(),)).fetchone()
            if row is None:
                return
            spent = db.execute("SELECT closed_spend FROM api_keys WHERE id = ?", (row["key_id"],)).fetchone()[0]
            db.execute("UPDATE api_keys SET closed_spend = ? WHERE id = ?", (str(int(spent) + fee), row["key_id"]))
            db.execute("DELETE FROM open_spend WHERE request_hash = ?", (request_hash.hex(),))

    def open_requests(self) -> list[bytes]:
        """Requests whose cost is not known yet."""
        with self._mutex:
            return [bytes.fromhex(row[0]) for row in self._db.execute("SELECT request_hash FROM open_spend")]

    # --- inside ------------------------------------------------------------------------------------------------

    def _key(self, key_id: str) -> ApiKey:
        row = self._db.execute("SELECT * FROM api_keys WHERE id = ?", (key_id,)).fetchone()
        if row is None:
            raise NotFound(f"there is no API key with the id {key_id!r:.40}.")
        opened = sum(int(r[0]) for r in self._db.execute("SELECT most FROM open_spend WHERE key_id = ?", (key_id,)))
        cap = None if row["cap"] is None else int(row["cap"])
        spent = int(row["closed_spend"])
        return ApiKey(row["id"], row["name"], cap, spent, opened, row["created_at"], row["revoked_at"])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()
