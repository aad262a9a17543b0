"""The node's HTTP API on a real socket: streams, disconnects, hostile bodies, who may read what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from poip_chain.service.node.admission import MAX_BODY_BYTES
from poip_chain.service.node.answers import ACCESS_HEADER, TranscriptQuery
from poip_chain.service.node.http import create_app
from poip_chain.spec.objects import Receipt
from poip_chain.spec.transcript import Transcript
from tests.engines.node_kit import Kit, flat, key_of, request_hash
from tests.engines.serving import serving

# One client for all: reading the certificates of the public web, which nothing here needs, takes longer than a request.
HTTP = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture
def url(kit: Kit) -> Iterator[str]:
    with serving(create_app(kit.node)) as base:
        yield base


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert lines[0].startswith("event: ") and lines[1].startswith("data: ")
            events.append((lines[0][7:], json.loads(lines[1][6:])))
    return events


def post(url: str, body: Any) -> list[tuple[str, dict[str, Any]]]:
    response = HTTP.post(f"{url}/v1/requests", json=body, timeout=20)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def test_a_request_streams_tokens_and_a_receipt(kit: Kit, url: str) -> None:
    body = kit.client.body()
    events = post(url, body)
    assert [name for name, _ in events] == ["token"] * (len(events) - 1) + ["receipt"]
    assert [data["i"] for _, data in events[:-1]] == list(range(len(events) - 1))
    final = events[-1][1]
    assert set(final) == {"receipt", "signature", "transcript"}
    receipt, transcript = Receipt.from_json(final["receipt"]), Transcript.from_json(final["transcript"])
    assert transcript.root() == receipt.transcript_root
    assert list(transcript.output_ids) == [data["id"] for _, data in events[:-1]]
    found = HTTP.get(f"{url}/v1/requests/0x{request_hash(body).hex()}").json()
    assert found == {"receipt": final["receipt"], "signature": final["signature"]}
    assert post(url, body) == events[-1:]


def test_info_health_and_metrics(kit: Kit, url: str) -> None:
    post(url, kit.client.body())
    info = HTTP.get(f"{url}/v1/info").json()
    assert info["node"] == info["node_key"] == kit.key.address
    assert (info["next_seq"], info["running"], info["capacity"], info["chain_id"]) == (1, 0, 16, 31337)
    assert set(info["deployment"]) == {"log", "vault", "registry"}
    kit.node.jobs.step()
    health = HTTP.get(f"{url}/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    kit.chain.down = True
    kit.node.jobs.step()
    health = HTTP.get(f"{url}/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "down")
    text = HTTP.get(f"{url}/metrics").text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert names and all(name.startswith("poip_node_") for name in names)
    assert "poip_node_receipts 1.0" in text and 'poip_node_requests_total{outcome="stop"} 1.0' in text
    assert "poip_node_chain_up 0.0" in text and "0x" not in text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"\xff\xfe{}", 400),
        (b'{"request": NaN}', 400),
        (b'{"request": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 100_000, 400),
        (b'{"request": {}, "request": {}}', 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
@pytest.mark.parametrize("path", ["/v1/requests", "/v1/vouchers"])
def test_hostile_bodies(kit: Kit, url: str, path: str, body: bytes, status: int) -> None:
    response = HTTP.post(url + path, content=body, timeout=20)
    assert response.status_code == status
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert len(response.content) < 2000
    assert kit.node.store.next_seq() == 0


def test_a_chunked_body_is_bounded_too(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 65_536

    # The node may close while the client still sends.
    with httpx.Client(timeout=20) as client, contextlib.suppress(httpx.TransportError):
        assert client.post(f"{url}/v1/requests", content=endless()).status_code == 413


def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"body_timeout": 0.2})

    def slow() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    with serving(create_app(kit.node)) as url:
        response = HTTP.post(f"{url}/v1/requests", content=slow(), timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "slow_body")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/requests/0x12",
        "/v1/requests/zz",
        "/v1/batches/x/receipts",
        "/v1/batches/-1/receipts",
        "/v1/batches/99999999999999999999999/receipts",
        "/v1/batches/1/transcripts/x",
    ],
)
def test_bad_paths(url: str, path: str) -> None:
    response = HTTP.get(url + path)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/docs", "/openapi.json", "/v1/batches/7/receipts"])
def test_unknown_paths(url: str, path: str) -> None:
    response = HTTP.get(url + path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_statuses_of_refusals(kit: Kit, url: str) -> None:
    def status(**changes: Any) -> tuple[int, str]:
        response = HTTP.post(f"{url}/v1/requests", json=kit.client.body(**changes), timeout=20)
        return response.status_code, response.json()["error"]["code"]

    assert status(client=key_of("x").address) == (401, "invalid_signature")
    assert status(model_id=bytes(32)) == (404, "model_not_found")
    assert status(deadline=5) == (408, "deadline_passed")
    kit.chain.down = True
    assert status() == (503, "unavailable")
    kit.chain.down = False
    kit.chain.state.escrow.clear()
    assert status() == (402, "insufficient_escrow")
    assert status(prompt=(1,) * 300, max_tokens=1) == (400, "context_length_exceeded")
    assert 'poip_node_refusals_total{code="insufficient_escrow"} 1.0' in HTTP.get(f"{url}/metrics").text


def test_an_engine_failure_before_the_first_token_has_a_status(kit: Kit, url: str) -> None:
    kit.engine.fail_after = 0
    response = HTTP.post(f"{url}/v1/requests", json=kit.client.body(), timeout=20)
    assert response.status_code == 503 and response.headers["retry-after"] == "5"


def test_an_engine_failure_later_is_an_event(kit: Kit, url: str) -> None:
    kit.engine.fail_after = 2
    kit.node.settings.__dict__["heartbeat"] = 5.0
    events = post(url, kit.client.body())
    assert [name for name, _ in events] == ["token", "token", "error"]
    assert events[-1][1]["error"]["code"] == "unavailable"


def test_a_disconnect_cancels_and_the_receipt_is_kept(kit: Kit, url: str) -> None:
    body = kit.client.body()
    kit.engine.gate = asyncio.Semaphore(3)
    done = threading.Event()
    original = kit.node.store.issue

    def issue(*arguments: Any) -> Any:
        try:
            return original(*arguments)
        finally:
            done.set()

    kit.node.store.issue = issue  # type: ignore[method-assign]
    with httpx.stream("POST", f"{url}/v1/requests", json=body, timeout=20) as response:
        lines = response.iter_lines()
        seen = 0
        while seen < 3:
            seen += next(lines).startswith("event: token")
        assert HTTP.get(f"{url}/v1/requests/0x{request_hash(body).hex()}").status_code == 409
    assert done.wait(10)
    found = HTTP.get(f"{url}/v1/requests/0x{request_hash(body).hex()}")
    assert found.status_code == 200
    receipt: Receipt = Receipt.from_json(found.json()["receipt"])
    assert (receipt.finish_reason, receipt.output_tokens) == (2, 3)
    assert kit.engine.closed == 1


def test_silence_is_filled_with_heartbeats(kit: Kit, url: str) -> None:
    kit.engine.gate = asyncio.Semaphore(0)
    with httpx.stream("POST", f"{url}/v1/requests", json=kit.client.body(), timeout=20) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        kit.engine.gate.release()
        while not next(lines).startswith("event: token"):
            pass


def test_vouchers(kit: Kit, url: str) -> None:
    body = kit.client.body(voucher=flat(kit.client.voucher(5)))
    receipt = Receipt.from_json(post(url, body)[-1][1]["receipt"])
    voucher = kit.client.voucher(receipt.payer_cum, receipt)
    assert HTTP.post(f"{url}/v1/vouchers", json=voucher).status_code == 204
    assert HTTP.post(f"{url}/v1/vouchers", json=voucher).status_code == 204
    forged = {**voucher, "signature": "0x" + "11" * 65}
    assert HTTP.post(f"{url}/v1/vouchers", json=forged).status_code == 401
    assert kit.node.store.paid(kit.client.address) == receipt.payer_cum


def test_who_may_read_transcripts(kit: Kit, url: str) -> None:
    receipts = [kit.ask(max_tokens=2) for _ in range(4)]
    kit.node.jobs.step()
    kit.chain.mine()
    kit.node.jobs.step()
    leaves = HTTP.get(f"{url}/v1/batches/1/receipts").json()["receipts"]
    assert [Receipt.from_json(leaf["receipt"]) for leaf in leaves] == receipts
    # Before the beacon nobody but the client may read.
    assert {HTTP.get(f"{url}/v1/batches/1/transcripts/{i}").status_code for i in range(4)} == {403}
    kit.chain.mine()
    kit.chain.mine()
    answers = [HTTP.get(f"{url}/v1/batches/1/transcripts/{i}") for i in range(4)]
    batch = kit.chain.state.batches[1]
    expected = [200 if kit.node.transcripts.is_selected(batch, i) else 403 for i in range(4)]
    assert [a.status_code for a in answers] == expected and set(expected) == {200, 403}
    served = next(a.json() for a in answers if a.status_code == 200)
    assert set(served) == {"request", "request_signature", "params", "receipt", "signature", "transcript"}
    hidden = expected.index(403)

    def ask(signer: str, seconds: int, number: int = hidden) -> int:
        deadline = kit.chain.state.time + seconds
        query = TranscriptQuery(receipts[hidden].request_hash, deadline)
        key = kit.client.key if signer == "client" else key_of(signer)
        signature = query.sign(kit.node.served.log_domain, key.private_key)
        headers = {ACCESS_HEADER: f"{deadline}:0x{signature.hex()}"}
        return HTTP.get(f"{url}/v1/batches/1/transcripts/{number}", headers=headers).status_code

    assert ask("client", 60) == 200
    assert ask("stranger", 60) == 403
    assert ask("client", -1) == 403
    assert ask("client", 10_000) == 403
    assert HTTP.get(f"{url}/v1/batches/1/transcripts/{hidden}", headers={ACCESS_HEADER: "1:0x12"}).status_code == 403
    assert HTTP.get(f"{url}/v1/batches/1/transcripts/{hidden}", headers={ACCESS_HEADER: "x"}).status_code == 400
    assert HTTP.get(f"{url}/v1/batches/1/transcripts/4").status_code == 404
