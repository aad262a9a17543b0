"""Amounts for people: exact both ways, and nothing ambiguous is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.economic.money import MAX_AMOUNT, format_amount, format_ppm, format_price, parse_amount
from poip_chain.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "wei"),
    [
        ("1", 10**18),
        ("1.5", 15 * 10**17),
        ("1.5 POIP", 15 * 10**17),
        ("1.5poip", 15 * 10**17),
        (" 0.000000000000000001 ", 1),
        ("7 wei", 7),
        ("2.5 gwei", 25 * 10**8),
        ("1_000", 1000 * 10**18),
        ("0", 0),
        ("1.500000000000000000000", 15 * 10**17),
    ],
)
def test_parse(text: str, wei: int) -> None:
    assert parse_amount(text) == wei


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        "1e3",
        "0x10",
        ".5",
        "1.",
        "1,5",
        "1.5 wei",
        "1 eth",
        "NaN",
        "inf",
        "1 2",
        "٣",
        "1" * 90,
        "1" * 200,
        "0.0000000000000000001",
        "1.0000000001 gwei",
        "1\n2",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_amount(text)


@given(st.integers(0, MAX_AMOUNT))
def test_round_trip(wei: int) -> None:
    assert parse_amount(format_amount(wei)) == wei
    assert parse_amount(f"{wei} wei") == wei
    assert format_amount(-wei) == (f"-{format_amount(wei)}" if wei else "0 POIP")


def test_formats() -> None:
    assert format_amount(10**18) == "1 POIP" and format_amount(1) == "0.000000000000000001 POIP"
    assert format_amount(1234567890 * 10**18) == "1_234_567_890 POIP"
    assert format_price(5 * 10**11) == "0.5 POIP per million tokens"
    assert [format_ppm(ppm) for ppm in (100_000, 5_000, 1, 1_000_000)] == ["10 %", "0.5 %", "0.0001 %", "100 %"]
