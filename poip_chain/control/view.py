"""What the control layer asks a chain, as one small interface with plain values, and its writing over `Network`.

The gateway, the client and `poip verify` depend on the Protocol alone, so a test can put a chain of its own in place.
All calls block; they raise Unavailable if the chain does not answer, NotFound for something that is not registered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar, cast

from poip_chain.control.client import ClientChain, Escrow
from poip_chain.economic.network import Network
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import NotFound, TransactionFailed, Unavailable
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import Batch, ModelSpec, Profile
from poip_chain.spec.types import ZERO_ADDRESS, Address

T = TypeVar("T")

FRESH_SECONDS = 2.0
"""How long escrow figures and keys are used without asking again."""
STALE_SECONDS = 600.0
"""How long they are used while the chain does not answer. Escrow shrinks only by what vouchers promise and by this
key's own thaws, so an old figure promises nothing twice."""
MAX_CACHED = 100_000


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


class NetworkView:
    """`ChainView` over a deployed network. Figures of escrow and keys are remembered for a moment; thread-safe."""

    def __init__(self, network: Network, clock: Callable[[], float] = time.monotonic) -> None:
        self.network = network
        self.chain_id = network.deployment.chain_id
        self.log_domain: Domain = network.domain("log")
        self.vault_domain: Domain = network.domain("vault")
        self.registry_address: Address = network.domain("registry").verifying_contract
        self._clock = clock
        self._lock = threading.Lock()
        self._cache: dict[Hashable, tuple[float, object]] = {}

    def timestamp(self) -> int:
        """See ChainView."""
        return self.network.chain.timestamp()

    def signing_key(self, node: Address, seq: int) -> Address:
        """See ChainView. A key is valid from one seq on, so the answer for a seq holds for a while."""
        key = self._remembered(("key", node, seq), lambda: self.network.registry.signing_key(node, seq))
        if key == ZERO_ADDRESS:
            raise NotFound(f"node {node} is not registered.")
        return key

    def escrow(self, payer: Address, node: Address) -> Escrow:
        """See ChainView."""
        holding = self._remembered(("escrow", payer, node), lambda: self.holding(payer, node))
        return Escrow(holding.balance - holding.thawing, holding.settled)

    def holding(self, payer: Address, node: Address) -> Holding:
        """See ChainView; always asked anew."""
        # Settled first: a collection in between then makes the escrow look smaller, never larger.
        settled = self.network.vault.settled(payer, node)
        escrow = self.network.vault.escrow(payer, node)
        return Holding(escrow.balance, escrow.thawing, escrow.thaw_end, settled)

    def forget_escrow(self, payer: Address, node: Address) -> None:
        """Ask anew next time: the key has just deposited or thawed."""
        with self._lock:
            self._cache.pop(("escrow", payer, node), None)

    def token_balance(self, owner: Address) -> int:
        """See ChainView."""
        return self.network.token.balance(owner)

    def nodes(self) -> list[RegisteredNode]:
        """See ChainView."""
        now = self.timestamp()
        return [self._node(address, now) for address in self.network.registry.nodes()]

    def node(self, node: Address) -> RegisteredNode:
        """See ChainView."""
        return self._node(node, self.timestamp())

    def _node(self, address: Address, now: int) -> RegisteredNode:
        registry = self.network.registry
        info = registry.info(address)
        active = registry.is_active(address)
        if active:
            reason = ""
        elif info.deregistered_at:
            reason = "has left the registry"
        elif info.jailed_until:
            reason = f"jailed until {info.jailed_until}" if info.jailed_until > now else "jailed, not yet released"
        else:
            reason = "has less than the minimum stake"
        offers = tuple(
            Offer(offer.model_id, offer.profile_version, offer.input_price, offer.output_price)
            for offer in registry.offers(address)
        )
        return RegisteredNode(address, info.endpoint, active, reason, info.active, offers)

    def model_spec(self, model_id: bytes) -> ModelSpec:
        """See ChainView."""
        return self._remembered(("spec", model_id), lambda: self._model(model_id), for_ever=True)

    def _model(self, model_id: bytes) -> ModelSpec:
        try:
            return self.network.models.spec(model_id)
        except TransactionFailed as error:
            raise NotFound(
                f"model 0x{model_id.hex()} is not registered.", hint="`poip model list` shows the registered ones."
            ) from error

    def profile(self, model_id: bytes, version: int) -> Profile:
        """See ChainView. Profiles never change."""

        def read() -> Profile:
            try:
                return self.network.models.profile(model_id, version)
            except TransactionFailed as error:
                raise NotFound(f"model 0x{model_id.hex()} has no profile {version}.") from error

        return self._remembered(("profile", model_id, version), read, for_ever=True)

    def profile_count(self, model_id: bytes) -> int:
        """See ChainView."""
        return self.network.models.profile_count(model_id)

    def is_servable(self, model_id: bytes, version: int) -> bool:
        """See ChainView."""
        return self.network.models.is_servable(model_id, version)

    def find_batch(self, node: Address, seq: int) -> tuple[Batch, BatchState] | None:
        """See ChainView. Reads the log's events of this node, and the status of the very batch that they name."""
        log = self.network.log
        if log.next_seq(node) <= seq:
            return None
        topic = "0x" + bytes(12).hex() + node[2:].lower()
        for event in reversed(log.events("BatchCommitted", self.network.deployment.block, topics=[None, topic])):
            batch = log.batch_of(event)
            if batch.node == node and batch.first_seq <= seq < batch.first_seq + batch.count:
                status = log.status_of(batch)
                if status is not BatchStatus.NONE:
                    return batch, BatchState(status.name.lower())
        return None

    def _remembered(self, key: Hashable, read: Callable[[], T], *, for_ever: bool = False) -> T:
        with self._lock:
            known = self._cache.get(key)
        if known is not None and (for_ever or self._clock() - known[0] < FRESH_SECONDS):
            return cast("T", known[1])
        try:
            value = read()
        except Unavailable:
            if known is not None and self._clock() - known[0] < STALE_SECONDS:
                return cast("T", known[1])
            raise
        with self._lock:
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[key] = self._clock(), value
        return value
