"""Attacks on the contracts start from the same deployments as the tests of the contracts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.court_ledger import Ledger, with_partner
from tests.contracts.conftest import network, server
from tests.contracts.court import Court, deploy_court
from tests.contracts.network import Committed
from tests.support.tellings import Story, Telling, story

__all__ = ["network", "server"]


@pytest.fixture(scope="session")
def told() -> Story:
    """An answer of a small model."""
    return story()


@pytest.fixture(scope="session")
def honest(told: Story) -> Telling:
    """Its canonical trace."""
    return Telling(told)


@pytest.fixture(scope="session")
def deployed_court(told: Story) -> Court:
    """The court, whose scoring believes every claim."""
    return deploy_court(told)


@pytest.fixture
def court(deployed_court: Court) -> Iterator[Court]:
    """With three players; in the end its books are balanced."""
    with_partner(deployed_court)
    yield deployed_court
    deployed_court.check_books()


@pytest.fixture
def committed(court: Court) -> Committed:
    """A batch of two answers, of which tests say whether they are true."""
    return court.serve(2)


@pytest.fixture
def ledger(court: Court, committed: Committed) -> Ledger:
    """Everybody's money before the game."""
    return Ledger(court, committed)
