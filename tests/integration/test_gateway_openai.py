"""The OpenAI API through the unmodified `openai` SDK, over scripted nodes with real signatures."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from poip_chain.spec.objects import Receipt, client_seed_from_integer
from poip_chain.spec.transcript import Transcript
from tests.engines.gateway_kit import GATEWAY, MODEL, GatewayKit, running_gateway
from tests.engines.scripted_chain import ScriptedChain
from tests.engines.scripted_node import Fault, ScriptedNode, change_receipt

HELLO = "Hello, wörld 🌍."
MESSAGES: Any = [{"role": "user", "content": "Hi!"}]


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[GatewayKit]:
    chain = ScriptedChain()
    node = ScriptedNode(chain, reply=lambda _: list(HELLO.encode()))
    # The tiny tokenizer's ids are the letters of the byte alphabet in order, so text is encoded by it, not by bytes.
    with running_gateway(tmp_path, chain, [node]) as kit:
        say(kit, HELLO)
        yield kit


def say(kit: GatewayKit, text: str) -> None:
    """Script what all nodes answer."""
    ids = kit.gateway.catalogue.models[0].tokenizer.encode_text(text)
    for node in kit.nodes:
        node.reply = lambda _: ids


def client(kit: GatewayKit, **options: Any) -> openai.OpenAI:
    settings = {"base_url": f"{kit.url}/v1", "api_key": kit.api_key, "max_retries": 0, "timeout": 20, **options}
    return openai.OpenAI(**settings)


def test_chat(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        raw = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=100, seed=7)
        answer = raw.parse()
        assert answer.choices[0].message.content == HELLO
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(HELLO.encode()) + 1
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        proof = answer.poip["proof"]  # type: ignore[attr-defined]
        receipt: Receipt = Receipt.from_json(proof["receipt"])
        assert Transcript.from_json(proof["transcript"]).root() == receipt.transcript_root
        assert proof["request"]["client_seed"] == "0x" + client_seed_from_integer(7).hex()
        text = raw.headers["x-poip-receipt"]
        header = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        assert header["receipt"] == proof["receipt"] and "transcript" not in header
        kit.run(kit.gateway.settle())
        assert kit.node.paid == receipt.fee == receipt.payer_cum


def test_chat_streaming_with_usage(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        stream = sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=100, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO
    assert all("�" not in (chunk.choices[0].delta.content or "") for chunk in chunks if chunk.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].poip["proof"]["receipt"]  # type: ignore[attr-defined]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(HELLO.encode()) + 1


def test_streaming_without_usage_has_none(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        chunks = list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_sdks_own_stream_helper(kit: GatewayKit) -> None:
    with client(kit) as sdk, sdk.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=100) as stream:
        assert stream.get_final_completion().choices[0].message.content == HELLO


def test_completions(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        answer = sdk.completions.create(model=MODEL, prompt="Once upon", max_tokens=100)
        assert answer.choices[0].text == HELLO
        assert answer.usage is not None and answer.usage.prompt_tokens == 9
        chunks = list(sdk.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=100, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == HELLO
        assert kit.node.received[-1]["prompt_ids"] == [1, 2, 3]


def test_async_client(kit: GatewayKit) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{kit.url}/v1", api_key=kit.api_key, max_retries=0) as sdk:

            async def one(index: int) -> None:
                answer = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100)
                assert answer.choices[0].message.content == HELLO
                stream = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                assert text == HELLO

            await asyncio.gather(*(one(index) for index in range(5)))

    asyncio.run(work())
    kit.run(kit.gateway.settle())
    assert kit.node.paid == kit.node.payer_cum[GATEWAY.address] > 0


def test_models(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        (model,) = sdk.models.list().data
        assert model.id == MODEL
        assert model.poip["max_context"] == 1024 and model.poip["nodes"] == 1  # type: ignore[attr-defined]
        assert sdk.models.retrieve(MODEL).id == MODEL
        by_id = model.poip["model_id"]  # type: ignore[attr-defined]
        assert sdk.chat.completions.create(model=by_id, messages=MESSAGES, max_tokens=5).model == MODEL
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("gpt-7")


BAD = {
    "unknown model": ({"model": "gpt-7"}, 404, "model_not_found", "model"),
    "n": ({"n": 2}, 400, "unsupported_parameter", "n"),
    "logprobs": ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
    "top_p": ({"top_p": 0.5}, 400, "unsupported_parameter", "top_p"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        400,
        "unsupported_parameter",
        "tools",
    ),
    "json mode": ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    "cold": ({"temperature": 0.01}, 400, "unsupported_parameter", "temperature"),
    "hot": ({"temperature": 3}, 400, "invalid_request", "temperature"),
    "negative": ({"max_tokens": -1}, 400, "invalid_request", "max_tokens"),
    "zero": ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    "huge": ({"max_tokens": 10**30}, 400, "invalid_request", "max_tokens"),
    "too long": ({"max_tokens": 1024}, 400, "context_length_exceeded", "messages"),
    "far too long": (
        {"messages": [{"role": "user", "content": "a" * 50_000}]},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "text for number": ({"max_tokens": "5"}, 400, "invalid_request", "max_tokens"),
    "bool for number": ({"max_tokens": True}, 400, "invalid_request", "max_tokens"),
    "huge seed": ({"seed": 2**63}, 400, "invalid_request", "seed"),
    "unknown": ({"extra_body": {"wishes": 3}}, 400, "unknown_parameter", "wishes"),
    "stop": ({"stop": ["a", "b", "c", "d", "e"]}, 400, "invalid_request", "stop"),
    "nonce": ({"extra_body": {"poip_user_nonce": "0x12"}}, 400, "invalid_request", "poip_user_nonce"),
    "two seeds": (
        {"seed": 1, "extra_body": {"poip_user_nonce": "0x" + "12" * 32}},
        400,
        "invalid_request",
        "poip_user_nonce",
    ),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_request", "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "invalid_request",
        "messages",
    ),
    "empty": ({"messages": []}, 400, "invalid_request", "messages"),
    "surrogate": ({"messages": [{"role": "user", "content": "\\ud800"}]}, 400, "invalid_request", "messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_openai_errors_and_cost_nothing(kit: GatewayKit, name: str) -> None:
    changes, status, code, param = BAD[name]
    with client(kit) as sdk, pytest.raises(openai.APIStatusError) as caught:
        if name == "surrogate":
            raw = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "?"}]}).replace("?", "\\ud800")
            sdk.post("/chat/completions", cast_to=object, content=raw.encode())
        sdk.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **changes})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    assert kit.node.received == []


def test_neutral_parameters_are_taken(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi!"}]}],
            max_completion_tokens=100,
            n=1,
            top_p=1,
            logprobs=False,
            frequency_penalty=0,
            presence_penalty=0.0,
            user="someone",
            store=False,
            metadata={"a": "b"},
            response_format={"type": "text"},
            temperature=0,
        )
    assert answer.choices[0].message.content == HELLO
    assert kit.node.received[-1]["params"]["temperature_milli"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_cancel_the_node(kit: GatewayKit, stream: bool) -> None:
    say(kit, "one two three four")
    kit.node.faults.append(Fault(silent_after=12))
    with client(kit) as sdk:
        options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, "stop": ["three", " thr"]}
        if stream:
            chunks = list(sdk.chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason, poip = chunks[-1].choices[0].finish_reason, chunks[-1].poip
        else:
            answer = sdk.chat.completions.create(**options)
            text, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
            poip = answer.poip  # type: ignore[attr-defined]
    assert (text, reason) == ("one two", "stop")
    receipt: Receipt = Receipt.from_json(poip["proof"]["receipt"])
    assert receipt.finish_reason == 2 and receipt.output_tokens <= 12
    kit.run(kit.gateway.settle())
    assert kit.node.paid == receipt.fee


def test_the_users_nonce_decides_the_seed(kit: GatewayKit) -> None:
    from poip_chain.spec.objects import client_seed_from_nonces

    nonce = secrets.token_bytes(32)
    with client(kit) as sdk:
        answer = sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=100, extra_body={"poip_user_nonce": nonce.hex()}
        )
    proof = answer.poip["proof"]  # type: ignore[attr-defined]
    assert proof["user_nonce"] == "0x" + nonce.hex()
    seed = client_seed_from_nonces(nonce, bytes.fromhex(proof["gateway_nonce"][2:]))
    assert proof["request"]["client_seed"] == "0x" + seed.hex()


@pytest.mark.parametrize("key", ["", "poip", "poip-0123456789ab-" + "0" * 64, "x" * 10_000, "poip-é-ü"])
def test_wrong_api_keys(kit: GatewayKit, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".strip().encode()}
    answer = httpx.post(f"{kit.url}/v1/chat/completions", json={}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert len(key) < 8 or key not in answer.text
    with client(kit, api_key="poip-nope") as sdk, pytest.raises(openai.AuthenticationError):
        sdk.models.list()


def test_spend_caps(kit: GatewayKit) -> None:
    fee_of_five = 10 * len(kit.gateway.catalogue.models[0].tokenizer.encode_chat(MESSAGES)) + 5 * 20
    with client(kit, api_key=kit.new_key("poor", cap=fee_of_five)) as sdk:
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6)
        assert (caught.value.status_code, caught.value.code) == (402, "insufficient_funds")
        assert kit.node.received == []
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
        with pytest.raises(openai.APIStatusError):
            sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    poor = next(key for key in kit.gateway.store.api_keys() if key.name == "poor")
    assert (poor.spent, poor.open) == (fee_of_five, 0)


def test_raw_bodies(kit: GatewayKit) -> None:
    headers = {"authorization": f"Bearer {kit.api_key}"}
    url = f"{kit.url}/v1/chat/completions"
    for body, status, code in (
        (b"", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"{" * 500_000, 400, "invalid_json"),
        (b'{"model": "a", "model": "b"}', 400, "invalid_json"),
        (b"x" * (3 * 2**20), 413, "request_too_large"),
    ):
        answer = httpx.post(url, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert httpx.get(url).json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{kit.url}/v1/nothing").json()["error"]["code"] == "unknown_url"


def test_health_metrics_and_nodes(kit: GatewayKit) -> None:
    with client(kit) as sdk:
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
    assert httpx.get(f"{kit.url}/healthz").json() == {"status": "ok", "usable_nodes": 1}
    text = httpx.get(f"{kit.url}/metrics").text
    assert 'poip_gateway_requests_total{endpoint="chat",status="200"} 1.0' in text
    assert 'poip_gateway_tokens_total{kind="completion"} 5.0' in text
    assert kit.node.address not in text
    assert httpx.get(f"{kit.url}/poip/v1/nodes").status_code == 401
    (row,) = httpx.get(f"{kit.url}/poip/v1/nodes", headers={"authorization": f"Bearer {kit.api_key}"}).json()["nodes"]
    assert row["node"] == kit.node.address and row["why_not_chosen"] is None


def test_a_wrong_answer_is_an_error_and_unpaid(kit: GatewayKit) -> None:
    kit.node.faults.append(Fault(change=change_receipt(fee=lambda r: r.fee + 1, payer_cum=10**9, node_cum=10**9)))
    with client(kit) as sdk, pytest.raises(openai.APIStatusError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100)
    assert (caught.value.status_code, caught.value.code) == (502, "bad_answer")
    kit.run(kit.gateway.settle())
    assert kit.node.vouchers == []
    (key,) = kit.gateway.store.api_keys()
    assert (key.spent, key.open) == (0, 0)
