"""The moves that players compute from traces of their own, judged by the real contracts of the court."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from poip_chain.canonical.moves import Finish, Game, MakeStep, OpenCell, Pick, Player
from poip_chain.canonical.trace import Trace
from poip_chain.errors import InvalidInput
from poip_chain.spec.dispute import Descent, Node, asked_cell, cell_number
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import LINEAR, Cell, Referee
from poip_chain.spec.trace import Op
from tests.contracts import system
from tests.contracts.court import ACCUSED, LOST, Court, deploy_court
from tests.support.lying_trace import Changes, Lie, LyingTrace, changed_leaf, consistent_lie, model, weight_tree
from tests.support.tellings import Story, Telling, story
from tests.vectors.generate_canonical import ODD
from tests.vectors.generate_numeric import TINY

DISPUTES = system.CONTRACTS / "disputes"
RNG = random.Random(12)
PROMPT = tuple(RNG.randrange(ODD.vocab_size) for _ in range(33))
OUTPUT = tuple(RNG.randrange(ODD.vocab_size) for _ in range(4))


@pytest.fixture(scope="module")
def referee() -> Any:
    return system.load(DISPUTES / "Referee.vy", system.load(DISPUTES / "TraceMap.vy").address)


def player(
    lie: Lie | Changes | None = None,
    config: ModelConfig = ODD,
    prompt: tuple[int, ...] = PROMPT,
    output: tuple[int, ...] = OUTPUT,
) -> Player:
    tokens = (*prompt, *output[:-1])
    if isinstance(lie, Changes):
        trace: Trace = LyingTrace(model(config), tokens, len(output), lie)
    else:
        trace = Trace(model(config, lie), tokens, len(output))
    return Player(trace, weight_tree(config), prompt, output)


@pytest.fixture(scope="module")
def honest() -> Player:
    return player()


def played(accuser: Player, contester: Player) -> MakeStep | Finish:
    game = Game(contester, accuser.root)
    number, node = 0, game.tree(0).shape.root
    while True:
        game.see(number, node, accuser.reveal(number, node))
        move = game.move(number, node)
        if isinstance(move, Pick):
            node = move.node
        elif isinstance(move, OpenCell):
            number = move.number
            node = game.tree(number).shape.root
        else:
            return move


def judged(referee: Any, accuser: Player, contester: Player) -> MakeStep | Finish:
    """The end of a descent, as the contract sees it: the value is the move's, and `holds` says whether the accuser's is."""
    move = played(accuser, contester)
    step, layout = move.step, accuser.layout
    trace = (
        *(layout.prompt_tokens, layout.output_tokens, accuser.root, accuser.rows.root),
        *(merkle_root(accuser.ids["prompt"]), merkle_root(accuser.ids["output"])),
    )
    arguments = (layout.config.values(), trace, move.sub_root, step.values(), move.opened.values())
    assert referee.compute(*arguments) == move.right
    assert referee.holds(*arguments, move.leaf) == (move.right == move.stated)
    return move


def somewhere(player: Player, op: Op) -> tuple[Op, int, int, int]:
    tensor = player.layout.tensor(op)
    return op, 0, tensor.rows - 1 - tensor.rows // 12, tensor.columns - 1 - tensor.columns // 3


@pytest.mark.slow
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name.lower())
def test_a_false_element(referee: Any, honest: Player, op: Op) -> None:
    """One of every tensor, what follows recomputed: the liar loses as accuser and as contester."""
    place = somewhere(honest, op)
    liar = player(Lie(*place))
    won, lost = judged(referee, liar, honest), judged(referee, honest, liar)
    assert won.step.leaf == lost.step.leaf == honest.layout.index(*place)
    assert won.right == lost.right == lost.stated != won.stated
    assert isinstance(won, Finish) == (op in LINEAR or op is Op.ATTENTION)


@pytest.mark.parametrize("op", [Op.EMBED, Op.K, Op.ATTENTION, Op.INPUT_MAX], ids=lambda op: op.name.lower())
def test_false_padding(referee: Any, honest: Player, op: Op) -> None:
    """What stands behind the end of a row is 0, and a step shows that."""
    tensor = honest.layout.tensor(op)
    leaf = tensor.start + tensor.row_leaves - 1
    count = honest.layout.locate(leaf).count
    if count == tensor.per_leaf:
        leaf = next(i for i in range(tensor.start, honest.layout.count) if honest.layout.locate(i).count < 16)
        count = honest.layout.locate(leaf).count
    move = judged(referee, player(Changes(leaves={leaf: changed_leaf(honest.trace, leaf, count)})), honest)
    assert (move.step.leaf, move.step.element, move.right, move.stated) == (leaf, count, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("op", [Op.V, Op.MIDDLE, Op.OUTPUT, Op.LOGITS], ids=lambda op: op.name.lower())
def test_false_running_sums(referee: Any, honest: Player, op: Op) -> None:
    cell = some_cell(honest, op)
    for segment in {0, len(honest.trace.partial_sums(cell)) - 1}:
        lie = consistent_lie(honest.trace, cell, 0, segment, 2**40)
        for move in both(referee, honest, player(lie)):
            assert move.step.values() == (cell.index, cell.element, True, 0, segment)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_every_part_of_a_false_sub_trace(referee: Any, honest: Player, part: int) -> None:
    cell = some_cell(honest, Op.ATTENTION)
    parts = Referee(honest.layout, honest.trace).attention_parts(cell)
    assert parts.blocks == 2
    first = (0, parts.maxima, parts.weights, parts.sums, parts.products)[part]
    lies = 0
    for by in (1, 2**22, -1):
        try:
            lie = consistent_lie(honest.trace, cell, first, 0, by)
        except InvalidInput:
            continue  # a maximum below a score has no weights: nobody can follow from that
        lies += 1
        for move in both(referee, honest, player(lie)):
            assert move.step.values() == (cell.index, cell.element, True, first, 0)
    assert lies >= 2


def some_cell(player: Player, op: Op) -> Cell:
    place = somewhere(player, op)
    index = player.layout.index(*place)
    return Cell(index, place[3] - player.layout.locate(index).column)


def both(referee: Any, honest: Player, liar: Player) -> list[MakeStep | Finish]:
    won, lost = judged(referee, liar, honest), judged(referee, honest, liar)
    assert won.right == lost.right == lost.stated != won.stated
    return [won, lost]


# Through the contracts of the game


@pytest.fixture(scope="module")
def told() -> Story:
    return story(ODD)


@pytest.fixture(scope="module")
def court(told: Story) -> Court:
    return deploy_court(told)


def driven(court: Court, contest: int, accuser: Player, contester: Player) -> None:
    """Both sides' moves as transactions, until the contest has ended."""
    contests = court.contests
    terms = court.terms[contest >> 32]  # a contest is numbered within its accusation
    who = contests.contest_info(contest).contester
    told_by = court.accusations.accuser_of(contest >> 32)  # the root of a cell's tree is for the accuser alone to tell
    game = Game(contester, accuser.root)
    while court.is_open(contest):
        info = contests.contest_info(contest)
        number, node = info.cell, Node(info.level, info.index)
        shown = accuser.reveal(number, node)
        asked = asked_cell(court.accusations.terms_hash(contest >> 32), number)
        if info.revealed_at == 0:
            if game.tree(number).shape.shows_leaves(node):
                contests.reveal_leaves(contest, asked, b"".join(shown), sender=told_by)
            else:
                contests.reveal(contest, asked, shown, sender=told_by)
        game.see(number, node, shown)
        move = game.move(number, node)
        if isinstance(move, Pick):
            contests.pick(contest, move.node.index, move.shown, list(move.path), sender=who)
        elif isinstance(move, Finish):
            contests.finish(contest, terms, move.leaf, move.sub_root, move.opened.values(), sender=who)
        else:
            where = (contest, terms, move.index, move.element, move.leaf, list(move.path))
            if isinstance(move, OpenCell):
                contests.open_cell(*where, sender=who)
            else:
                contests.step(*where, move.sub_root, move.opened.values(), sender=who)


@pytest.mark.parametrize("op", [Op.INPUT_SUM, Op.MIDDLE, Op.ATTENTION], ids=lambda op: op.name.lower())
def test_whole_contests(court: Court, told: Story, op: Op) -> None:
    """A false accusation ends by its first contest; a true one outlasts a false contest."""
    truth = player(None, ODD, told.prompt, told.output)
    place = somewhere(truth, op)
    index = truth.layout.index(*place)
    changed = {index: changed_leaf(truth.trace, index, place[3] - truth.layout.locate(index).column)}
    liar = player(Changes(leaves=changed), ODD, told.prompt, told.output)
    committed = court.serve(2, f"node for {op.name}")
    good = court.accuse(committed, Telling(told))
    bad = court.accuse(committed, Telling(told, changed), index=1)
    assert (truth.root, liar.root) == (Telling(told).root, Telling(told, changed).root)
    driven(court, court.contest(good), truth, liar)
    driven(court, court.contest(bad), liar, truth)
    assert (court.status(good), court.status(bad)) == (ACCUSED, LOST)
    court.check_books()


@pytest.mark.slow
def test_a_cells_own_tree_takes_a_descent() -> None:
    """Keys by the hundred: the tree of an attention cell has more than 64 leaves, so nodes are shown in it before leaves."""
    config = replace(TINY, max_positions=1024, num_layers=1)
    prompt = tuple(RNG.randrange(config.vocab_size) for _ in range(680))
    output = (5, 3)
    truth = player(None, config, prompt, output)
    told = Story(config, prompt, output, tuple(truth.trace.leaf(i) for i in range(truth.layout.count)))
    court = deploy_court(told)
    cell = some_cell(truth, Op.ATTENTION)
    parts = Referee(truth.layout, truth.trace).attention_parts(cell)
    assert parts.count > 64
    lie = consistent_lie(truth.trace, cell, parts.weights + 3, 1, 1)
    liar = player(lie, config, prompt, output)
    committed = court.serve(2, "node of a long answer")
    good, bad = court.accuse(committed, Telling(told)), court.accuse(committed, Telling(told, lie.leaves), index=1)
    assert Telling(told, lie.leaves).root == liar.root
    number = cell_number(cell.index, cell.element)
    for accusation, accuser, contester in ((good, truth, liar), (bad, liar, truth)):
        driven(court, court.contest(accusation), accuser, contester)
        root, below = Descent(parts.count).root, Descent(parts.count).shown(Descent(parts.count).root)
        assert court.contests.shown_at(accusation, number, root.level, root.index)
        assert any(court.contests.shown_at(accusation, number, node.level, node.index) for node in below)
    assert (court.status(good), court.status(bad)) == (ACCUSED, LOST)
    court.check_books()


def test_points_are_shown(court: Court, told: Story) -> None:
    truth = player(None, ODD, told.prompt, told.output)
    committed = court.serve(1, "node of points")
    id = court.accuse(committed, Telling(told))
    claim = court.claims[id]
    points = (*claim[7], *claim[8])
    for number, (position, token, *_) in enumerate(points):
        contest = court.contest(id, point=number)
        point = truth.point(position, token)
        court.contests.show_point(
            *(contest, court.terms[id], claim[7], claim[8], point.ids, list(point.ids_proof)),
            *(point.leaves, list(point.proof)),
        )
        assert not court.is_open(contest)
    assert court.status(id) == ACCUSED
