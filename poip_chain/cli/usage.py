"""What a wrong command line most likely meant. Works on click's errors alone; runs nothing.

Click takes a negative number for an option, and an option before the command for one of the group's; its own words for
both ("No such option") help nobody.
"""

from __future__ import annotations

import re

import click

from poip_chain.cli.context import AMOUNT, sending_context

_NUMBER = re.compile(r"-[0-9.].*")


def explained(error: click.UsageError) -> click.UsageError:
    """The error in better words where we have some, otherwise as it is."""
    if not isinstance(error, click.NoSuchOption):
        return error
    command = None if error.ctx is None else error.ctx.command
    if _NUMBER.fullmatch(error.option_name):
        takes_amount = command is not None and any(
            parameter.type is AMOUNT for parameter in command.params if isinstance(parameter, click.Argument)
        )
        what = "an amount must be positive" if takes_amount else "a number must not be negative here"
        return click.UsageError(f"{what}; this one begins with '{error.option_name}'.", error.ctx)
    if isinstance(command, click.Group) and error.option_name in _shared_options():
        path = "poip" if error.ctx is None else error.ctx.command_path
        return click.UsageError(
            f"{error.option_name} stands before the command; options come after it: "
            f"`{path} COMMAND ... {error.option_name} ...`.",
            error.ctx,
        )
    return error


def _shared_options() -> frozenset[str]:
    """The options that most commands take."""

    @click.command("any")
    @sending_context
    def command(context: object) -> None:
        """Never run."""

    return frozenset(option for parameter in command.params for option in parameter.opts)
