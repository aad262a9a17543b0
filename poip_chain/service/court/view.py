"""What the chain says of the court: accusations, contests, and everything that was shown in them.

Reads events and views and keeps nothing but what never changes. Whatever a player needs to go on after a kill is here:
who accuses whom of what, where each contest stands, and all reveals. Knows no model, no trace, and sends nothing.

    view.accusations(from_block=n)     who accused, since a block
    view.accused(id)                   the terms and points of a revealed accusation
    view.record(id)                    its contests with their reveals and picks, oldest first
    view.info(id), view.contest(id)    how they stand now
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from eth_utils.abi import event_abi_to_log_topic
from web3.types import LogReceipt

from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.clients.court import (
    POINT_LEVEL,
    AccusationInfo,
    AccusationStatus,
    ContestInfo,
    ContestOutcome,
    Terms,
)
from poip_chain.economic.network import Network
from poip_chain.errors import IntegrityError, NotFound
from poip_chain.spec.accusation import Point
from poip_chain.spec.dispute import Node
from poip_chain.spec.objects import Batch
from poip_chain.spec.trace import LEAF_BYTES
from poip_chain.spec.types import Address, Hash32

MAX_RANGE = 2000
"""Blocks asked for in one eth_getLogs."""


def accusation_id(batch_id: int, number: int) -> int:
    """The id of a batch's accusation by its number in the order of commitment."""
    return batch_id << 32 | number


def batch_of(accusation: int) -> int:
    """The id of the batch that an accusation is about."""
    return accusation >> 32


def accusation_of(contest: int) -> int:
    """The id of the accusation that a contest is about."""
    return contest >> 32


@dataclass(frozen=True, slots=True)
class Where:
    """Where an event stands on chain."""

    block: int
    log_index: int
    transaction: str


@dataclass(frozen=True, slots=True)
class Accusation:
    """A committed accusation. bond in wei."""

    id: int
    batch_id: int
    accuser: Address
    commitment: Hash32
    bond: int
    where: Where


@dataclass(frozen=True, slots=True)
class Accused:
    """A revealed accusation: of the answer at `index` of the batch. Contests number margins before fingerprints."""

    id: int
    batch_id: int
    accuser: Address
    index: int
    terms: Terms
    margins: tuple[Point, ...]
    fingerprints: tuple[Point, ...]
    where: Where

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, as contests number them."""
        return self.margins + self.fingerprints


@dataclass(frozen=True, slots=True)
class Ended:
    """How a contest ended: `by` 1 a step, 2 time, 3 a proven point, 4 the accusation was over."""

    outcome: ContestOutcome
    by: int
    where: Where


@dataclass(frozen=True, slots=True)
class Contest:
    """A contest as it was opened; `point` is None for one over the trace. `ended` is None while it is open."""

    id: int
    accusation: int
    contester: Address
    free: bool
    point: int | None
    where: Where
    ended: Ended | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A reveal: what stands below `node` of the trace (cell 0) or of a cell's tree: hashes, or leaves of 128 bytes."""

    contest: int
    cell: int
    node: Node
    parts: tuple[bytes, ...]
    where: Where


@dataclass(frozen=True, slots=True)
class Picked:
    """A contester's choice: the contest stands at `node` of a tree from then on."""

    contest: int
    cell: int
    node: Node
    where: Where


@dataclass(frozen=True, slots=True)
class Record:
    """All that happened in the contests over one accusation, each oldest first. `points`: numbers of those proven."""

    contests: tuple[Contest, ...]
    reveals: tuple[Shown, ...]
    picks: tuple[Picked, ...]
    points: frozenset[int]


class CourtView:
    """The court of `network`. Methods raise Unavailable without a chain; IntegrityError for events that fit no ABI."""

    def __init__(self, network: Network, max_range: int = MAX_RANGE) -> None:
        self.network = network
        self._range = max_range
        self._batches: dict[int, Batch] = {}

    # Now

    def time(self) -> int:
        """Chain time, Unix seconds."""
        return self.network.chain.timestamp()

    def head(self) -> int:
        """The newest block."""
        return self.network.chain.block_number()

    def info(self, accusation: int) -> AccusationInfo:
        """How an accusation stands; its status is NONE for an unknown one."""
        return self.network.accusations.info(accusation)

    def contest(self, contest: int) -> ContestInfo:
        """Where a contest stands; `is_open` is false for an unknown or ended one."""
        return self.network.contests.info(contest)

    def credit(self, account: Address) -> int:
        """What an account may claim, wei."""
        return self.network.accusations.claimable(account)

    def batch(self, batch_id: int) -> Batch:
        """A batch by its id, as the log holds it now. Raises NotFound."""
        known = self._batches.get(batch_id)
        if known is None or not self.network.log.matches(known):
            found = self.network.log.find(batch_id, self.network.deployment.block)
            if found is None:
                raise NotFound(f"there is no batch {batch_id}.", hint="`poip batch list` shows all.")
            known = self._batches[batch_id] = found[0]
        return known

    # Events

    def accusations(
        self, *, batch_id: int | None = None, from_block: int | None = None, to_block: int | None = None
    ) -> list[Accusation]:
        """Accusations committed, of one batch or in a range of blocks, oldest first."""
        start = self.batch(batch_id).block_number if batch_id is not None and from_block is None else from_block
        topics = [None, None if batch_id is None else _word(batch_id)]
        return [
            Accusation(
                id=int(args["id"]),
                batch_id=int(args["batch_id"]),
                accuser=Address(str(args["accuser"])),
                commitment=Hash32(bytes(args["commitment"])),
                bond=int(args["bond"]),
                where=where,
            )
            for _, args, where in self._events(self.network.accusations, ["Committed"], topics, start, to_block)
        ]

    def revealed(self, *, from_block: int, to_block: int | None = None) -> list[Accused]:
        """Accusations revealed in a range of blocks, oldest first."""
        found = self._events(self.network.accusations, ["Accused"], [], from_block, to_block)
        return [_accused(args, where) for _, args, where in found]

    def accused(self, accusation: int) -> Accused | None:
        """The terms and points of a revealed accusation, as the court keeps their hash; None if it is not revealed."""
        info = self.info(accusation)
        if info.status in (AccusationStatus.NONE, AccusationStatus.COMMITTED, AccusationStatus.EXPIRED):
            return None
        found = self._events(self.network.accusations, ["Accused"], [_word(accusation)], self._start(accusation), None)
        for _, args, where in reversed(found):
            known = _accused(args, where)
            if self.is_current(known, info):
                return known
        return None

    def is_current(self, accused: Accused, info: AccusationInfo) -> bool:
        """Whether these are the terms whose hash the court keeps: a reorganisation may have brought others."""
        return self.network.contests.terms_hash(accused.terms) == info.digest

    def record(self, accusation: int) -> Record:
        """All that happened in the contests over an accusation."""
        names = ["ContestOpened", "ContestEnded", "Revealed", "LeavesRevealed", "Picked", "PointShown"]
        topics = [None, _word(accusation)]
        contests: dict[int, dict[str, Any]] = {}
        reveals, picks, points = [], [], set()
        for name, args, where in self._events(self.network.contests, names, topics, self._start(accusation), None):
            contest = int(args["contest"])
            if name == "ContestOpened":
                at_point = int(args["level"]) == POINT_LEVEL
                contests[contest] = {
                    "id": contest,
                    "accusation": accusation,
                    "contester": Address(str(args["contester"])),
                    "free": bool(args["free"]),
                    "point": int(args["index"]) if at_point else None,
                    "where": where,
                    "ended": None,
                }
            elif name == "ContestEnded" and contest in contests:
                contests[contest]["ended"] = Ended(ContestOutcome(args["outcome"]), int(args["by"]), where)
            elif name == "PointShown":
                points.add(int(args["number"]))
            elif name == "Picked":
                picks.append(Picked(contest, int(args["cell"]), _node(args), where))
            elif name == "Revealed":
                parts = tuple(bytes(node) for node in args["nodes"])
                reveals.append(Shown(contest, int(args["cell"]), _node(args), parts, where))
            elif name == "LeavesRevealed":
                leaves = bytes(args["leaves"])
                parts = tuple(leaves[i : i + LEAF_BYTES] for i in range(0, len(leaves), LEAF_BYTES))
                reveals.append(Shown(contest, int(args["cell"]), _node(args), parts, where))
        return Record(tuple(Contest(**c) for c in contests.values()), tuple(reveals), tuple(picks), frozenset(points))

    def contests(self, accusation: int) -> tuple[Contest, ...]:
        """The contests over an accusation."""
        return self.record(accusation).contests

    def reveals(self, accusation: int) -> tuple[Shown, ...]:
        """The reveals in the contests over an accusation; those above another come before it."""
        return self.record(accusation).reveals

    def endings(self, accusation: int) -> tuple[AccusationStatus, bool, Where] | None:
        """How an accusation ended, whether it convicted, and where; None while it is open."""
        found = self._events(self.network.accusations, ["Ended"], [_word(accusation)], self._start(accusation), None)
        if not found:
            return None
        _, args, where = found[-1]
        return AccusationStatus(int(args["status"])), bool(args["convicted"]), where

    def _start(self, accusation: int) -> int:
        """A block before which nothing happened to an accusation."""
        return self.batch(batch_of(accusation)).block_number

    def _events(
        self,
        client: ContractClient,
        names: Sequence[str],
        topics: Sequence[str | None],
        from_block: int | None,
        to_block: int | None,
    ) -> list[tuple[str, Any, Where]]:
        """(name, arguments, place) of a contract's events, oldest first. `topics` filters by indexed arguments, in order."""
        decoders = {}
        for name in names:
            decoder = client.contract.events[name]()
            decoders["0x" + event_abi_to_log_topic(decoder.abi).hex()] = (name, decoder)
        first = self.network.deployment.block if from_block is None else from_block
        last = self.head() if to_block is None else to_block
        found = []
        for log in self._logs(str(client.contract.address), [sorted(decoders), *topics], first, last):
            topic = "0x" + bytes(log["topics"][0]).hex() if log["topics"] else ""
            if topic not in decoders or str(log["address"]).lower() != str(client.contract.address).lower():
                raise IntegrityError(f"{self.network.chain.url} answered with logs that were not asked for.")
            name, decoder = decoders[topic]
            try:
                args = decoder.process_log(log)["args"]
            except Exception as error:
                # web3 raises many kinds for a log that does not fit its ABI; all mean the same here.
                raise IntegrityError(f"an event {name} of {log['address']} does not fit its ABI: {error}.") from error
            where = Where(int(log["blockNumber"]), int(log["logIndex"]), "0x" + bytes(log["transactionHash"]).hex())
            found.append((name, args, where))
        return sorted(found, key=lambda event: (event[2].block, event[2].log_index))

    def _logs(self, address: str, topics: list[Any], first: int, last: int) -> Iterator[LogReceipt]:
        while first <= last:
            end = min(last, first + self._range - 1)
            asked = {"address": address, "fromBlock": first, "toBlock": end, "topics": topics}
            yield from self.network.chain.logs(cast(Any, asked))
            first = end + 1


def _accused(args: Any, where: Where) -> Accused:
    margins, fingerprints = (
        tuple(Point(**{name: int(value) for name, value in point.items()}) for point in args[part])
        for part in ("margins", "fingerprints")
    )
    return Accused(
        id=int(args["id"]),
        batch_id=int(args["batch_id"]),
        accuser=Address(str(args["accuser"])),
        index=int(args["index"]),
        terms=Terms.from_event(args["terms"]),
        margins=margins,
        fingerprints=fingerprints,
        where=where,
    )


def _node(args: Any) -> Node:
    return Node(int(args["level"]), int(args["index"]))


def _word(number: int) -> str:
    """A number as a topic."""
    return "0x" + number.to_bytes(32, "big").hex()
