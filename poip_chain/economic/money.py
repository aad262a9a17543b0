"""Amounts for people: '1.5 POIP' to wei and back, exactly. The one place where amounts are parsed and printed."""

from __future__ import annotations

import re
from decimal import Decimal

from poip_chain.errors import InvalidInput

DECIMALS = 18
TOKEN = 10**DECIMALS
"""One POIP in wei."""
SYMBOL = "POIP"
MAX_AMOUNT = 2**192 - 1

_AMOUNT = re.compile(r"(?P<digits>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)


def parse_amount(text: str, *, name: str = "amount") -> int:
    """'1.5', '1.5 POIP', '250 gwei' or '7 wei' as wei; a number without a unit is in POIP.

    Raises InvalidInput for anything else, for more than 18 decimals, and for amounts of 2**192 wei and more.
    """
    match = _AMOUNT.fullmatch(text.strip().replace("_", ""))
    if match is None or len(text) > 100:
        raise InvalidInput(
            f"{name} must be an amount such as '1.5 POIP' or '250 wei', not {text[:60]!r}.", hint="It is not negative."
        )
    units = {"": DECIMALS, SYMBOL.lower(): DECIMALS, "gwei": 9, "wei": 0}
    unit = match["unit"].lower()
    if unit not in units:
        raise InvalidInput(f"{name} has the unknown unit {match['unit']!r}.", hint=f"Use {SYMBOL}, gwei or wei.")
    whole, _, fraction = match["digits"].partition(".")
    decimals = units[unit]
    fraction = fraction.rstrip("0")
    if len(fraction) > decimals:
        raise InvalidInput(f"{name} {text!r} is finer than one wei.", hint=f"{SYMBOL} has {DECIMALS} decimals.")
    amount = int(whole + fraction.ljust(decimals, "0"))
    if amount > MAX_AMOUNT:
        raise InvalidInput(f"{name} {text!r} is larger than any amount can be.")
    return amount


def format_amount(wei: int, *, symbol: str = SYMBOL) -> str:
    """Wei as '1.5 POIP', all digits kept; '-' in front of a negative one (a loss)."""
    sign = "-" if wei < 0 else ""
    whole, fraction = divmod(abs(wei), TOKEN)
    digits = f"{whole:,}".replace(",", "_") if whole >= 10**9 else str(whole)
    decimals = f".{fraction:018d}".rstrip("0") if fraction else ""
    return f"{sign}{digits}{decimals} {symbol}".rstrip()


def format_price(wei_per_token: int) -> str:
    """A price in wei per token as POIP per million tokens."""
    return f"{format_amount(wei_per_token * 1_000_000)} per million tokens"


def format_ppm(ppm: int) -> str:
    """Parts per million as per cent: 100000 -> '10 %'."""
    return f"{Decimal(ppm) / 10_000:f}".rstrip("0").rstrip(".") + " %" if ppm % 10_000 else f"{ppm // 10_000} %"
