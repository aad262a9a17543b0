"""Add and withdraw the stake of a node."""

from __future__ import annotations

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, key_context, sending_context, when
from poip_chain.cli.main import group

command = group("stake", "The stake of a node: what it loses if it cheats. Locked stake stands behind pending batches.")

PERMIT_SECONDS = 3600


@command.command("add")
@click.argument("node")
@click.argument("amount", type=AMOUNT)
@sending_context
def add(context: Context, node: str, amount: int) -> None:
    """Add AMOUNT to the stake of NODE, from the wallet of --key. Anyone may add."""
    from poip_chain.economic.money import format_amount

    network, address = context.network, context.node(node)
    context.need_tokens(context.key.address, amount)
    deadline = context.chain.timestamp() + PERMIT_SECONDS
    v, r, s = network.token.permit(context.key, network.registry.address, amount, deadline)
    title = f"stake {format_amount(amount)} on {address}"
    context.transact(
        title,
        network.registry.stake_with_permit(address, amount, deadline, v, r, s),
        question=f"{title.capitalize()} from {context.key.address}?",
        node=address,
        amount=str(amount),
    )


@command.command("unbond")
@click.argument("node")
@click.argument("amount", type=AMOUNT)
@sending_context
def unbond(context: Context, node: str, amount: int) -> None:
    """Start to take AMOUNT of free stake out of NODE; by its operator. It stays slashable until it is withdrawn."""
    from poip_chain.economic.money import format_amount

    network, address = context.network, context.node(node)
    period = network.parameters.value("unbonding_period")
    title = f"unbond {format_amount(amount)} of {address}"
    context.transact(
        title,
        network.registry.unbond(address, amount),
        question=f"{title.capitalize()}? It can be withdrawn after {period} seconds.",
        node=address,
        amount=str(amount),
    )


@command.command("cancel")
@click.argument("node")
@click.argument("unbonding_id", type=click.IntRange(min=0))
@sending_context
def cancel(context: Context, node: str, unbonding_id: int) -> None:
    """Make the unbonding UNBONDING_ID of NODE active stake again; by its operator."""
    address = context.node(node)
    title = f"cancel unbonding {unbonding_id} of {address}"
    context.transact(title, context.network.registry.cancel_unbond(address, unbonding_id), node=address)


@command.command("withdraw")
@click.argument("node")
@sending_context
def withdraw(context: Context, node: str) -> None:
    """Pay out the stake of NODE that has finished unbonding, to the node's payout address."""
    network, address = context.network, context.address(node)
    info = network.registry.info(address)
    title = f"withdraw unbonded stake of {address} to {info.payout}"
    context.transact(
        title, network.registry.withdraw(address), question=f"{title.capitalize()}?", node=address, payout=info.payout
    )


@command.command("show")
@click.argument("node", required=False)
@key_context
def show(context: Context, node: str | None) -> None:
    """Show the stake of NODE: active, locked, free, and what is on its way out."""
    from poip_chain.economic.money import format_amount

    registry, address = context.network.registry, context.address(node)
    info, free, unbondings = registry.info(address), registry.free_stake(address), registry.unbondings(address)
    data = {
        "node": address,
        "active": str(info.active),
        "locked": str(info.locked),
        "free": str(free),
        "unbonding": [{"id": u.id, "amount": str(u.amount), "withdrawable_at": u.withdrawable_at} for u in unbondings],
        "jailed_until": info.jailed_until,
    }

    def text() -> None:
        output.fields(
            {
                "node": address,
                "active stake": format_amount(info.active),
                "  locked": format_amount(info.locked),
                "  free": format_amount(free),
                "unbonding": format_amount(info.unbonding),
                "jailed until": when(info.jailed_until),
            }
        )
        if unbondings:
            output.table(
                [">id", ">amount", "withdrawable from"],
                [[u.id, format_amount(u.amount), when(u.withdrawable_at)] for u in unbondings],
            )

    output.result(data, text)
