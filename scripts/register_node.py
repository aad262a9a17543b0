"""Register a node: `ape run register_node --node-key ALIAS --peer-key ALIAS --network ethereum:devnet:node`."""

from __future__ import annotations

from pathlib import Path

import click
from ape.cli import ConnectedProviderCommand

from scripts import _network


@click.command(cls=ConnectedProviderCommand)
@_network.account_option(help="the operator, who will own the stake")
@_network.account_option("--node-key", "TEST::1", "signs receipts; its address names the node")
@_network.account_option("--peer-key", "TEST::2", "the node's identity among its peers")
@click.option("--endpoint", default="http://127.0.0.1:9000", show_default=True, help="Where clients reach the node.")
@click.option("--payout", help="Address that earnings and withdrawn stake go to; the operator's own if not given.")
@_network.deployment_option()
def cli(account: str, node_key: str, peer_key: str, endpoint: str, payout: str | None, deployment: Path) -> None:
    """Register a node with three keys; node key and peer key prove by a signature that they are held."""
    operator = _network.account_named(account)
    registry = _network.open_contracts(deployment, operator)["NodeRegistry"]
    key = _network.account_named(node_key)
    _network.register(registry, operator, key, _network.account_named(peer_key), endpoint, payout)
    _network.report(registry, key.address)
