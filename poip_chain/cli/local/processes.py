"""Start, watch and stop the processes of a local network, and remember them so that another command can stop them.

Knows nothing of what the processes are: it is given command lines and readiness checks.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from poip_chain.errors import ConfigurationError, PoipError, Unavailable

STOP_SECONDS = 15.0
"""A process that has not ended this long after SIGTERM is killed."""
LOG_TAIL_LINES = 15
THRIFTY = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""Many processes share one machine: glibc gives large blocks back at once, a tenth of a gigabyte of each engine."""


@dataclass(frozen=True, slots=True)
class Program:
    """One process to run. It is ready when `ready_url` answers 200, `ready_port` accepts, or (neither) it has started.

    ends: it may end by itself, with code 0.
    """

    name: str
    command: Sequence[str]
    ready_url: str | None = None
    ready_port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    ready_timeout: float = 60.0
    ends: bool = False


def in_own_process(work: Callable[..., None], *arguments: Any, tell: Callable[[str], None]) -> None:
    """Run `work(*arguments, tell)`, a module's function, in a process of its own: the memory it takes goes with it.

    Raises the PoipError that it raises, and Unavailable if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments), daemon=True)
    failure: PoipError | None = None
    try:
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while True:
                said = receiver.recv()
                if isinstance(said, PoipError):
                    failure = said
                else:
                    tell(said)
        process.join()
    finally:
        receiver.close()
        process.kill()
    if failure is not None:
        raise failure
    if process.exitcode:
        raise Unavailable(f"{work.__name__.strip('_')} ended with code {process.exitcode}.", hint="Is memory short?")


def _work(sender: Connection, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        work(*arguments, sender.send)
    except PoipError as error:
        sender.send(error)


class Supervisor:
    """Runs programs with their output in `directory`/logs and their process ids in `directory`/processes.json."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._state = directory / "processes.json"
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._may_end: set[str] = set()
        self.peak_memory_bytes = 0

    def start(self, program: Program) -> None:
        """Start one program; `wait` tells when it is ready."""
        with self.log_path(program.name).open("ab") as log:
            process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**THRIFTY, **os.environ, **program.environment},
                start_new_session=True,
            )
        self._running[program.name] = process
        if program.ends:
            self._may_end.add(program.name)
        self._remember()

    def wait(self, programs: Sequence[Program], progress: Callable[[str, float], None]) -> None:
        """Wait until all are ready; calls progress(name, seconds) as each one is.

        Raises Unavailable with the end of its log if a program dies or is not ready in time.
        """
        begin = time.monotonic()
        waiting = list(programs)
        while waiting:
            for program in list(waiting):
                elapsed = time.monotonic() - begin
                code = self._running[program.name].poll()
                if code is not None:
                    raise Unavailable(f"{program.name} ended with code {code}.", hint=self._log_hint(program.name))
                if _is_ready(program):
                    waiting.remove(program)
                    progress(program.name, elapsed)
                elif elapsed > program.ready_timeout:
                    raise Unavailable(
                        f"{program.name} is not ready after {elapsed:.0f} s.",
                        hint=self._log_hint(program.name),
                    )
            if waiting:
                time.sleep(0.3)

    def check(self) -> None:
        """Measure the memory (`peak_memory_bytes`). Raises Unavailable if any program has died."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, self.memory_bytes())
        for name, process in self._running.items():
            code = process.poll()
            if code is not None and not (code == 0 and name in self._may_end):
                raise Unavailable(f"{name} ended with code {process.returncode}.", hint=self._log_hint(name))

    def stop(self) -> None:
        """Stop everything that this supervisor started, last started first."""
        for process in reversed(self._running.values()):
            _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()
        self._state.unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """SIGKILL one program and forget it: for fault tests and demonstrations."""
        process = self._running.pop(name)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        self._remember()

    def memory_bytes(self) -> int:
        """Resident memory of this process and all that it has started; shared pages count once (PSS)."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(entry.read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.parent.name))
        waiting = [os.getpid()]
        total = 0
        while waiting:
            pid = waiting.pop()
            waiting += children.get(pid, [])
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
        return total

    def log_path(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._directory / "logs" / f"{name}.log"

    def _remember(self) -> None:
        state = {name: {"pid": p.pid, "started": _start_time(p.pid)} for name, p in self._running.items()}
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._state)

    def _log_hint(self, name: str) -> str:
        path = self.log_path(name)
        tail = "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        return f"The end of {path}:\n{tail}"


def running(directory: Path) -> dict[str, int]:
    """Names and process ids that an earlier command left running in `directory`."""
    try:
        state = json.loads((directory / "processes.json").read_text())
        entries = {name: (int(entry["pid"]), str(entry["started"])) for name, entry in state.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{directory / 'processes.json'} is damaged.", hint="Stop the processes by hand and delete it."
        ) from error
    # A process id may have been reused: the start time tells whether it is still ours.
    return {name: pid for name, (pid, started) in entries.items() if started and _start_time(pid) == started}


def stop_running(directory: Path) -> list[str]:
    """Stop what an earlier command left running; the names of what was stopped."""
    processes = running(directory)
    for pid in reversed(processes.values()):
        _signal_group(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for pid in processes.values():
        while _start_time(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if _start_time(pid):
            _signal_group(pid, signal.SIGKILL)
    (directory / "processes.json").unlink(missing_ok=True)
    return list(processes)


def preferred_port(port: int) -> int:
    """`port` if it is free on the loopback interface right now, else one that is."""
    for candidate in (port, 0):
        with socket.socket() as listener:
            # As servers do: a port whose last connections are still closing counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", candidate))
                return int(listener.getsockname()[1])
    raise Unavailable("no TCP port is free on 127.0.0.1.")


def _start_time(pid: int) -> str:
    """The kernel's start time of a live process, '' if there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _is_ready(program: Program) -> bool:
    if program.ready_port is not None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", program.ready_port)) == 0
    return program.ready_url is None or _answers(program.ready_url)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
