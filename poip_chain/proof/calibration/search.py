"""Searching seeds as a client would who wants an honest node to look like a cheat.

The client picks the seed, and near ties fall as the engine's rounding falls. So it asks the engine once for the top of
its row, computes the canonical row, and looks among thousands of seeds for the one under which the engine's choice loses
most against the canonical one; then it goes on with the seeds that lead to the same token, one position further. The
search sees the listed tokens only; what it finds is measured as every other receipt. Knows rows, no engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from eth_hash.auto import keccak
from numpy.typing import NDArray

from poip_chain.proof.calibration.terms import Forward
from poip_chain.service.engine.client import EngineToken
from poip_chain.service.engine.noise import gumbel_array, uniform_bits_array
from poip_chain.spec import sampler

SEEDS = 1 << 14
DEPTH = 3
"""Positions searched: each keeps only the seeds that agree on the token, about a hundredth on flat distributions."""
TRIED = 500
Int64 = NDArray[np.int64]
Ask = Callable[[tuple[int, ...]], Awaitable[EngineToken]]
"""Gives the engine's first token, with the listed logarithms, after a prompt."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best seed, and the sum of margins (2**-16 logits) that the search expects of it."""

    seed: bytes
    expected: int


def candidate(tag: bytes, number: int) -> bytes:
    """Seed `number` of a search."""
    return keccak(tag + number.to_bytes(4, "big"))


async def search(
    model: Forward,
    ask: Ask,
    prompt_ids: tuple[int, ...],
    temperature_milli: int,
    tag: bytes,
    seeds: int = SEEDS,
    depth: int = DEPTH,
) -> Found:
    """The seed under which an honest engine's first answers lose most. Deterministic for a deterministic engine."""
    alive = [candidate(tag, number) for number in range(seeds)]
    total = np.zeros(seeds, np.int64)
    found = Found(alive[0], 0)
    prefix = prompt_ids
    for position in range(depth):
        token = await ask(prefix)
        row = model.forward(prefix, None, 1)[0].astype(np.int64)
        margins, choices = _margins(row, token, alive, position, temperature_milli)
        total = total + margins
        best = _best(row, token, total, choices, alive, position, temperature_milli)
        same = np.flatnonzero(choices == choices[best])
        # The most promising token: the one whose seeds have the best sum so far; they all share the next row.
        found = Found(alive[best], int(total[best]))
        alive, total = [alive[i] for i in same], total[same]
        prefix = (*prefix, int(choices[best]))
    return found


def _best(
    row: Int64,
    token: EngineToken,
    total: Int64,
    choices: Int64,
    seeds: Sequence[bytes],
    position: int,
    temperature_milli: int,
) -> int:
    """The place of the seed with the largest sum under which no unlisted token wins. On flat distributions most seeds lift
    one of the many unlisted ones; so the most promising are tried on the whole row."""
    order = np.argsort(-total, kind="stable")[:TRIED]
    ids = np.arange(len(row), dtype=np.int64)
    listed = [token.token_id, *(other for other, _ in token.top)]
    for place in order.tolist():
        keys = np.full(len(row), sampler.position_key(seeds[place], position), dtype=np.uint64)
        noised = 1000 * row + temperature_milli * gumbel_array(uniform_bits_array(keys, ids))
        least = noised[choices[place]]
        noised[listed] = least
        if noised.max() <= least:
            return int(place)
    return int(order[0])


def _margins(
    row: Int64, token: EngineToken, seeds: Sequence[bytes], position: int, temperature_milli: int
) -> tuple[Int64, Int64]:
    """For each seed: the margin of the engine's choice among its listed tokens, and that choice."""
    listed = {token.token_id: token.logprob, **dict(token.top)}
    ids = np.array(sorted(listed), dtype=np.int64)
    engine = np.array([sampler.quantise_logit(listed[int(i)]) for i in ids], dtype=np.int64)
    keys = np.array([sampler.position_key(seed, position) for seed in seeds], dtype=np.uint64)
    flat = uniform_bits_array(np.repeat(keys, len(ids)), np.tile(ids, len(seeds)))
    noise = temperature_milli * gumbel_array(flat).reshape(len(seeds), len(ids))
    chosen = (1000 * engine + noise).argmax(axis=1)
    canonical = 1000 * row[ids] + noise
    lost = canonical.max(axis=1) - canonical[np.arange(len(seeds)), chosen]
    return lost // 1000, ids[chosen]
