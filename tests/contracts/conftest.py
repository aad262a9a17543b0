"""Fixtures of the contract tests. Each test starts from an untouched copy of what they deploy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boa
import pytest

from tests.contracts import system


@pytest.fixture(autouse=True)
def anchored() -> Iterator[None]:
    """Undo on the chain what a test did."""
    with boa.env.anchor():
        yield


@pytest.fixture
def token() -> Any:
    """PoipToken."""
    return system.deploy_token()


@pytest.fixture
def parameters() -> Any:
    """Parameters with the defaults."""
    return system.deploy_parameters()


@pytest.fixture
def models() -> Any:
    """An empty ModelRegistry."""
    return system.deploy_models()


@pytest.fixture
def staking() -> system.Staking:
    """A registry with its surroundings."""
    return system.deploy_staking()
