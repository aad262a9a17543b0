"""What the control layer asks a chain, as one small interface with plain values, and its writing over `Network`.

The gateway, the client and `poip verify` depend on the Protocol alone, so a test can put a chain of its own in place.
All calls block; they raise Unavailable if the chain does not answer, NotFound for something that is not registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from poip_chain.control.client import ClientChain
from poip_chain.spec.objects import Batch, ModelSpec, Profile
from poip_chain.spec.types import Address


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node asks for a model, in wei per token."""

    model_id: bytes
    profile_version: int
    input_price: int
    output_price: int


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """A node as the registry has it. `inactive_reason` is empty for an active one; `stake` in wei, the active part."""

    address: Address
    endpoint: str
    active: bool
    inactive_reason: str
    stake: int
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class Holding:
    """Escrow of one payer with one node in wei; `thaw_end` in Unix seconds, 0 where nothing thaws."""

    balance: int
    thawing: int
    thaw_end: int
    settled: int


class BatchState(StrEnum):
    """What the commitment log says of a batch."""

    PENDING = "pending"
    FINAL = "final"
    CONVICTED = "convicted"


class ChainView(ClientChain, Protocol):
    """See the module's docstring."""

    @property
    def chain_id(self) -> int:
        """EIP-155 chain id."""

    @property
    def registry_address(self) -> Address:
        """The node registry."""

    def timestamp(self) -> int:
        """Chain time in Unix seconds."""

    def holding(self, payer: Address, node: Address) -> Holding:
        """Escrow of `payer` with `node`."""

    def token_balance(self, owner: Address) -> int:
        """Tokens in `owner`'s wallet, in wei."""

    def nodes(self) -> list[RegisteredNode]:
        """All registered nodes."""

    def node(self, node: Address) -> RegisteredNode:
        """One node."""

    def model_spec(self, model_id: bytes) -> ModelSpec:
        """What a registered model is."""

    def profile(self, model_id: bytes, version: int) -> Profile:
        """A model's profile."""

    def profile_count(self, model_id: bytes) -> int:
        """How many profiles a model has; they are numbered from 1."""

    def is_servable(self, model_id: bytes, version: int) -> bool:
        """Whether new requests for this profile are allowed."""

    def find_batch(self, node: Address, seq: int) -> tuple[Batch, BatchState] | None:
        """The committed batch that covers receipt `seq` of `node`, and its state; None if there is none yet."""
