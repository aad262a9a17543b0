"""The protocol's objects against their vectors and against eth_account's own EIP-712, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account.messages import encode_typed_data
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput, InvalidSignature
from poip_chain.spec.eip712 import SECP256K1_N, Domain, TypedStruct, recover
from poip_chain.spec.objects import (
    Batch,
    ModelConfig,
    ModelSpec,
    Profile,
    ProofOfPossession,
    Receipt,
    Request,
    SamplingParams,
    ThresholdRow,
    Voucher,
    audit_draws,
    audit_indices,
    client_seed_from_integer,
    client_seed_from_nonces,
)
from tests.vectors import generate_objects

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "objects.json").read_text())
KINDS = {"request": Request, "receipt": Receipt, "voucher": Voucher, "proof_of_possession": ProofOfPossession}
SIGNED = [(kind, case) for kind in KINDS for case in VECTORS[kind]]
DOMAIN = Domain(VECTORS["domain"]["chain_id"], VECTORS["domain"]["verifying_contract"])


def unhex(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def test_files_are_what_the_generator_writes() -> None:
    for name, text in generate_objects.render().items():
        assert (generate_objects.FOLDER / name).read_text() == text, f"{name} is stale: run generate_objects.py"


@pytest.mark.parametrize(("kind", "case"), SIGNED, ids=[f"{k}{i}" for i, (k, _) in enumerate(SIGNED)])
class TestSigned:
    def test_vector(self, kind: str, case: dict[str, Any]) -> None:
        item = KINDS[kind].from_json(case["object"])
        assert item.to_json() == case["object"]
        assert item.type_string() == case["type"]
        assert item.struct_hash() == unhex(case["struct_hash"])
        assert item.digest(DOMAIN) == unhex(case["digest"])
        assert item.recover(DOMAIN, unhex(case["signature"])) == case["signer"]

    def test_eth_account_agrees(self, kind: str, case: dict[str, Any]) -> None:
        item: TypedStruct = KINDS[kind].from_json(case["object"])
        name = type(item).__name__
        message = encode_typed_data(
            {
                "name": "PoIP",
                "version": "1",
                "chainId": DOMAIN.chain_id,
                "verifyingContract": DOMAIN.verifying_contract,
            },
            {name: [{"name": field, "type": kind} for field, kind in item.ABI.items()]},
            {field: getattr(item, field) for field in item.ABI},
        )
        assert message.header == DOMAIN.separator
        assert message.body == item.struct_hash()

    def test_every_field_counts(self, kind: str, case: dict[str, Any]) -> None:
        item: TypedStruct = KINDS[kind].from_json(case["object"])
        hashes = {item.struct_hash()}
        for name in item.ABI:
            value = getattr(item, name)
            changed: Any = value ^ 1 if isinstance(value, int) else keccak(bytes(str(value), "ascii"))
            if item.ABI[name] == "address":
                changed = "0x" + changed[:20].hex()
            hashes.add(item.replace(**{name: changed}).struct_hash())
        assert len(hashes) == len(item.ABI) + 1

    def test_other_domains(self, kind: str, case: dict[str, Any]) -> None:
        item: TypedStruct = KINDS[kind].from_json(case["object"])
        signature = unhex(case["signature"])
        for domain in (
            Domain(1, DOMAIN.verifying_contract),
            Domain(DOMAIN.chain_id, VECTORS["request"][0]["object"]["client"]),
        ):
            assert item.recover(domain, signature) != case["signer"]


def test_derived_identifiers() -> None:
    model = VECTORS["model"]
    config, spec = ModelConfig.from_json(model["config"]), ModelSpec.from_json(model["spec"])
    assert config.config_hash() == spec.config_hash == unhex(model["config_hash"])
    assert spec.model_id() == unhex(model["model_id"])
    assert generate_objects.sample_profile().profile_hash() == unhex(model["profile_hash"])
    for case in VECTORS["params"]:
        assert SamplingParams.from_json(case["object"]).params_hash() == unhex(case["params_hash"])
        assert SamplingParams.from_json(case["object"]).to_json() == case["object"]
    for case in VECTORS["batch"]:
        assert generate_objects.batch_hash(Batch.from_json(case["object"])) == unhex(case["abi_hash"])


def test_seeds() -> None:
    seeds = VECTORS["seeds"]
    assert Request.from_json(VECTORS["request"][0]["object"]).seed() == unhex(seeds["request_seed"])
    assert client_seed_from_integer(42) == unhex(seeds["openai_seed_42"])
    assert client_seed_from_integer(-1) == unhex(seeds["openai_seed_minus_1"])
    words = generate_objects.word("user"), generate_objects.word("gateway")
    assert client_seed_from_nonces(*words) == unhex(seeds["nonces"])
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(InvalidInput, match="64-bit"):
            client_seed_from_integer(seed)


@pytest.mark.parametrize("case", VECTORS["audit"])
def test_audit_vectors(case: dict[str, Any]) -> None:
    beacon = unhex(case["beacon"])
    assert audit_indices(beacon, case["batch_id"], case["count"], case["rate_ppm"]) == case["indices"]


@given(count=st.integers(1, 65536), rate=st.integers(1, 10**6))
def test_audit_draws(count: int, rate: int) -> None:
    draws = audit_draws(count, rate)
    assert 1 <= draws <= count
    assert (draws - 1) * 10**6 < count * rate <= draws * 10**6


@given(beacon=st.binary(min_size=32, max_size=32), count=st.integers(1, 300), rate=st.integers(1, 10**6))
def test_audit_indices_are_in_the_batch(beacon: bytes, count: int, rate: int) -> None:
    indices = audit_indices(beacon, 9, count, rate)
    assert indices == sorted(set(indices))
    assert 1 <= len(indices) <= audit_draws(count, rate)
    assert 0 <= indices[0] <= indices[-1] < count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, 2**256, "1", 1.5, None, True, b"", b"\x00" * 33, "0x1234", []])
def test_hostile_fields_are_refused(kind: str, bad: Any) -> None:
    item: TypedStruct = KINDS[kind].from_json(VECTORS[kind][0]["object"])
    for name in item.ABI:
        with pytest.raises(InvalidInput, match=name):
            item.replace(**{name: bad})


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_json_is_refused(kind: str) -> None:
    good = VECTORS[kind][0]["object"]
    for bad in (None, [], "x", {}, {**good, "extra": 1}, {k: v for k, v in list(good.items())[1:]}):
        with pytest.raises(InvalidInput):
            KINDS[kind].from_json(bad)
    for name in good:
        for value in (None, [], {}, -1, "", "0x", "9" * 100, 2**300, True):
            with pytest.raises(InvalidInput):
                KINDS[kind].from_json({**good, name: value})


def test_signatures_have_one_form() -> None:
    item = Receipt.from_json(VECTORS["receipt"][0]["object"])
    signature = unhex(VECTORS["receipt"][0]["signature"])
    r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64]
    high_s = r + (SECP256K1_N - s).to_bytes(32, "big") + bytes([55 - v])
    for bad in (
        b"",
        signature[:64],
        signature + b"\0",
        r + signature[32:64] + bytes([v - 27]),
        high_s,
        bytes(64) + b"\x1b",
        b"\xff" * 32 + signature[32:],
    ):
        with pytest.raises(InvalidSignature):
            item.recover(DOMAIN, bad)
    assert recover(item.digest(DOMAIN), signature) == VECTORS["receipt"][0]["signer"]


@given(key=st.integers(1, SECP256K1_N - 1))
def test_any_key_signs_and_is_recovered(key: int) -> None:
    private = PrivateKey(key.to_bytes(32, "big"))
    voucher = Voucher.from_json(VECTORS["voucher"][0]["object"])
    assert voucher.recover(DOMAIN, voucher.sign(DOMAIN, private)) == private.public_key.to_checksum_address()


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": tuple(range(9))},
        {"stop_token_ids": (3, 3)},
        {"stop_token_ids": (3, 2)},
        {"stop_token_ids": (-1,)},
        {"temperature_milli": -1},
        {"top_k": 2**32},
        {"ignore_eos": 1},
    ],
)
def test_params_refusals(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        SamplingParams(**({"temperature_milli": 0} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"end_token_ids": ()},
        {"end_token_ids": tuple(range(9))},
        {"end_token_ids": (49152,)},
        {"margin_table": (ThresholdRow(8, 1), ThresholdRow(8, 2))},
        {"fingerprint_table": tuple(ThresholdRow(i, 1) for i in range(1, 10))},
        {"dtype": "x" * 33},
        {"dtype": "\u00e9"},
        {"max_context": 2**32},
        {"margin_hard_limit": -1},
    ],
)
def test_profile_refusals(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        replace(generate_objects.sample_profile(), **changes)


def test_profile_round_trip() -> None:
    profile = generate_objects.sample_profile()
    assert Profile.from_values(profile.values()) == profile
