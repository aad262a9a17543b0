"""Canonical engines over several model directories, shared by those who play in the court: opened when needed, given back
when nobody plays. Knows no chain and no game.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from poip_chain.canonical.moves import Player
from poip_chain.errors import NotFound
from poip_chain.service.court.traces import Traces
from poip_chain.service.engine.model import prepare


class Engines:
    """A `Traces` for each directory, found by the weights_root of its model. Directories are read on first use.

    keep_open: the memory is never given back.
    """

    def __init__(self, directories: Sequence[Path], threads: int = 1, keep_open: bool = False) -> None:
        self._directories, self._threads = tuple(dict.fromkeys(directories)), threads
        self._keep_open = keep_open
        self._lock = threading.RLock()
        self._by_root: dict[bytes, Traces] | None = None
        self._users: set[User] = set()

    def user(self) -> User:
        """One of those who play."""
        return User(self)

    def open_kept(self) -> None:
        """Open what is to be kept open, once. Raises what `prepare` and `Traces` do."""
        if self._keep_open:
            with self._lock:
                for root, traces in self._known().items():
                    traces.weights(root)

    def traces(self, weights_root: bytes) -> Traces:
        """The engine for a model's registered weights_root. Raises NotFound, and what `prepare` does."""
        with self._lock:
            known = self._known().get(weights_root)
        if known is None:
            raise NotFound(
                f"there is no copy of the model with weights_root 0x{weights_root.hex()} for canonical execution.",
                hint="Name its directory under models, or as model in the section court, of the settings.",
            )
        return known

    def _known(self) -> dict[bytes, Traces]:
        if self._by_root is None:
            found = {prepare(path).weights_root: path for path in self._directories}
            self._by_root = {root: Traces(path, self._threads) for root, path in found.items()}
        return self._by_root

    def take(self, user: User) -> None:
        """`user` plays."""
        with self._lock:
            self._users.add(user)

    def give_back(self, user: User) -> None:
        """`user` plays no longer; after the last one the memory is free."""
        with self._lock:
            self._users.discard(user)
            if not self._users and not self._keep_open:
                for traces in (self._by_root or {}).values():
                    traces.release()


class User:
    """`Engines` for one of those who play (`service.court.traces.Players`)."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def player(self, weights_root: bytes, prompt: Sequence[int], output: Sequence[int]) -> Player:
        """See `Traces.player`; raises NotFound for a model without a directory, too."""
        traces = self._engines.traces(weights_root)
        self._engines.take(self)
        return traces.player(weights_root, prompt, output)

    def release(self) -> None:
        """Not needed any more, until it is asked again."""
        self._engines.give_back(self)
