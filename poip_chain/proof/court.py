"""The watchtower in the court: it accuses what it found false, and defends answers that it holds against false accusations.

Runs beside the watchtower's rounds, in a thread of its own: a canonical trace takes seconds to minutes, in which
challenges have deadlines.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from poip_chain.chain.keys import address_of
from poip_chain.chain.outbox import Outbox
from poip_chain.economic.network import Network
from poip_chain.errors import ConfigurationError, InvalidInput, PoipError, Unavailable
from poip_chain.proof.accuser import Accuser
from poip_chain.proof.canonical import Engines
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.examiner import Examiner
from poip_chain.proof.hand import Hand, Proposer
from poip_chain.proof.report import Report
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import BatchRow, WatchtowerStore
from poip_chain.service.court.contester import Answer, Contester
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.view import Accused, CourtView
from poip_chain.spec.scores import Verdict
from poip_chain.spec.types import Address

log = structlog.get_logger("watchtower")

ENDED_BATCHES = 64
"""So many batches that have ended are still looked at after a start: bonds may wait there."""


class HeldAnswers:
    """The answers that a watchtower holds and finds right (`contester.Answers`): those it has evidence files of."""

    def __init__(self, store: WatchtowerStore, account: Address, start: int) -> None:
        self._store, self._account, self._start = store, account, start
        self._missing: set[tuple[int, int]] = set()

    def first_block(self) -> int:
        """See Answers."""
        rows = [row for row in self._store.batches() if row.status != "removed"]
        ended = [row for row in rows if row.status != "pending"][-ENDED_BATCHES:]
        pending = [row for row in rows if row.status == "pending"]
        return min((row.batch.block_number for row in (*pending, *ended)), default=self._start)

    def accused(self, accused: Accused) -> Answer | None:
        """See Answers."""
        row = self._store.batch(accused.batch_id)
        if accused.accuser == self._account or row is None:
            return None
        found = self._held(row, accused.index)
        if found is None:
            self._missing.add((accused.batch_id, accused.index))
        return found

    def found_meanwhile(self) -> bool:
        """Whether an answer that was asked for in vain is held now; each is told once."""
        found = set()
        for batch_id, position in self._missing:
            row = self._store.batch(batch_id)
            if row is None or row.status != "pending" or self._held(row, position) is not None:
                found.add((batch_id, position))
        self._missing -= found
        return bool(found)

    def _held(self, row: BatchRow, position: int) -> Answer | None:
        for audit in self._store.audits(batch_id=row.batch.id):
            # What is found false here is left to its node: a false accusation of it shields nobody.
            if audit.position != position or audit.evidence is None or audit.verdict == Verdict.FRAUD:
                continue
            try:
                evidence = Evidence.read(Path(audit.evidence))
            except InvalidInput as error:
                log.error("evidence cannot be read", path=audit.evidence, reason=str(error)[:300])
                return None
            if evidence.batch == row.batch:
                transcript = evidence.record.transcript
                return Answer(tuple(transcript.prompt_ids), tuple(transcript.output_ids))
        return None


class Court:
    """One round of both sides at a time."""

    def __init__(
        self, accuser: Accuser, contester: Contester | None, answers: HeldAnswers | None, engines: Engines
    ) -> None:
        self.accuser, self.contester, self._answers, self._engines = accuser, contester, answers, engines
        self._trouble: dict[str, str] = {}

    def step(self) -> Report:
        """One round. Raises Unavailable without a chain; other trouble is logged and comes up again."""
        self._engines.open_kept()
        report = self.accuser.step()
        if self.contester is None or self._answers is None:
            return report
        if self._answers.found_meanwhile():
            self.contester.look_again()
        trouble = {}
        try:
            self.contester.step()
            trouble = self.contester.trouble()
        except Unavailable:
            raise
        except PoipError as error:
            trouble = {"contests": str(error)}
        for name, reason in trouble.items():
            report.add("contest_trouble")
            if self._trouble.get(name) != reason:
                log.warning("cannot contest", what=name, reason=reason[:300])
        self._trouble = trouble
        return report


def open_court(
    settings: WatchtowerSettings, network: Network, store: WatchtowerStore, outbox: Outbox | None
) -> Court | None:
    """The watchtower's part in the court as its settings have it; None where it takes none."""
    directories = [*([settings.court.model] if settings.court.model else []), *settings.models]
    if not settings.court.enabled or not directories:
        log.warning("nothing is accused", enabled=settings.court.enabled, hint="name a directory under models")
        return None
    try:
        network.address("Accusations")
    except ConfigurationError:
        log.warning("nothing is accused: this deployment has no court")
        return None
    engines = Engines(directories, settings.court.threads, settings.court.keep_open)
    view = CourtView(network)
    hand: Hand | None = None
    contester, answers = None, None
    if settings.mode is Mode.DEFEND and outbox is not None:
        hand = sender = Sender(outbox)
        answers = HeldAnswers(store, sender.address, network.deployment.block)
        contester = Contester(CourtView(network), engines.user(), sender, answers, settings.court.defence_budget)
    elif settings.mode is Mode.PROPOSE and settings.key is not None:
        hand = Proposer(settings.data / "proposals", address_of(settings.key))
    players = engines.user()
    examiner = Examiner(settings, view, players, store, hand)
    return Court(Accuser(settings, view, players, store, hand, examiner), contester, answers, engines)
