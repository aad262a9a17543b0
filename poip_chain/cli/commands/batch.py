"""Show committed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context, when
from poip_chain.cli.main import group
from poip_chain.errors import NotFound

if TYPE_CHECKING:
    from poip_chain.economic.types import BatchStatus
    from poip_chain.spec.objects import Batch

command = group("batch", "Batches: what nodes have committed on chain, pending, final or convicted.")


@command.command("list")
@click.option("--node", help="Only this node's (an address or the name of a key).")
@click.option("--status", type=click.Choice(["pending", "final", "convicted"]), help="Only those with this status.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="The newest so many.")
@command_context
def list_batches(context: Context, node: str | None, status: str | None, limit: int) -> None:
    """List batches, newest last."""
    from poip_chain.economic.money import format_amount

    log, wanted = context.network.log, context.address(node) if node else None
    topics = [None, "0x" + wanted[2:].rjust(64, "0").lower()] if wanted else []
    found: list[tuple[Batch, BatchStatus]] = []
    for arguments in reversed(log.events("BatchCommitted", context.network.deployment.block, topics=topics)):
        batch = log.batch_of(arguments)
        state = log.status_of(batch)
        if status is None or state.name.lower() == status:
            found.append((batch, state))
        if len(found) == limit:
            break
    found.reverse()
    output.result(
        {"batches": [_data(batch, state) for batch, state in found]},
        lambda: output.table(
            [">id", "status", "node", ">receipts", ">fees", ">lock", "window ends"],
            [
                [
                    b.id,
                    s.name.lower(),
                    b.node,
                    b.count,
                    format_amount(b.total_fee),
                    format_amount(b.lock),
                    when(b.window_end),
                ]
                for b, s in found
            ],
            empty="no batches",
        ),
    )


@command.command("show")
@click.argument("batch_id", type=click.IntRange(min=1))
@command_context
def show(context: Context, batch_id: int) -> None:
    """Show one batch: its numbers, its beacon and which receipts its audit selects."""
    from poip_chain.spec.objects import audit_indices

    log = context.network.log
    found = log.find(batch_id, context.network.deployment.block)
    if found is None:
        raise NotFound(f"there is no batch {batch_id}.", hint="`poip batch list` shows all.")
    batch, locator = found
    beacon = log.beacon_of(batch)
    selected = audit_indices(beacon, batch.id, batch.count, batch.audit_rate_ppm) if beacon else None
    window_end = log.window_end_of(batch)
    data = {
        **_data(batch, log.status_of(batch)),
        "window_extended_to": window_end if window_end > batch.window_end else None,
        "locator": locator,
        "open_cases": log.open_cases(batch_id),
        "beacon": "0x" + beacon.hex() if beacon else None,
        "selected": selected,
    }

    def text() -> None:
        from poip_chain.economic.money import format_amount, format_ppm

        readable = {
            **data,
            "total_fee": format_amount(batch.total_fee),
            "node_cum": format_amount(batch.node_cum),
            "lock": format_amount(batch.lock),
            "audit_rate_ppm": format_ppm(batch.audit_rate_ppm),
            "committed_at": when(batch.committed_at),
            "window_end": when(batch.window_end),
            "window_extended_to": when(window_end) if window_end > batch.window_end else "not extended",
            "beacon": data["beacon"] or "not submitted yet",
            "selected": "unknown until the beacon" if selected is None else ", ".join(map(str, selected)),
        }
        output.fields(readable)

    output.result(data, text)


def _data(batch: Batch, status: BatchStatus) -> dict[str, Any]:
    return {"status": status.name.lower(), **batch.to_json()}
