"""The processes of a local network: work apart, readiness, memory, deaths and stops."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from poip_chain.cli.local.processes import Program, Supervisor, in_own_process
from poip_chain.errors import NotFound, Unavailable

Tell = Callable[[str], None]
SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


def works(parent: int, tell: Tell) -> None:
    tell("first")
    tell("another process" if os.getpid() != parent else "the same process")


def fails(tell: Tell) -> None:
    tell("first")
    raise NotFound("the model is not there.", hint="Fetch it.")


def dies(tell: Tell) -> None:
    os._exit(3)


def test_work_apart() -> None:
    said: list[str] = []
    in_own_process(works, os.getpid(), tell=said.append)
    assert said == ["first", "another process"]
    with pytest.raises(NotFound, match="not there") as failure:
        in_own_process(fails, tell=said.append)
    assert failure.value.hint == "Fetch it." and said[2:] == ["first"]
    with pytest.raises(Unavailable, match="ended with code 3"):
        in_own_process(dies, tell=said.append)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.stop()


def test_memory_is_that_of_all(supervisor: Supervisor) -> None:
    own = supervisor.memory_bytes()
    assert own > 10_000_000
    held = 200_000_000
    takes = f"held = b'1' * {held}; import time; print('ready', flush=True); time.sleep(60)"
    supervisor.start(Program("greedy", [sys.executable, "-c", takes]))
    while b"ready" not in supervisor.log_path("greedy").read_bytes():
        supervisor.check()
    supervisor.check()
    assert supervisor.peak_memory_bytes > own / 2 + held


def test_a_death_is_told_with_the_end_of_the_log(supervisor: Supervisor) -> None:
    supervisor.start(Program("short", [sys.executable, "-c", "print('out of ideas'); raise SystemExit(4)"]))
    with pytest.raises(Unavailable, match="short") as failure:
        supervisor.wait([Program("short", [], ready_port=1)], lambda *_: None)
    assert "out of ideas" in failure.value.hint
    supervisor.start(Program("ends", [sys.executable, "-c", ""], ends=True))
    supervisor.start(Program("lives", SLEEPS))
    with pytest.raises(Unavailable, match="short ended with code 4"):
        supervisor.check()


def test_kill_and_stop(supervisor: Supervisor, tmp_path: Path) -> None:
    for name in ("one", "two"):
        supervisor.start(Program(name, SLEEPS))
    supervisor.kill("one")
    supervisor.check()
    assert "two" in (tmp_path / "processes.json").read_text()
    supervisor.stop()
    assert not (tmp_path / "processes.json").exists()
