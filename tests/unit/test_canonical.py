"""Canonical arithmetic against exact rationals and real functions; clamps, roundings and bounds; refused models."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput, UnsupportedModel
from poip_chain.spec import bounds
from poip_chain.spec import canonical as c
from poip_chain.spec import weights as w
from poip_chain.spec.architecture import model_config
from poip_chain.spec.rope_scaling import TWO_PI, RopeScaling
from tests.vectors.generate_canonical import EIGHT_B, ODD, SMOLLM, canonical_vectors, integer_weights
from tests.vectors.generate_numeric import TINY, render

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
INT63 = 2**63


def test_vectors_are_what_the_spec_gives() -> None:
    assert (VECTORS / "canonical.json").read_text() == render(canonical_vectors())


# Rounding


@given(st.integers(-(2**62), 2**62), st.integers(-3, 70))
def test_rsh_rounds_halves_upwards(x: int, s: int) -> None:
    exact = Fraction(x) / Fraction(2) ** s
    assert -Fraction(1, 2) < c.rsh(x, s) - exact <= Fraction(1, 2)
    if s > 62 and abs(x) < bounds.WHOLE:
        assert c.rsh(x, s) == c.rsh(x, 62) == 0  # what an engine may rely on


def test_halves_by_hand() -> None:
    assert [c.rsh(x, 1) for x in (-3, -1, 1, 3)] == [-1, 0, 1, 2]
    assert c.rsh(-5, -2) == -20 and c.rsh(7, 0) == 7
    assert c.clamp(9, 4) == 4 and c.clamp(-9, 4) == -4 and c.clamp(-3, 4) == -3


@given(
    st.integers(-(2**60), 2**60), st.integers(-40, -8), st.none() | st.tuples(st.integers(-32640, 32640), st.just(-20))
)
def test_linear_is_one_rounding_of_the_sum_and_one_of_the_bias(
    total: int, exponent: int, bias: tuple[int, int] | None
) -> None:
    exact = Fraction(total) * Fraction(2) ** (exponent - 16 + 12)
    result = c.linear(total, exponent, 16, 12, bias)
    if bias is not None:
        exact += Fraction(bias[0]) * Fraction(2) ** (bias[1] + 12)
    assert abs(result - exact) <= (Fraction(1, 2) if bias is None else 1)


# Exponential and what uses it


def test_exp_is_within_its_bound_and_never_grows_on_a_dense_grid() -> None:
    d = np.unique(np.concatenate([np.arange(0, 2**22, 17), np.arange(0, 2**25, 151)])).astype(np.int64)
    z = d * c.LOG2E
    assert z.max() < 2**56
    f, n = (z >> 20) & (2**30 - 1), z >> 50
    r = np.zeros_like(f)
    for coefficient in reversed(c.EXP_COEFFICIENTS):
        assert np.abs(r).max() <= 2**30  # times f: below 2**60
        r = coefficient + ((r * f) >> 30)
    value = r.astype(np.longdouble) * np.exp2(-(30 + n).astype(np.longdouble))
    error = np.abs(value / np.exp(-d.astype(np.longdouble) / 2**20) - 1)
    assert error.max() < 2.0**-26
    assert (np.diff(value) <= 0).all()
    assert r.min() >= 2**29 and r.max() == 2**30 and n.max() == 46
    for i in range(0, len(d), 4999):
        assert c.exp_negative(int(d[i])) == (int(r[i]), int(n[i]))


@given(st.integers(0, 2**25 - 1))
def test_exp_is_accurate_anywhere(d: int) -> None:
    r, n = c.exp_negative(d)
    with mpmath.workdps(40):
        exact = mpmath.exp(-mpmath.mpf(d) / 2**20)
        assert abs(mpmath.mpf(r) / mpmath.mpf(2) ** (30 + n) / exact - 1) < mpmath.mpf(2) ** -26


def test_log2e_is_rounded_to_nearest() -> None:
    with mpmath.workdps(40):
        assert abs(c.LOG2E - mpmath.mpf(2) ** 30 / mpmath.log(2)) <= 0.5


@pytest.mark.parametrize("head_dim", [2, 40, 64, 80, 96, 128, 256, 512])
def test_attention_weights_are_near_and_vanish_before_the_clamp(head_dim: int) -> None:
    multiplier = c.score_multiplier(head_dim)
    assert abs(Fraction(multiplier) ** 2 * head_dim - 2**60) <= multiplier * head_dim + head_dim  # rounded to nearest
    assert c.attention_weight(0, multiplier) == 2**20
    assert c.attention_weight(c.DISTANCE_LIMIT, multiplier) == 0 == c.attention_weight(2**54, multiplier)
    assert c.DISTANCE_LIMIT * multiplier < INT63
    rng = random.Random(head_dim)
    previous = 2**20
    for distance in sorted(rng.randrange(2**31) for _ in range(300)):
        weight = c.attention_weight(distance, multiplier)
        exact = 2**20 * mpmath.exp(-mpmath.mpf(distance) / 2**24 / mpmath.sqrt(head_dim))
        assert abs(weight - exact) <= 0.5 + 2.0**-20 * exact + 2.0**-5
        assert weight <= previous
        previous = weight


@given(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=40), st.sampled_from([64, 80, 128]))
def test_softmax_sums_and_largest_weight(scores: list[int], head_dim: int) -> None:
    m, weights, total = c.softmax(scores, c.score_multiplier(head_dim))
    assert m == max(scores) and weights[scores.index(m)] == 2**20
    assert total == sum(weights) and 2**20 <= total <= 2**20 * len(scores)
    assert all(0 <= weight <= 2**20 for weight in weights)


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(-c.V_LIMIT, c.V_LIMIT)), min_size=1, max_size=30))
def test_attention_output_is_the_rounded_weighted_mean(pairs: list[tuple[int, int]]) -> None:
    pairs.append((2**20, pairs[0][1]))
    total = sum(weight for weight, _ in pairs)
    products = sum(weight * v for weight, v in pairs)
    result = c.attend(products, total)
    assert -Fraction(1, 2) < result - Fraction(16 * products, total) <= Fraction(1, 2)
    assert 16 * min(v for _, v in pairs) <= result <= 16 * max(v for _, v in pairs)


def test_attention_stays_in_64_bits_at_the_longest_context() -> None:
    total = 2**20 * bounds.MAX_POSITIONS
    assert 32 * total * c.V_LIMIT + total < INT63
    assert bounds.KEY_BLOCK * 2**20 * c.V_LIMIT < bounds.EXACT
    assert bounds.MAX_HEAD_DIM * c.QK_LIMIT**2 < bounds.EXACT
    assert c.attend(total * c.V_LIMIT, total) == bounds.ATTENTION_LIMIT == -c.attend(-total * c.V_LIMIT, total)


@given(st.integers(-c.GATE_LIMIT, c.GATE_LIMIT), st.integers(-c.GATE_LIMIT, c.GATE_LIMIT))
def test_swiglu_is_near_and_clamped(gate: int, up: int) -> None:
    assert abs(gate) * 2**30 < INT63
    with mpmath.workdps(40):
        g, u = mpmath.mpf(gate) / 2**16, mpmath.mpf(up) / 2**16
        exact = g / (1 + mpmath.exp(-g)) * u * 2**14
        # silu is held in 2**-16: half a unit times up, and a relative 2**-25 of the sigmoid
        bound = 1 + abs(u) * 2.0**-3 * 1.1 + abs(exact) * 2.0**-25
        limited = max(-c.HIDDEN_LIMIT, min(c.HIDDEN_LIMIT, exact))
        assert abs(c.swiglu(gate, up) - limited) <= bound


def test_swiglu_at_its_ends() -> None:
    assert c.swiglu(c.GATE_LIMIT, c.GATE_LIMIT) == c.HIDDEN_LIMIT
    assert c.swiglu(c.GATE_LIMIT, -c.GATE_LIMIT) == -c.HIDDEN_LIMIT
    assert c.swiglu(-c.GATE_LIMIT, c.GATE_LIMIT) == 0 == c.swiglu(0, c.GATE_LIMIT)
    assert c.swiglu(2**16, 2**16) == round(2**14 / (1 + mpmath.exp(-1)))


# RMSNorm


def exact_norm(row: list[int], bits: int, eps_e12: int) -> list[Any]:
    with mpmath.workdps(60):
        real = [mpmath.mpf(h) / 2**bits for h in row]
        mean = sum(x * x for x in real) / len(row) + mpmath.mpf(eps_e12) / 10**12
        return [x / mpmath.sqrt(mean) for x in real]


@given(st.integers(1, 62), st.integers(1, 300), st.integers(0, 2**32), st.sampled_from([16, 20]))
def test_rms_norm_is_near_the_exact_value(size: int, columns: int, seed: int, bits: int) -> None:
    rng = random.Random(seed)
    row = [rng.randrange(-(2**size), 2**size + 1) for _ in range(columns)]
    gain, exponent = 3 * 2**13, -14  # 1.5
    out = c.rms_norm(row, bits, 10_000_000, [gain] * columns, exponent)
    root = float(mpmath.sqrt(columns))
    for value, exact in zip(out, exact_norm(row, bits, 10_000_000), strict=True):
        # Two roundings; R's relative error; and, for rows above 24 bits, elements rounded to 2**-24 of the largest.
        error = abs(value - 1.5 * 2**16 * exact)
        assert error <= 0.5 + 1.5 * 2**-4 + abs(float(exact)) * 2**17 * (2.0**-20 + root * 2.0**-23) + root * 2.0**-6


@pytest.mark.parametrize(
    "row", [[0] * 8, [1] + [0] * 63, [2**62 - 1] * 64, [-(2**62)] + [1] * 575, [2**24 - 1] * 8192, [2**62] + [0] * 8191]
)
def test_rms_norm_keeps_to_its_stated_ranges(row: list[int]) -> None:
    columns = len(row)
    shift = c.norm_shift(max(map(abs, row)))
    assert all(abs(c.rsh(h, shift)) <= 2**24 for h in row)
    total = c.norm_epsilon(bounds.MAX_EPS_E12, columns, 20, shift) + sum(c.norm_square(h, shift) for h in row)
    assert 1 <= total < 2**62
    multiplier, cut = c.norm_scale(total, columns)
    t = 2 * (36 - cut)
    assert 5 <= cut <= 36 and 2**60 <= total << t < 2**62
    assert isqrt(columns << 40) << 36 < INT63 and multiplier * 2**24 < 2**57.5
    normalised = [c.rsh(c.rsh(h, shift) * multiplier, cut) for h in row]
    assert max(map(abs, normalised)) <= bounds.sqrt_columns(columns) + 1
    # A single non-zero element attains the bound: it is sqrt(columns) times the root mean square.
    if sum(1 for h in row if h) == 1 and shift:
        assert max(map(abs, normalised)) >= bounds.sqrt_columns(columns) - 1


def test_a_row_of_zeros_has_a_norm() -> None:
    assert c.rms_norm([0] * 8, 20, 1, [32_640] * 8, -14) == [0] * 8


# RoPE and its scaling


@given(
    st.integers(-c.LINEAR_QK_LIMIT, c.LINEAR_QK_LIMIT),
    st.integers(-c.LINEAR_QK_LIMIT, c.LINEAR_QK_LIMIT),
    st.floats(0, 6.3),
)
def test_rope_rotates_and_clamps(x0: int, x1: int, angle: float) -> None:
    cosine, sine = round(float(mpmath.cos(angle)) * 2**30), round(float(mpmath.sin(angle)) * 2**30)
    assert abs(x0 * cosine) + abs(x1 * sine) + 2**33 < 2**57.2
    exact = (x0 * cosine - x1 * sine) / 2**34, (x1 * cosine + x0 * sine) / 2**34
    for value, wanted in zip(c.rope(x0, x1, cosine, sine), exact, strict=True):
        assert abs(value - max(-c.QK_LIMIT, min(c.QK_LIMIT, wanted))) <= 0.5 + 1e-6


def test_rope_clamp_is_attained() -> None:
    diagonal = 759_250_125
    assert c.rope(2**26, -(2**26), diagonal, diagonal)[0] == c.QK_LIMIT
    assert c.rope(-(2**26), 2**26, diagonal, diagonal)[0] == -c.QK_LIMIT


def test_two_pi_has_its_digits() -> None:
    with mpmath.workdps(90):
        assert abs(mpmath.mpf(TWO_PI.numerator) / TWO_PI.denominator - 2 * mpmath.pi) < mpmath.mpf(10) ** -75


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def reference_frequency(inverse: float, entry: dict[str, Any]) -> float:
    """The published definition, in floats."""
    if entry["rope_type"] == "linear":
        return inverse / entry["factor"]
    length = entry["original_max_position_embeddings"]
    wavelength = 2 * np.pi / inverse
    if wavelength < length / entry["high_freq_factor"]:
        return inverse
    if wavelength > length / entry["low_freq_factor"]:
        return inverse / entry["factor"]
    low, high = entry["low_freq_factor"], entry["high_freq_factor"]
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * inverse / entry["factor"] + smooth * inverse


@pytest.mark.parametrize("entry", [LLAMA3, {"rope_type": "linear", "factor": 4}])
def test_scaled_rope_is_the_published_one(entry: dict[str, Any]) -> None:
    scaling = RopeScaling.parse(entry)
    assert scaling is not None
    config = dataclasses.replace(
        EIGHT_B, head_dim=128, max_positions=40, rope_theta=500_000, rope_scaling_hash=scaling.hash()
    )
    rows = list(w.rope_rows(config, scaling))
    for i in range(64):
        frequency = reference_frequency(500_000 ** (-i / 64), entry)
        for position in (1, 39):
            assert abs(rows[position][i] - np.cos(position * frequency) * 2**30) < 2
            assert abs(rows[position][64 + i] - np.sin(position * frequency) * 2**30) < 2
    with pytest.raises(InvalidInput, match="by its hash"):
        next(w.rope_rows(config))
    with pytest.raises(InvalidInput, match="by its hash"):
        next(w.rope_rows(dataclasses.replace(config, rope_scaling_hash=bytes(32)), scaling))


def test_a_scalings_hash_does_not_depend_on_how_numbers_are_written() -> None:
    parsed = RopeScaling.parse({**LLAMA3, "rope_theta": 500_000.0}), RopeScaling.parse({**LLAMA3, "factor": 8})
    assert parsed[0] and parsed[1] and parsed[0].hash() == parsed[1].hash()
    assert RopeScaling.parse(None) is None is RopeScaling.parse({"rope_type": "default", "rope_theta": 1e4})


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"rope_type": "yarn", "factor": 4}, "yarn"),
        ({"type": "dynamic", "factor": 2}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({**LLAMA3, "high_freq_factor": 1}, "out of order"),
        ({**LLAMA3, "factor": True}, "factor"),
        ({**LLAMA3, "factor": float("nan")}, "factor"),
    ],
)
def test_other_scalings_are_refused(entry: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        RopeScaling.parse(entry)


# Architectures


SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


def test_unused_features_are_let_pass() -> None:
    harmless = {"sliding_window": 128, "use_sliding_window": True, "num_experts": 0, "rope_parameters": None}
    config, scaling = model_config({**SETTINGS, **harmless})
    assert scaling is None and config.head_dim == 16 and config.rms_norm_eps_e12 == 1_000_000
    config, scaling = model_config({**SETTINGS, "rope_scaling": LLAMA3})
    assert scaling is not None and config.rope_scaling_hash == scaling.hash()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": []}, "none"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped attention"),
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "part of each head"),
        ({"alibi": True}, "ALiBi"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, "sliding-window"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "bias on the attention output"),
        ({"rope_theta": 10_000.5}, "rotary base"),
        ({"hidden_size": None, "head_dim": None}, "misstates"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        model_config({**SETTINGS, **change})


# Bounds of a model


def extents(weights: Any) -> Any:
    return lambda plan: [bounds.extent(e, row) for e, row in weights.rows[plan.name]]


def test_the_bound_of_every_sum_is_that_of_the_worst_input() -> None:
    weights = integer_weights(ODD, 5)
    worst = bounds.check_bounds(ODD, extents(weights))
    assert set(worst) == {*(f"0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")), "logits"}
    # Inputs of the largest magnitude with the signs of a row attain the bound, and no inputs exceed it.
    rows = weights.rows["0.down"]
    attained = max(c.dot(row, [c.HIDDEN_LIMIT if x > 0 else -c.HIDDEN_LIMIT for x in row]) for _, row in rows)
    assert attained == worst["0.down"] < bounds.EXACT


def with_row(weights: Any, name: str, row: tuple[int, list[int]]) -> Any:
    rows = {**weights.rows, name: [row, *weights.rows[name][1:]]}
    return dataclasses.replace(weights, rows=rows)


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("0.input_norm", (8, [32_640] * 144), r"0\.input_norm: the norm output"),
        ("0.down", (-4, [32_640] * 72), r"0\.down, row 0: its exponent -4"),
        ("embed", (30, [32_640] * 144), "residual stream after the embedding"),
        ("0.q_norm", (9, [32_640] * 40), r"0\.q_norm: the norm output"),
    ],
)
def test_a_model_that_breaks_a_bound_is_refused_by_tensor(name: str, row: tuple[int, list[int]], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        bounds.check_bounds(ODD, extents(with_row(integer_weights(ODD, 5), name, row)))


def test_sums_are_bounded_block_by_block_and_whole() -> None:
    """An 8-billion-parameter shape: full rows of `down` break 2**53 in a block; rows as trained do not."""
    config = dataclasses.replace(EIGHT_B, num_layers=1, vocab_size=1, max_positions=1)

    def rows(size: int) -> Any:
        def of(plan: w.TensorPlan) -> Iterable[bounds.Extent]:
            block = size * min(plan.columns, bounds.BLOCK)
            return [bounds.Extent(-14 if "norm" in plan.name else -16, size, size * plan.columns, block)] * plan.rows

        return of

    worst = bounds.check_bounds(config, rows(6000))
    assert worst["0.down"] > bounds.EXACT and worst["0.down"] < bounds.WHOLE
    with pytest.raises(InvalidInput, match=r"0\.down: the block sum of row 0"):
        bounds.check_bounds(config, rows(32_640))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 8193}, "hidden_size"),
        ({"head_dim": 41}, "even"),
        ({"head_dim": 514}, "head_dim"),
        ({"num_kv_heads": 3}, "share"),
        ({"num_heads": 512, "head_dim": 512}, "num_heads \\* head_dim"),
        ({"rms_norm_eps_e12": 0}, "rms_norm_eps_e12"),
        ({"rms_norm_eps_e12": 1, "head_dim": 2}, "QK-norm"),
        ({"max_positions": 2**17 + 1}, "max_positions"),
    ],
)
def test_dimensions_outside_of_the_definition_are_refused(change: dict[str, int], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        bounds.check_dimensions(dataclasses.replace(ODD, **change))


def test_known_shapes_are_inside() -> None:
    for config in (SMOLLM, EIGHT_B, TINY, ODD):
        bounds.check_dimensions(config)
