"""Canonical weights: quantisation, the row tree, the fast twin, and model directories."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eth_hash.auto import keccak
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from poip_chain.errors import IntegrityError, InvalidInput, UnsupportedModel
from poip_chain.service.engine import checkpoint, default_model, fast_weights, model
from poip_chain.spec import merkle, weights
from tests.vectors.generate_numeric import TINY, render, tiny_tensors, weights_vectors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(floats, min_size=1, max_size=20))
def test_quantised_weights_are_near_and_bounded(row: list[float]) -> None:
    exponent, integers = weights.quantise_row(row)
    assert max(map(abs, integers)) <= weights.MAX_WEIGHT
    for value, integer in zip(row, integers, strict=True):
        assert abs(math.ldexp(integer, exponent) - value) <= math.ldexp(0.5, exponent)
    if any(row):
        assert max(map(abs, integers)) >= 32_640 // 2


@given(st.lists(st.integers(-255, 255), min_size=1, max_size=12), st.integers(-40, 40))
def test_bfloat16_rows_of_one_binade_are_exact(mantissas: list[int], power: int) -> None:
    row = [math.ldexp(m, power) for m in mantissas]
    exponent, integers = weights.quantise_row(row)
    assert [math.ldexp(i, exponent) for i in integers] == row


def test_quantisation_by_hand() -> None:
    assert weights.quantise_row([1.0, -0.5]) == (-14, [16384, -8192])
    assert weights.quantise_row([0.0, 0.0]) == (0, [0, 0])
    # 1 - 2**-24 would round to 2**15: one exponent more, not an overflow.
    assert weights.quantise_row([1 - 2.0**-24]) == (-14, [16384])
    # Halves go to even: 0.5 and 1.5 and 2.5 units beside a full row.
    assert weights.quantise_row([1.0, 0.5 * 2.0**-14, 1.5 * 2.0**-14, 2.5 * 2.0**-14])[1] == [16384, 0, 2, 2]
    with pytest.raises(InvalidInput, match="infinite"):
        weights.quantise_row([1.0, float("inf")])


def test_row_leaf_is_the_exponent_and_the_segments_root() -> None:
    integers = list(range(-100, 100))
    data = b"".join(i.to_bytes(2, "little", signed=True) for i in integers)
    leaf = weights.row_leaf(-3, integers)
    assert leaf == (-3).to_bytes(2, "little", signed=True) + merkle.merkle_root([data[:256], data[256:]])
    assert len(leaf) == weights.ROW_LEAF_BYTES
    with pytest.raises(InvalidInput, match="does not fit"):
        weights.row_leaf(0, [40_000])


def test_rope_rows_are_correctly_rounded() -> None:
    config = dataclasses.replace(TINY, head_dim=8, rope_theta=100_000, max_positions=700)
    rows = list(weights.rope_rows(config))
    assert rows[0] == [2**30] * 4 + [0] * 4
    for position in (1, 2, 333, 699):
        for i in range(4):
            angle = position * 100_000 ** (-2 * i / 8)
            assert abs(rows[position][i] / 2**30 - math.cos(angle)) < 2**-31 + 1e-12
            assert abs(rows[position][4 + i] / 2**30 - math.sin(angle)) < 2**-31 + 1e-12


def test_every_row_has_its_index_and_a_proof() -> None:
    tensors = tiny_tensors(TINY)
    leaves = [
        weights.row_leaf(*weights.quantise_row(row))
        for tensor in weights.tensor_plan(TINY)
        if tensor.source
        for row in tensors[tensor.source]
    ] + [weights.row_leaf(weights.ROPE_EXPONENT, row, 4) for row in weights.rope_rows(TINY)]
    root = weights.weights_root(TINY, tensors)
    index = weights.row_index(TINY, "1.down", 7)
    leaf = weights.row_leaf(*weights.quantise_row(tensors["model.layers.1.mlp.down_proj.weight"][7]))
    assert merkle.verify_proof(root, [leaf], [index], len(leaves), merkle.merkle_proof(leaves, [index]))
    assert weights.row_index(TINY, "rope", TINY.max_positions - 1) == len(leaves) - 1
    with pytest.raises(InvalidInput, match="no row"):
        weights.row_index(TINY, "1.down", 12)
    with pytest.raises(InvalidInput, match="no tensor named"):
        weights.row_index(TINY, "2.down", 0)


def test_a_changed_weight_changes_the_root() -> None:
    tensors = tiny_tensors(TINY)
    before = weights.weights_root(TINY, tensors)
    tensors["model.norm.weight"][0][3] += 2.0**-8
    assert weights.weights_root(TINY, tensors) != before


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    tensors = tiny_tensors(TINY)
    del tensors["model.norm.weight"]
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight"):
        weights.weights_root(TINY, tensors)
    tensors["model.norm.weight"] = [[1.0]]
    with pytest.raises(InvalidInput, match="1 x 12"):
        weights.weights_root(TINY, tensors)


@pytest.mark.parametrize("length", [0, 1, 134, 135, 136, 137, 271, 272, 300])
def test_batched_keccak_is_keccak(length: int) -> None:
    messages = np.random.default_rng(length).integers(0, 256, (5, length), dtype=np.uint8)
    assert [h.tobytes() for h in fast_weights.keccak_many(messages)] == [keccak(m.tobytes()) for m in messages]


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True, "attention_bias": False, "qk_norm": False}])
def test_fast_root_is_the_specs(changes: dict[str, bool]) -> None:
    config = dataclasses.replace(TINY, hidden_size=200, intermediate_size=130, **changes)
    tensors = tiny_tensors(config, seed=2)
    tensors["model.embed_tokens.weight"][3] = [0.0] * 200
    tensors["model.embed_tokens.weight"][4][0] = 1 - 2.0**-24
    arrays = {name: np.array(rows, dtype=np.float32) for name, rows in tensors.items()}
    assert fast_weights.weights_root(config, arrays.__getitem__) == weights.weights_root(config, tensors)


def test_fast_quantisation_refuses_what_is_not_finite() -> None:
    with pytest.raises(InvalidInput, match="infinite or not a number"):
        fast_weights.quantise_rows(np.array([[1.0, np.nan]], dtype=np.float32))


def test_vectors_are_what_the_spec_gives() -> None:
    assert (ROOT / "tests" / "vectors" / "weights.json").read_text() == render(weights_vectors())


# Model directories


def settings() -> dict[str, Any]:
    """config.json of a model with TINY's dimensions."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 17,
        "max_position_embeddings": 9,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": [3, 2],
    }


QWEN3 = dataclasses.replace(TINY, attention_bias=False)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "model"
    path.mkdir()
    tensors = {}
    for plan in weights.tensor_plan(QWEN3):
        if plan.source:
            tensor = torch.tensor(tiny_tensors(QWEN3)[plan.source], dtype=torch.bfloat16)
            tensors[plan.source] = tensor[0].clone() if plan.rows == 1 else tensor
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings()))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    yield path


def test_prepare_gives_the_specs_hashes(directory: Path) -> None:
    hashes = model.prepare(directory)
    assert hashes.weights_root == weights.weights_root(QWEN3, tiny_tensors(QWEN3))
    assert hashes.config == QWEN3 and hashes.config_hash == QWEN3.config_hash()
    assert hashes.chat_template_hash == keccak(b"{{ messages }}")
    assert hashes.tokenizer_hash == merkle.merkle_root([b"tokenizer.json\0" + keccak(b"{}")])
    assert hashes.end_token_ids == (2, 3)
    assert model.ModelHashes.from_json(json.loads(json.dumps(hashes.to_json()))) == hashes


def test_prepare_is_remembered_until_a_file_changes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model.prepare(directory)
    with monkeypatch.context() as patch:
        patch.setattr(model, "compute", lambda *_: pytest.fail("recomputed"))
        assert model.prepare(directory) == first
    (directory / "tokenizer.json").write_text('{"a": 1}')
    assert model.prepare(directory).tokenizer_hash != first.tokenizer_hash
    (directory / model.RECORD).write_text("not JSON")
    assert model.prepare(directory).weights_root == first.weights_root


def test_verify_sees_changed_weights(directory: Path) -> None:
    model.prepare(directory)
    assert model.verify(directory)
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (directory / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="its record"):
        model.verify(directory)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "bias"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, "sliding-window"),
        ({"num_attention_heads": None}, "num_heads"),
        ({"eos_token_id": None}, "end token"),
        ({"intermediate_size": 21}, "21 x 12"),
    ],
)
def test_unsupported_models_are_refused_by_name(directory: Path, change: dict[str, Any], why: str) -> None:
    (directory / "config.json").write_text(json.dumps({**settings(), **change}))
    with pytest.raises(InvalidInput, match=why):
        model.prepare(directory)


def test_pickles_and_missing_files_are_refused(directory: Path, tmp_path: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="pickle"):
        model.prepare(directory)
    (directory / "pytorch_model.bin").unlink()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        model.prepare(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        model.prepare(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors"):
        model.prepare(directory)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        model.prepare(tmp_path / "nothing")


@pytest.mark.parametrize("kind", checkpoint.DEGRADATIONS)
def test_degraded_copies_are_other_models(directory: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / kind
    checkpoint.degrade(directory, out, kind)
    honest, cheat = model.prepare(directory), model.prepare(out)
    assert cheat.weights_root != honest.weights_root
    assert cheat.tokenizer_hash == honest.tokenizer_hash
    assert cheat.config.num_layers == honest.config.num_layers - (kind == "drop_layer")
    with pytest.raises(InvalidInput, match="exists already"):
        checkpoint.degrade(directory, out, kind)
    with pytest.raises(InvalidInput, match="unknown degradation"):
        checkpoint.degrade(directory, tmp_path / "x", "int3")


def test_the_default_models_pin_is_the_lock_file() -> None:
    lock = (ROOT / "requirements" / "model.lock").read_text()
    wanted = " ".join(line.strip(" \\") for line in lock.splitlines() if not line.strip().startswith("#"))
    assert wanted == default_model.REQUIREMENT
