"""The node in the court: it contests false accusations of its own answers, from its own transcripts.

Runs in a thread of its own: a canonical trace takes seconds to minutes, in which challenges must still be answered.
"""

from __future__ import annotations

import structlog

from poip_chain.chain.outbox import Outbox
from poip_chain.economic.network import Network
from poip_chain.errors import IntegrityError, NotFound, PoipError, Unavailable
from poip_chain.service.court.contester import Answer, Contester
from poip_chain.service.court.lies import LyingTraces
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.traces import Traces
from poip_chain.service.court.view import Accused, CourtView
from poip_chain.service.node.receipts import read_record
from poip_chain.service.node.schema import BatchState
from poip_chain.service.node.settings import NodeSettings
from poip_chain.service.node.store import Store
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.node")

ENDED_BATCHES = 64
"""So many batches that have ended are still looked at when the node starts: bonds may wait there."""


class NodeAnswers:
    """The answers in a node's database (`contester.Answers`). `start`: the network's first block."""

    def __init__(self, store: Store, node: Address, start: int) -> None:
        self._store, self._node, self._start = store, node, start

    def first_block(self) -> int:
        """See Answers."""
        ended = self._store.batches(BatchState.FINAL, BatchState.CONVICTED)[-ENDED_BATCHES:]
        blocks = [s.batch.block_number for s in (*ended, *self._store.batches(BatchState.COMMITTED)) if s.batch]
        return min(blocks, default=self._start)

    def accused(self, accused: Accused) -> Answer | None:
        """See Answers."""
        if accused.terms.node != self._node:
            return None
        stored = self._store.batch_of_id(accused.batch_id)
        if stored is None or not 0 <= accused.index < stored.count:
            return None
        try:
            transcript = read_record(self._store, stored.first_seq + accused.index).transcript
        except NotFound:
            log.error("accused of an answer that is no longer kept", accusation=accused.id)
            return None
        return Answer(tuple(transcript.prompt_ids), tuple(transcript.output_ids))


class Defence:
    """One round of the contester at a time, as a job of the node. Never raises for trouble that may pass."""

    def __init__(self, contester: Contester) -> None:
        self._contester = contester
        self._trouble = ""
        self.fatal: IntegrityError | None = None

    def trouble(self) -> dict[str, str]:
        """What the last round could not do."""
        if self._trouble:
            return {"court": self._trouble}
        found = "; ".join(f"{name}: {why}" for name, why in self._contester.trouble().items())
        return {"court": found} if found else {}

    def step(self) -> None:
        """One round."""
        try:
            self._contester.step()
        except PoipError as error:
            if not isinstance(error, Unavailable) and self._trouble != str(error):
                log.error("the court's round failed", error=str(error)[:300])
            self._trouble = str(error)
        else:
            self._trouble = ""


def open_defence(
    settings: NodeSettings, network: Network, outbox: Outbox, store: Store, node: Address
) -> Defence | None:
    """The node's part in the court; None where it takes none."""
    court = settings.court
    if court.model is None or not court.active:
        log.warning("this node does not contest accusations", enabled=court.enabled, hint="set [court] model")
        return None
    if settings.contests_everything:
        traces: Traces = LyingTraces(court.model, threads=court.threads)
    else:
        traces = Traces(court.model, court.threads)
    contester = Contester(
        CourtView(network),
        traces,
        Sender(outbox),
        NodeAnswers(store, node, network.deployment.block),
        court.defence_budget,
    )
    return Defence(contester)
