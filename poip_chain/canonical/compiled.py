"""Whether numba is here, and how functions are compiled with it. Knows nothing of what they compute.

Compiled functions release the GIL and take no threads of their own: callers split rows over a pool (`Workers`), so
nothing depends on numba's threading layers, of which the default one aborts a process that calls it from two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

try:
    import numba
except ImportError:  # the runtime without an engine
    numba = None

HAVE_NUMBA = numba is not None

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function compiled with numba (machine code kept on disk where there is a place for it); unchanged without."""
    if numba is None:
        return function
    try:
        result: Function = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        result = numba.njit(nogil=True, error_model="numpy")(function)
    return result


def inlined(function: Function) -> Function:
    """A helper of compiled functions; without numba the function itself."""
    if numba is None:
        return function
    result: Function = numba.njit(nogil=True, inline="always", error_model="numpy")(function)
    return result


def cpu_has(feature: str) -> bool:
    """Whether the CPU has an instruction set, by LLVM's name ("avx2"); False without numba."""
    if numba is None:
        return False
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get(feature, False))


class Workers:
    """A fixed number of threads that share out ranges of rows. With one, everything runs in the caller."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def split(self, count: int, work: Callable[[int, int], None], unit: int = 1) -> None:
        """work(first, last) over disjoint ranges that cover 0..count, cut at multiples of `unit`. Returns when done."""
        units = -(-count // unit)
        if self._pool is None or units < 2:
            if count:
                work(0, count)
            return
        cuts = [min(count, units * i // self.threads * unit) for i in range(self.threads + 1)]
        jobs = [self._pool.submit(work, a, b) for a, b in pairwise(cuts) if a < b]
        for job in jobs:
            job.result()
