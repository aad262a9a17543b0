"""The watchtower's memory: the budget holds, a reorganisation replaces what it must, contradictions are kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.chain.rpc import Call
from poip_chain.proof.cases import LossLimit
from poip_chain.proof.publication import Chunk
from poip_chain.proof.store import AuditState, BatchState, FilingState, WatchtowerStore, open_store
from poip_chain.spec.objects import Batch, Part, Receipt
from poip_chain.spec.types import ZERO_ADDRESS, Address

NODE = Address("0x1111111111111111111111111111111111111111")
OTHER = Address("0x2222222222222222222222222222222222222222")
CHUNK: Chunk = (Part.OUTPUT, 0)
UNBOUND = LossLimit(NODE, 10**9, 0)
BATCH = Batch(1, NODE, bytes(32), 1, b"r" * 32, 0, 2, 10, 10, 5, 10**6, 1, 7, 1000, 1100)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WatchtowerStore]:
    with open_store(tmp_path) as opened:
        yield opened


def receipt(seq: int, tag: bytes = b"q", node: Address = NODE, issued_at: int = 1000) -> Receipt:
    return Receipt(node, seq, tag.ljust(32, b"\0"), bytes(32), bytes(32), 1, 1, 5, ZERO_ADDRESS, 5, 5, issued_at)


def entries(*receipts: Receipt) -> list[dict[str, object]]:
    return [{"receipt": r.to_json(), "signature": "0x" + "00" * 65} for r in receipts]


def audited(store: WatchtowerStore, batch: Batch = BATCH, positions: tuple[int, ...] = (0, 1)) -> None:
    store.add_batch(batch)
    store.set_receipts(batch.id, entries(receipt(0, b"a"), receipt(1, b"b")))
    store.set_selected(batch.id, b"\x01" * 32, positions)


# bonds


def test_a_reservation_is_made_once_and_given_back(store: WatchtowerStore) -> None:
    assert store.reserve_bond(1, 0, CHUNK, 6, 10, "k", loss=UNBOUND)
    assert store.reserve_bond(1, 0, CHUNK, 6, 10, "k", loss=UNBOUND)
    assert store.bonds_standing() == 6
    assert not store.reserve_bond(1, 1, CHUNK, 6, 10, loss=UNBOUND)
    store.release_bond(1, 0, CHUNK)
    assert store.bonds_standing() == 0
    assert store.reserve_bond(1, 1, CHUNK, 10, 10, loss=UNBOUND)


def test_an_open_challenge_is_not_reserved_again(store: WatchtowerStore) -> None:
    store.open_challenge(1, 0, CHUNK, 9, 2000)
    assert not store.reserve_bond(1, 0, CHUNK, 1, 10, loss=UNBOUND)
    assert store.bonds_standing() == 0  # the bond is somebody else's
    store.release_bond(1, 0, CHUNK)
    assert [c.state for c in store.challenges()] == ["open"]


def test_a_lost_race_frees_the_bond_only_when_it_is_told(store: WatchtowerStore) -> None:
    assert store.reserve_bond(1, 0, CHUNK, 6, 10, "k", loss=UNBOUND)
    store.open_challenge(1, 0, CHUNK, 9, 2000)
    assert store.bonds_standing() == 6
    store.lost_race(1, 0, CHUNK)
    assert store.bonds_standing() == 0


def test_a_challenge_that_a_reorganisation_takes_away_keeps_its_bond(store: WatchtowerStore) -> None:
    assert store.reserve_bond(1, 0, CHUNK, 6, 10, "k", loss=UNBOUND)
    store.open_challenge(1, 0, CHUNK, 9, 2000, 6)
    store.open_challenge(1, 1, CHUNK, 10, 2000)
    store.unchallenge(9)
    store.unchallenge(10)
    assert [(c.position, c.state, c.challenge_id, c.bond) for c in store.challenges()] == [(0, "reserved", None, 6)]
    store.open_challenge(1, 0, CHUNK, 12, 2000, 6)
    assert store.close_challenge(9, "answered") is None
    closed = store.close_challenge(12, "answered")
    assert closed is not None and closed.state == "answered" and store.bonds_standing() == 0


def test_the_budget_survives_a_restart(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.reserve_bond(1, 0, CHUNK, 6, 10, loss=UNBOUND)
    with open_store(tmp_path) as store:
        assert not store.reserve_bond(2, 0, CHUNK, 6, 10, loss=UNBOUND)


def test_reservations_side_by_side_stay_within_the_budget(tmp_path: Path) -> None:
    """Several threads of one process, and a second connection as another process has it."""
    with open_store(tmp_path) as one, open_store(tmp_path) as two:
        granted: list[int] = []
        start = threading.Barrier(6)

        def reserve(number: int) -> None:
            start.wait()
            for position in range(4):
                if (one, two)[number % 2].reserve_bond(number, position, CHUNK, 3, 20, loss=UNBOUND):
                    granted.append(3)

        threads = [threading.Thread(target=reserve, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(granted) == 18 == one.bonds_standing()


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "open", "open_other", "answered", "resolved", "release", "unchallenge"]),
        st.integers(0, 3),
        st.integers(1, 5),
    ),
    max_size=30,
)


@given(operations)
@settings(max_examples=60)
def test_whatever_happens_the_budget_is_not_exceeded(steps: list[tuple[str, int, int]]) -> None:
    store = WatchtowerStore(Path(":memory:"))
    try:
        for action, position, bond in steps:
            number = position + 100
            if action == "reserve":
                store.reserve_bond(1, position, CHUNK, bond, 7, "k", loss=UNBOUND)
            elif action == "open":
                known = [c for c in store.challenges(1, position) if c.state == "reserved"]
                if known:
                    store.open_challenge(1, position, CHUNK, number, 5, known[0].bond)
            elif action == "open_other":
                if not store.challenges(1, position):
                    store.open_challenge(1, position, CHUNK, number, 5)
            elif action == "release":
                store.release_bond(1, position, CHUNK)
            elif action == "unchallenge":
                if any(c.state == "open" for c in store.challenges(1, position)):
                    store.unchallenge(number)
            else:
                store.close_challenge(number, action)
            assert store.bonds_standing() <= 7
    finally:
        store.close()


# batches and audits


def test_a_reorganisation_replaces_a_batch_and_all_that_hangs_on_it(store: WatchtowerStore) -> None:
    audited(store)
    store.finish_audit(1, 0, "honest", {})
    store.reserve_bond(1, 1, CHUNK, 6, 10, loss=UNBOUND)
    store.add_filing("k", 1, "fee", FilingState.FOUND, {}, Call(NODE, b"x", "d"))
    store.set_batch_status(1, "removed")
    store.add_batch(BATCH)  # the same again: everything is kept
    row = store.batch(1)
    assert row is not None and (row.status, row.state) == ("pending", BatchState.SELECTED)
    assert len(store.audits(batch_id=1)) == 2
    store.add_batch(BATCH.replace(block_number=9))
    row = store.batch(1)
    assert row is not None and (row.state, row.has_receipts, row.beacon) == (BatchState.NEW, False, None)
    assert store.audits() == [] and store.challenges() == [] and store.bonds_standing() == 0
    assert [f.state for f in store.filings()] == [FilingState.MOOT]


def test_another_draw_keeps_what_is_found_out(store: WatchtowerStore) -> None:
    audited(store, BATCH.replace(count=3), (0, 1))
    store.finish_audit(1, 0, "honest", {})
    store.set_selected(1, b"\x02" * 32, [2])
    assert [(a.position, a.state) for a in store.audits()] == [(0, AuditState.DONE), (2, AuditState.FETCH)]
    store.unselect(1)
    row = store.batch(1)
    assert row is not None and (row.state, row.beacon) == (BatchState.RECEIPTS, None)


def test_a_verdict_is_given_once(store: WatchtowerStore) -> None:
    audited(store)
    store.finish_audit(1, 0, "honest", {"tokens": 3}, Path("e.json"))
    store.finish_audit(1, 0, "withheld", {})
    store.move_audit(1, 0, AuditState.CHALLENGED, AuditState.FETCH)
    (audit,) = [a for a in store.audits() if a.position == 0]
    assert (audit.verdict, audit.detail, audit.evidence, audit.state) == (
        "honest", {"tokens": 3}, "e.json", AuditState.DONE,
    )  # fmt: skip


def test_only_due_audits_come_up(store: WatchtowerStore) -> None:
    audited(store)
    store.delay_audit(1, 0, 50.0)
    assert [a.position for a in store.audits(AuditState.FETCH, due=49)] == [1]
    assert [(a.position, a.attempts) for a in store.audits(AuditState.FETCH, due=50)] == [(0, 1), (1, 0)]


# contradictions


def test_contradicting_receipts_make_a_pair(store: WatchtowerStore) -> None:
    store.add_batch(BATCH)
    first, second = receipt(0, b"a"), receipt(1, b"b")
    store.set_receipts(1, entries(first, second))
    assert store.equivocations() == []
    same_seq, same_request = receipt(0, b"c"), receipt(7, b"b")
    for other in (same_seq, same_request):
        store.observe(other, b"s" * 65)
        store.observe(other, b"s" * 65)
    pairs = [{a.receipt, b.receipt} for a, b in store.equivocations()]
    assert pairs == [{first, same_seq}, {second, same_request}]
    (committed, handed_in), _ = store.equivocations(unjudged=True)
    assert (committed.batch_id, committed.position, handed_in.batch_id) == (1, 0, None)
    store.judged(committed, handed_in)
    assert len(store.equivocations(unjudged=True)) == 1


def test_the_same_receipt_twice_is_no_pair_and_keeps_its_checked_signature(store: WatchtowerStore) -> None:
    first = receipt(0, b"a")
    store.observe(first, b"s" * 65)
    store.add_batch(BATCH)
    store.set_receipts(1, entries(first, receipt(1, b"b")))
    store.observe(receipt(0, b"c"), b"t" * 65)
    ((a, _),) = store.equivocations()
    assert (a.receipt, a.signature, a.batch_id) == (first, b"s" * 65, 1)


def test_a_receipt_of_another_node_in_a_batch_is_no_evidence_against_it(store: WatchtowerStore) -> None:
    """A stranger's batch must neither frame a node nor spoil the evidence against it."""
    store.add_batch(BATCH)
    framed = receipt(0, b"a", OTHER)
    store.set_receipts(1, entries(framed, receipt(1, b"b")))
    store.observe(receipt(0, b"c", OTHER), b"s" * 65)
    assert store.equivocations() == []
    store.observe(framed, b"t" * 65)
    ((a, b),) = store.equivocations()
    assert (a.batch_id, b.batch_id) == (None, None)


def test_a_replaced_batch_has_its_pairs_judged_again(store: WatchtowerStore) -> None:
    store.add_batch(BATCH)
    store.set_receipts(1, entries(receipt(0, b"a"), receipt(1, b"b")))
    store.observe(receipt(0, b"c"), b"s" * 65)
    ((a, b),) = store.equivocations()
    store.judged(a, b)
    store.add_batch(BATCH.replace(block_number=9))
    ((a, _),) = store.equivocations(unjudged=True)
    assert a.batch_id is None


def test_numbers_beyond_sqlite_are_kept(store: WatchtowerStore) -> None:
    huge = receipt(2**64 - 1, b"a", issued_at=2**64 - 1)
    store.observe(huge, b"s" * 65)
    store.observe(receipt(2**64 - 1, b"b"), b"s" * 65)
    ((a, _),) = store.equivocations()
    assert a.receipt == huge


def test_a_flood_of_contradictions_makes_few_pairs(store: WatchtowerStore) -> None:
    for number in range(30):
        store.observe(receipt(0, str(number).encode()), b"s" * 65)
    assert len(store.equivocations()) <= 30 * 8


# filings


def test_a_filing_is_recorded_once_with_its_transaction(store: WatchtowerStore) -> None:
    call = Call(NODE, b"\x01\x02", "Offences.prove")
    assert store.add_filing("k", 1, "fee", FilingState.FOUND, {"n": 1}, call)
    assert not store.add_filing("k", 1, "fee", FilingState.PROPOSED, {}, None)
    (filing,) = store.filings(FilingState.FOUND)
    assert (filing.call, filing.detail, filing.attempts) == (call, {"n": 1}, 0)
    store.delay_filing("k", 20.0)
    assert store.filings(FilingState.FOUND, due=19) == []
    assert [f.attempts for f in store.filings(FilingState.FOUND, FilingState.SENT, due=20)] == [1]


# what is old


def test_what_nobody_can_be_punished_by_is_dropped(store: WatchtowerStore) -> None:
    audited(store)
    for position in (0, 1):
        store.finish_audit(1, position, "honest", {})
    store.observe(receipt(9, b"z", issued_at=500), b"s" * 65)
    store.observe(receipt(9, b"y", issued_at=1500), b"s" * 65)
    store.observe(receipt(8, b"x", issued_at=0), b"s" * 65, now=1900)
    store.observe(receipt(8, b"w", issued_at=0), b"s" * 65, now=1900)
    store.prune(2850, 1000)
    assert len(store.equivocations()) == 1, "the date in a receipt is the node's own"
    store.prune(3000, 1000)
    assert store.receipts(1) is not None  # still pending: nothing of it may go
    store.set_batch_status(1, "final")
    store.finish_batch(1)
    store.prune(2000, 1000)
    assert store.receipts(1) is not None  # its window was not long ago
    store.prune(2200, 1000)
    assert store.receipts(1) is None and store.equivocations() == []
    assert [a.verdict for a in store.audits(batch_id=1)] == ["honest", "honest"]


def test_a_batch_that_never_came_back_is_forgotten(store: WatchtowerStore) -> None:
    audited(store)
    store.set_batch_status(1, "removed")
    store.prune(2000, 1000)
    assert store.batch(1) is not None
    store.prune(3000, 1000)
    assert store.batch(1) is None and store.audits() == []
