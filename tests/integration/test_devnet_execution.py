"""Calls, estimates, traces, logs and fees of the devnet, seen by an ordinary client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rlp
from eth_account import Account
from eth_hash.auto import keccak
from trie import HexaryTrie
from web3 import Web3
from web3.contract import Contract
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.types import TxReceipt

from tests.integration.devnet_probe import deploy, local_node, rpc


@pytest.fixture(scope="module")
def w3() -> Iterator[Web3]:
    with local_node() as client:
        yield client


@pytest.fixture(scope="module")
def probe(w3: Web3) -> Contract:
    return deploy(w3, w3.eth.accounts[0])


@pytest.fixture(autouse=True)
def _restored(w3: Web3, probe: Contract) -> Iterator[None]:
    snapshot = rpc(w3, "evm_snapshot")
    yield
    assert rpc(w3, "evm_revert", snapshot) is True


def sent(w3: Web3, function: Any, **fields: Any) -> TxReceipt:
    return w3.eth.wait_for_transaction_receipt(
        function.transact({"from": w3.eth.accounts[0], **fields}), poll_latency=0.01
    )


def test_usual_accounts_and_settings(w3: Web3) -> None:
    assert w3.eth.chain_id == 31337
    assert w3.eth.accounts[0] == "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
    assert len(w3.eth.accounts) == 10
    assert w3.eth.get_balance(w3.eth.accounts[9]) == 10_000 * 10**18
    assert w3.eth.get_block("latest")["gasLimit"] == 60_000_000


def test_revert_reason_and_data_come_with_code_3(w3: Web3, probe: Contract) -> None:
    with pytest.raises(ContractLogicError, match="probe: too small") as raised:
        probe.functions.refuse(1).call()
    assert str(raised.value.data).startswith("0x08c379a0")
    call = {"to": probe.address, "data": probe.encode_abi("refuse", [1])}
    with pytest.raises(ValueError) as raw:
        rpc(w3, "eth_call", call, "latest")
    assert raw.value.args[0]["code"] == 3
    assert raw.value.args[0]["message"] == "execution reverted: probe: too small"
    with pytest.raises(ValueError) as estimated:
        rpc(w3, "eth_estimateGas", call)
    assert estimated.value.args[0]["code"] == 3
    with pytest.raises(ValueError) as silent:
        rpc(w3, "eth_call", {"to": probe.address, "data": probe.encode_abi("refuse_silently")}, "latest")
    assert silent.value.args[0] == {"code": 3, "message": "execution reverted", "data": "0x"}


def test_calls_and_balances_of_earlier_blocks(w3: Web3, probe: Contract) -> None:
    first = sent(w3, probe.functions.store(1, 11))["blockNumber"]
    sent(w3, probe.functions.store(1, 22))
    rpc(w3, "evm_mine")
    assert probe.functions.values(1).call(block_identifier=first) == 11
    assert probe.functions.values(1).call(block_identifier=first - 1) == 0
    assert probe.functions.values(1).call() == 22
    by_hash = w3.eth.get_block(first)["hash"]
    assert probe.functions.values(1).call(block_identifier=by_hash) == 11
    other = Account.create().address
    before = w3.eth.block_number
    w3.eth.send_transaction({"from": w3.eth.accounts[0], "to": other, "value": 5})
    assert (w3.eth.get_balance(other, before), w3.eth.get_balance(other)) == (0, 5)
    with pytest.raises(ValueError) as missing:
        rpc(w3, "eth_getBalance", other, hex(10**6))
    assert missing.value.args[0]["code"] == -32001


def test_call_sees_its_block(w3: Web3, probe: Contract) -> None:
    block = w3.eth.get_block("latest")
    number, timestamp, base_fee, random = probe.functions.surroundings().call()
    assert (number, timestamp, base_fee) == (block["number"], block["timestamp"], 0)
    assert random == block["mixHash"]
    assert probe.functions.surroundings().call(block_identifier="pending")[0] == block["number"] + 1
    paying = {"gasPrice": 10**10, "from": w3.eth.accounts[0]}
    assert probe.functions.surroundings().call(paying)[2] == block["baseFeePerGas"]


def test_random_differs_from_block_to_block(w3: Web3) -> None:
    for _ in range(3):
        rpc(w3, "evm_mine")
    newest = w3.eth.block_number
    assert len({w3.eth.get_block(newest - back)["mixHash"] for back in range(3)}) == 3


def test_state_overrides_last_for_one_call(w3: Web3, probe: Contract) -> None:
    slot = "0x" + keccak((4).to_bytes(32, "big") + bytes(32)).hex()
    code = rpc(w3, "eth_getCode", probe.address, "latest")
    stranger = "0x" + "ab" * 20
    call = {"from": stranger, "to": stranger, "data": probe.encode_abi("surroundings"), "value": "0x5"}
    with pytest.raises(ValueError, match=r"enough balance|afford"):
        rpc(w3, "eth_call", {**call, "data": "0x"}, "latest")
    rpc(w3, "eth_call", {**call, "data": "0x"}, "latest", {stranger: {"balance": "0x5"}})
    overrides = {stranger: {"code": code, "stateDiff": {slot: "0x9"}}}
    result = rpc(w3, "eth_call", {**call, "value": "0x0"}, "latest", overrides)
    assert int(result[2:66], 16) == w3.eth.block_number
    assert rpc(w3, "eth_getCode", stranger, "latest") == "0x"


def test_history_contract_gives_the_parent_and_a_block_300_back(w3: Web3, probe: Contract) -> None:
    rpc(w3, "anvil_mine", 310)
    receipt = sent(w3, probe.functions.store(1, 1))
    number = receipt["blockNumber"]
    for back in (1, 2, 255, 256, 300):
        wanted = w3.eth.get_block(number - back)["hash"]
        assert probe.functions.history(number - back).call() == wanted, back
    with pytest.raises(ContractLogicError):
        probe.functions.history(number + 1).call()


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("store", (1, 2)),
        ("store_many", (0, 40, 9)),
        ("pass_on", (100, 60)),
        ("tree", ()),
        ("create", ()),
    ],
)
def test_estimate_suffices_and_is_tight(w3: Web3, probe: Contract, name: str, arguments: tuple[int, ...]) -> None:
    function = probe.functions[name](*arguments)
    gas = function.estimate_gas({"from": w3.eth.accounts[0]})
    snapshot = rpc(w3, "evm_snapshot")
    assert sent(w3, function, gas=gas)["status"] == 1
    rpc(w3, "evm_revert", snapshot)
    assert sent(w3, function, gas=int(gas * 0.98))["status"] == 0


def test_estimate_counts_refunds_and_the_63_64_rule(w3: Web3, probe: Contract) -> None:
    sender = {"from": w3.eth.accounts[0]}
    sent(w3, probe.functions.store_many(0, 50, 1))
    clearing = probe.functions.store_many(0, 50, 0)
    gas = clearing.estimate_gas(sender)
    used = sent(w3, clearing, gas=gas)["gasUsed"]
    assert used < gas * 0.85, "what a receipt shows is after refunds and would not have been enough"
    passing = probe.functions.pass_on(500, 100)
    gas = passing.estimate_gas(sender)
    receipt = sent(w3, passing, gas=gas)
    assert receipt["status"] == 1
    assert receipt["gasUsed"] < gas


def test_estimate_of_plain_transfers_and_of_what_cannot_work(w3: Web3) -> None:
    first, second = w3.eth.accounts[:2]
    assert w3.eth.estimate_gas({"from": first, "to": second, "value": 1}) == 21_000
    with_data = w3.eth.estimate_gas({"from": first, "to": second, "data": b"\xff" * 100})
    assert with_data == 21_000 + 100 * 40  # the floor of EIP-7623, above the intrinsic gas
    with pytest.raises(Web3RPCError, match=r"enough balance|afford"):
        w3.eth.estimate_gas({"from": first, "to": second, "value": 10**30})
    with pytest.raises(Web3RPCError, match="allowance"):
        w3.eth.estimate_gas({"from": first, "to": second, "gas": 20_000, "data": b"\x01"})


def test_out_of_gas_fails_in_the_block_and_costs_everything(w3: Web3, probe: Contract) -> None:
    receipt = sent(w3, probe.functions.store_many(0, 100, 1), gas=100_000)
    assert (receipt["status"], receipt["gasUsed"], receipt["logs"]) == (0, 100_000, [])


def test_trace_shows_the_tree_of_calls(w3: Web3, probe: Contract) -> None:
    receipt = sent(w3, probe.functions.tree())
    trace = rpc(w3, "debug_traceTransaction", receipt["transactionHash"].to_0x_hex(), {"tracer": "callTracer"})
    assert trace["type"] == "CALL"
    assert int(trace["gasUsed"], 16) == receipt["gasUsed"]
    assert int(trace["output"], 16) == 2
    assert [call["type"] for call in trace["calls"]] == ["CALL", "CALL", "CALL", "DELEGATECALL", "STATICCALL"]
    assert [call.get("error") for call in trace["calls"]] == [None, *["execution reverted"] * 2, None, None]
    assert trace["calls"][2]["revertReason"] == "probe: too small"
    assert trace["calls"][0]["input"] == probe.encode_abi("store", [1, 2])
    assert all(0 < int(call["gasUsed"], 16) <= int(call["gas"], 16) for call in trace["calls"])
    assert all(call["from"] == call["to"] == probe.address for call in trace["calls"])
    only_top = {"tracer": "callTracer", "tracerConfig": {"onlyTopCall": True}}
    assert "calls" not in rpc(w3, "debug_traceTransaction", receipt["transactionHash"].to_0x_hex(), only_top)
    with pytest.raises(ValueError) as refused:
        rpc(w3, "debug_traceTransaction", receipt["transactionHash"].to_0x_hex())
    assert refused.value.args[0]["code"] == -32004


def test_trace_replays_what_came_before_in_the_block(w3: Web3, probe: Contract) -> None:
    sender = w3.eth.accounts[0]
    rpc(w3, "evm_setAutomine", False)
    hashes = [probe.functions.store_many(0, 1, value).transact({"from": sender, "gas": 100_000}) for value in (1, 2, 3)]
    rpc(w3, "anvil_setBalance", "0x" + "11" * 20, hex(77))  # its block carries no transactions
    rpc(w3, "evm_mine")
    rpc(w3, "evm_setAutomine", True)
    for transaction_hash in hashes:
        receipt = w3.eth.get_transaction_receipt(transaction_hash)
        trace = rpc(w3, "debug_traceTransaction", transaction_hash.to_0x_hex(), {"tracer": "callTracer"})
        assert int(trace["gasUsed"], 16) == receipt["gasUsed"]
    assert w3.eth.get_balance(Web3.to_checksum_address("0x" + "11" * 20)) == 77


def test_trace_call_and_create(w3: Web3, probe: Contract) -> None:
    call = {"from": w3.eth.accounts[0], "to": probe.address, "data": probe.encode_abi("create")}
    trace = rpc(w3, "debug_traceCall", call, "latest", {"tracer": "callTracer"})
    assert trace["calls"][0]["type"] == "CREATE"
    assert trace["calls"][0]["from"] == probe.address
    assert trace["calls"][0]["to"][2:].lower() == trace["output"][-40:]


def test_logs_by_range_address_and_topic(w3: Web3, probe: Contract) -> None:
    first = w3.eth.block_number + 1
    for key in (1, 2, 1):
        sent(w3, probe.functions.store(key, key * 10))
        rpc(w3, "evm_mine")
    event = probe.events.Stored
    assert [log["args"]["value"] for log in event().get_logs(from_block=first)] == [10, 20, 10]
    assert len(event().get_logs(from_block=first, argument_filters={"key": 1})) == 2
    assert len(event().get_logs(from_block=first, to_block=first + 1)) == 1
    one = event().get_logs(from_block=first)[1]
    assert len(w3.eth.get_logs({"blockHash": one["blockHash"]})) == 1
    assert w3.eth.get_logs({"fromBlock": first, "address": w3.eth.accounts[0]}) == []
    topic = "0x" + keccak(b"Stored(uint256,uint256)").hex()
    keys = ["0x" + number.to_bytes(32, "big").hex() for number in (1, 2)]
    assert len(w3.eth.get_logs({"fromBlock": first, "topics": [[topic, keys[0]], keys]})) == 3  # type: ignore[list-item]
    assert len(w3.eth.get_logs({"fromBlock": first, "topics": [None, keys[1]]})) == 1  # type: ignore[list-item]
    with pytest.raises(ValueError) as backwards:
        rpc(w3, "eth_getLogs", {"fromBlock": hex(first), "toBlock": hex(first - 1)})
    assert backwards.value.args[0]["code"] == -32602


def test_polled_filters(w3: Web3, probe: Contract) -> None:
    blocks, pending = w3.eth.filter("latest"), w3.eth.filter("pending")
    logs = w3.eth.filter({"address": probe.address})
    receipt = sent(w3, probe.functions.store(1, 2))
    assert blocks.get_new_entries() == [receipt["blockHash"]]
    assert pending.get_new_entries() == [receipt["transactionHash"]]
    assert [entry["transactionHash"] for entry in logs.get_new_entries()] == [receipt["transactionHash"]]
    assert logs.get_new_entries() == []
    assert len(logs.get_all_entries()) == 1
    assert w3.eth.uninstall_filter(logs.filter_id) is True  # type: ignore[arg-type]
    with pytest.raises(Web3RPCError, match="filter not found"):
        logs.get_new_entries()


def test_header_hash_can_be_recomputed_from_json(w3: Web3, probe: Contract) -> None:
    number = sent(w3, probe.functions.store(1, 2))["blockNumber"]
    block = rpc(w3, "eth_getBlockByNumber", hex(number), False)
    names = [
        "parentHash",
        "sha3Uncles",
        "miner",
        "stateRoot",
        "transactionsRoot",
        "receiptsRoot",
        "logsBloom",
        "difficulty",
        "number",
        "gasLimit",
        "gasUsed",
        "timestamp",
        "extraData",
        "mixHash",
        "nonce",
        "baseFeePerGas",
        "withdrawalsRoot",
        "blobGasUsed",
        "excessBlobGas",
        "parentBeaconBlockRoot",
        "requestsHash",
    ]
    numbers = {
        "difficulty",
        "number",
        "gasLimit",
        "gasUsed",
        "timestamp",
        "baseFeePerGas",
        "blobGasUsed",
        "excessBlobGas",
    }
    fields = [int(block[name], 16) if name in numbers else bytes.fromhex(block[name][2:]) for name in names]
    encoded = rlp.encode(fields)
    assert "0x" + keccak(encoded).hex() == block["hash"]
    assert rpc(w3, "debug_getRawHeader", hex(number)) == "0x" + encoded.hex()
    raw_block = rlp.decode(bytes.fromhex(rpc(w3, "debug_getRawBlock", hex(number))[2:]))
    assert rlp.encode(raw_block[0]) == encoded
    assert int(block["size"], 16) == len(rlp.encode(raw_block))


def test_receipts_blocks_and_transactions_agree(w3: Web3, probe: Contract) -> None:
    sender = w3.eth.accounts[0]
    rpc(w3, "evm_setAutomine", False)
    hashes = [probe.functions.store(index, index).transact({"from": sender, "gas": 100_000}) for index in range(3)]
    assert w3.eth.get_transaction(hashes[0])["blockNumber"] is None
    assert w3.eth.get_transaction_count(sender, "pending") == w3.eth.get_transaction_count(sender) + 3
    rpc(w3, "evm_mine")
    rpc(w3, "evm_setAutomine", True)
    block = w3.eth.get_block("latest", True)
    receipts = w3.eth.get_block_receipts("latest")
    assert [receipt["transactionHash"] for receipt in receipts] == hashes
    assert [receipt["logs"][0]["logIndex"] for receipt in receipts] == [0, 1, 2]
    assert receipts[-1]["cumulativeGasUsed"] == block["gasUsed"] == sum(receipt["gasUsed"] for receipt in receipts)
    for index, receipt in enumerate(receipts):
        transaction = w3.eth.get_transaction(hashes[index])
        assert transaction == block["transactions"][index]
        assert w3.eth.get_transaction_by_block(block["number"], index) == transaction
        assert transaction["gasPrice"] == receipt["effectiveGasPrice"]
        raw = bytes.fromhex(rpc(w3, "debug_getRawTransaction", hashes[index].to_0x_hex())[2:])
        assert keccak(raw) == hashes[index]
        assert Account.recover_transaction(raw) == sender


def test_sender_pays_exactly_what_the_receipt_says(w3: Web3, probe: Contract) -> None:
    sender = w3.eth.accounts[0]
    before = w3.eth.get_balance(sender)
    receipt = sent(w3, probe.functions.store(1, 2), maxFeePerGas=10**11, maxPriorityFeePerGas=3)
    block = w3.eth.get_block(receipt["blockNumber"])
    assert receipt["effectiveGasPrice"] == block["baseFeePerGas"] + 3
    assert before - w3.eth.get_balance(sender) == receipt["gasUsed"] * receipt["effectiveGasPrice"]


def test_legacy_access_list_and_dynamic_fee_transactions(w3: Web3) -> None:
    account = Account.from_key("0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
    assert account.address == w3.eth.accounts[0]
    to = w3.eth.accounts[1]
    nonce = w3.eth.get_transaction_count(account.address)
    usual = {"to": to, "value": 1, "gas": 30_000, "chainId": 31337}
    kinds: list[dict[str, Any]] = [
        {"gasPrice": 10**10},
        {"gasPrice": 10**10, "accessList": [{"address": to, "storageKeys": ["0x" + "00" * 32]}], "type": 1},
        {"maxFeePerGas": 10**10, "maxPriorityFeePerGas": 1},
    ]
    for kind, fees in enumerate(kinds):
        signed = account.sign_transaction({**usual, **fees, "nonce": nonce + kind})
        receipt = w3.eth.wait_for_transaction_receipt(w3.eth.send_raw_transaction(signed.raw_transaction))
        assert (receipt["status"], receipt["type"]) == (1, kind)
        assert w3.eth.get_transaction(receipt["transactionHash"])["type"] == kind


def test_fee_history_and_suggestions(w3: Web3, probe: Contract) -> None:
    rpc(w3, "anvil_mine", 3)
    receipt = sent(w3, probe.functions.store(1, 2), maxPriorityFeePerGas=5, maxFeePerGas=10**11)
    history = w3.eth.fee_history(4, "latest", [25.0, 75.0])
    assert history["oldestBlock"] == receipt["blockNumber"] - 3
    assert history["baseFeePerGas"][3] == w3.eth.get_block("latest")["baseFeePerGas"]
    assert history["reward"][3] == [5, 5]
    assert history["gasUsedRatio"][3] == pytest.approx(receipt["gasUsed"] / 60_000_000)
    rpc(w3, "evm_mine")
    assert w3.eth.get_block("latest")["baseFeePerGas"] == history["baseFeePerGas"][4]
    assert w3.eth.gas_price == w3.eth.max_priority_fee + w3.eth.fee_history(1, "latest")["baseFeePerGas"][1]


def test_proofs_lead_to_the_state_root(w3: Web3, probe: Contract) -> None:
    sent(w3, probe.functions.store(1, 2))
    slot = next(
        number
        for number in range(10)
        if w3.eth.get_storage_at(
            probe.address, int.from_bytes(keccak(number.to_bytes(32, "big") + (1).to_bytes(32, "big")))
        )
        != bytes(32)
    )
    key = int.from_bytes(keccak(slot.to_bytes(32, "big") + (1).to_bytes(32, "big")))
    proof = w3.eth.get_proof(probe.address, [key])
    root = w3.eth.get_block("latest")["stateRoot"]

    def proven(start: bytes, name: bytes, nodes: Any) -> Any:
        return HexaryTrie.get_from_proof(start, keccak(name), [rlp.decode(bytes(node)) for node in nodes])

    leaf = proven(bytes(root), bytes.fromhex(probe.address[2:]), proof["accountProof"])
    assert rlp.decode(leaf)[2] == proof["storageHash"]
    stored = proven(bytes(proof["storageHash"]), key.to_bytes(32, "big"), proof["storageProof"][0]["proof"])
    assert rlp.decode(stored) == b"\x02"


def test_accounts_set_by_hand(w3: Web3, probe: Contract) -> None:
    someone = Web3.to_checksum_address("0x" + "5a" * 20)
    rpc(w3, "anvil_setBalance", someone, hex(10**18))
    rpc(w3, "anvil_setNonce", someone, hex(7))
    rpc(w3, "anvil_setCode", someone, "0x6001")
    rpc(w3, "anvil_setStorageAt", someone, "0x3", "0x" + "00" * 31 + "2a")
    assert w3.eth.get_balance(someone) == 10**18
    assert w3.eth.get_transaction_count(someone) == 7
    assert w3.eth.get_code(someone) == b"\x60\x01"
    assert int.from_bytes(w3.eth.get_storage_at(someone, 3)) == 42


def test_only_development_keys_are_unlocked(w3: Web3) -> None:
    with pytest.raises(Web3RPCError, match="no key for"):
        w3.eth.send_transaction(
            {"from": Web3.to_checksum_address("0x" + "5a" * 20), "to": w3.eth.accounts[0], "gas": 21_000}
        )


def test_calls_may_nest_as_deep_as_gas_allows(w3: Web3, probe: Contract) -> None:
    receipt = sent(w3, probe.functions.dive(), gas=30_000_000)
    trace = rpc(w3, "debug_traceTransaction", receipt["transactionHash"].to_0x_hex(), {"tracer": "callTracer"})
    depth = 0
    while trace.get("calls"):
        trace, depth = trace["calls"][0], depth + 1
    assert depth > 300
