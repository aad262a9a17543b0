"""From receipts to final batches: compose, commit, and finalise when the window has ended.

A batch is stored before it is sent, and never changes once it was, so the same first_seq always gets the same batch. One
that was not sent yet is cut in two if the free stake does not carry the whole. Every method is one idempotent
round. It knows the chain only through `NodeChain`.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from poip_chain.economic.types import BatchStatus
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.ports import NodeChain
from poip_chain.service.node.schema import BatchState, StoredBatch
from poip_chain.service.node.store import Store
from poip_chain.service.node.transactions import Transactions
from poip_chain.spec.objects import Batch

log = structlog.get_logger("poip.node")

MAX_FINALIZE = 32
"""Batches in one `finalize`, as the contract takes them."""
MAX_COMMITS_AHEAD = 8
"""Composed batches that may wait at the same time; more receipts wait unbatched."""


class Batching:
    """`batch_count` receipts or `batch_age` seconds make a batch; `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        chain: NodeChain,
        transactions: Transactions,
        *,
        batch_count: int,
        batch_age: float,
        locator: str,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._chain, self._transactions = store, chain, transactions
        self._count, self._age, self._locator, self._clock = batch_count, batch_age, locator, clock
        self.blocked: str | None = None
        """Why the chain takes no batch of this node (no stake, jailed, model sunset), None while it does."""

    def commit(self, *, demanded: bool = False) -> None:
        """Compose what is due (at once if `demanded`) and bring it to the chain, in order."""
        waiting = self._store.batches(BatchState.COMPOSED)
        while len(waiting) < MAX_COMMITS_AHEAD:
            composed = self._compose(demanded)
            if composed is None:
                break
            waiting.append(composed)
        self.blocked = None
        if not waiting:
            return
        covered = self._chain.next_seq()
        for batch in waiting:
            if batch.first_seq < covered:
                continue  # mined; the follower will tell
            if batch.first_seq > covered:
                # The log takes batches in order only; the next one is sent when this one is mined.
                break
            self._send(self._carried(batch))

    def _compose(self, demanded: bool) -> StoredBatch | None:
        now = self._clock()
        composed = self._store.compose(
            maximum=self._count,
            now=int(now),
            due=lambda count, oldest: demanded or count >= self._count or now - oldest >= self._age,
        )
        if composed is not None:
            crash_point("batch_composed")
            log.info("batch composed", first_seq=composed.first_seq, count=composed.count)
        return composed

    def _carried(self, batch: StoredBatch) -> StoredBatch:
        """The batch, or a first part of it that the free stake can carry. What was ever sent stays as it is: it may still
        be mined. Where not even one receipt is carried, the whole is tried: the chain may lock less than reckoned."""
        if self._transactions.begun(self._job(batch)):
            return batch
        backing = self._chain.backing()
        if backing.terms.lock(batch.total_fee) <= backing.free_stake:
            return batch
        count, fees = 0, 0
        for stored in self._store.receipts_in(batch)[:-1]:
            fees += stored.receipt.fee
            if backing.terms.lock(fees) > backing.free_stake:
                break
            count += 1
        if count == 0:
            return batch
        log.warning(
            "batch cut: its lock exceeds the free stake", first_seq=batch.first_seq, count=batch.count, now=count,
            free_stake=backing.free_stake,
        )  # fmt: skip
        return self._store.cut(batch.first_seq, count)

    def _job(self, batch: StoredBatch) -> str:
        return f"commit:{self._chain.node}:{batch.first_seq}"

    def _send(self, batch: StoredBatch) -> None:
        draft = Batch(
            id=0,
            node=self._chain.node,
            model_id=batch.model_id,
            profile_version=batch.profile_version,
            root=batch.root,
            first_seq=batch.first_seq,
            count=batch.count,
            total_fee=batch.total_fee,
            node_cum=0,
            lock=0,
            audit_rate_ppm=0,
            parameters_version=0,
            block_number=0,
            committed_at=0,
            window_end=0,
        )

        def send(key: str) -> None:
            self._chain.send_commit(key, batch=draft, locator=self._locator)
            crash_point("commit_sent")

        job = self._job(batch)
        self._transactions.ensure(job, lambda: self._chain.next_seq() > batch.first_seq, send)
        self.blocked = self._transactions.refused(job)

    def finalize(self, chain_time: int) -> None:
        """Make batches final whose window has ended without an open case."""
        due: list[Batch] = []
        for stored in self._store.batches(BatchState.COMMITTED):
            batch = stored.batch
            if batch is None or batch.window_end > chain_time:
                continue
            if self._chain.status(batch) is not BatchStatus.PENDING or self._chain.open_cases(batch) != 0:
                continue
            if self._chain.window_end(batch) <= chain_time:
                due.append(batch)
            if len(due) == MAX_FINALIZE:
                break
        if not due:
            return
        crash_point("before_finalize")
        # All in one transaction, or one by one where that was refused: one bad batch must not hold up the others.
        if not self._finalize(due) and len(due) > 1:
            for batch in due:
                self._finalize([batch])

    def _finalize(self, batches: list[Batch]) -> bool:
        """False if this was refused before and waits for another try."""
        job = "finalize:" + ",".join(str(batch.id) for batch in batches)
        refused = False

        def send(key: str) -> None:
            nonlocal refused
            refused = True
            self._chain.send_finalize(key, batches)
            refused = False
            crash_point("finalize_sent")

        self._transactions.ensure(
            job, lambda: all(self._chain.status(batch) is not BatchStatus.PENDING for batch in batches), send
        )
        return not refused
