"""Reading from a node that wants to cheat, stall or crash its reader: whatever it does is withholding."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from poip_chain.proof import fetch
from poip_chain.proof.fetch import NodeReader, NodeWithholds, checked_record, fetch_all
from poip_chain.spec.objects import Part
from poip_chain.spec.transcript import Transcript
from tests.engines.serving import serving
from tests.support.records import batch_of, record, served

RECORDS = tuple(record(seq=seq) for seq in range(3))
BATCH = batch_of(*RECORDS)
TIMEOUT = 1.0


def receipts_body() -> dict[str, Any]:
    return {"receipts": [{"receipt": r.receipt.to_json(), "signature": "0x" + "22" * 65} for r in RECORDS]}


class Node:
    """A server that answers everything with `reply`."""

    def __init__(self) -> None:
        self.reply: Callable[[HttpRequest], Response] = lambda request: json_reply({})
        self.paths: list[str] = []

    async def serve(self, request: HttpRequest) -> Response:
        self.paths.append(request.url.path)
        return self.reply(request)


def json_reply(document: Any) -> Response:
    return Response(json.dumps(document), media_type="application/json")


@pytest.fixture(scope="module")
def served_node() -> Iterator[tuple[Node, str]]:
    node = Node()
    with serving(Starlette(routes=[Route("/{path:path}", node.serve)])) as url:
        yield node, url


@pytest.fixture
def node(served_node: tuple[Node, str]) -> Node:
    served_node[0].paths.clear()
    return served_node[0]


@pytest.fixture
def reader(served_node: tuple[Node, str]) -> NodeReader:
    return NodeReader(served_node[1], TIMEOUT * 5)


def test_an_honest_node_is_read(node: Node, reader: NodeReader) -> None:
    node.reply = lambda request: json_reply(receipts_body())
    assert reader.receipts(BATCH) == receipts_body()["receipts"]
    node.reply = lambda request: json_reply(served(RECORDS[1]))
    assert reader.record(BATCH, 1, RECORDS[1].receipt) == RECORDS[1]
    assert node.paths == ["/v1/batches/7/receipts", "/v1/batches/7/transcripts/1"]


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Response:
    document = receipts_body()
    changed = change(document)
    return json_reply(document if changed is None else changed)


HOSTILE_RECEIPTS: dict[str, Callable[[HttpRequest], Response]] = {
    "nothing": lambda r: Response(b""),
    "no JSON": lambda r: Response(b"{'receipts': 5"),
    "no text": lambda r: Response(b"\xff\xfe\x00"),
    "no object": lambda r: json_reply([receipts_body()]),
    "deep JSON": lambda r: Response(b"[" * 200_000),
    "a long number": lambda r: Response(b'{"receipts": ' + b"9" * 10_000 + b"}"),
    "no receipts": lambda r: json_reply({"receipts": 5}),
    "too few": lambda r: spoilt(lambda d: d["receipts"].pop() and None),
    "too many": lambda r: spoilt(lambda d: d["receipts"].append(d["receipts"][0])),
    "another order": lambda r: spoilt(lambda d: d["receipts"].reverse()),
    "another fee": lambda r: spoilt(lambda d: d["receipts"][0]["receipt"].update(fee="12345")),
    "a negative number": lambda r: spoilt(lambda d: d["receipts"][0]["receipt"].update(seq=-1)),
    "a huge number": lambda r: spoilt(lambda d: d["receipts"][0]["receipt"].update(seq=2**70)),
    "a text for a number": lambda r: spoilt(lambda d: d["receipts"][0]["receipt"].update(seq="0")),
    "a short signature": lambda r: spoilt(lambda d: d["receipts"][0].update(signature="0x22")),
    "entries that are texts": lambda r: json_reply({"receipts": ["x", "y", "z"]}),
    "entries that are null": lambda r: json_reply({"receipts": [None] * 3}),
    "an error": lambda r: Response(json.dumps(receipts_body()), status_code=500),
    "a redirect": lambda r: RedirectResponse("/elsewhere"),
    "a compressed body": lambda r: Response(b"\x1f\x8b", headers={"content-encoding": "gzip"}),
}


@pytest.mark.parametrize("name", HOSTILE_RECEIPTS)
def test_hostile_receipts_are_withholding(node: Node, reader: NodeReader, name: str) -> None:
    node.reply = HOSTILE_RECEIPTS[name]
    with pytest.raises(NodeWithholds):
        reader.receipts(BATCH)
    assert node.paths == ["/v1/batches/7/receipts"]  # a redirect is not followed


def changed(**fields: Any) -> dict[str, Any]:
    document = served(RECORDS[0])
    document["transcript"] = {**document["transcript"], **fields}
    return document


HOSTILE_RECORDS: dict[str, Any] = {
    "another record": served(RECORDS[1]),
    "another token": changed(output_ids=[1, 2, 3]),
    "fewer tokens": changed(output_ids=[300]),
    "a token id too large": changed(output_ids=[2**32, 301, 302]),
    "a token that is true": changed(output_ids=[True, 301, 302]),
    "tokens as text": changed(output_ids="300"),
    "half a character": changed(engine_statement="\ud800"),
    "a long statement": changed(engine_statement="x" * 257),
    "fingerprints cut off": changed(fingerprints="0x00"),
    "no such reason": changed(finish_reason="tired"),
    "a reason that is a list": changed(finish_reason=[]),
    "another statement": changed(engine_statement="better"),
    "no transcript": {**served(RECORDS[0]), "transcript": None},
    "no request": {key: value for key, value in served(RECORDS[0]).items() if key != "request"},
    "other parameters": {**served(RECORDS[0]), "params": {**served(RECORDS[0])["params"], "top_k": 1}},
    "a request of somebody else": {**served(RECORDS[0]), "request": served(RECORDS[1])["request"]},
}


@pytest.mark.parametrize("name", HOSTILE_RECORDS)
def test_hostile_records_are_withholding(node: Node, reader: NodeReader, name: str) -> None:
    node.reply = lambda request: json_reply(HOSTILE_RECORDS[name])
    with pytest.raises(NodeWithholds):
        reader.record(BATCH, 0, RECORDS[0].receipt)


def test_a_node_cannot_state_the_hash_of_a_statement_that_it_hides(node: Node, reader: NodeReader) -> None:
    document = {**changed(engine_statement="better"), "statement_hash": "0x" + RECORDS[0].statement_hash.hex()}
    node.reply = lambda request: json_reply(document)
    with pytest.raises(NodeWithholds):
        reader.record(BATCH, 0, RECORDS[0].receipt)


def positions(count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple((i, -i) for i in range(8)) for _ in range(count))


@pytest.mark.parametrize(
    "changes",
    [{"fingerprints": positions(8)}, {"fingerprints": positions(17)}, {"output_ids": tuple(range(300, 340))}],
)
def test_a_transcript_with_leaves_that_no_proof_fits_counts_as_withheld(changes: dict[str, Any]) -> None:
    """The node committed to another number of leaves than request and receipt say: no contract takes their proofs."""
    short = record(output_tokens=9, **changes)
    with pytest.raises(NodeWithholds, match="leaves"):
        checked_record(short, short.receipt)


def test_faults_that_a_leaf_proves_are_let_through() -> None:
    short = record(output_tokens=9, output_ids=tuple(range(300, 308)))
    assert checked_record(short, short.receipt) == short
    empty = record(output_tokens=9, output_ids=(), fingerprints=())
    assert checked_record(empty, empty.receipt).transcript.leaves(Part.OUTPUT) == []
    assert isinstance(empty.transcript, Transcript)


def test_an_oversized_body_is_cut_off(node: Node, reader: NodeReader, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 4096
            await asyncio.sleep(0)  # or the server's loop never learns that the reader has gone, and spins for ever

    monkeypatch.setattr(fetch, "MAX_RECEIPTS_BYTES", 10_000)
    node.reply = lambda request: StreamingResponse(endless())
    with pytest.raises(NodeWithholds, match="more than 10000 bytes"):
        reader.receipts(BATCH)
    assert sent < 100_000


def test_a_body_that_drips_is_given_up_in_time(node: Node, served_node: tuple[Node, str]) -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    node.reply = lambda request: StreamingResponse(drip())
    start = time.monotonic()
    with pytest.raises(NodeWithholds, match="within"):
        NodeReader(served_node[1], TIMEOUT).receipts(BATCH)
    assert time.monotonic() - start < 10 * TIMEOUT


class Raw:
    """A TCP server whose one connection is played by `play(socket, stop)`."""

    def __init__(self, play: Callable[[socket.socket, threading.Event], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop = threading.Event()
        self._play = play
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        # The reader goes when it has had enough, as it should.
        with connection, contextlib.suppress(OSError):
            self._play(connection, self._stop)

    def __enter__(self) -> str:
        self._thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._listener.close()


def test_headers_that_drip_are_given_up_in_time() -> None:
    def play(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not stop.wait(0.05):
            connection.sendall(b"x")

    start = time.monotonic()
    with Raw(play) as url, pytest.raises(NodeWithholds, match="within"):
        NodeReader(url, TIMEOUT).receipts(BATCH)
    assert time.monotonic() - start < 10 * TIMEOUT


def test_what_is_no_http_is_withholding() -> None:
    with Raw(lambda connection, stop: connection.sendall(b"\0\1\2 hello\r\n\r\n")) as url, pytest.raises(NodeWithholds):
        NodeReader(url, TIMEOUT).receipts(BATCH)


@pytest.mark.parametrize(
    "endpoint",
    ["", "x", "ftp://node", "file:///etc/passwd", "http://node?x=", "http://node#", "http://u:p@node", "http://[",
     "http://127.0.0.1:1", "http://no such host", "http://127.0.0.1:99999", "https://127.0.0.1:1"],
)  # fmt: skip
def test_an_endpoint_that_leads_nowhere_is_withholding(endpoint: str) -> None:
    with pytest.raises(NodeWithholds):
        NodeReader(endpoint, TIMEOUT).receipts(BATCH)


def test_nodes_are_asked_side_by_side_and_a_slow_one_costs_only_its_own_time() -> None:
    release = threading.Event()

    def slow() -> str:
        release.wait(20)
        return "slow"

    def fast() -> str:
        release.set()  # the slow one is under way, or nobody would come here
        return "fast"

    def refusing() -> str:
        raise NodeWithholds("no")

    first, second, third, last = fetch_all([("a", slow), ("b", fast), ("c", refusing), ("a", fast)], seconds=1000)
    assert (first, second, last) == ("slow", "fast", "fast")
    assert isinstance(third, NodeWithholds)
    assert fetch_all([("a", fast)], seconds=0) == [None]
    assert fetch_all([], seconds=1) == []
