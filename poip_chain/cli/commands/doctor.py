"""Check chain, contracts, clock, keys, balances, ports, model and engine, each with its fix."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Also recompute the hashes of this model directory.")
@click.option("--engine", "engine_url", metavar="URL", help="Also ask this vLLM server whether it is ready.")
@command_context
def command(context: Context, model: Path | None, engine_url: str | None) -> None:
    """Look for what would go wrong, before money is at stake. Exit code 4 if a check fails."""
    from poip_chain.cli.diagnosis import examine

    with output.progress("checking"):
        found = list(examine(context, model, engine_url))
    output.result(
        {"checks": [diagnosis.to_json() for diagnosis in found]},
        lambda: output.table(["check", "state", "what", "fix"], [(d.name, d.state, d.detail, d.fix) for d in found]),
    )
    failed = [diagnosis.name for diagnosis in found if diagnosis.state == "failed"]
    if failed:
        raise output.CheckFailed(f"failed: {', '.join(failed)}.")
