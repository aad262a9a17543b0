"""Writes merkle.json, objects.json and transcript.json beside this file, from the specification.

    python tests/vectors/generate_objects.py

Deterministic: running it again changes nothing unless the protocol changed. Values are derived by keccak from names, so
that no vector depends on a library's random numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eth_abi.abi import encode
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey

from poip_chain.spec.eip712 import Domain
from poip_chain.spec.merkle import leaf_hash, merkle_proof, merkle_root
from poip_chain.spec.objects import (
    Batch,
    FinishReason,
    ModelConfig,
    ModelSpec,
    Part,
    Profile,
    ProofOfPossession,
    Receipt,
    Request,
    SamplingParams,
    ThresholdRow,
    Voucher,
    audit_indices,
    client_seed_from_integer,
    client_seed_from_nonces,
)
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import ZERO_ADDRESS, Address

FOLDER = Path(__file__).resolve().parent
FILES = ("merkle.json", "objects.json", "transcript.json")

PROOF_CASES = {
    1: [[0]],
    2: [[0], [1], [0, 1]],
    3: [[0], [2], [0, 2], [0, 1, 2]],
    5: [[4], [3, 4], [0, 4]],
    7: [[6], [1, 3, 6], [0, 1, 2, 3, 4, 5, 6]],
    8: [[5], [0, 7], [0, 1, 2, 3, 4, 5, 6, 7]],
    13: [[12], [8, 9, 10, 11, 12], [0, 6, 12]],
    33: [[32], [0, 31, 32], [8, 9, 10, 11, 12, 13, 14, 15]],
}


def hex_of(data: bytes) -> str:
    return "0x" + data.hex()


def word(name: str) -> bytes:
    """32 bytes that a name stands for."""
    return keccak(b"poip vector " + name.encode())


def key(name: str) -> PrivateKey:
    return PrivateKey(word(f"key {name}"))


def address(name: str) -> Address:
    return Address(key(name).public_key.to_checksum_address())


def leaf_data(index: int) -> bytes:
    """Leaves of 0 to 67 bytes."""
    data = word(f"leaf {index}") * 3
    return data[: (index * 7) % 68]


def merkle_vectors() -> list[dict[str, Any]]:
    """Trees with their leaves, roots and multi-leaf proofs."""
    trees = [{"leaves": [], "root": hex_of(merkle_root([])), "proofs": []}]
    for count, selections in PROOF_CASES.items():
        leaves = [leaf_data(i) for i in range(count)]
        proofs = [{"indices": s, "proof": [hex_of(h) for h in merkle_proof(leaves, s)]} for s in selections]
        trees.append(
            {
                "leaves": [hex_of(leaf) for leaf in leaves],
                "leaf_hashes": [hex_of(leaf_hash(leaf)) for leaf in leaves],
                "root": hex_of(merkle_root(leaves)),
                "proofs": proofs,
            }
        )
    return trees


def sample_objects() -> dict[str, Any]:
    """One ordinary and one extreme object of each kind."""
    params = SamplingParams(700, stop_token_ids=(7, 99), ignore_eos=False)
    request = Request(
        client=address("client"),
        node=address("node"),
        model_id=word("model"),
        profile_version=1,
        prompt_root=word("prompt"),
        prompt_tokens=40,
        params_hash=params.params_hash(),
        max_tokens=64,
        input_price=10**12,
        output_price=3 * 10**12,
        client_seed=word("seed"),
        client_nonce=word("nonce"),
        deadline=1_800_000_000,
    )
    receipt = Receipt(
        node=address("node"),
        seq=5,
        request_hash=request.struct_hash(),
        model_id=word("model"),
        transcript_root=word("transcript"),
        output_tokens=50,
        finish_reason=FinishReason.STOP,
        fee=request.fee(50),
        payer=address("client"),
        payer_cum=request.fee(50) + 12345,
        node_cum=request.fee(50) + 987654321,
        issued_at=1_799_999_990,
    )
    voucher = Voucher(address("client"), address("node"), receipt.payer_cum, receipt.struct_hash())
    batch = Batch(
        id=7,
        node=address("node"),
        model_id=word("model"),
        profile_version=1,
        root=word("root"),
        first_seq=5,
        count=1,
        total_fee=receipt.fee,
        node_cum=receipt.node_cum,
        lock=10**18,
        audit_rate_ppm=100_000,
        parameters_version=3,
        block_number=1234,
        committed_at=1_799_999_995,
        window_end=1_800_086_395,
    )
    full = bytes([255]) * 32
    return {
        "request": [
            request,
            Request(
                address("client"),
                ZERO_ADDRESS,
                full,
                2**32 - 1,
                full,
                2**32 - 1,
                full,
                2**32 - 1,
                2**128 - 1,
                2**128 - 1,
                full,
                full,
                2**64 - 1,
            ),
        ],
        "receipt": [
            receipt,
            Receipt(
                address("node"),
                2**64 - 1,
                full,
                full,
                full,
                2**32 - 1,
                255,
                2**192 - 1,
                address("client"),
                2**192 - 1,
                2**192 - 1,
                2**64 - 1,
            ),
        ],
        "voucher": [voucher, Voucher(address("client"), address("node"), 2**192 - 1, bytes(32))],
        "proof_of_possession": [ProofOfPossession(address("operator"), address("node"), 1, 1_800_000_000)],
        "batch": [batch],
        "params": [
            params,
            SamplingParams(0),
            SamplingParams(2**32 - 1, 2**32 - 1, 2**32 - 1, tuple(range(2**32 - 8, 2**32)), True),
        ],
    }


def sample_profile() -> Profile:
    return Profile(
        max_context=4096,
        vocab_size=49152,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        min_temperature_milli=200,
        max_temperature_milli=1500,
        end_token_ids=(0, 2),
        margin_dead_zone=32768,
        margin_hard_limit=655360,
        margin_table=(ThresholdRow(8, 100_000), ThresholdRow(64, 300_000)),
        fingerprint_dead_zone=8,
        fingerprint_tolerance=16,
        fingerprint_table=(ThresholdRow(8, 900),),
    )


def object_vectors() -> dict[str, Any]:
    """Hashes, digests and signatures of the objects, and the derived identifiers."""
    domain = Domain(31337, address("log"))
    samples = sample_objects()
    out: dict[str, Any] = {
        "domain": {
            "chain_id": domain.chain_id,
            "verifying_contract": domain.verifying_contract,
            "separator": hex_of(domain.separator),
        }
    }
    for kind in ("request", "receipt", "voucher", "proof_of_possession"):
        out[kind] = [
            {
                "type": item.type_string(),
                "object": item.to_json(),
                "struct_hash": hex_of(item.struct_hash()),
                "digest": hex_of(item.digest(domain)),
                "signer": address("signer"),
                "signature": hex_of(item.sign(domain, key("signer"))),
            }
            for item in samples[kind]
        ]
    out["batch"] = [{"object": item.to_json(), "abi_hash": hex_of(batch_hash(item))} for item in samples["batch"]]
    out["params"] = [
        {"object": item.to_json(), "params_hash": hex_of(item.params_hash())} for item in samples["params"]
    ]
    config = ModelConfig(576, 1536, 30, 9, 3, 64, 49152, 8192, 10**7, 100_000, bytes(32), True, False, False, False)
    spec = ModelSpec(word("weights"), word("tokenizer"), word("template"), config.config_hash())
    out["model"] = {
        "config": config.to_json(),
        "config_hash": hex_of(config.config_hash()),
        "spec": spec.to_json(),
        "model_id": hex_of(spec.model_id()),
        "profile_hash": hex_of(sample_profile().profile_hash()),
    }
    out["seeds"] = {
        "request_seed": hex_of(samples["request"][0].seed()),
        "openai_seed_42": hex_of(client_seed_from_integer(42)),
        "openai_seed_minus_1": hex_of(client_seed_from_integer(-1)),
        "nonces": hex_of(client_seed_from_nonces(word("user"), word("gateway"))),
    }
    out["audit"] = [
        {
            "beacon": hex_of(word("beacon")),
            "batch_id": batch_id,
            "count": count,
            "rate_ppm": rate,
            "indices": audit_indices(word("beacon"), batch_id, count, rate),
        }
        for batch_id, count, rate in ((1, 1, 10_000), (7, 100, 100_000), (2**64 - 1, 1000, 12_345), (3, 5, 10**6))
    ]
    return out


def batch_hash(batch: Batch) -> bytes:
    """keccak(abi.encode(batch)), of which the commitment log keeps the highest 240 bits."""
    return keccak(encode(list(batch.ABI.values()), list(batch.values())))


def sample_transcript(prompt_tokens: int, output_tokens: int, reason: FinishReason) -> Transcript:
    def ids(name: str, count: int) -> tuple[int, ...]:
        return tuple(int.from_bytes(word(f"{name} {i}")[:2], "big") % 49152 for i in range(count))

    def entries(position: int) -> tuple[tuple[int, int], ...]:
        seed = word(f"fingerprint {position}")
        values = sorted((int.from_bytes(seed[2 * i : 2 * i + 2], "big", signed=True) for i in range(8)), reverse=True)
        return tuple((8 * position + i + 100, value) for i, value in enumerate(values))

    return Transcript(
        request_hash=word(f"request {prompt_tokens}"),
        finish_reason=reason,
        engine_statement="vllm 0.32.0 bfloat16",
        prompt_ids=ids("prompt", prompt_tokens),
        output_ids=ids("output", output_tokens),
        fingerprints=tuple(entries(i) for i in range(output_tokens)),
    )


def transcript_vectors() -> list[dict[str, Any]]:
    """Transcripts with their leaves' hashes and roots."""
    out = []
    for prompt, output, reason in (
        (1, 0, FinishReason.CANCELLED),
        (32, 8, FinishReason.STOP),
        (33, 33, FinishReason.LENGTH),
        (100, 70, FinishReason.STOP),
    ):
        transcript = sample_transcript(prompt, output, reason)
        roots = transcript.part_roots()
        out.append(
            {
                "transcript": transcript.to_json(),
                "header_hash": hex_of(transcript.header_hash()),
                "leaf_hashes": {
                    part.name.lower(): [hex_of(leaf_hash(leaf)) for leaf in transcript.leaves(part)] for part in Part
                },
                "part_roots": {part.name.lower(): hex_of(root) for part, root in zip(Part, roots, strict=True)},
                "transcript_root": hex_of(transcript.root()),
            }
        )
    return out


def render() -> dict[str, str]:
    """The files' texts by name."""
    data = dict(zip(FILES, (merkle_vectors(), object_vectors(), transcript_vectors()), strict=True))
    return {name: json.dumps(value, indent=1) + "\n" for name, value in data.items()}


if __name__ == "__main__":
    for file_name, text in render().items():
        (FOLDER / file_name).write_text(text)
        print(f"{file_name}: {len(text)} bytes")
