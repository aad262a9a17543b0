"""Lint of the Vyper sources: what the compiler accepts and this project does not.

Vyper 0.4.3 miscompiles some sources without a word; no fixed release exists. Those patterns are banned
here, on the syntax tree and the inferred types, never by text search:

  * characters that shift the positions the compiler reads literals from: anything but printable ASCII,
  newline and
    ordinary spaces (CVE-2026-114116 form feed, NEL, U+2028; CVE-2026-114114 byte order mark, wide
    identifiers);
  * conditional expressions that touch `msg.value` or `msg.data` in a branch (CVE-2026-114117), or yield an
  array, also
    one inside of a struct or tuple (CVE-2026-114115);
  * `create_from_blueprint` with a computed `code_offset` (CVE-2026-114118);
  * the experimental code generator.

And the habits of this project: exact pragmas, licence header, NatSpec, names, room below the size limit of
EIP-170. Run `python -m build_tools.vyper_lint [FOLDER]`. This file must not import the library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vyper import ast as vy_ast
from vyper.cli.vyper_compile import get_search_paths
from vyper.compiler.input_bundle import FilesystemInputBundle
from vyper.compiler.phases import CompilerData
from vyper.exceptions import VyperException, VyperInternalException
from vyper.semantics.types import StructT, TupleT
from vyper.semantics.types.subscriptable import DArrayT, SArrayT

ROOT = Path(__file__).resolve().parent.parent

# EIP-170 allows 24,576 bytes of runtime code; the rest is room for a fix without a redesign.
RUNTIME_SIZE_BUDGET = 22_000

LICENSE_HEADER = "# SPDX-License-Identifier: AGPL-3.0-only"
COMPILER_VERSION = "0.4.3"
EVM_VERSION = "cancun"
_REQUIRED_TAGS = ("@title", "@license", "@notice", "@custom:security", "@custom:kill")
_HEADING = re.compile(r"(?:#.*\n|\s*\n)+")
_PRAGMA = re.compile(r"^#\s?(?:pragma\s+|@(?=version))(\S+)\s*(.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Finding:
    """One broken rule at `path`:`line` (line 1 for what concerns the whole file)."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}: {self.message}"


def is_deployable(path: Path) -> bool:
    """True for CamelCase.vy: a contract with an address of its own. Modules are snake_case.vy."""
    return path.suffix == ".vy" and path.stem[:1].isupper()


def check_characters(path: Path, content: bytes) -> Iterator[Finding]:
    """Every byte must be printable ASCII or a newline; one finding for each bad line."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        bad = next((byte for byte in line if not 0x20 <= byte <= 0x7E), None)
        if bad is not None:
            column = line.index(bad) + 1
            yield Finding(path, number, f"byte 0x{bad:02x} in column {column}: only printable ASCII goes")


def check_name(path: Path) -> Iterator[Finding]:
    """CamelCase.vy, snake_case.vy or IName.vyi."""
    pattern = r"[A-Z][A-Za-z0-9]*|[a-z][a-z0-9_]*" if path.suffix == ".vy" else r"I[A-Z][A-Za-z0-9]*"
    if not re.fullmatch(pattern, path.stem):
        yield Finding(path, 1, "names are CamelCase.vy (deployable), snake_case.vy (module), IName.vyi")


def check_pragmas(path: Path, source: str) -> Iterator[Finding]:
    """Licence header, exact compiler version; in deployables also EVM version and the reentrancy guard."""
    heading = _HEADING.match(source)
    comments = heading.group() if heading is not None else ""
    if LICENSE_HEADER not in comments.splitlines():
        yield Finding(path, 1, f"the comments above the code must hold '{LICENSE_HEADER}'")
    pragmas = dict(_PRAGMA.findall(source))
    wanted = {"version": COMPILER_VERSION}
    if is_deployable(path):
        wanted |= {"evm-version": EVM_VERSION, "nonreentrancy": "on"}
    for name, value in wanted.items():
        if pragmas.get(name) != value:
            yield Finding(path, 1, f"'# pragma {name} {value}' is missing or different")
    if pragmas.get("evm-version", EVM_VERSION) != EVM_VERSION:
        yield Finding(path, 1, f"evm-version must be {EVM_VERSION}")
    if "experimental-codegen" in pragmas or "venom" in pragmas:
        yield Finding(path, 1, "the experimental code generator is not for releases")


def check_documentation(path: Path, module: vy_ast.Module) -> Iterator[Finding]:
    """NatSpec: the contract's own tags, and a @notice or @dev on each function that others can call."""
    heading = module.get("doc_string.value") or ""
    for tag in _REQUIRED_TAGS if is_deployable(path) else ("@title",):
        if tag not in heading:
            yield Finding(path, 1, f"the file's NatSpec lacks {tag}")
    for function in module.get_children(vy_ast.FunctionDef):
        decorators = {name.id for name in function.decorator_list if isinstance(name, vy_ast.Name)}
        if "external" not in decorators and not ("deploy" in decorators and is_deployable(path)):
            continue
        text = function.get("doc_string.value") or ""
        if "@notice" not in text and "@dev" not in text:
            yield Finding(path, function.lineno, f"{function.name} needs NatSpec with @notice or @dev")


def _reads_call_data(node: vy_ast.VyperNode) -> bool:
    """True if the expression touches msg.value or msg.data anywhere inside."""
    return any(
        part.attr in ("value", "data") and isinstance(part.value, vy_ast.Name) and part.value.id == "msg"
        for part in node.get_descendants(vy_ast.Attribute, include_self=True)
    )


def _contains_array(kind: Any) -> bool:
    """True for an array type, and for a struct or tuple with one inside."""
    if isinstance(kind, (SArrayT, DArrayT)):
        return True
    if isinstance(kind, StructT):
        return any(_contains_array(member) for member in kind.members.values())
    return isinstance(kind, TupleT) and any(_contains_array(member) for member in kind.member_types)


def check_expressions(path: Path, module: vy_ast.Module) -> Iterator[Finding]:
    """The miscompiled patterns. Types are judged where `module` has been through the compiler's analysis."""
    for choice in module.get_descendants(vy_ast.IfExp):
        branches = (choice.body, choice.orelse)
        if any(_reads_call_data(branch) for branch in branches):
            yield Finding(path, choice.lineno, "msg.value or msg.data in a branch of a conditional expression")
        kinds = [node._metadata.get("type") for node in (choice, *branches)]
        literals = any(branch.get_descendants(vy_ast.List, include_self=True) for branch in branches)
        if literals or any(_contains_array(kind) for kind in kinds):
            yield Finding(path, choice.lineno, "a conditional expression that yields an array; use an if statement")
    for call in module.get_descendants(vy_ast.Call):
        if isinstance(call.func, vy_ast.Name) and call.func.id == "create_from_blueprint":
            offsets = [keyword.value for keyword in call.keywords if keyword.arg == "code_offset"]
            if any(not isinstance(offset, vy_ast.Int) for offset in offsets):
                yield Finding(path, call.lineno, "code_offset of create_from_blueprint must be a literal")


def _parse(path: Path, source: str) -> vy_ast.Module:
    return vy_ast.parse_to_ast(source, module_path=str(path), resolved_path=str(path))


def _reachable(module: vy_ast.Module) -> Iterator[vy_ast.Module]:
    """The module and everything it imports, own files and libraries alike, each once."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        kind = current._metadata.get("type")
        imported = kind.imported_modules.values() if kind is not None else ()
        waiting += [info.module_t._module for info in imported if info.module_t._module is not None]


def check_compiled(path: Path, folder: Path) -> Iterator[Finding]:
    """Analyse the file with all that it imports; of a deployable, also measure the runtime code."""
    bundle = FilesystemInputBundle([*get_search_paths(), folder])
    try:
        compiled = CompilerData(bundle.load_file(path), bundle)
        for module in _reachable(compiled.annotated_vyper_module):
            yield from check_expressions(Path(module.resolved_path), module)
        size = len(compiled.bytecode_runtime) if is_deployable(path) else 0
    except (VyperException, VyperInternalException) as error:
        yield Finding(path, 1, f"does not compile: {str(error).strip()}")
        return
    if size > RUNTIME_SIZE_BUDGET:
        yield Finding(path, 1, f"runtime code is {size:,} bytes; the budget is {RUNTIME_SIZE_BUDGET:,}")


def lint_file(path: Path, folder: Path) -> list[Finding]:
    """All findings about one source file, sorted. `folder` is where absolute imports of own files start."""
    content = path.read_bytes()
    findings = [*check_name(path), *check_characters(path, content)]
    if findings:
        # The compiler's own view of such a file cannot be relied on.
        return sorted(findings)
    source = content.decode("ascii")
    findings += check_pragmas(path, source)
    try:
        module = _parse(path, source)
    except VyperException as error:
        return sorted([*findings, Finding(path, 1, f"does not parse: {str(error).strip()}")])
    findings += check_expressions(path, module)
    if path.suffix == ".vy":
        findings += [*check_documentation(path, module), *check_compiled(path, folder)]
    return sorted(set(findings))


def lint_folder(folder: Path) -> list[Finding]:
    """All findings about the .vy and .vyi files under `folder`."""
    files = sorted([*folder.rglob("*.vy"), *folder.rglob("*.vyi")])
    return sorted({finding for path in files for finding in lint_file(path, folder)})


def main(arguments: Sequence[str]) -> int:
    """Lint the folder named, or contracts/; 0 if nothing was found."""
    folder = Path(arguments[0]).resolve() if arguments else ROOT / "contracts"
    findings = lint_folder(folder)
    for finding in findings:
        print(finding)
    count = len([*folder.rglob("*.vy"), *folder.rglob("*.vyi")])
    print(f"vyper lint: {count} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
