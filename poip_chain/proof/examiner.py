"""From a verdict to an accusation that is ready: confirmed by the canonical engine, with the cheapest points that convict.

An answer found false is computed again in the court's arithmetic. What that does not confirm, what cannot be kept in
time, and what the bond budget does not hold is not accused; the reason is stored for people. A claim is stored with its
salt, and its bond reserved, before anybody hears of it. What happens to it then is the accuser's (`accuser.py`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from poip_chain.canonical.moves import Player
from poip_chain.economic.money import format_amount
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import InsufficientFunds, PoipError, Unavailable
from poip_chain.proof.accusations import AccusationRow, AccusationState, Claim, Ending
from poip_chain.proof.claims import Grounds, grounds_of
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.hand import Hand
from poip_chain.proof.report import Report
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import BatchRow, FilingState, WatchtowerStore
from poip_chain.service.court.traces import Players
from poip_chain.service.court.view import CourtView
from poip_chain.spec.scores import Verdict

log = structlog.get_logger("watchtower")

KIND = "wrong_computation"
ATTEMPTS = 2
"""Accusations of one batch at most: one before was lost by time, or not revealed in time."""
MAX_MARGIN = 60
MAX_PAUSE = 600.0


def margin_of(window: int) -> int:
    """Seconds that a transaction is given to be mined, in a window of so many seconds."""
    return max(2, min(MAX_MARGIN, window // 10))


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer found false, that could be accused."""

    row: BatchRow
    position: int
    attempt: int
    evidence: Path


class NotNow(PoipError):
    """Why an answer is not accused at present. `name` is what is counted."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class Never(NotNow):
    """Why an answer is not accused at all."""


class Examiner:
    """See the module's docstring. hand: who would move; None in mode watch. clock: seconds, for the pauses after trouble."""

    def __init__(
        self,
        settings: WatchtowerSettings,
        view: CourtView,
        players: Players,
        store: WatchtowerStore,
        hand: Hand | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._view, self._players, self._store = settings, view, players, store
        self._hand, self._clock = hand, clock
        self._pauses: dict[tuple[int, int], tuple[float, float]] = {}

    def step(self, report: Report) -> int | None:
        """Examine one answer, and store its claim if it is to be accused; the batch whose claim was stored.

        One a round: a trace takes seconds to minutes, and accusations that stand have their moves to make.
        """
        for candidate in self._candidates():
            place = (candidate.row.batch.id, candidate.position)
            if self._clock() < self._pauses.get(place, (0.0, 0.0))[0]:
                continue
            if self._view.network.log.status_of(candidate.row.batch) is not BatchStatus.PENDING:
                continue  # the events that say so are still to be followed
            try:
                return self._consider(candidate, report)
            except Unavailable:
                raise
            except Never as reason:
                self._note(candidate, AccusationState.REFUSED, reason.message, reason.name, report)
            except NotNow as reason:
                self._note(candidate, AccusationState.WAITING, reason.message, reason.name, report)
                self._pause(place)
            except (PoipError, OSError) as error:
                # No evidence, no engine, or one that computes wrong bits: nothing is filed.
                self._note(candidate, AccusationState.WAITING, str(error), "accusation_trouble", report)
                self._pause(place)
        return None

    def _candidates(self) -> Iterator[Candidate]:
        """Answers found false in batches that can still be convicted: the earliest window first, then the cheapest."""
        found: list[tuple[int, int, int, Candidate]] = []
        for filing in self._store.filings(FilingState.EVIDENCE):
            row = None if filing.kind != KIND or filing.batch_id is None else self._store.batch(filing.batch_id)
            if row is None or row.status != "pending":
                continue
            known = self._store.accusations(batch_id=row.batch.id)
            tried = [r for r in known if r.state is AccusationState.ENDED and r.reason != Ending.DROPPED]
            if len(tried) >= ATTEMPTS or any(r.state is AccusationState.STANDING for r in known):
                continue
            position = int(filing.detail["position"])
            mine = [r for r in known if r.position == position]
            if any(r.reason == Ending.LOST_BY_STEP for r in mine):
                continue
            attempt = sum(r.state is AccusationState.ENDED for r in mine)
            settled = (AccusationState.REFUSED, AccusationState.REPORTED)
            if any(r.attempt == attempt and r.state in settled and self._stays(r) for r in mine):
                continue
            audits = [a for a in self._store.audits(batch_id=row.batch.id) if a.position == position]
            if not audits or audits[0].verdict != Verdict.FRAUD or audits[0].evidence is None:
                continue
            cost = int(audits[0].detail.get("tokens", 0))
            candidate = Candidate(row, position, attempt, Path(audits[0].evidence))
            found.append((row.batch.window_end, cost, position, candidate))
        return (candidate for *_, candidate in sorted(found, key=lambda entry: entry[:3]))

    def _stays(self, row: AccusationRow) -> bool:
        """Whether nothing is to be done about an answer that was only reported, or refused."""
        return row.state is AccusationState.REFUSED or self._settings.mode is Mode.WATCH

    def _consider(self, candidate: Candidate, report: Report) -> int | None:
        """Store a claim; the batch's id, None if it is only reported. Raises NotNow, Never and what an engine does."""
        batch = candidate.row.batch
        self._check_time(candidate)
        bond = self._checked_bond(candidate) if self._settings.mode is Mode.DEFEND else 0
        evidence = Evidence.read(candidate.evidence)
        if evidence.batch != batch or evidence.position != candidate.position:
            raise NotNow("accusation_trouble", "its evidence is of another batch: the audit is still to be repeated")
        started = self._clock()
        player, grounds = self._grounds(evidence)
        seconds = self._clock() - started
        if grounds.claim is None:
            raise Never("not_confirmed", f"not accused: {grounds.reason}")
        clock = self._parameter(candidate, "dispute_clock")
        if 2 * seconds > clock:
            raise Never(
                "not_accused", f"not accused: the trace takes {seconds:.0f} s here; the court's clock has {clock}"
            )
        if self._hand is None:
            self._note(candidate, AccusationState.REPORTED, "could be accused", "accusable", report, grounds.detail)
            return None
        self._check_time(candidate)
        salt = secrets.token_bytes(32)
        models = self._view.network.models
        transcript = evidence.record.transcript
        call = self._view.network.accusations.accuse(0, batch, models.config(batch.model_id), grounds.claim, salt)
        claim = Claim(
            batch=batch,
            position=candidate.position,
            accuser=self._hand.address,
            commitment=grounds.claim.commitment(salt, self._hand.address),
            salt=salt,
            reveal=call.data,
            weights_root=models.spec(batch.model_id).weights_root,
            prompt=tuple(transcript.prompt_ids),
            output=tuple(transcript.output_ids),
            bond=bond,
        )
        budget = self._settings.bond_budget if self._settings.mode is Mode.DEFEND else None
        if not self._store.store_claim(claim, candidate.attempt, grounds.detail, budget):
            raise NotNow("over_budget", "not accused: bond budget exhausted")
        log.warning(
            "accusing", batch=batch.id, position=candidate.position, node=batch.node, bond=str(bond),
            trace_root="0x" + player.root.hex(), seconds=round(seconds, 1), **grounds.detail,
        )  # fmt: skip
        report.add("accusing")
        return batch.id

    def _grounds(self, evidence: Evidence) -> tuple[Player, Grounds]:
        transcript = evidence.record.transcript
        spec = self._view.network.models.spec(evidence.batch.model_id)
        player = self._players.player(spec.weights_root, transcript.prompt_ids, transcript.output_ids)
        return player, grounds_of(evidence, player)

    def _check_time(self, candidate: Candidate) -> None:
        """Raises NotNow or Never if a commitment could not be kept."""
        batch = candidate.row.batch
        margin = margin_of(batch.window_end - batch.committed_at)
        left = self._view.network.log.window_end_of(batch) - self._view.time()
        if left <= margin:
            raise NotNow(
                "too_late", f"not accused: {max(0, left)} s are left of the batch's window, {margin} are needed"
            )
        reveal = self._parameter(candidate, "reveal_window")
        if reveal < margin:
            raise Never("not_accused", f"not accused: an accusation must be revealed within {reveal} s")

    def _checked_bond(self, candidate: Candidate) -> int:
        """The bond of an accusation, wei. Raises NotNow if it cannot be posted now."""
        bond = self._parameter(candidate, "accusation_bond")
        lost = [
            row.ended_at
            for row in self._store.accusations(AccusationState.ENDED)
            if row.reason == Ending.LOST_BY_STEP and row.ended_at > self._view.time() - self._settings.loss_period
        ]
        if lost:
            raise NotNow("not_accused", "not accused: the referee has contradicted this machine's canonical execution")
        if self._store.bonds_standing() + bond > self._settings.bond_budget:
            raise NotNow("over_budget", "not accused: bond budget exhausted")
        assert self._hand is not None
        balance = self._view.network.token.balance(self._hand.address)
        if balance < bond:
            raise InsufficientFunds(
                f"an accusation needs a bond of {format_amount(bond)}; {self._hand.address} has {format_amount(balance)}.",
                hint="Send it tokens.",
            )
        return bond

    def _parameter(self, candidate: Candidate, name: str) -> int:
        return self._view.network.parameters.value_at(name, candidate.row.batch.parameters_version)

    def _note(
        self,
        candidate: Candidate,
        state: AccusationState,
        reason: str,
        count: str,
        report: Report,
        detail: dict[str, Any] | None = None,
    ) -> None:
        batch, position = candidate.row.batch, candidate.position
        if self._store.note_accusation(batch.id, position, candidate.attempt, state, reason, detail):
            log.warning(reason, batch=batch.id, position=position, node=batch.node, state=state.value, **(detail or {}))
        report.add(count)

    def _pause(self, place: tuple[int, int]) -> None:
        _, pause = self._pauses.get(place, (0.0, 1.0))
        self._pauses[place] = (self._clock() + pause, min(2 * pause, MAX_PAUSE))
