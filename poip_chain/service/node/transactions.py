"""Getting something done on chain, whatever happens in between: crash, reorganisation, a race with somebody else.

`ensure` is given the goal ("is it done?", asked of the chain) and a way to send. It sends under an idempotency key, so
that the same attempt is never sent twice; a new attempt is made only when the earlier one ended without the goal.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from poip_chain.errors import InsufficientFunds, TransactionFailed
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.ports import NodeChain, SentState

log = structlog.get_logger("poip.node")


class Transactions:
    """Sends the node's transactions through its outbox. `clock` gives Unix seconds; delays in seconds."""

    def __init__(self, chain: NodeChain, ledger: Ledger, clock: Callable[[], float], retry_delay: float) -> None:
        self._chain, self._ledger, self._clock, self._delay = chain, ledger, clock, retry_delay
        self._refused: dict[str, str] = {}

    def refused(self, job: str) -> str | None:
        """Why the chain refused `job` the last time, if it has not been sent or done since."""
        return self._refused.get(job)

    def begun(self, job: str) -> bool:
        """Whether a transaction for `job` was ever sent."""
        attempt, _ = self._ledger.attempt(job)
        return attempt > 0 or self._chain.sent(f"{job}#{attempt}") is not SentState.UNKNOWN

    def ensure(self, job: str, done: Callable[[], bool], send: Callable[[str], None]) -> bool:
        """Move `job` on; True if its goal is reached. `send(key)` sends its transaction under that idempotency key.

        A revert in simulation is logged and tried again later, unless the goal turns out to be reached: somebody else
        was faster. Raises Unavailable if the chain does not answer.
        """
        if done():
            self._refused.pop(job, None)
            return True
        attempt, not_before = self._ledger.attempt(job)
        key = f"{job}#{attempt}"
        state = self._chain.sent(key)
        now = self._clock()
        if state is SentState.OPEN:
            return False
        if state in (SentState.MINED, SentState.FAILED):
            if done():
                return True
            until = self._ledger.put_off(job, now, self._delay, used=True)
            log.info("transaction did not do it", job=job, state=state.value, retry_in=round(until - now, 1))
            return False
        if now < not_before:
            return False
        try:
            send(key)
        except (TransactionFailed, InsufficientFunds) as error:
            if done():
                return True
            self._refused[job] = str(error)
            until = self._ledger.put_off(job, now, self._delay, used=False)
            log.warning("cannot send", job=job, error=str(error)[:300], retry_in=round(until - now, 1))
            return False
        self._refused.pop(job, None)
        log.info("sent", job=job)
        return False
