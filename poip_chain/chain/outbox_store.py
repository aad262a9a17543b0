"""What an outbox remembers, in SQLite with write-ahead log; every method is one transaction.

Knows neither the chain nor keys.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from poip_chain.chain.private_files import PRIVATE_DIRECTORY, prepare_private
from poip_chain.chain.rpc import Call
from poip_chain.errors import ConfigurationError, IntegrityError, NotFound, Refused
from poip_chain.spec.types import Address, Hash32

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS transactions(
    id INTEGER PRIMARY KEY, idempotency_key TEXT NOT NULL UNIQUE, target TEXT, data BLOB NOT NULL, value TEXT NOT NULL,
    description TEXT NOT NULL, nonce INTEGER NOT NULL, gas INTEGER NOT NULL, state TEXT NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, error TEXT NOT NULL DEFAULT '', receipt TEXT);
CREATE INDEX IF NOT EXISTS transactions_open ON transactions(settled, state);
CREATE TABLE IF NOT EXISTS attempts(
    hash TEXT PRIMARY KEY, transaction_id INTEGER NOT NULL REFERENCES transactions(id), number INTEGER NOT NULL,
    raw BLOB NOT NULL, max_fee TEXT NOT NULL, tip TEXT NOT NULL, sent_at REAL NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS attempts_of ON attempts(transaction_id, number);
"""


class State(StrEnum):
    """How far a transaction is."""

    OPEN = "open"
    """Signed and stored; sent, or to be sent by the next step."""
    MINED = "mined"
    """In a block, and it succeeded."""
    REVERTED = "reverted"
    """In a block, and it reverted. It is never tried again."""
    LOST = "lost"
    """Another use of the key took its nonce; the next step signs it anew."""
    STOPPED = "stopped"
    """Lost, and by now it would revert: not signed again unless the caller asks."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed form of a transaction. sent_at 0: not handed over yet. Prices in wei per gas."""

    hash: str
    raw: bytes
    max_fee: int
    tip: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class TransactionReceipt:
    """How a transaction ended. fee is what its gas cost, in wei of the chain's own coin."""

    hash: str
    block_number: int
    block_hash: Hash32
    status: bool
    gas_used: int
    fee: int
    contract_address: Address | None


@dataclass(frozen=True, slots=True)
class Transaction:
    """One intent and all its signed forms under its present nonce, oldest first."""

    id: int
    idempotency_key: str
    to: Address | None
    data: bytes
    value: int
    description: str
    nonce: int
    gas: int
    state: State
    created_at: float
    error: str
    receipt: TransactionReceipt | None
    attempts: tuple[Attempt, ...]

    @property
    def hash(self) -> str:
        """Hash of the form that was mined, else of the latest."""
        return self.receipt.hash if self.receipt is not None else self.attempts[-1].hash

    @property
    def call(self) -> Call:
        """Its content."""
        return Call(self.to, self.data, self.description, self.value)


def receipt_from_json_rpc(receipt: dict[str, Any]) -> TransactionReceipt:
    """A receipt as web3 returns it."""
    price = int(receipt.get("effectiveGasPrice", 0))
    created = receipt.get("contractAddress")
    return TransactionReceipt(
        hash="0x" + bytes(receipt["transactionHash"]).hex(),
        block_number=int(receipt["blockNumber"]),
        block_hash=Hash32(bytes(receipt["blockHash"])),
        status=int(receipt["status"]) == 1,
        gas_used=int(receipt["gasUsed"]),
        fee=int(receipt["gasUsed"]) * price,
        contract_address=Address(str(created)) if created else None,
    )


class OutboxStore:
    """See the module's docstring. The caller serialises access.

    Raises Refused if another process holds the file.
    """

    def __init__(self, path: Path, owner: str) -> None:
        path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        self._path = path
        self._lock_file = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise Refused(
                f"another process sends transactions for {owner} (it holds {path}).",
                hint="One key has one sender: stop the other process, or use another key.",
            ) from error
        try:
            prepare_private(path)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            # A nonce that was signed must never be forgotten, whatever the machine does.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            os.close(self._lock_file)
            raise ConfigurationError(f"{path} cannot be used as an outbox: {error}.") from error

    def close(self) -> None:
        """Close the file and let others have it. May be called twice."""
        if self._lock_file >= 0:
            self._db.close()
            os.close(self._lock_file)
            self._lock_file = -1

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def bind(self, address: Address, chain_id: int, genesis: bytes) -> None:
        """Tie a new file to its key and chain; raises IntegrityError if it is tied to others."""
        wanted = {"address": address, "chain_id": str(chain_id), "genesis": genesis.hex()}
        with self._write() as db:
            found = dict(db.execute("SELECT name, value FROM meta").fetchall())
            if not found:
                db.executemany("INSERT INTO meta VALUES(?,?)", wanted.items())
            elif found != wanted:
                differing = ", ".join(sorted(name for name in wanted if found.get(name) != wanted[name]))
                raise IntegrityError(
                    f"the outbox {self._path} belongs to another {differing}.",
                    hint="If the chain was made anew, delete this file.",
                )

    def find(self, idempotency_key: str) -> Transaction | None:
        """The transaction of a key, or None."""
        found = self._select("WHERE idempotency_key=?", idempotency_key)
        return found[0] if found else None

    def get(self, idempotency_key: str) -> Transaction:
        """The transaction of a key. Raises NotFound."""
        found = self.find(idempotency_key)
        if found is None:
            raise NotFound(f"no transaction was sent under the key {idempotency_key!r}.")
        return found

    def open_transactions(self) -> list[Transaction]:
        """Those with no outcome yet, by nonce."""
        return self._select("WHERE settled=0 AND state IN ('open','lost') ORDER BY nonce")

    def unsettled(self) -> list[Transaction]:
        """Those whose outcome is unknown or may still change, by nonce."""
        return self._select("WHERE settled=0 AND state<>'stopped' ORDER BY nonce")

    def newest(self, limit: int) -> list[Transaction]:
        """The newest ones, newest first."""
        return self._select("ORDER BY id DESC LIMIT ?", limit)

    def highest_nonce(self) -> int | None:
        """The highest nonce that was given away."""
        row = self._db.execute("SELECT MAX(nonce) FROM transactions").fetchone()
        return None if row[0] is None else int(row[0])

    def add(self, idempotency_key: str, call: Call, nonce: int, gas: int, attempt: Attempt, now: float) -> None:
        """Store an intent with its nonce and first signed form."""
        with self._write() as db:
            cursor = db.execute(
                "INSERT INTO transactions(idempotency_key,target,data,value,description,nonce,gas,state,created_at)"
                " VALUES(?,?,?,?,?,?,?,'open',?)",
                (idempotency_key, call.to, call.data, str(call.value), call.description, nonce, gas, now),
            )
            _insert_attempt(db, int(cursor.lastrowid or 0), 0, attempt)

    def add_attempt(self, identifier: int, attempt: Attempt) -> None:
        """Store a replacement under the same nonce."""
        with self._write() as db:
            (count,) = db.execute("SELECT COUNT(*) FROM attempts WHERE transaction_id=?", (identifier,)).fetchone()
            _insert_attempt(db, identifier, int(count), attempt)

    def renew(self, identifier: int, nonce: int, gas: int, attempt: Attempt) -> None:
        """Give a lost transaction a new nonce. Its old signed forms are dead and are dropped."""
        with self._write() as db:
            db.execute("DELETE FROM attempts WHERE transaction_id=?", (identifier,))
            db.execute(
                "UPDATE transactions SET nonce=?, gas=?, state='open', settled=0, error='', receipt=NULL WHERE id=?",
                (nonce, gas, identifier),
            )
            _insert_attempt(db, identifier, 0, attempt)

    def sent(self, identifier: int, attempt_hash: str, now: float, error: str) -> None:
        """A form was handed over; `error` is the endpoint's refusal or ''.

        The time of the first hand-over stays, so that a stuck transaction ages though it is sent again.
        """
        with self._write() as db:
            db.execute("UPDATE attempts SET sent_at=? WHERE hash=? AND sent_at=0", (now, attempt_hash))
            db.execute("UPDATE transactions SET error=? WHERE id=? AND state='open'", (error, identifier))

    def mined(self, identifier: int, receipt: TransactionReceipt, reason: str, settled: bool) -> None:
        """Record an outcome; `reason` says why it reverted."""
        body = {
            "hash": receipt.hash,
            "block_number": receipt.block_number,
            "block_hash": receipt.block_hash.hex(),
            "status": receipt.status,
            "gas_used": receipt.gas_used,
            "fee": str(receipt.fee),
            "contract_address": receipt.contract_address,
        }
        state = State.MINED if receipt.status else State.REVERTED
        with self._write() as db:
            db.execute(
                "UPDATE transactions SET state=?, receipt=?, error=?, settled=? WHERE id=?",
                (state, json.dumps(body), reason, int(settled), identifier),
            )

    def settle(self, identifier: int) -> None:
        """The outcome is deep enough to stand."""
        with self._write() as db:
            db.execute("UPDATE transactions SET settled=1 WHERE id=?", (identifier,))

    def reopen(self, identifier: int) -> None:
        """The outcome has gone: a reorganisation dropped it."""
        with self._write() as db:
            db.execute("UPDATE transactions SET state='open', receipt=NULL, error='' WHERE id=?", (identifier,))

    def fail(self, identifier: int, state: State, reason: str) -> None:
        """Record that a transaction is lost, or stopped for good."""
        with self._write() as db:
            db.execute("UPDATE transactions SET state=?, error=? WHERE id=?", (state, reason, identifier))

    def _select(self, condition: str, *values: Any) -> list[Transaction]:
        rows = self._db.execute(f"SELECT * FROM transactions {condition}", values).fetchall()
        return [self._transaction(row) for row in rows]

    def _transaction(self, row: sqlite3.Row) -> Transaction:
        attempts = self._db.execute(
            "SELECT * FROM attempts WHERE transaction_id=? ORDER BY number", (row["id"],)
        ).fetchall()
        return Transaction(
            id=row["id"],
            idempotency_key=row["idempotency_key"],
            to=row["target"],
            data=bytes(row["data"]),
            value=int(row["value"]),
            description=row["description"],
            nonce=row["nonce"],
            gas=row["gas"],
            state=State(row["state"]),
            created_at=row["created_at"],
            error=row["error"],
            receipt=_stored_receipt(row["receipt"]),
            attempts=tuple(
                Attempt(a["hash"], bytes(a["raw"]), int(a["max_fee"]), int(a["tip"]), a["sent_at"]) for a in attempts
            ),
        )


def _insert_attempt(db: sqlite3.Connection, identifier: int, number: int, attempt: Attempt) -> None:
    db.execute(
        "INSERT INTO attempts(hash,transaction_id,number,raw,max_fee,tip) VALUES(?,?,?,?,?,?)",
        (attempt.hash, identifier, number, attempt.raw, str(attempt.max_fee), str(attempt.tip)),
    )


def _stored_receipt(text: str | None) -> TransactionReceipt | None:
    if text is None:
        return None
    body = json.loads(text)
    return TransactionReceipt(
        **{**body, "block_hash": Hash32(bytes.fromhex(body["block_hash"])), "fee": int(body["fee"])}
    )
