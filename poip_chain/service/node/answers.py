"""What the node owes to those who check it: transcripts of selected receipts, and answers to challenges on chain.

Who may read a transcript: anyone, if the batch's beacon selects the receipt; otherwise the client of the request, who
proves it with a signature. Everyone else gets 403.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import structlog

from poip_chain.economic.types import ReceiptInBatch
from poip_chain.errors import InvalidInput, NotFound
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.metrics import NodeMetrics
from poip_chain.service.node.ports import NodeChain
from poip_chain.service.node.receipts import read_record, receipt_json, record_json
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import Duty, DutyKind, StoredBatch, StoredReceipt
from poip_chain.service.node.store import Store
from poip_chain.service.node.transactions import Transactions
from poip_chain.spec.eip712 import TypedStruct, parse_hex
from poip_chain.spec.merkle import merkle_proof
from poip_chain.spec.objects import Batch, Part, audit_indices

log = structlog.get_logger("poip.node")

LEAVES_PER_ANSWER = 8
ACCESS_HEADER = "x-poip-access"
MAX_ACCESS_SECONDS = 600
"""A signed TranscriptQuery may not be valid for longer than this, so that a leaked one soon is worthless."""


@dataclass(frozen=True)
class TranscriptQuery(TypedStruct):
    """Signed by a request's client (domain: commitment log) to read its own transcript until `deadline` (Unix seconds).

    Travels as the header `x-poip-access: <deadline>:<0x signature>`.
    """

    ABI: ClassVar[dict[str, str]] = {"request_hash": "bytes32", "deadline": "uint64"}
    request_hash: bytes
    deadline: int


class Transcripts:
    """Serves batches and transcripts. `withhold_after`: see NodeSettings.misbehave; None for an honest node."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        chain: NodeChain,
        metrics: NodeMetrics,
        *,
        withhold_after: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._ledger, self._chain, self._metrics = store, ledger, chain, metrics
        self._withhold_after, self._clock = withhold_after, clock
        self._selected: dict[int, tuple[Batch, frozenset[int]]] = {}

    def batch_receipts(self, batch_id: int) -> dict[str, Any]:
        """The leaves of a committed batch, in order. Raises NotFound."""
        stored, _ = self._batch(batch_id)
        return {"receipts": [receipt_json(receipt) for receipt in self._store.receipts_in(stored)]}

    def transcript(self, batch_id: int, index: int, access: str | None) -> dict[str, Any]:
        """Everything about one receipt of a batch. Raises NotFound, or RequestRefused (403, 503)."""
        stored, batch = self._batch(batch_id)
        if not 0 <= index < stored.count:
            raise NotFound(f"batch {batch_id} has the receipts 0 to {stored.count - 1}, not {index}.")
        receipt = self._store.receipt_at(stored.first_seq + index)
        assert receipt is not None  # a composed batch holds only stored receipts
        if access is not None:
            self._check_access(receipt, access)
        elif not self.is_selected(batch, index):
            self._metrics.transcripts.labels(result="refused").inc()
            raise RequestRefused(
                403, "not_selected", f"receipt {index} of batch {batch_id} is not selected for audit.",
                hint=f"Its client may read it with the header {ACCESS_HEADER}.",
            )  # fmt: skip
        elif not self._ledger.note_served(receipt.receipt.seq, self._withhold_after):
            self._metrics.transcripts.labels(result="withheld").inc()
            raise RequestRefused(503, "unavailable", "the transcript cannot be read now.")
        else:
            self._metrics.transcripts.labels(result="served").inc()
        return record_json(receipt, read_record(self._store, receipt.receipt.seq))

    def _check_access(self, stored: StoredReceipt, header: str) -> None:
        deadline, _, signature = header.partition(":")
        if not deadline.isascii() or not deadline.isdigit() or len(deadline) > 12:
            raise InvalidInput(f"the header {ACCESS_HEADER} must be '<deadline>:<0x signature>'.")
        now = int(self._clock())
        if not now <= int(deadline) <= now + MAX_ACCESS_SECONDS:
            raise RequestRefused(
                403, "not_allowed", f"the query's deadline must lie within the next {MAX_ACCESS_SECONDS} seconds."
            )
        query = TranscriptQuery(stored.receipt.request_hash, int(deadline))
        signer = query.recover(self._chain.log_domain, parse_hex(signature, ACCESS_HEADER, 65))
        if signer != stored.receipt.payer:
            raise RequestRefused(403, "not_allowed", "the query is not signed by the client of this receipt.")

    def is_selected(self, batch: Batch, index: int) -> bool:
        """Whether the batch's beacon selects this receipt; False while the beacon is not known."""
        known = self._selected.get(batch.id)
        if known is None or known[0] != batch:
            beacon = self._chain.beacon(batch)
            if beacon is None:
                return False
            known = (batch, frozenset(audit_indices(beacon, batch.id, batch.count, batch.audit_rate_ppm)))
            self._selected[batch.id] = known
            while len(self._selected) > 1024:
                self._selected.pop(next(iter(self._selected)))
        return index in known[1]

    def _batch(self, batch_id: int) -> tuple[StoredBatch, Batch]:
        stored = self._store.batch_of_id(batch_id) if 0 <= batch_id < 2**63 else None
        if stored is None or stored.batch is None:
            raise NotFound(f"this node has no batch {batch_id}.")
        return stored, stored.batch


class Duties:
    """Answers challenges and demands in time; one idempotent round per method."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        chain: NodeChain,
        transactions: Transactions,
        *,
        withhold_after: int | None,
    ) -> None:
        self._store, self._ledger, self._chain, self._transactions = store, ledger, chain, transactions
        self._withhold_after = withhold_after

    def answer(self, chain_time: int) -> None:
        """Answer open challenges, the nearest deadline first."""
        for duty in self._ledger.open_duties(DutyKind.CHALLENGE):
            if chain_time > duty.deadline:
                log.error("challenge missed", id=duty.id, batch_id=duty.batch_id)
                self._ledger.close_duty(duty.kind, duty.id, "missed")
                continue
            if self._withholds(duty):
                continue
            self._answer(duty)

    def _withholds(self, duty: Duty) -> bool:
        return self._withhold_after is not None and not self._ledger.note_served(duty.seq, self._withhold_after)

    def _answer(self, duty: Duty) -> None:
        stored = self._store.batch_of_id(duty.batch_id)
        if stored is None or stored.batch is None:
            return  # the follower will bring the batch
        batch = stored.batch
        receipts = self._store.receipts_in(stored)
        index = duty.seq - stored.first_seq
        record = read_record(self._store, duty.seq)
        part = Part(duty.part)
        leaves = record.transcript.leaves(part)
        chosen = list(range(duty.first_leaf, min(duty.first_leaf + LEAVES_PER_ANSWER, len(leaves))))
        place = ReceiptInBatch(
            receipts[index].receipt, index, tuple(merkle_proof([r.receipt.struct_hash() for r in receipts], [index]))
        )

        def send(key: str) -> None:
            self._chain.send_answer(
                key,
                duty,
                batch,
                place,
                record.request,
                record.params,
                record.transcript,
                part,
                [leaves[i] for i in chosen],
                merkle_proof(leaves, chosen) if chosen else [],
            )

        # Done when the answer's event has arrived, which closes the duty.
        self._transactions.ensure(f"answer:{duty.id}", lambda: False, send)

    def demanded(self) -> bool:
        """Whether somebody demands the commitment of a receipt that is in no batch yet; closes what is covered."""
        open_demands = self._ledger.open_duties(DutyKind.DEMAND)
        if not open_demands:
            return False
        covered = self._chain.next_seq()
        waiting = False
        for duty in open_demands:
            if duty.seq < covered:
                self._ledger.close_duty(duty.kind, duty.id)
            elif duty.seq >= self._store.next_seq():
                log.critical("a receipt is demanded that this database does not hold", seq=duty.seq)
            else:
                waiting = True
        return waiting
