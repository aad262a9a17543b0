"""Beacons: real header encodings, the two sources of block hashes, refusals, and the fixed targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import boa
import pytest
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts.headers import header

HARNESS = """
# pragma version 0.4.3
# pragma evm-version cancun
from contracts.commitments import beacon
initializes: beacon
exports: beacon.beacon_at

@deploy
def __init__():
    beacon.__init__()

@external
def submit(header_rlp: Bytes[1024]) -> (uint256, bytes32):
    return beacon._submit(header_rlp)

@external
@view
def of_target(target: uint256) -> bytes32:
    return beacon._of_target(target)

@external
@pure
def parse(header_rlp: Bytes[1024]) -> (uint256, bytes32):
    return beacon._parse(header_rlp)
"""

HISTORY = "0x0000F90827F1C53a10cb7A02335B175320002935"
HISTORY_CODE = bytes.fromhex(
    "3373fffffffffffffffffffffffffffffffffffffffe14604657602036036042575f35600143038111604257611fff8143031160425761"
    "1fff9006545f5260205ff35b5f5ffd5b5f35611fff60014303065500"
)


@cache
def deployer() -> Any:
    return boa.loads_partial(HARNESS)


@pytest.fixture
def beacon() -> Any:
    return deployer().deploy()


@pytest.fixture
def chain_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, dict[int, bytes]], None]:
    """Set the block number and the hashes of earlier blocks that BLOCKHASH gives."""

    def patch(block_number: int, hashes: dict[int, bytes]) -> None:
        boa.env.evm.patch.block_number = block_number
        boa.env.evm.patch.prev_hashes = [hashes.get(block_number - 1 - i, bytes(32)) for i in range(256)]

    return patch


@pytest.mark.parametrize("number", [1, 127, 128, 255, 65536, 2**40])
@pytest.mark.parametrize("extra_data", [b"", b"\x01", b"node" * 8])
def test_parse(beacon: Any, number: int, extra_data: bytes) -> None:
    mix_hash = keccak(b"mix")
    assert beacon.parse(header(number, mix_hash, extra_data=extra_data)) == (number, mix_hash)


@settings(max_examples=60)
@given(data=st.binary(max_size=700), flips=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=3))
def test_hostile_bytes_never_store_anything(data: bytes, flips: list[tuple[int, int]]) -> None:
    contract = deployer().deploy()
    broken = bytearray(header(boa.env.evm.patch.block_number, keccak(b"mix")))
    for position, value in flips:
        broken[position % len(broken)] = value
    for hostile in (data, bytes(broken)):
        with boa.reverts():
            contract.submit(hostile)


def test_recent_block(beacon: Any, chain_with: Callable[..., None]) -> None:
    raw = header(1000, keccak(b"mix"))
    chain_with(1001, {1000: keccak(raw)})
    assert beacon.submit(raw) == (1000, keccak(b"mix"))
    assert len(beacon.get_logs()) == 1
    assert beacon.beacon_at(1000) == keccak(b"mix")
    assert beacon.submit(raw) == (1000, keccak(b"mix")), "twice is no error"
    assert beacon.get_logs() == []


def test_oldest_block_that_blockhash_knows(beacon: Any, chain_with: Callable[..., None]) -> None:
    raw = header(1000, keccak(b"mix"))
    chain_with(1256, {1000: keccak(raw)})
    assert beacon.submit(raw)[0] == 1000


def test_block_in_the_history_contract(beacon: Any, chain_with: Callable[..., None]) -> None:
    raw = header(1000, keccak(b"mix"))
    for block_number, known in ((1257, True), (1000 + 8191, True), (1000 + 8192, False)):
        with boa.env.anchor():
            chain_with(block_number, {})
            boa.env.set_code(HISTORY, HISTORY_CODE)
            boa.env.set_storage(HISTORY, 1000 % 8191, int.from_bytes(keccak(raw), "big"))
            if known:
                assert beacon.submit(raw) == (1000, keccak(b"mix"))
            else:
                with boa.reverts("beacon: block hash is not available"):
                    beacon.submit(raw)


def test_zero_hash_is_refused(beacon: Any, chain_with: Callable[..., None]) -> None:
    chain_with(1257, {})
    boa.env.set_code(HISTORY, HISTORY_CODE)
    with boa.reverts("beacon: block hash is not available"):
        beacon.submit(header(1000, keccak(b"mix")))


def test_current_and_future_blocks_are_refused(beacon: Any, chain_with: Callable[..., None]) -> None:
    chain_with(1000, {})
    for number in (1000, 1001, 2**64 - 1):
        with boa.reverts("beacon: block hash is not available"):
            beacon.submit(header(number, keccak(b"mix")))


def test_header_of_another_chain(beacon: Any, chain_with: Callable[..., None]) -> None:
    chain_with(1001, {1000: keccak(header(1000, keccak(b"mix")))})
    with boa.reverts("beacon: header is not this chain's"):
        beacon.submit(header(1000, keccak(b"other")))


def test_header_without_mix_hash(beacon: Any, chain_with: Callable[..., None]) -> None:
    raw = header(1000, bytes(32))
    chain_with(1001, {1000: keccak(raw)})
    with boa.reverts("beacon: header has no mix hash"):
        beacon.submit(raw)


def test_targets(beacon: Any, chain_with: Callable[..., None]) -> None:
    """The first submitted of target + k * 8192, k <= 3; a later one is submitted only when an earlier one cannot be."""
    assert beacon.of_target(1000) == bytes(32)
    for k in (3, 2, 1, 0):
        number = 1000 + 8192 * k
        raw = header(number, keccak(bytes([k])))
        with boa.env.anchor():
            chain_with(number + 1, {number: keccak(raw)})
            beacon.submit(raw)
            assert beacon.of_target(1000) == keccak(bytes([k]))
            assert beacon.of_target(999) == beacon.of_target(1001) == bytes(32)
    raw = header(1000 + 8192 * 4, keccak(b"mix"))
    chain_with(1000 + 8192 * 4 + 1, {1000 + 8192 * 4: keccak(raw)})
    beacon.submit(raw)
    assert beacon.of_target(1000) == bytes(32)
