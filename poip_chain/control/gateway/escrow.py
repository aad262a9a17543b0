"""Keeps the gateway's escrow where it is needed: deposits for usable nodes within a bound, takes stale escrow back.

One move is under way at a time. It is written down with its idempotency key before it is sent, so a kill at any point
neither loses nor repeats it. What is spoken for by open requests and vouchers is never thawed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from poip_chain.chain.keys import Key
from poip_chain.chain.outbox import Outbox, State
from poip_chain.control.faults import crash_point
from poip_chain.control.ledger import Ledger
from poip_chain.control.view import Holding, NetworkView
from poip_chain.errors import TransactionFailed
from poip_chain.spec.types import Address

SCHEMA = """
CREATE TABLE IF NOT EXISTS escrow_moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, kind TEXT NOT NULL, amount TEXT NOT NULL,
    state TEXT NOT NULL, made_at INTEGER NOT NULL, reason TEXT NOT NULL DEFAULT '');
"""
RETRY_SECONDS = 60
"""How long a node's escrow is left alone after a move for it failed."""
PERMIT_SECONDS = 24 * 3600


class Kind(StrEnum):
    """What a move does."""

    DEPOSIT = "deposit"
    THAW = "thaw"
    CANCEL_THAW = "cancel_thaw"
    WITHDRAW = "withdraw"


class Sent(StrEnum):
    """How a move stands on the chain."""

    UNKNOWN = "unknown"
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Move:
    """One change of escrow; amount in wei. `key` is its idempotency key."""

    id: int
    node: Address
    kind: Kind
    amount: int

    @property
    def key(self) -> str:
        """Idempotency key at the outbox."""
        return f"gateway escrow move {self.id}"


@dataclass(frozen=True, slots=True)
class EscrowPolicy:
    """Wei and seconds. target 0: deposit nothing; total None: no bound."""

    target: int
    low_water: int
    total: int | None
    thaw_after: float


class Treasury(Protocol):
    """The gateway's key on the chain. All calls block."""

    def balance(self) -> int:
        """Tokens in the wallet."""

    def holding(self, node: Address) -> Holding:
        """Escrow with one node."""

    def now(self) -> int:
        """Chain time."""

    def send(self, move: Move) -> None:
        """Send a move once under its key. Raises TransactionFailed if it would revert (then nothing is sent)."""

    def sent(self, move: Move) -> Sent:
        """How the move stands."""

    def step(self) -> None:
        """Push what is under way."""


class EscrowManager:
    """See the module's docstring. `step` is synchronous and idempotent; one thread calls it."""

    def __init__(
        self, path: Path, treasury: Treasury, ledger: Ledger, policy: EscrowPolicy, changed: Callable[[Address], None]
    ) -> None:
        self._treasury, self._ledger, self._policy, self._changed = treasury, ledger, policy, changed
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.row_factory = sqlite3.Row
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @property
    def under_way(self) -> bool:
        """Whether a move is not over yet."""
        return self._db.execute("SELECT 1 FROM escrow_moves WHERE state = 'open'").fetchone() is not None

    def step(self, usable: Collection[Address], known: Iterable[Address]) -> list[str]:
        """One round. `usable`: nodes that may get requests; `known`: all nodes that escrow may lie with.

        Returns what happened, to log. Raises Unavailable without a chain.
        """
        self._treasury.step()
        said: list[str] = []
        # What is under way comes first; as soon as it is done the next move may begin, so a fresh gateway is quick.
        row = self._db.execute("SELECT * FROM escrow_moves WHERE state = 'open'").fetchone()
        if row is not None and not self._advance(_move(row), said):
            return said
        nodes = list(dict.fromkeys([*usable, *known, *(account.node for account in self._ledger.accounts())]))
        holdings = {node: self._treasury.holding(node) for node in nodes}
        planned = self._plan(set(usable), holdings)
        if planned is not None:
            node, kind, amount = planned
            cursor = self._db.execute(
                "INSERT INTO escrow_moves (node, kind, amount, state, made_at) VALUES (?, ?, ?, 'open', ?)",
                (node, kind, str(amount), self._treasury.now()),
            )
            crash_point("gateway_move_planned")
            self._advance(Move(int(cursor.lastrowid or 0), node, kind, amount), said)
        return said

    def _advance(self, move: Move, said: list[str]) -> bool:
        """Whether the move is over."""
        sent = self._treasury.sent(move)
        if sent is Sent.UNKNOWN:
            try:
                self._treasury.send(move)
                crash_point("gateway_move_sent")
            except TransactionFailed as error:
                self._end(move, "failed", str(error))
                said.append(f"{move.kind} of {move.amount} wei with {move.node} is not possible: {error}")
                return True
            said.append(f"{move.kind} of {move.amount} wei with {move.node} is sent")
            return False
        if sent is Sent.OPEN:
            return False
        self._end(move, "done" if sent is Sent.DONE else "failed", "")
        self._changed(move.node)
        said.append(f"{move.kind} of {move.amount} wei with {move.node} is {sent}")
        return True

    def _end(self, move: Move, state: str, reason: str) -> None:
        self._db.execute("UPDATE escrow_moves SET state = ?, reason = ? WHERE id = ?", (state, reason[:300], move.id))

    def _plan(self, usable: set[Address], holdings: dict[Address, Holding]) -> tuple[Address, Kind, int] | None:
        now, policy = self._treasury.now(), self._policy
        held = sum(holding.balance for holding in holdings.values())
        wallet: int | None = None
        for node, holding in holdings.items():
            if self._failed_lately(node, now):
                continue
            account = self._ledger.account(node)
            free = holding.balance - holding.thawing - account.committed(holding.settled)
            wanted = node in usable and not account.blocked and policy.target > 0
            if wanted and free < policy.low_water:
                if holding.thawing:
                    return node, Kind.CANCEL_THAW, 0
                wallet = self._treasury.balance() if wallet is None else wallet
                room = wallet if policy.total is None else min(wallet, policy.total - held)
                amount = min(policy.target - free, room)
                if amount > 0:
                    return node, Kind.DEPOSIT, amount
            elif holding.thawing and holding.thaw_end <= now:
                return node, Kind.WITHDRAW, holding.thawing
            elif not holding.thawing and free > 0 and not wanted and self._stale(node, account.blocked, now):
                return node, Kind.THAW, free
        return None

    def _stale(self, node: Address, blocked: str, now: int) -> bool:
        """Blocked by this key, or unused for so long that its escrow serves nobody."""
        last = max(self._ledger.last_used(node), self._last_deposit(node))
        return bool(blocked) or (last > 0 and now - last > self._policy.thaw_after)

    def _last_deposit(self, node: Address) -> int:
        row = self._db.execute(
            "SELECT MAX(made_at) FROM escrow_moves WHERE node = ? AND kind = 'deposit'", (node,)
        ).fetchone()
        return int(row[0] or 0)

    def _failed_lately(self, node: Address, now: int) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM escrow_moves WHERE node = ? AND state = 'failed' AND made_at > ?",
            (node, now - RETRY_SECONDS),
        ).fetchone()
        return row is not None


class OutboxTreasury:
    """`Treasury` over a network and the outbox of the gateway's key."""

    def __init__(self, view: NetworkView, outbox: Outbox, key: Key) -> None:
        self._view, self._outbox, self._key = view, outbox, key

    def balance(self) -> int:
        """See Treasury."""
        return self._view.token_balance(self._key.address)

    def holding(self, node: Address) -> Holding:
        """See Treasury."""
        return self._view.holding(self._key.address, node)

    def now(self) -> int:
        """See Treasury."""
        return self._view.timestamp()

    def send(self, move: Move) -> None:
        """See Treasury. A deposit carries its own permit, so it is one transaction."""
        vault, token = self._view.network.vault, self._view.network.token
        if move.kind is Kind.DEPOSIT:
            deadline = self.now() + PERMIT_SECONDS
            permit = token.permit(self._key, self._view.vault_domain.verifying_contract, move.amount, deadline)
            call = vault.deposit_with_permit(move.node, move.amount, deadline, *permit)
        elif move.kind is Kind.THAW:
            call = vault.thaw(move.node, move.amount)
        elif move.kind is Kind.CANCEL_THAW:
            call = vault.cancel_thaw(move.node)
        else:
            call = vault.withdraw(move.node)
        self._outbox.send(call, move.key)

    def sent(self, move: Move) -> Sent:
        """See Treasury."""
        if not self._outbox.known(move.key):
            return Sent.UNKNOWN
        state = self._outbox.status(move.key).state
        if state in (State.OPEN, State.LOST):
            return Sent.OPEN
        return Sent.DONE if state is State.MINED else Sent.FAILED

    def step(self) -> None:
        """See Treasury."""
        self._outbox.step()


def _move(row: sqlite3.Row) -> Move:
    return Move(row["id"], Address(row["node"]), Kind(row["kind"]), int(row["amount"]))
