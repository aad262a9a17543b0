"""A real vLLM engine with our plugin: normative sampling, the input check, hostile requests, and clean stops."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from poip_chain.errors import InvalidInput
from poip_chain.service.engine.client import EngineClient, EngineToken, InputMismatch, fingerprint_entries
from poip_chain.service.engine.noise import GumbelSampler, quantise_array
from poip_chain.spec import sampler, scores
from poip_chain.spec.transcript import prompt_root
from tests.e2e.conftest import Engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SEED = bytes(range(32))
WEIGHTS_ROOT = "a121c76330f60f234a15ed624aa519fb71a1a97e9d4cbff07107c989586b5b33"
MODEL_ID = "2c596bb043f243abd0c7bd5fa48c2e932a4e6ef4799083bf32f9981fe3f2ef30"


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    message = [{"role": "user", "content": "Tell me about the sea."}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return list(ids)


def request(engine: Engine, prompt: list[int], **changes: Any) -> dict[str, Any]:
    """Arguments of EngineClient.generate."""
    return {
        "seed": SEED,
        "temperature_milli": 700,
        "max_tokens": 24,
        "prompt_root": prompt_root(prompt),
        "end_token_ids": engine.hashes.end_token_ids,
        **changes,
    }


def generate(engine: Engine, prompt: list[int], *requests: dict[str, Any]) -> list[list[EngineToken]]:
    """The answers to several requests at once; the client checks every token against the sampler."""

    async def one(client: EngineClient, changes: dict[str, Any]) -> list[EngineToken]:
        return [token async for token in client.generate(prompt, **request(engine, prompt, **changes))]

    async def every() -> list[list[EngineToken]]:
        async with EngineClient(engine.url, engine.served_name) as client:
            return await asyncio.gather(*(one(client, changes) for changes in requests))

    return asyncio.run(every())


def ids(tokens: list[EngineToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_the_default_model_has_everybodys_id(engine: Engine) -> None:
    assert engine.hashes.weights_root.hex() == WEIGHTS_ROOT
    assert engine.hashes.model_id.hex() == MODEL_ID


def test_the_server_says_what_it_is(engine: Engine) -> None:
    async def ask() -> None:
        async with EngineClient(engine.url, engine.served_name) as client:
            assert await client.health()
            info = await client.model_info()
            assert info.max_model_len == engine.server.options.max_model_len
            assert info.statement.startswith("vllm ")

    asyncio.run(ask())


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(engine: Engine, prompt: list[int]) -> None:
    (alone,) = generate(engine, prompt, {})
    batch = generate(engine, prompt, {}, *({"seed": bytes([i]) * 32} for i in range(7)))
    (again,) = generate(engine, prompt, {})
    assert ids(alone) == ids(again)
    assert len({tuple(ids(tokens)) for tokens in batch}) > 4, "the seed has no effect"
    # A batch is computed in other shapes, so a near tie may fall otherwise; the start does not depend on it.
    assert ids(batch[0])[:4] == ids(alone)[:4]


def test_greedy_is_the_most_likely_token(engine: Engine, prompt: list[int]) -> None:
    (tokens,) = generate(engine, prompt, {"temperature_milli": 0})
    assert all(token.logprob == token.top[0][1] for token in tokens)


def test_finish_reasons(engine: Engine, prompt: list[int]) -> None:
    (cut, forced) = generate(
        engine, prompt, {"max_tokens": 3, "ignore_eos": True}, {"stop_token_ids": list(range(100, 49_000))[:8]}
    )
    assert cut[-1].finish_reason == "length" and len(cut) == 3
    assert forced[-1].finish_reason in ("stop", "length")
    (greedy,) = generate(engine, prompt, {"temperature_milli": 0, "max_tokens": 8})
    (stopped,) = generate(
        engine, prompt, {"temperature_milli": 0, "max_tokens": 8, "stop_token_ids": [greedy[4].token_id]}
    )
    assert stopped[-1].finish_reason == "stop" and len(stopped) == ids(greedy).index(greedy[4].token_id) + 1


def test_honest_scores_are_small_and_a_wrong_seed_is_not(engine: Engine, prompt: list[int]) -> None:
    """Recompute by one float32 prefill: the engine's bf16 noise stays within the verification page's figures."""
    (tokens,) = generate(engine, prompt, {"max_tokens": 64, "ignore_eos": True})
    model = AutoModelForCausalLM.from_pretrained(engine.model_dir, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + ids(tokens)[:-1]])).logits[0, len(prompt) - 1 :]

    def margins(seed: bytes) -> list[int]:
        keys = [sampler.position_key(seed, i) for i in range(len(tokens))]
        best = GumbelSampler().sample(rows, range(len(tokens)), keys, [700] * len(tokens))
        logits = quantise_array(rows.numpy())
        result = []
        for i, token in enumerate(tokens):
            noised = [
                sampler.noised(int(logits[i, v]), 700, sampler.gumbel(sampler.uniform_bits(keys[i], v)))
                for v in (best[i], token.token_id)
            ]
            result.append(scores.margin_between(*noised))
        return result

    honest, wrong = margins(SEED), margins(bytes(32))
    assert max(honest) < 65536 and sum(honest) / len(honest) < 0.02 * 65536
    assert sum(wrong) / len(wrong) > 0.3 * 65536
    logits = quantise_array(rows.numpy())
    for i, token in enumerate(tokens):
        for other, stated in fingerprint_entries(token):
            canonical = scores.canonical_value(int(logits[i, other]), int(logits[i, token.token_id]))
            assert abs(stated - canonical) < 64, "a difference of logits is off by more than one nat"


def test_an_altered_prompt_is_refused_inside_the_engine(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(InputMismatch, match="do not hash to the request's prompt_root"):
        generate(engine, prompt, {"prompt_root": prompt_root([*prompt[:-1], 5])})
    (tokens,) = generate(engine, prompt, {"max_tokens": 2, "ignore_eos": True})
    assert len(tokens) == 2, "the engine does not serve any more"


def test_leaving_a_stream_aborts_it_in_the_engine(engine: Engine, prompt: list[int]) -> None:
    def running() -> float:
        text = httpx.get(f"{engine.url}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.split()[-1]) for line in lines)

    async def leave() -> None:
        async with EngineClient(engine.url, engine.served_name) as client:
            stream = client.generate(prompt, **request(engine, prompt, max_tokens=1500, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()

    asyncio.run(leave())
    deadline = time.monotonic() + 30
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running() == 0


def hostile_bodies(prompt: list[int]) -> list[dict[str, Any]]:
    """Requests that must be refused with a 4xx status."""
    good = {
        "poip_seed": SEED.hex(),
        "poip_temperature_milli": 700,
        "poip_prompt_root": prompt_root(prompt).hex(),
        "poip_prompt_tokens": len(prompt),
    }
    arguments: list[Any] = [
        {**good, "poip_seed": "zz"},
        {**good, "poip_seed": 5},
        {**good, "poip_seed": ["00"] * 32},
        {**good, "poip_seed": {"a": 1}},
        {**good, "poip_seed": "0" * 100_000},
        {**good, "poip_temperature_milli": -1},
        {**good, "poip_temperature_milli": 1.5},
        {**good, "poip_temperature_milli": 2**63},
        {**good, "poip_temperature_milli": 2**200},
        {**good, "poip_temperature_milli": "hot"},
        {**good, "poip_prompt_tokens": 0},
        {**good, "poip_extra": 1},
        {"poip_seed": SEED.hex()},
        {"anything": 2**80},
        {"anything": [2**80]},
        "garbage",
        [1, 2],
    ]
    bodies: list[dict[str, Any]] = [{"vllm_xargs": value} for value in arguments]
    bodies += [
        {"vllm_xargs": good, **fields}
        for fields in (
            {"temperature": 0.7},
            {"n": 2},
            {"logit_bias": {"5": 3}},
            {"min_tokens": 2},
            {"frequency_penalty": 1},
            {"repetition_penalty": 1.5},
            {"prompt": [10**12]},
            {"prompt": [-1]},
            {"prompt": [60_000]},
            {"prompt": []},
            {"prompt": [1] * 5000},
            {"max_tokens": -1},
            {"logprobs": 1000},
        )
    ]
    return [{"model": "poip", "prompt": prompt, "max_tokens": 2, "temperature": 0, **body} for body in bodies]


def test_hostile_requests_get_an_error_and_the_engine_lives(engine: Engine, prompt: list[int]) -> None:
    with httpx.Client(base_url=engine.url, timeout=60, trust_env=False) as http:
        for body in hostile_bodies(prompt):
            answer = http.post("/v1/completions", content=json.dumps(body))
            assert 400 <= answer.status_code < 500, (str(body)[:200], answer.status_code, answer.text[:200])
        # A false count of prompt tokens is well-formed; it is refused inside the engine.
        assert http.get("/health").status_code == 200
    (tokens,) = generate(engine, prompt, {"max_tokens": 2, "ignore_eos": True})
    assert len(tokens) == 2


def test_a_malformed_request_is_our_invalid_input(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(InvalidInput, match="poip_temperature_milli"):
        generate(engine, prompt, {"temperature_milli": -5})
