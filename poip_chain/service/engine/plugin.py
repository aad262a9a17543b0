"""The part of us that runs inside vLLM: the normative sampler and the input check, as a V1 logits processor.

Load it with `--logits-processors poip_chain.service.engine.plugin:PoipLogitsProcessor`. It imports numpy,
torch, vllm and spec only, and must not know of chains, nodes or files: it lives in the engine's process.

A request asks for it through `vllm_xargs`, all four or none:

    poip_seed               64 hex digits: the request's 32-byte seed
    poip_temperature_milli  integer, 0 to 100,000
    poip_prompt_root        64 hex digits: the signed prompt_root
    poip_prompt_tokens      integer >= 1: the signed number of prompt tokens

and must set the engine's own temperature to 0, so that vLLM takes the maximum of the row, in which the
processor has put the sampled token on top. vLLM's reported log-probabilities are those of the untouched
logits.

**Input check.** When a request enters the batch, the ids that the engine really holds are hashed and compared
with poip_prompt_root. On a mismatch the request is refused: vLLM offers a processor no way to fail one
request, so the first token is the least likely one of the row (`refusal_token`), which no sampler and no
greedy decoding ever outputs at any temperature that a profile allows, and an end token follows. The client
sees at once that the first token contradicts the sampler (`client.EngineClient` checks that on every token)
and raises InputMismatch; the node then signs nothing.

**Hostile requests.** An exception in `update_state` or `apply` ends the engine process and with it every
other request. So `validate_params`, which runs in the API process and may raise (HTTP 400), refuses
everything malformed; whatever still gets through is parsed again without raising and served as a refusal.

vLLM's Model Runner V2 (default on GPUs) does not load V1 processors: start the server with
VLLM_USE_V2_MODEL_RUNNER=0, as `server.py` does.
"""

from __future__ import annotations

import logging
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from poip_chain.errors import InvalidInput
from poip_chain.service.engine.noise import GumbelSampler
from poip_chain.spec.sampler import MAX_TEMPERATURE_MILLI, SEED_BYTES, position_key
from poip_chain.spec.transcript import prompt_root

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.poip")

SEED = "poip_seed"
TEMPERATURE = "poip_temperature_milli"
PROMPT_ROOT = "poip_prompt_root"
PROMPT_TOKENS = "poip_prompt_tokens"
ARGUMENTS = frozenset({SEED, TEMPERATURE, PROMPT_ROOT, PROMPT_TOKENS})
PREFIX = "poip_"

_HEX = frozenset(string.hexdigits)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The parsed `vllm_xargs` of a request."""

    seed: bytes
    temperature_milli: int
    prompt_root: bytes
    prompt_tokens: int


@dataclass(slots=True)
class RowState:
    """One request in the batch. `output` is the engine's live list of output ids; its length is the next
    position.
    """

    arguments: Arguments | None
    output: list[int]
    end_token: int

    @property
    def refused(self) -> bool:
        """Whether the request failed the input check (or could not be parsed)."""
        return self.arguments is None


def parse_arguments(extra_args: Any) -> Arguments | None:
    """The arguments of a request, or None if it does not ask for the sampler. Raises ValueError saying what
    is wrong.
    """
    if extra_args is None:
        return None
    if not isinstance(extra_args, dict):
        raise ValueError("vllm_xargs must be an object.")
    given = {key for key in extra_args if isinstance(key, str) and key.startswith(PREFIX)}
    if not given:
        return None
    if unknown := given - ARGUMENTS:
        raise ValueError(f"vllm_xargs holds unknown arguments {sorted(unknown)}; known are {sorted(ARGUMENTS)}.")
    if missing := ARGUMENTS - given:
        raise ValueError(f"vllm_xargs lacks {sorted(missing)}: the sampler needs all of {sorted(ARGUMENTS)}.")
    return Arguments(
        seed=_digest(extra_args, SEED),
        temperature_milli=_integer(extra_args, TEMPERATURE, 0, MAX_TEMPERATURE_MILLI),
        prompt_root=_digest(extra_args, PROMPT_ROOT),
        prompt_tokens=_integer(extra_args, PROMPT_TOKENS, 1, 2**32 - 1),
    )


def _digest(extra_args: dict[Any, Any], name: str) -> bytes:
    value = extra_args[name]
    if not isinstance(value, str) or len(value) != 2 * SEED_BYTES or not _HEX.issuperset(value):
        raise ValueError(f"{name} must be {2 * SEED_BYTES} hex digits without 0x.")
    return bytes.fromhex(value)


def _integer(extra_args: dict[Any, Any], name: str, low: int, high: int) -> int:
    value = extra_args[name]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}.")
    return value


# What else in SamplingParams would change which token is chosen, with the values that leave the choice alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.0),
    "n": (1, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "repetition_penalty": (1.0, None),
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "min_tokens": (0, None),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "thinking_token_budget": (None, -1),
    "repetition_detection": (None,),
    "watermarking": (None, False),
}


class PoipLogitsProcessor(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """vLLM creates one per engine process; see the module's docstring."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Runs in the API process for each request. Raises ValueError (HTTP 400) for arguments that cannot be
        served.
        """
        if parse_arguments(sampling_params.extra_args) is None:
            return
        for name, neutral in _NEUTRAL.items():
            value = getattr(sampling_params, name, None)
            if value not in neutral:
                allowed = neutral[0]
                raise ValueError(f"{name} must be {allowed} with {SEED}: the normative sampler takes no {name}.")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, RowState] = {}
        self._sampler = GumbelSampler()
        self._end_token = _end_token(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """False: it decides which token is the maximum."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step with the requests that entered, left or moved. Never raises for a request's
        content.
        """
        process_dict_updates(self._rows, batch_update, self._new_row)

    def _new_row(self, params: SamplingParams, prompt_ids: list[int] | None, output: list[int]) -> RowState | None:
        try:
            arguments = parse_arguments(params.extra_args)
            if arguments is None:
                return None
            if not prompt_matches(arguments, prompt_ids):
                logger.warning(
                    "refused a request: the %s prompt ids received do not hash to its prompt_root %s",
                    "missing" if prompt_ids is None else len(prompt_ids),
                    arguments.prompt_root.hex(),
                )
                arguments = None
        except Exception:  # whatever it is, raising it would end the engine for everybody
            logger.exception("refused a request whose arguments cannot be parsed")
            arguments = None
        end_token = getattr(params, "eos_token_id", None)
        return RowState(arguments, output, end_token if type(end_token) is int else self._end_token)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Put each row's sampled token above all others, in place. `logits`: float32 [batch, vocabulary]."""
        if not self._rows:
            return logits
        rows: list[int] = []
        keys: list[int] = []
        temperatures: list[int] = []
        refused: list[tuple[int, RowState]] = []
        for index, row in self._rows.items():
            if index >= logits.shape[0]:
                continue
            if row.arguments is None:
                refused.append((index, row))
                continue
            rows.append(index)
            keys.append(position_key(row.arguments.seed, len(row.output)))
            temperatures.append(row.arguments.temperature_milli)
        try:
            winners = self._sampler.sample(logits, rows, keys, temperatures)
        except Exception:  # as above: refuse these requests, keep the engine
            logger.exception("sampling failed; refusing the requests of this step")
            refused.extend((index, self._rows[index]) for index in rows)
            rows, winners = [], []
        for index, row in refused:
            rows.append(index)
            at_end = len(row.output) > 0 and 0 <= row.end_token < logits.shape[1]
            winners.append(row.end_token if at_end else refusal_token(logits[index]))
        _force(logits, rows, winners)
        return logits


def prompt_matches(arguments: Arguments, prompt_ids: list[int] | None) -> bool:
    """Whether the ids that the engine holds are those that the client signed."""
    if prompt_ids is None or len(prompt_ids) != arguments.prompt_tokens:
        return False
    try:
        return prompt_root(prompt_ids) == arguments.prompt_root
    except InvalidInput:
        return False


def refusal_token(row: torch.Tensor) -> int:
    """The least likely token of a row of logits (lowest id among equals): the sign of a refused request."""
    return int(torch.nan_to_num(row, nan=float("-inf")).argmin())


def _force(logits: torch.Tensor, rows: list[int], winners: list[int]) -> None:
    """Make winners[i] the unique maximum of row rows[i]."""
    if not rows:
        return
    index = torch.tensor(rows, device=logits.device)
    column = torch.tensor(winners, device=logits.device)
    peaks = logits[index].amax(dim=1)
    if not bool((peaks.abs() < 1e30).all()):  # infinities or NaN: nothing in these rows may rival the winner
        logits[index] = 0.0
    logits[index, column] = torch.finfo(logits.dtype).max


def _end_token(vllm_config: VllmConfig) -> int:
    """The model's end token, or -1 if its configuration names none."""
    config = getattr(getattr(vllm_config, "model_config", None), "hf_config", None)
    value = getattr(config, "eos_token_id", None)
    if isinstance(value, list) and value:
        value = value[0]
    return value if type(value) is int else -1
