"""Blocks, transactions, receipts and logs as JSON-RPC shows them. Reads objects; knows no transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import rlp
from eth._utils.address import generate_contract_address
from eth.abc import BlockHeaderAPI, LogAPI, SignedTransactionAPI

from poip_chain.chain.devnet.ledger import SealedBlock
from poip_chain.chain.devnet.params import LogCriteria, shown_address

JsonObject = dict[str, Any]


def hex_bytes(raw: bytes) -> str:
    """0x hex of bytes."""
    return "0x" + bytes(raw).hex()


def base_fee(header: BlockHeaderAPI) -> int:
    """The base fee of a block, in wei per gas; every block here has one."""
    return cast(int, header.base_fee_per_gas)


def header_view(header: BlockHeaderAPI) -> JsonObject:
    """Every field of a header: keccak(rlp(...)) of them is the block's hash."""
    return {
        "number": hex(header.block_number),
        "hash": hex_bytes(header.hash),
        "parentHash": hex_bytes(header.parent_hash),
        "sha3Uncles": hex_bytes(header.uncles_hash),
        "miner": shown_address(header.coinbase),
        "stateRoot": hex_bytes(header.state_root),
        "transactionsRoot": hex_bytes(header.transaction_root),
        "receiptsRoot": hex_bytes(header.receipt_root),
        "logsBloom": f"0x{header.bloom:0512x}",
        "difficulty": hex(header.difficulty),
        "gasLimit": hex(header.gas_limit),
        "gasUsed": hex(header.gas_used),
        "timestamp": hex(header.timestamp),
        "extraData": hex_bytes(header.extra_data),
        "mixHash": hex_bytes(header.mix_hash),
        "nonce": hex_bytes(header.nonce),
        "baseFeePerGas": hex(base_fee(header)),
        "withdrawalsRoot": hex_bytes(cast(bytes, header.withdrawals_root)),
        "blobGasUsed": hex(header.blob_gas_used),
        "excessBlobGas": hex(header.excess_blob_gas),
        "parentBeaconBlockRoot": hex_bytes(cast(bytes, header.parent_beacon_block_root)),
        "requestsHash": hex_bytes(header.requests_hash),  # type: ignore[attr-defined]
    }


def block_view(sealed: SealedBlock, *, full: bool) -> JsonObject:
    """A block with its transactions, or only their hashes."""
    return {
        **header_view(sealed.header),
        "totalDifficulty": "0x0",
        "size": hex(len(rlp.encode(sealed.block))),
        "uncles": [],
        "withdrawals": [],
        "transactions": [
            transaction_view(transaction, sealed, index) if full else hex_bytes(transaction.hash)
            for index, transaction in enumerate(sealed.transactions)
        ],
    }


def effective_price(transaction: SignedTransactionAPI, base_fee: int) -> int:
    """What a transaction pays, in wei per gas, in a block with this base fee."""
    return min(transaction.max_fee_per_gas, transaction.max_priority_fee_per_gas + base_fee)


def transaction_view(transaction: SignedTransactionAPI, sealed: SealedBlock | None, index: int | None) -> JsonObject:
    """A transaction in a block, or a waiting one (sealed None)."""
    kind = transaction.type_id or 0
    view: JsonObject = {
        "hash": hex_bytes(transaction.hash),
        "type": hex(kind),
        "nonce": hex(transaction.nonce),
        "from": shown_address(transaction.sender),
        "to": shown_address(transaction.to) if transaction.to else None,
        "value": hex(transaction.value),
        "gas": hex(transaction.gas),
        "input": hex_bytes(transaction.data),
        "r": hex(transaction.r),
        "s": hex(transaction.s),
        "blockHash": None if sealed is None else hex_bytes(sealed.header.hash),
        "blockNumber": None if sealed is None else hex(sealed.header.block_number),
        "transactionIndex": None if index is None else hex(index),
    }
    if transaction.chain_id is not None:
        view["chainId"] = hex(transaction.chain_id)
    if kind == 0:
        view["v"] = hex(transaction.v)  # type: ignore[attr-defined]
        view["gasPrice"] = hex(transaction.max_fee_per_gas)
        return view
    view["v"] = view["yParity"] = hex(transaction.y_parity)
    view["accessList"] = [
        {"address": shown_address(account), "storageKeys": [f"0x{slot:064x}" for slot in slots]}
        for account, slots in transaction.access_list
    ]
    if kind == 1:
        view["gasPrice"] = hex(transaction.max_fee_per_gas)
        return view
    view["maxFeePerGas"] = hex(transaction.max_fee_per_gas)
    view["maxPriorityFeePerGas"] = hex(transaction.max_priority_fee_per_gas)
    price = transaction.max_fee_per_gas if sealed is None else effective_price(transaction, base_fee(sealed.header))
    view["gasPrice"] = hex(price)
    return view


def receipt_view(sealed: SealedBlock, index: int) -> JsonObject:
    """The receipt of one transaction of a block."""
    transaction, receipt = sealed.transactions[index], sealed.receipts[index]
    before = sealed.receipts[index - 1].gas_used if index else 0
    created = None
    if not transaction.to:
        created = shown_address(generate_contract_address(transaction.sender, transaction.nonce))
    return {
        "transactionHash": hex_bytes(transaction.hash),
        "transactionIndex": hex(index),
        "blockHash": hex_bytes(sealed.header.hash),
        "blockNumber": hex(sealed.header.block_number),
        "from": shown_address(transaction.sender),
        "to": shown_address(transaction.to) if transaction.to else None,
        "contractAddress": created,
        "cumulativeGasUsed": hex(receipt.gas_used),
        "gasUsed": hex(receipt.gas_used - before),
        "effectiveGasPrice": hex(effective_price(transaction, base_fee(sealed.header))),
        "type": hex(transaction.type_id or 0),
        "status": "0x1" if receipt.state_root == b"\x01" else "0x0",
        "logsBloom": f"0x{receipt.bloom:0512x}",
        "logs": [
            log_view(sealed, position, number, log)
            for position, number, log in _numbered_logs(sealed)
            if position == index
        ],
    }


def matching_logs(sealed: SealedBlock, criteria: LogCriteria, *, removed: bool = False) -> Iterator[JsonObject]:
    """The wanted logs of a block, in order; `removed` marks those of a block that left the chain."""
    if not criteria.may_be_in(sealed.header.bloom):
        return
    for position, number, log in _numbered_logs(sealed):
        if criteria.match(log.address, log.topics):
            yield log_view(sealed, position, number, log, removed=removed)


def log_view(sealed: SealedBlock, position: int, number: int, log: LogAPI, *, removed: bool = False) -> JsonObject:
    """One log: `position` of its transaction, and its own `number`, in the block."""
    return {
        "address": shown_address(log.address),
        "topics": [f"0x{topic:064x}" for topic in log.topics],
        "data": hex_bytes(log.data),
        "blockNumber": hex(sealed.header.block_number),
        "blockHash": hex_bytes(sealed.header.hash),
        "blockTimestamp": hex(sealed.header.timestamp),
        "transactionHash": hex_bytes(sealed.transactions[position].hash),
        "transactionIndex": hex(position),
        "logIndex": hex(number),
        "removed": removed,
    }


def _numbered_logs(sealed: SealedBlock) -> Iterator[tuple[int, int, LogAPI]]:
    number = 0
    for position, receipt in enumerate(sealed.receipts):
        for log in receipt.logs:
            yield position, number, log
            number += 1
