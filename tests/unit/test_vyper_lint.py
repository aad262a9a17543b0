"""The lint of the Vyper sources finds each thing that it bans, and leaves a clean contract alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_tools import vyper_lint

HEADING = """\
# SPDX-License-Identifier: AGPL-3.0-only
# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
\"\"\"
@title A sample
@license AGPL-3.0-only
@notice Nothing to see.
@custom:security None needed.
@custom:kill None.
\"\"\"

struct Pair:
    numbers: uint256[2]
    flag: bool

stored: uint256[2]
many: DynArray[uint256, 3]
more: DynArray[uint256, 3]
pair: Pair

"""

CLEAN = """\
@external
@payable
def choose(which: bool) -> uint256:
    \"\"\"
    @notice Doubles or returns what was sent.
    \"\"\"
    sent: uint256 = msg.value
    return sent * 2 if which else sent
"""


def function(body: str) -> str:
    """A payable external function with NatSpec around the given statements."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f'@external\n@payable\ndef act(which: bool) -> uint256:\n    """\n    @notice Acts.\n    """\n{lines}'


def messages(folder: Path, name: str, content: str | bytes) -> list[str]:
    """What the lint says about one file with that content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [finding.message for finding in vyper_lint.lint_file(path, folder)]


def test_clean_contract_passes(tmp_path: Path) -> None:
    assert messages(tmp_path, "Sample.vy", HEADING + CLEAN) == []


@pytest.mark.parametrize(
    ("where", "character"),
    [
        ("form feed", b"\x0c"),
        ("vertical tab", b"\x0b"),
        ("tab", b"\t"),
        ("carriage return", b"\r"),
        ("next line (NEL)", "\u0085".encode()),
        ("line separator", "\u2028".encode()),
        ("paragraph separator", "\u2029".encode()),
        ("letter outside ASCII", "é".encode()),
    ],
)
def test_characters_that_shift_positions(tmp_path: Path, where: str, character: bytes) -> None:
    found = messages(tmp_path, "Sample.vy", HEADING.encode() + b"# " + character + b"\n" + CLEAN.encode())
    assert len(found) == 1, where
    assert f"byte 0x{character[0]:02x} in column 3" in found[0]


def test_byte_order_mark(tmp_path: Path) -> None:
    found = messages(tmp_path, "Sample.vy", b"\xef\xbb\xbf" + (HEADING + CLEAN).encode())
    assert [message[:9] for message in found] == ["byte 0xef"]


@pytest.mark.parametrize(
    "body",
    [
        "return (msg.value | 4) if which else 7",
        "return 7 if which else (len(msg.data) | 4)",
        "return msg.value if which else 7",
        "return 1 + max(2, (3 if which else (msg.value & 5)))",
    ],
)
def test_call_data_in_a_conditional_expression(tmp_path: Path, body: str) -> None:
    found = messages(tmp_path, "Sample.vy", HEADING + function(body))
    assert found == ["msg.value or msg.data in a branch of a conditional expression"]


@pytest.mark.parametrize(
    "body",
    [
        "x: uint256[2] = [1, 2] if which else [3, 4]\nreturn x[0]",
        "x: uint256[2] = self.stored if which else self.pair.numbers\nreturn x[0]",
        "x: Pair = self.pair if which else empty(Pair)\nreturn x.numbers[0]",
        "x: DynArray[uint256, 3] = self.many if which else self.more\nreturn len(x)",
    ],
)
def test_array_out_of_a_conditional_expression(tmp_path: Path, body: str) -> None:
    found = messages(tmp_path, "Sample.vy", HEADING + function(body))
    assert found == ["a conditional expression that yields an array; use an if statement"]


def test_condition_may_read_call_data(tmp_path: Path) -> None:
    body = "return 1 if msg.value == 0 and len(msg.data) > 4 else 2"
    assert messages(tmp_path, "Sample.vy", HEADING + function(body)) == []


def test_banned_expression_in_an_imported_module(tmp_path: Path) -> None:
    module = "@internal\n@payable\ndef f(b: bool) -> uint256:\n    return (msg.value | 4) if b else 7\n"
    (tmp_path / "helper.vy").write_text(module)
    body = "return helper.f(which)"
    source = HEADING.replace("struct Pair", "from . import helper\n\nstruct Pair") + function(body)
    (tmp_path / "Sample.vy").write_text(source)
    found = vyper_lint.lint_file(tmp_path / "Sample.vy", tmp_path)
    assert [(finding.path.name, finding.line) for finding in found] == [("helper.vy", 4)]


def test_computed_code_offset(tmp_path: Path) -> None:
    template = "a: address = create_from_blueprint(self, code_offset={})\nreturn convert(a, uint256)"
    bad = messages(tmp_path, "Sample.vy", HEADING + function(template.format("len(msg.data)")))
    assert bad == ["code_offset of create_from_blueprint must be a literal"]
    assert messages(tmp_path, "Sample.vy", HEADING + function(template.format(3))) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "# pragma version 0.4.3",
            "# pragma version ^0.4.3",
            "'# pragma version 0.4.3' is missing or different",
        ),
        ("# pragma nonreentrancy on\n", "", "'# pragma nonreentrancy on' is missing or different"),
        ("# pragma evm-version cancun\n", "", "'# pragma evm-version cancun' is missing or different"),
        ("@custom:kill None.\n", "", "the file's NatSpec lacks @custom:kill"),
        ("@custom:security None needed.\n", "", "the file's NatSpec lacks @custom:security"),
        ("    @notice Doubles", "    Doubles", "choose needs NatSpec with @notice or @dev"),
        (
            "# pragma nonreentrancy on\n",
            "# pragma nonreentrancy on\n# pragma experimental-codegen\n",
            "the experimental code generator is not for releases",
        ),
        (
            "# SPDX-License-Identifier: AGPL-3.0-only\n",
            "",
            "the comments above the code must hold '# SPDX-License-Identifier: AGPL-3.0-only'",
        ),
    ],
)
def test_habits(tmp_path: Path, old: str, new: str, expected: str) -> None:
    source = HEADING + CLEAN
    assert old in source
    assert expected in messages(tmp_path, "Sample.vy", source.replace(old, new))


@pytest.mark.parametrize("name", ["mixed_Case.vy", "Snake_Case.vy", "reader.vyi", "Ireader.vyi"])
def test_file_names(tmp_path: Path, name: str) -> None:
    found = messages(tmp_path, name, HEADING + CLEAN)
    assert found[0] == "names are CamelCase.vy (deployable), snake_case.vy (module), IName.vyi"


def test_size_budget(tmp_path: Path) -> None:
    blob = "ab" * (vyper_lint.RUNTIME_SIZE_BUDGET // 2)
    natspec = '    """\n    @notice Big.\n    """\n'
    calls = "".join(
        f'@external\ndef f{i}() -> Bytes[{len(blob) // 2}]:\n{natspec}    return x"{i:02x}{blob[2:]}"\n'
        for i in range(3)
    )
    found = messages(tmp_path, "Sample.vy", HEADING + calls)
    assert len(found) == 1
    assert found[0].endswith("bytes; the budget is 22,000")


def test_broken_source_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    assert messages(tmp_path, "Sample.vy", HEADING + "def (")[0].startswith("does not parse")
    assert messages(tmp_path, "Sample.vy", HEADING + function("return nothing"))[0].startswith("does not compile")


def test_command_fails_on_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Sample.vy").write_text(HEADING + CLEAN)
    assert vyper_lint.main([str(tmp_path)]) == 0
    (tmp_path / "Other.vy").write_text(CLEAN)
    assert vyper_lint.main([str(tmp_path)]) == 1
    assert "Other.vy:1: " in capsys.readouterr().out
