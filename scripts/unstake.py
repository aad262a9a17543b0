"""Take stake out of a node: `ape run unstake --node ADDRESS --amount 50`, and later `--withdraw`."""

from __future__ import annotations

from pathlib import Path

import click
from ape.cli import ConnectedProviderCommand

from scripts import _network

# As many unbondings as a node can have open.
MAXIMUM_COUNT = 32


@click.command(cls=ConnectedProviderCommand)
@_network.account_option(help="the node's operator")
@click.option("--node", help="The node's name (address of its first node key). Not needed on Ape's own network.")
@click.option("--amount", type=_network.Amount(), help="How much to take out, in POIP.")
@click.option("--withdraw", is_flag=True, help="Pay out what has finished unbonding.")
@_network.deployment_option()
def cli(account: str, node: str | None, amount: int | None, withdraw: bool, deployment: Path) -> None:
    """Start to take stake out (it stays slashable for the unbonding period), or withdraw what is due."""
    if amount is None and not withdraw:
        raise click.UsageError("Say how much to take out (--amount), or withdraw what is due (--withdraw).")
    operator = _network.account_named(account)
    contracts = _network.open_contracts(deployment, operator)
    registry = contracts["NodeRegistry"]
    if node is None:
        if not _network.is_ephemeral():
            raise click.UsageError("Name the node: --node ADDRESS")
        node = _network.rehearsed_node(contracts, operator, stake=amount or _network.UNIT)
    if amount is not None:
        registry.unbond(node, amount, sender=operator)
    if withdraw:
        registry.withdraw(node, MAXIMUM_COUNT, sender=operator)
    _network.report(registry, node)
