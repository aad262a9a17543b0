"""The canonical forward pass: it is a Llama's, causal, exact over orders of summing, and in the shapes of the trace."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from poip_chain.errors import InvalidInput
from poip_chain.spec import bounds, forward
from poip_chain.spec import canonical as c
from poip_chain.spec.architecture import model_config
from poip_chain.spec.trace import Layout
from poip_chain.spec.weights import TensorPlan
from tests.vectors.generate_canonical import ODD, TOKENS, integer_weights
from tests.vectors.generate_numeric import TINY, tiny_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 20, "rope_parameters": LLAMA3}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 40}),
        ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    ],
    ids=["llama", "llama-tied-scaled", "qwen2-biases", "qwen3-qk-norm", "mistral"],
)
def test_it_is_the_float_models_forward(family: str, change: dict[str, Any]) -> None:
    """Random weights against torch fp32: logits of a spread of 1 within 2**-8."""
    import transformers  # ten seconds, which collecting this file shall not cost

    model, config = getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    base = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    network = model(config(**{**base, **change})).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn_like(parameter)
            value = 1 + 0.3 * noise if "norm" in name else (3 if "bias" in name else 0.2) * noise
            parameter.copy_(value.bfloat16().float())
    settings = {**network.config.to_dict(), "architectures": [model.__name__]}
    dimensions, scaling = model_config(settings)
    tensors = {
        name: value[None].tolist() if value.ndim == 1 else value.tolist()
        for name, value in network.state_dict().items()
    }
    weights = forward.canonical_weights(dimensions, tensors, scaling)
    bounds.check_bounds(dimensions, lambda plan: [bounds.extent(e, row) for e, row in weights.rows[plan.name]])
    tokens = [random.Random(1).randrange(61) for _ in range(12)]
    logits = torch.tensor(forward.forward(weights, tokens, 12)["logits"], dtype=torch.float64) / 2**16
    with torch.no_grad():
        wanted = network(torch.tensor([tokens])).logits[0]
    assert wanted.std() > 0.8
    assert (logits - wanted).abs().max() < 2**-8


def test_a_position_does_not_depend_on_later_ones_and_prefill_is_decoding() -> None:
    weights = forward.canonical_weights(TINY, tiny_tensors(TINY))
    whole = forward.forward(weights, TOKENS, len(TOKENS))
    for length in range(1, len(TOKENS)):
        part = forward.forward(weights, TOKENS[:length])
        assert part["logits"][-1] == whole["logits"][length - 1]
        assert list(part["1.output"]) == list(whole["1.output"][:length])
        assert [list(row) for row in part["0.v"]] == [list(row[:length]) for row in whole["0.v"]]
    assert forward.forward(weights, TOKENS, 2)["logits"] == whole["logits"][-2:]


def test_the_order_of_a_sum_does_not_matter() -> None:
    """Permuting the hidden columns of every weight permutes the residual stream and nothing else."""
    config = dataclasses.replace(ODD, hidden_size=24, qk_norm=False)
    weights = integer_weights(config, 3)
    order = list(range(24))
    random.Random(2).shuffle(order)
    rows = dict(weights.rows)
    for name in ("embed", "0.q", "0.k", "0.v", "0.gate", "0.up", "0.input_norm", "0.post_norm", "final_norm"):
        rows[name] = [(e, [row[i] for i in order]) for e, row in weights.rows[name]]
    for name in ("0.o", "0.down"):
        rows[name] = [weights.rows[name][i] for i in order]
    permuted = forward.forward(forward.CanonicalWeights(config, rows), TOKENS)
    plain = forward.forward(weights, TOKENS)
    assert permuted["logits"] == plain["logits"] and permuted["0.attention"] == plain["0.attention"]
    assert permuted["0.output"] == [[row[i] for i in order] for row in plain["0.output"]]


@pytest.mark.parametrize("change", [{}, {"qk_norm": False, "attention_bias": False, "tied_embeddings": True}])
def test_the_tensors_are_those_of_the_layout_in_order_and_inside_their_clamps(change: dict[str, bool]) -> None:
    config = dataclasses.replace(TINY, **change)
    trace = forward.forward(integer_weights(config, 7), TOKENS, 2)
    layout = Layout(config, 4, 2)
    assert list(trace) == [tensor.name for tensor in layout.tensors()]
    limits = {
        "q": c.LINEAR_QK_LIMIT, "k_norm": c.LINEAR_QK_LIMIT, "q_rope": c.QK_LIMIT, "v": c.V_LIMIT, "gate": c.GATE_LIMIT,
        "attention": bounds.ATTENTION_LIMIT, "hidden": c.HIDDEN_LIMIT, "logits": c.LOGIT_LIMIT,
    }  # fmt: skip
    for tensor in layout.tensors():
        rows = trace[tensor.name]
        assert len(rows) == tensor.rows and {len(row) for row in rows} == {tensor.columns}
        limit = limits.get(tensor.name.rpartition(".")[2], 2**63 - 1)
        assert all(abs(value) <= limit for row in rows for value in row)


def test_large_inputs_are_clamped_not_wrapped() -> None:
    """Gains and weights of the largest allowed size drive every clamped tensor to its limit, and not past it."""
    config = dataclasses.replace(TINY, qk_norm=False, attention_bias=False)
    weights = integer_weights(config, 1)
    rows = dict(weights.rows)

    def large(plan_name: str, exponent: int) -> None:
        rows[plan_name] = [(exponent, row) for _, row in weights.rows[plan_name]]

    for name in ("0.q", "0.k", "0.v", "0.gate", "0.up"):
        large(name, 0)
    large("0.input_norm", -10)
    large("0.post_norm", -10)
    trace = forward.forward(forward.CanonicalWeights(config, rows), TOKENS)

    def largest(name: str) -> int:
        return max(abs(value) for row in trace[name] for value in row)

    assert largest("0.q") == c.LINEAR_QK_LIMIT and largest("0.v") == c.V_LIMIT and largest("0.q_rope") == c.QK_LIMIT
    assert largest("0.gate") == c.GATE_LIMIT and largest("0.hidden") == c.HIDDEN_LIMIT
    extents = lambda plan: [bounds.extent(e, row) for e, row in rows[plan.name]]  # noqa: E731
    assert bounds.check_bounds(config, extents)["0.down"] < bounds.WHOLE


@pytest.mark.parametrize(
    ("tokens", "outputs", "why"),
    [((), 1, "prompt and output"), ((17,), 1, "token ids"), ((1,) * 10, 1, "positions"), ((1, 2), 3, "prompt")],
)
def test_wrong_inputs_are_refused(tokens: tuple[int, ...], outputs: int, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        forward.forward(integer_weights(TINY, 7), tokens, outputs)


def test_a_missing_tensor_is_named() -> None:
    tensors = tiny_tensors(TINY)
    del tensors["lm_head.weight"]
    with pytest.raises(InvalidInput, match=r"lm_head\.weight"):
        forward.canonical_weights(TINY, tensors)


def test_extents_must_cover_every_row() -> None:
    def short(plan: TensorPlan) -> list[bounds.Extent]:
        return [bounds.Extent(-16, 1, 1, 1)] * (plan.rows - (plan.name == "1.up"))

    with pytest.raises(InvalidInput, match=r"1\.up has 19 rows"):
        bounds.check_bounds(TINY, short)
