"""What somebody new gets wrong on the command line: each mistake is named with the value and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from poip_chain.chain.keys import create_development_key
from poip_chain.cli import main
from poip_chain.cli.context import AMOUNT
from poip_chain.proof.scoring import Judgement, PositionScore
from poip_chain.proof.store import open_store
from poip_chain.spec.scores import Scores, Verdict
from tests.unit.test_evidence import evidence


class Shell:
    """Runs commands in one data directory; nothing here has a chain."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.capsys = data, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main.run([*arguments, "--data", str(self.data)])
        shown = self.capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    def fails(self, code: int, *arguments: str) -> str:
        found, out, err = self.run(*arguments)
        assert (found, out) == (code, ""), (arguments, out, err)
        return err


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in ("POIP_DATA", "POIP_CONFIG", "POIP_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return Shell(tmp_path / "data", capsys)


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    with click.Context(command, info_name="poip") as context:
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


WITH_AMOUNTS = [
    (path, command, parameter)
    for path, command in commands(main.cli)
    for parameter in command.params
    if parameter.type is AMOUNT
]


def test_there_are_amounts() -> None:
    kinds = {type(parameter) for _, _, parameter in WITH_AMOUNTS}
    assert len(WITH_AMOUNTS) >= 10 and kinds == {click.Argument, click.Option}


@pytest.mark.parametrize("amount", ["-5", "-0.5", "-.5", "-5 POIP"])
def test_no_amount_is_negative(shell: Shell, amount: str) -> None:
    for path, command, parameter in WITH_AMOUNTS:
        words = [*path]
        for other in command.params:
            if isinstance(other, click.Argument):
                words.append(amount if other is parameter else "1")
        if isinstance(parameter, click.Option):
            words += [parameter.opts[0], amount]
        error = shell.fails(2, *words)
        assert "an amount must be positive" in error and "-" in error and "No such option" not in error, words


def test_other_numbers_are_not_called_amounts(shell: Shell) -> None:
    error = shell.fails(2, "batch", "show", "-1")
    assert "must not be negative here" in error and "amount" not in error
    assert "No such option" in shell.fails(2, "batch", "show", "-x")


@pytest.mark.parametrize("option", ["--data", "--rpc", "--json", "--key", "--yes"])
def test_options_before_the_command(shell: Shell, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, path in (([], "poip"), (["stake"], "poip stake")):
        assert main.run([*words, option, "x", "show", "1"]) == 2
        shown = capsys.readouterr()
        said = shown.out + shown.err
        assert "after it" in said and f"`{path} COMMAND ... {option} ...`" in said
    assert "No such option" in shell.fails(2, "--nonsense", "verify")


def test_a_key_has_a_name_and_no_path(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "bad/name",
        "./name",
        "../name",
        "/tmp/name",
        "name.json",
        ".hidden",
        "",
        "0xabc",
        "two words",
        "a" * 65,
    ):
        error = shell.fails(1, "key", "new", name, "--development")
        assert "not a name for a key" in error and str(shell.data / "keys") in error, name
    assert not list(tmp_path.rglob("*.json"))
    assert shell.run("key", "new", "my-node.2", "--development")[0] == 0
    assert (shell.data / "keys" / "my-node.2.json").is_file()
    # Where a key is used, a path stays a path.
    file = tmp_path / "else" / "where.json"
    key = create_development_key(file)
    assert key.address in shell.run("key", "show", str(file))[1]


def test_a_short_password_says_how_long_and_from_where(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POIP_PASSWORD", "1234567")
    error = shell.fails(1, "key", "new", "node")
    assert "8 characters" in error and "POIP_PASSWORD" in error


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schema": 1, "contracts": {}, "deployer": "0x"}, "deployment file"),
        ({"crypto": {}, "version": 3, "address": ""}, "key file"),
        ({"choices": [{"message": {"content": "Hi"}}]}, "answer without a proof"),
        ({"choices": [], "poip": {"proof": None}}, "answer without a proof"),
        ({"receipt": {"seq": 1}, "signature": "0x"}, "not a whole proof: chain_id, log"),
        ({"proof": "0x12"}, "no `poip.proof` and no `receipt`"),
        ({"rpc_url": "http://x"}, "no `poip.proof` and no `receipt`"),
        ([1, 2], "neither JSON nor"),
    ],
)
def test_a_file_that_holds_no_receipt(shell: Shell, tmp_path: Path, document: object, words: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(document))
    for command in (["receipt", "show"], ["verify"]):
        error = shell.fails(1, *command, str(file))
        assert words in error and str(file) in error and "poip chat --save" in error, error


def test_an_evidence_file_is_for_another_command(shell: Shell, tmp_path: Path) -> None:
    error = shell.fails(1, "receipt", "show", str(evidence().write(tmp_path / "case.json")))
    assert "evidence file" in error and "poip audit run" in error
    (tmp_path / "broken.json").write_text('{"poip": ')
    error = shell.fails(1, "receipt", "show", str(tmp_path / "broken.json"))
    assert "broken.json is not the JSON of an answer" in error


@pytest.mark.parametrize("noun", ["node", "gateway", "watch"])
def test_a_missing_settings_file(shell: Shell, tmp_path: Path, noun: str) -> None:
    missing = tmp_path / "missing.toml"
    error = shell.fails(1, noun, "run", "--config", str(missing))
    section = "watchtower" if noun == "watch" else noun
    assert str(missing) in error and "README" in error and f"poip config {section}" in error
    assert shell.run("config", section)[0] == 0


def test_a_missing_evidence_file(shell: Shell, tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    error = shell.fails(1, "audit", "run", "--evidence", str(missing), "--model", str(tmp_path))
    assert f"there is no evidence file {missing}" in error and "poip audit list" in error


@pytest.mark.parametrize(
    ("stated", "found", "code"),
    [
        ("fraud", Verdict.FRAUD, 4),
        ("honest", Verdict.FRAUD, 4),
        ("withheld", Verdict.FRAUD, 4),
        ("fraud", Verdict.HONEST, 4),
        ("honest", Verdict.HONEST, 0),
        ("cannot_tell", Verdict.CANNOT_TELL, 0),
    ],
)
def test_the_exit_code_of_a_verdict(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, found: Verdict, code: int
) -> None:
    case = replace(evidence(), result={"verdict": stated})
    file = case.write(tmp_path / "case.json")
    judgement = Judgement(Scores(5, 2 * 65536, 98304, 32), found, (PositionScore(98304, 32, 7),), "a test")
    monkeypatch.setattr(
        "poip_chain.service.engine.model.prepare", lambda *_: SimpleNamespace(model_id=case.batch.model_id)
    )
    monkeypatch.setattr("poip_chain.proof.reexecution.TorchSource", lambda _: None)
    monkeypatch.setattr("poip_chain.proof.scoring.judge", lambda *_: [judgement])
    line = ["audit", "run", "--evidence", str(file), "--model", str(tmp_path), "--positions"]
    given, out, err = shell.run(*line)
    assert given == code and (str(found) in err) == (code != 0), err
    # People get units, programs the protocol's integers.
    for words in ("2.0000 logits", "1.5000 logits", "0.50 nat"):
        assert words in out
    given, out, _ = shell.run(*line, "--json")
    data = json.loads(out)
    assert given == code and (data["verdict"], data["margin_sum"], data["fingerprint_sum"]) == (found, 131072, 32)
    assert data["positions"][0]["margin"] == 98304


def test_the_exit_codes_are_documented(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    assert "a verdict of fraud" in capsys.readouterr().out
    for line in (["audit", "run"], ["verify"], ["doctor"]):
        assert main.run([*line, "--help"]) == 0
        assert "4" in capsys.readouterr().out
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert "verdict of fraud" in readme and "exit code" in readme.lower()


@pytest.mark.parametrize("line", [("watch", "status"), ("audit", "list")])
def test_where_no_watchtower_has_run(shell: Shell, line: tuple[str, ...]) -> None:
    error = shell.fails(1, *line)
    database = shell.data / "watchtower" / "watchtower.db"
    assert f"no watchtower has run here: there is no {database}" in error and "--data" in error
    # Looking leaves nothing behind, and where one has run, no audits are an answer.
    assert not database.exists()
    database.parent.mkdir(parents=True)
    with open_store(database.parent):
        pass
    code, out, _ = shell.run(*line, "--json")
    assert code == 0 and json.loads(out)["audits"] == []


def test_what_reads_files_alone_takes_no_chain(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["audit", "list"], ["audit", "run"]):
        assert "No such option" in shell.fails(2, *line, "--rpc", "http://127.0.0.1:9")
        assert main.run([*line, "--help"]) == 0
        assert "--rpc" not in capsys.readouterr().out


def test_every_noun_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    listed: dict[str, Any] = {}
    for line in capsys.readouterr().out.partition("Commands:\n")[2].splitlines():
        name, _, about = line.strip().partition(" ")
        if not line:
            break
        if not line.startswith("   "):
            listed[name] = about.strip()
    assert {"engine", "audit", "node"} <= set(listed)
    assert not [name for name, about in listed.items() if not about]
