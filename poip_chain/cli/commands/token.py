"""Balances and transfers of the network's token."""

from __future__ import annotations

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, key_context, sending_context
from poip_chain.cli.main import group

command = group("token", "The network's token, POIP.")


@command.command("balance")
@click.argument("account", required=False)
@key_context
def balance(context: Context, account: str | None) -> None:
    """Show what ACCOUNT (an address or the name of a key) holds."""
    from poip_chain.economic.money import format_amount

    address = context.address(account)
    tokens, coin = context.network.token.balance(address), context.chain.balance(address)
    output.result(
        {"address": address, "tokens": str(tokens), "coin": str(coin)},
        lambda: output.fields(
            {
                "address": address,
                "tokens": format_amount(tokens),
                "coin for gas": format_amount(coin, symbol="ETH"),
            }
        ),
    )


@command.command("transfer")
@click.argument("receiver")
@click.argument("amount", type=AMOUNT)
@sending_context
def transfer(context: Context, receiver: str, amount: int) -> None:
    """Send AMOUNT ('1.5', '1.5 POIP', '100 wei') to RECEIVER (an address or the name of a key)."""
    from poip_chain.economic.money import format_amount

    address = context.address(receiver)
    context.need_tokens(context.key.address, amount)
    title = f"send {format_amount(amount)} to {address}"
    context.transact(
        title,
        context.network.token.transfer(address, amount),
        question=f"{title} from {context.key.address}?".capitalize(),
        amount=str(amount),
        receiver=address,
    )
