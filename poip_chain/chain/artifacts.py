"""ABI and bytecode of our contracts, compiled from contracts/ with the vyper package and cached on disk.

A cached result names every source file that went into it, with its hash, and is used only while all of them are
unchanged. Knows no chain.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from poip_chain.chain.sources import contracts_directory
from poip_chain.errors import ConfigurationError, NotFound

_compiling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled contract: its JSON ABI and its creation bytecode (constructor arguments not appended)."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes
    runtime_size: int


def artifact(name: str) -> Artifact:
    """Our contract `name` ('NodeRegistry' for staking/NodeRegistry.vy).

    Raises NotFound if there is no such source and ConfigurationError if it does not compile.
    """
    paths = sorted(contracts_directory().rglob(f"{name}.vy"))
    if len(paths) != 1:
        raise NotFound(f"contracts/ holds {len(paths)} sources named {name}.vy, not one.")
    return _load(paths[0], _fingerprint(paths[0]))


def cache_directory() -> Path:
    """Where compiled contracts are kept: POIP_CACHE, else the user's cache directory."""
    configured = os.environ.get("POIP_CACHE")
    return (Path(configured) if configured else user_cache_path("poip-chain")) / "contracts"


def compile_source(source: str, name: str = "Inline") -> Artifact:
    """Compile a source text that imports nothing of ours, uncached: for small contracts in tests."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.vy"
        path.write_text(source)
        return _compile(path, [Path(directory)])[0]


def _fingerprint(path: Path) -> float:
    """The newest modification time in contracts/; it only decides how long the in-process cache holds."""
    root = contracts_directory()
    return max(file.stat().st_mtime for pattern in ("*.vy", "*.vyi") for file in root.rglob(pattern))


@cache
def _load(path: Path, _fingerprint: float) -> Artifact:
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{path}|{_toolchain()}".encode()).hexdigest()[:16]
    cached = directory / f"{path.stem}-{key}.json"
    found = _read(cached)
    if found is not None:
        return found
    with _exclusive(directory / f"{path.stem}-{key}.lock"):
        found = _read(cached)
        if found is not None:
            return found
        result, sources = _compile(path, [contracts_directory()])
        body = {
            "name": result.name,
            "abi": result.abi,
            "bytecode": result.bytecode.hex(),
            "runtime_size": result.runtime_size,
            "sources": {str(source): _hash(source) for source in sources},
        }
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(body))
        temporary.replace(cached)
        return result


@cache
def _toolchain() -> str:
    return f"vyper {package_version('vyper')} snekmate {package_version('snekmate')}"


def _read(cached: Path) -> Artifact | None:
    try:
        body = json.loads(cached.read_text())
        if any(_hash(Path(source)) != digest for source, digest in body["sources"].items()):
            return None
        return Artifact(body["name"], body["abi"], bytes.fromhex(body["bytecode"]), int(body["runtime_size"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Absent, damaged, or one of its sources is gone: compile again.
        return None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(path: Path, search: list[Path]) -> tuple[Artifact, list[Path]]:
    """Compile one file. Returns the result and every file that was read for it."""
    from vyper.compiler.input_bundle import FilesystemInputBundle
    from vyper.compiler.phases import CompilerData
    from vyper.exceptions import VyperException

    read: list[Path] = []

    class Recording(FilesystemInputBundle):  # type: ignore[misc]
        """Remembers the files that imports resolved to."""

        def _load_from_path(self, resolved_path: Any, original_path: Any) -> Any:
            loaded = super()._load_from_path(resolved_path, original_path)
            read.append(Path(resolved_path))
            return loaded

    # Vyper searches the last entry first: our own folder wins over installed packages.
    paths = [Path(sysconfig.get_path("purelib")), *search]
    # The compiler keeps global state.
    with _compiling, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = Recording(paths)
        try:
            data = CompilerData(bundle.load_file(path), input_bundle=bundle)
            from vyper.compiler.output import build_abi_output

            abi = build_abi_output(data)
            bytecode, runtime = data.bytecode, data.bytecode_runtime
        except VyperException as error:
            raise ConfigurationError(f"{path.name} does not compile: {error}") from error
    sources = sorted({source for source in read if source.is_file()} | {path})
    return Artifact(path.stem, abi, bytecode, len(runtime)), sources


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Only one process compiles a contract; the others wait and read its result."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
