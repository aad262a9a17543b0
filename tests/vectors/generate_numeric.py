"""Writes sampler.json, scores.json and weights.json from the spec: `python tests/vectors/generate_numeric.py`.

Another implementation proves itself against these files. A test checks that they are what the spec gives today: a change of
the spec that changes them is a new sampler or canonical version.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))

from poip_chain.spec import sampler, scores, weights  # noqa: E402
from poip_chain.spec.objects import ModelConfig, ThresholdRow  # noqa: E402

EDGE_BITS = sorted(
    {0, 1, 2, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 3, 2**32 - 2, 2**32 - 1}
    | {2**k for k in range(32)}
    | {2**32 - 2**k for k in range(1, 32)}
)

TINY = ModelConfig(
    hidden_size=12,
    intermediate_size=20,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=17,
    max_positions=9,
    rms_norm_eps_e12=10_000_000,
    rope_theta=10_000,
    rope_scaling_hash=bytes(32),
    tied_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
    qk_norm=True,
)
"""Small, with every optional tensor."""


def tiny_tensors(config: ModelConfig, seed: int = 1) -> dict[str, list[list[float]]]:
    """Reproducible weights for a config: bfloat16 values, as a checkpoint has them."""
    rng = random.Random(seed)

    def weight() -> float:
        return rng.randint(-255, 255) * 2.0 ** rng.randint(-16, -8)

    return {
        tensor.source: [[weight() for _ in range(tensor.columns)] for _ in range(tensor.rows)]
        for tensor in weights.tensor_plan(config)
        if tensor.source
    }


def sampler_vectors() -> dict[str, Any]:
    """Keys, hashes, Gumbel values and sampled tokens."""
    rng = random.Random(7)
    seed = bytes(range(32))
    keys = [{"position": p, "key": str(sampler.position_key(seed, p))} for p in (0, 1, 2, 255, 256, 2**32 - 1)]
    key = sampler.position_key(seed, 0)
    tokens = [0, 1, 2, 49_151, 151_935, 2**32 - 1]
    bits = EDGE_BITS + sorted(rng.randrange(2**32) for _ in range(64))
    samples = []
    for temperature in (0, 1, 300, 700, 1000, 2000):
        logits = [rng.randrange(-20 * 65536, 20 * 65536) for _ in range(48)]
        logits[5] = logits[9] = max(logits)
        token = sampler.sample(logits, seed, temperature, temperature)
        samples.append(
            {"position": temperature, "temperature_milli": temperature, "logits_q16": logits, "token": token}
        )
    return {
        "seed": seed.hex(),
        "position_keys": keys,
        "uniform_bits": {
            "key": str(key),
            "cases": [{"token": t, "bits": sampler.uniform_bits(key, t)} for t in tokens],
        },
        "gumbel": [[b, sampler.gumbel(b)] for b in bits],
        "samples": samples,
    }


def scores_vectors() -> dict[str, Any]:
    """Margins, fingerprint scores and thresholds."""
    rng = random.Random(11)
    seed = bytes(range(32, 64))
    positions = []
    for position, temperature in enumerate((0, 300, 700, 1000)):
        logits = [rng.randrange(-10 * 65536, 10 * 65536) for _ in range(40)]
        claimed = rng.randrange(40)
        others = sorted((t for t in range(40) if t != claimed), key=lambda t: -logits[t])[1:9]
        stated = [(t, scores.canonical_value(logits[t], logits[claimed]) + rng.randint(-9, 9)) for t in others]
        stated.sort(key=lambda entry: (-entry[1], entry[0]))
        positions.append(
            {
                "position": position,
                "temperature_milli": temperature,
                "logits_q16": logits,
                "claimed": claimed,
                "entries": [list(entry) for entry in stated],
                "dead_zone": 4,
                "tolerance": 6,
                "margin": scores.margin(logits, claimed, seed, position, temperature),
                "fingerprint": scores.fingerprint(logits, claimed, stated, 4, 6),
            }
        )
    table = [(16, 100), (128, 401), (512, 700)]
    rows = [ThresholdRow(*row) for row in table]
    lengths = (1, 15, 16, 17, 127, 128, 300, 511, 512, 513, 4096)
    return {
        "seed": seed.hex(),
        "positions": positions,
        "threshold": {
            "table": [list(row) for row in table],
            "cases": [[n, scores.threshold(rows, n)] for n in lengths],
        },
    }


def weights_vectors() -> dict[str, Any]:
    """Quantised rows, leaves, RoPE rows and the root of a tiny model."""
    rows = [
        [0.0, 0.0],
        [1.0, -0.5, 0.25],
        [255 / 256, -1 / 512],
        [0.99999994, 0.5],  # rounds up to 2**15 as float32: the exponent grows
        [3.0e-5, 2.5 * 2.0**-29, 1.5 * 2.0**-29],
        [(i - 150) / 97 for i in range(300)],
    ]
    cases = []
    for row in rows:
        exponent, integers = weights.quantise_row(row)
        leaf = weights.row_leaf(exponent, integers)
        cases.append({"row": row, "exponent": exponent, "integers": integers, "leaf": leaf.hex()})
    rope = list(weights.rope_rows(TINY))
    return {
        "rows": cases,
        "rope": {"theta": TINY.rope_theta, "head_dim": TINY.head_dim, "positions": rope},
        "tiny_model": {
            "plan": [[t.name, t.source, t.rows, t.columns] for t in weights.tensor_plan(TINY)],
            "tensors": tiny_tensors(TINY),
            "weights_root": weights.weights_root(TINY, tiny_tensors(TINY)).hex(),
        },
    }


VECTORS = {"sampler.json": sampler_vectors, "scores.json": scores_vectors, "weights.json": weights_vectors}


def render(vectors: dict[str, Any]) -> str:
    """The exact text of a vector file."""
    return json.dumps(vectors, indent=None, separators=(",", ":"), sort_keys=True) + "\n"


if __name__ == "__main__":
    for name, make in VECTORS.items():
        (HERE / name).write_text(render(make()))
        print(f"wrote {HERE / name}")
