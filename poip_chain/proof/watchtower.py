"""The watchtower: follows batches, audits what the beacon selects, and acts on what it finds (protocol section 5).

One `step()` does one round and is safe to repeat: all it has learned is in the store, all it sends goes through the
outbox under idempotency keys, and a revert that says "already done" by somebody else is success. It keeps its clocks by
the chain's time. Each round:

    follow events -> fetch receipts -> check them, derive the selection -> fetch transcripts -> check, re-execute, judge
    -> challenge what is withheld, resolve what was not answered, file what a contract can judge
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from poip_chain.chain.follower import Added, Event, Follower, Removed
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain
from poip_chain.economic.network import Network
from poip_chain.errors import InvalidInput, NotFound, PoipError, TransactionFailed, Unavailable
from poip_chain.proof.audit import Auditor, Finding, Outcome
from poip_chain.proof.fetch import NodeReader, NodeWithholds, Record
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import AuditRow, AuditState, BatchRow, BatchState, WatchtowerStore
from poip_chain.spec.objects import Batch, Part, Receipt, audit_indices
from poip_chain.spec.types import Hash32

log = structlog.get_logger("watchtower")

RETRY_SECONDS = 2.0
BEACON_RETRY_BLOCKS = 8000
"""Distance of the fixed targets that follow a missed beacon block (CommitmentLog)."""


@dataclass
class Report:
    """What one round did: counts by name, for logs and metrics."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Count one."""
        self.counts[name] = self.counts.get(name, 0) + 1


class Watchtower:
    """One watchtower over one deployment. `outbox` is needed in mode defend only."""

    def __init__(
        self,
        settings: WatchtowerSettings,
        chain: Chain,
        network: Network,
        follower: Follower,
        store: WatchtowerStore,
        auditor: Auditor,
        outbox: Outbox | None,
        reader: Callable[[str, float], NodeReader] = NodeReader,
    ) -> None:
        self._settings = settings
        self._chain = chain
        self._network = network
        self._follower = follower
        self._store = store
        self._auditor = auditor
        self._outbox = outbox
        self._reader = reader

    def step(self) -> Report:
        """One round. Trouble with one node or batch is logged and tried again; raises Unavailable if the RPC is away."""
        report = Report()
        self._follow(report)
        now = self._chain.timestamp()
        for row in self._store.batches(BatchState.NEW):
            self._guarded(self._take_receipts, row, now, report)
        for row in self._store.batches(BatchState.RECEIPTS):
            self._guarded(self._select, row, now, report)
        self._audit(now, report)
        self._equivocation(report)
        self._challenges(now, report)
        if self._outbox is not None:
            self._outbox.step()
        return report

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop` is set."""
        while not stop.is_set():
            try:
                report = self.step()
                if report.counts:
                    log.info("round", **report.counts)
            except Unavailable as error:
                log.warning("waiting", reason=str(error))
            stop.wait(self._settings.poll_interval)

    # following

    def _follow(self, report: Report) -> None:
        while changes := self._follower.poll():
            for change in changes:
                if isinstance(change, Added):
                    self._added(change.event, report)
                elif isinstance(change, Removed):
                    self._removed(change.event)
                self._follower.commit(change)

    def _added(self, event: Event, report: Report) -> None:
        args = event.args
        if event.name == "BatchCommitted":
            self._store.add_batch(self._network.log.batch_from_event(event))
            report.add("batches")
        elif event.name == "BatchFinal":
            self._store.set_batch_status(args["batch_id"], "final")
        elif event.name == "BatchConvicted":
            self._store.set_batch_status(args["batch_id"], "convicted")
        elif event.name == "Challenged":
            if self._outbox is not None and args["challenger"] == self._outbox.address:
                self._store.open_challenge(
                    args["batch_id"], args["index"], args["challenge_id"], args["deadline"]
                )
        elif event.name == "Answered":
            self._store.close_challenge(args["challenge_id"], "answered")
            self._store.set_audit_state(args["batch_id"], args["index"], AuditState.FETCH)
            report.add("answers")
        elif event.name == "ChallengeResolved":
            self._store.close_challenge(args["challenge_id"], "resolved")

    def _removed(self, event: Event) -> None:
        if event.name == "BatchCommitted":
            self._store.set_batch_status(event.args["batch_id"], "removed")
        elif event.name in ("BatchFinal", "BatchConvicted"):
            self._store.set_batch_status(event.args["batch_id"], "pending")

    # receipts and selection

    def _guarded(self, work: Callable[[BatchRow, int, Report], None], row: BatchRow, now: int, report: Report) -> None:
        if row.next_try > now or row.status == "removed":
            return
        if row.status != "pending":
            self._store.finish_batch(row.batch.id)
            return
        try:
            work(row, now, report)
        except NodeWithholds as error:
            log.warning("node withholds", batch=row.batch.id, node=row.batch.node, reason=str(error))
            self._store.delay_batch(row.batch.id, now + RETRY_SECONDS)
            report.add("withheld")

    def _node(self, batch: Batch) -> NodeReader:
        endpoint = self._network.registry.node_info(batch.node).endpoint
        return self._reader(endpoint, self._settings.node_timeout)

    def _take_receipts(self, row: BatchRow, now: int, report: Report) -> None:
        try:
            entries = self._node(row.batch).receipts(row.batch)
        except NodeWithholds:
            # Receipts that nobody can read still have positions: the selection and the challenges need nothing else.
            if row.attempts + 1 >= self._settings.fetch_attempts:
                self._select(row, now, report)
            raise
        self._store.set_receipts(row.batch.id, entries)
        receipts = [Receipt.from_json(entry["receipt"]) for entry in entries]
        for finding in self._auditor.sequence_findings(row.batch, receipts):
            self._found(row.batch, finding, report)

    def _select(self, row: BatchRow, now: int, report: Report) -> None:
        beacon = self._beacon(row.batch)
        if beacon is None:
            return
        positions = audit_indices(beacon, row.batch.id, row.batch.count, row.batch.audit_rate_ppm)
        self._store.set_selected(row.batch.id, beacon, positions)
        log.info("selected", batch=row.batch.id, node=row.batch.node, positions=positions)
        report.add("selected")

    def _beacon(self, batch: Batch) -> Hash32 | None:
        """The mixHash that selects, from the contract if submitted, else from the chain; None while it is not there."""
        submitted = self._network.log.beacon_of(batch)
        if submitted != bytes(32):
            return submitted
        target = self._target_block(batch)
        if self._chain.block_number() < target + self._settings.confirmations:
            return None
        return self._chain.block(target).mix_hash

    def _target_block(self, batch: Batch) -> int:
        delay = self._network.parameters.value_at("beacon_delay", batch.parameters_version)
        target = batch.block_number + delay
        head = self._chain.block_number()
        while head - target > BEACON_RETRY_BLOCKS:
            target += BEACON_RETRY_BLOCKS
        return target

    # audits

    def _audit(self, now: int, report: Report) -> None:
        fetched: list[tuple[BatchRow, AuditRow, Record]] = []
        for audit in self._store.audits(AuditState.FETCH):
            row = self._store.batch(audit.batch_id)
            if row is None or audit.next_try > now or row.status == "removed":
                continue
            if row.status != "pending":
                self._store.finish_audit(audit.batch_id, audit.position, "missed", {"status": row.status}, None)
                continue
            try:
                fetched.append((row, audit, self._record(row, audit)))
            except NodeWithholds as error:
                self._not_served(row, audit, now, str(error), report)
        for (row, audit, record), outcome in zip(
            fetched, self._auditor.audit([(row.batch, record) for row, _, record in fetched]), strict=True
        ):
            self._judged(row, audit, record, outcome, report)
        for row in self._store.batches(BatchState.SELECTED):
            if all(audit.state is AuditState.DONE for audit in self._store.audits(batch_id=row.batch.id)):
                self._store.finish_batch(row.batch.id)

    def _record(self, row: BatchRow, audit: AuditRow) -> Record:
        if row.receipts is None:
            entries = self._node(row.batch).receipts(row.batch)
            self._store.set_receipts(row.batch.id, entries)
            self._store.set_selected(row.batch.id, row.beacon or bytes(32), [])
        else:
            entries = row.receipts
        receipt = Receipt.from_json(entries[audit.position]["receipt"])
        return self._node(row.batch).record(row.batch, audit.position, receipt)

    def _judged(self, row: BatchRow, audit: AuditRow, record: Record, outcome: Outcome, report: Report) -> None:
        path = self._auditor.write_evidence(
            self._evidence_path(row.batch, audit.position), row.batch, audit.position, row.receipts, record, outcome
        )
        self._store.finish_audit(row.batch.id, audit.position, outcome.verdict, outcome.to_json(), path)
        log.info(
            "verdict", batch=row.batch.id, position=audit.position, node=row.batch.node, verdict=outcome.verdict,
            evidence=str(path),
        )  # fmt: skip
        report.add(f"verdict_{outcome.verdict}")
        for finding in outcome.findings:
            self._found(row.batch, finding, report)

    def _evidence_path(self, batch: Batch, position: int) -> Path:
        return self._settings.data / "evidence" / f"batch-{batch.id}-receipt-{position}.json"

    # withholding

    def _not_served(self, row: BatchRow, audit: AuditRow, now: int, reason: str, report: Report) -> None:
        self._store.delay_audit(audit.batch_id, audit.position, now + RETRY_SECONDS)
        report.add("withheld")
        if audit.attempts + 1 < self._settings.fetch_attempts:
            return
        log.warning("withheld", batch=audit.batch_id, position=audit.position, node=row.batch.node, reason=reason)
        call = self._network.availability.challenge(row.batch, audit.position, Part.OUTPUT, 0)
        key = f"challenge:{row.batch.id}:{row.batch.root.hex()[:16]}:{audit.position}"
        if self._settings.mode is not Mode.DEFEND or self._outbox is None:
            self._propose(key, row.batch.id, "challenge", call, {"position": audit.position, "reason": reason})
            return
        bond = self._network.parameters.value_at("availability_bond", row.batch.parameters_version)
        if not self._store.reserve_bond(row.batch.id, audit.position, bond, self._settings.bond_budget):
            log.warning("bond budget exhausted", batch=row.batch.id, position=audit.position, bond=bond)
            report.add("over_budget")
            return
        try:
            self._submit_beacon(row.batch)
            self._approve(bond)
            self._outbox.execute(call, key)
        except TransactionFailed as error:
            # Somebody else's challenge of the same receipt serves as well as ours; anything else is tried again.
            log.warning("challenge refused", batch=row.batch.id, position=audit.position, reason=str(error))
            self._store.release_bond(row.batch.id, audit.position)
            return
        self._store.set_audit_state(row.batch.id, audit.position, AuditState.CHALLENGED)
        report.add("challenged")

    def _submit_beacon(self, batch: Batch) -> None:
        assert self._outbox is not None
        if self._network.log.beacon_of(batch) == bytes(32):
            target = self._target_block(batch)
            header = self._chain.raw_header(target)
            try:
                self._outbox.execute(self._network.log.submit_beacon(header), f"beacon:{target}:{batch.id}")
            except TransactionFailed:
                if self._network.log.beacon_of(batch) == bytes(32):
                    raise

    def _approve(self, bond: int) -> None:
        assert self._outbox is not None
        availability = self._network.availability.address
        allowance = self._network.token.allowance(self._outbox.address, availability)
        if allowance < bond:
            total = max(self._settings.bond_budget, bond)
            number = len(self._store.challenges())
            self._outbox.execute(self._network.token.approve(availability, total), f"approve:{availability}:{number}")

    def _challenges(self, now: int, report: Report) -> None:
        """Resolve our challenges that were not answered in time. The chain pays the bond back with the conviction."""
        if self._outbox is None:
            return
        for row in self._store.challenges():
            if row["state"] != "open" or row["deadline"] is None or now <= row["deadline"]:
                continue
            challenge = row["challenge_id"]
            try:
                self._outbox.execute(self._network.availability.resolve(challenge), f"resolve:{challenge}")
                report.add("resolved")
            except TransactionFailed as error:
                # Answered or resolved by somebody meanwhile: the event that says so closes it.
                log.info("resolve refused", challenge=challenge, reason=str(error))
                continue
            self._store.close_challenge(challenge, "resolved")
            self._finish_withheld(row["batch_id"], row["position"])

    def _finish_withheld(self, batch_id: int, position: int) -> None:
        self._store.finish_audit(batch_id, position, "withheld", {"reason": "not answered in time"}, None)

    # offences

    def _equivocation(self, report: Report) -> None:
        for a, b in self._store.equivocations():
            finding = self._auditor.equivocation_finding(a, b, self._evidence_of)
            if finding is not None:
                self._found(None, finding, report)

    def _evidence_of(self, batch_id: int | None) -> tuple[Batch, list[dict[str, Any]]] | None:
        row = None if batch_id is None else self._store.batch(batch_id)
        return None if row is None or row.receipts is None else (row.batch, row.receipts)

    def _found(self, batch: Batch | None, finding: Finding, report: Report) -> None:
        """File an offence once; one conviction per batch is all that there is to win."""
        batch_id = None if batch is None else batch.id
        if finding.call is None or self._settings.mode is not Mode.DEFEND or self._outbox is None:
            self._propose(finding.key, batch_id, finding.kind, finding.call, finding.detail)
            return
        if self._store.add_filing(finding.key, batch_id, finding.kind, "found", finding.detail):
            report.add("offences")
            log.warning("offence", kind=finding.kind, **finding.detail)
        state = next(f["state"] for f in self._store.filings() if f["key"] == finding.key)
        if state != "found":
            return
        try:
            self._outbox.execute(finding.call, finding.key)
            self._store.set_filing(finding.key, "done")
            report.add("filed")
        except TransactionFailed as error:
            log.info("filing refused", kind=finding.kind, reason=str(error))
            self._store.set_filing(finding.key, "refused")

    def _propose(self, key: str, batch_id: int | None, kind: str, call: Call | None, detail: dict[str, Any]) -> None:
        state = "evidence" if call is None else "proposed"
        if not self._store.add_filing(key, batch_id, kind, state, detail):
            return
        log.warning("offence" if call is None else "proposed", kind=kind, **detail)
        if self._settings.mode is Mode.PROPOSE and call is not None:
            self._auditor.write_proposal(self._settings.data / "proposals", key, kind, call, detail)

    def observe(self, receipt: Receipt, signature: bytes) -> None:
        """Take in a receipt that a client holds, to be compared with all others of its node.

        Raises InvalidSignature or InvalidInput if the node's key did not sign it, NotFound for an unknown node.
        """
        try:
            signer = self._network.registry.signing_key(receipt.node, receipt.seq)
        except PoipError as error:
            raise NotFound(f"{receipt.node} is not a registered node.") from error
        if receipt.recover(self._network.domain("log"), signature) != signer:
            raise InvalidInput(f"the receipt is not signed by the key {signer} of node {receipt.node}.")
        self._store.observe(receipt, signature)
