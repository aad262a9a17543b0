"""The node's background work: follow the chain, answer it, commit, finalise, collect, settle, withdraw.

`step()` does one round of everything, is idempotent, and may be called at any time, also after a kill at any line. A
failure of one job does not keep the others from their turn; without a chain the round ends early.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from poip_chain.economic.types import BatchStatus
from poip_chain.errors import IntegrityError, PoipError, Unavailable
from poip_chain.service.node.answers import Duties
from poip_chain.service.node.batching import Batching
from poip_chain.service.node.collection import Collector
from poip_chain.service.node.faults import crash_point
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.metrics import WEI, NodeMetrics
from poip_chain.service.node.ports import Answered, Asked, Change, Committed, Ended, NodeChain, Rotated
from poip_chain.service.node.schema import BatchState, DutyKind
from poip_chain.service.node.store import Store

log = structlog.get_logger("poip.node")

PRUNE_INTERVAL = 600.0
_ENDED = {BatchStatus.FINAL: BatchState.FINAL, BatchStatus.CONVICTED: BatchState.CONVICTED}


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What a node has: receipts signed, their fees (wei), receipts in no batch, and batches, payers' shares of batches
    and open duties by state or kind."""

    receipts: int
    fees: int
    unbatched: int
    batches: dict[str, int]
    collections: dict[str, int]
    duties: dict[str, int]


class Jobs:
    """One round of all jobs. `clock` gives Unix seconds; `retention` seconds after a batch's end its transcripts go."""

    def __init__(
        self,
        *,
        store: Store,
        ledger: Ledger,
        chain: NodeChain,
        batching: Batching,
        collector: Collector,
        duties: Duties,
        metrics: NodeMetrics,
        model_id: bytes,
        retention: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._ledger, self._chain = store, ledger, chain
        self._batching, self._collector, self._duties = batching, collector, duties
        self._metrics, self._retention, self._clock = metrics, retention, clock
        self._model_id = model_id
        self._last_prune = 0.0
        self._lock = threading.Lock()
        self._trouble: dict[str, str] = {}
        self.chain_time = 0
        self.sunset = 0
        """From when on, by chain time, the model is no longer served; 0 if it stays."""
        self.fatal: IntegrityError | None = None

    def trouble(self) -> dict[str, str]:
        """What the last round could not do, by job."""
        return dict(self._trouble)

    def step(self) -> None:
        """One round. Never raises for trouble that another round may cure; IntegrityError is kept in `fatal`."""
        with self._lock:
            if not self._job("follow", self._follow):
                return
            self._job("duties", lambda: self._duties.answer(self.chain_time))
            self._job("batches", lambda: self._batching.commit(demanded=self._duties.demanded()))
            self._job("finality", lambda: self._batching.finalize(self.chain_time))
            self._job("collection", lambda: self._collector.collect(self.chain_time))
            self._job("collection", self._collector.settle)
            self._job("withdrawal", self._collector.withdraw)
            self._job("upkeep", self._upkeep)

    def _job(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except IntegrityError as error:
            self.fatal = error
            log.critical("stopped: the node's data contradict the chain", error=str(error))
            return False
        except PoipError as error:
            self._metrics.job_errors.labels(job=name).inc()
            if isinstance(error, Unavailable):
                self._metrics.chain_up.set(0)
            if self._trouble.get(name) != str(error):
                log.warning("job failed", job=name, error=str(error)[:300])
            self._trouble[name] = str(error)
            return False
        self._trouble.pop(name, None)
        return True

    def see_time(self) -> None:
        """Ask the chain for its time and for the model's sunset."""
        self.chain_time = self._chain.timestamp()
        sunset = self._chain.sunset(self._model_id)
        if sunset != self.sunset:
            log.warning("the model's sunset was set", sunset=sunset)
        self.sunset = sunset

    def _follow(self) -> None:
        self.see_time()
        self._metrics.chain_up.set(1)
        self._chain.step()
        for change in self._chain.changes():
            self._apply(change)
            self._chain.acknowledge(change)

    def _apply(self, change: Change) -> None:
        what = change.what
        if isinstance(what, Committed):
            if change.removed:
                log.warning("a reorganisation removed a commitment", first_seq=what.batch.first_seq)
                self._store.set_removed(what.batch.first_seq)
            else:
                crash_point("commit_mined")
                self._store.set_committed(what.batch)
                log.info("batch committed", batch_id=what.batch.id, first_seq=what.batch.first_seq)
        elif isinstance(what, Ended):
            state = BatchState.COMMITTED if change.removed else _ENDED[what.status]
            if state is BatchState.FINAL:
                crash_point("finalised")
            self._store.set_ended(what.batch_id, state, int(self._clock()))
            log.info("batch ended", batch_id=what.batch_id, state=state.value)
        elif isinstance(what, Rotated):
            self._store.set_key_limit(what.old_key, None if change.removed else what.next_seq)
            log.info("node key rotated", old_key=what.old_key, next_seq=what.next_seq, undone=change.removed)
        elif isinstance(what, Asked):
            duty = what.duty
            if duty.kind is DutyKind.CHALLENGE:
                stored = self._store.batch_of_id(duty.batch_id)
                if stored is None:
                    return  # another node's
                duty = dataclasses.replace(duty, seq=stored.first_seq + duty.seq)
            if change.removed:
                self._ledger.drop_duty(duty.kind, duty.id)
            else:
                self._ledger.add_duty(duty)
                log.info("asked", kind=duty.kind.value, id=duty.id, seq=duty.seq, deadline=duty.deadline)
        elif isinstance(what, Answered):
            if change.removed:
                self._ledger.reopen_duty(what.kind, what.id)
            else:
                self._ledger.close_duty(what.kind, what.id)

    def _upkeep(self) -> None:
        now = self._clock()
        if now - self._last_prune >= PRUNE_INTERVAL:
            self._last_prune = now
            if dropped := self._store.prune(int(now - self._retention)):
                log.info("transcripts dropped", count=dropped)

    def counts(self) -> Counts:
        """What the database holds, by state."""
        receipts, fees, unbatched = self._store.totals()
        states = dict(self._store.rows("SELECT state, count(*) FROM batches GROUP BY state"))
        return Counts(
            receipts=receipts,
            fees=fees,
            unbatched=unbatched,
            batches={state.value: int(states.get(state.value, 0)) for state in BatchState},
            collections=self._ledger.collections(),
            duties={kind.value: len(self._ledger.open_duties(kind)) for kind in DutyKind},
        )

    def refresh(self, metrics: NodeMetrics) -> None:
        """Set the gauges that are counted in the database."""
        counts = self.counts()
        metrics.receipts.set(counts.receipts)
        metrics.fees.set(counts.fees / WEI)
        metrics.unbatched.set(counts.unbatched)
        for name, number in counts.batches.items():
            metrics.batches.labels(state=name).set(number)
        for name, number in counts.collections.items():
            metrics.collections.labels(state=name).set(number)
        for name, number in counts.duties.items():
            metrics.duties.labels(kind=name).set(number)


class Work(Protocol):
    """What a `Loop` does again and again."""

    fatal: IntegrityError | None

    def step(self) -> None:
        """One round."""


class Loop:
    """Calls `step` every `interval` seconds in a thread until stopped; `stopped` is called if the data went bad."""

    def __init__(self, jobs: Work, interval: float, stopped: Callable[[], None], name: str = "poip-node-jobs") -> None:
        self._jobs, self._interval, self._on_fatal = jobs, interval, stopped
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End after the present round."""
        self._stop.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._jobs.step()
            except Exception:  # a defect here must not end the node's other work, nor go unseen
                log.exception("background round failed")
            if self._jobs.fatal is not None:
                self._on_fatal()
                return
            self._stop.wait(self._interval)
