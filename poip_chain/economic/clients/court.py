"""The court: accusations of false computation, and the contests over them (docs/court.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, Self

from eth_hash.auto import keccak

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.spec.objects import Batch, ModelConfig
from poip_chain.spec.types import Address, Hash32

POINT_LEVEL = 255
"""The level at which a contest over a point stands."""


class Values(Protocol):
    """An object that a contract takes as a struct."""

    def values(self) -> tuple[Any, ...]: ...


class AccusationStatus(IntEnum):
    """How an accusation stands. From EXPIRED on it is over."""

    NONE = 0
    COMMITTED = 1
    REVEALED = 2
    EXPIRED = 3
    LOST = 4
    STOOD = 5


class ContestOutcome(IntEnum):
    """How a contest ended, from the contester's side."""

    WON = 1
    LOST = 2
    VOID = 3


@dataclass(frozen=True, slots=True)
class AccusationInfo:
    """An accusation on chain. `committed_at` (Unix seconds) is 0 from the reveal on; contests are counted from then on.

    digest: of commitment and batch until the reveal, then the hash of the terms.
    """

    accuser: Address
    status: AccusationStatus
    committed_at: int
    contests: int
    open_contests: int
    lost_contests: int
    free_contest_used: bool
    digest: Hash32

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status >= AccusationStatus.EXPIRED


@dataclass(frozen=True, slots=True)
class TraceTerms:
    """A trace on trial: its lengths, its root, and the roots that its inputs are proven against."""

    prompt_tokens: int
    output_tokens: int
    trace_root: Hash32
    weights_root: Hash32
    prompt_root: Hash32
    output_root: Hash32


@dataclass(frozen=True, slots=True)
class Terms:
    """What a revealed accusation is about; every move brings it again. Bonds in wei, clock and contest_end in seconds."""

    node: Address
    trace: TraceTerms
    config: ModelConfig
    leaf_count: int
    points: int
    points_hash: Hash32
    accusation_bond: int
    contest_bond: int
    clock: int
    contest_end: int

    def values(self) -> tuple[Any, ...]:
        """As the contracts take it."""
        trace = self.trace
        return (
            self.node,
            (
                trace.prompt_tokens,
                trace.output_tokens,
                trace.trace_root,
                trace.weights_root,
                trace.prompt_root,
                trace.output_root,
            ),
            self.config.values(),
            self.leaf_count,
            self.points,
            self.points_hash,
            self.accusation_bond,
            self.contest_bond,
            self.clock,
            self.contest_end,
        )

    @classmethod
    def from_event(cls, terms: Mapping[str, Any]) -> Self:
        """From an event's arguments, structs as mappings by field."""
        return cls(**{**terms, "trace": TraceTerms(**terms["trace"]), "config": ModelConfig(**terms["config"])})


@dataclass(frozen=True, slots=True)
class ContestInfo:
    """An open contest; `contester` is zero once it has ended. Times and clocks in seconds.

    It stands at node `index` of `level` of the trace (cell 0) or of the tree of a cell (1 + 32 * leaf + element), or at
    a point (POINT_LEVEL). revealed_at 0: the accuser is to move.
    """

    contester: Address
    free: bool
    since: int
    accuser_left: int
    contester_left: int
    level: int
    index: int
    cell: int
    leaf_count: int
    node: Hash32
    revealed_at: int

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return int(self.contester, 16) != 0


class Accusations(ContractClient):
    """Accusations: committed, revealed, resolved; bonds and credits."""

    NAME = "Accusations"

    def info(self, accusation: int) -> AccusationInfo:
        """An accusation; its status is NONE for an unknown one."""
        values = list(self.read("accusation_info", accusation))
        values[0], values[1], values[7] = Address(str(values[0])), AccusationStatus(values[1]), Hash32(bytes(values[7]))
        return AccusationInfo(*values)

    def count(self, batch_id: int) -> int:
        """How many accusations of a batch were committed; their ids are batch_id * 2**32 + 0 .. this - 1."""
        return int(self.read("accusation_count", batch_id))

    def claimable(self, account: Address) -> int:
        """What an account may claim, wei."""
        return int(self.read("credits", account))

    def commit(self, batch: Batch, commitment: bytes) -> Call:
        """Commit to an accusation; the sender posts the bond."""
        return self.call("commit", batch.values(), commitment)

    def accuse(self, accusation: int, batch: Batch, config: ModelConfig, claim: Values, salt: bytes) -> Call:
        """Reveal it. config: the dimensions of the batch's model."""
        return self.call("accuse", accusation, batch.values(), config.values(), claim.values(), salt)

    def expire(self, accusation: int, batch: Batch) -> Call:
        """End one that was not revealed in time."""
        return self.call("expire", accusation, batch.values())

    def resolve(self, accusation: int, terms: Terms, batch: Batch) -> Call:
        """End one that stood, and convict."""
        return self.call("resolve", accusation, terms.values(), batch.values())

    def claim(self) -> Call:
        """Pay the sender's credit."""
        return self.call("claim")

    def burn(self) -> Call:
        """Destroy what was forfeited until now. By anyone."""
        return self.call("burn")


class Contests(ContractClient):
    """Contests: descents through a trace, and proofs of points."""

    NAME = "Contests"

    def info(self, contest: int) -> ContestInfo:
        """A contest; `is_open` is false for an unknown or ended one."""
        values = list(self.read("contest_info", contest))
        values[0], values[9] = Address(str(values[0])), Hash32(bytes(values[9]))
        return ContestInfo(*values)

    def contest_trace(self, accusation: int, terms: Terms, free: bool) -> Call:
        """Contest the trace; the sender posts the bond, unless it is the node's free contest."""
        return self.call("contest_trace", accusation, terms.values(), free)

    def contest_point(self, accusation: int, terms: Terms, free: bool, number: int) -> Call:
        """Contest that a point's logits stand in the trace; margins count before fingerprints."""
        return self.call("contest_point", accusation, terms.values(), free, number)

    def show_point(
        self,
        contest: int,
        terms: Terms,
        points: tuple[Sequence[Values], Sequence[Values]],
        ids: tuple[bytes, Sequence[bytes]],
        leaves: tuple[bytes, Sequence[bytes]],
    ) -> Call:
        """Prove a contested point. points: margins, fingerprints. ids, leaves: bytes and their Merkle proof."""
        margins, fingerprints = ([point.values() for point in some] for some in points)
        return self.call(
            *("show_point", contest, terms.values(), margins, fingerprints),
            *(ids[0], list(ids[1]), leaves[0], list(leaves[1])),
        )

    def reveal(self, contest: int, asked: bytes, nodes: Sequence[bytes]) -> Call:
        """Show the nodes six levels below where a contest stands. asked: `spec.dispute.asked_cell`, 32 bytes."""
        return self.call("reveal", contest, asked, list(nodes))

    def reveal_leaves(self, contest: int, asked: bytes, leaves: bytes) -> Call:
        """Show the leaves below where a contest stands. asked: `spec.dispute.asked_cell`, 32 bytes."""
        return self.call("reveal_leaves", contest, asked, leaves)

    def pick(self, contest: int, index: int, node: bytes, path: Sequence[bytes]) -> Call:
        """Name the first shown node that differs."""
        return self.call("pick", contest, index, node, list(path))

    def open_cell(
        self, contest: int, terms: Terms, index: int, element: int, leaf: bytes, path: Sequence[bytes]
    ) -> Call:
        """Name the first cell that differs; the accuser has to open it into its tree."""
        return self.call("open_cell", contest, terms.values(), index, element, leaf, list(path))

    def step(
        self,
        contest: int,
        terms: Terms,
        index: int,
        element: int,
        leaf: bytes,
        path: Sequence[bytes],
        sub_root: bytes,
        opened: Values,
    ) -> Call:
        """The one step: the first cell that differs, and what it is computed from. sub_root: of the tree of the cell in
        which the contest stands, zeros in the trace."""
        return self.call("step", contest, terms.values(), index, element, leaf, list(path), sub_root, opened.values())

    def finish(self, contest: int, terms: Terms, leaf: bytes, sub_root: bytes, opened: Values) -> Call:
        """The one step where a cell's tree is right: the cell itself does not follow from it."""
        return self.call("finish", contest, terms.values(), leaf, sub_root, opened.values())

    def settle(self, contest: int, terms: Terms) -> Call:
        """End a contest whose time is over, or whose accusation is."""
        return self.call("settle", contest, terms.values())

    def terms_hash(self, terms: Terms) -> Hash32:
        """keccak(abi.encode(terms)): what `AccusationInfo.digest` is from the reveal on. Asks no chain."""
        # All fields are static, so they stand in the call's data as abi.encode writes them.
        return Hash32(keccak(self.settle(0, terms).data[4 + 32 :]))
