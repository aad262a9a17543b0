"""Attacks on the contracts start from the same deployments as the tests of the contracts."""

from __future__ import annotations

from tests.contracts.conftest import network, server

__all__ = ["network", "server"]
