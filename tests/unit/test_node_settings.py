"""Where a node's settings come from, and that crash points sleep unless they are woken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from poip_chain.errors import ConfigurationError
from poip_chain.service.node.faults import CRASH_POINTS, crash_point
from poip_chain.service.node.settings import NodeSettings, load_settings


def test_the_later_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text('rpc_url = "http://a"\ndata = "here"\nkey = "/abs/key.json"\nport = 1\ncapacity = 3\n')
    monkeypatch.setenv("POIP_NODE_PORT", "2")
    monkeypatch.setenv("POIP_NODE_BATCH_AGE", "7.5")
    settings = load_settings(file, port=4, host=None)
    assert (settings.rpc_url, settings.port, settings.capacity, settings.batch_age) == ("http://a", 4, 3, 7.5)
    assert settings.data == tmp_path / "here" and settings.key == Path("/abs/key.json")
    assert load_settings(file).port == 2
    assert settings.public_endpoint == "http://127.0.0.1:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 99999", "port"),
        ("prot = 1", "prot"),
        ('model_id = "0x12"', "model_id"),
        ('misbehave = "lie"', "misbehave"),
        ("batch_count = 0", "batch_count"),
        ("input_price = -1", "input_price"),
        ("port = ", "cannot read"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_settings(file)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_settings(tmp_path / "none.toml")


def test_misbehaviour_is_off() -> None:
    assert NodeSettings().withhold_after is None
    assert not NodeSettings().contests_everything
    assert NodeSettings(misbehave="withhold_after=2").withhold_after == 2
    stubborn = NodeSettings(misbehave="contest")
    assert stubborn.contests_everything and stubborn.withhold_after is None


def test_crash_points_need_two_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POIP_CRASH_AT", "admitted")
    crash_point("admitted")
    monkeypatch.setenv("POIP_ALLOW_CRASH_POINTS", "yes")
    crash_point("admitted")
    monkeypatch.setenv("POIP_ALLOW_CRASH_POINTS", "1")
    crash_point("first_token")


def test_a_crash_point_kills_at_its_passage() -> None:
    script = (
        "import os; os.environ.update(POIP_ALLOW_CRASH_POINTS='1', POIP_CRASH_AT='settled:2')\n"
        "from poip_chain.service.node.faults import crash_point\n"
        "crash_point('settled'); print('once', flush=True); crash_point('settled'); print('twice', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-9, "once\n")


def test_every_crash_point_is_in_the_code() -> None:
    folder = Path(crash_point.__code__.co_filename).parent
    text = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "faults.py")
    assert {name for name in CRASH_POINTS if f'"{name}"' not in text} == set()
