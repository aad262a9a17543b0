"""The trace's layout and its one-step referee: every leaf of whole traces, every changed leaf, every index."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec import weights as w
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import AttentionCell, Cell, Referee, SumCell, weight_row
from poip_chain.spec.trace import LEAF_BYTES, WIDE, Layout, Op, check_context, decode, encode, trace_root
from tests.support.trace_inputs import TraceInputs
from tests.vectors.generate_canonical import (
    EIGHT_B,
    ODD,
    ODD_TOKENS,
    SMOLLM,
    TOKENS,
    integer_weights,
    trace_vectors,
    traced,
)
from tests.vectors.generate_numeric import TINY, render

pytestmark = pytest.mark.slow

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
PLAIN = dataclasses.replace(
    TINY, qk_norm=False, attention_bias=False, tied_embeddings=True, num_heads=4, num_kv_heads=2, mlp_bias=True
)
MOST_READS = 64


def case(config: ModelConfig, tokens: tuple[int, ...], outputs: int) -> tuple[Referee, TraceInputs]:
    weights = integer_weights(config, 5)
    layout = Layout(config, len(tokens) - outputs + 1, outputs)
    inputs = TraceInputs(layout, weights, tokens, list(traced(config, tokens, outputs)))
    return Referee(layout, inputs), inputs


def recompute(referee: Referee, inputs: TraceInputs, index: int) -> bytes:
    """A leaf by the referee alone, sub-traces and partial sums included."""
    tensor = referee.layout.locate(index).tensor
    inputs.sums.clear()
    inputs.subs.clear()
    for element in range(tensor.per_leaf):
        inputs.open(referee, Cell(index, element))
    return referee.leaf(index)


def test_vectors_are_what_the_spec_gives() -> None:
    assert (VECTORS / "trace.json").read_text() == render(trace_vectors())


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["everything", "plain"])
def test_every_leaf_follows_from_earlier_ones(config: ModelConfig) -> None:
    """The referee reproduces the whole trace of a forward pass, and never reads a leaf that is not agreed by then."""
    referee, inputs = case(config, TOKENS, 2)
    assert len(inputs.leaves) == referee.layout.count
    for index, leaf in enumerate(inputs.leaves):
        inputs.read.clear()
        tensor = referee.layout.locate(index).tensor
        assert recompute(referee, inputs, index) == leaf, (index, tensor.name)
        read = [at for kind, at in inputs.read if kind == "leaf"]
        running = tensor.op in (Op.INPUT_SUM, Op.POST_SUM, Op.FINAL_SUM, Op.INPUT_MAX, Op.POST_MAX, Op.FINAL_MAX)
        assert all(at < index or (at == index and running) for at in read), tensor.name


def test_cells_over_several_blocks_heads_and_segments() -> None:
    """A model of more than 128 columns over more than 32 positions: a sample of every tensor."""
    referee, inputs = case(ODD, ODD_TOKENS, 2)
    rng = random.Random(4)
    for tensor in referee.layout.tensors():
        for _ in range(4):
            row, leaf = rng.randrange(max(0, tensor.rows - 40), tensor.rows), rng.randrange(tensor.row_leaves)
            index = tensor.start + row * tensor.row_leaves + leaf
            cell = Cell(index, rng.randrange(tensor.per_leaf))
            inputs.open(referee, cell)
            inputs.read.clear()
            assert referee.compute(cell) == decode(inputs.leaves[index], tensor.op in WIDE)[cell.element], tensor.name
            assert len(set(inputs.read)) <= MOST_READS


def test_no_step_reads_more_than_its_stated_inputs() -> None:
    referee, inputs = case(ODD, ODD_TOKENS, 2)
    layout = referee.layout
    linear = Cell(layout.index(Op.MIDDLE, 0, 35, 5), 5)
    attention = Cell(layout.index(Op.ATTENTION, 0, 35, 130), 2)
    for cell in (linear, attention):
        inputs.open(referee, cell)
    inputs.read.clear()
    referee.compute_sum(SumCell(linear, 0))
    assert len([1 for kind, _ in inputs.read if kind == "leaf"]) == 4 and len(inputs.read) == 5
    parts = referee.attention_parts(attention)
    assert (parts.query, parts.column, parts.blocks, parts.count) == (3, 10, 2, 4 + 1 + 2 + 1 + 1)
    stated = {0: 4, parts.maxima: 2, parts.weights: 2, parts.sums: 1, parts.products: 2}  # a head of 40 is two leaves
    for index, most in stated.items():
        inputs.read.clear()
        referee.compute_attention(AttentionCell(attention, index, 0))
        assert len(set(inputs.read)) <= most


@pytest.mark.parametrize("seed", range(3))
def test_any_changed_leaf_is_found_at_the_first_difference(seed: int) -> None:
    """A claimer changes one element, padding included. At the first leaf that differs the inputs are agreed, whatever
    follows it, and the referee's value is the honest one and not the claimed one.
    """
    config = (TINY, PLAIN)[seed % 2]
    referee, inputs = case(config, TOKENS, 2)
    honest = list(inputs.leaves)
    rng = random.Random(seed)
    for index in rng.sample(range(len(honest)), 60):
        place = referee.layout.locate(index)
        wide = place.tensor.op in WIDE
        values = decode(honest[index], wide)
        element = rng.randrange(len(values))  # padding too
        values[element] += rng.choice((-1, 1))
        inputs.leaves[index] = encode(values, wide)
        cell = Cell(index, element)
        inputs.open(referee, cell)
        assert referee.compute(cell) == decode(honest[index], wide)[element] != values[element]
        inputs.leaves[index] = honest[index]


def test_a_lie_in_a_sub_trace_is_found_at_its_first_difference() -> None:
    referee, inputs = case(ODD, ODD_TOKENS, 2)
    attention = Cell(referee.layout.index(Op.ATTENTION, 0, 35, 97), 1)
    linear = Cell(referee.layout.index(Op.MIDDLE, 0, 35, 20), 4)
    for cell in (attention, linear):
        inputs.open(referee, cell)
    parts = referee.attention_parts(attention)
    rng = random.Random(9)
    for index in range(parts.count):
        honest = inputs.subs[attention, index]
        values = decode(honest, not parts.narrow(index))
        element = rng.randrange(len(values))
        values[element] += 1
        inputs.subs[attention, index] = encode(values, not parts.narrow(index))
        right = referee.compute_attention(AttentionCell(attention, index, element))
        assert right == values[element] - 1
        inputs.subs[attention, index] = honest
    inputs.sums[linear, 1] += 2**40
    assert referee.compute_sum(SumCell(linear, 1)) == inputs.sums[linear, 1] - 2**40
    # A true sub-trace under a false leaf: the element is the sub-trace's last step, so it is found there.
    assert referee.compute(attention) == decode(inputs.leaves[attention.index], False)[1]


def test_impossible_inputs_are_refused_not_computed() -> None:
    """Whoever names a leaf after the first false one may meet values that would divide by zero or shift backwards."""
    referee, inputs = case(TINY, TOKENS, 2)
    layout = referee.layout
    for op, value, reader in (
        (Op.INPUT_SUM, 0, Op.INPUT_NORM),
        (Op.INPUT_SUM, 2**62, Op.INPUT_NORM),
        (Op.POST_MAX, -1, Op.POST_SUM),
        (Op.POST_MAX, -1, Op.POST_NORM),
    ):
        index = layout.index(op, 0, 0, 0)
        honest, inputs.leaves[index] = inputs.leaves[index], encode([value], True)
        with pytest.raises(InvalidInput, match="any forward pass"):
            referee.compute(Cell(layout.index(reader, 0, 0, 0), 0))
        inputs.leaves[index] = honest
    cell = Cell(layout.index(Op.ATTENTION, 0, 1, 0), 0)
    inputs.open(referee, cell)
    parts = referee.attention_parts(cell)
    inputs.subs[cell, parts.maxima] = encode([-(2**60)], True)
    inputs.subs[cell, parts.sums] = encode([0], True)
    with pytest.raises(InvalidInput, match="any forward pass"):
        referee.compute_attention(AttentionCell(cell, parts.weights, 0))
    with pytest.raises(InvalidInput, match="any forward pass"):
        referee.compute(cell)


def test_padding_is_zero_and_reads_nothing() -> None:
    referee, inputs = case(TINY, TOKENS, 2)
    inputs.read.clear()
    for index in range(0, referee.layout.count, 7):
        place = referee.layout.locate(index)
        for element in range(place.count, place.tensor.per_leaf):
            assert referee.compute(Cell(index, element)) == 0
    assert inputs.read == []


CONFIGS = st.builds(
    ModelConfig,
    hidden_size=st.integers(1, 300),
    intermediate_size=st.integers(1, 300),
    num_layers=st.integers(1, 4),
    num_heads=st.integers(1, 3).map(lambda n: 2 * n),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.integers(1, 70).map(lambda n: 2 * n),
    vocab_size=st.integers(1, 200),
    max_positions=st.just(200),
    rms_norm_eps_e12=st.just(10_000_000),
    rope_theta=st.just(10_000),
    rope_scaling_hash=st.just(bytes(32)),
    tied_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
)


@given(CONFIGS, st.integers(1, 100), st.integers(1, 100), st.data())
def test_places_and_indices_are_inverses(config: ModelConfig, prompt: int, output: int, data: st.DataObject) -> None:
    layout = Layout(config, prompt, output)
    tensors = layout.tensors()
    assert sum(tensor.leaves for tensor in tensors) == layout.count
    assert [tensor.start for tensor in tensors[1:]] == [t.start + t.leaves for t in tensors[:-1]]
    index = data.draw(st.integers(0, layout.count - 1))
    place = layout.locate(index)
    assert place.tensor in tensors and 1 <= place.count <= place.tensor.per_leaf
    column = data.draw(st.integers(place.column, place.column + place.count - 1))
    assert layout.index(place.tensor.op, place.tensor.layer, place.row, column) == index


@given(CONFIGS, st.data())
def test_weight_rows_are_those_of_the_weights_tree(config: ModelConfig, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(w.tensor_plan(config)))
    row = data.draw(st.integers(0, plan.rows - 1))
    layer, _, name = plan.name.rpartition(".")
    assert weight_row(config, name, int(layer or 0), row) == w.row_index(config, plan.name, row)


def test_a_tied_head_is_the_embedding() -> None:
    assert weight_row(SMOLLM, "head", 0, 77) == weight_row(SMOLLM, "embed", 0, 77) == 77


def test_real_layouts_have_the_published_sizes() -> None:
    """docs/court.md quotes these."""
    assert [Layout(SMOLLM, n - 63, 64).count for n in (128, 512)] == [1_363_712, 5_156_096]
    assert Layout(EIGHT_B, 449, 64).count < 2**27


def test_a_context_whose_traces_no_tree_holds_is_refused() -> None:
    """To the token: the contract refuses such a trace, so an answer of that length could not be accused."""
    long = dataclasses.replace(EIGHT_B, max_positions=2**17)
    for fine in (1, 2, 8192):
        check_context(long, fine)
    with pytest.raises(InvalidInput, match="max_context can be up to") as refused:
        check_context(long, 2**17)
    longest = int(re.search(r"up to (\d+)\.", str(refused.value))[1])  # type: ignore[index]
    check_context(long, longest)
    Layout(long, 1, longest - 1)
    with pytest.raises(InvalidInput, match=rf"up to {longest}\."):
        check_context(long, longest + 1)


def test_leaves_are_128_bytes_and_nothing_else_is_accepted() -> None:
    assert encode([-1], False) == b"\xff" * 4 + bytes(124) and len(encode([], True)) == LEAF_BYTES
    assert decode(encode([-(2**63), 2**63 - 1], True), True)[:2] == [-(2**63), 2**63 - 1]
    for values, wide in (([2**31], False), ([2**63], True), ([0] * 33, False)):
        with pytest.raises(InvalidInput, match=r"does not fit|128 bytes"):
            encode(values, wide)
    with pytest.raises(InvalidInput, match="128 bytes"):
        decode(bytes(127), False)


def test_wrong_places_are_refused() -> None:
    referee, inputs = case(TINY, TOKENS, 2)
    layout = referee.layout
    for wrong in (-1, layout.count):
        with pytest.raises(InvalidInput, match="outside a trace"):
            layout.locate(wrong)
    with pytest.raises(InvalidInput, match="no layer 2"):
        layout.tensor(Op.Q, 2)
    with pytest.raises(InvalidInput, match="rows of"):
        layout.index(Op.Q, 0, 0, TINY.head_dim)
    with pytest.raises(InvalidInput, match="no element 32"):
        referee.compute(Cell(layout.index(Op.HIDDEN, 0, 0, 0), 32))
    with pytest.raises(InvalidInput, match="not a linear"):
        referee.segments(Cell(layout.index(Op.HIDDEN, 0, 0, 0), 0))
    with pytest.raises(InvalidInput, match="no running sum"):
        referee.compute_sum(SumCell(Cell(layout.index(Op.Q, 0, 0, 0), 0), 1))
    attention = Cell(layout.index(Op.ATTENTION, 0, 0, 0), 0)
    with pytest.raises(InvalidInput, match="not an attention"):
        referee.attention_parts(Cell(0, 0))
    with pytest.raises(InvalidInput, match="no cell"):
        referee.compute_attention(AttentionCell(attention, referee.attention_parts(attention).count, 0))
    inputs.tokens = (17, *TOKENS[1:])
    with pytest.raises(InvalidInput, match="vocabulary"):
        referee.compute(Cell(0, 0))
    for lengths in ((0, 1), (1, 0), (9, 2)):
        with pytest.raises(InvalidInput, match=r"prompt and output|positions"):
            Layout(TINY, *lengths)
    with pytest.raises(InvalidInput, match=r"embed of this trace is not of shape"):
        trace_root(layout, {})
    assert len(json.loads((VECTORS / "trace.json").read_text())["layouts"]) == 4
