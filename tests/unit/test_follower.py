"""The follower against a chain in memory: what it reports adds up to the chain, over reorganisations and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from web3 import Web3

from poip_chain.chain.follower import Added, Change, Follower, Removed
from poip_chain.errors import ConfigurationError, IntegrityError, Unavailable
from tests.support.fake_chain import FakeChain

ADDRESS = "0x00000000000000000000000000000000000000AA"
OTHER = "0x00000000000000000000000000000000000000bb"
ABI: list[dict[str, Any]] = [
    {
        "type": "event",
        "name": "Number",
        "anonymous": False,
        "inputs": [{"name": "value", "type": "uint256", "indexed": False}],
    },
    {
        "type": "event",
        "name": "Pair",
        "anonymous": False,
        "inputs": [
            {
                "name": "pair",
                "type": "tuple",
                "indexed": False,
                "components": [{"name": "a", "type": "uint256"}, {"name": "b", "type": "bytes32"}],
            }
        ],
    },
]
NUMBER, PAIR = keccak(b"Number(uint256)"), keccak(b"Pair((uint256,bytes32))")
CONTRACT = Web3().eth.contract(address=Web3.to_checksum_address(ADDRESS), abi=ABI)


def emit(chain: FakeChain, value: int, address: str = CONTRACT.address) -> None:
    chain.emit(address, NUMBER, value.to_bytes(32, "big"))


def block_with(chain: FakeChain, *values: int) -> None:
    chain.mine()
    for value in values:
        emit(chain, value)


def follower(chain: FakeChain, path: Path, **options: Any) -> Follower:
    options.setdefault("start_block", 0)
    return Follower(chain, path, options.pop("name", "test"), [(CONTRACT, "Number")], **options)  # type: ignore[arg-type]


def values(changes: list[Change]) -> list[int]:
    """Added values as they are, removed ones negative."""
    return [c.event.args["value"] * (1 if isinstance(c, Added) else -1) for c in changes]


def take(subject: Follower) -> list[int]:
    """Poll and commit everything."""
    changes = subject.poll()
    for change in changes:
        subject.commit(change)
    return values(changes)


@pytest.fixture
def chain() -> FakeChain:
    return FakeChain()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "follower.db"


def test_in_order_and_once(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1, 2)
    block_with(chain)
    block_with(chain, 3)
    assert take(subject) == [1, 2, 3]
    assert take(subject) == [] and subject.position == 3
    block_with(chain, 4)
    assert take(subject) == [4]


def test_only_what_was_asked_for(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    chain.mine()
    emit(chain, 1, OTHER)
    chain.emit(CONTRACT.address, PAIR, bytes(64))
    emit(chain, 2)
    assert take(subject) == [2]


def test_structs_are_dicts(chain: FakeChain, path: Path) -> None:
    subject = Follower(chain, path, "pairs", [(CONTRACT, "Pair")], 0)  # type: ignore[arg-type]
    chain.mine()
    chain.emit(CONTRACT.address, PAIR, (7).to_bytes(32, "big") + b"\x01" * 32)
    (change,) = subject.poll()
    assert change.event.args == {"pair": {"a": 7, "b": b"\x01" * 32}}
    assert type(change.event.args["pair"]) is dict


def test_uncommitted_changes_come_again_after_a_kill(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1, 2)
    block_with(chain, 3)
    changes = subject.poll()
    subject.commit(changes[0])
    assert values(subject.poll()) == [2, 3]
    subject.close()
    again = follower(chain, path)
    assert take(again) == [2, 3] and take(again) == []


def test_commit_in_order_and_once(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1, 2)
    first, second = subject.poll()
    with pytest.raises(ValueError, match="in the order"):
        subject.commit(second)
    subject.commit(first)
    with pytest.raises(ValueError):
        subject.commit(first)
    subject.commit(second)
    with pytest.raises(ValueError):
        subject.commit(second)


def test_a_reorganisation_of_three_blocks(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    for value in (1, 2, 3, 4):
        block_with(chain, value)
    assert take(subject) == [1, 2, 3, 4]
    chain.drop(3)
    for value in (20, 30, 40, 50):
        block_with(chain, value)
    assert take(subject) == [-4, -3, -2, 20, 30, 40, 50]
    assert take(subject) == []


def test_the_same_event_in_another_block_is_removed_and_added(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    assert take(subject) == [1]
    chain.drop(1)
    block_with(chain)
    block_with(chain, 1)
    changes = subject.poll()
    assert [type(change) for change in changes] == [Removed, Added]
    assert changes[0].event.block_hash != changes[1].event.block_hash


def test_a_reorganisation_that_removes_without_adding(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    block_with(chain, 2)
    assert take(subject) == [1, 2]
    chain.drop(1)
    block_with(chain)
    assert take(subject) == [-2] and take(subject) == []


def test_there_and_back_before_the_removal_is_committed(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    block_with(chain, 2)
    assert take(subject) == [1, 2]
    lost = chain.blocks[-1]
    chain.drop(1)
    block_with(chain, 3)
    assert values(subject.poll()) == [-2, 3]
    chain.drop(1)
    chain.blocks.append(lost)
    assert take(subject) == []
    block_with(chain, 4)
    assert take(subject) == [4]


def test_a_reorganisation_between_two_commits(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    block_with(chain, 2, 3)
    first, second, _ = subject.poll()
    subject.commit(first)
    subject.commit(second)
    chain.drop(1)
    block_with(chain, 2, 9)
    assert take(subject) == [-2, 2, 9]


def test_an_endpoint_that_lags_behind_is_waited_for(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    for value in (1, 2, 3):
        block_with(chain, value)
    assert take(subject) == [1, 2, 3]
    held_back = [chain.blocks.pop(), chain.blocks.pop()]
    assert take(subject) == []
    chain.blocks += reversed(held_back)
    assert take(subject) == []
    block_with(chain, 4)
    assert take(subject) == [4]


@pytest.mark.parametrize("moment", range(10))
@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("max_range", [1, 1000])
def test_a_chain_that_changes_while_it_is_read(
    chain: FakeChain, path: Path, moment: int, depth: int, max_range: int
) -> None:
    subject = follower(chain, path, max_range=max_range)
    block_with(chain, 1)
    block_with(chain, 2)
    while take(subject):
        pass
    # No event lies in the newest block of either branch: nothing in the logs gives the change away.
    block_with(chain, 3)
    block_with(chain)
    block_with(chain)

    def reorganise() -> None:
        chain.drop(depth)
        for value in (20, 30, 40)[4 - depth :]:
            block_with(chain, value)
        block_with(chain)
        block_with(chain)

    chain.interrupt(moment, reorganise)
    seen: list[int] = []
    for _ in range(8):
        seen += take(subject)
    new = [-2, 20, 30, 40] if depth == 4 else [30, 40]
    assert seen in ([3, -3, *new], new)


def test_a_checkpoint_of_a_lost_branch_completes_nothing(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain)
    take(subject)
    for _ in range(3):
        block_with(chain)
    take(subject)
    assert subject.position == 4
    chain.drop(2)
    block_with(chain, 1, 2)
    block_with(chain)
    block_with(chain)
    subject.commit(subject.poll()[0])
    subject.close()
    assert take(follower(chain, path)) == [2]


def test_confirmations(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path, confirmations=2)
    for value in (1, 2, 3):
        block_with(chain, value)
    assert take(subject) == [1]
    chain.drop(2)
    block_with(chain, 20)
    block_with(chain, 30)
    assert take(subject) == []
    block_with(chain, 40)
    assert take(subject) == [20]


def test_start_block_and_ranges(chain: FakeChain, path: Path) -> None:
    for value in range(10):
        block_with(chain, value)
    subject = follower(chain, path, start_block=4, max_range=3)
    found: list[int] = []
    while batch := take(subject):
        assert len(batch) <= 3
        found += batch
    assert found == [3, 4, 5, 6, 7, 8, 9]


def test_followers_share_a_file(chain: FakeChain, path: Path) -> None:
    block_with(chain, 1)
    one, two = follower(chain, path, name="one"), follower(chain, path, name="two")
    assert take(one) == [1] and take(one) == []
    assert take(two) == [1]


def test_memory_is_bounded_and_a_deeper_reorganisation_is_noticed(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path, horizon=5)
    for value in range(1, 31):
        block_with(chain, value)
        take(subject)
    assert len(subject._known_blocks()) <= 7
    chain.drop(4)
    for value in range(100, 105):
        block_with(chain, value)
    assert take(subject)[:4] == [-30, -29, -28, -27]
    chain.drop(20)
    for value in range(200, 225):
        block_with(chain, value)
    with pytest.raises(IntegrityError, match="deeper"):
        subject.poll()


def test_a_reorganisation_down_to_the_start_is_no_trouble(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    assert take(subject) == [1]
    chain.drop(1)
    block_with(chain, 2)
    assert take(subject) == [-1, 2]


def test_another_chain_is_refused(chain: FakeChain, path: Path) -> None:
    follower(chain, path).close()
    other = FakeChain()
    other.blocks[0].hash = b"\x07" * 32
    with pytest.raises(IntegrityError, match="another chain"):
        follower(other, path)


def test_nothing_to_follow(chain: FakeChain, path: Path) -> None:
    with pytest.raises(ConfigurationError):
        Follower(chain, path, "none", [], 0)  # type: ignore[arg-type]


def test_the_chain_goes_away_and_comes_back(chain: FakeChain, path: Path) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    chain.away = True
    with pytest.raises(Unavailable):
        subject.poll()
    chain.away = False
    assert take(subject) == [1]


def test_logs_that_contradict_the_question(chain: FakeChain, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = follower(chain, path)
    block_with(chain, 1)
    good = chain.logs

    def shifted(parameters: dict[str, Any]) -> list[Any]:
        return [{**log, "blockNumber": 77} for log in good(parameters)]

    monkeypatch.setattr(chain, "logs", shifted)
    with pytest.raises(IntegrityError, match="outside the blocks"):
        subject.poll()


STEPS = st.one_of(
    st.tuples(st.just("grow"), st.integers(0, 3)),
    st.tuples(st.just("reorg"), st.integers(1, 4)),
    st.tuples(st.just("poll"), st.integers(0, 6)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("reorg while read"), st.integers(0, 31)),
)


@pytest.mark.slow
@settings(max_examples=200)
@given(steps=st.lists(STEPS, max_size=30), confirmations=st.integers(0, 2), max_range=st.integers(1, 5))
def test_what_is_reported_adds_up_to_the_chain(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], confirmations: int, max_range: int
) -> None:
    chain, path = FakeChain(), tmp_path_factory.mktemp("follower") / "follower.db"
    options = {"confirmations": confirmations, "max_range": max_range}
    subject, state, counter = follower(chain, path, **options), [], 0

    def grow(count: int) -> None:
        nonlocal counter
        chain.mine()
        for _ in range(count):
            counter += 1
            emit(chain, counter)

    def reorganise(depth: int) -> None:
        depth = min(depth, len(chain.blocks) - 1)
        if depth:
            chain.drop(depth)
            for position in range(depth + 1):
                grow(position % 2)

    def poll(limit: int) -> int:
        changes = subject.poll()
        for change in changes[:limit]:
            place = (change.event.block_hash, change.event.log_index, change.event.args["value"])
            if isinstance(change, Added):
                assert place not in state
                state.append(place)
            else:
                # Removals come newest first, so they always take the last one away.
                assert state.pop() == place
            subject.commit(change)
        return len(changes)

    for kind, amount in steps:
        if kind == "grow":
            grow(amount)
        elif kind == "reorg":
            reorganise(amount)
        elif kind == "poll":
            poll(amount)
        elif kind == "restart":
            subject.close()
            subject = follower(chain, path, **options)
        else:
            chain.interrupt(amount // 4, lambda depth=amount % 4: reorganise(depth))
            poll(100)
            chain.interruption = None
    for _ in range(200):
        if not poll(100):
            break
    head = len(chain.blocks) - 1 - confirmations
    expected = [
        (bytes(log["blockHash"]), log["logIndex"], int.from_bytes(log["data"], "big"))
        for block in chain.blocks[: head + 1]
        for log in block.logs
    ]
    assert state == expected
    subject.close()
