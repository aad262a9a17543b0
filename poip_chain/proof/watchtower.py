"""The watchtower: follows batches, audits what the beacon selects, and has `actions.py` act on what it finds (protocol
section 5).

One `step()` does one round and is safe to repeat: all it has learned is in the store, and what it has found is stored
before the work that found it counts as done. It keeps its clocks by the chain's time. Each round:

    follow events -> fetch receipts -> check them, derive the selection -> move on what is under way on chain
    -> fetch transcripts, challenge what is withheld -> check, re-execute, judge -> file
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import structlog

from poip_chain.chain.endpoints import DEVELOPMENT_CHAIN
from poip_chain.chain.follower import Added, Event, Follower, Removed
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.economic.network import Network
from poip_chain.economic.types import Evidence as ReceiptEvidence
from poip_chain.errors import NotFound, PoipError, Unavailable
from poip_chain.proof.actions import RETRY_SECONDS, Actions
from poip_chain.proof.audit import MALFORMED, Auditor, BatchReceipts, Outcome
from poip_chain.proof.court import Court
from poip_chain.proof.fetch import NodeReader, NodeWithholds, Record, fetch_all
from poip_chain.proof.publication import Answer, assemble, missing_chunks, published_leaves
from poip_chain.proof.report import Report
from poip_chain.proof.settings import WatchtowerSettings
from poip_chain.proof.store import NOTE, AuditRow, AuditState, BatchRow, BatchState, WatchtowerStore
from poip_chain.spec.objects import Batch, Part, Receipt, audit_indices
from poip_chain.spec.types import Address, Hash32

log = structlog.get_logger("watchtower")

NODE_SHARE = 2
"""A node's questions in one round may take this many times the time of one."""
PRUNE_SECONDS = 3600
STOP_SECONDS = 30.0
"""How long the end waits for the court's round; one that is cut short goes on after the next start."""
HEAD = "head"

Fetched = tuple[BatchRow, AuditRow, ReceiptEvidence, Record]


class Watchtower:
    """One watchtower over one deployment. `outbox` is needed in mode defend only. What is found false is accused by `court`,
    whose rounds `run` calls in a thread of their own."""

    def __init__(
        self,
        settings: WatchtowerSettings,
        chain: Chain,
        network: Network,
        follower: Follower,
        store: WatchtowerStore,
        auditor: Auditor,
        outbox: Outbox | None,
        reader: Callable[..., NodeReader] = NodeReader,
        court: Court | None = None,
    ) -> None:
        self._settings = settings
        self._chain = chain
        self._network = network
        self._follower = follower
        self._store = store
        self._auditor = auditor
        self._actions = Actions(settings, chain, network, store, outbox)
        self._reader = reader
        self.court = court
        wanted = settings.private_endpoints
        self._private_endpoints = chain.chain_id == DEVELOPMENT_CHAIN if wanted is None else wanted
        self._receipts: dict[int, BatchReceipts] = {}
        self._endpoints: dict[Address, str] = {}
        self._prune_at = 0

    def step(self) -> Report:
        """One round. Trouble with one node or batch is logged and tried again; raises Unavailable if the RPC is away."""
        report = Report()
        self._receipts, self._endpoints = {}, {}
        self._follow(report)
        self._check_branch()
        now = self._chain.timestamp()
        self._take_receipts(now, report)
        for row in self._store.batches(BatchState.RECEIPTS):
            self._select(row, report)
        self._equivocation(report)
        # What has a deadline comes before what takes long.
        self._actions.step(now, self._follower.position, report)
        self._audit(now, report)
        self._actions.step(now, self._follower.position, report)
        self._close(report)
        if now >= self._prune_at:
            self._store.prune(now, self._network.parameters.value("evidence_window"))
            self._prune_at = now + PRUNE_SECONDS
        return report

    def run(self, stop: threading.Event, count: Callable[[str, int], None]) -> None:
        """Rounds until `stop` is set; `count` takes each round's counts by name."""
        beside = None
        if self.court is not None:
            beside = threading.Thread(
                target=self._rounds, args=(self._court_step, "court", stop, count), name="watchtower-court", daemon=True
            )
            beside.start()
        self._rounds(self.step, "watch", stop, count)
        if beside is not None:
            beside.join(STOP_SECONDS)

    def _court_step(self) -> Report:
        assert self.court is not None
        try:
            return self.court.step()
        except PoipError:
            raise
        except Exception:  # a defect there must not end in silence: bonds stand, and moves are due
            log.exception("the court's round failed")
            return Report({"failed_rounds": 1})

    def _rounds(
        self, step: Callable[[], Report], what: str, stop: threading.Event, count: Callable[[str, int], None]
    ) -> None:
        while not stop.is_set():
            try:
                for name, number in step().counts.items():
                    count(name, number)
            except Unavailable as error:
                log.warning("waiting", what=what, reason=str(error))
            except PoipError as error:
                # One round's trouble is no reason to leave the watch; what is stored is whole, and comes up again.
                log.error("round failed", what=what, kind=type(error).__name__, reason=str(error))
                count("failed_rounds", 1)
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
            bond = int(args["bond"]) if args["challenger"] == self._actions.account else None
            self._store.open_challenge(args["batch_id"], args["index"], chunk, args["id"], args["deadline"], bond)
        elif event.name == "Answered":
            self._answered(event)
            report.add("answers")
        elif event.name == "Resolved":
            challenge = self._store.close_challenge(args["id"], "resolved")
            if challenge is not None:
                place = (challenge.batch_id, challenge.position)
                if args["convicted"]:
                    self._store.finish_audit(*place, "withheld", {"reason": "not answered in time"})
                else:
                    self._store.finish_audit(*place, "missed", {"reason": "the batch was convicted for something else"})

    def _answered(self, event: Event) -> None:
        challenge = self._store.close_challenge(event.args["id"], "answered")
        if challenge is None or not self._store.audits(batch_id=challenge.batch_id):
            return
        self._store.add_answer(challenge, Answer.from_event(event.args))
        place = (challenge.batch_id, challenge.position)
        self._store.move_audit(*place, AuditState.CHALLENGED, AuditState.FETCH)

    def _removed(self, event: Event) -> None:
        args = event.args
        if event.name == "BatchCommitted":
            self._store.set_batch_status(args["batch_id"], "removed")
        elif event.name in ("BatchFinal", "BatchConvicted"):
            self._store.set_batch_status(args["batch_id"], "pending")
        elif event.name == "Challenged":
            self._store.unchallenge(args["id"])
        elif event.name == "Answered":
            challenge = self._store.reopen_challenge(args["id"])
            if challenge is not None:
                self._store.drop_answer(challenge)
                place = (challenge.batch_id, challenge.position)
                self._store.move_audit(*place, AuditState.FETCH, AuditState.CHALLENGED)
        elif event.name == "Resolved":
            challenge = self._store.reopen_challenge(args["id"])
            if challenge is not None:
                for verdict in ("withheld", "missed"):
                    self._store.reopen_audit(challenge.batch_id, challenge.position, verdict)

    def _check_branch(self) -> None:
        """Draw again what a reorganisation drew otherwise: a beacon is a block's, and has no event that is removed.

        One question a round; only after a reorganisation is every open batch looked at.
        """
        head = self._chain.block("latest")
        known = self._store.note(HEAD)
        if known is not None:
            number, block_hash = known.split(":")
            try:
                same = self._chain.block(int(number)).hash.hex() == block_hash
            except NotFound:
                same = False
            if not same:
                log.warning("reorganised", block=int(number))
                for row in self._store.batches(status="pending"):
                    if row.beacon is not None:
                        self._redraw(row)
        self._store.set_note(HEAD, f"{head.number}:{head.hash.hex()}")

    def _redraw(self, row: BatchRow) -> None:
        beacon = self._beacon(row.batch)
        if beacon is None:
            self._store.unselect(row.batch.id)
        elif beacon != row.beacon:
            self._draw(row.batch, beacon)

    # receipts and selection

    def _take_receipts(self, now: int, report: Report) -> None:
        due = []
        for row in self._store.batches(BatchState.NEW):
            if row.next_try > now or row.status == "removed":
                continue
            if row.status != "pending":
                self._store.finish_batch(row.batch.id)
                continue
            due.append(row)
        jobs = [(row.batch.node, self._receipts_job(row.batch)) for row in due]
        for row, entries in zip(due, fetch_all(jobs, NODE_SHARE * self._settings.node_timeout), strict=True):
            if isinstance(entries, NodeWithholds):
                log.warning("receipts withheld", batch=row.batch.id, node=row.batch.node, reason=str(entries))
                self._store.delay_batch(row.batch.id, now + RETRY_SECONDS)
                report.add("withheld")
                # Receipts that nobody can read still have positions, and a challenge needs no more than that.
                if self._patience_over(row.batch, row.attempts, now):
                    self._select(row, report)
            elif entries is not None:
                self._keep_receipts(row.batch, entries, BatchState.RECEIPTS, report)

    def _receipts_job(self, batch: Batch) -> Callable[[], list[dict[str, object]]]:
        reader = self._node(batch)
        return lambda: reader.receipts(batch)

    def _keep_receipts(
        self, batch: Batch, entries: list[dict[str, object]], state: BatchState, report: Report
    ) -> BatchReceipts:
        """Store what the receipts show, then the receipts: a kill in between does the former again."""
        known = BatchReceipts(batch, [Receipt.from_json(entry["receipt"]) for entry in entries])
        for finding in self._auditor.sequence_findings(known):
            self._actions.found(batch, finding, report)
        self._store.set_receipts(batch.id, entries, state)
        self._receipts[batch.id] = known
        return known

    def _known_receipts(self, batch_id: int) -> BatchReceipts | None:
        """A batch's receipts, if they are stored; parsed once a round."""
        if batch_id not in self._receipts:
            row, receipts = self._store.batch(batch_id), self._store.receipts(batch_id)
            if row is None or receipts is None:
                return None
            self._receipts[batch_id] = BatchReceipts(row.batch, receipts)
        return self._receipts[batch_id]

    def _node(self, batch: Batch) -> NodeReader:
        if batch.node not in self._endpoints:
            self._endpoints[batch.node] = self._network.registry.info(batch.node).endpoint
        return self._reader(
            self._endpoints[batch.node], self._settings.node_timeout, private_endpoints=self._private_endpoints
        )

    def _patience_over(self, batch: Batch, attempts: int, now: int) -> bool:
        """Whether a node that fails once more is challenged: after some tries, or when half of the window is over."""
        return attempts + 1 >= self._settings.fetch_attempts or 2 * now >= batch.committed_at + batch.window_end

    def _select(self, row: BatchRow, report: Report) -> None:
        if row.status == "removed":
            return
        if row.status != "pending":
            self._store.finish_batch(row.batch.id)
            return
        beacon = self._beacon(row.batch)
        if beacon is not None:
            self._draw(row.batch, beacon)
            report.add("selected")

    def _draw(self, batch: Batch, beacon: bytes) -> None:
        positions = audit_indices(beacon, batch.id, batch.count, batch.audit_rate_ppm)
        self._store.set_selected(batch.id, beacon, positions)
        log.info("selected", batch=batch.id, node=batch.node, positions=len(positions), first=positions[:16])

    def _beacon(self, batch: Batch) -> Hash32 | None:
        """The mixHash that selects, from the contract if submitted, else from the chain; None while it is not there."""
        submitted = self._network.log.beacon_of(batch)
        if submitted is not None:
            return submitted
        target = self._actions.target_block(batch)
        if self._chain.block_number() < target + self._settings.confirmations:
            return None
        return self._chain.block(target).mix_hash

    # audits

    def _audit(self, now: int, report: Report) -> None:
        fetched: list[Fetched] = []
        asked: list[tuple[BatchRow, AuditRow]] = []
        for row, audit in self._due(now, report):
            published = self._published(row, audit, report)
            if isinstance(published, Outcome):
                self._judged(row.batch, audit.position, published, None, report)
            elif published is not None:
                fetched.append((row, audit, *published))
            else:
                asked.append((row, audit))
        fetched += self._served(asked, now, report)
        outcomes = self._auditor.audit([(place, record) for _, _, place, record in fetched])
        for (row, audit, place, record), outcome in zip(fetched, outcomes, strict=True):
            if isinstance(outcome, Unavailable):
                # What re-executes is away, not the node: nobody is blamed, and the audit comes up again.
                where = {"batch": row.batch.id, "position": audit.position, "window_end": row.batch.window_end}
                log.warning("cannot re-execute", **where, reason=str(outcome))
                self._store.delay_audit(row.batch.id, audit.position, now + RETRY_SECONDS, failed=False)
                report.add("not_executed")
                continue
            path = self._settings.data / "evidence" / f"batch-{row.batch.id}-receipt-{audit.position}.json"
            self._auditor.write_evidence(path, place, record, outcome)
            self._judged(row.batch, audit.position, outcome, path, report)

    def _due(self, now: int, report: Report) -> list[tuple[BatchRow, AuditRow]]:
        """The audits of this round: each node gets its turn, however many another has."""
        by_node: dict[Address, list[tuple[BatchRow, AuditRow]]] = {}
        rows: dict[int, BatchRow | None] = {}
        for audit in self._store.audits(AuditState.FETCH, due=now):
            if audit.batch_id not in rows:
                rows[audit.batch_id] = self._store.batch(audit.batch_id)
            row = rows[audit.batch_id]
            if row is None or row.status == "removed":
                continue
            if row.status != "pending":
                log.warning("not audited in time", batch=audit.batch_id, position=audit.position, status=row.status)
                verdict = NOTE if NOTE in audit.detail else "missed"
                self._store.finish_audit(
                    audit.batch_id, audit.position, verdict, {**audit.detail, "status": row.status}
                )
                report.add(verdict if verdict == "missed" else f"verdict_{verdict}")
                continue
            by_node.setdefault(row.batch.node, []).append((row, audit))
        turns = zip_longest(*by_node.values())
        return [due for turn in turns for due in turn if due is not None][: self._settings.audits_per_round]

    def _served(self, asked: list[tuple[BatchRow, AuditRow]], now: int, report: Report) -> list[Fetched]:
        """The records as the nodes serve them. Those that are not served are challenged in the end."""
        missing = {row.batch.id: row for row, _ in asked if not row.has_receipts}
        receipt_jobs = [(row.batch.node, self._receipts_job(row.batch)) for row in missing.values()]
        seconds = NODE_SHARE * self._settings.node_timeout
        withheld: dict[int, NodeWithholds | None] = {}
        for row, entries in zip(missing.values(), fetch_all(receipt_jobs, seconds), strict=True):
            if isinstance(entries, list):
                self._keep_receipts(row.batch, entries, BatchState.SELECTED, report)
            else:
                withheld[row.batch.id] = entries
        known = {row.batch.id: self._known_receipts(row.batch.id) for row, _ in asked}
        jobs = [(row.batch.node, self._record_job(row, audit, known, withheld)) for row, audit in asked]
        found: list[Fetched] = []
        refused: list[tuple[BatchRow, AuditRow, NodeWithholds]] = []
        for (row, audit), record in zip(asked, fetch_all(jobs, seconds), strict=True):
            receipts = known[row.batch.id]
            if isinstance(record, Record) and receipts is not None:
                found.append((row, audit, receipts.evidence(audit.position), record))
            elif isinstance(record, NodeWithholds):
                refused.append((row, audit, record))
        # The budgets may not do for all: where most is at stake first.
        for row, audit, withholds in sorted(refused, key=lambda entry: -entry[0].batch.total_fee):
            self._not_served(row, audit, now, str(withholds), report)
        return found

    def _record_job(
        self,
        row: BatchRow,
        audit: AuditRow,
        known: dict[int, BatchReceipts | None],
        withheld: dict[int, NodeWithholds | None],
    ) -> Callable[[], Record | None]:
        batch, receipts, reader = row.batch, known[row.batch.id], self._node(row.batch)

        def ask() -> Record | None:
            if receipts is not None:
                return reader.record(batch, audit.position, receipts.receipts[audit.position])
            refusal = withheld.get(batch.id)
            if refusal is not None:
                raise refusal
            return None  # the node's time ran out before it was asked

        return ask

    def _published(
        self, row: BatchRow, audit: AuditRow, report: Report
    ) -> tuple[ReceiptEvidence, Record] | Outcome | None:
        """The record as challenges brought it onto the chain, None while something is missing.

        A fault that shows in what is there already ends the audit with its outcome.
        """
        answers = self._store.answers(audit.batch_id, audit.position)
        if not answers:
            return None
        known = next(iter(answers.values()))
        receipts = self._known_receipts(row.batch.id)
        if receipts is not None:
            place = receipts.evidence(audit.position)
        else:
            proof = max((answer.receipt_proof for answer in answers.values()), key=len)
            place = ReceiptEvidence(batch=row.batch, index=audit.position, proof=proof)
        findings = self._auditor.published_findings(place, known, published_leaves(answers))
        if findings:
            return Outcome(MALFORMED, findings=tuple(findings))
        return None if missing_chunks(answers) else (place, assemble(answers))

    def _judged(self, batch: Batch, position: int, outcome: Outcome, evidence: Path | None, report: Report) -> None:
        """Store what was found, then that the audit is over: a kill in between does the former again."""
        for finding in outcome.findings:
            self._actions.found(batch, finding, report)
        self._store.finish_audit(batch.id, position, outcome.verdict, outcome.to_json(), evidence)
        log.info("verdict", batch=batch.id, position=position, node=batch.node, verdict=str(outcome.verdict))
        report.add(f"verdict_{outcome.verdict}")

    def _not_served(self, row: BatchRow, audit: AuditRow, now: int, reason: str, report: Report) -> None:
        report.add("withheld")
        if self._patience_over(row.batch, audit.attempts, now):
            known = self._store.challenges(audit.batch_id, audit.position)
            under_way = {challenge.chunk for challenge in known if challenge.state == "open"}
            # All that is missing at once: a node that answers each as late as it may cannot outlast the window.
            limits: list[str] = []
            for chunk in missing_chunks(self._store.answers(audit.batch_id, audit.position)):
                if chunk not in under_way:
                    limit = self._actions.challenge(row, audit, chunk, reason, now, report)
                    limits += [] if limit is None else [limit]
            note = limits[0] if limits else None
            if note != audit.detail.get(NOTE):
                self._store.note_audit(audit.batch_id, audit.position, note)
        # Last, so that a kill in between does not put the challenge off.
        self._store.delay_audit(audit.batch_id, audit.position, now + RETRY_SECONDS)

    def _close(self, report: Report) -> None:
        for row in self._store.batches(BatchState.SELECTED):
            audits = self._store.audits(batch_id=row.batch.id)
            if all(audit.state is AuditState.DONE for audit in audits):
                self._store.finish_batch(row.batch.id)
                report.add("batches_done")

    # offences that need no audit

    def _equivocation(self, report: Report) -> None:
        for a, b in self._store.equivocations(unjudged=True):
            finding = self._auditor.equivocation_finding(a, b, self._known_receipts)
            if finding is not None:
                self._actions.found(None, finding, report)
            self._store.judged(a, b)
