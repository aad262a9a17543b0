"""The Merkle tree over the trace of a forward pass, hashed as it is computed and never stored.

Leaves go through the hash in execution order; of the tree only the levels from CHUNK_LEVEL up are kept (a node for
4,096 leaves: 40 kB for 512 tokens of the default model). A node below, or a leaf, is opened by computing its layer
again: the bits are the same. The residual stream between layers is kept for that, within CHECKPOINT_BYTES.

`Trace` answers everything that `spec.referee.Inputs` asks: it is what a player opens from. Knows no game.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical import keccak
from poip_chain.canonical.compiled import Workers
from poip_chain.canonical.model import Cache, CanonicalModel
from poip_chain.errors import InvalidInput
from poip_chain.spec import canonical as c
from poip_chain.spec.merkle import leaf_hash
from poip_chain.spec.referee import KEYS, LINEAR, SEGMENT_COLUMNS, Cell, Referee
from poip_chain.spec.trace import LEAF_BYTES, Layout, Op, Tensor, encode
from poip_chain.spec.types import Hash32
from poip_chain.spec.weights import SEGMENT_BYTES, tensor_plan

CHUNK_LEVEL = 12
CHUNK = 1 << CHUNK_LEVEL
CHECKPOINT_BYTES = 256 << 20
"""Residual streams kept between layers. Where all do not fit, every second, third ... is kept."""
KEPT_LAYERS = 2
"""Computed layers kept for further openings: 150 MB each for 512 tokens of a model of 4,096 x 14,336."""
_SLICE = 8192
"""Leaves encoded and hashed at a time: 1 MB."""

Array = NDArray[Any]
Words = keccak.Words


class StreamedTree:
    """A Merkle tree fed with whole tensors in order. Keeps the nodes of CHUNK_LEVEL; `levels` are those above."""

    def __init__(self, workers: Workers | None = None) -> None:
        self.count = 0
        self._workers = workers
        self._pending = np.empty((0, 4), np.uint64)
        self._nodes: list[Words] = []
        self.levels: list[Words] = []

    def add(self, rows: Array) -> None:
        """The leaves of a tensor int32 or int64 [rows, columns]."""
        per_row = leaves_per_row(rows)
        step = max(1, _SLICE // per_row)
        for start in range(0, len(rows), step):
            hashes = keccak.leaf_nodes(leaf_words(rows[start : start + step]), self._workers)
            self.count += len(hashes)
            self._pending = np.concatenate([self._pending, hashes])
            whole = len(self._pending) // CHUNK * CHUNK
            if whole:
                self._nodes.append(self._reduce(self._pending[:whole]))
                self._pending = self._pending[whole:]

    def _reduce(self, level: Words) -> Words:
        for _ in range(CHUNK_LEVEL):
            level = keccak.parents(level, self._workers)
        return level

    def finish(self) -> Hash32:
        """The root."""
        if len(self._pending):
            self._nodes.append(self._reduce(self._pending))
            self._pending = self._pending[:0]
        level = np.concatenate(self._nodes) if self._nodes else self._pending
        self.levels = [level]
        while len(level) > 1:
            level = keccak.parents(level, self._workers)
            self.levels.append(level)
        return keccak.root_of(level)


def leaves_per_row(rows: Array) -> int:
    """Leaves of one row of a tensor int32 or int64."""
    return -(-int(rows.shape[1]) * rows.itemsize // LEAF_BYTES)


def leaf_words(rows: Array) -> Words:
    """A tensor's leaves as uint64 [leaves, 16]; rows are padded with zeros to whole leaves."""
    count, columns = rows.shape
    width = leaves_per_row(rows) * LEAF_BYTES // rows.itemsize
    if columns != width or not rows.flags.c_contiguous:
        padded = np.zeros((count, width), rows.dtype)
        padded[:, :columns] = rows
        rows = padded
    return rows.view(np.uint64).reshape(-1, LEAF_BYTES // 8)


class Trace:
    """The trace of one answer: root, and every node, leaf and sub-trace on demand.

    `tokens` are prompt and output without its last token; logits for the last `output_tokens` of them. Raises
    InvalidInput as `Layout` and the model do. Not for several threads at a time.
    """

    def __init__(self, model: CanonicalModel, tokens: Sequence[int], output_tokens: int) -> None:
        self.model, self.config, self.tokens = model, model.config, tuple(tokens)
        self.layout = Layout(model.config, len(tokens) - output_tokens + 1, output_tokens)
        per_layer = 8 * len(tokens) * self.config.hidden_size
        self._stride = -(-self.config.num_layers * per_layer // CHECKPOINT_BYTES)
        self._streams: dict[int, Array] = {}
        self._layers: OrderedDict[int, dict[Op, Array]] = OrderedDict()
        self._chunks: OrderedDict[int, list[Words]] = OrderedDict()
        tree = StreamedTree(model.workers)

        def record(op: Op, layer: int, rows: Array) -> None:
            if op in (Op.EMBED, Op.OUTPUT):
                following = 0 if op is Op.EMBED else layer + 1
                if following % self._stride == 0 or following == self.config.num_layers:
                    self._streams[following] = rows
            tree.add(rows)

        self.logits = model.forward(self.tokens, None, output_tokens, record)
        self.root = tree.finish()
        self._upper = tree.levels
        if tree.count != self.layout.count:
            raise InvalidInput(f"the engine made {tree.count} leaves; the layout has {self.layout.count}.")
        starts = list(accumulate((plan.rows for plan in tensor_plan(self.config)), initial=0))
        self._row_starts, self._plans = starts, tensor_plan(self.config)

    # Nodes and leaves

    def tensor(self, op: Op, layer: int = 0) -> Array:
        """A whole tensor of the trace [rows, columns], computed again."""
        if op is Op.EMBED:
            return self._stream(0)
        return self._computed(self.config.num_layers if op >= Op.FINAL_MAX else layer)[op]

    def leaf(self, index: int) -> bytes:
        """A leaf: 128 bytes. Raises InvalidInput if there is none of this index."""
        place = self.layout.locate(index)
        row = self.tensor(place.tensor.op, place.tensor.layer)[place.row]
        data: bytes = row[place.column : place.column + place.count].tobytes()
        return data.ljust(LEAF_BYTES, b"\0")

    def nodes(self, level: int, first: int, count: int) -> list[Hash32]:
        """Nodes first .. first + count of a level (0: leaf hashes). Raises InvalidInput if one does not exist."""
        known = 0 <= level < CHUNK_LEVEL + len(self._upper)
        size = -(-self.layout.count >> level) if known else 0
        if not (first >= 0 and 0 < count <= size - first):
            raise InvalidInput(f"level {level} of this trace has {size} nodes, not {first} to {first + count - 1}.")
        if level >= CHUNK_LEVEL:
            return [Hash32(node.tobytes()) for node in self._upper[level - CHUNK_LEVEL][first : first + count]]
        width = CHUNK >> level
        result: list[Hash32] = []
        for chunk in range(first // width, (first + count - 1) // width + 1):
            nodes = self._chunk(chunk)[level]
            begin = max(0, first - chunk * width)
            result.extend(Hash32(node.tobytes()) for node in nodes[begin : first + count - chunk * width])
        return result

    def proof(self, index: int) -> list[Hash32]:
        """The siblings of a leaf from the bottom up, as `spec.merkle.root_from_proof` takes them."""
        proof, size, level = [], self.layout.count, 0
        while size > 1:
            if index ^ 1 < size:
                proof += self.nodes(level, index ^ 1, 1)
            index, size, level = index // 2, (size + 1) // 2, level + 1
        return proof

    def _chunk(self, chunk: int) -> list[Words]:
        """The levels below CHUNK_LEVEL of one chunk."""
        if chunk not in self._chunks:
            words = self._words(chunk * CHUNK, min(self.layout.count, (chunk + 1) * CHUNK))
            levels = [keccak.leaf_nodes(words, self.model.workers)]
            for _ in range(CHUNK_LEVEL - 1):
                levels.append(keccak.parents(levels[-1], self.model.workers))
            self._chunks[chunk] = levels
            while len(self._chunks) > 64:
                self._chunks.popitem(last=False)
        return self._chunks[chunk]

    def _words(self, first: int, last: int) -> Words:
        """Leaves first .. last as words."""
        parts = []
        while first < last:
            tensor = self.layout.locate(first).tensor
            end = min(last, tensor.start + tensor.leaves)
            parts.append(self._tensor_words(tensor, first - tensor.start, end - tensor.start))
            first = end
        return np.concatenate(parts)

    def _tensor_words(self, tensor: Tensor, first: int, last: int) -> Words:
        rows = self.tensor(tensor.op, tensor.layer)
        row, end = first // tensor.row_leaves, -(-last // tensor.row_leaves)
        skip = row * tensor.row_leaves
        return leaf_words(rows[row:end])[first - skip : last - skip]

    def _stream(self, layer: int) -> Array:
        """The residual stream before a layer."""
        kept = layer if layer in self._streams else layer // self._stride * self._stride
        h = self._streams[kept]
        for number in range(kept, layer):
            h = self.model.layer(number, h, Cache())
        return h

    def _computed(self, layer: int) -> dict[Op, Array]:
        """All tensors of a layer; those after the last layer for layer = num_layers."""
        if layer in self._layers:
            self._layers.move_to_end(layer)
            return self._layers[layer]
        found: dict[Op, Array] = {}

        def record(op: Op, _layer: int, rows: Array) -> None:
            found[op] = rows

        h = self._stream(layer)
        while len(self._layers) >= KEPT_LAYERS:
            self._layers.popitem(last=False)
        if layer == self.config.num_layers:
            self.model.head(h[self.layout.first_logit_position :], record)
        else:
            self.model.layer(layer, h, Cache(), record)
        self._layers[layer] = found
        return found

    def forget(self) -> None:
        """Free what was computed for openings; it is computed again when asked for."""
        self._layers.clear()
        self._chunks.clear()

    # What else a step of the referee reads

    def sub_leaf(self, cell: Cell, index: int) -> bytes:
        """A leaf of the sub-trace of an attention cell."""
        return self.attention(cell)[index]

    def attention(self, cell: Cell) -> list[bytes]:
        """All leaves of the sub-trace of an attention cell, as `spec.referee` defines it."""
        parts = Referee(self.layout, self).attention_parts(cell)
        config, position = self.config, parts.position
        keys = config.num_kv_heads
        key = parts.query // (config.num_heads // keys)
        q = self.tensor(Op.Q_ROPE, parts.layer)[position * config.num_heads + parts.query].astype(np.int64)
        rows = self.tensor(Op.K_ROPE, parts.layer)[key : (position + 1) * keys : keys].astype(np.int64)
        column = self.tensor(Op.V, parts.layer)[key * config.head_dim + parts.column, : position + 1].astype(np.int64)
        scores: list[int] = (rows @ q).tolist()
        _, weights, _ = c.softmax(scores, c.score_multiplier(config.head_dim))
        values: list[int] = column.tolist()
        blocks = range(0, position + 1, KEYS)
        maxima = list(accumulate((max(scores[i : i + KEYS]) for i in blocks), max))
        sums = list(accumulate(sum(weights[i : i + KEYS]) for i in blocks))
        products = list(accumulate(c.dot(weights[i : i + KEYS], values[i : i + KEYS]) for i in blocks))
        scores += [0] * (len(blocks) * KEYS - len(scores))
        leaves: list[bytes] = []
        for part, wide in ((scores, True), (maxima, True), (weights, False), (sums, True), (products, True)):
            step = 16 if wide else 32
            leaves += [encode(part[i : i + step], wide) for i in range(0, len(part), step)]
        return leaves

    def attention_tree(self, cell: Cell) -> list[list[Hash32]]:
        """The levels of the tree over an attention cell's sub-trace, leaf hashes first."""
        level = [leaf_hash(leaf) for leaf in self.attention(cell)]
        words = np.frombuffer(b"".join(level), np.uint64).reshape(-1, 4)
        levels = [level]
        while len(words) > 1:
            words = keccak.parents(words)
            levels.append([Hash32(node.tobytes()) for node in words])
        return levels

    def partial_sum(self, cell: Cell, segment: int) -> int:
        """A running sum of a linear cell."""
        return self.partial_sums(cell)[segment]

    def partial_sums(self, cell: Cell) -> list[int]:
        """All running sums of a linear cell, one after every 128 input columns. Raises InvalidInput for another kind."""
        place = self.layout.locate(cell.index)
        op, layer, config = place.tensor.op, place.tensor.layer, self.config
        if op not in LINEAR or not 0 <= cell.element < place.count:
            raise InvalidInput(f"leaf {cell.index}, element {cell.element} is not a linear element.")
        output, position = place.column + cell.element, place.row
        if op is Op.V:
            output, position = position, output
        elif op in (Op.Q, Op.K):
            position, head = divmod(position, config.num_heads if op is Op.Q else config.num_kv_heads)
            output += head * config.head_dim
        name = LINEAR[op].weight
        if name == "head":
            name = "embed" if config.tied_embeddings else "head"
        else:
            name = f"{layer}.{name}"
        weights = self.model.weights.integers[name][output].astype(np.int64)
        products = weights * self.tensor(LINEAR[op].source, layer)[position].astype(np.int64)
        running = np.cumsum(products)
        ends = [min(len(running), i + SEGMENT_COLUMNS) - 1 for i in range(0, len(running), SEGMENT_COLUMNS)]
        return [int(value) for value in running[ends]]

    def exponent(self, row: int) -> int:
        """The exponent of a row of weights_root."""
        name, inside = self._weight_row(row)
        return int(self.model.weights.exponents[name][inside])

    def segment(self, row: int, segment: int) -> bytes:
        """256 bytes, or a row's shorter rest, of a row of weights_root."""
        return self.row(row)[segment * SEGMENT_BYTES : (segment + 1) * SEGMENT_BYTES]

    def row(self, row: int) -> bytes:
        """All bytes of a row of weights_root, without its exponent."""
        name, inside = self._weight_row(row)
        data: bytes = self.model.weights.integers[name][inside].tobytes()
        return data

    def _weight_row(self, row: int) -> tuple[str, int]:
        if not 0 <= row < self._row_starts[-1]:
            raise InvalidInput(f"this model has {self._row_starts[-1]} rows of weights, not row {row}.")
        number = bisect_right(self._row_starts, row) - 1
        return self._plans[number].name, row - self._row_starts[number]

    def token(self, position: int) -> int:
        """The token at a position."""
        return self.tokens[position]
