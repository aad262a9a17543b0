"""Serve a prepared model with vLLM and the protocol's sampler"""

from __future__ import annotations

from poip_chain.cli.main import group

command = group("engine", "The engine of a node: vLLM with the protocol's sampler.")
