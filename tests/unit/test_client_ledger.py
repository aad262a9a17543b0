"""The client's ledger as a state machine: whatever the order of events and crashes, it promises only what was checked."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from poip_chain.control.checks import BadAnswer, SignedRequest
from poip_chain.control.client import KeySigner
from poip_chain.control.ledger import Ledger, SignedVoucher
from poip_chain.errors import InsufficientFunds, Refused
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import Receipt, Request, SamplingParams
from poip_chain.spec.types import ZERO_ADDRESS, ZERO_HASH, Address

PAYER = Address("0x" + "11" * 20)
NODES = (Address("0x" + "22" * 20), Address("0x" + "33" * 20))
DOMAIN = Domain(1, Address("0x" + "44" * 20))
PARAMS = SamplingParams(0)
MAX_TOKENS = 10
ESCROW = 60
URL = "http://node"


def open_ledger(path: Path) -> Ledger:
    return Ledger(path / "ledger.db", PAYER, DOMAIN, lambda voucher: voucher.struct_hash() * 2 + b"\x1b")


def request_of(number: int) -> SignedRequest:
    request = Request(
        PAYER, ZERO_ADDRESS, bytes(32), 1, bytes(32), 1, PARAMS.params_hash(), MAX_TOKENS, 0, 1,
        bytes(32), number.to_bytes(32, "big"), 100,
    )  # fmt: skip
    return SignedRequest(request, PARAMS, bytes(65), (number % 1000,))


class LedgerMachine(RuleBasedStateMachine):
    """Two nodes with honest books of their own; requests in any order, lost receipts, restarts at any moment."""

    open_requests = Bundle("open_requests")
    answered = Bundle("answered")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.ledger = open_ledger(self.path)
        self.number = 0
        self.node_total = dict.fromkeys(NODES, 0)
        self.node_seq = dict.fromkeys(NODES, 0)
        self.accepted: dict[Address, dict[bytes, int]] = {node: {} for node in NODES}
        self.live_max: dict[Address, dict[bytes, int]] = {node: {} for node in NODES}
        self.prepaid: dict[Address, int] = dict.fromkeys(NODES, 0)
        self.paid_at: dict[bytes, Address] = {}

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.path)

    def remember(self, vouchers: list[SignedVoucher]) -> None:
        for signed in vouchers:
            assert signed.voucher.last_receipt_hash != ZERO_HASH

    @rule(target=open_requests, node=st.sampled_from(NODES))
    def ask(self, node: Address) -> object:
        self.number += 1
        signed = request_of(self.number)
        spoken = sum(self.accepted[node].values()) + sum(self.live_max[node].values())
        try:
            self.ledger.open(signed, node, URL, available=ESCROW, settled=0, now=self.number)
        except InsufficientFunds:
            assert max(spoken, self.prepaid[node]) + MAX_TOKENS > ESCROW
            return multiple()
        assert spoken + MAX_TOKENS <= ESCROW
        self.live_max[node][signed.request_hash] = MAX_TOKENS
        return signed, node

    @rule(target=open_requests, abandon=st.booleans())
    def ask_both(self, abandon: bool) -> object:
        """One request at two nodes, as after a retry."""
        entry = self.ask(NODES[0])
        if not isinstance(entry, tuple):
            return multiple()
        if abandon:
            self.ledger.abandon(entry[0].request_hash, NODES[0], "too slow")
        other = self.ask_elsewhere(entry)
        return multiple(entry, other) if isinstance(other, tuple) else multiple(entry)

    @rule(target=open_requests, entry=open_requests)
    def ask_elsewhere(self, entry: tuple[SignedRequest, Address]) -> object:
        signed, node = entry
        other = NODES[1 - NODES.index(node)]
        try:
            self.ledger.open(signed, other, URL, available=ESCROW, settled=0, now=self.number)
        except (InsufficientFunds, Refused):
            return multiple()
        assert signed.request_hash not in self.paid_at
        self.live_max[other][signed.request_hash] = MAX_TOKENS
        return signed, other

    @rule(entry=open_requests)
    def abandon(self, entry: tuple[SignedRequest, Address]) -> None:
        self.ledger.abandon(entry[0].request_hash, entry[1], "too slow")

    @rule(target=answered, entry=consumes(open_requests), tokens=st.integers(0, MAX_TOKENS))
    def node_answers(self, entry: tuple[SignedRequest, Address], tokens: int) -> object:
        signed, node = entry
        self.node_total[node] += tokens
        receipt = Receipt(
            node, self.node_seq[node], signed.request_hash, bytes(32), bytes(32), tokens, 1, tokens, PAYER,
            self.node_total[node], self.node_total[node], 1,
        )  # fmt: skip
        self.node_seq[node] += 1
        return receipt

    @rule(receipt=answered)
    def client_gets_the_receipt(self, receipt: Receipt) -> None:
        node, name = receipt.node, receipt.request_hash
        attempt = self.ledger.attempt(name, node)
        assert attempt is not None
        if attempt.state in ("refused", "void"):
            with pytest.raises(Refused):
                self.ledger.accept(receipt, bytes(65))
            return
        state, vouchers = self.ledger.accept(receipt, bytes(65))
        self.remember(vouchers)
        self.live_max[node].pop(name, None)
        if state == "checked":
            assert self.paid_at.setdefault(name, node) == node, "paid twice"
            self.accepted[node][name] = receipt.fee
        else:
            assert attempt.state in ("abandoned", "unpaid") or self.paid_at[name] != node

    @rule(receipt=consumes(answered))
    def receipt_is_lost(self, receipt: Receipt) -> None:
        """The node made it and the client never sees it: later receipts must not suffer."""
        node, name = receipt.node, receipt.request_hash
        self.remember(self.ledger.void(name, node, "no receipt by the deadline"))
        if self.ledger.attempt(name, node).state == "void":  # type: ignore[union-attr]
            self.live_max[node].pop(name, None)

    @rule(entry=consumes(open_requests), state=st.sampled_from(["refused", "void"]))
    def nothing_came(self, entry: tuple[SignedRequest, Address], state: str) -> None:
        signed, node = entry
        self.remember(getattr(self.ledger, state)(signed.request_hash, node, "no"))
        if self.ledger.attempt(signed.request_hash, node).state == state:  # type: ignore[union-attr]
            self.live_max[node].pop(signed.request_hash, None)

    @rule(entry=open_requests)
    def prepay(self, entry: tuple[SignedRequest, Address]) -> None:
        signed, node = entry
        try:
            voucher = self.ledger.prepay(signed.request_hash, node).voucher
        except Refused:
            return
        assert voucher.last_receipt_hash == ZERO_HASH
        limit = sum(self.accepted[node].values()) + sum(self.live_max[node].values())
        assert voucher.cumulative <= max(limit, self.prepaid[node])
        self.prepaid[node] = max(self.prepaid[node], voucher.cumulative)

    @rule(count=st.integers(0, 3))
    def deliver(self, count: int) -> None:
        for voucher in self.ledger.undelivered()[:count]:
            self.ledger.delivered(voucher.id)

    @rule()
    def kill(self) -> None:
        before = [(a.request_hash, a.node, a.state) for a in self.ledger.attempts("open", "abandoned", "checked")]
        vouchers = self.ledger.undelivered()
        self.ledger.close()
        self.ledger = open_ledger(self.path)
        assert before == [
            (a.request_hash, a.node, a.state) for a in self.ledger.attempts("open", "abandoned", "checked")
        ]
        assert vouchers == self.ledger.undelivered()

    @invariant()
    def promises_are_covered_by_what_was_checked(self) -> None:
        for node in NODES:
            account = self.ledger.account(node)
            assert account.accepted == sum(self.accepted[node].values())
            assert account.open_max == sum(self.live_max[node].values())
            assert account.signed <= max(account.accepted, self.prepaid[node])
            assert account.committed(0) <= ESCROW

    @invariant()
    def everything_checked_is_vouched_for_once_nothing_is_under_way(self) -> None:
        for node in NODES:
            if not self.live_max[node]:
                account = self.ledger.account(node)
                named = [
                    v.voucher.cumulative for v in self.every_voucher(node) if v.voucher.last_receipt_hash != ZERO_HASH
                ]
                assert named == sorted(set(named)), "in order, each once"
                assert (named[-1] if named else 0) == account.accepted

    def every_voucher(self, node: Address) -> Iterator[SignedVoucher]:
        rows = self.ledger._db.execute("SELECT * FROM vouchers WHERE node = ? ORDER BY id", (node,))
        from poip_chain.control.ledger import _signed_voucher

        yield from map(_signed_voucher, rows)


TestLedger = pytest.mark.slow(LedgerMachine.TestCase)
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])


def receipt_for(signed: SignedRequest, fee: int, cum: int, seq: int = 0) -> Receipt:
    return Receipt(
        NODES[0], seq, signed.request_hash, bytes(32), bytes(32), fee, 1, fee, PAYER, cum, cum, 1
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = open_ledger(tmp_path)
    yield made
    made.close()


def opened(ledger: Ledger, number: int) -> SignedRequest:
    signed = request_of(number)
    ledger.open(signed, NODES[0], URL, available=1000, settled=0, now=1)
    return signed


def test_a_later_voucher_waits_for_an_earlier_receipt_on_its_way(ledger: Ledger) -> None:
    first, second = opened(ledger, 1), opened(ledger, 2)
    assert ledger.accept(receipt_for(second, 4, 9, 1), bytes(65)) == ("checked", [])
    _, vouchers = ledger.accept(receipt_for(first, 5, 5), bytes(65))
    assert [voucher.voucher.cumulative for voucher in vouchers] == [5, 9]


def test_an_interval_that_nobody_can_explain_is_not_paid(ledger: Ledger) -> None:
    signed = opened(ledger, 1)
    receipt = receipt_for(signed, 4, 5)
    with pytest.raises(BadAnswer, match=r"a total of 5 wei .* explains 4"):
        ledger.accept(receipt, bytes(65))
    assert ledger.attempt(signed.request_hash, NODES[0]).state == "open"  # type: ignore[union-attr]
    assert (ledger.undelivered(), ledger.account(NODES[0]).signed) == ([], 0)
    ledger.accept(receipt_for(signed, 4, 4), bytes(65))


@pytest.mark.parametrize("fate", ["open", "abandoned", "void", "unpaid"])
def test_what_may_have_been_answered_explains_a_gap_once(ledger: Ledger, fate: str) -> None:
    """A lost receipt must not block an honest node; it explains its maximum fee, and no more than once."""
    lost, first, second = opened(ledger, 1), opened(ledger, 2), opened(ledger, 3)
    explained = MAX_TOKENS
    if fate in ("abandoned", "unpaid"):
        assert ledger.abandon(lost.request_hash, NODES[0], "too slow") == "abandoned"
    if fate == "unpaid":
        explained = 3
        ledger.accept(receipt_for(lost, 3, 3), bytes(65))
    if fate == "void":
        ledger.void(lost.request_hash, NODES[0], "no receipt")
    ledger.void(second.request_hash, NODES[0], "it may have a receipt, too")
    with pytest.raises(BadAnswer, match="explains"):
        ledger.accept(receipt_for(first, 4, explained + MAX_TOKENS + 5), bytes(65))
    assert ledger.accept(receipt_for(first, 4, explained + MAX_TOKENS + 4), bytes(65))[0] == "checked"
    third = opened(ledger, 4)
    with pytest.raises(BadAnswer, match="explains"):
        ledger.accept(receipt_for(third, 1, explained + MAX_TOKENS + 6), bytes(65))
    assert ledger.accept(receipt_for(third, 1, explained + MAX_TOKENS + 5), bytes(65))[0] == "checked"


def test_a_refused_request_explains_nothing(ledger: Ledger) -> None:
    ledger.refused(opened(ledger, 1).request_hash, NODES[0], "busy")
    with pytest.raises(BadAnswer, match="explains 4"):
        ledger.accept(receipt_for(opened(ledger, 2), 4, 5), bytes(65))


def test_a_paid_request_cannot_be_abandoned(ledger: Ledger) -> None:
    signed = opened(ledger, 1)
    ledger.accept(receipt_for(signed, 4, 4), bytes(65))
    assert ledger.abandon(signed.request_hash, NODES[0], "another node is asked") == "checked"
    assert ledger.abandon(bytes(32), NODES[0], "was never asked") == ""


def test_a_new_ledger_takes_over_from_a_lost_one_when_it_is_told_to(ledger: Ledger) -> None:
    """What the lost ledger owed is on no chain: the node's word for it is taken only after somebody looked into it."""
    signed = request_of(1)
    ledger.open(signed, NODES[0], URL, available=100, settled=70, now=1)
    receipt = receipt_for(signed, 4, 90)
    with pytest.raises(BadAnswer, match="explains 74") as caught:
        ledger.accept(receipt, bytes(65))
    ledger.reject(signed.request_hash, NODES[0], str(caught.value), receipt, bytes(65))
    ledger.unblock(NODES[0])
    _, (voucher,) = ledger.accept(receipt_for(opened(ledger, 2), 4, 94, seq=1), bytes(65))
    assert voucher.voucher.cumulative == 74, "what was checked here, not what the lost ledger owed"


def test_a_ledger_from_before_totals_were_explained_is_taken_over(tmp_path: Path) -> None:
    old = open_ledger(tmp_path)
    old.accept(receipt_for(opened(old, 1), 4, 4), bytes(65))
    old.void(opened(old, 2).request_hash, NODES[0], "no receipt")
    old._db.execute("ALTER TABLE accounts DROP COLUMN explained")
    old.close()
    ledger = open_ledger(tmp_path)
    signed = opened(ledger, 3)
    with pytest.raises(BadAnswer, match=f"explains {4 + MAX_TOKENS + 4}"):
        ledger.accept(receipt_for(signed, 4, 4 + MAX_TOKENS + 5), bytes(65))
    assert ledger.accept(receipt_for(signed, 4, 4 + MAX_TOKENS + 4), bytes(65))[0] == "checked"
    ledger.close()


def test_two_receipts_for_one_request_are_equivocation(ledger: Ledger) -> None:
    signed = opened(ledger, 1)
    ledger.accept(receipt_for(signed, 4, 4), bytes(65))
    with pytest.raises(BadAnswer, match="two different receipts"):
        ledger.accept(receipt_for(signed, 4, 4, seq=1), bytes(65))
    assert ledger.account(NODES[0]).accepted == 4


@pytest.mark.parametrize("abandoned", [False, True])
def test_the_second_receipt_for_a_request_is_kept_and_not_paid(ledger: Ledger, abandoned: bool) -> None:
    signed = opened(ledger, 1)
    ledger.open(signed, NODES[1], URL, available=1000, settled=0, now=1)
    if abandoned:
        ledger.abandon(signed.request_hash, NODES[0], "too slow")
        assert ledger.accept(receipt_for(signed, 4, 4), bytes(65)) == ("unpaid", [])
    else:
        _, (voucher,) = ledger.accept(receipt_for(signed, 4, 4), bytes(65))
        assert voucher.voucher.cumulative == 4
    state, vouchers = ledger.accept(receipt_for(signed, 5, 5).replace(node=NODES[1]), bytes(65))
    assert (state, [voucher.voucher.cumulative for voucher in vouchers]) == (
        ("checked", [5]) if abandoned else ("unpaid", [])
    )
    assert all(attempt.receipt is not None for attempt in ledger.of_request(signed.request_hash))


def test_a_prepaid_voucher_covers_only_what_prepays(ledger: Ledger) -> None:
    first, second = opened(ledger, 1), opened(ledger, 2)
    assert ledger.prepay(first.request_hash, NODES[0]).voucher.cumulative == MAX_TOKENS
    assert ledger.prepay(second.request_hash, NODES[0]).voucher.cumulative == 2 * MAX_TOKENS
    ledger.accept(receipt_for(first, 3, 3), bytes(65))
    assert ledger.account(NODES[0]).signed == 2 * MAX_TOKENS


def test_a_receipt_for_what_was_never_asked_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Refused, match="never sent"):
        ledger.accept(receipt_for(request_of(5), 4, 4), bytes(65))


def test_an_old_key_with_a_new_ledger_starts_at_what_is_settled(ledger: Ledger) -> None:
    signed = request_of(1)
    ledger.open(signed, NODES[0], URL, available=100, settled=70, now=1)
    _, (voucher,) = ledger.accept(receipt_for(signed, 4, 74), bytes(65))
    assert voucher.voucher.cumulative == 74
    assert ledger.account(NODES[0]).committed(70) == 4


def test_a_blocked_node_can_be_unblocked(ledger: Ledger) -> None:
    signed = opened(ledger, 1)
    ledger.reject(signed.request_hash, NODES[0], "a wrong fee", receipt_for(signed, 4, 4), bytes(65))
    with pytest.raises(Refused, match="a wrong fee"):
        opened(ledger, 2)
    ledger.unblock(NODES[0])
    opened(ledger, 2)


def test_signatures_come_from_the_key(tmp_path: Path) -> None:
    from tests.engines.scripted_node import private_key

    signer = KeySigner(private_key("p"))
    ledger = Ledger(tmp_path / "l.db", signer.address, DOMAIN, lambda voucher: signer.sign(voucher, DOMAIN))
    request = request_of(1).request.replace(client=signer.address)
    signed = SignedRequest(request, PARAMS, bytes(65), (1,))
    ledger.open(signed, NODES[0], URL, available=100, settled=0, now=1)
    _, (voucher,) = ledger.accept(receipt_for(signed, 4, 4), bytes(65))
    assert voucher.voucher.recover(DOMAIN, voucher.signature) == signer.address
    ledger.close()
