"""A frozen forward pass that an engine must reproduce before it may speak: no bits are better than wrong ones.

Two small models with drawn integer weights, one of every kind of step (biases, QK-norm, shared heads, a tied head, an
odd head size, more than one block of everything): the trace roots must be the ones written here, which come from
`spec`. A library or CPU that computes anything else is found here and not in a dispute.
"""

from __future__ import annotations

import numpy as np

from poip_chain.canonical.model import CanonicalModel
from poip_chain.canonical.trace import Trace
from poip_chain.canonical.weights import Weights
from poip_chain.errors import ConfigurationError
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.types import ZERO_HASH
from poip_chain.spec.weights import ROPE_EXPONENT, rope_rows, tensor_plan

BIASED = ModelConfig(144, 200, 2, 4, 2, 40, 61, 48, 10_000_000, 10_000, ZERO_HASH, False, True, False, True)
TIED = ModelConfig(96, 80, 1, 3, 1, 64, 53, 48, 1_000_000, 500_000, ZERO_HASH, True, False, False, False)
CASES = (
    (BIASED, "45fc0710af02d91c6a9b2a5956f831acf213aa8320b374a31233b432f0158c07"),
    (TIED, "3091c7dfc287904e32e8cd37502801b2b058da4544d610f28627b42ef5d198bd"),
)
"""(dimensions, trace root) over the tokens of `tokens` with 3 output tokens."""


def tokens(config: ModelConfig) -> list[int]:
    """37 token ids: more than one block of keys."""
    return [(7 * i + 3) % config.vocab_size for i in range(37)]


def drawn_weights(config: ModelConfig) -> Weights:
    """Weights from a linear congruential generator, so that they are the same under every version of every library.
    Among them are the largest magnitudes that weights may have."""
    state = 1
    integers, exponents = {}, {}

    def draw(count: int) -> list[int]:
        nonlocal state
        values = []
        for _ in range(count):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            values.append(state >> 40)
        return values

    for plan in tensor_plan(config):
        if not plan.source:
            integers[plan.name] = np.array(list(rope_rows(config)), np.int32)
            exponents[plan.name] = np.full(plan.rows, ROPE_EXPONENT, np.int16)
            continue
        values = np.array(draw(plan.rows * plan.columns), np.int64).reshape(plan.rows, plan.columns)
        if "norm" in plan.name:
            integers[plan.name] = (12_000 + values % 8000).astype(np.int16)
            exponents[plan.name] = np.full(1, -14, np.int16)
        else:
            integers[plan.name] = (values % 65_281 - 32_640).astype(np.int16)
            integers[plan.name][:, ::61] = 32_640
            exponents[plan.name] = np.array([-18 + value % 2 for value in draw(plan.rows)], np.int16)
    return Weights(config, None, integers, exponents)


def check(path: str | None = None, threads: int = 1, plain: bool = False) -> None:
    """Raises ConfigurationError if an engine of these settings does not reproduce the frozen roots."""
    for config, root in CASES:
        model = CanonicalModel(drawn_weights(config), threads, path, plain)
        if Trace(model, tokens(config), 3).root.hex() != root:
            raise ConfigurationError(
                f"this machine's canonical engine (matmul path {model.path.name}) computes wrong bits: refused.",
                hint="Report the CPU and the versions of numpy, torch and numba; another matmul path may work.",
            )
