"""Follow contracts' events in order, over restarts and reorganisations.

`poll()` tells what has changed since the last committed change: first the events that a reorganisation has removed,
newest first, then new ones, oldest first. The caller stores what it derives from a change and then commits it; after a
kill in between it sees the change again, so what it stores must be idempotent. Knows nothing of what events mean.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eth_utils.abi import event_abi_to_log_topic
from hexbytes import HexBytes
from web3.contract import Contract
from web3.datastructures import AttributeDict
from web3.types import LogReceipt

from poip_chain.chain.private_files import prepare_private
from poip_chain.chain.rpc import Block, Chain
from poip_chain.errors import ConfigurationError, IntegrityError, NotFound
from poip_chain.spec.types import Address, Hash32

SCHEMA = """
CREATE TABLE IF NOT EXISTS followers(
    name TEXT PRIMARY KEY, chain_id INTEGER NOT NULL, genesis TEXT NOT NULL, start_block INTEGER NOT NULL,
    pruned_to INTEGER NOT NULL DEFAULT -1);
CREATE TABLE IF NOT EXISTS checkpoints(
    name TEXT NOT NULL, number INTEGER NOT NULL, hash TEXT NOT NULL, PRIMARY KEY(name, number));
CREATE TABLE IF NOT EXISTS committed(
    name TEXT NOT NULL, number INTEGER NOT NULL, hash TEXT NOT NULL, log_index INTEGER NOT NULL, log TEXT NOT NULL,
    PRIMARY KEY(name, number, log_index));
"""
HORIZON_BLOCKS = 1024
"""Committed events are remembered for this many blocks, so a reorganisation up to that depth can be undone."""
MAX_RANGE = 1000
"""Blocks asked for in one eth_getLogs."""
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Event:
    """One decoded event. `args` holds the ABI's names; a struct is a dict with the names of its fields, in order."""

    name: str
    address: Address
    args: dict[str, Any]
    block_number: int
    block_hash: Hash32
    transaction_hash: str
    log_index: int


@dataclass(frozen=True, slots=True)
class Added:
    """The event is on the chain."""

    event: Event


@dataclass(frozen=True, slots=True)
class Removed:
    """The event was committed before, and a reorganisation has taken it away."""

    event: Event


Change = Added | Removed


class Follower:
    """Follows the events `sources` from block `start_block` on, staying `confirmations` blocks behind the newest.

    `path` is a SQLite file, which several followers may share under different names. One follower is used by one
    thread at a time. Raises IntegrityError if the file was made for another chain.
    """

    def __init__(
        self,
        chain: Chain,
        path: Path,
        name: str,
        sources: Sequence[tuple[Contract, str]],
        start_block: int,
        confirmations: int = 0,
        *,
        horizon: int = HORIZON_BLOCKS,
        max_range: int = MAX_RANGE,
    ) -> None:
        if not sources:
            raise ConfigurationError("a follower needs at least one event to follow.")
        self._chain = chain
        self._name = name
        self._start = start_block
        self._confirmations = confirmations
        self._horizon = horizon
        self._max_range = max_range
        self._decoders: dict[tuple[str, bytes], Any] = {}
        for contract, event in sources:
            decoder = contract.events[event]()
            self._decoders[str(contract.address).lower(), event_abi_to_log_topic(decoder.abi)] = decoder
        self._lock = threading.RLock()
        self._outstanding: list[Change] = []
        self._scanned: tuple[int, str] | None = None
        self._packed: dict[tuple[int, int], str] = {}
        prepare_private(path)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30.0)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.executescript(SCHEMA)
        try:
            self._bind()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database. Nothing is lost by it."""
        self._db.close()

    @property
    def position(self) -> int:
        """The newest block up to which everything is committed (start_block - 1 at first)."""
        with self._lock:
            row = self._db.execute("SELECT MAX(number) FROM checkpoints WHERE name=?", (self._name,)).fetchone()
            return self._start - 1 if row[0] is None else int(row[0])

    def poll(self) -> list[Change]:
        """The changes since the last committed one, in order; empty if there are none.

        Uncommitted changes come again. Covers at most `max_range` blocks that hold events, so poll until it is empty to
        catch up. Raises Unavailable if the chain is away, IntegrityError if it was reorganised deeper than the horizon.
        """
        with self._lock:
            self._outstanding = []
            self._scanned = None
            for _ in range(_ATTEMPTS):
                changes = self._round()
                if changes is not None:
                    self._outstanding = changes
                    return list(changes)
            # The chain changes faster than it can be read; the next poll tries again.
            return []

    def commit(self, change: Change) -> None:
        """The caller has stored what follows from `change`, the first uncommitted one of the last poll."""
        with self._lock:
            if not self._outstanding or self._outstanding[0] != change:
                raise ValueError("changes are committed in the order in which poll() gave them, each once.")
            event = change.event
            key = (self._name, event.block_number, event.log_index)
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if isinstance(change, Removed):
                    self._db.execute(
                        "DELETE FROM committed WHERE name=? AND number=? AND log_index=? AND hash=?",
                        (*key, event.block_hash.hex()),
                    )
                else:
                    self._db.execute(
                        "INSERT INTO committed VALUES(?,?,?,?,?)",
                        (
                            self._name,
                            event.block_number,
                            event.block_hash.hex(),
                            event.log_index,
                            self._packed[key[1:]],
                        ),
                    )
                if len(self._outstanding) == 1:
                    self._checkpoint()
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            self._outstanding.pop(0)

    def _round(self) -> list[Change] | None:
        """One attempt at a consistent reading; None if the chain changed meanwhile."""
        newest = self._chain.block("latest")
        head = newest.number - self._confirmations
        known = self._known_blocks()
        ancestor, ancestor_hash, unseen = self._ancestor(known, newest)
        if unseen:
            # The endpoint lags behind what it (or a sibling) told before, with no sign of another branch: wait for it.
            return []
        # Those of a branch that has gone. Its events stay until their removal is committed.
        self._db.execute("DELETE FROM checkpoints WHERE name=? AND number>?", (self._name, ancestor))
        removed = [Removed(self._event(row)) for row in self._committed_above(ancestor)]
        start, skip = self._resume_point(ancestor)
        changes: list[Change] = list(removed)
        self._packed = {}
        while start <= head:
            end = min(head, start + self._max_range - 1)
            tip = newest if end == newest.number else self._chain.block(end)
            logs = self._logs(start, end)
            if any(bytes(log["blockHash"]) != tip.hash for log in logs if log["blockNumber"] == end):
                return None
            # Both ends on the chain after the reading as before it: the logs between them are of one branch.
            if ancestor_hash and self._hash(ancestor) != ancestor_hash:
                return None
            if self._hash(end) != tip.hash.hex():
                return None
            self._scanned = (end, tip.hash.hex())
            for log in logs:
                position = (int(log["blockNumber"]), int(log["logIndex"]))
                if position > skip:
                    self._packed[position] = _pack(log)
                    changes.append(Added(self._decode(log)))
            if changes:
                break
            start = end + 1
        if not changes and self._scanned is not None:
            self._write_checkpoint()
        return changes

    def _known_blocks(self) -> list[tuple[int, str]]:
        """Blocks whose hash we rely on, newest first."""
        rows = self._db.execute(
            "SELECT number, hash FROM checkpoints WHERE name=?1 UNION SELECT number, hash FROM committed WHERE name=?1"
            " ORDER BY number DESC",
            (self._name,),
        ).fetchall()
        return [(int(row["number"]), str(row["hash"])) for row in rows]

    def _ancestor(self, known: list[tuple[int, str]], newest: Block) -> tuple[int, str, bool]:
        """The highest block we rely on that is still on the chain, its hash ('' for the block before the start), and
        whether blocks above it are merely unseen yet."""
        top, unseen = newest.number, False
        for number, block_hash in known:
            if (number, block_hash) == (newest.number, newest.hash.hex()):
                return number, block_hash, unseen
            found = "" if number > top else self._hash(number)
            if not found:
                unseen = True
            elif found == block_hash:
                return number, block_hash, unseen
            else:
                # Proof of another branch: everything above belongs to the old one.
                unseen = False
        row = self._db.execute("SELECT pruned_to FROM followers WHERE name=?", (self._name,)).fetchone()
        if known and int(row["pruned_to"]) >= 0 and not unseen:
            raise IntegrityError(
                f"the chain was reorganised deeper than the {self._horizon} blocks that {self._name} remembers.",
                hint="Delete the program's data that derives from the chain and let it follow from the start.",
            )
        return self._start - 1, "", unseen

    def _hash(self, number: int) -> str:
        """The hash of the chain's block `number` as hex, '' if there is none."""
        try:
            return self._chain.block(number).hash.hex()
        except NotFound:
            return ""

    def _committed_above(self, ancestor: int) -> list[sqlite3.Row]:
        return self._db.execute(
            "SELECT * FROM committed WHERE name=? AND number>? ORDER BY number DESC, log_index DESC",
            (self._name, ancestor),
        ).fetchall()

    def _resume_point(self, ancestor: int) -> tuple[int, tuple[int, int]]:
        """From which block to read on, and the last committed log of that block, which is not told again."""
        row = self._db.execute(
            "SELECT MAX(log_index) AS last FROM committed WHERE name=? AND number=?", (self._name, ancestor)
        ).fetchone()
        complete = self._db.execute(
            "SELECT 1 FROM checkpoints WHERE name=? AND number>=?", (self._name, ancestor)
        ).fetchone()
        if complete is not None or row["last"] is None:
            return ancestor + 1, (ancestor, 2**62)
        return ancestor, (ancestor, int(row["last"]))

    def _logs(self, start: int, end: int) -> list[LogReceipt]:
        found = self._chain.logs(
            {
                "fromBlock": start,
                "toBlock": end,
                "address": cast(Any, sorted({_checksummed(address) for address, _ in self._decoders})),
                "topics": [[HexBytes(topic) for topic in sorted({topic for _, topic in self._decoders})]],
            }
        )
        wanted = [log for log in found if log["topics"] and self._decoder(log) is not None]
        if any(not start <= log["blockNumber"] <= end for log in wanted):
            raise IntegrityError(f"{self._chain.url} answered with logs outside the blocks {start} to {end}.")
        return sorted(wanted, key=lambda log: (log["blockNumber"], log["logIndex"]))

    def _decoder(self, log: LogReceipt) -> Any:
        return self._decoders.get((str(log["address"]).lower(), bytes(log["topics"][0])))

    def _decode(self, log: LogReceipt) -> Event:
        try:
            data = self._decoder(log).process_log(log)
        except Exception as error:
            # web3 raises many kinds for a log that does not fit its ABI; all mean the same here.
            raise IntegrityError(f"an event of {log['address']} does not fit its ABI: {error}.") from error
        return Event(
            name=data["event"],
            address=Address(str(log["address"])),
            args=_plain(data["args"]),
            block_number=int(log["blockNumber"]),
            block_hash=Hash32(bytes(log["blockHash"])),
            transaction_hash="0x" + bytes(log["transactionHash"]).hex(),
            log_index=int(log["logIndex"]),
        )

    def _event(self, row: sqlite3.Row) -> Event:
        return self._decode(_unpack(row["log"]))

    def _write_checkpoint(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._checkpoint()
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _checkpoint(self) -> None:
        """Everything up to the scanned block is committed: remember it, and forget what lies below the horizon."""
        if self._scanned is None:
            return
        number, block_hash = self._scanned
        self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES(?,?,?)", (self._name, number, block_hash))
        limit = number - self._horizon
        if limit < 0:
            return
        for table in ("checkpoints", "committed"):
            self._db.execute(f"DELETE FROM {table} WHERE name=? AND number<?", (self._name, limit))
        self._db.execute(
            "UPDATE followers SET pruned_to=MAX(pruned_to,?) WHERE name=? AND start_block<?",
            (limit, self._name, limit),
        )

    def _bind(self) -> None:
        genesis = self._chain.block(0).hash.hex()
        self._db.execute("BEGIN IMMEDIATE")
        row = self._db.execute("SELECT * FROM followers WHERE name=?", (self._name,)).fetchone()
        if row is None:
            self._db.execute(
                "INSERT INTO followers(name,chain_id,genesis,start_block) VALUES(?,?,?,?)",
                (self._name, self._chain.chain_id, genesis, self._start),
            )
        self._db.execute("COMMIT")
        if row is not None and (row["chain_id"], row["genesis"]) != (self._chain.chain_id, genesis):
            raise IntegrityError(
                f"the position of {self._name} belongs to another chain.",
                hint="If the chain was made anew, delete the program's data.",
            )


def _plain(value: Any) -> Any:
    """web3's attribute dictionaries as plain ones."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


def _checksummed(address: str) -> str:
    from eth_utils.address import to_checksum_address

    return to_checksum_address(address)


def _pack(log: LogReceipt) -> str:
    return json.dumps(
        {
            "address": str(log["address"]),
            "topics": [bytes(topic).hex() for topic in log["topics"]],
            "data": bytes(log["data"]).hex(),
            "blockNumber": int(log["blockNumber"]),
            "blockHash": bytes(log["blockHash"]).hex(),
            "transactionHash": bytes(log["transactionHash"]).hex(),
            "transactionIndex": int(log["transactionIndex"]),
            "logIndex": int(log["logIndex"]),
        }
    )


def _unpack(text: str) -> LogReceipt:
    body = json.loads(text)
    for name in ("data", "blockHash", "transactionHash"):
        body[name] = HexBytes(body[name])
    body["topics"] = [HexBytes(topic) for topic in body["topics"]]
    return cast(LogReceipt, AttributeDict(body))
