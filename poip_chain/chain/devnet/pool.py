"""Transactions that wait for a block: ordered by what they pay, queued behind nonce gaps, replaced by a higher fee.

Lives in memory, as any node's pool may be lost: senders must be ready to send again. Knows no execution.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from eth.abc import SignedTransactionAPI

from poip_chain.chain.devnet.errors import TransactionRejected

MAX_TRANSACTIONS = 50_000
MAX_TRANSACTIONS_PER_SENDER = 2_000
REPLACEMENT_PERCENT = 10


@dataclass(slots=True)
class TransactionPool:
    """Pending transactions by sender and nonce. Not thread-safe: the chain's lock guards it."""

    _by_sender: dict[bytes, dict[int, SignedTransactionAPI]] = field(default_factory=dict)
    _by_hash: dict[bytes, SignedTransactionAPI] = field(default_factory=dict)
    _arrival: dict[bytes, int] = field(default_factory=dict)
    _counter: Iterator[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return len(self._by_hash)

    def __iter__(self) -> Iterator[SignedTransactionAPI]:
        return iter(tuple(self._by_hash.values()))

    def get(self, transaction_hash: bytes) -> SignedTransactionAPI | None:
        """The waiting transaction with this hash."""
        return self._by_hash.get(transaction_hash)

    def of_sender(self, sender: bytes) -> dict[int, SignedTransactionAPI]:
        """A sender's waiting transactions by nonce."""
        return dict(self._by_sender.get(sender, {}))

    def senders(self) -> tuple[bytes, ...]:
        """Everyone with a waiting transaction."""
        return tuple(self._by_sender)

    def add(self, transaction: SignedTransactionAPI) -> None:
        """Take a transaction, in place of one with the same nonce if both its fees are at least 10 % higher.

        Raises TransactionRejected if it is known, pays too little to replace, or does not fit in.
        """
        if transaction.hash in self._by_hash:
            raise TransactionRejected("already known")
        queue = self._by_sender.get(transaction.sender, {})
        old = queue.get(transaction.nonce)
        if old is not None:
            for new_fee, old_fee in (
                (transaction.max_fee_per_gas, old.max_fee_per_gas),
                (transaction.max_priority_fee_per_gas, old.max_priority_fee_per_gas),
            ):
                if new_fee * 100 < old_fee * (100 + REPLACEMENT_PERCENT):
                    raise TransactionRejected(
                        f"replacement transaction underpriced: both fees must rise by {REPLACEMENT_PERCENT} %, "
                        f"{new_fee} wei follows {old_fee} wei"
                    )
            self.remove(old)
        elif len(queue) >= MAX_TRANSACTIONS_PER_SENDER:
            raise TransactionRejected(f"the sender has {len(queue)} waiting transactions already")
        elif len(self) >= MAX_TRANSACTIONS:
            raise TransactionRejected(f"the pool is full with {len(self)} transactions")
        self._by_sender.setdefault(transaction.sender, {})[transaction.nonce] = transaction
        self._by_hash[transaction.hash] = transaction
        self._arrival[transaction.hash] = next(self._counter)

    def remove(self, transaction: SignedTransactionAPI) -> None:
        """Forget a transaction, if it waits."""
        if self._by_hash.pop(transaction.hash, None) is None:
            return
        del self._arrival[transaction.hash]
        queue = self._by_sender[transaction.sender]
        del queue[transaction.nonce]
        if not queue:
            del self._by_sender[transaction.sender]

    def forget_below(self, sender: bytes, nonce: int) -> None:
        """Forget a sender's transactions whose nonce is used up."""
        for used in [n for n in self._by_sender.get(sender, {}) if n < nonce]:
            self.remove(self._by_sender[sender][used])

    def copy(self) -> TransactionPool:
        """An independent pool with the same transactions."""
        copied = TransactionPool()
        for transaction in self:
            copied.add(transaction)
        return copied

    def pick(self, base_fee: int, nonce_of: Callable[[bytes], int]) -> Picker:
        """What a block may hold at this base fee, best payer first; `nonce_of` gives a sender's next nonce."""
        return Picker(self, base_fee, nonce_of)

    def arrival(self, transaction: SignedTransactionAPI) -> int:
        """When the transaction came, as a count: of equal payers the first goes first."""
        return self._arrival[transaction.hash]


class Picker:
    """Walks through a pool in the order of a block. Each sender's transactions come in the order of their nonces."""

    def __init__(self, pool: TransactionPool, base_fee: int, nonce_of: Callable[[bytes], int]) -> None:
        self._pool = pool
        self._base_fee = base_fee
        self._heap: list[tuple[int, int, SignedTransactionAPI]] = []
        for sender in pool.senders():
            self._push(sender, nonce_of(sender))

    def __iter__(self) -> Iterator[SignedTransactionAPI]:
        """Yields the next candidate. Only `included` brings its sender's next one into play."""
        while self._heap:
            yield heapq.heappop(self._heap)[2]

    def included(self, transaction: SignedTransactionAPI) -> None:
        """The candidate went into the block, so its sender's next nonce may follow."""
        self._push(transaction.sender, transaction.nonce + 1)

    def _push(self, sender: bytes, nonce: int) -> None:
        transaction = self._pool._by_sender[sender].get(nonce)
        if transaction is None or transaction.max_fee_per_gas < self._base_fee:
            return
        tip = min(transaction.max_priority_fee_per_gas, transaction.max_fee_per_gas - self._base_fee)
        heapq.heappush(self._heap, (-tip, self._pool.arrival(transaction), transaction))
