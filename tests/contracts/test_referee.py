"""Referee.vy and TraceMap.vy against the spec: layouts, every kind of cell, frozen vectors, hostile moves."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import boa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec.merkle import merkle_levels, merkle_root
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import LINEAR, Referee
from poip_chain.spec.trace import Layout, Op, encode
from tests.contracts import system
from tests.support.referee_steps import (
    Opening,
    RandomInputs,
    Step,
    Trees,
    open_step,
    random_step,
    sub_leaf,
    sub_leaf_count,
    whole_trees,
)
from tests.support.trace_inputs import TraceInputs
from tests.vectors.generate_canonical import EIGHT_B, ODD, ODD_TOKENS, SMOLLM, TOKENS, integer_weights, traced
from tests.vectors.generate_numeric import TINY

DISPUTES = system.CONTRACTS / "disputes"
VECTORS = Path(__file__).resolve().parent.parent / "vectors"
PLAIN = dataclasses.replace(
    TINY, qk_norm=False, attention_bias=False, tied_embeddings=True, num_heads=4, num_kv_heads=2, mlp_bias=True
)
NEVER = "referee: inputs are those of no forward pass"


@pytest.fixture(scope="module")
def trace_map() -> Any:
    return system.load(DISPUTES / "TraceMap.vy")


@pytest.fixture(scope="module")
def contract(trace_map: Any) -> Any:
    return system.load(DISPUTES / "Referee.vy", trace_map.address)


@cache
def case(config: ModelConfig, tokens: tuple[int, ...], outputs: int) -> tuple[Referee, TraceInputs, Trees]:
    """An honest trace with its trees."""
    layout = Layout(config, len(tokens) - outputs + 1, outputs)
    inputs = TraceInputs(layout, integer_weights(config, 5), tokens, list(traced(config, tokens, outputs)))
    return Referee(layout, inputs), inputs, whole_trees(inputs.rows, inputs.leaves, random.Random(1))


def opened(config: ModelConfig, tokens: tuple[int, ...], outputs: int, step: Step) -> Opening:
    """A step of an honest trace, its own tree included."""
    referee, inputs, trees = case(config, tokens, outputs)
    inputs.open(referee, step.cell)
    place = referee.layout.locate(step.leaf)
    if (place.tensor.op in LINEAR or place.tensor.op is Op.ATTENTION) and step.element < place.count:
        count = sub_leaf_count(referee, step.cell)
        levels = merkle_levels([sub_leaf(referee, step.cell, i) for i in range(count)])
        trees.levels[step.cell] = [list(level) for level in levels]
    return open_step(referee, step, trees)


def cell(config: ModelConfig, tokens: tuple[int, ...], op: Op, row: int, column: int, layer: int = 0) -> Step:
    layout = case(config, tokens, 2)[0].layout
    leaf = layout.index(op, layer, row, column)
    return Step(leaf, column - layout.locate(leaf).column)


# Layouts

CONFIGS = st.builds(
    lambda groups, **fields: ModelConfig(num_heads=groups * fields["num_kv_heads"], **fields),
    groups=st.integers(1, 5),
    hidden_size=st.integers(1, 8192),
    intermediate_size=st.integers(1, 15_000),
    num_layers=st.integers(1, 80),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 256).map(lambda n: 2 * n),
    vocab_size=st.integers(1, 200_000),
    max_positions=st.just(200),
    rms_norm_eps_e12=st.just(10_000_000),
    rope_theta=st.just(10_000),
    rope_scaling_hash=st.just(bytes(32)),
    tied_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
)


@settings(max_examples=30)
@given(CONFIGS, st.integers(1, 100), st.integers(1, 100), st.randoms(use_true_random=False))
def test_layouts(trace_map: Any, config: ModelConfig, prompt: int, output: int, rng: random.Random) -> None:
    """Counts, places and indices are the spec's, and what a random cell reads is what the spec reads there."""
    layout = Layout(config, prompt, output)
    dimensions = config.values()
    assert trace_map.leaf_count(dimensions, prompt, output) == layout.count
    index = rng.choice([0, layout.count - 1, rng.randrange(layout.count), rng.choice(layout.tensors()).start])
    place = layout.locate(index)
    tensor = place.tensor
    found = trace_map.locate(dimensions, prompt, output, index)
    assert tuple(found) == (tensor.op, tensor.layer, place.row, place.column, place.count)
    column = place.column + rng.randrange(place.count)
    where = (tensor.op, tensor.layer, place.row, column)
    assert trace_map.index_of(dimensions, prompt, output, *where) == index


@settings(max_examples=20)
@given(CONFIGS, st.integers(1, 100), st.integers(1, 100), st.randoms(use_true_random=False))
def test_steps_of_any_model(contract: Any, config: ModelConfig, prompt: int, output: int, rng: random.Random) -> None:
    layout = Layout(config, prompt, output)
    op = rng.choice([op for op in Op if config.qk_norm or op not in (Op.Q_NORM, Op.K_NORM)])
    step = random_step(layout, op, rng, inside=rng.random() < 0.6)
    agree(contract, open_step(Referee(layout, RandomInputs(layout, rng)), step, Trees(rng)))


def agree(contract: Any, opening: Opening) -> None:
    if opening.value is None:
        with boa.reverts(NEVER):
            contract.compute(*opening.arguments())
        return
    try:
        assert contract.compute(*opening.arguments()) == opening.value, opening.step
    except boa.BoaError as error:
        # Random exponents that no registered model has.
        assert "referee: exponent is out of range" in str(error), opening.step


@pytest.mark.slow
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name.lower())
def test_every_kind_of_cell(contract: Any, op: Op) -> None:
    """Random values in the shapes of an odd small model and of an 8-billion-parameter one with everything."""
    rng = random.Random(op)
    everything = dataclasses.replace(EIGHT_B, qk_norm=True, attention_bias=True, mlp_bias=True)
    for config, prompt, output in ((ODD, 20, 17), (everything, 449, 64)):
        layout = Layout(config, prompt, output)
        for inside in (False, True) if op in LINEAR else (False,):
            step = random_step(layout, op, rng, inside)
            agree(contract, open_step(Referee(layout, RandomInputs(layout, rng)), step, Trees(rng)))


def test_every_part_of_an_attention_sub_trace(contract: Any) -> None:
    rng = random.Random(2)
    parts: set[int] = set()
    for number in range(24):
        layout = Layout(*((ODD, 20, 17), (SMOLLM, 449, 64))[number % 2])
        step = random_step(layout, Op.ATTENTION, rng, inside=True)
        sub = Referee(layout, RandomInputs(layout, rng)).attention_parts(step.cell)
        starts = (0, sub.maxima, sub.weights, sub.sums, sub.products)
        parts.add(max(i for i, start in enumerate(starts) if start <= step.sub_leaf))
        agree(contract, open_step(Referee(layout, RandomInputs(layout, rng, 0.05)), step, Trees(rng)))
    assert parts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("config", "tokens"), [(TINY, TOKENS), (PLAIN, TOKENS), (ODD, ODD_TOKENS)], ids=["everything", "plain", "odd"]
)
def test_honest_traces(contract: Any, config: ModelConfig, tokens: tuple[int, ...]) -> None:
    """Cells of a real forward pass, with the roots that a court would hold: about one of each kind of tensor."""
    rng = random.Random(7)
    layout = case(config, tokens, 2)[0].layout
    for tensor in layout.tensors():
        if tensor.layer != rng.randrange(config.num_layers):
            continue
        leaf = tensor.start + rng.randrange(tensor.leaves)
        step = Step(leaf, rng.randrange(layout.locate(leaf).count))
        opening = opened(config, tokens, 2, step)
        assert contract.compute(*opening.arguments()) == opening.value, tensor.name
        held = case(config, tokens, 2)[1].leaves[leaf]
        assert contract.value(tensor.per_leaf == 16, held, step.element) == opening.value


# Frozen vectors


def test_frozen_layouts(trace_map: Any) -> None:
    for entry in json.loads((VECTORS / "trace.json").read_text())["layouts"]:
        fields = {**entry["config"], "rope_scaling_hash": bytes.fromhex(entry["config"]["rope_scaling_hash"])}
        arguments = (ModelConfig(**fields).values(), entry["prompt_tokens"], entry["output_tokens"])
        assert trace_map.leaf_count(*arguments) == entry["leaves"]
        for index, *place in entry["places"][:6]:
            assert list(trace_map.locate(*arguments, index)) == place


def test_frozen_trace(contract: Any, trace_map: Any) -> None:
    vector = json.loads((VECTORS / "trace.json").read_text())["trace"]
    tokens = tuple(vector["tokens"])
    where = (ODD.values(), vector["prompt_tokens"], 2)

    linear = vector["partial_sums"]
    step = Step(linear["index"], linear["element"])
    sums = b"".join(value.to_bytes(8, "little", signed=True) for value in linear["sums"])
    root = trace_map.root_of_sums(*where, step.leaf, step.element, sums)
    assert root == merkle_root([encode(linear["sums"], True)])
    for segment, value in enumerate(linear["sums"]):
        opening = opened(ODD, tokens, 2, dataclasses.replace(step, inside=True, sub_element=segment))
        assert opening.trace_root.hex() == vector["root"] and opening.sub_root in (root, bytes(32))
        assert contract.compute(*opening.arguments()) == value

    attention = vector["attention"]
    step = Step(attention["index"], attention["element"])
    leaves = [bytes.fromhex(leaf) for leaf in attention["leaves"]]
    assert trace_map.sub_leaf_count(*where, step.leaf, step.element) == len(leaves)
    assert contract.root_of_nodes(merkle_levels(leaves)[0]).hex() == attention["root"]
    for number in range(len(leaves)):
        opening = opened(ODD, tokens, 2, dataclasses.replace(step, inside=True, sub_leaf=number, sub_element=1))
        narrow = case(ODD, tokens, 2)[0].attention_parts(step.cell).narrow(number)
        assert contract.compute(*opening.arguments()) == contract.value(not narrow, leaves[number], 1)


def test_frozen_functions(contract: Any) -> None:
    """canonical.json through cells that hold its inputs."""
    vectors = json.loads((VECTORS / "canonical.json").read_text())
    layout = Layout(SMOLLM, 4, 2)

    class Held(RandomInputs):
        def hold(self, op: Op, *values: int) -> None:
            index = layout.index(op, 0, 0, 0)
            self.kept["leaf", index] = encode(values, op is Op.MIDDLE)

    def check(step: Step, inputs: Held, expected: int) -> None:
        opening = open_step(Referee(layout, inputs), step, Trees(random.Random(1)))
        assert opening.value == expected == contract.compute(*opening.arguments())

    for gate, up, expected in vectors["swiglu"][::2]:
        inputs = Held(layout, random.Random(1))
        inputs.hold(Op.GATE, gate)
        inputs.hold(Op.UP, up)
        check(Step(layout.index(Op.HIDDEN, 0, 0, 0), 0), inputs, expected)
    attention = Step(layout.index(Op.ATTENTION, 0, 0, 0), 0)
    parts = Referee(layout, RandomInputs(layout, random.Random(1))).attention_parts(attention.cell)
    for products, total, expected in vectors["attend"]:
        inputs = Held(layout, random.Random(1))
        inputs.kept[attention.cell, parts.sums] = encode([total], True)
        inputs.kept[attention.cell, parts.products] = encode([products], True)
        check(attention, inputs, expected)
    weight = dataclasses.replace(attention, inside=True, sub_leaf=parts.weights)
    for distance, head_dim, expected in vectors["attention_weight"][::2]:
        if head_dim == SMOLLM.head_dim:
            inputs = Held(layout, random.Random(1))
            inputs.kept[attention.cell, 0] = encode([-distance], True)
            inputs.kept[attention.cell, parts.maxima] = encode([0], True)
            check(weight, inputs, expected)


# Trees


@pytest.mark.parametrize("count", [1, 2, 3, 31, 33, 63, 64])
def test_a_run_of_nodes(contract: Any, count: int) -> None:
    leaves = [bytes([i]) for i in range(count)]
    assert contract.root_of_nodes(merkle_levels(leaves)[0]) == merkle_root(leaves)


def test_running_sums_have_a_fixed_length(trace_map: Any) -> None:
    layout = Layout(EIGHT_B, 3, 2)
    leaf = layout.index(Op.OUTPUT, 5, 1, 17)
    sums = [random.Random(i).getrandbits(60) for i in range(112)]
    written = b"".join(value.to_bytes(8, "little", signed=True) for value in sums)
    where = (EIGHT_B.values(), 3, 2)
    expected = merkle_root([encode(sums[i : i + 16], True) for i in range(0, 112, 16)])
    assert trace_map.root_of_sums(*where, leaf, 1, written) == expected
    assert trace_map.sub_leaf_count(*where, leaf, 1) == 7
    for wrong in (written[:-8], written + bytes(8), b""):
        with boa.reverts("referee: not all running sums"):
            trace_map.root_of_sums(*where, leaf, 1, wrong)
    with boa.reverts("referee: not a linear cell"):
        trace_map.root_of_sums(*where, layout.index(Op.HIDDEN, 5, 1, 17), 1, written)


# Hostile moves


def rebuilt(opening: Opening, **changes: Any) -> tuple[Any, ...]:
    return dataclasses.replace(opening, **changes).arguments()


def test_what_is_not_exactly_what_is_read_reverts(contract: Any) -> None:
    norm = opened(ODD, ODD_TOKENS, 2, cell(ODD, ODD_TOKENS, Op.POST_NORM, 35, 100))
    finish = opened(ODD, ODD_TOKENS, 2, cell(ODD, ODD_TOKENS, Op.MIDDLE, 35, 20))
    plain = opened(TINY, TOKENS, 2, cell(TINY, TOKENS, Op.EMBED, 3, 1))
    assert contract.compute(*norm.arguments()) == norm.value
    leaves = [norm.leaves[i : i + 128] for i in range(0, len(norm.leaves), 128)]
    assert len(leaves) == 3
    flipped = bytes([norm.leaves[0] ^ 1]) + norm.leaves[1:]
    refused: list[tuple[str, Opening, dict[str, Any]]] = [
        ("leaves are of the wrong length", norm, {"leaves": norm.leaves[:-128]}),
        ("leaves are of the wrong length", norm, {"leaves": norm.leaves + bytes(128)}),
        ("leaves are of the wrong length", norm, {"leaves": b""}),
        ("leaves are not of the trace", norm, {"leaves": flipped}),
        ("leaves are not of the trace", norm, {"leaves": leaves[1] + leaves[0] + leaves[2]}),
        ("leaves are not of the trace", norm, {"trace_root": bytes(32)}),
        ("rows are of the wrong length", norm, {"rows": norm.rows[:-1]}),
        ("rows are of the wrong length", norm, {"rows": norm.rows + b"\0"}),
        ("rows are of the wrong length", norm, {"rows": b""}),
        ("rows are not of the model", norm, {"rows": norm.rows[:-1] + bytes([norm.rows[-1] ^ 1])}),
        ("rows are not of the model", norm, {"rows": bytes([norm.rows[0] ^ 1]) + norm.rows[1:]}),
        ("rows are not of the model", norm, {"weights_root": bytes(32)}),
        ("proof is too short", norm, {"proof": norm.proof[:-1]}),
        ("proof is too short", norm, {"proof": []}),
        ("proof is too long", norm, {"proof": [*norm.proof, bytes(32)]}),
        ("leaves are not of the trace", norm, {"proof": [norm.proof[1], norm.proof[0], *norm.proof[2:]]}),
        ("leaves are not of the cell's tree", finish, {"sub_root": bytes(32)}),
        ("rows are not of the model", finish, {"rows": finish.rows[:2] + bytes(32)}),
        ("token is not of the transcript", plain, {"prompt_root": bytes(32)}),
        ("token is outside the vocabulary", plain, {"leaves": b"\xff" * len(plain.leaves)}),
        ("leaves are of the wrong length", plain, {"leaves": plain.leaves + bytes(4)}),
    ]  # fmt: skip
    for reason, opening, changes in refused:
        with boa.reverts(f"referee: {reason}"):
            contract.compute(*rebuilt(opening, **changes))


def test_no_cell_can_be_named_as_another(contract: Any) -> None:
    """An opening fits one cell only: with any other name it is refused, or it is what that cell reads as well."""
    referee, _, _ = case(ODD, ODD_TOKENS, 2)
    rng = random.Random(3)
    step = cell(ODD, ODD_TOKENS, Op.HIDDEN, 30, 5)
    opening = opened(ODD, ODD_TOKENS, 2, step)
    for other in (step.leaf - 1, step.leaf + 1, 0, referee.layout.count - 1, rng.randrange(referee.layout.count)):
        with boa.reverts():
            contract.compute(*rebuilt(opening, step=dataclasses.replace(step, leaf=other)))
    for lengths in ({"output_tokens": 1}, {"prompt_tokens": 34}, {"prompt_tokens": 30}):
        with boa.reverts():
            contract.compute(*rebuilt(opening, **lengths))
    for dimension in ({"hidden_size": 170}, {"num_layers": 2}, {"intermediate_size": 100}, {"qk_norm": False}):
        with boa.reverts():
            contract.compute(*rebuilt(opening, config=dataclasses.replace(ODD, **dimension)))


def test_there_is_no_such_cell(contract: Any) -> None:
    layout = case(ODD, ODD_TOKENS, 2)[0].layout
    hidden = opened(ODD, ODD_TOKENS, 2, cell(ODD, ODD_TOKENS, Op.HIDDEN, 30, 5))
    linear = cell(ODD, ODD_TOKENS, Op.MIDDLE, 35, 20)
    attention = cell(ODD, ODD_TOKENS, Op.ATTENTION, 35, 20)
    huge = 2**256 - 1
    for step, reason in (
        (Step(layout.count, 0), "no such leaf"),
        (Step(huge, 0), "no such leaf"),
        (Step(hidden.step.leaf, 32), "no such element"),
        (Step(hidden.step.leaf, huge), "no such element"),
        (Step(linear.leaf, 16), "no such element"),
        (Step(hidden.step.leaf, 0, True), "no such cell inside"),
        (dataclasses.replace(linear, inside=True, sub_leaf=1), "no such cell inside"),
        (dataclasses.replace(linear, inside=True, sub_element=2), "no such cell inside"),
        (dataclasses.replace(linear, inside=True, sub_element=huge), "no such cell inside"),
        (dataclasses.replace(attention, inside=True, sub_leaf=9), "no such cell inside"),
        (dataclasses.replace(attention, inside=True, sub_leaf=huge), "no such cell inside"),
        (dataclasses.replace(attention, inside=True, sub_leaf=0, sub_element=16), "no such cell inside"),
        (dataclasses.replace(attention, inside=True, sub_leaf=5, sub_element=32), "no such cell inside"),
    ):
        with boa.reverts(f"referee: {reason}"):
            contract.compute(*rebuilt(hidden, step=step))


def test_padding_is_zero_and_needs_nothing(contract: Any) -> None:
    layout = case(ODD, ODD_TOKENS, 2)[0].layout
    padding = Step(layout.index(Op.K_ROPE, 0, 3, 39), 31)
    assert layout.locate(padding.leaf).count == 8
    opening = opened(ODD, ODD_TOKENS, 2, padding)
    assert (opening.value, opening.opened_bytes) == (0, b"") and contract.compute(*opening.arguments()) == 0
    masked = dataclasses.replace(cell(ODD, ODD_TOKENS, Op.ATTENTION, 35, 20), inside=True, sub_leaf=3, sub_element=15)
    assert contract.compute(*opened(ODD, ODD_TOKENS, 2, masked).arguments()) == 0
    with boa.reverts("referee: leaves are of the wrong length"):
        contract.compute(*rebuilt(opening, leaves=bytes(128)))


def test_impossible_values_are_refused(contract: Any) -> None:
    """Whoever names a cell after the first false one may meet values that no forward pass has."""
    layout = Layout(SMOLLM, 40, 2)
    norm = Step(layout.index(Op.INPUT_NORM, 3, 20, 50), 50 % 32)
    total = layout.index(Op.INPUT_SUM, 3, 20, 4)
    largest = layout.index(Op.INPUT_MAX, 3, 20, 4)
    attention = Step(layout.index(Op.ATTENTION, 3, 40, 50), 18)
    cases: list[tuple[Step, Any, bytes]] = [
        (norm, ("leaf", total), bytes(128)),
        (norm, ("leaf", total), encode([2**62] * 16, True)),
        (norm, ("leaf", total), encode([-1] * 16, True)),
        (norm, ("leaf", largest), encode([-1] * 16, True)),
        (Step(layout.index(Op.INPUT_SUM, 3, 20, 1), 1), ("leaf", largest), encode([-(2**63)] * 16, True)),
        (attention, (attention.cell, 7), bytes(128)),
        (dataclasses.replace(attention, inside=True, sub_leaf=5), (attention.cell, 4), encode([-(2**60)] * 16, True)),
    ]
    for step, name, leaf in cases:
        inputs = RandomInputs(layout, random.Random(4), 0)
        inputs.kept[name] = leaf
        opening = open_step(Referee(layout, inputs), step, Trees(random.Random(5)))
        assert opening.value is None, step
        agree(contract, opening)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": 0}, "hidden size is out of range"),
        ({"hidden_size": 8193}, "hidden size is out of range"),
        ({"intermediate_size": 2**32 - 1}, "intermediate size is out of range"),
        ({"num_layers": 0}, "layers are out of range"),
        ({"num_layers": 2**32 - 1}, "layers are out of range"),
        ({"num_heads": 0}, "heads are out of range"),
        ({"num_kv_heads": 0}, "heads are out of range"),
        ({"num_kv_heads": 4}, "heads do not group"),
        ({"num_heads": 1023, "head_dim": 512}, "heads are out of range"),
        ({"head_dim": 63}, "head size is out of range"),
        ({"head_dim": 514}, "head size is out of range"),
        ({"vocab_size": 0}, "vocabulary is out of range"),
        ({"max_positions": 2**17 + 1}, "positions are out of range"),
        ({"rms_norm_eps_e12": 0}, "epsilon is out of range"),
        ({"rms_norm_eps_e12": 2**64 - 1}, "epsilon is out of range"),
    ],
)
def test_dimensions_without_a_meaning(trace_map: Any, change: dict[str, Any], reason: str) -> None:
    with boa.reverts(f"referee: {reason}"):
        trace_map.leaf_count(dataclasses.replace(SMOLLM, **change).values(), 4, 2)


def test_lengths_without_a_trace(trace_map: Any) -> None:
    dimensions = SMOLLM.values()
    for lengths in ((0, 1), (1, 0)):
        with boa.reverts("referee: a trace has prompt and output"):
            trace_map.leaf_count(dimensions, *lengths)
    for lengths in ((8192, 2), (2**256 - 1, 1), (1, 2**256 - 1)):
        with boa.reverts("referee: context is too long"):
            trace_map.leaf_count(dimensions, *lengths)
    large = dataclasses.replace(EIGHT_B, max_positions=2**17, num_layers=1024)
    with boa.reverts("referee: trace has too many leaves"):
        trace_map.leaf_count(large.values(), 2**16, 2**16)
    with pytest.raises(InvalidInput, match="at most"):
        Layout(large, 2**16, 2**16)
    for wrong in (
        (24, 0, 0, 0),
        (4, 30, 0, 0),
        (23, 1, 0, 0),
        (23, 0, 2, 0),
        (3, 0, 5, 0),
        (3, 0, 0, 576),
        (7, 0, 0, 0),
    ):
        with boa.reverts("referee: no such element"):
            trace_map.index_of(dimensions, 4, 2, *wrong)


def test_a_value_is_read_from_a_whole_leaf(contract: Any) -> None:
    for wide, leaf, element in ((True, bytes(128), 16), (False, bytes(128), 32)):
        with boa.reverts("referee: no such element"):
            contract.value(wide, leaf, element)
    with boa.reverts("referee: leaf is not 128 bytes"):
        contract.value(True, bytes(127), 0)
    with boa.reverts("referee: no nodes"):
        contract.root_of_nodes([])


def test_the_largest_steps_stay_small(contract: Any) -> None:
    """No step of the largest supported shapes takes more than a million gas to compute."""
    widest = dataclasses.replace(EIGHT_B, hidden_size=8192, intermediate_size=2**17, head_dim=512, qk_norm=True)
    layout = Layout(widest, 7000, 1000)
    rng = random.Random(8)
    steps: list[Callable[[], Step]] = [
        lambda: random_step(layout, Op.Q_NORM, rng, False),
        lambda: random_step(layout, Op.FINAL_SUM, rng, False),
        lambda: random_step(layout, Op.OUTPUT, rng, True),
        lambda: Step(layout.index(Op.ATTENTION, 3, 7900, 5), 5, True, 3, 2),
    ]
    for make in steps:
        opening = open_step(Referee(layout, RandomInputs(layout, rng, 0)), make(), Trees(rng))
        assert contract.compute(*opening.arguments()) == opening.value
        assert contract._computation.get_gas_used() < 1_000_000
