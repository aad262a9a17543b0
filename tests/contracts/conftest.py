"""Fixtures of the contract tests: deployed once a module. titanoboa's plugin undoes what each test did to them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contracts import system


@pytest.fixture(scope="module")
def token() -> Any:
    """PoipToken."""
    return system.deploy_token()


@pytest.fixture(scope="module")
def parameters() -> Any:
    """Parameters with the defaults."""
    return system.deploy_parameters()


@pytest.fixture(scope="module")
def models() -> Any:
    """An empty ModelRegistry."""
    return system.deploy_models()


@pytest.fixture(scope="module")
def staking() -> system.Staking:
    """A registry with its surroundings."""
    return system.deploy_staking()
