"""A chain that exists only in memory: registry, escrow and batches as plain dictionaries, for tests of the control
layer. It answers what `poip_chain.control.view` asks for, with the figures that a test writes into it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from poip_chain.control.client import Escrow
from poip_chain.control.view import BatchState, Holding, Offer, RegisteredNode
from poip_chain.errors import NotFound, Unavailable
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import Batch, ModelSpec, Profile, ThresholdRow
from poip_chain.spec.types import Address
from tests.engines.tiny_tokenizer import END_OF_TEXT, IM_END, VOCABULARY

LOG = Address("0x1111111111111111111111111111111111111111")
VAULT = Address("0x2222222222222222222222222222222222222222")
REGISTRY = Address("0x3333333333333333333333333333333333333333")
CHAIN_ID = 31337
SPEC = ModelSpec(bytes([1] * 32), bytes([2] * 32), bytes([3] * 32), bytes([4] * 32))
MODEL_ID = SPEC.model_id()
PROFILE = Profile(
    max_context=1024,
    vocab_size=VOCABULARY,
    dtype="float32",
    kv_dtype="float32",
    min_temperature_milli=100,
    max_temperature_milli=2000,
    end_token_ids=(END_OF_TEXT, IM_END),
    margin_dead_zone=1000,
    margin_hard_limit=100000,
    margin_table=(ThresholdRow(1, 10000),),
    fingerprint_dead_zone=1,
    fingerprint_tolerance=4,
    fingerprint_table=(ThresholdRow(1, 100),),
)


@dataclass
class ScriptedChain:
    """See the module's docstring. `down` makes every call fail as an RPC does that went away."""

    chain_id: int = CHAIN_ID
    log_domain: Domain = field(default_factory=lambda: Domain(CHAIN_ID, LOG))
    vault_domain: Domain = field(default_factory=lambda: Domain(CHAIN_ID, VAULT))
    registry_address: Address = REGISTRY
    now: int = 1_800_000_000
    down: bool = False
    registered: dict[Address, RegisteredNode] = field(default_factory=dict)
    keys: dict[Address, Address] = field(default_factory=dict)
    escrows: dict[tuple[Address, Address], Holding] = field(default_factory=dict)
    tokens: defaultdict[Address, int] = field(default_factory=lambda: defaultdict(int))
    batches: list[tuple[Batch, BatchState]] = field(default_factory=list)
    sunset: bool = False

    def _up(self) -> None:
        if self.down:
            raise Unavailable("the chain does not answer.", hint="Check the RPC URL.")

    def register(self, node: Address, key: Address, url: str, *offers: Offer) -> None:
        """Put a node into the registry."""
        self.registered[node] = RegisteredNode(node, url, True, "", 10**24, offers)
        self.keys[node] = key

    def fund(self, payer: Address, node: Address, amount: int) -> None:
        """Give `payer` an escrow of `amount` with `node`."""
        self.escrows[payer, node] = Holding(amount, 0, 0, 0)

    def timestamp(self) -> int:
        self._up()
        return self.now

    def signing_key(self, node: Address, seq: int) -> Address:
        self._up()
        if node not in self.keys:
            raise NotFound(f"no node {node} is registered.")
        return self.keys[node]

    def escrow(self, payer: Address, node: Address) -> Escrow:
        holding = self.holding(payer, node)
        return Escrow(holding.balance - holding.thawing, holding.settled)

    def holding(self, payer: Address, node: Address) -> Holding:
        self._up()
        return self.escrows.get((payer, node), Holding(0, 0, 0, 0))

    def token_balance(self, owner: Address) -> int:
        self._up()
        return self.tokens[owner]

    def nodes(self) -> list[RegisteredNode]:
        self._up()
        return list(self.registered.values())

    def node(self, node: Address) -> RegisteredNode:
        self._up()
        if node not in self.registered:
            raise NotFound(f"no node {node} is registered.")
        return self.registered[node]

    def model_spec(self, model_id: bytes) -> ModelSpec:
        self._up()
        if model_id != MODEL_ID:
            raise NotFound(f"model 0x{model_id.hex()} is not registered.")
        return SPEC

    def profile(self, model_id: bytes, version: int) -> Profile:
        self._up()
        if model_id != MODEL_ID or version != 1:
            raise NotFound(f"model 0x{model_id.hex()} has no profile {version}.")
        return PROFILE

    def profile_count(self, model_id: bytes) -> int:
        self._up()
        return 1

    def is_servable(self, model_id: bytes, version: int) -> bool:
        self._up()
        return model_id == MODEL_ID and version == 1 and not self.sunset

    def find_batch(self, node: Address, seq: int) -> tuple[Batch, BatchState] | None:
        self._up()
        for batch, state in self.batches:
            if batch.node == node and batch.first_seq <= seq < batch.first_seq + batch.count:
                return batch, state
        return None
