# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Where everything stands in a trace and in a model's weights
@custom:contract-name trace_layout
@license AGPL-3.0-only
@notice The second writing of the index arithmetic of poip_chain/spec/{trace,referee,weights}.py: leaf index to tensor,
        layer, row and column and back; rows of weights_root; the parts of an attention cell's sub-trace. All of it from
        the model's dimensions and two lengths: nobody can name a leaf something else. Stateless.
"""

from ..interfaces import IModelRegistry
from ..interfaces import ITraceMap

# The tensors of a trace in order.
EMBED: constant(uint256) = 0
INPUT_MAX: constant(uint256) = 1
INPUT_SUM: constant(uint256) = 2
INPUT_NORM: constant(uint256) = 3
Q: constant(uint256) = 4
K: constant(uint256) = 5
V: constant(uint256) = 6
Q_NORM: constant(uint256) = 7
K_NORM: constant(uint256) = 8
Q_ROPE: constant(uint256) = 9
K_ROPE: constant(uint256) = 10
ATTENTION: constant(uint256) = 11
MIDDLE: constant(uint256) = 12
POST_MAX: constant(uint256) = 13
POST_SUM: constant(uint256) = 14
POST_NORM: constant(uint256) = 15
GATE: constant(uint256) = 16
UP: constant(uint256) = 17
HIDDEN: constant(uint256) = 18
OUTPUT: constant(uint256) = 19
FINAL_MAX: constant(uint256) = 20
FINAL_SUM: constant(uint256) = 21
FINAL_NORM: constant(uint256) = 22
LOGITS: constant(uint256) = 23
OPS: constant(uint256) = 24

# Bit `op` is set for tensors of int64 (16 in a leaf); the others are int32 (32 in a leaf).
_WIDE: constant(uint256) = 2**0 + 2**1 + 2**2 + 2**12 + 2**13 + 2**14 + 2**19 + 2**20 + 2**21

# The tensors of a layer's weights in the order of weights_root, then those outside of layers. Biases follow their matrix.
W_INPUT_NORM: constant(uint256) = 0
W_Q: constant(uint256) = 1
W_K: constant(uint256) = 3
W_V: constant(uint256) = 5
W_Q_NORM: constant(uint256) = 7
W_K_NORM: constant(uint256) = 8
W_O: constant(uint256) = 9
W_POST_NORM: constant(uint256) = 10
W_GATE: constant(uint256) = 11
W_UP: constant(uint256) = 13
W_DOWN: constant(uint256) = 15
W_LAYER: constant(uint256) = 17
W_EMBED: constant(uint256) = 17
W_FINAL_NORM: constant(uint256) = 18
W_HEAD: constant(uint256) = 19
W_ROPE: constant(uint256) = 20

STAT_COLUMNS: constant(uint256) = 128
KEYS: constant(uint256) = 32
_MAX_LEAVES: constant(uint256) = 2**32


# A model's dimensions; flags are 0 or 1.
struct Dimensions:
    hidden: uint256
    intermediate: uint256
    layers: uint256
    heads: uint256
    kv_heads: uint256
    head_dim: uint256
    vocabulary: uint256
    max_positions: uint256
    eps_e12: uint256
    tied: uint256
    attention_bias: uint256
    mlp_bias: uint256
    qk_norm: uint256


# By tensor: first leaf (counted from the layer's first for those of a layer), leaves, leaves of a row, columns.
struct Layout:
    model: Dimensions
    prompt_tokens: uint256
    output_tokens: uint256
    embed_leaves: uint256
    layer_leaves: uint256
    count: uint256
    starts: uint256[24]
    leaves: uint256[24]
    row_leaves: uint256[24]
    columns: uint256[24]


# An attention cell: position, head of q, column in it; blocks of 32 keys; first leaf of each part of its sub-trace.
struct Parts:
    position: uint256
    query: uint256
    column: uint256
    blocks: uint256
    maxima: uint256
    weights: uint256
    sums: uint256
    products: uint256
    count: uint256


@internal
@pure
def _is_wide(op: uint256) -> bool:
    return (_WIDE >> op) & 1 == 1


@internal
@pure
def _per_leaf(op: uint256) -> uint256:
    return 32 >> ((_WIDE >> op) & 1)


@internal
@pure
def _dimensions(config: IModelRegistry.ModelConfig) -> Dimensions:
    """
    @dev Reverts for dimensions that canonical arithmetic version 1 is not defined for (`bounds.check_dimensions`): the
         rest of the referee relies on them for its words and loops.
    """
    d: Dimensions = Dimensions(
        hidden=convert(config.hidden_size, uint256),
        intermediate=convert(config.intermediate_size, uint256),
        layers=convert(config.num_layers, uint256),
        heads=convert(config.num_heads, uint256),
        kv_heads=convert(config.num_kv_heads, uint256),
        head_dim=convert(config.head_dim, uint256),
        vocabulary=convert(config.vocab_size, uint256),
        max_positions=convert(config.max_positions, uint256),
        eps_e12=convert(config.rms_norm_eps_e12, uint256),
        tied=convert(config.tied_embeddings, uint256),
        attention_bias=convert(config.attention_bias, uint256),
        mlp_bias=convert(config.mlp_bias, uint256),
        qk_norm=convert(config.qk_norm, uint256),
    )
    assert 0 < d.hidden and d.hidden <= 8192, "referee: hidden size is out of range"
    assert 0 < d.intermediate and d.intermediate <= 2**17, "referee: intermediate size is out of range"
    assert 0 < d.layers and d.layers <= 1024, "referee: layers are out of range"
    assert 0 < d.heads and d.heads <= 1024 and 0 < d.kv_heads, "referee: heads are out of range"
    assert d.heads % d.kv_heads == 0, "referee: heads do not group"
    assert 0 < d.head_dim and d.head_dim <= 512 and d.head_dim & 1 == 0, "referee: head size is out of range"
    assert d.heads * d.head_dim <= 2**17, "referee: heads are out of range"
    assert 0 < d.vocabulary and d.vocabulary <= 2**31, "referee: vocabulary is out of range"
    assert d.max_positions <= 2**17, "referee: positions are out of range"
    assert 0 < d.eps_e12 and d.eps_e12 <= 10**10, "referee: epsilon is out of range"
    return d


@internal
@pure
def _layout(config: IModelRegistry.ModelConfig, prompt_tokens: uint256, output_tokens: uint256) -> Layout:
    """
    @dev Reverts if a count is zero, the context longer than the model's or the tree larger than 2**32 leaves.
    """
    layout: Layout = empty(Layout)
    layout.model = self._dimensions(config)
    d: Dimensions = layout.model
    assert 0 < prompt_tokens and 0 < output_tokens, "referee: a trace has prompt and output"
    assert prompt_tokens <= d.max_positions and output_tokens <= d.max_positions, "referee: context is too long"
    t: uint256 = prompt_tokens + output_tokens - 1
    assert t <= d.max_positions, "referee: context is too long"
    layout.prompt_tokens = prompt_tokens
    layout.output_tokens = output_tokens
    n: uint256 = output_tokens
    stats: uint256 = (d.hidden + STAT_COLUMNS - 1) // STAT_COLUMNS
    q_rows: uint256 = t * d.heads
    k_rows: uint256 = t * d.kv_heads
    queries: uint256 = d.heads * d.head_dim
    values: uint256 = d.kv_heads * d.head_dim
    layout.columns = [
        d.hidden,
        stats, stats, d.hidden,
        d.head_dim, d.head_dim, t, d.head_dim, d.head_dim, d.head_dim, d.head_dim,
        queries, d.hidden,
        stats, stats, d.hidden,
        d.intermediate, d.intermediate, d.intermediate, d.hidden,
        stats, stats, d.hidden, d.vocabulary,
    ]
    # Leaves of a row: 16 elements in one of the wide tensors, 32 in the others.
    stream: uint256 = (d.hidden + 15) >> 4
    stat: uint256 = (stats + 15) >> 4
    norm: uint256 = (d.hidden + 31) >> 5
    head: uint256 = (d.head_dim + 31) >> 5
    inner: uint256 = (d.intermediate + 31) >> 5
    columns: uint256 = (t + 31) >> 5
    attention: uint256 = (queries + 31) >> 5
    vocabulary: uint256 = (d.vocabulary + 31) >> 5
    layout.row_leaves = [
        stream,
        stat, stat, norm,
        head, head, columns, head, head, head, head,
        attention, stream,
        stat, stat, norm,
        inner, inner, inner, stream,
        stat, stat, norm, vocabulary,
    ]
    # Nothing here nor below exceeds 2**80: `_dimensions` bounds every factor.
    layout.leaves = [
        t * stream,
        t * stat, t * stat, t * norm,
        q_rows * head, k_rows * head, values * columns, q_rows * d.qk_norm * head, k_rows * d.qk_norm * head,
        q_rows * head, k_rows * head,
        t * attention, t * stream,
        t * stat, t * stat, t * norm,
        t * inner, t * inner, t * inner, t * stream,
        n * stat, n * stat, n * norm, n * vocabulary,
    ]
    # One after the other. Written out, since a loop with its checks of bounds costs twice as much as all of the rest.
    start: uint256 = 0
    layout.starts[EMBED] = start
    start = unsafe_add(start, layout.leaves[EMBED])
    layout.embed_leaves = start
    start = 0
    layout.starts[INPUT_MAX] = start
    start = unsafe_add(start, layout.leaves[INPUT_MAX])
    layout.starts[INPUT_SUM] = start
    start = unsafe_add(start, layout.leaves[INPUT_SUM])
    layout.starts[INPUT_NORM] = start
    start = unsafe_add(start, layout.leaves[INPUT_NORM])
    layout.starts[Q] = start
    start = unsafe_add(start, layout.leaves[Q])
    layout.starts[K] = start
    start = unsafe_add(start, layout.leaves[K])
    layout.starts[V] = start
    start = unsafe_add(start, layout.leaves[V])
    layout.starts[Q_NORM] = start
    start = unsafe_add(start, layout.leaves[Q_NORM])
    layout.starts[K_NORM] = start
    start = unsafe_add(start, layout.leaves[K_NORM])
    layout.starts[Q_ROPE] = start
    start = unsafe_add(start, layout.leaves[Q_ROPE])
    layout.starts[K_ROPE] = start
    start = unsafe_add(start, layout.leaves[K_ROPE])
    layout.starts[ATTENTION] = start
    start = unsafe_add(start, layout.leaves[ATTENTION])
    layout.starts[MIDDLE] = start
    start = unsafe_add(start, layout.leaves[MIDDLE])
    layout.starts[POST_MAX] = start
    start = unsafe_add(start, layout.leaves[POST_MAX])
    layout.starts[POST_SUM] = start
    start = unsafe_add(start, layout.leaves[POST_SUM])
    layout.starts[POST_NORM] = start
    start = unsafe_add(start, layout.leaves[POST_NORM])
    layout.starts[GATE] = start
    start = unsafe_add(start, layout.leaves[GATE])
    layout.starts[UP] = start
    start = unsafe_add(start, layout.leaves[UP])
    layout.starts[HIDDEN] = start
    start = unsafe_add(start, layout.leaves[HIDDEN])
    layout.starts[OUTPUT] = start
    start = unsafe_add(start, layout.leaves[OUTPUT])
    layout.layer_leaves = start
    start = layout.embed_leaves + d.layers * start
    layout.starts[FINAL_MAX] = start
    start = unsafe_add(start, layout.leaves[FINAL_MAX])
    layout.starts[FINAL_SUM] = start
    start = unsafe_add(start, layout.leaves[FINAL_SUM])
    layout.starts[FINAL_NORM] = start
    start = unsafe_add(start, layout.leaves[FINAL_NORM])
    layout.starts[LOGITS] = start
    start = unsafe_add(start, layout.leaves[LOGITS])
    layout.count = start
    assert start <= _MAX_LEAVES, "referee: trace has too many leaves"
    return layout


@internal
@pure
def _locate(layout: Layout, index: uint256) -> ITraceMap.Place:
    assert index < layout.count, "referee: no such leaf"
    op: uint256 = EMBED
    layer: uint256 = 0
    rest: uint256 = index
    if index >= layout.embed_leaves:
        layer = (index - layout.embed_leaves) // layout.layer_leaves
        rest = (index - layout.embed_leaves) % layout.layer_leaves
        op = INPUT_MAX
        if layer >= layout.model.layers:
            layer = 0
            rest = index
            op = FINAL_MAX
        for _: uint256 in range(OPS):
            if rest < unsafe_add(layout.starts[op], layout.leaves[op]):
                break
            op = unsafe_add(op, 1)
        rest -= layout.starts[op]
    per_leaf: uint256 = self._per_leaf(op)
    column: uint256 = (rest % layout.row_leaves[op]) * per_leaf
    return ITraceMap.Place(
        op=op,
        layer=layer,
        row=rest // layout.row_leaves[op],
        column=column,
        count=min(per_leaf, layout.columns[op] - column),
    )


@internal
@pure
def _index(layout: Layout, op: uint256, layer: uint256, row: uint256, column: uint256) -> uint256:
    """
    @dev The leaf that holds an element; its place must exist.
    """
    start: uint256 = layout.starts[op]
    if INPUT_MAX <= op and op < FINAL_MAX:
        start += layout.embed_leaves + layer * layout.layer_leaves
    return start + row * layout.row_leaves[op] + column // self._per_leaf(op)


@internal
@pure
def _rows_of_layer(model: Dimensions, tensor: uint256) -> (uint256, uint256):
    """
    @dev Rows of a layer's weights before those of `tensor`, and all.
    """
    queries: uint256 = model.heads * model.head_dim
    keys: uint256 = model.kv_heads * model.head_dim
    sizes: uint256[17] = [
        1,
        queries, model.attention_bias,
        keys, model.attention_bias,
        keys, model.attention_bias,
        model.qk_norm, model.qk_norm,
        model.hidden,
        1,
        model.intermediate, model.mlp_bias,
        model.intermediate, model.mlp_bias,
        model.hidden, model.mlp_bias,
    ]
    before: uint256 = 0
    total: uint256 = 0
    for i: uint256 in range(W_LAYER):
        if i == tensor:
            before = total
        total += sizes[i]
    return before, total


@internal
@pure
def _weight_row(model: Dimensions, tensor: uint256, layer: uint256, row: uint256) -> uint256:
    """
    @dev A row of a tensor among all leaves of weights_root. A tied head is the embedding.
    """
    before: uint256 = 0
    of_layer: uint256 = 0
    before, of_layer = self._rows_of_layer(model, tensor)
    if tensor < W_LAYER:
        return model.vocabulary + layer * of_layer + before + row
    if tensor == W_EMBED or (tensor == W_HEAD and model.tied == 1):
        return row
    final_norm: uint256 = model.vocabulary + model.layers * of_layer
    if tensor == W_FINAL_NORM:
        return final_norm
    if tensor == W_HEAD:
        return final_norm + 1 + row
    return final_norm + 1 + (1 - model.tied) * model.vocabulary + row


@internal
@pure
def _weight_row_count(model: Dimensions) -> uint256:
    """
    @dev Leaves of weights_root: the RoPE tables are the last.
    """
    return self._weight_row(model, W_ROPE, 0, model.max_positions)


@internal
@pure
def _parts(model: Dimensions, place: ITraceMap.Place, element: uint256) -> Parts:
    """
    @dev Of an element, not padding, of an attention leaf.
    """
    at: uint256 = place.column + element
    blocks: uint256 = place.row // KEYS + 1
    statistics: uint256 = (blocks + 15) >> 4
    parts: Parts = empty(Parts)
    parts.position = place.row
    parts.query = at // model.head_dim
    parts.column = at % model.head_dim
    parts.blocks = blocks
    parts.maxima = 2 * blocks
    parts.weights = parts.maxima + statistics
    parts.sums = parts.weights + blocks
    parts.products = parts.sums + statistics
    parts.count = parts.products + statistics
    return parts
