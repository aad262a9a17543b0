"""The devnet's chain in this process: validity of its blocks by full import, bad transactions, time, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eth.db.atomic import AtomicDB
from eth.vm.forks.prague import PragueVM
from eth_account import Account

from poip_chain.chain.devnet import anvil
from poip_chain.chain.devnet.chain import MAX_TIMESTAMP, ChainEvent, Devnet
from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.chain.devnet.errors import InvalidInput, TransactionRejected
from poip_chain.chain.devnet.overrides import AccountOverride, decode_overrides, encode_overrides
from poip_chain.chain.devnet.vm import chain_class
from poip_chain.errors import ConfigurationError, Unavailable

NOW = 1_800_000_000


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def devnet(clock: Clock) -> Any:
    chain = Devnet(DevnetConfig(block_time=None), clock=clock)
    yield chain
    chain.close()


def signed(devnet: Devnet, nonce: int, *, account: int = 0, **fields: Any) -> bytes:
    content = {
        "nonce": nonce,
        "to": devnet.accounts[1].address,
        "value": 1,
        "gas": 21_000,
        "maxFeePerGas": 10**10,
        "maxPriorityFeePerGas": 10**9,
        "chainId": devnet.config.chain_id,
        **fields,
    }
    if "gasPrice" in fields:
        del content["maxFeePerGas"], content["maxPriorityFeePerGas"]
    return bytes(devnet.accounts[account].sign_transaction(content).raw_transaction)


def test_blocks_are_valid_for_a_chain_that_checks_everything(devnet: Devnet, clock: Clock) -> None:
    genesis = devnet.head
    init = "0x6000600055600160005560ff60005360016000f3"  # stores and returns one byte of code
    for index in range(6):
        devnet.submit(signed(devnet, 2 * index))
        devnet.submit(signed(devnet, 2 * index + 1, to=b"", data=init, value=0, gas=200_000))
        clock.now += 1
        assert len(devnet.mine().transactions) == 2
    devnet.mine()
    # Only the state of the genesis is copied; py-evm's import then executes and validates each block by itself.
    entries = dict(devnet.database.scan(b"", b"\xff" * 33))
    other: Any = chain_class(devnet.config.chain_id)
    checker = other.from_genesis_header(AtomicDB(_MemoryStore(entries)), genesis)
    checker.vm_configuration = ((0, PragueVM),)
    for number in range(1, devnet.head.block_number + 1):
        block = devnet.sealed(devnet.header_by_number(number)).block
        assert checker.import_block(block).imported_block.hash == block.hash
    assert checker.get_canonical_head() == devnet.head


class _MemoryStore(dict[bytes, bytes]):
    """The trie nodes of another store, without its records of which blocks count."""

    def __init__(self, entries: dict[bytes, bytes]) -> None:
        super().__init__({key: value for key, value in entries.items() if len(key) == 32})

    def set(self, key: bytes, value: bytes) -> None:
        self[key] = value

    def exists(self, key: bytes) -> bool:
        return key in self

    def delete(self, key: bytes) -> None:
        del self[key]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"chainId": 1}, "invalid chain id: signed for 1, this chain is 31337"),
        ({"gas": 60_000_001}, "exceeds block gas limit"),
        ({"gas": 20_999}, "intrinsic gas too low: 20999 given, 21000 needed"),
        ({"gasPrice": 10**10, "gas": 20_999}, "intrinsic gas too low"),
        ({"gas": 24_000, "data": b"\xff" * 100}, "intrinsic gas too low: 24000 given, 25000 needed"),
        ({"value": 10**23}, "insufficient funds for gas"),
        ({"maxFeePerGas": 10**18}, "insufficient funds for gas"),
        ({"maxFeePerGas": 1}, "max priority fee per gas .* is higher than max fee per gas"),
        ({"nonce": 2**64 - 1}, "nonce is out of range"),
    ],
)
def test_refused_transactions_leave_no_trace(devnet: Devnet, fields: dict[str, Any], message: str) -> None:
    content = {"nonce": 0, **fields}
    with pytest.raises(TransactionRejected, match=message):
        devnet.submit(signed(devnet, content.pop("nonce"), **content))
    assert (len(devnet.pool), devnet.head.block_number) == (0, 0)


def test_a_second_form_of_a_signature_is_refused(devnet: Devnet) -> None:
    builder = devnet.machine_after(devnet.head).get_transaction_builder()
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    good = builder.decode(signed(devnet, 0))
    forged: Any = good.copy(s=order - good.s, y_parity=1 - good.y_parity)  # type: ignore[attr-defined]
    assert forged.sender == good.sender
    with pytest.raises(TransactionRejected, match="s is out of range"):
        devnet.submit(forged.encode())


@pytest.mark.parametrize("raw", [b"", b"\x02", b"\x03\xc0", b"\x04\xc0", b"\xc0", b"\x7f", b"\xff" * 40, b"\x02\xc1"])
def test_nonsense_is_refused(devnet: Devnet, raw: bytes) -> None:
    with pytest.raises(TransactionRejected):
        devnet.submit(raw)


def test_a_transaction_that_went_bad_does_not_stop_the_block(devnet: Devnet) -> None:
    poor = Account.create()
    devnet.override([AccountOverride(bytes.fromhex(poor.address[2:]), balance=10**18)])
    usual = {"to": devnet.accounts[2].address, "gas": 21_000, "chainId": 31337}
    fees = {"maxFeePerGas": 10**10, "maxPriorityFeePerGas": 9 * 10**9}
    for nonce, value in ((0, 9 * 10**17), (1, 9 * 10**17)):  # each is covered, both are not
        raw = poor.sign_transaction({**usual, **fees, "nonce": nonce, "value": value}).raw_transaction
        devnet.submit(bytes(raw))
    devnet.submit(signed(devnet, 0))
    sealed = devnet.mine()
    assert [transaction.nonce for transaction in sealed.transactions] == [0, 0]
    assert len(devnet.pool) == 0
    assert devnet.nonce(bytes.fromhex(poor.address[2:])) == 1


def test_a_full_block_leaves_the_rest_for_the_next(devnet: Devnet) -> None:
    for nonce in range(3):
        devnet.submit(signed(devnet, nonce, gas=25_000_000))
    devnet.submit(signed(devnet, 0, account=1))
    assert len(devnet.mine().transactions) == 4  # what counts is the gas that was used, not the limit asked for
    for nonce in range(3, 6):
        devnet.submit(signed(devnet, nonce, gas=30_000_000, to=b"", data="0xfe"))  # burns all of its gas
    assert [len(devnet.mine().transactions) for _ in range(3)] == [2, 1, 0]


def test_filling_stops_when_time_is_up(devnet: Devnet) -> None:
    for nonce in range(5):
        devnet.submit(signed(devnet, nonce))
    assert len(devnet.mine(seconds=-1).transactions) == 0
    assert len(devnet.mine(seconds=60).transactions) == 5


def test_timestamps_rise_and_follow_the_clock(devnet: Devnet, clock: Clock) -> None:
    assert devnet.head.timestamp == NOW
    assert [devnet.mine().header.timestamp - NOW for _ in range(3)] == [1, 2, 3]
    clock.now += 60
    assert devnet.mine().header.timestamp == NOW + 60
    clock.now -= 1000  # a clock that is set back does not stop the chain
    assert devnet.mine().header.timestamp == NOW + 61
    devnet.increase_time(5000)
    assert devnet.mine().header.timestamp == NOW + 4060
    for wrong in (devnet.head.timestamp, MAX_TIMESTAMP + 1):
        with pytest.raises(InvalidInput, match="must be above"):
            devnet.mine(timestamp=wrong)
    with pytest.raises(InvalidInput, match="out of range"):
        devnet.increase_time(MAX_TIMESTAMP)


def test_time_offset_outlives_the_process(tmp_path: Path, clock: Clock) -> None:
    config = DevnetConfig(block_time=None, database=tmp_path / "x.db")
    first = Devnet(config, clock=clock)
    first.increase_time(777)
    first.close()
    second = Devnet(config, clock=clock)
    assert second.mine().header.timestamp == NOW + 777
    second.close()


def test_a_file_of_another_chain_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    Devnet(DevnetConfig(block_time=None, database=path)).close()
    for settings, message in (({"chain_id": 5}, "chain_id 31337, not 5"), ({"gas_limit": 10**7}, "gas_limit 60000000")):
        with pytest.raises(ConfigurationError, match=message):
            Devnet(DevnetConfig(block_time=None, database=path, **settings))
    Devnet(DevnetConfig(block_time=None, database=path)).close()  # a refusal does not keep the file locked


def test_a_failure_while_sealing_changes_nothing(devnet: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    devnet.submit(signed(devnet, 0))
    head = devnet.head

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(devnet.database, "commit", fail)
        with pytest.raises(OSError, match="disk full"):
            devnet.mine()
    assert (devnet.head, len(devnet.pool)) == (head, 1)
    assert len(devnet.mine().transactions) == 1
    assert devnet.head.parent_hash == head.hash


def test_snapshots_work_across_reorganisations(devnet: Devnet) -> None:
    for _ in range(5):
        devnet.mine()
    head = devnet.head
    snapshot = devnet.snapshot()
    devnet.reorganise(3)
    assert devnet.head.block_number == head.block_number
    assert not devnet.is_canonical(head)
    assert devnet.revert(snapshot) is True
    assert devnet.head == head
    assert [devnet.header_by_number(number).block_number for number in range(6)] == list(range(6))
    assert devnet.mine().header.parent_hash == head.hash
    for depth in (0, 7, 65):
        with pytest.raises(InvalidInput, match="1 to 6 are"):
            devnet.reorganise(depth)


def test_listeners_hear_of_everything_and_cannot_break_it(devnet: Devnet) -> None:
    heard: list[ChainEvent] = []

    def broken(_: ChainEvent) -> None:
        raise RuntimeError("listener")

    devnet.listen(broken)
    devnet.listen(heard.append)
    transaction = devnet.submit(signed(devnet, 0))
    sealed = devnet.mine()
    done = devnet.reorganise(1)
    assert heard[0].pending == (transaction,)
    assert heard[1].added == (sealed,)
    assert heard[2].removed == (sealed,)
    assert heard[2].added[0].header == done.new_head
    assert heard[2].pending == done.returned
    devnet.unlisten(broken)


def test_overrides_survive_their_encoding() -> None:
    overrides = (AccountOverride(b"\x01" * 20, 5, 6, b"\x07", {8: 9, 2**255: 1}, True), AccountOverride(b"\x02" * 20))
    assert decode_overrides(encode_overrides(overrides)) == overrides


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"port": 65536}, "port 65536"),
        ({"block_time": 0.0}, "block time"),
        ({"block_time": float("nan")}, "block time"),
        ({"automine": True}, "exclude each other"),
        ({"chain_id": 0}, "chain id 0"),
        ({"accounts": -1}, "-1 accounts"),
        ({"gas_limit": 5}, "gas limit of 5"),
        ({"backend": "geth"}, "'geth' does not exist"),
        ({"mnemonic": "test test"}, "BIP-39"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DevnetConfig(**settings)


def test_anvil_is_the_same_chain(tmp_path: Path) -> None:
    line = anvil.command(Path("anvil"), DevnetConfig(backend="anvil", block_time=2.0), 9000)
    assert " ".join(line) == (
        "anvil --host 127.0.0.1 --port 9000 --silent --chain-id 31337 --hardfork prague --gas-limit 60000000 "
        "--mnemonic test test test test test test test test test test test junk --accounts 10 --balance 10000 "
        "--block-time 2"
    )
    manual = anvil.command(Path("anvil"), DevnetConfig(block_time=None, database=tmp_path / "s"), 1)
    assert manual[-5:] == ["--no-mining", "--state", str(tmp_path / "s"), "--state-interval", "1"]
    with pytest.raises(ConfigurationError, match="whole ether"):
        anvil.command(Path("anvil"), DevnetConfig(balance=1), 1)


def test_anvil_that_is_missing_or_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = DevnetConfig(backend="anvil", port=0)
    with pytest.raises(ConfigurationError, match="no 'anvil' is on PATH"):
        anvil.run(config)
    stub = tmp_path / "anvil"
    stub.write_text("#!/bin/sh\nexit 3\n")
    stub.chmod(0o755)
    with pytest.raises(Unavailable, match="status 3"):
        anvil.run(config)
