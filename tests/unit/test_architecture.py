"""The layers keep their direction: a room imports only from rooms below it, and nobody imports Ape."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import poip_chain

PACKAGE = Path(poip_chain.__file__).parent
ROOT = PACKAGE.parent

# From the top down; a room may import itself and what stands after it.
LAYERS = (
    "cli",
    "simulation",
    "control",
    "proof",
    "service",
    "transaction",
    "economic",
    "chain",
    "canonical",
    "spec",
)
# Below every layer.
COMMON = {"errors"}
# The whole of what the room that must stay pure, and the one inside of vLLM's process, may import.
SPEC_MAY_IMPORT = {"numpy", "eth_abi", "eth_hash", "eth_keys", "eth_utils", "eth_typing", "poip_chain"}
PLUGIN_MAY_IMPORT = {"numpy", "torch", "vllm", "poip_chain"}


def imported_names(source: str) -> Iterator[str]:
    """The full dotted names that a source imports, inside of functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer: write the full name"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer of a dotted name of this package; None for what is common to all or not ours."""
    parts = name.split(".")
    if parts[0] != "poip_chain" or len(parts) == 1:
        return None
    return None if parts[1] in COMMON else parts[1]


def upward_imports(layer: str, source: str) -> list[str]:
    """The names that a file in `layer` imports from above it, or from no known layer."""
    allowed = set(LAYERS[LAYERS.index(layer) :])
    found = (name for name in imported_names(source) if layer_of(name) not in allowed | {None})
    return sorted({name for name in found if not name.startswith("poip_chain.__")})


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("poip_chain"), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts[0]
    if place in LAYERS:
        assert upward_imports(place, path.read_text()) == []
    else:
        # What lies beside the layers belongs to all of them, so it may know none.
        assert path.stem in COMMON | {"__init__"}
        assert [name for name in imported_names(path.read_text()) if layer_of(name)] == []


@pytest.mark.parametrize("path", sources("poip_chain", "workers"), ids=name_of)
def test_nobody_imports_ape(path: Path) -> None:
    assert not [name for name in imported_names(path.read_text()) if name.split(".")[0] in {"ape", "ape_vyper"}]


@pytest.mark.parametrize("path", [path for path in sources("poip_chain") if path.name == "__init__.py"], ids=name_of)
def test_package_files_hold_no_code(path: Path) -> None:
    """A docstring may stand there; names are imported from where they are defined."""
    body = ast.parse(path.read_text()).body
    code = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    names = [ast.unparse(node).split(" = ")[0] for node in code]
    assert names in ([], ["__version__"]) if path.parent == PACKAGE else names == []


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize("path", sources("poip_chain/spec"), ids=name_of)
def test_spec_is_pure(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported_names(path.read_text())}
    forbidden = {
        "os",
        "io",
        "socket",
        "time",
        "datetime",
        "random",
        "secrets",
        "subprocess",
        "urllib",
        "asyncio",
    }
    assert tops & forbidden == set()
    assert tops - SPEC_MAY_IMPORT <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((PACKAGE / "service" / "engine").glob("*plugin*.py")), ids=name_of)
def test_engine_plugin_is_light(path: Path) -> None:
    names = list(imported_names(path.read_text()))
    assert {name.split(".")[0] for name in names} - PLUGIN_MAY_IMPORT <= set(sys.stdlib_module_names)
    assert {layer_of(name) for name in names} <= {None, "spec", "service"}


def test_the_check_itself_sees_a_wrong_import() -> None:
    bad = "def f():\n    from poip_chain.control.gateway import app\n"
    assert upward_imports("chain", bad) == ["poip_chain.control.gateway", "poip_chain.control.gateway.app"]
    assert upward_imports("chain", "from poip_chain import control") == ["poip_chain.control"]
    assert upward_imports("cli", bad) == []
    assert upward_imports("spec", "import poip_chain.errors\nimport json") == []
