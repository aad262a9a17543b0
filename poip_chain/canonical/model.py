"""The canonical forward pass at speed: prefill in any split, decode with a cache, logits where they are asked for.

Bit-identical to `spec.forward`: row t of every tensor depends on tokens 0..t alone and every step is exact, so neither
the split into batches nor threads nor the way of multiplying can change a bit. `record` sees each tensor of the trace
in execution order, in the shape of `spec.trace`; nothing is kept for it. Knows no tree and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical import ops as all_ops
from poip_chain.canonical.compiled import Workers
from poip_chain.canonical.matmul import Path, blas_product, make_path
from poip_chain.canonical.weights import Weights
from poip_chain.errors import InvalidInput
from poip_chain.spec import canonical as c
from poip_chain.spec.bounds import KEY_BLOCK
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.trace import Op

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
Array = NDArray[Any]
Record = Callable[[Op, int, Array], None]
"""record(op, layer, rows): one whole tensor of the trace, int32 or int64."""

QUERY_BLOCK = 64
"""Positions whose scores are computed together: keys after the block are never touched, so nearly half of the square is
skipped; scores of a block stay in a core's cache up to some thousand keys."""
_NO_LIMIT = 2**31 - 1


@dataclass
class Cache:
    """Keys and values of the positions so far, float64 [kv heads, capacity, head_dim] a layer. One per sequence."""

    length: int = 0
    layers: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def room(self, config: ModelConfig, layer: int, positions: int) -> tuple[Array, Array]:
        """Keys and values of a layer with place for `positions` in all."""
        have = self.layers.get(layer)
        if have is None or have[0].shape[1] < positions:
            capacity = positions if have is None else min(config.max_positions, max(positions, 2 * have[0].shape[1]))
            grown = [np.zeros((config.num_kv_heads, capacity, config.head_dim)) for _ in range(2)]
            for old, new in zip(have or (), grown, strict=False):
                new[:, : self.length] = old[:, : self.length]
            self.layers[layer] = have = grown[0], grown[1]
        return have


@dataclass(frozen=True)
class _Linear:
    """A prepared matrix with the shift and bias of each output."""

    prepared: Any
    shift: I64
    bias: I64


class CanonicalModel:
    """A model ready to run. `threads` splits rows and columns; `path` names a way to multiply (None: the fastest here).

    One object serves one sequence at a time per Cache, and may be used from several threads.
    """

    def __init__(self, weights: Weights, threads: int = 1, path: str | None = None, plain: bool = False) -> None:
        self.weights, self.config = weights, weights.config
        self.workers = Workers(threads)
        self.path: Path = make_path(path, self.workers)
        self._product = blas_product()
        self._ops: Any = all_ops.PLAIN if plain else all_ops.FAST
        config = self.config
        self._layers = [self._layer_parts(f"{layer}.") for layer in range(config.num_layers)]
        self._head = self._linear("embed" if config.tied_embeddings else "head", c.NORM_BITS, c.LOGIT_BITS)
        self._final = self._gains("final_norm")
        self._group = config.num_heads // config.num_kv_heads
        self._multiplier = c.score_multiplier(config.head_dim)

    # Preparation

    def _linear(self, name: str, bits_in: int, bits_out: int) -> _Linear:
        exponents = self.weights.exponents[name].astype(np.int64)
        shift = np.clip(bits_in - exponents - bits_out, 0, 62)
        bias = np.zeros(len(exponents), np.int64)
        if name + "_bias" in self.weights.integers:
            exponent = int(self.weights.exponents[name + "_bias"][0])
            bias = _scaled(self.weights.integers[name + "_bias"][0].astype(np.int64), -(bits_out + exponent))
        return _Linear(self.path.prepare(self.weights.integers[name]), shift, bias)

    def _gains(self, name: str) -> tuple[I64, int]:
        shift = c.RESIDUAL_BITS - int(self.weights.exponents[name][0]) - c.NORM_BITS
        return self.weights.integers[name][0].astype(np.int64), min(shift, 62)

    def _layer_parts(self, layer: str) -> dict[str, Any]:
        bits = {
            "q": (c.NORM_BITS, c.NORM_BITS), "k": (c.NORM_BITS, c.NORM_BITS), "v": (c.NORM_BITS, c.V_BITS),
            "o": (c.ATTENTION_BITS, c.RESIDUAL_BITS), "gate": (c.NORM_BITS, c.GATE_BITS),
            "up": (c.NORM_BITS, c.GATE_BITS), "down": (c.HIDDEN_BITS, c.RESIDUAL_BITS),
        }  # fmt: skip
        parts: dict[str, Any] = {name: self._linear(layer + name, *pair) for name, pair in bits.items()}
        norms = ["input_norm", "post_norm"] + (["q_norm", "k_norm"] if self.config.qk_norm else [])
        parts.update({name: self._gains(layer + name) for name in norms})
        return parts

    # Running

    def forward(
        self, tokens: Sequence[int], cache: Cache | None = None, logits: int = 1, record: Record | None = None
    ) -> I32:
        """Logits int32 [logits, vocabulary] of the last `logits` of `tokens`, which follow those in the cache.

        Without a cache the sequence starts here and nothing is kept. Raises InvalidInput if there is no token, one
        outside the vocabulary, more than the model has positions, or more logits asked for than tokens given.
        """
        config = self.config
        kept, cache = cache is not None, Cache() if cache is None else cache
        ids = self._checked(tokens, cache, logits)
        h = self.embed(ids)
        if record:
            record(Op.EMBED, 0, h)
        for layer in range(config.num_layers):
            h = self.layer(layer, h, cache, record)
            if not kept:
                del cache.layers[layer]
        cache.length += len(ids)
        return self.head(h[len(ids) - logits :], record)

    def _checked(self, tokens: Sequence[int], cache: Cache, logits: int) -> I64:
        config = self.config
        if not 0 <= logits <= len(tokens) or not len(tokens):
            raise InvalidInput(f"logits of {logits} positions were asked for, and {len(tokens)} tokens given.")
        if cache.length + len(tokens) > config.max_positions:
            raise InvalidInput(
                f"{cache.length + len(tokens)} positions are more than the model's {config.max_positions}."
            )
        if any(not 0 <= token < config.vocab_size for token in tokens):
            raise InvalidInput(f"token ids are 0 to {config.vocab_size - 1}.")
        return np.array(tokens, np.int64)

    def embed(self, ids: I64) -> I64:
        """The residual stream [T, hidden] of token ids before the first layer."""
        rows = self.weights.integers["embed"][ids].astype(np.int64)
        s = -(c.RESIDUAL_BITS + self.weights.exponents["embed"][ids].astype(np.int64))[:, None]
        down = np.clip(s, 0, 62)
        h: I64 = np.where(s > 0, (rows + ((np.int64(1) << down) >> 1)) >> down, rows << np.maximum(-s, 0))
        return h

    def layer(self, layer: int, h: I64, cache: Cache, record: Record | None = None) -> I64:
        """One layer over the residual stream of the positions that follow those in the cache."""
        config, parts, ops = self.config, self._layers[layer], self._ops
        count, head = len(h), config.head_dim
        queries, keys = config.num_heads, config.num_kv_heads
        tell = (lambda op, rows: record(op, layer, rows)) if record else _ignore

        normed, largest, sums = self._norm(h, parts["input_norm"])
        tell(Op.INPUT_MAX, largest)
        tell(Op.INPUT_SUM, sums)
        tell(Op.INPUT_NORM, normed)
        q, k, v = self._multiply(
            normed,
            [(parts["q"], c.LINEAR_QK_LIMIT), (parts["k"], c.LINEAR_QK_LIMIT), (parts["v"], c.V_LIMIT)],
        )
        tell(Op.Q, q.reshape(-1, head))
        tell(Op.K, k.reshape(-1, head))
        if record:
            tell(Op.V, np.ascontiguousarray(v.T))
        if config.qk_norm:
            q, k = self._head_norm(q, parts["q_norm"]), self._head_norm(k, parts["k_norm"])
            tell(Op.Q_NORM, q.reshape(-1, head))
            tell(Op.K_NORM, k.reshape(-1, head))
        table = self.weights.integers["rope"][cache.length : cache.length + count]
        q, k = self._rotate(q, queries, table), self._rotate(k, keys, table)
        tell(Op.Q_ROPE, q.reshape(-1, head))
        tell(Op.K_ROPE, k.reshape(-1, head))
        stores = cache.room(config, layer, cache.length + count)
        for store, x in zip(stores, (k, v), strict=True):
            store[:, cache.length : cache.length + count] = x.reshape(count, keys, head).swapaxes(0, 1)
        attention = self._attention(q, *stores, cache.length)
        tell(Op.ATTENTION, attention)
        h = self._add(attention, parts["o"], h)
        tell(Op.MIDDLE, h)

        normed, largest, sums = self._norm(h, parts["post_norm"])
        tell(Op.POST_MAX, largest)
        tell(Op.POST_SUM, sums)
        tell(Op.POST_NORM, normed)
        gate, up = self._multiply(normed, [(parts["gate"], c.GATE_LIMIT), (parts["up"], c.GATE_LIMIT)])
        tell(Op.GATE, gate)
        tell(Op.UP, up)
        hidden = np.empty_like(gate)
        self.workers.split(count, lambda a, b: ops.swiglu(gate[a:b], up[a:b], hidden[a:b]))
        tell(Op.HIDDEN, hidden)
        h = self._add(hidden, parts["down"], h)
        tell(Op.OUTPUT, h)
        return h

    def head(self, h: I64, record: Record | None = None) -> I32:
        """Logits of rows of the residual stream after the last layer."""
        if not len(h):
            return np.empty((0, self.config.vocab_size), np.int32)
        normed, largest, sums = self._norm(h, self._final)
        (logits,) = self._multiply(normed, [(self._head, c.LOGIT_LIMIT)])
        if record:
            record(Op.FINAL_MAX, 0, largest)
            record(Op.FINAL_SUM, 0, sums)
            record(Op.FINAL_NORM, 0, normed)
            record(Op.LOGITS, 0, logits)
        return logits

    # Steps

    def _norm(self, h: I64, gains: tuple[I64, int]) -> tuple[I32, I64, I64]:
        rows, columns = h.shape
        epsilon = c.norm_epsilon(self.config.rms_norm_eps_e12, columns, c.RESIDUAL_BITS, 0)
        out = np.empty((rows, columns), np.int32)
        blocks = -(-columns // c.STAT_COLUMNS)
        largest, sums = np.empty((rows, blocks), np.int64), np.empty((rows, blocks), np.int64)
        root = isqrt(columns << 40)
        self.workers.split(
            rows,
            lambda a, b: self._ops.rms_norm(
                h[a:b], epsilon, root, *gains, _NO_LIMIT, out[a:b], largest[a:b], sums[a:b]
            ),
        )
        return out, largest, sums

    def _head_norm(self, x: I32, gains: tuple[I64, int]) -> I32:
        head = self.config.head_dim
        rows = x.reshape(-1, head)
        epsilon = c.norm_epsilon(self.config.rms_norm_eps_e12, head, c.NORM_BITS, 0)
        out = np.empty_like(rows)
        blocks = -(-head // c.STAT_COLUMNS)
        largest, sums = np.empty((len(rows), blocks), np.int64), np.empty((len(rows), blocks), np.int64)
        root = isqrt(head << 40)
        self.workers.split(
            len(rows),
            lambda a, b: self._ops.rms_norm(
                rows[a:b], epsilon, root, *gains, c.LINEAR_QK_LIMIT, out[a:b], largest[a:b], sums[a:b]
            ),
        )
        return out.reshape(x.shape)

    def _rotate(self, x: I32, heads: int, table: Array) -> I32:
        out = np.empty_like(x)
        self.workers.split(len(x), lambda a, b: self._ops.rope(x[a:b], heads, table[a:b], out[a:b]))
        return out

    def _multiply(self, x: I32, outputs: Sequence[tuple[_Linear, int]]) -> list[I32]:
        """Linear layers that read the same rows."""
        taken = self.path.take(x)
        results = []
        for linear, limit in outputs:
            out = np.empty((len(x), len(linear.shift)), np.int32)

            def done(sums: Array, a: int, b: int, linear: _Linear = linear, out: I32 = out, limit: int = limit) -> None:
                self._ops.finish(sums, linear.shift[a:b], linear.bias[a:b], limit, out[:, a:b])

            self.path.multiply(taken, linear.prepared, done)
            results.append(out)
        return results

    def _add(self, x: I32, linear: _Linear, h: I64) -> I64:
        out = np.empty_like(h)

        def done(sums: Array, a: int, b: int) -> None:
            self._ops.add(sums, linear.shift[a:b], linear.bias[a:b], h[:, a:b], out[:, a:b])

        self.path.multiply(self.path.take(x), linear.prepared, done)
        return out

    def _attention(self, q: I32, keys: Array, values: Array, past: int) -> I32:
        """int32 [T, heads * head_dim] from rotated queries, over cached keys 0..past + t."""
        config, head, group = self.config, self.config.head_dim, self._group
        count = len(q)
        out = np.empty((count, config.num_heads * head), np.int32)
        # [kv heads, T, group, head]: the queries of all heads that share keys are rows of one product.
        grouped = q.reshape(count, config.num_kv_heads, group, head).swapaxes(0, 1).astype(np.float64)
        heads_out = out.reshape(count, config.num_kv_heads, group, head)
        blocks = [(a, min(count, a + QUERY_BLOCK)) for a in range(0, count, QUERY_BLOCK)]
        tasks = [(k, a, b) for a, b in reversed(blocks) for k in range(config.num_kv_heads)]

        def work(first: int, last: int) -> None:
            for k, a, b in tasks[first:last]:
                rows = grouped[k, a:b].reshape((b - a) * group, head)
                seen = past + b
                scores = self._product(rows, keys[k, :seen].T)
                totals = np.empty(len(rows), np.int64)
                self._ops.softmax(scores, past + a, group, self._multiplier, totals)
                if seen <= KEY_BLOCK:
                    products = self._product(scores, values[k, :seen])
                else:
                    products = np.zeros((len(rows), head), np.int64)
                    for start in range(0, seen, KEY_BLOCK):
                        part = self._product(
                            scores[:, start : start + KEY_BLOCK], values[k, start : start + KEY_BLOCK][: seen - start]
                        )
                        products += part.astype(np.int64)
                result = np.empty(products.shape, np.int32)
                self._ops.attend(products, totals, result)
                heads_out[a:b, k] = result.reshape(b - a, group, head)

        self.workers.split(len(tasks), work)
        return out


def _scaled(x: I64, s: int) -> I64:
    """`spec.canonical.rsh` of an array; from 62 on every 16-bit value is 0 either way."""
    s = min(s, 62)
    return (x + (1 << (s - 1))) >> s if s > 0 else x << -s


def _ignore(_op: Op, _rows: Array) -> None:
    return None
