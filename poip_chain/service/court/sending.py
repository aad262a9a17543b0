"""Sending a player's transactions, each once, over kills, reorganisations and races.

A job is named by what it does at one place of the game, and its attempts are numbered; the outbox keeps both, so nothing
else is stored. An attempt that was mined is never repeated (the outbox sends it again by itself if a reorganisation
drops it); one that failed is followed by another, after a pause. Knows no game.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

import structlog

from poip_chain.chain.outbox import Outbox, State
from poip_chain.chain.rpc import Call
from poip_chain.errors import InsufficientFunds, TransactionFailed
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.court")

MAX_PAUSE = 30.0


class Progress(StrEnum):
    """How a job stands."""

    NONE = "none"
    """Never sent, or every attempt failed."""
    OPEN = "open"
    MINED = "mined"


class Sender:
    """Sends through `outbox`. `pause`: seconds before a failed attempt is followed by another, doubling. For one thread.

    `refused` holds why a job could not be sent the last time.
    """

    def __init__(self, outbox: Outbox, pause: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._outbox, self._pause, self._clock = outbox, pause, clock
        self._waits: dict[str, tuple[float, float]] = {}
        self._seen: dict[str, int] = {}
        self.refused: dict[str, str] = {}

    @property
    def address(self) -> Address:
        """Who sends."""
        return self._outbox.address

    def step(self) -> None:
        """Push what is under way. Raises Unavailable."""
        self._outbox.step()

    def progress(self, job: str) -> Progress:
        """How a job stands, without asking the chain."""
        return self._latest(job)[1]

    def ensure(self, job: str, call: Callable[[], Call], *, again: bool = False) -> Progress:
        """Move a job on. `call` is asked for its transaction only when one is to be sent.

        again: a job that may be due anew after it was mined. A refusal by the chain is kept in `refused` and tried again
        later: somebody else may have been faster, which the next look at the chain tells. Raises Unavailable.
        """
        number, progress = self._latest(job)
        if progress is Progress.OPEN or (progress is Progress.MINED and not again):
            self.refused.pop(job, None)
            return progress
        now = self._clock()
        not_before, pause = self._waits.get(job, (0.0, self._pause))
        if number > self._seen.get(job, number):
            # An attempt ended since the last look.
            not_before, pause = self._put_off(job, now, pause)
        self._seen[job] = number
        if now < not_before:
            return progress
        try:
            sent = call()
            self._outbox.send(sent, f"{job}#{number}")
        except (TransactionFailed, InsufficientFunds) as error:
            self._put_off(job, now, pause)
            self.refused[job] = error.message
            log.info("not sent", job=job, reason=error.message[:300])
            return progress
        self.refused.pop(job, None)
        log.info("sent", job=job, call=sent.description)
        return Progress.OPEN

    def _latest(self, job: str) -> tuple[int, Progress]:
        """(number of the next attempt, how the last one stands)."""
        number = self._seen.get(job, 0)
        while self._outbox.known(f"{job}#{number}"):
            number += 1
        if number == 0:
            return 0, Progress.NONE
        state = self._outbox.status(f"{job}#{number - 1}").state
        if state in (State.OPEN, State.LOST):
            return number, Progress.OPEN
        return number, Progress.MINED if state is State.MINED else Progress.NONE

    def _put_off(self, job: str, now: float, pause: float) -> tuple[float, float]:
        self._waits[job] = (now + pause, min(2 * pause, MAX_PAUSE))
        return self._waits[job]
