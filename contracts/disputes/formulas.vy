# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The kinds of formulas that `TraceMap` names and `Referee` computes
@custom:contract-name formulas
@license AGPL-3.0-only
@notice What stands in `leaves` first is from the trace, then from the cell's own tree. ABSENT: there is no such element.
"""

# A padding cell or masked key: 0.
ZERO: constant(uint256) = 0
# weight_at in the row of the token.
EMBED: constant(uint256) = 1
# Largest magnitude of `columns` int64 from the first leaf on, and of the one before, c or ABSENT.
MAGNITUDE: constant(uint256) = 2
# The one before, c or (ABSENT) epsilon for `size` columns, plus squares of `columns` int64; b: the row's largest.
SQUARES: constant(uint256) = 3
# a: the element; b: the row's largest; c: its sum of squares; `size` columns; gain at weight_at.
NORM: constant(uint256) = 4
# Element a of a head's whole row of `size` int32; gain at weight_at.
HEAD_NORM: constant(uint256) = 5
# a, b: the pair; cosine at weight_at, sine at second_at; columns: 0 for the first of the pair, 1 for the second.
ROPE: constant(uint256) = 6
# a: gate; b: up.
SWIGLU: constant(uint256) = 7
# a: sum of weights; b: sum of weight * v.
ATTEND: constant(uint256) = 8
# a: sum of products; bits_in, bits_out, limit; bias at second_at if that is not 0; plus c unless it is ABSENT.
LINEAR: constant(uint256) = 9
# The one before, c or ABSENT, plus `columns` products of weights and int32 from the first leaf on.
RUNNING_SUM: constant(uint256) = 10
# `columns` products of int32 from the first leaf on with those from element a on.
SCORE: constant(uint256) = 11
# Largest of `columns` int64 from the first leaf on, and of the one before, c or ABSENT.
LARGEST: constant(uint256) = 12
# a: score; b: largest score; `size` columns in a head.
WEIGHT: constant(uint256) = 13
# The one before, c or ABSENT, plus the int32 of the first leaf.
TOTAL: constant(uint256) = 14
# The one before, c or ABSENT, plus products of the int32 of the first and of the second leaf.
PRODUCT: constant(uint256) = 15

ABSENT: constant(uint256) = max_value(uint256)
