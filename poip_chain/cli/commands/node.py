"""Register and manage inference nodes"""

from __future__ import annotations

from typing import Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, HASH, Context, command_context, sending_context
from poip_chain.cli.main import group
from poip_chain.errors import ConfigurationError, InvalidInput

command = group(
    "node",
    "Inference nodes. A node has three keys: the operator (owns the stake; --key), the node key (signs receipts), and the "
    "peer key. It is named by the address of its first node key.",
)

SIGNATURE_SECONDS = 3600


@command.command("register")
@click.option("--node-key", required=True, help="Key (name or file) that signs receipts.")
@click.option("--peer-key", required=True, help="Key (name or file) of the node's network identity.")
@click.option("--endpoint", required=True, help="URL at which clients reach the node.")
@click.option("--payout", help="Who gets earnings and stake back; default: the operator.")
@click.option("--stake", type=AMOUNT, default="0", help="Stake to add at once, from the operator's wallet.")
@sending_context
def register(context: Context, node_key: str, peer_key: str, endpoint: str, payout: str | None, stake: int) -> None:
    """Register a node; --key is its operator."""
    from poip_chain.economic.money import format_amount
    from poip_chain.spec.objects import ProofOfPossession

    if not endpoint.startswith(("http://", "https://")) or len(endpoint.encode()) > 256:
        raise InvalidInput(f"the endpoint must be an http(s) URL of at most 256 bytes, not {endpoint[:80]!r}.")
    network, operator = context.network, context.key
    signer, peer = context.load_key(node_key), context.load_key(peer_key)
    if len({operator.address, signer.address, peer.address}) != 3:
        raise ConfigurationError("operator, node key and peer key must be three different keys.")
    context.need_tokens(operator.address, stake)
    receiver = context.address(payout) if payout else operator.address
    deadline = context.chain.timestamp() + SIGNATURE_SECONDS
    domain = network.domain("registry")
    calls = [
        network.registry.register(
            signer.address,
            receiver,
            peer.address,
            endpoint,
            deadline,
            ProofOfPossession(operator.address, signer.address, 1, deadline).sign(domain, signer.private_key),
            ProofOfPossession(operator.address, peer.address, 2, deadline).sign(domain, peer.private_key),
        )
    ]
    title = f"register node {signer.address}"
    if stake:
        v, r, s = network.token.permit(operator, network.registry.address, stake, deadline)
        calls.append(network.registry.stake_with_permit(signer.address, stake, deadline, v, r, s))
        title += f" with a stake of {format_amount(stake)}"
    context.transact_all(
        title,
        calls,
        question=f"{title.capitalize()}? Paid by {operator.address}." if stake else "",
        node=signer.address,
        operator=operator.address,
        stake=str(stake),
    )


@command.command("list")
@click.option("--model", "model_id", type=HASH, help="Only those that offer this model.")
@command_context
def list_nodes(context: Context, model_id: bytes | None) -> None:
    """List the registered nodes."""
    from poip_chain.economic.money import format_amount

    registry, now = context.network.registry, context.chain.timestamp()
    rows: list[dict[str, Any]] = []
    for node in registry.nodes():
        info, offers = registry.info(node), registry.offers(node)
        if model_id is not None and all(offer.model_id != model_id for offer in offers):
            continue
        state = (
            "left"
            if info.deregistered_at
            else "jailed"
            if info.jailed_until > now
            else "active"
            if registry.is_active(node)
            else "inactive"
        )
        rows.append(
            {
                "node": node,
                "state": state,
                "stake": str(info.active),
                "locked": str(info.locked),
                "offers": len(offers),
                "endpoint": info.endpoint,
            }
        )
    output.result(
        {"nodes": rows},
        lambda: output.table(
            ["node", "state", ">stake", ">locked", ">offers", "endpoint"],
            [
                [
                    r["node"],
                    r["state"],
                    format_amount(int(r["stake"])),
                    format_amount(int(r["locked"])),
                    r["offers"],
                    r["endpoint"],
                ]
                for r in rows
            ],
            empty="no nodes",
        ),
    )


@command.command("offer")
@click.argument("node")
@click.option("--model", "model_id", type=HASH, required=True, help="The model's id.")
@click.option("--profile", "version", type=click.IntRange(1), default=1, show_default=True, help="Its profile version.")
@click.option("--input-price", type=AMOUNT, default="0", help="For a million prompt tokens, e.g. '2 POIP'.")
@click.option("--output-price", type=AMOUNT, default="0", help="For a million output tokens.")
@click.option("--remove", is_flag=True, help="Take the offer back instead.")
@sending_context
def offer(
    context: Context, node: str, model_id: bytes, version: int, input_price: int, output_price: int, remove: bool
) -> None:
    """Offer a model on NODE at a price; by its operator (--key)."""
    from poip_chain.economic.types import Offer
    from poip_chain.spec.types import Hash32

    network, address = context.network, context.node(node)
    if remove:
        title = f"take back the offer of model 0x{model_id.hex()} on {address}"
        context.transact(title, network.registry.remove_offer(address, model_id), node=address)
        return
    new = Offer(Hash32(model_id), version, _per_token(input_price), _per_token(output_price))
    title = f"offer model 0x{model_id.hex()} on {address}"
    context.transact(
        title,
        network.registry.set_offer(address, new),
        node=address,
        input_price=str(new.input_price),
        output_price=str(new.output_price),
    )


def _per_token(per_million: int) -> int:
    price, rest = divmod(per_million, 1_000_000)
    if rest:
        raise InvalidInput(
            f"a price of {per_million} wei for a million tokens is no whole number of wei for one token."
        )
    return price


@command.command("rotate-key")
@click.argument("node")
@click.option("--new-key", required=True, help="Key (name or file) that signs from then on.")
@click.option(
    "--next-seq",
    type=click.IntRange(0, 2**56 - 1),
    help="First receipt number of the new key; default: the next one in the node's database (--data).",
)
@sending_context
def rotate_key(context: Context, node: str, new_key: str, next_seq: int | None) -> None:
    """Give NODE a new node key; by its operator (--key). The old key stays valid for the receipts before.

    Stop the node first, and start it with the new key when the rotation delay is over.
    """
    from poip_chain.cli.rotation import first_of_new_key
    from poip_chain.spec.objects import ProofOfPossession

    network, address = context.network, context.address(node)
    info = network.registry.info(address)
    signer = context.load_key(new_key)
    first = first_of_new_key(context, address, info.endpoint, next_seq)
    delay = network.parameters.value("key_rotation_delay")
    deadline = context.chain.timestamp() + SIGNATURE_SECONDS
    proof = ProofOfPossession(context.key.address, signer.address, 1, deadline)
    signature = proof.sign(network.domain("registry"), signer.private_key)
    title = f"let {signer.address} sign for {address} from receipt {first} on"
    context.transact(
        title,
        network.registry.rotate_node_key(address, signer.address, first, deadline, signature),
        node=address,
        new_key=signer.address,
        next_seq=first,
        delay=delay,
    )
    if not context.dry_run:
        output.note(
            f"In {delay} seconds only {signer.address} counts from receipt {first} on; the node takes no requests for these "
            f"with its old key. Then start it with the new key and the setting node.node = {address}."
        )


@command.command("endpoint")
@click.argument("node")
@click.argument("url")
@sending_context
def endpoint(context: Context, node: str, url: str) -> None:
    """Change the URL at which clients reach NODE; by its operator."""
    address = context.node(node)
    context.transact(
        f"set the endpoint of {address} to {url}", context.network.registry.set_endpoint(address, url), node=address
    )


@command.command("unjail")
@click.argument("node")
@sending_context
def unjail(context: Context, node: str) -> None:
    """Let NODE work again after its jail period; by its operator."""
    address = context.node(node)
    context.transact(f"unjail {address}", context.network.registry.unjail(address), node=address)


@command.command("deregister")
@click.argument("node")
@sending_context
def deregister(context: Context, node: str) -> None:
    """Take NODE out of the network for good; its free stake unbonds. By its operator."""
    address = context.node(node)
    title = f"deregister {address}"
    context.transact(
        title,
        context.network.registry.deregister(address),
        question=f"{title.capitalize()}? This cannot be undone.",
        node=address,
    )
