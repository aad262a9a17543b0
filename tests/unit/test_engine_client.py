"""The engine client against a scripted HTTP server (no inference): what it accepts, and all that it refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from poip_chain.errors import IntegrityError, InvalidInput, Unavailable
from poip_chain.service.engine.client import (
    EngineClient,
    EngineToken,
    InputMismatch,
    fingerprint_entries,
    sampler_margin,
)
from poip_chain.spec import sampler
from poip_chain.spec.transcript import prompt_root
from tests.engines.scripted_engine import Event, ScriptedEngine, token_event

PROMPT = [5, 6, 7]
SEED = bytes(range(32))
EOS = 2
LOGPROBS = {token: -0.1 - 0.7 * k for k, token in enumerate((11, 12, 13, EOS, 14, 15, 16, 17, 18))}


def answer(position: int, temperature: int = 700) -> int:
    """The listed token that the normative sampler prefers at a position."""
    key = sampler.position_key(SEED, position)

    def score(token: int) -> int:
        noise = sampler.gumbel(sampler.uniform_bits(key, token))
        return sampler.noised(sampler.quantise_logit(LOGPROBS[token]), temperature, noise)

    return max(LOGPROBS, key=score)


def honest(body: dict[str, Any]) -> list[Event]:
    """What a server with the plugin would stream over the distribution above."""
    events: list[Event] = []
    for position in range(body["max_tokens"]):
        token = answer(position, body["vllm_xargs"]["poip_temperature_milli"])
        ends = token in body["stop_token_ids"]
        finish = "stop" if ends else "length" if position == body["max_tokens"] - 1 else None
        prompt = body["prompt"] if position == 0 else None
        events.append(token_event(token, LOGPROBS[token], LOGPROBS, finish=finish, prompt=prompt))
        if ends:
            break
    return events


def run(engine: ScriptedEngine, **changes: Any) -> list[EngineToken]:
    """All tokens of one request to the engine."""
    request: dict[str, Any] = {
        "seed": SEED,
        "temperature_milli": 700,
        "max_tokens": 5,
        "prompt_root": prompt_root(PROMPT),
        "end_token_ids": [EOS],
        "ignore_eos": True,
        **changes,
    }

    async def collect() -> list[EngineToken]:
        async with EngineClient(engine.url, "poip", read_timeout_seconds=5) as client:
            return [token async for token in client.generate(PROMPT, **request)]

    return asyncio.run(collect())


def test_tokens_arrive_with_their_neighbours_and_a_finish_reason() -> None:
    with ScriptedEngine(honest) as engine:
        tokens = run(engine)
    assert [t.token_id for t in tokens] == [answer(p) for p in range(5)]
    assert [t.finish_reason for t in tokens] == [None] * 4 + ["length"]
    assert tokens[0].top[0] == (11, -0.1) and len(tokens[0].top) == 9
    body = engine.requests[0]
    assert body["temperature"] == 0 and body["logprobs"] >= 9 and body["stream"] is True
    assert body["vllm_xargs"] == {
        "poip_seed": SEED.hex(),
        "poip_temperature_milli": 700,
        "poip_prompt_root": prompt_root(PROMPT).hex(),
        "poip_prompt_tokens": 3,
    }


def test_end_tokens_stop_unless_ignored() -> None:
    ends = next(p for p in range(1000) if answer(p) == EOS)
    with ScriptedEngine(honest) as engine:
        tokens = run(engine, ignore_eos=False, max_tokens=1000)
        assert engine.requests[0]["stop_token_ids"] == [EOS]
        assert len(tokens) == ends + 1 and tokens[-1].finish_reason == "stop"
        assert len(run(engine, max_tokens=ends + 3)) == ends + 3
        assert engine.requests[1]["stop_token_ids"] == [] and engine.requests[1]["ignore_eos"] is True


def test_leaving_the_stream_closes_the_request() -> None:
    def start(body: dict[str, Any]) -> list[Event]:
        return honest(body)[:1]

    with ScriptedEngine(start, hold=True) as engine:

        async def leave() -> None:
            async with EngineClient(engine.url, "poip") as client:
                stream = client.generate(
                    PROMPT,
                    seed=SEED,
                    temperature_milli=700,
                    max_tokens=9,
                    prompt_root=prompt_root(PROMPT),
                    end_token_ids=[EOS],
                )
                async for _ in stream:
                    break
                await stream.aclose()
                assert await asyncio.to_thread(engine.aborted.wait, 10)

        asyncio.run(leave())


def change(position: int, **fields: Any) -> Callable[[dict[str, Any]], list[Event]]:
    """The honest answer with some fields of one event's choice replaced."""

    def script(body: dict[str, Any]) -> list[Event]:
        events = honest(body)
        event = events[position]
        assert isinstance(event, dict)
        event["choices"][0] |= fields
        return events

    return script


def chosen(position: int, token: int, logprob: float) -> Callable[[dict[str, Any]], list[Event]]:
    """The honest answer with another token at one position."""

    def script(body: dict[str, Any]) -> list[Event]:
        events = honest(body)
        prompt = PROMPT if position == 0 else None
        events[position] = token_event(token, logprob, LOGPROBS, prompt=prompt)
        return events

    return script


def raw(*pieces: bytes) -> Callable[[dict[str, Any]], Sequence[Event]]:
    return lambda body: pieces


@pytest.mark.parametrize(
    ("script", "error", "why"),
    [
        (chosen(0, 99, -30.0), InputMismatch, "do not hash to the request's prompt_root"),
        (change(0, prompt_token_ids=[5, 6]), InputMismatch, "another prompt"),
        (chosen(2, 18, -5.0), IntegrityError, "position 2 .* short of the normative"),
        (chosen(0, next(t for t in (12, 11) if t != answer(0)), -0.1), IntegrityError, "logits processor"),
        (change(0, prompt_token_ids=None), IntegrityError, "no prompt before"),
        (change(1, token_ids=["x"]), IntegrityError, "not a token id"),
        (change(1, token_ids=[-1]), IntegrityError, "not a token id"),
        (change(1, token_ids=[True]), IntegrityError, "not a token id"),
        (change(1, logprobs=None), IntegrityError, "without log-probabilities"),
        (
            change(1, logprobs={"token_logprobs": [], "top_logprobs": []}),
            IntegrityError,
            "another number of log-probabilities",
        ),
        (
            change(1, logprobs={"token_logprobs": [-1.0], "top_logprobs": [{"word": -1.0}]}),
            IntegrityError,
            "as text",
        ),
        (
            change(1, logprobs={"token_logprobs": [math.nan], "top_logprobs": [{}]}),
            IntegrityError,
            "not JSON",
        ),
        (
            change(1, logprobs={"token_logprobs": ["-1"], "top_logprobs": [{}]}),
            IntegrityError,
            "for a log-probability",
        ),
        (change(1, finish_reason="stop"), IntegrityError, "no end token"),
        (change(1, finish_reason="length"), Unavailable, "context ended after 2 of 5"),
        (change(1, finish_reason="error"), Unavailable, "'error'"),
        (change(4, finish_reason=None), IntegrityError, "did not finish"),
        (lambda body: [*honest(body), token_event(11, -0.1, LOGPROBS)], IntegrityError, "more tokens"),
        (lambda body: [{"error": {"message": "engine dead"}}], Unavailable, "engine dead"),
        (lambda body: [{"error": {"message": "no such thing", "code": 400}}], InvalidInput, "no such thing"),
        (lambda body: [{"error": "text"}], Unavailable, "text"),
        (raw(b"data: {]\n\n"), IntegrityError, "not JSON"),
        (raw(b'data: {"choices": []}\n\n'), IntegrityError, "exactly one choice"),
        (raw(b"data: [1]\n\n"), IntegrityError, "exactly one choice"),
        (raw(b"data: " + b"x" * (1 << 21)), IntegrityError, "more than 1048576 bytes"),
        (raw(b": nothing\n\n"), Unavailable, "broke off its answer after 0"),
        (lambda body: honest(body)[:2], Unavailable, "broke off its answer after 2"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(
    script: Callable[[dict[str, Any]], Sequence[Event]], error: type[Exception], why: str
) -> None:
    with ScriptedEngine(script) as engine, pytest.raises(error, match=why):
        run(engine)


def test_a_token_after_the_end_is_refused() -> None:
    def script(body: dict[str, Any]) -> list[Event]:
        return honest({**body, "stop_token_ids": []})

    with ScriptedEngine(script) as engine, pytest.raises(IntegrityError, match="went on after end token"):
        run(engine, ignore_eos=False, max_tokens=1000)


@pytest.mark.parametrize(("status", "error"), [(400, InvalidInput), (404, InvalidInput), (500, Unavailable)])
def test_http_errors_become_ours(status: int, error: type[Exception]) -> None:
    with ScriptedEngine(honest, status=status) as engine, pytest.raises(error, match="scripted refusal"):
        run(engine)


def test_a_cut_connection_is_unavailable() -> None:
    def script(body: dict[str, Any]) -> list[Event]:
        return honest(body)[:3]

    with ScriptedEngine(script, break_off=True) as engine, pytest.raises(Unavailable):
        run(engine)


def test_an_absent_engine_is_unavailable_and_unhealthy() -> None:
    async def ask() -> None:
        async with EngineClient("http://127.0.0.1:9", "poip") as client:
            assert await client.health() is False
            with pytest.raises(Unavailable, match="does not answer"):
                await client.model_info()

    asyncio.run(ask())


def test_model_info() -> None:
    async def ask(engine: ScriptedEngine) -> None:
        async with EngineClient(engine.url, "poip") as client:
            assert await client.health() is True
            info = await client.model_info()
            assert (info.max_model_len, info.statement) == (64, "vllm 0.0-scripted")
            engine.models = {"data": [{"id": "other"}]}
            with pytest.raises(IntegrityError, match="does not serve a model named 'poip'"):
                await client.model_info()

    with ScriptedEngine(honest) as engine:
        asyncio.run(ask(engine))


def test_fingerprint_rounds_saturates_and_orders() -> None:
    # In 1/64 nat: 0.5 and 1.5 round to even (0 and 2), equal values are ordered by id.
    values = {9: 0.5 / 64, 4: 1.5 / 64, 7: -1.0, 6: -1.0, 1: -9999.0, 3: -2.0, 8: -3.0, 5: 600.0}
    top = tuple((token, -1.0 + value) for token, value in values.items())
    token = EngineToken(2, -1.0, ((2, -1.0), *top))
    assert fingerprint_entries(token) == (
        (5, 32767), (4, 2), (9, 0), (6, -64), (7, -64), (3, -128), (8, -192), (1, -32768),
    )  # fmt: skip
    with pytest.raises(IntegrityError, match="listed 7 tokens"):
        fingerprint_entries(EngineToken(2, -1.0, top[:7]))


def test_sampler_margin_is_zero_for_the_winner_alone() -> None:
    top = tuple(LOGPROBS.items())
    for token in LOGPROBS:
        margin = sampler_margin(EngineToken(token, LOGPROBS[token], top), SEED, 4, 700)
        assert (margin == 0) == (token == answer(4))
