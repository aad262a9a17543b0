"""How tests are shared out among pytest-xdist's processes, and the time that those with contracts may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

WITH_CONTRACTS = ("tests/contracts/", "tests/attack/")
# Runs on the devnet, with the runtime's own compiled contracts.
APART = "tests/contracts/test_gas.py"


class Shares(LoadScopeScheduling):
    """Each file's tests run in one process, and in one process, too, do all tests that deploy contracts.

    Compiling and deploying is the dearest part of those: a second process would do it all over, at the same time. Named
    first on the command line, their share starts first, and the other processes take the files beside it.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return "contracts" if path.startswith(WITH_CONTRACTS) and path != APART else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares | None:
    """Our way of sharing takes the place of xdist's --dist loadfile."""
    return Shares(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a cache of compiled contracts is empty, the first test to deploy waits for the compiler."""
    folders = tuple(Path(__file__).resolve().parent.parent / folder for folder in WITH_CONTRACTS)
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
