"""Raw score terms of one answer against canonical logits: what `data` keeps of each position.

The fast twin of `spec.scores` before dead zones; tests compare both. Knows logits and tokens, no engine and no folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from poip_chain.proof.calibration.data import WIDTH, Scored
from poip_chain.service.engine.client import EngineToken, fingerprint_entries
from poip_chain.service.engine.noise import gumbel_array, uniform_bits_array
from poip_chain.spec import sampler, scores

Int64 = NDArray[np.int64]
_INT32 = 2**31 - 1
NOISE_RANGE = sampler.GUMBEL_MAX - sampler.GUMBEL_MIN
"""A token so many T (2**-16 logits) below another can never beat it under any seed."""


class Forward(Protocol):
    """What computes canonical logits: `canonical.model.CanonicalModel` does."""

    def forward(self, tokens: Sequence[int], cache: None = None, logits: int = 1) -> NDArray[np.int32]:
        """int32 [logits, vocabulary] in 2**-16 for the last `logits` of `tokens`."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """An answer as a node states it: what was asked, the seed it claims, and each token with the listed logarithms."""

    content: int
    temperature_milli: int
    seed: bytes
    prompt_ids: tuple[int, ...]
    tokens: tuple[EngineToken, ...]


def score(model: Forward, claim: Claim, end_token_ids: Sequence[int]) -> Scored:
    """All terms of a claim, by one prefill over prompt and answer. Raises what the model raises, and IntegrityError if a
    token lists fewer than eight others."""
    ids = tuple(token.token_id for token in claim.tokens)
    rows = model.forward((*claim.prompt_ids, *ids[:-1]), None, len(ids))
    terms = [
        position_terms(rows[i], token, claim.seed, i, claim.temperature_milli, end_token_ids)
        for i, token in enumerate(claim.tokens)
    ]
    return Scored(
        content=claim.content,
        temperature=claim.temperature_milli,
        seed=claim.seed,
        prompt_ids=claim.prompt_ids,
        output_ids=ids,
        margin=np.array([t[0] for t in terms], np.int32),
        free=np.array([t[1] for t in terms], np.int32),
        ending=np.array([t[2] for t in terms], np.int32),
        listed=np.array([t[3] for t in terms], np.int16).reshape(-1, WIDTH),
        unlisted=np.array([t[4] for t in terms], np.int16).reshape(-1, WIDTH),
    )


def position_terms(
    row: NDArray[Any],
    token: EngineToken,
    seed: bytes,
    position: int,
    temperature_milli: int,
    end_token_ids: Sequence[int],
) -> tuple[int, int, int, list[int], list[int]]:
    """(margin, free, ending, listed, unlisted) of one position: see `data`. row: canonical logits."""
    logits = row.astype(np.int64)
    chosen = token.token_id
    key = sampler.position_key(seed, position)

    def noised(ids: Int64) -> Int64:
        result: Int64 = 1000 * logits[ids]
        if temperature_milli:
            keys = np.full(len(ids), key, dtype=np.uint64)
            result = result + temperature_milli * gumbel_array(uniform_bits_array(keys, ids))
        return result

    lowest = 1000 * int(logits.max()) - temperature_milli * NOISE_RANGE
    best = int(noised(np.flatnonzero(1000 * logits >= lowest)).max())
    at_chosen, *at_end = (int(value) for value in noised(np.array([chosen, *end_token_ids], dtype=np.int64)))
    margin = min(_INT32, scores.margin_between(best, at_chosen))
    ending = min(_INT32, min((scores.margin_between(best, value) for value in at_end), default=0))

    entries = fingerprint_entries(token)
    canonical = np.clip(
        (logits - logits[chosen] + (1 << (scores.NAT_SHIFT - 1))) >> scores.NAT_SHIFT,
        scores.VALUE_MIN,
        scores.VALUE_MAX,
    )
    listed = [_int16(stated - int(canonical[other])) for other, stated in entries]
    rest = canonical.copy()
    rest[[chosen, *(other for other, _ in entries)]] = scores.VALUE_MIN
    highest = np.sort(rest[np.argpartition(rest, -WIDTH)[-WIDTH:]])[::-1]
    unlisted = [_int16(int(value) - entries[-1][1]) for value in highest]
    return margin, max(margin, _free(logits, token, temperature_milli)), ending, listed, unlisted


def _free(logits: Int64, token: EngineToken, temperature_milli: int) -> int:
    """The largest margin that some seed gives an honest engine here, among the chosen and the listed tokens.

    The engine takes t where the canonical sampler takes b; the margin is at most the engine's error at t minus that at b.
    Only tokens within reach of the best one count: no noise lifts the others above it.
    """
    known = {token.token_id: token.logprob, **dict(token.top)}
    ids = np.array(list(known), dtype=np.int64)
    canonical = logits[ids]
    stated = np.array([known[int(i)] for i in ids]) * 65536.0
    errors = (stated - stated[0]) - (canonical - canonical[0])
    errors = errors[1000 * canonical >= 1000 * int(canonical.max()) - temperature_milli * NOISE_RANGE]
    return min(_INT32, int(errors.max() - errors.min())) if len(errors) else 0


def _int16(value: int) -> int:
    return max(scores.VALUE_MIN, min(scores.VALUE_MAX, value))
