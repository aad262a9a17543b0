"""Where money is, and how to move it"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, key_context, sending_context, when
from poip_chain.cli.main import group

if TYPE_CHECKING:
    from poip_chain.spec.types import Address

command = group("funds", "Where is my money? Wallet, escrow, stake, earnings, rewards and bonds of an account.")

PERMIT_SECONDS = 3600


@command.command("show")
@click.argument("account", required=False)
@key_context
def show(context: Context, account: str | None) -> None:
    """Show everything that ACCOUNT (an address or the name of a key) owns, wherever it is, summed up."""
    from poip_chain.economic.money import format_amount

    address = context.address(account)
    places = _places(context, address)
    total = sum(place["amount"] for place in places)
    coin = context.chain.balance(address)
    data = {
        "address": address,
        "coin": str(coin),
        "places": [{**place, "amount": str(place["amount"])} for place in places],
        "total": str(total),
    }

    def text() -> None:
        output.fields({"account": address, "coin for gas": format_amount(coin, symbol="ETH")})
        click.echo("")
        output.table(
            ["place", ">amount", "available", "how to get it"],
            [[p["place"], format_amount(p["amount"]), p["available"], p["command"]] for p in places],
            empty="no tokens anywhere",
        )
        click.echo(f"\ntotal {format_amount(total)}")

    output.result(data, text)


def _places(context: Context, address: Address) -> list[dict[str, Any]]:
    """Every place that holds tokens of an account; amounts in wei."""
    network, now = context.network, context.chain.timestamp()
    places: list[dict[str, Any]] = []

    def add(place: str, amount: int, available: str, command: str) -> None:
        if amount:
            places.append({"place": place, "amount": amount, "available": available, "command": command})

    add("wallet", network.token.balance(address), "now", "poip token transfer")
    for node in network.registry.nodes():
        escrow = network.vault.escrow(address, node)
        add(f"escrow with {node}", escrow.available, "after a thaw", f"poip funds thaw {node} AMOUNT")
        ready = "now" if escrow.thaw_end <= now else when(escrow.thaw_end)
        add(f"thawing escrow with {node}", escrow.thawing, ready, f"poip funds withdraw --escrow {node}")
        info = network.registry.info(node)
        if info.operator == address:
            free = network.registry.free_stake(node)
            add(f"free stake of {node}", free, "after unbonding", f"poip stake unbond {node} AMOUNT")
            add(f"locked stake of {node}", info.active - free, "when its batches are final", "")
            for unbonding in network.registry.unbondings(node):
                ready = "now" if unbonding.withdrawable_at <= now else when(unbonding.withdrawable_at)
                add(f"unbonding stake of {node}", unbonding.amount, ready, f"poip stake withdraw {node}")
        if info.payout == address:
            add(f"earnings of {node}", network.vault.earned(node), "now", f"poip funds withdraw --earnings {node}")
    add("rewards", network.registry.rewards(address), "now", "poip funds withdraw --rewards")
    add("returned bonds", network.availability.claimable(address), "now", "poip funds withdraw --bonds")
    return places


@command.command("deposit")
@click.argument("node")
@click.argument("amount", type=AMOUNT)
@sending_context
def deposit(context: Context, node: str, amount: int) -> None:
    """Put AMOUNT from the wallet of --key into its escrow with NODE, to pay for answers."""
    from poip_chain.economic.money import format_amount

    network, address = context.network, context.address(node)
    network.registry.info(address)
    context.need_tokens(context.key.address, amount)
    deadline = context.chain.timestamp() + PERMIT_SECONDS
    v, r, s = network.token.permit(context.key, network.vault.address, amount, deadline)
    title = f"deposit {format_amount(amount)} with {address}"
    context.transact(
        title,
        network.vault.deposit_with_permit(address, amount, deadline, v, r, s),
        question=f"{title.capitalize()} from {context.key.address}?",
        node=address,
        amount=str(amount),
    )


@command.command("thaw")
@click.argument("node")
@click.argument("amount", type=AMOUNT)
@sending_context
def thaw(context: Context, node: str, amount: int) -> None:
    """Start to take AMOUNT out of the escrow with NODE, besides what is thawing already; 0 cancels the thaw.

    Each thaw starts the clock anew for all of it.
    """
    from poip_chain.economic.money import format_amount

    network, address = context.network, context.address(node)
    if amount == 0:
        context.transact(f"cancel the thaw with {address}", network.vault.cancel_thaw(address), node=address)
        return
    period = network.parameters.value("thaw_period")
    title = f"thaw {format_amount(amount)} with {address}"
    context.transact(
        title,
        network.vault.thaw(address, amount),
        question=f"{title.capitalize()}? It can be withdrawn after {period} seconds.",
        node=address,
        amount=str(amount),
    )


@command.command("withdraw")
@click.option("--escrow", metavar="NODE", help="What has thawed with this node.")
@click.option("--earnings", metavar="NODE", help="What this node has earned; goes to its payout address.")
@click.option("--rewards", is_flag=True, help="Rewards for convictions.")
@click.option("--bonds", is_flag=True, help="Returned bonds of availability challenges.")
@click.option("--treasury", is_flag=True, help="Protocol fees; go to the treasury.")
@sending_context
def withdraw(
    context: Context, escrow: str | None, earnings: str | None, rewards: bool, bonds: bool, treasury: bool
) -> None:
    """Pay out what is due: one or several of the options."""
    from poip_chain.economic.money import format_amount
    from poip_chain.errors import Refused

    network = context.network
    parts: list[tuple[str, int, Any]] = []
    if escrow:
        node = context.address(escrow)
        held = network.vault.escrow(context.key.address, node)
        parts.append((f"escrow with {node}", held.thawing, lambda: network.vault.withdraw(node)))
    if earnings:
        earner = context.address(earnings)
        parts.append(
            (f"earnings of {earner}", network.vault.earned(earner), lambda: network.vault.withdraw_earnings(earner))
        )
    if rewards:
        parts.append(("rewards", network.registry.rewards(context.key.address), network.registry.claim_reward))
    if bonds:
        parts.append(("bonds", network.availability.claimable(context.key.address), network.availability.claim))
    if treasury:
        parts.append(("protocol fees", network.vault.treasury_due(), network.vault.withdraw_treasury))
    if not parts:
        raise click.UsageError("say what to withdraw: --escrow, --earnings, --rewards, --bonds or --treasury.")
    due = [(what, amount, build) for what, amount, build in parts if amount]
    if not due:
        raise Refused("there is nothing to withdraw there.", hint="`poip funds show` shows where money is.")
    title = "withdraw " + " and ".join(f"{format_amount(amount)} ({what})" for what, amount, _ in due)
    context.transact_all(
        title,
        [build() for _, _, build in due],
        question=f"{title.capitalize()}?",
        amounts={what: str(amount) for what, amount, _ in due},
    )
