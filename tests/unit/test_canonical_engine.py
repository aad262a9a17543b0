"""The fast engine computes spec's bits: every tensor, every way of multiplying, any threads, any split, any opening."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eth_hash.auto import keccak
from safetensors.torch import save_file

from poip_chain.canonical import keccak as hashes
from poip_chain.canonical import matmul, ops, selftest
from poip_chain.canonical import weights as canonical_weights
from poip_chain.canonical.compiled import Workers, cpu_has
from poip_chain.canonical.engine import open_model
from poip_chain.canonical.model import Cache, CanonicalModel
from poip_chain.canonical.trace import CHUNK_LEVEL, StreamedTree, Trace, leaf_words
from poip_chain.errors import ConfigurationError, IntegrityError, InvalidInput, UnsupportedModel
from poip_chain.spec import bounds
from poip_chain.spec import canonical as c
from poip_chain.spec import weights as spec_weights
from poip_chain.spec.forward import forward
from poip_chain.spec.merkle import merkle_levels, merkle_root, verify_proof
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import Cell, Referee, SumCell, build_attention, running_sums
from poip_chain.spec.trace import Layout, Op, trace_leaves
from poip_chain.spec.types import ZERO_HASH
from tests.support.trace_inputs import TraceInputs
from tests.vectors.generate_canonical import ODD, ODD_TOKENS, TOKENS, integer_weights
from tests.vectors.generate_numeric import TINY

pytestmark = pytest.mark.slow

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "trace.json").read_text())
PATHS = ["float64", "int8"] + (["int16"] if cpu_has("avx2") else [])
LLAMA = ModelConfig(64, 96, 2, 4, 1, 64, 37, 64, 10_000_000, 500_000, ZERO_HASH, False, False, False, False)
WIDE_HEAD = dataclasses.replace(LLAMA, num_heads=2, num_kv_heads=2, head_dim=128, num_layers=1, tied_embeddings=True)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True, head_dim=18, hidden_size=35, intermediate_size=33)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=66, num_layers=1)
MODELS = {"llama": LLAMA, "head-128-tied": WIDE_HEAD, "qwen2-odd": QWEN2, "qwen3": QWEN3, "odd": ODD, "tiny": TINY}


def engine(config: ModelConfig, path: str | None = "float64", threads: int = 1, plain: bool = False) -> CanonicalModel:
    weights = canonical_weights.from_rows(config, integer_weights(config, 5).rows)
    return CanonicalModel(weights, threads, path, plain)


def tokens_of(config: ModelConfig, count: int = 9) -> list[int]:
    count = min(count, config.max_positions)
    return [random.Random(config.head_dim + i).randrange(config.vocab_size) for i in range(count)]


def recorded(model: CanonicalModel, tokens: list[int], outputs: int) -> dict[str, Any]:
    """All tensors by spec's names, in the order in which they were recorded."""
    found = {}

    def record(op: Op, layer: int, rows: Any) -> None:
        name = op.name.lower()
        found[f"{layer}.{name}" if Op.EMBED < op < Op.FINAL_MAX else name] = rows

    model.forward(tokens, None, outputs, record)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_specs(name: str) -> None:
    config = MODELS[name]
    tokens = tokens_of(config)
    wanted = forward(integer_weights(config, 5), tokens, 3)
    for path in PATHS:
        for threads, plain in ((1, False), (2, False), (2, True)):
            found = recorded(engine(config, path, threads, plain), tokens, 3)
            assert list(found) == [tensor.name for tensor in Layout(config, len(tokens) - 2, 3).tensors()]
            for tensor, rows in wanted.items():
                assert found[tensor].tolist() == [list(row) for row in rows], (path, threads, plain, tensor)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("path", PATHS)
def test_any_split_and_decoding_give_the_same_bits(name: str, path: str) -> None:
    model = engine(MODELS[name], path, 2)
    tokens = [i % 37 for i in range(64)]
    wanted = model.forward(tokens, None, len(tokens))
    rng = random.Random(3)
    for parts in ([1] * 64, [63, 1], [17, 1, 30, 16], [rng.randrange(1, 4) for _ in range(20)]):
        cache, at = Cache(), 0
        for count in parts:
            logits = model.forward(tokens[at : at + count], cache, count)
            assert np.array_equal(logits, wanted[at : at + count])
            at += count


def test_keys_are_summed_in_blocks_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts beyond KEY_BLOCK, and depths beyond BLOCK, at sizes that a test can afford."""
    wanted = engine(ODD).forward(list(ODD_TOKENS), None, 36)
    monkeypatch.setattr("poip_chain.canonical.model.KEY_BLOCK", 7)
    monkeypatch.setattr("poip_chain.canonical.model.QUERY_BLOCK", 5)
    monkeypatch.setattr(matmul, "BLOCK", 50)
    monkeypatch.setattr(matmul, "COLUMNS", 11)
    for path in ("float64", "int8"):
        assert np.array_equal(engine(ODD, path, 2).forward(list(ODD_TOKENS), None, 36), wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_products_are_exact_at_the_bounds(path: str, rows: int) -> None:
    """Largest weights of either sign, inputs to the ends of int32, depths beside every blocking, against plain ints."""
    rng = np.random.default_rng(rows)
    for depth, outputs in ((1, 1), (33, 17), (130, 40), (4100, 5)):
        weights = rng.choice(np.array([-32_640, 32_640, 32_639, 0, 1], np.int16), (outputs, depth))
        weights[0] = 32_640
        x = rng.integers(-(2**22), 2**22, (rows, depth)).astype(np.int32)
        x[:, ::3] = rng.choice(np.array([2**23 - 2049, 2**23 - 2048, -(2**23), 2047, 2048], np.int32), x[:, ::3].shape)
        if depth < 200:
            x[-1] = rng.choice(np.array([2**31 - 1, -(2**31 - 1)], np.int32), depth)
        wanted = x.astype(object) @ weights.T.astype(object)
        found = np.zeros((rows, outputs), np.int64)

        def done(sums: Any, first: int, last: int, found: Any = found) -> None:
            found[:, first:last] = sums

        way = matmul.make_path(path, Workers(2))
        way.multiply(way.take(x), way.prepare(weights), done)
        assert (found == wanted).all()


def test_a_path_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"no matmul path 'int5'.*float64"):
        matmul.make_path("int5", Workers(1))
    assert matmul.fastest(Workers(1)).name in PATHS


@pytest.mark.parametrize("way", [ops.PLAIN, ops.FAST], ids=["plain", "compiled"])
def test_steps_at_their_ends_are_specs(way: Any) -> None:
    rng = random.Random(8)
    gates = [0, 1, -1, c.GATE_LIMIT, -c.GATE_LIMIT, 2**21, -(2**21), 2**21 - 1]
    gates += [rng.randrange(-(2**b), 2**b) for b in range(4, 31) for _ in range(9)]
    ups = [rng.choice((-c.GATE_LIMIT, c.GATE_LIMIT, 1, -70_000)) for _ in gates]
    out = np.empty((1, len(gates)), np.int32)
    way.swiglu(np.array([gates], np.int32), np.array([ups], np.int32), out)
    assert out[0].tolist() == [c.swiglu(g, u) for g, u in zip(gates, ups, strict=True)]
    for head, spread in ((64, 2**31), (64, 2**53 - 1), (40, 2**34), (2, 2**20), (512, 2**36)):
        scores = [[float(rng.randrange(-spread, spread)) for _ in range(50)] for _ in range(6)]
        given, totals = np.array(scores), np.empty(6, np.int64)
        way.softmax(given, 47, 2, c.score_multiplier(head), totals)
        for row in range(6):
            seen = [int(score) for score in scores[row][: 48 + row // 2]]
            _, weights, total = c.softmax(seen, c.score_multiplier(head))
            assert given[row].tolist() == weights + [0] * (50 - len(seen)) and totals[row] == total
    products = np.array([[2**57 - 1, -(2**57), 0, 5, -5]], np.int64)
    result = np.empty((1, 5), np.int32)
    way.attend(products, np.array([2**37]), result)
    assert result[0].tolist() == [c.attend(int(p), 2**37) for p in products[0]]
    for scale, gain_exponent in ((1, -14), (2**20, -30), (2**40, -14), (2**61, -10), (0, -14), (2**30, -80)):
        row = [rng.randrange(-scale, scale + 1) for _ in range(300)]
        gains = [rng.randrange(-32_640, 32_641) for _ in row]
        wanted = c.rms_norm(row, 20, 10_000_000, gains, gain_exponent)
        out = np.empty((1, 300), np.int32)
        epsilon, root = c.norm_epsilon(10_000_000, 300, 20, 0), isqrt(300 << 40)
        stats = np.empty((1, 3), np.int64), np.empty((1, 3), np.int64)
        shift = min(4 - gain_exponent, 62)
        way.rms_norm(np.array([row]), epsilon, root, np.array(gains), shift, 2**31 - 1, out, *stats)
        assert out[0].tolist() == wanted
    limit = c.LINEAR_QK_LIMIT
    x = [[rng.choice((-limit, limit, 5)) for _ in range(16)] for _ in range(3)]
    table = [[rng.choice((2**30, 759_250_125, -(2**30), 0)) for _ in range(8)] for _ in range(3)]
    turned = np.empty((3, 16), np.int32)
    way.rope(np.array(x, np.int32), 2, np.array(table, np.int32), turned)
    for t in range(3):
        for start in (0, 8):
            pairs = [c.rope(x[t][start + i], x[t][start + 4 + i], table[t][i], table[t][4 + i]) for i in range(4)]
            assert turned[t, start : start + 8].tolist() == [a for a, _ in pairs] + [b for _, b in pairs]
    sums = np.array([[2**61 - 1, -(2**61), 3, -3, 5]], np.int64)
    shifts = np.array([62, 62, 1, 1, 0])
    for limit in (2, 2**31 - 1):
        finished = np.empty((1, 5), np.int32)
        way.finish(sums, shifts, np.array([0, 1, -1, 0, 7]), limit, finished)
        wanted = [
            c.clamp(c.rsh(int(v), int(s)) + b, limit) for v, s, b in zip(sums[0], shifts, (0, 1, -1, 0, 7), strict=True)
        ]
        assert finished[0].tolist() == wanted


# Hashes and trees


@pytest.mark.parametrize("length", [1, 34, 65, 129, 135, 136, 257, 300])
def test_many_hashes_are_each_ones_hash(length: int) -> None:
    messages = np.random.default_rng(length).integers(0, 256, (11, length)).astype(np.uint8)
    wanted = [keccak(row.tobytes()) for row in messages]
    assert [row.tobytes() for row in hashes.keccak_many(messages)] == wanted
    words = np.random.default_rng(length).integers(0, 2**63, (9, 16)).astype(np.uint64)
    assert [row.tobytes() for row in hashes.leaf_nodes(words)] == [keccak(b"\0" + row.tobytes()) for row in words]


def test_the_plain_sponge_gives_the_same_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = np.random.default_rng(0).integers(0, 256, (5, 300)).astype(np.uint8)
    words = np.arange(80, dtype=np.uint64).reshape(5, 16)
    wanted = hashes.keccak_many(messages), hashes.leaf_nodes(words)
    monkeypatch.setattr(hashes, "HAVE_NUMBA", False)
    assert np.array_equal(hashes.keccak_many(messages), wanted[0])
    assert np.array_equal(hashes.leaf_nodes(words), wanted[1])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 4096, 4097, 8193, 12_290])
def test_a_streamed_tree_is_the_tree(count: int) -> None:
    rows = np.arange(count * 20, dtype=np.int32).reshape(count, 20)
    tree = StreamedTree(Workers(2))
    for start in range(0, count, 1000):
        tree.add(rows[start : start + 1000])
    assert tree.finish() == merkle_root([words.tobytes() for words in leaf_words(rows)])


def test_the_frozen_trace() -> None:
    entry = VECTORS["trace"]
    for path in PATHS:
        for threads in (1, 2):
            trace = Trace(engine(ODD, path, threads), ODD_TOKENS, 2)
            assert trace.root.hex() == entry["root"]
            for index, leaf in entry["leaves"]:
                assert trace.leaf(index).hex() == leaf
            for op in ("partial_sums", "attention"):
                cell = Cell(entry[op]["index"], entry[op]["element"])
                if op == "attention":
                    assert [leaf.hex() for leaf in trace.attention(cell)] == entry[op]["leaves"]
                    assert trace.attention_tree(cell)[-1][0].hex() == entry[op]["root"]
                else:
                    assert trace.partial_sums(cell) == entry[op]["sums"]


THREE_LAYERS = dataclasses.replace(ODD, num_layers=3, hidden_size=130, num_heads=2, head_dim=64, intermediate_size=96)


@cache
def slow_tree(config: ModelConfig, tokens: tuple[int, ...]) -> tuple[list[bytes], list[list[Any]]]:
    leaves = trace_leaves(Layout(config, 35, 2), forward(integer_weights(config, 5), tokens, 2))
    return leaves, merkle_levels(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [2**30, 1])
def test_every_node_and_leaf_opens(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all residual streams kept and with one; levels below and above those held in memory."""
    monkeypatch.setattr("poip_chain.canonical.trace.CHECKPOINT_BYTES", kept)
    config, tokens = THREE_LAYERS, ODD_TOKENS
    leaves, levels = slow_tree(config, tokens)
    assert len(leaves) > 1 << CHUNK_LEVEL  # or this test would not reach the levels that are kept
    trace = Trace(engine(config, "float64", 2), tokens, 2)
    assert trace.root == levels[-1][0]
    for number, level in enumerate(levels):
        assert trace.nodes(number, 0, len(level)) == level
        first = len(level) // 3
        assert trace.nodes(number, first, 1) == level[first : first + 1]
    for index in (0, 1, 4095, 4096, len(leaves) - 1, *random.Random(1).sample(range(len(leaves)), 20)):
        assert trace.leaf(index) == leaves[index]
        assert verify_proof(trace.root, [leaves[index]], [index], len(leaves), trace.proof(index))
    for level, first, count in ((0, 0, 0), (0, len(leaves), 1), (-1, 0, 1), (99, 0, 1), (1, -1, 2)):
        with pytest.raises(InvalidInput, match="nodes"):
            trace.nodes(level, first, count)


@pytest.mark.parametrize("name", ["tiny", "odd", "qwen2-odd"])
def test_the_referee_runs_on_an_opened_trace(name: str) -> None:
    """Each kind of cell recomputed from what the trace gives: its own leaf; partial results equal spec's."""
    config = MODELS[name]
    tokens = tuple(tokens_of(config, 12) if name != "tiny" else TOKENS)
    trace = Trace(engine(config, None, 2), tokens, 2)
    referee = Referee(trace.layout, trace)
    weights = integer_weights(config, 5)
    slow = TraceInputs(trace.layout, weights, tokens, trace_leaves(trace.layout, forward(weights, tokens, 2)))
    slow_referee = Referee(trace.layout, slow)
    for tensor in trace.layout.tensors():
        row = tensor.rows - 1
        index = tensor.start + row * tensor.row_leaves
        assert referee.leaf(index) == trace.leaf(index), tensor.name
        cell = Cell(index, 0)
        slow.open(slow_referee, cell)
        if tensor.op is Op.ATTENTION:
            given: dict[int, bytes] = {}
            assert build_attention(slow_referee, cell, lambda i, leaf: slow.subs.update({(cell, i): leaf}))  # noqa: B023
            wanted = [slow.subs[cell, i] for i in range(referee.attention_parts(cell).count)]
            assert trace.attention(cell) == wanted and not given
        if tensor.op in (Op.Q, Op.V, Op.MIDDLE, Op.LOGITS):
            sums = running_sums(referee, cell, lambda _i, _v: None)
            assert list(sums) == trace.partial_sums(cell) == [slow.sums[cell, i] for i in range(len(sums))]
            assert referee.compute_sum(SumCell(cell, 0)) == sums[0]
    with pytest.raises(InvalidInput, match="not a linear element"):
        trace.partial_sums(Cell(0, 0))


# Self-test and weights


def test_the_frozen_roots_are_specs() -> None:
    for config, root in selftest.CASES:
        drawn = selftest.drawn_weights(config)
        bounds.check_bounds(config, drawn.extents)
        rows = {
            name: list(zip(drawn.exponents[name].tolist(), a.tolist(), strict=True))
            for name, a in drawn.integers.items()
        }
        tokens = selftest.tokens(config)
        canonical = type(integer_weights(TINY, 5))(config, rows)
        assert merkle_root(trace_leaves(Layout(config, 35, 3), forward(canonical, tokens, 3))).hex() == root


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_computes_other_bits_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selftest.check(path, 2)
    right = ops.FAST.swiglu

    def wrong(gate: Any, up: Any, out: Any) -> None:
        right(gate, up, out)
        out[0, 0] += 1

    monkeypatch.setattr(ops.FAST, "swiglu", wrong)
    with pytest.raises(ConfigurationError, match="wrong bits"):
        selftest.check(path, 1)


def checkpoint(folder: Path, scale: float = 1.0) -> dict[str, Any]:
    """A small Qwen2-like checkpoint on disk; its tensors as spec takes them."""
    settings = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 31,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    config, _ = canonical_weights.read_config(folder)
    generator = torch.Generator().manual_seed(4)
    types = [torch.bfloat16, torch.float16, torch.float32]
    tensors = {}
    for number, plan in enumerate(spec_weights.tensor_plan(config)):
        if plan.source:
            shape = (plan.rows, plan.columns) if plan.rows > 1 else (plan.columns,)
            tensors[plan.source] = (scale * torch.randn(shape, generator=generator)).to(types[number % 3])
    save_file(tensors, folder / "model.safetensors")
    return {k: (v[None] if v.ndim == 1 else v).tolist() for k, v in tensors.items()}


def test_weights_are_specs_and_are_kept(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path)
    first = canonical_weights.load(tmp_path)
    root = spec_weights.weights_root(first.config, tensors)
    assert first.root() == root
    kept = tmp_path / canonical_weights.CACHE
    written = kept.stat().st_mtime_ns
    again = canonical_weights.load(tmp_path, root)
    assert kept.stat().st_mtime_ns == written and again.root() == root
    for plan in spec_weights.tensor_plan(first.config):
        if plan.source:
            rows = [spec_weights.quantise_row(row) for row in tensors[plan.source]]
            assert again.exponents[plan.name].tolist() == [e for e, _ in rows]
            assert again.integers[plan.name].tolist() == [row for _, row in rows]
            assert list(again.extents(plan)) == [bounds.extent(*row) for row in rows]
    damaged = bytearray(kept.read_bytes())
    damaged[-40] ^= 1
    kept.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="weights_root"):
        canonical_weights.load(tmp_path, root)
    kept.write_bytes(damaged[:-3])  # another length is not this model's: made again
    assert canonical_weights.load(tmp_path, root).root() == root
    checkpoint(tmp_path, scale=2.0)
    assert canonical_weights.load(tmp_path).root() != root
    assert open_model(tmp_path, path="float64").forward([1, 2, 3]).shape == (1, 31)


def test_models_that_cannot_run_are_refused_with_the_reason(tmp_path: Path) -> None:
    checkpoint(tmp_path, scale=2.0**13)
    with pytest.raises(InvalidInput, match=r"tensor .*bound|exponent .* canonical form"):
        canonical_weights.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UnsupportedModel, match=r"model.embed_tokens|cannot be read"):
        canonical_weights.load(tmp_path)


def test_bad_requests_are_refused() -> None:
    model = engine(TINY)
    for tokens, logits, reason in (
        ([], 1, "0 tokens"),
        ([17], 1, "0 to 16"),
        ([1] * 10, 1, "10 positions"),
        ([1], 2, "2 pos"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            model.forward(tokens, None, logits)
    cache = Cache()
    model.forward([1] * 9, cache)
    with pytest.raises(InvalidInput, match="10 positions"):
        model.forward([1], cache)
