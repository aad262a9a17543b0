"""A devnet in a process of its own, for tests and benchmarks: started on a free port, awaited, killed at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from poip_chain.errors import Unavailable

START_SECONDS = 60.0
STOP_SECONDS = 10.0


class DevnetProcess:
    """A running node. `url` is its HTTP address, `ws_url` its WebSocket address."""

    def __init__(
        self, block_time: float | None = None, db: Path | None = None, arguments: tuple[str, ...] = ()
    ) -> None:
        """Start and wait until it answers. block_time in seconds; None seals each transaction at once.

        Raises Unavailable, with the end of the node's log, if it does not come up.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="devnet-")
        folder = Path(self._directory.name)
        ready, self.log_path = folder / "ready", folder / "log"
        pace: tuple[str, ...] = ("--automine",) if block_time is None else ("--block-time", str(block_time))
        if "--no-mining" in arguments:
            pace = ()
        store = () if db is None else ("--db", str(db))
        line = [sys.executable, "-m", "poip_chain.chain.devnet", "--port", "0", "--ready-file", str(ready)]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*line, *pace, *store, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        try:
            self.url = self._await(ready)
        except BaseException:
            self.close()
            raise
        self.ws_url = "ws" + self.url.removeprefix("http")

    def __enter__(self) -> DevnetProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM, and wait. Returns the exit status; kills after ten seconds."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Unavailable("the devnet did not end after SIGTERM.", hint=self.log_tail()) from None

    def close(self) -> None:
        """Kill it if it still runs, and remove its temporary files (not the database)."""
        if self._process.poll() is None:
            self.kill()
        self._directory.cleanup()

    def log_tail(self) -> str:
        """The last lines that the node wrote."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])

    def _await(self, ready: Path) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if ready.exists():
                return ready.read_text().strip()
            if self._process.poll() is not None:
                raise Unavailable(f"the devnet ended with status {self._process.returncode}.", hint=self.log_tail())
            time.sleep(0.02)
        raise Unavailable(f"the devnet did not start within {START_SECONDS:.0f} seconds.", hint=self.log_tail())


@contextlib.contextmanager
def running_devnet(block_time: float | None = None, db: Path | None = None) -> Iterator[str]:
    """The HTTP URL of a devnet that lives as long as the context: `with running_devnet() as url`.

    block_time  seconds between blocks, empty ones too; None (default) seals each transaction at once.
    db          SQLite file that keeps the chain; None keeps it in memory.
    """
    with DevnetProcess(block_time, db) as node:
        yield node.url
