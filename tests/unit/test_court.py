"""The court's players without a chain: sending once, judging a step again, and a contester before a scripted view."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from poip_chain.canonical.moves import Finish, MakeStep, Player
from poip_chain.canonical.opening import Opened
from poip_chain.canonical.replay import Roots, describe, judge
from poip_chain.chain.outbox import State
from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.court import (
    AccusationInfo,
    AccusationStatus,
    ContestInfo,
    ContestOutcome,
    Terms,
    TraceTerms,
)
from poip_chain.errors import ConfigurationError, InvalidInput, TransactionFailed, Unavailable
from poip_chain.service.court.contester import ATTEMPTS, Answer, Contester, false_points
from poip_chain.service.court.sending import Progress, Sender
from poip_chain.service.court.view import Accused, Contest, Ended, Record, Shown, Where
from poip_chain.service.node.settings import load_settings
from poip_chain.spec.accusation import Point
from poip_chain.spec.dispute import cell_number
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.trace import Op
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import ZERO_HASH, Address, Hash32
from tests.support.lying_trace import Changes, Lie
from tests.unit.test_moves import answer, played, player
from tests.vectors.generate_canonical import ODD

US, NODE, ACCUSER = (Address("0x" + digit * 40) for digit in "123")
PROMPT, OUTPUT = answer(ODD, 36)
WHERE = Where(1, 0, "0x" + "00" * 32)
BOND = 50
CONTEST = 7 << 64


class FakeOutbox:
    """Keeps states by key; `refuse` makes sending fail."""

    address = US

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.refuse: Exception | None = None
        self.steps = 0

    def known(self, key: str) -> bool:
        return key in self.states

    def status(self, key: str) -> Any:
        return SimpleNamespace(state=self.states[key])

    def send(self, call: Call, key: str) -> str:
        if self.refuse is not None:
            raise self.refuse
        assert key not in self.states
        self.states[key] = State.OPEN
        return key

    def step(self) -> None:
        self.steps += 1


def call(name: str = "move") -> Call:
    return Call(US, b"", name)


def test_a_job_is_sent_once() -> None:
    outbox, now = FakeOutbox(), [0.0]
    sender = Sender(outbox, 1.0, lambda: now[0])  # type: ignore[arg-type]
    assert sender.progress("a") is Progress.NONE
    assert sender.ensure("a", call) is sender.ensure("a", call) is Progress.OPEN
    outbox.states["a#0"] = State.MINED
    assert sender.ensure("a", call) is Progress.MINED and list(outbox.states) == ["a#0"]
    # After a kill, all is known from the outbox.
    again = Sender(outbox, 1.0, lambda: now[0])  # type: ignore[arg-type]
    assert again.ensure("a", call) is Progress.MINED
    assert again.ensure("a", call, again=True) is Progress.OPEN and "a#1" in outbox.states


def test_a_failed_attempt_is_followed_by_another_after_a_pause() -> None:
    outbox, now = FakeOutbox(), [0.0]
    sender = Sender(outbox, 1.0, lambda: now[0])  # type: ignore[arg-type]
    sender.ensure("a", call)
    outbox.states["a#0"] = State.REVERTED
    assert sender.progress("a") is Progress.NONE
    assert sender.ensure("a", call) is Progress.NONE and "a#1" not in outbox.states
    now[0] = 1.5
    assert sender.ensure("a", call) is Progress.OPEN and "a#1" in outbox.states
    outbox.states["a#1"] = State.STOPPED
    assert sender.ensure("a", call) is Progress.NONE
    now[0] = 3.0  # the pause has doubled
    assert sender.ensure("a", call) is Progress.NONE
    now[0] = 3.6
    assert sender.ensure("a", call) is Progress.OPEN


def test_a_refusal_is_kept_and_tried_again() -> None:
    outbox, now = FakeOutbox(), [0.0]
    sender = Sender(outbox, 1.0, lambda: now[0])  # type: ignore[arg-type]
    outbox.refuse = TransactionFailed("court: too early")
    assert sender.ensure("a", call) is Progress.NONE and "too early" in sender.refused["a"]
    outbox.refuse = None
    assert sender.ensure("a", call) is Progress.NONE
    now[0] = 1.0
    assert sender.ensure("a", call) is Progress.OPEN and not sender.refused
    outbox.refuse = Unavailable("away")
    with pytest.raises(Unavailable):
        sender.ensure("b", call)


LIES: list[Lie | Changes] = [
    Lie(Op.EMBED, 0, 3, 1),
    Lie(Op.GATE, 0, 2, 5),
    Lie(Op.ATTENTION, 0, 30, 2),
    Lie(Op.Q, 0, 9, 1),
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_step_is_judged_again_from_its_bytes(lie: Lie) -> None:
    honest, liar = player(ODD, 36), player(ODD, 36, lie)
    game, move = played(liar, honest)
    roots = roots_of(liar, None if move.step.inside or isinstance(move, Finish) else ZERO_HASH)
    if roots.cell is None:
        cell = cell_number(move.step.leaf, move.step.element)
        roots = dataclasses.replace(roots, cell=game.tree(cell).root)
    verdict = judge(honest.layout, move.step, move.opened, roots, move.leaf)
    assert (verdict.right, verdict.stated) == (move.right, move.stated) and not verdict.holds
    assert honest.layout.locate(move.step.leaf).tensor.name in describe(honest.layout, move.step)
    check_refusals(honest, move, roots)


def check_refusals(honest: Player, move: MakeStep | Finish, roots: Roots) -> None:
    """Nothing but what the step reads, from the roots on trial, is judged."""
    opened = move.opened
    wrong: list[Opened] = [dataclasses.replace(opened, proof=(*opened.proof, ZERO_HASH))]
    if opened.proof:
        wrong.append(dataclasses.replace(opened, proof=opened.proof[:-1]))
    for name in ("leaves", "rows"):
        data = getattr(opened, name)
        if data:
            wrong += [
                dataclasses.replace(opened, **{name: bytes([data[0] ^ 1]) + data[1:]}),
                dataclasses.replace(opened, **{name: data[:-1]}),
                dataclasses.replace(opened, **{name: data + b"\0"}),
            ]
    for other in wrong:
        with pytest.raises(InvalidInput):
            judge(honest.layout, move.step, other, roots, move.leaf)
    strange = Roots(ZERO_HASH, ZERO_HASH, ZERO_HASH, ZERO_HASH, ZERO_HASH)
    with pytest.raises(InvalidInput, match="root on trial"):
        judge(honest.layout, move.step, opened, strange, move.leaf)


def roots_of(accuser: Player, cell: bytes | None) -> Roots:
    prompt, output = merkle_root(accuser.ids["prompt"]), merkle_root(accuser.ids["output"])
    return Roots(accuser.root, accuser.rows.root, prompt, output, cell)


def accused_by(liar: Player, points: tuple[Point, ...] = (), contest_end: int = 100) -> Accused:
    trace = TraceTerms(
        len(PROMPT), len(OUTPUT), liar.root, liar.rows.root, prompt_root(PROMPT), prompt_root(OUTPUT)
    )  # fmt: skip
    terms = Terms(NODE, trace, ODD, liar.layout.count, len(points), ZERO_HASH, 100, BOND, 60, contest_end)
    return Accused(7 << 32, 7, ACCUSER, 0, terms, points, (), WHERE)


def test_points_are_compared_with_ones_own_trace() -> None:
    honest = player(ODD, 36)
    logits = honest.trace.logits

    def point(position: int, token: int, by: int = 0, claimed_by: int = 0) -> Point:
        claimed = int(logits[position, OUTPUT[position]]) + claimed_by
        return Point(position, token, int(logits[position, token]) + by, claimed)

    points = (point(0, 1), point(1, 2, by=1), point(2, 0, claimed_by=-1), point(0, OUTPUT[0]), Point(9, 0, 0, 0))
    accused = accused_by(honest, (*points, Point(0, ODD.vocab_size, 0, 0)))
    assert false_points(honest, accused, OUTPUT) == [1, 2, 4, 5]


class ScriptedView:
    """A `CourtView` of one accusation, as the test says it is. `moves` are the contracts' names of calls that were made."""

    def __init__(self, liar: Player, points: tuple[Point, ...] = ()) -> None:
        self.liar, self.now, self.current = liar, 10, True
        self.known = accused_by(liar, points)
        self.status, self.free_used, self.allowed, self.owed = AccusationStatus.REVEALED, True, 10**6, 0
        self.listed: list[Contest] = []
        self.shown: list[Shown] = []
        self.at: ContestInfo | None = None
        clients: dict[str, Any] = {
            "registry": SimpleNamespace(committer=lambda _: NODE, info=lambda _: SimpleNamespace(operator=ACCUSER)),
            "token": SimpleNamespace(
                balance=lambda _: 10**6, allowance=lambda *_: self.allowed, approve=lambda *_: call("approve")
            ),
            "accusations": SimpleNamespace(address=NODE, claim=lambda: call("claim")),
            "contests": Named(),
        }
        self.network = SimpleNamespace(**clients)

    def time(self) -> int:
        return self.now

    def head(self) -> int:
        return 5

    def revealed(self, **_: int) -> list[Accused]:
        return [self.known]

    def is_current(self, *_: Any) -> bool:
        return self.current

    def info(self, _: int) -> AccusationInfo:
        return AccusationInfo(ACCUSER, self.status, 0, 0, 0, 0, self.free_used, ZERO_HASH)

    def record(self, _: int) -> Record:
        return Record(tuple(self.listed), tuple(self.shown), (), frozenset())

    def contest(self, _: int) -> ContestInfo:
        assert self.at is not None
        return self.at

    def credit(self, _: Address) -> int:
        return self.owed


class Named:
    """Every method gives a call of its own name."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return lambda *_: call(name)


class ScriptedTraces:
    def __init__(self, player: Player) -> None:
        self.own, self.released = player, 0

    def player(self, *_: Any) -> Player:
        return self.own

    def release(self) -> None:
        self.released += 1


class Known:
    def first_block(self) -> int:
        return 0

    def accused(self, accused: Accused) -> Answer | None:
        return Answer(PROMPT, OUTPUT)


class Stage:
    """A contester, its outbox, and the view that the test moves."""

    def __init__(self, liar: Player, *, budget: int = BOND, points: tuple[Point, ...] = ()) -> None:
        self.view, self.outbox = ScriptedView(liar, points), FakeOutbox()
        self.traces = ScriptedTraces(player(ODD, 36))
        self.budget = budget
        self.restart()

    def restart(self) -> None:
        """As after a kill: only outbox and chain are left."""
        sender = Sender(self.outbox, 0.0, lambda: 0.0)  # type: ignore[arg-type]
        self.contester = Contester(self.view, self.traces, sender, Known(), self.budget)  # type: ignore[arg-type]

    def step(self) -> list[str]:
        """One round by a new process; the jobs sent in it."""
        self.restart()
        before = set(self.outbox.states)
        self.contester.step()
        return sorted(set(self.outbox.states) - before)

    def mine(self) -> None:
        for key in self.outbox.states:
            self.outbox.states[key] = State.MINED

    def open(self, **changes: Any) -> None:
        """Our contest is open, at the root of the trace."""
        self.view.listed = [Contest(CONTEST, 7 << 32, US, False, None, WHERE, None)]
        level = self.view.liar.tree(0).shape.height
        fields: dict[str, Any] = {
            "contester": US, "free": False, "since": 10, "accuser_left": 60, "contester_left": 60, "level": level,
            "index": 0, "cell": 0, "leaf_count": self.view.liar.layout.count, "node": ZERO_HASH, "revealed_at": 0,
        }  # fmt: skip
        self.view.at = ContestInfo(**{**fields, **changes})

    def end(self, outcome: ContestOutcome, by: int) -> None:
        self.view.listed = [
            dataclasses.replace(c, ended=c.ended or Ended(outcome, by, WHERE)) for c in self.view.listed
        ]


LIAR = Lie(Op.GATE, 0, 2, 5)
OPENING, ROOT_MOVE = f"court:{7 << 32}:contest:0#0", f"court:{CONTEST}:0:12:0#0"


def test_a_contest_is_opened_once_though_its_event_is_late() -> None:
    stage = Stage(player(ODD, 36, LIAR))
    assert stage.step() == [OPENING]
    assert stage.step() == []
    stage.mine()
    assert stage.step() == []
    stage.open()
    assert stage.step() == []
    assert stage.contester.cases() == (7 << 32,) and stage.contester.trouble() == {}


def test_a_move_follows_each_reveal_once() -> None:
    liar = player(ODD, 36, LIAR)
    stage = Stage(liar)
    root = liar.tree(0).shape.root
    stage.open(revealed_at=12)
    assert stage.step() == []  # the event is not there yet
    stage.view.shown = [Shown(CONTEST, 0, root, tuple(liar.reveal(0, root)), WHERE)]
    assert stage.step() == [ROOT_MOVE]
    assert stage.step() == []


def test_the_accusers_time_and_ones_own() -> None:
    stage = Stage(player(ODD, 36, LIAR))
    stage.open()
    stage.view.now = 70
    assert stage.step() == []
    stage.view.now = 71
    assert stage.step() == [f"court:{CONTEST}:settle#0"]
    late = Stage(player(ODD, 36, LIAR))
    late.open(revealed_at=71)  # shown for another contest, too late for this one
    late.view.now = 72
    assert late.step() == [f"court:{CONTEST}:settle#0"]
    slow = Stage(player(ODD, 36, LIAR))
    slow.open(revealed_at=20)
    slow.view.now = 81
    assert slow.step() == []


def test_nothing_is_contested_without_ground_or_too_late() -> None:
    right = Stage(player(ODD, 36))
    assert right.step() == [] and right.contester.cases()
    over = Stage(player(ODD, 36, LIAR))
    over.view.now = 101
    assert over.step() == []


def test_bonds_stay_within_the_budget_and_are_approved() -> None:
    poor = Stage(player(ODD, 36, LIAR), budget=BOND - 1)
    assert poor.step() == [] and "defence budget" in next(iter(poor.contester.trouble().values()))
    stage = Stage(player(ODD, 36, LIAR))
    stage.view.allowed = BOND - 1
    assert [key.partition("#")[0] for key in stage.step()] == [f"court:approve:{BOND - 1}:{BOND}"]
    stage.view.allowed = BOND
    assert stage.step() == [OPENING]
    free = Stage(player(ODD, 36, LIAR), budget=0)
    free.view.free_used = False
    free.view.network.registry.committer = lambda _: US
    assert free.step() == [OPENING]


def test_who_lost_by_time_tries_again_and_who_lost_by_a_step_does_not() -> None:
    stage = Stage(player(ODD, 36, LIAR))
    for number in range(ATTEMPTS):
        assert stage.step() == [f"court:{7 << 32}:contest:{number}#0"]
        stage.mine()
        stage.view.listed.append(Contest(CONTEST + number, 7 << 32, US, False, None, WHERE, None))
        stage.end(ContestOutcome.LOST, 2)
    assert stage.step() == []
    wrong = Stage(player(ODD, 36, LIAR))
    wrong.open()
    wrong.end(ContestOutcome.LOST, 1)
    assert wrong.step() == []


def test_what_another_won_is_settled_and_the_credit_claimed() -> None:
    stage = Stage(player(ODD, 36, LIAR))
    stage.open()
    stage.contester.step()
    stage.view.status, stage.view.owed = AccusationStatus.LOST, BOND
    assert stage.step() == [f"court:{CONTEST}:settle#0", f"court:claim:{BOND}#0"]
    stage.end(ContestOutcome.VOID, 4)
    stage.view.owed = 0
    assert stage.step() == [] and stage.contester.cases() == () and stage.traces.released


def test_an_accusation_that_a_reorganisation_removed_is_forgotten() -> None:
    stage = Stage(player(ODD, 36, LIAR))
    stage.contester.step()
    stage.view.current = False
    stage.contester.step()
    assert stage.contester.cases() == ()


def test_a_reveal_that_proves_nothing_is_trouble_not_a_move() -> None:
    liar = player(ODD, 36, LIAR)
    stage = Stage(liar)
    root = liar.tree(0).shape.root
    stage.open(revealed_at=12)
    stage.view.shown = [Shown(CONTEST, 0, root, (Hash32(bytes(32)),) * len(liar.reveal(0, root)), WHERE)]
    assert stage.step() == []
    assert "does not hash" in next(iter(stage.contester.trouble().values()))


def test_the_section_court_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[court]\nmodel = "models/a"\nthreads = 2\ndefence_budget = 5\n')
    court = load_settings(file).court
    assert (court.model, court.threads, court.defence_budget, court.active) == (tmp_path / "models/a", 2, 5, True)
    monkeypatch.setenv("POIP_NODE_COURT", '{"enabled": false, "model": "/b"}')
    assert not load_settings(file).court.active
    assert not load_settings(None, court={}).court.active
    monkeypatch.delenv("POIP_NODE_COURT")
    file.write_text("[court]\nthread = 2\n")
    with pytest.raises(ConfigurationError, match=r"court\.thread"):
        load_settings(file)
