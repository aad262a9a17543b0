"""Deploy the network's contracts, and the file that says where they are.

Running it again continues where it stopped, or finds everything in place and sends nothing: creations are recorded in
the file as they land (and kept by the outbox before that), wiring is compared with the chain. Knows the contracts'
constructors and wiring, not what they do.

The file is JSON: `schema` (1), `chain_id`, `genesis` (hash of block 0), `block` (of the first contract: nothing of the
network happened before it), `deployer`, `complete`, and `contracts`: name -> `address`, `transaction`, `block`,
`code_hash` (keccak of the runtime code).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eth_hash.auto import keccak

from poip_chain.chain.artifacts import artifact
from poip_chain.chain.keys import Key
from poip_chain.chain.outbox import FeePolicy, Outbox
from poip_chain.chain.rpc import Call, Chain
from poip_chain.chain.signing import GWEI
from poip_chain.errors import ConfigurationError, IntegrityError, InvalidInput, PoipError
from poip_chain.spec.eip712 import checked
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Address

SCHEMA = 1
MAX_FILE_BYTES = 1024 * 1024

CONTRACTS = (
    "PoipToken",
    "Parameters",
    "ModelRegistry",
    "NodeRegistry",
    "CommitmentLog",
    "PaymentVault",
    "Offences",
    "Availability",
    "TraceMap",
    "Referee",
    "Scoring",
    "Accusations",
    "Contests",
)
"""All contracts, in the order of their deployment."""
SLASHERS = ("CommitmentLog", "Offences", "Availability")
JUDGES = ("Offences", "Availability", "Accusations")
CONSTRUCTED_FROM: Mapping[str, tuple[str, ...]] = {
    "ModelRegistry": (),
    "NodeRegistry": ("PoipToken", "Parameters", "ModelRegistry"),
    "CommitmentLog": ("NodeRegistry", "ModelRegistry", "Parameters"),
    "PaymentVault": ("PoipToken", "CommitmentLog", "NodeRegistry", "Parameters"),
    "Offences": ("CommitmentLog", "NodeRegistry", "ModelRegistry", "Parameters"),
    "Availability": ("PoipToken", "CommitmentLog", "NodeRegistry", "Parameters"),
    "TraceMap": (),
    "Referee": ("TraceMap",),
    "Scoring": ("CommitmentLog", "ModelRegistry"),
    "Accusations": ("PoipToken", "CommitmentLog", "NodeRegistry", "ModelRegistry", "Parameters", "Scoring", "TraceMap"),
    "Contests": ("Accusations", "Referee", "TraceMap"),
}
"""The contracts whose addresses each constructor takes, in its order (the vault's then takes the treasury)."""
OWNED = ("PoipToken", "Parameters", "ModelRegistry", "NodeRegistry", "CommitmentLog", "PaymentVault")

ParameterRow = tuple[bytes, int, int, int, str]
"""(name left-aligned in 32 bytes, value, minimum, maximum, unit), as the Parameters contract takes it."""


@dataclass(frozen=True)
class DeploymentSettings:
    """What a deployment is made with. Amounts in wei of the token.

    `treasury` None: the deployer. `admin` None: the deployer stays owner; otherwise ownership is offered to `admin`,
    who has to accept it. `grants` are paid out of the initial supply, once each.
    """

    parameters: tuple[ParameterRow, ...]
    initial_supply: int = 10**9 * 10**18
    maximum_supply: int = 10**10 * 10**18
    treasury: Address | None = None
    admin: Address | None = None
    grants: Mapping[Address, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(self.grants.values()) > self.initial_supply or any(value < 0 for value in self.grants.values()):
            raise ConfigurationError("the grants of a deployment are not covered by the initial supply.")


@dataclass(frozen=True, slots=True)
class Deployed:
    """Where a contract is, and how it got there."""

    address: Address
    transaction: str
    block: int
    code_hash: str


@dataclass(frozen=True)
class Deployment:
    """A deployment file's content. `block` is the first one that a follower has to read."""

    chain_id: int
    genesis: str
    deployer: Address
    complete: bool
    contracts: dict[str, Deployed]

    @property
    def addresses(self) -> dict[str, Address]:
        """Contract name -> address."""
        return {name: deployed.address for name, deployed in self.contracts.items()}

    @property
    def block(self) -> int:
        """The block of the first contract."""
        return min((deployed.block for deployed in self.contracts.values()), default=0)

    def address(self, name: str) -> Address:
        """Raises ConfigurationError if the deployment lacks the contract."""
        if name not in self.contracts:
            raise ConfigurationError(
                f"the deployment has no contract {name}.", hint="Run `poip deploy` to complete it."
            )
        return self.contracts[name].address

    @classmethod
    def load(cls, path: Path) -> Deployment:
        """Read a deployment file. Raises ConfigurationError if it is absent, damaged or incomplete."""
        deployment = _read(path)
        if deployment is None:
            raise ConfigurationError(
                f"there is no deployment file {path}.",
                hint="A network that runs elsewhere: --data (or POIP_DATA) names the directory with its file, for example "
                "~/.poip/local after `make up`, and --deployment the file itself; `poip deploy` makes a new network.",
            )
        if not deployment.complete:
            raise ConfigurationError(f"the deployment in {path} is not complete.", hint="Run `poip deploy` again.")
        return deployment

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        body = {
            "schema": SCHEMA,
            "chain_id": self.chain_id,
            "genesis": self.genesis,
            "block": self.block,
            "deployer": self.deployer,
            "complete": self.complete,
            "contracts": {
                name: {
                    "address": deployed.address,
                    "transaction": deployed.transaction,
                    "block": deployed.block,
                    "code_hash": deployed.code_hash,
                }
                for name, deployed in self.contracts.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w") as handle:
            handle.write(json.dumps(body, indent=2) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)

    def check(self, chain: Chain) -> None:
        """Raises ConfigurationError unless the deployment was made on this very chain and its contracts are there."""
        if chain.chain_id != self.chain_id or "0x" + chain.block(0).hash.hex() != self.genesis:
            raise ConfigurationError(
                f"the deployment file belongs to another chain than {chain.url} (chain id {self.chain_id} there, "
                f"{chain.chain_id} here).",
                hint="Give the right --rpc or --deployment; after a new devnet, delete the file and deploy again.",
            )
        for name, deployed in self.contracts.items():
            if "0x" + keccak(chain.code(deployed.address)).hex() != deployed.code_hash:
                raise ConfigurationError(
                    f"the chain has another code (or none) at the address of {name}, {deployed.address}.",
                    hint="Deploy again into a new file.",
                )


def deploy(
    chain: Chain,
    key: Key,
    settings: DeploymentSettings,
    path: Path,
    *,
    outbox_path: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    timeout: float = 60.0,
) -> Deployment:
    """Deploy, wire and seal the network with `key`, recording it in the file `path`. See the module's docstring.

    `outbox_path` defaults to outbox/<address>.db beside the file; `timeout` in seconds bounds the wait for each
    transaction. Raises PoipError classes as `Outbox.send`, and ConfigurationError or IntegrityError if the file belongs
    to another chain or deployer, or a contract does not answer as it should.
    """
    known = _read(path)
    genesis = "0x" + chain.block(0).hash.hex()
    deployment = known or Deployment(chain.chain_id, genesis, key.address, False, {})
    deployment.check(chain)
    if deployment.complete:
        _verify(chain, deployment)
        return deployment
    if deployment.deployer != key.address:
        raise ConfigurationError(f"{path} was begun by {deployment.deployer}.", hint="Use that key, or another file.")
    location = outbox_path or path.parent / "outbox" / f"{key.address}.db"
    # A creation takes millions of gas: the bound on its price is wide, the wait for a bump short.
    with Outbox(chain, key, location, fees=FeePolicy(max_fee=500 * GWEI)) as outbox:
        run = _Run(chain, key.address, settings, path, outbox, progress, timeout, deployment)
        run.create_all()
        run.wire()
        run.grant()
        run.hand_over()
        _verify(chain, run.deployment)
        return run.finish()


class _Run:
    """One attempt at completing a deployment."""

    def __init__(
        self,
        chain: Chain,
        deployer: Address,
        settings: DeploymentSettings,
        path: Path,
        outbox: Outbox,
        progress: Callable[[str], None],
        timeout: float,
        deployment: Deployment,
    ) -> None:
        self._chain = chain
        self._deployer = deployer
        self._settings = settings
        self._path = path
        self._outbox = outbox
        self._progress = progress
        self._timeout = timeout
        self.deployment = deployment

    def create_all(self) -> None:
        for name in CONTRACTS:
            if name not in self.deployment.contracts:
                self._progress(f"deploying {name}")
                self._record(name, self._create(name))

    def _arguments(self, name: str) -> list[Any]:
        settings = self._settings
        if name == "PoipToken":
            return [self._deployer, settings.initial_supply, settings.maximum_supply]
        if name == "Parameters":
            return [[tuple(row) for row in settings.parameters]]
        parts: list[Any] = [self.deployment.address(part) for part in CONSTRUCTED_FROM[name]]
        return [*parts, settings.treasury or self._deployer] if name == "PaymentVault" else parts

    def _create(self, name: str) -> Deployed:
        compiled = artifact(name)
        factory = self._chain.w3.eth.contract(abi=compiled.abi, bytecode=compiled.bytecode)
        data = factory.constructor(*self._arguments(name)).data_in_transaction
        call = Call(None, bytes.fromhex(str(data)[2:]), f"deploy {name}")
        receipt = self._outbox.execute(call, f"deploy:{self._path.name}:{name}", self._timeout)
        assert receipt.contract_address is not None
        code = self._chain.code(receipt.contract_address)
        if not code:
            raise IntegrityError(f"{name} was created at {receipt.contract_address}, but the chain has no code there.")
        return Deployed(receipt.contract_address, receipt.hash, receipt.block_number, "0x" + keccak(code).hex())

    def _record(self, name: str, deployed: Deployed) -> None:
        old = self.deployment
        contracts = {**old.contracts, name: deployed}
        self.deployment = Deployment(old.chain_id, old.genesis, old.deployer, False, contracts)
        self.deployment.save(self._path)

    def wire(self) -> None:
        """Tell the registry its log and slashers, the log its judges, the court its contests; then seal registry and log."""
        at = self.deployment.address
        pending = []
        if int(str(self._read("NodeRegistry", "log_address")), 16) == 0:
            pending.append(self._send("NodeRegistry", "initialize", at("CommitmentLog")))
        if int(str(self._read("Accusations", "contests")), 16) == 0:
            pending.append(self._send("Accusations", "initialize", at("Contests")))
        for slasher in SLASHERS:
            if int(self._read("NodeRegistry", "slasher_active_at", at(slasher))) == 0:
                pending.append(self._send("NodeRegistry", "set_slasher", at(slasher), True))
        for judge in JUDGES:
            if int(self._read("CommitmentLog", "judge_active_from", at(judge))) == 0:
                pending.append(self._send("CommitmentLog", "set_judge", at(judge), True))
        self._wait(pending)
        pending = []
        if not self._read("NodeRegistry", "is_sealed"):
            pending.append(self._send("NodeRegistry", "seal"))
        if not self._read("CommitmentLog", "sealed"):
            pending.append(self._send("CommitmentLog", "seal"))
        self._wait(pending)

    def grant(self) -> None:
        """Pay each grant once: the outbox remembers which were paid."""
        self._wait(
            [
                self._send("PoipToken", "transfer", receiver, amount, purpose=f"grant to {receiver}")
                for receiver, amount in self._settings.grants.items()
                if receiver != self._deployer and amount > 0
            ]
        )

    def hand_over(self) -> None:
        """Offer the ownership of every contract to the admin."""
        admin = self._settings.admin
        if admin is None or admin == self._deployer:
            return
        self._wait(
            [
                self._send(name, "transfer_ownership", admin)
                for name in OWNED
                if str(self._read(name, "owner")) == self._deployer and str(self._read(name, "pending_owner")) != admin
            ]
        )

    def finish(self) -> Deployment:
        old = self.deployment
        self.deployment = Deployment(old.chain_id, old.genesis, old.deployer, True, old.contracts)
        self.deployment.save(self._path)
        return self.deployment

    def _read(self, name: str, function: str, *arguments: Any) -> Any:
        contract = self._chain.contract(name, self.deployment.address(name))
        return self._chain.read(contract.functions[function](*arguments))

    def _send(self, name: str, function: str, *arguments: Any, purpose: str = "") -> str:
        """Send a call once; its idempotency key, for `_wait`."""
        self._progress(purpose or f"{name}.{function}")
        address = self.deployment.address(name)
        contract = self._chain.contract(name, address)
        data = bytes.fromhex(contract.encode_abi(function, list(arguments))[2:])
        identity = purpose or ":".join([function, *(str(argument) for argument in arguments)])
        idempotency_key = f"deploy:{address}:{identity}"
        self._outbox.send(Call(address, data, f"{name}.{function}"), idempotency_key)
        return idempotency_key

    def _wait(self, idempotency_keys: list[str]) -> None:
        for idempotency_key in idempotency_keys:
            self._outbox.wait(idempotency_key, self._timeout)


def _verify(chain: Chain, deployment: Deployment) -> None:
    """Every address answers as the contract that it should be."""
    for name in CONTRACTS:
        contract = chain.contract(name, deployment.address(name))
        try:
            version = chain.read(contract.functions.version())
        except PoipError as error:
            raise IntegrityError(f"{name} at {deployment.address(name)} does not answer: {error}") from error
        if not isinstance(version, str) or not version:
            raise IntegrityError(f"{name} at {deployment.address(name)} states the version {version!r}.")


def _read(path: Path) -> Deployment | None:
    """The file's content, None if there is none. Raises ConfigurationError if it is damaged."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path} is too large for a deployment file.")
        body = parse_json_object(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InvalidInput) as error:
        raise ConfigurationError(f"{path} is not a readable deployment file: {error}.") from error
    with _damaged(path):
        if body["schema"] != SCHEMA:
            raise ConfigurationError(f"{path} has the unknown schema {body['schema']!r}; this program reads {SCHEMA}.")
        contracts = {
            str(name): Deployed(
                address=checked("address", entry["address"], f"{name}.address"),
                transaction=str(entry["transaction"]),
                block=int(entry["block"]),
                code_hash=str(entry["code_hash"]),
            )
            for name, entry in body["contracts"].items()
        }
        return Deployment(
            chain_id=checked("uint256", body["chain_id"], "chain_id"),
            genesis=str(body["genesis"]),
            deployer=checked("address", body["deployer"], "deployer"),
            complete=body["complete"] is True,
            contracts=contracts,
        )


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, PoipError) as error:
        raise ConfigurationError(f"{path} is not a deployment file: {error!r}.") from error
