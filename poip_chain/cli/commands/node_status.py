"""Show what a running node does, has earned and is owed"""

from __future__ import annotations

from typing import Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context, when

MAX_ANSWER_BYTES = 64 * 1024


@click.command("status")
@click.option("--url", default="http://127.0.0.1:8700", show_default=True, help="The node's address.")
@command_context
def command(context: Context, url: str) -> None:
    """Ask the node at URL, and the chain about it. What holds up its income is named under `trouble`."""
    from poip_chain.economic.money import format_amount
    from poip_chain.spec.eip712 import checked
    from poip_chain.spec.types import Address

    base = url.rstrip("/")
    info, health = _get(f"{base}/v1/info"), _get(f"{base}/healthz")
    node = Address(checked("address", info.get("node"), "the node's name"))
    network = context.network
    stake, earned = network.registry.info(node), network.vault.earned(node)
    data = {
        "node": node,
        "url": base,
        "health": health,
        "info": info,
        "chain": {
            "active_stake": str(stake.active),
            "locked_stake": str(stake.locked),
            "jailed_until": stake.jailed_until,
            "committed_receipts": network.log.next_seq(node),
            "withdrawable": str(earned),
        },
    }

    def text() -> None:
        batches, shares = health.get("batches", {}), health.get("collections", {})
        output.fields(
            {
                "node": node,
                "status": health.get("status", "?"),
                "running": f"{info.get('running')} of {info.get('capacity')} requests",
                "receipts": f"{health.get('receipts')} signed, {health.get('unbatched')} in no batch yet",
                "batches": ", ".join(f"{number} {name}" for name, number in batches.items()),
                "payments": ", ".join(f"{number} {name}" for name, number in shares.items()),
                "fees of all receipts": format_amount(int(health.get("fees", 0))),
                "withdrawable": format_amount(earned),
                "stake": f"{format_amount(stake.active)}, of it locked {format_amount(stake.locked)}",
                "jailed until": when(stake.jailed_until),
            }
        )
        for job, trouble in health.get("trouble", {}).items():
            output.warning(f"{job}: {trouble}")

    output.result(data, text)


def _get(url: str) -> dict[str, Any]:
    """A JSON object from the node, also with status 503 (a node that is down still says why). Raises Unavailable."""
    import httpx

    from poip_chain.errors import PoipError, Unavailable
    from poip_chain.spec.strict_json import parse_json_object

    body = b""
    try:
        with httpx.stream("GET", url, timeout=10.0) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"{url} answered more than {MAX_ANSWER_BYTES} bytes.")
        return parse_json_object(body)
    except (httpx.HTTPError, httpx.InvalidURL, PoipError) as error:
        raise Unavailable(f"there is no node at {url}: {error}", hint="Start it with `poip node run`.") from error
