"""Finding the Vyper sources in a checkout, in an installed package, and not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from poip_chain.chain import sources
from poip_chain.errors import ConfigurationError


def test_checkout() -> None:
    folder = sources.contracts_directory()
    assert folder == Path(__file__).resolve().parent.parent.parent / "contracts"
    assert list(folder.rglob("*.vy"))


def test_installed_copy_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "poip_chain"
    for folder in (tmp_path / "contracts", package / "contracts"):
        folder.mkdir(parents=True)
        (folder / "LICENSE").write_text("text")
    monkeypatch.setattr(sources, "_PACKAGE", package)
    assert sources.contracts_directory() == package / "contracts"


def test_missing_sources_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contracts").mkdir()
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "poip_chain")
    with pytest.raises(ConfigurationError, match="Install poip-chain again"):
        sources.contracts_directory()
