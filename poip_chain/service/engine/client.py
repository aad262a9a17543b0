"""Asynchronous client of a vLLM server that runs our plugin, and the fingerprint taken from what it returns.

Knows the engine's HTTP dialect; nothing of receipts, nodes or chains. It trusts the engine no further than it
must: each streamed token is checked against the normative sampler (as far as the listed log-probabilities
show), against the bounds of the request and against the prompt that was sent, before anybody can sign for it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from poip_chain.errors import IntegrityError, InvalidInput, PoipError, Unavailable
from poip_chain.spec import sampler
from poip_chain.spec.strict_json import parse_json, parse_json_object
from poip_chain.spec.transcript import ENTRIES_PER_POSITION, FingerprintEntry

TOP_LOGPROBS = 9
"""Log-probabilities asked for per token: the eight of the fingerprint, plus one in case the chosen token is
among them."""
MAX_EVENT_BYTES = 1 << 20
"""Bound of one server-sent event and of an error body. A normal event has about 600 bytes."""
MAX_INFO_BYTES = 1 << 16
SAMPLER_TOLERANCE = 1000 * 65536 // 256
"""1/256 logit in the sampler's units: covers the float32 rounding of log-probabilities (about 1e-5), nothing
else."""
NATS = 64
"""Fingerprint values are in 1/64 nat."""

_KEY = "token_id:"
_REFUSALS = (400, 404, 413, 422)


class InputMismatch(IntegrityError):
    """The engine refused: the prompt ids that it received are not those that the request's prompt_root
    commits to.
    """

    code = "input_mismatch"


@dataclass(frozen=True, slots=True)
class EngineToken:
    """One streamed token.

    top: (token id, log-probability) of the likeliest tokens, likeliest first; the chosen one may be among
    them.
    finish_reason: "stop" or "length" on the last token, None before.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server says about itself. max_model_len counts prompt and output tokens together."""

    model_name: str
    max_model_len: int
    version: str

    @property
    def statement(self) -> str:
        """The engine statement for a transcript's header: short ASCII text, at most 64 bytes."""
        return "".join(c for c in f"vllm {self.version}" if c.isascii() and c.isprintable())[:64]


def fingerprint_entries(token: EngineToken) -> tuple[FingerprintEntry, ...]:
    """The eight fingerprint entries of a position (protocol section 12).

    Each is (token id, value): the stated log-probability minus the chosen token's in 1/64 nat (a difference
    of logits), rounded half to even, saturated to int16; ordered by value descending, then id ascending; the
    chosen token excluded.
    Raises IntegrityError if the engine listed fewer than eight other tokens.
    """
    entries = []
    for token_id, logprob in token.top:
        if token_id != token.token_id:
            value = round((logprob - token.logprob) * NATS)
            entries.append((token_id, max(-(2**15), min(2**15 - 1, value))))
    if len(entries) < ENTRIES_PER_POSITION:
        raise IntegrityError(
            f"the engine listed {len(entries)} tokens beside the chosen one; {ENTRIES_PER_POSITION} are needed."
        )
    entries.sort(key=lambda entry: (-entry[1], entry[0]))
    return tuple(entries[:ENTRIES_PER_POSITION])


def sampler_margin(token: EngineToken, seed: bytes, position: int, temperature_milli: int) -> int:
    """By how much the best listed token beats the chosen one, in the sampler's units (2**-16 / 1000 logit),
    >= 0.

    A lower bound of the true margin: unlisted tokens could be better still.
    """
    key = sampler.position_key(seed, position)

    def score(token_id: int, logprob: float) -> int:
        noise = sampler.gumbel(sampler.uniform_bits(key, token_id)) if temperature_milli else 0
        return sampler.noised(sampler.quantise_logit(logprob), temperature_milli, noise)

    chosen = score(token.token_id, token.logprob)
    return max(0, max((score(*entry) for entry in token.top), default=chosen) - chosen)


class EngineClient:
    """Talks to one vLLM server. Use as an async context manager, or call `close`. Safe for concurrent
    requests.

    read_timeout_seconds bounds the wait for the next piece of a stream, queueing in the engine included.
    """

    def __init__(
        self,
        base_url: str,
        model_name: str,
        *,
        read_timeout_seconds: float = 300,
        max_connections: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.model_name = model_name
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            timeout=httpx.Timeout(10, read=read_timeout_seconds),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; running requests are aborted by the engine."""
        await self._http.aclose()

    async def health(self) -> bool:
        """Whether the server answers and its engine lives. Never raises for a server that does not answer."""
        try:
            return (await self._http.get("/health", timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False

    async def model_info(self) -> EngineInfo:
        """The served model's bounds. Raises Unavailable, or IntegrityError if the server does not serve
        `model_name`.
        """
        models = await self._get_json("/v1/models")
        version = await self._get_json("/version")
        listed = models.get("data")
        for entry in listed if isinstance(listed, list) else []:
            if isinstance(entry, dict) and entry.get("id") == self.model_name:
                length = entry.get("max_model_len")
                if type(length) is int and length > 0:
                    return EngineInfo(self.model_name, length, str(version.get("version", "unknown"))[:32])
        raise IntegrityError(
            f"the engine at {self.base_url} does not serve a model named {self.model_name!r}.",
            hint="Check the served name and the address.",
        )

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: bytes,
        temperature_milli: int,
        max_tokens: int,
        prompt_root: bytes,
        end_token_ids: Collection[int],
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[EngineToken]:
        """Stream the answer's tokens; the last one carries the finish reason. Closing the iterator aborts the
        request.

        end_token_ids: the profile's EOS ids. prompt_root: as the client signed it; the engine checks its
        input against it.

        Raises InvalidInput if the engine refuses the request as malformed, Unavailable if it does not answer
        or breaks off, InputMismatch if it received another prompt, IntegrityError if what it returns
        contradicts the request or the sampler (a server without the plugin, or with other end tokens). After
        an exception nothing must be signed.
        """
        body = {
            "model": self.model_name,
            "prompt": list(prompt_ids),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "logprobs": TOP_LOGPROBS,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "ignore_eos": ignore_eos,
            # vLLM stops at the checkpoint's own end token; the profile's ids are passed on, so that both
            # agree.
            "stop_token_ids": sorted(stop_token_ids if ignore_eos else {*stop_token_ids, *end_token_ids}),
            "vllm_xargs": {
                "poip_seed": seed.hex(),
                "poip_temperature_milli": temperature_milli,
                "poip_prompt_root": prompt_root.hex(),
                "poip_prompt_tokens": len(prompt_ids),
            },
        }
        last_ids = frozenset(stop_token_ids) | (frozenset() if ignore_eos else frozenset(end_token_ids))
        position = 0
        prompt_seen = False
        finished = False
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise await _error(response)
                async for choice in _choices(response):
                    if "prompt_token_ids" in choice and choice["prompt_token_ids"] is not None:
                        if choice["prompt_token_ids"] != list(prompt_ids):
                            raise InputMismatch("the engine reports another prompt than the one that was sent.")
                        prompt_seen = True
                    for token in _tokens(choice):
                        if finished or not prompt_seen or position >= max_tokens:
                            raise IntegrityError("the engine sent more tokens than it may, or no prompt before them.")
                        _check_sampler(token, seed, position, temperature_milli)
                        position += 1
                        finished = token.finish_reason is not None
                        _check_end(token, last_ids, position, max_tokens)
                        yield token
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the engine at {self.base_url} does not answer: {type(error).__name__} {error}".rstrip(),
                hint="Check that it runs and is not overloaded; then try again.",
            ) from error
        if not finished:
            raise Unavailable(f"the engine at {self.base_url} broke off its answer after {position} tokens.")

    async def _get_json(self, path: str) -> dict[str, Any]:
        try:
            response = await self._http.get(path, timeout=10)
            if response.status_code != 200:
                raise Unavailable(f"the engine answered {response.status_code} to GET {path}.")
            if len(response.content) > MAX_INFO_BYTES:
                raise IntegrityError(f"the engine's answer to GET {path} is too large.")
            return parse_json_object(response.content)
        except httpx.HTTPError as error:
            raise Unavailable(f"the engine at {self.base_url} does not answer: {error}") from error
        except InvalidInput as error:
            raise IntegrityError(f"the engine's answer to GET {path} is not a JSON object: {error}") from error


async def _error(response: httpx.Response) -> PoipError:
    """The exception for an answer that is not 200."""
    text = b""
    async for piece in response.aiter_bytes():
        text += piece
        if len(text) > MAX_EVENT_BYTES:
            break
    message = text.decode(errors="replace")[:500]
    try:
        body = parse_json(text)
        message = str((body.get("error") or body)["message"])[:500]
    except (InvalidInput, KeyError, TypeError, AttributeError):
        pass
    if response.status_code in _REFUSALS:
        return InvalidInput(f"the engine refused the request: {message}")
    return Unavailable(f"the engine answered {response.status_code}: {message}")


async def _choices(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The single choice of each streamed event, until [DONE]."""
    buffer = b""
    async for piece in response.aiter_bytes():
        buffer += piece
        if len(buffer) > MAX_EVENT_BYTES and b"\n" not in buffer:
            raise IntegrityError(f"the engine sent an event of more than {MAX_EVENT_BYTES} bytes.")
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _choice(data)


def _choice(data: bytes) -> dict[str, Any]:
    try:
        event = parse_json(data)
    except InvalidInput as error:
        raise IntegrityError("the engine sent an event that is not JSON.") from error
    if isinstance(event, dict) and "error" in event:
        # vLLM validates a streamed request after it has sent the status line: a refusal comes as an event, too.
        body = event["error"] if isinstance(event["error"], dict) else {"message": event["error"]}
        message = str(body.get("message"))[:300]
        if body.get("code") in _REFUSALS:
            raise InvalidInput(f"the engine refused the request: {message}")
        raise Unavailable(f"the engine failed while answering: {message}")
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise IntegrityError("the engine sent an event without exactly one choice.")
    choice: dict[str, Any] = choices[0]
    return choice


def _tokens(choice: dict[str, Any]) -> Iterator[EngineToken]:
    """The tokens of one event. Raises IntegrityError unless ids and log-probabilities agree."""
    ids = choice.get("token_ids")
    finish = choice.get("finish_reason")
    if finish is not None and finish not in ("stop", "length"):
        raise Unavailable(f"the engine ended the answer with {str(finish)[:40]!r}.")
    if not ids:
        if finish is not None:
            raise IntegrityError("the engine ended the answer in an event without a token.")
        return
    logprobs = choice.get("logprobs")
    if not isinstance(ids, list) or not isinstance(logprobs, dict):
        raise IntegrityError("the engine sent tokens without log-probabilities: was it started with --max-logprobs?")
    chosen, listed = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(chosen, list) or not isinstance(listed, list) or not len(ids) == len(chosen) == len(listed):
        raise IntegrityError("the engine sent another number of log-probabilities than of tokens.")
    for i, (token_id, logprob, top) in enumerate(zip(ids, chosen, listed, strict=True)):
        if type(token_id) is not int or not 0 <= token_id < 2**32 or not isinstance(top, dict):
            raise IntegrityError(f"the engine sent {token_id!r:.40}, which is not a token id, or no list with it.")
        pairs = sorted(((_token_id(name), _number(value)) for name, value in top.items()), key=lambda p: (-p[1], p[0]))
        last = i == len(ids) - 1
        yield EngineToken(token_id, _number(logprob), tuple(pairs), finish if last else None)


def _token_id(name: str) -> int:
    digits = name.removeprefix(_KEY)
    if not name.startswith(_KEY) or not digits.isascii() or not digits.isdigit() or len(digits) > 10:
        raise IntegrityError(f"the engine lists tokens as text ({name[:40]!r}), not as ids.")
    return int(digits)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise IntegrityError(f"the engine sent {value!r:.40} for a log-probability.")
    return float(value)


def _check_sampler(token: EngineToken, seed: bytes, position: int, temperature_milli: int) -> None:
    margin = sampler_margin(token, seed, position, temperature_milli)
    if margin <= SAMPLER_TOLERANCE:
        return
    logits = margin / 65_536_000
    # The plugin's sign of a refused request is the least likely token of all in the first place: a listed
    # token is not it.
    if position == 0 and all(token.logprob < logprob for i, logprob in token.top if i != token.token_id):
        raise InputMismatch(
            "the engine refused its input: the prompt ids that reached it do not hash to the request's prompt_root.",
            hint="Something between client and engine altered the prompt. Nothing was signed.",
        )
    raise IntegrityError(
        f"the engine's token {token.token_id} at position {position} is {logits:.3f} logits short of the normative "
        "sampler's choice.",
        hint="Start the engine with our logits processor (python -m poip_chain.service.engine.server).",
    )


def _check_end(token: EngineToken, last_ids: frozenset[int], count: int, max_tokens: int) -> None:
    ends = token.token_id in last_ids
    if token.finish_reason == "stop" and not ends:
        raise IntegrityError(
            f"the engine stopped at token {token.token_id}, which is no end token of the profile nor a stop id.",
            hint="The profile's end token ids must contain the checkpoint's own.",
        )
    if token.finish_reason == "length" and count != max_tokens:
        raise Unavailable(
            f"the engine's context ended after {count} of {max_tokens} tokens.",
            hint="Start it with a --max-model-len of at least the profile's max_context.",
        )
    if ends and token.finish_reason != "stop" and count < max_tokens:
        raise IntegrityError(f"the engine went on after end token {token.token_id}.")
    if token.finish_reason is None and count == max_tokens:
        raise IntegrityError(f"the engine did not finish at max_tokens = {max_tokens}.")
