"""Attacks on a single dispute: false traces, moves that cheat or do not come, and partners on both sides.

Named as the attack; each says what it wants and why it fails, and asserts what everybody has afterwards, to the wei.
Attacks by several accusations, by time and by order: test_court_order.py. By the computation:
test_court_wrong_computation.py. By claims: test_court_claims.py.
"""

from __future__ import annotations

import boa
import pytest
from eth_hash.auto import keccak

from poip_chain.service.court.lies import Lie
from poip_chain.spec.dispute import Node, path_within
from poip_chain.spec.trace import Op
from tests.attack.court_ledger import BOND, CONTEST_BOND, PARTNER, Ledger
from tests.contracts.court import ACCUSED, ACCUSER, LOST, Court, arguments
from tests.contracts.network import CONVICTED, PENDING, Committed, Server
from tests.contracts.system import POIP, account, refuses
from tests.support.lying_trace import Changes, LyingTrace, model
from tests.support.referee_steps import Step, open_step
from tests.support.tellings import Story, Telling
from tests.vectors.generate_canonical import traced

pytestmark = pytest.mark.slow

HALF, QUARTER = BOND // 2, CONTEST_BOND // 2
LOST_BOND = {"accuser": -BOND, "contester": HALF, "burned": BOND - HALF}
"""An accusation that one contest ended."""


def place(telling: Telling, op: Op) -> tuple[int, int]:
    """(leaf, element) in the middle of a tensor of the last layer."""
    tensor = telling.layout.tensor(op, telling.layout.config.num_layers - 1 if Op.EMBED < op < Op.FINAL_MAX else 0)
    leaf = tensor.start + tensor.leaves // 2
    return leaf, telling.layout.locate(leaf).count - 1


def lying(telling: Telling, op: Op) -> Telling:
    """One element off; what follows is as it was."""
    leaf, element = place(telling, op)
    return Telling(telling.story, {leaf: telling.changed(leaf, element)})


def to_the_leaves(court: Court, contest: int, shown: Telling, own: Telling) -> None:
    """Both sides move until the contested leaf is among those shown."""
    while True:
        court.answer_for(contest, shown)
        if court.contests.contest_info(contest).level <= 6:
            return
        court.move(contest, shown, own)


def step_with(court: Court, contest: int, shown: Telling, at: Step, opened: Telling, of: Step) -> None:
    """The step at a leaf that was shown, with what `opened` computes another from."""
    info = court.contests.contest_info(contest)
    leaves = shown.shown(0, Node(info.level, info.index))
    offset = at.leaf - (info.index << info.level)
    path = path_within([keccak(b"\0" + leaf) for leaf in leaves], offset)
    inputs = arguments(open_step(opened.referee, of, opened.trees))
    where = (contest, court.terms[contest >> 32], at.leaf, at.element, leaves[offset], path)
    court.contests.step(*where, bytes(32), inputs, sender=info.contester)


# What is false in the accuser's trace


@pytest.mark.parametrize("op", [Op.EMBED, Op.GATE, Op.LOGITS], ids=lambda op: op.name.lower())
def test_false_trace(court: Court, committed: Committed, honest: Telling, ledger: Ledger, op: Op) -> None:
    """An invented trace that is consistent with itself: one number is false and all that reads it follows, so the points
    prove into it. The first difference is that number, its inputs are agreed, and the referee computes it."""
    told = honest.story
    tokens = [*told.prompt, *told.output][:-1]
    trace = LyingTrace(model(told.config, Lie(op, 0, 0, 1, 1 << 12)), tokens, len(told.output), Changes())
    false = Telling(told, dict(enumerate(trace.leaves)))
    id = court.accuse(committed, false)
    ended = court.play(court.contest(id), false, honest)
    assert (ended.outcome, ended.by) == (1, 1) and court.status(id) == LOST
    assert court.network.log.status(committed.batch.id) == PENDING
    assert ledger.changes() == LOST_BOND


def test_stale_root(court: Court, committed: Committed, honest: Telling, told: Story, ledger: Ledger) -> None:
    """The root of a true canonical trace, of an earlier answer of the same lengths. It is a trace of other tokens: the
    first leaf that differs is computed from an id that the transcript on trial does not have."""
    tokens = (*told.prompt[:-1], (told.prompt[-1] + 1) % told.config.vocab_size, *told.output[:-1])
    stale = Telling(told, dict(enumerate(traced(told.config, tokens, len(told.output)))))
    id = court.accuse(committed, stale)
    assert stale.root != honest.root
    court.play(court.contest(id), stale, honest)
    assert court.status(id) == LOST
    assert ledger.changes() == LOST_BOND


def test_relabelled_leaf(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Every leaf is a true one, but two rows have changed places. What a leaf is follows from its index alone: the one
    that stands where another belongs is false there."""
    tensor = honest.layout.tensor(Op.HIDDEN, 0)
    one, two = tensor.start, tensor.start + 1
    assert honest.leaves[one] != honest.leaves[two]
    swapped = Telling(honest.story, {one: honest.leaves[two], two: honest.leaves[one]})
    id = court.accuse(committed, swapped)
    court.play(court.contest(id), swapped, honest)
    assert court.status(id) == LOST
    assert ledger.changes() == LOST_BOND


@pytest.mark.parametrize("op", [Op.ATTENTION, Op.Q, Op.MIDDLE], ids=lambda op: op.name.lower())
def test_true_sub_trace_under_a_false_leaf(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger, op: Op
) -> None:
    """The contested cell is false, and the tree that it is opened into is the true one, in which nobody finds a fault.
    The cell itself is the step after the tree's last leaf, so that its contester finishes there."""
    false = lying(honest, op)
    id = court.accuse(committed, false)
    contest = court.contest(id)
    to_the_leaves(court, contest, false, honest)
    court.move(contest, false, honest)
    cell = court.contests.contest_info(contest).cell
    assert cell and false.open(cell) == honest.open(cell)
    ended = court.play(contest, false, honest)
    assert (ended.outcome, ended.by) == (1, 1) and court.status(id) == LOST
    assert ledger.changes() == LOST_BOND


# What is false in the contester's step


@pytest.mark.parametrize("attack", ["false input leaf", "relabelled leaf"])
def test_step_from_other_inputs(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger, attack: str
) -> None:
    """A cheat's partner contests a true accusation and has a true number recomputed from inputs that give another: from
    a false input leaf, or from true ones of another position. Neither is a leaf of this trace at the places that the
    contract derives, so the step is no move; the partner runs out of time."""
    leaf, element = place(honest, Op.HIDDEN)
    tensor = honest.layout.tensor(Op.HIDDEN, honest.layout.config.num_layers - 1)
    at = Step(leaf, element)
    id = court.accuse(committed, honest)
    contest = court.contest(id, PARTNER.address)
    to_the_leaves(court, contest, honest, lying(honest, Op.HIDDEN))
    if attack == "false input leaf":
        opened, of = lying(honest, Op.GATE), at
        assert place(honest, Op.GATE)[0] - honest.layout.tensor(Op.GATE, 1).start == leaf - tensor.start
    else:
        opened, of = honest, Step(leaf + 1, element)
    before = court.contests.contest_info(contest)
    with boa.reverts("referee: leaves are not of the trace"):
        step_with(court, contest, honest, at, opened, of)
    assert court.contests.contest_info(contest) == before
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert not court.settle(contest) and court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction(accuser=QUARTER, partner=-CONTEST_BOND, burned=QUARTER)


# Moves that come late or never


def test_late_move_of_the_accuser(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A right answer after the clock is none, whoever brings it: else every contest could be answered at leisure."""
    id = court.accuse(committed, honest)
    contest = court.contest(id)
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    refuses("court: the accuser's time is over", lambda: court.answer_for(contest, honest))
    assert court.settle(contest) and court.status(id) == LOST
    refuses("court: not an open accusation", lambda: court.end(id, committed.batch.values()))
    assert ledger.changes() == LOST_BOND


def test_late_move_of_the_contester(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Right, but late: a contester that lets its clock run has lost its bond, and the accusation goes on."""
    false = lying(honest, Op.HIDDEN)
    id = court.accuse(committed, false)
    contest = court.contest(id)
    court.answer_for(contest, false)
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    refuses("court: the contester's time is over", lambda: court.move(contest, false, honest))
    assert not court.settle(contest) and court.status(id) == ACCUSED
    # One defender in time is enough, but the window is over here: nobody was awake.
    assert court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction(accuser=QUARTER, contester=-CONTEST_BOND, burned=QUARTER)


def test_withheld_move_of_the_accuser(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A root of nothing, which nobody can show to be false in one step, because nothing is ever shown of it. Who states
    a root must open it."""
    id = court.accuse(committed, honest, trace_root=b"\x07" * 32)
    contest = court.contest(id)
    refuses("court: not the node's", lambda: court.answer_for(contest, honest))
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert court.settle(contest) and court.status(id) == LOST
    assert ledger.changes() == LOST_BOND


def test_withheld_move_of_the_contester(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """The cheat's partner contests in the last second and never moves again, to keep the batch from its conviction. It
    is held up for one clock, and the partner pays for it."""
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("contest_window"))
    contest = court.contest(id, PARTNER.address)
    court.answer_for(contest, honest)
    refuses("court: the contester has time left", lambda: court.settle(contest))
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert not court.settle(contest) and court.end(id, committed.batch.values())
    assert ledger.changes() == ledger.conviction(accuser=QUARTER, partner=-CONTEST_BOND, burned=QUARTER)


# Both sides in one hand


def test_self_accusation_of_the_node(court: Court, honest: Telling) -> None:
    """A node that was found out accuses itself first, to have the reward at least. It gets back less than a third of
    what is taken, at the dearest batch as at any."""
    server = Server.start(court.network, "self accuser")
    committed = server.commit([court.answer(server)], total_fee=1000 * POIP)
    court.fund(committed.batch.node)
    ledger = Ledger(court, committed)
    assert court.resolve(court.accuse(committed, honest, committed.batch.node), committed.batch)
    assert ledger.lock > 10_000 * POIP and 3 * ledger.reward < ledger.lock
    assert ledger.changes() == ledger.conviction("node")


def test_self_accusation_of_an_accuser(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Who accuses falsely and contests himself, before anybody else does, pays half his bond for nothing; the one that
    contested honestly has its bond back."""
    false = lying(honest, Op.EMBED)
    id = court.accuse(committed, false)
    mine, other = court.contest(id, ACCUSER.address), court.contest(id)
    court.play(mine, false, honest)
    assert court.status(id) == LOST and not court.settle(other)
    assert ledger.changes() == {"accuser": HALF - BOND, "burned": BOND - HALF}


def test_collusive_bad_defence_of_a_cheat(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A cheat's partner contests the true accusation and plays badly, so that the matter counts as tried. Nothing is ever
    tried but the contested step: the partner's bond is lost and the accusation stands."""
    id = court.accuse(committed, honest)
    ended = court.play(court.contest(id, PARTNER.address), honest, lying(honest, Op.UP))
    assert (ended.outcome, ended.by) == (2, 1) and court.status(id) == ACCUSED
    assert court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction(accuser=QUARTER, partner=-CONTEST_BOND, burned=QUARTER)


def test_collusive_bad_defence_of_an_honest_node(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger
) -> None:
    """The liar's partner "defends" the node first, and loses on purpose: where one defence decides, the node is convicted.
    Contests stand side by side, each with its own bond: one that wins is enough, before or after any that lost. Those
    that are open then get their bonds back, once."""
    false = lying(honest, Op.GATE)
    id = court.accuse(committed, false)
    court.play(court.contest(id, PARTNER.address), false, lying(honest, Op.EMBED))
    idle, good, point = (
        court.contest(id, PARTNER.address),
        court.contest(id),
        court.contest(id, PARTNER.address, point=0),
    )
    assert court.status(id) == ACCUSED
    court.play(good, false, honest)
    assert court.status(id) == LOST and court.network.log.open_cases(committed.batch.id) == 0
    refuses("court: not an open accusation", lambda: court.contest(id))
    assert not court.settle(idle) and not court.settle(point)
    refuses("court: no such contest", lambda: court.settle(idle))
    assert ledger.changes() == {
        "accuser": QUARTER - BOND,
        "partner": -CONTEST_BOND,
        "contester": HALF,
        "burned": BOND - HALF + CONTEST_BOND - QUARTER,
    }
    court.network.finalize(committed.batch)


def test_collusive_bad_accusation(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A cheat's partner accuses first, of the same answer, and loses, so that it counts as acquitted. A lost accusation
    proves nothing for the node: the honest one stands beside it, convicts, and is rewarded."""
    false = lying(honest, Op.INPUT_NORM)
    lost = court.accuse(committed, false, PARTNER.address)
    id = court.accuse(committed, honest)
    court.play(court.contest(lost, account("node").address, free=True), false, honest)
    assert court.status(lost) == LOST and court.network.log.open_cases(committed.batch.id) == 1
    assert court.resolve(id, committed.batch)
    assert court.network.log.status(committed.batch.id) == CONVICTED
    assert ledger.changes() == ledger.conviction(partner=-BOND, node=HALF, burned=BOND - HALF)


def test_collusive_true_accusation_thrown_away(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger
) -> None:
    """A cheat's partner accuses rightly, first, so that others save their bonds; the node contests, and the partner lets
    its clock run out when the batch's window is over and nobody can accuse any more. Who committed inside the window, as
    a watchtower does whoever else accuses, convicts all the same."""
    boa.env.time_travel(seconds=court.value("challenge_window") - 10)
    thrown = court.accuse(committed, honest, PARTNER.address)
    id = court.accuse(committed, honest)
    contest = court.contest(thrown, committed.batch.node, free=True)
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    with boa.reverts("court: window is over"):
        court.commit(committed.batch, court.claim(committed, honest))
    refuses("court: an earlier accusation is open", lambda: court.end(id, committed.batch.values()))
    assert court.settle(contest) and court.status(thrown) == LOST
    assert court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction(partner=-BOND, node=HALF, burned=BOND - HALF)
