# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The rules of offences behind external functions, for tests
"""

from contracts.disputes import faults
from contracts.disputes import objects


@external
@pure
def receipt_fault(
    receipt: objects.Receipt, request: objects.Request, standard: faults.Standard, batch: objects.Batch
) -> uint256:
    return faults._receipt_fault(receipt, request, standard, batch)


@external
@pure
def place_fault(receipt: objects.Receipt, batch: objects.Batch, index: uint256) -> uint256:
    return faults._place_fault(receipt, batch, index)


@external
@pure
def sequence_fault(a: objects.Receipt, b: objects.Receipt) -> uint256:
    return faults._sequence_fault(a, b)


@external
@pure
def roots_fault(
    receipt: objects.Receipt, request: objects.Request, roots: objects.TranscriptRoots
) -> uint256:
    return faults._roots_fault(receipt, request, roots)


@external
@pure
def leaf_fault(
    receipt: objects.Receipt,
    request: objects.Request,
    standard: faults.Standard,
    part: uint256,
    leaf_index: uint256,
    leaf: Bytes[512],
) -> uint256:
    tokens: uint256 = faults._tokens_of(receipt, request, part)
    assert leaf_index < faults._leaf_count(part, tokens), "faults: no such leaf"
    return faults._leaf_fault(receipt, standard, part, leaf_index, leaf, tokens)
