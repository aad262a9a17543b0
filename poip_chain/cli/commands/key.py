"""Make and list key files (keystore v3)."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context
from poip_chain.cli.main import group
from poip_chain.errors import InvalidInput

command = group("key", "Key files: one for each role. A key itself never appears on a command line or on screen.")

MINIMUM_PASSWORD = 8


@command.command("new")
@click.argument("name")
@click.option("--password-file", type=click.Path(path_type=Path), help="Take the password from this file (mode 0600).")
@click.option(
    "--development",
    is_flag=True,
    help="For devnets: a random password is kept in NAME.password beside the key, so nothing asks for it.",
)
@click.option(
    "--account", type=click.IntRange(0, 999), help="With --development: this account of the well-known mnemonic."
)
@command_context
def new(context: Context, name: str, password_file: Path | None, development: bool, account: int | None) -> None:
    """Make the key NAME in the data directory.

    The password, of 8 characters or more, comes from --password-file, POIP_PASSWORD, or the terminal.
    """
    from poip_chain.chain import keys

    if account is not None and not development:
        raise click.UsageError("--account is for --development keys only: everybody knows them.")
    path = context.new_key_path(name)
    if development:
        existed = path.exists()
        key = keys.create_development_key(path, account)
        if existed:
            output.note(f"{path} was there already.")
    else:
        key = keys.create(path, _new_password(path, password_file))
    output.result(
        {"name": path.stem, "address": key.address, "file": str(path)}, f"{path.stem}: {key.address} in {path}"
    )


def _new_password(path: Path, password_file: Path | None) -> str:
    import os
    import sys

    from poip_chain.chain.keys import PASSWORD_VARIABLE, password_from

    if password_file is None and PASSWORD_VARIABLE not in os.environ and sys.stdin.isatty():
        password = str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    else:
        password = password_from(password_file)(path)
    if len(password) < MINIMUM_PASSWORD:
        raise InvalidInput(
            f"the password is shorter than {MINIMUM_PASSWORD} characters.",
            hint="It comes from --password-file, POIP_PASSWORD, or the terminal; keys of devnets: --development.",
        )
    return password


@command.command("list")
@command_context
def list_keys(context: Context) -> None:
    """List the keys in the data directory."""
    from poip_chain.chain.keys import address_of, permissions_problem

    rows = []
    for path in sorted(context.settings.keys.glob("*.json")):
        rows.append({"name": path.stem, "address": address_of(path), "problem": permissions_problem(path)})
    output.result(
        {"keys": rows},
        lambda: output.table(
            ["name", "address", "problem"],
            [list(row.values()) for row in rows],
            empty=f"no keys in {context.settings.keys}",
        ),
    )


@command.command("show")
@click.argument("name")
@command_context
def show(context: Context, name: str) -> None:
    """Show the address of a key, and what it holds if the chain can be reached."""
    from poip_chain.chain.keys import permissions_problem
    from poip_chain.economic.money import format_amount
    from poip_chain.errors import PoipError

    path = context.key_path(name)
    address = context.address(name)
    data: dict[str, object] = {"name": path.stem, "address": address, "file": str(path)}
    lines: list[tuple[str, object]] = [("address", address), ("file", path)]
    problem = permissions_problem(path)
    if problem:
        output.warning(f"{problem} Run: chmod 600 {path}")
    try:
        tokens, coin = context.network.token.balance(address), context.chain.balance(address)
    except PoipError as error:
        output.note(f"Balances are not shown: {error}")
    else:
        data |= {"tokens": str(tokens), "coin": str(coin)}
        lines += [("tokens", format_amount(tokens)), ("coin for gas", format_amount(coin, symbol="ETH"))]
    output.result(data, lambda: output.fields(lines))
