"""The Prague machine as the devnet runs it: who pays for a call, which opcode made it, how a block begins.

Knows py-evm; knows no storage, pool or JSON-RPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from eth.abc import (
    BlockHeaderAPI,
    ComputationAPI,
    MessageAPI,
    SignedTransactionAPI,
    StateAPI,
    UnsignedTransactionAPI,
)
from eth.chains.base import Chain
from eth.constants import ZERO_ADDRESS
from eth.vm.forks.prague import PragueVM
from eth.vm.forks.prague.computation import PragueComputation
from eth.vm.forks.prague.constants import STANDARD_TOKEN_COST, TOTAL_COST_FLOOR_PER_TOKEN
from eth.vm.forks.prague.state import PragueState
from eth_typing import BlockNumber

BASE_TRANSACTION_GAS = 21_000


class TracedComputation(PragueComputation):
    """Remembers with each nested call which opcode made it: the call tree is a trace without a second execution."""

    opcode: int | None = None

    def generate_child_computation(self, child_msg: MessageAPI) -> ComputationAPI:
        # The counter already stands behind the opcode that is being executed.
        opcode = self.code[self.code.program_counter - 1]
        child = super().generate_child_computation(child_msg)
        cast(TracedComputation, child).opcode = opcode
        return child


class DevnetState(PragueState):
    computation_class = TracedComputation

    def set_system_contracts(self) -> None:
        """Nothing: the genesis has them. py-evm would read their code again for every state that is looked at."""


class DevnetVM(PragueVM):
    _state_class = DevnetState


def next_header(parent: BlockHeaderAPI, *, timestamp: int, mix_hash: bytes) -> BlockHeaderAPI:
    """The header of a block after `parent`, before any transaction; mix_hash is what PREVRANDAO gives (EIP-4399)."""
    header = DevnetVM.create_header_from_parent(
        parent,
        timestamp=timestamp,
        # Without it py-evm lets the limit drift towards what blocks use.
        gas_limit=parent.gas_limit,
        coinbase=ZERO_ADDRESS,
    )
    return cast(BlockHeaderAPI, header.copy(mix_hash=mix_hash))


def begin_block(vm: DevnetVM) -> None:
    """What happens before the first transaction: the parent's hash goes into the history contract (EIP-2935)."""
    vm.block_preprocessing(vm.get_block())


def minimum_gas(transaction: SignedTransactionAPI | UnsignedTransactionAPI) -> int:
    """The least gas limit that makes a transaction valid: intrinsic gas, or the calldata floor (EIP-7623)."""
    zeros = transaction.data.count(0)
    tokens = zeros + (len(transaction.data) - zeros) * STANDARD_TOKEN_COST
    floor = BASE_TRANSACTION_GAS + TOTAL_COST_FLOOR_PER_TOKEN * tokens
    creation = 0
    if not transaction.to:
        creation = 2 * ((len(transaction.data) + 31) // 32)  # EIP-3860: py-evm takes it during execution
    return max(transaction.intrinsic_gas + creation, floor)


class Simulation:
    """One execution of an unsigned call on a state of its own; nothing of it is ever stored.

    vm           a machine built for this execution only, at the header whose block the call sees.
    sender       need not have signed anything; pays only if max_fee > 0.
    """

    def __init__(
        self,
        vm: DevnetVM,
        *,
        sender: bytes,
        to: bytes,
        value: int,
        data: bytes,
        gas: int,
        max_fee: int,
        priority_fee: int,
        access_list: Sequence[tuple[bytes, Sequence[int]]],
    ) -> None:
        state = vm.state
        if max_fee == 0:
            # A call that pays nothing would be refused as below the base fee. Geth shows it a base fee of 0, too.
            state.execution_context._base_fee_per_gas = 0  # type: ignore[attr-defined]
        unsigned = vm.get_transaction_builder().new_unsigned_dynamic_fee_transaction(  # type: ignore[attr-defined]
            vm.chain_context.chain_id,
            state.get_nonce(cast(Any, sender)),
            priority_fee,
            max_fee,
            gas,
            to,
            value,
            data,
            tuple((address, tuple(slots)) for address, slots in access_list),
        )
        self._state: StateAPI = state
        self._vm = vm
        self.transaction = cast(SignedTransactionAPI, UnsignedCall(unsigned, sender))

    def run(self) -> ComputationAPI:
        """Execute. Raises eth_utils.ValidationError where no block could hold the transaction."""
        return self._state.apply_transaction(self.transaction)

    def gas_used(self, computation: ComputationAPI) -> int:
        """What a receipt would show: intrinsic gas included, refunds taken off."""
        return self._vm.finalize_gas_used(self.transaction, computation)


class UnsignedCall:
    """An unsigned transaction that answers as a signed one of the given sender would."""

    type_id = 2
    y_parity = 1
    r = 1
    s = 1

    def __init__(self, unsigned: UnsignedTransactionAPI, sender: bytes) -> None:
        self._unsigned = unsigned
        self.sender = sender

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unsigned, name)


def chain_class(identifier: int) -> type[Chain]:
    """A py-evm chain that follows Prague rules from its genesis on."""

    class DevnetChain(Chain):
        chain_id = identifier
        vm_configuration = ((BlockNumber(0), DevnetVM),)

    return DevnetChain
