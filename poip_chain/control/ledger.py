"""The client's durable account with every node: what was asked, what was answered and checked, what was promised.

One SQLite file per paying key. Everything that binds money is written, and synced, before it leaves the process:
a request before it is sent, a receipt together with the vouchers that it earns before they are handed over. After a
crash at any line `attempts("open", "abandoned")` and `undelivered()` say exactly what is still to do.

    attempt = one request at one node:    open -> checked | refused | void | bad
                                          open -> abandoned -> refused | void | unpaid | bad

Rules kept here, each inside one transaction:
* a request is paid at most at one node, whoever else holds a receipt for it;
* a voucher's `cumulative` is the sum of the fees of checked receipts of that node, in the order of payer_cum, and it
  names the receipt that it runs up to; it waits for earlier receipts that are still on their way;
* a prepaid voucher (no receipt named) never exceeds that sum plus the most that open requests can cost;
* an escrow is promised once: open requests reserve their maximum fee;
* a node's running total must be explained: it is at most what was settled when this account began, plus the fees of the
  receipts that are known, plus the maximum fee of each request whose receipt may exist and is not known.

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
    node TEXT PRIMARY KEY, accepted TEXT NOT NULL, covered TEXT NOT NULL, signed TEXT NOT NULL,
    blocked TEXT NOT NULL DEFAULT '', explained TEXT NOT NULL DEFAULT '0');
CREATE TABLE IF NOT EXISTS requests (
    request_hash TEXT PRIMARY KEY, body TEXT NOT NULL, deadline INTEGER NOT NULL, created_at INTEGER NOT NULL,
    paid_node TEXT);
CREATE TABLE IF NOT EXISTS attempts (
    request_hash TEXT NOT NULL REFERENCES requests, node TEXT NOT NULL, url TEXT NOT NULL, state TEXT NOT NULL,
    max_fee TEXT NOT NULL, prepaid INTEGER NOT NULL DEFAULT 0, receipt TEXT, signature TEXT,
    settled INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (request_hash, node));
CREATE INDEX IF NOT EXISTS attempts_live ON attempts (node, settled, state);
CREATE TABLE IF NOT EXISTS vouchers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, url TEXT NOT NULL, voucher TEXT NOT NULL,
    signature TEXT NOT NULL, delivered INTEGER NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS vouchers_undelivered ON vouchers (delivered, node);
"""
# `settled` marks an attempt that needs no more work: nothing is owed, or its voucher is signed. `explained` is how far
# the settled attempts let a node's payer_cum have come; those that are not settled are added when it is needed.

MAX_REASON = 300
"""Reasons may quote a node; they are cut so that a hostile one cannot fill the disk."""


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
    """One request at one node; amounts in wei, `receipt` None where none is held."""

    request_hash: bytes
    node: Address
    url: str
    state: str
    max_fee: int
    deadline: int
    reason: str
    receipt: Receipt | None
    signature: bytes


@dataclass(frozen=True, slots=True)
class Account:
    """What stands between this key and one node, in wei.

    accepted: fees of all checked receipts; signed: the highest voucher; open_max: the most that open requests may cost.
    """

    node: Address
    accepted: int
    signed: int
    open_max: int
    blocked: str

    def committed(self, settled: int) -> int:
        """How much of the escrow is spoken for, given what the vault has settled."""
        return max(self.accepted + self.open_max, self.signed, settled) - settled


class Ledger:
    """See the module's docstring. Safe to use from several threads of one process; a second process is refused."""

    def __init__(self, path: Path, payer: Address, vault: Domain, sign: Callable[[Voucher], bytes]) -> None:
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
        self._sign_voucher = sign
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        os.chmod(path, 0o600)
        self._db.row_factory = sqlite3.Row
        # FULL: a committed transaction survives power loss, which is what "written before it leaves" means.
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;" + SCHEMA)
        self._explain_old_accounts()
        owner = {"payer": payer, "chain_id": str(vault.chain_id), "vault": vault.verifying_contract}
        for name, value in owner.items():
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

    # --- before a request leaves -------------------------------------------------------------------------------

    def open(self, signed: SignedRequest, node: Address, url: str, *, available: int, settled: int, now: int) -> None:
        """Write down that `signed` is about to go to `node`, and reserve its maximum fee.

        `available` and `settled` are the vault's figures for (payer, node), `now` in Unix seconds. Raises
        InsufficientFunds if the escrow that is not yet spoken for is below the maximum fee, Refused if the node is
        blocked, the request is paid already, or it was tried at this node before and not refused.
        """
        request_hash = signed.request_hash.hex()
        with self._transaction() as db:
            start = str(settled)
            db.execute(
                "INSERT OR IGNORE INTO accounts (node, accepted, covered, signed, explained) VALUES (?, ?, ?, ?, ?)",
                (node, start, start, start, start),
            )
            account = self._account(node)
            if account.blocked:
                raise Refused(f"node {node} is blocked: {account.blocked}")
            row = db.execute("SELECT paid_node FROM requests WHERE request_hash = ?", (request_hash,)).fetchone()
            if row is not None and row["paid_node"]:
                raise Refused(f"request 0x{request_hash} is already answered and paid at {row['paid_node']}.")
            before = self._row(request_hash, node)
            if before is not None and before["state"] != "refused":
                raise Refused(f"request 0x{request_hash} was already tried at {node} ({before['state']}).")
            free = available - account.committed(settled)
            if free < signed.max_fee():
                raise InsufficientFunds(
                    f"the escrow with {node} has {max(free, 0)} wei free, the request may cost {signed.max_fee()}.",
                    hint="Deposit more escrow for this node, or ask for fewer tokens.",
                )
            db.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, NULL) "
                "ON CONFLICT (request_hash) DO UPDATE SET body = excluded.body",
                (request_hash, json.dumps(signed.to_json()), signed.request.deadline, now),
            )
            db.execute(
                "INSERT INTO attempts (request_hash, node, url, state, max_fee) VALUES (?, ?, ?, 'open', ?) "
                "ON CONFLICT (request_hash, node) DO UPDATE SET state = 'open', settled = 0, prepaid = 0, "
                "url = excluded.url",
                (request_hash, node, url, str(signed.max_fee())),
            )

    def prepay(self, request_hash: bytes, node: Address) -> SignedVoucher:
        """A voucher that covers all checked receipts and the open requests that prepay, this one included."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE attempts SET prepaid = 1 WHERE request_hash = ? AND node = ? AND state = 'open'",
                (request_hash.hex(), node),
            ).rowcount
            if not changed:
                raise Refused(f"request 0x{request_hash.hex()} is not open at {node}: nothing to prepay.")
            rows = db.execute(
                "SELECT url, max_fee FROM attempts WHERE node = ? AND state = 'open' AND prepaid = 1", (node,)
            ).fetchall()
            account = self._account(node)
            amount = max(account.signed, account.accepted + sum(int(row["max_fee"]) for row in rows))
            return self._voucher(node, rows[-1]["url"], amount, ZERO_HASH)

    # --- what became of it -------------------------------------------------------------------------------------

    def refused(self, request_hash: bytes, node: Address, reason: str) -> list[SignedVoucher]:
        """The node said before the first byte that it does not take the request: nothing is owed."""
        return self._close(request_hash, node, "refused", reason)

    def void(self, request_hash: bytes, node: Address, reason: str) -> list[SignedVoucher]:
        """No receipt exists and none can come in time: nothing is owed."""
        return self._close(request_hash, node, "void", reason)

    def abandon(self, request_hash: bytes, node: Address, reason: str) -> str:
        """The client gives this attempt up and may ask another node: a receipt that still turns up is not paid.

        Returns the attempt's state after this, "" if it was never opened. "checked" says that its receipt was accepted
        before: it is paid, so nobody else may be asked. Its maximum fee stays reserved until its fate is known.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET state = 'abandoned', reason = ? "
                "WHERE request_hash = ? AND node = ? AND state = 'open'",
                (reason[:MAX_REASON], request_hash.hex(), node),
            )
            row = self._row(request_hash.hex(), node)
            return "" if row is None else str(row["state"])

    def reject(
        self, request_hash: bytes, node: Address, reason: str, receipt: Receipt | None, signature: bytes
    ) -> None:
        """The node's answer broke a rule: it is not paid, its receipt is kept as evidence, the node is blocked."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE attempts SET state = 'bad', settled = 1, reason = ?, receipt = ?, signature = ? "
                "WHERE request_hash = ? AND node = ? AND state IN ('open', 'abandoned')",
                (
                    reason[:MAX_REASON],
                    json.dumps(receipt.to_json()) if receipt else None,
                    signature.hex(),
                    request_hash.hex(),
                    node,
                ),
            ).rowcount
            if changed:
                self._explain(node, int(self._known_row(request_hash.hex(), node)["max_fee"]))
            db.execute("UPDATE accounts SET blocked = ? WHERE node = ?", (reason[:MAX_REASON], node))

    def accept(self, receipt: Receipt, signature: bytes) -> tuple[str, list[SignedVoucher]]:
        """Keep a receipt whose answer was checked, and sign the vouchers that are due now. Idempotent.

        Returns the attempt's state: "checked", or "unpaid" if the attempt was abandoned or the request is paid at
        another node. Raises BadAnswer, and changes nothing, if the receipt contradicts another receipt of this node:
        a second one for the request, or an interval of payer_cum that overlaps or lies beyond what can be explained.
        """
        node, request_hash = receipt.node, receipt.request_hash.hex()
        with self._transaction() as db:
            row = self._row(request_hash, node)
            if row is None:
                raise Refused(f"this key never sent request 0x{request_hash} to {node}.")
            if row["state"] in ("checked", "unpaid"):
                if Receipt.from_json(json.loads(row["receipt"])).struct_hash() != receipt.struct_hash():
                    raise BadAnswer("equivocation", f"node {node} signed two different receipts for 0x{request_hash}.")
                return row["state"], []
            if row["state"] not in ("open", "abandoned"):
                raise Refused(f"request 0x{request_hash} is closed at {node} ({row['state']}): {row['reason']}")
            self._check_interval(receipt)
            paid = db.execute("SELECT paid_node FROM requests WHERE request_hash = ?", (request_hash,)).fetchone()[0]
            state = "unpaid" if row["state"] == "abandoned" or (paid and paid != node) else "checked"
            db.execute(
                "UPDATE attempts SET state = ?, receipt = ?, signature = ? WHERE request_hash = ? AND node = ?",
                (state, json.dumps(receipt.to_json()), signature.hex(), request_hash, node),
            )
            if state == "checked":
                db.execute("UPDATE requests SET paid_node = ? WHERE request_hash = ?", (node, request_hash))
            self._forget_prompt(request_hash)
            return state, self._due(node)

    # --- vouchers ----------------------------------------------------------------------------------------------

    def undelivered(self, node: Address | None = None) -> list[SignedVoucher]:
        """Vouchers that no node has acknowledged, oldest first, at most 1000."""
        where, arguments = ("AND node = ?", (node,)) if node else ("", ())
        with self._mutex:
            rows = self._db.execute(
                f"SELECT * FROM vouchers WHERE delivered = 0 {where} ORDER BY id LIMIT 1000", arguments
            ).fetchall()
        return [_signed_voucher(row) for row in rows]

    def delivered(self, voucher_id: int, note: str = "") -> None:
        """The node took the voucher, or refused it for good (`note` says why)."""
        with self._transaction() as db:
            db.execute("UPDATE vouchers SET delivered = 1, note = ? WHERE id = ?", (note[:MAX_REASON], voucher_id))

    # --- reading -----------------------------------------------------------------------------------------------

    def attempts(self, *states: str) -> list[Attempt]:
        """All attempts in these states, oldest first, at most 10,000."""
        marks = ",".join("?" * len(states))
        with self._mutex:
            rows = self._db.execute(
                "SELECT a.*, r.deadline FROM attempts a JOIN requests r USING (request_hash) "
                f"WHERE a.state IN ({marks}) ORDER BY r.created_at, r.rowid LIMIT 10000",
                states,
            ).fetchall()
        return [_attempt(row) for row in rows]

    def of_request(self, request_hash: bytes) -> list[Attempt]:
        """Every attempt of one request."""
        with self._mutex:
            rows = self._db.execute(
                "SELECT a.*, r.deadline FROM attempts a JOIN requests r USING (request_hash) WHERE request_hash = ?",
                (request_hash.hex(),),
            ).fetchall()
        return [_attempt(row) for row in rows]

    def attempt(self, request_hash: bytes, node: Address) -> Attempt | None:
        """One attempt, or None."""
        return next((attempt for attempt in self.of_request(request_hash) if attempt.node == node), None)

    def body(self, request_hash: bytes) -> SignedRequest | None:
        """The request as it was sent, its prompt ids empty once it is settled; None if it is unknown."""
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

    def account(self, node: Address) -> Account:
        """The standing with one node; zeros if there is none."""
        with self._mutex:
            return self._account(node)

    def accounts(self) -> list[Account]:
        """The standing with every node that was ever asked."""
        with self._mutex:
            nodes = [row["node"] for row in self._db.execute("SELECT node FROM accounts ORDER BY node")]
            return [self._account(node) for node in nodes]

    def last_used(self, node: Address) -> int:
        """When a request last went to a node, Unix seconds; 0 if never."""
        with self._mutex:
            row = self._db.execute(
                "SELECT MAX(created_at) FROM requests JOIN attempts USING (request_hash) WHERE node = ?", (node,)
            ).fetchone()
        return int(row[0] or 0)

    def unblock(self, node: Address) -> None:
        """Deal with a node again after its wrong answer was looked into.

        Running totals that it stated in the meantime count as explained: this is how a new ledger takes over from one
        that was lost, whose receipts it cannot know.
        """
        with self._transaction() as db:
            rows = db.execute("SELECT receipt FROM attempts WHERE node = ? AND state = 'bad'", (node,)).fetchall()
            stated = [Receipt.from_json(json.loads(row["receipt"])).payer_cum for row in rows if row["receipt"]]
            explained = max([self._explained(node), *stated])
            db.execute("UPDATE accounts SET blocked = '', explained = ? WHERE node = ?", (str(explained), node))

    # --- inside a transaction ----------------------------------------------------------------------------------

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

    def _row(self, request_hash: str, node: Address) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(
            "SELECT * FROM attempts WHERE request_hash = ? AND node = ?", (request_hash, node)
        ).fetchone()
        return row

    def _known_row(self, request_hash: str, node: Address) -> sqlite3.Row:
        row = self._row(request_hash, node)
        assert row is not None
        return row

    def _account(self, node: Address) -> Account:
        row = self._db.execute("SELECT * FROM accounts WHERE node = ?", (node,)).fetchone()
        if row is None:
            return Account(node, 0, 0, 0, "")
        waiting, opened = 0, 0
        for attempt in self._db.execute("SELECT * FROM attempts WHERE node = ? AND settled = 0", (node,)):
            if attempt["state"] == "checked":
                waiting += Receipt.from_json(json.loads(attempt["receipt"])).fee
            elif attempt["state"] in ("open", "abandoned"):
                opened += int(attempt["max_fee"])
        return Account(node, int(row["accepted"]) + waiting, int(row["signed"]), opened, row["blocked"])

    def _unsettled_receipts(self, node: Address) -> list[tuple[Receipt, sqlite3.Row]]:
        rows = self._db.execute(
            "SELECT * FROM attempts WHERE node = ? AND settled = 0 AND state IN ('checked', 'unpaid')", (node,)
        )
        receipts = [(Receipt.from_json(json.loads(row["receipt"])), row) for row in rows]
        return sorted(receipts, key=lambda item: (item[0].payer_cum, item[0].seq))

    def _check_interval(self, receipt: Receipt) -> None:
        low, high = receipt.payer_cum - receipt.fee, receipt.payer_cum
        row = self._db.execute("SELECT covered FROM accounts WHERE node = ?", (receipt.node,)).fetchone()
        taken = [(0, int(row["covered"]))]
        taken += [(other.payer_cum - other.fee, other.payer_cum) for other, _ in self._unsettled_receipts(receipt.node)]
        for start, end in taken:
            if low < end and start < high:
                raise BadAnswer(
                    "payer total",
                    f"node {receipt.node} charges the interval ({low}, {high}] of payer_cum for request "
                    f"0x{receipt.request_hash.hex()}, of which ({start}, {end}] is charged already.",
                )
        explained = self._explained(receipt.node) + receipt.fee
        for attempt in self._db.execute("SELECT * FROM attempts WHERE node = ? AND settled = 0", (receipt.node,)):
            if attempt["state"] in ("checked", "unpaid"):
                explained += Receipt.from_json(json.loads(attempt["receipt"])).fee
            elif attempt["request_hash"] != receipt.request_hash.hex():
                explained += int(attempt["max_fee"])
        if high > explained:
            raise BadAnswer(
                "payer total",
                f"node {receipt.node} states a total of {high} wei for request 0x{receipt.request_hash.hex()}, but all "
                f"that this ledger ever asked of it explains {explained}.",
                hint="If another ledger paid with this key, or one was lost, look into it and unblock the node.",
            )

    def _explained(self, node: Address) -> int:
        return int(self._db.execute("SELECT explained FROM accounts WHERE node = ?", (node,)).fetchone()["explained"])

    def _explain(self, node: Address, amount: int) -> None:
        self._db.execute(
            "UPDATE accounts SET explained = ? WHERE node = ?", (str(self._explained(node) + amount), node)
        )

    def _explain_old_accounts(self) -> None:
        """A ledger from before `explained` was kept: what it took without asking stays taken."""
        names = [row["name"] for row in self._db.execute("PRAGMA table_info(accounts)")]
        if "explained" in names:
            return
        with self._transaction() as db:
            db.execute("ALTER TABLE accounts ADD COLUMN explained TEXT NOT NULL DEFAULT '0'")
            for account in db.execute("SELECT node, covered FROM accounts").fetchall():
                lost = db.execute(
                    "SELECT max_fee FROM attempts WHERE node = ? AND state IN ('void', 'bad')", (account["node"],)
                ).fetchall()
                self._explain(account["node"], int(account["covered"]) + sum(int(row["max_fee"]) for row in lost))

    def _due(self, node: Address) -> list[SignedVoucher]:
        """Sign for receipts in the order of payer_cum, up to the first gap that a live request may still fill."""
        row = self._db.execute("SELECT * FROM accounts WHERE node = ?", (node,)).fetchone()
        accepted, covered = int(row["accepted"]), int(row["covered"])
        live = self._db.execute(
            "SELECT 1 FROM attempts WHERE node = ? AND settled = 0 AND state IN ('open', 'abandoned')", (node,)
        ).fetchone()
        vouchers = []
        for receipt, attempt in self._unsettled_receipts(node):
            if receipt.payer_cum - receipt.fee > covered and live:
                break
            covered = max(covered, receipt.payer_cum)
            self._explain(node, receipt.fee)
            if attempt["state"] == "checked" and receipt.fee:
                accepted += receipt.fee
                vouchers.append(self._voucher(node, attempt["url"], accepted, receipt.struct_hash()))
            self._db.execute(
                "UPDATE attempts SET settled = 1 WHERE request_hash = ? AND node = ?",
                (attempt["request_hash"], node),
            )
        self._db.execute(
            "UPDATE accounts SET accepted = ?, covered = ? WHERE node = ?", (str(accepted), str(covered), node)
        )
        return vouchers

    def _voucher(self, node: Address, url: str, cumulative: int, receipt_hash: bytes) -> SignedVoucher:
        voucher = Voucher(self.payer, node, cumulative, receipt_hash)
        signature = self._sign_voucher(voucher)
        row = self._db.execute("SELECT signed FROM accounts WHERE node = ?", (node,)).fetchone()
        self._db.execute(
            "UPDATE accounts SET signed = ? WHERE node = ?", (str(max(int(row["signed"]), cumulative)), node)
        )
        cursor = self._db.execute(
            "INSERT INTO vouchers (node, url, voucher, signature) VALUES (?, ?, ?, ?)",
            (node, url, json.dumps(voucher.to_json()), signature.hex()),
        )
        return SignedVoucher(int(cursor.lastrowid or 0), node, url, voucher, signature)

    def _close(self, request_hash: bytes, node: Address, state: str, reason: str) -> list[SignedVoucher]:
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE attempts SET state = ?, settled = 1, reason = ? WHERE request_hash = ? AND node = ? "
                "AND state IN ('open', 'abandoned')",
                (state, reason[:MAX_REASON], request_hash.hex(), node),
            ).rowcount
            if changed and state == "void":
                # Its receipt may have been made and lost on the way: an honest node's later totals contain it.
                self._explain(node, int(self._known_row(request_hash.hex(), node)["max_fee"]))
            self._forget_prompt(request_hash.hex())
            return self._due(node)

    def _forget_prompt(self, request_hash: str) -> None:
        # A prompt is kept only while recovery may need it: a settled request keeps hashes and amounts alone.
        live = self._db.execute(
            "SELECT 1 FROM attempts WHERE request_hash = ? AND state IN ('open', 'abandoned')", (request_hash,)
        ).fetchone()
        if live is None:
            row = self._db.execute("SELECT body FROM requests WHERE request_hash = ?", (request_hash,)).fetchone()
            body = {**json.loads(row["body"]), "prompt_ids": []}
            self._db.execute("UPDATE requests SET body = ? WHERE request_hash = ?", (json.dumps(body), request_hash))


def _signed_voucher(row: sqlite3.Row) -> SignedVoucher:
    voucher = Voucher.from_json(json.loads(row["voucher"]))
    return SignedVoucher(row["id"], Address(row["node"]), row["url"], voucher, bytes.fromhex(row["signature"]))


def _attempt(row: sqlite3.Row) -> Attempt:
    receipt = Receipt.from_json(json.loads(row["receipt"])) if row["receipt"] else None
    return Attempt(
        request_hash=bytes.fromhex(row["request_hash"]),
        node=Address(row["node"]),
        url=row["url"],
        state=row["state"],
        max_fee=int(row["max_fee"]),
        deadline=row["deadline"],
        reason=row["reason"],
        receipt=receipt,
        signature=bytes.fromhex(row["signature"] or ""),
    )
