"""Recompute the logits of an answer with one prefill over prompt and output (protocol section 5).

Two sources of logits: torch in this process in fp32 (the quietest noise, verification needs no GPU), or any vLLM
server through `prompt_logprobs` (first stage only: it lists the top tokens, so a margin from it is a lower bound).
This module knows nothing of receipts, verdicts or the chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import numpy.typing as npt

from poip_chain.errors import InvalidInput, Unavailable
from poip_chain.service.engine.noise import quantise_array
from poip_chain.spec.strict_json import parse_json_object

MAX_BATCH_TOKENS = 2048
"""Tokens in one padded forward: bounds the memory of a re-execution, about 1 MB a token at 135M parameters."""
VLLM_PROMPT_LOGPROBS = 16
"""What service/engine/server.py lets a request ask for."""
MAX_ANSWER_BYTES = 256 * 2**20
"""The listed logprobs of 100,000 tokens take about half of it."""
MAX_LOGPROB = 1e-3
"""A logprob is not positive; servers round."""
ServedRow = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of one answer: at least one prompt id and one output id."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """The logits at one output position, in units of 2**-16.

    ids is None for a full row (values[v] is token v's logit); else values[k] belongs to token ids[k], the chosen token
    among them, and every token not listed has a logit of at most min(values).
    """

    values: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64] | None = None


class LogitSource(Protocol):
    """Anything that can recompute answers."""

    name: str

    def rows(self, answers: Sequence[Answer]) -> Iterator[tuple[int, int, Row]]:
        """Yield (answer index, output position, row) for every output position, positions in order within an answer."""
        ...


class TorchSource:
    """The model in this process, fp32 on the CPU.

    Raises InvalidInput for a directory that transformers cannot load without running code from it.
    """

    def __init__(self, model_directory: Path, threads: int = 1) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.name = f"torch {torch.__version__} fp32"
        self._torch = torch
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_directory, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{model_directory} cannot be loaded for re-execution: {error}",
                hint="Run `poip model prepare` on it first.",
            ) from error
        self.model = model.eval()

    def rows(self, answers: Sequence[Answer]) -> Iterator[tuple[int, int, Row]]:
        """See LogitSource. Answers are padded on the right into shared forwards; causality keeps them independent."""
        torch = self._torch
        for group in _groups(answers):
            sequences = [answers[i].prompt_ids + answers[i].output_ids[:-1] for i in group]
            width = max(map(len, sequences))
            ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
            with torch.inference_mode():
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                for line, i in enumerate(group):
                    first = len(answers[i].prompt_ids) - 1
                    for position in range(len(answers[i].output_ids)):
                        logits = self.model.lm_head(hidden[line, first + position])
                        yield i, position, Row(quantise_array(logits.numpy()))


class EngineSource:
    """A vLLM server as a first-stage verifier: it serves the top logprobs of every prompt position. `timeout` seconds
    bound each question as a whole. Not to be called from inside an event loop."""

    def __init__(self, url: str, timeout: float = 120.0) -> None:
        self.name = "vLLM prompt_logprobs"
        self._url, self._timeout = url.rstrip("/"), timeout
        self._model_name = ""

    def rows(self, answers: Sequence[Answer]) -> Iterator[tuple[int, int, Row]]:
        """See LogitSource. Raises Unavailable if the server does not answer as vLLM does."""
        for i, answer in enumerate(answers):
            served = self._prompt_logprobs([*answer.prompt_ids, *answer.output_ids])
            for position, token in enumerate(answer.output_ids):
                listed = self._listed(served[len(answer.prompt_ids) + position])
                if token not in listed:
                    raise Unavailable(f"{self._url} served no logprob for a token of the prompt.")
                ids = np.array(sorted(listed), dtype=np.int64)
                values = np.array([listed[int(k)] for k in ids], dtype=np.float32)
                yield i, position, Row(quantise_array(values), ids)

    def _prompt_logprobs(self, ids: list[int]) -> list[ServedRow]:
        body = {
            "model": self._served_model(),
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": VLLM_PROMPT_LOGPROBS,
        }
        try:
            served: Any = self._ask("POST", "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise Unavailable(
                f"the engine at {self._url} did not re-execute: {error!r:.300}.",
                hint="Start it with --max-logprobs 16 or more.",
            ) from error
        if not isinstance(served, list) or len(served) != len(ids):
            raise Unavailable(f"{self._url} answered for another number of tokens than it was asked for.")
        return served

    def _served_model(self) -> str:
        """The name under which the server knows its one model; asked once."""
        if not self._model_name:
            try:
                self._model_name = str(self._ask("GET", "/v1/models", None)["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise Unavailable(f"the engine at {self._url} does not name its model: {error!r:.300}.") from error
        return self._model_name

    def _listed(self, entry: Any) -> dict[int, float]:
        """One position's logprobs by token id. Nonsense is no verdict on the answer: the engine is at fault then."""
        try:
            listed = {int(key): float(value["logprob"]) for key, value in entry.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"{self._url} served no logprobs for a token of the prompt.") from error
        if any(not 0 <= token < 2**32 or not value <= MAX_LOGPROB for token, value in listed.items()):
            raise Unavailable(f"{self._url} served numbers that are no logprobs.")
        return listed

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            return parse_json_object(asyncio.run(self._exchange(method, path, body)))
        except TimeoutError as error:
            raise Unavailable(f"the engine at {self._url} did not answer within {self._timeout:g} s.") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, InvalidInput) as error:
            raise Unavailable(f"the engine at {self._url} does not answer properly: {error!r:.300}.") from error

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        # A proxy that the environment names is for the outside world, not for an engine on this machine.
        trust = self._url.startswith("https://")
        data = bytearray()
        async with (
            asyncio.timeout(self._timeout),
            httpx.AsyncClient(timeout=self._timeout, trust_env=trust) as client,
            client.stream(method, self._url + path, json=body) as reply,
        ):
            reply.raise_for_status()
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"the engine at {self._url} answers more than {MAX_ANSWER_BYTES} bytes.")
        return bytes(data)


def _groups(answers: Sequence[Answer]) -> Iterator[list[int]]:
    """Indices of answers of similar length, each group within MAX_BATCH_TOKENS when padded."""
    lengths = [len(a.prompt_ids) + len(a.output_ids) for a in answers]
    group: list[int] = []
    for i in sorted(range(len(answers)), key=lengths.__getitem__, reverse=True):
        if group and lengths[group[0]] * (len(group) + 1) > MAX_BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
