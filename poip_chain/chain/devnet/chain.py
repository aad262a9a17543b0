"""The living chain: sealing blocks, the clock, snapshots and reorganisations. Knows no JSON and no transport.

One lock guards everything that changes. Reading a state by its root needs no lock, since tries are never overwritten.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from eth.abc import BlockHeaderAPI, ReceiptAPI, SignedTransactionAPI
from eth.constants import (
    POST_MERGE_MIX_HASH,
    SECPK1_N,
)
from eth.exceptions import PyEVMError
from eth_typing import Address
from eth_utils.exceptions import ValidationError

from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.chain.devnet.errors import InvalidInput, TransactionRejected
from poip_chain.chain.devnet.ledger import Ledger, SealedBlock
from poip_chain.chain.devnet.overrides import (
    AccountOverride,
    apply_overrides,
)
from poip_chain.chain.devnet.pool import TransactionPool
from poip_chain.chain.devnet.vm import (
    BASE_TRANSACTION_GAS,
    DevnetVM,
    begin_block,
    minimum_gas,
    next_header,
)

log = logging.getLogger(__name__)

MAX_REORG_DEPTH = 64
"""Blocks deeper than this count as final (`finalized`), so no reorganisation touches them."""
SAFE_DEPTH = 32
MAX_TIMESTAMP = 2**40
_TRANSACTION_TYPES = (0, 1, 2)
_TRANSACTION_NUMBERS = (
    ("nonce", 2**64 - 2),
    ("gas", 2**64 - 1),
    ("value", 2**256 - 1),
    ("max_fee_per_gas", 2**256 - 1),
    ("max_priority_fee_per_gas", 2**256 - 1),
    ("s", SECPK1_N // 2),  # EIP-2: the other half would be a second valid form of each transaction
)


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """What changed, oldest first: blocks that left the chain, blocks that joined it, transactions now waiting."""

    removed: tuple[SealedBlock, ...] = ()
    added: tuple[SealedBlock, ...] = ()
    pending: tuple[SignedTransactionAPI, ...] = ()


@dataclass(frozen=True, slots=True)
class Reorganisation:
    """`old_head` was replaced by `new_head` at the same height; `returned` transactions wait again."""

    ancestor: BlockHeaderAPI
    old_head: BlockHeaderAPI
    new_head: BlockHeaderAPI
    returned: tuple[SignedTransactionAPI, ...]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    header: BlockHeaderAPI
    clock_offset: int
    next_timestamp: int | None
    pool: TransactionPool


class Devnet(Ledger):
    """A development chain that grows: from a pool, at once or whenever `mine` is called.

    clock       gives Unix seconds; chain time is this plus an offset that time travel moves.

    Raises ConfigurationError if the database belongs to a chain with other settings.
    """

    def __init__(self, config: DevnetConfig, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(config, int(clock()))
        self.lock = threading.RLock()
        self.pool = TransactionPool()
        self.automine = config.automine
        self._clock = clock
        self._clock_offset = self.stored_clock_offset()
        self._listeners: list[Callable[[ChainEvent], None]] = []
        self._snapshots: dict[int, _Snapshot] = {}
        self._snapshot_count = 0
        self._next_timestamp: int | None = None

    def close(self) -> None:
        """Close the database. Every sealed block is in it already."""
        with self.lock:
            super().close()

    # -- looking ahead ------------------------------------------------------------------------------------------

    def machine_for_next(self) -> DevnetVM:
        """A machine with the newest state, seeing the block that would come next."""
        header = next_header(self.head, timestamp=self._timestamp_for(self.head), mix_hash=os.urandom(32))
        return cast(DevnetVM, self._chain.get_vm(header))

    def next_base_fee(self) -> int:
        """Base fee of the block that would come next, in wei per gas."""
        return cast(int, self._next_header_of(self.head).base_fee_per_gas)

    def nonce(self, address: bytes) -> int:
        """The next nonce of an account in the newest state."""
        return int(self.machine_after(self.head).state.get_nonce(Address(address)))

    def pending_nonce(self, address: bytes) -> int:
        """The next nonce once everything that can follow from the pool is in a block."""
        nonce, waiting = self.nonce(address), self.pool.of_sender(address)
        while nonce in waiting:
            nonce += 1
        return nonce

    # -- listening ----------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[ChainEvent], None]) -> None:
        """Call a function after each change, from the thread that made it and under the lock: it must be quick."""
        with self.lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[ChainEvent], None]) -> None:
        """Stop calling it."""
        with self.lock:
            self._listeners.remove(listener)

    def _tell(self, event: ChainEvent) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener of the chain failed")

    # -- transactions -------------------------------------------------------------------------------------------

    def submit(self, encoded: bytes) -> SignedTransactionAPI:
        """Take a signed transaction (types 0, 1 and 2) into the pool; with automine, seal it. Raises TransactionRejected."""
        transaction = _decode_transaction(encoded)
        with self.lock:
            self._check(transaction)
            self.pool.add(transaction)
            self._tell(ChainEvent(pending=(transaction,)))
            if self.automine:
                self._seal_waiting()
        return transaction

    def _check(self, transaction: SignedTransactionAPI) -> None:
        if transaction.chain_id is not None and transaction.chain_id != self.config.chain_id:
            raise TransactionRejected(
                f"invalid chain id: signed for {transaction.chain_id}, this chain is {self.config.chain_id}"
            )
        if transaction.gas > self.config.gas_limit:
            raise TransactionRejected(f"exceeds block gas limit: {transaction.gas} is over {self.config.gas_limit}")
        least = minimum_gas(transaction)
        if transaction.gas < least:
            raise TransactionRejected(f"intrinsic gas too low: {transaction.gas} given, {least} needed")
        if transaction.max_priority_fee_per_gas > transaction.max_fee_per_gas:
            raise TransactionRejected(
                f"max priority fee per gas ({transaction.max_priority_fee_per_gas} wei) is higher than max fee per gas "
                f"({transaction.max_fee_per_gas} wei)"
            )
        state = self.machine_after(self.head).state
        nonce = state.get_nonce(transaction.sender)
        if transaction.nonce < nonce:
            raise TransactionRejected(f"nonce too low: next nonce {nonce}, transaction nonce {transaction.nonce}")
        cost = transaction.value + transaction.gas * transaction.max_fee_per_gas
        balance = state.get_balance(transaction.sender)
        if balance < cost:
            raise TransactionRejected(
                f"insufficient funds for gas * price + value: balance {balance} wei, transaction cost {cost} wei"
            )

    # -- blocks -------------------------------------------------------------------------------------------------

    def mine(self, *, timestamp: int | None = None, seconds: float | None = None) -> SealedBlock:
        """Seal a block from the pool, empty if nothing waits.

        timestamp   of the block, Unix seconds; must be above the newest block's.
        seconds     stop adding transactions after so long; the rest stays for the next block.
        """
        with self.lock:
            if timestamp is not None:
                self.set_next_timestamp(timestamp)
            sealed = self._seal(self._timestamp_for(self.head), from_pool=True, seconds=seconds)
            assert sealed is not None
            self._tell(ChainEvent(added=(sealed,)))
            return sealed

    def set_automine(self, enabled: bool) -> None:
        """Seal at once whatever comes, beginning with what waits."""
        with self.lock:
            self.automine = enabled
            if enabled:
                self._seal_waiting()

    def override(self, overrides: Sequence[AccountOverride]) -> SealedBlock:
        """Set accounts by hand, by an extra block without transactions that carries the change."""
        with self.lock:
            sealed = self._seal(self._timestamp_for(self.head), from_pool=False, overrides=overrides)
            assert sealed is not None
            self._tell(ChainEvent(added=(sealed,)))
            return sealed

    def _seal_waiting(self) -> None:
        while len(self.pool):
            sealed = self._seal(self._timestamp_for(self.head), from_pool=True, empty=False)
            if sealed is None:
                return
            self._tell(ChainEvent(added=(sealed,)))

    def _seal(
        self,
        timestamp: int,
        *,
        from_pool: bool,
        seconds: float | None = None,
        empty: bool = True,
        overrides: Sequence[AccountOverride] = (),
    ) -> SealedBlock | None:
        try:
            sealed, rejected = self._build(timestamp, from_pool, seconds, empty, overrides)
            if sealed is not None:
                self.database.commit()
        except BaseException:
            self.database.discard()
            raise
        for transaction in rejected:
            self.pool.remove(transaction)
        if sealed is None:
            self.database.discard()
            return None
        self.head = sealed.header
        self._next_timestamp = None
        self.keep_sealed(sealed)
        for transaction in sealed.transactions:
            self.pool.remove(transaction)
            self.pool.forget_below(transaction.sender, transaction.nonce)
        return sealed

    def _build(
        self,
        timestamp: int,
        from_pool: bool,
        seconds: float | None,
        empty: bool,
        overrides: Sequence[AccountOverride],
    ) -> tuple[SealedBlock | None, list[SignedTransactionAPI]]:
        header = next_header(self.head, timestamp=timestamp, mix_hash=os.urandom(32))
        vm = cast(DevnetVM, self._chain.get_vm(header))
        block = vm.get_block()
        begin_block(vm)
        if overrides:
            apply_overrides(vm.state, overrides)
        transactions: list[SignedTransactionAPI] = []
        receipts: list[ReceiptAPI] = []
        rejected: list[SignedTransactionAPI] = []
        if from_pool:
            picker = self.pool.pick(
                cast(int, header.base_fee_per_gas), lambda sender: vm.state.get_nonce(Address(sender))
            )
            deadline = None if seconds is None else time.monotonic() + seconds
            for transaction in picker:
                gas_left = header.gas_limit - header.gas_used
                if gas_left < BASE_TRANSACTION_GAS or (deadline is not None and time.monotonic() > deadline):
                    break
                if transaction.gas > gas_left:
                    continue
                receipt = self._apply(vm, header, transaction)
                if receipt is None:
                    rejected.append(transaction)
                    continue
                header = vm.add_receipt_to_header(header, receipt)
                transactions.append(transaction)
                receipts.append(receipt)
                picker.included(transaction)
        if not transactions and not empty:
            return None, rejected
        filled = vm.set_block_transactions_and_withdrawals(block, header, transactions, receipts)
        # Execution requests (EIP-7685) come from contracts that this chain does not have: their hash stays the empty one.
        final = vm.finalize_block(filled).block
        self.store_block(final, overrides)
        return SealedBlock(final, tuple(receipts)), rejected

    def _apply(self, vm: DevnetVM, header: BlockHeaderAPI, transaction: SignedTransactionAPI) -> ReceiptAPI | None:
        """The receipt of a transaction, or None if no block can hold it; then the state is as before."""
        vm.state.lock_changes()
        before = vm.state.snapshot()
        try:
            computation = vm.state.apply_transaction(transaction)
            return vm.make_receipt(header, transaction, computation, vm.state)
        except (ValidationError, PyEVMError, ValueError, OverflowError) as error:
            log.warning("transaction 0x%s is dropped: %s", transaction.hash.hex(), error)
            vm.state.revert(before)
            return None

    # -- time ---------------------------------------------------------------------------------------------------

    def now(self) -> int:
        """Chain time: the clock and the offset, Unix seconds."""
        return int(self._clock() + self._clock_offset)

    @property
    def clock_offset(self) -> int:
        """Seconds by which chain time differs from the clock."""
        return self._clock_offset

    def increase_time(self, seconds: int) -> int:
        """Move chain time forward. Returns the whole offset in seconds."""
        if seconds < 0:
            raise InvalidInput(f"time cannot go back by {-seconds} seconds")
        with self.lock:
            if self.now() + seconds > MAX_TIMESTAMP:
                raise InvalidInput(f"a chain time {seconds} seconds from now is out of range")
            self._set_clock_offset(self._clock_offset + seconds)
            return self._clock_offset

    def set_next_timestamp(self, timestamp: int) -> None:
        """Give the next block exactly this timestamp; chain time goes on from there."""
        with self.lock:
            if not self.head.timestamp < timestamp <= MAX_TIMESTAMP:
                raise InvalidInput(
                    f"timestamp {timestamp} must be above that of the newest block, {self.head.timestamp}, "
                    f"and not over {MAX_TIMESTAMP}"
                )
            self._next_timestamp = timestamp
            self._set_clock_offset(timestamp - int(self._clock()))

    def _set_clock_offset(self, seconds: int) -> None:
        self._clock_offset = seconds
        self.store_clock_offset(seconds)

    def _timestamp_for(self, parent: BlockHeaderAPI) -> int:
        if self._next_timestamp is not None and self._next_timestamp > parent.timestamp:
            return self._next_timestamp
        return max(parent.timestamp + 1, self.now())

    def _next_header_of(self, parent: BlockHeaderAPI) -> BlockHeaderAPI:
        return next_header(parent, timestamp=parent.timestamp + 1, mix_hash=POST_MERGE_MIX_HASH)

    # -- going back ---------------------------------------------------------------------------------------------

    def snapshot(self) -> int:
        """Remember the present: head, clock and pool. Returns a number for `revert`; lost when the process ends."""
        with self.lock:
            self._snapshot_count += 1
            self._snapshots[self._snapshot_count] = _Snapshot(
                self.head, self._clock_offset, self._next_timestamp, self.pool.copy()
            )
            return self._snapshot_count

    def revert(self, identifier: int) -> bool:
        """Return to a snapshot; it and all later ones are used up. False if there is no such snapshot."""
        with self.lock:
            snapshot = self._snapshots.get(identifier)
            if snapshot is None:
                return False
            removed, added = self.set_head(snapshot.header)
            self._set_clock_offset(snapshot.clock_offset)
            self._next_timestamp = snapshot.next_timestamp
            self.pool = snapshot.pool
            self._snapshots = {key: kept for key, kept in self._snapshots.items() if key < identifier}
            self._tell(ChainEvent(removed=removed, added=added))
            return True

    def reorganise(self, depth: int, *, drop_transactions: bool = False) -> Reorganisation:
        """Replace the newest `depth` blocks (1..64) by empty ones at the same heights and times, with other hashes.

        Their transactions go back to the pool, where automine leaves them until the next block, or are dropped.
        """
        with self.lock:
            most = min(MAX_REORG_DEPTH, self.head.block_number)
            if not 1 <= depth <= most:
                raise InvalidInput(f"a reorganisation of {depth} blocks is not possible; 1 to {most} are")
            old_head, planned = self.head, self._next_timestamp
            replaced = [self.header_by_number(self.head.block_number - back) for back in reversed(range(depth))]
            ancestor = self.header_by_hash(replaced[0].parent_hash)
            removed, _ = self.set_head(ancestor)
            added = []
            for header in replaced:
                sealed = self._seal(header.timestamp, from_pool=False)
                assert sealed is not None
                added.append(sealed)
            self._next_timestamp = planned
            returned: list[SignedTransactionAPI] = []
            if not drop_transactions:
                returned = self._return_to_pool(removed)
            self._tell(ChainEvent(removed=removed, added=tuple(added), pending=tuple(returned)))
            return Reorganisation(ancestor, old_head, self.head, tuple(returned))

    def _return_to_pool(self, blocks: Iterable[SealedBlock]) -> list[SignedTransactionAPI]:
        returned = []
        for transaction in [transaction for block in blocks for transaction in block.transactions]:
            try:
                self.pool.add(transaction)
            except TransactionRejected as error:
                log.info("transaction 0x%s does not return to the pool: %s", transaction.hash.hex(), error)
            else:
                returned.append(transaction)
        return returned


def _decode_transaction(encoded: bytes) -> SignedTransactionAPI:
    """A signed transaction whose sender can be told. Raises TransactionRejected."""
    try:
        transaction = DevnetVM.get_transaction_builder().decode(encoded)
        kind = transaction.type_id or 0
        if kind not in _TRANSACTION_TYPES:
            raise TransactionRejected(f"transaction type {kind} is not supported; 0, 1 and 2 are")
        for name, most in _TRANSACTION_NUMBERS:
            if getattr(transaction, name) > most:
                raise TransactionRejected(f"{name} is out of range: {getattr(transaction, name)} is over {most}")
        if len(transaction.to) not in (0, 20):
            raise TransactionRejected(f"the recipient has {len(transaction.to)} bytes, not 20")
        # Whom a signature can be recovered to has made it. It is done once, here, and remembered by the object.
        transaction.sender  # noqa: B018
    except TransactionRejected:
        raise
    except Exception as error:
        raise TransactionRejected(f"the transaction cannot be decoded: {error}") from error
    return transaction
