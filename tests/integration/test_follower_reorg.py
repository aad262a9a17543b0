"""The follower against a real node that is reorganised by three blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.artifacts import compile_source
from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.follower import Added, Follower, Removed
from poip_chain.chain.keys import development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain

SOURCE = """
# pragma version 0.4.3
# pragma evm-version cancun

struct Pair:
    a: uint256
    b: bytes32

event Said:
    who: indexed(address)
    number: uint256
    pair: Pair

@external
def say(number: uint256):
    log Said(who=msg.sender, number=number, pair=Pair(a=number, b=keccak256("x")))
"""


class Speaker:
    """The contract above and the key that calls it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.chain = Chain(url)
        artifact = compile_source(SOURCE)
        self.outbox = Outbox(self.chain, development_key(1), folder / "outbox.db", rebroadcast_after=0.0)
        created = self.outbox.execute(Call(None, artifact.bytecode, "create"), "create")
        assert created.contract_address is not None
        self.contract = self.chain.contract_at(artifact.abi, created.contract_address)
        self.start = created.block_number

    def say(self, number: int) -> None:
        data = bytes.fromhex(self.contract.encode_abi("say", [number])[2:])
        self.outbox.execute(Call(self.contract.address, data, f"say {number}"), f"say {number}")  # type: ignore[arg-type]


@pytest.fixture
def speaker(tmp_path: Path) -> Iterator[Speaker]:
    with running_devnet() as url:
        speaker = Speaker(url, tmp_path)
        yield speaker
        speaker.outbox.close()
        speaker.chain.close()


def take(follower: Follower) -> list[tuple[type[Any], int]]:
    found = []
    for change in follower.poll():
        found.append((type(change), change.event.args["number"]))
        follower.commit(change)
    return found


def test_three_blocks_are_replaced(speaker: Speaker, tmp_path: Path) -> None:
    chain, path = speaker.chain, tmp_path / "follower.db"

    def opened() -> Follower:
        return Follower(chain, path, "speaker", [(speaker.contract, "Said")], speaker.start)

    follower = opened()
    for number in (1, 2, 3, 4):
        speaker.say(number)
    first = follower.poll()
    assert first[0].event.args["pair"]["a"] == 1 and first[0].event.args["who"] == development_key(1).address
    assert take(follower) == [(Added, 1), (Added, 2), (Added, 3), (Added, 4)]

    # Three blocks go; their transactions are dropped and never seen again by this branch.
    chain.request("devnet_reorg", 3, True)
    follower.close()
    follower = opened()
    removed = take(follower)
    assert removed == [(Removed, 4), (Removed, 3), (Removed, 2)]

    # The outbox brings them back in the same order, in other blocks.
    for number in (2, 3, 4):
        speaker.outbox.step()
        speaker.outbox.wait(f"say {number}", 10)
    speaker.say(5)
    assert take(follower) == [(Added, 2), (Added, 3), (Added, 4), (Added, 5)]
    assert take(follower) == []
    follower.close()


def test_three_blocks_whose_transactions_are_mined_again(speaker: Speaker, tmp_path: Path) -> None:
    """The node puts them back into its mempool and into the next block: all are removed and added, in order."""
    chain = speaker.chain
    follower = Follower(chain, tmp_path / "f.db", "speaker", [(speaker.contract, "Said")], speaker.start)
    for number in (1, 2, 3):
        speaker.say(number)
    assert [number for _, number in take(follower)] == [1, 2, 3]
    chain.request("devnet_reorg", 3)
    chain.request("evm_mine")
    found = take(follower)
    assert found[:3] == [(Removed, 3), (Removed, 2), (Removed, 1)]
    speaker.outbox.step()
    found += take(follower)
    assert found[3:] == [(Added, 1), (Added, 2), (Added, 3)]
    follower.close()


def test_headers_are_rebuilt_exactly(speaker: Speaker) -> None:
    """`raw_header` checks itself against the block's hash; here for the genesis block, full and empty ones."""
    speaker.say(1)
    speaker.chain.request("evm_mine")
    for number in range(speaker.chain.block_number() + 1):
        assert len(speaker.chain.raw_header(number)) > 500
