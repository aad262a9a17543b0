"""Gas of one step of the court's referee, by kind of cell, with the real contracts in py-evm.

A step is what a move of the dispute game carries (opened leaves, rows and proofs) and what `Referee.compute` spends on it.
Billed is the larger of intrinsic gas, calldata at 4 and 16 and execution, and of the EIP-7623 floor of 10 and 40 a byte.
The game's own reads and writes come on top. Values and weights are random: gas depends on the shape alone, up to zeros.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from eth_keys.datatypes import PrivateKey

from benchmarks.gas import _Bench
from benchmarks.rows import Row
from poip_chain.canonical.opening import Step
from poip_chain.chain.devnet.chain import Devnet
from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.spec.referee import Referee
from poip_chain.spec.trace import Layout, Op
from tests.support.referee_steps import RandomInputs, Trees, open_step
from tests.vectors.generate_canonical import EIGHT_B, SMOLLM

PROMPT, OUTPUT = 449, 64
"""512 positions."""
LIMIT = 16_000_000
GOAL = 2_000_000
TRANSACTION = 21_000


@dataclass(frozen=True, slots=True)
class StepGas:
    """What one step costs: bytes that the move carries, gas of the referee, gas of a transaction that is this step."""

    kind: str
    opened_bytes: int
    execution: int
    floor: int
    billed: int


class _Court(_Bench):
    """A chain with the referee only."""

    def __init__(self) -> None:
        self.chain = Devnet(DevnetConfig(block_time=None, automine=True))
        self.owner = PrivateKey(bytes(self.chain.accounts[0].key))
        trace_map = self._deploy("TraceMap")
        self.referee = self._deploy("Referee", trace_map.address)

    def call(self, data: bytes) -> tuple[int, int]:
        """(value, gas) of a call of the referee."""
        sender = self.owner.public_key.to_canonical_address()
        computation = self.chain.machine_for_next().execute_bytecode(
            origin=sender,  # type: ignore[arg-type]
            gas_price=0,
            gas=LIMIT,
            to=self.referee.address,  # type: ignore[arg-type]
            sender=sender,  # type: ignore[arg-type]
            value=0,
            data=data,
            code=self.chain.machine_for_next().state.get_code(self.referee.address),  # type: ignore[arg-type]
        )
        computation.raise_if_error()
        return int.from_bytes(computation.output, "big", signed=True), int(computation.get_gas_used())


def kinds(layout: Layout) -> Iterator[tuple[str, Step]]:
    """A step of each kind, in the last layer and at the last position: the largest that the shape has."""
    config, last = layout.config, layout.positions - 1

    def at(op: Op, row: int, column: int) -> Step:
        leaf = layout.index(op, 0 if op is Op.EMBED or op >= Op.FINAL_MAX else config.num_layers - 1, row, column)
        return Step(leaf, column - layout.locate(leaf).column)

    def inside(step: Step, sub_leaf: int, sub_element: int) -> Step:
        return Step(step.leaf, step.element, True, sub_leaf, sub_element)

    yield "embedding", at(Op.EMBED, last, 5)
    yield "norm: running maximum", at(Op.INPUT_MAX, last, 1)
    yield "norm: running sum of squares", at(Op.INPUT_SUM, last, 1)
    yield "norm: output", at(Op.INPUT_NORM, last, config.hidden_size // 2)
    yield "linear: running sum", inside(at(Op.OUTPUT, last, 77), 0, 1)
    yield "linear: element (q)", at(Op.Q, last * config.num_heads + 1, 3)
    yield "linear: element with residual", at(Op.OUTPUT, last, 77)
    yield "linear: running sum (logits)", inside(at(Op.LOGITS, 3, 777), 0, 1)
    yield "RoPE", at(Op.Q_ROPE, last * config.num_heads + 1, 3)
    cell = at(Op.ATTENTION, last, 100)
    parts = Referee(layout, RandomInputs(layout, random.Random(1))).attention_parts(cell.cell)
    yield "attention: score", inside(cell, 0, 1)
    yield "attention: running maximum", inside(cell, parts.maxima, 2)
    yield "attention: weight", inside(cell, parts.weights + 2, 3)
    yield "attention: running sum", inside(cell, parts.sums, 2)
    yield "attention: running product", inside(cell, parts.products, 2)
    yield "attention: element", cell
    yield "SwiGLU", at(Op.HIDDEN, last, 77)


def measure(layout: Layout) -> list[StepGas]:
    """The gas of a step of each kind; each value is checked against the spec."""
    court = _Court()
    result = []
    for kind, step in kinds(layout):
        rng = random.Random(3)
        opening = open_step(Referee(layout, RandomInputs(layout, rng, 0)), step, Trees(rng))
        value, execution = court.call(opening.calldata())
        assert value == opening.value, kind
        carried = opening.opened_bytes
        zeros = carried.count(0)
        floor = TRANSACTION + 10 * zeros + 40 * (len(carried) - zeros)
        paid = TRANSACTION + 4 * zeros + 16 * (len(carried) - zeros) + execution
        result.append(StepGas(kind, len(carried), execution, floor, max(floor, paid)))
    return result


def run() -> list[Row]:
    """The largest step of a small and of an 8-billion-parameter model, at 512 positions."""
    rows = []
    for name, config in (("SmolLM2-135M", SMOLLM), ("4096 wide, 14336 deep", EIGHT_B)):
        largest = max(measure(Layout(config, PROMPT, OUTPUT)), key=lambda step: step.billed)
        rows.append(
            Row(
                f"gas of the referee's largest step, {name}",
                largest.billed,
                "gas",
                f"{largest.kind}: {largest.opened_bytes:,} bytes opened, execution {largest.execution:,}, "
                f"EIP-7623 floor {largest.floor:,}, py-evm",
                compared_with=f"limit {GOAL:,}",
                ratio=largest.billed / GOAL,
                goal=f"< {GOAL:,}",
            )
        )
    return rows


if __name__ == "__main__":
    for shape in (SMOLLM, EIGHT_B):
        for step in measure(Layout(shape, PROMPT, OUTPUT)):
            print(f"{step.kind:32} {step.opened_bytes:6,} {step.execution:8,} {step.floor:8,} {step.billed:8,}")
        print()
