"""What a client asks for: OpenAI request bodies, validated and turned into an `Ask`.

A parameter that would change the answer and cannot be honoured is refused, never ignored; one at its neutral value is
accepted, and one without any effect on the answer (such as `user`) is dropped. Nothing here knows nodes or money.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from poip_chain.control.gateway.catalogue import Catalogue, ServedModel
from poip_chain.control.gateway.errors import ApiError, bad_request, unsupported
from poip_chain.errors import InvalidInput
from poip_chain.service.engine.tokenizer import TooLong, conversation
from poip_chain.spec.objects import MAX_STOP_TOKENS, SamplingParams, client_seed_from_integer, client_seed_from_nonces

B = TypeVar("B", bound="_Body")

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
DEFAULT_TEMPERATURE_MILLI = 1000

NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Accepted and dropped: they do not change the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1, 1.0),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Parameters that are not supported, and the values of each that ask for nothing."""

REASONS = {
    "n": "one answer per request: each has its own receipt. Send the request several times instead.",
    "logprobs": "the sampler's exact inputs are in the proof's fingerprints; log probabilities are not served.",
    "top_p": "the network's sampler has a temperature only: leave top_p at 1.",
    "top_k": "the network's sampler has a temperature only: leave top_k at 0.",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """A validated request, ready to be signed. `client_seed` comes from `seed`, from both nonces, or is random."""

    chat: bool
    model: ServedModel
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    client_seed: bytes
    user_nonce: bytes | None
    gateway_nonce: bytes | None
    seed: int | None
    stream: bool
    include_usage: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    """Fields that both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: _StreamOptions | None = None
    poip_user_nonce: Annotated[str, Field(pattern="^(0x)?[0-9a-fA-F]{64}$")] | None = None


class _ChatBody(_Body):
    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None


class _CompletionBody(_Body):
    prompt: str | list[Any]


def chat_ask(body: dict[str, Any], catalogue: Catalogue, default_max_tokens: int) -> Ask:
    """A POST /v1/chat/completions body as an Ask. Tokenises, so it costs time. Raises ApiError."""
    parsed = _parse(_ChatBody, body)
    model = catalogue.get(parsed.model)
    context = model.profile.max_context
    ids = _tokenised("messages", lambda: model.tokenizer.encode_chat(conversation(parsed.messages), most=context))
    return _ask(parsed, model, ids, parsed.max_completion_tokens or parsed.max_tokens, default_max_tokens, chat=True)


def completion_ask(body: dict[str, Any], catalogue: Catalogue, default_max_tokens: int) -> Ask:
    """A POST /v1/completions body as an Ask: the prompt is a text, or a list of token ids. Raises ApiError."""
    parsed = _parse(_CompletionBody, body)
    model = catalogue.get(parsed.model)
    prompt = parsed.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        text, context = prompt, model.profile.max_context
        ids = _tokenised("prompt", lambda: model.tokenizer.encode_text(text, most=context))
    else:
        size = model.profile.vocab_size
        if not all(type(token_id) is int and 0 <= token_id < size for token_id in prompt):
            raise bad_request(
                f"prompt must be one text, or one list of token ids from 0 to {size - 1}; send several prompts one by one.",
                "prompt",
            )
        ids = tuple(prompt)
    return _ask(parsed, model, ids, parsed.max_tokens, default_max_tokens, chat=False)


def _parse(kind: type[B], body: dict[str, Any]) -> B:
    given = {name: value for name, value in body.items() if value is not None and name not in NO_EFFECT}
    for name in list(given):
        if name in NEUTRAL and name not in kind.model_fields:
            value = given.pop(name)
            if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
                raise unsupported(name, REASONS.get(name, f"{name} is not supported by this network: leave it out."))
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in fault["loc"][:2]) or None
        if fault["type"] == "extra_forbidden":
            raise bad_request(f"unrecognised request argument: {param!s:.60}.", param, "unknown_parameter") from None
        raise bad_request(f"{param}: {fault['msg']}.", param) from None


def _tokenised(param: str, encode: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return encode()
    except TooLong as error:
        raise ApiError(400, error.code, error.message, param=param, hint="Shorten the prompt.") from error
    except InvalidInput as error:
        raise ApiError(400, "invalid_request", error.message, param=param, hint=error.hint) from error


def _ask(
    body: _Body,
    model: ServedModel,
    prompt_ids: tuple[int, ...],
    max_tokens: int | None,
    default_max_tokens: int,
    *,
    chat: bool,
) -> Ask:
    if not prompt_ids:
        raise bad_request("the prompt is empty: it must have at least one token.", "prompt")
    context = model.profile.max_context
    room = context - len(prompt_ids)
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = "" if max_tokens is None else f" and asks for {max_tokens} more"
        raise ApiError(
            400,
            "context_length_exceeded",
            f"this model's context is {context} tokens; the prompt has {len(prompt_ids)}{asked}.",
            param="messages" if chat else "prompt",
            hint="Shorten the prompt, or lower max_tokens.",
        )
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options is only for stream = true.", "stream_options")
    user_nonce = gateway_nonce = None
    if body.poip_user_nonce is not None:
        if body.seed is not None:
            raise bad_request("give either seed or poip_user_nonce: both decide the seed.", "poip_user_nonce")
        user_nonce, gateway_nonce = bytes.fromhex(body.poip_user_nonce[-64:]), secrets.token_bytes(32)
        client_seed = bytes(client_seed_from_nonces(user_nonce, gateway_nonce))
    elif body.seed is not None:
        client_seed = bytes(client_seed_from_integer(body.seed))
    else:
        client_seed = secrets.token_bytes(32)
    return Ask(
        chat=chat,
        model=model,
        prompt_ids=prompt_ids,
        params=_params(body, model),
        max_tokens=max_tokens if max_tokens is not None else min(default_max_tokens, room),
        stop=_stop_strings(body.stop),
        client_seed=client_seed,
        user_nonce=user_nonce,
        gateway_nonce=gateway_nonce,
        seed=body.seed,
        stream=body.stream,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _params(body: _Body, model: ServedModel) -> SamplingParams:
    low, high = model.profile.min_temperature_milli, model.profile.max_temperature_milli
    if body.temperature is None:
        milli = min(max(DEFAULT_TEMPERATURE_MILLI, low), high)
    else:
        milli = round(body.temperature * 1000)
        if milli != 0 and not low <= milli <= high:
            raise unsupported(
                "temperature",
                f"temperature must be 0 (greedy) or from {low / 1000:g} to {high / 1000:g}, not {body.temperature:g}.",
            )
    ids = sorted(set(body.stop_token_ids or ()))
    if len(ids) > MAX_STOP_TOKENS or any(not 0 <= token_id < model.profile.vocab_size for token_id in ids):
        raise bad_request(f"stop_token_ids holds at most {MAX_STOP_TOKENS} ids of the vocabulary.", "stop_token_ids")
    return SamplingParams(temperature_milli=milli, stop_token_ids=tuple(ids), ignore_eos=body.ignore_eos)


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MAX_STOP_STRINGS or any(not 0 < len(text) <= MAX_STOP_LENGTH for text in stops):
        raise bad_request(f"stop holds at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_LENGTH} characters.", "stop")
    return tuple(stops)
