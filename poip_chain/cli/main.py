"""The `poip` command. Finds its commands by their files and imports only the one that is asked for.

A file commands/<noun>.py gives `poip <noun>`, a file commands/<noun>_<verb>.py gives `poip <noun> <verb>` (in the group of
commands/<noun>.py if there is one); each exports `command`, a click command or group. The first line of a file's
docstring is what the list of commands says about it, so that `poip --help` imports none of them.
"""

from __future__ import annotations

import ast
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from poip_chain.cli import output
from poip_chain.errors import PoipError, Unavailable

COMMANDS = Path(__file__).parent / "commands"
PACKAGE = "poip_chain.cli.commands"

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_CHECK_FAILED = 4
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose further members are files: see the module's docstring. `noun` '' is the top level."""

    def __init__(self, *arguments: Any, noun: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noun = noun

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all members."""
        names = set(super().list_commands(ctx))
        for path in COMMANDS.glob("[a-z]*.py"):
            noun, _, verb = path.stem.partition("_")
            if noun and self.noun == "":
                names.add(noun)
            elif verb and noun == self.noun:
                names.add(verb.replace("_", "-"))
        return sorted(names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a member."""
        known = super().get_command(ctx, cmd_name)
        if known is not None:
            return known
        if not cmd_name.replace("-", "").isalnum():
            return None
        stem = cmd_name if self.noun == "" else f"{self.noun}_{cmd_name.replace('-', '_')}"
        if (COMMANDS / f"{stem}.py").is_file():
            return _exported(stem)
        if self.noun == "" and any(COMMANDS.glob(f"{cmd_name}_*.py")):
            return LazyGroup(cmd_name, noun=cmd_name, help=f"Commands about {cmd_name}.")
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the members with a line each, without importing their files."""
        rows = []
        for name in self.list_commands(ctx):
            known = super().get_command(ctx, name)
            stem = name if self.noun == "" else f"{self.noun}_{name.replace('-', '_')}"
            rows.append((name, known.get_short_help_str(100) if known else _summary(stem)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def group(noun: str, help_text: str) -> click.Group:
    """The group of commands/<noun>.py; commands/<noun>_<verb>.py join it."""
    return LazyGroup(noun, noun=noun, help=help_text, no_args_is_help=True)


def _exported(stem: str) -> click.Command:
    command = importlib.import_module(f"{PACKAGE}.{stem}").command
    assert isinstance(command, click.Command)
    return command


def _summary(stem: str) -> str:
    """First line of a command file's docstring."""
    try:
        documentation = ast.get_docstring(ast.parse((COMMANDS / f"{stem}.py").read_text())) or ""
    except (OSError, SyntaxError):
        return ""
    return documentation.splitlines()[0].removesuffix(".") if documentation else ""


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 not reachable; 4 a check says no (a false receipt, "
    "a verdict of fraud, a fault that `doctor` finds).",
)
@click.version_option(package_name="poip-chain", prog_name="poip", message="%(prog)s %(version)s")
def cli() -> None:
    """Proof of Inference Protocol: verifiable answers of open language models.

    Options stand after the command. Every command takes --json; where money moves also --dry-run and --yes. `poip config`
    shows the settings and where each comes from.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code. Deliberate errors are printed without a traceback."""
    output.reset()
    # A wrong command line fails before any command could read its --json.
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_json = "--json" in given[: given.index("--")] if "--" in given else "--json" in given
    try:
        code = cli.main(args=None if arguments is None else list(arguments), prog_name="poip", standalone_mode=False)
        # Without standalone mode click returns the code of an Exit, and otherwise what the command returned.
        return code if type(code) is int else EXIT_DONE
    except click.exceptions.Exit as exit_:
        return int(exit_.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.UsageError as error:
        from poip_chain.cli.usage import explained

        output.use_json(wants_json)
        output.usage_error(explained(error))
        return EXIT_USAGE
    except click.ClickException as error:
        output.error(error.format_message(), "", "usage")
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        output.note("stopped.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`poip ... | head`): not our failure, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except output.CheckFailed as error:
        output.error(error.message, error.hint, error.code)
        return EXIT_CHECK_FAILED
    except PoipError as error:
        output.error(error.message, error.hint, error.code)
        return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
    except OSError as error:
        output.error(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ") + ".", "", "system")
        return EXIT_FAILED
    except Exception as error:
        if os.environ.get("POIP_DEBUG"):
            raise
        output.error(
            f"an error that should not happen: {type(error).__name__}: {error}.",
            "Set POIP_DEBUG=1 to see where, and report it.",
            "internal_error",
        )
        return EXIT_FAILED


def main() -> None:
    """The console script."""
    # A service manager's stop request ends long-running commands as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(run())
