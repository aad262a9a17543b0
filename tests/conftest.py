"""How tests are shared out among pytest-xdist's processes, and the time that those with contracts may take."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

WITH_CONTRACTS = ("tests/contracts/", "tests/attack/")
# Runs on the devnet, with the runtime's own compiled contracts.
APART = "tests/contracts/test_gas.py"
# Files whose names have one of these words need the court's contracts too.
COURT = ("referee", "scoring", "accusations", "contests", "court", "moves")

# Loading a compiled contract makes a million objects that stay; by default half the time goes to looking for garbage
# among them.
gc.set_threshold(200_000, 50, 50)

# Everybody runs the same examples, here and in CI, however slow the machine: no test passes or fails by chance.
# `pytest --hypothesis-profile explore` draws new ones.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")


class Shares(LoadScopeScheduling):
    """Each file's tests run in one process; those that deploy contracts make two groups: with the court and without.

    Compiling and deploying is the dearest part of those: more processes would do it all over, at the same time. Named
    first on the command line, the two groups start first, and then the other files.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        if not path.startswith(WITH_CONTRACTS) or path == APART:
            return path
        return "court" if any(word in path for word in COURT) else "contracts"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares | None:
    """Our way of sharing takes the place of xdist's --dist loadfile."""
    return Shares(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a cache of compiled contracts is empty, the first test to deploy waits for the compiler."""
    folders = tuple(
        Path(__file__).resolve().parent.parent / folder for folder in (*WITH_CONTRACTS, "tests/integration/")
    )
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
