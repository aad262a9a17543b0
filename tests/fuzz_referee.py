"""A long comparison of the referee's contracts with the spec: `python -m tests.fuzz_referee [STEPS] [SEED]`.

Random cells of all kinds of random traces, a tenth of the leaves with values that no forward pass has, over models of
several shapes up to 4,096 x 14,336. The contracts run in revm (`pip install pyrevm==0.3.7`: not among the pinned
packages), a sample of the same steps in py-evm. Ends with the first difference, or with a count for each kind.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
import warnings
from collections import Counter
from typing import Any

from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.referee import Referee
from poip_chain.spec.trace import Layout, Op
from tests.support.referee_steps import Opening, RandomInputs, Trees, open_step, random_step
from tests.vectors.generate_canonical import EIGHT_B, ODD, SMOLLM
from tests.vectors.generate_numeric import TINY

SHAPES: list[tuple[ModelConfig, int, int]] = [
    (TINY, 3, 4),
    (ODD, 20, 17),
    (SMOLLM, 449, 64),
    (EIGHT_B, 7000, 1000),
    (dataclasses.replace(EIGHT_B, qk_norm=True, attention_bias=True, mlp_bias=True, head_dim=512), 70, 600),
    (dataclasses.replace(SMOLLM, qk_norm=True, tied_embeddings=False, head_dim=80, mlp_bias=True), 33, 1000),
]
_IMPOSSIBLE = b"referee: inputs are those of no forward pass".hex()
_OUT_OF_RANGE = b"referee: exponent is out of range".hex()
SAMPLE = 1000
"""One step in so many runs in py-evm too."""


def deploy() -> tuple[Any, Any, Any]:
    """(revm, address of the referee in it, the referee in py-evm)."""
    import boa
    import pyrevm

    from tests.contracts import system

    trace_map = system.load(system.CONTRACTS / "disputes" / "TraceMap.vy")
    referee = system.load(system.CONTRACTS / "disputes" / "Referee.vy", trace_map.address)
    evm = pyrevm.EVM()
    # The addresses stay the same, so the code that py-evm deployed can be copied with its immutables.
    for contract in (trace_map, referee):
        evm.insert_account_info(contract.address, pyrevm.AccountInfo(code=bytes(boa.env.get_code(contract.address))))
    return evm, referee.address, referee


def in_revm(evm: Any, address: str, opening: Opening) -> tuple[int | None, str]:
    """(value or None for a revert, the reason)."""
    try:
        result = evm.message_call("0x" + "11" * 20, address, calldata=opening.calldata(), gas=10_000_000)
    except RuntimeError as error:
        return None, str(error)
    return int.from_bytes(bytes(result), "big", signed=True), ""


def in_py_evm(referee: Any, opening: Opening) -> int | None:
    """The value, or None for a revert."""
    import boa

    try:
        return int(referee.compute(*opening.arguments()))
    except boa.BoaError:
        return None


def main() -> int:
    """0 if every step agreed."""
    warnings.simplefilter("ignore")
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    evm, address, referee = deploy()
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    layouts = [Layout(*shape) for shape in SHAPES]
    refused = unbounded = sampled = 0
    begin = time.monotonic()
    for number in range(steps):
        layout = layouts[number % len(layouts)]
        config = layout.config
        op = rng.choice([op for op in Op if config.qk_norm or op not in (Op.Q_NORM, Op.K_NORM)])
        step = random_step(layout, op, rng, inside=op is Op.ATTENTION or rng.random() < 0.5)
        if op is Op.ATTENTION and rng.random() < 0.2:
            step = dataclasses.replace(step, inside=False, sub_leaf=0, sub_element=0)
        opening = open_step(Referee(layout, RandomInputs(layout, rng)), step, Trees(rng))
        given, reason = in_revm(evm, address, opening)
        if given is None and _OUT_OF_RANGE in reason:
            unbounded += 1  # weights that `bounds.py` refuses: the contract does too, the spec computes on
        elif given != opening.value or (given is None and _IMPOSSIBLE not in reason):
            print(f"step {number}, seed {seed}: {op.name} {step}: spec {opening.value}, contract {given} {reason}")
            return 1
        if number % SAMPLE == 0:
            sampled += 1
            if in_py_evm(referee, opening) != given:
                print(f"step {number}, seed {seed}: {op.name} {step}: py-evm and revm differ")
                return 1
        refused += opening.value is None
        counts[op.name + (" inside" if step.inside else "")] += 1
        if number % 10_000 == 9_999:
            print(f"{number + 1} steps, {time.monotonic() - begin:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:7} {name}")
    print(
        f"{steps} steps agree, {refused} refused by both as impossible, {unbounded} by the contract for an exponent; "
        f"{sampled} also in py-evm; seed {seed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
