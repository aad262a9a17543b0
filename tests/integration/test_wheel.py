"""The wheel holds all that an installed package needs: Vyper sources, licences, launchers, the command."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

COMPILE_ONE = """
from poip_chain.chain.sources import contracts_directory
from vyper.cli.vyper_compile import compile_files
folder = contracts_directory()
print(folder)
found = compile_files([folder / "governance" / "Parameters.vy"], ["bytecode_runtime"], paths=[str(folder)])
print(len(list(found.values())[0]["bytecode_runtime"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("poip_chain-*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    vyper = {str(path.relative_to(ROOT)) for path in (ROOT / "contracts").rglob("*.vy*")}
    shipped = {str(path.relative_to(wheel / "poip_chain")) for path in (wheel / "poip_chain").rglob("*.vy*")}
    assert vyper
    assert shipped == vyper
    (metadata,) = wheel.glob("*.dist-info")
    text = (metadata / "METADATA").read_text()
    assert "License-Expression: Apache-2.0 AND AGPL-3.0-only" in text
    assert {"cpu", "dev", "gpu"} == {line[16:] for line in text.splitlines() if line.startswith("Provides-Extra: ")}
    licences = metadata / "licenses"
    assert "Apache License" in (licences / "LICENSE").read_text()
    assert "GNU AFFERO GENERAL PUBLIC LICENSE" in (licences / "contracts" / "LICENSE").read_text()
    assert "SmolLM2-135M-Instruct" in (licences / "NOTICE").read_text()
    assert "poip = poip_chain.cli.main:main" in (metadata / "entry_points.txt").read_text()
    assert (wheel / "poip_chain" / "py.typed").is_file()
    assert (wheel / "workers").is_dir()
    assert {path.name for path in wheel.iterdir()} == {"poip_chain", "workers", metadata.name}


@pytest.mark.slow
def test_contract_compiles_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    # -P and the empty folder keep the checkout itself off the import path; the wheel comes before it in any case.
    finished = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE_ONE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    folder, length = finished.stdout.split()
    assert Path(folder) == wheel / "poip_chain" / "contracts"
    assert int(length) > 2_000
