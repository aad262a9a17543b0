"""Builders of the system of contracts in titanoboa's EVM, for contract tests.

Plain functions: each deploys one contract and needs those below it; `deploy_staking` deploys what the registry needs.
Compiled code is cached, so a builder costs milliseconds after its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boa
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey

from poip_chain.economic.parameters import PARAMETERS, Parameter, parameter_key, with_values
from poip_chain.spec.eip712 import Domain, TypedStruct
from poip_chain.spec.objects import ModelConfig, ModelSpec, Profile, ProofOfPossession, ThresholdRow
from poip_chain.spec.types import Address

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
HARNESS = Path(__file__).resolve().parent / "harness"
POIP = 10**18
INITIAL_SUPPLY = 10**9 * POIP
MAXIMUM_SUPPLY = 10**10 * POIP
FOREVER = 2**63


@dataclass(frozen=True)
class Account:
    """An account whose key is known."""

    key: PrivateKey
    address: Address


@cache
def account(label: str) -> Account:
    """The account of that label; the same label gives the same account."""
    key = PrivateKey(keccak(b"test account " + label.encode()))
    return Account(key, Address(key.public_key.to_checksum_address()))


OWNER = account("owner")


def load(path: Path, *arguments: Any, sender: Address = OWNER.address) -> Any:
    """Deploy a Vyper file; `sender` becomes the owner if the contract has one."""
    with boa.env.prank(sender):
        contract = compiled(path).deploy(*arguments)
    # The address may have been another contract's, in a test that was undone. Of a revert boa reports the storage, and
    # fails where it takes the other's for this one's.
    boa.env.sstore_trace.pop(contract.address, None)
    return contract


@cache
def compiled(path: Path) -> Any:
    """The compiled contract of a Vyper file."""
    return boa.load_partial(str(path))


def domain(contract: Any) -> Domain:
    """The EIP-712 domain of the protocol's objects with this verifying contract."""
    return Domain(boa.env.evm.patch.chain_id, Address(contract.address))


def vrs(signature: bytes) -> tuple[int, bytes, bytes]:
    """A 65-byte signature as (v, r, s)."""
    return signature[64], signature[:32], signature[32:64]


def now() -> int:
    """The time of the pending block."""
    return int(boa.env.timestamp)


def deploy_token(holder: Address = OWNER.address) -> Any:
    """PoipToken with the initial supply at `holder`."""
    return load(CONTRACTS / "token/PoipToken.vy", holder, INITIAL_SUPPLY, MAXIMUM_SUPPLY)


def deploy_parameters(overrides: Mapping[str, int] | None = None, base: tuple[Parameter, ...] = PARAMETERS) -> Any:
    """Parameters with the defaults, some replaced."""
    rows = [parameter.as_tuple() for parameter in with_values(base, overrides or {})]
    return load(CONTRACTS / "governance/Parameters.vy", rows)


def set_parameter(parameters: Any, name: str, value: int) -> None:
    """Change a parameter as the owner."""
    parameters.set_value(parameter_key(name), value, sender=OWNER.address)


def value_of(parameters: Any, name: str) -> int:
    """A parameter's present value."""
    return int(parameters.value(parameter_key(name)))


def deploy_models() -> Any:
    """ModelRegistry without a model."""
    return load(CONTRACTS / "models/ModelRegistry.vy")


def model_config() -> ModelConfig:
    """The dimensions of a small model."""
    return ModelConfig(64, 128, 2, 4, 2, 16, 1000, 2048, 10**6, 10_000, bytes(32), True, False, False, False)


def model_spec(tag: str = "model", config: ModelConfig | None = None) -> ModelSpec:
    """A model; different tags give different models."""
    weights, tokenizer, template = (keccak(f"{tag} {part}".encode()) for part in ("weights", "tokenizer", "template"))
    return ModelSpec(weights, tokenizer, template, (config or model_config()).config_hash())


def profile() -> Profile:
    """A profile for `model_config`."""
    table = (ThresholdRow(32, 1000), ThresholdRow(128, 2000))
    return Profile(512, 1000, "bfloat16", "bfloat16", 100, 2000, (2, 7), 100, 5000, table, 3, 8, table)


def add_model(models: Any, tag: str = "model", profiles: int = 1) -> bytes:
    """Register a model with some profiles; its id."""
    spec, config = model_spec(tag), model_config()
    models.register_model(spec.values(), config.values(), "ipfs://model", sender=OWNER.address)
    for _ in range(profiles):
        models.add_profile(spec.model_id(), profile().values(), sender=OWNER.address)
    return spec.model_id()


def deploy_registry(
    token: Any, parameters: Any, models: Any, log: Any = None, slashers: tuple[Address, ...] = (), seal: bool = True
) -> Any:
    """NodeRegistry. With a log it is initialized, and sealed unless told otherwise."""
    registry = load(CONTRACTS / "staking/NodeRegistry.vy", token, parameters, models)
    with boa.env.prank(OWNER.address):
        if log is not None:
            registry.initialize(log)
        for slasher in slashers:
            registry.set_slasher(slasher, True)
        if log is not None and seal:
            registry.seal()
    return registry


@dataclass
class Staking:
    """A registry with what it needs, a stand-in for the log, and one slasher."""

    token: Any
    parameters: Any
    models: Any
    log: Any
    registry: Any
    slasher: Address


def deploy_staking(overrides: Mapping[str, int] | None = None) -> Staking:
    """A sealed registry whose log is a stand-in that tests speak for."""
    token, parameters, models = deploy_token(), deploy_parameters(overrides), deploy_models()
    log = load(HARNESS / "log_harness.vy")
    slasher = account("slasher").address
    registry = deploy_registry(token, parameters, models, log, (slasher,))
    return Staking(token, parameters, models, log, registry, slasher)


def proof_of_possession(registry: Any, operator: Address, key: Account, role: int, deadline: int) -> bytes:
    """A key's signature that lets `operator` bind it."""
    return ProofOfPossession(operator, key.address, role, deadline).sign(domain(registry), key.key)


def register_node(registry: Any, label: str = "node", operator: Account | None = None) -> Address:
    """Register the node of `account(label)`, with operator, payout and peer key derived from the label; its name."""
    node, peer = account(label), account(f"{label} peer")
    owner = (operator or account(f"{label} operator")).address
    registry.register(
        node.address,
        account(f"{label} payout").address,
        peer.address,
        f"https://{label.replace(' ', '-')}.example",
        FOREVER,
        proof_of_possession(registry, owner, node, ProofOfPossession.NODE_KEY, FOREVER),
        proof_of_possession(registry, owner, peer, ProofOfPossession.PEER_KEY, FOREVER),
        sender=owner,
    )
    return node.address


def add_stake(token: Any, registry: Any, node: Address, amount: int, staker: Address = OWNER.address) -> None:
    """Stake `amount` wei from `staker`, who is given the tokens first."""
    if staker != OWNER.address:
        token.transfer(staker, amount, sender=OWNER.address)
    token.approve(registry, amount, sender=staker)
    registry.stake(node, amount, sender=staker)


def refuses(reason: str, *calls: Callable[[], Any]) -> None:
    """Each of the calls reverts with that reason."""
    for call in calls:
        with boa.reverts(reason):
            call()


def sign(contract: Any, value: TypedStruct, signer: Account) -> bytes:
    """A protocol object signed in the domain of `contract`."""
    return value.sign(domain(contract), signer.key)
