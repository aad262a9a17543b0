"""The stored chain: blocks, receipts, states, and which blocks count. Knows no pool, clock, JSON or transport."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
from eth.exceptions import CanonicalHeadNotFound, HeaderNotFound, TransactionNotFound
from eth.rlp.sedes import chain_gaps
from eth.typing import AccountDetails, HeaderParams
from eth.vm.forks.prague.constants import HISTORY_STORAGE_ADDRESS, HISTORY_STORAGE_CONTRACT_CODE
from eth_typing import Address, BlockNumber, Hash32

from poip_chain.chain.devnet.config import DevnetConfig, development_accounts
from poip_chain.chain.devnet.database import Database
from poip_chain.chain.devnet.errors import ResourceNotFound
from poip_chain.chain.devnet.overrides import AccountOverride, apply_overrides, decode_overrides, encode_overrides
from poip_chain.chain.devnet.vm import DevnetVM, begin_block, chain_class
from poip_chain.errors import ConfigurationError

_SEALED_CACHE = 512
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


class Ledger:
    """The chain in `config.database`, or a new one in it whose genesis is at `genesis_time` (Unix seconds).

    Raises ConfigurationError if the file belongs to a chain with other settings.
    """

    def __init__(self, config: DevnetConfig, genesis_time: int) -> None:
        self.config = config
        self.accounts = development_accounts(config.mnemonic, config.accounts)
        self.database = Database(config.database)
        self._db = AtomicDB(self.database)
        self._sealed: OrderedDict[bytes, SealedBlock] = OrderedDict()
        try:
            self._chain = self._open(genesis_time)
        except BaseException:
            self.database.close()
            raise
        self.head: BlockHeaderAPI = self._chain.get_canonical_head()

    # -- opening ------------------------------------------------------------------------------------------------

    def _open(self, genesis_time: int) -> Chain:
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
            chain = self._create_genesis(chain_type, genesis_time)
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

    def _create_genesis(self, chain_type: type[Chain], genesis_time: int) -> Chain:
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
            "timestamp": genesis_time,
        }
        return cast(Chain, chain_type.from_genesis(self._db, parameters, state))

    def close(self) -> None:
        """Close the database."""
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
            self.keep_sealed(cached)
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

    # -- writing ------------------------------------------------------------------------------------------------

    def store_block(self, block: BlockAPI, overrides: Sequence[AccountOverride]) -> None:
        """Make a block the newest one, in what the next commit writes; `head` stays until then."""
        if overrides:
            self.database[_OVERRIDE_PREFIX + block.header.mix_hash] = encode_overrides(overrides)
        self._chain.chaindb.persist_block(block)
        if block.header.bloom:
            self.database[_bloom_key(block.number)] = block.header.bloom.to_bytes(256, "big")

    def store_clock_offset(self, seconds: int) -> None:
        """Keep by how many seconds chain time differs from the clock."""
        self.database[_CLOCK_KEY] = str(seconds).encode()
        self.database.commit()

    def stored_clock_offset(self) -> int:
        """What `store_clock_offset` kept."""
        return int(self.database[_CLOCK_KEY])

    def set_head(self, target: BlockHeaderAPI) -> tuple[tuple[SealedBlock, ...], tuple[SealedBlock, ...]]:
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

    def keep_sealed(self, sealed: SealedBlock) -> None:
        self._sealed[sealed.header.hash] = sealed
        if len(self._sealed) > _SEALED_CACHE:
            self._sealed.popitem(last=False)


def _bloom_key(number: int) -> bytes:
    return _BLOOM_PREFIX + number.to_bytes(8, "big")
