"""The gateway's smaller parts: API keys and spending, escrow, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from poip_chain.control.gateway.escrow import EscrowManager, EscrowPolicy, Kind, Move, Sent
from poip_chain.control.gateway.settings import load_settings
from poip_chain.control.gateway.store import GatewayStore
from poip_chain.control.ledger import Ledger
from poip_chain.control.view import Holding
from poip_chain.errors import ConfigurationError, InsufficientFunds, InvalidInput, NotFound, TransactionFailed
from poip_chain.spec.types import Address
from tests.unit.test_client_ledger import NODES, open_ledger, receipt_for, request_of

HASH, OTHER = b"\x01" * 32, b"\x02" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatewayStore]:
    made = GatewayStore(tmp_path / "gateway.db")
    yield made
    made.close()


def test_keys_are_kept_as_hashes_and_recognised(store: GatewayStore, tmp_path: Path) -> None:
    key, text = store.create_key("alice", None, 5)
    assert store.authenticate(text) == key
    secret = text.split("-")[2]
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in files and bytes.fromhex(secret) not in files
    assert key.id.encode() in files
    assert (tmp_path / "gateway.db").stat().st_mode & 0o077 == 0
    assert secret not in repr(key) and secret not in json.dumps(key.to_json())


def test_other_keys_are_not(store: GatewayStore) -> None:
    key, text = store.create_key("alice", None, 5)
    other, _ = store.create_key("bob", None, 5)
    prefix, key_id, secret = text.split("-")
    for wrong in (
        "",
        "poip",
        key_id,
        secret,
        f"{prefix}-{key_id}-",
        f"{prefix}-{key_id}-{secret[:-1]}",
        f"{prefix}-{key_id}-{secret}0",
        f"{prefix}-{other.id}-{secret}",
        f"x-{key_id}-{secret}",
        text + "-",
        text * 50,
        f"{prefix}-{key_id}-é\ud800",
    ):
        assert store.authenticate(wrong) is None
    store.revoke_key(key.id, 9)
    assert store.authenticate(text) is None
    assert [k.revoked_at for k in store.api_keys() if k.id == key.id] == [9]
    with pytest.raises(NotFound):
        store.revoke_key("nobody", 9)
    for name in ("", "a" * 101, "a\nb"):
        with pytest.raises(InvalidInput):
            store.create_key(name, None, 0)


def test_spending_is_capped_and_closed_once(store: GatewayStore) -> None:
    key, _ = store.create_key("alice", 100, 0)
    store.reserve(key.id, HASH, 60)
    with pytest.raises(InsufficientFunds, match="40 wei more"):
        store.reserve(key.id, OTHER, 41)
    store.reserve(key.id, OTHER, 40)
    assert sorted(store.open_requests()) == [HASH, OTHER]
    store.close_spend(HASH, 10)
    store.close_spend(HASH, 10)
    (now,) = store.api_keys()
    assert (now.spent, now.open) == (10, 40)
    store.close_spend(OTHER, 0)
    store.reserve(key.id, b"\x03" * 32, 90)


def test_a_cap_of_huge_amounts_stays_exact(store: GatewayStore) -> None:
    key, _ = store.create_key("alice", 2**191, 0)
    store.reserve(key.id, HASH, 2**191)
    store.close_spend(HASH, 2**191 - 1)
    store.reserve(key.id, OTHER, 1)
    with pytest.raises(InsufficientFunds):
        store.reserve(key.id, b"\x03" * 32, 1)


# --- escrow ----------------------------------------------------------------------------------------------------


@dataclass
class ScriptedTreasury:
    """A wallet and a vault in memory; moves are mined one `step` after they were sent."""

    wallet: int = 1000
    time: int = 100_000
    thaw_period: int = 50
    holdings: dict[Address, Holding] = field(default_factory=dict)
    moves: dict[str, Sent] = field(default_factory=dict)
    pending: list[Move] = field(default_factory=list)
    refuse: bool = False
    log: list[tuple[Kind, Address, int]] = field(default_factory=list)

    def balance(self) -> int:
        return self.wallet

    def holding(self, node: Address) -> Holding:
        return self.holdings.get(node, Holding(0, 0, 0, 0))

    def now(self) -> int:
        return self.time

    def send(self, move: Move) -> None:
        if self.refuse:
            raise TransactionFailed("vault: paused")
        assert move.key not in self.moves, "sent twice"
        self.moves[move.key] = Sent.OPEN
        self.pending.append(move)

    def sent(self, move: Move) -> Sent:
        return self.moves.get(move.key, Sent.UNKNOWN)

    def step(self) -> None:
        for move in self.pending:
            self.moves[move.key] = Sent.DONE
            self.log.append((move.kind, move.node, move.amount))
            old = self.holding(move.node)
            if move.kind is Kind.DEPOSIT:
                assert self.wallet >= move.amount
                self.wallet -= move.amount
                new = Holding(old.balance + move.amount, old.thawing, old.thaw_end, old.settled)
            elif move.kind is Kind.THAW:
                assert move.amount <= old.balance - old.thawing
                new = Holding(old.balance, move.amount, self.time + self.thaw_period, old.settled)
            elif move.kind is Kind.CANCEL_THAW:
                new = Holding(old.balance, 0, 0, old.settled)
            else:
                assert self.time >= old.thaw_end
                self.wallet += old.thawing
                new = Holding(old.balance - old.thawing, 0, 0, old.settled)
            self.holdings[move.node] = new
        self.pending.clear()


@dataclass
class EscrowWorld:
    treasury: ScriptedTreasury
    ledger: Ledger
    path: Path
    policy: EscrowPolicy = field(default_factory=lambda: EscrowPolicy(100, 50, None, 1000))

    def manager(self) -> EscrowManager:
        return EscrowManager(self.path / "escrow.db", self.treasury, self.ledger, self.policy, lambda _: None)

    def rounds(self, count: int, usable: Any = NODES) -> None:
        manager = self.manager()
        for _ in range(count):
            manager.step(usable, NODES)
        manager.close()


@pytest.fixture
def escrow(tmp_path: Path) -> Iterator[EscrowWorld]:
    ledger = open_ledger(tmp_path)
    yield EscrowWorld(ScriptedTreasury(), ledger, tmp_path)
    ledger.close()


def test_each_usable_node_gets_its_escrow_once(escrow: EscrowWorld) -> None:
    escrow.rounds(6)
    assert escrow.treasury.log == [(Kind.DEPOSIT, NODES[0], 100), (Kind.DEPOSIT, NODES[1], 100)]


def test_the_bound_and_the_wallet_are_never_exceeded(escrow: EscrowWorld) -> None:
    escrow.policy = EscrowPolicy(100, 50, 130, 1000)
    escrow.rounds(6)
    assert [entry[2] for entry in escrow.treasury.log] == [100, 30]
    escrow.policy = EscrowPolicy(1000, 950, None, 1000)
    escrow.treasury.wallet = 40
    escrow.rounds(6)
    assert escrow.treasury.wallet == 0


def test_a_restart_between_any_two_rounds_changes_nothing(escrow: EscrowWorld) -> None:
    for _ in range(8):
        escrow.rounds(1)
    assert [entry[0] for entry in escrow.treasury.log] == [Kind.DEPOSIT, Kind.DEPOSIT]
    assert escrow.treasury.wallet == 800


def test_spent_escrow_is_topped_up_and_promised_escrow_is_not_thawed(escrow: EscrowWorld) -> None:
    escrow.rounds(6)
    signed = request_of(1)
    escrow.ledger.open(signed, NODES[0], "http://n", available=100, settled=0, now=escrow.treasury.time)
    escrow.ledger.accept(receipt_for(signed, 10, 10), bytes(65))
    for number in range(2, 7):
        escrow.ledger.open(request_of(number), NODES[0], "http://n", available=100, settled=0, now=escrow.treasury.time)
    escrow.rounds(4)
    assert escrow.treasury.log[-1] == (Kind.DEPOSIT, NODES[0], 60)
    escrow.treasury.time += 5000
    escrow.rounds(6, usable=())
    assert (Kind.THAW, NODES[0], 100) in escrow.treasury.log, "160 held, 60 of them promised"
    escrow.treasury.time += 100
    escrow.rounds(6, usable=())
    assert escrow.treasury.holding(NODES[0]).balance == 60
    assert escrow.treasury.holding(NODES[1]).balance == 0


def test_a_node_that_comes_back_gets_its_thaw_cancelled(escrow: EscrowWorld) -> None:
    escrow.rounds(6)
    escrow.treasury.time += 5000
    escrow.rounds(3, usable=(NODES[0],))
    assert escrow.treasury.holding(NODES[1]).thawing == 100
    escrow.rounds(4)
    assert escrow.treasury.log[-1] == (Kind.CANCEL_THAW, NODES[1], 0)


def test_a_blocked_node_loses_its_escrow_at_once(escrow: EscrowWorld) -> None:
    escrow.rounds(6)
    signed = request_of(1)
    escrow.ledger.open(signed, NODES[0], "http://n", available=100, settled=0, now=escrow.treasury.time)
    escrow.ledger.reject(signed.request_hash, NODES[0], "wrong fee", None, b"")
    escrow.rounds(4)
    assert escrow.treasury.log[-1][:2] == (Kind.THAW, NODES[0])


def test_a_move_that_would_revert_is_not_tried_at_once_again(escrow: EscrowWorld) -> None:
    escrow.treasury.refuse = True
    escrow.rounds(10)
    assert escrow.treasury.log == []
    escrow.treasury.refuse = False
    escrow.rounds(5)
    assert escrow.treasury.log == []
    escrow.treasury.time += 100
    escrow.rounds(5)
    assert len(escrow.treasury.log) == 2


def test_no_target_means_no_deposits(escrow: EscrowWorld) -> None:
    escrow.policy = EscrowPolicy(0, 0, None, 1000)
    escrow.rounds(5)
    assert escrow.treasury.log == []


# --- settings --------------------------------------------------------------------------------------------------

SETTINGS = """
[gateway]
rpc_url = "http://127.0.0.1:8545"
deployment = "deployment.json"
data = "data"
key = "keys/gateway.json"
escrow_per_node = "100000000000000000000"
models = [{ name = "tiny", directory = "models/tiny" }]
"""


def test_settings_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(SETTINGS)
    monkeypatch.setenv("POIP_GATEWAY_PORT", "9000")
    settings = load_settings(path, host="0.0.0.0")
    assert settings.data == tmp_path / "data"
    assert settings.models[0].directory == tmp_path / "models/tiny"
    assert (settings.port, settings.host, settings.escrow_per_node) == (9000, "0.0.0.0", 10**20)
    monkeypatch.setenv("POIP_GATEWAY_MODELS", '[{"name": "x", "directory": "/x"}]')
    assert [model.name for model in load_settings(path).models] == ["x"]


def test_wrong_settings_name_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(SETTINGS + 'port = 99999\ncolour = "red"\n')
    with pytest.raises(ConfigurationError, match=r"port.*colour|colour.*port"):
        load_settings(path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_settings(tmp_path / "nothing.toml")
    path.write_text("rpc_url = ")
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_settings(path)
    monkeypatch.setenv("POIP_GATEWAY_MODELS", "x")
    path.write_text(SETTINGS)
    with pytest.raises(ConfigurationError, match="JSON"):
        load_settings(path)
