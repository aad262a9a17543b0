"""The checks of `poip doctor`: each says what it looked at, how it came out, and how to mend it.

Checks only read. A check that cannot be made because an earlier one failed says so instead of failing again.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from poip_chain.chain.keys import address_of, permissions_problem
from poip_chain.cli.context import Context
from poip_chain.economic.money import format_amount
from poip_chain.errors import PoipError
from poip_chain.spec.types import Address

State = Literal["ok", "warning", "failed", "not checked"]

MAX_CLOCK_SKEW = 30
"""Seconds between this machine's clock and the newest block beyond which deadlines and windows go wrong."""
LOW_COINS = 10**16
"""Wei of the chain's coin below which a sending key will soon be stuck."""
PORTS = {"node": 8700, "gateway": 8800, "engine": 8000}
"""Where the programs listen if the settings do not say otherwise."""
_PEER_NAME = re.compile(r"(^|[-_.])peer[0-9]*($|[-_.])")
"""How people call a peer key; before the node is registered the name is all there is to tell it by."""
FIXES = {
    "chain": "Start the chain (`poip devnet`), or name another endpoint with --rpc.",
    "contracts": "--data (or POIP_DATA) names the network's directory, --deployment its file; `poip deploy` makes one.",
    "model": "`poip model prepare` builds the default model; name a directory with --model.",
    "engine": "Give the address as http://HOST:PORT; `poip engine serve --model DIR` starts one.",
}
"""What to do about an error that does not say it itself, by the check."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One check. `fix` is what to do, '' where nothing is wrong."""

    name: str
    state: State
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """All fields by name."""
        return {"name": self.name, "state": self.state, "detail": self.detail, "fix": self.fix}


def examine(context: Context, model: Path | None, engine_url: str | None) -> Iterator[Diagnosis]:
    """All checks in order: chain, contracts, clock, keys, balances, nodes, ports, model, engine."""
    chain_there = yield from _guarded("chain", lambda: _chain(context))
    if chain_there:
        deployed = yield from _guarded("contracts", lambda: _contracts(context))
        yield from _guarded("clock", lambda: _clock(context))
    else:
        deployed = False
        for name in ("contracts", "clock"):
            yield Diagnosis(name, "not checked", "the chain does not answer")
    yield from _keys(context)
    if deployed:
        peers = _peer_keys(context)
        for name, address in _addresses(context).items():
            yield from _guarded(f"funds of {name}", lambda n=name, a=address: _funds(context, n, a, peers))  # type: ignore[misc]
    yield from _ports(context)
    if model is not None:
        yield from _guarded("model", lambda: _model(context, model, deployed))
    if engine_url is not None:
        yield from _guarded("engine", lambda: _engine(engine_url))


def _guarded(name: str, check: Callable[[], Diagnosis]) -> Generator[Diagnosis, None, bool]:
    """Yield the check's result, or its error as one; returns whether it went well."""
    try:
        found = check()
    except (PoipError, OSError) as error:
        hint = error.hint if isinstance(error, PoipError) else ""
        message = error.message if isinstance(error, PoipError) else str(error)
        found = Diagnosis(
            name, "failed", message, hint or FIXES.get(name, "Repeat this; if it stays, see `poip node list`.")
        )
    yield found
    return found.state in ("ok", "warning")


def _chain(context: Context) -> Diagnosis:
    chain = context.chain
    return Diagnosis("chain", "ok", f"{chain.url}, chain id {chain.chain_id}, block {chain.block_number()}")


def _contracts(context: Context) -> Diagnosis:
    deployment = context.network.deployment
    return Diagnosis("contracts", "ok", f"{len(deployment.addresses)} contracts of {context.settings.deployment_path}")


def _clock(context: Context) -> Diagnosis:
    ahead = time.time() - context.chain.timestamp()
    detail = f"the newest block is {ahead:.0f} s behind this clock" if ahead >= 0 else f"{-ahead:.0f} s ahead of it"
    if abs(ahead) <= MAX_CLOCK_SKEW:
        return Diagnosis("clock", "ok", detail)
    return Diagnosis(
        "clock", "warning", detail, "Set this machine's clock (NTP), or see whether the chain has stopped."
    )


def _key_files(context: Context) -> list[Path]:
    return sorted(context.settings.keys.glob("*.json"))


def _keys(context: Context) -> Iterator[Diagnosis]:
    files = _key_files(context)
    if not files:
        yield Diagnosis("keys", "warning", f"none in {context.settings.keys}", "`poip key new NAME` makes one.")
    for path in files:
        yield _key(path)


def _key(path: Path) -> Diagnosis:
    name = f"key {path.stem}"
    for secret in (path, path.with_suffix(".password")):
        problem = permissions_problem(secret) if secret.exists() else ""
        if problem:
            return Diagnosis(name, "failed", problem, f"chmod 600 {secret}")
    try:
        return Diagnosis(name, "ok", str(address_of(path)))
    except (PoipError, OSError) as error:
        return Diagnosis(name, "failed", str(error), f"Restore {path} from your copy, or move it away.")


def _addresses(context: Context) -> dict[str, Address]:
    """The keys that can be read; `_keys` tells of the others."""
    found: dict[str, Address] = {}
    for path in _key_files(context):
        with contextlib.suppress(PoipError, OSError):
            found[path.stem] = address_of(path)
    return found


def _peer_keys(context: Context) -> frozenset[Address]:
    """The peer keys of all registered nodes."""
    registry = context.network.registry
    found = set()
    with contextlib.suppress(PoipError):
        found = {registry.info(node).peer_key for node in registry.nodes()}
    return frozenset(found)


def _funds(context: Context, key: str, address: Address, peers: frozenset[Address]) -> Diagnosis:
    network = context.network
    coins, tokens = context.chain.balance(address), network.token.balance(address)
    node = network.registry.node_of_key(address)
    role = "" if node is None else f"; node {node}: {_node_state(context, node)}"
    name, detail = f"funds of {key}", f"{format_amount(tokens)}, {coins / 10**18:.4f} of the chain's coin{role}"
    if role.endswith("has left"):
        return Diagnosis(name, "warning", detail, "It left for good: register a new node with a new key.")
    if node is not None and "not active" in role:
        return Diagnosis(name, "warning", detail, "`poip stake add` or `poip node unjail`; see `poip node list`.")
    if node is None and (address in peers or _PEER_NAME.search(key)):
        return Diagnosis(name, "ok", f"{detail}; a peer key sends no transactions and needs no gas")
    if coins < LOW_COINS:
        return Diagnosis(name, "warning", detail, f"Send some of the chain's coin to {address}: it pays for gas.")
    return Diagnosis(name, "ok", detail)


def _node_state(context: Context, node: Address) -> str:
    registry = context.network.registry
    info = registry.info(node)
    if info.deregistered_at:
        return "not active: has left"
    state = "active" if registry.is_active(node) else "not active"
    jail = f", jailed until {info.jailed_until}" if info.jailed_until > context.chain.timestamp() else ""
    return f"{state}{jail}, stake {format_amount(info.active)}, {format_amount(info.locked)} of it locked"


def _ports(context: Context) -> Iterator[Diagnosis]:
    for name in PORTS:
        try:
            host, port = _address(context, name)
        except PoipError as error:
            fix = error.hint or "Mend the settings; `poip config` shows them."
            yield Diagnosis(f"port of the {name}", "failed", error.message, fix)
            continue
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free = False
            with contextlib.suppress(OSError):
                listener.bind((host, port))
                free = True
        detail = f"{port} is {'free' if free else 'in use'}"
        fix = "" if free else f"If that is not your own {name}, choose another port with --port or in the settings."
        yield Diagnosis(f"port of the {name}", "ok" if free else "warning", detail, fix)


def _address(context: Context, program: str) -> tuple[str, int]:
    """Where a program will listen by its section of the settings."""
    from poip_chain.cli.settings import load_section

    place = load_section(_Place, program, context.config, {"data": context.flags.get("data")}).values
    return place.host, PORTS[program] if place.port is None else place.port


class _Place(BaseModel):
    """What a program's section of the settings says about its address."""

    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=0, le=65535)


def _model(context: Context, directory: Path, deployed: bool) -> Diagnosis:
    from poip_chain.service.engine.model import verify

    hashes = verify(directory)
    detail = f"{directory}: 0x{hashes.model_id.hex()}, recomputed from the files"
    if deployed and hashes.model_id not in context.network.models.model_ids():
        return Diagnosis(
            "model", "warning", f"{detail}; not registered on this chain", "`poip model register` adds it."
        )
    return Diagnosis("model", "ok", detail)


def _engine(url: str) -> Diagnosis:
    import httpx

    try:
        status = httpx.get(f"{url.rstrip('/')}/health", timeout=5.0).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Diagnosis("engine", "failed", f"{url}: {error!r}", "`poip engine serve --model DIR` starts one.")
    if status != 200:
        return Diagnosis("engine", "failed", f"{url} answers {status}", "Wait until it is ready, or see its log.")
    return Diagnosis("engine", "ok", url)
