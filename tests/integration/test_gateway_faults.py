"""Nodes that fail, clients that leave, money that is short: what the gateway does, seen from both sides."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from poip_chain.control.checks import SignedRequest
from poip_chain.control.gateway.serving import Gateway
from poip_chain.service.engine.tokenizer import Tokenizer
from poip_chain.spec.objects import FinishReason, Receipt, Request
from poip_chain.spec.types import Address
from tests.engines.gateway_kit import GATEWAY, MODEL, GatewayKit, running_gateway
from tests.engines.scripted_chain import ScriptedChain
from tests.engines.scripted_node import Fault, ScriptedNode, change_transcript
from tests.integration.node_world import wait_until
from tests.integration.test_gateway_openai import MESSAGES, client, say

TEXT = "A text that is long enough."


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[GatewayKit]:
    """Two nodes; the first is much cheaper, so it is asked first."""
    chain = ScriptedChain()
    cheap = ScriptedNode(chain, name="cheap", input_price=1, output_price=2)
    dear = ScriptedNode(chain, name="dear", input_price=10, output_price=20)
    with running_gateway(tmp_path, chain, [cheap, dear]) as kit:
        kit.gateway.directory.rng = random.Random(1)
        say(kit, TEXT)
        yield kit


def ask(kit: GatewayKit, **options: Any) -> Any:
    with client(kit) as sdk:
        return sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, **options)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


BEFORE_THE_FIRST_BYTE = {
    "busy": Fault(refuse=(429, "busy")),
    "engine down": Fault(refuse=(503, "engine_unavailable")),
    "server error": Fault(refuse=(500, "internal_error")),
    "closes at once": Fault(stop_after=0),
    "reports a failure": Fault(error_after=0),
    "garbage": Fault(raw=b"event: token\ndata: nonsense\n\n", forget=True),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_BYTE)
@pytest.mark.parametrize("stream", [False, True])
def test_another_node_is_asked_before_the_first_byte(pair: GatewayKit, name: str, stream: bool) -> None:
    cheap, dear = pair.nodes
    cheap.faults.append(BEFORE_THE_FIRST_BYTE[name])
    if stream:
        with client(pair) as sdk:
            chunks = list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    else:
        assert text_of(ask(pair)) == TEXT
    assert (len(cheap.received), len(dear.received)) == (1, 1)
    pair.run(pair.gateway.settle())
    assert cheap.vouchers == [] and dear.paid == dear.payer_cum[GATEWAY.address] > 0


def test_settling_does_not_close_the_spending_of_a_request_that_is_about_to_run(
    pair: GatewayKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed early it would count as free: settle right after its money was set aside."""
    gateway = pair.gateway
    reserve = gateway.store.reserve

    def reserve_and_close(key_id: str, request_hash: bytes, most: int) -> None:
        reserve(key_id, request_hash, most)
        gateway._close_spending()

    monkeypatch.setattr(gateway.store, "reserve", reserve_and_close)
    assert text_of(ask(pair)) == TEXT
    ((draft, _),) = pair.nodes[0].stored.values()
    (key,) = gateway.store.api_keys()
    assert (key.spent, key.open) == (draft.receipt.fee, 0)
    assert gateway._live == set()


def test_settling_does_not_close_the_spending_of_a_request_between_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = ScriptedChain()
    nodes = [ScriptedNode(chain, name=name) for name in ("one", "other")]
    with running_gateway(tmp_path, chain, nodes) as kit:
        say(kit, TEXT)
        for node in nodes:
            node.faults.append(Fault(refuse=(429, "busy")))
        abandon = kit.gateway.client.abandon

        async def abandon_and_settle(signed: SignedRequest, node: Address, reason: str) -> str:
            state = await abandon(signed, node, reason)
            await kit.gateway.settle()
            for other in nodes:
                other.faults.clear()
            return state

        monkeypatch.setattr(kit.gateway.client, "abandon", abandon_and_settle)
        assert text_of(ask(kit)) == TEXT
        (fee,) = [draft.receipt.fee for node in nodes for draft, _ in node.stored.values()]
        (key,) = kit.gateway.store.api_keys()
        assert (key.spent, key.open) == (fee, 0)


def test_an_unregistered_port_is_no_obstacle(pair: GatewayKit) -> None:
    cheap, dear = pair.nodes
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        standing = pair.gateway.directory._standing[cheap.address]
        standing.node = type(standing.node)(cheap.address, url, True, "", 1, (cheap.offer(),))
        assert text_of(ask(pair)) == TEXT
    assert len(dear.received) == 1 and cheap.received == []


def test_a_node_that_stops_mid_stream(pair: GatewayKit) -> None:
    """A streamed answer ends in an error; what came is paid once its receipt is there; nothing is paid twice."""
    cheap, dear = pair.nodes
    cheap.faults.append(Fault(stop_after=5))
    with client(pair) as sdk:
        stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="after 5 tokens"):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert text == TEXT[:5] and dear.received == []
    pair.run(pair.gateway.aclose())
    pair.run(pair.gateway.settle())
    ((draft, _),) = cheap.stored.values()
    assert draft.receipt.finish_reason == FinishReason.CANCELLED
    assert cheap.paid == draft.receipt.fee
    (key,) = pair.gateway.store.api_keys()
    assert (key.spent, key.open) == (draft.receipt.fee, 0)


def test_an_unstreamed_answer_is_retried_even_mid_stream(pair: GatewayKit) -> None:
    cheap, dear = pair.nodes
    cheap.faults.append(Fault(stop_after=5))
    assert text_of(ask(pair)) == TEXT
    pair.run(pair.gateway.aclose())
    pair.run(pair.gateway.settle())
    assert cheap.vouchers == [] and dear.paid > 0
    states = {attempt.node: attempt.state for attempt in pair.gateway.client.ledger.attempts("unpaid", "checked")}
    assert states == {cheap.address: "unpaid", dear.address: "checked"}


def test_a_key_whose_cap_allows_one_answer_gets_it_from_the_second_node(pair: GatewayKit) -> None:
    """What is given up is not paid: it must not take the cap from the node that answers, nor be counted later."""
    cheap, dear = pair.nodes
    prompt = len(pair.gateway.catalogue.models[0].tokenizer.encode_chat(MESSAGES))
    most = prompt * 10 + 100 * 20
    pair.api_key = pair.gateway.store.create_key("capped", most, 0)[1]
    cheap.faults.append(Fault(stop_after=5))
    assert text_of(ask(pair)) == TEXT
    pair.run(pair.gateway.aclose())
    pair.run(pair.gateway.settle())
    ((draft, _),) = dear.stored.values()
    capped = next(key for key in pair.gateway.store.api_keys() if key.name == "capped")
    assert (capped.spent, capped.open) == (draft.receipt.fee, 0)
    assert cheap.paid == 0 and dear.paid == draft.receipt.fee


def test_no_second_node_is_asked_once_the_first_is_paid(pair: GatewayKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settling in the background may accept the first node's receipt before the attempt is given up."""
    cheap, dear = pair.nodes
    cheap.faults.append(Fault(stop_after=5))
    abandon = pair.gateway.client.abandon

    async def settle_and_abandon(signed: SignedRequest, node: Address, reason: str) -> str:
        (attempt,) = pair.gateway.client.ledger.of_request(signed.request_hash)
        answer = await pair.gateway.client.recover(attempt, pair.gateway.catalogue.models[0].profile, wait=10)
        assert answer is not None
        return await abandon(signed, node, reason)

    monkeypatch.setattr(pair.gateway.client, "abandon", settle_and_abandon)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(pair)
    assert (caught.value.status_code, caught.value.code) == (502, "node_stopped")
    assert dear.received == []
    pair.run(pair.gateway.aclose())
    pair.run(pair.gateway.settle())
    ((draft, _),) = cheap.stored.values()
    (key,) = pair.gateway.store.api_keys()
    assert cheap.paid == draft.receipt.fee == key.spent and key.open == 0


def test_two_nodes_hold_receipts_for_one_question_and_one_is_paid(tmp_path: Path) -> None:
    """Each is asked by a request of its own, which no other node may answer, and with the same seed."""
    chain = ScriptedChain()
    first, second = (ScriptedNode(chain, name=name) for name in ("first", "second"))
    with running_gateway(tmp_path, chain, [first, second]) as kit:
        say(kit, TEXT)
        for node in kit.nodes:
            node.faults.append(Fault(drop_receipt=True))
        kit.nodes[1].faults.clear()
        kit.gateway.directory.started(kit.nodes[1].address)
        for _ in range(7):
            kit.gateway.directory.started(kit.nodes[1].address)
        kit.gateway.directory._standing[kit.nodes[1].address].capacity = 9
        kit.gateway.directory.rng = random.Random(0)
        assert text_of(ask(kit)) == TEXT
        assert [len(node.received) for node in kit.nodes] == [1, 1]
        one, other = (Request.from_json(node.received[0]["request"]) for node in kit.nodes)
        assert (one.node, other.node) == (first.address, second.address)
        assert one.seed() == other.seed() and one.struct_hash() != other.struct_hash()
        assert len(first.stored) == len(second.stored) == 1
        kit.run(kit.gateway.aclose())
        kit.run(kit.gateway.settle())
        assert first.vouchers == [] and second.paid > 0


def test_no_node_can_take_it(pair: GatewayKit) -> None:
    for node in pair.nodes:
        node.faults.append(Fault(refuse=(429, "busy")))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(pair)
    assert (caught.value.status_code, caught.value.code) == (503, "no_node_available")
    assert caught.value.response.headers["retry-after"]
    (key,) = pair.gateway.store.api_keys()
    pair.run(pair.gateway.settle())
    assert (key.spent, pair.gateway.store.api_keys()[0].open) == (0, 0)


def test_the_reasons_are_explained(pair: GatewayKit) -> None:
    cheap, _ = pair.nodes
    cheap.faults.append(Fault(refuse=(503, "engine_unavailable")))
    ask(pair)
    headers = {"authorization": f"Bearer {pair.api_key}"}
    rows = {row["node"]: row for row in httpx.get(f"{pair.url}/poip/v1/nodes", headers=headers).json()["nodes"]}
    assert rows[cheap.address]["why_not_chosen"] == "engine_unavailable"


def test_a_client_that_aborts_cancels_the_node_and_pays_for_what_came(pair: GatewayKit) -> None:
    cheap, _ = pair.nodes
    cheap.faults.append(Fault(silent_after=6))
    with client(pair) as sdk:
        stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True)
        seen = ""
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            if len(seen) == 6:
                break
        stream.close()
    assert cheap.cancelled.wait(10), "the node must notice"
    pair.run(pair.gateway.aclose())
    ((draft, _),) = cheap.stored.values()
    assert draft.receipt.output_tokens == 6
    assert cheap.paid == draft.receipt.fee
    pair.run(pair.gateway.settle())
    (key,) = pair.gateway.store.api_keys()
    assert (key.spent, key.open) == (draft.receipt.fee, 0)
    assert pair.gateway.running == 0


def test_an_unstreamed_client_that_aborts_cancels_the_node(pair: GatewayKit) -> None:
    cheap, _ = pair.nodes
    cheap.faults.append(Fault(silent_after=6))
    with client(pair, timeout=0.5) as sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100)
    assert cheap.cancelled.wait(10)


def test_silence_brings_heartbeats_and_then_the_answer(tmp_path: Path) -> None:
    chain = ScriptedChain()
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)], heartbeat=0.1) as kit:
        say(kit, TEXT)
        kit.node.faults.append(Fault(silent_after=0))
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, "stream": True}
        headers = {"authorization": f"Bearer {kit.api_key}"}
        lines: list[str] = []
        with httpx.stream("POST", f"{kit.url}/v1/chat/completions", json=body, headers=headers) as response:
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": heartbeat") == 2:
                    kit.node.release()
        assert lines[0] == ": heartbeat" and lines.count(": heartbeat") >= 2
        assert "data: [DONE]" in lines


def test_an_error_after_heartbeats_is_an_event(tmp_path: Path) -> None:
    chain = ScriptedChain()
    changes = {"heartbeat": 0.05, "first_token_timeout": 0.5}
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)], **changes) as kit:
        kit.node.faults.append(Fault(silent_after=0, forget=True))
        with client(kit) as sdk, pytest.raises(openai.APIError, match="silent"):
            list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9, stream=True))


def test_a_wrong_answer_goes_elsewhere_and_blocks_the_node(pair: GatewayKit) -> None:
    cheap, dear = pair.nodes
    cheap.faults.append(Fault(change=change_transcript(prompt_ids=(1, 2, 3))))
    assert text_of(ask(pair)) == TEXT
    assert text_of(ask(pair)) == TEXT
    assert (len(cheap.received), len(dear.received)) == (1, 2)
    assert cheap.vouchers == []


def test_a_gateway_without_escrow_asks_nobody(tmp_path: Path) -> None:
    chain = ScriptedChain()
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)], escrow=100) as kit:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(kit)
        assert (caught.value.status_code, caught.value.code) == (503, "no_node_available")
        assert "escrow" in caught.value.message and kit.node.received == []


def test_one_escrow_promised_to_many_requests(tmp_path: Path) -> None:
    """Escrow for two requests at one node and for none at the other; five arrive at once: two are served."""
    chain = ScriptedChain()
    funded, broke = ScriptedNode(chain, name="funded"), ScriptedNode(chain, name="broke")
    with running_gateway(tmp_path, chain, [funded, broke]) as kit:
        say(kit, TEXT)
        prompt = len(kit.gateway.catalogue.models[0].tokenizer.encode_chat(MESSAGES))
        most = prompt * 10 + 100 * 20
        chain.fund(GATEWAY.address, funded.address, 2 * most)
        chain.fund(GATEWAY.address, broke.address, 0)
        kit.run(kit.gateway.refresh())
        for _ in range(5):
            funded.faults.append(Fault(silent_after=1))

        async def one(sdk: openai.AsyncOpenAI) -> int:
            try:
                await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100)
            except openai.APIStatusError as error:
                assert error.code == "no_node_available"
                if len(funded.received) == 2:
                    funded.release()
                return error.status_code
            return 200

        async def all_at_once() -> list[int]:
            async with openai.AsyncOpenAI(base_url=f"{kit.url}/v1", api_key=kit.api_key, max_retries=0) as sdk:
                return await asyncio.gather(*(one(sdk) for _ in range(5)))

        assert sorted(asyncio.run(all_at_once())) == [200, 200, 503, 503, 503]
        assert len(funded.received) == 2 and broke.received == []
        kit.run(kit.gateway.settle())
        assert funded.paid <= 2 * most


def test_a_client_that_never_pays_is_refused_by_the_node(tmp_path: Path) -> None:
    chain = ScriptedChain()
    node = ScriptedNode(chain, demand_voucher=True)
    with running_gateway(tmp_path, chain, [node], allow_prepaid=False) as kit:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(kit)
        assert caught.value.status_code == 503
        assert "voucher_due" in caught.value.message
        assert node.stored == {} and node.vouchers == []


def test_the_chain_goes_away_and_comes_back(pair: GatewayKit) -> None:
    pair.chain.down = True
    with pytest.raises(openai.APIStatusError) as caught:
        ask(pair)
    assert caught.value.status_code == 503
    assert all(node.received == [] for node in pair.nodes)
    pair.chain.down = False
    assert text_of(ask(pair)) == TEXT


def test_too_many_requests(tmp_path: Path) -> None:
    chain = ScriptedChain()
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)], max_concurrent=1) as kit:
        say(kit, TEXT)
        kit.node.faults.append(Fault(silent_after=3))
        with client(kit) as sdk:
            stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True)
            next(stream)
            with pytest.raises(openai.RateLimitError):
                ask(kit)
            kit.node.release()
            list(stream)
        assert text_of(ask(kit)) == TEXT


def test_texts_are_tokenised_in_places_and_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that take for ever: no more than there are places for, and a running stream goes on."""
    chain = ScriptedChain()
    with running_gateway(tmp_path, chain, [ScriptedNode(chain)], max_concurrent=40) as kit:
        say(kit, TEXT)
        kit.node.faults.append(Fault(silent_after=3))
        encode, gate, begun = Tokenizer.encode_text, threading.Event(), threading.Semaphore(0)

        def slow(self: Tokenizer, text: str, *, most: int | None = None) -> tuple[int, ...]:
            begun.release()
            assert gate.wait(30)
            return encode(self, text, most=most)

        monkeypatch.setattr(Tokenizer, "encode_text", slow)
        body = {"model": MODEL, "prompt": "x", "max_tokens": 100}
        with client(kit) as sdk, ThreadPoolExecutor(39) as clients:
            stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True)
            next(stream)
            headers = {"authorization": f"Bearer {kit.api_key}"}
            asked = [
                clients.submit(httpx.post, f"{kit.url}/v1/completions", json=body, headers=headers, timeout=30)
                for _ in range(39)
            ]
            try:
                assert begun.acquire(timeout=10)
                wait_until(lambda: kit.gateway.running == 40, 10, lambda: f"{kit.gateway.running} places are taken")
                # Before its text is looked at: a place is needed for that.
                with pytest.raises(openai.RateLimitError):
                    sdk.completions.create(**body)
                kit.node.release()
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
            finally:
                gate.set()
            assert {answer.result().status_code for answer in asked} <= {200, 503}
        wait_until(lambda: kit.gateway.running == 0, 10, lambda: f"{kit.gateway.running} places are taken")


def test_a_restarted_gateway_settles_what_it_owes(tmp_path: Path) -> None:
    chain = ScriptedChain()
    node = ScriptedNode(chain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gateway, "_settle_soon", lambda *_: None)
        with running_gateway(tmp_path, chain, [node]) as kit:
            say(kit, TEXT)
            node.faults.append(Fault(drop_receipt=True))
            with pytest.raises(openai.APIError), client(kit) as sdk:
                list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True))
            assert node.vouchers == []
    with running_gateway(tmp_path, chain, [node]) as kit:
        kit.run(kit.gateway.settle())
        assert node.paid == node.payer_cum[GATEWAY.address] > 0
        kit.run(kit.gateway.settle())
        assert len(node.vouchers) == 1
        assert [key.open for key in kit.gateway.store.api_keys()] == [0, 0]


def test_logs_hold_no_prompts_answers_or_keys(
    pair: GatewayKit, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "the-crown-jewels"
    say(pair, secret[::-1])
    pair.nodes[0].faults.append(Fault(refuse=(503, "engine_unavailable")))
    messages: Any = [{"role": "user", "content": secret}]
    with client(pair) as sdk:
        sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=50)
        with pytest.raises(openai.APIStatusError):
            sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=5000)
    ours = [record for record in caplog.records if not record.name.startswith(("openai", "httpcore", "httpx"))]
    written = "".join(capfd.readouterr()) + "".join(record.getMessage() for record in ours)
    for hidden in (secret, secret[::-1], pair.api_key, pair.api_key.split("-")[2]):
        assert hidden not in written


def test_the_receipt_of_each_answer_is_its_own(pair: GatewayKit) -> None:
    begun = time.monotonic()
    receipts = [Receipt.from_json(ask(pair).poip["proof"]["receipt"]) for _ in range(3)]
    assert len({receipt.request_hash for receipt in receipts}) == 3
    assert time.monotonic() - begun < 60
