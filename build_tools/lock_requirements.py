"""Rewrite requirements/*.lock from the .in files beside them: exact versions with hashes, no addresses.

Run `python -m build_tools.lock_requirements` after editing an .in file; versions that are already locked
stay unless `--upgrade` is given. This file must not install anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_tools.package_sources import read_pip_settings, uv_environment

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path("requirements")
_ALWAYS = (
    "--quiet",
    "--python-version=3.11",
    "--generate-hashes",
    "--no-header",
    "--no-emit-index-url",
    "--no-emit-find-links",
    # Pre-releases only where an .in file pins one: letting them all in brings an httpx without an async
    # client.
    "--prerelease=if-necessary-or-explicit",
)


@dataclass(frozen=True)
class Lock:
    """One lock file: `name`.in becomes `name`.lock with the given extra arguments of `uv pip compile`."""

    name: str
    extra: tuple[str, ...] = ()


_OVERRIDES = ("--overrides", str(REQUIREMENTS / "overrides.txt"))
_SAME_AS_DEV = ("--constraints", str(REQUIREMENTS / "dev.lock"))
# dev first: the smaller environments take their versions from it.
LOCKS = (
    Lock("dev", _OVERRIDES),
    Lock("cpu", (*_OVERRIDES, *_SAME_AS_DEV)),
    Lock("runtime", (*_OVERRIDES, *_SAME_AS_DEV)),
    Lock("model", ("--no-deps",)),
    Lock("bootstrap"),
    Lock("build"),
    Lock("ape"),
)


def main() -> int:
    """Rewrite every lock; the exit code is 0, or that of the first uv call that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the .in files allow")
    arguments = parser.parse_args()
    python = Path(sys.executable)
    environment = uv_environment(read_pip_settings(python))
    for lock in LOCKS:
        source, target = REQUIREMENTS / f"{lock.name}.in", REQUIREMENTS / f"{lock.name}.lock"
        print(f"{source} -> {target}", flush=True)
        command = [
            str(python.parent / "uv"),
            "pip",
            "compile",
            *_ALWAYS,
            *lock.extra,
            str(source),
            "-o",
            str(target),
        ]
        command += ["--upgrade"] if arguments.upgrade else []
        finished = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if finished.returncode:
            return finished.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
