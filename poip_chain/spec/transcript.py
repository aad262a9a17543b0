"""Transcripts: what was asked and answered, leaf by leaf (protocol section 3).

    transcript_root = keccak(0x02 || header_hash || prompt_root || output_ids_root || fingerprint_root)
    header_hash     = keccak(abi.encode(request_hash, finish_reason, engine_statement_hash))

Token ids are little-endian uint32, 32 a leaf, the last leaf unpadded. A fingerprint of one position is 8 entries of
(uint32 token id, int16 value), little-endian, 48 bytes; 8 positions a leaf. All counts follow from request and
receipt; none is supplied with the transcript.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec.eip712 import parse_hex
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import FinishReason, Part
from poip_chain.spec.types import Hash32

IDS_PER_LEAF = 32
POSITIONS_PER_LEAF = 8
ENTRIES_PER_POSITION = 8
ENTRY_BYTES = 6
POSITION_BYTES = ENTRIES_PER_POSITION * ENTRY_BYTES
MAX_STATEMENT_BYTES = 256

FingerprintEntry = tuple[int, int]
"""(token id, stated logit minus the chosen token's logit in 1/64 nat, saturated to int16)."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """The full record of one answer, kept by node and client.

    fingerprints: per output position 8 (token id, value) entries, ordered by value descending then id ascending, ids
    distinct, the chosen token excluded. engine_statement: free text, at most 256 bytes of UTF-8.
    """

    request_hash: bytes
    finish_reason: int
    engine_statement: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    fingerprints: tuple[tuple[FingerprintEntry, ...], ...]

    def header_hash(self) -> Hash32:
        """See the module's docstring."""
        return header_hash(self.request_hash, self.finish_reason, statement_hash(self.engine_statement))

    def leaves(self, part: Part) -> list[bytes]:
        """The leaves of one part in order."""
        if part is Part.PROMPT:
            return id_leaves(self.prompt_ids)
        if part is Part.OUTPUT:
            return id_leaves(self.output_ids)
        return fingerprint_leaves(self.fingerprints)

    def part_roots(self) -> tuple[Hash32, Hash32, Hash32]:
        """prompt_root, output_ids_root, fingerprint_root."""
        return tuple(merkle_root(self.leaves(part)) for part in Part)  # type: ignore[return-value]

    def root(self) -> Hash32:
        """The transcript_root of the receipt."""
        return transcript_root(self.header_hash(), *self.part_roots())

    def to_json(self) -> dict[str, Any]:
        """JSON form; fingerprints as one 0x-hex string of their leaves' bytes."""
        return {
            "request_hash": "0x" + self.request_hash.hex(),
            "finish_reason": FinishReason(self.finish_reason).name.lower(),
            "engine_statement": self.engine_statement,
            "prompt_ids": list(self.prompt_ids),
            "output_ids": list(self.output_ids),
            "fingerprints": "0x" + b"".join(fingerprint_leaves(self.fingerprints)).hex(),
        }

    @classmethod
    def from_json(cls, data: Any) -> Transcript:
        """Parse `to_json`'s form. Raises InvalidInput on any malformed field; sizes are the caller's to bound."""
        fields = {
            "request_hash",
            "finish_reason",
            "engine_statement",
            "prompt_ids",
            "output_ids",
            "fingerprints",
        }
        if not isinstance(data, dict) or set(data) != fields:
            raise InvalidInput(f"a transcript must be a JSON object with exactly the fields {sorted(fields)}.")
        reasons = {reason.name.lower(): int(reason) for reason in FinishReason}
        if not isinstance(data["finish_reason"], str) or data["finish_reason"] not in reasons:
            raise InvalidInput(f"finish_reason must be one of {sorted(reasons)}, not {data['finish_reason']!r:.40}.")
        statement = data["engine_statement"]
        if not isinstance(statement, str) or not _encodes(statement, MAX_STATEMENT_BYTES):
            raise InvalidInput(f"engine_statement must be a text of at most {MAX_STATEMENT_BYTES} bytes of UTF-8.")
        raw = parse_hex(data["fingerprints"], "fingerprints")
        if len(raw) % POSITION_BYTES:
            raise InvalidInput(f"fingerprints must be a multiple of {POSITION_BYTES} bytes, not {len(raw)}.")
        return cls(
            request_hash=parse_hex(data["request_hash"], "request_hash", 32),
            finish_reason=reasons[data["finish_reason"]],
            engine_statement=statement,
            prompt_ids=checked_ids(data["prompt_ids"], "prompt_ids"),
            output_ids=checked_ids(data["output_ids"], "output_ids"),
            fingerprints=parse_fingerprints(raw),
        )


def header_hash(request_hash: bytes, finish_reason: int, engine_statement_hash: bytes) -> Hash32:
    """keccak(abi.encode(bytes32, uint8, bytes32))."""
    return Hash32(keccak(encode(["bytes32", "uint8", "bytes32"], [request_hash, finish_reason, engine_statement_hash])))


def statement_hash(engine_statement: str) -> Hash32:
    """keccak of the statement's UTF-8 bytes."""
    return Hash32(keccak(engine_statement.encode()))


def transcript_root(header: bytes, prompt: bytes, output_ids: bytes, fingerprint: bytes) -> Hash32:
    """keccak(0x02 || four 32-byte hashes)."""
    return Hash32(keccak(b"\x02" + header + prompt + output_ids + fingerprint))


def prompt_root(ids: Sequence[int]) -> Hash32:
    """The Merkle root over token ids, 32 a leaf: the request's prompt_root."""
    return merkle_root(id_leaves(ids))


def id_leaves(ids: Sequence[int]) -> list[bytes]:
    """Token ids as leaves of up to 32 little-endian uint32. Raises InvalidInput for an id outside uint32."""
    try:
        data = struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise InvalidInput("every token id must be an integer from 0 to 2**32 - 1.") from error
    size = 4 * IDS_PER_LEAF
    return [data[i : i + size] for i in range(0, len(data), size)]


def fingerprint_leaves(fingerprints: Sequence[Sequence[FingerprintEntry]]) -> list[bytes]:
    """Fingerprints as leaves of up to 8 positions. Raises InvalidInput on a wrong count or a value outside its type."""
    try:
        positions = [
            b"".join(struct.pack("<Ih", token_id, value) for token_id, value in position) for position in fingerprints
        ]
    except struct.error as error:
        raise InvalidInput("a fingerprint entry is a uint32 token id and an int16 value.") from error
    if any(len(position) != POSITION_BYTES for position in positions):
        raise InvalidInput(f"a fingerprint has exactly {ENTRIES_PER_POSITION} entries a position.")
    step = POSITIONS_PER_LEAF
    return [b"".join(positions[i : i + step]) for i in range(0, len(positions), step)]


def parse_fingerprints(data: bytes) -> tuple[tuple[FingerprintEntry, ...], ...]:
    """The inverse of joining `fingerprint_leaves`; `data` must be a multiple of 48 bytes."""
    entries = list(struct.iter_unpack("<Ih", data))
    step = ENTRIES_PER_POSITION
    return tuple(tuple((e[0], e[1]) for e in entries[i : i + step]) for i in range(0, len(entries), step))


def leaf_count(part: Part, tokens: int) -> int:
    """How many leaves `tokens` prompt or output tokens make in this part."""
    per_leaf = POSITIONS_PER_LEAF if part is Part.FINGERPRINT else IDS_PER_LEAF
    return -(-tokens // per_leaf)


def leaf_size(part: Part, index: int, tokens: int) -> int:
    """The exact length in bytes of leaf `index` when the part covers `tokens` tokens."""
    per_leaf, unit = (POSITIONS_PER_LEAF, POSITION_BYTES) if part is Part.FINGERPRINT else (IDS_PER_LEAF, 4)
    return min(per_leaf, tokens - index * per_leaf) * unit


def _encodes(text: str, most: int) -> bool:
    """Whether a text is at most `most` bytes of UTF-8. JSON can hold half of a surrogate pair, which is no text."""
    try:
        return len(text.encode()) <= most
    except UnicodeEncodeError:
        return False


def checked_ids(value: Any, name: str) -> tuple[int, ...]:
    """A JSON list of uint32 as a tuple. Raises InvalidInput."""
    if not isinstance(value, list):
        raise InvalidInput(f"{name} must be a list of token ids.")
    for token_id in value:
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise InvalidInput(f"{name} holds {token_id!r:.40}, which is not a token id (0 to 2**32 - 1).")
    return tuple(value)
