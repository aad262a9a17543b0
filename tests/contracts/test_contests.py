"""Contests: every kind of cell down to the step, both ways; points, clocks, crowds, and moves that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import boa
import pytest
from eth_hash.auto import keccak

from poip_chain.spec.dispute import Node, asked_cell, cell_number, path_within
from poip_chain.spec.referee import Cell
from poip_chain.spec.trace import Op, decode, encode
from tests.contracts.court import (
    ACCUSED,
    ACCUSER,
    CONTESTER,
    LOST,
    NODE,
    POINT_LEVEL,
    Court,
    arguments,
    deploy_court,
)
from tests.contracts.network import CONVICTED, PENDING, Committed
from tests.contracts.system import account, refuses
from tests.support.referee_steps import Step, open_step
from tests.support.tellings import Story, Telling, story
from tests.vectors.generate_canonical import ODD

OTHER = account("other contester")


@pytest.fixture(scope="module")
def told() -> Story:
    return story()


@pytest.fixture(scope="module")
def honest(told: Story) -> Telling:
    return Telling(told)


@pytest.fixture(scope="module")
def deployed(told: Story) -> Court:
    return deploy_court(told)


@pytest.fixture(scope="module")
def odd() -> Court:
    return deploy_court(story(ODD))


@pytest.fixture
def court(deployed: Court) -> Iterator[Court]:
    deployed.fund(OTHER.address)
    yield deployed
    deployed.check_books()


@pytest.fixture
def committed(court: Court) -> Committed:
    return court.serve()


def place(telling: Telling, op: Op) -> tuple[int, int]:
    """(leaf, element) in the middle of a tensor."""
    tensor = telling.layout.tensor(op, telling.layout.config.num_layers - 1 if Op.EMBED < op < Op.FINAL_MAX else 0)
    leaf = tensor.start + tensor.leaves // 2
    return leaf, telling.layout.locate(leaf).count - 1


def lying(telling: Telling, leaf: int, element: int) -> Telling:
    return Telling(telling.story, {leaf: telling.changed(leaf, element)})


def earned(court: Court, id: int) -> int:
    """What the accuser will get of contests that were lost."""
    return int(court.accusations.accusation_info(id).lost_contests) * (court.value("contest_bond") // 2)


def credit(court: Court, who: Any) -> int:
    return int(court.accusations.credits(who.address))


# Every kind of cell, some of them in a quick run too

QUICK = (Op.EMBED, Op.ATTENTION, Op.LOGITS)
EVERY_KIND = pytest.mark.parametrize(
    "op",
    [pytest.param(op, id=op.name.lower(), marks=() if op in QUICK else pytest.mark.slow) for op in Op],
)


@EVERY_KIND
def test_a_true_accusation_outlasts_a_false_contest(
    court: Court, committed: Committed, honest: Telling, op: Op
) -> None:
    """The contester says that some cell is another: the step shows that it is not."""
    id = court.accuse(committed, honest)
    contest, bond = court.contest(id), court.value("contest_bond")
    assert court.accusations.accusation_info(id).open_contests == 1
    ended = court.play(contest, honest, lying(honest, *place(honest, op)))
    assert (ended.contest, ended.contester, ended.outcome, ended.by) == (contest, CONTESTER.address, 2, 1)
    assert (earned(court, id), credit(court, CONTESTER)) == (bond // 2, 0)
    assert court.status(id) == ACCUSED and court.accusations.accusation_info(id).open_contests == 0
    assert court.resolve(id, committed.batch) and court.network.log.status(committed.batch.id) == CONVICTED
    assert credit(court, ACCUSER) == court.value("accusation_bond") + bond // 2
    assert court.accusations.to_burn() == bond - bond // 2


@EVERY_KIND
def test_a_false_leaf_loses(court: Court, committed: Committed, honest: Telling, op: Op) -> None:
    """The accuser falsifies one cell; the trees of cells follow honestly from what stands before them."""
    id = court.accuse(committed, lying(honest, *place(honest, op)))
    contest = court.contest(id)
    court.play(contest, lying(honest, *place(honest, op)), honest)
    bond = court.value("accusation_bond")
    assert court.status(id) == LOST
    assert credit(court, CONTESTER) == court.value("contest_bond") + bond // 2 and credit(court, ACCUSER) == 0
    assert court.accusations.to_burn() == bond - bond // 2
    assert court.network.log.status(committed.batch.id) == PENDING
    assert court.network.log.open_cases(committed.batch.id) == 0
    refuses("court: not an open accusation", lambda: court.resolve(id, committed.batch))


@pytest.mark.slow
@pytest.mark.parametrize("op", [Op.ATTENTION, Op.MIDDLE, Op.LOGITS, Op.INPUT_SUM], ids=lambda op: op.name.lower())
def test_more_than_one_block_of_everything(odd: Court, op: Op) -> None:
    """A larger model: two moves of hashes, sums of two segments, attention over two blocks. Both ways."""
    truth, committed = Telling(odd.story), odd.serve(2)
    lie = lying(truth, *place(truth, op))
    good, bad = odd.accuse(committed, truth), odd.accuse(committed, lie, index=1)
    for id, mine, theirs in ((good, truth, lie), (bad, lie, truth)):
        odd.play(odd.contest(id), mine, theirs)
    assert (odd.status(good), odd.status(bad)) == (ACCUSED, LOST)
    odd.check_books()


def falsified_sub(telling: Telling, leaf: int, element: int, index: int, at: int) -> Telling:
    """A falsified cell whose own tree is falsified too, at one of its cells."""
    lie = lying(telling, leaf, element)
    number = cell_number(leaf, element)
    attention = telling.layout.locate(leaf).tensor.op is Op.ATTENTION
    parts = telling.referee.attention_parts(Cell(leaf, element)) if attention else None
    wide = parts is None or not parts.narrow(index)
    values = list(decode(telling.open(number)[index], wide))
    values[at] += 1
    lie.sub_changes[number] = {index: encode(values, wide)}
    return lie


def sub_cells(telling: Telling, op: Op) -> list[tuple[int, int]]:
    leaf, element = place(telling, op)
    count = len(telling.open(cell_number(leaf, element)))
    return [(index, 0) for index in range(count)]


def test_a_false_tree_under_a_false_leaf_loses(court: Court, committed: Committed, honest: Telling) -> None:
    """Falsified sums, and a falsified cell of each part of an attention tree."""
    cases = [(Op.GATE, 0, 0), *((Op.ATTENTION, *where) for where in sub_cells(honest, Op.ATTENTION))]
    assert len(cases) == 7
    for op, index, at in cases:
        lie = falsified_sub(honest, *place(honest, op), index, at)
        id = court.accuse(committed, lie)
        court.play(court.contest(id), lie, honest)
        assert court.status(id) == LOST, (op, index)


def test_a_true_tree_is_not_shaken(court: Court, committed: Committed, honest: Telling) -> None:
    """The contester claims that a cell of the opened tree is another, and loses."""
    id = court.accuse(committed, honest)
    for op, index, at in ((Op.OUTPUT, 0, 0), (Op.ATTENTION, 1, 0), (Op.ATTENTION, 4, 0)):
        lie = falsified_sub(honest, *place(honest, op), index, at)
        contest = court.contest(id)
        court.play(contest, honest, lie)
        assert court.status(id) == ACCUSED and not court.is_open(contest)
    assert earned(court, id) == 3 * (court.value("contest_bond") // 2)


def test_sums_of_two_segments(odd: Court) -> None:
    truth, committed = Telling(odd.story), odd.serve()
    leaf, element = place(truth, Op.MIDDLE)
    assert truth.referee.segments(Cell(leaf, element)) == 2
    for at in (0, 1):
        lie = falsified_sub(truth, leaf, element, 0, at)
        id = odd.accuse(committed, lie)
        odd.play(odd.contest(id), lie, truth)
        assert odd.status(id) == LOST
    odd.check_books()


def test_the_trace_of_other_tokens_loses(court: Court, committed: Committed, honest: Telling, told: Story) -> None:
    """Consistent throughout, but computed from another prompt."""
    other = Telling(told, dict(enumerate(honest.leaves[:40] + honest.leaves[60:80])))
    id = court.accuse(committed, other)
    court.play(court.contest(id), other, honest)
    assert court.status(id) == LOST


def test_padding_is_contested_like_any_cell(court: Court, committed: Committed, honest: Telling) -> None:
    leaf, element = place(honest, Op.Q)
    lie = lying(honest, leaf, element + 1)
    id = court.accuse(committed, lie)
    court.play(court.contest(id), lie, honest)
    assert court.status(id) == LOST


# What cannot be shown


def test_a_root_of_nothing_cannot_be_answered(court: Court, committed: Committed, honest: Telling) -> None:
    """Neither a random root nor zero, which no hash gives and which stands for nothing inside."""
    for root in (b"\x07" * 32, bytes(32)):
        id = court.accuse(committed, honest, trace_root=root)
        contest = court.contest(id)
        refuses("court: not the node's", lambda contest=contest: court.answer_for(contest, honest))
        boa.env.time_travel(seconds=court.value("dispute_clock"))
        refuses("court: the accuser has time left", lambda contest=contest: court.settle(contest))
        boa.env.time_travel(seconds=1)
        assert court.settle(contest) and court.status(id) == LOST


def test_a_node_of_nothing_cannot_be_answered(court: Court, committed: Committed, honest: Telling) -> None:
    """A zero among the nodes shown: it can be picked, and nothing can be shown below it."""
    hollow = Telling(court.story)
    levels = hollow.trees.levels["trace"]
    levels[3][7] = bytes(32)
    for level in range(3, 9):
        for i in range(len(levels[level + 1])):
            pair = levels[level][2 * i : 2 * i + 2]
            levels[level + 1][i] = keccak(b"\x01" + pair[0] + pair[1]) if len(pair) == 2 else pair[0]
    id = court.accuse(committed, hollow)
    contest = court.contest(id)
    court.answer_for(contest, hollow)
    court.move(contest, hollow, honest)
    info = court.contests.contest_info(contest)
    assert (info.level, info.index, info.node) == (3, 7, bytes(32))
    for telling in (hollow, honest):
        refuses("court: not the node's", lambda telling=telling: court.answer_for(contest, telling))
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert court.settle(contest) and court.status(id) == LOST


# Points


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_true_point_is_shown(court: Court, committed: Committed, honest: Telling, number: int) -> None:
    id = court.accuse(committed, honest)
    contest = court.contest(id, point=number)
    info = court.contests.contest_info(contest)
    assert (info.level, info.index) == (POINT_LEVEL, number)
    same = court.contest(id, OTHER.address, point=number)
    court.play(contest, honest, honest)
    assert not court.is_open(contest) and earned(court, id) == court.value("contest_bond") // 2
    refuses("court: the point was proven", lambda: court.contest(id, point=number))
    refuses("court: shown already", lambda: court.show_point(same, honest, number))
    assert not court.settle(same) and earned(court, id) == 2 * (court.value("contest_bond") // 2)
    assert court.resolve(id, committed.batch)


def test_a_false_point_cannot_be_shown(court: Court, committed: Committed, honest: Telling, told: Story) -> None:
    for change in ((2, 1), (3, -1)):
        point = [0, 4, honest.logit(0, 4), honest.logit(0, told.output[0])]
        point[change[0]] += change[1]
        id = court.accuse(committed, honest, margins=[tuple(point)], fingerprints=[])
        contest = court.contest(id, point=0)
        with boa.reverts(f"court: the {'claimed ' if change[0] == 3 else ''}logit is another"):
            court.answer_for(contest, honest)
        boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
        assert court.settle(contest) and court.status(id) == LOST


def test_points_whose_tokens_stand_anyhow(odd: Court) -> None:
    """The token below, above and in the leaf of the claimed one; and the claimed one itself."""
    truth, committed, told = Telling(odd.story), odd.serve(), odd.story
    for position in (0, 1):
        for token in (0, 5, told.output[position], 28):
            point = (position, token, truth.logit(position, token), truth.logit(position, told.output[position]))
            id = odd.accuse(committed, truth, margins=[point], fingerprints=[])
            contest = odd.contest(id, point=0)
            odd.answer_for(contest, truth)
            assert not odd.is_open(contest) and odd.status(id) == ACCUSED


def test_a_point_is_shown_with_nothing_else(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    contest = court.contest(id, point=1)
    claim = court.claims[id]
    ids = court.story.output[0].to_bytes(4, "little") + b"\x09\0\0\0"
    for changes, reason in (
        ({"margins": claim[7][:1]}, "not the accusation's points"),
        ({"fingerprints": []}, "not the accusation's points"),
        ({"ids": ids}, "ids of another transcript"),
        ({"ids": ids[:4]}, "ids are of the wrong length"),
        ({"leaves": bytes(128)}, "leaves of another trace"),
        ({"leaves": bytes(256)}, "leaves are of the wrong length"),
        ({"proof": []}, None),
    ):
        with boa.reverts(f"court: {reason}" if reason else "referee: proof is too short"):
            court.show_point(contest, honest, 1, **changes)
    refuses("court: no such point", lambda: court.contest(id, point=3))
    trace = court.contest(id)
    refuses("court: not a point contest", lambda: court.show_point(trace, honest, 1))
    nothing = (court.terms[id], claim[7], claim[8], ids, [], b"", [])
    refuses("court: no such contest", lambda: court.contests.show_point(99, *nothing))
    for contest_id, call in ((contest, court.contests.reveal), (trace, court.contests.reveal_leaves)):
        with boa.reverts():
            call(contest_id, bytes(32), [] if call == court.contests.reveal else b"")


# Clocks


def test_the_accuser_runs_out_of_time(court: Court, committed: Committed, honest: Telling) -> None:
    id, clock = court.accuse(committed, honest), court.value("dispute_clock")
    contest, lie = court.contest(id), lying(honest, *place(honest, Op.GATE))
    boa.env.time_travel(seconds=clock - 100)
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=50)
    court.move(contest, honest, lie)
    info = court.contests.contest_info(contest)
    assert (info.accuser_left, info.contester_left) == (100, clock - 50)
    boa.env.time_travel(seconds=100)
    refuses("court: the accuser has time left", lambda: court.settle(contest))
    boa.env.time_travel(seconds=1)
    refuses("court: the accuser's time is over", lambda: court.answer_for(contest, honest))
    refuses("court: the accuser is to move", lambda: court.move(contest, honest, lie))
    assert court.settle(contest) and court.status(id) == LOST


def test_the_contester_runs_out_of_time(court: Court, committed: Committed, honest: Telling) -> None:
    id, clock = court.accuse(committed, honest), court.value("dispute_clock")
    contest, lie = court.contest(id), lying(honest, *place(honest, Op.GATE))
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=clock - 10)
    court.move(contest, honest, lie)
    boa.env.time_travel(seconds=1000)
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=10)
    refuses("court: the contester has time left", lambda: court.settle(contest))
    boa.env.time_travel(seconds=1)
    refuses("court: the contester's time is over", lambda: court.move(contest, honest, lie))
    assert not court.settle(contest) and court.status(id) == ACCUSED
    assert earned(court, id) == court.value("contest_bond") // 2


def test_what_is_shown_for_one_is_shown_for_all(court: Court, committed: Committed, honest: Telling) -> None:
    """A second contest goes down the same way at no cost of the accuser's time, up to where the ways part."""
    id = court.accuse(committed, honest)
    first, second = lying(honest, *place(honest, Op.GATE)), lying(honest, place(honest, Op.GATE)[0] - 4, 0)
    one, two = court.contest(id), court.contest(id, OTHER.address)
    boa.env.time_travel(seconds=100)
    court.answer_for(one, honest)
    refuses("court: shown already", lambda: court.answer_for(two, honest))
    boa.env.time_travel(seconds=30)
    court.move(two, honest, second)
    late = court.contest(id, OTHER.address)
    boa.env.time_travel(seconds=20)
    court.move(late, honest, first)
    clock = court.value("dispute_clock")
    for contest, expected in ((two, (clock - 100, clock - 30)), (late, (clock, clock - 20))):
        info = court.contests.contest_info(contest)
        assert (info.accuser_left, info.contester_left) == expected
    for contest, lie in ((one, first), (two, second), (late, first)):
        court.play(contest, honest, lie)
    assert court.status(id) == ACCUSED and earned(court, id) == 3 * (court.value("contest_bond") // 2)


def test_a_reveal_too_late_for_one_contest_is_in_time_for_another(
    court: Court, committed: Committed, honest: Telling
) -> None:
    id, clock = court.accuse(committed, honest), court.value("dispute_clock")
    lie = lying(honest, *place(honest, Op.GATE))
    old = court.contest(id)
    boa.env.time_travel(seconds=court.value("contest_window"))
    young = court.contest(id, OTHER.address)
    boa.env.time_travel(seconds=clock - court.value("contest_window") + 1)
    refuses("court: the accuser's time is over", lambda: court.answer_for(old, honest))
    court.answer_for(young, honest)
    refuses("court: the accuser was too late: settle", lambda: court.move(old, honest, lie))
    court.move(young, honest, lie)
    assert court.settle(old) and court.status(id) == LOST
    assert not court.settle(young) and credit(court, OTHER) == court.value("contest_bond")


# Crowds


def test_only_the_accuser_opens_a_cell(court: Court, committed: Committed, honest: Telling) -> None:
    """Nothing proves a cell's tree: whoever could bring one in the accuser's name would win by a false one."""
    id = court.accuse(committed, honest)
    contest = court.contest(id)
    leaf = honest.layout.index(Op.GATE, 0, 1, 3)
    liar = Telling(court.story, {leaf: honest.changed(leaf, 3)})
    while not court.contests.contest_info(contest).cell:
        if court.contests.contest_info(contest).revealed_at == 0:
            court.answer_for(contest, honest)
        else:
            court.move(contest, honest, liar)
    leaves = honest.open(court.contests.contest_info(contest).cell)
    forged = b"\x01" + b"".join(leaves)[1:]
    asked = asked_cell(court.accusations.terms_hash(id), court.contests.contest_info(contest).cell)
    for who in (CONTESTER.address, account("anyone").address):
        refuses(
            "court: not the accuser", lambda who=who: court.contests.reveal_leaves(contest, asked, forged, sender=who)
        )
    court.answer_for(contest, honest)
    court.move(contest, honest, liar)
    assert court.status(id) == ACCUSED and not court.is_open(contest)


def test_two_winners_share_nothing_twice(court: Court, committed: Committed, honest: Telling) -> None:
    """The second contest to win an accusation that is lost already gets its bond back, and no more."""
    lie = lying(honest, *place(honest, Op.HIDDEN))
    id, bond = court.accuse(committed, lie), court.value("contest_bond")
    one, two = court.contest(id), court.contest(id, OTHER.address)
    court.play(one, lie, honest)
    court.play(two, lie, honest)
    assert not court.is_open(two) and credit(court, OTHER) == bond
    assert credit(court, CONTESTER) == bond + court.value("accusation_bond") // 2


def test_an_open_contest_holds_up_the_conviction_no_longer_than_its_clocks(
    court: Court, committed: Committed, honest: Telling
) -> None:
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("contest_window"))
    contest = court.contest(id)
    boa.env.time_travel(seconds=1)
    refuses("court: contest window is over", lambda: court.contest(id))
    refuses("court: a contest is open", lambda: court.end(id, committed.batch.values()))
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    court.settle(contest)
    assert court.end(id, committed.batch.values())


# The node's free contest


@pytest.mark.parametrize("who", [NODE, f"{NODE} operator"])
def test_the_node_contests_once_without_a_bond(court: Court, committed: Committed, honest: Telling, who: str) -> None:
    id, node = court.accuse(committed, honest), account(who).address
    with boa.reverts("court: sender is neither operator nor key of the node"):
        court.contest(id, OTHER.address, free=True)
    held = court.accusations.total_held()
    contest = court.contest(id, node, free=True)
    assert court.accusations.total_held() == held and court.contests.contest_info(contest).free
    assert court.accusations.accusation_info(id).free_contest_used
    for second in (NODE, f"{NODE} operator"):
        with boa.reverts("court: the node has had its free contest"):
            court.contest(id, account(second).address, free=True)
    court.play(contest, honest, lying(honest, *place(honest, Op.EMBED)))
    assert earned(court, id) == 0 and court.status(id) == ACCUSED
    with boa.reverts("court: the node has had its free contest"):
        court.contest(id, node, free=True)
    court.fund(node)
    bonded = court.contest(id, node)
    assert court.accusations.total_held() == held + court.value("contest_bond")
    court.play(bonded, honest, lying(honest, *place(honest, Op.EMBED)))


def test_a_free_contest_wins_like_any(court: Court, committed: Committed, honest: Telling) -> None:
    lie = lying(honest, *place(honest, Op.EMBED))
    id, node = court.accuse(committed, lie), account(NODE)
    contest = court.contest(id, node.address, free=True)
    void = court.contest(id, OTHER.address)
    court.play(contest, lie, honest)
    assert credit(court, node) == court.value("accusation_bond") // 2 and court.status(id) == LOST
    court.settle(void)


# Moves that are none


def at_leaves(court: Court, id: int, honest: Telling, lie: Telling) -> int:
    contest = court.contest(id)
    court.answer_for(contest, honest)
    court.move(contest, honest, lie)
    court.answer_for(contest, honest)
    return contest


def test_malformed_moves_change_nothing(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    terms, c = court.terms[id], court.contests
    lie = lying(honest, *place(honest, Op.GATE))
    boa.env.time_travel(seconds=10)
    fresh, who = court.contest(id), {"sender": CONTESTER.address}
    shown = honest.shown(0, _node(court, fresh))
    wrong_terms = terms._replace(clock=terms.clock + 1)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("not the accusation's terms", lambda: c.contest_trace(id, wrong_terms, False, **who)),
        ("not the accusation's terms", lambda: c.contest_trace(id, terms._replace(leaf_count=4), False, **who)),
        ("not an open accusation", lambda: c.contest_trace(id + 1, terms, False, **who)),
        ("not the accusation's terms", lambda: c.settle(fresh, wrong_terms)),
        ("wrong number of nodes", lambda: c.reveal(fresh, bytes(32), shown[:-1])),
        ("wrong number of nodes", lambda: c.reveal(fresh, bytes(32), [*shown, bytes(32)])),
        ("wrong number of nodes", lambda: c.reveal(fresh, bytes(32), [honest.root])),
        ("not the node's", lambda: c.reveal(fresh, bytes(32), [shown[1], shown[0], *shown[2:]])),
        ("no leaves are due here", lambda: c.reveal_leaves(fresh, bytes(32), bytes(128))),
        ("the accuser is to move", lambda: c.pick(fresh, 3, shown[3], path_within(shown, 3), **who)),
        ("not at the leaves", lambda: c.step(fresh, terms, 3, 0, bytes(128), [], bytes(32), (b"", b"", []), **who)),
        ("not in the tree of a cell", lambda: c.finish(fresh, terms, bytes(128), bytes(32), (b"", b"", []), **who)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    court.answer_for(fresh, honest)
    path = path_within(shown, 3)
    refused = [
        ("shown already", lambda: c.reveal(fresh, bytes(32), shown)),
        ("not the contester", lambda: c.pick(fresh, 3, shown[3], path, sender=OTHER.address)),
        ("not what was shown", lambda: c.pick(fresh, 4, shown[3], path, **who)),
        ("not what was shown", lambda: c.pick(fresh, 3, shown[4], path, **who)),
        ("path is too short", lambda: c.pick(fresh, 3, shown[3], path[:-1], **who)),
        ("path is too long", lambda: c.pick(fresh, len(shown) - 1, shown[-1], path, **who)),
        ("no such node", lambda: c.pick(fresh, len(shown), shown[3], path, **who)),
        ("not below the contested node", lambda: c.pick(fresh, 64, shown[3], path, **who)),
        ("the contester has time left", lambda: court.settle(fresh)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    court.move(fresh, honest, lie)
    info = c.contest_info(fresh)
    leaves = honest.shown(0, _node(court, fresh))
    raw = b"".join(leaves)
    refused = [
        ("the leaves are due here", lambda: c.reveal(fresh, bytes(32), [keccak(b"\0" + leaf) for leaf in leaves])),
        ("wrong number of leaves", lambda: c.reveal_leaves(fresh, bytes(32), raw[:-128])),
        ("wrong number of leaves", lambda: c.reveal_leaves(fresh, bytes(32), raw[:-1])),
        ("wrong number of leaves", lambda: c.reveal_leaves(fresh, bytes(32), raw + bytes(128))),
        ("not the node's", lambda: c.reveal_leaves(fresh, bytes(32), raw[128:] + raw[:128])),
        ("nothing to pick here", lambda: c.pick(fresh, 0, shown[0], [], **who)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    court.answer_for(fresh, honest)
    first = info.index << info.level
    hashes = [keccak(b"\0" + leaf) for leaf in leaves]
    leaf, path = leaves[2], path_within(hashes, 2)
    opened = (bytes(32), (b"", b"", []))
    refused = [
        ("not the contester", lambda: c.step(fresh, terms, first + 2, 0, leaf, path, *opened, sender=OTHER.address)),
        ("not the contester", lambda: c.open_cell(fresh, terms, first + 2, 0, leaf, path, sender=OTHER.address)),
        ("not what was shown", lambda: c.open_cell(fresh, terms, first + 2, 0, leaves[3], path, **who)),
        ("leaf is not 128 bytes", lambda: c.open_cell(fresh, terms, first + 2, 0, leaf[:-1], path, **who)),
        ("not below the contested node", lambda: c.open_cell(fresh, terms, first + 64, 0, leaf, path, **who)),
        ("such a cell is not opened: step", lambda: c.open_cell(fresh, terms, first + 2, 31, leaf, path, **who)),
        ("not the accusation's terms", lambda: c.open_cell(fresh, wrong_terms, first + 2, 0, leaf, path, **who)),
        ("not the accusation's terms", lambda: c.step(fresh, wrong_terms, first + 2, 0, leaf, path, *opened, **who)),
        ("nothing to pick here", lambda: c.pick(fresh, first, hashes[0], path_within(hashes, 0), **who)),
        ("not in the tree of a cell", lambda: c.finish(fresh, terms, leaf, *opened, **who)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    # A step over what was not opened is the referee's to refuse; a linear cell is no single step.
    with boa.reverts("referee: leaves are of the wrong length"):
        c.step(fresh, terms, first + 2, 0, leaf, path, *opened, **who)
    court.move(fresh, honest, lie)
    cell = c.contest_info(fresh).cell
    assert cell == cell_number(*place(honest, Op.GATE)) and c.contest_info(fresh).revealed_at == 0
    sums = b"".join(honest.open(cell))
    refused = [
        ("wrong number of leaves", lambda: c.reveal_leaves(fresh, bytes(32), sums + bytes(128))),
        ("the accuser is to move", lambda: c.finish(fresh, terms, leaf, *opened, **who)),
        ("the accuser is to move", lambda: c.step(fresh, terms, 0, 0, sums, [], *opened, **who)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    court.answer_for(fresh, honest)
    refused = [
        ("shown already", lambda: c.reveal_leaves(fresh, bytes(32), sums)),
        ("not the cell's leaf", lambda: c.finish(fresh, terms, leaves[0], *opened, **who)),
        ("in the tree of a cell already", lambda: c.open_cell(fresh, terms, 0, 0, sums, [], **who)),
        ("not below the contested node", lambda: c.step(fresh, terms, 1, 0, sums, [], *opened, **who)),
        ("not what was shown", lambda: c.step(fresh, terms, 0, 0, bytes(128), [], *opened, **who)),
        ("not the contester", lambda: c.finish(fresh, terms, leaf, *opened, sender=OTHER.address)),
    ]  # fmt: skip
    nothing_changes(court, fresh, refused)
    court.play(fresh, honest, lie)
    for move in (lambda: c.settle(fresh, terms), lambda: c.pick(fresh, 0, bytes(32), [], **who)):
        with boa.reverts():
            move()
    assert court.status(id) == ACCUSED


def _node(court: Court, contest: int) -> Node:
    info = court.contests.contest_info(contest)
    return Node(info.level, info.index)


def nothing_changes(court: Court, contest: int, refused: list[tuple[str, Callable[[], Any]]]) -> None:
    before = court.contests.contest_info(contest)
    for reason, call in refused:
        with boa.reverts(f"court: {reason}"):
            call()
        assert court.contests.contest_info(contest) == before, reason


def test_moves_of_no_contest(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    terms, c = court.terms[id], court.contests
    for call in (
        lambda: c.reveal(7, bytes(32), [bytes(32)]),
        lambda: c.reveal_leaves(7, bytes(32), bytes(128)),
        lambda: c.pick(7, 0, bytes(32), []),
        lambda: c.step(7, terms, 0, 0, bytes(128), [], bytes(32), (b"", b"", [])),
        lambda: c.open_cell(7, terms, 0, 0, bytes(128), []),
        lambda: c.finish(7, terms, bytes(128), bytes(32), (b"", b"", [])),
        lambda: c.settle(7, terms),
    ):
        with boa.reverts():
            call()
    assert tuple(c.contest_info(7))[:3] == ("0x" + "00" * 20, False, 0)


def test_steps_that_cannot_be_computed_are_no_moves(court: Court, committed: Committed, honest: Telling) -> None:
    """A contester who names a cell behind the first false one may meet values that no forward pass has."""
    layout = honest.layout
    total = layout.index(Op.POST_SUM, 1, 3, 0)
    lie = Telling(court.story, {total: bytes(128)})
    id = court.accuse(committed, lie)
    norm = layout.index(Op.POST_NORM, 1, 3, 0)
    behind = Telling(court.story, {total: bytes(128), norm: honest.changed(norm, 2)})
    contest = court.contest(id)
    for _ in range(2):
        court.answer_for(contest, lie)
        if court.contests.contest_info(contest).level > 6:
            court.move(contest, lie, behind)
    before = court.contests.contest_info(contest)
    with boa.reverts("referee: inputs are those of no forward pass"):
        step_at(court, contest, lie, norm, 2)
    assert court.contests.contest_info(contest) == before
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert not court.settle(contest)


def step_at(court: Court, contest: int, telling: Telling, leaf: int, element: int) -> None:
    info = court.contests.contest_info(contest)
    leaves = telling.shown(0, _node(court, contest))
    offset = leaf - (info.index << info.level)
    path = path_within([keccak(b"\0" + one) for one in leaves], offset)
    opened = bytes(32), arguments(open_step(telling.referee, Step(leaf, element), telling.trees))
    terms = court.terms[contest >> 32]
    court.contests.step(contest, terms, leaf, element, leaves[offset], path, *opened, sender=info.contester)
