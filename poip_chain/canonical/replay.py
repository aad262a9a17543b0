"""The one step of a contest, judged again from the bytes that were brought: the second writing of the court's verdict.

`Replay` checks every proof in an `Opened` against the roots of the trace on trial, as contracts/disputes/Referee.vy does,
and gives the values to `spec.referee`. It needs no model and no trace. Knows no chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from poip_chain.canonical.opening import (
    SUMS_PER_LEAF,
    Opened,
    Step,
    compute,
    is_wide,
    prove,
    reads_of,
    row_bytes,
    row_count,
    sub_leaf_count,
)
from poip_chain.errors import InvalidInput
from poip_chain.spec import weights as w
from poip_chain.spec.merkle import root_from_proof
from poip_chain.spec.referee import Cell, Referee
from poip_chain.spec.trace import LEAF_BYTES, Layout, Op, decode
from poip_chain.spec.transcript import IDS_PER_LEAF
from poip_chain.spec.types import Hash32


@dataclass(frozen=True, slots=True)
class Roots:
    """What a step's inputs are proven against. `cell`: of the tree of the cell in which the contest stands, if any."""

    trace: bytes
    weights: bytes
    prompt: bytes
    output: bytes
    cell: bytes | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`right` is what the cell must be, `stated` what the accuser's leaf says."""

    right: int
    stated: int

    @property
    def holds(self) -> bool:
        """Whether the accuser is right."""
        return self.right == self.stated


def judge(layout: Layout, step: Step, opened: Opened, roots: Roots, leaf: bytes) -> Verdict:
    """Judge a step: `leaf` is the accuser's, in which the cell stands.

    Raises InvalidInput if the bytes brought are not those of the roots, or are not what the step reads.
    """
    wide = is_wide(layout, step)
    stated = decode(leaf, wide)[step.sub_element if step.inside else step.element]
    return Verdict(compute(Referee(layout, Replay(layout, step, opened, roots)), step), stated)


def describe(layout: Layout, step: Step) -> str:
    """A cell in words."""
    place = layout.locate(step.leaf)
    name = f"{place.tensor.name}, row {place.row}, column {place.column + step.element} (leaf {step.leaf})"
    if not step.inside:
        return name
    if place.tensor.op is Op.ATTENTION:
        return f"leaf {step.sub_leaf}, element {step.sub_element} of the sub-trace of {name}"
    return f"running sum {SUMS_PER_LEAF * step.sub_leaf + step.sub_element} of {name}"


class Replay:
    """The proven inputs of one step, as `spec.referee.Inputs` asks for them."""

    def __init__(self, layout: Layout, step: Step, opened: Opened, roots: Roots) -> None:
        self._layout, self._roots = layout, roots
        self._proof, self._used = list(opened.proof), 0
        # Whose token is read is the referee's business; every token of the leaf that was brought is known after this.
        reads = reads_of(layout, step, lambda _: 0)
        self._leaves: dict[int, bytes] = {}
        self._subs: dict[int, bytes] = {}
        self._tokens: dict[int, int] = {}
        self._exponents: dict[int, int] = {}
        self._segments: dict[tuple[int, int], bytes] = {}
        if reads.position is None:
            parts = [opened.leaves[i : i + LEAF_BYTES] for i in range(0, len(opened.leaves), LEAF_BYTES)]
            wanted = len(reads.leaves) + len(reads.sub_leaves)
            if len(opened.leaves) != wanted * LEAF_BYTES:
                raise InvalidInput(f"this step reads {wanted} leaves; {len(opened.leaves)} bytes were brought.")
            self._leaves = dict(zip(reads.leaves, parts, strict=False))
            self._subs = dict(zip(reads.sub_leaves, parts[len(reads.leaves) :], strict=True))
            if self._leaves:
                self._check("leaves of the trace", roots.trace, self._leaves, layout.count)
            if self._subs:
                count = sub_leaf_count(layout, step.cell)
                self._check("leaves of the cell's tree", roots.cell, self._subs, count)
        else:
            self._take_tokens(opened.leaves, reads.position)
            reads = reads_of(layout, step, self.token)
        self._take_rows(opened.rows, reads.rows)
        if reads.position is not None:
            self._check_tokens(opened.leaves, reads.position)
        if self._used != len(self._proof):
            raise InvalidInput(f"the proofs hold {len(self._proof)} hashes, of which {self._used} are needed.")

    def leaf(self, index: int) -> bytes:
        """See Inputs."""
        return self._leaves[index]

    def sub_leaf(self, _cell: Cell, index: int) -> bytes:
        """See Inputs."""
        return self._subs[index]

    def partial_sum(self, _cell: Cell, segment: int) -> int:
        """See Inputs."""
        return decode(self._subs[segment // SUMS_PER_LEAF], True)[segment % SUMS_PER_LEAF]

    def exponent(self, row: int) -> int:
        """See Inputs."""
        return self._exponents[row]

    def segment(self, row: int, segment: int) -> bytes:
        """See Inputs."""
        return self._segments[row, segment]

    def token(self, position: int) -> int:
        """See Inputs."""
        return self._tokens[position]

    def _part(self, position: int) -> tuple[int, int, int, bytes]:
        """(first position, tokens, leaf, root) of the part of the transcript that holds a position."""
        prompt = self._layout.prompt_tokens
        first, tokens, root = (
            (0, prompt, self._roots.prompt)
            if position < prompt
            else (prompt, self._layout.output_tokens, self._roots.output)
        )
        return first, tokens, (position - first) // IDS_PER_LEAF, root

    def _take_tokens(self, ids: bytes, position: int) -> None:
        first, tokens, index, _ = self._part(position)
        many = min(IDS_PER_LEAF, tokens - IDS_PER_LEAF * index)
        if len(ids) != 4 * many:
            raise InvalidInput(f"this step reads a leaf of {many} token ids; {len(ids)} bytes were brought.")
        for i in range(many):
            at = first + IDS_PER_LEAF * index + i
            self._tokens[at] = int.from_bytes(ids[4 * i : 4 * i + 4], "little")

    def _check_tokens(self, ids: bytes, position: int) -> None:
        _, tokens, index, root = self._part(position)
        self._check("token ids", root, {index: ids}, -(-tokens // IDS_PER_LEAF))

    def _take_rows(self, data: bytes, rows: Mapping[int, tuple[int, ...]]) -> None:
        config, at = self._layout.config, 0
        hashed: dict[int, bytes] = {}
        for row, numbers in rows.items():
            size, head = row_bytes(config, row), data[at : at + 2]
            at += 2
            self._exponents[row] = int.from_bytes(head, "little", signed=True)
            taken: dict[int, bytes] = {}
            for number in numbers:
                length = min(w.SEGMENT_BYTES, size - w.SEGMENT_BYTES * number)
                taken[number] = self._segments[row, number] = data[at : at + length]
                at += length
            if taken:
                root: bytes = self._root(taken, -(-size // w.SEGMENT_BYTES))
            else:
                root = data[at : at + 32]
                at += 32
            hashed[row] = head + root
        if at != len(data):
            raise InvalidInput(f"this step reads {at} bytes of weights; {len(data)} were brought.")
        if hashed:
            self._check("rows of weights", self._roots.weights, hashed, row_count(config))

    def _check(self, what: str, root: bytes | None, leaves: Mapping[int, bytes], count: int) -> None:
        if self._root(leaves, count) != root:
            raise InvalidInput(f"the {what} that were brought are not those of the root on trial.")

    def _root(self, leaves: Mapping[int, bytes], count: int) -> Hash32:
        """The root that leaves have with the next hashes of the proof."""
        indices = sorted(leaves)
        many = len(prove(lambda _level, _index: bytes(32), indices, count))
        part = self._proof[self._used : self._used + many]
        self._used += many
        return root_from_proof([leaves[i] for i in indices], indices, count, part)
