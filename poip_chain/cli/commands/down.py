"""Stop what `poip up` has started."""

from __future__ import annotations

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context


@click.command()
@command_context
def command(context: Context) -> None:
    """Stop the local network's processes. Nothing to stop is no error."""
    from poip_chain.cli.local.processes import stop_running

    stopped = stop_running(context.settings.data / "local")
    output.result({"stopped": stopped}, f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")
