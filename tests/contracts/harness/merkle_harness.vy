# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The Merkle module behind external functions, for tests
"""

from contracts.commitments import merkle


@external
@pure
def root_of_one(data: Bytes[512], index: uint256, count: uint256, proof: DynArray[bytes32, 32]) -> bytes32:
    return merkle._root_of_one(merkle._leaf(data), index, count, proof)


@external
@pure
def root_of_hash(data: bytes32, index: uint256, count: uint256, proof: DynArray[bytes32, 32]) -> bytes32:
    return merkle._root_of_one(merkle._leaf_of_hash(data), index, count, proof)


@external
@pure
def root_of_many(
    leaves: DynArray[Bytes[512], 8],
    indices: DynArray[uint256, 8],
    count: uint256,
    proof: DynArray[bytes32, 64],
) -> bytes32:
    hashes: DynArray[bytes32, 8] = []
    for i: uint256 in range(len(leaves), bound=8):
        hashes.append(merkle._leaf(leaves[i]))
    return merkle._root_of_many(hashes, indices, count, proof)
