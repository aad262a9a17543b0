"""The court under random play: honest, lying, lazy and vanishing players, several accusations and contests at once.

Whatever happens: the books agree to the wei, an accuser who is right and answers is never beaten, a contester who is right
and moves is never beaten, and when everybody has left, anyone can end every contest and every accusation by the clocks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import boa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from poip_chain.errors import InvalidInput
from poip_chain.spec.trace import Op
from tests.contracts import system
from tests.contracts.court import ACCUSED, COMMITTED, EXPIRED, LOST, STOOD, Court, deploy_court
from tests.contracts.network import Committed
from tests.contracts.system import account
from tests.support.tellings import Telling, story

ACCUSERS = [account(f"accuser {i}") for i in range(3)]
CONTESTERS = [account(f"contester {i}") for i in range(3)]
LIES = [(Op.EMBED, 0), (Op.V, 0), (Op.ATTENTION, 0), (Op.OUTPUT, 0), (Op.POST_SUM, 0), (Op.LOGITS, 0)]


@cache
def deployed() -> Court:
    made = deploy_court(story())
    for who in (*ACCUSERS, *CONTESTERS):
        made.fund(who.address, 10_000 * system.POIP)
    return made


@cache
def honest() -> Telling:
    return Telling(story())


@cache
def lie(number: int) -> Telling:
    """A trace that is false at one cell; the tree of a cell is falsified too where the number is odd."""
    op, element = LIES[number // 2]
    leaf = honest().layout.index(op, 1 if Op.EMBED < op < Op.FINAL_MAX else 0, 1, 0)
    made = Telling(story(), {leaf: honest().changed(leaf, element)})
    if number % 2:
        cell = 1 + 32 * leaf + element
        try:
            first = bytearray(honest().open(cell)[0])
        except InvalidInput:
            return made
        first[0] ^= 1
        made.sub_changes[cell] = {0: bytes(first)}
    return made


@dataclass
class Accusation:
    claim: Any
    telling: Telling
    lazy: bool
    right: bool


@dataclass
class Contest:
    accusation: int
    own: Telling
    lazy: bool
    right: bool
    last: int


class CourtMachine(RuleBasedStateMachine):
    """One batch; players come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = ExitStack()
        self.undo.enter_context(boa.env.anchor())
        self.court = deployed()
        self.court.terms.clear()
        self.committed: Committed = self.court.serve()
        self.accusations: dict[int, Accusation] = {}
        self.contests: dict[int, Contest] = {}

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.undo.close()

    # Moves

    @rule(who=st.sampled_from(ACCUSERS), number=st.integers(-4, 2 * len(LIES) - 1), lazy=st.booleans())
    def commit(self, who: Any, number: int, lazy: bool) -> None:
        """A right accusation (number < 0) or one with a false trace; a lazy accuser never answers."""
        if system.now() >= self.committed.batch.window_end:
            return
        telling = honest() if number < 0 else lie(number)
        claim = self.court.claim(self.committed, telling)
        id = self.court.commit(self.committed.batch, claim, who.address)
        self.accusations[id] = Accusation(claim, telling, lazy, number < 0)

    @precondition(lambda self: self.accusations)
    @rule(data=st.data())
    def reveal(self, data: st.DataObject) -> None:
        waiting = [id for id in self.accusations if self.court.status(id) == COMMITTED]
        if not waiting:
            return
        id = data.draw(st.sampled_from(waiting))
        due = self.court.accusations.accusation_info(id).committed_at + self.court.value("reveal_window")
        if system.now() <= due:
            self.court.reveal(id, self.committed.batch, self.accusations[id].claim)
        else:
            self.court.accusations.expire(id, self.committed.batch.values())

    @precondition(lambda self: self.court.terms)
    @rule(data=st.data(), number=st.integers(-3, 2 * len(LIES) - 1), lazy=st.booleans(), point=st.integers(-3, 2))
    def contest(self, data: st.DataObject, number: int, lazy: bool, point: int) -> None:
        """A contest from the honest trace or from a false one."""
        standing = [id for id in self.accusations if self.court.status(id) == ACCUSED]
        standing = [id for id in standing if system.now() <= self.court.terms[id].contest_end]
        if not standing:
            return
        id = data.draw(st.sampled_from(standing))
        own = honest() if number < 0 else lie(number)
        who = data.draw(st.sampled_from(CONTESTERS)).address
        shown = self.court.contests.shown_at(id, 0, 255, max(point, 0))
        asked = point if point >= 0 and not shown else None
        contest = self.court.contest(id, who, point=asked)
        right = asked is None and own is honest() and not self.accusations[id].right
        self.contests[contest] = Contest(id, own, lazy, right, system.now())

    @rule(seconds=st.sampled_from([1, 60, 1800]))
    def wait(self, seconds: int) -> None:
        boa.env.time_travel(seconds=seconds)
        self.play()

    @rule()
    def pass_long(self) -> None:
        """Long enough that some such waits run out a clock."""
        self.play()
        boa.env.time_travel(seconds=self.court.value("contest_window") // 3)
        self.play()

    def play(self) -> None:
        """Everybody who is not lazy makes the moves that are due."""
        for _ in range(2):
            for id, contest in self.contests.items():
                if not self.court.is_open(id):
                    continue
                accuser = self.accusations[contest.accusation]
                info = self.court.contests.contest_info(id)
                if info.revealed_at == 0:
                    due = info.since + info.accuser_left
                    if (not accuser.lazy) and system.now() <= due:
                        self.court.answer_for(id, accuser.telling)
                    elif system.now() > due:
                        self.court.settle(id)
                elif (
                    info.level == 255
                    or info.revealed_at > info.since + info.accuser_left
                    or system.now() > max(info.revealed_at, info.since) + info.contester_left
                ):
                    self.court.settle(id)
                elif not contest.lazy:
                    self.court.move(id, accuser.telling, contest.own)

    @precondition(lambda self: self.accusations)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.accusations)))
        info = self.court.accusations.accusation_info(id)
        if info.status != ACCUSED or info.open_contests or system.now() <= self.court.terms[id].contest_end:
            return
        if any(self.court.status(i) in (COMMITTED, ACCUSED) for i in self.accusations if i < id):
            with boa.reverts("court: an earlier accusation is open"):
                self.court.end(id, self.committed.batch.values())
        else:
            self.court.end(id, self.committed.batch.values())

    @rule()
    def burn(self) -> None:
        if self.court.accusations.to_burn():
            self.court.accusations.burn()

    # What always holds

    @invariant()
    def books_agree(self) -> None:
        self.court.check_books()

    @invariant()
    def who_is_right_is_not_beaten(self) -> None:
        for id, accusation in self.accusations.items():
            if accusation.right and not accusation.lazy:
                assert self.court.status(id) != LOST
        for id, contest in self.contests.items():
            if contest.right and not contest.lazy and not self.court.is_open(id):
                assert self.court.status(contest.accusation) == LOST

    def everything_ends(self) -> None:
        """All leave but one stranger, who calls what the clocks allow; then all that is held is somebody's credit."""
        boa.env.time_travel(seconds=self.court.value("reveal_window") + 1)
        batch, c = self.committed.batch, self.court.accusations
        for id in self.accusations:
            if self.court.status(id) == COMMITTED:
                c.expire(id, batch.values())
        longest = self.court.value("contest_window") + 2 * self.court.value("dispute_clock")
        boa.env.time_travel(seconds=longest + 1)
        for contest in self.contests:
            if self.court.is_open(contest):
                self.court.settle(contest)
        for id in sorted(self.accusations):
            if self.court.status(id) == ACCUSED:
                self.court.end(id, batch.values())
        assert all(self.court.status(id) in (EXPIRED, LOST, STOOD) for id in self.accusations)
        assert self.court.network.log.open_cases(batch.id) == 0
        stood = any(self.court.status(id) == STOOD for id in self.accusations)
        assert (self.court.network.log.status(batch.id) == 3) == stood
        for who in self.court.players:
            if c.credits(who):
                c.claim(sender=who)
        assert c.total_held() == c.to_burn() == self.court.network.token.balanceOf(c)


@pytest.mark.slow
def test_court_machine() -> None:
    deployed()  # outside the runs, each of which is undone
    checked = settings(max_examples=8, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(CourtMachine, settings=checked)
