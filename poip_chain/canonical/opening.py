"""What one step of the referee reads, opened and proven: the `IReferee.Opened` of a move.

The spec decides what is read: a step is run on harmless values by a recorder, so the list is the same whatever the values
are. A `Source` then gives leaves and proofs, of one's own trees or of an opponent's. Knows no game, no EVM.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from poip_chain.spec import weights as w
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import LINEAR, AttentionCell, Cell, Inputs, Referee, SumCell
from poip_chain.spec.trace import WIDE, Layout, Op, encode
from poip_chain.spec.transcript import IDS_PER_LEAF
from poip_chain.spec.types import Hash32

SUMS_PER_LEAF = 16
"""Running sums of a linear cell in a leaf of its tree."""
_ONES = {True: encode([1] * 16, True), False: encode([1] * 32, False)}


@dataclass(frozen=True, slots=True)
class Step:
    """A cell of the trace, or (inside) a cell of the tree into which that cell is opened: `ITraceMap.Step`."""

    leaf: int
    element: int
    inside: bool = False
    sub_leaf: int = 0
    sub_element: int = 0

    @property
    def cell(self) -> Cell:
        """The cell of the trace."""
        return Cell(self.leaf, self.element)

    def values(self) -> tuple[int, int, bool, int, int]:
        """As the contracts take it."""
        return self.leaf, self.element, self.inside, self.sub_leaf, self.sub_element


@dataclass(frozen=True, slots=True)
class Reads:
    """What a step reads, each in increasing order: leaves of the trace and of the cell's own tree, segments of rows of
    weights_root by row (none: only the row's exponent), and the position whose token it needs."""

    leaves: tuple[int, ...]
    sub_leaves: tuple[int, ...]
    rows: Mapping[int, tuple[int, ...]]
    position: int | None


@dataclass(frozen=True, slots=True)
class Opened:
    """`IReferee.Opened`: see contracts/interfaces/IReferee.vyi for the order within each part."""

    leaves: bytes = b""
    rows: bytes = b""
    proof: tuple[bytes, ...] = ()

    def values(self) -> tuple[bytes, bytes, list[bytes]]:
        """As the contracts take it."""
        return self.leaves, self.rows, list(self.proof)


TreeName = str | tuple[str, int]
"""Which tree a leaf is proven into: "trace", "cell", ("row", number), "weights", "prompt" or "output"."""


class Source(Inputs, Protocol):
    """What a step is opened from. `sub_leaf` answers for linear cells, too: 16 running sums a leaf."""

    def ids_leaf(self, tree: str, index: int) -> bytes:
        """A leaf of token ids of "prompt" or "output"."""

    def row_root(self, row: int) -> bytes:
        """The Merkle root of a row's segments. Asked for after those that are opened are proven."""

    def prove(self, tree: TreeName, leaves: Mapping[int, bytes], count: int) -> Sequence[bytes]:
        """The hashes that prove leaves, by index, into a tree of `count` leaves, as `spec.merkle.root_from_proof` takes
        them."""


def compute(referee: Referee, step: Step) -> int:
    """The right value of a step from the referee's inputs. Raises InvalidInput as the spec does."""
    if not step.inside:
        return referee.compute(step.cell)
    if referee.layout.locate(step.leaf).tensor.op is Op.ATTENTION:
        return referee.compute_attention(AttentionCell(step.cell, step.sub_leaf, step.sub_element))
    return referee.compute_sum(SumCell(step.cell, SUMS_PER_LEAF * step.sub_leaf + step.sub_element))


def reads_of(layout: Layout, step: Step, token: Callable[[int], int]) -> Reads:
    """What a step reads. token: the token at a position. Raises InvalidInput if there is no such cell."""
    recorder = _Recorder(layout, token)
    compute(Referee(layout, recorder), step)
    rows = {row: tuple(sorted(segments)) for row, segments in sorted(recorder.rows.items())}
    return Reads(tuple(sorted(recorder.leaves)), tuple(sorted(recorder.subs)), rows, recorder.position)


def open_step(layout: Layout, step: Step, source: Source) -> Opened:
    """All that a step reads, with proofs. Raises InvalidInput if there is no such cell, and what the source raises."""
    reads, config = reads_of(layout, step, source.token), layout.config
    leaves = {i: source.leaf(i) for i in reads.leaves}
    subs = {i: source.sub_leaf(step.cell, i) for i in reads.sub_leaves}
    data, rows, proof = b"".join(leaves.values()) + b"".join(subs.values()), b"", list[bytes]()
    if leaves:
        proof += source.prove("trace", leaves, layout.count)
    if subs:
        proof += source.prove("cell", subs, sub_leaf_count(layout, step.cell))
    row_leaves: dict[int, bytes] = {}
    for row, numbers in reads.rows.items():
        head = source.exponent(row).to_bytes(2, "little", signed=True)
        segments = {i: source.segment(row, i) for i in numbers}
        if segments:
            proof += source.prove(("row", row), segments, -(-row_bytes(config, row) // w.SEGMENT_BYTES))
        root = source.row_root(row)
        rows += head + (b"".join(segments.values()) or root)
        row_leaves[row] = head + root
    if row_leaves:
        proof += source.prove("weights", row_leaves, row_count(config))
    if reads.position is not None:
        in_prompt = reads.position < layout.prompt_tokens
        tree, first = ("prompt", 0) if in_prompt else ("output", layout.prompt_tokens)
        tokens = layout.prompt_tokens if in_prompt else layout.output_tokens
        index = (reads.position - first) // IDS_PER_LEAF
        data = source.ids_leaf(tree, index)
        proof += source.prove(tree, {index: data}, -(-tokens // IDS_PER_LEAF))
    return Opened(data, rows, tuple(proof))


def is_opened(layout: Layout, cell: Cell) -> bool:
    """Whether a cell of the trace has a tree of its own: linear and attention cells have, padding has not."""
    place = layout.locate(cell.index)
    return cell.element < place.count and (place.tensor.op in LINEAR or place.tensor.op is Op.ATTENTION)


def sub_leaf_count(layout: Layout, cell: Cell) -> int:
    """Leaves of the tree into which a linear or attention cell is opened. Raises InvalidInput for another cell."""
    referee = Referee(layout, _Recorder(layout, lambda _: 0))
    if layout.locate(cell.index).tensor.op is Op.ATTENTION:
        return referee.attention_parts(cell).count
    return -(-referee.segments(cell) // SUMS_PER_LEAF)


def is_wide(layout: Layout, step: Step) -> bool:
    """Whether the leaf in which a step's cell stands holds 16 int64, not 32 int32."""
    op = layout.locate(step.leaf).tensor.op
    if not step.inside:
        return op in WIDE
    if op is not Op.ATTENTION:
        return True
    referee = Referee(layout, _Recorder(layout, lambda _: 0))
    return not referee.attention_parts(step.cell).narrow(step.sub_leaf)


def row_count(config: ModelConfig) -> int:
    """Leaves of weights_root."""
    return _rows(config)[0][-1]


def row_bytes(config: ModelConfig, row: int) -> int:
    """Bytes of a row of weights_root, without its exponent."""
    ends, sizes = _rows(config)
    return sizes[bisect_right(ends, row)]


@lru_cache(maxsize=64)
def _rows(config: ModelConfig) -> tuple[list[int], list[int]]:
    """By tensor: the row after its last, and the bytes of its rows."""
    plan = w.tensor_plan(config)
    return list(accumulate(p.rows for p in plan)), [p.columns * (2 if p.source else 4) for p in plan]


class _Recorder:
    """Answers with harmless values and notes what was asked."""

    def __init__(self, layout: Layout, token: Callable[[int], int]) -> None:
        self.layout, self._token = layout, token
        self.leaves: set[int] = set()
        self.subs: set[int] = set()
        self.rows: dict[int, set[int]] = {}
        self.position: int | None = None

    def leaf(self, index: int) -> bytes:
        self.leaves.add(index)
        return _ONES[self.layout.locate(index).tensor.op in WIDE]

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        self.subs.add(index)
        return _ONES[not Referee(self.layout, self).attention_parts(cell).narrow(index)]

    def partial_sum(self, cell: Cell, segment: int) -> int:
        self.subs.add(segment // SUMS_PER_LEAF)
        return 1

    def exponent(self, row: int) -> int:
        self.rows.setdefault(row, set())
        return -14

    def segment(self, row: int, segment: int) -> bytes:
        self.rows.setdefault(row, set()).add(segment)
        rest = row_bytes(self.layout.config, row) - w.SEGMENT_BYTES * segment
        return bytes(min(w.SEGMENT_BYTES, rest))

    def token(self, position: int) -> int:
        self.position = position
        return self._token(position)


def prove(hash_of: Callable[[int, int], bytes], indices: Sequence[int], count: int) -> list[Hash32]:
    """The multi-leaf proof of `spec.merkle` out of single nodes. hash_of: (level, index) -> hash."""
    known, size, level = sorted(indices), count, 0
    proof: list[Hash32] = []
    while size > 1:
        standing = set(known)
        proof += [Hash32(hash_of(level, i ^ 1)) for i in known if (i ^ 1) < size and i ^ 1 not in standing]
        known = sorted({i // 2 for i in known})
        size, level = (size + 1) // 2, level + 1
    return proof
