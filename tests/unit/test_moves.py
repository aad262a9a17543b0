"""Both sides of the dispute game from traces of their own: every lie ends in one step that is proven and shows it."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from poip_chain.canonical.contested import ContestedTree, MemoryTree, reveal
from poip_chain.canonical.moves import Finish, Game, MakeStep, OpenCell, Pick, Player
from poip_chain.canonical.opening import (
    Opened,
    Reads,
    Step,
    compute,
    is_opened,
    is_wide,
    prove,
    reads_of,
    row_bytes,
    row_count,
    sub_leaf_count,
)
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weight_tree import WeightTree
from poip_chain.errors import IntegrityError, InvalidInput
from poip_chain.spec.dispute import Node, cell_number
from poip_chain.spec.merkle import merkle_levels, merkle_root, root_from_proof, verify_proof
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import Cell, Referee
from poip_chain.spec.trace import WIDE, Layout, Op, decode, encode
from poip_chain.spec.types import ZERO_HASH
from tests.support.lying_trace import Changes, Lie, LyingTrace, changed_leaf, consistent_lie, model, weight_tree
from tests.vectors.generate_canonical import ODD

OUTPUTS = 3

CONFIGS = st.builds(
    lambda groups, half_head, **fields: ModelConfig(
        num_heads=groups * fields["num_kv_heads"], head_dim=2 * half_head, **fields
    ),
    groups=st.integers(1, 2),
    half_head=st.integers(1, 35),
    hidden_size=st.sampled_from([1, 12, 33, 130]),
    intermediate_size=st.sampled_from([1, 40, 135]),
    num_layers=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    vocab_size=st.sampled_from([2, 17, 40]),
    max_positions=st.just(48),
    rms_norm_eps_e12=st.just(10_000_000),
    rope_theta=st.just(10_000),
    rope_scaling_hash=st.just(ZERO_HASH),
    tied_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
)


def answer(config: ModelConfig, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prompt, output) ids of an answer."""
    rng = random.Random(positions)
    ids = tuple(rng.randrange(config.vocab_size) for _ in range(positions + 1))
    return ids[:-OUTPUTS], ids[-OUTPUTS:]


def player(config: ModelConfig, positions: int, lie: Lie | Changes | None = None) -> Player:
    """A side of the game over an answer: honest, or with a lie."""
    prompt, output = answer(config, positions)
    told = (*prompt, *output[:-1])
    if isinstance(lie, Changes):
        trace: Trace = LyingTrace(model(config), told, OUTPUTS, lie)
    else:
        trace = Trace(model(config, lie), told, OUTPUTS)
    return Player(trace, weight_tree(config), prompt, output)


def played(accuser: Player, contester: Player) -> tuple[Game, MakeStep | Finish]:
    """A whole descent: the accuser answers, the contester picks; and every pick is proven as the contract does it."""
    game = Game(contester, accuser.root)
    number, node = 0, game.tree(0).shape.root
    for _ in range(20):
        assert not game.tree(number).is_shown(node)
        game.see(number, node, accuser.reveal(number, node))
        move = game.move(number, node)
        if isinstance(move, Finish):
            return game, move
        tree = game.tree(number)
        if isinstance(move, Pick):
            assert tree.shape.climb(move.node, move.shown, node.level, move.path) == tree.hash(node.level, node.index)
            node = move.node
            continue
        under = merkle_levels([move.leaf])[0][0]
        climbed = tree.shape.climb(Node(0, move.index), under, node.level, move.path)
        assert climbed == tree.hash(node.level, node.index)
        if isinstance(move, MakeStep):
            return game, move
        assert isinstance(move, OpenCell) and number == 0
        number = move.number
        node = game.tree(number).shape.root
    raise AssertionError("a descent without an end")


class Checked:
    """Inputs of the spec's referee out of an `Opened` alone, each proven against a root as the contract does it."""

    def __init__(self, layout: Layout, step: Step, opened: Opened, accuser: Player, sub_root: bytes | None) -> None:
        reads = reads_of(layout, step, accuser.trace.token)
        self.layout, self.proof, self.at = layout, list(opened.proof), 0
        self.leaves: dict[int, bytes] = {}
        self.subs: dict[int, bytes] = {}
        self.segments: dict[tuple[int, int], bytes] = {}
        self.exponents: dict[int, int] = {}
        data = opened.leaves
        if reads.position is None:
            parts = [data[i : i + 128] for i in range(0, len(data), 128)]
            assert len(parts) == len(reads.leaves) + len(reads.sub_leaves)
            self.leaves = dict(zip(reads.leaves, parts, strict=False))
            self.subs = dict(zip(reads.sub_leaves, parts[len(reads.leaves) :], strict=True))
            if reads.leaves:
                assert self._root(self.leaves, layout.count) == accuser.root
            if reads.sub_leaves:
                assert self._root(self.subs, sub_leaf_count(layout, step.cell)) == sub_root
        self._take_rows(reads, opened.rows, accuser)
        self.tokens: dict[int, int] = {}
        if reads.position is not None:
            in_prompt = reads.position < layout.prompt_tokens
            first, count = (0, layout.prompt_tokens) if in_prompt else (layout.prompt_tokens, layout.output_tokens)
            index = (reads.position - first) // 32
            ids = accuser.ids["prompt" if in_prompt else "output"]
            assert self._root({index: data}, -(-count // 32)) == merkle_root(ids)
            for i in range(0, len(data), 4):
                self.tokens[first + 32 * index + i // 4] = int.from_bytes(data[i : i + 4], "little")
        assert self.at == len(self.proof)

    def _take_rows(self, reads: Reads, rows: bytes, accuser: Player) -> None:
        hashed, at, config = {}, 0, self.layout.config
        for row, numbers in reads.rows.items():
            size, head, at = row_bytes(config, row), rows[at : at + 2], at + 2
            self.exponents[row] = int.from_bytes(head, "little", signed=True)
            taken = {}
            for number in numbers:
                length = min(256, size - 256 * number)
                taken[number], at = rows[at : at + length], at + length
                self.segments[row, number] = taken[number]
            if taken:
                root: bytes = self._root(taken, -(-size // 256))
            else:
                root, at = rows[at : at + 32], at + 32
            hashed[row] = head + root
        assert at == len(rows)
        if hashed:
            assert self._root(hashed, row_count(config)) == accuser.rows.root

    def _root(self, leaves: dict[int, bytes], count: int) -> bytes:
        used = len(prove(lambda _level, _index: bytes(32), sorted(leaves), count))
        part, self.at = self.proof[self.at : self.at + used], self.at + used
        return root_from_proof([leaves[i] for i in sorted(leaves)], sorted(leaves), count, part)

    def leaf(self, index: int) -> bytes:
        return self.leaves[index]

    def sub_leaf(self, _cell: Cell, index: int) -> bytes:
        return self.subs[index]

    def partial_sum(self, _cell: Cell, segment: int) -> int:
        return decode(self.subs[segment // 16], True)[segment % 16]

    def exponent(self, row: int) -> int:
        return self.exponents[row]

    def segment(self, row: int, segment: int) -> bytes:
        return self.segments[row, segment]

    def token(self, position: int) -> int:
        return self.tokens[position]


def check(accuser: Player, contester: Player, honest: Player) -> MakeStep | Finish:
    """Play to the end: the step is proven, its value is the honest one, and whoever lied loses."""
    game, move = played(accuser, contester)
    step, layout = move.step, honest.layout
    number = cell_number(step.leaf, step.element)
    checked = Checked(layout, step, move.opened, accuser, move.sub_root)
    in_tree = step.inside or is_opened(layout, step.cell)
    assert move.sub_root == (game.tree(number).root if in_tree else ZERO_HASH)
    assert compute(Referee(layout, checked), step) == move.right
    tree, leaf, element = (0, step.leaf, step.element)
    if step.inside:
        tree, leaf, element = number, step.sub_leaf, step.sub_element
    if honest is contester:
        own = decode(honest.tree(tree).leaf(leaf), is_wide(layout, step))[element]
        assert move.right == own != move.stated
    else:
        assert move.right == move.stated
    return move


def both_ways(honest: Player, liar: Player) -> MakeStep | Finish:
    """The liar accuses and loses; the liar contests and loses."""
    assert liar.root != honest.root
    check(honest, liar, honest)
    return check(liar, honest, honest)


def random_place(layout: Layout, rng: random.Random) -> tuple[Op, int, int, int]:
    """(op, layer, row, column), each tensor as likely as the next."""
    tensor = rng.choice(layout.tensors())
    return tensor.op, tensor.layer, rng.randrange(tensor.rows), rng.randrange(tensor.columns)


@settings(max_examples=12)
@given(CONFIGS, st.sampled_from([3, 8, 36]), st.randoms(use_true_random=False))
def test_a_false_element_and_all_that_follows_from_it(config: ModelConfig, positions: int, rng: random.Random) -> None:
    honest = player(config, positions)
    place = random_place(honest.layout, rng)
    liar = player(config, positions, Lie(*place, rng.choice((1, -1, 1000))))
    move = both_ways(honest, liar)
    assert move.step.leaf == honest.layout.index(*place)
    assert honest.layout.locate(move.step.leaf).column + move.step.element == place[3]
    assert isinstance(move, Finish) == is_opened(honest.layout, move.step.cell)


@settings(max_examples=12)
@given(CONFIGS, st.sampled_from([3, 36]), st.integers(1, 6), st.randoms(use_true_random=False))
def test_false_leaves_alone(config: ModelConfig, positions: int, lies: int, rng: random.Random) -> None:
    """Several false leaves, padding among what is false: the first one is found."""
    honest = player(config, positions)
    leaves, elements = {}, {}
    for _ in range(lies):
        index = honest.layout.index(*random_place(honest.layout, rng))
        tensor = honest.layout.locate(index).tensor
        false = sorted(rng.sample(range(tensor.per_leaf), rng.randrange(1, 4)))
        values = decode(honest.trace.leaf(index), tensor.op in WIDE)
        for element in false:
            values[element] += rng.choice((1, 77)) * (-1 if values[element] > 0 else 1)  # within its bits
        leaves[index], elements[index] = encode(values, tensor.op in WIDE), false[0]
    move = both_ways(honest, player(config, positions, Changes(leaves=leaves)))
    assert move.step == Step(min(leaves), elements[min(leaves)])


OPENED = [Op.Q, Op.K, Op.V, Op.ATTENTION, Op.MIDDLE, Op.GATE, Op.UP, Op.OUTPUT, Op.LOGITS]


@pytest.mark.slow
@settings(max_examples=20)
@given(CONFIGS, st.sampled_from(OPENED), st.randoms(use_true_random=False))
def test_a_false_place_in_a_cells_own_tree(config: ModelConfig, op: Op, rng: random.Random) -> None:
    """The rest of the tree and the cell follow from the false place: the step is there, or in the cell if it hides it."""
    honest = player(config, 36)
    tensor = honest.layout.tensor(op, 0 if op is Op.LOGITS else rng.randrange(config.num_layers))
    index = tensor.start + rng.randrange(tensor.leaves)
    cell = Cell(index, rng.randrange(honest.layout.locate(index).count))
    number, element = random_place_inside(honest, cell, rng)
    try:
        lie = consistent_lie(honest.trace, cell, number, element, rng.choice((1, 2**20, 2**45)))
    except InvalidInput:
        assume(False)
    move = both_ways(honest, player(config, 36, lie))
    assert move.step == Step(cell.index, cell.element, True, number, element)


@pytest.mark.parametrize(("op", "places"), [(Op.OUTPUT, [(0, 0)]), (Op.LOGITS, [(0, 0), (0, 1)])])
def test_the_first_false_running_sum(op: Op, places: list[tuple[int, int]]) -> None:
    honest = honest_odd()
    cell = Cell(honest.layout.index(op, 0, 2, 3), 3)
    for number, element in places:
        lie = consistent_lie(honest.trace, cell, number, element, 2**40)
        assert both_ways(honest, player(ODD, 36, lie)).step == Step(*astuple(cell), True, number, element)


@pytest.mark.parametrize("part", range(5))
def test_every_part_of_a_sub_trace(part: int) -> None:
    """Two blocks of keys, the first place of each part: what follows in the part is false, too."""
    honest = honest_odd()
    cell = Cell(honest.layout.index(Op.ATTENTION, 0, 34, 65), 1)
    parts = Referee(honest.layout, honest.trace).attention_parts(cell)
    first = (0, parts.maxima, parts.weights, parts.sums, parts.products)[part]
    lie = consistent_lie(honest.trace, cell, first, 0, 2**22)
    assert both_ways(honest, player(ODD, 36, lie)).step == Step(*astuple(cell), True, first, 0)


def random_place_inside(honest: Player, cell: Cell, rng: random.Random) -> tuple[int, int]:
    """(leaf, element) in a cell's tree, padding left out."""
    if honest.layout.locate(cell.index).tensor.op is not Op.ATTENTION:
        return divmod(rng.randrange(len(honest.trace.partial_sums(cell))), 16)
    parts = Referee(honest.layout, honest.trace).attention_parts(cell)
    part = rng.randrange(5)
    starts = [0, parts.maxima, parts.weights, parts.sums, parts.products, parts.count]
    if part in (0, 2):
        key = rng.randrange(parts.position + 1)
        return (key // 16, key % 16) if part == 0 else (parts.weights + key // 32, key % 32)
    block = rng.randrange(parts.blocks)
    return starts[part] + block // 16, block % 16


def honest_odd() -> Player:
    return player(ODD, 36)


def odd_leaf(op: Op, row: int = 2, column: int = 5) -> int:
    return honest_odd().layout.index(op, 0, row, column)


def test_false_nodes_cannot_be_shown() -> None:
    """A node that nothing hashes to: the contester comes to stand there, and no reveal is accepted."""
    honest = honest_odd()
    shape = honest.tree(0).shape
    level = shape.height - 6
    liar = player(ODD, 36, Changes(nodes={(level, 3): b"\x07" * 32}))
    game = Game(honest, liar.root)
    game.see(0, shape.root, liar.reveal(0, shape.root))
    move = game.move(0, shape.root)
    assert isinstance(move, Pick) and move.node == Node(level, 3)
    with pytest.raises(InvalidInput, match="does not hash"):
        game.see(0, move.node, liar.reveal(0, move.node))
    with pytest.raises(InvalidInput, match="the accuser is to move"):
        game.move(0, move.node)


@pytest.mark.parametrize("op", [Op.INPUT_SUM, Op.V, Op.MIDDLE, Op.Q_ROPE, Op.ATTENTION, Op.HIDDEN])
def test_false_nodes_behind_the_first_difference_prove_nothing(op: Op) -> None:
    """Right of a false leaf the accuser's tree is garbage that has no leaves: inputs are proven past it."""
    honest = honest_odd()
    rng = random.Random(op)
    index = honest.layout.index(op, 0, 1, 1)
    shape = honest.tree(0).shape
    level = shape.height - 6  # the only one that is shown as hashes
    beside = range((index >> level) + 1, shape.size(level))
    garbage = {(level, node): rng.randbytes(32) for node in beside if rng.random() < 0.7}
    assert garbage
    lie = Changes(leaves={index: changed_leaf(honest.trace, index, 0)}, nodes=garbage)
    liar = player(ODD, 36, lie)
    move = check(liar, honest, honest)
    assert (move.step.leaf, move.step.element) == (index, 0)


def test_what_was_not_shown_cannot_be_opened() -> None:
    """A step behind the first difference reads what the contester cannot know: it is told so."""
    honest = honest_odd()
    liar = player(ODD, 36, Lie(Op.GATE, 0, 2, 5, 2**20))
    game, _ = played(liar, honest)
    late = Step(honest.layout.index(Op.OUTPUT, 0, 2, 0), 0, True)  # its input row holds what follows from the lie
    with pytest.raises(InvalidInput, match="only what is before the first difference"):
        game.opened(late)
    fresh = Game(honest, liar.root)
    with pytest.raises(InvalidInput, match="only what is before the first difference"):
        fresh.opened(Step(odd_leaf(Op.HIDDEN), 5))
    same = Game(honest, honest.root)
    right, _ = same.opened(late)
    assert same.same and not fresh.same and right == honest.trace.partial_sums(late.cell)[0]
    with pytest.raises(InvalidInput, match="no ground"):
        same.see(0, same.tree(0).shape.root, honest.reveal(0, same.tree(0).shape.root))
        same.move(0, same.tree(0).shape.root)


def test_numbers_behind_the_last_running_sum_are_no_difference() -> None:
    """They are padding that no step computes. The honest contester finishes at the cell and wins all the same."""
    honest = honest_odd()
    index = odd_leaf(Op.MIDDLE)
    liar = player(ODD, 36, Changes(leaves={index: changed_leaf(honest.trace, index, 5)}))
    sums = honest.trace.partial_sums(Cell(index, 5))
    number = cell_number(index, 5)
    liar._cells[number] = MemoryTree([encode([*sums, 99], True)])
    move = check(liar, honest, honest)
    assert isinstance(move, Finish) and move.step == Step(index, 5)


def test_reveals_are_checked() -> None:
    honest = honest_odd()
    tree = honest.tree(0)
    shape, root = tree.shape, tree.shape.root
    shown = honest.reveal(0, root)
    below = Node(root.level - 6, 0)
    contested = ContestedTree(tree, honest.root)
    for node, wrong, reason in (
        (root, shown[:-1], "shows"),
        (root, [*shown[:-1], b"\0" * 31], "shows"),
        (root, [shown[1], shown[0], *shown[2:]], "does not hash"),
        (Node(root.level + 1, 0), shown, "no node"),
        (Node(3, 0), honest.reveal(0, Node(3, 0)), "not shown yet"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            contested.add(node, wrong)
    contested.add(root, shown)
    contested.add(below, honest.reveal(0, below))
    assert contested.difference(below) is None and contested.is_shown(below)
    assert shape.height == 12 and contested.root == honest.root


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 200, 4097])
def test_a_tree_known_by_its_reveals(count: int) -> None:
    """Whatever lies left of the first difference is opened and proven, in trees of every shape."""
    rng = random.Random(count)
    leaves = [rng.randbytes(128) for _ in range(count)]
    for first in {0, count - 1, count // 2, rng.randrange(count)}:
        theirs = MemoryTree([leaf if i < first else rng.randbytes(128) for i, leaf in enumerate(leaves)])
        tree = ContestedTree(MemoryTree(leaves), None if count < 65 else theirs.root)
        node = tree.shape.root
        while True:
            tree.add(node, reveal(theirs, node))
            found = tree.difference(node)
            assert found is not None
            if tree.shape.shows_leaves(node):
                break
            node = found.node
        assert found.node == Node(0, first) and tree.leaf(first) == theirs.leaf(first)
        for _ in range(10):
            wanted = sorted(rng.sample(range(first + 1), min(first + 1, rng.randrange(1, 6))))
            opened = [tree.leaf(i) for i in wanted]
            assert opened == [theirs.leaf(i) for i in wanted]
            assert verify_proof(theirs.root, opened, wanted, count, tree.prove(wanted))


def test_points_are_opened() -> None:
    honest = honest_odd()
    layout, (_, output) = honest.layout, answer(ODD, 36)
    for position, token in ((0, 0), (2, ODD.vocab_size - 1), (1, output[1])):
        point = honest.point(position, token)
        wanted = sorted({layout.index(Op.LOGITS, 0, position, t) for t in (token, output[position])})
        leaves = [point.leaves[i : i + 128] for i in range(0, len(point.leaves), 128)]
        assert verify_proof(honest.root, leaves, wanted, layout.count, point.proof)
        at = (wanted.index(layout.index(Op.LOGITS, 0, position, token)), token % 32)
        assert decode(leaves[at[0]], False)[at[1]] == honest.trace.logits[position, token]
        assert verify_proof(merkle_root(honest.ids["output"]), [point.ids], [0], 1, point.ids_proof)
    for position, token in ((3, 0), (-1, 0), (0, ODD.vocab_size)):
        with pytest.raises(InvalidInput, match=r"no position|not \("):
            honest.point(position, token)


def test_a_player_is_of_its_answer() -> None:
    honest = honest_odd()
    prompt, output = answer(ODD, 36)
    for wrong in ((prompt, output[:-1]), (prompt[1:], output), ((*prompt[:-1], 1 - prompt[-1] % 2), output)):
        with pytest.raises(InvalidInput, match="prompt and output"):
            Player(honest.trace, honest.rows, *wrong)
    with pytest.raises(InvalidInput, match="not a linear element"):
        honest.tree(cell_number(odd_leaf(Op.HIDDEN), 0))


def test_the_tree_of_weights() -> None:
    weights = model(ODD).weights
    tree = WeightTree(weights, weights.root())
    assert tree.root == weights.root()
    with pytest.raises(IntegrityError, match="weights_root"):
        WeightTree(weights, ZERO_HASH)
