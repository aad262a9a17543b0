"""What commands print: results on stdout (one JSON document with --json), everything else on stderr.

Amounts in JSON are decimal strings in wei. Nothing here knows the network.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from poip_chain.errors import PoipError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

_PIPE_WIDTH = 200
"""Columns of a table that goes into a pipe or file: nothing is cut."""

_json_mode = False
_has_result = False


class CheckFailed(PoipError):
    """A check that the user asked for says no (exit code 4)."""

    code = "check_failed"


def reset() -> None:
    """Back to text output; each command line starts with it."""
    global _json_mode, _has_result
    _json_mode = _has_result = False


def use_json(enabled: bool) -> None:
    """Switch to JSON output."""
    global _json_mode
    _json_mode = _json_mode or enabled


def json_mode() -> bool:
    """Whether the user asked for JSON."""
    return _json_mode


def result(data: Any, text: str | Callable[[], None] | None = None) -> None:
    """The command's result: `data` as JSON with --json; otherwise `text` (or what the function prints)."""
    global _has_result
    _has_result = True
    if _json_mode:
        click.echo(json.dumps(data, indent=2, default=_plain))
    elif callable(text):
        text()
    else:
        click.echo(text if text is not None else json.dumps(data, indent=2, default=_plain))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", empty: str = "none") -> None:
    """Print a table; columns whose name starts with '>' are aligned right."""
    if not rows:
        click.echo(f"{title}: {empty}" if title else empty)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    _console(stderr=False).print(grid)


def fields(pairs: Mapping[str, object] | Sequence[tuple[str, object]]) -> None:
    """Print names and values, one a line, values aligned."""
    entries = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    width = max((len(name) for name, _ in entries), default=0)
    for name, value in entries:
        click.echo(f"{name.ljust(width)}  {value}")


def tree(top: Tree) -> None:
    """Print a tree."""
    _console(stderr=False).print(top)


def logits(value: int) -> str:
    """A margin, in 2**-16 logits, for people."""
    return f"{value / 65536:.4f} logits"


def nats(value: int) -> str:
    """A fingerprint score, in 1/64 nat, for people."""
    return f"{value / 64:.2f} nat"


def note(text: str) -> None:
    """A remark for the person, on stderr."""
    click.echo(text, err=True)


def warning(text: str) -> None:
    """Something the person should look at, on stderr."""
    click.echo(click.style("Warning: ", fg="yellow", bold=True) + text, err=True)


def error(message: str, hint: str, code: str) -> None:
    """A failure: on stderr; with --json as the document on stdout, unless that holds a result already."""
    if _json_mode and not _has_result:
        click.echo(json.dumps({"error": {"code": code, "message": message, "hint": hint}}, indent=2))
        return
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    if hint:
        click.echo("       " + hint, err=True)


def usage_error(failure: click.UsageError) -> None:
    """A wrong command line, with the command's usage."""
    if _json_mode:
        click.echo(json.dumps({"error": {"code": "usage", "message": failure.format_message(), "hint": ""}}, indent=2))
        return
    if failure.ctx is not None:
        click.echo(failure.ctx.get_usage(), err=True)
    click.echo(click.style("Error: ", fg="red", bold=True) + failure.format_message(), err=True)
    if failure.ctx is not None:
        click.echo(f"       `{failure.ctx.command_path} --help` explains it.", err=True)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show that something is going on; the yielded function changes the text. On stderr: a spinner on a terminal, else
    one line per text."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        if not _json_mode:
            note(f"{text} ...")
        yield lambda changed: None if _json_mode else note(f"{changed} ...")
        return
    with _console(stderr=True).status(text) as status:
        yield lambda changed: status.update(changed)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before money moves, unless --yes. Raises PoipError without a terminal to ask on, click.Abort for a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise PoipError("this moves money, and there is no terminal to ask for confirmation.", hint="Add --yes.")
    click.confirm(question, abort=True, err=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


def _plain(value: Any) -> Any:
    """JSON forms of what the library's objects hold."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if hasattr(value, "to_json"):
        return value.to_json()
    return str(value)
