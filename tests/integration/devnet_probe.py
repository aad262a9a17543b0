"""A contract that shows what a node does, and how to put it on a chain. Shared by the devnet's tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from vyper import compile_code
from web3 import Web3
from web3.contract import Contract
from web3.providers import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.chain.devnet.server import Node

PROBE = """
# pragma version 0.4.3
# pragma evm-version cancun

interface Probe:
    def store(key: uint256, word: uint256): nonpayable
    def values(key: uint256) -> uint256: view

event Stored:
    key: indexed(uint256)
    value: uint256

HISTORY: constant(address) = 0x0000F90827F1C53a10cb7A02335B175320002935

values: public(HashMap[uint256, uint256])

@deploy
@payable
def __init__():
    pass

@external
@payable
def __default__():
    pass

@external
def store(key: uint256, word: uint256):
    self.values[key] = word
    log Stored(key=key, value=word)

@external
def store_many(first: uint256, count: uint256, word: uint256):
    for index: uint256 in range(count, bound=1000):
        self.values[first + index] = word

@external
def refuse(word: uint256):
    assert word > 10, "probe: too small"

@external
def refuse_silently():
    raise

@external
def overflow(word: uint256) -> uint256:
    return max_value(uint256) + word

@external
@view
def history(number: uint256) -> bytes32:
    answer: Bytes[32] = raw_call(HISTORY, abi_encode(number), max_outsize=32, is_static_call=True)
    return convert(answer, bytes32)

@external
@view
def surroundings() -> (uint256, uint256, uint256, bytes32):
    return (block.number, block.timestamp, block.basefee, block.prevrandao)

@external
def pass_on(first: uint256, count: uint256):
    # The callee needs nearly all gas that there is: what the caller uses in the end is not what it must be given.
    raw_call(self, abi_encode(first, count, convert(7, uint256), method_id=method_id("store_many(uint256,uint256,uint256)")))

@external
def tree() -> uint256:
    extcall Probe(self).store(1, 2)
    _: bool = raw_call(self, method_id("refuse_silently()"), revert_on_failure=False)
    small: Bytes[36] = abi_encode(convert(3, uint256), method_id=method_id("refuse(uint256)"))
    __: bool = raw_call(self, small, revert_on_failure=False)
    both: Bytes[68] = abi_encode(convert(5, uint256), convert(6, uint256), method_id=method_id("store(uint256,uint256)"))
    raw_call(self, both, is_delegate_call=True)
    return staticcall Probe(self).values(1)

@external
@view
def spin(count: uint256) -> bytes32:
    word: bytes32 = empty(bytes32)
    for _: uint256 in range(count, bound=1000000):
        word = keccak256(word)
    return word

@external
def dive():
    _: bool = raw_call(self, method_id("dive()"), revert_on_failure=False)

@external
def create() -> address:
    return create_minimal_proxy_to(self)
"""


@functools.cache
def compiled() -> dict[str, Any]:
    """ABI and bytecode of the probe."""
    return dict(compile_code(PROBE, output_formats=["abi", "bytecode"]))


def deploy(w3: Web3, sender: str) -> Contract:
    """A new probe; waits until it stands."""
    output = compiled()
    factory = w3.eth.contract(abi=output["abi"], bytecode=output["bytecode"])
    receipt = w3.eth.wait_for_transaction_receipt(factory.constructor().transact({"from": sender}), poll_latency=0.01)
    assert receipt["status"] == 1
    return w3.eth.contract(address=receipt["contractAddress"], abi=output["abi"])


class NodeProvider(JSONBaseProvider):
    """A client's connection to a node in the same process: requests and answers are JSON, but no socket is needed."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        request = self.encode_rpc_request(method, params)
        return self.decode_rpc_response(self.node.dispatcher.answer_text(request).encode())


@contextlib.contextmanager
def local_node(**settings: Any) -> Iterator[Web3]:
    """A client of a node that lives in this process; with automine unless told otherwise."""
    node = Node(DevnetConfig(**{"block_time": None, "automine": True, **settings}))
    node.start()
    try:
        yield Web3(NodeProvider(node))
    finally:
        node.stop()


def rpc(w3: Web3, method: str, *parameters: Any) -> Any:
    """One raw request; its result, or its error object as a ValueError's argument."""
    response: Any = w3.provider.make_request(method, list(parameters))  # type: ignore[arg-type]
    if "error" in response:
        raise ValueError(response["error"])
    return response["result"]
