"""The devnet's key-value store: commits are whole, discards leave no trace."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.chain.devnet import database as database_module
from poip_chain.chain.devnet.database import Database
from poip_chain.errors import ConfigurationError, IntegrityError

_KEY = st.binary(min_size=1, max_size=2)
_STEP = st.one_of(
    st.tuples(st.just("set"), _KEY, st.binary(max_size=4)),
    st.tuples(st.just("delete"), _KEY, st.just(b"")),
    st.tuples(st.sampled_from(["commit", "discard"]), st.just(b""), st.just(b"")),
)


@given(st.lists(_STEP, max_size=40))
def test_behaves_like_a_dictionary_with_commits(steps: list[tuple[str, bytes, bytes]]) -> None:
    store = Database(None)
    committed: dict[bytes, bytes] = {}
    present: dict[bytes, bytes] = {}
    for action, key, value in steps:
        if action == "set":
            store[key] = present[key] = value
        elif action == "delete" and key in present:
            del store[key], present[key]
        elif action == "delete":
            with pytest.raises(KeyError):
                del store[key]
        elif action == "commit":
            store.commit()
            committed = dict(present)
        else:
            store.discard()
            present = dict(committed)
        assert all(store[known] == value for known, value in present.items())
        assert all((known in store) == (known in present) for _, known, _ in steps if known)
    assert store.scan(b"\x00", b"\xff\xff\xff") == sorted(committed.items())
    store.close()


def test_only_commits_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = Database(path)
    store[b"kept"] = b"1"
    store.commit()
    store[b"lost"] = b"2"
    del store[b"kept"]
    store.close()
    again = Database(path)
    assert (again[b"kept"], b"lost" in again) == (b"1", False)
    again.close()


def test_a_failed_commit_changes_nothing(tmp_path: Path) -> None:
    store = Database(tmp_path / "x.db")
    store[b"a"] = b"1"
    store.commit()
    store[b"a"] = b"2"
    store._pending[b"b"] = 5.5j  # type: ignore[assignment] # what SQLite cannot store
    with pytest.raises(sqlite3.ProgrammingError):
        store.commit()
    store.discard()
    assert (store[b"a"], b"b" in store) == (b"1", False)
    store.close()


def test_the_cache_may_be_emptied_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "CACHE_BYTES", 500)
    store = Database(None)
    for index in range(50):
        store[index.to_bytes(4, "big")] = bytes([index])
        store.commit()
    assert all(store[index.to_bytes(4, "big")] == bytes([index]) for index in range(50))
    store.close()


def test_wrong_and_busy_files(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.db"
    wrong.write_bytes(b"this is no database at all, but long enough to be looked at" * 40)
    with pytest.raises(IntegrityError, match="no devnet database"):
        Database(wrong)
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        Database(tmp_path / "missing" / "x.db")
    first = Database(tmp_path / "x.db")
    with pytest.raises(ConfigurationError, match="Is another devnet running"):
        Database(tmp_path / "x.db")
    first.close()
