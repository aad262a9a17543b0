"""Settings: which source wins, where each value came from, and that faults name their source."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from poip_chain.cli.settings import load_common, load_section
from poip_chain.errors import ConfigurationError


class Program(BaseModel):
    """A program's settings."""

    model_config = ConfigDict(extra="forbid")

    rpc_url: str
    deployment: Path
    port: int = Field(80, ge=0)
    ratio: float = 0.5
    key: Path | None = None
    models: list[str] = []
    urls: dict[str, str] = {}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("POIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("POIP_DATA", str(tmp_path / "data"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "poip.toml"
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    common = load_common()
    assert common.values.rpc_url == "http://127.0.0.1:8545" and common.sources["rpc_url"] == "default"
    assert common.values.data == tmp_path / "data" and common.sources["data"] == "environment POIP_DATA"
    section = load_section(Program, "node")
    assert section.values.deployment == tmp_path / "data" / "deployment.json"
    assert section.values.port == 80 and section.sources["port"] == "default"


def test_the_later_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, 'rpc_url = "http://file"\nrpc_timeout = 3\n[node]\nport = 1\nratio = 0.25\n')
    common = load_common(file)
    assert (common.values.rpc_url, common.sources["rpc_url"]) == ("http://file", f"file {file}")
    monkeypatch.setenv("POIP_RPC_URL", "http://environment")
    monkeypatch.setenv("POIP_NODE_PORT", "2")
    common = load_common(file)
    assert common.sources["rpc_url"] == "environment POIP_RPC_URL" and common.values.rpc_timeout == 3
    section = load_section(Program, "node", file)
    assert (section.values.port, section.sources["port"]) == (2, "environment POIP_NODE_PORT")
    assert (section.values.ratio, section.sources["ratio"]) == (0.25, f"file {file}")
    assert section.values.rpc_url == "http://environment"
    section = load_section(Program, "node", file, {"port": 3, "rpc_url": "http://flag", "ratio": None})
    assert (section.values.port, section.sources["port"]) == (3, "flag")
    assert (section.values.rpc_url, section.values.ratio) == ("http://flag", 0.25)


def test_a_section_may_differ_from_the_common_value(tmp_path: Path) -> None:
    file = write(tmp_path, 'rpc_url = "http://common"\n[node]\nrpc_url = "http://own"\n')
    assert load_section(Program, "node", file).values.rpc_url == "http://own"
    assert load_section(Program, "gateway", file).values.rpc_url == "http://common"


def test_lists_and_tables_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POIP_NODE_MODELS", '["a", "b"]')
    monkeypatch.setenv("POIP_NODE_URLS", '{"x": "y"}')
    values = load_section(Program, "node").values
    assert values.models == ["a", "b"] and values.urls == {"x": "y"}
    monkeypatch.setenv("POIP_NODE_MODELS", "a,b")
    with pytest.raises(ConfigurationError, match="POIP_NODE_"):
        load_section(Program, "node")


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    file = write(tmp_path, 'deployment = "d.json"\n[node]\nkey = "keys/a.json"\n')
    assert load_common(file).values.deployment_path == tmp_path / "d.json"
    section = load_section(Program, "node", file)
    assert section.values.key == tmp_path / "keys" / "a.json" and section.values.deployment == tmp_path / "d.json"


def test_the_file_in_the_data_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "poip.toml").write_text('rpc_url = "http://there"\n')
    assert load_common().values.rpc_url == "http://there"
    other = write(tmp_path, 'rpc_url = "http://named"\n')
    monkeypatch.setenv("POIP_CONFIG", str(other))
    assert load_common().values.rpc_url == "http://named"


def test_all_faults_at_once_with_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "[node]\nport = -1\nunknown = 3\n")
    monkeypatch.setenv("POIP_NODE_RATIO", "much")
    with pytest.raises(ConfigurationError) as caught:
        load_section(Program, "node", file)
    message = caught.value.message
    assert f"node.port = -1 (from file {file})" in message
    assert "node.unknown = 3" in message and "node.ratio = 'much' (from environment POIP_NODE_RATIO)" in message


@pytest.mark.parametrize("text", ["rpc_url = ", "nonsense = 1\n", "node = 3\n", "[nodes]\nport = 1\n", "\x00"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigurationError):
        load_common(file)


def test_an_absent_file_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no settings file"):
        load_common(tmp_path / "none.toml")
