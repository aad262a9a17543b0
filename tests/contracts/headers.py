"""Block headers for beacon tests."""

from __future__ import annotations

from typing import Any

import rlp


def header(number: int, mix_hash: bytes, **changes: Any) -> bytes:
    """The RLP of a Prague block header; some of its items can be given by name."""
    fields: dict[str, Any] = {
        "parent_hash": b"\x11" * 32,
        "uncles_hash": b"\x22" * 32,
        "coinbase": b"\x33" * 20,
        "state_root": b"\x44" * 32,
        "transactions_root": b"\x55" * 32,
        "receipts_root": b"\x66" * 32,
        "bloom": bytes(256),
        "difficulty": 0,
        "number": number,
        "gas_limit": 60_000_000,
        "gas_used": 21_000,
        "timestamp": 1_800_000_000,
        "extra_data": b"",
        "mix_hash": mix_hash,
        "nonce": bytes(8),
        "base_fee": 7,
        "withdrawals_root": b"\x77" * 32,
        "blob_gas_used": 0,
        "excess_blob_gas": 0,
        "parent_beacon_root": b"\x88" * 32,
        "requests_hash": b"\x99" * 32,
    } | changes
    return bytes(
        rlp.encode([rlp.sedes.big_endian_int.serialize(v) if isinstance(v, int) else v for v in fields.values()])
    )
