"""The client's durable account with every node: what was asked, what was answered and checked, what was promised.

One SQLite file per paying key. Everything that binds money is written, and synced, before it leaves the process:
a request before it is sent, a receipt together with the vouchers that it earns before they are handed over. After a
crash at any line `open_attempts` and `undelivered` say exactly what is still to do.

    attempt: one request at one node    open -> checked | refused | void | unpaid | bad
                                        open -> abandoned -> refused | void | unpaid

Rules kept here, each inside one transaction:
* a request is paid at most at one node, whoever else holds a receipt for it;
* a voucher's `cumulative` is the sum of the fees of checked receipts with that node, in the order of payer_cum, and
  names the receipt it runs up to; it waits for earlier receipts that are still on their way;
* a prepaid voucher (no receipt named) never exceeds that sum plus the most that open requests can cost;
* an escrow is promised once: open requests reserve their maximum fee.

Knows nothing of HTTP or of the chain. Amounts are wei, kept as decimal text because SQLite integers have 64 bits.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.control.checks import BadAnswer, SignedRequest
from poip_chain.errors import ConfigurationError, InsufficientFunds, Refused
from poip_chain.spec.eip712 import Domain, parse_hex
from poip_chain.spec.objects import Receipt, Request, SamplingParams, Voucher
from poip_chain.spec.types import ZERO_HASH, Address

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS accounts (
    node TEXT PRIMARY KEY, base TEXT NOT NULL, signed TEXT NOT NULL, blocked TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS requests (
    request_hash TEXT PRIMARY KEY, body TEXT NOT NULL, deadline INTEGER NOT NULL, created_at INTEGER NOT NULL,
    paid_node TEXT);
CREATE TABLE IF NOT EXISTS attempts (
    request_hash TEXT NOT NULL REFERENCES requests, node TEXT NOT NULL, url TEXT NOT NULL, state TEXT NOT NULL,
    max_fee TEXT NOT NULL, prepaid INTEGER NOT NULL DEFAULT 0, receipt TEXT, signature TEXT, receipt_hash TEXT,
    from_cum TEXT, to_cum TEXT, fee TEXT, vouched INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (request_hash, node));
CREATE INDEX IF NOT EXISTS attempts_by_state ON attempts (node, state, vouched);
CREATE TABLE IF NOT EXISTS vouchers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, url TEXT NOT NULL, voucher TEXT NOT NULL,
    signature TEXT NOT NULL, delivered INTEGER NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS vouchers_undelivered ON vouchers (delivered, node);
"""

Sign = Callable[[Voucher], bytes]


@dataclass(frozen=True, slots=True)
class SignedVoucher:
    """A voucher with its signature, and where it goes."""

    id: int
    node: Address
    url: str
    voucher: Voucher
    signature: bytes

    def to_json(self) -> dict[str, Any]:
        """The body of POST /v1/vouchers."""
        return {"voucher": self.voucher.to_json(), "signature": "0x" + self.signature.hex()}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request at one node. `fee` is what its receipt takes, 0 where there is none."""

    request_hash: bytes
    node: Address
    url: str
    state: str
    max_fee: int
    fee: int
    deadline: int
    reason: str


@dataclass(frozen=True, slots=True)
class Account:
    """What stands between this key and one node, in wei. `accepted` is the sum of all checked receipts' fees."""

    node: Address
    accepted: int
    signed: int
    open_max: int
    unpaid: int
    blocked: str


class Ledger:
    """See the module's docstring. Safe to use from several threads of one process; a second process is refused."""

    def __init__(self, path: Path, payer: Address, vault: Domain) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = os.open(path.with_suffix(path.suffix + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise ConfigurationError(
                f"the ledger {path} is in use by another process.",
                hint="Stop that process, or give this one its own data directory and key.",
            ) from error
        self.payer = payer
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        os.chmod(path, 0o600)
        self._db.row_factory = sqlite3.Row
        # FULL: a committed transaction survives power loss, which is what "written before it leaves" means.
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;" + SCHEMA)
        for name, value in (
            ("payer", payer),
            ("chain_id", str(vault.chain_id)),
            ("vault", vault.verifying_contract),
        ):
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, value))
            stored = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()["value"]
            if stored != value:
                self.close()
                raise ConfigurationError(
                    f"the ledger {path} belongs to {name} {stored}, not {value}.",
                    hint="Use one data directory per key and deployment.",
                )

    def close(self) -> None:
        """Release the file and its lock."""
        self._db.close()
        os.close(self._lock_file)

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

    # --- before a request leaves -------------------------------------------------------------------------------

    def open(
        self, signed: SignedRequest, node: Address, url: str, *, available: int, settled: int, now: int
    ) -> None:
        """Write down that `signed` is about to go to `node`, and reserve its maximum fee.

        `available` and `settled` are the vault's figures for (payer, node). Raises InsufficientFunds if the escrow
        that is not yet spoken for is below the maximum fee, Refused if the node is blocked or the request is paid.
        """
        request_hash = signed.request_hash.hex()
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?, ?, '')", (node, str(settled), str(settled)))
            account = self._account(db, node)
            if account.blocked:
                raise Refused(f"node {node} is blocked: {account.blocked}")
            row = db.execute("SELECT paid_node FROM requests WHERE request_hash = ?", (request_hash,)).fetchone()
            if row is not None and row["paid_node"]:
                raise Refused(f"request 0x{request_hash} is already answered and paid at {row['paid_node']}.")
            free = available - self._committed(account, settled)
            if free < signed.max_fee():
                raise InsufficientFunds(
                    f"the escrow with {node} has {max(free, 0)} wei free, the request may cost {signed.max_fee()}.",
                    hint="Deposit more escrow for this node, or ask for fewer tokens.",
                )
            db.execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, NULL)",
                (request_hash, json.dumps(signed.to_json()), signed.request.deadline, now),
            )
            existing = db.execute(
                "SELECT state FROM attempts WHERE request_hash = ? AND node = ?", (request_hash, node)
            ).fetchone()
            if existing is not None and existing["state"] not in ("open", "refused"):
                raise Refused(f"request 0x{request_hash} was already tried at {node} ({existing['state']}).")
            db.execute(
                "INSERT INTO attempts (request_hash, node, url, state, max_fee) VALUES (?, ?, ?, 'open', ?) "
                "ON CONFLICT (request_hash, node) DO UPDATE SET state = 'open', url = excluded.url",
                (request_hash, node, url, str(signed.max_fee())),
            )

    def prepay(self, request_hash: bytes, node: Address, sign: Sign) -> SignedVoucher:
        """A voucher that covers all checked receipts and the open requests that prepay, this one included."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE attempts SET prepaid = 1 WHERE request_hash = ? AND node = ? AND state = 'open'",
                (request_hash.hex(), node),
            ).rowcount
            if not changed:
                raise Refused(f"request 0x{request_hash.hex()} is not open at {node}: nothing to prepay.")
            account = self._account(db, node)
            prepaid = self._sum(
                db, "SELECT max_fee FROM attempts WHERE node = ? AND prepaid = 1 AND state = 'open'", (node,)
            )
            amount = account.accepted + prepaid
            return self._sign(db, node, self._url(db, request_hash, node), amount, ZERO_HASH, sign)

    # --- what became of it -------------------------------------------------------------------------------------

    def refused(self, request_hash: bytes, node: Address, reason: str) -> None:
        """The node said before the first byte that it does not take the request: nothing is owed."""
        self._close(request_hash, node, "refused", reason)

    def void(self, request_hash: bytes, node: Address, reason: str) -> None:
        """No receipt exists and none can come in time: nothing is owed."""
        self._close(request_hash, node, "void", reason)

    def abandon(self, request_hash: bytes, node: Address, reason: str) -> None:
        """The client gives this attempt up and may ask another node: a receipt that still turns up is not paid."""
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET state = 'abandoned', reason = ? "
                "WHERE request_hash = ? AND node = ? AND state = 'open'",
                (reason[:300], request_hash.hex(), node),
            )

    def reject(self, request_hash: bytes, node: Address, reason: str) -> None:
        """The node's answer broke a rule: it is not paid, and this key asks the node nothing more."""
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET state = 'bad', reason = ? WHERE request_hash = ? AND node = ? "
                "AND state IN ('open', 'abandoned')",
                (reason[:300], request_hash.hex(), node),
            )
            db.execute("UPDATE accounts SET blocked = ? WHERE node = ?", (reason[:300], node))

    def unpaid(self, receipt: Receipt, signature: bytes, sign: Sign) -> list[SignedVoucher]:
        """Keep the receipt of an abandoned attempt, or of a request that another node answered, without paying it."""
        with self._transaction() as db:
            return self._unpaid(db, receipt, signature, sign)

    def accept(self, receipt: Receipt, signature: bytes, sign: Sign) -> list[SignedVoucher]:
        """Keep a receipt whose answer was checked, and sign the vouchers that are due now.

        Idempotent. Raises BadAnswer if its interval of payer_cum overlaps that of another receipt of this node
        (nothing is changed then), Refused if the attempt was abandoned or the request is paid elsewhere: the receipt
        is then kept as unpaid.
        """
        node, request_hash = receipt.node, receipt.request_hash.hex()
        with self._transaction() as db:
            attempt = self._attempt(db, request_hash, node)
            paid = attempt["paid_node"]
            elsewhere = attempt["state"] == "abandoned" or (paid and paid != node)
            if elsewhere:
                self._unpaid(db, receipt, signature, sign)
            elif attempt["state"] == "checked":
                if attempt["receipt_hash"] != receipt.struct_hash().hex():
                    raise BadAnswer("equivocation", f"node {node} signed two different receipts for 0x{request_hash}.")
                return []
            else:
                self._store(db, receipt, signature, "checked")
                db.execute("UPDATE requests SET paid_node = ? WHERE request_hash = ?", (node, request_hash))
                self._forget_prompt(db, request_hash)
                return self._due(db, node, sign)
        raise Refused(f"request 0x{request_hash} was answered elsewhere: the receipt of {node} is kept and not paid.")

    # --- vouchers ----------------------------------------------------------------------------------------------

    def undelivered(self, node: Address | None = None) -> list[SignedVoucher]:
        """Vouchers that no node has acknowledged, oldest first."""
        where, arguments = ("AND node = ?", (node,)) if node else ("", ())
        with self._mutex:
            rows = self._db.execute(
                f"SELECT * FROM vouchers WHERE delivered = 0 {where} ORDER BY id LIMIT 1000", arguments
            ).fetchall()
        return [_voucher(row) for row in rows]

    def delivered(self, voucher_id: int, note: str = "") -> None:
        """The node took the voucher, or refused it for good (`note` says why)."""
        with self._transaction() as db:
            db.execute("UPDATE vouchers SET delivered = 1, note = ? WHERE id = ?", (note[:300], voucher_id))

    # --- reading -----------------------------------------------------------------------------------------------

    def attempts(self, *states: str) -> list[Attempt]:
        """All attempts in these states, oldest first."""
        marks = ",".join("?" * len(states))
        with self._mutex:
            rows = self._db.execute(
                f"SELECT a.*, r.deadline FROM attempts a JOIN requests r USING (request_hash) "
                f"WHERE a.state IN ({marks}) ORDER BY r.created_at LIMIT 10000",
                states,
            ).fetchall()
        return [_attempt(row) for row in rows]

    def attempt(self, request_hash: bytes, node: Address) -> Attempt | None:
        """One attempt, or None."""
        with self._mutex:
            row = self._db.execute(
                "SELECT a.*, r.deadline FROM attempts a JOIN requests r USING (request_hash) "
                "WHERE request_hash = ? AND node = ?",
                (request_hash.hex(), node),
            ).fetchone()
        return None if row is None else _attempt(row)

    def body(self, request_hash: bytes) -> SignedRequest | None:
        """The request as it was sent; its prompt ids are empty once it is settled."""
        with self._mutex:
            row = self._db.execute("SELECT body FROM requests WHERE request_hash = ?", (request_hash.hex(),)).fetchone()
        if row is None:
            return None
        data = json.loads(row["body"])
        return SignedRequest(
            request=Request.from_json(data["request"]),
            params=SamplingParams.from_json(data["params"]),
            signature=parse_hex(data["signature"], "signature", 65),
            prompt_ids=tuple(data["prompt_ids"]),
        )

    def receipts(self, request_hash: bytes) -> list[tuple[str, Receipt, bytes]]:
        """(state, receipt, signature) of every receipt that is held for a request."""
        with self._mutex:
            rows = self._db.execute(
                "SELECT state, receipt, signature FROM attempts WHERE request_hash = ? AND receipt IS NOT NULL",
                (request_hash.hex(),),
            ).fetchall()
        return [
            (row["state"], Receipt.from_json(json.loads(row["receipt"])), bytes.fromhex(row["signature"]))
            for row in rows
        ]

    def account(self, node: Address) -> Account:
        """The standing with one node; zeros if there is none."""
        with self._mutex:
            return self._account(self._db, node)

    def accounts(self) -> list[Account]:
        """The standing with every node that was ever asked."""
        with self._mutex:
            nodes = [row["node"] for row in self._db.execute("SELECT node FROM accounts ORDER BY node")]
            return [self._account(self._db, node) for node in nodes]

    def committed(self, node: Address, settled: int) -> int:
        """How much of the escrow with `node` is spoken for, given what the vault has settled."""
        with self._mutex:
            return self._committed(self._account(self._db, node), settled)

    # --- inside a transaction ----------------------------------------------------------------------------------

    @staticmethod
    def _sum(db: sqlite3.Connection, query: str, arguments: tuple[Any, ...]) -> int:
        return sum(int(row[0]) for row in db.execute(query, arguments))

    def _account(self, db: sqlite3.Connection, node: Address) -> Account:
        row = db.execute("SELECT * FROM accounts WHERE node = ?", (node,)).fetchone()
        if row is None:
            return Account(node, 0, 0, 0, 0, "")
        # Totals of receipts that are vouched for live in `base`, so the sums below stay short.
        waiting = self._sum(
            db, "SELECT fee FROM attempts WHERE node = ? AND state = 'checked' AND vouched = 0", (node,)
        )
        opened = self._sum(db, "SELECT max_fee FROM attempts WHERE node = ? AND state IN ('open', 'abandoned')", (node,))
        unpaid = self._sum(db, "SELECT fee FROM attempts WHERE node = ? AND state = 'unpaid'", (node,))
        return Account(node, int(row["base"]) + waiting, int(row["signed"]), opened, unpaid, row["blocked"])

    @staticmethod
    def _committed(account: Account, settled: int) -> int:
        return max(account.accepted + account.open_max, account.signed, settled) - settled

    @staticmethod
    def _attempt(db: sqlite3.Connection, request_hash: str, node: Address) -> sqlite3.Row:
        row: sqlite3.Row | None = db.execute(
            "SELECT a.*, r.paid_node FROM attempts a JOIN requests r USING (request_hash) "
            "WHERE request_hash = ? AND node = ?",
            (request_hash, node),
        ).fetchone()
        if row is None:
            raise Refused(f"this key never sent request 0x{request_hash} to {node}.")
        return row

    def _url(self, db: sqlite3.Connection, request_hash: bytes, node: Address) -> str:
        return str(self._attempt(db, request_hash.hex(), node)["url"])

    @staticmethod
    def _store(db: sqlite3.Connection, receipt: Receipt, signature: bytes, state: str) -> None:
        low, high = receipt.payer_cum - receipt.fee, receipt.payer_cum
        own = receipt.request_hash.hex()
        others = db.execute(
            "SELECT request_hash, from_cum, to_cum FROM attempts "
            "WHERE node = ? AND receipt IS NOT NULL AND request_hash != ? AND state IN ('checked', 'unpaid')",
            (receipt.node, own),
        )
        for row in others:
            if low < int(row["to_cum"]) and int(row["from_cum"]) < high:
                raise BadAnswer(
                    "payer total",
                    f"node {receipt.node} charges payer_cum ({low}, {high}] for 0x{own}, which overlaps "
                    f"({row['from_cum']}, {row['to_cum']}] of its receipt for 0x{row['request_hash']}.",
                )
        db.execute(
            "UPDATE attempts SET state = ?, receipt = ?, signature = ?, receipt_hash = ?, from_cum = ?, to_cum = ?, "
            "fee = ? WHERE request_hash = ? AND node = ?",
            (
                state,
                json.dumps(receipt.to_json()),
                signature.hex(),
                receipt.struct_hash().hex(),
                str(low),
                str(high),
                str(receipt.fee),
                own,
                receipt.node,
            ),
        )

    def _unpaid(
        self, db: sqlite3.Connection, receipt: Receipt, signature: bytes, sign: Sign
    ) -> list[SignedVoucher]:
        if self._attempt(db, receipt.request_hash.hex(), receipt.node)["state"] not in ("open", "abandoned"):
            return []
        self._store(db, receipt, signature, "unpaid")
        return self._due(db, receipt.node, sign)

    def _close(self, request_hash: bytes, node: Address, state: str, reason: str) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET state = ?, reason = ? WHERE request_hash = ? AND node = ? "
                "AND state IN ('open', 'abandoned')",
                (state, reason[:300], request_hash.hex(), node),
            )
            live = db.execute(
                "SELECT 1 FROM attempts WHERE request_hash = ? AND state IN ('open', 'abandoned')",
                (request_hash.hex(),),
            ).fetchone()
            if live is None and state == "void":
                self._forget_prompt(db, request_hash.hex())

    @staticmethod
    def _forget_prompt(db: sqlite3.Connection, request_hash: str) -> None:
        # A prompt is kept only as long as recovery may need it: a settled request keeps hashes and amounts alone.
        row = db.execute("SELECT body FROM requests WHERE request_hash = ?", (request_hash,)).fetchone()
        body = {**json.loads(row["body"]), "prompt_ids": []}
        db.execute("UPDATE requests SET body = ? WHERE request_hash = ?", (json.dumps(body), request_hash))

    def _due(self, db: sqlite3.Connection, node: Address, sign: Sign) -> list[SignedVoucher]:
        """Sign for checked receipts in the order of payer_cum, up to the first gap that an open request may fill."""
        rows = db.execute(
            "SELECT * FROM attempts WHERE node = ? AND state = 'checked' AND vouched = 0", (node,)
        ).fetchall()
        rows.sort(key=lambda row: int(row["to_cum"]))
        covered = [
            (int(row["from_cum"]), int(row["to_cum"]))
            for row in db.execute(
                "SELECT from_cum, to_cum FROM attempts WHERE node = ? AND state IN ('checked', 'unpaid')", (node,)
            )
        ]
        waiting = db.execute(
            "SELECT 1 FROM attempts WHERE node = ? AND state IN ('open', 'abandoned')", (node,)
        ).fetchone()
        starts = {low for low, high in covered if high > low}
        ends = {high for low, high in covered if high > low}
        first = self._first_cum(db, node)
        signed = []
        for row in rows:
            low, fee = int(row["from_cum"]), int(row["fee"])
            # A hole below this receipt: some interval starts above an end that nothing continues.
            holes = [end for end in ({first} | ends) if end <= low and end not in starts and end != low]
            if fee and low not in ({first} | ends):
                holes.append(low)
            if waiting and holes:
                break
            account = db.execute("SELECT base FROM accounts WHERE node = ?", (node,)).fetchone()
            total = int(account["base"]) + fee
            db.execute("UPDATE accounts SET base = ? WHERE node = ?", (str(total), node))
            db.execute(
                "UPDATE attempts SET vouched = 1 WHERE request_hash = ? AND node = ?", (row["request_hash"], node)
            )
            if fee:
                receipt_hash = bytes.fromhex(row["receipt_hash"])
                signed.append(self._sign(db, node, row["url"], total, receipt_hash, sign))
        return signed
