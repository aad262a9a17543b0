"""The fast twin of spec/sampler.py: the same tokens for whole batches of float logits, in milliseconds.

Imports numpy, torch and spec only: it runs inside the engine's process. It knows nothing of requests or HTTP.

How it is both exact and fast. The winner maximises S(v) = 1000 * q(v) + T * g(v), all integers, where q(v) is
the float logit rounded to units of 2**-16 (`spec.sampler.quantise_logit`). For each row:

1. B = S(b) for the token b with the largest float logit. The winner w has S(w) >= B.
2. Pick a cut C (units of 2**-16). A token with g(v) < C can reach B only if 1000 * q(v) > B - T * C, and
   since 1000 * q(v) <= 65_536_000 * logit(v) + 500, only if logit(v) >= (B - T * C - 500) / 65_536_000. That
   is one comparison of floats; rounding the right side down to float32 keeps it a superset.
3. A token with g(v) >= C has, g being monotone in the hash, a hash of at least H = min {h : gumbel(h) >= C}.
   That is one comparison of integers.

So the tokens that pass (2) or (3) contain the winner. They are a few dozen to a few hundred of the
vocabulary, and only they are evaluated, in integers. No logarithm is taken of anything else, and no error
bound enters. The finaliser's last step only flips the lowest of the 32 hash bits, so (3) compares the word
before it with H - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from poip_chain.spec import sampler

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

CUT = 7 * 65536
"""C above: about V * exp(-7) tokens, 45 of 49,152, pass (3) by chance; (2) admits what lies within 7 T of the
best."""

SAFE_LOGIT = 2.0**19
"""Rows whose best logit is beyond this (or not a number) take the slow path: clamping could matter there."""

_U30, _U27, _U31, _U32 = (np.uint64(n) for n in (30, 27, 31, 32))
_GOLDEN = np.uint64(sampler._GOLDEN)
_MIX_1 = np.uint64(sampler._MIX_1)
_MIX_2 = np.uint64(sampler._MIX_2)


def _smallest_bits(cut: int) -> int:
    """min {h : gumbel(h) >= cut} by bisection; gumbel is monotone."""
    low, high = 0, 2**32 - 1
    while low < high:
        middle = (low + high) // 2
        if sampler.gumbel(middle) >= cut:
            high = middle
        else:
            low = middle + 1
    return low


_CUT_WORD = (_smallest_bits(CUT) - 1) << 32
_CUT_WORD_UNSIGNED = np.uint64(_CUT_WORD)
_SIGN = -(2**63)
_CUT_WORD_SIGNED = (_CUT_WORD ^ 2**63) - 2**64 if _CUT_WORD < 2**63 else _CUT_WORD - 2**63


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def gumbel_array(bits: Int64) -> Int64:
    """`spec.sampler.gumbel` for an int64 array of values in [0, 2**32)."""
    upper = bits >= 2**31
    x = np.where(upper, 2 * (2**32 - 1 - bits) + 1, 2 * bits + 1)
    first = 33 * sampler.LN2 - _ln_array(x)
    tail = _polynomial_array(sampler.TAIL_COEFFICIENTS, x >> 2)
    # The second logarithm is wanted where u < 1/2 only; elsewhere its argument is replaced by a harmless one.
    second = 30 * sampler.LN2 - _ln_array(np.where(upper, 1, first))
    result: Int64 = (np.where(upper, first - tail, second) + 2**13) >> 14
    return result


def _ln_array(x: Int64) -> Int64:
    # frexp of an integer below 2**53 is exact, so its exponent is the bit length.
    k = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    mantissa = np.where(k <= 30, x << np.maximum(30 - k, 0), x >> np.maximum(k - 30, 0))
    return (k + 1) * sampler.LN2 - _polynomial_array(sampler.LN_COEFFICIENTS, 2**31 - mantissa)


def _polynomial_array(coefficients: Sequence[int], s: Int64) -> Int64:
    r = np.full_like(s, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        r *= s
        r >>= 30
        r += coefficient
    result: Int64 = (r * s) >> 30
    return result


def uniform_bits_array(keys: UInt64, tokens: Int64) -> Int64:
    """`spec.sampler.uniform_bits` element by element: uint64 keys, int64 token ids -> int64 values in [0,
    2**32).
    """
    z = keys + (tokens.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> _U30)) * _MIX_1
    z = (z ^ (z >> _U27)) * _MIX_2
    result: Int64 = ((z ^ (z >> _U31)) >> _U32).astype(np.int64)
    return result


def quantise_array(logits: NDArray[np.float32]) -> Int64:
    """`spec.sampler.quantise_logit` element by element."""
    limit = sampler.MAX_LOGIT_Q16 / 65536
    wide = np.where(np.isnan(logits), -limit, np.clip(logits.astype(np.float64), -limit, limit))
    result: Int64 = np.rint(wide * 65536).astype(np.int64)
    return result


class GumbelSampler:
    """Samples rows of a batch of float32 logits by the normative rule. One per engine; holds scratch memory
    only.
    """

    def __init__(self) -> None:
        self._steps: UInt64 = np.empty(0, np.uint64)
        self._word: UInt64 = np.empty(0, np.uint64)
        self._scratch: UInt64 = np.empty(0, np.uint64)
        self._device_steps: dict[torch.device, torch.Tensor] = {}

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        keys: Sequence[int],
        temperatures_milli: Sequence[int],
    ) -> list[int]:
        """The winning token id of each of `rows` (row indices of `logits`, shape [batch, vocabulary], float).

        keys: `spec.sampler.position_key` of each row's next position. temperatures_milli: 0 to
        MAX_TEMPERATURE_MILLI. `logits` is not changed. The result equals `spec.sampler.sample` over the
        quantised row.
        """
        if not rows:
            return []
        wide_keys = np.array(keys, dtype=np.uint64)
        temperatures = np.array(temperatures_milli, dtype=np.int64)
        on_host = logits.device.type == "cpu"
        chosen = logits if len(rows) == logits.shape[0] and list(rows) == list(range(len(rows))) else logits[list(rows)]
        chosen = chosen.to(torch.float32)
        if on_host:  # numpy's argmax is ten times as fast as torch's here
            peaks = chosen.numpy().argmax(axis=1)
            tops = np.take_along_axis(chosen.numpy(), peaks[:, None], 1)[:, 0]
        else:
            columns = chosen.argmax(dim=1)
            tops = chosen.gather(1, columns[:, None])[:, 0].cpu().numpy()
            peaks = columns.cpu().numpy()

        sane = np.abs(tops) < SAFE_LOGIT
        bits = (sampler.uniform_bits(key, peak) for key, peak in zip(keys, peaks.tolist(), strict=True))
        noise = np.array([sampler.gumbel(b) for b in bits], dtype=np.int64)
        best = 1000 * quantise_array(tops) + temperatures * noise
        bounds = (best - temperatures * CUT - 500).astype(np.float64) / 65_536_000
        floors = np.nextafter(bounds.astype(np.float32), np.float32(-np.inf))
        floors = np.where(sane, floors, np.float32(-np.inf)).astype(np.float32)

        collect = self._candidates_on_host if on_host else self._candidates_on_device
        counts, tokens, values = collect(chosen, wide_keys, temperatures, floors, sane)
        per_key = np.repeat(wide_keys, counts)
        per_temperature = np.repeat(temperatures, counts)
        scores = 1000 * quantise_array(values) + per_temperature * gumbel_array(uniform_bits_array(per_key, tokens))
        winners: list[int] = []
        start = 0
        for count in counts.tolist():
            # Tokens ascend within a row and argmax takes the first maximum: ties go to the lowest id.
            winners.append(int(tokens[start + int(scores[start : start + count].argmax())]))
            start += count
        return winners

    def _candidates_on_host(
        self,
        logits: torch.Tensor,
        keys: UInt64,
        temperatures: Int64,
        floors: NDArray[np.float32],
        sane: NDArray[np.bool_],
    ) -> tuple[Int64, Int64, NDArray[np.float32]]:
        size = logits.shape[1]
        if self._steps.size != size:
            self._steps = np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN
            self._word, self._scratch = np.empty_like(self._steps), np.empty_like(self._steps)
        table, word, scratch = logits.numpy(), self._word, self._scratch
        tokens: list[Int64] = []
        values: list[NDArray[np.float32]] = []
        for i in range(len(keys)):
            row = table[i]
            if not sane[i]:
                ids = np.arange(size)
            elif temperatures[i] == 0:
                ids = np.flatnonzero(row >= floors[i])
            else:
                np.add(self._steps, keys[i], out=word)
                np.right_shift(word, _U30, out=scratch)
                np.bitwise_xor(word, scratch, out=word)
                np.multiply(word, _MIX_1, out=word)
                np.right_shift(word, _U27, out=scratch)
                np.bitwise_xor(word, scratch, out=word)
                np.multiply(word, _MIX_2, out=word)
                ids = np.flatnonzero((row >= floors[i]) | (word >= _CUT_WORD_UNSIGNED))
            tokens.append(ids)
            values.append(row[ids])
        return np.array([len(ids) for ids in tokens]), np.concatenate(tokens), np.concatenate(values)

    def _candidates_on_device(
        self,
        logits: torch.Tensor,
        keys: UInt64,
        temperatures: Int64,
        floors: NDArray[np.float32],
        sane: NDArray[np.bool_],
    ) -> tuple[Int64, Int64, NDArray[np.float32]]:
        """The same sets by torch operations on the logits' device. Shifts of int64 are arithmetic: mask the
        sign bits.
        """
        device, size = logits.device, logits.shape[1]
        steps = self._device_steps.get(device)
        if steps is None or steps.shape[0] != size:
            steps = torch.arange(1, size + 1, device=device) * _signed(sampler._GOLDEN)
            self._device_steps[device] = steps
        word = steps[None, :] + torch.from_numpy(keys.view(np.int64)).to(device)[:, None]
        word = (word ^ ((word >> 30) & (2**34 - 1))) * _signed(sampler._MIX_1)
        word = (word ^ ((word >> 27) & (2**37 - 1))) * _signed(sampler._MIX_2)
        mask = (word ^ _SIGN) >= _CUT_WORD_SIGNED
        mask &= torch.from_numpy(temperatures != 0).to(device)[:, None]
        mask |= logits >= torch.from_numpy(floors).to(device)[:, None]
        mask |= torch.from_numpy(~sane).to(device)[:, None]
        places = mask.nonzero()
        counts = torch.bincount(places[:, 0], minlength=logits.shape[0])
        values = logits[places[:, 0], places[:, 1]]
        return counts.cpu().numpy(), places[:, 1].cpu().numpy(), values.cpu().numpy()
