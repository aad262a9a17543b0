"""The payment vault under random sequences of actions, beside a model that keeps the same books in plain Python.

After each step: every wei is where the model says; nothing was paid twice; no payer lost more than it signed; what a
convicted batch drew goes back.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, ClassVar

import boa
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.contracts import system
from tests.contracts.network import CONVICTED, FINAL, PENDING, Committed, Network, Server, voucher_for
from tests.contracts.system import Account, account

PAYERS = (account("first payer"), account("second payer"))
ACCUSER = account("accuser").address
payers = st.sampled_from(PAYERS)
amounts = st.integers(1, 8 * 10**15)


def account_of(address: str) -> Account:
    """The payer with this address."""
    return next(payer for payer in PAYERS if payer.address == address)


class PaymentMachine(RuleBasedStateMachine):
    """Actions are plain methods; each does the same to the chain and to the model."""

    network: ClassVar[Network]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.anchor: AbstractContextManager[Any] = boa.env.anchor()
        self.anchor.__enter__()
        self.server = Server.start(self.network)
        self.node = self.server.node
        self.batches: list[Committed] = []
        self.status: dict[int, int] = {}
        self.escrow = dict.fromkeys(PAYERS, 0)
        self.thawing = dict.fromkeys(PAYERS, 0)
        self.thaw_end = dict.fromkeys(PAYERS, 0)
        self.settled = dict.fromkeys(PAYERS, 0)
        self.signed = dict.fromkeys(PAYERS, 0)
        self.deposited = dict.fromkeys(PAYERS, 0)
        self.withdrawn = dict.fromkeys(PAYERS, 0)
        self.intervals: dict[Account, list[tuple[int, int, int]]] = {payer: [] for payer in PAYERS}
        self.buckets: dict[tuple[int, Account], int] = {}
        self.earned = self.treasury = self.paid_out = 0
        self.network.set_value("jail_period", 0)
        for payer in PAYERS:
            self.deposit(payer, 2 * 10**15)
        self.commit(list(PAYERS) * 2, 40, False)

    def teardown(self) -> None:
        self.anchor.__exit__(None, None, None)

    # Payers ------------------------------------------------------------------------------------------------------

    @rule(payer=payers, amount=amounts)
    def deposit(self, payer: Account, amount: int) -> None:
        self.network.deposit(payer.address, self.node, amount)
        self.escrow[payer] += amount
        self.deposited[payer] += amount

    @rule(payer=payers, amount=amounts)
    def thaw(self, payer: Account, amount: int) -> None:
        if amount > self.escrow[payer] - self.thawing[payer]:
            with boa.reverts("vault: not so much is available"):
                self.network.vault.thaw(self.node, amount, sender=payer.address)
            return
        self.network.vault.thaw(self.node, amount, sender=payer.address)
        self.thawing[payer] += amount
        self.thaw_end[payer] = system.now() + self.network.value("thaw_period")

    @precondition(lambda self: any(self.thawing.values()))
    @rule(payer=payers)
    def cancel_thaw(self, payer: Account) -> None:
        if self.thawing[payer]:
            self.network.vault.cancel_thaw(self.node, sender=payer.address)
            self.thawing[payer] = self.thaw_end[payer] = 0

    @precondition(lambda self: any(self.thawing.values()))
    @rule(payer=payers, wait=st.booleans())
    def withdraw(self, payer: Account, wait: bool) -> None:
        if not self.thawing[payer]:
            with boa.reverts("vault: nothing is thawing"):
                self.network.vault.withdraw(self.node, sender=payer.address)
            return
        if wait:
            boa.env.time_travel(seconds=max(1, self.thaw_end[payer] - system.now()))
        if system.now() < self.thaw_end[payer]:
            with boa.reverts("vault: still thawing"):
                self.network.vault.withdraw(self.node, sender=payer.address)
            return
        amount = self.network.vault.withdraw(self.node, sender=payer.address)
        assert amount == self.thawing[payer] <= self.escrow[payer]
        self.escrow[payer] -= amount
        self.withdrawn[payer] += amount
        self.thawing[payer] = self.thaw_end[payer] = 0

    # The node ----------------------------------------------------------------------------------------------------

    @rule(who=st.lists(payers, min_size=1, max_size=4), tokens=st.integers(1, 60), collect=st.booleans())
    def commit(self, who: list[Account], tokens: int, collect: bool) -> None:
        answers = [self.server.serve(payer, tokens + i) for i, payer in enumerate(who)]
        committed = self.server.commit(answers)
        self.batches.append(committed)
        self.status[committed.batch.id] = PENDING
        if collect:
            own = [i for i, payer in enumerate(who) if payer is who[0]]
            self.collect_interval(committed, who[0], own[0], own[-1], False, 0)

    @rule(data=st.data(), prepaid=st.booleans(), shift=st.sampled_from([0, 0, 0, -1, 1, 10**15]))
    def collect(self, data: st.DataObject, prepaid: bool, shift: int) -> None:
        committed = data.draw(st.sampled_from(self.batches))
        payer = data.draw(st.sampled_from([account_of(a.receipt.payer) for a in committed.answers]))
        own = [i for i, a in enumerate(committed.answers) if a.receipt.payer == payer.address]
        first = data.draw(st.sampled_from(own))
        last = data.draw(st.sampled_from([i for i in own if i >= first][::-1]))
        self.collect_interval(committed, payer, first, last, prepaid, shift)

    def collect_interval(
        self, committed: Committed, payer: Account, first: int, last: int, prepaid: bool, shift: int
    ) -> None:
        """Collect with a voucher for the last receipt's total plus `shift`, and do the same to the books."""
        receipt, start = committed.answers[last].receipt, committed.answers[first].receipt
        changes: dict[str, Any] = {"cumulative": max(0, receipt.payer_cum + shift)}
        if prepaid:
            changes["last_receipt_hash"] = bytes(32)
        voucher, signature = voucher_for(self.network, payer, receipt, **changes)
        self.signed[payer] = max(self.signed[payer], voucher.cumulative)

        low = max(start.payer_cum - start.fee, self.settled[payer])
        high = min(receipt.payer_cum, voucher.cumulative)
        amount = min(high - low, self.escrow[payer])
        if self.status[committed.batch.id] == CONVICTED or amount <= 0:
            with boa.reverts():
                self.server.collect(voucher, signature, committed, first, last)
            return
        assert self.server.collect(voucher, signature, committed, first, last) == amount
        self.seen["collected"] += 1
        self.seen["partly"] += amount < high - low
        self.settled[payer] = low + amount
        self.escrow[payer] -= amount
        self.thawing[payer] = min(self.thawing[payer], self.escrow[payer])
        key = (committed.batch.id, payer)
        self.buckets[key] = self.buckets.get(key, 0) + amount
        self.intervals[payer].append((low, low + amount, committed.batch.id))

    @precondition(lambda self: self.earned)
    @rule()
    def withdraw_earnings(self) -> None:
        assert self.network.vault.withdraw_earnings(self.node) == self.earned
        self.paid_out += self.earned
        self.earned = 0

    # What becomes of batches -------------------------------------------------------------------------------------

    def pending(self) -> list[Committed]:
        """Pending batches, those that have drawn money first."""
        drawn = {batch_id for (batch_id, _), amount in self.buckets.items() if amount}
        found = [b for b in self.batches if self.status[b.batch.id] == PENDING]
        return sorted(found, key=lambda b: b.batch.id not in drawn)

    @precondition(lambda self: PENDING in self.status.values())
    @rule(data=st.data())
    def finalize(self, data: st.DataObject) -> None:
        committed = data.draw(st.sampled_from(self.pending()))
        self.network.finalize(committed.batch)
        self.status[committed.batch.id] = FINAL

    @precondition(lambda self: PENDING in self.status.values())
    @rule(data=st.data())
    def convict(self, data: st.DataObject) -> None:
        committed = data.draw(st.sampled_from(self.pending()))
        batch = committed.batch.values()
        if not self.network.log.convictable(self.network.offences, batch):
            return
        self.network.log.convict(batch, ACCUSER, bytes(32), bytes(32), sender=self.network.offences.address)
        self.status[committed.batch.id] = CONVICTED
        self.server.leave_jail()
        self.seen["convicted"] += 1

    @precondition(lambda self: any(self.buckets.values()))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        decided = [key for key, amount in self.buckets.items() if amount and self.status[key[0]] != PENDING]
        batch_id, payer = data.draw(st.sampled_from(decided or list(self.buckets)))
        committed = self.batches[[b.batch.id for b in self.batches].index(batch_id)]
        batch, status = committed.batch, self.status[committed.batch.id]
        amount = self.buckets.get((batch.id, payer), 0)
        if status == PENDING or not amount:
            with boa.reverts():
                self.network.vault.settle(batch.values(), payer.address)
            return
        assert self.network.vault.settle(batch.values(), payer.address) == amount
        self.buckets[(batch.id, payer)] = 0
        if status == CONVICTED:
            self.escrow[payer] += amount
            self.seen["refunded"] += 1
        else:
            self.seen["paid"] += 1
            fee = amount * self.network.value("protocol_fee") // 10**6
            self.treasury += fee
            self.earned += amount - fee

    # Invariants --------------------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        vault = self.network.vault
        for payer in PAYERS:
            held = vault.escrow(payer.address, self.node)
            assert held == (self.escrow[payer], self.thawing[payer], held[2])
            assert vault.available(payer.address, self.node) == self.escrow[payer] - self.thawing[payer]
            assert vault.settled(payer.address, self.node) == self.settled[payer]
            assert self.network.token.balanceOf(payer.address) == self.withdrawn[payer]
        for (batch_id, payer), amount in self.buckets.items():
            assert vault.bucket(batch_id, payer.address) == amount
        assert (vault.earned(self.node), vault.treasury_due()) == (self.earned, self.treasury)

    @invariant()
    def every_wei_is_accounted_for(self) -> None:
        held = sum(self.escrow.values()) + sum(self.buckets.values()) + self.earned + self.treasury
        assert self.network.vault.total_held() == held == self.network.token.balanceOf(self.network.vault)
        assert held + self.paid_out + sum(self.withdrawn.values()) == sum(self.deposited.values())

    @invariant()
    def nothing_is_paid_twice(self) -> None:
        for payer in PAYERS:
            ordered = self.intervals[payer]
            assert all(a[1] <= b[0] for a, b in pairwise(ordered))
            if ordered:
                assert ordered[-1][1] == self.settled[payer]

    @invariant()
    def no_payer_loses_more_than_it_signed(self) -> None:
        for payer in PAYERS:
            refundable = sum(
                amount
                for (batch_id, who), amount in self.buckets.items()
                if who is payer and self.status[batch_id] == CONVICTED
            )
            lost = self.deposited[payer] - self.withdrawn[payer] - self.escrow[payer] - refundable
            assert lost <= self.signed[payer]
            kept = sum(b - a for a, b, i in self.intervals[payer] if self.status[i] != CONVICTED)
            assert lost == kept, "what a convicted batch drew is the payer's again"


REACHED = ("collected", "partly", "convicted", "refunded", "paid")
MOST_ROUNDS = 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_payments(network: Network) -> None:
    PaymentMachine.network, PaymentMachine.seen = network, Counter()
    seen = PaymentMachine.seen
    # Rounds until the sequences have reached what matters, each often.
    for number in range(MOST_ROUNDS):
        run_state_machine_as_test(
            seed(number)(PaymentMachine),
            settings=settings(
                max_examples=15,
                stateful_step_count=25,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if min(seen[what] for what in REACHED) >= 5:
            return
    raise AssertionError(f"{MOST_ROUNDS} rounds did not reach everything: {seen}")
