"""Show and set the protocol's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context, sending_context
from poip_chain.cli.main import group

if TYPE_CHECKING:
    from poip_chain.economic.types import ParameterInfo

command = group("params", "The protocol's numbers: each has hard bounds, and every change makes a new revision.")


@command.command("list")
@command_context
def list_parameters(context: Context) -> None:
    """List all numbers with their bounds."""
    parameters = context.network.parameters
    found = parameters.all()
    output.result(
        {"revision": parameters.revision(), "parameters": [_data(info) for info in found]},
        lambda: output.table(
            ["name", ">value", "unit", ">minimum", ">maximum"],
            [[info.name, readable(info), info.unit, info.minimum, info.maximum] for info in found],
        ),
    )


@command.command("show")
@click.argument("name")
@command_context
def show(context: Context, name: str) -> None:
    """Show one number."""
    info = context.network.parameters.describe(name)
    output.result(_data(info), lambda: output.fields({**_data(info), "value": readable(info)}))


@command.command("set")
@click.argument("name")
@click.argument("value", type=click.IntRange(min=0))
@sending_context
def set_value(context: Context, name: str, value: int) -> None:
    """Set the number NAME to VALUE (in its unit; wei for amounts). By the owner of Parameters only."""
    parameters = context.network.parameters
    old = parameters.describe(name)
    title = f"set {name} from {old.value} to {value} {old.unit}"
    context.transact(
        title,
        parameters.set_value(name, value),
        question=f"{title.capitalize()}? What is already committed keeps the old value.",
        name=name,
        old_value=str(old.value),
        new_value=str(value),
    )


def readable(info: ParameterInfo) -> str:
    """A value with its meaning for people: rates in per cent, amounts in POIP."""
    from poip_chain.economic.money import format_amount, format_ppm

    if info.unit == "ppm":
        return f"{info.value} ({format_ppm(info.value)})"
    if info.unit == "wei" and info.value:
        return f"{info.value} ({format_amount(info.value)})"
    return str(info.value)


def _data(info: ParameterInfo) -> dict[str, str]:
    return {
        "name": info.name,
        "value": str(info.value),
        "unit": info.unit,
        "minimum": str(info.minimum),
        "maximum": str(info.maximum),
    }
