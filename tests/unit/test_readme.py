"""Every `poip` command line in README and docs parses against the real commands, and every Python block compiles."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from poip_chain.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, content) of every fenced block in a language, '' for none."""
    found: list[tuple[str, str]] = []
    opened = ""
    for path in DOCUMENTS:
        lines: list[str] | None = None
        for line in path.read_text().splitlines():
            if lines is not None and line != "```":
                lines.append(line)
            elif lines is not None:
                found += [(path.name, "\n".join(lines))] if opened == language else []
                lines = None
            elif line.startswith("```"):
                opened, lines = line[3:].strip(), []
    return found


def command_lines() -> list[str]:
    lines = [line.strip() for _, block in blocks("") for line in block.splitlines()]
    return [part.strip() for line in lines if line.startswith("poip ") for part in line.split("&&")]


def test_there_are_examples() -> None:
    assert len(command_lines()) >= 10 and blocks("python")


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="poip")
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, f"there is no command {arguments[0]!r} in: {line}"
        context = click.Context(found, info_name=arguments.pop(0), parent=context)
        command = found
    # Parsing alone: types, required options and arguments are checked, nothing is run.
    command.parse_args(context, arguments)


@pytest.mark.parametrize(("name", "block"), blocks("python"))
def test_python_blocks_compile(name: str, block: str) -> None:
    compile(block, name, "exec")
