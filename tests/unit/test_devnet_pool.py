"""The devnet's transaction pool: order, nonce gaps, replacement, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from poip_chain.chain.devnet import pool as pool_module
from poip_chain.chain.devnet.errors import TransactionRejected
from poip_chain.chain.devnet.pool import TransactionPool


@dataclass(frozen=True)
class Waiting:
    """What the pool looks at of a transaction."""

    sender: bytes
    nonce: int
    max_fee_per_gas: int = 100
    max_priority_fee_per_gas: int = 10

    @property
    def hash(self) -> bytes:
        return repr(self).encode()


def waiting(sender: str, nonce: int, fee: int = 100, tip: int = 10) -> Any:
    return Waiting(sender.encode(), nonce, fee, tip)


def filled(*transactions: Any) -> TransactionPool:
    pool = TransactionPool()
    for transaction in transactions:
        pool.add(cast(Any, transaction))
    return pool


def picked(pool: TransactionPool, base_fee: int = 0, nonces: dict[str, int] | None = None) -> list[tuple[str, int]]:
    order = []
    picker = pool.pick(base_fee, lambda sender: (nonces or {}).get(sender.decode(), 0))
    for transaction in picker:
        order.append((transaction.sender.decode(), transaction.nonce))
        picker.included(transaction)
    return order


def test_best_payer_first_but_nonces_in_order() -> None:
    pool = filled(waiting("a", 0, tip=1), waiting("a", 1, tip=50), waiting("b", 0, tip=20), waiting("c", 0, tip=20))
    assert picked(pool) == [("b", 0), ("c", 0), ("a", 0), ("a", 1)]


def test_a_gap_holds_back_what_follows() -> None:
    pool = filled(waiting("a", 0), waiting("a", 2))
    assert picked(pool) == [("a", 0)]
    assert picked(pool, nonces={"a": 2}) == [("a", 2)]


def test_too_low_a_fee_holds_back_what_follows() -> None:
    pool = filled(waiting("a", 0, fee=99), waiting("a", 1, fee=1000), waiting("b", 0, fee=100))
    assert picked(pool, base_fee=100) == [("b", 0)]


def test_the_tip_is_what_the_base_fee_leaves() -> None:
    pool = filled(waiting("a", 0, fee=100, tip=100), waiting("b", 0, fee=1000, tip=30))
    assert picked(pool, base_fee=80) == [("b", 0), ("a", 0)]


def test_what_is_not_included_brings_nothing_after_it() -> None:
    pool = filled(waiting("a", 0), waiting("a", 1))
    assert [transaction.nonce for transaction in pool.pick(0, lambda _: 0)] == [0]


@pytest.mark.parametrize("fee,tip,taken", [(110, 11, True), (109, 11, False), (110, 10, False), (1000, 10, False)])
def test_replacement_needs_ten_percent_on_both_fees(fee: int, tip: int, taken: bool) -> None:
    old, new = waiting("a", 0, 100, 10), waiting("a", 0, fee, tip)
    pool = filled(old)
    if taken:
        pool.add(new)
    else:
        with pytest.raises(TransactionRejected, match="replacement transaction underpriced"):
            pool.add(new)
    assert list(pool) == [new if taken else old]
    assert pool.get(old.hash) == (None if taken else old)


def test_known_transactions_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_TRANSACTIONS_PER_SENDER", 2)
    monkeypatch.setattr(pool_module, "MAX_TRANSACTIONS", 3)
    pool = filled(waiting("a", 0), waiting("a", 1))
    with pytest.raises(TransactionRejected, match="already known"):
        pool.add(waiting("a", 0))
    with pytest.raises(TransactionRejected, match="the sender has 2"):
        pool.add(waiting("a", 2))
    pool.add(waiting("a", 1, fee=200, tip=20))  # a replacement needs no room
    pool.add(waiting("b", 0))
    with pytest.raises(TransactionRejected, match="full"):
        pool.add(waiting("c", 0))


def test_forgetting_used_nonces_and_copying() -> None:
    pool = filled(waiting("a", 0), waiting("a", 1), waiting("a", 2))
    copied = pool.copy()
    pool.forget_below(b"a", 2)
    assert sorted(pool.of_sender(b"a")) == [2]
    pool.remove(waiting("a", 2))
    pool.remove(waiting("a", 2))  # twice is nothing
    assert (len(pool), pool.senders()) == (0, ())
    assert sorted(copied.of_sender(b"a")) == [0, 1, 2]
