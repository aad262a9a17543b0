"""What the node needs of the chain, in its own terms. `chainport.py` speaks to a real one; tests use a model.

No I/O here. All methods are synchronous and may raise Unavailable (no chain) or TransactionFailed (a revert, with its
reason; nothing was sent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from poip_chain.economic.locks import LockTerms
from poip_chain.economic.types import BatchStatus, Offer, ReceiptInBatch
from poip_chain.service.node.schema import Duty, DutyKind
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import Batch, Part, Profile, Request, SamplingParams, Voucher
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address


@dataclass(frozen=True, slots=True)
class Escrow:
    """A payer's money with this node: what it may still spend, what is settled of its running total; wei."""

    available: int
    settled: int


@dataclass(frozen=True, slots=True)
class Backing:
    """What stands behind the receipts from number `next_seq` on: stake (wei) that no batch below it has locked, the
    terms of the next lock, and the offers that clients see in the registry."""

    next_seq: int
    free_stake: int
    terms: LockTerms
    offers: tuple[Offer, ...]


class SentState(StrEnum):
    """How a transaction stands that was sent under an idempotency key."""

    UNKNOWN = "unknown"
    OPEN = "open"
    MINED = "mined"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Committed:
    """The log holds this batch."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Ended:
    """A batch became final or convicted."""

    batch_id: int
    status: BatchStatus


@dataclass(frozen=True, slots=True)
class Rotated:
    """The operator gave the receipts from `next_seq` on to another key than `old_key`."""

    old_key: Address
    next_seq: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A challenge or demand against this node was filed."""

    duty: Duty


@dataclass(frozen=True, slots=True)
class Answered:
    """A challenge was answered, or closed otherwise."""

    kind: DutyKind
    id: int


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened on chain, or (`removed`) a reorganisation undid it. `token` is for `acknowledge`.

    `what` is None for an event of another node. A challenge is reported for any node's batch, with the receipt's index
    in the batch as its duty's seq: only the database knows which batches are this node's.
    """

    what: Committed | Ended | Rotated | Asked | Answered | None
    removed: bool
    token: object


class NodeChain(Protocol):
    """The chain as one node sees it."""

    node: Address
    chain_id: int
    log_domain: Domain
    vault_domain: Domain
    registry_address: Address

    def timestamp(self) -> int:
        """Chain time, Unix seconds."""

    def signing_key(self, seq: int) -> Address:
        """The key that may sign receipt `seq`."""

    def next_seq(self) -> int:
        """The first receipt number that the log does not cover."""

    def node_cum(self) -> int:
        """The node's running total in the log, wei."""

    def offers(self) -> list[Offer]:
        """The node's offers."""

    def profile(self, model_id: bytes, version: int) -> Profile:
        """A model's profile."""

    def sunset(self, model_id: bytes) -> int:
        """From when on the model is no longer served, Unix seconds; 0 if it stays."""

    def escrow(self, payer: Address) -> Escrow:
        """`settled` is read before `available`, so that a collect in between makes the payer poorer, never richer."""

    def backing(self) -> Backing:
        """`next_seq` is read before `free_stake`: a commit in between is counted twice, never not at all."""

    def collectable(self, payer: Address) -> int:
        """What a collect could draw now, thawing included, wei."""

    def status(self, batch: Batch) -> BatchStatus:
        """NONE also where the log holds another batch under this number."""

    def open_cases(self, batch: Batch) -> int:
        """How many cases keep the batch from becoming final."""

    def window_end(self, batch: Batch) -> int:
        """Until when the batch may be judged, Unix seconds: its window_end, or later after a late answer."""

    def collected(self, batch: Batch) -> int:
        """What was collected for the batch from all payers, wei; the vault takes at most its total_fee."""

    def settled(self, payer: Address, depth: int = 0) -> int:
        """How far of the payer's running total is settled, as of `depth` blocks below the newest, wei."""

    def bucket(self, batch: Batch, payer: Address, depth: int = 0) -> int:
        """What was collected for the batch and is not settled yet, as of `depth` blocks below the newest, wei."""

    def earned(self) -> int:
        """What may be withdrawn, wei."""

    def beacon(self, batch: Batch) -> bytes | None:
        """The batch's beacon as the log has it, else the mixHash of its first target block; None before that block."""

    def changes(self) -> Sequence[Change]:
        """News about this node since what was acknowledged, in order."""

    def acknowledge(self, change: Change) -> None:
        """Never report this change again."""

    def sent(self, key: str) -> SentState:
        """How the transaction under this idempotency key stands."""

    def step(self) -> None:
        """Push transactions that are under way."""

    def send_commit(self, key: str, *, batch: Batch, locator: str) -> None:
        """`batch` holds model_id, profile_version, root, first_seq, count and total_fee; the rest is ignored."""

    def send_finalize(self, key: str, batches: Sequence[Batch]) -> None:
        """At most 32."""

    def send_collect(
        self, key: str, voucher: Voucher, signature: bytes, batch: Batch, first: ReceiptInBatch, last: ReceiptInBatch
    ) -> None:
        """See PaymentVault.collect."""

    def send_settle(self, key: str, batch: Batch, payer: Address) -> None:
        """See PaymentVault.settle."""

    def send_withdraw(self, key: str) -> None:
        """Earnings to the payout address."""

    def send_answer(
        self,
        key: str,
        duty: Duty,
        batch: Batch,
        place: ReceiptInBatch,
        request: Request,
        params: SamplingParams,
        transcript: Transcript,
        part: Part,
        leaves: Sequence[bytes],
        proof: Sequence[bytes],
    ) -> None:
        """See Availability.answer."""
