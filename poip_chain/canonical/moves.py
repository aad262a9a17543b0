"""Everything that a player of the dispute game must say, from a trace of its own.

A `Player` is one side: it answers reveals, opens cells and points of its own trace. A `Game` is what a contester knows of
one accusation: the accuser's root and what it has shown; `Game.move` is the move that an honest contester makes next.
Trees are numbered as `spec.dispute.cell_number` does it; 0 is the trace. Knows no clocks, no chain.

    reveals seen -> first difference -> Pick ... -> OpenCell or MakeStep -> (in the cell's tree) Pick ... -> MakeStep
                                                                            nothing differs there        -> Finish
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poip_chain.canonical.contested import ContestedTree, MemoryTree, TraceTree, Tree, reveal
from poip_chain.canonical.opening import (
    SUMS_PER_LEAF,
    Opened,
    Step,
    TreeName,
    compute,
    is_opened,
    is_wide,
    open_step,
    prove,
)
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weight_tree import WeightTree
from poip_chain.errors import InvalidInput
from poip_chain.spec import weights as w
from poip_chain.spec.dispute import TRACE, Node, cell_number, cell_of
from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.referee import Cell, Referee
from poip_chain.spec.trace import Op, decode, encode
from poip_chain.spec.transcript import IDS_PER_LEAF, id_leaves
from poip_chain.spec.types import ZERO_HASH, Hash32


@dataclass(frozen=True, slots=True)
class Pick:
    """`Contests.pick`: the first shown node that differs."""

    node: Node
    shown: bytes
    path: tuple[Hash32, ...]


@dataclass(frozen=True, slots=True)
class OpenCell:
    """`Contests.open_cell`: the first cell that differs has a tree of its own."""

    index: int
    element: int
    leaf: bytes
    path: tuple[Hash32, ...]

    @property
    def number(self) -> int:
        """The cell's tree."""
        return cell_number(self.index, self.element)


@dataclass(frozen=True, slots=True)
class MakeStep:
    """`Contests.step`: the first cell that differs, of the trace or of a cell's tree (`sub_root`; zero in the trace).
    `right` is what the referee computes, `stated` what the accuser says."""

    step: Step
    index: int
    element: int
    leaf: bytes
    path: tuple[Hash32, ...]
    sub_root: Hash32
    opened: Opened
    right: int
    stated: int


@dataclass(frozen=True, slots=True)
class Finish:
    """`Contests.finish`: nothing in the cell's tree differs, so the cell does not follow from it. `right` and `stated` as
    for MakeStep."""

    step: Step
    leaf: bytes
    sub_root: Hash32
    opened: Opened
    right: int
    stated: int


Move = Pick | OpenCell | MakeStep | Finish


@dataclass(frozen=True, slots=True)
class PointProof:
    """What `Contests.show_point` takes beside the points: the leaf of output ids with its proof, one or two leaves of
    logits with theirs."""

    ids: bytes
    ids_proof: tuple[Hash32, ...]
    leaves: bytes
    proof: tuple[Hash32, ...]


class Player:
    """One side. `rows` is the model's tree of weights, `prompt` and `output` all token ids of the answer.

    Raises InvalidInput if the trace is of another answer.
    """

    def __init__(self, trace: Trace, rows: WeightTree, prompt: Sequence[int], output: Sequence[int]) -> None:
        if trace.tokens != (*prompt, *output[:-1]) or trace.layout.output_tokens != len(output):
            raise InvalidInput("this trace is not that of the prompt and output given.")
        self.trace, self.layout, self.rows = trace, trace.layout, rows
        self.ids = {"prompt": id_leaves(prompt), "output": id_leaves(output)}
        self._output = tuple(output)
        self._main = TraceTree(trace)
        self._cells: dict[int, Tree] = {}

    @property
    def root(self) -> Hash32:
        """The root of this side's trace."""
        return self.trace.root

    def tree(self, number: int) -> Tree:
        """This side's trace (0), or its tree of a cell. Raises InvalidInput if the cell has none."""
        if number == TRACE:
            return self._main
        if number not in self._cells:
            cell = Cell(*cell_of(number))
            if self.layout.locate(cell.index).tensor.op is Op.ATTENTION:
                self._cells[number] = MemoryTree(self.trace.attention(cell))
            else:
                sums = self.trace.partial_sums(cell)
                leaves = [encode(sums[i : i + SUMS_PER_LEAF], True) for i in range(0, len(sums), SUMS_PER_LEAF)]
                self._cells[number] = MemoryTree(leaves, 8 * ((len(sums) - 1) % SUMS_PER_LEAF + 1))
        return self._cells[number]

    def reveal(self, number: int, node: Node) -> list[bytes]:
        """`Contests.reveal` or `reveal_leaves` (joined) of a node: up to 64 hashes, or leaves of 128 bytes."""
        return reveal(self.tree(number), node)

    def point(self, position: int, token: int) -> PointProof:
        """`Contests.show_point`: the logits of `token` and of the claimed token at an output position.

        Raises InvalidInput if there is no such position or token.
        """
        if not 0 <= position < len(self._output):
            raise InvalidInput(f"an answer of {len(self._output)} tokens has no position {position}.")
        wanted = sorted({self.layout.index(Op.LOGITS, 0, position, t) for t in (token, self._output[position])})
        ids, number = self.ids["output"], position // IDS_PER_LEAF
        return PointProof(
            ids=ids[number],
            ids_proof=tuple(merkle_proof(ids, [number])),
            leaves=b"".join(self.trace.leaf(i) for i in wanted),
            proof=tuple(ContestedTree(self._main, self.root).prove(wanted)),
        )


class Game:
    """What a player knows of an accusation: the accuser's root, and what was shown in any contest over it."""

    def __init__(self, player: Player, root: bytes) -> None:
        self.player, self.layout = player, player.layout
        self._trees = {TRACE: ContestedTree(player.tree(TRACE), root)}

    @property
    def same(self) -> bool:
        """Whether the accuser's trace is this player's: there is nothing to contest but points."""
        return self._trees[TRACE].root == self.player.root

    def tree(self, number: int) -> ContestedTree:
        """The accuser's tree of a cell, or its trace (0). Raises InvalidInput if the cell has none."""
        if number not in self._trees:
            self._trees[number] = ContestedTree(self.player.tree(number), None)
        return self._trees[number]

    def see(self, number: int, node: Node, shown: Sequence[bytes]) -> None:
        """Take in a reveal; within a tree from above downwards. Raises InvalidInput if it proves nothing."""
        self.tree(number).add(node, shown)

    def move(self, number: int, node: Node) -> Move:
        """The contester's next move at a node whose reveal was seen.

        Raises InvalidInput if the accuser is to move, or nothing differs: then there is nothing to contest.
        """
        found = self.tree(number).difference(node)
        if found is None:
            if number == TRACE:
                raise InvalidInput("what was shown is as in one's own trace: this contest has no ground.")
            return self._finish(Step(*cell_of(number)))
        if not self.tree(number).shape.shows_leaves(node):
            return Pick(found.node, found.shown, found.path)
        index = found.node.index
        inside = Step(*cell_of(number), True, index) if number else Step(index, 0)
        wide = is_wide(self.layout, inside)
        theirs, own = decode(found.shown, wide), decode(found.own, wide)
        element = next(i for i, (a, b) in enumerate(zip(theirs, own, strict=True)) if a != b)
        if number == TRACE and is_opened(self.layout, Cell(index, element)):
            return OpenCell(index, element, found.shown, found.path)
        step = Step(*cell_of(number), True, index, element) if number else Step(index, element)
        right, opened = self.opened(step)
        sub_root = self.tree(number).root if number else None
        where = (index, element, found.shown, found.path, sub_root or ZERO_HASH)
        return MakeStep(step, *where, opened, right, theirs[element])

    def opened(self, step: Step) -> tuple[int, Opened]:
        """(right value, what it is computed from) of a step, proven against the accuser's roots.

        Raises InvalidInput if there is no such cell, if it stands after the first difference, so that what it reads is
        not known, or if the accuser's inputs are those of no forward pass.
        """
        number = cell_number(step.leaf, step.element)
        needs = step.inside or is_opened(self.layout, step.cell)
        source = _Source(self.player, self._trees[TRACE], self.tree(number) if needs else None)
        return compute(Referee(self.layout, source), step), open_step(self.layout, step, source)

    def _finish(self, step: Step) -> Finish:
        leaf = self._trees[TRACE].leaf(step.leaf)
        right, opened = self.opened(step)
        sub_root = self.tree(cell_number(step.leaf, step.element)).root or ZERO_HASH
        return Finish(step, leaf, sub_root, opened, right, decode(leaf, is_wide(self.layout, step))[step.element])


class _Source:
    """`opening.Source` of the accuser's trees, one's own weights and the answer's tokens."""

    def __init__(self, player: Player, main: ContestedTree, cell: ContestedTree | None) -> None:
        self._player, self._trace, self._main, self._cell = player, player.trace, main, cell

    def leaf(self, index: int) -> bytes:
        return self._main.leaf(index)

    def sub_leaf(self, _cell: Cell, index: int) -> bytes:
        return self._opened_cell().leaf(index)

    def partial_sum(self, _cell: Cell, segment: int) -> int:
        return decode(self._opened_cell().leaf(segment // SUMS_PER_LEAF), True)[segment % SUMS_PER_LEAF]

    def exponent(self, row: int) -> int:
        return self._trace.exponent(row)

    def segment(self, row: int, segment: int) -> bytes:
        return self._trace.segment(row, segment)

    def token(self, position: int) -> int:
        return self._trace.token(position)

    def ids_leaf(self, tree: str, index: int) -> bytes:
        return self._player.ids[tree][index]

    def row_root(self, row: int) -> Hash32:
        return merkle_root(self._segments(row))

    def prove(self, tree: TreeName, leaves: Mapping[int, bytes], count: int) -> Sequence[bytes]:
        indices = sorted(leaves)
        if tree == "trace":
            return self._main.prove(indices)
        if tree == "cell":
            return self._opened_cell().prove(indices)
        if tree == "weights":
            return prove(self._player.rows.node, indices, count)
        return merkle_proof(self._segments(tree[1]) if isinstance(tree, tuple) else self._player.ids[tree], indices)

    def _segments(self, row: int) -> list[bytes]:
        data = self._trace.row(row)
        return [data[i : i + w.SEGMENT_BYTES] for i in range(0, len(data), w.SEGMENT_BYTES)]

    def _opened_cell(self) -> ContestedTree:
        if self._cell is None:
            raise InvalidInput("this cell has no tree of its own.")
        return self._cell
