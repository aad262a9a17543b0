"""Deploy and wire the contracts: `ape run deploy --network ethereum:devnet:node`."""

from __future__ import annotations

from pathlib import Path

import click
from ape.cli import ConnectedProviderCommand

from scripts import _network


@click.command(cls=ConnectedProviderCommand)
@_network.account_option(help="deploys, owns the contracts and gets the initial supply")
@_network.deployment_option()
@click.option("--short-windows", is_flag=True, help="The devnet's windows of seconds instead of days.")
@click.option("--overwrite", is_flag=True, help="Replace an existing deployment file.")
def cli(account: str, deployment: Path, short_windows: bool, overwrite: bool) -> None:
    """Deploy every contract, wire them, seal them, and write the deployment file."""
    if deployment.exists() and not overwrite and not _network.is_ephemeral():
        raise click.UsageError(f"{deployment} exists. Deploy anew with --overwrite, or name another: --deployment")
    owner = _network.account_named(account)
    contracts = _network.deploy_all(owner, short_windows or _network.is_ephemeral())
    for name, contract in contracts.items():
        click.echo(f"{name:20} {contract.address}")
    if _network.is_ephemeral():
        click.echo("This was Ape's own network: it ends with the script, so no deployment file was written.")
    else:
        _network.save(deployment, contracts, owner.address)
        click.echo(f"written to {deployment}")
