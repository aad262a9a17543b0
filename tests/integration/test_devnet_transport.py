"""HTTP, batches, WebSocket subscriptions, refusals and limits of the devnet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from web3 import AsyncWeb3, Web3, WebSocketProvider
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from poip_chain.chain.devnet.testing import DevnetProcess
from tests.integration.devnet_probe import compiled, deploy, rpc


@pytest.fixture(scope="module")
def node() -> Iterator[DevnetProcess]:
    process = DevnetProcess()
    yield process
    process.close()


@pytest.fixture
def w3(node: DevnetProcess) -> Web3:
    return Web3(Web3.HTTPProvider(node.url))


def post(node: DevnetProcess, content: bytes | str, **headers: str) -> httpx.Response:
    return httpx.post(node.url, content=content, headers={"content-type": "application/json", **headers}, timeout=30)


@pytest.mark.parametrize(
    "body,code",
    [
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b"[]", -32600),
        (b"3", -32600),
        (b'{"id":1}', -32600),
        (b'{"id":1,"method":"eth_nonsense"}', -32601),
        (b'{"id":1,"method":"_call"}', -32601),
        (b'{"id":1,"method":"eth_call","params":{}}', -32602),
        (b'{"id":1,"method":"eth_getBalance","params":["0x12","latest"]}', -32602),
        (b'{"id":1,"method":"eth_getBalance","params":["0x00000000000000000000000000000000000000zz"]}', -32602),
        (b'{"id":1,"method":"eth_getBlockByNumber","params":["0x-1",false]}', -32602),
        (b'{"id":1,"method":"eth_getBlockByNumber","params":["latest","yes"]}', -32602),
        (b'{"id":1,"method":"evm_increaseTime","params":[-5]}', -32602),
        (b'{"id":1,"method":"evm_increaseTime","params":[1e400]}', -32602),
        (b'{"id":1,"method":"eth_feeHistory","params":["0x2","latest",[90,10]]}', -32602),
        (b'{"id":1,"method":"eth_getLogs","params":[{"topics":[1,2,3,4,5]}]}', -32602),
        (b'{"id":1,"method":"eth_sendRawTransaction","params":["0x02c0"]}', -32003),
        (b'{"id":1,"method":"eth_sendRawTransaction","params":["0x"]}', -32003),
        (b'{"id":1,"method":"eth_sendRawTransaction","params":["0x03f8"]}', -32003),
        (
            b'{"id":1,"method":"eth_sendTransaction","params":[{"from":"0x0000000000000000000000000000000000000001"}]}',
            -32000,
        ),
        (b'{"id":1,"method":"devnet_reorg","params":["0xffff"]}', -32000),
        (
            b'{"id":1,"method":"debug_traceTransaction","params":["0x%s",{"tracer":"callTracer"}]}' % (b"00" * 32),
            -32001,
        ),
    ],
)
def test_bad_requests_get_their_code_and_change_nothing(node: DevnetProcess, w3: Web3, body: bytes, code: int) -> None:
    before = w3.eth.block_number
    response = post(node, body)
    assert response.status_code == 200
    assert response.json()["error"]["code"] == code
    assert w3.eth.block_number == before


def test_missing_things_are_null(w3: Web3) -> None:
    nothing = "0x" + "12" * 32
    for method in ("eth_getTransactionByHash", "eth_getTransactionReceipt"):
        assert rpc(w3, method, nothing) is None
    assert rpc(w3, "eth_getBlockByHash", nothing, False) is None
    assert rpc(w3, "eth_getBlockByNumber", "0xffffff", True) is None
    assert rpc(w3, "eth_getBlockReceipts", "0xffffff") is None


def test_batches_keep_order_and_contain_errors(node: DevnetProcess) -> None:
    requests = [
        {"jsonrpc": "2.0", "id": 7, "method": "eth_chainId"},
        {"jsonrpc": "2.0", "method": "eth_blockNumber"},  # a notification gets no answer
        {"jsonrpc": "2.0", "id": "x", "method": "nonsense"},
        5,
        {"jsonrpc": "2.0", "id": 8, "method": "web3_clientVersion", "params": []},
    ]
    answers = post(node, json.dumps(requests)).json()
    assert [answer["id"] for answer in answers] == [7, "x", None, 8]
    assert answers[0]["result"] == "0x7a69"
    assert [answer.get("error", {}).get("code") for answer in answers] == [None, -32601, -32600, None]
    too_many = [{"id": index, "method": "eth_chainId"} for index in range(1001)]
    assert post(node, json.dumps(too_many)).json()["error"]["code"] == -32005


def test_oversized_bodies_are_refused(node: DevnetProcess) -> None:
    response = post(node, b'{"method":"' + b"a" * (5 * 1024 * 1024) + b'"}')
    assert response.status_code == 413
    assert response.json()["error"]["code"] == -32005


def test_foreign_web_pages_are_refused_and_local_ones_served(node: DevnetProcess) -> None:
    body = b'{"id":1,"method":"eth_chainId"}'
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        assert post(node, body, origin=origin).status_code == 403
        with pytest.raises(InvalidStatus), connect(node.ws_url, origin=origin):  # type: ignore[arg-type]
            pass
    served = post(node, body, origin="http://localhost:3000")
    assert served.json()["result"] == "0x7a69"
    assert served.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_websocket_takes_text_and_binary_frames_and_bad_ones(node: DevnetProcess) -> None:
    with connect(node.ws_url) as socket:
        for frame in ('{"id":1,"method":"eth_chainId"}', b'{"id":1,"method":"eth_chainId"}'):
            socket.send(frame)
            assert json.loads(socket.recv(10))["result"] == "0x7a69"
        for bad, code in (
            (b"\xff", -32700),
            ('{"id":1,"method":"eth_subscribe"}', -32602),
            ('{"id":1,"method":"eth_subscribe","params":["nonsense"]}', -32004),
            ('{"id":1,"method":"eth_subscribe","params":["logs",{"topics":7}]}', -32602),
        ):
            socket.send(bad)
            assert json.loads(socket.recv(10))["error"]["code"] == code
        socket.send('[{"id":1,"method":"eth_chainId"},{"id":2,"method":"eth_chainId"}]')
        assert [answer["id"] for answer in json.loads(socket.recv(10))] == [1, 2]
        socket.send('{"id":3,"method":"eth_unsubscribe","params":["0x1"]}')
        assert json.loads(socket.recv(10))["result"] is False


def test_reorganised_logs_come_again_as_removed(node: DevnetProcess, w3: Web3) -> None:
    probe = deploy(w3, w3.eth.accounts[0])
    with connect(node.ws_url) as socket:
        for subscription in ('["newHeads"]', '["logs",{}]'):
            socket.send('{"id":1,"method":"eth_subscribe","params":%s}' % subscription)  # noqa: UP031
            socket.recv(10)
        probe.functions.store(1, 2).transact({"from": w3.eth.accounts[0]})
        head, log = (json.loads(socket.recv(10))["params"]["result"] for _ in range(2))
        assert log["blockHash"] == head["hash"]
        assert log["removed"] is False
        rpc(w3, "devnet_reorg", 1, True)
        new_head, removed = (json.loads(socket.recv(10))["params"]["result"] for _ in range(2))
        assert new_head["number"] == head["number"]
        assert new_head["hash"] != head["hash"]
        assert removed == {**log, "removed": True}


def test_async_client_follows_heads_and_logs(node: DevnetProcess, w3: Web3) -> None:
    sender = w3.eth.accounts[0]
    probe = deploy(w3, sender)

    async def follow() -> list[Any]:
        async with AsyncWeb3(WebSocketProvider(node.ws_url)) as client:
            heads = await client.eth.subscribe("newHeads")
            logs = await client.eth.subscribe("logs", {"address": probe.address})
            contract = client.eth.contract(address=probe.address, abi=compiled()["abi"])
            for key in range(3):
                await contract.functions.store(key, key).transact({"from": sender})
            seen: list[Any] = []
            async for message in client.socket.process_subscriptions():
                seen.append((str(message["subscription"]) == str(logs), message["result"]))
                if len(seen) == 6:
                    break
            assert await client.eth.unsubscribe(heads)
            return seen

    seen = asyncio.run(asyncio.wait_for(follow(), 30))
    numbers = [result["number"] for is_log, result in seen if not is_log]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert [result["blockNumber"] for is_log, result in seen if is_log] == numbers


def test_every_client_error_is_answered_by_name(w3: Web3) -> None:
    account, other = w3.eth.accounts[:2]
    nonce = w3.eth.get_transaction_count(account)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"nonce": nonce, "gas": 20_999}, "intrinsic gas too low"),
        ({"nonce": nonce, "gas": 60_000_001}, "exceeds block gas limit"),
        ({"nonce": nonce, "gas": 21_000, "value": 10**24}, "insufficient funds"),
    ]
    for fields, message in cases:
        converted = {key: hex(item) if isinstance(item, int) else item for key, item in fields.items()}
        with pytest.raises(ValueError, match=message) as raised:
            rpc(w3, "eth_sendTransaction", {"from": account, "to": other, **converted})
        assert raised.value.args[0]["code"] == -32003
    w3.eth.wait_for_transaction_receipt(w3.eth.send_transaction({"from": account, "to": other}))
    with pytest.raises(ValueError, match="nonce too low"):
        rpc(w3, "eth_sendTransaction", {"from": account, "to": other, "nonce": hex(nonce), "gas": "0x5208"})
