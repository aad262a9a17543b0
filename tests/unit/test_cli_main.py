"""The command line's frame: finding commands, exit codes, errors without tracebacks, quick help."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from poip_chain.cli import main, output
from poip_chain.cli.context import AMOUNT, HASH, Context, command_context, sending_context
from poip_chain.errors import InvalidInput, PoipError, TransactionFailed, Unavailable

ROOT = Path(__file__).resolve().parents[2]
NOUNS = sorted({path.stem.partition("_")[0] for path in main.COMMANDS.glob("[a-z]*.py")})

HEAVY = ("web3", "pydantic", "rich", "vyper", "torch", "fastapi", "httpx", "eth_account", "transformers", "numpy")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    done = fresh(
        "import sys\nfrom poip_chain.cli.main import run\ncode = run(['--help'])\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)), code)"
    )
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stdout + done.stderr
    assert "\n  deploy " in done.stdout and "\n  stake " in done.stdout


def test_no_command_imports_anything_heavy_for_its_help() -> None:
    done = fresh(
        "import sys\nfrom poip_chain.cli.main import run\n"
        f"codes = [run([noun, '--help']) for noun in {NOUNS!r}]\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)), set(codes))"
    )
    assert done.stdout.splitlines()[-1] == "HEAVY [] {0}", done.stdout[-2000:] + done.stderr


def test_every_command_has_help_and_json() -> None:
    """Each command of each file, groups opened: a help text, and --json (also --dry-run where it asks with --yes)."""
    seen = 0

    def visit(command: click.Command, name: str) -> None:
        nonlocal seen
        assert command.get_short_help_str(), f"{name} has no help"
        if isinstance(command, click.Group):
            with click.Context(command, info_name=name) as context:
                for member in command.list_commands(context):
                    found = command.get_command(context, member)
                    assert found is not None, f"{name} {member}"
                    visit(found, f"{name} {member}")
            return
        options = {option for parameter in command.params for option in parameter.opts}
        if "poip_chain.cli.commands" in (command.callback.__module__ if command.callback else ""):
            assert "--json" in options, f"{name} lacks --json"
        assert "--yes" not in options or "--dry-run" in options, f"{name} has --yes without --dry-run"
        assert not any(option in options for option in ("--private-key", "--password", "--secret")), name
        seen += 1

    visit(main.cli, "poip")
    assert seen > 25


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory of command files."""
    monkeypatch.setattr(main, "COMMANDS", tmp_path)
    return tmp_path


def test_files_are_commands(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (commands / "fish.py").write_text('"""About fish.\n\nMore."""\n')
    (commands / "bird_sing_loud.py").write_text('"""Let it sing"""\n')
    (commands / "_private.py").write_text("")
    (commands / "broken.py").write_text("def (")
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "fish    About fish\n" in text and "  bird" in text and "private" not in text and "broken" in text
    assert main.run(["bird", "--help"]) == 0
    assert "sing-loud  Let it sing" in capsys.readouterr().out
    assert main.run(["mouse"]) == 2
    assert main.run(["../fish"]) == 2


def run_with(monkeypatch: pytest.MonkeyPatch, body: Callable[[], None], *arguments: str) -> int:
    @click.command("probe")
    @command_context
    def probe(context: Context) -> None:
        """A test's command."""
        body()

    monkeypatch.setattr(main.cli, "commands", {"probe": probe})
    return main.run(["probe", *arguments])


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PoipError("no"), 1),
        (TransactionFailed("no"), 1),
        (Unavailable("no"), 3),
        (output.CheckFailed("no"), 4),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (click.UsageError("no"), 2),
        (OSError(13, "Permission denied", "/x"), 1),
        (ZeroDivisionError("no"), 1),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    assert run_with(monkeypatch, raising(error)) == code
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err and shown.err


def test_an_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, raising(InvalidInput("the value is 7.", hint="Use 8."))) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["Error: the value is 7.", "       Use 8."]


def test_errors_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, raising(Unavailable("away.", hint="Wait.")), "--json") == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": {"code": "unavailable", "message": "away.", "hint": "Wait."}}
    assert shown.err == ""
    # It does not stick.
    assert run_with(monkeypatch, raising(Unavailable("away."))) == 3
    assert capsys.readouterr().out == ""


def test_unexpected_errors_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POIP_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, raising(ZeroDivisionError()))


def test_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        output.note("a remark")
        output.result({"hash": b"\x01", "path": Path("x")}, "done.")

    assert run_with(monkeypatch, body) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("done.\n", "a remark\n")
    assert run_with(monkeypatch, body, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"hash": "0x01", "path": "x"}


def test_tables_in_a_pipe_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    address = "0x" + "ab" * 20
    output.table(["node", ">amount"], [[address, "1 POIP"], [address, "10 POIP"]])
    output.table(["node"], [], empty="no nodes")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [address, "1", "POIP"] and lines[1].endswith(" 1 POIP")
    assert lines[-1] == "no nodes"


def test_markup_in_foreign_text_is_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["endpoint"], [["[bold]http://x[/bold] :smile:"]])
    assert "[bold]http://x[/bold] :smile:" in capsys.readouterr().out


def test_no_terminal_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    with pytest.raises(PoipError, match="no terminal") as caught:
        output.confirm("Really?", yes=False)
    assert "--yes" in caught.value.hint
    output.confirm("Really?", yes=True)
    sys.stdin.close()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(AMOUNT, "1.5", 15 * 10**17), (AMOUNT, "3 wei", 3), (HASH, "0x" + "0f" * 32, b"\x0f" * 32)],
)
def test_parameter_types(kind: click.ParamType[object], text: str, value: object) -> None:
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(("kind", "text"), [(AMOUNT, "-1"), (AMOUNT, "1 x"), (HASH, "0x00"), (HASH, "zz" * 32)])
def test_wrong_parameters(kind: click.ParamType[object], text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


def test_sending_options_reach_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Context] = []

    @click.command("probe")
    @sending_context
    def probe(context: Context) -> None:
        """A test's command."""
        seen.append(context)

    monkeypatch.setattr(main.cli, "commands", {"probe": probe})
    arguments = ["--key", "k", "--password-file", "/p", "--yes", "--dry-run", "--rpc", "http://r", "--data", "/d"]
    assert main.run(["probe", *arguments]) == 0
    (context,) = seen
    assert (context.key_name, context.password_file, context.yes, context.dry_run) == ("k", Path("/p"), True, True)
    assert context.settings.rpc_url == "http://r" and context.settings.data == Path("/d")
    assert context.settings.deployment_path == Path("/d/deployment.json")
    assert context.key_path("k") == Path("/d/keys/k.json") and context.key_path("./x.json") == Path("x.json")


def test_which_key(tmp_path: Path) -> None:
    from poip_chain.chain.keys import create_development_key
    from poip_chain.errors import ConfigurationError

    def context(**options: object) -> Context:
        return Context(flags={"data": tmp_path}, **options)  # type: ignore[arg-type]

    with pytest.raises(ConfigurationError, match="poip key new"):
        _ = context().key
    first = create_development_key(tmp_path / "keys" / "a.json")
    assert context().key.address == first.address == context().address(None) == context().address("a")
    create_development_key(tmp_path / "keys" / "b.json")
    with pytest.raises(ConfigurationError, match="a, b"):
        _ = context().key
    assert context(key_name="a").key.address == first.address
    with pytest.raises(InvalidInput, match="neither"):
        context().address("c")
    with pytest.raises(InvalidInput, match="not an address"):
        context().address("0x12")
    assert context().address(first.address.lower()) == first.address
