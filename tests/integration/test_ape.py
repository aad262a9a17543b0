"""`make ape` as a test: Ape compiles the same contracts to the same code, and its scripts run on both networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ape_scripts_on_both_networks() -> None:
    for command in (["build_tools.setup_env", "--ape"], ["build_tools.ape_check"]):
        finished = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    assert "contracts: the same bytecode as the library's" in finished.stdout
    assert "the library reads back: active 110000000000000000000 wei" in finished.stdout
