"""Deploy the network's contracts"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, sending_context
from poip_chain.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from poip_chain.chain.keys import Key


@click.command("deploy")
@click.option(
    "--profile",
    type=click.Choice(["devnet", "standard"]),
    default="standard",
    show_default=True,
    help="devnet: windows of seconds, funded development accounts, and account 0 as deployer unless --key is given.",
)
@click.option(
    "--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Start a protocol number at this value."
)
@click.option("--treasury", help="Who gets the protocol fee; default: the deployer.")
@click.option("--admin", help="Who is offered the ownership of the contracts; default: the deployer keeps it.")
@sending_context
def command(
    context: Context, profile: str, parameters: tuple[str, ...], treasury: str | None, admin: str | None
) -> None:
    """Deploy all contracts, wire and seal them, and write the deployment file.

    Run again, it continues where it stopped, or finds everything in place and does nothing.
    """
    from poip_chain.chain.deployment import CONTRACTS, deploy
    from poip_chain.economic.profiles import deployment_settings

    settings = deployment_settings(
        profile,
        values=_values(parameters),
        treasury=context.address(treasury) if treasury else None,
        admin=context.address(admin) if admin else None,
    )
    path, key = context.settings.deployment_path, _deployer(context, profile)
    if context.dry_run:
        output.result(
            {"dry_run": "deploy", "deployer": key.address, "contracts": list(CONTRACTS), "file": str(path)},
            f"would deploy {', '.join(CONTRACTS)} from {key.address} into {path}; nothing was sent.",
        )
        return
    if profile != "devnet" and not path.exists():
        output.confirm(f"Deploy {len(CONTRACTS)} contracts to chain {context.chain.chain_id}?", yes=context.yes)
    with output.progress("deploying") as show:
        deployment = deploy(
            context.chain,
            key,
            settings,
            path,
            outbox_path=context.settings.data / "outbox" / f"{key.address}.db",
            progress=show,
            timeout=context.settings.transaction_timeout,
        )
    data = {"file": str(path), "chain_id": deployment.chain_id, "block": deployment.block}

    def text() -> None:
        output.table(["contract", "address"], list(deployment.addresses.items()))
        click.echo(f"\nchain {deployment.chain_id}, from block {deployment.block}; written to {path}")

    output.result({**data, "addresses": deployment.addresses}, text)


def _deployer(context: Context, profile: str) -> Key:
    """The key that deploys: --key, or on a devnet the first development account."""
    if context.key_name is None and profile == "devnet":
        from poip_chain.chain.keys import create_development_key

        if context.chain.chain_id != 31337:
            raise ConfigurationError(
                f"chain {context.chain.chain_id} is no development chain, so account 0 has nothing there.",
                hint="Name the deployer with --key.",
            )
        return create_development_key(context.key_path("deployer"), 0)
    return context.key


def _values(texts: tuple[str, ...]) -> dict[str, int]:
    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not value.isdecimal():
            raise InvalidInput(f"--param takes NAME=VALUE with a whole number, not {text!r}.")
        values[name] = int(value)
    return values
