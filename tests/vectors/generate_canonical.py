"""Writes canonical.json and trace.json from the spec: `python tests/vectors/generate_canonical.py`.

Another engine, and the contracts of the court, prove themselves against these files. A test checks that they are what
the spec gives today: a change of the spec that changes them is a new canonical version.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))

from poip_chain.spec import canonical as c  # noqa: E402
from poip_chain.spec.forward import CanonicalWeights, canonical_weights, forward  # noqa: E402
from poip_chain.spec.merkle import merkle_root  # noqa: E402
from poip_chain.spec.objects import ModelConfig  # noqa: E402
from poip_chain.spec.referee import Cell, Referee  # noqa: E402
from poip_chain.spec.trace import Layout, Op, trace_leaves  # noqa: E402
from poip_chain.spec.weights import ROPE_EXPONENT, rope_rows, tensor_plan  # noqa: E402
from tests.support.trace_inputs import TraceInputs  # noqa: E402
from tests.vectors.generate_numeric import TINY, render, tiny_tensors  # noqa: E402

SMOLLM = ModelConfig(576, 1536, 30, 9, 3, 64, 49_152, 8192, 10_000_000, 100_000, bytes(32), True, False, False, False)
"""SmolLM2-135M-Instruct."""
EIGHT_B = ModelConfig(
    4096, 14_336, 32, 32, 8, 128, 128_256, 8192, 10_000_000, 500_000, bytes(32), False, False, False, False
)
"""The dimensions of an 8-billion-parameter Llama."""
ODD = dataclasses.replace(
    TINY,
    hidden_size=144,
    intermediate_size=72,
    num_heads=4,
    num_kv_heads=2,
    head_dim=40,
    vocab_size=29,
    max_positions=40,
    attention_bias=False,
    tied_embeddings=True,
    num_layers=1,
)
"""More than one block of everything: statistics, weight segments, leaves of a head; QK-norm; tied."""
TOKENS = (3, 16, 0, 3, 9)


@cache
def integer_weights(config: ModelConfig, seed: int) -> CanonicalWeights:
    """Reproducible canonical weights, drawn as integers and exponents."""
    rng = random.Random(seed)
    rows: dict[str, Any] = {}
    for plan in tensor_plan(config):
        if not plan.source:
            rows[plan.name] = [(ROPE_EXPONENT, row) for row in rope_rows(config)]
        elif "norm" in plan.name:
            rows[plan.name] = [(-14, [rng.randrange(12_000, 20_000) for _ in range(plan.columns)])]
        else:
            rows[plan.name] = [
                (rng.randrange(-18, -16), [rng.randrange(-32_640, 32_641) for _ in range(plan.columns)])
                for _ in range(plan.rows)
            ]
    return CanonicalWeights(config, rows)


def canonical_vectors() -> dict[str, Any]:
    """Each function on its edges and on random inputs; the logits of two small models."""
    rng = random.Random(31)
    distances = [0, 1, 127, 2**20, 2**27, 2**33 - 1, 2**33, 2**50] + [rng.randrange(2**31) for _ in range(20)]
    ds = [0, 1, 2**20, 2**25 - 1, 2**25, 2**34] + [rng.randrange(2**24) for _ in range(20)]
    gates = [0, 1, -1, c.GATE_LIMIT, -c.GATE_LIMIT] + [rng.randrange(-(2**20), 2**20) for _ in range(15)]
    ups = [c.GATE_LIMIT, -c.GATE_LIMIT, 1, c.GATE_LIMIT, c.GATE_LIMIT]
    ups += [rng.randrange(-(2**20), 2**20) for _ in range(15)]
    norms = []
    for bits, scale in ((20, 2**18), (20, 2**40), (16, 2**17), (20, 1)):
        row = [rng.randrange(-scale, scale + 1) for _ in range(12)]
        gains = [rng.randrange(-32_640, 32_641) for _ in row]
        norms.append({"bits": bits, "row": row, "gains": gains, "exponent": -13, "eps_e12": 10_000_000})
    for case in norms:
        case["out"] = c.rms_norm(case["row"], case["bits"], case["eps_e12"], case["gains"], case["exponent"])
    pairs = [(2**26, 2**26, 759_250_125, 759_250_125), (-(2**26), 2**26, 759_250_125, 759_250_125)]
    pairs += [
        (rng.randrange(-(2**20), 2**20), rng.randrange(-(2**20), 2**20), rng.randrange(2**30), rng.randrange(2**30))
        for _ in range(10)
    ]
    totals = [(rng.randrange(-(2**45), 2**45), rng.randrange(-20, -8), rng.randrange(-9, 9)) for _ in range(10)]
    scores = [rng.randrange(-(2**28), 2**28) for _ in range(9)]
    return {
        "rsh": [[x, s, c.rsh(x, s)] for x in (-5, -3, -1, 0, 1, 3, 5) for s in (-1, 0, 1, 2, 62)],
        "embed": [[v, e, c.embed(v, e)] for v in (-32_640, -3, 3, 32_640) for e in (-22, -20, -15, 0)],
        "linear": [[t, e, b, c.linear(t, e, 16, 12, (b, -14))] for t, e, b in totals],
        "rms_norm": norms,
        "rope": [[*pair, *c.rope(*pair)] for pair in pairs],
        "score_multiplier": [[n, c.score_multiplier(n)] for n in (2, 40, 64, 80, 96, 128, 256, 512)],
        "exp_negative": [[d, *c.exp_negative(d)] for d in ds],
        "attention_weight": [[d, n, c.attention_weight(d, c.score_multiplier(n))] for d in distances for n in (64, 80)],
        "softmax": [{"scores": scores, "head_dim": 64, "out": list(c.softmax(scores, c.score_multiplier(64)))}],
        "attend": [[p, t, c.attend(p, t)] for p, t in ((3, 2**20), (-(2**40), 2**21 + 1), (2**33 - 5, 2**22))],
        "swiglu": [[g, u, c.swiglu(g, u)] for g, u in zip(gates, ups, strict=True)],
        "models": [
            {"config": name, "tokens": TOKENS, "logits": forward(weights, TOKENS, 2)["logits"]}
            for name, weights in (
                ("TINY, the tensors of weights.json", canonical_weights(TINY, tiny_tensors(TINY))),
                ("ODD, integer_weights(ODD, 5)", integer_weights(ODD, 5)),
            )
        ],
    }


ODD_TOKENS = tuple((7 * i + 3) % ODD.vocab_size for i in range(36))


@cache
def traced(config: ModelConfig, tokens: tuple[int, ...], outputs: int) -> tuple[bytes, ...]:
    """The leaves of a forward pass with `integer_weights(config, 5)`."""
    layout = Layout(config, len(tokens) - outputs + 1, outputs)
    return tuple(trace_leaves(layout, forward(integer_weights(config, 5), tokens, outputs)))


def trace_vectors() -> dict[str, Any]:
    """Layouts of real and small models; one whole trace; sub-traces of one linear and one attention element."""
    layouts = []
    for name, config in (("SMOLLM", SMOLLM), ("EIGHT_B", EIGHT_B), ("TINY", TINY), ("ODD", ODD)):
        lengths = (2, 4) if config.max_positions < 128 else (384, 129)
        layout = Layout(config, *lengths)
        rng = random.Random(name)
        places = []
        for index in sorted({0, layout.count - 1, *(rng.randrange(layout.count) for _ in range(24))}):
            place = layout.locate(index)
            places.append([index, place.tensor.op, place.tensor.layer, place.row, place.column, place.count])
        layouts.append(
            {
                "config": {k: v.hex() if isinstance(v, bytes) else v for k, v in dataclasses.asdict(config).items()},
                "prompt_tokens": lengths[0],
                "output_tokens": lengths[1],
                "leaves": layout.count,
                "places": places,
            }
        )
    weights = integer_weights(ODD, 5)
    layout = Layout(ODD, 35, 2)
    leaves = list(traced(ODD, ODD_TOKENS, 2))
    inputs = TraceInputs(layout, weights, ODD_TOKENS, leaves)
    referee = Referee(layout, inputs)
    linear = Cell(layout.index(Op.MIDDLE, 0, 35, 140), 12)
    attention = Cell(layout.index(Op.ATTENTION, 0, 35, 90), 26)
    for cell in (linear, attention):
        inputs.open(referee, cell)
    sub = [inputs.subs[attention, i] for i in range(referee.attention_parts(attention).count)]
    return {
        "layouts": layouts,
        "trace": {
            "config": "ODD",
            "weights": "integer_weights(ODD, 5)",
            "tokens": ODD_TOKENS,
            "prompt_tokens": 35,
            "root": merkle_root(leaves).hex(),
            "leaves": [[i, leaves[i].hex()] for i in range(0, layout.count, 97)],
            "partial_sums": {
                "index": linear.index,
                "element": linear.element,
                "sums": [inputs.sums[linear, s] for s in range(referee.segments(linear))],
            },
            "attention": {
                "index": attention.index,
                "element": attention.element,
                "leaves": [leaf.hex() for leaf in sub],
                "root": merkle_root(sub).hex(),
            },
        },
    }


VECTORS = {"canonical.json": canonical_vectors, "trace.json": trace_vectors}

if __name__ == "__main__":
    for name, make in VECTORS.items():
        (HERE / name).write_text(render(make()))
        print(f"wrote {HERE / name}")
