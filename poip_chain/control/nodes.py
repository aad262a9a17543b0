"""Which node gets a request: what is known of each, a score, a weighted random choice, and why the others were not it.

Candidates are the nodes of the registry whose /v1/info answers and agrees with the chain. The score multiplies price,
success, latency and free capacity; the choice is random among the best, in proportion to their scores, so that a
newcomer gets traffic and nobody gets all of it (protocol section 8). Failures bench a node for a growing time.

Everything that a node says about itself is a claim: prices above its registered offer make it ineligible, and its load
only ever lowers its chance. Endpoints come from strangers: only plain http(s) URLs, no redirects, small answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from poip_chain.chain.endpoints import public_addresses
from poip_chain.control.client import call_json
from poip_chain.control.view import ChainView, Offer, RegisteredNode
from poip_chain.errors import InvalidInput, PoipError, Refused, Unavailable
from poip_chain.spec.eip712 import checked
from poip_chain.spec.types import Address

MAX_INFO_BYTES = 64 * 2**10
MAX_PARALLEL_PROBES = 16
MAX_PRICE = 2**128
SMOOTHING = 0.2
"""Weight of the newest observation in every running average."""
BEST_SHARE = 0.25
"""Nodes with at least this share of the best score take part in the draw."""
FIRST_BENCH_SECONDS = 2.0
LONGEST_BENCH_SECONDS = 300.0
ASSUMED_SUCCESS = 0.9
"""What a node without history is given, so that it is tried and does not displace a proven one."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of a node. Token counts; `models` maps acceptable (model_id, profile_version) pairs."""

    model_id: bytes
    profile_version: int
    prompt_tokens: int
    max_tokens: int

    def max_fee(self, offer: Offer) -> int:
        """The most that the request costs under an offer, in wei."""
        return self.prompt_tokens * offer.input_price + self.max_tokens * offer.output_price


@dataclass
class Standing:
    """What was observed of one node. Times in seconds."""

    node: RegisteredNode
    unfit: str = "not asked yet"
    running: int = 0
    capacity: int = 1
    in_flight: int = 0
    success: float = ASSUMED_SUCCESS
    first_token: float | None = None
    per_token: float | None = None
    failures: int = 0
    benched_until: float = 0.0
    last_failure: str = ""

    def offer(self, need: Need) -> Offer | None:
        """The node's offer for what is needed."""
        return next(
            (
                offer
                for offer in self.node.offers
                if (offer.model_id, offer.profile_version) == (need.model_id, need.profile_version)
            ),
            None,
        )

    def seconds(self, tokens: int) -> float | None:
        """Expected time for an answer of so many tokens; None without history."""
        if self.first_token is None or self.per_token is None:
            return None
        return self.first_token + tokens * self.per_token


@dataclass(frozen=True, slots=True)
class Considered:
    """One node in one choice: its score, and why it was not chosen ("" for the one that was)."""

    node: Address
    score: float
    why_not: str

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"node": self.node, "score": round(self.score, 6), "why_not_chosen": self.why_not or None}


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen node with its URL and offer, and everyone who was considered."""

    node: Address
    url: str
    offer: Offer
    considered: tuple[Considered, ...]


class NoNode(Unavailable):
    """No node can take the request now. `considered` says why for each."""

    code = "no_node_available"

    def __init__(self, considered: tuple[Considered, ...]) -> None:
        reasons = "; ".join(f"{entry.node}: {entry.why_not}" for entry in considered[:8]) or "none is registered"
        super().__init__(f"no node can take this request now ({reasons}).", hint="Try again in a few seconds.")
        self.considered = considered


@dataclass
class NodeDirectory:
    """See the module's docstring. Used from one event loop; `refresh` is called by a loop and before a first choice."""

    chain: ChainView
    http: httpx.AsyncClient
    private_endpoints: bool = True
    probe_timeout: float = 3.0
    rng: random.Random = field(default_factory=random.SystemRandom)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._standing: dict[Address, Standing] = {}

    # --- what is known -----------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Read the registry and ask every active node how it is. Raises Unavailable if the chain does not answer."""
        registered = await asyncio.to_thread(self.chain.nodes)
        for node in registered:
            standing = self._standing.setdefault(node.address, Standing(node))
            standing.node = node
        for gone in set(self._standing) - {node.address for node in registered}:
            self._standing[gone].unfit = "no longer registered"
        gate = asyncio.Semaphore(MAX_PARALLEL_PROBES)

        async def probe(standing: Standing) -> None:
            async with gate:
                standing.unfit = await self._unfit(standing)

        await asyncio.gather(*(probe(self._standing[node.address]) for node in registered))

    async def _unfit(self, standing: Standing) -> str:
        """Why the node cannot be used at all, "" if it can; reads its load on the way."""
        node = standing.node
        if not node.active:
            return node.inactive_reason or "not active"
        if not node.offers:
            return "offers no model"
        problem = await asyncio.to_thread(endpoint_problem, node.endpoint, self.private_endpoints)
        if problem:
            return problem
        try:
            status, info = await call_json(
                self.http, "GET", f"{node.endpoint.rstrip('/')}/v1/info", None, self.probe_timeout, MAX_INFO_BYTES
            )
            if status != 200:
                return f"its /v1/info answers {status}"
            return self._check_info(standing, info)
        except PoipError as error:
            return str(error)[:200]

    def _check_info(self, standing: Standing, info: Mapping[str, Any]) -> str:
        node, deployment = standing.node, info.get("deployment")
        ours = {
            "log": self.chain.log_domain.verifying_contract,
            "vault": self.chain.vault_domain.verifying_contract,
            "registry": self.chain.registry_address,
        }
        try:
            if checked("address", info.get("node"), "node") != node.address:
                return f"its endpoint belongs to node {info.get('node')}"
            theirs = deployment if isinstance(deployment, dict) else {}
            if info.get("chain_id") != self.chain.chain_id or any(
                checked("address", theirs.get(name), name) != address for name, address in ours.items()
            ):
                return "it serves another chain or deployment"
            running = checked("uint32", info.get("running"), "running")
            capacity = checked("uint32", info.get("capacity"), "capacity")
            asked = Offer(
                bytes.fromhex(str(info.get("model_id"))[2:]),
                checked("uint32", info.get("profile_version"), "profile_version"),
                _price(info.get("input_price")),
                _price(info.get("output_price")),
            )
        except (InvalidInput, ValueError) as error:
            return f"its /v1/info is malformed: {str(error)[:150]}"
        standing.running, standing.capacity = running, max(1, capacity)
        for offer in node.offers:
            if (offer.model_id, offer.profile_version) == (asked.model_id, asked.profile_version):
                if asked.input_price > offer.input_price or asked.output_price > offer.output_price:
                    return "asks more than its registered offer"
                return ""
        return "does not serve what it offers in the registry"

    def standings(self) -> list[Standing]:
        """All nodes that were ever seen."""
        return list(self._standing.values())

    def url(self, node: Address) -> str | None:
        """Where a node is reached now, by the registry."""
        standing = self._standing.get(node)
        return standing.node.endpoint.rstrip("/") if standing else None

    # --- choosing ----------------------------------------------------------------------------------------------

    def choose(
        self,
        need: Need,
        *,
        barred: Mapping[Address, str] | None = None,
        free_escrow: Mapping[Address, int] | None = None,
    ) -> Choice:
        """A node for a request. `barred`: nodes that must not get it, with the reason; `free_escrow`: what may still be
        spent with each node in wei, where that is known.

        Raises NoNode, with the reason for each.
        """
        now = self.clock()
        refused: list[Considered] = []
        fit: list[tuple[Standing, Offer]] = []
        for standing in self._standing.values():
            offer = standing.offer(need)
            why = self._why_not(standing, offer, need, now, barred or {}, free_escrow or {})
            if why or offer is None:
                refused.append(Considered(standing.node.address, 0.0, why or "does not offer this model"))
            else:
                fit.append((standing, offer))
        if not fit:
            raise NoNode(tuple(refused))
        scores = self._scores(fit, need)
        best = max(scores)
        pool = [(pair, score) for pair, score in zip(fit, scores, strict=True) if score >= BEST_SHARE * best]
        (chosen, offer), _ = self.rng.choices(pool, weights=[score for _, score in pool])[0]
        considered = [
            Considered(
                standing.node.address,
                score,
                ""
                if standing is chosen
                else ("lost the draw" if score >= BEST_SHARE * best else f"scores {score / best:.0%} of the best"),
            )
            for (standing, _), score in zip(fit, scores, strict=True)
        ]
        return Choice(chosen.node.address, chosen.node.endpoint.rstrip("/"), offer, tuple(considered + refused))

    @staticmethod
    def _why_not(
        standing: Standing,
        offer: Offer | None,
        need: Need,
        now: float,
        barred: Mapping[Address, str],
        free_escrow: Mapping[Address, int],
    ) -> str:
        node = standing.node.address
        if node in barred:
            return barred[node]
        if standing.unfit:
            return standing.unfit
        if offer is None:
            return "does not offer this model"
        if standing.benched_until > now:
            return f"benched for {standing.benched_until - now:.0f} s more: {standing.last_failure}"
        if standing.running >= standing.capacity or standing.in_flight >= standing.capacity:
            return "busy"
        free = free_escrow.get(node)
        if free is not None and free < need.max_fee(offer):
            return f"escrow with it has {free} wei free, the request may cost {need.max_fee(offer)}"
        return ""

    @staticmethod
    def _scores(fit: list[tuple[Standing, Offer]], need: Need) -> list[float]:
        fees = [need.max_fee(offer) for _, offer in fit]
        times = [standing.seconds(need.max_tokens) for standing, _ in fit]
        # One token of slack keeps free offers from dividing by zero and from taking all traffic at any price ratio.
        slack = max(1, max(fees) // 100)
        cheapest = min(fees) + slack
        known = [seconds for seconds in times if seconds]
        fastest = min(known) if known else 1.0
        scores = []
        for (standing, _), fee, seconds in zip(fit, fees, times, strict=True):
            price = cheapest / (fee + slack)
            speed = fastest / seconds if seconds else 1.0
            load = max(standing.running, standing.in_flight) / standing.capacity
            scores.append(max(1e-9, price**2 * standing.success**3 * min(1.0, speed) * max(0.05, 1.0 - load)))
        return scores

    # --- what came of it ---------------------------------------------------------------------------------------

    def started(self, node: Address) -> None:
        """A request goes to the node."""
        if standing := self._standing.get(node):
            standing.in_flight += 1

    def succeeded(self, node: Address, first_token: float, total: float, tokens: int) -> None:
        """A request was answered: seconds to the first token, seconds in all, output tokens."""
        standing = self._standing.get(node)
        if standing is None:
            return
        standing.in_flight = max(0, standing.in_flight - 1)
        standing.failures, standing.benched_until, standing.last_failure = 0, 0.0, ""
        standing.success = _average(standing.success, 1.0)
        standing.first_token = _average(standing.first_token, first_token)
        if tokens > 1:
            standing.per_token = _average(standing.per_token, max(0.0, total - first_token) / (tokens - 1))
        elif standing.per_token is None:
            standing.per_token = 0.0

    def failed(self, node: Address, reason: str, *, blame: bool = True) -> None:
        """A request failed; `blame` false where that says nothing about the node (the client left, escrow is short)."""
        standing = self._standing.get(node)
        if standing is None:
            return
        standing.in_flight = max(0, standing.in_flight - 1)
        if blame:
            standing.failures += 1
            standing.success = _average(standing.success, 0.0)
            bench = min(LONGEST_BENCH_SECONDS, FIRST_BENCH_SECONDS * 2 ** (standing.failures - 1))
            standing.benched_until = self.clock() + bench
            standing.last_failure = reason[:200]


def endpoint_problem(endpoint: str, private_allowed: bool) -> str:
    """Why a registered endpoint is not called, "" if it may be. Resolves the name, so it blocks.

    A public gateway must not be made to knock on its own network's doors by whoever registers a node. This says so
    early and in words; what is connected to is decided again, for each connection, by the client's transport.
    """
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        return "its endpoint is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        return "its endpoint is not a plain http(s) URL"
    if private_allowed:
        return ""
    try:
        public_addresses(parts.hostname, port or (443 if parts.scheme == "https" else 80))
    except OSError:
        return "the host of its endpoint is not known"
    except Refused:
        return "its endpoint lies in a private network"
    return ""


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new


def _price(value: Any) -> int:
    """A price as /v1/info states it: an integer, or a decimal string. Raises InvalidInput."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 40:
        value = int(value)
    if type(value) is not int or not 0 <= value < MAX_PRICE:
        raise InvalidInput(f"a price is an integer below 2**128, not {value!r:.60}.")
    return value
