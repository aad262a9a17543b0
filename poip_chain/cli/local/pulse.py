"""Tells that a long quiet step lives, and what it waits for. Knows nothing of what is waited for: it is given the words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

QUIET_SECONDS = 12.0
"""After this long without a line there is one: never more than 15 seconds pass in silence."""


class Pulse:
    """Passes lines on to `tell`; within a `with` block it adds one whenever there was none for `quiet` seconds."""

    def __init__(self, tell: Callable[[str], None], quiet: float = QUIET_SECONDS) -> None:
        self._tell, self._quiet = tell, quiet
        self._lock = threading.Lock()
        self._last, self._told = time.monotonic(), ""
        self._waiting: tuple[str, float | None, str] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def tell(self, text: str) -> None:
        """One line."""
        with self._lock:
            self._told = text.strip()
            self._say(text)

    def wait_for(self, text: str, *, seconds: float | None = None, until: str = "") -> None:
        """What is awaited from now on; with `seconds`, until `until` happens: counted down. '' for nothing in particular."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._lock:
            self._waiting = (text, end, until) if text else None

    @property
    def quiet_for(self) -> float:
        """Seconds since the last line."""
        with self._lock:
            return time.monotonic() - self._last

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        self._tell(text)

    def _line(self) -> str:
        if self._waiting is None:
            return f"  ... still at: {self._told}"
        text, end, until = self._waiting
        left = 0.0 if end is None else end - time.monotonic()
        return f"  ... waiting: {text}" + (f"; {until} in {left:.0f} s" if left >= 0.5 else "")

    def _beat(self) -> None:
        while not self._done.wait(max(0.01, self._quiet - self.quiet_for)):
            with self._lock:
                if time.monotonic() - self._last >= self._quiet:
                    self._say(self._line())
