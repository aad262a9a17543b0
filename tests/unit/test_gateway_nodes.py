"""Choosing a node: who is fit, who is better, and the reason for everyone else."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from poip_chain.control.nodes import (
    FIRST_BENCH_SECONDS,
    LONGEST_BENCH_SECONDS,
    Need,
    NodeDirectory,
    NoNode,
    endpoint_problem,
)
from poip_chain.control.view import Offer, RegisteredNode
from poip_chain.errors import Unavailable
from poip_chain.spec.types import Address
from tests.engines.scripted_chain import CHAIN_ID, LOG, MODEL_ID, REGISTRY, VAULT, ScriptedChain

A, B, C = (Address("0x" + digit * 40) for digit in "123")
NEED = Need(MODEL_ID, 1, 10, 100)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def info(node: Address, /, **changes: Any) -> dict[str, Any]:
    return {
        "node": node,
        "node_key": node,
        "chain_id": CHAIN_ID,
        "deployment": {"log": LOG, "vault": VAULT, "registry": REGISTRY},
        "model_id": "0x" + MODEL_ID.hex(),
        "profile_version": 1,
        "input_price": "1",
        "output_price": "1",
        "max_context": 100,
        "engine_statement": "",
        "next_seq": 0,
        "running": 0,
        "capacity": 4,
        "version": "1",
        **changes,
    }


class Network:
    """Nodes whose /v1/info a test writes."""

    def __init__(self, **prices: int) -> None:
        self.chain, self.clock = ScriptedChain(), Clock()
        self.answers: dict[str, Any] = {}
        for node, price in ((A, prices.get("a", 1)), (B, prices.get("b", 1)), (C, prices.get("c", 1))):
            host = f"node{node[2]}"
            self.chain.register(node, node, f"http://{host}:1", Offer(MODEL_ID, 1, price, price))
            self.answers[host] = info(node)
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        self.directory = NodeDirectory(self.chain, self.http, rng=random.Random(5), clock=self.clock)

    def answer(self, request: httpx.Request) -> httpx.Response:
        found = self.answers[request.url.host]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, httpx.Response) else httpx.Response(200, json=found)

    def refresh(self) -> NodeDirectory:
        asyncio.run(self.directory.refresh())
        return self.directory

    def reasons(self, **options: Any) -> dict[Address, str]:
        try:
            considered = self.directory.choose(NEED, **options).considered
        except NoNode as error:
            considered = error.considered
        return {entry.node: entry.why_not for entry in considered}

    def shares(self, draws: int = 2000, **options: Any) -> dict[Address, float]:
        counts = Counter(self.directory.choose(NEED, **options).node for _ in range(draws))
        return {node: counts[node] / draws for node in (A, B, C)}


UNFIT = {
    "another node": (info(B), "belongs to node"),
    "another chain": (info(A, chain_id=1), "another chain"),
    "another log": (info(A, deployment={"log": VAULT, "vault": VAULT, "registry": REGISTRY}), "another chain"),
    "no deployment": (info(A, deployment=None), "malformed"),
    "dearer than offered": (info(A, input_price=2), "more than its registered offer"),
    "another model": (info(A, model_id="0x" + "00" * 32), "does not serve what it offers"),
    "negative price": (info(A, output_price=-1), "malformed"),
    "huge price": (info(A, output_price="9" * 60), "malformed"),
    "bad load": (info(A, running="many"), "malformed"),
    "no address": (info(A, node=None), "malformed"),
    "a list": (httpx.Response(200, json=[]), "does not answer properly"),
    "not json": (httpx.Response(200, text="<html>"), "does not answer properly"),
    "endless": (httpx.Response(200, content=b" " * 70_000), "more than"),
    "server error": (httpx.Response(500), "answers 500"),
    "redirect": (httpx.Response(302, headers={"location": "http://169.254.169.254/"}), "answers 302"),
    "down": (httpx.ConnectError("refused"), "does not answer properly"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_nodes_are_left_out_and_the_reason_is_said(name: str) -> None:
    network = Network()
    network.answers["node1"], reason = UNFIT[name]
    network.refresh()
    assert reason in network.reasons()[A]
    assert network.shares(200)[A] == 0


def test_inactive_and_unregistered_nodes() -> None:
    network = Network()
    jailed = network.chain.registered[A]
    network.chain.registered[A] = RegisteredNode(A, jailed.endpoint, False, "jailed until 5", 0, jailed.offers)
    network.refresh()
    assert network.reasons()[A] == "jailed until 5"
    del network.chain.registered[B]
    network.refresh()
    assert network.reasons()[B] == "no longer registered"
    assert network.reasons()[C] == ""


def test_without_a_chain_the_directory_stays_as_it_was() -> None:
    network = Network()
    network.refresh()
    network.chain.down = True
    with pytest.raises(Unavailable):
        network.refresh()
    assert network.directory.choose(NEED).node in (A, B, C)


def test_equals_share_the_traffic() -> None:
    network = Network()
    network.refresh()
    assert all(0.28 < share < 0.39 for share in network.shares().values())


def test_cheaper_gets_more_and_far_dearer_gets_none() -> None:
    network = Network(a=100, b=130, c=1000)
    for host in network.answers:
        network.answers[host]["input_price"] = network.answers[host]["output_price"] = 100
    network.refresh()
    shares = network.shares()
    assert shares[A] > shares[B] > 0.2 and shares[C] == 0
    assert "of the best" in network.reasons()[C]


def test_a_free_node_does_not_break_the_score() -> None:
    network = Network(a=0, b=0, c=0)
    for host in network.answers:
        network.answers[host].update(input_price=0, output_price=0)
    network.refresh()
    assert all(share > 0.2 for share in network.shares().values())


def test_slow_busy_and_failing_nodes_get_less() -> None:
    network = Network()
    directory = network.refresh()
    for node, total in ((A, 1.0), (B, 3.0), (C, 1.0)):
        directory.started(node)
        directory.succeeded(node, 0.1, total, 100)
    shares = network.shares()
    assert shares[B] < shares[A]
    network.answers["node1"] = info(A, running=3)
    network.refresh()
    assert network.shares()[A] < shares[A]
    network.answers["node1"] = info(A, running=4)
    network.refresh()
    assert network.reasons()[A] == "busy"


def test_a_failing_node_is_benched_for_a_growing_time_and_comes_back() -> None:
    network = Network()
    directory = network.refresh()
    for count in range(12):
        directory.started(A)
        directory.failed(A, "it stopped")
        assert "benched" in network.reasons()[A] and "it stopped" in network.reasons()[A]
        bench = min(LONGEST_BENCH_SECONDS, FIRST_BENCH_SECONDS * 2**count)
        network.clock.now += bench - 0.01
        assert "benched" in network.reasons()[A]
        network.clock.now += 0.02
        assert "benched" not in network.reasons()[A]
    assert network.shares()[A] < 0.1
    for _ in range(30):
        directory.started(A)
        directory.succeeded(A, 0.1, 1.0, 10)
    assert network.shares()[A] > 0.2


def test_a_client_that_leaves_is_not_the_nodes_fault() -> None:
    network = Network()
    directory = network.refresh()
    directory.started(A)
    directory.failed(A, "client_left", blame=False)
    assert network.reasons()[A] in ("", "lost the draw")
    assert directory._standing[A].in_flight == 0


def test_barred_and_underfunded_nodes() -> None:
    network = Network()
    network.refresh()
    most = NEED.max_fee(Offer(MODEL_ID, 1, 1, 1))
    options = {"barred": {A: "already tried"}, "free_escrow": {B: most - 1, C: most}}
    assert network.directory.choose(NEED, **options).node == C
    reasons = network.reasons(**options)
    assert reasons[A] == "already tried" and "escrow" in reasons[B]
    with pytest.raises(NoNode, match="already tried"):
        network.directory.choose(NEED, barred=dict.fromkeys((A, B, C), "already tried"))
    with pytest.raises(NoNode, match="does not offer"):
        network.directory.choose(Need(MODEL_ID, 2, 1, 1))


def test_an_empty_network() -> None:
    directory = NodeDirectory(ScriptedChain(), httpx.AsyncClient(transport=httpx.MockTransport(lambda _: None)))  # type: ignore[arg-type,return-value]
    with pytest.raises(NoNode, match="none is registered"):
        directory.choose(NEED)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://a:b@host",
        "http://host/?x=1",
        "http://host:99999",
        "host:80",
    ],
)
def test_strange_endpoints_are_not_called(endpoint: str) -> None:
    assert endpoint_problem(endpoint, private_allowed=True)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:80",
        "http://10.0.0.1",
        "http://169.254.169.254",
        "http://[::1]:80",
        "http://localhost",
        "http://0",
    ],
)
def test_private_endpoints_are_called_only_where_that_is_wanted(endpoint: str) -> None:
    assert endpoint_problem(endpoint, private_allowed=False)
    assert endpoint_problem(endpoint, private_allowed=True) == ""
    assert endpoint_problem("http://93.184.216.34:80", private_allowed=False) == ""
