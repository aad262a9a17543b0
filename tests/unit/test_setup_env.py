"""Set-up: what it asks of the machine, when it does nothing, and what it says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import setup_env
from build_tools.package_sources import read_pip_settings, uv_environment


def script(path: Path, text: str) -> Path:
    """An executable shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> setup_env.Environment:
    """A project folder of its own with an empty environment in it."""
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name, pin in {"dev": "torch==2.13.0+cpu", "bootstrap": "uv==1.2.3", "build": "wheel==1.0"}.items():
        (requirements / f"{name}.lock").write_text(f"{pin} \\\n    --hash=sha256:00\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "REQUIREMENTS", requirements)
    made = setup_env.Environment(".venv", ("dev",), "testing", has_package=True)
    script(made.python, "exit 0")
    return made


def test_pip_settings_reach_uv() -> None:
    settings = {
        "index-url": "https://mirror.example/simple",
        "extra-index-url": "https://one.example/simple\nhttps://two.example/simple",
        "find-links": "/wheels /more",
        "trusted-host": "mirror.example",
        "cert": "/certificates.pem",
        "timeout": "90",
    }
    assert uv_environment(settings, {"HOME": "/home/x"}) == {
        "HOME": "/home/x",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "mirror.example",
        "UV_HTTP_TIMEOUT": "90",
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_settings_made_for_uv_win() -> None:
    chosen = {"UV_FIND_LINKS": "/mine", "UV_EXTRA_INDEX_URL": "https://x.example", "UV_INDEX_STRATEGY": "first-index"}
    settings = {"find-links": "/wheels", "extra-index-url": "https://y.example"}
    assert uv_environment(settings, chosen) == chosen


def test_pip_settings_are_read_with_pips_own_precedence(tmp_path: Path) -> None:
    listing = "global.find-links='/one'\nglobal.cert='/c'\ninstall.find-links='/two'\n:env:.find-links='/three'"
    python = script(tmp_path / "python", f"cat <<\"END\"\n{listing}\nfreeze.timeout='1'\nEND")
    assert read_pip_settings(python) == {"find-links": "/three", "cert": "/c"}
    assert read_pip_settings(script(tmp_path / "nopip", "exit 1")) == {}


def test_does_nothing_when_the_stamp_matches(
    environment: setup_env.Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(setup_env, "install", lambda _: done.append("locks"))
    monkeypatch.setattr(setup_env, "install_package", lambda _: done.append("package"))
    setup_env.set_up(environment)
    assert done == ["locks", "package"]
    capsys.readouterr()
    setup_env.set_up(environment)
    assert done == ["locks", "package"]
    assert capsys.readouterr().out == ""
    # A new entry point needs the package alone; a new lock needs everything.
    (setup_env.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    setup_env.set_up(environment)
    assert done == ["locks", "package", "package"]
    environment.lock_paths[0].write_text("torch==2.14.0+cpu\n")
    setup_env.set_up(environment)
    assert done[3:] == ["locks", "package"]


def test_a_set_up_cut_short_is_done_again(environment: setup_env.Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: setup_env.Environment) -> None:
        raise setup_env.SetupError("no network")

    setup_env.write_stamp(environment, {"locks": "of another time"})
    monkeypatch.setattr(setup_env, "install", fail)
    with pytest.raises(setup_env.SetupError):
        setup_env.set_up(environment)
    assert setup_env.read_stamp(environment) == {}
    (environment.path / setup_env._STAMP).write_text("{half")
    assert setup_env.read_stamp(environment) == {}


def test_only_a_working_environment_of_the_right_python_is_kept(environment: setup_env.Environment) -> None:
    assert not setup_env.is_usable(environment)
    script(environment.python, "echo 3 12")
    assert not setup_env.is_usable(environment)
    script(environment.python, "echo 3 11")
    assert setup_env.is_usable(environment)
    environment.python.unlink()
    assert not setup_env.is_usable(environment)


def test_missing_torch_build_stops_with_advice(environment: setup_env.Environment) -> None:
    asked = setup_env.ROOT / "asked"
    script(environment.path / "bin" / "uv", f'echo "$@" > {asked}\necho "no such version" >&2\nexit 1')
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.check_torch_source(environment, {"PATH": os.environ["PATH"]})
    said = str(caught.value)
    assert "nothing was downloaded" in said
    assert "torch==2.13.0+cpu" in said
    assert "pip config set" in said
    assert "no such version" in said
    words = asked.read_text().split()
    assert {"--dry-run", "--no-deps", "torch==2.13.0+cpu"} <= set(words)


def test_the_real_resolver_refuses_a_machine_without_a_source(
    environment: setup_env.Environment, tmp_path: Path
) -> None:
    """uv itself, cut off from every index: the CPU build is not there, and the advice says how to get it."""
    empty = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    real = setup_env.Environment(str(empty), ("dev",), "testing", has_package=True)
    (empty / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}
    with pytest.raises(setup_env.SetupError, match="No source of PyTorch's CPU build"):
        setup_env.check_torch_source(real, variables)


def test_bootstrap_fetches_uv_only_when_another_version_is_there(environment: setup_env.Environment) -> None:
    log = setup_env.ROOT / "pip.log"
    script(environment.python, f'echo "$@" >> {log}')
    script(environment.path / "bin" / "uv", 'echo "uv 1.2.3 (of today)"')
    setup_env.install_uv(environment)
    assert not log.exists()
    script(environment.path / "bin" / "uv", 'echo "uv 1.2.2"')
    setup_env.install_uv(environment)
    assert {"--require-hashes", "--no-deps"} <= set(log.read_text().split())


def test_failed_step_names_itself_and_the_fix(environment: setup_env.Environment) -> None:
    with pytest.raises(setup_env.SetupError, match=r"Failed while testing \(exit code 3;(.|\n)*Fix: do x"):
        setup_env.run("testing", ["/bin/sh", "-c", "exit 3"], os.environ, "Fix: do x.")


def test_long_steps_show_that_they_live(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], environment: setup_env.Environment
) -> None:
    monkeypatch.setattr(setup_env, "_HEARTBEAT_SECONDS", 0.02)
    setup_env.run("waiting", ["/bin/sh", "-c", "sleep 0.2"], os.environ, "")
    assert "... still waiting" in capfd.readouterr().out


def test_too_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "FREE_GIGABYTES", 10**9)
    with pytest.raises(setup_env.SetupError, match="make room"):
        setup_env.check_disk()


def test_unknown_pin(environment: setup_env.Environment) -> None:
    with pytest.raises(setup_env.SetupError, match=r"dev\.lock pins no vllm"):
        setup_env.pinned(environment.lock_paths[0], "vllm")


def test_wrong_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup_env, "PYTHON_VERSION", (3, 1))
    monkeypatch.setattr(sys, "argv", ["setup_env"])
    assert setup_env.main() == 1
    assert "make PYTHON=" in capsys.readouterr().err


def test_the_list_of_packages_goes_into_a_log(
    environment: setup_env.Environment, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """350 lines of packages hide the few that matter; the steps are still shown."""
    monkeypatch.setattr(setup_env, "is_usable", lambda _: True)
    monkeypatch.setattr(setup_env, "install_uv", lambda _: None)
    monkeypatch.setattr(setup_env, "check_torch_source", lambda *_: None)
    monkeypatch.setattr(setup_env, "check_disk", lambda: None)
    lister = 'for i in $(seq 350); do echo "+ package-$i"; done; echo "Installed 350" >&2'
    script(environment.path / "bin" / "uv", lister)
    setup_env.install(environment)
    shown = capfd.readouterr()
    assert [line[:5] for line in shown.out.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"] and shown.err == ""
    log = environment.path / "poip-setup.log"
    assert f"{environment.folder}/{log.name}" in shown.out
    assert len(log.read_text().splitlines()) == 351
    # A failure shows the end of it, and where the rest is.
    script(environment.path / "bin" / "uv", f'{lister}; echo "no space left" >&2; exit 7')
    with pytest.raises(setup_env.SetupError, match=r"exit code 7(.|\n)*352 lines(.|\n)*poip-setup\.log(.|\n)*Fix:"):
        setup_env.install(environment)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "no space left" and "+ package-1" not in lines and len(lines) < 50
