"""Contesting false accusations: compute the trace oneself, find what is false, show it, down to one step.

`step()` does one round and may be called at any time, also after a kill at any line: what is under way is known from the
chain and the outbox, and everything else is derived anew. For each revealed accusation that it is to defend against:

    own trace has the accused root, all points are its     the accusation is right: nothing
    own trace has the accused root, a point is not         a contest of that point
    own trace has another root                             a contest of the trace: pick ... open_cell ... step

A node contests once without a bond; otherwise a bond is posted, within a budget. A right contest loses nothing: its bond
comes back whether it wins or another contest was faster.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from poip_chain.canonical.moves import Finish, Game, MakeStep, OpenCell, Pick, Player
from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.court import POINT_LEVEL, AccusationInfo, AccusationStatus, ContestInfo, ContestOutcome
from poip_chain.economic.money import format_amount
from poip_chain.errors import PoipError, Unavailable
from poip_chain.service.court.sending import Progress, Sender
from poip_chain.service.court.traces import Players
from poip_chain.service.court.view import Accused, Contest, CourtView, Record
from poip_chain.spec.dispute import TRACE, Node
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.transcript import id_leaves, prompt_root
from poip_chain.spec.types import ZERO_HASH, Address

log = structlog.get_logger("poip.court")

REWIND = 32
"""Blocks that are read again in every round: a reorganisation may have changed them."""
ATTEMPTS = 3
"""Contests of one accusation at most: those before were lost, which only happens to who is too slow."""
BY_STEP = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """All token ids of an answer."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


class Answers(Protocol):
    """The answers that one defends."""

    def first_block(self) -> int:
        """Where to begin to look for accusations: nothing before it matters any more."""

    def accused(self, accused: Accused) -> Answer | None:
        """The answer that an accusation is about; None if it is not to be defended, or not known."""


@dataclass(slots=True)
class Case:
    """An accusation to defend against. `point`: a false one by its number; `right`: there is nothing to contest."""

    accused: Accused
    answer: Answer
    judged: bool = False
    right: bool = False
    false_points: tuple[int, ...] = ()


class Contester:
    """See the module's docstring. `budget`: most that may stand in bonds at one time, wei."""

    def __init__(self, view: CourtView, traces: Players, sender: Sender, answers: Answers, budget: int) -> None:
        self._view, self._traces, self._sender, self._answers = view, traces, sender, answers
        self._budget = budget
        self._cases: dict[int, Case] = {}
        self._seen_to: int | None = None
        self._told: set[tuple[int, str]] = set()
        self._trouble: dict[str, str] = {}
        self._lock = threading.Lock()

    def trouble(self) -> dict[str, str]:
        """What the last round could not do, by accusation."""
        return dict(self._trouble)

    def look_again(self) -> None:
        """Look at all accusations anew: answers that were not known may be known now."""
        with self._lock:
            self._seen_to = None

    def cases(self) -> tuple[int, ...]:
        """Accusations that are looked after."""
        return tuple(self._cases)

    def step(self) -> None:
        """One round. Raises Unavailable without a chain; other trouble is kept in `trouble`."""
        with self._lock:
            self._sender.step()
            self._discover()
            trouble: dict[str, str] = {}
            now, standing = self._view.time(), self._standing()
            # Whose window ends first is looked at first: a trace may take minutes.
            for case in sorted(self._cases.values(), key=lambda c: c.accused.terms.contest_end):
                try:
                    standing += self._tend(case, now, standing)
                except Unavailable:
                    raise
                except PoipError as error:
                    trouble[f"accusation {case.accused.id}"] = str(error)
                    self._tell(case, "cannot defend", error=str(error)[:300])
            self._claim()
            self._trouble = trouble
            if not self._cases:
                self._traces.release()

    # What there is

    def _discover(self) -> None:
        head = self._view.head()
        start = self._answers.first_block() if self._seen_to is None else max(0, min(self._seen_to, head) - REWIND)
        for accused in self._view.revealed(from_block=start, to_block=head):
            known = self._cases.get(accused.id)
            if known is not None and known.accused.terms == accused.terms:
                continue
            info = self._view.info(accused.id)
            if info.is_over and not self._open_own(accused.id):
                continue
            if not self._view.is_current(accused, info):
                continue
            answer = self._answers.accused(accused)
            if answer is None or not _is_accused(answer, accused):
                continue
            self._cases[accused.id] = Case(accused, answer)
            log.warning(
                "accused", accusation=accused.id, batch=accused.batch_id, index=accused.index, node=accused.terms.node,
                accuser=accused.accuser, contest_end=accused.terms.contest_end,
            )  # fmt: skip
        self._seen_to = head

    def _open_own(self, accusation: int) -> list[Contest]:
        return [c for c in self._own(self._view.record(accusation)) if c.ended is None]

    def _own(self, record: Record) -> list[Contest]:
        return [c for c in record.contests if c.contester == self._sender.address]

    def _standing(self) -> int:
        """What stands in bonds, or is on its way to, wei."""
        total = 0
        for case in self._cases.values():
            own = self._own(self._view.record(case.accused.id))
            bonded = [c for c in own if c.ended is None and not c.free]
            on_its_way = self._sender.progress(_contest_job(case.accused.id, len(own))) is not Progress.NONE
            total += (len(bonded) + on_its_way) * case.accused.terms.contest_bond
        return total

    # One accusation

    def _tend(self, case: Case, now: int, standing: int) -> int:
        """Do what is due for an accusation; what was added to the bonds that stand, wei."""
        accusation = case.accused.id
        info = self._view.info(accusation)
        if info.status in (AccusationStatus.NONE, AccusationStatus.COMMITTED) or not self._view.is_current(
            case.accused, info
        ):
            log.warning("a reorganisation removed an accusation", accusation=accusation)
            del self._cases[accusation]
            self._seen_to = None
            return 0
        record = self._view.record(accusation)
        own = self._own(record)
        playing = [c for c in own if c.ended is None]
        if info.is_over:
            for contest in playing:
                self._settle(case, contest)
            if not playing:
                log.info("accusation is over", accusation=accusation, status=info.status.name.lower())
                del self._cases[accusation]
            return 0
        for contest in playing:
            self._play(case, contest, now)
        return 0 if playing else self._contest(case, info, record, now, standing)

    def _contest(self, case: Case, info: AccusationInfo, record: Record, now: int, standing: int) -> int:
        """Open a contest if the accusation is false; the bond posted for it, wei."""
        accused, terms, own = case.accused, case.accused.terms, self._own(record)
        job = _contest_job(accused.id, len(own))
        if now > terms.contest_end or self._sender.progress(job) is not Progress.NONE:
            return 0
        if any(c.ended and c.ended.outcome is ContestOutcome.LOST and c.ended.by == BY_STEP for c in own):
            self._tell(case, "the referee contradicts this machine's canonical execution: nothing more is contested")
            return 0
        if len(own) >= ATTEMPTS:
            self._tell(case, "every contest was lost by time: nothing more is contested")
            return 0
        self._judge(case)
        points = [number for number in case.false_points if number not in record.points]
        if case.right or (case.false_points and not points):
            return 0
        free = not info.free_contest_used and self._is_node(terms.node)
        if not free and not self._may_pay(case, standing):
            return 0
        contests = self._view.network.contests

        def call() -> Call:
            if points:
                return contests.contest_point(accused.id, terms, free, points[0])
            return contests.contest_trace(accused.id, terms, free)

        sent = self._sender.ensure(job, call) is Progress.OPEN
        if not sent and job in self._sender.refused:
            raise PoipError(f"cannot contest accusation {accused.id}: {self._sender.refused[job]}")
        return terms.contest_bond if sent and not free else 0

    def _judge(self, case: Case) -> None:
        """Compute the trace and compare, once."""
        if case.judged:
            return
        accused, player = case.accused, self._player(case)
        if player.root == accused.terms.trace.trace_root:
            case.false_points = tuple(false_points(player, accused, case.answer.output))
            case.right = not case.false_points
        case.judged = True
        log.warning(
            "judged an accusation", accusation=accused.id, right=case.right, false_points=list(case.false_points),
            own_root="0x" + player.root.hex(), accused_root="0x" + accused.terms.trace.trace_root.hex(),
        )  # fmt: skip

    def _player(self, case: Case) -> Player:
        return self._traces.player(case.accused.terms.trace.weights_root, case.answer.prompt, case.answer.output)

    def _is_node(self, node: Address) -> bool:
        """Whether the sender may contest for this node without a bond."""
        registry = self._view.network.registry
        return self._sender.address in (registry.committer(node), registry.info(node).operator)

    def _may_pay(self, case: Case, standing: int) -> bool:
        """Whether a bond is within the budget, in the account, and approved; approves it if not. Raises PoipError."""
        bond, network = case.accused.terms.contest_bond, self._view.network
        if standing + bond > self._budget:
            raise PoipError(
                f"a contest needs a bond of {format_amount(bond)}, and {format_amount(standing)} of the defence budget of "
                f"{format_amount(self._budget)} are in use.",
                hint="Raise defence_budget in the section court of the settings.",
            )
        balance = network.token.balance(self._sender.address)
        if balance < bond:
            raise PoipError(
                f"a contest needs a bond of {format_amount(bond)}; {self._sender.address} has {format_amount(balance)}.",
                hint="Send it tokens.",
            )
        spender = network.accusations.address
        allowance = network.token.allowance(self._sender.address, spender)
        if allowance >= standing + bond:
            return True
        approve = network.token.approve(spender, self._budget)
        self._sender.ensure(f"court:approve:{allowance}:{self._budget}", lambda: approve, again=True)
        return False

    # One contest

    def _play(self, case: Case, contest: Contest, now: int) -> None:
        at = self._view.contest(contest.id)
        if not at.is_open:
            return  # it ended since the record was read
        due = at.since + at.accuser_left
        if at.revealed_at == 0 or at.revealed_at > due:
            if now > due:
                self._settle(case, contest)
            return
        if at.level == POINT_LEVEL:
            self._tell(case, "a point that this machine finds false was proven", contest=contest.id)
            return
        if now > max(at.revealed_at, at.since) + at.contester_left:
            self._tell(case, "too late to move", contest=contest.id)
            return
        job = f"court:{contest.id}:{at.cell}:{at.level}:{at.index}"
        if self._sender.progress(job) is not Progress.NONE:
            return
        record = self._view.record(case.accused.id)
        if not any((s.cell, s.node) == (at.cell, Node(at.level, at.index)) for s in record.reveals):
            return  # the endpoint's events lag behind its state
        self._sender.ensure(job, lambda: self._move(case, contest.id, at, record))
        if job in self._sender.refused:
            raise PoipError(f"cannot move in contest {contest.id}: {self._sender.refused[job]}")

    def _move(self, case: Case, contest: int, at: ContestInfo, record: Record) -> Call:
        terms = case.accused.terms
        game = game_of(self._player(case), terms.trace.trace_root, record, at.cell)
        move = game.move(at.cell, Node(at.level, at.index))
        if isinstance(move, MakeStep | Finish):
            log.info(
                "the step of a contest", contest=contest, leaf=move.step.leaf, element=move.step.element,
                accuser_states=move.stated, right=move.right,
            )  # fmt: skip
        sub_root = (game.tree(at.cell).root if at.cell != TRACE else None) or ZERO_HASH
        contests = self._view.network.contests
        match move:
            case Pick():
                return contests.pick(contest, move.node.index, move.shown, move.path)
            case OpenCell():
                return contests.open_cell(contest, terms, move.index, move.element, move.leaf, move.path)
            case MakeStep():
                return contests.step(
                    contest, terms, move.index, move.element, move.leaf, move.path, sub_root, move.opened
                )
            case Finish():
                return contests.finish(contest, terms, move.leaf, sub_root, move.opened)

    def _settle(self, case: Case, contest: Contest) -> None:
        call = self._view.network.contests.settle(contest.id, case.accused.terms)
        self._sender.ensure(f"court:{contest.id}:settle", lambda: call)

    def _claim(self) -> None:
        credit = self._view.credit(self._sender.address)
        if credit:
            call = self._view.network.accusations.claim()
            self._sender.ensure(f"court:claim:{credit}", lambda: call, again=True)

    def _tell(self, case: Case, what: str, **fields: object) -> None:
        """Log something once for an accusation."""
        key = (case.accused.id, what)
        if key not in self._told:
            self._told.add(key)
            log.error(what, accusation=case.accused.id, **fields)


def game_of(player: Player, root: bytes, record: Record, cell: int) -> Game:
    """What `player` knows of an accusation after all reveals of the trace and of a cell's tree. Raises InvalidInput."""
    game = Game(player, root)
    shown = [s for s in record.reveals if s.cell in (TRACE, cell)]
    for reveal in sorted(shown, key=lambda s: (s.cell, -s.node.level, s.node.index)):
        game.see(reveal.cell, reveal.node, reveal.parts)
    return game


def false_points(player: Player, accused: Accused, output: Sequence[int]) -> list[int]:
    """The numbers of an accusation's points that are not those of the player's trace."""
    logits = player.trace.logits
    found = []
    for number, point in enumerate(accused.points):
        known = point.position < len(output) and point.token < logits.shape[1]
        if not known or (point.logit, point.claimed_logit) != (
            int(logits[point.position, point.token]),
            int(logits[point.position, output[point.position]]),
        ):
            found.append(number)
    return found


def _is_accused(answer: Answer, accused: Accused) -> bool:
    """Whether an answer is the one that an accusation is about."""
    trace = accused.terms.trace
    same = (
        prompt_root(answer.prompt) == trace.prompt_root and merkle_root(id_leaves(answer.output)) == trace.output_root
    )
    if not same:
        log.error("an accusation of an answer that is not the one stored here", accusation=accused.id)
    return same


def _contest_job(accusation: int, made: int) -> str:
    """The job of opening one's contest number `made` of an accusation: at most one is sent."""
    return f"court:{accusation}:contest:{made}"
