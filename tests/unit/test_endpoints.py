"""Connections to endpoints of strangers: a name leads only where it was looked at, and never into a private network."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from poip_chain.chain import endpoints
from poip_chain.chain.endpoints import node_transport, public_addresses
from poip_chain.control.nodes import endpoint_problem
from poip_chain.errors import Refused
from poip_chain.proof.fetch import NodeReader, NodeWithholds
from tests.engines.serving import serving
from tests.support.records import batch_of, record

PUBLIC = "93.184.216.34"
NAME = "node.example"


@pytest.fixture
def port() -> Iterator[int]:
    """A service on this machine that a stranger wants to be called."""

    async def answer(http: Request) -> JSONResponse:
        return JSONResponse({"host": http.headers["host"]})

    with serving(Starlette(routes=[Route("/{path:path}", answer)])) as url:
        yield int(url.rpartition(":")[2])


class Names:
    """A name server that gives these answers for NAME, one after the other, the last for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.answers, self.asked, real = list(answers), 0, socket.getaddrinfo

        def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host not in (NAME, NAME.encode()):
                return real(host, port, *args, **options)
            self.asked += 1
            addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return [entry for address in addresses for entry in real(address, port, *args, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


def get(url: str, private_allowed: bool) -> Any:
    async def ask() -> Any:
        async with httpx.AsyncClient(transport=node_transport(private_allowed), timeout=5, trust_env=False) as http:
            return (await http.get(url)).json()

    return asyncio.run(ask())


def test_a_name_that_changes_its_answer_leads_nowhere_else(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public while it is looked at, the loopback address when it is called."""
    url = f"http://{NAME}:{port}"
    Names(monkeypatch, [PUBLIC], ["127.0.0.1"])
    assert endpoint_problem(url, private_allowed=False) == ""
    with pytest.raises(httpx.ConnectError, match="private network"):
        get(url, private_allowed=False)
    assert get(url, private_allowed=True) == {"host": f"{NAME}:{port}"}


def test_one_look_decides_where_a_connection_goes(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was looked at is called, under the name's own Host; the next one if it does not answer."""
    monkeypatch.setattr(endpoints, "_is_public", lambda address: address != "127.0.0.9")
    names = Names(monkeypatch, ["127.0.0.2", "127.0.0.1"], ["127.0.0.9"])
    assert get(f"http://{NAME}:{port}", private_allowed=False) == {"host": f"{NAME}:{port}"}
    assert names.asked == 1


def test_an_auditor_does_not_read_from_private_addresses(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, ["127.0.0.1"])
    for host in ("127.0.0.1", NAME):
        with pytest.raises(NodeWithholds, match="private network"):
            NodeReader(f"http://{host}:{port}", 5, private_endpoints=False).receipts(batch_of(record()))
        with pytest.raises(NodeWithholds, match="did not serve its"):
            NodeReader(f"http://{host}:{port}", 5).receipts(batch_of(record()))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "224.0.0.1", "0.0.0.0", "::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1",
     "64:ff9b::a00:1", "2002:a00:1::", "ff02::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(Refused, match="private network"):
        public_addresses(address, 80)


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, [PUBLIC, "10.0.0.1"])
    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        public_addresses(NAME, 80)


def test_public_addresses_and_strange_names() -> None:
    assert public_addresses(PUBLIC, 443) == [PUBLIC]
    with pytest.raises(OSError, match="no host name"):
        public_addresses("a" * 70 + ".example", 80)
