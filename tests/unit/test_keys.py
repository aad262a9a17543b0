"""Key files: round trip, permissions, hostile content, and that a key is never printed."""

from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path

import pytest

from poip_chain.chain import keys
from poip_chain.chain.keys import Key
from poip_chain.errors import ConfigurationError, InvalidInput, NotFound, Refused

SECRET = bytes(range(1, 33))


def password(_: Path) -> str:
    return "correct horse"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    keys.create(tmp_path / "a.json", "correct horse", key=Key.from_bytes(SECRET), light=True)
    return tmp_path / "a.json"


def test_round_trip(key_file: Path) -> None:
    key = keys.load(key_file, password)
    assert key.private_key.to_bytes() == SECRET
    assert keys.address_of(key_file) == key.address


def test_eth_account_opens_our_files(key_file: Path) -> None:
    from eth_account import Account

    assert bytes(Account.decrypt(key_file.read_text(), "correct horse")) == SECRET


def test_full_strength_is_scrypt_with_the_usual_cost(tmp_path: Path) -> None:
    keys.create(tmp_path / "a.json", "x")
    parameters = json.loads((tmp_path / "a.json").read_text())["crypto"]
    assert parameters["kdf"] == "scrypt" and parameters["kdfparams"]["n"] >= 2**18


def test_file_is_private_and_never_overwritten(key_file: Path) -> None:
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    before = key_file.read_bytes()
    with pytest.raises(Refused, match="exists already"):
        keys.create(key_file, "other", light=True)
    assert key_file.read_bytes() == before
    assert [path.name for path in key_file.parent.iterdir()] == ["a.json"]


def test_wrong_password(key_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not open"):
        keys.load(key_file, lambda _: "wrong")


def test_readable_by_others_is_refused_with_the_fix(key_file: Path) -> None:
    key_file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        keys.load(key_file, password)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="poip key new"):
        keys.load(tmp_path / "none.json", password)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"version": 3}', '{"version": 3, "crypto": {"kdf": "none"}}', '{"version": 9}', "null"],
)
def test_damaged_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError):
        keys.load(path, password)


def test_stated_address_must_be_the_keys(key_file: Path) -> None:
    body = json.loads(key_file.read_text())
    body["address"] = "00" * 20
    key_file.write_text(json.dumps(body))
    with pytest.raises(ConfigurationError, match="states the address"):
        keys.load(key_file, password)


def test_a_key_is_never_printed(key_file: Path) -> None:
    key = keys.load(key_file, password)
    for text in (repr(key), str(key), f"{key}", f"{key!r}", f"{key}"):
        assert SECRET.hex() not in text and key.address in text
    with pytest.raises(TypeError):
        pickle.dumps(key)


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, b"1", b""])
def test_not_a_private_key(secret: bytes) -> None:
    with pytest.raises(InvalidInput):
        Key.from_bytes(secret)


def test_password_sources_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, explicit, beside = tmp_path / "a.json", tmp_path / "given", tmp_path / "a.password"
    monkeypatch.delenv("POIP_PASSWORD", raising=False)
    with pytest.raises(ConfigurationError, match="POIP_PASSWORD"):
        keys.password_from()(path)
    assert keys.password_from(prompt=lambda _: "typed")(path) == "typed"
    keys.write_private(beside, "beside\n")
    assert keys.password_from(prompt=lambda _: "typed")(path) == "beside"
    monkeypatch.setenv("POIP_PASSWORD", "environment")
    assert keys.password_from()(path) == "environment"
    keys.write_private(explicit, "given\nsecond line\n")
    assert keys.password_from(explicit)(path) == "given"
    explicit.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        keys.password_from(explicit)(path)


def test_development_accounts_are_the_well_known_ones() -> None:
    assert keys.development_key(0).address == "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
    assert keys.development_key(9).address == "0xa0Ee7A142d267C1f36714E4a8F75612F20a79720"


def test_development_key_file_is_made_once(tmp_path: Path) -> None:
    first = keys.create_development_key(tmp_path / "k" / "a.json")
    assert keys.create_development_key(tmp_path / "k" / "a.json").address == first.address
    assert keys.create_development_key(tmp_path / "k" / "b.json").address != first.address


def test_development_key_survives_a_kill_after_the_password_was_written(tmp_path: Path) -> None:
    keys.write_private(tmp_path / "a.password", "left behind\n")
    key = keys.create_development_key(tmp_path / "a.json")
    assert keys.load(tmp_path / "a.json", keys.password_from()).address == key.address
