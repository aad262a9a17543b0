# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Where everything stands in a trace, and what each of its cells depends on
@license AGPL-3.0-only
@notice From a model's dimensions, two lengths and an index it derives tensor, layer, row and column of a leaf, the
        leaves, weights and token that a cell is computed from, and the formula. Nobody states any of this, so nobody can
        state it falsely. The second writing of poip_chain/spec/trace.py and of what spec/referee.py reads.
@custom:security Pure: no storage, no calls, no owner. Dimensions that canonical arithmetic is not defined for revert.
@custom:kill None needed: it holds nothing and decides nothing by itself.
"""

from ..interfaces import IModelRegistry
from ..interfaces import ITraceMap
from . import openings
from . import referee_reads
from . import trace_layout

implements: ITraceMap


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
@view
def leaf_count(config: IModelRegistry.ModelConfig, prompt_tokens: uint256, output_tokens: uint256) -> uint256:
    """
    @notice The leaves of a trace. Reverts for lengths or dimensions that have none.
    """
    return trace_layout._layout(config, prompt_tokens, output_tokens).count


@external
@view
def locate(
    config: IModelRegistry.ModelConfig, prompt_tokens: uint256, output_tokens: uint256, leaf: uint256
) -> ITraceMap.Place:
    """
    @notice What a leaf holds: `count` elements of a row of a tensor from `column` on.
    """
    return trace_layout._locate(trace_layout._layout(config, prompt_tokens, output_tokens), leaf)


@external
@view
def index_of(
    config: IModelRegistry.ModelConfig,
    prompt_tokens: uint256,
    output_tokens: uint256,
    op: uint256,
    layer: uint256,
    row: uint256,
    column: uint256,
) -> uint256:
    """
    @notice The leaf that holds an element. Reverts if the trace has no such element.
    """
    layout: trace_layout.Layout = trace_layout._layout(config, prompt_tokens, output_tokens)
    assert op < trace_layout.OPS and column < layout.columns[op], "referee: no such element"
    assert row < layout.leaves[op] // layout.row_leaves[op], "referee: no such element"
    layers: uint256 = 1
    if trace_layout.EMBED < op and op < trace_layout.FINAL_MAX:
        layers = layout.model.layers
    assert layer < layers, "referee: no such element"
    return trace_layout._index(layout, op, layer, row, column)


@external
@view
def sub_leaf_count(
    config: IModelRegistry.ModelConfig,
    prompt_tokens: uint256,
    output_tokens: uint256,
    leaf: uint256,
    element: uint256,
) -> uint256:
    """
    @notice Leaves of the tree into which a cell is opened; 0 if it is of a kind that is not.
    """
    layout: trace_layout.Layout = trace_layout._layout(config, prompt_tokens, output_tokens)
    return referee_reads._sub_leaves(layout, trace_layout._locate(layout, leaf), element)


@external
@view
def root_of_sums(
    config: IModelRegistry.ModelConfig,
    prompt_tokens: uint256,
    output_tokens: uint256,
    leaf: uint256,
    element: uint256,
    sums: Bytes[8192],
) -> bytes32:
    """
    @notice The root of a linear cell's running sums, written out. Reverts if they are not as many as the cell has.
    @param sums int64 each, little-endian.
    """
    layout: trace_layout.Layout = trace_layout._layout(config, prompt_tokens, output_tokens)
    place: ITraceMap.Place = trace_layout._locate(layout, leaf)
    assert referee_reads._is_linear(place.op) and element < place.count, "referee: not a linear cell"
    source: uint256 = referee_reads._linear(layout.model, place, element).source
    count: uint256 = referee_reads._running_sums(layout, source)
    assert len(sums) == 8 * count, "referee: not all running sums"
    filled: Bytes[8320] = concat(sums, empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32))
    nodes: DynArray[bytes32, 64] = []
    for i: uint256 in range((count + 15) >> 4, bound=64):
        nodes.append(keccak256(concat(0x00, slice(filled, 128 * i, 128))))
    return openings._root_of_nodes(nodes)


@external
@view
def inputs_of(
    config: IModelRegistry.ModelConfig, prompt_tokens: uint256, output_tokens: uint256, step: ITraceMap.Step
) -> ITraceMap.Reads:
    """
    @notice What a cell is computed from, and how. The row of an embedding cell is its token's and is 0 here.
    """
    layout: trace_layout.Layout = trace_layout._layout(config, prompt_tokens, output_tokens)
    return referee_reads._reads(layout, trace_layout._locate(layout, step.leaf), step)
