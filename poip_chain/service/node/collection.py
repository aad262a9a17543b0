"""From vouchers to money: collect per (batch, payer) in order, settle what is final, withdraw what is earned.

The vault pays intervals of a payer's running total, each wei once; whatever lies below what is settled already is given
up. So a payer's batches are collected strictly in order, and a batch that still lacks vouchers holds up the later ones
until the payer has moved on or `patience` seconds have passed. Whether something is done is always asked of the vault,
never remembered alone: a reorganisation or a second attempt cannot pay twice or lose a payment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from poip_chain.economic.types import BatchStatus, ReceiptInBatch
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.ports import NodeChain
from poip_chain.service.node.schema import BatchState, Collection, CollectionState, StoredBatch, StoredVoucher
from poip_chain.service.node.store import Store
from poip_chain.service.node.transactions import Transactions
from poip_chain.spec.merkle import merkle_proof
from poip_chain.spec.objects import Batch, FinishReason, Receipt
from poip_chain.spec.types import ZERO_HASH

log = structlog.get_logger("poip.node")


@dataclass(frozen=True, slots=True)
class Plan:
    """The best collect that the vouchers allow: up to `reach` of the payer's running total, with `last` as the receipt
    that it ends at. `moved_on`: the payer has paid beyond this batch, so nothing more will come for it."""

    voucher: StoredVoucher
    last: Receipt
    reach: int
    moved_on: bool


def plan_collection(
    receipts: Sequence[Receipt], vouchers: Sequence[StoredVoucher], limit: int | None = None
) -> Plan | None:
    """The plan that reaches furthest, but not beyond `limit`, for one payer's receipts of a batch (in order), by the
    vault's rules:

    `last` must be named by the voucher if it was cancelled, and must not end beyond one that names another receipt.
    None if no voucher pays anything.
    """
    best: Plan | None = None
    top = max((v.voucher.cumulative for v in vouchers), default=0)
    for held in vouchers:
        voucher = held.voucher
        for receipt in receipts:
            named = voucher.last_receipt_hash == receipt.struct_hash()
            if not named and receipt.finish_reason == FinishReason.CANCELLED:
                continue
            if not named and voucher.last_receipt_hash != ZERO_HASH and receipt.payer_cum > voucher.cumulative:
                continue
            reach = min(receipt.payer_cum, voucher.cumulative)
            if limit is not None and reach > limit:
                continue
            if best is None or reach > best.reach:
                best = Plan(held, receipt, reach, False)
    if best is None or best.reach <= receipts[0].payer_cum - receipts[0].fee:
        return None
    return Plan(best.voucher, best.last, best.reach, top > receipts[-1].payer_cum)


class Collector:
    """One idempotent round per method. `patience`, `withdraw_threshold` and `depth` (finality_blocks) are settings."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        chain: NodeChain,
        transactions: Transactions,
        *,
        patience: float,
        withdraw_threshold: int | None,
        depth: int,
    ) -> None:
        self._store, self._ledger, self._chain, self._transactions = store, ledger, chain, transactions
        self._patience, self._threshold, self._depth = patience, withdraw_threshold, depth

    def collect(self, chain_time: int) -> None:
        """Send at most one collect per payer, for its oldest batch that is still due."""
        for payer in self._ledger.payers_due():
            for collection in self._ledger.due(payer):
                if not self._collect(collection, chain_time):
                    break

    def _collect(self, due: Collection, chain_time: int) -> bool:
        """True if nothing more is to be had from this interval, so that the payer's next one may be looked at."""
        stored = self._store.batch_at(due.first_seq)
        if stored is None or stored.batch is None:
            return False
        batch = stored.batch
        if stored.state is BatchState.CONVICTED:
            return self._close(due, CollectionState.VOID)
        own = [(i, r.receipt) for i, r in enumerate(self._store.receipts_in(stored)) if r.receipt.payer == due.payer]
        receipts = [receipt for _, receipt in own]
        vouchers = self._store.vouchers_for(due.payer, [r.struct_hash() for r in receipts])
        plan = plan_collection(receipts, vouchers)
        waited = chain_time >= batch.committed_at + self._patience
        if plan is None and not waited:
            return False
        settled = self._chain.settled(due.payer)
        if plan is not None and plan.reach > settled:
            # All that is collected for a batch is at most its total.
            room = batch.total_fee - self._chain.collected(batch)
            limit = max(settled, receipts[0].payer_cum - receipts[0].fee) + room
            if plan.reach > limit:
                plan = plan_collection(receipts, vouchers, limit)
        if plan is not None and plan.reach > settled and (plan.reach == due.high or plan.moved_on or waited):
            self._send(due, batch, stored, plan, settled)
            return False
        # A step back in what is believed: only what a reorganisation will not undo closes an interval.
        safe = self._chain.settled(due.payer, self._depth)
        if safe >= due.high:
            return self._close(due, CollectionState.COLLECTED)
        if settled >= due.high:
            return True  # done as far as one can see; the next one need not wait for certainty
        if safe == settled and (waited or (plan is not None and plan.moved_on)):
            return self._close(due, CollectionState.COLLECTED if safe > due.low else CollectionState.VOID)
        return False

    def _send(self, due: Collection, batch: Batch, stored: StoredBatch, plan: Plan, settled: int) -> None:
        if self._chain.collectable(due.payer) == 0:
            # The payer owes it; when it deposits again this goes on. What was drawn so far need not wait for that.
            self._settle(due, batch)
            return
        receipts = [r.receipt for r in self._store.receipts_in(stored)]
        leaves = [receipt.struct_hash() for receipt in receipts]
        first = next(i for i, receipt in enumerate(receipts) if receipt.payer == due.payer)
        last = plan.last.seq - batch.first_seq
        places = [ReceiptInBatch(receipts[i], i, tuple(merkle_proof(leaves, [i]))) for i in (first, last)]

        def send(key: str) -> None:
            held = plan.voucher
            self._chain.send_collect(key, held.voucher, held.signature, batch, places[0], places[1])
            crash_point("collect_sent")

        # The key holds where the interval starts: a partial collect, or one undone by a reorganisation, is another job.
        self._transactions.ensure(f"collect:{batch.id}:{due.payer}:{settled}:{plan.reach}", lambda: False, send)

    def _close(self, due: Collection, state: CollectionState) -> bool:
        self._ledger.set_collection(due, state)
        log.info("interval closed", first_seq=due.first_seq, state=state.value)
        return True

    def settle(self) -> None:
        """Turn collected money of final batches into earnings."""
        for collection in self._ledger.to_settle():
            stored = self._store.batch_at(collection.first_seq)
            if stored is None or stored.batch is None:
                continue
            self._settle(collection, stored.batch)
            if self._chain.bucket(stored.batch, collection.payer, self._depth) == 0:
                crash_point("settled")
                self._ledger.set_collection(collection, CollectionState.SETTLED)
                log.info("settled", batch_id=stored.batch.id)

    def _settle(self, collection: Collection, batch: Batch) -> None:
        amount = self._chain.bucket(batch, collection.payer)
        if amount == 0 or self._chain.status(batch) is not BatchStatus.FINAL:
            return

        def send(key: str) -> None:
            self._chain.send_settle(key, batch, collection.payer)
            crash_point("settle_sent")

        # A bucket can be filled again after a partial collect: the amount makes it another job.
        self._transactions.ensure(
            f"settle:{batch.id}:{collection.payer}:{amount}",
            lambda: self._chain.bucket(batch, collection.payer) == 0,
            send,
        )

    def withdraw(self, *, at_least: int | None = None) -> int:
        """Send earnings to the payout address once they reach the threshold (or `at_least`); what is waiting, wei."""
        threshold = self._threshold if at_least is None else at_least
        earned = self._chain.earned()
        if threshold is None or earned < max(threshold, 1):
            return earned
        self._transactions.ensure(
            f"withdraw:{earned}", lambda: self._chain.earned() < earned, lambda key: self._chain.send_withdraw(key)
        )
        return earned
