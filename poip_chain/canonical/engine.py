"""Opening a model directory for canonical execution: the self-test first, then the weights. What players call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from poip_chain.canonical import selftest
from poip_chain.canonical.compiled import Workers
from poip_chain.canonical.matmul import fastest
from poip_chain.canonical.model import CanonicalModel
from poip_chain.canonical.weights import load


def open_model(
    directory: Path,
    threads: int = 1,
    path: str | None = None,
    root: bytes | None = None,
    progress: Callable[[str], None] | None = None,
) -> CanonicalModel:
    """The model in `directory`, on an engine that has just reproduced the frozen vector.

    `root` (weights_root) is checked against the rows in use if it is given. Raises ConfigurationError where the engine
    computes wrong bits, UnsupportedModel or InvalidInput for a model without canonical execution, IntegrityError for
    weights that are not those of `root`.
    """
    path = path or _choice(threads)
    _tested(path, threads)
    return CanonicalModel(load(directory, root, progress), threads, path)


@cache
def _choice(threads: int) -> str:
    return fastest(Workers(threads)).name


@cache
def _tested(path: str, threads: int) -> None:
    selftest.check(path, threads)
