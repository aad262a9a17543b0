"""What the contracts return and take beside the objects of the spec.

Amounts in wei of the token, times in Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from poip_chain.spec.objects import Batch, Receipt
from poip_chain.spec.types import ZERO_ADDRESS, Address, Hash32


class BatchStatus(IntEnum):
    """A batch's status in the commitment log."""

    NONE = 0
    PENDING = 1
    FINAL = 2
    CONVICTED = 3


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A registered node. `locked` is the part of `active` that stands behind pending batches."""

    operator: Address
    payout: Address
    node_key: Address
    peer_key: Address
    endpoint: str
    active: int
    unbonding: int
    locked: int
    jailed_until: int
    registered_at: int
    deregistered_at: int
    fixed_slash_ppm: int

    @property
    def registered(self) -> bool:
        """Whether the node was ever registered and has not left."""
        return self.operator != ZERO_ADDRESS and self.deregistered_at == 0


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node offers; prices in wei per token."""

    model_id: Hash32
    profile_version: int
    input_price: int
    output_price: int


@dataclass(frozen=True, slots=True)
class Unbonding:
    """Stake on its way out."""

    id: int
    amount: int
    withdrawable_at: int


@dataclass(frozen=True, slots=True)
class Escrow:
    """A payer's money with one node. `thawing` is the part of `balance` that may leave from `thaw_end` on."""

    balance: int
    thawing: int
    thaw_end: int

    @property
    def available(self) -> int:
        """What may still be promised to the node."""
        return self.balance - self.thawing


class CaseStatus(IntEnum):
    """How an availability challenge or a demand to commit stands. A demand that ends is WITHHELD or VOID."""

    NONE = 0
    OPEN = 1
    ANSWERED = 2
    WITHHELD = 3
    VOID = 4


@dataclass(frozen=True, slots=True)
class ChallengeInfo:
    """A challenge to publish eight leaves of one part of a receipt's transcript."""

    challenger: Address
    batch_id: int
    index: int
    part: int
    first_leaf: int
    deadline: int
    status: CaseStatus
    bond: int


@dataclass(frozen=True, slots=True)
class DemandInfo:
    """A demand to commit a signed receipt."""

    demander: Address
    node: Address
    seq: int
    deadline: int
    status: CaseStatus
    receipt_hash: Hash32
    bond: int


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A protocol number with its hard bounds."""

    name: str
    value: int
    minimum: int
    maximum: int
    unit: str


@dataclass(frozen=True, slots=True)
class ReceiptInBatch:
    """A receipt with its Merkle proof into the root of a batch."""

    receipt: Receipt
    index: int
    proof: tuple[bytes, ...]

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it."""
        return (self.receipt.values(), self.index, list(self.proof))


NO_BATCH = Batch(0, ZERO_ADDRESS, bytes(32), 0, bytes(32), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a receipt is known to be the node's: by its place in a batch, or (batch None) by the node's signature."""

    batch: Batch | None = None
    index: int = 0
    proof: tuple[bytes, ...] = ()
    signature: bytes = b""

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it; batch.id 0 means none."""
        return ((self.batch or NO_BATCH).values(), self.index, list(self.proof), self.signature)
