"""What answered challenges cost a watchtower: bounded for each node and period, whatever the node answers or when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.proof.cases import LossLimit
from poip_chain.proof.publication import Chunk
from poip_chain.proof.settings import WatchtowerSettings
from poip_chain.proof.store import NOTE, AuditState, WatchtowerStore, open_store
from poip_chain.spec.objects import Batch, Part
from poip_chain.spec.types import Address

NODE = Address("0x1111111111111111111111111111111111111111")
OTHER = Address("0x2222222222222222222222222222222222222222")
CHUNK: Chunk = (Part.OUTPUT, 0)
BATCH = Batch(1, NODE, bytes(32), 1, b"r" * 32, 0, 200, 10, 10, 5, 10**6, 1, 7, 1000, 1100)
BOND, DAY, WINDOW = 100, 86_400, 600
COST = BOND // 4
PLENTY = 10**9


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WatchtowerStore]:
    with open_store(tmp_path) as opened:
        opened.add_batch(BATCH)
        opened.add_batch(BATCH.replace(id=2, node=OTHER))
        yield opened


def limit(now: int, amount: int = 4 * COST, node: Address = NODE) -> LossLimit:
    return LossLimit(node, amount, now - DAY)


def ask(store: WatchtowerStore, position: int, now: int, *, node: Address = NODE, amount: int = 4 * COST) -> bool:
    """Reserve and open; the challenge's id is its position."""
    batch = 1 if node == NODE else 2
    if not store.reserve_bond(batch, position, CHUNK, BOND, PLENTY, "k", loss=limit(now, amount, node)):
        return False
    store.open_challenge(batch, position, CHUNK, 1000 * batch + position, now + WINDOW, BOND)
    return True


def test_a_node_that_answers_everything_takes_no_more_than_its_loss_budget(store: WatchtowerStore) -> None:
    """Each bond comes back less a quarter: without a loss budget this goes on until nothing is left."""
    taken = 0
    for position in range(200):
        if ask(store, position, now=5000 + position):
            store.close_challenge(1000 + position, "answered")
            taken += COST
    assert taken == 4 * COST == store.losses(NODE, 0)
    assert store.bonds_standing() == 0
    assert store.losses_by_node() == {NODE: taken}


def test_one_nodes_losses_are_not_another_nodes(store: WatchtowerStore) -> None:
    for position in range(5):
        ask(store, position, 5000)
    assert not ask(store, 9, 5000)
    assert ask(store, 9, 5000, node=OTHER)


def test_time_refills_it(store: WatchtowerStore) -> None:
    for position in range(4):
        assert ask(store, position, 5000)
        store.close_challenge(1000 + position, "answered")
    assert not ask(store, 4, 5000 + WINDOW + DAY)
    assert ask(store, 4, 5000 + WINDOW + DAY + 1)


def test_what_still_stands_never_grows_old(store: WatchtowerStore) -> None:
    for position in range(4):
        assert ask(store, position, 5000)
    assert not ask(store, 4, 5000 + 10 * DAY)


@pytest.mark.parametrize("end", ["resolved", "lost race", "released"])
def test_what_the_contract_did_not_take_is_free_again(store: WatchtowerStore, end: str) -> None:
    assert ask(store, 0, 5000, amount=COST)
    assert not ask(store, 1, 5000, amount=COST)
    if end == "resolved":
        store.close_challenge(1000, "resolved")
    elif end == "lost race":
        store.lost_race(1, 0, CHUNK)
    else:
        store.unchallenge(1000)
        store.release_bond(1, 0, CHUNK)
    assert store.losses(NODE, 0) == 0
    assert ask(store, 1, 5000, amount=COST)


def test_an_answer_that_a_reorganisation_takes_away_is_counted_once(store: WatchtowerStore) -> None:
    assert ask(store, 0, 5000)
    for state in ("answered", "resolved", "answered"):
        store.close_challenge(1000, state)
        assert store.losses(NODE, 0) == (0 if state == "resolved" else COST)
        store.reopen_challenge(1000)
        assert store.losses(NODE, 0) == COST


def test_the_bond_that_the_contract_took_counts(store: WatchtowerStore) -> None:
    """Governance may raise the bond between the reservation and its block."""
    assert store.reserve_bond(1, 0, CHUNK, BOND, PLENTY, "k", loss=limit(5000))
    store.open_challenge(1, 0, CHUNK, 7, 5600, 3 * BOND)
    assert store.losses(NODE, 0) == 3 * COST


def test_other_peoples_bonds_are_not_ours_to_lose(store: WatchtowerStore) -> None:
    store.open_challenge(1, 0, CHUNK, 7, 5600)
    store.close_challenge(7, "answered")
    assert store.losses(NODE, 0) == 0 and store.losses_by_node() == {}


def test_losses_survive_a_kill(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.add_batch(BATCH)
        assert ask(store, 0, 5000, amount=COST)
        store.close_challenge(1000, "answered")
    with open_store(tmp_path) as store:
        assert not ask(store, 1, 5000, amount=COST)


def test_reservations_side_by_side_stay_within_the_loss_budget(tmp_path: Path) -> None:
    with open_store(tmp_path) as one, open_store(tmp_path) as two:
        one.add_batch(BATCH)
        granted: list[int] = []
        start = threading.Barrier(6)

        def reserve(number: int) -> None:
            start.wait()
            for position in range(4):
                place = (1, 10 * number + position, CHUNK, BOND, PLENTY)
                if (one, two)[number % 2].reserve_bond(*place, loss=limit(5000)):
                    granted.append(position)

        threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 4


@given(st.lists(st.tuples(st.integers(1, DAY), st.integers(0, WINDOW)), max_size=25))
@settings(max_examples=60)
def test_no_period_sees_more_taken_than_the_budget(challenges: list[tuple[int, int]]) -> None:
    """Challenges some time apart, each answered after a while of the node's choice."""
    store = WatchtowerStore(Path(":memory:"))
    try:
        store.add_batch(BATCH)
        now, due, taken = 5000, dict[int, int](), list[int]()
        for position, (pause, delay) in enumerate(challenges):
            now += pause
            for earlier in [p for p, at in due.items() if at <= now]:
                taken.append(due.pop(earlier))
                store.close_challenge(1000 + earlier, "answered")
            if ask(store, position, now):
                due[position] = now + delay
        taken += due.values()
        for first in taken:
            assert sum(first <= at <= first + DAY for at in taken) <= 4
    finally:
        store.close()


# the sample


def withheld(store: WatchtowerStore, count: int) -> None:
    store.set_selected(1, b"\x01" * 32, range(count))
    for position in range(count):
        store.delay_audit(1, position, 0.0)


def asked(store: WatchtowerStore, count: int) -> list[int]:
    """The receipts challenged of a node that answers each at once."""
    found = []
    for position in range(count):
        if store.may_ask(1, position):
            assert ask(store, position, 5000, amount=PLENTY)
            store.close_challenge(1000 + position, "answered")
            found.append(position)
    return found


def test_of_many_withheld_receipts_a_sample_is_asked_for(store: WatchtowerStore) -> None:
    withheld(store, 100)
    found = asked(store, 100)
    assert found[:2] == [0, 1]
    assert 27 <= len(found) <= 29  # two as they come, and 27 by the secret, two of which may be the same
    assert asked_again(store, 100) == found


def asked_again(store: WatchtowerStore, count: int) -> list[int]:
    return [position for position in range(count) if store.may_ask(1, position)]


def test_few_withheld_receipts_are_all_asked_for(store: WatchtowerStore) -> None:
    withheld(store, 3)
    assert asked(store, 3) == [0, 1, 2]


def test_the_sample_is_secret_and_stays_over_a_restart(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        with open_store(tmp_path / name) as store:
            store.add_batch(BATCH)
            withheld(store, 100)
            first = asked(store, 100)
        with open_store(tmp_path / name) as store:
            assert asked_again(store, 100) == first
        found.append(first)
    assert found[0] != found[1]


# what is reported


def test_why_a_record_is_not_challenged_stays_with_its_audit_until_it_is_over(store: WatchtowerStore) -> None:
    withheld(store, 2)
    store.note_audit(1, 0, "not challenged: loss budget of node x used")
    audit = store.audits(AuditState.FETCH)[0]
    assert audit.detail == {NOTE: "not challenged: loss budget of node x used"}
    store.note_audit(1, 0, None)
    assert store.audits(AuditState.FETCH)[0].detail == {}
    store.finish_audit(1, 0, "honest", {"tokens": 3})
    store.note_audit(1, 0, "too late")
    assert store.audits(AuditState.DONE)[0].detail == {"tokens": 3}


def test_the_loss_budget_follows_the_bond_budget_unless_it_is_set(tmp_path: Path) -> None:
    common = {"rpc_url": "http://x", "deployment": tmp_path}
    assert WatchtowerSettings(**common).losable() == 0
    assert WatchtowerSettings(**common, bond_budget=10).losable() == 2
    assert WatchtowerSettings(**common, bond_budget=10, loss_budget=0).losable() == 0
    assert WatchtowerSettings(**common, bond_budget=10, loss_budget=7).losable() == 7
