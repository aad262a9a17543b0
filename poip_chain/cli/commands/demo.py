"""Show the whole network on this machine: answers, receipts, audits, fees, a cheat that loses its stake, the court."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context

if TYPE_CHECKING:
    from poip_chain.cli.local.report import Report

TIME_LIMIT = 480.0
"""Seconds for the scenario once the network is up."""


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path), help="A local safetensors directory; default: the shipped model."
)
@click.option("--directory", type=click.Path(path_type=Path), help="Where the network lives; default: DATA/demo.")
@command_context
def command(context: Context, model: Path | None, directory: Path | None) -> None:
    """Run a devnet, two honest nodes and a cheat (a real vLLM engine each), a gateway and a watchtower; ask questions
    through the OpenAI SDK; follow the money until fees are withdrawn, the cheat is slashed and convicted in court, and a
    liar has lost its bond. Ends by itself.
    """
    from poip_chain.cli.local.network import LocalNetwork
    from poip_chain.cli.local.pulse import Pulse
    from poip_chain.cli.local.report import reconcile, take
    from poip_chain.cli.local.scenario import Scenario

    begin = time.monotonic()
    place = directory or context.settings.data / "demo"

    def tell(text: str) -> None:
        output.note(f"[{time.monotonic() - begin:5.0f} s] {text}")

    with Pulse(tell) as pulse:
        local = LocalNetwork(place, pulse.tell)
        try:
            network = local.start(context.settings.data / "models", model)
            before = take(local, network)
            pulse.tell("asking questions through the OpenAI SDK")
            Scenario(local, network, pulse, TIME_LIMIT).run()
            memory = local.supervisor.peak_memory_bytes
            report = reconcile(before, take(local, network))
        finally:
            pulse.wait_for("all processes to stop")
            pulse.tell("stopping all processes")
            local.supervisor.stop()
    seconds = time.monotonic() - begin
    summary = {**report.to_json(), "seconds": round(seconds, 1), "memory_bytes": memory, "logs": str(place / "logs")}
    (place / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    output.result(summary, lambda: _print(report, summary, place))


def _print(report: Report, summary: dict[str, Any], place: Path) -> None:
    from poip_chain.economic.money import format_amount

    output.table(
        ["who", ">wallet", ">stake", ">escrow", ">earned, rewards, credits", ">gained or lost"],
        [
            (
                name,
                format_amount(h.wallet),
                format_amount(h.stake),
                format_amount(h.escrow),
                format_amount(h.earned + h.rewards + h.credits),
                ("+" if report.change(name) > 0 else "") + format_amount(report.change(name)),
            )
            for name, h in report.after.items()
        ]
        + [("burned", "", "", "", "", format_amount(report.burned))],
        title="who earned and lost what (POIP)",
    )
    click.echo("")
    output.table(
        ["checked against the chain", ">books", ">chain"],
        [(what, format_amount(a), format_amount(b)) for what, (a, b) in report.reconciliation.items()],
    )
    click.echo("")
    click.echo(
        f"{summary['seconds']:.0f} s, {summary['memory_bytes'] / 2**30:.1f} GiB; summary: {place / 'summary.json'}"
    )
