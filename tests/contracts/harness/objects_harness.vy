# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The objects module behind external functions, for tests
"""

from contracts.disputes import objects


@external
@pure
def request_hash(request: objects.Request) -> bytes32:
    return objects._request_hash(request)


@external
@pure
def receipt_hash(receipt: objects.Receipt) -> bytes32:
    return objects._receipt_hash(receipt)


@external
@pure
def voucher_hash(voucher: objects.Voucher) -> bytes32:
    return objects._voucher_hash(voucher)


@external
@pure
def params_hash(params: objects.SamplingParams) -> bytes32:
    return objects._params_hash(params)


@external
@pure
def batch_hash(batch: objects.Batch) -> bytes32:
    return objects._batch_hash(batch)


@external
@pure
def transcript_root(roots: objects.TranscriptRoots) -> bytes32:
    return objects._transcript_root(roots)


@external
@view
def domain_separator(verifying_contract: address) -> bytes32:
    return objects._domain_separator(verifying_contract)


@external
@view
def signer(struct_hash: bytes32, verifying_contract: address, signature: Bytes[65]) -> address:
    return objects._signer(struct_hash, verifying_contract, signature)
