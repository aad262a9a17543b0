"""What the background jobs remember in the node's database: attempts, collections, duties, transcripts served.

Everything here can be worked out again from the chain and the receipts; losing it costs a repeated look, never money.
"""

from __future__ import annotations

from poip_chain.service.node.schema import Collection, CollectionState, Duty, DutyKind
from poip_chain.service.node.store import Store
from poip_chain.spec.types import Address

MAX_DOUBLINGS = 7
"""With the default delay of 5 s, a job that keeps failing is tried about every ten minutes."""


class Ledger:
    """The jobs' tables in a node's store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # ---------------------------------------------------------------- attempts

    def attempt(self, job: str) -> tuple[int, float]:
        """(number of the current attempt at `job`, from 0; time before which it must not be tried again)."""
        rows = self._store.rows("SELECT number, not_before FROM attempts WHERE job = ?", job)
        return (int(rows[0][0]), float(rows[0][1])) if rows else (0, 0.0)

    def put_off(self, job: str, now: float, delay: float, *, used: bool) -> float:
        """Try `job` again after `delay` seconds, doubled with every failure up to MAX_DOUBLINGS times.

        It gets a new attempt number if the present one is `used` (a transaction was sent under it). Returns the time of
        the next try, Unix seconds.
        """
        with self._store.transaction() as db:
            row = db.execute("SELECT number, failures FROM attempts WHERE job = ?", (job,)).fetchone() or (0, 0)
            not_before = now + delay * 2 ** min(row[1], MAX_DOUBLINGS)
            db.execute(
                "INSERT OR REPLACE INTO attempts VALUES(?, ?, ?, ?)", (job, row[0] + int(used), row[1] + 1, not_before)
            )
        return float(not_before)

    def retry_now(self) -> None:
        """Forget all delays: whoever starts the node again has perhaps mended what stood in the way."""
        with self._store.transaction() as db:
            db.execute("UPDATE attempts SET failures = 0, not_before = 0")

    # ---------------------------------------------------------------- collections

    def payers_due(self) -> list[Address]:
        """Payers with an interval that may still be collected."""
        rows = self._store.rows("SELECT DISTINCT payer FROM collections WHERE state = 'due' ORDER BY payer")
        return [Address(row[0]) for row in rows]

    def due(self, payer: Address, limit: int = 64) -> list[Collection]:
        """The payer's intervals that may still be collected, oldest first."""
        rows = self._store.rows(
            "SELECT first_seq, payer, low, high, state FROM collections WHERE state = 'due' AND payer = ? "
            "ORDER BY first_seq LIMIT ?",
            payer,
            limit,
        )
        return [_collection(row) for row in rows]

    def to_settle(self, limit: int = 32) -> list[Collection]:
        """Collected intervals of batches that are final, oldest first."""
        rows = self._store.rows(
            "SELECT c.first_seq, c.payer, c.low, c.high, c.state FROM collections c JOIN batches b USING(first_seq) "
            "WHERE c.state = 'collected' AND b.state = 'final' ORDER BY c.first_seq, c.payer LIMIT ?",
            limit,
        )
        return [_collection(row) for row in rows]

    def set_collection(self, collection: Collection, state: CollectionState) -> None:
        """Move one interval on."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE collections SET state = ? WHERE first_seq = ? AND payer = ?",
                (state, collection.first_seq, collection.payer),
            )
            if state is not CollectionState.DUE:
                # Vouchers for these receipts have done their work; the payer's best one stays.
                db.execute(
                    "DELETE FROM vouchers WHERE payer = ?1 AND receipt_hash IN (SELECT struct_hash FROM receipts "
                    "WHERE payer = ?1 AND first_seq = ?2) "
                    "AND receipt_hash NOT IN (SELECT receipt_hash FROM payers WHERE payer = ?1)",
                    (collection.payer, collection.first_seq),
                )

    def collections(self) -> dict[str, int]:
        """How many intervals are in each state."""
        counts = dict(self._store.rows("SELECT state, count(*) FROM collections GROUP BY state"))
        return {state.value: int(counts.get(state.value, 0)) for state in CollectionState}

    # ---------------------------------------------------------------- duties

    def add_duty(self, duty: Duty) -> None:
        """Remember a challenge or demand; known ones stay as they are."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO duties VALUES(?, ?, ?, ?, ?, ?, ?, 'open')",
                (duty.kind, duty.id, duty.batch_id, duty.seq, duty.part, duty.first_leaf, duty.deadline),
            )

    def drop_duty(self, kind: DutyKind, duty_id: int) -> None:
        """Forget one that a reorganisation removed."""
        with self._store.transaction() as db:
            db.execute("DELETE FROM duties WHERE kind = ? AND id = ?", (kind, duty_id))

    def close_duty(self, kind: DutyKind, duty_id: int, state: str = "done") -> None:
        """Note that nothing more can be done about it."""
        with self._store.transaction() as db:
            db.execute("UPDATE duties SET state = ? WHERE kind = ? AND id = ?", (state, kind, duty_id))

    def reopen_duty(self, kind: DutyKind, duty_id: int) -> None:
        """Take it up again: a reorganisation removed the answer."""
        self.close_duty(kind, duty_id, "open")

    def open_duties(self, kind: DutyKind) -> list[Duty]:
        """What waits, the nearest deadline first."""
        rows = self._store.rows(
            "SELECT kind, id, batch_id, seq, part, first_leaf, deadline FROM duties "
            "WHERE kind = ? AND state = 'open' ORDER BY deadline, id",
            kind,
        )
        return [Duty(DutyKind(row[0]), *row[1:]) for row in rows]

    # ---------------------------------------------------------------- transcripts served to auditors

    def note_served(self, seq: int, limit: int | None) -> bool:
        """Whether the audited transcript `seq` is served: always, unless `limit` distinct ones were served already."""
        with self._store.transaction() as db:
            known = db.execute("SELECT 1 FROM served WHERE seq = ?", (seq,)).fetchone()
            if known is None:
                if limit is not None and db.execute("SELECT count(*) FROM served").fetchone()[0] >= limit:
                    return False
                db.execute("INSERT INTO served VALUES(?)", (seq,))
        return True


def _collection(row: tuple[int, str, str, str, str]) -> Collection:
    return Collection(row[0], Address(row[1]), int(row[2]), int(row[3]), CollectionState(row[4]))
