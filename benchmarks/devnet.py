"""Transactions per second of the embedded devnet, signed by the client, over HTTP."""

from __future__ import annotations

import time

from eth_account import Account
from web3 import HTTPProvider, Web3

from benchmarks.rows import Row
from poip_chain.chain.devnet.testing import running_devnet

TRANSACTIONS = 200
MNEMONIC = "test test test test test test test test test test test junk"


def run() -> list[Row]:
    """Value transfers: one at a time with automine, and all queued into 1-second blocks."""
    rows = []
    for block_time, name in ((None, "automine, one at a time"), (1.0, "1-second blocks, all queued")):
        with running_devnet(block_time=block_time) as url:
            rate = _rate(Web3(HTTPProvider(url)), wait_each=block_time is None)
        rows.append(Row(f"devnet transactions, {name}", rate, "tx/s", f"{TRANSACTIONS} transfers over HTTP, one run"))
    return rows


def _rate(w3: Web3, *, wait_each: bool) -> float:
    Account.enable_unaudited_hdwallet_features()
    account = Account.from_mnemonic(MNEMONIC)
    fee = {
        "maxFeePerGas": 10 * 10**9,
        "maxPriorityFeePerGas": 10**9,
        "gas": 21000,
        "chainId": w3.eth.chain_id,
    }
    to = Account.create().address
    signed = [
        account.sign_transaction({"to": to, "value": 1, "nonce": nonce, **fee}).raw_transaction
        for nonce in range(TRANSACTIONS)
    ]
    begin = time.monotonic()
    hashes = []
    for raw in signed:
        hashes.append(w3.eth.send_raw_transaction(raw))
        if wait_each:
            w3.eth.wait_for_transaction_receipt(hashes[-1], poll_latency=0.005)
    w3.eth.wait_for_transaction_receipt(hashes[-1], poll_latency=0.05)
    return TRANSACTIONS / (time.monotonic() - begin)
