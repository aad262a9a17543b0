"""The standard methods: eth_, net_, web3_, txpool_. Knows no transport."""

from __future__ import annotations

from typing import Any

import rlp
from eth.abc import SignedTransactionAPI
from eth_hash.auto import keccak
from trie.hexary import HexaryTrie

from poip_chain.chain.devnet import execution
from poip_chain.chain.devnet.chain import Devnet
from poip_chain.chain.devnet.errors import InvalidInput, InvalidParams, LimitExceeded, ResourceNotFound
from poip_chain.chain.devnet.filters import Filter, FilterRegistry
from poip_chain.chain.devnet.ledger import SealedBlock
from poip_chain.chain.devnet.params import (
    CallRequest,
    LogCriteria,
    address,
    block_reference,
    call_request,
    data,
    flag,
    log_criteria,
    mapping,
    quantity,
    sequence,
    shown_address,
    state_overrides,
)
from poip_chain.chain.devnet.rpc import method
from poip_chain.chain.devnet.views import (
    JsonObject,
    base_fee,
    block_view,
    effective_price,
    hex_bytes,
    matching_logs,
    receipt_view,
    transaction_view,
)

CLIENT_VERSION = "poip-devnet/0.1.0/py-evm-0.12"
SUGGESTED_PRIORITY_FEE = 10**9
MAX_LOGS = 50_000
MAX_FEE_HISTORY = 1_024
MAX_PROOF_KEYS = 1_024


class EthMethods:
    """Reading the chain, executing calls, sending transactions."""

    def __init__(self, devnet: Devnet, filters: FilterRegistry) -> None:
        self._devnet = devnet
        self._filters = filters

    # -- identity -----------------------------------------------------------------------------------------------

    @method
    def web3_clientVersion(self) -> str:
        return CLIENT_VERSION

    @method
    def web3_sha3(self, payload: object) -> str:
        return hex_bytes(keccak(data(payload, "data")))

    @method
    def net_version(self) -> str:
        return str(self._devnet.config.chain_id)

    @method
    def net_listening(self) -> bool:
        return True

    @method
    def net_peerCount(self) -> str:
        return "0x0"

    @method
    def eth_chainId(self) -> str:
        return hex(self._devnet.config.chain_id)

    @method
    def eth_syncing(self) -> bool:
        return False

    @method
    def eth_accounts(self) -> list[str]:
        return [account.address for account in self._devnet.accounts]

    @method
    def eth_blockNumber(self) -> str:
        return hex(self._devnet.head.block_number)

    # -- fees ---------------------------------------------------------------------------------------------------

    @method
    def eth_gasPrice(self) -> str:
        return hex(self._devnet.next_base_fee() + SUGGESTED_PRIORITY_FEE)

    @method
    def eth_maxPriorityFeePerGas(self) -> str:
        return hex(SUGGESTED_PRIORITY_FEE)

    @method
    def eth_blobBaseFee(self) -> str:
        return "0x1"

    @method
    def eth_feeHistory(self, count: object, newest: object, percentiles: object = None) -> JsonObject:
        blocks = min(quantity(count, "block count", most=2**63), MAX_FEE_HISTORY)
        shares = (
            []
            if percentiles is None
            else [_percentile(item) for item in sequence(percentiles, "percentiles", most=100)]
        )
        if shares != sorted(shares):
            raise InvalidParams("percentiles must rise")
        with self._devnet.lock:
            last = execution.header_of(self._devnet, block_reference(newest))
            first = max(0, last.block_number - blocks + 1)
            headers = [self._devnet.header_by_number(number) for number in range(first, last.block_number + 1)]
            sealed = [self._devnet.sealed(header) for header in headers] if shares else []
            if blocks == 0:
                return {"oldestBlock": "0x0", "baseFeePerGas": [], "gasUsedRatio": []}
            if last.block_number == self._devnet.head.block_number:
                following = self._devnet.next_base_fee()
            else:
                following = base_fee(self._devnet.header_by_number(last.block_number + 1))
        history: JsonObject = {
            "oldestBlock": hex(first),
            "baseFeePerGas": [*(hex(base_fee(header)) for header in headers), hex(following)],
            "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
            "baseFeePerBlobGas": ["0x1"] * (len(headers) + 1),
            "blobGasUsedRatio": [0.0] * len(headers),
        }
        if shares:
            history["reward"] = [_rewards(block, shares) for block in sealed]
        return history

    # -- accounts -----------------------------------------------------------------------------------------------

    @method
    def eth_getBalance(self, account: object, block: object = None) -> str:
        return hex(self._state(block).get_balance(address(account, "address")))

    @method
    def eth_getCode(self, account: object, block: object = None) -> str:
        return hex_bytes(self._state(block).get_code(address(account, "address")))

    @method
    def eth_getStorageAt(self, account: object, slot: object, block: object = None) -> str:
        return f"0x{self._state(block).get_storage(address(account, 'address'), quantity(slot, 'slot')):064x}"

    @method
    def eth_getTransactionCount(self, account: object, block: object = None) -> str:
        owner, reference = address(account, "address"), block_reference(block)
        if reference == "pending":
            with self._devnet.lock:
                return hex(self._devnet.pending_nonce(owner))
        return hex(self._state(block).get_nonce(owner))

    @method
    def eth_getProof(self, account: object, slots: object, block: object = None) -> JsonObject:
        owner = address(account, "address")
        keys = [quantity(item, "storage key") for item in sequence(slots, "storage keys", most=MAX_PROOF_KEYS)]
        header, _ = execution.resolve(self._devnet, block_reference(block))
        state = self._devnet.machine_after(header).state
        accounts = HexaryTrie(self._devnet.database, header.state_root)
        leaf = accounts[keccak(owner)]
        storage_root = rlp.decode(leaf)[2] if leaf else keccak(rlp.encode(b""))
        storage = HexaryTrie(self._devnet.database, storage_root)
        return {
            "address": shown_address(owner),
            "accountProof": _nodes(accounts, keccak(owner)),
            "balance": hex(state.get_balance(owner)),  # type: ignore[arg-type]
            "nonce": hex(state.get_nonce(owner)),  # type: ignore[arg-type]
            "codeHash": hex_bytes(rlp.decode(leaf)[3] if leaf else keccak(b"")),
            "storageHash": hex_bytes(storage_root),
            "storageProof": [
                {
                    "key": hex(key),
                    "value": hex(state.get_storage(owner, key)),  # type: ignore[arg-type]
                    "proof": _nodes(storage, keccak(key.to_bytes(32, "big"))),
                }
                for key in keys
            ],
        }

    def _state(self, block: object) -> Any:
        header, _ = execution.resolve(self._devnet, block_reference(block))
        return self._devnet.machine_after(header).state

    # -- blocks -------------------------------------------------------------------------------------------------

    def _sealed(self, block: object) -> SealedBlock | None:
        with self._devnet.lock:
            try:
                return self._devnet.sealed(execution.header_of(self._devnet, block_reference(block)))
            except ResourceNotFound:
                return None

    @method
    def eth_getBlockByNumber(self, block: object, full: object = False) -> JsonObject | None:
        sealed = self._sealed(block)
        return None if sealed is None else block_view(sealed, full=flag(full, "full transactions"))

    @method
    def eth_getBlockByHash(self, block_hash: object, full: object = False) -> JsonObject | None:
        return self.eth_getBlockByNumber(hex_bytes(data(block_hash, "block hash", length=32)), full)

    @method
    def eth_getBlockTransactionCountByNumber(self, block: object) -> str | None:
        sealed = self._sealed(block)
        return None if sealed is None else hex(len(sealed.transactions))

    @method
    def eth_getBlockTransactionCountByHash(self, block_hash: object) -> str | None:
        return self.eth_getBlockTransactionCountByNumber(hex_bytes(data(block_hash, "block hash", length=32)))

    @method
    def eth_getUncleCountByBlockNumber(self, block: object) -> str | None:
        return None if self._sealed(block) is None else "0x0"

    @method
    def eth_getBlockReceipts(self, block: object) -> list[JsonObject] | None:
        sealed = self._sealed(block)
        if sealed is None:
            return None
        return [receipt_view(sealed, index) for index in range(len(sealed.transactions))]

    # -- transactions -------------------------------------------------------------------------------------------

    @method
    def eth_getTransactionByHash(self, transaction_hash: object) -> JsonObject | None:
        wanted = data(transaction_hash, "transaction hash", length=32)
        with self._devnet.lock:
            found = self._devnet.find_transaction(wanted)
            waiting = self._devnet.pool.get(wanted)
        if found is not None:
            return transaction_view(found[0].transactions[found[1]], *found)
        return None if waiting is None else transaction_view(waiting, None, None)

    @method
    def eth_getTransactionByBlockNumberAndIndex(self, block: object, index: object) -> JsonObject | None:
        sealed, position = self._sealed(block), quantity(index, "index")
        if sealed is None or position >= len(sealed.transactions):
            return None
        return transaction_view(sealed.transactions[position], sealed, position)

    @method
    def eth_getTransactionByBlockHashAndIndex(self, block_hash: object, index: object) -> JsonObject | None:
        return self.eth_getTransactionByBlockNumberAndIndex(hex_bytes(data(block_hash, "block hash", length=32)), index)

    @method
    def eth_getTransactionReceipt(self, transaction_hash: object) -> JsonObject | None:
        with self._devnet.lock:
            found = self._devnet.find_transaction(data(transaction_hash, "transaction hash", length=32))
        return None if found is None else receipt_view(*found)

    @method
    def eth_sendRawTransaction(self, encoded: object) -> str:
        return hex_bytes(self._devnet.submit(data(encoded, "transaction")).hash)

    @method
    def eth_sendTransaction(self, transaction: object) -> str:
        request = call_request(transaction)
        with self._devnet.lock:
            return hex_bytes(self._devnet.submit(self._sign(request)).hash)

    @method
    def eth_signTransaction(self, transaction: object) -> JsonObject:
        request = call_request(transaction)
        with self._devnet.lock:
            return {"raw": hex_bytes(self._sign(request))}

    def _sign(self, request: CallRequest) -> bytes:
        account = next((one for one in self._devnet.accounts if bytes.fromhex(one.address[2:]) == request.sender), None)
        if account is None:
            raise InvalidInput(
                f"no key for {shown_address(request.sender)}: sign yourself and use eth_sendRawTransaction, "
                "or send from one of eth_accounts"
            )
        fields: dict[str, Any] = {
            "chainId": self._devnet.config.chain_id,
            "nonce": self._devnet.pending_nonce(request.sender) if request.nonce is None else request.nonce,
            "to": request.to,
            "value": request.value,
            "data": request.data,
            "gas": execution.estimate(self._devnet, request, "latest") if request.gas is None else request.gas,
        }
        if request.access_list:
            fields["accessList"] = [
                {"address": shown_address(owner), "storageKeys": [f"0x{slot:064x}" for slot in slots]}
                for owner, slots in request.access_list
            ]
        if request.legacy_price is not None:
            fields["gasPrice"] = request.legacy_price
        else:
            tip = SUGGESTED_PRIORITY_FEE if request.priority_fee is None else request.priority_fee
            usual = 2 * self._devnet.next_base_fee() + tip
            fields["maxFeePerGas"] = usual if request.max_fee is None else request.max_fee
            fields["maxPriorityFeePerGas"] = min(tip, fields["maxFeePerGas"])
        return bytes(account.sign_transaction(fields).raw_transaction)

    # -- execution ----------------------------------------------------------------------------------------------

    @method
    def eth_call(self, transaction: object, block: object = None, overrides: object = None) -> str:
        return hex_bytes(
            execution.call(self._devnet, call_request(transaction), block_reference(block), state_overrides(overrides))
        )

    @method
    def eth_estimateGas(self, transaction: object, block: object = None, overrides: object = None) -> str:
        return hex(
            execution.estimate(
                self._devnet, call_request(transaction), block_reference(block), state_overrides(overrides)
            )
        )

    # -- logs and filters ---------------------------------------------------------------------------------------

    @method
    def eth_getLogs(self, criteria: object) -> list[JsonObject]:
        fields = mapping(criteria, "filter")
        wanted = log_criteria(fields)
        with self._devnet.lock:
            if fields.get("blockHash") is not None:
                if fields.get("fromBlock") is not None or fields.get("toBlock") is not None:
                    raise InvalidParams("a filter has either blockHash or fromBlock and toBlock")
                header = self._devnet.header_by_hash(data(fields["blockHash"], "blockHash", length=32))
                return list(matching_logs(self._devnet.sealed(header), wanted))
            return self._logs_between(wanted, *self._range(fields))

    def _range(self, fields: Any) -> tuple[int, int]:
        first, last = self._bound(fields.get("fromBlock")), self._bound(fields.get("toBlock"))
        if first > last:
            raise InvalidParams(f"fromBlock {first} is after toBlock {last}")
        return first, last

    def _bound(self, value: object) -> int:
        reference = block_reference(value)
        if isinstance(reference, int):
            return reference
        return int(execution.header_of(self._devnet, reference).block_number)

    def _logs_between(self, wanted: LogCriteria, first: int, last: int) -> list[JsonObject]:
        found: list[JsonObject] = []
        for number, bloom in self._devnet.blocks_with_logs(first, min(last, self._devnet.head.block_number)):
            if wanted.may_be_in(bloom):
                found.extend(matching_logs(self._devnet.sealed(self._devnet.header_by_number(number)), wanted))
                if len(found) > MAX_LOGS:
                    raise LimitExceeded(f"more than {MAX_LOGS} logs match; ask for fewer blocks at once")
        return found

    @method
    def eth_newFilter(self, criteria: object) -> str:
        fields = mapping(criteria, "filter")
        with self._devnet.lock:
            last = fields.get("toBlock")
            return self._filters.add(
                Filter(
                    "logs",
                    log_criteria(fields),
                    dict(fields),
                    first=self._bound(fields.get("fromBlock")),
                    last=None if last in (None, "latest", "pending") else self._bound(last),
                )
            )

    @method
    def eth_newBlockFilter(self) -> str:
        with self._devnet.lock:
            return self._filters.add(Filter("blocks"))

    @method
    def eth_newPendingTransactionFilter(self) -> str:
        with self._devnet.lock:
            return self._filters.add(Filter("transactions"))

    @method
    def eth_getFilterChanges(self, name: object) -> list[Any]:
        with self._devnet.lock:
            found = self._filters.get(name)
            news = list(found.queue)
            found.queue.clear()
            return news

    @method
    def eth_getFilterLogs(self, name: object) -> list[JsonObject]:
        with self._devnet.lock:
            found = self._filters.get(name)
            if found.criteria is None:
                raise InvalidInput("this filter is not for logs")
            return self.eth_getLogs(found.request)

    @method
    def eth_uninstallFilter(self, name: object) -> bool:
        with self._devnet.lock:
            return self._filters.remove(name)

    # -- pool ---------------------------------------------------------------------------------------------------

    def _waiting(self) -> tuple[list[SignedTransactionAPI], list[SignedTransactionAPI]]:
        """The executable and the queued transactions; a gap in the nonces makes the difference."""
        ready: list[SignedTransactionAPI] = []
        queued: list[SignedTransactionAPI] = []
        with self._devnet.lock:
            for sender in self._devnet.pool.senders():
                following = self._devnet.pending_nonce(sender)
                for nonce, transaction in sorted(self._devnet.pool.of_sender(sender).items()):
                    (ready if nonce < following else queued).append(transaction)
        return ready, queued

    @method
    def txpool_status(self) -> JsonObject:
        ready, queued = self._waiting()
        return {"pending": hex(len(ready)), "queued": hex(len(queued))}

    @method
    def txpool_content(self) -> JsonObject:
        content: JsonObject = {}
        for name, transactions in zip(("pending", "queued"), self._waiting(), strict=True):
            senders: JsonObject = {}
            for transaction in transactions:
                one = senders.setdefault(shown_address(transaction.sender), {})
                one[str(transaction.nonce)] = transaction_view(transaction, None, None)
            content[name] = senders
        return content


def _percentile(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise InvalidParams("percentiles must be numbers from 0 to 100")
    return float(value)


def _rewards(sealed: SealedBlock, shares: list[float]) -> list[str]:
    """The priority fee paid at each percentile of a block's gas (EIP-1559's eth_feeHistory)."""
    if not sealed.transactions:
        return ["0x0"] * len(shares)
    base = base_fee(sealed.header)
    before, paid = 0, []
    for transaction, receipt in zip(sealed.transactions, sealed.receipts, strict=True):
        paid.append((effective_price(transaction, base) - base, receipt.gas_used - before))
        before = receipt.gas_used
    paid.sort()
    rewards = []
    for share in shares:
        wanted, reached = sealed.header.gas_used * share / 100, 0
        for tip, gas in paid:
            reached += gas
            if reached >= wanted:
                rewards.append(hex(tip))
                break
    return rewards


def _nodes(trie: HexaryTrie, key: bytes) -> list[str]:
    return [hex_bytes(rlp.encode(node)) for node in trie.get_proof(key)]  # type: ignore[no-untyped-call]
