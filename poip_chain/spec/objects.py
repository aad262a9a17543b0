"""The protocol's objects and their hashes (protocol section 3). The contracts are their second writing.

Sizes of integers are part of the signed types. They are chosen so that no sum or product that a contract forms from
hostile values can overflow 256 bits: prices are uint128, token counts uint32, sums of fees uint192.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar

from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec.eip712 import TypedStruct, checked, parse_hex
from poip_chain.spec.types import Address, Hash32

MAX_STOP_TOKENS = 8
MAX_END_TOKENS = 8
MAX_TABLE_ROWS = 8
CANONICAL_VERSION = 1
SAMPLER_VERSION = 1


class FinishReason(IntEnum):
    """Why an answer ended. CANCELLED (by the client) is payable only by a voucher that names the receipt."""

    STOP = 0
    LENGTH = 1
    CANCELLED = 2


class Part(IntEnum):
    """The leafed parts of a transcript."""

    PROMPT = 0
    OUTPUT = 1
    FINGERPRINT = 2


@dataclass(frozen=True)
class ModelConfig(TypedStruct):
    """The dimensions of a Llama-architecture model. `config_hash` commits to them; the registry stores them.

    Rationals are scaled: rms_norm_eps by 10**12, rope_theta by 1. `rope_scaling_hash` is keccak of the canonical JSON of
    the model's rope_scaling entry (sorted keys, no spaces), or 0 where it has none.
    """

    ABI: ClassVar[dict[str, str]] = {
        "hidden_size": "uint32",
        "intermediate_size": "uint32",
        "num_layers": "uint32",
        "num_heads": "uint32",
        "num_kv_heads": "uint32",
        "head_dim": "uint32",
        "vocab_size": "uint32",
        "max_positions": "uint32",
        "rms_norm_eps_e12": "uint64",
        "rope_theta": "uint64",
        "rope_scaling_hash": "bytes32",
        "tied_embeddings": "bool",
        "attention_bias": "bool",
        "mlp_bias": "bool",
        "qk_norm": "bool",
    }
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps_e12: int
    rope_theta: int
    rope_scaling_hash: bytes
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def config_hash(self) -> Hash32:
        """keccak of the ABI encoding of all fields in order."""
        return Hash32(keccak(encode(list(self.ABI.values()), list(self.values()))))


@dataclass(frozen=True)
class ModelSpec(TypedStruct):
    """What a model is. Its identity does not contain its profile."""

    ABI: ClassVar[dict[str, str]] = {
        "weights_root": "bytes32",
        "tokenizer_hash": "bytes32",
        "chat_template_hash": "bytes32",
        "config_hash": "bytes32",
        "canonical_version": "uint32",
        "sampler_version": "uint32",
    }
    weights_root: bytes
    tokenizer_hash: bytes
    chat_template_hash: bytes
    config_hash: bytes
    canonical_version: int = CANONICAL_VERSION
    sampler_version: int = SAMPLER_VERSION

    def model_id(self) -> Hash32:
        """keccak(abi.encode(fields)): the model's name everywhere."""
        return Hash32(keccak(encode(list(self.ABI.values()), list(self.values()))))


@dataclass(frozen=True, slots=True)
class ThresholdRow:
    """At `tokens` output tokens a sum of scores above `limit` is fraud; longer answers scale the limit per token up to the
    next row (`scores.threshold`, which gives the units, too)."""

    tokens: int
    limit: int


@dataclass(frozen=True)
class Profile:
    """How a model is served and judged, versioned under its id and immutable (protocol section 3).

    max_context in tokens; temperatures in thousandths; `end_token_ids` are the EOS ids. margin_* in 2**-16 logits,
    fingerprint_* in 1/64 nat; rows strictly increase in tokens.
    """

    max_context: int
    vocab_size: int
    dtype: str
    kv_dtype: str
    min_temperature_milli: int
    max_temperature_milli: int
    end_token_ids: tuple[int, ...]
    margin_dead_zone: int
    margin_hard_limit: int
    margin_table: tuple[ThresholdRow, ...]
    fingerprint_dead_zone: int
    fingerprint_tolerance: int
    fingerprint_table: tuple[ThresholdRow, ...]

    ABI_TYPE: ClassVar[str] = (
        "(uint32,uint32,bytes32,bytes32,uint32,uint32,uint32[],uint64,uint64,(uint32,uint64)[],"
        "uint64,uint64,(uint32,uint64)[])"
    )

    def __post_init__(self) -> None:
        for name in ("max_context", "vocab_size", "min_temperature_milli", "max_temperature_milli"):
            checked("uint32", getattr(self, name), f"Profile.{name}")
        for name in (
            "margin_dead_zone",
            "margin_hard_limit",
            "fingerprint_dead_zone",
            "fingerprint_tolerance",
        ):
            checked("uint64", getattr(self, name), f"Profile.{name}")
        if not 0 < len(self.end_token_ids) <= MAX_END_TOKENS:
            raise InvalidInput(f"a profile has 1 to {MAX_END_TOKENS} end token ids, not {len(self.end_token_ids)}.")
        if any(not 0 <= i < self.vocab_size for i in self.end_token_ids):
            raise InvalidInput("an end token id of the profile is outside its vocabulary.")
        for table in (self.margin_table, self.fingerprint_table):
            if len(table) > MAX_TABLE_ROWS or any(b.tokens <= a.tokens for a, b in pairwise(table)):
                raise InvalidInput(f"a score table has at most {MAX_TABLE_ROWS} rows, strictly increasing in tokens.")
        for text in (self.dtype, self.kv_dtype):
            if not text.isascii() or not 0 < len(text) <= 32:
                raise InvalidInput("a profile's dtype is a short ASCII name such as 'bfloat16'.")

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it; names of dtypes are left-aligned in 32 bytes."""
        return (
            self.max_context,
            self.vocab_size,
            self.dtype.encode().ljust(32, b"\0"),
            self.kv_dtype.encode().ljust(32, b"\0"),
            self.min_temperature_milli,
            self.max_temperature_milli,
            list(self.end_token_ids),
            self.margin_dead_zone,
            self.margin_hard_limit,
            [(row.tokens, row.limit) for row in self.margin_table],
            self.fingerprint_dead_zone,
            self.fingerprint_tolerance,
            [(row.tokens, row.limit) for row in self.fingerprint_table],
        )

    @classmethod
    def from_values(cls, v: Any) -> Profile:
        """The inverse of `values`, for what a contract returns."""
        rows = [tuple(ThresholdRow(int(t), int(x)) for t, x in v[i]) for i in (9, 12)]
        names = [bytes(v[i]).rstrip(b"\0").decode("ascii") for i in (2, 3)]
        return cls(
            v[0],
            v[1],
            names[0],
            names[1],
            v[4],
            v[5],
            tuple(v[6]),
            v[7],
            v[8],
            rows[0],
            v[10],
            v[11],
            rows[1],
        )

    def profile_hash(self) -> Hash32:
        """keccak(abi.encode(profile))."""
        return Hash32(keccak(encode([self.ABI_TYPE], [self.values()])))


@dataclass(frozen=True)
class SamplingParams:
    """How the answer is sampled. top_p_milli = 1000 and top_k = 0 mean off, and nothing else is served yet.

    temperature_milli is 0 (greedy) or within the profile's range; stop_token_ids strictly increase, at most 8.
    """

    temperature_milli: int
    top_p_milli: int = 1000
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    ABI_TYPE: ClassVar[str] = "(uint32,uint32,uint32,uint32[],bool)"

    def __post_init__(self) -> None:
        checked("uint32", self.temperature_milli, "params.temperature_milli")
        checked("uint32", self.top_p_milli, "params.top_p_milli")
        checked("uint32", self.top_k, "params.top_k")
        checked("bool", self.ignore_eos, "params.ignore_eos")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        ids = self.stop_token_ids
        if len(ids) > MAX_STOP_TOKENS:
            raise InvalidInput(f"params.stop_token_ids holds at most {MAX_STOP_TOKENS} ids, not {len(ids)}.")
        for token_id in ids:
            checked("uint32", token_id, "params.stop_token_ids")
        if any(b <= a for a, b in pairwise(ids)):
            raise InvalidInput("params.stop_token_ids must strictly increase.")

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it."""
        return (
            self.temperature_milli,
            self.top_p_milli,
            self.top_k,
            list(self.stop_token_ids),
            self.ignore_eos,
        )

    def params_hash(self) -> Hash32:
        """keccak(abi.encode(params))."""
        return Hash32(keccak(encode([self.ABI_TYPE], [self.values()])))

    def to_json(self) -> dict[str, Any]:
        """JSON form with the field names."""
        return {
            "temperature_milli": self.temperature_milli,
            "top_p_milli": self.top_p_milli,
            "top_k": self.top_k,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
        }

    @classmethod
    def from_json(cls, data: Any) -> SamplingParams:
        """Parse `to_json`'s form. Raises InvalidInput."""
        fields = {"temperature_milli", "top_p_milli", "top_k", "stop_token_ids", "ignore_eos"}
        if not isinstance(data, dict) or set(data) != fields or not isinstance(data["stop_token_ids"], list):
            raise InvalidInput(f"params must be a JSON object with exactly the fields {sorted(fields)}.")
        return cls(**{**data, "stop_token_ids": tuple(data["stop_token_ids"])})


@dataclass(frozen=True)
class Request(TypedStruct):
    """A client's signed order. `node` zero means any node. Prices in wei per token, deadline in Unix seconds."""

    ABI: ClassVar[dict[str, str]] = {
        "client": "address",
        "node": "address",
        "model_id": "bytes32",
        "profile_version": "uint32",
        "prompt_root": "bytes32",
        "prompt_tokens": "uint32",
        "params_hash": "bytes32",
        "max_tokens": "uint32",
        "input_price": "uint128",
        "output_price": "uint128",
        "client_seed": "bytes32",
        "client_nonce": "bytes32",
        "deadline": "uint64",
    }
    client: Address
    node: Address
    model_id: bytes
    profile_version: int
    prompt_root: bytes
    prompt_tokens: int
    params_hash: bytes
    max_tokens: int
    input_price: int
    output_price: int
    client_seed: bytes
    client_nonce: bytes
    deadline: int

    def fee(self, output_tokens: int) -> int:
        """What `output_tokens` tokens of answer cost, in wei."""
        return self.prompt_tokens * self.input_price + output_tokens * self.output_price

    def seed(self) -> Hash32:
        """The sampler's seed of an off-chain request: keccak("PoIP seed" || client_seed)."""
        return Hash32(keccak(b"PoIP seed" + self.client_seed))


@dataclass(frozen=True)
class Receipt(TypedStruct):
    """A node's signed statement of one answer. payer_cum and node_cum are running totals of fee, this one included."""

    ABI: ClassVar[dict[str, str]] = {
        "node": "address",
        "seq": "uint64",
        "request_hash": "bytes32",
        "model_id": "bytes32",
        "transcript_root": "bytes32",
        "output_tokens": "uint32",
        "finish_reason": "uint8",
        "fee": "uint192",
        "payer": "address",
        "payer_cum": "uint192",
        "node_cum": "uint192",
        "issued_at": "uint64",
    }
    node: Address
    seq: int
    request_hash: bytes
    model_id: bytes
    transcript_root: bytes
    output_tokens: int
    finish_reason: int
    fee: int
    payer: Address
    payer_cum: int
    node_cum: int
    issued_at: int


@dataclass(frozen=True)
class Voucher(TypedStruct):
    """A client's signed promise: `node` may have been paid `cumulative` wei in all out of the client's escrow with it.

    last_receipt_hash is the struct hash of the receipt that the promise runs up to, or 0 for a prepaid voucher.
    """

    ABI: ClassVar[dict[str, str]] = {
        "payer": "address",
        "node": "address",
        "cumulative": "uint192",
        "last_receipt_hash": "bytes32",
    }
    payer: Address
    node: Address
    cumulative: int
    last_receipt_hash: bytes


@dataclass(frozen=True)
class ProofOfPossession(TypedStruct):
    """Signed by a node key (role 1) or peer key (role 2) to let `operator` bind it in the registry."""

    ABI: ClassVar[dict[str, str]] = {
        "operator": "address",
        "key": "address",
        "role": "uint8",
        "deadline": "uint64",
    }
    operator: Address
    key: Address
    role: int
    deadline: int

    NODE_KEY: ClassVar[int] = 1
    PEER_KEY: ClassVar[int] = 2


@dataclass(frozen=True)
class Batch(TypedStruct):
    """A batch commitment as the commitment log keeps it (by its hash) and emits it. It is not signed.

    The batch covers receipts first_seq .. first_seq + count - 1 of `node`; total_fee is their sum and node_cum the
    node's running total after the last. Times in Unix seconds, audit_rate in parts per million.
    """

    ABI: ClassVar[dict[str, str]] = {
        "id": "uint64",
        "node": "address",
        "model_id": "bytes32",
        "profile_version": "uint32",
        "root": "bytes32",
        "first_seq": "uint64",
        "count": "uint32",
        "total_fee": "uint192",
        "node_cum": "uint192",
        "lock": "uint256",
        "audit_rate_ppm": "uint32",
        "parameters_version": "uint32",
        "block_number": "uint64",
        "committed_at": "uint64",
        "window_end": "uint64",
    }
    id: int
    node: Address
    model_id: bytes
    profile_version: int
    root: bytes
    first_seq: int
    count: int
    total_fee: int
    node_cum: int
    lock: int
    audit_rate_ppm: int
    parameters_version: int
    block_number: int
    committed_at: int
    window_end: int


def audit_selection(beacon: bytes, batch_id: int, count: int, rate_ppm: int) -> list[int]:
    """The receipts of a batch that the beacon selects, one per draw: keccak(beacon || batch_id || j) mod count.

    j runs over ceil(rate * count) draws (protocol section 5); batch_id and j are uint256. Draws may repeat.
    count >= 1, 0 < rate_ppm <= 10**6.
    """
    draws = audit_draws(count, rate_ppm)
    words = (keccak(beacon + batch_id.to_bytes(32, "big") + j.to_bytes(32, "big")) for j in range(draws))
    return [int.from_bytes(word, "big") % count for word in words]


def audit_indices(beacon: bytes, batch_id: int, count: int, rate_ppm: int) -> list[int]:
    """The distinct receipts that `audit_selection` draws, in order."""
    return sorted(set(audit_selection(beacon, batch_id, count, rate_ppm)))


def audit_draws(count: int, rate_ppm: int) -> int:
    """ceil(rate * count), at least 1 for a batch that is not empty."""
    return -(-count * rate_ppm // 1_000_000)


def client_seed_from_integer(seed: int) -> Hash32:
    """The client_seed for OpenAI's integer `seed`: keccak("PoIP openai seed" || int64 big-endian) (section 12)."""
    if not -(2**63) <= seed < 2**63:
        raise InvalidInput(f"seed must be a signed 64-bit integer, not {seed}.")
    return Hash32(keccak(b"PoIP openai seed" + seed.to_bytes(8, "big", signed=True)))


def client_seed_from_nonces(user_nonce: bytes, gateway_nonce: bytes) -> Hash32:
    """client_seed = keccak(user_nonce || gateway_nonce), both 32 bytes (protocol section 2)."""
    return Hash32(keccak(user_nonce + gateway_nonce))


__all__ = [
    "Batch",
    "FinishReason",
    "ModelConfig",
    "ModelSpec",
    "Part",
    "Profile",
    "ProofOfPossession",
    "Receipt",
    "Request",
    "SamplingParams",
    "ThresholdRow",
    "Voucher",
    "audit_draws",
    "audit_indices",
    "audit_selection",
    "client_seed_from_integer",
    "client_seed_from_nonces",
    "parse_hex",
]
