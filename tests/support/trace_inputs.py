"""What a referee is given, out of a whole trace in memory: honest, or with what a test changes. Records what was read."""

from __future__ import annotations

from collections.abc import Sequence

from poip_chain.spec import weights as w
from poip_chain.spec.forward import CanonicalWeights
from poip_chain.spec.referee import Cell, Referee, build_attention, running_sums
from poip_chain.spec.trace import Layout, Op


class TraceInputs:
    """Inputs of `spec.referee.Referee`. `leaves` may be changed between steps; sub-traces are built when asked for."""

    def __init__(self, layout: Layout, weights: CanonicalWeights, tokens: Sequence[int], leaves: list[bytes]) -> None:
        self.layout, self.tokens, self.leaves = layout, tokens, leaves
        self.rows: list[tuple[int, bytes]] = []
        for plan in w.tensor_plan(layout.config):
            width = 2 if plan.source else 4
            for exponent, integers in weights.rows[plan.name]:
                self.rows.append((exponent, b"".join(i.to_bytes(width, "little", signed=True) for i in integers)))
        self.sums: dict[tuple[Cell, int], int] = {}
        self.subs: dict[tuple[Cell, int], bytes] = {}
        self.read: list[tuple[str, int]] = []

    def leaf(self, index: int) -> bytes:
        self.read.append(("leaf", index))
        return self.leaves[index]

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        self.read.append(("sub", index))
        return self.subs[cell, index]

    def partial_sum(self, cell: Cell, segment: int) -> int:
        self.read.append(("sum", segment))
        return self.sums[cell, segment]

    def exponent(self, row: int) -> int:
        return self.rows[row][0]

    def segment(self, row: int, segment: int) -> bytes:
        data = self.rows[row][1][segment * w.SEGMENT_BYTES :][: w.SEGMENT_BYTES]
        assert data, "a segment outside of the row"
        self.read.append(("weights", row))
        return data

    def token(self, position: int) -> int:
        return self.tokens[position]

    def open(self, referee: Referee, cell: Cell) -> None:
        """Build the sub-trace of a cell that has one."""
        place = self.layout.locate(cell.index)
        if cell.element >= place.count:
            return
        if place.tensor.op is Op.ATTENTION:
            build_attention(referee, cell, lambda i, leaf: self.subs.__setitem__((cell, i), leaf))
        elif place.tensor.op in LINEAR_OPS:
            running_sums(referee, cell, lambda s, value: self.sums.__setitem__((cell, s), value))


LINEAR_OPS = frozenset({Op.Q, Op.K, Op.V, Op.MIDDLE, Op.GATE, Op.UP, Op.OUTPUT, Op.LOGITS})
