"""Stake tokens on a node: `ape run stake --node ADDRESS --amount 150 --network ethereum:devnet:node`."""

from __future__ import annotations

from pathlib import Path

import click
from ape.cli import ConnectedProviderCommand

from scripts import _network


@click.command(cls=ConnectedProviderCommand)
@_network.account_option(help="pays; anyone may add to a node's stake")
@click.option("--node", help="The node's name (address of its first node key). Not needed on Ape's own network.")
@click.option("--amount", type=_network.Amount(), required=True, help="How much to stake, in POIP.")
@_network.deployment_option()
def cli(account: str, node: str | None, amount: int, deployment: Path) -> None:
    """Add to a node's stake."""
    sender = _network.account_named(account)
    contracts = _network.open_contracts(deployment, sender)
    if node is None:
        if not _network.is_ephemeral():
            raise click.UsageError("Name the node: --node ADDRESS")
        node = _network.rehearsed_node(contracts, sender)
    _network.add_stake(contracts, sender, node, amount)
    _network.report(contracts["NodeRegistry"], node)
