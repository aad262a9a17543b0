"""The chain itself: sealing blocks, the clock, snapshots and reorganisations. Knows no JSON and no transport.

One lock guards everything that changes. Reading a state by its root needs no lock, since tries are never overwritten.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import rlp
from eth.abc import BlockAPI, BlockHeaderAPI, ReceiptAPI, SignedTransactionAPI
from eth.chains.base import Chain
from eth.constants import (
    BLANK_ROOT_HASH,
    POST_MERGE_DIFFICULTY,
    POST_MERGE_MIX_HASH,
    POST_MERGE_NONCE,
    ZERO_ADDRESS,
)
from eth.db.atomic import AtomicDB
from eth.db.schema import SchemaV1
from eth.exceptions import CanonicalHeadNotFound, HeaderNotFound, PyEVMError, TransactionNotFound
from eth.rlp.sedes import chain_gaps
from eth.typing import AccountDetails, HeaderParams
from eth.vm.forks.prague.constants import HISTORY_STORAGE_ADDRESS, HISTORY_STORAGE_CONTRACT_CODE
from eth_typing import Address, BlockNumber, Hash32
from eth_utils.exceptions import ValidationError

from poip_chain.chain.devnet.config import DevnetConfig, development_accounts
from poip_chain.chain.devnet.database import Database
from poip_chain.chain.devnet.errors import InvalidInput, ResourceNotFound, TransactionRejected
from poip_chain.chain.devnet.overrides import (
    AccountOverride,
    apply_overrides,
    decode_overrides,
    encode_overrides,
)
from poip_chain.chain.devnet.pool import TransactionPool
from poip_chain.chain.devnet.vm import (
    BASE_TRANSACTION_GAS,
    DevnetVM,
    begin_block,
    chain_class,
    minimum_gas,
    next_header,
)
from poip_chain.errors import ConfigurationError

log = logging.getLogger(__name__)

MAX_REORG_DEPTH = 64
"""Blocks deeper than this count as final (`finalized`), so no reorganisation touches them."""
SAFE_DEPTH = 32
MAX_TIMESTAMP = 2**40
_SEALED_CACHE = 512
_TRANSACTION_TYPES = (0, 1, 2)

_IDENTITY_KEY = b"devnet:identity"
_CLOCK_KEY = b"devnet:clock-offset"
_BLOOM_PREFIX = b"devnet:bloom:"
_OVERRIDE_PREFIX = b"devnet:override:"


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A block with its receipts, in the order of its transactions."""

    block: BlockAPI
    receipts: tuple[ReceiptAPI, ...]

    @property
    def header(self) -> BlockHeaderAPI:
        return self.block.header

    @property
    def transactions(self) -> Sequence[SignedTransactionAPI]:
        return self.block.transactions


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


class Devnet:
    """A development chain. Opens `config.database` or starts a new chain in it.

    clock       gives Unix seconds; chain time is this plus an offset that time travel moves.

    Raises ConfigurationError if the file belongs to a chain with other settings.
    """

    def __init__(self, config: DevnetConfig, *, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.lock = threading.RLock()
        self.accounts = development_accounts(config.mnemonic, config.accounts)
        self.pool = TransactionPool()
        self.automine = config.automine
        self._clock = clock
        self._listeners: list[Callable[[ChainEvent], None]] = []
        self._snapshots: dict[int, _Snapshot] = {}
        self._snapshot_count = 0
        self._next_timestamp: int | None = None
        self._sealed: OrderedDict[bytes, SealedBlock] = OrderedDict()
        self.database = Database(config.database)
        self._db = AtomicDB(self.database)
        self._chain = self._open()
        self.head: BlockHeaderAPI = self._chain.get_canonical_head()
        self._clock_offset = int(self.database[_CLOCK_KEY])

    # -- opening ------------------------------------------------------------------------------------------------

    def _open(self) -> Chain:
        chain_type = chain_class(self.config.chain_id)
        identity = {
            "version": 1,
            "chain_id": self.config.chain_id,
            "gas_limit": self.config.gas_limit,
            "funded": [account.address for account in self.accounts],
            "balance": self.config.balance,
        }
        try:
            stored = json.loads(self.database[_IDENTITY_KEY])
        except KeyError:
            chain = self._create_genesis(chain_type)
            self.database[_IDENTITY_KEY] = json.dumps(identity).encode()
            self.database[_CLOCK_KEY] = b"0"
            self.database.commit()
            return chain
        for name, value in identity.items():
            if stored.get(name) != value:
                raise ConfigurationError(
                    f"{self.config.database} holds a chain with {name} {stored.get(name)!r}, not {value!r}.",
                    hint="Use the settings it was made with, or another database file.",
                )
        chain = chain_type(self._db)
        try:
            chain.get_canonical_head()
        except CanonicalHeadNotFound as error:
            raise ConfigurationError(f"{self.config.database} holds no chain.", hint="Use another file.") from error
        return chain

    def _create_genesis(self, chain_type: type[Chain]) -> Chain:
        state: dict[Address, AccountDetails] = {
            Address(bytes.fromhex(account.address[2:])): {
                "balance": self.config.balance,
                "nonce": 0,
                "code": b"",
                "storage": {},
            }
            for account in self.accounts
        }
        # The history contract must be there from the start: py-evm itself never deploys it (EIP-2935).
        state[HISTORY_STORAGE_ADDRESS] = {
            "balance": 0,
            "nonce": 1,
            "code": HISTORY_STORAGE_CONTRACT_CODE,
            "storage": {},
        }
        parameters: dict[str, HeaderParams] = {
            "coinbase": ZERO_ADDRESS,
            "difficulty": POST_MERGE_DIFFICULTY,
            "extra_data": b"",
            "gas_limit": self.config.gas_limit,
            "mix_hash": POST_MERGE_MIX_HASH,
            "nonce": POST_MERGE_NONCE,
            "receipt_root": BLANK_ROOT_HASH,
            "transaction_root": BLANK_ROOT_HASH,
            "timestamp": int(self._clock()),
        }
        return cast(Chain, chain_type.from_genesis(self._db, parameters, state))

    def close(self) -> None:
        """Close the database. Every sealed block is in it already."""
        with self.lock:
            self.database.close()

    # -- reading ------------------------------------------------------------------------------------------------

    def header_by_number(self, number: int) -> BlockHeaderAPI:
        """A block of the chain. Raises ResourceNotFound."""
        if not 0 <= number <= self.head.block_number:
            raise ResourceNotFound(f"block {number} does not exist; the newest is {self.head.block_number}")
        return self._chain.get_canonical_block_header_by_number(BlockNumber(number))

    def header_by_hash(self, block_hash: bytes) -> BlockHeaderAPI:
        """A block, in the chain or once replaced. Raises ResourceNotFound."""
        try:
            return self._chain.get_block_header_by_hash(Hash32(block_hash))
        except (HeaderNotFound, rlp.exceptions.RLPException, ValueError):
            raise ResourceNotFound(f"block 0x{block_hash.hex()} does not exist") from None

    def is_canonical(self, header: BlockHeaderAPI) -> bool:
        """Whether a block is part of the chain now."""
        return header.block_number <= self.head.block_number and (
            self._chain.chaindb.get_canonical_block_hash(header.block_number) == header.hash
        )

    def sealed(self, header: BlockHeaderAPI) -> SealedBlock:
        """The whole block of a header."""
        cached = self._sealed.get(header.hash)
        if cached is None:
            block = self._chain.get_block_by_header(header)
            cached = SealedBlock(block, tuple(block.get_receipts(self._chain.chaindb)))
            self._keep_sealed(cached)
        return cached

    def find_transaction(self, transaction_hash: bytes) -> tuple[SealedBlock, int] | None:
        """The block that a transaction is in, and its index there."""
        try:
            number, index = self._chain.get_canonical_transaction_index(Hash32(transaction_hash))
        except TransactionNotFound:
            return None
        return self.sealed(self.header_by_number(number)), index

    def blocks_with_logs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(number, bloom) of each block in a range that has logs at all."""
        for key, bloom in self.database.scan(_bloom_key(first), _bloom_key(last)):
            yield int.from_bytes(key[len(_BLOOM_PREFIX) :], "big"), int.from_bytes(bloom, "big")

    def machine_after(self, header: BlockHeaderAPI) -> DevnetVM:
        """A machine with the state that a block left, seeing that block as the current one."""
        return cast(DevnetVM, self._chain.get_vm(header))

    def machine_for_next(self) -> DevnetVM:
        """A machine with the newest state, seeing the block that would come next."""
        header = next_header(self.head, timestamp=self._timestamp_for(self.head), mix_hash=os.urandom(32))
        return cast(DevnetVM, self._chain.get_vm(header))

    def machine_for_replay(self, header: BlockHeaderAPI) -> DevnetVM:
        """A machine as it was when a block's first transaction began."""
        parent = self.header_by_hash(header.parent_hash)
        vm = cast(DevnetVM, self._chain.get_vm(header.copy(state_root=parent.state_root, gas_used=0, blob_gas_used=0)))
        begin_block(vm)
        try:
            encoded = self.database[_OVERRIDE_PREFIX + header.mix_hash]
        except KeyError:
            return vm
        apply_overrides(vm.state, decode_overrides(encoded))
        return vm

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
        self._keep_sealed(sealed)
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
            self.database[_OVERRIDE_PREFIX + header.mix_hash] = encode_overrides(overrides)
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
        self._chain.chaindb.persist_block(final)
        if final.header.bloom:
            self.database[_bloom_key(final.number)] = final.header.bloom.to_bytes(256, "big")
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
        self.database[_CLOCK_KEY] = str(seconds).encode()
        self.database.commit()

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
            removed, added = self._set_head(snapshot.header)
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
            removed, _ = self._set_head(ancestor)
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

    def _set_head(self, target: BlockHeaderAPI) -> tuple[tuple[SealedBlock, ...], tuple[SealedBlock, ...]]:
        """Make `target` the newest block. Returns the blocks that left the chain and those that joined it.

        py-evm only ever moves its head forward, so its few entries that say which blocks are canonical are rewritten here.
        """
        branch: list[BlockHeaderAPI] = []
        ancestor = target
        while not self.is_canonical(ancestor):
            branch.insert(0, ancestor)
            ancestor = self.header_by_hash(ancestor.parent_hash)
        leaving = [
            self.sealed(self.header_by_number(number))
            for number in range(ancestor.block_number + 1, self.head.block_number + 1)
        ]
        joining = [self.sealed(header) for header in branch]
        try:
            for sealed in leaving:
                del self.database[SchemaV1.make_block_number_to_hash_lookup_key(sealed.header.block_number)]
                if sealed.header.bloom:
                    del self.database[_bloom_key(sealed.header.block_number)]
                for transaction in sealed.transactions:
                    del self.database[SchemaV1.make_transaction_hash_to_block_lookup_key(transaction.hash)]
            for sealed in joining:
                number = sealed.header.block_number
                self.database[SchemaV1.make_block_number_to_hash_lookup_key(number)] = rlp.encode(sealed.header.hash)
                if sealed.header.bloom:
                    self.database[_bloom_key(number)] = sealed.header.bloom.to_bytes(256, "big")
                for index, transaction in enumerate(sealed.transactions):
                    key = SchemaV1.make_transaction_hash_to_block_lookup_key(transaction.hash)
                    self.database[key] = rlp.encode([number, index])
            self.database[SchemaV1.make_canonical_head_hash_lookup_key()] = target.hash
            no_gaps = rlp.encode(((), target.block_number + 1), sedes=chain_gaps)
            self.database[SchemaV1.make_header_chain_gaps_lookup_key()] = no_gaps
            self.database[SchemaV1.make_chain_gaps_lookup_key()] = no_gaps
            self.database.commit()
        except BaseException:
            self.database.discard()
            raise
        self.head = target
        return tuple(leaving), tuple(joining)

    def _keep_sealed(self, sealed: SealedBlock) -> None:
        self._sealed[sealed.header.hash] = sealed
        if len(self._sealed) > _SEALED_CACHE:
            self._sealed.popitem(last=False)


def _bloom_key(number: int) -> bytes:
    return _BLOOM_PREFIX + number.to_bytes(8, "big")


def _decode_transaction(encoded: bytes) -> SignedTransactionAPI:
    """A signed transaction whose sender can be told. Raises TransactionRejected."""
    try:
        transaction = DevnetVM.get_transaction_builder().decode(encoded)
        kind = transaction.type_id or 0
        if kind not in _TRANSACTION_TYPES:
            raise TransactionRejected(f"transaction type {kind} is not supported; 0, 1 and 2 are")
        transaction.validate()
        transaction.check_signature_validity()
        if transaction.nonce >= 2**64 - 1:
            raise TransactionRejected(f"nonce {transaction.nonce} is out of range")
        transaction.sender  # noqa: B018 - recovered once, here, and remembered by the object
    except TransactionRejected:
        raise
    except Exception as error:
        raise TransactionRejected(f"the transaction cannot be decoded: {error}") from error
    return transaction
