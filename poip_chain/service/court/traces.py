"""Canonical traces of answers, and all that a player says from them: opened when needed, kept while in use.

A `Traces` opens the model on first use (seconds; the default model takes 1 GB) and keeps the players of the last few
answers. Knows no chain and no game.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from poip_chain.canonical.engine import open_model
from poip_chain.canonical.model import CanonicalModel
from poip_chain.canonical.moves import Player
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weight_tree import WeightTree
from poip_chain.errors import IntegrityError
from poip_chain.spec.types import Hash32

log = structlog.get_logger("poip.court")

KEPT = 2
"""Answers whose traces are kept: up to some hundred MB each."""


class Players(Protocol):
    """Whoever gives players by the weights_root of their model, as `Traces` does."""

    def player(self, weights_root: bytes, prompt: Sequence[int], output: Sequence[int]) -> Player:
        """Who plays for an answer."""

    def release(self) -> None:
        """Give the memory back."""


class Traces:
    """The canonical engine over the model in `directory`, for one thread at a time; others wait.

    `player` and `trace` raise IntegrityError if the weights are not those of `weights_root`, ConfigurationError,
    UnsupportedModel or InvalidInput as `canonical.engine.open_model` does, InvalidInput for an answer that is none of
    this model.
    """

    def __init__(
        self, directory: Path, threads: int = 1, kept: int = KEPT, progress: Callable[[str], None] | None = None
    ) -> None:
        self.directory = directory
        self._threads, self._kept, self._progress = threads, kept, progress
        self._lock = threading.RLock()
        self._opened: tuple[CanonicalModel, WeightTree] | None = None
        self._players: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Player] = OrderedDict()

    def player(self, weights_root: bytes, prompt: Sequence[int], output: Sequence[int]) -> Player:
        """Who plays for the canonical trace of an answer, given by all its token ids. weights_root: the registry's."""
        key = (tuple(prompt), tuple(output))
        with self._lock:
            model, rows = self._open(weights_root)
            if key not in self._players:
                while len(self._players) >= self._kept:
                    self._players.popitem(last=False)
                self._tell(f"computing the canonical trace of {len(prompt)} + {len(output)} tokens")
                self._players[key] = Player(self._trace(model, prompt, output), rows, prompt, output)
            self._players.move_to_end(key)
            return self._players[key]

    def trace(self, weights_root: bytes, prompt: Sequence[int], output: Sequence[int]) -> Trace:
        """The canonical trace of an answer."""
        return self.player(weights_root, prompt, output).trace

    def weights(self, weights_root: bytes) -> tuple[CanonicalModel, WeightTree]:
        """The engine and the tree over its weights."""
        with self._lock:
            return self._open(weights_root)

    def weights_root(self) -> Hash32:
        """The root of the weights in the directory, whatever is registered."""
        with self._lock:
            return self._load()[1].root

    def release(self) -> None:
        """Give the memory back; what is asked for later is opened again."""
        with self._lock:
            self._players.clear()
            self._opened = None

    def _trace(self, model: CanonicalModel, prompt: Sequence[int], output: Sequence[int]) -> Trace:
        return Trace(model, [*prompt, *output[:-1]], len(output))

    def _open(self, weights_root: bytes) -> tuple[CanonicalModel, WeightTree]:
        model, rows = self._load()
        if rows.root != weights_root:
            raise IntegrityError(
                f"the model in {self.directory} has the weights_root 0x{rows.root.hex()}, the registered one is "
                f"0x{weights_root.hex()}.",
                hint="Name the directory of the model that the batch was made with.",
            )
        return model, rows

    def _tell(self, what: str) -> None:
        if self._progress is None:
            log.info(what)
        else:
            self._progress(what)

    def _load(self) -> tuple[CanonicalModel, WeightTree]:
        if self._opened is None:
            self._tell(f"opening {self.directory} for canonical execution")
            model = open_model(self.directory, self._threads, progress=self._progress)
            self._opened = model, WeightTree(model.weights)
        return self._opened
