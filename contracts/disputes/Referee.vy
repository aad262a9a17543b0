# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The one-step referee: any single element of a trace, recomputed
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/referee.py. Given a model's dimensions, the roots of a trace on trial and
        the name of one cell, it asks `TraceMap` what the cell depends on, checks that exactly this was opened and is
        proven, and returns the cell's right value. It never learns what anybody claimed: the dispute game compares. A
        step that it cannot compute reverts; in the game that is a move not made.
@custom:security No storage, no owner; it calls the one contract named at deployment. What is given is believed only as
                 far as its proofs reach. Work is bounded by the arguments' types: 32 leaves, 2 rows, 32 levels.
@custom:kill None needed: it holds nothing and decides nothing by itself. A new one acts on batches committed under it.
"""

from ..interfaces import IModelRegistry
from ..interfaces import IReferee
from ..interfaces import ITraceMap
from . import arithmetic
from . import formulas
from . import openings

implements: IReferee

ZEROS: constant(Bytes[32]) = x"0000000000000000000000000000000000000000000000000000000000000000"

trace_map: public(immutable(address))


@deploy
def __init__(trace_map_: address):
    """
    @notice Bind the referee to its `TraceMap`.
    """
    assert trace_map_.is_contract, "referee: no trace map"
    trace_map = trace_map_


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
@view
def compute(
    config: IModelRegistry.ModelConfig,
    trace: IReferee.Trace,
    sub_root: bytes32,
    step: ITraceMap.Step,
    opened: IReferee.Opened,
) -> int256:
    """
    @notice The right value of a cell, given that what it reads is right.
    @param config The model's dimensions, from ModelRegistry.
    @param trace Lengths and roots, from the case.
    @param sub_root Root of the tree into which the cell was opened; ignored by a step that does not read it.
    @param step The cell.
    @param opened Exactly what `TraceMap.inputs_of` lists, with proofs.
    """
    return self._compute(config, trace, sub_root, step, opened)[0]


@external
@view
def holds(
    config: IModelRegistry.ModelConfig,
    trace: IReferee.Trace,
    sub_root: bytes32,
    step: ITraceMap.Step,
    opened: IReferee.Opened,
    leaf: Bytes[128],
) -> bool:
    """
    @notice Whether a leaf holds the right value of a cell: `compute` and `value` in one, for the dispute game.
    @param leaf The leaf in which the cell stands. That it is the trace's, the caller has checked.
    """
    right: int256 = 0
    wide: bool = False
    right, wide = self._compute(config, trace, sub_root, step, opened)
    element: uint256 = step.element
    if step.inside:
        element = step.sub_element
    return right == self._value(wide, leaf, element)


@external
@view
def value(wide: bool, leaf: Bytes[128], element: uint256) -> int256:
    """
    @notice An element of an opened leaf, of 16 int64 (wide) or 32 int32: what is compared with `compute`.
    """
    return self._value(wide, leaf, element)


@external
@view
def root_of_nodes(nodes: DynArray[bytes32, 64]) -> bytes32:
    """
    @notice The node up to six levels above a run of nodes: of a whole level, or from a multiple of 64 on, shorter than 64
            only at the level's end.
    """
    return openings._root_of_nodes(nodes)


@internal
@view
def _compute(
    config: IModelRegistry.ModelConfig,
    trace: IReferee.Trace,
    sub_root: bytes32,
    step: ITraceMap.Step,
    opened: IReferee.Opened,
) -> (int256, bool):
    """
    @dev (the right value of a cell, whether it is one of 16 int64).
    """
    reads: ITraceMap.Reads = staticcall ITraceMap(trace_map).inputs_of(
        config, trace.prompt_tokens, trace.output_tokens, step
    )
    if reads.token:
        reads.rows[0].row = self._token(reads, opened.leaves)

    # Everything read was opened, nothing else, and all of it is proven.
    leaves: uint256 = reads.many[0] + reads.many[1] + reads.many[2]
    subs: uint256 = reads.sub_many[0] + reads.sub_many[1]
    size: uint256 = 128 * (leaves + subs) + reads.token_bytes
    assert len(opened.leaves) == size, "referee: leaves are of the wrong length"
    root: bytes32 = empty(bytes32)
    used: uint256 = 0
    if leaves != 0:
        root, used = openings._root(
            openings._hashes(opened.leaves, 0, leaves),
            openings._indices(reads.first, reads.many),
            reads.leaves,
            opened.proof,
            used,
        )
        assert root == trace.trace_root, "referee: leaves are not of the trace"
    if subs != 0:
        root, used = openings._root(
            openings._hashes(opened.leaves, 128 * leaves, subs),
            openings._indices(
                [reads.sub_first[0], reads.sub_first[1], 0], [reads.sub_many[0], reads.sub_many[1], 0]
            ),
            reads.sub_leaves,
            opened.proof,
            used,
        )
        assert root == sub_root, "referee: leaves are not of the cell's tree"
    hashes: DynArray[bytes32, 2] = []
    indices: DynArray[uint256, 2] = []
    at: uint256 = 0
    for i: uint256 in range(2):
        if i == reads.row_count:
            break
        row: ITraceMap.RowRead = reads.rows[i]
        end: uint256 = at + 34
        if row.segments != 0:
            end = at + 2 + openings._segment_bytes(row.size, row.first)
        if row.segments == 2:
            end += openings._segment_bytes(row.size, row.second)
        assert len(opened.rows) >= end, "referee: rows are of the wrong length"
        if row.segments == 0:
            root = convert(slice(opened.rows, at + 2, 32), bytes32)
        else:
            length: uint256 = openings._segment_bytes(row.size, row.first)
            segments: DynArray[bytes32, 2] = [keccak256(concat(0x00, slice(opened.rows, at + 2, length)))]
            numbers: DynArray[uint256, 2] = [row.first]
            if row.segments == 2:
                behind: uint256 = at + 2 + length
                segments.append(keccak256(concat(0x00, slice(opened.rows, behind, end - behind))))
                numbers.append(row.second)
            root, used = openings._root(
                segments, numbers, openings._segment_count(row.size), opened.proof, used
            )
        hashes.append(keccak256(concat(0x00, slice(opened.rows, at, 2), root)))
        indices.append(row.row)
        at = end
    assert len(opened.rows) == at, "referee: rows are of the wrong length"
    if at != 0:
        root, used = openings._root(hashes, indices, reads.weight_rows, opened.proof, used)
        assert root == trace.weights_root, "referee: rows are not of the model"
    if reads.token:
        hash: bytes32 = keccak256(concat(0x00, opened.leaves))
        ids_root: bytes32 = trace.output_root
        if reads.from_prompt:
            ids_root = trace.prompt_root
        root, used = openings._root([hash], [reads.token_leaf], reads.token_leaves, opened.proof, used)
        assert root == ids_root, "referee: token is not of the transcript"
    assert used == len(opened.proof), "referee: proof is too long"

    return self._evaluate(reads.formula, opened.leaves, opened.rows), reads.wide


@internal
@pure
def _value(wide: bool, leaf: Bytes[128], element: uint256) -> int256:
    assert len(leaf) == 128, "referee: leaf is not 128 bytes"
    if wide:
        assert element < 16, "referee: no such element"
        return arithmetic._wide(leaf, element)
    assert element < 32, "referee: no such element"
    return arithmetic._narrow(leaf, element)


@internal
@pure
def _token(reads: ITraceMap.Reads, leaf: Bytes[4096]) -> uint256:
    """
    @dev The token id in an opened leaf of ids. Whether the leaf is right, `compute` checks.
    """
    assert len(leaf) == reads.token_bytes, "referee: leaves are of the wrong length"
    padded: Bytes[4128] = concat(leaf, ZEROS)
    token: int256 = arithmetic._int32(extract32(padded, reads.token_at, output_type=uint256))
    known: bool = 0 <= token and token < convert(reads.vocabulary, int256)
    assert known, "referee: token is outside the vocabulary"
    return convert(token, uint256)


# The value of a cell


@internal
@pure
def _evaluate(formula: ITraceMap.Formula, leaves: Bytes[4096], rows: Bytes[546]) -> int256:
    """
    @dev See formulas.vy.
    """
    kind: uint256 = formula.kind
    if kind == formulas.ZERO:
        return 0
    if kind == formulas.MAGNITUDE or kind == formulas.SQUARES or kind == formulas.LARGEST:
        return self._over_wide(formula, leaves)
    if kind == formulas.SWIGLU:
        return arithmetic._swiglu(
            arithmetic._narrow(leaves, formula.a), arithmetic._narrow(leaves, formula.b)
        )
    if kind == formulas.ATTEND:
        return arithmetic._attend(arithmetic._wide(leaves, formula.b), arithmetic._wide(leaves, formula.a))
    if kind == formulas.SCORE:
        # Of the row of q no more than the head: what stands beside it in k's leaves then counts nothing.
        q: Bytes[4128] = concat(slice(leaves, 0, 4 * formula.columns), ZEROS)
        at: uint256 = 4 * formula.a
        return arithmetic._dot(q, slice(leaves, at, len(leaves) - at), formula.columns)
    if kind == formulas.WEIGHT:
        distance: int256 = arithmetic._wide(leaves, formula.b) - arithmetic._wide(leaves, formula.a)
        assert distance >= 0, "referee: inputs are those of no forward pass"
        return arithmetic._attention_weight(distance, arithmetic._score_multiplier(formula.size))
    if kind == formulas.TOTAL or kind == formulas.PRODUCT or kind == formulas.RUNNING_SUM:
        before: int256 = 0
        if formula.c != formulas.ABSENT:
            before = arithmetic._wide(leaves, formula.c)
        if kind == formulas.TOTAL:
            return before + arithmetic._total(slice(leaves, 0, 128))
        if kind == formulas.PRODUCT:
            return before + arithmetic._dot(slice(leaves, 0, 128), slice(leaves, 128, 128), 32)
        weights: Bytes[578] = concat(slice(rows, 2, len(rows) - 2), ZEROS)
        return before + arithmetic._dot_weights(weights, leaves, formula.columns)

    padded: Bytes[578] = concat(rows, ZEROS)
    if kind == formulas.ROPE:
        return arithmetic._rope(
            arithmetic._narrow(leaves, formula.a),
            arithmetic._narrow(leaves, formula.b),
            arithmetic._int32(extract32(padded, formula.weight_at, output_type=uint256)),
            arithmetic._int32(extract32(padded, formula.second_at, output_type=uint256)),
            formula.columns == 1,
        )
    exponent: int256 = arithmetic._int16(extract32(padded, 0, output_type=uint256))
    if kind == formulas.LINEAR:
        total: int256 = arithmetic._wide(leaves, formula.a)
        result: int256 = arithmetic._rsh(total, formula.bits_in - exponent - formula.bits_out)
        if formula.second_at != 0:
            # Behind the first row's exponent and root.
            exponent = arithmetic._int16(extract32(padded, 34, output_type=uint256))
            bias: int256 = arithmetic._int16(extract32(padded, formula.second_at, output_type=uint256))
            result += arithmetic._rsh(bias, -(formula.bits_out + exponent))
        if formula.limit != 0:
            return arithmetic._clamp(result, formula.limit)
        return result + arithmetic._wide(leaves, formula.c)
    weight: int256 = arithmetic._int16(extract32(padded, formula.weight_at, output_type=uint256))
    if kind == formulas.EMBED:
        return arithmetic._rsh(weight, -20 - exponent)
    if kind == formulas.HEAD_NORM:
        return self._head_norm(formula, leaves, weight, exponent)
    assert kind == formulas.NORM, "referee: unknown formula"
    return arithmetic._norm_element(
        arithmetic._wide(leaves, formula.a),
        self._norm_shift(arithmetic._wide(leaves, formula.b)),
        arithmetic._wide(leaves, formula.c),
        formula.size,
        weight,
        exponent,
    )


@internal
@pure
def _norm_shift(largest: int256) -> int256:
    assert largest >= 0, "referee: inputs are those of no forward pass"
    return arithmetic._norm_shift(largest)


@internal
@pure
def _over_wide(formula: ITraceMap.Formula, leaves: Bytes[4096]) -> int256:
    """
    @dev A running maximum, largest magnitude or sum of squares over int64 from the first leaf on.
    """
    kind: uint256 = formula.kind
    shifted: int256 = 0
    if kind == formulas.SQUARES:
        shifted = self._norm_shift(arithmetic._wide(leaves, formula.b))
    result: int256 = 0
    if formula.c != formulas.ABSENT:
        result = arithmetic._wide(leaves, formula.c)
    elif kind == formulas.SQUARES:
        result = arithmetic._norm_epsilon(formula.eps_e12, formula.size, arithmetic.RESIDUAL_BITS, shifted)
    elif kind == formulas.LARGEST:
        result = min_value(int256)
    for i: uint256 in range((formula.columns + 3) >> 2, bound=32):
        word: uint256 = arithmetic._words_64(extract32(leaves, i << 5, output_type=uint256))
        for k: uint256 in range(4):
            if (i << 2) + k == formula.columns:
                break
            h: int256 = arithmetic._signed(word << (k << 6), 64)
            if kind == formulas.SQUARES:
                h = arithmetic._rsh(h, shifted)
                result += h * h
            elif kind == formulas.MAGNITUDE:
                result = max(result, abs(h))
            else:
                result = max(result, h)
    return result


@internal
@pure
def _head_norm(formula: ITraceMap.Formula, leaves: Bytes[4096], gain: int256, gain_exponent: int256) -> int256:
    """
    @dev An output of QK-norm: the head's whole row is in `leaves`.
    """
    largest: int256 = 0
    for i: uint256 in range(formula.size, bound=512):
        word: uint256 = extract32(leaves, (i >> 3) << 5, output_type=uint256)
        largest = max(largest, abs(arithmetic._int32(word << ((i & 7) << 5))))
    shifted: int256 = arithmetic._norm_shift(largest)
    total: int256 = arithmetic._norm_epsilon(formula.eps_e12, formula.size, arithmetic.NORM_BITS, shifted)
    for i: uint256 in range(formula.size, bound=512):
        word: uint256 = extract32(leaves, (i >> 3) << 5, output_type=uint256)
        x: int256 = arithmetic._rsh(arithmetic._int32(word << ((i & 7) << 5)), shifted)
        total += x * x
    h: int256 = arithmetic._narrow(leaves, formula.a)
    y: int256 = arithmetic._norm_element(h, shifted, total, formula.size, gain, gain_exponent)
    return arithmetic._clamp(y, arithmetic.LINEAR_QK_LIMIT)
