"""EIP-1559 transactions: what they may cost, and their signed bytes. No storage and no sending here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import rlp
from eth_utils.crypto import keccak

from poip_chain.chain.keys import Key
from poip_chain.chain.rpc import Call, Chain
from poip_chain.errors import Refused
from poip_chain.spec.types import Address

GWEI = 10**9
_TRANSACTION_TYPE = b"\x02"


@dataclass(frozen=True, slots=True)
class Fees:
    """EIP-1559 prices in wei per gas: the most in all, and the block producer's share of it."""

    max_fee: int
    tip: int


@dataclass(frozen=True, slots=True)
class FeePolicy:
    """How much may be paid for gas. `max_fee` bounds the price for ever, bumps included (wei per gas).

    A transaction that is not mined `bump_after` seconds after it was sent is replaced at a price at least 12.5 %
    higher, at most `max_bumps` times. The gas limit is the estimate plus a fifth plus `gas_margin`.
    """

    max_fee: int = 500 * GWEI
    bump_after: float = 20.0
    max_bumps: int = 6
    gas_margin: int = 20_000

    def current(self, chain: Chain) -> Fees:
        """Prices for a transaction sent now: covers two blocks' worth of a doubling base fee.

        Raises Refused if the chain asks for more than `max_fee`.
        """
        base = chain.block("latest").base_fee
        tip = chain.tip()
        if base + tip > self.max_fee:
            raise Refused(
                f"gas costs {base + tip} wei per gas now, above the bound of {self.max_fee}.",
                hint="Wait, or raise the bound on the gas price.",
            )
        return Fees(min(2 * base + tip, self.max_fee), tip)

    def bumped(self, old: Fees, current: Fees) -> Fees | None:
        """The prices of a replacement: both at least 12.5 % up (what mempools ask), None if that breaks the bound."""
        new = Fees(max(_raised(old.max_fee), current.max_fee), max(_raised(old.tip), current.tip))
        return new if new.max_fee <= self.max_fee else None

    def gas_limit(self, estimate: int) -> int:
        """The gas limit for an estimated use."""
        return estimate + estimate // 5 + self.gas_margin


def _raised(price: int) -> int:
    return price + price // 8 + 1


@dataclass(frozen=True, slots=True)
class Preview:
    """What a transaction would be. Nothing has been sent."""

    call: Call
    sender: Address
    gas: int
    fees: Fees

    @property
    def most(self) -> int:
        """The most that it can take from the sender's balance of the chain's own coin, wei."""
        return self.call.value + self.gas * self.fees.max_fee

    def to_json(self) -> dict[str, object]:
        """For people and scripts: the call data, the gas and its highest cost (amounts as decimal strings)."""
        return {
            "description": self.call.description,
            "from": self.sender,
            "to": self.call.to,
            "data": "0x" + self.call.data.hex(),
            "value": str(self.call.value),
            "gas": self.gas,
            "max_fee_per_gas": str(self.fees.max_fee),
            "highest_cost": str(self.most),
        }


def sign_transaction(key: Key, chain_id: int, call: Call, nonce: int, gas: int, fees: Fees) -> bytes:
    """The signed bytes of an EIP-1559 transaction (EIP-2718 type 2), ready for eth_sendRawTransaction."""
    to = bytes.fromhex(call.to[2:]) if call.to is not None else b""
    fields: list[object] = [chain_id, nonce, fees.tip, fees.max_fee, gas, to, call.value, call.data, []]
    signature = key.private_key.sign_msg_hash(keccak(_TRANSACTION_TYPE + cast(bytes, rlp.encode(fields))))
    return _TRANSACTION_TYPE + cast(bytes, rlp.encode([*fields, signature.v, signature.r, signature.s]))


def created_address(sender: Address, nonce: int) -> Address:
    """The address of the contract that the sender's transaction `nonce` creates."""
    from eth_utils.address import to_checksum_address

    digest = keccak(cast(bytes, rlp.encode([bytes.fromhex(sender[2:]), nonce])))
    return Address(to_checksum_address(digest[12:]))
