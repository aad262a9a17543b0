"""Reading JSON-RPC parameters: every malformed or oversized value is refused with its name. Knows no chain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eth_bloom.bloom import BloomFilter
from eth_utils.address import to_checksum_address

from poip_chain.chain.devnet.errors import InvalidParams
from poip_chain.chain.devnet.overrides import AccountOverride

UINT256 = 2**256 - 1
MAX_TOPICS = 4
MAX_FILTER_ALTERNATIVES = 1_000
_HEX = re.compile(r"0x[0-9a-fA-F]*\Z")
_TAGS = frozenset({"latest", "pending", "earliest", "safe", "finalized"})


def quantity(value: object, name: str, *, most: int = UINT256) -> int:
    """An unsigned number: 0x hex, or a JSON integer as many clients send to the evm_ methods."""
    if isinstance(value, str) and len(value) <= 66 and len(value) > 2 and _HEX.match(value):
        number = int(value, 16)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    else:
        raise InvalidParams(f"{name} must be a number as 0x hex, not {_shown(value)}")
    if not 0 <= number <= most:
        raise InvalidParams(f"{name} must be between 0 and {most}, not {number}")
    return number


def data(value: object, name: str, *, length: int | None = None) -> bytes:
    """Bytes as 0x hex with an even number of digits."""
    if not isinstance(value, str) or len(value) % 2 or not _HEX.match(value):
        raise InvalidParams(f"{name} must be bytes as 0x hex with an even number of digits, not {_shown(value)}")
    decoded = bytes.fromhex(value[2:])
    if length is not None and len(decoded) != length:
        raise InvalidParams(f"{name} must be {length} bytes, not {len(decoded)}")
    return decoded


def address(value: object, name: str) -> bytes:
    """Twenty bytes; the checksum's capitals are not checked."""
    return data(value, name, length=20)


def flag(value: object, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise InvalidParams(f"{name} must be true or false, not {_shown(value)}")
    return value


def mapping(value: object, name: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise InvalidParams(f"{name} must be an object, not {_shown(value)}")
    return value


def sequence(value: object, name: str, *, most: int) -> Sequence[Any]:
    """A JSON array of at most `most` items."""
    if not isinstance(value, list):
        raise InvalidParams(f"{name} must be an array, not {_shown(value)}")
    if len(value) > most:
        raise InvalidParams(f"{name} has {len(value)} items; at most {most} are taken")
    return value


BlockReference = int | bytes | str
"""A number, a hash, or one of the tags."""


def block_reference(value: object, name: str = "block") -> BlockReference:
    """A tag, a number, a hash, or an object with blockNumber or blockHash (EIP-1898). Missing means `latest`."""
    if value is None:
        return "latest"
    if isinstance(value, dict):
        if ("blockHash" in value) == ("blockNumber" in value):
            raise InvalidParams(f"{name} must have either blockHash or blockNumber")
        if "blockHash" in value:
            return data(value["blockHash"], f"{name}.blockHash", length=32)
        return block_reference(value["blockNumber"], f"{name}.blockNumber")
    if isinstance(value, str) and value in _TAGS:
        return value
    if isinstance(value, str) and len(value) == 66:
        return data(value, name, length=32)
    return quantity(value, name, most=2**63)


@dataclass(frozen=True, slots=True)
class CallRequest:
    """A transaction that nobody signed. Fees in wei per gas, None where the caller gave none; `to` empty creates."""

    sender: bytes
    to: bytes
    value: int
    data: bytes
    gas: int | None
    nonce: int | None
    legacy_price: int | None
    max_fee: int | None
    priority_fee: int | None
    access_list: tuple[tuple[bytes, tuple[int, ...]], ...]


def call_request(value: object, name: str = "transaction") -> CallRequest:
    """The first parameter of eth_call, eth_estimateGas and eth_sendTransaction."""
    fields = mapping(value, name)

    def optional(key: str) -> int | None:
        return None if fields.get(key) is None else quantity(fields[key], f"{name}.{key}")

    payload, other = fields.get("data"), fields.get("input")
    if payload is not None and other is not None and payload != other:
        raise InvalidParams(f"{name}.data and {name}.input differ; give one of them")
    payload = other if payload is None else payload
    legacy, max_fee, priority = optional("gasPrice"), optional("maxFeePerGas"), optional("maxPriorityFeePerGas")
    if legacy is not None and (max_fee is not None or priority is not None):
        raise InvalidParams(f"{name} has both gasPrice and maxFeePerGas or maxPriorityFeePerGas")
    return CallRequest(
        sender=bytes(20) if fields.get("from") is None else address(fields["from"], f"{name}.from"),
        to=b"" if fields.get("to") is None else address(fields["to"], f"{name}.to"),
        value=optional("value") or 0,
        data=b"" if payload is None else data(payload, f"{name}.data"),
        gas=optional("gas"),
        nonce=optional("nonce"),
        legacy_price=legacy,
        max_fee=max_fee,
        priority_fee=priority,
        access_list=tuple(
            (
                address(mapping(entry, f"{name}.accessList").get("address"), f"{name}.accessList.address"),
                tuple(
                    int.from_bytes(data(key, f"{name}.accessList.storageKeys", length=32), "big")
                    for key in sequence(entry.get("storageKeys"), f"{name}.accessList.storageKeys", most=10_000)
                ),
            )
            for entry in sequence(fields.get("accessList") or [], f"{name}.accessList", most=10_000)
        ),
    )


def state_overrides(value: object) -> tuple[AccountOverride, ...]:
    """The third parameter of eth_call: accounts as they should be for this call."""
    if value is None:
        return ()
    overrides = []
    for key, item in mapping(value, "state overrides").items():
        fields = mapping(item, f"state override of {key[:50]}")
        if "state" in fields and "stateDiff" in fields:
            raise InvalidParams("a state override has either state or stateDiff, not both")
        slots = mapping(fields.get("state", fields.get("stateDiff")) or {}, "state override's storage")
        overrides.append(
            AccountOverride(
                address=address(key, "state override's address"),
                balance=None if fields.get("balance") is None else quantity(fields["balance"], "balance"),
                nonce=None if fields.get("nonce") is None else quantity(fields["nonce"], "nonce", most=2**64 - 2),
                code=None if fields.get("code") is None else data(fields["code"], "code"),
                storage={
                    quantity(slot, "storage slot"): quantity(word, "storage value") for slot, word in slots.items()
                },
                replaces_storage="state" in fields,
            )
        )
    return tuple(overrides)


@dataclass(frozen=True, slots=True)
class LogCriteria:
    """Which logs are wanted. No addresses: any; topic position None: anything; else one of the alternatives."""

    addresses: frozenset[bytes]
    topics: tuple[frozenset[int] | None, ...]

    def may_be_in(self, bloom: int) -> bool:
        """Whether a block or receipt with this bloom filter may hold such a log. No false negatives."""
        filled = BloomFilter(bloom)
        if self.addresses and not any(item in filled for item in self.addresses):
            return False
        return all(
            wanted is None or any(topic.to_bytes(32, "big") in filled for topic in wanted) for wanted in self.topics
        )

    def match(self, emitter: bytes, topics: Sequence[int]) -> bool:
        """Whether a log is one of those wanted."""
        if self.addresses and emitter not in self.addresses:
            return False
        if len(self.topics) > len(topics):
            return False
        return all(wanted is None or topic in wanted for wanted, topic in zip(self.topics, topics, strict=False))


def log_criteria(value: Mapping[str, Any]) -> LogCriteria:
    """The `address` and `topics` members of a log filter."""
    given = value.get("address")
    listed = [] if given is None else given if isinstance(given, list) else [given]
    topics: list[frozenset[int] | None] = []
    for wanted in sequence(value.get("topics") or [], "topics", most=MAX_TOPICS):
        if wanted is None or wanted == []:
            topics.append(None)
            continue
        choices = sequence(wanted if isinstance(wanted, list) else [wanted], "topics", most=MAX_FILTER_ALTERNATIVES)
        if None in choices:
            topics.append(None)
        else:
            topics.append(frozenset(int.from_bytes(data(item, "topic", length=32), "big") for item in choices))
    return LogCriteria(
        frozenset(address(item, "address") for item in sequence(listed, "address", most=MAX_FILTER_ALTERNATIVES)),
        tuple(topics),
    )


def shown_address(raw: bytes) -> str:
    """An address as JSON shows it, with checksum capitals (EIP-55)."""
    return str(to_checksum_address(raw))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
