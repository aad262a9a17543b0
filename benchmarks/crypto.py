"""Merkle trees, signatures and what one answer puts on chain."""

from __future__ import annotations

import os

from eth_account import Account
from eth_keys.datatypes import PrivateKey

from benchmarks.rows import Row, median_seconds
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.merkle import merkle_proof, merkle_root, root_from_proof
from poip_chain.spec.objects import Part, Receipt
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address

LEAVES = 1000
OUTPUT_TOKENS = 256


def run() -> list[Row]:
    """Throughput of the hashes and signatures on a request's path, and bytes per token."""
    receipts = [_receipt(seq) for seq in range(LEAVES)]
    hashes = [receipt.struct_hash() for receipt in receipts]
    domain = Domain(31337, Address("0x" + "22" * 20))
    key = PrivateKey(os.urandom(32))
    signature = receipts[0].sign(domain, key)
    account = Account.from_key(key.to_bytes())
    root, proof = merkle_root(hashes), merkle_proof(hashes, [LEAVES // 2])

    build = median_seconds(lambda: merkle_root(hashes))
    verify = median_seconds(lambda: root_from_proof([hashes[LEAVES // 2]], [LEAVES // 2], LEAVES, proof))
    struct = median_seconds(lambda: [receipt.struct_hash() for receipt in receipts])
    sign = median_seconds(lambda: [r.sign(domain, key) for r in receipts[:100]]) / 100
    peer = median_seconds(lambda: [account.unsafe_sign_hash(r.digest(domain)) for r in receipts[:100]]) / 100
    recover = median_seconds(lambda: [receipts[0].recover(domain, signature) for _ in range(100)]) / 100
    transcript = _transcript()
    roots = median_seconds(transcript.root)
    served = sum(len(leaf) for part in (Part.OUTPUT, Part.FINGERPRINT) for leaf in transcript.leaves(part))
    assert root == merkle_root(hashes)
    return [
        Row(
            "Merkle tree of 1,000 receipts",
            LEAVES / build,
            "leaves/s",
            "merkle_root over 32-byte leaves, median of 5",
        ),
        Row(
            "Merkle proof check in 1,000 leaves",
            1 / verify,
            "proofs/s",
            "root_from_proof, one index, median of 5",
        ),
        Row("EIP-712 hash of a receipt", LEAVES / struct, "hashes/s", "Receipt.struct_hash, median of 5"),
        Row(
            "receipt signature",
            1 / sign,
            "signatures/s",
            "hash and sign, coincurve backend, median of 5 x 100",
            compared_with="eth-account signing the same digest",
            ratio=peer / sign,
        ),
        Row("signature recovery", 1 / recover, "recoveries/s", "hash and recover, median of 5 x 100"),
        Row(
            "transcript root",
            OUTPUT_TOKENS / roots,
            "tokens/s",
            f"all leaves and roots of a {OUTPUT_TOKENS}-token answer, median of 5",
        ),
        Row(
            "commitment on chain",
            32 / LEAVES / OUTPUT_TOKENS,
            "bytes/token",
            f"one 32-byte root for {LEAVES} answers of {OUTPUT_TOKENS} tokens",
        ),
        Row(
            "transcript served when audited",
            served / OUTPUT_TOKENS,
            "bytes/token",
            "output ids and fingerprint leaves over output tokens",
        ),
    ]


def _receipt(seq: int) -> Receipt:
    node = Address("0x" + "33" * 20)
    digest = seq.to_bytes(32, "big")
    return Receipt(node, seq, digest, digest, digest, 100, 0, 10, node, 10 * (seq + 1), 10 * (seq + 1), 1)


def _transcript() -> Transcript:
    entries = tuple((i, -i) for i in range(8))
    ids = tuple(range(OUTPUT_TOKENS))
    return Transcript(bytes(32), 0, "benchmark", ids, ids, (entries,) * OUTPUT_TOKENS)
