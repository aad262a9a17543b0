# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title What a cell depends on, and how
@custom:contract-name referee_reads
@license AGPL-3.0-only
@notice From the name of a cell alone: which leaves of the trace and of the cell's own tree, which segments of which
        weight rows, which token; and by which formula it follows from them. The second writing of the first half of
        poip_chain/spec/referee.py.
        A linear or attention cell is opened into a tree of its own. Of an attention cell it is the sub-trace; of a
        linear cell its running sums as leaves of 16 int64, zero-filled: sum s is element s % 16 of leaf s // 16.
"""

from ..interfaces import ITraceMap
from . import formulas
from . import trace_layout

_SEGMENT_COLUMNS: constant(uint256) = 128
_SEGMENT_BYTES: constant(uint256) = 256


# A linear cell: its weights, whether they have a bias, input tensor, fraction bits, clamp (0: it adds to the residual
# stream), row of the weights, row of the input tensor, rows of the weights.
struct Linear:
    weights: uint256
    biased: bool
    source: uint256
    bits_in: int256
    bits_out: int256
    limit: int256
    output: uint256
    position: uint256
    outputs: uint256


@internal
@pure
def _is_linear(op: uint256) -> bool:
    # Q K V MIDDLE GATE UP OUTPUT LOGITS
    return ((2**4 + 2**5 + 2**6 + 2**12 + 2**16 + 2**17 + 2**19 + 2**23) >> op) & 1 == 1


@internal
@pure
def _linear(model: trace_layout.Dimensions, place: ITraceMap.Place, element: uint256) -> Linear:
    op: uint256 = place.op
    result: Linear = empty(Linear)
    result.output = place.column + element
    result.position = place.row
    result.source = trace_layout.INPUT_NORM
    result.bits_in = 16
    result.bits_out = 16
    result.limit = 2**26
    if op <= trace_layout.V:
        result.biased = model.attention_bias == 1
        heads: uint256 = model.kv_heads
        result.weights = trace_layout.W_K
        if op == trace_layout.Q:
            heads = model.heads
            result.weights = trace_layout.W_Q
        result.outputs = heads * model.head_dim
        if op == trace_layout.V:
            # A row of v is a column of its matrix product.
            result.output = place.row
            result.position = place.column + element
            result.weights = trace_layout.W_V
            result.bits_out = 12
            result.limit = 2**21 - 1
        else:
            result.output += (place.row % heads) * model.head_dim
            result.position = place.row // heads
    elif op == trace_layout.MIDDLE:
        result.weights = trace_layout.W_O
        result.source = trace_layout.ATTENTION
        result.bits_out = 20
        result.limit = 0
    elif op == trace_layout.OUTPUT:
        result.weights = trace_layout.W_DOWN
        result.source = trace_layout.HIDDEN
        result.bits_in = 14
        result.bits_out = 20
        result.limit = 0
        result.outputs = model.hidden
        result.biased = model.mlp_bias == 1
    elif op == trace_layout.LOGITS:
        result.weights = trace_layout.W_HEAD
        result.source = trace_layout.FINAL_NORM
        result.limit = 2**31 - 1
    else:
        result.weights = trace_layout.W_GATE + 2 * (op - trace_layout.GATE)
        result.source = trace_layout.POST_NORM
        result.limit = 2**30 - 1
        result.outputs = model.intermediate
        result.biased = model.mlp_bias == 1
    return result


@internal
@pure
def _running_sums(layout: trace_layout.Layout, source: uint256) -> uint256:
    """
    @dev How many running sums a linear cell over this input tensor has.
    """
    return (layout.columns[source] + _SEGMENT_COLUMNS - 1) // _SEGMENT_COLUMNS


@internal
@pure
def _sub_leaves(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> uint256:
    """
    @dev Leaves of the tree into which a cell is opened; 0 if it is not.
    """
    if element >= place.count:
        return 0
    if place.op == trace_layout.ATTENTION:
        return trace_layout._parts(layout.model, place, element).count
    if self._is_linear(place.op):
        linear: Linear = self._linear(layout.model, place, element)
        return (self._running_sums(layout, linear.source) + 15) >> 4
    return 0


@internal
@pure
def _stream(layout: trace_layout.Layout, place: ITraceMap.Place, position: uint256, column: uint256) -> uint256:
    """
    @dev The leaf of the residual stream that a norm or an addition reads.
    """
    op: uint256 = trace_layout.OUTPUT
    layer: uint256 = place.layer
    if place.op >= trace_layout.FINAL_MAX:
        layer = layout.model.layers - 1
    elif place.op >= trace_layout.POST_MAX:
        op = trace_layout.MIDDLE
    elif layer == 0:
        op = trace_layout.EMBED
    else:
        layer -= 1
    return trace_layout._index(layout, op, layer, position, column)


@internal
@pure
def _one_weight(row: uint256, columns: uint256, column: uint256) -> ITraceMap.RowRead:
    """
    @dev A row of int16 of which the segment with one column is read.
    """
    return ITraceMap.RowRead(
        row=row, size=2 * columns, segments=1, first=column // _SEGMENT_COLUMNS, second=0
    )


@internal
@pure
def _reads(layout: trace_layout.Layout, place: ITraceMap.Place, step: ITraceMap.Step) -> ITraceMap.Reads:
    """
    @dev Reverts if there is no such cell. A padding cell is 0 and reads nothing.
    """
    assert step.element < trace_layout._per_leaf(place.op), "referee: no such element"
    subs: uint256 = self._sub_leaves(layout, place, step.element)
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    if step.inside:
        assert step.sub_leaf < subs, "referee: no such cell inside"
        if place.op == trace_layout.ATTENTION:
            reads = self._inside_attention(layout, place, step)
        else:
            reads = self._running_sum(layout, place, step)
    elif step.element < place.count:
        if place.op == trace_layout.EMBED:
            reads = self._embed(layout, place, step.element)
        elif self._is_linear(place.op):
            reads = self._finish_linear(layout, place, step.element)
        elif place.op == trace_layout.ATTENTION:
            reads = self._finish_attention(layout, place, step.element)
        elif place.op == trace_layout.HIDDEN:
            column: uint256 = place.column + step.element
            reads.first[0] = trace_layout._index(layout, trace_layout.GATE, place.layer, place.row, column)
            reads.first[1] = trace_layout._index(layout, trace_layout.UP, place.layer, place.row, column)
            reads.many = [1, 1, 0]
            reads.formula.kind = formulas.SWIGLU
            reads.formula.a = step.element
            reads.formula.b = 32 + step.element
        elif trace_layout.Q_NORM <= place.op and place.op <= trace_layout.K_ROPE:
            reads = self._head(layout, place, step.element)
        else:
            reads = self._norm(layout, place, step.element)
    reads.leaves = layout.count
    reads.sub_leaves = subs
    reads.weight_rows = trace_layout._weight_row_count(layout.model)
    reads.wide = step.inside or trace_layout._is_wide(place.op)
    if step.inside and place.op == trace_layout.ATTENTION:
        parts: trace_layout.Parts = trace_layout._parts(layout.model, place, step.element)
        reads.wide = step.sub_leaf < parts.weights or parts.sums <= step.sub_leaf
    return reads


@internal
@pure
def _embed(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> ITraceMap.Reads:
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    column: uint256 = place.column + element
    reads.token = True
    reads.from_prompt = place.row < layout.prompt_tokens
    at: uint256 = place.row
    tokens: uint256 = layout.prompt_tokens
    if not reads.from_prompt:
        at -= layout.prompt_tokens
        tokens = layout.output_tokens
    reads.token_leaves = (tokens + 31) >> 5
    reads.token_leaf = at >> 5
    reads.token_bytes = 4 * min(32, tokens - 32 * reads.token_leaf)
    reads.token_at = 4 * (at & 31)
    reads.vocabulary = layout.model.vocabulary
    reads.row_count = 1
    reads.rows[0] = self._one_weight(0, layout.model.hidden, column)
    reads.formula.kind = formulas.EMBED
    reads.formula.weight_at = 2 + 2 * (column % _SEGMENT_COLUMNS)
    return reads


@internal
@pure
def _norm(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> ITraceMap.Reads:
    """
    @dev A cell of the three tensors of a norm over the residual stream: running maximum, running sum, output.
    """
    model: trace_layout.Dimensions = layout.model
    layer: uint256 = place.layer
    row: uint256 = place.row
    column: uint256 = place.column + element
    base: uint256 = trace_layout.INPUT_MAX
    weights: uint256 = trace_layout.W_INPUT_NORM
    position: uint256 = row
    if place.op >= trace_layout.FINAL_MAX:
        base = trace_layout.FINAL_MAX
        weights = trace_layout.W_FINAL_NORM
        position = row + layout.prompt_tokens - 1
    elif place.op >= trace_layout.POST_MAX:
        base = trace_layout.POST_MAX
        weights = trace_layout.W_POST_NORM
    last: uint256 = layout.columns[base] - 1
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    reads.formula.size = model.hidden
    if place.op == base + 2:
        reads.first[0] = self._stream(layout, place, position, column)
        reads.first[1] = trace_layout._index(layout, base, layer, row, last)
        reads.first[2] = trace_layout._index(layout, base + 1, layer, row, last)
        reads.many = [1, 1, 1]
        reads.row_count = 1
        reads.rows[0] = self._one_weight(
            trace_layout._weight_row(model, weights, layer, 0), model.hidden, column
        )
        reads.formula.kind = formulas.NORM
        reads.formula.a = column & 15
        reads.formula.b = 16 + (last & 15)
        reads.formula.c = 32 + (last & 15)
        reads.formula.weight_at = 2 + 2 * (column % _SEGMENT_COLUMNS)
        return reads
    first: uint256 = column * trace_layout.STAT_COLUMNS
    columns: uint256 = min(trace_layout.STAT_COLUMNS, model.hidden - first)
    many: uint256 = (columns + 15) >> 4
    reads.first[0] = self._stream(layout, place, position, first)
    reads.many[0] = many
    reads.formula.kind = formulas.MAGNITUDE
    reads.formula.columns = columns
    reads.formula.c = formulas.ABSENT
    run: uint256 = 1
    if place.op == base + 1:
        reads.first[1] = trace_layout._index(layout, base, layer, row, last)
        reads.many[1] = 1
        reads.formula.kind = formulas.SQUARES
        reads.formula.b = 16 * many + (last & 15)
        reads.formula.eps_e12 = model.eps_e12
        run = 2
        many += 1
    if column != 0:
        reads.first[run] = trace_layout._index(layout, place.op, layer, row, column - 1)
        reads.many[run] = 1
        reads.formula.c = 16 * many + ((column - 1) & 15)
    return reads


@internal
@pure
def _head(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> ITraceMap.Reads:
    """
    @dev A cell of q_norm, k_norm, q_rope or k_rope: it reads the row of the same head before it.
    """
    model: trace_layout.Dimensions = layout.model
    op: uint256 = place.op
    column: uint256 = place.column + element
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    reads.row_count = 1
    if op <= trace_layout.K_NORM:
        weights: uint256 = trace_layout.W_Q_NORM + (op - trace_layout.Q_NORM)
        row: uint256 = trace_layout._weight_row(model, weights, place.layer, 0)
        reads.first[0] = trace_layout._index(layout, op - 3, place.layer, place.row, 0)
        reads.many[0] = layout.row_leaves[op]
        reads.rows[0] = self._one_weight(row, model.head_dim, column)
        reads.formula.kind = formulas.HEAD_NORM
        reads.formula.a = column
        reads.formula.size = model.head_dim
        reads.formula.eps_e12 = model.eps_e12
        reads.formula.weight_at = 2 + 2 * (column % _SEGMENT_COLUMNS)
        return reads
    heads: uint256 = model.heads
    if op == trace_layout.K_ROPE:
        heads = model.kv_heads
    half: uint256 = model.head_dim // 2
    pair: uint256 = column % half
    other: uint256 = half + pair
    # q and k stand five places before q_rope and k_rope, q_norm and k_norm two.
    source: uint256 = op - 5 + 3 * model.qk_norm
    reads.first[0] = trace_layout._index(layout, source, place.layer, place.row, pair)
    reads.first[1] = trace_layout._index(layout, source, place.layer, place.row, other)
    reads.many = [1, 1, 0]
    if reads.first[0] == reads.first[1]:
        reads.many[1] = 0
    reads.formula.kind = formulas.ROPE
    reads.formula.columns = column // half
    reads.formula.a = pair & 31
    reads.formula.b = 32 * reads.many[1] + (other & 31)
    # A table's row holds int32: 64 in a segment.
    reads.rows[0].row = trace_layout._weight_row(model, trace_layout.W_ROPE, 0, place.row // heads)
    reads.rows[0].size = 4 * model.head_dim
    reads.rows[0].segments = 1
    reads.rows[0].first = pair >> 6
    reads.formula.weight_at = 2 + 4 * (pair & 63)
    reads.formula.second_at = 2 + 4 * (other & 63)
    if other >> 6 != pair >> 6:
        reads.rows[0].segments = 2
        reads.rows[0].second = other >> 6
        reads.formula.second_at += _SEGMENT_BYTES
    return reads


@internal
@pure
def _finish_attention(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> ITraceMap.Reads:
    """
    @dev An attention cell from the last running sum and product of its sub-trace.
    """
    parts: trace_layout.Parts = trace_layout._parts(layout.model, place, element)
    last: uint256 = parts.blocks - 1
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    reads.sub_first = [parts.sums + (last >> 4), parts.products + (last >> 4)]
    reads.sub_many = [1, 1]
    reads.formula.kind = formulas.ATTEND
    reads.formula.a = last & 15
    reads.formula.b = 16 + (last & 15)
    return reads


@internal
@pure
def _finish_linear(layout: trace_layout.Layout, place: ITraceMap.Place, element: uint256) -> ITraceMap.Reads:
    """
    @dev A linear cell: its last running sum, the exponent of its row, its bias, the stream that it adds to.
    """
    model: trace_layout.Dimensions = layout.model
    linear: Linear = self._linear(model, place, element)
    last: uint256 = self._running_sums(layout, linear.source) - 1
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    reads.sub_first[0] = last >> 4
    reads.sub_many[0] = 1
    reads.row_count = 1
    reads.rows[0].row = trace_layout._weight_row(model, linear.weights, place.layer, linear.output)
    reads.formula.kind = formulas.LINEAR
    reads.formula.a = last & 15
    reads.formula.bits_in = linear.bits_in
    reads.formula.bits_out = linear.bits_out
    reads.formula.limit = linear.limit
    reads.formula.c = formulas.ABSENT
    if linear.biased:
        reads.row_count = 2
        row: uint256 = trace_layout._weight_row(model, linear.weights + 1, place.layer, 0)
        reads.rows[1] = self._one_weight(row, linear.outputs, linear.output)
        # Behind the first row (exponent and root) and the bias row's exponent.
        reads.formula.second_at = 36 + 2 * (linear.output % _SEGMENT_COLUMNS)
    if linear.limit == 0:
        reads.first[0] = self._stream(layout, place, linear.position, place.column + element)
        reads.many[0] = 1
        reads.formula.a += 16
        reads.formula.c = element
    return reads


@internal
@pure
def _running_sum(
    layout: trace_layout.Layout, place: ITraceMap.Place, step: ITraceMap.Step
) -> ITraceMap.Reads:
    """
    @dev A running sum: the one before, a segment of the row, up to four leaves of the input.
    """
    linear: Linear = self._linear(layout.model, place, step.element)
    segment: uint256 = 16 * step.sub_leaf + step.sub_element
    depth: uint256 = layout.columns[linear.source]
    inside: bool = step.sub_element < 16 and segment < self._running_sums(layout, linear.source)
    assert inside, "referee: no such cell inside"
    first: uint256 = segment * _SEGMENT_COLUMNS
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    reads.formula.kind = formulas.RUNNING_SUM
    reads.formula.columns = min(_SEGMENT_COLUMNS, depth - first)
    reads.first[0] = trace_layout._index(layout, linear.source, place.layer, linear.position, first)
    reads.many[0] = (reads.formula.columns + 31) >> 5
    reads.row_count = 1
    reads.rows[0] = self._one_weight(
        trace_layout._weight_row(layout.model, linear.weights, place.layer, linear.output), depth, first
    )
    reads.formula.c = formulas.ABSENT
    if segment != 0:
        reads.sub_first[0] = (segment - 1) >> 4
        reads.sub_many[0] = 1
        reads.formula.c = 16 * reads.many[0] + ((segment - 1) & 15)
    return reads


@internal
@pure
def _inside_attention(
    layout: trace_layout.Layout, place: ITraceMap.Place, step: ITraceMap.Step
) -> ITraceMap.Reads:
    """
    @dev A cell of an attention sub-trace. Padding and masked keys read nothing.
    """
    model: trace_layout.Dimensions = layout.model
    parts: trace_layout.Parts = trace_layout._parts(model, place, step.element)
    at: uint256 = step.sub_leaf
    weights: bool = parts.weights <= at and at < parts.sums
    assert step.sub_element < 16 or (weights and step.sub_element < 32), "referee: no such cell inside"
    reads: ITraceMap.Reads = empty(ITraceMap.Reads)
    kv_head: uint256 = parts.query // (model.heads // model.kv_heads)
    if at < parts.maxima:
        key: uint256 = 16 * at + step.sub_element
        if key <= parts.position:
            q_row: uint256 = parts.position * model.heads + parts.query
            k_row: uint256 = key * model.kv_heads + kv_head
            many: uint256 = layout.row_leaves[trace_layout.Q_ROPE]
            reads.first[0] = trace_layout._index(layout, trace_layout.Q_ROPE, place.layer, q_row, 0)
            reads.first[1] = trace_layout._index(layout, trace_layout.K_ROPE, place.layer, k_row, 0)
            reads.many = [many, many, 0]
            reads.formula.kind = formulas.SCORE
            reads.formula.columns = model.head_dim
            reads.formula.a = 32 * many
        return reads
    if weights:
        key: uint256 = trace_layout.KEYS * (at - parts.weights) + step.sub_element
        if key <= parts.position:
            reads.sub_first = [key >> 4, parts.maxima + ((parts.blocks - 1) >> 4)]
            reads.sub_many = [1, 1]
            reads.formula.kind = formulas.WEIGHT
            reads.formula.a = key & 15
            reads.formula.b = 16 + ((parts.blocks - 1) & 15)
            reads.formula.size = model.head_dim
        return reads
    start: uint256 = parts.maxima
    if at >= parts.products:
        start = parts.products
    elif at >= parts.sums:
        start = parts.sums
    group: uint256 = 16 * (at - start) + step.sub_element
    if group >= parts.blocks:
        return reads
    before: uint256 = 32
    reads.sub_first[0] = parts.weights + group
    reads.sub_many[0] = 1
    if start == parts.maxima:
        reads.sub_first[0] = 2 * group
        reads.sub_many[0] = 2
        reads.formula.kind = formulas.LARGEST
        reads.formula.columns = min(
            trace_layout.KEYS, parts.position + 1 - trace_layout.KEYS * group
        )
    elif start == parts.sums:
        reads.formula.kind = formulas.TOTAL
        before = 16
    else:
        v_row: uint256 = kv_head * model.head_dim + parts.column
        reads.first[0] = trace_layout._index(
            layout, trace_layout.V, place.layer, v_row, trace_layout.KEYS * group
        )
        reads.many[0] = 1
        reads.formula.kind = formulas.PRODUCT
    reads.formula.c = formulas.ABSENT
    if group != 0:
        reads.sub_first[1] = start + ((group - 1) >> 4)
        reads.sub_many[1] = 1
        reads.formula.c = before + ((group - 1) & 15)
    return reads
