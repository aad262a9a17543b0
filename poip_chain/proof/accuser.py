"""Accusing false computation: from the stored claim to the conviction, through every contest.

`step()` does one round and may be called at any time, also after a kill at any line: claims are stored before their
commitments leave (`examiner.py`), what was sent is the outbox's, and everything else is read from the chain again.

    claim, salt and bond stored -> commit -> accuse -> each contest: what stands below its node, or the point
    -> resolve, after whoever accused the batch earlier -> claim

One accusation of a batch stands at a time, the receipt that is cheapest to compute first. A claim is told nobody, no
endpoint either, before its commitment is on chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.court import POINT_LEVEL, AccusationInfo, AccusationStatus, ContestInfo, ContestOutcome
from poip_chain.errors import IntegrityError, PoipError, Unavailable
from poip_chain.proof.accusations import AccusationRow, AccusationState, Claim, Ending
from poip_chain.proof.examiner import KIND, Examiner, margin_of
from poip_chain.proof.hand import Hand
from poip_chain.proof.report import Report
from poip_chain.proof.settings import WatchtowerSettings
from poip_chain.proof.store import FilingState, WatchtowerStore
from poip_chain.service.court.sending import Progress
from poip_chain.service.court.traces import Players
from poip_chain.service.court.view import Accused, CourtView, accusation_id
from poip_chain.spec.dispute import LEVELS, Node, asked_cell

log = structlog.get_logger("watchtower")

FINAL_DEPTH = 3
"""Blocks under which an accusation's end lies when it is believed."""
CLEARED = 32
"""Others' accusations in the way that are moved on in one round."""
BY_STEP = 1


class Accuser:
    """See the module's docstring. hand: who moves; None in mode watch. examiner: where its claims come from; None for those
    in the store alone."""

    def __init__(
        self,
        settings: WatchtowerSettings,
        view: CourtView,
        players: Players,
        store: WatchtowerStore,
        hand: Hand | None,
        examiner: Examiner | None,
    ) -> None:
        self._settings, self._view, self._players, self._store = settings, view, players, store
        self._hand, self._examiner = hand, examiner
        self._over: set[int] = set()
        self._told: set[tuple[str, str]] = set()

    def step(self) -> Report:
        """One round. Raises Unavailable without a chain; trouble with one accusation is logged and comes up again."""
        report = Report()
        now = self._view.time()
        if self._hand is not None:
            self._hand.step()
            # What has a clock running comes before what takes long.
            for row in self._store.accusations(AccusationState.STANDING):
                self._guarded(row, now, report)
        examined = None if self._examiner is None else self._examiner.step(report)
        if self._hand is not None:
            if examined:
                for row in self._store.accusations(AccusationState.STANDING, examined):
                    self._guarded(row, self._view.time(), report)
            self._claim_credit(self._hand)
        if not examined and not self._store.accusations(AccusationState.STANDING):
            self._players.release()
        return report

    def _guarded(self, row: AccusationRow, now: int, report: Report) -> None:
        assert self._hand is not None and row.claim is not None
        try:
            self._tend(self._hand, row, row.claim, now, report)
        except Unavailable:
            raise
        except PoipError as error:
            self._tell(row.claim, "an accusation is in trouble", error=str(error)[:300])
            report.add("accusation_trouble")

    # From the claim to its end

    def _tend(self, hand: Hand, row: AccusationRow, claim: Claim, now: int, report: Report) -> None:
        if claim.accuser != hand.address:
            self._tell(claim, "an accusation of another account stands in the database")
            return
        found = [
            seen
            for seen in self._view.accusations(batch_id=claim.batch.id, from_block=claim.batch.block_number)
            if seen.accuser == claim.accuser and seen.commitment == claim.commitment
        ]
        self._store.see_accusation(row, found[0].id if found else None)
        if not found:
            self._commit(hand, row, claim, now, report)
            return
        accusation, info = found[0].id, self._view.info(found[0].id)
        if info.is_over:
            self._ended(row, accusation, now, report)
        elif info.status is AccusationStatus.COMMITTED:
            self._reveal(hand, claim, accusation, info, found[0].where.block, now)
        elif info.status is AccusationStatus.REVEALED:
            accused = self._view.accused(accusation)
            if accused is None:
                return  # the endpoint's events lag behind its state
            if info.open_contests:
                self._answer_contests(hand, claim, accused, now)
            elif now > accused.terms.contest_end and self._way_is_clear(hand, claim, accusation, now):
                call = self._view.network.accusations.resolve(accusation, accused.terms, claim.batch)
                job = f"{_name(claim)}:resolve:{accusation}"
                hand.ensure(job, lambda: call)
                if job in hand.refused:
                    self._over.clear()

    def _commit(self, hand: Hand, row: AccusationRow, claim: Claim, now: int, report: Report) -> None:
        batch, job = claim.batch, f"{_name(claim)}:commit"
        if hand.progress(job) is not Progress.NONE:
            return
        known = self._store.batch(batch.id)
        margin = margin_of(batch.window_end - batch.committed_at)
        if known is None or known.batch != batch or known.status != "pending":
            reason = "the batch is gone or settled"
        elif self._view.network.log.window_end_of(batch) - now <= margin:
            reason = "its window is over"
        else:
            if self._approved(hand, claim):
                call = self._view.network.accusations.commit(batch, claim.commitment)
                if hand.ensure(job, lambda: call) is Progress.OPEN:
                    report.add("accused")
                elif job in hand.refused:
                    self._tell(claim, "an accusation cannot be committed", error=hand.refused[job][:300])
            return
        log.warning("an accusation was never committed", batch=batch.id, position=claim.position, reason=reason)
        self._store.end_accusation(row, Ending.DROPPED, now)

    def _approved(self, hand: Hand, claim: Claim) -> bool:
        """Whether the court may take the bonds on their way; if not, both budgets are approved, and a later round goes
        on."""
        token, spender = self._view.network.token, self._view.network.accusations.address
        bond = claim.bond or self._view.network.parameters.value_at("accusation_bond", claim.batch.parameters_version)
        waiting = sum(
            r.claim.bond
            for r in self._store.accusations(AccusationState.STANDING)
            if r.claim is not None and r.accusation is None and r.claim != claim
        )
        allowance = token.allowance(hand.address, spender)
        if allowance >= waiting + bond:
            return True
        amount = max(bond, self._settings.bond_budget) + self._settings.court.defence_budget
        call = token.approve(spender, amount)
        hand.ensure(f"court:approve:{allowance}:{amount}", lambda: call, again=True)
        return False

    def _reveal(
        self, hand: Hand, claim: Claim, accusation: int, info: AccusationInfo, committed_in: int, now: int
    ) -> None:
        parameters = self._view.network.parameters
        window = parameters.value_at("reveal_window", claim.batch.parameters_version)
        accusations = self._view.network.accusations
        if now > info.committed_at + window:
            self._tell(claim, "an accusation was not revealed in time", accusation=accusation)
            expire = accusations.expire(accusation, claim.batch)
            hand.ensure(f"{_name(claim)}:expire:{accusation}", lambda: expire)
            return
        # Whoever sees the claim could commit to it: a commitment that a reorganisation drops must not be out-run. But
        # half of the time is kept for the reveal.
        deep = self._view.head() - committed_in + 1 > self._settings.confirmations
        if not deep and 2 * (now - info.committed_at) < window:
            return
        call = Call(accusations.address, claim.reveal_of(accusation), f"{accusations.NAME}.accuse")
        job = f"{_name(claim)}:reveal:{accusation}"
        hand.ensure(job, lambda: call)
        if job in hand.refused:
            self._tell(claim, "an accusation cannot be revealed", error=hand.refused[job][:300])

    def _ended(self, row: AccusationRow, accusation: int, now: int, report: Report) -> None:
        """Close an accusation that is over, once that lies deep enough."""
        ended = self._view.endings(accusation)
        if ended is None or self._view.head() - ended[2].block < FINAL_DEPTH:
            return
        status, convicted, _ = ended
        ending = Ending.EXPIRED
        if status is AccusationStatus.STOOD:
            ending = Ending.CONVICTED if convicted else Ending.STOOD
        elif status is AccusationStatus.LOST:
            won = [
                c.ended for c in self._view.contests(accusation) if c.ended and c.ended.outcome is ContestOutcome.WON
            ]
            ending = Ending.LOST_BY_STEP if any(end.by == BY_STEP for end in won) else Ending.LOST_BY_TIME
        if ending is Ending.CONVICTED:
            for filing in self._store.filings(FilingState.EVIDENCE):
                if (
                    filing.kind == KIND
                    and filing.batch_id == row.batch_id
                    and filing.detail["position"] == row.position
                ):
                    self._store.set_filing(filing.key, FilingState.DONE)
        log.warning("an accusation has ended", accusation=accusation, batch=row.batch_id, ending=ending.value)
        self._store.end_accusation(row, ending, now)
        report.add("accusation_" + ending.value.replace(" ", "_"))

    # Contests

    def _answer_contests(self, hand: Hand, claim: Claim, accused: Accused, now: int) -> None:
        for contest in self._view.contests(accused.id):
            at = None if contest.ended is not None else self._view.contest(contest.id)
            if at is None or not at.is_open:
                continue
            if at.revealed_at != 0:
                if _contester_is_late(at, now):
                    self._settle(hand, accused, contest.id)
            elif now > at.since + at.accuser_left:
                self._tell(claim, "too late to answer a contest", contest=contest.id)
            else:
                # Named by the node: what is shown for one contest is shown for all that stand there.
                job = f"{_name(claim)}:{accused.id}:{at.cell}:{at.level}:{at.index}"
                answer = _Answer(self, claim, accused, contest.id, at)
                if hand.progress(job) is Progress.NONE:
                    hand.ensure(job, answer)
                if job in hand.refused:
                    log.info("an answer is refused", contest=contest.id, reason=hand.refused[job][:300])

    def answer(self, claim: Claim, accused: Accused, contest: int, at: ContestInfo) -> Call:
        """The accuser's move in a contest. Raises IntegrityError if this machine computes another trace by now."""
        contests, terms = self._view.network.contests, accused.terms
        player = self._players.player(claim.weights_root, claim.prompt, claim.output)
        if player.root != terms.trace.trace_root:
            raise IntegrityError("the canonical engine does not give the trace any more that was accused with.")
        if at.level == POINT_LEVEL:
            point = accused.points[at.index]
            proof = player.point(point.position, point.token)
            points = (accused.margins, accused.fingerprints)
            return contests.show_point(
                contest, terms, points, (proof.ids, proof.ids_proof), (proof.leaves, proof.proof)
            )
        shown = player.reveal(at.cell, Node(at.level, at.index))
        asked = asked_cell(contests.terms_hash(terms), at.cell)
        if at.level > LEVELS:
            return contests.reveal(contest, asked, shown)
        return contests.reveal_leaves(contest, asked, b"".join(shown))

    def _settle(self, hand: Hand, accused: Accused, contest: int) -> None:
        call = self._view.network.contests.settle(contest, accused.terms)
        hand.ensure(f"court:{contest}:settle", lambda: call)

    # Others in the way

    def _way_is_clear(self, hand: Hand, claim: Claim, accusation: int, now: int) -> bool:
        """Whether all accusations of the batch that were committed earlier are over; what can end them is sent."""
        moved = 0
        for number in range(accusation & (2**32 - 1)):
            other = accusation_id(claim.batch.id, number)
            if other in self._over:
                continue
            info = self._view.info(other)
            if info.is_over:
                self._over.add(other)
                continue
            moved += 1
            self._move_on(hand, claim, other, info, now)
            if moved == CLEARED:
                break
        return moved == 0

    def _move_on(self, hand: Hand, claim: Claim, other: int, info: AccusationInfo, now: int) -> None:
        """End somebody else's accusation, or a contest of it, if its time is over."""
        accusations = self._view.network.accusations
        if info.status is AccusationStatus.COMMITTED:
            window = self._view.network.parameters.value_at("reveal_window", claim.batch.parameters_version)
            if now > info.committed_at + window:
                expire = accusations.expire(other, claim.batch)
                hand.ensure(f"court:expire:{other}", lambda: expire)
            return
        accused = self._view.accused(other)
        if accused is None or now <= accused.terms.contest_end:
            return
        if not info.open_contests:
            resolve = accusations.resolve(other, accused.terms, claim.batch)
            hand.ensure(f"court:resolve:{other}", lambda: resolve)
            return
        for contest in self._view.contests(other):
            at = None if contest.ended is not None else self._view.contest(contest.id)
            if at is not None and at.is_open and (_contester_is_late(at, now) or _accuser_is_late(at, now)):
                self._settle(hand, accused, contest.id)

    # Money

    def _claim_credit(self, hand: Hand) -> None:
        credit = self._view.credit(hand.address)
        if credit:
            call = self._view.network.accusations.claim()
            hand.ensure(f"court:claim:{credit}", lambda: call, again=True)

    def _tell(self, claim: Claim, what: str, **fields: object) -> None:
        """Log something once for an accusation."""
        key = (claim.commitment.hex(), what)
        if key not in self._told:
            self._told.add(key)
            log.error(what, batch=claim.batch.id, position=claim.position, **fields)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An accuser's move, computed when it is to be sent."""

    accuser: Accuser
    claim: Claim
    accused: Accused
    contest: int
    at: ContestInfo

    def __call__(self) -> Call:
        return self.accuser.answer(self.claim, self.accused, self.contest, self.at)


def _name(claim: Claim) -> str:
    """How the jobs of an accusation begin: no other has its commitment."""
    return f"accuse:{claim.commitment.hex()[:16]}"


def _accuser_is_late(at: ContestInfo, now: int) -> bool:
    due = at.since + at.accuser_left
    return at.revealed_at > due or (at.revealed_at == 0 and now > due)


def _contester_is_late(at: ContestInfo, now: int) -> bool:
    """Whether a contest whose node was shown in time can be settled against its contester."""
    if at.revealed_at == 0 or at.revealed_at > at.since + at.accuser_left:
        return False
    return at.level == POINT_LEVEL or now > max(at.revealed_at, at.since) + at.contester_left
