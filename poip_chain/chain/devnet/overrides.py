"""Accounts set by hand: for one simulated call, or from one block on. Knows the state interface only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from eth.abc import StateAPI
from eth_typing import Address


@dataclass(frozen=True, slots=True)
class AccountOverride:
    """What an account gets; None leaves as it is. balance in wei, storage slot -> value (both 256 bits)."""

    address: bytes
    balance: int | None = None
    nonce: int | None = None
    code: bytes | None = None
    storage: Mapping[int, int] = field(default_factory=dict)
    replaces_storage: bool = False


def apply_overrides(state: StateAPI, overrides: Sequence[AccountOverride]) -> None:
    """Change a state as told."""
    for override in overrides:
        address = cast(Address, override.address)
        if override.balance is not None:
            state.set_balance(address, override.balance)
        if override.nonce is not None:
            state.set_nonce(address, override.nonce)
        if override.code is not None:
            state.set_code(address, override.code)
        if override.replaces_storage:
            state.delete_storage(address)
        for slot, value in override.storage.items():
            state.set_storage(address, slot, value)
    state.lock_changes()


def encode_overrides(overrides: Sequence[AccountOverride]) -> bytes:
    """Bytes for the database."""
    return json.dumps(
        [
            {
                "address": item.address.hex(),
                "balance": item.balance,
                "nonce": item.nonce,
                "code": None if item.code is None else item.code.hex(),
                "storage": [[slot, value] for slot, value in item.storage.items()],
                "replaces_storage": item.replaces_storage,
            }
            for item in overrides
        ]
    ).encode()


def decode_overrides(encoded: bytes) -> tuple[AccountOverride, ...]:
    """The inverse of `encode_overrides`."""
    return tuple(
        AccountOverride(
            address=bytes.fromhex(item["address"]),
            balance=item["balance"],
            nonce=item["nonce"],
            code=None if item["code"] is None else bytes.fromhex(item["code"]),
            storage={slot: value for slot, value in item["storage"]},
            replaces_storage=item["replaces_storage"],
        )
        for item in json.loads(encoded)
    )
