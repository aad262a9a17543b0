"""Methods that only a development node has: time travel, snapshots, mining, reorganisations, traces.

The names are those of other development nodes, so that their test tools work here too. Knows no transport.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rlp

from poip_chain.chain.devnet import execution
from poip_chain.chain.devnet.chain import Devnet
from poip_chain.chain.devnet.config import MAX_BLOCK_TIME
from poip_chain.chain.devnet.errors import InvalidParams, ResourceNotFound, Unsupported
from poip_chain.chain.devnet.overrides import AccountOverride
from poip_chain.chain.devnet.params import (
    address,
    block_reference,
    call_request,
    data,
    flag,
    mapping,
    quantity,
    state_overrides,
)
from poip_chain.chain.devnet.rpc import method
from poip_chain.chain.devnet.views import JsonObject, hex_bytes

MAX_BLOCKS_AT_ONCE = 10_000


class DevMethods:
    """Control of the chain. `set_interval` gives the block producer a new pace in seconds, None stops it."""

    def __init__(self, devnet: Devnet, set_interval: Callable[[float | None], None]) -> None:
        self._devnet = devnet
        self._set_interval = set_interval

    # -- mining -------------------------------------------------------------------------------------------------

    @method
    def evm_mine(self, options: object = None) -> str:
        timestamp, blocks = None, 1
        if isinstance(options, dict):
            if options.get("timestamp") is not None:
                timestamp = quantity(options["timestamp"], "timestamp")
            if options.get("blocks") is not None:
                blocks = _block_count(options["blocks"])
        elif options is not None:
            timestamp = quantity(options, "timestamp")
        self._mine(blocks, timestamp)
        return "0x0"

    @method
    def anvil_mine(self, count: object = 1, seconds: object = None) -> None:
        self._mine(_block_count(count), None, None if seconds is None else quantity(seconds, "seconds"))

    @method
    def hardhat_mine(self, count: object = 1, seconds: object = None) -> None:
        self.anvil_mine(count, seconds)

    def _mine(self, blocks: int, timestamp: int | None, step: int | None = None) -> None:
        for index in range(blocks):
            with self._devnet.lock:
                if index and step:
                    timestamp = self._devnet.head.timestamp + step
                self._devnet.mine(timestamp=timestamp)
            timestamp = None

    @method
    def evm_setAutomine(self, enabled: object) -> bool:
        wanted = flag(enabled, "automine")
        if wanted:
            self._set_interval(None)
        self._devnet.set_automine(wanted)
        return True

    @method
    def evm_setIntervalMining(self, seconds: object) -> bool:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float, str)):
            raise InvalidParams("the seconds between two blocks must be a number; 0 stops interval mining")
        pace = float(quantity(seconds, "seconds") if isinstance(seconds, str) else seconds)
        if not 0 <= pace <= MAX_BLOCK_TIME:
            raise InvalidParams(f"the seconds between two blocks must be between 0 and {MAX_BLOCK_TIME:.0f}")
        if pace:
            self._devnet.set_automine(False)
        self._set_interval(pace or None)
        return True

    @method
    def anvil_getAutomine(self) -> bool:
        return self._devnet.automine

    # -- time ---------------------------------------------------------------------------------------------------

    @method
    def evm_increaseTime(self, seconds: object) -> str:
        return hex(self._devnet.increase_time(quantity(seconds, "seconds", most=2**40)))

    @method
    def evm_setNextBlockTimestamp(self, timestamp: object) -> None:
        self._devnet.set_next_timestamp(quantity(timestamp, "timestamp", most=2**63))

    # -- going back ---------------------------------------------------------------------------------------------

    @method
    def evm_snapshot(self) -> str:
        return hex(self._devnet.snapshot())

    @method
    def evm_revert(self, identifier: object) -> bool:
        return self._devnet.revert(quantity(identifier, "snapshot", most=2**63))

    @method
    def devnet_reorg(self, depth: object, drop_transactions: object = False) -> JsonObject:
        """Replace the newest blocks by empty ones; their transactions wait again, or are dropped."""
        done = self._devnet.reorganise(
            quantity(depth, "depth", most=2**63), drop_transactions=flag(drop_transactions, "drop transactions")
        )
        return {
            "ancestor": hex_bytes(done.ancestor.hash),
            "ancestorNumber": hex(done.ancestor.block_number),
            "oldHead": hex_bytes(done.old_head.hash),
            "newHead": hex_bytes(done.new_head.hash),
            "returned": [hex_bytes(transaction.hash) for transaction in done.returned],
        }

    # -- accounts -----------------------------------------------------------------------------------------------

    @method
    def anvil_setBalance(self, account: object, balance: object) -> None:
        self._set(AccountOverride(address(account, "address"), balance=quantity(balance, "balance")))

    @method
    def anvil_setNonce(self, account: object, nonce: object) -> None:
        self._set(AccountOverride(address(account, "address"), nonce=quantity(nonce, "nonce", most=2**64 - 2)))

    @method
    def anvil_setCode(self, account: object, code: object) -> None:
        self._set(AccountOverride(address(account, "address"), code=data(code, "code")))

    @method
    def anvil_setStorageAt(self, account: object, slot: object, value: object) -> bool:
        self._set(
            AccountOverride(
                address(account, "address"),
                storage={quantity(slot, "slot"): int.from_bytes(data(value, "value", length=32), "big")},
            )
        )
        return True

    def _set(self, override: AccountOverride) -> None:
        self._devnet.override([override])

    # -- debugging ----------------------------------------------------------------------------------------------

    @method
    def debug_getRawHeader(self, block: object) -> str:
        with self._devnet.lock:
            return hex_bytes(rlp.encode(execution.header_of(self._devnet, block_reference(block))))

    @method
    def debug_getRawBlock(self, block: object) -> str:
        with self._devnet.lock:
            header = execution.header_of(self._devnet, block_reference(block))
            return hex_bytes(rlp.encode(self._devnet.sealed(header).block))

    @method
    def debug_getRawTransaction(self, transaction_hash: object) -> str:
        with self._devnet.lock:
            found = self._devnet.find_transaction(data(transaction_hash, "transaction hash", length=32))
        if found is None:
            raise ResourceNotFound("no block holds this transaction")
        return hex_bytes(found[0].transactions[found[1]].encode())

    @method
    def debug_traceTransaction(self, transaction_hash: object, options: object = None) -> dict[str, Any]:
        only_top = _call_tracer(options)
        with self._devnet.lock:
            found = self._devnet.find_transaction(data(transaction_hash, "transaction hash", length=32))
        if found is None:
            raise ResourceNotFound("no block holds this transaction")
        return execution.trace_transaction(self._devnet, *found, only_top=only_top)

    @method
    def debug_traceCall(self, transaction: object, block: object = None, options: object = None) -> dict[str, Any]:
        only_top = _call_tracer(options)
        overrides = state_overrides(mapping(options or {}, "options").get("stateOverrides"))
        return execution.trace_call(
            self._devnet, call_request(transaction), block_reference(block), overrides, only_top=only_top
        )


def _block_count(value: object) -> int:
    return quantity(value, "blocks", most=MAX_BLOCKS_AT_ONCE)


def _call_tracer(options: object) -> bool:
    fields = mapping(options or {}, "options")
    if fields.get("tracer") != "callTracer":
        raise Unsupported('only the call tracer exists here: pass {"tracer": "callTracer"}')
    config = mapping(fields.get("tracerConfig") or {}, "tracerConfig")
    return flag(config.get("onlyTopCall", False), "onlyTopCall")
