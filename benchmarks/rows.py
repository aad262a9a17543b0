"""One line of the benchmark table, and how repeated timings become one number."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """`ratio` is value against the peer or limit named in `compared_with`, formed in the same run."""

    what: str
    value: float
    unit: str
    how: str
    compared_with: str = ""
    ratio: float | None = None
    goal: str = ""

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)


def median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median wall time of `repeats` runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
