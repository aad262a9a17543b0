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
from eth_hash.auto import keccak

from poip_chain.chain.follower import Added, Event, Follower, Removed
from poip_chain.chain.outbox import Outbox, State
from poip_chain.chain.rpc import Call, Chain
from poip_chain.economic.clients.log import BEACON_TARGET_DISTANCE
from poip_chain.economic.network import Network
from poip_chain.economic.types import Evidence as ReceiptEvidence
from poip_chain.errors import TransactionFailed, Unavailable
from poip_chain.proof.audit import MALFORMED, Auditor, Finding, Outcome, receipt_evidence, write_proposal
from poip_chain.proof.fetch import NodeReader, NodeWithholds, Record
from poip_chain.proof.publication import Answer, Chunk, assemble, next_chunk, published_leaves
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import AuditRow, AuditState, BatchRow, BatchState, WatchtowerStore, parse_chunk
from poip_chain.spec.objects import Batch, Part, Receipt, audit_selection
from poip_chain.spec.types import Hash32

log = structlog.get_logger("watchtower")

RETRY_SECONDS = 2.0


class AuditEnded(Exception):
    """The audit came to its verdict without re-execution."""


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

    def run(self, stop: threading.Event, count: Callable[[str, int], None]) -> None:
        """Rounds until `stop` is set; `count` takes each round's counts by name."""
        while not stop.is_set():
            try:
                report = self.step()
                for name, number in report.counts.items():
                    count(name, number)
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
            self._store.add_batch(self._network.log.batch_of(args))
            report.add("batches")
        elif event.name == "BatchFinal":
            self._store.set_batch_status(args["batch_id"], "final")
        elif event.name == "BatchConvicted":
            self._store.set_batch_status(args["batch_id"], "convicted")
        elif event.name == "Challenged":
            chunk = Part(args["part"]), int(args["first_leaf"])
            self._store.open_challenge(args["batch_id"], args["index"], chunk, args["id"], args["deadline"])
        elif event.name == "Answered":
            row = self._store.close_challenge(args["id"], "answered")
            if row is not None:
                proof = self._network.availability.receipt_proof_of_answer(event.transaction_hash)
                self._store.add_answer(row["batch_id"], row["position"], row["chunk"], Answer.from_event(args, proof))
                self._store.set_audit_state(row["batch_id"], row["position"], AuditState.FETCH)
            report.add("answers")
        elif event.name == "Resolved":
            row = self._store.close_challenge(args["id"], "resolved")
            if row is not None and args["convicted"]:
                self._store.finish_audit(
                    row["batch_id"], row["position"], "withheld", {"reason": "not answered in time"}, None
                )

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
        endpoint = self._network.registry.info(batch.node).endpoint
        return self._reader(endpoint, self._settings.node_timeout)

    def _take_receipts(self, row: BatchRow, now: int, report: Report) -> None:
        try:
            entries = self._node(row.batch).receipts(row.batch)
        except NodeWithholds:
            # Receipts that nobody can read still have positions, and a challenge needs no more than that.
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
        draws = audit_selection(beacon, row.batch.id, row.batch.count, row.batch.audit_rate_ppm)
        positions = sorted(set(draws))
        self._store.set_selected(row.batch.id, beacon, positions)
        log.info("selected", batch=row.batch.id, node=row.batch.node, positions=positions)
        report.add("selected")

    def _beacon(self, batch: Batch) -> Hash32 | None:
        """The mixHash that selects, from the contract if submitted, else from the chain; None while it is not there."""
        submitted = self._network.log.beacon_of(batch)
        if submitted is not None:
            return submitted
        target = self._target_block(batch)
        if self._chain.block_number() < target + self._settings.confirmations:
            return None
        return self._chain.block(target).mix_hash

    def _target_block(self, batch: Batch) -> int:
        delay = self._network.parameters.value_at("beacon_delay", batch.parameters_version)
        target = batch.block_number + delay
        head = self._chain.block_number()
        while head - target > BEACON_TARGET_DISTANCE:
            target += BEACON_TARGET_DISTANCE
        return target

    # audits

    def _audit(self, now: int, report: Report) -> None:
        fetched: list[tuple[BatchRow, AuditRow, ReceiptEvidence, Record]] = []
        for audit in self._store.audits(AuditState.FETCH):
            row = self._store.batch(audit.batch_id)
            if row is None or audit.next_try > now or row.status == "removed":
                continue
            if row.status != "pending":
                self._store.finish_audit(audit.batch_id, audit.position, "missed", {"status": row.status}, None)
                continue
            try:
                found = self._published(row, audit, report) or self._served(row, audit)
            except AuditEnded:
                continue
            except NodeWithholds as error:
                self._not_served(row, audit, now, str(error), report)
                continue
            fetched.append((row, audit, *found))
        outcomes = self._auditor.audit([(place, record) for _, _, place, record in fetched])
        for (row, audit, place, record), outcome in zip(fetched, outcomes, strict=True):
            path = self._evidence_path(row.batch, audit.position)
            self._auditor.write_evidence(path, place, record, outcome)
            self._judged(row.batch, audit.position, outcome, path, report)
        for row in self._store.batches(BatchState.SELECTED):
            if all(audit.state is AuditState.DONE for audit in self._store.audits(batch_id=row.batch.id)):
                self._store.finish_batch(row.batch.id)

    def _served(self, row: BatchRow, audit: AuditRow) -> tuple[ReceiptEvidence, Record]:
        """The record as the node serves it. Raises NodeWithholds."""
        entries = row.receipts
        if entries is None:
            entries = self._node(row.batch).receipts(row.batch)
            self._store.set_receipts(row.batch.id, entries, BatchState.SELECTED)
        receipts = [Receipt.from_json(entry["receipt"]) for entry in entries]
        record = self._node(row.batch).record(row.batch, audit.position, receipts[audit.position])
        return receipt_evidence(row.batch, audit.position, receipts), record

    def _published(self, row: BatchRow, audit: AuditRow, report: Report) -> tuple[ReceiptEvidence, Record] | None:
        """The record as challenges brought it onto the chain, None while something is missing.

        Leaves that show a fault end the audit here, as the node's own words.
        """
        answers = self._store.answers(audit.batch_id, audit.position)
        if not answers or next_chunk(answers) is not None:
            return None
        known = next(iter(answers.values()))
        place = ReceiptEvidence(batch=row.batch, index=audit.position, proof=known.receipt_proof)
        findings = self._auditor.published_findings(place, known, published_leaves(answers))
        if findings:
            outcome = Outcome(MALFORMED, findings=tuple(findings))
            self._judged(row.batch, audit.position, outcome, None, report)
            raise AuditEnded
        return place, assemble(answers)

    def _judged(self, batch: Batch, position: int, outcome: Outcome, evidence: Path | None, report: Report) -> None:
        self._store.finish_audit(batch.id, position, outcome.verdict, outcome.to_json(), evidence)
        log.info("verdict", batch=batch.id, position=position, node=batch.node, verdict=outcome.verdict)
        report.add(f"verdict_{outcome.verdict}")
        for finding in outcome.findings:
            self._found(batch, finding, report)

    def _evidence_path(self, batch: Batch, position: int) -> Path:
        return self._settings.data / "evidence" / f"batch-{batch.id}-receipt-{position}.json"

    # withholding

    def _not_served(self, row: BatchRow, audit: AuditRow, now: int, reason: str, report: Report) -> None:
        self._store.delay_audit(audit.batch_id, audit.position, now + RETRY_SECONDS)
        report.add("withheld")
        if audit.attempts + 1 < self._settings.fetch_attempts:
            return
        chunk = next_chunk(self._store.answers(audit.batch_id, audit.position))
        known = self._store.challenges(audit.batch_id, audit.position)
        if chunk is None or any(c["state"] == "open" for c in known):
            return
        log.warning("withheld", batch=audit.batch_id, position=audit.position, node=row.batch.node, reason=reason)
        draws = audit_selection(row.beacon or bytes(32), row.batch.id, row.batch.count, row.batch.audit_rate_ppm)
        call = self._network.availability.challenge(row.batch, draws.index(audit.position), *chunk)
        key = _challenge_key(row.batch, audit.position, chunk)
        if self._settings.mode is not Mode.DEFEND or self._outbox is None:
            detail = {"position": audit.position, "reason": reason}
            self._propose(key, row.batch.id, "challenge", call, detail)
            return
        bond = self._network.parameters.value_at("availability_bond", row.batch.parameters_version)
        if not self._store.reserve_bond(row.batch.id, audit.position, chunk, bond, self._settings.bond_budget):
            log.warning("bond budget exhausted", batch=row.batch.id, position=audit.position, bond=bond)
            report.add("over_budget")
            return
        try:
            if not (self._beacon_submitted(row.batch) and self._approved(bond)):
                return
            self._outbox.send(call, key)
        except TransactionFailed as error:
            # Somebody else's challenge of the same leaves serves as well as ours; anything else is tried again.
            log.warning("challenge refused", batch=row.batch.id, position=audit.position, reason=str(error))
            self._store.release_bond(row.batch.id, audit.position, chunk)
            return
        self._store.set_audit_state(row.batch.id, audit.position, AuditState.CHALLENGED)
        report.add("challenged")

    def _beacon_submitted(self, batch: Batch) -> bool:
        """Whether the contract has the batch's beacon; if not, it is sent, and a later round goes on."""
        assert self._outbox is not None
        if self._network.log.beacon_of(batch) is not None:
            return True
        target = self._target_block(batch)
        header = self._chain.raw_header(target)
        self._outbox.send(self._network.log.submit_beacon(header), f"beacon:{target}:{keccak(header).hex()[:16]}")
        return False

    def _approved(self, bond: int) -> bool:
        """Whether the contract may take a bond; if not, the budget is approved, and a later round goes on."""
        assert self._outbox is not None
        availability = self._network.availability.address
        if self._network.token.allowance(self._outbox.address, availability) >= bond:
            return True
        self._send_unless_open("approve", self._network.token.approve(availability, self._settings.bond_budget))
        return False

    def _send_unless_open(self, purpose: str, call: Call) -> None:
        """Send a call that may be due again and again, but only one at a time."""
        assert self._outbox is not None
        waiting = [t for t in self._outbox.transactions() if t.state is State.OPEN]
        if not any(t.idempotency_key.startswith(f"{purpose}:") for t in waiting):
            self._outbox.send(call, f"{purpose}:{self._chain.block_number()}")

    def _challenges(self, now: int, report: Report) -> None:
        """Resolve challenges that were not answered in time, anybody's: the event then closes them."""
        if self._outbox is None or self._settings.mode is not Mode.DEFEND:
            return
        for challenge in self._store.challenges():
            row = self._store.batch(challenge["batch_id"])
            if challenge["state"] == "reserved" and row is not None:
                self._check_sent(row.batch, challenge)
            if challenge["state"] != "open" or now <= challenge["deadline"] or row is None:
                continue
            number = challenge["challenge_id"]
            try:
                self._outbox.send(self._network.availability.resolve(number, row.batch), f"resolve:{number}")
                report.add("resolved")
            except TransactionFailed as error:
                # Answered at the last moment, or resolved by somebody else: the next round reads which.
                log.info("resolve refused", challenge=number, reason=str(error))
        self._claim()

    def _check_sent(self, batch: Batch, challenge: dict[str, Any]) -> None:
        """Give a challenge up that was sent and came too late: somebody else's is followed instead."""
        assert self._outbox is not None
        position, chunk = challenge["position"], parse_chunk(challenge["chunk"])
        key = _challenge_key(batch, position, chunk)
        if self._outbox.known(key) and self._outbox.status(key).state in (State.REVERTED, State.STOPPED):
            self._store.release_bond(batch.id, position, chunk)
            self._store.set_audit_state(batch.id, position, AuditState.FETCH)

    def _claim(self) -> None:
        """Fetch bonds and rewards that the contracts hold for us."""
        assert self._outbox is not None
        if self._network.availability.claimable(self._outbox.address):
            self._send_unless_open("claim", self._network.availability.claim())
        if self._network.registry.rewards(self._outbox.address):
            self._send_unless_open("reward", self._network.registry.claim_reward())

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
            self._outbox.send(finding.call, finding.key)
            self._store.set_filing(finding.key, "sent")
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
            write_proposal(self._settings.data / "proposals", Finding(key, kind, call, detail))


def _challenge_key(batch: Batch, position: int, chunk: Chunk) -> str:
    return f"challenge:{batch.id}:{batch.root.hex()[:16]}:{position}:{int(chunk[0])}:{chunk[1]}"
