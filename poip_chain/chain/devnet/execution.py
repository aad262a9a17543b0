"""Calls, gas estimates and traces: executing without sealing anything. Knows no transport.

Each execution has a machine of its own on a state that no longer changes, so it holds the chain's lock only while it
looks up its block: a call that runs for seconds does not stop the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eth.abc import BlockHeaderAPI, ComputationAPI, SignedTransactionAPI
from eth.exceptions import OutOfGas, Revert
from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from eth_utils.exceptions import ValidationError

from poip_chain.chain.devnet.chain import MAX_REORG_DEPTH, SAFE_DEPTH, Devnet
from poip_chain.chain.devnet.errors import ExecutionReverted, InvalidInput, ResourceNotFound
from poip_chain.chain.devnet.ledger import SealedBlock
from poip_chain.chain.devnet.overrides import AccountOverride, apply_overrides
from poip_chain.chain.devnet.params import BlockReference, CallRequest, shown_address
from poip_chain.chain.devnet.views import hex_bytes
from poip_chain.chain.devnet.vm import BASE_TRANSACTION_GAS, DevnetVM, Simulation, TracedComputation, minimum_gas

_ERROR_SELECTOR = bytes.fromhex("08c379a0")
_PANIC_SELECTOR = bytes.fromhex("4e487b71")
_CALL_STIPEND = 2_300
ESTIMATE_TOLERANCE = 0.015
"""An estimate may exceed the least sufficient gas by this share: it saves half of the executions."""

_CALL_NAMES = {
    0xF0: "CREATE",
    0xF1: "CALL",
    0xF2: "CALLCODE",
    0xF4: "DELEGATECALL",
    0xF5: "CREATE2",
    0xFA: "STATICCALL",
}


def call(
    devnet: Devnet, request: CallRequest, block: BlockReference, overrides: Sequence[AccountOverride] = ()
) -> bytes:
    """What a call returns on the state after a block. Raises ExecutionReverted, InvalidInput."""
    simulation = _prepare(devnet, resolve(devnet, block), request, overrides, request.gas)
    computation = _run(simulation)
    if computation.is_error:
        raise failure(computation)
    return bytes(computation.output)


def estimate(
    devnet: Devnet, request: CallRequest, block: BlockReference, overrides: Sequence[AccountOverride] = ()
) -> int:
    """A gas limit with which the transaction succeeds, by search: what it uses is not enough where a call may pass
    on only 63/64 of its gas (EIP-150) or refunds come at the end. Raises ExecutionReverted, InvalidInput.
    """
    view = resolve(devnet, block)
    header = view[0]
    state = devnet.machine_after(header).state
    if request.to and not request.data and not overrides and not state.get_code(request.to):  # type: ignore[arg-type]
        highest = BASE_TRANSACTION_GAS
    else:
        highest = request.gas if request.gas is not None else header.gas_limit
    highest = min(highest, header.gas_limit)
    price = request.max_fee or request.legacy_price or 0
    if price:
        affordable = max(0, state.get_balance(request.sender) - request.value) // price  # type: ignore[arg-type]
        highest = min(highest, affordable)

    def attempt(gas: int) -> tuple[Simulation, ComputationAPI | None]:
        simulation = _prepare(devnet, view, request, overrides, gas)
        if gas < minimum_gas(simulation.transaction):
            return simulation, None
        return simulation, _run(simulation)

    simulation, computation = attempt(highest)
    if computation is None:
        raise InvalidInput(
            f"gas required exceeds allowance: {highest} allowed, {minimum_gas(simulation.transaction)} needed"
        )
    if computation.is_error:
        if isinstance(computation.error, OutOfGas):
            raise InvalidInput(f"gas required exceeds allowance: all of {highest} was used up")
        raise failure(computation)
    used = simulation.gas_used(computation)
    lowest = used - 1
    for likely in (used, (used + computation.get_gas_refund() + _CALL_STIPEND) * 64 // 63):
        if likely < highest:
            _, tried = attempt(likely)
            if tried is not None and not tried.is_error:
                highest = likely
                break
            lowest = likely
    while lowest + 1 < highest and (highest - lowest) / highest >= ESTIMATE_TOLERANCE:
        middle = min((lowest + highest) // 2, lowest * 2)
        _, tried = attempt(middle)
        if tried is None or tried.is_error:
            lowest = middle
        else:
            highest = middle
    return highest


def resolve(devnet: Devnet, block: BlockReference) -> tuple[BlockHeaderAPI, bool]:
    """The header that a reference names, and whether the block after it was meant (`pending`)."""
    with devnet.lock:
        return header_of(devnet, block), block == "pending"


def header_of(devnet: Devnet, block: BlockReference) -> BlockHeaderAPI:
    """The header that a reference names; `pending` gives the newest. Raises ResourceNotFound. Needs the lock."""
    if isinstance(block, bytes):
        return devnet.header_by_hash(block)
    if isinstance(block, int):
        return devnet.header_by_number(block)
    if block in ("latest", "pending"):
        return devnet.head
    depth = {"safe": SAFE_DEPTH, "finalized": MAX_REORG_DEPTH}.get(block, devnet.head.block_number)
    return devnet.header_by_number(max(0, devnet.head.block_number - depth))


def failure(computation: ComputationAPI) -> ExecutionReverted | InvalidInput:
    """The error of a failed execution: the contract's words where it gave some."""
    if not isinstance(computation.error, Revert):
        return InvalidInput(f"execution failed: {_error_name(computation)}")
    output = bytes(computation.output)
    reason = revert_reason(output)
    message = "execution reverted" if reason is None else f"execution reverted: {reason}"
    return ExecutionReverted(message, data=hex_bytes(output))


def revert_reason(output: bytes) -> str | None:
    """The text in `Error(string)` or `Panic(uint256)` return data; None for any other."""
    try:
        if output[:4] == _ERROR_SELECTOR:
            return str(abi_decode(["string"], output[4:])[0])
        if output[:4] == _PANIC_SELECTOR:
            return f"panic code 0x{abi_decode(['uint256'], output[4:])[0]:02x}"
    except (DecodingError, UnicodeDecodeError, OverflowError):
        return None
    return None


def trace_transaction(devnet: Devnet, sealed: SealedBlock, index: int, *, only_top: bool) -> dict[str, Any]:
    """The tree of calls of a sealed transaction (`callTracer`), by replaying its block up to it."""
    with devnet.lock:
        vm = devnet.machine_for_replay(sealed.header)
    for earlier in sealed.transactions[:index]:
        vm.state.lock_changes()
        vm.state.apply_transaction(earlier)
    vm.state.lock_changes()
    transaction = sealed.transactions[index]
    computation = vm.state.apply_transaction(transaction)
    return _top_frame(computation, transaction, vm.finalize_gas_used(transaction, computation), only_top)


def trace_call(
    devnet: Devnet,
    request: CallRequest,
    block: BlockReference,
    overrides: Sequence[AccountOverride] = (),
    *,
    only_top: bool,
) -> dict[str, Any]:
    """The tree of calls of a call that nobody signed."""
    simulation = _prepare(devnet, resolve(devnet, block), request, overrides, request.gas)
    computation = _run(simulation)
    return _top_frame(computation, simulation.transaction, simulation.gas_used(computation), only_top)


def _prepare(
    devnet: Devnet,
    view: tuple[BlockHeaderAPI, bool],
    request: CallRequest,
    overrides: Sequence[AccountOverride],
    gas: int | None,
) -> Simulation:
    header, pending = view
    vm: DevnetVM = devnet.machine_for_next() if pending else devnet.machine_after(header)
    if overrides:
        apply_overrides(vm.state, overrides)
    if request.legacy_price is not None:
        max_fee = priority = request.legacy_price
    else:
        max_fee = request.max_fee or 0
        priority = min(request.priority_fee or 0, max_fee)
    return Simulation(
        vm,
        sender=request.sender,
        to=request.to,
        value=request.value,
        data=request.data,
        gas=min(header.gas_limit if gas is None else gas, header.gas_limit),
        max_fee=max_fee,
        priority_fee=priority,
        access_list=request.access_list,
    )


def _run(simulation: Simulation) -> ComputationAPI:
    try:
        return simulation.run()
    except ValidationError as error:
        raise InvalidInput(f"the call is not possible: {error}") from error
    except KeyError as error:
        raise ResourceNotFound("the state of this block is not stored") from error


def _top_frame(
    computation: ComputationAPI, transaction: SignedTransactionAPI, used: int, only_top: bool
) -> dict[str, Any]:
    frame = _frame(computation, "CREATE" if computation.msg.is_create else "CALL", only_top)
    frame.update(gas=hex(transaction.gas), gasUsed=hex(used))
    return frame


def _frame(computation: ComputationAPI, kind: str, only_top: bool) -> dict[str, Any]:
    message = computation.msg
    to = message.storage_address if message.is_create else message.code_address or message.to
    frame: dict[str, Any] = {
        "type": kind,
        # What a DELEGATECALL runs as is the account that made it; its own sender is that account's caller.
        "from": shown_address(message.storage_address if kind in ("DELEGATECALL", "CALLCODE") else message.sender),
        "to": shown_address(to),
        "gas": hex(message.gas),
        "gasUsed": hex(message.gas - computation.get_gas_remaining()),
        "input": hex_bytes(message.code if message.is_create else bytes(message.data)),
    }
    if kind != "STATICCALL":
        frame["value"] = hex(message.value)
    if computation.output:
        frame["output"] = hex_bytes(computation.output)
    if computation.is_error:
        frame["error"] = _error_name(computation)
        if isinstance(computation.error, Revert):
            reason = revert_reason(bytes(computation.output))
            if reason is not None:
                frame["revertReason"] = reason
    if computation.children and not only_top:
        frame["calls"] = [
            _frame(child, _CALL_NAMES.get(_opcode(child), "CALL"), only_top) for child in computation.children
        ]
    return frame


def _opcode(computation: ComputationAPI) -> int:
    opcode = computation.opcode if isinstance(computation, TracedComputation) else None
    return -1 if opcode is None else opcode


def _error_name(computation: ComputationAPI) -> str:
    error = computation.error
    if isinstance(error, Revert):
        return "execution reverted"
    if isinstance(error, OutOfGas):
        return "out of gas"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
