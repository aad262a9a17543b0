"""What the Ape scripts share: the set of contracts, its deployment, the deployment file, accounts and amounts.

Ape skips files that begin with an underscore. The library deploys in its own way (`poip deploy`); this is the same
order of steps for people who work with Ape. It must not be imported by the library, and must not need web3 8.
"""

from __future__ import annotations

import json
import os
import time
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click
from ape import accounts, chain, networks, project
from eth_account.messages import encode_typed_data
from eth_utils import keccak

from poip_chain.economic.parameters import DEVNET_PARAMETERS, PARAMETERS

UNIT = 10**18
INITIAL_SUPPLY = 10**9 * UNIT
MAXIMUM_SUPPLY = 10**10 * UNIT
# Ape's own network lives in this process alone and starts empty.
EPHEMERAL = "local"
ROLE_NODE, ROLE_PEER = 1, 2
SIGNATURE_LIFETIME = 3600
SLASHERS = ("CommitmentLog", "Offences", "Availability")
JUDGES = ("Offences", "Availability", "Accusations")
# Of the deployment file, as poip_chain/chain/deployment.py writes it.
SCHEMA = 1
# Where `poip` looks for it too.
DEFAULT_DEPLOYMENT = Path(os.environ.get("POIP_DATA", "~/.poip")).expanduser() / "deployment.json"


class Amount(click.ParamType):
    """An amount of POIP such as 150 or 0.5, taken exactly; gives wei."""

    name = "POIP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            wei = Decimal(value) * UNIT
        except InvalidOperation:
            self.fail(f"{value!r} is not a number; write an amount of POIP such as 150 or 0.5", param, ctx)
        if not wei.is_finite() or wei <= 0 or wei != wei.to_integral_value():
            self.fail(f"{value!r} must be positive, with at most 18 decimals", param, ctx)
        return int(wei)


def account_named(name: str) -> Any:
    """The Ape account with that alias; `TEST::3` is the fourth account of the test mnemonic."""
    prefix, _, number = name.partition("::")
    if prefix == "TEST" and number.isdigit():
        return accounts.test_accounts[int(number)]
    if name not in accounts.aliases:
        known = ", ".join(accounts.aliases) or "none"
        raise click.UsageError(f"Ape has no account {name!r} (it has: {known}). Make one: ape accounts import {name}")
    return accounts.load(name)


def account_option(flag: str = "--account", default: str = "TEST::0", help: str = "who sends") -> Any:
    """An option that names an Ape account by alias."""
    return click.option(flag, default=default, show_default=True, help=f"Ape account: {help}.")


def deployment_option() -> Any:
    """Where the addresses are written to or read from."""
    return click.option(
        "--deployment",
        type=click.Path(dir_okay=False, path_type=Path),
        default=DEFAULT_DEPLOYMENT,
        show_default=True,
        help="Deployment file with the addresses; not used on Ape's own network.",
    )


def is_ephemeral() -> bool:
    """True on Ape's own network, which is gone when the script ends."""
    return bool(networks.provider.network.name == EPHEMERAL)


def deploy_all(owner: Any, short_windows: bool) -> dict[str, Any]:
    """Deploy and wire every contract from `owner`, who gets the initial supply; contract name -> instance."""

    def deploy(name: str, *arguments: Any) -> Any:
        made[name] = owner.deploy(getattr(project, name), *arguments)
        return made[name]

    made: dict[str, Any] = {}
    token = deploy("PoipToken", owner.address, INITIAL_SUPPLY, MAXIMUM_SUPPLY)
    table = DEVNET_PARAMETERS if short_windows else PARAMETERS
    parameters = deploy("Parameters", [parameter.as_tuple() for parameter in table])
    models = deploy("ModelRegistry")
    registry = deploy("NodeRegistry", token, parameters, models)
    log = deploy("CommitmentLog", registry, models, parameters)
    deploy("PaymentVault", token, log, registry, parameters, owner.address)
    deploy("Offences", log, registry, models, parameters)
    deploy("Availability", token, log, registry, parameters)
    trace_map = deploy("TraceMap")
    referee = deploy("Referee", trace_map)
    scoring = deploy("Scoring", log, models)
    accusations = deploy("Accusations", token, log, registry, models, parameters, scoring, trace_map)
    accusations.initialize(deploy("Contests", accusations, referee, trace_map), sender=owner)
    registry.initialize(log, sender=owner)
    for name in SLASHERS:
        registry.set_slasher(made[name], True, sender=owner)
    for name in JUDGES:
        log.set_judge(made[name], True, sender=owner)
    registry.seal(sender=owner)
    log.seal(sender=owner)
    return made


def save(path: Path, contracts: dict[str, Any], deployer: str) -> None:
    """Write the deployment file in the form that the library's programs read too."""
    entries = {
        name: {
            "address": contract.address,
            "transaction": contract.creation_metadata.txn_hash,
            "block": contract.creation_metadata.block,
            "code_hash": "0x" + keccak(chain.provider.get_code(contract.address)).hex(),
        }
        for name, contract in contracts.items()
    }
    content = {
        "schema": SCHEMA,
        "chain_id": chain.chain_id,
        "genesis": "0x" + bytes(chain.provider.get_block(0).hash).hex(),
        "block": min(entry["block"] for entry in entries.values()),
        "deployer": deployer,
        "complete": True,
        "contracts": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def load(path: Path) -> dict[str, Any]:
    """The contracts of a deployment file, checked against the connected chain."""
    if not path.exists():
        raise click.UsageError(f"There is no deployment file {path}. Run the deploy script, or name it: --deployment")
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA or not content.get("complete"):
        raise click.UsageError(f"{path} is not a complete deployment file. Run the deploy script.")
    genesis = "0x" + bytes(chain.provider.get_block(0).hash).hex()
    if (content["chain_id"], content["genesis"]) != (chain.chain_id, genesis):
        raise click.UsageError(
            f"{path} belongs to another chain than the connected one (chain {chain.chain_id}). "
            "Name another file with --deployment, another network with --network, or deploy anew."
        )
    return {name: getattr(project, name).at(entry["address"]) for name, entry in content["contracts"].items()}


def open_contracts(path: Path, owner: Any) -> dict[str, Any]:
    """The network's contracts; on Ape's own, empty network they are deployed first."""
    if is_ephemeral():
        click.echo("Ape's own network starts empty: deploying first.")
        return deploy_all(owner, short_windows=True)
    return load(path)


def proof_of_possession(registry: Any, key: Any, operator: str, role: int, deadline: int) -> bytes:
    """The key's EIP-712 signature that it is held by whoever registers it."""
    fields = {"operator": "address", "key": "address", "role": "uint8", "deadline": "uint64"}
    message = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "ProofOfPossession": [{"name": name, "type": kind} for name, kind in fields.items()],
        },
        "domain": {
            "name": "PoIP",
            "version": "1",
            "chainId": chain.chain_id,
            "verifyingContract": registry.address,
        },
        "primaryType": "ProofOfPossession",
        "message": {"operator": operator, "key": key.address, "role": role, "deadline": deadline},
    }
    signature = key.sign_message(encode_typed_data(full_message=message))
    if signature is None:
        raise click.ClickException(f"{key.address} did not sign the proof of possession.")
    return bytes(signature.encode_rsv())


def register(registry: Any, operator: Any, node_key: Any, peer_key: Any, endpoint: str, payout: str | None) -> None:
    """Register a node with its three keys; the first node key's address names it."""
    deadline = max(int(time.time()), chain.blocks.head.timestamp) + SIGNATURE_LIFETIME
    registry.register(
        node_key.address,
        payout or operator.address,
        peer_key.address,
        endpoint,
        deadline,
        proof_of_possession(registry, node_key, operator.address, ROLE_NODE, deadline),
        proof_of_possession(registry, peer_key, operator.address, ROLE_PEER, deadline),
        sender=operator,
    )


def add_stake(contracts: dict[str, Any], sender: Any, node: str, amount: int) -> None:
    """Approve and stake `amount` wei of the sender's tokens on a node."""
    balance = contracts["PoipToken"].balanceOf(sender.address)
    if balance < amount:
        raise click.ClickException(
            f"{sender.address} holds {poip(balance)}, less than {poip(amount)}. Send it tokens first."
        )
    contracts["PoipToken"].approve(contracts["NodeRegistry"].address, amount, sender=sender)
    contracts["NodeRegistry"].stake(node, amount, sender=sender)


def rehearsed_node(contracts: dict[str, Any], owner: Any, stake: int = 0) -> str:
    """A node of the test accounts on Ape's own network, staked as asked; its name."""
    node_key, peer_key = accounts.test_accounts[1], accounts.test_accounts[2]
    register(contracts["NodeRegistry"], owner, node_key, peer_key, "http://127.0.0.1:9000", None)
    if stake:
        add_stake(contracts, owner, node_key.address, stake)
    return str(node_key.address)


def report(registry: Any, node: str) -> None:
    """Print what the chain now says about a node."""
    info = registry.node_info(node)
    click.echo(f"node {node}: active {poip(info.active)}, unbonding {poip(info.unbonding)}, locked {poip(info.locked)}")


def poip(wei: int) -> str:
    """An amount for people."""
    return f"{Decimal(wei) / UNIT:f} POIP"
