"""Fixtures of the contract tests: deployed once a module. titanoboa's plugin undoes what each test did to them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contracts import system
from tests.contracts.network import Network, Server, deploy_network


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


@pytest.fixture(scope="session")
def network() -> Network:
    """All contracts, wired and sealed, with the default parameters."""
    return deploy_network()


@pytest.fixture
def server(network: Network) -> Server:
    """A staked node of `network`."""
    return Server.start(network)
