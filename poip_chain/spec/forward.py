"""The canonical forward pass of a model over a sequence of tokens (canonical arithmetic version 1).

Written to be compared with the paper's formulas line by line: for each layer

    x = h + attention(norm(h)),   h = x + down(silu(gate(norm(x))) * up(norm(x)))

There is no cache and no batch: row t of every tensor depends on tokens 0..t alone, so decoding step by step and one
prefill are the same function. Slow on purpose; the fast twin is poip_chain/canonical. The result is every committed
tensor by name in execution order, in the shapes of `trace.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poip_chain.errors import InvalidInput
from poip_chain.spec import canonical as c
from poip_chain.spec import weights as w
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling
from poip_chain.spec.trace import Layout, Op, Rows

CanonicalRow = tuple[int, Sequence[int]]
"""(exponent e, integers): the weights integers * 2**e. RoPE tables have the exponent -30."""


@dataclass(frozen=True)
class CanonicalWeights:
    """All rows of a model by the names of `weights.tensor_plan`."""

    config: ModelConfig
    rows: Mapping[str, Sequence[CanonicalRow]]

    def vector(self, name: str) -> CanonicalRow:
        """The only row of a tensor that is a vector."""
        return self.rows[name][0]

    def bias(self, name: str, column: int) -> tuple[int, int] | None:
        """(integer, exponent) of one element of the bias of the tensor `name`; None if it has none."""
        if name + "_bias" not in self.rows:
            return None
        exponent, integers = self.vector(name + "_bias")
        return integers[column], exponent


def canonical_weights(
    config: ModelConfig, tensors: Mapping[str, Sequence[w.Row]], scaling: RopeScaling | None = None
) -> CanonicalWeights:
    """The rows of a checkpoint. `tensors` maps checkpoint names to float rows (a vector is one row).

    Raises InvalidInput if a tensor is missing or a weight not finite.
    """
    rows: dict[str, list[CanonicalRow]] = {}
    for plan in w.tensor_plan(config):
        if not plan.source:
            rows[plan.name] = [(w.ROPE_EXPONENT, row) for row in w.rope_rows(config, scaling)]
        elif plan.source in tensors:
            rows[plan.name] = [w.quantise_row(row) for row in tensors[plan.source]]
        else:
            raise InvalidInput(f"the checkpoint has no tensor {plan.source}.")
    return CanonicalWeights(config, rows)


def forward(weights: CanonicalWeights, tokens: Sequence[int], output_tokens: int = 1) -> dict[str, Rows]:
    """All tensors of the trace over `tokens`, with logits for the last `output_tokens` positions.

    Raises InvalidInput if there is no token, one outside the vocabulary, or more than the model has positions.
    """
    config = weights.config
    layout = Layout(config, len(tokens) - output_tokens + 1, output_tokens)
    if any(not 0 <= token < config.vocab_size for token in tokens):
        raise InvalidInput(f"token ids are 0 to {config.vocab_size - 1}.")
    trace: dict[str, Rows] = {}
    table = weights.rows["embed"]
    h: Rows = [[c.embed(value, table[token][0]) for value in table[token][1]] for token in tokens]
    trace["embed"] = h
    for layer in range(config.num_layers):
        h = _layer(weights, f"{layer}.", h, trace)
    last = h[layout.first_logit_position :]
    normed = _norm(weights, "final_norm", last, trace, "final_")
    head = weights.rows["embed" if config.tied_embeddings else "head"]
    trace["logits"] = _linear(head, normed, c.NORM_BITS, c.LOGIT_BITS, c.LOGIT_LIMIT)
    return trace


def _layer(weights: CanonicalWeights, layer: str, h: Rows, trace: dict[str, Rows]) -> Rows:
    """One layer; adds its tensors to the trace and returns the residual stream."""
    config = weights.config
    normed = _norm(weights, layer + "input_norm", h, trace, layer + "input_")

    def project(name: str, x: Rows, bits: int, limit: int) -> Rows:
        biases = [weights.bias(layer + name, column) for column in range(len(weights.rows[layer + name]))]
        return _linear(weights.rows[layer + name], x, c.NORM_BITS, bits, limit, biases)

    def add(name: str, x: Rows, bits: int, to: Rows) -> Rows:
        rows = weights.rows[layer + name]
        biases = [weights.bias(layer + name, column) for column in range(len(rows))]
        change = _linear(rows, x, bits, c.RESIDUAL_BITS, None, biases)
        return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(to, change, strict=True)]

    q = _heads(project("q", normed, c.NORM_BITS, c.LINEAR_QK_LIMIT), config.head_dim)
    k = _heads(project("k", normed, c.NORM_BITS, c.LINEAR_QK_LIMIT), config.head_dim)
    v = project("v", normed, c.V_BITS, c.V_LIMIT)
    columns = [list(column) for column in zip(*v, strict=True)]
    trace.update({layer + "q": q, layer + "k": k, layer + "v": columns})
    if config.qk_norm:
        q, k = (_head_norm(weights, layer + name, x) for name, x in (("q_norm", q), ("k_norm", k)))
        trace.update({layer + "q_norm": q, layer + "k_norm": k})
    q, k = (_rotate(weights, x, heads) for x, heads in ((q, config.num_heads), (k, config.num_kv_heads)))
    trace.update({layer + "q_rope": q, layer + "k_rope": k})
    attention = [_attend(config, q, k, columns, t) for t in range(len(h))]
    trace[layer + "attention"] = attention
    h = add("o", attention, c.ATTENTION_BITS, h)
    trace[layer + "middle"] = h
    normed = _norm(weights, layer + "post_norm", h, trace, layer + "post_")
    gate = project("gate", normed, c.GATE_BITS, c.GATE_LIMIT)
    up = project("up", normed, c.GATE_BITS, c.GATE_LIMIT)
    hidden = [[c.swiglu(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(gate, up, strict=True)]
    trace.update({layer + "gate": gate, layer + "up": up, layer + "hidden": hidden})
    h = add("down", hidden, c.HIDDEN_BITS, h)
    trace[layer + "output"] = h
    return h


def _linear(
    rows: Sequence[CanonicalRow],
    x: Rows,
    bits_in: int,
    bits_out: int,
    limit: int | None,
    biases: Sequence[tuple[int, int] | None] | None = None,
) -> Rows:
    """x W^T + b for all positions; clamped where there is a limit."""

    def element(position: Sequence[int], column: int) -> int:
        exponent, integers = rows[column]
        bias = biases[column] if biases else None
        value = c.linear(c.dot(integers, position), exponent, bits_in, bits_out, bias)
        return value if limit is None else c.clamp(value, limit)

    return [[element(position, column) for column in range(len(rows))] for position in x]


def _norm(weights: CanonicalWeights, name: str, h: Rows, trace: dict[str, Rows], prefix: str) -> Rows:
    """RMSNorm of the residual stream, with the running statistics that the trace commits to."""
    exponent, gains = weights.vector(name)
    eps = weights.config.rms_norm_eps_e12
    maxima, sums = zip(*(norm_statistics(row, eps) for row in h), strict=True)
    trace[prefix + "max"], trace[prefix + "sum"] = maxima, sums
    trace[prefix + "norm"] = [c.rms_norm(row, c.RESIDUAL_BITS, eps, gains, exponent) for row in h]
    return trace[prefix + "norm"]


def norm_statistics(row: Sequence[int], eps_e12: int) -> tuple[list[int], list[int]]:
    """(running maximum of |h|, running sum of squares that starts from epsilon), one of each per 128 columns.

    The last of each are what `canonical.rms_norm` uses: the shift that the squares need is that of the last maximum.
    """
    blocks = [row[i : i + c.STAT_COLUMNS] for i in range(0, len(row), c.STAT_COLUMNS)]
    maxima: list[int] = []
    for block in blocks:
        maxima.append(max([abs(h) for h in block] + maxima[-1:]))
    shift = c.norm_shift(maxima[-1])
    total = c.norm_epsilon(eps_e12, len(row), c.RESIDUAL_BITS, shift)
    sums: list[int] = []
    for block in blocks:
        total += sum(c.norm_square(h, shift) for h in block)
        sums.append(total)
    return maxima, sums


def _head_norm(weights: CanonicalWeights, name: str, x: Rows) -> Rows:
    """QK-norm: RMSNorm of each head's row, then the clamp that RoPE expects."""
    exponent, gains = weights.vector(name)
    eps = weights.config.rms_norm_eps_e12
    normed = (c.rms_norm(row, c.NORM_BITS, eps, gains, exponent) for row in x)
    return [[c.clamp(value, c.LINEAR_QK_LIMIT) for value in row] for row in normed]


def _rotate(weights: CanonicalWeights, x: Rows, heads: int) -> Rows:
    """RoPE: element i of a head and element i + half are one pair (the layout of all supported checkpoints)."""
    half = weights.config.head_dim // 2
    result = []
    for index, row in enumerate(x):
        table = weights.rows["rope"][index // heads][1]
        pairs = [c.rope(row[i], row[half + i], table[i], table[half + i]) for i in range(half)]
        result.append([a for a, _ in pairs] + [b for _, b in pairs])
    return result


def _attend(config: ModelConfig, q: Rows, k: Rows, columns: Rows, t: int) -> list[int]:
    """The attention output of all heads at position t, over keys 0..t. Several heads share one head of k and v."""
    head, shared = config.head_dim, config.num_heads // config.num_kv_heads
    multiplier = c.score_multiplier(head)
    result = []
    for query in range(config.num_heads):
        key = query // shared
        scores = [c.dot(q[t * config.num_heads + query], k[j * config.num_kv_heads + key]) for j in range(t + 1)]
        _, weights, total = c.softmax(scores, multiplier)
        for column in columns[key * head : (key + 1) * head]:
            result.append(c.attend(c.dot(weights, column[: t + 1]), total))
    return result


def _heads(rows: Rows, head_dim: int) -> Rows:
    """Rows of all heads side by side as one row per position and head."""
    return [row[i : i + head_dim] for row in rows for i in range(0, len(row), head_dim)]


__all__ = ["CanonicalRow", "CanonicalWeights", "Op", "canonical_weights", "forward", "norm_statistics"]
