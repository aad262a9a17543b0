"""The logits processor without an engine: arguments, the input check, and rows that move in the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from poip_chain.spec import sampler
from poip_chain.spec.transcript import prompt_root

if TYPE_CHECKING:
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from poip_chain.service.engine import plugin
    from poip_chain.service.engine.plugin import PoipLogitsProcessor

# Importing vLLM alone takes longer than ten seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def engine_libraries() -> None:
    """The imports, when the first test runs: whoever only collects this file, as each process does, is spared them."""
    global torch, SamplingParams, BatchUpdate, MoveDirectionality, plugin, PoipLogitsProcessor
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from poip_chain.service.engine import plugin
    from poip_chain.service.engine.plugin import PoipLogitsProcessor


VOCABULARY = 500
PROMPT = list(range(40))
SEED = bytes(range(32))
EOS = 2
CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(eos_token_id=[EOS, 3])))


def arguments(**changes: Any) -> dict[str, Any]:
    """Valid vllm_xargs, changed; a value of None leaves the argument out."""
    values = {
        "poip_seed": SEED.hex(),
        "poip_temperature_milli": 700,
        "poip_prompt_root": prompt_root(PROMPT).hex(),
        "poip_prompt_tokens": len(PROMPT),
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def params(extra: Any, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=fields.pop("temperature", 0), extra_args=extra, **fields)


def processor() -> PoipLogitsProcessor:
    return PoipLogitsProcessor(CONFIG, torch.device("cpu"), False)


def added(*requests: tuple[int, SamplingParams, Any, list[int]], **rest: Any) -> BatchUpdate:
    return BatchUpdate(batch_size=8, removed=rest.get("removed", []), added=list(requests), moved=rest.get("moved", []))


def logits(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


def expected(row: torch.Tensor, position: int, temperature: int = 700, seed: bytes = SEED) -> int:
    return sampler.sample([sampler.quantise_logit(x) for x in row.tolist()], seed, position, temperature)


def test_the_sampled_token_is_on_top_and_other_rows_are_untouched() -> None:
    unit, output = processor(), [7, 8, 9]
    unit.update_state(added((1, params(arguments()), PROMPT, output), (2, params(None), [1], [])))
    table = logits()
    result = unit.apply(table.clone())
    assert int(result[1].argmax()) == expected(table[1], 3)
    for row in (0, 2, 3):
        assert torch.equal(result[row], table[row])
    output.append(int(result[1].argmax()))  # the engine's live list: the next position follows by itself
    assert int(unit.apply(table.clone())[1].argmax()) == expected(table[1], 4)


def test_rows_move_swap_and_leave() -> None:
    unit = processor()
    other = bytes(32)
    unit.update_state(
        added(
            (0, params(arguments()), PROMPT, []),
            (1, params(arguments(poip_seed=other.hex(), poip_temperature_milli=1000)), PROMPT, [1]),
        )
    )
    unit.update_state(added(moved=[(0, 1, MoveDirectionality.SWAP)]))
    table = logits()
    result = unit.apply(table.clone())
    assert int(result[1].argmax()) == expected(table[1], 0)
    assert int(result[0].argmax()) == expected(table[0], 1, 1000, other)
    unit.update_state(added(removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    result = unit.apply(table.clone())
    assert int(result[0].argmax()) == expected(table[0], 0)
    assert torch.equal(result[1], table[1])
    unit.update_state(None)
    unit.update_state(added(removed=[0]))
    assert torch.equal(unit.apply(table.clone()), table)


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    unit, table = processor(), logits()
    table[0, 77] = table[0, 33] = 50.0
    unit.update_state(added((0, params(arguments(poip_temperature_milli=0)), PROMPT, [])))
    assert int(unit.apply(table.clone())[0].argmax()) == 33


def test_rows_that_are_not_finite_still_have_one_winner() -> None:
    unit, table = processor(), logits()
    table[0, 5], table[0, 9] = float("inf"), float("nan")
    unit.update_state(added((0, params(arguments(poip_temperature_milli=0)), PROMPT, [])))
    assert int(unit.apply(table.clone())[0].argmax()) == 5


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        (arguments(), PROMPT[:-1]),
        (arguments(), [*PROMPT[:-1], 41]),
        (arguments(), [*PROMPT, 1]),
        (arguments(), None),
        (arguments(poip_prompt_tokens=39), PROMPT),
        (arguments(poip_prompt_root="00" * 32), PROMPT),
        (arguments(), [*PROMPT[:-1], -5]),
        # Arguments that validate_params would have refused: never an exception here.
        (arguments(poip_seed=None), PROMPT),
        (arguments(poip_seed=b"\x00"), PROMPT),
        (arguments(poip_temperature_milli="hot"), PROMPT),
        (arguments(poip_temperature_milli=2**63), PROMPT),
        (arguments(poip_unknown=1), PROMPT),
    ],
)
def test_a_wrong_prompt_is_refused_by_the_least_likely_token_then_an_end(extra: Any, prompt: Any) -> None:
    unit, output, table = processor(), [], logits()
    unit.update_state(added((0, params(extra), prompt, output), (1, params(arguments()), PROMPT, [])))
    result = unit.apply(table.clone())
    first = int(result[0].argmax())
    assert first == int(table[0].argmin()) == plugin.refusal_token(table[0])
    assert int(result[1].argmax()) == expected(table[1], 0), "the neighbour was disturbed"
    output.append(first)
    assert int(unit.apply(table.clone())[0].argmax()) == EOS


def test_an_error_in_the_sampler_refuses_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, table = processor(), logits()
    unit.update_state(added((0, params(arguments()), PROMPT, [])))

    def fail(*_: Any) -> list[int]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(unit._sampler, "sample", fail)
    assert int(unit.apply(table.clone())[0].argmax()) == int(table[0].argmin())


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (arguments(poip_seed=None), "lacks"),
        ({"poip_seed": SEED.hex()}, "lacks"),
        (arguments(poip_more=1), "unknown arguments"),
        (arguments(poip_seed="0x" + SEED.hex()), "64 hex digits"),
        (arguments(poip_seed=SEED.hex()[:-1] + "g"), "64 hex digits"),
        (arguments(poip_seed="é" * 64), "64 hex digits"),
        (arguments(poip_seed=12), "64 hex digits"),
        (arguments(poip_seed=["00"] * 64), "64 hex digits"),
        (arguments(poip_prompt_root=""), "64 hex digits"),
        (arguments(poip_temperature_milli=-1), "integer from 0"),
        (arguments(poip_temperature_milli=100_001), "integer from 0"),
        (arguments(poip_temperature_milli=0.7), "integer from 0"),
        (arguments(poip_temperature_milli=True), "integer from 0"),
        (arguments(poip_temperature_milli="700"), "integer from 0"),
        (arguments(poip_prompt_tokens=0), "integer from 1"),
        (arguments(poip_prompt_tokens=2**32), "integer from 1"),
    ],
)
def test_malformed_arguments_are_refused_with_the_reason(extra: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PoipLogitsProcessor.validate_params(params(extra))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 3},
        {"logit_bias": {1: 5.0}},
        {"allowed_token_ids": [1, 2]},
        {"bad_words": ["sea"]},
    ],
)
def test_other_ways_to_change_the_choice_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        PoipLogitsProcessor.validate_params(params(arguments(), **fields))
    PoipLogitsProcessor.validate_params(params(None, **fields))


def test_valid_requests_and_foreign_ones_pass() -> None:
    PoipLogitsProcessor.validate_params(params(arguments()))
    PoipLogitsProcessor.validate_params(params({"other": "value"}))
    PoipLogitsProcessor.validate_params(params(None, temperature=0.5, top_p=0.9))
    assert processor().is_argmax_invariant() is False
