"""Canonical traces that are false on purpose. FOR TESTS AND THE DEMO ONLY: who plays with one loses what it stakes.

One element of a forward pass is falsified, and all that the pass computes from it follows: so the trace is whole and
proves everything it is asked for, and nothing but the one step shows that it is false. Knows no game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from poip_chain.canonical.model import CanonicalModel
from poip_chain.canonical.trace import Trace
from poip_chain.service.court.traces import Traces
from poip_chain.spec.trace import Op


@dataclass(frozen=True)
class Lie:
    """Element (row, column) of a tensor is `by` too large; what the engine computes from it follows."""

    op: Op
    layer: int
    row: int
    column: int
    by: int = 1


SOMEWHERE = Lie(Op.GATE, 0, 0, 0)
"""An element that every model has."""


class LyingModel(CanonicalModel):
    """The engine with one falsified element."""

    lie: Lie

    @classmethod
    def over(cls, model: CanonicalModel, lie: Lie) -> Self:
        """`model`, lying; its memory is shared."""
        made = cls.__new__(cls)
        made.__dict__.update(model.__dict__)
        made.lie = lie
        return made

    def embed(self, ids: Any) -> Any:
        h = super().embed(ids)
        self._falsify(Op.EMBED, 0, h)
        return h

    def layer(self, layer: int, h: Any, cache: Any, record: Any = None) -> Any:
        return super().layer(layer, h, cache, self._telling(record))

    def head(self, h: Any, record: Any = None) -> Any:
        return super().head(h, self._telling(record))

    def _telling(self, record: Any) -> Any:
        def tell(op: Op, layer: int, rows: Any) -> None:
            self._falsify(op, layer, rows)
            if record:
                record(op, layer, rows)

        return tell

    def _falsify(self, op: Op, layer: int, rows: Any) -> None:
        if (op, layer) == (self.lie.op, self.lie.layer):
            rows[self.lie.row, self.lie.column] += self.lie.by


class LyingTraces(Traces):
    """Traces that are false where `lie` says for an answer's prompt and output."""

    def __init__(
        self,
        directory: Path,
        lie: Callable[[Sequence[int], Sequence[int]], Lie] = lambda *_: SOMEWHERE,
        threads: int = 1,
    ) -> None:
        super().__init__(directory, threads)
        self._lie = lie

    def _trace(self, model: CanonicalModel, prompt: Sequence[int], output: Sequence[int]) -> Trace:
        return super()._trace(LyingModel.over(model, self._lie(prompt, output)), prompt, output)
