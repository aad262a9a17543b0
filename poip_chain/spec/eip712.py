"""EIP-712 hashing for the protocol's signed objects, and signature recovery.

Every signed object is a frozen dataclass whose fields are all of static ABI types, so `encodeData` is plain ABI
encoding. The domain is {name: "PoIP", version: "1", chainId, verifyingContract} (protocol section 2).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from eth_abi.abi import encode
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey, Signature
from eth_keys.exceptions import BadSignature
from eth_utils.address import is_address, to_checksum_address
from eth_utils.exceptions import ValidationError

from poip_chain.errors import InvalidInput, InvalidSignature
from poip_chain.spec.types import Address, Hash32

DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
SECP256K1_N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@dataclass(frozen=True, slots=True)
class Domain:
    """Where a signature is valid: one contract on one chain."""

    chain_id: int
    verifying_contract: Address

    @property
    def separator(self) -> Hash32:
        """The EIP-712 domain separator, 32 bytes."""
        return _separator(self.chain_id, self.verifying_contract)


@cache
def _separator(chain_id: int, contract: Address) -> Hash32:
    return Hash32(
        keccak(
            encode(
                ["bytes32", "bytes32", "bytes32", "uint256", "address"],
                [keccak(DOMAIN_TYPE.encode()), keccak(b"PoIP"), keccak(b"1"), chain_id, contract],
            )
        )
    )


@dataclass(frozen=True)
class TypedStruct:
    """Base of signed objects. A subclass lists `ABI`: field name -> static ABI type, in the order of its fields.

    Construction checks every value against its type, so a TypedStruct that exists can be hashed.
    Raises InvalidInput for a value out of range or of the wrong kind.
    """

    ABI: ClassVar[dict[str, str]]

    def __post_init__(self) -> None:
        for name, abi_type in self.ABI.items():
            object.__setattr__(self, name, checked(abi_type, getattr(self, name), f"{type(self).__name__}.{name}"))

    @classmethod
    def type_string(cls) -> str:
        """`Name(type field,...)` as EIP-712 encodes it."""
        return f"{cls.__name__}({','.join(f'{abi_type} {name}' for name, abi_type in cls.ABI.items())})"

    @classmethod
    def type_hash(cls) -> Hash32:
        """keccak of the type string."""
        return Hash32(keccak(cls.type_string().encode()))

    def values(self) -> tuple[Any, ...]:
        """The field values in order, as the contracts take the struct."""
        return tuple(getattr(self, name) for name in self.ABI)

    def struct_hash(self) -> Hash32:
        """EIP-712 hashStruct, 32 bytes."""
        return Hash32(keccak(self.type_hash() + encode(list(self.ABI.values()), list(self.values()))))

    def digest(self, domain: Domain) -> Hash32:
        """What is signed: keccak(0x1901 || domain separator || hashStruct)."""
        return Hash32(keccak(b"\x19\x01" + domain.separator + self.struct_hash()))

    def sign(self, domain: Domain, private_key: PrivateKey) -> bytes:
        """A 65-byte signature r || s || v with low s and v in {27, 28}."""
        signature = private_key.sign_msg_hash(self.digest(domain))
        return signature.to_bytes()[:64] + bytes([27 + signature.v])

    def recover(self, domain: Domain, signature: bytes) -> Address:
        """The address that signed. Raises InvalidSignature if the signature is malformed or not canonical."""
        return recover(self.digest(domain), signature)

    def to_json(self) -> dict[str, Any]:
        """JSON form: hashes and bytes as 0x-hex, amounts (over 64 bits) as decimal strings, small ints as ints."""
        return {name: _to_json(abi_type, getattr(self, name)) for name, abi_type in self.ABI.items()}

    @classmethod
    def from_json(cls, data: Any) -> Any:
        """Parse `to_json`'s form. Raises InvalidInput on a missing, unknown or malformed field."""
        if not isinstance(data, dict):
            raise InvalidInput(f"{cls.__name__} must be a JSON object, not {type(data).__name__}.")
        unknown, missing = sorted(set(data) - set(cls.ABI)), sorted(set(cls.ABI) - set(data))
        if unknown or missing:
            raise InvalidInput(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}.")
        return cls(**{n: _from_json(t, data[n], f"{cls.__name__}.{n}") for n, t in cls.ABI.items()})

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def recover(digest: bytes, signature: bytes) -> Address:
    """The address whose key signed `digest`. Low s and v in {27, 28} only, so each signature has one form (EIP-2).

    Raises InvalidSignature if the signature is malformed, not canonical, or recovers to nothing.
    """
    if len(signature) != 65:
        raise InvalidSignature(f"a signature is 65 bytes (r, s, v), not {len(signature)}.")
    r, s, v = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big"), signature[64]
    if v not in (27, 28) or not 0 < s <= SECP256K1_N // 2:
        raise InvalidSignature("a signature must have v of 27 or 28 and a low s (EIP-2).")
    try:
        public_key = Signature(vrs=(v - 27, r, s)).recover_public_key_from_msg_hash(digest)
    except (BadSignature, ValidationError) as error:
        raise InvalidSignature("the signature recovers to no key.") from error
    return Address(public_key.to_checksum_address())


def checked(abi_type: str, value: Any, name: str) -> Any:
    """`value` in its plain Python form if it fits the static ABI type. Raises InvalidInput if it does not."""
    if abi_type == "address":
        if not isinstance(value, str) or not is_address(value):
            raise InvalidInput(f"{name} must be an address, not {value!r}.")
        return Address(to_checksum_address(value))
    if abi_type == "bytes32":
        if not isinstance(value, bytes) or len(value) != 32:
            raise InvalidInput(f"{name} must be 32 bytes, not {value!r}.")
        return bytes(value)
    if abi_type == "bool":
        if not isinstance(value, bool):
            raise InvalidInput(f"{name} must be true or false, not {value!r}.")
        return value
    bits = int(abi_type.removeprefix("uint"))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**bits:
        raise InvalidInput(f"{name} must be an integer from 0 to 2**{bits} - 1, not {value!r}.")
    return value


def _to_json(abi_type: str, value: Any) -> Any:
    if abi_type == "bytes32":
        return "0x" + value.hex()
    if abi_type.startswith("uint") and int(abi_type[4:]) > 64:
        return str(value)
    return value


def _from_json(abi_type: str, value: Any, name: str) -> Any:
    if abi_type == "bytes32":
        return parse_hex(value, name, 32)
    if abi_type.startswith("uint") and int(abi_type[4:]) > 64:
        # 80 digits hold 2**256; longer strings would cost quadratic time to parse.
        if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 80:
            raise InvalidInput(f"{name} must be a decimal string, not {value!r:.60}.")
        return int(value)
    return value


def parse_hex(value: Any, name: str, length: int | None = None) -> bytes:
    """The bytes of a 0x-hex string, of exactly `length` bytes if given. Raises InvalidInput."""
    if not isinstance(value, str) or not value.startswith("0x") or len(value) % 2:
        raise InvalidInput(f"{name} must be 0x-prefixed hex, not {value!r:.60}.")
    if length is not None and len(value) != 2 + 2 * length:
        raise InvalidInput(f"{name} must be {length} bytes of hex, not {len(value) // 2 - 1}.")
    try:
        return bytes.fromhex(value[2:])
    except ValueError as error:
        raise InvalidInput(f"{name} must be 0x-prefixed hex, not {value!r:.60}.") from error
