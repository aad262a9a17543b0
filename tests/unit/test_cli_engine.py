"""`poip engine serve` refuses at once what vLLM would only find out after minutes; no engine is started here."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from poip_chain.cli import main
from poip_chain.errors import ConfigurationError
from poip_chain.service.engine.server import EngineOptions, EngineServer


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; (code, error message and hint). A process that it would start fails the test."""

    def start(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", start)

    def run(*arguments: str) -> tuple[int, str]:
        code = main.run(["engine", "serve", *arguments, "--data", str(tmp_path / "data"), "--json"])
        error = json.loads(capsys.readouterr().out)["error"]
        return code, f"{error['message']} {error['hint']}"

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_a_folder_that_is_no_model(serve: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, text = serve("--model", str(folder))
        assert code == 1 and str(folder) in text and "config.json" in text and "poip model prepare" in text
    assert serve()[0] == 2
    assert not (tmp_path / "data").exists()


def test_a_taken_port(serve: Any, model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = serve("--model", str(model), "--port", str(port))
        assert code == 1 and f"127.0.0.1:{port}" in text and "engine.port" in text and "another port" in text
    assert not (tmp_path / "data").exists()
    # Free again, it would start.
    with pytest.raises(AssertionError, match="started"):
        EngineServer(EngineOptions(model, port=port)).start()


def test_an_address_that_is_not_here(serve: Any, model: Path) -> None:
    code, text = serve("--model", str(model), "--host", "192.0.2.1", "--port", "1234")
    assert code == 1 and "192.0.2.1:1234" in text and "engine.host" in text
    for port in ("-1", "65536", "x"):
        assert serve("--model", str(model), "--port", port)[0] == 2


def test_the_socket_that_a_program_takes_is_its_own() -> None:
    from poip_chain.chain.listening import bound_socket

    with bound_socket("127.0.0.1", 0, "node") as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        bound.listen()
        with pytest.raises(ConfigurationError, match=r"node\.port") as caught:
            bound_socket("127.0.0.1", port, "node")
        assert "another port" in caught.value.hint
    bound_socket("127.0.0.1", port, "node").close()
