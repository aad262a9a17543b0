"""All checks that need no run of the code: ruff, its formatter, mypy, and the lint of the contracts.

Every check runs even if an earlier one failed, so that one run shows everything. This file must hold no
rules of its own: they are in pyproject.toml and vyper_lint.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    ("ruff", ("-m", "ruff", "check", ".")),
    ("ruff format", ("-m", "ruff", "format", "--check", ".")),
    ("mypy", ("-m", "mypy")),
    ("vyper lint", ("-m", "build_tools.vyper_lint")),
)


def main() -> int:
    """Run the checks one after the other; 0 if all passed."""
    failed = []
    for name, command in CHECKS:
        started = time.monotonic()
        finished = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        verdict = "failed" if finished.returncode else "passed"
        print(f"== {name} {verdict} in {time.monotonic() - started:.1f} s", flush=True)
        failed += [name] if finished.returncode else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
