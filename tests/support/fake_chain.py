"""A chain in memory with the methods that outbox and follower use: blocks, one mempool, events, reorganisations, faults.

It executes nothing: a transaction is mined as successful unless `reverting` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import rlp
from eth_hash.auto import keccak
from hexbytes import HexBytes
from web3 import Web3

from poip_chain.chain.rpc import Block, Call
from poip_chain.errors import NotFound, TransactionFailed, Unavailable
from poip_chain.spec.types import Address, Hash32


@dataclass(frozen=True)
class FakeTransaction:
    """A decoded EIP-1559 transaction."""

    hash: str
    nonce: int
    tip: int
    max_fee: int
    data: bytes
    raw: bytes


@dataclass
class FakeBlock:
    """A block with its transactions and logs."""

    number: int
    hash: bytes
    parent: bytes
    transactions: list[FakeTransaction] = field(default_factory=list)
    foreign: int = 0
    logs: list[dict[str, Any]] = field(default_factory=list)


class FakeChain:
    """See the module's docstring. One account uses it."""

    def __init__(self) -> None:
        self.chain_id = 1337
        self.url = "fake"
        self.w3 = Web3()
        self.blocks = [FakeBlock(0, keccak(b"genesis"), bytes(32))]
        self.mempool: dict[int, FakeTransaction] = {}
        self.sent: list[FakeTransaction] = []
        self.branch = 0
        self.base_fee = 10**9
        self.coin = 10**20
        self.away = False
        self.refusal = ""
        self.forgets = False
        self.reverts = ""
        self.reverting: set[bytes] = set()
        self.calls = 0
        self.interruption: tuple[int, Callable[[], None]] | None = None

    def _ask(self) -> None:
        self.calls += 1
        if self.interruption is not None and self.calls >= self.interruption[0]:
            _, happens = self.interruption
            self.interruption = None
            happens()
        if self.away:
            raise Unavailable("the fake chain is away.")

    # what Chain has

    def block(self, number: int | str = "latest") -> Block:
        self._ask()
        if number == "latest":
            number = len(self.blocks) - 1
        assert isinstance(number, int)
        if not 0 <= number < len(self.blocks):
            raise NotFound(f"no block {number}")
        block = self.blocks[number]
        return Block(number, Hash32(block.hash), Hash32(block.parent), 1000 + number, Hash32(bytes(32)), self.base_fee)

    def block_number(self) -> int:
        return self.block().number

    def transaction_count(self, _: Address, block: int | str = "latest") -> int:
        self._ask()
        last = len(self.blocks) - 1 if isinstance(block, str) else block
        mined = sum(len(b.transactions) + b.foreign for b in self.blocks[: last + 1])
        if block == "pending":
            while mined in self.mempool:
                mined += 1
        return mined

    def balance(self, _: Address) -> int:
        self._ask()
        return self.coin

    def tip(self) -> int:
        self._ask()
        return 10**9

    def simulate(self, call: Call, sender: Address, *, block: int | str = "latest") -> bytes:
        self._ask()
        if self.reverts:
            raise TransactionFailed(self.reverts)
        return b""

    def estimate_gas(self, call: Call, sender: Address) -> int:
        self._ask()
        return 50_000

    def send_raw(self, raw: bytes) -> str:
        self._ask()
        transaction = decode(raw)
        if self.refusal:
            raise TransactionFailed(self.refusal)
        if transaction.nonce < self.transaction_count(Address("")):
            raise TransactionFailed("nonce too low")
        self.sent.append(transaction)
        known = self.mempool.get(transaction.nonce)
        if known is not None:
            if known.hash == transaction.hash:
                raise TransactionFailed("already known")
            if transaction.max_fee * 8 < known.max_fee * 9 or transaction.tip * 8 < known.tip * 9:
                raise TransactionFailed("replacement transaction underpriced")
        if not self.forgets:
            self.mempool[transaction.nonce] = transaction
        return transaction.hash

    def transaction_receipt(self, transaction_hash: str) -> dict[str, Any] | None:
        self._ask()
        for block in self.blocks:
            for transaction in block.transactions:
                if transaction.hash == transaction_hash:
                    return {
                        "transactionHash": HexBytes(transaction_hash),
                        "blockNumber": block.number,
                        "blockHash": HexBytes(block.hash),
                        "status": 0 if transaction.data in self.reverting else 1,
                        "gasUsed": 42_000,
                        "effectiveGasPrice": self.base_fee,
                        "contractAddress": None,
                    }
        return None

    def logs(self, parameters: dict[str, Any]) -> list[Any]:
        topics = [bytes(topic) for topic in parameters["topics"][0]]
        found: list[Any] = []
        # Block by block, as real endpoints do: the chain may change in between.
        for number in range(parameters["fromBlock"], parameters["toBlock"] + 1):
            self._ask()
            for log in self.blocks[number].logs if number < len(self.blocks) else []:
                if bytes(log["topics"][0]) in topics and log["address"] in parameters["address"]:
                    found.append(log)
        return found

    # what happens to it

    def interrupt(self, after: int, happens: Callable[[], None]) -> None:
        """Let something happen at the start of the call that follows `after` more calls."""
        self.interruption = (self.calls + after + 1, happens)

    def mine(self, count: int = 1, *, fill: bool = True, foreign: int = 0) -> None:
        """Seal blocks; the first takes every transaction of the mempool that is next in line."""
        for _ in range(count):
            parent = self.blocks[-1]
            number = parent.number + 1
            block = FakeBlock(number, keccak(parent.hash + bytes([self.branch % 256])), parent.hash, foreign=foreign)
            self.blocks.append(block)
            foreign = 0
            nonce = self.transaction_count_now()
            while fill and nonce in self.mempool:
                block.transactions.append(self.mempool.pop(nonce))
                nonce += 1
            self.mempool = {n: t for n, t in self.mempool.items() if n >= nonce}

    def transaction_count_now(self) -> int:
        """Mined transactions, with no fault injected."""
        return sum(len(b.transactions) + b.foreign for b in self.blocks)

    def mined(self) -> list[FakeTransaction]:
        """All mined transactions."""
        return [transaction for block in self.blocks for transaction in block.transactions]

    def drop(self, depth: int, *, keep: bool = True) -> None:
        """Forget the newest blocks; `keep` puts their transactions back into the mempool."""
        self.branch += 1
        for block in self.blocks[len(self.blocks) - depth :]:
            for transaction in block.transactions:
                if keep:
                    self.mempool[transaction.nonce] = transaction
        del self.blocks[len(self.blocks) - depth :]

    def emit(self, address: str, topic: bytes, data: bytes) -> None:
        """Add a log to the newest block."""
        block = self.blocks[-1]
        index = len(block.logs)
        block.logs.append(
            {
                "address": address,
                "topics": [HexBytes(topic)],
                "data": HexBytes(data),
                "blockNumber": block.number,
                "blockHash": HexBytes(block.hash),
                "transactionHash": HexBytes(keccak(block.hash + bytes([index % 256]))),
                "transactionIndex": 0,
                "logIndex": index,
                "removed": False,
            }
        )


def decode(raw: bytes) -> FakeTransaction:
    """The fields of a signed EIP-1559 transaction."""
    assert raw[0] == 2
    fields = rlp.decode(raw[1:])
    number = [int.from_bytes(value, "big") if isinstance(value, bytes) else 0 for value in fields]
    return FakeTransaction("0x" + keccak(raw).hex(), number[1], number[2], number[3], fields[7], raw)
