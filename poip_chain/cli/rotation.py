"""From which receipt on a new node key signs. The old key's signatures from that number on are worth nothing later, so
the number must not be below one that the node has given out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from poip_chain.errors import ConfigurationError, InvalidInput, Unavailable
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Address

if TYPE_CHECKING:
    from poip_chain.cli.context import Context
    from poip_chain.service.node.issued import Issued

MAX_INFO_BYTES = 64 * 1024
INFO_SECONDS = 5.0


class NodePlace(BaseModel):
    """Where a node keeps its database: all that is read of the [node] section here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: Path = Path("~/.poip/node")


def first_of_new_key(context: Context, node: Address, endpoint: str, wanted: int | None) -> int:
    """The first receipt number of a new key: `wanted`, checked as far as the node's database is here, or that
    database's next number.

    Raises InvalidInput if `wanted` would void receipts, ConfigurationError if the number is not fixed because the node
    runs, Unavailable if neither a database nor a node says it.
    """
    network = context.network
    committed = network.log.next_seq(node)
    known = _database(context, node)
    if wanted is not None:
        signed = max(committed, known.next_seq if known else 0)
        if wanted < signed:
            raise InvalidInput(
                f"the node has signed receipts up to number {signed - 1} with its present key, {committed} of them are "
                f"committed: from receipt {wanted} on they would be void.",
                hint=f"Give --next-seq {signed} or more.",
            )
        return wanted
    if known is None:
        _refuse_by_answer(node, endpoint)
    assert known is not None
    if known.running:
        raise _still_signing(node, known.next_seq, 0)
    if known.next_seq < committed:
        raise ConfigurationError(
            f"the node's database knows {known.next_seq} receipts, the chain {committed}: it is an old copy.",
            hint="Restore the newest copy, or give the next number of the node with --next-seq.",
        )
    return known.next_seq


def _database(context: Context, node: Address) -> Issued | None:
    from poip_chain.cli.settings import load_section
    from poip_chain.service.node.issued import issued

    place = load_section(NodePlace, "node", context.config, {"data": context.flags.get("data")})
    default = place.sources["data"] == "default"
    folder = context.settings.data / "node" if default else place.values.data.expanduser()
    domain = context.network.domain("log")
    return issued(folder / "node.db", node=node, chain_id=domain.chain_id, log=domain.verifying_contract)


def _refuse_by_answer(node: Address, endpoint: str) -> None:
    """Raises with what can be said without the node's database: ConfigurationError if the node runs, else Unavailable."""
    import httpx

    try:
        with httpx.stream("GET", endpoint.rstrip("/") + "/v1/info", timeout=INFO_SECONDS) as response:
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_INFO_BYTES:
                    raise InvalidInput(
                        f"{endpoint} answered more than {MAX_INFO_BYTES} bytes.", hint="Give --next-seq."
                    )
        info = _answer(endpoint, body)
        next_seq, running, stated = info["next_seq"], info["running"], info["node"]
    except (httpx.HTTPError, httpx.InvalidURL, KeyError) as error:
        raise Unavailable(
            f"the next receipt number of {node} is not known: its database is not in this data directory, and "
            f"{endpoint} does not say it.",
            hint="Run this with the --data of the node, or give one above the highest number that it has signed with "
            "--next-seq.",
        ) from error
    if stated != node or any(type(n) is not int or not 0 <= n < 2**56 for n in (next_seq, running)):
        raise InvalidInput(f"{endpoint} does not answer as node {node} does.", hint="Give --next-seq.")
    raise _still_signing(node, next_seq, running)


def _answer(endpoint: str, body: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(body)
    except InvalidInput as error:
        raise InvalidInput(f"{endpoint} does not answer as a node does: {error}", hint="Give --next-seq.") from error


def _still_signing(node: Address, next_seq: int, running: int) -> ConfigurationError:
    busy = f" and {running} requests are running" if running else ""
    return ConfigurationError(
        f"node {node} runs: its next receipt has number {next_seq}{busy}. What its present key signs from the first "
        "number of the new key on is void when the new key takes effect.",
        hint="Stop the node, then repeat this with the node's --data. Or give --next-seq, above all that the present "
        f"key will sign (more than {next_seq + running}), and stop the node before it gets there.",
    )
