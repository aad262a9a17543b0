"""Create or refresh the project's Python environments from the lock files; does nothing if they are current.

`python3.11 -m build_tools.setup_env` makes .venv (runtime, engine, default model, development tools),
`--ape` makes .venv-ape (the contracts toolchain of Ape). It runs on a bare Python 3.11, so it must import
nothing but the standard library and build_tools. When a lock file has not changed since the last run, it
needs no network.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from build_tools.package_sources import read_pip_settings, uv_environment

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PYTHON_VERSION = (3, 11)
# Installed packages, uv's cache of them and the prepared model, rounded up.
FREE_GIGABYTES = 10
_HEARTBEAT_SECONDS = 20.0
_STAMP = "poip-setup.json"
_LOG = "poip-setup.log"
_SHOWN_LOG_LINES = 40

TORCH_ADVICE = """\
No source of PyTorch's CPU build is configured for pip, so nothing was downloaded: without one the ordinary
build would come, with several gigabytes of CUDA packages that a CPU node cannot use.
Fix: add PyTorch's CPU wheel index (pytorch.org, "Start Locally", CPU, names its address), or a folder that
holds the wheel of {requirement}, to pip's own settings, and run the command again:
    pip config set global.extra-index-url ADDRESS
    pip config set global.find-links FOLDER"""


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """One virtual environment: its folder, its locks in requirements/, and what it contains besides."""

    folder: str
    locks: tuple[str, ...]
    purpose: str
    has_package: bool

    @property
    def path(self) -> Path:
        return ROOT / self.folder

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def lock_paths(self) -> list[Path]:
        return [REQUIREMENTS / f"{name}.lock" for name in self.locks]


MAIN = Environment(".venv", ("dev", "model"), "the runtime, a CPU engine, the default model and tools", True)
APE = Environment(".venv-ape", ("ape",), "the contracts toolchain", False)


def fingerprint(paths: Sequence[Path], *extra: str) -> str:
    """SHA-256 over the contents of the files and the extra strings, in order, as hex."""
    digest = hashlib.sha256()
    for part in [path.read_bytes() for path in paths] + [text.encode() for text in extra]:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def wanted_stamp(environment: Environment) -> dict[str, str]:
    """What a finished environment records: hashes of its locks, and of what its package depends on."""
    locks = [*environment.lock_paths, REQUIREMENTS / "bootstrap.lock", REQUIREMENTS / "build.lock"]
    stamp = {"locks": fingerprint(locks, str(ROOT))}
    if environment.has_package:
        stamp["package"] = fingerprint([ROOT / "pyproject.toml"], str(ROOT))
    return stamp


def read_stamp(environment: Environment) -> dict[str, str]:
    """The stamp of the last finished set-up; empty if there was none or the environment cannot run."""
    try:
        stamp = json.loads((environment.path / _STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and environment.python.exists() else {}


def write_stamp(environment: Environment, stamp: Mapping[str, str]) -> None:
    """Record `stamp` in one step, so that a set-up that was cut short is never taken for a finished one."""
    partial = environment.path / f"{_STAMP}.partial"
    partial.write_text(json.dumps(stamp, indent=1) + "\n")
    partial.replace(environment.path / _STAMP)


def pinned(lock: Path, package: str) -> str:
    """The requirement `package==version` that a lock holds; `SetupError` if it holds none."""
    found = re.search(rf"^{re.escape(package)}==[^\s\\;]+", lock.read_text(), re.MULTILINE)
    if found is None:
        raise SetupError(f"{lock.name} pins no {package}. Restore it, or run build_tools.lock_requirements.")
    return found.group()


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print a line every `_HEARTBEAT_SECONDS` while the body runs: a long quiet step is seen to live."""
    done, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(_HEARTBEAT_SECONDS):
            print(f"      ... still {what}, {time.monotonic() - started:.0f} s", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run(
    what: str, command: Sequence[str], environment: Mapping[str, str], fix: str, *, log: Path | None = None
) -> None:
    """Run one step; `SetupError` with `fix` if it fails. Its output is shown or, with `log`, goes into that file, whose
    end is shown if the step fails."""
    with heartbeat(what), log.open("w") if log else nullcontext() as file:
        finished = subprocess.run(command, cwd=ROOT, env=dict(environment), stdout=file, stderr=file, check=False)
    if finished.returncode == 0:
        return
    if log is not None:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-_SHOWN_LOG_LINES:]), flush=True)
        fix = f"All {len(lines)} lines of it: {log}\n{fix}"
    raise SetupError(f"Failed while {what} (exit code {finished.returncode}; its own words are above).\n{fix}")


def is_usable(environment: Environment) -> bool:
    """True if the folder holds a virtual environment of the right Python whose interpreter and pip still run."""
    program = "import pip, sys; print(*sys.version_info[:2])"
    try:
        asked = subprocess.run(
            [str(environment.python), "-c", program], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return False
    return tuple(map(int, asked.split())) == PYTHON_VERSION


def create(environment: Environment) -> None:
    """Make the virtual environment anew, with pip in it."""
    try:
        venv.create(environment.path, clear=True, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(environment.path, ignore_errors=True)
        raise SetupError(
            f"Python at {sys.executable} could not make a virtual environment: {error}\n"
            "Fix: install its venv module (Debian, Ubuntu: apt-get install python3.11-venv), then try again."
        ) from error


def install_uv(environment: Environment) -> None:
    """Have pip fetch the pinned uv, unless that very version is there."""
    uv = environment.path / "bin" / "uv"
    version = pinned(REQUIREMENTS / "bootstrap.lock", "uv").partition("==")[2]
    if uv.exists():
        said = subprocess.run([str(uv), "--version"], capture_output=True, text=True, check=False).stdout.split()
        if said[1:2] == [version]:
            return
    lock = str(REQUIREMENTS / "bootstrap.lock")
    command = [str(environment.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(
        "fetching the installer (uv)",
        [*command, "--require-hashes", "--no-deps", "-r", lock],
        os.environ,
        "Fix: check that pip can reach a package index from this machine (pip config list), and try again.",
    )


def check_torch_source(environment: Environment, uv_variables: Mapping[str, str]) -> None:
    """Ask the resolver, without installing, for the locked CPU build of torch; `SetupError` if none."""
    requirement = pinned(environment.lock_paths[0], "torch")
    command = [str(environment.path / "bin" / "uv"), "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    asked = subprocess.run(
        [*command, "--python", str(environment.python), requirement],
        env=dict(uv_variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        raise SetupError(
            f"{TORCH_ADVICE.format(requirement=requirement)}\n\nThe resolver said:\n{asked.stderr.strip()}"
        )


def check_disk() -> None:
    """`SetupError` if the disk plainly cannot hold the environment."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GIGABYTES:
        raise SetupError(
            f"{free:.1f} GB are free where the project lies; set-up needs about {FREE_GIGABYTES} GB.\n"
            "Fix: make room, or move the project to a larger disk."
        )


def install(environment: Environment) -> None:
    """Make the environment hold exactly what its locks say."""
    count = sum(len(re.findall(r"^\S+==", path.read_text(), re.MULTILINE)) for path in environment.lock_paths)
    if not is_usable(environment):
        print(f"[1/4] making {environment.folder}", flush=True)
        create(environment)
    else:
        print(f"[1/4] {environment.folder} exists", flush=True)
    print("[2/4] fetching the installer (uv)", flush=True)
    install_uv(environment)
    uv_variables = uv_environment(read_pip_settings(environment.python))
    if environment.has_package:
        print("[3/4] looking for PyTorch's CPU build", flush=True)
        check_torch_source(environment, uv_variables)
        check_disk()
    else:
        print("[3/4] no engine in this environment: PyTorch is not needed", flush=True)
    print(
        f"[4/4] installing {count} packages, two minutes from a near index; they are listed in {environment.folder}/{_LOG}",
        flush=True,
    )
    command = [
        str(environment.path / "bin" / "uv"),
        "pip",
        "sync",
        "--require-hashes",
        "--require-build-hashes",
    ]
    command += ["--preview-features", "build-dependency-hashes"]
    command += ["--build-constraints", str(REQUIREMENTS / "build.lock"), "--python", str(environment.python)]
    # Once here instead of in each process: where Python may not write bytecode, an engine's start took four times as long.
    command.append("--compile-bytecode")
    run(
        "installing packages",
        [*command, *map(str, environment.lock_paths)],
        uv_variables,
        "Fix: check the connection to the package index and the free space, then run the command again; it\n"
        "goes on from what is already downloaded. A hash mismatch means that the index serves other files\n"
        "than were locked.",
        log=environment.path / _LOG,
    )


def install_package(environment: Environment) -> None:
    """Install this checkout in place; needs no network, because the build tool comes with the locks."""
    command = [str(environment.path / "bin" / "uv"), "pip", "install", "--quiet", "--offline", "--no-deps"]
    run(
        "installing poip-chain in place",
        [*command, "--no-build-isolation", "--python", str(environment.python), "-e", str(ROOT)],
        uv_environment(read_pip_settings(environment.python)),
        "Fix: the error above is about this checkout: pyproject.toml, or a file that it names, is broken.",
    )


def set_up(environment: Environment) -> None:
    """Bring `environment` up to date with the lock files and pyproject.toml, doing only what is needed."""
    wanted = wanted_stamp(environment)
    present = read_stamp(environment)
    if present == wanted:
        return
    if present.get("locks") != wanted["locks"]:
        print(f"Setting up {environment.folder}: {environment.purpose}.", flush=True)
        started = time.monotonic()
        (environment.path / _STAMP).unlink(missing_ok=True)
        install(environment)
        print(f"{environment.folder} is ready after {time.monotonic() - started:.0f} s.", flush=True)
    if environment.has_package:
        install_package(environment)
    write_stamp(environment, wanted)


def main() -> int:
    """Set up the environment asked for; 0 when it is ready, 1 with a message when it is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ape", action="store_true", help="the contracts toolchain in .venv-ape")
    arguments = parser.parse_args()
    if sys.version_info[:2] != PYTHON_VERSION:
        print(
            f"Set-up needs Python 3.11; {sys.executable} is {sys.version.split()[0]}.\n"
            "Fix: install Python 3.11, or name it: make PYTHON=/path/to/python3.11 ...",
            file=sys.stderr,
        )
        return 1
    # Two set-ups at once would tread on each other; the second waits and then finds nothing to do.
    with (REQUIREMENTS / "bootstrap.lock").open() as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            set_up(APE if arguments.ape else MAIN)
        except SetupError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
