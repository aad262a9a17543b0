"""Seals a block at a steady pace, in a thread of its own. Knows the chain, no transport."""

from __future__ import annotations

import logging
import threading
import time

from poip_chain.chain.devnet.chain import Devnet

log = logging.getLogger(__name__)

FILL_SHARE = 0.8
"""At most this share of the pace goes into filling a block, so that a full pool cannot stop the clock."""


class BlockProducer:
    """Seals a block every `interval` seconds of the clock, empty ones too; None seals none."""

    def __init__(self, devnet: Devnet, interval: float | None) -> None:
        self._devnet = devnet
        self._interval = interval
        self._changed = threading.Condition()
        self._running = False
        self._thread = threading.Thread(target=self._run, name="block-producer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._running = True
        self._thread.start()

    def stop(self) -> None:
        """End, after the block that is being sealed."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def set_interval(self, interval: float | None) -> None:
        """Change the pace from now on."""
        with self._changed:
            self._interval = interval
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                interval = self._interval
                # Multiples of the pace on the wall clock: a whole second's block comes just after the second began.
                now = time.time()
                wait = None if interval is None else interval - now % interval
                if self._running and self._changed.wait(wait):
                    continue
                if not self._running:
                    return
            assert interval is not None
            try:
                self._devnet.mine(seconds=max(0.5, FILL_SHARE * interval))
            except Exception:
                log.exception("a block could not be sealed")
