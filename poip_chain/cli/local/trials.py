"""The court in the demonstration: the cheat is accused and contests to the last step, a liar accuses an honest answer.

Watchtower, nodes and liar play by themselves; here the liar is started and what happens is told, from the chain's events.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from poip_chain.chain.keys import development_key
from poip_chain.cli.local.network import LIAR, WATCHTOWER, Liar, LocalNetwork
from poip_chain.economic.clients.court import AccusationStatus, ContestOutcome
from poip_chain.economic.money import format_amount
from poip_chain.economic.network import Network
from poip_chain.economic.types import BatchStatus
from poip_chain.proof.store import open_store
from poip_chain.service.court.view import Accusation, Contest, CourtView, Record
from poip_chain.spec.scores import Verdict
from poip_chain.spec.types import Address

LIAR_NEEDS = 15
"""Seconds of a batch's window that must be left for the liar to compute its false trace and commit to it."""
BY_STEP = 1
ENDINGS = {
    AccusationStatus.STOOD: "stands: the batch is convicted for wrong computation",
    AccusationStatus.LOST: "is lost: half of its bond goes to who contested it, half is burned",
    AccusationStatus.EXPIRED: "was not revealed in time: its bond is gone",
}


class Trials:
    """`tell(key, text)` tells each thing once."""

    def __init__(
        self, local: LocalNetwork, network: Network, tell: Callable[[str, str], None], names: dict[Address, str]
    ) -> None:
        self._local, self._network, self._tell = local, network, tell
        self._view = CourtView(network)
        self._nodes = names
        self._names = {
            **names,
            **{node.operator.address: node.name for node in local.nodes},
            development_key(WATCHTOWER).address: "watchtower",
            development_key(LIAR).address: "liar",
        }
        self._cheat = next(node.node_key.address for node in local.nodes if node.degradation)
        self._liar: Liar | None = None
        self._liar_at_work = False
        self._contested: set[str] = set()
        self._over: dict[int, tuple[str, AccusationStatus, bool]] = {}

    def step(self) -> None:
        """Start the liar when there is something to lie about; tell what is new."""
        if self._cheat_is_judged() and self._liar is None:
            self._liar = self._local.start_liar()
        liar = self._waiting_liar()
        if liar is not None and (evidence := self._honest_evidence()) is not None:
            self._liar_at_work = True
            self._tell("liar", f"a liar accuses an honest answer with invented numbers ({evidence.stem})")
            liar.evidence.hardlink_to(evidence)
        for accusation in self._view.accusations(from_block=self._network.deployment.block):
            if accusation.id not in self._over:
                self._follow(accusation)
        if not self.open_ends() and self._network.accusations.read("to_burn"):
            # Anyone may: what nobody gets leaves the supply.
            with self._local.outbox(development_key(LIAR + 1)) as outbox:
                outbox.execute(self._network.accusations.burn(), "burn")

    def busy(self) -> bool:
        """Whether somebody computes a trace against the clock: then nothing else is asked of this machine."""
        if self._liar_at_work:
            return "liar" not in self._contested and "liar" not in {accuser for accuser, *_ in self._over.values()}
        return self._found_false() and "watchtower" not in self._contested and not self._cheat_is_judged()

    def wants_an_honest_answer(self) -> bool:
        """Whether the liar waits for one to accuse."""
        return self._waiting_liar() is not None

    def open_ends(self) -> list[str]:
        """What still has to happen."""
        ends = []
        if not self._cheat_is_judged():
            ends.append("the cheat's conviction for wrong computation, contested to the last step")
        if ("liar", AccusationStatus.LOST, True) not in self._over.values():
            ends.append("the liar's loss of its bond")
        return ends

    def _waiting_liar(self) -> Liar | None:
        ready = self._liar is not None and self._liar.ready.exists()
        return self._liar if ready and not self._liar_at_work else None

    def _cheat_is_judged(self) -> bool:
        return ("watchtower", AccusationStatus.STOOD, True) in self._over.values()

    def _found_false(self) -> bool:
        with open_store(self._local.directory / "watchtower") as store:
            pending = {row.batch.id for row in store.batches() if row.status == "pending"}
            return any(audit.verdict == Verdict.FRAUD and audit.batch_id in pending for audit in store.audits())

    def _honest_evidence(self) -> Path | None:
        """Evidence of an honest answer in a batch whose window lasts long enough."""
        latest = self._view.time() + LIAR_NEEDS
        with open_store(self._local.directory / "watchtower") as store:
            batches = {row.batch.id: row.batch for row in store.batches()}
            for audit in store.audits():
                batch = batches.get(audit.batch_id)
                if batch is None or batch.node == self._cheat or audit.evidence is None:
                    continue
                in_time = batch.window_end > latest and self._network.log.status(batch.id) is BatchStatus.PENDING
                if audit.verdict == Verdict.HONEST and in_time:
                    return Path(audit.evidence)
        return None

    def _follow(self, accusation: Accusation) -> None:
        accuser = self._names.get(accusation.accuser, accusation.accuser)
        node = self._nodes[self._view.batch(accusation.batch_id).node]
        what = f"accusation of batch {accusation.batch_id} by the {accuser}"
        self._tell(
            f"committed {accusation.id}",
            f"{what}: committed, against {node}, with a bond of {format_amount(accusation.bond)}",
        )
        accused = self._view.accused(accusation.id)
        if accused is None:
            self._ended(accusation, accuser, what, None)
            return
        points = len(accused.margins) + len(accused.fingerprints)
        scored = (
            "1 logit of its trace, which convicts if it is"
            if points == 1
            else f"{points} logits of its trace, which convict if they are"
        )
        self._tell(
            f"revealed {accusation.id}",
            f"{what}: receipt {accused.index}; the contract scored {scored} true",
        )
        record = self._view.record(accusation.id)
        for contest in record.contests:
            self._contested.add(accuser)
            self._contest(what, contest, record)
        self._ended(accusation, accuser, what, record)

    def _contest(self, what: str, contest: Contest, record: Record) -> None:
        who = self._names.get(contest.contester, contest.contester)
        self._tell(f"contest {contest.id}", f"{what}: {who} contests it{' (free of bond)' if contest.free else ''}")
        if contest.ended is None:
            return
        moves = [move.contest for move in record.reveals] + [move.contest for move in record.picks]
        how = "by one step that the referee recomputed" if contest.ended.by == BY_STEP else "by time"
        won = contest.ended.outcome is ContestOutcome.WON
        self._tell(
            f"contest over {contest.id}",
            f"{what}: after {moves.count(contest.id)} moves {who} {'wins' if won else 'loses'} the contest, {how}",
        )

    def _ended(self, accusation: Accusation, accuser: str, what: str, record: Record | None) -> None:
        ending = self._view.endings(accusation.id)
        if ending is None:
            return
        status, convicted, _ = ending
        to_the_end = record is not None and any(c.ended and c.ended.by == BY_STEP for c in record.contests)
        shown = to_the_end and convicted == (status is AccusationStatus.STOOD)
        self._over[accusation.id] = (accuser, status, shown)
        self._tell(f"ended {accusation.id}", f"{what} {ENDINGS.get(status, status.name.lower())}")
