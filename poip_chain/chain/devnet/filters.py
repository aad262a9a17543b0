"""Polled filters (eth_newFilter and its family). Knows the chain's events, no transport."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from poip_chain.chain.devnet.chain import ChainEvent
from poip_chain.chain.devnet.errors import LimitExceeded, ResourceNotFound
from poip_chain.chain.devnet.params import LogCriteria
from poip_chain.chain.devnet.views import hex_bytes, matching_logs

MAX_FILTERS = 1_000
MAX_QUEUED = 10_000
IDLE_SECONDS = 300.0

FilterKind = Literal["logs", "blocks", "transactions"]


@dataclass(slots=True)
class Filter:
    """What one client wants to hear of, and what it has not fetched yet; the oldest items fall out."""

    kind: FilterKind
    criteria: LogCriteria | None = None
    request: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    last: int | None = None
    queue: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_QUEUED))
    used_at: float = 0.0


class FilterRegistry:
    """All filters of a node. The chain's lock guards it. Filters that nobody polls for five minutes disappear."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._filters: dict[str, Filter] = {}
        self._clock = clock

    def add(self, new: Filter) -> str:
        """Install a filter; returns its name. Raises LimitExceeded if there are too many."""
        now = self._clock()
        self._filters = {key: kept for key, kept in self._filters.items() if now - kept.used_at < IDLE_SECONDS}
        if len(self._filters) >= MAX_FILTERS:
            raise LimitExceeded(f"{MAX_FILTERS} filters are installed; remove some with eth_uninstallFilter")
        new.used_at = now
        name = hex(secrets.randbits(120) | 1 << 120)
        self._filters[name] = new
        return name

    def get(self, name: object) -> Filter:
        """A filter by name. Raises ResourceNotFound."""
        found = self._filters.get(name) if isinstance(name, str) else None
        if found is None:
            raise ResourceNotFound("filter not found: it was removed, or not polled for five minutes")
        found.used_at = self._clock()
        return found

    def remove(self, name: object) -> bool:
        """Forget a filter; false if there was none."""
        return isinstance(name, str) and self._filters.pop(name, None) is not None

    def on_event(self, event: ChainEvent) -> None:
        """Queue what each filter wants of a change."""
        for one in self._filters.values():
            if one.kind == "blocks":
                one.queue.extend(hex_bytes(sealed.header.hash) for sealed in event.added)
            elif one.kind == "transactions":
                one.queue.extend(hex_bytes(transaction.hash) for transaction in event.pending)
            elif one.criteria is not None:
                for gone, blocks in ((True, event.removed), (False, event.added)):
                    for sealed in blocks:
                        if one.first <= sealed.header.block_number and (
                            one.last is None or sealed.header.block_number <= one.last
                        ):
                            one.queue.extend(matching_logs(sealed, one.criteria, removed=gone))
