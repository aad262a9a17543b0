"""Check an answer's proof against the chain, trusting neither gateway nor node"""

from __future__ import annotations

import base64
import binascii
import sys
from pathlib import Path
from typing import Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import HASH, Context, command_context
from poip_chain.cli.main import EXIT_CHECK_FAILED
from poip_chain.errors import InvalidInput

WANTED = (
    "Give an answer as it came, its `poip` field (in a stream: of the last chunk with a choice), a file of "
    "`poip chat --save`, or the text of an x-poip-receipt header."
)
OTHER_FILES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"schema", "contracts", "deployer"}), "a deployment file"),
    (frozenset({"crypto", "version"}), "a key file"),
    (frozenset({"batch", "record", "receipt_proof"}), "a watchtower's evidence file, which `poip audit run` reads"),
    (frozenset({"choices"}), "an answer without a proof: it did not come through a gateway of this network"),
)
"""Fields that tell the network's other files."""
MARKS = {"ok": "ok", "failed": "FAILED", "not checked": "-"}


@click.command("verify")
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--messages", type=click.Path(path_type=Path), help="Your chat messages as JSON, to check the prompt.")
@click.option("--prompt", type=click.Path(path_type=Path), help="Your prompt as text, for a completion.")
@click.option("--answer", type=click.Path(path_type=Path), help="The text you received, if FILE does not hold it.")
@click.option("--model", type=click.Path(path_type=Path), help="Directory with the model's tokenizer, to check texts.")
@click.option("--seed", type=int, help="The seed that you sent.")
@click.option("--user-nonce", type=HASH, help="The nonce that you sent.")
@click.option("--require-final", is_flag=True, help="Fail unless the batch is final.")
@command_context
def command(
    context: Context,
    file: Path,
    messages: Path | None,
    prompt: Path | None,
    answer: Path | None,
    model: Path | None,
    seed: int | None,
    user_nonce: bytes | None,
    require_final: bool,
) -> None:
    """Check FILE (- for standard input): an OpenAI answer, its `poip.proof` field, a file of `poip chat --save`, or the
    text of an x-poip-receipt header.

    Exit code 0: every check that could be made holds; 4: a check failed. Checks that could not be made are listed.
    """
    from poip_chain.control.verify import Expected, verify_proof
    from poip_chain.control.view import NetworkView

    if model is None and (messages or prompt or answer):
        raise click.UsageError("Texts can be checked only with the model's tokenizer: give its directory with --model.")
    if model is not None and not model.is_dir():
        raise InvalidInput(f"there is no model directory {model}.", hint="`poip model prepare` makes one.")
    document = read_document(file)
    proof = find_proof(document, file)
    given = _texts(document)
    expected = Expected(
        messages=_json(messages) if messages else given["messages"],
        prompt=prompt.read_text() if prompt else None,
        answer=answer.read_text() if answer else given["answer"],
        seed=seed,
        user_nonce=user_nonce or given["user_nonce"],
    )
    with context.chain:
        view = NetworkView(context.network)
        report = verify_proof(proof, view, tokenizer_dir=model, expected=expected)

    def text() -> None:
        output.table(["check", "result", "what"], [[c.name, MARKS[c.result], c.detail] for c in report.checks])
        click.echo("")
        if report.failed:
            click.echo(f"NOT VERIFIED: {', '.join(check.name for check in report.failed)}.")
        else:
            click.echo(f"Verified: what was checked holds. The receipt is {report.status}.")
            if report.unchecked:
                click.echo(f"NOT checked: {'; '.join(f'{c.name} ({c.detail})' for c in report.unchecked)}.")
            click.echo("Whether the model was computed honestly, audits of the receipt's batch show, not the receipt.")

    output.result(report.to_json(), text)
    if report.failed or (require_final and report.status != "final"):
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def read_document(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or in a header's base64url text. Raises InvalidInput."""
    from poip_chain.control.verify import MAX_PROOF_BYTES
    from poip_chain.spec.strict_json import parse_json_object

    if str(file) == "-":
        raw = sys.stdin.buffer.read(MAX_PROOF_BYTES + 1)
    else:
        with file.open("rb") as handle:
            raw = handle.read(MAX_PROOF_BYTES + 1)
    if len(raw) > MAX_PROOF_BYTES:
        raise InvalidInput(f"{file} is larger than {MAX_PROOF_BYTES} bytes: it is no answer and no proof.")
    raw = raw.strip()
    if raw and not raw.startswith(b"{"):
        try:
            raw = base64.b64decode(raw + b"=" * (-len(raw) % 4), altchars=b"-_", validate=True)
        except binascii.Error as error:
            raise InvalidInput(
                f"{file} is neither JSON nor the text of an x-poip-receipt header.", hint=WANTED
            ) from error
    try:
        return parse_json_object(raw)
    except InvalidInput as error:
        raise InvalidInput(f"{file} is not the JSON of an answer or a proof: {error.message}", hint=WANTED) from error


def find_proof(document: dict[str, Any], file: Path) -> Any:
    """The proof within what `read_document` read from `file`. Raises InvalidInput."""
    from poip_chain.control.verify import REQUIRED

    if "receipt" in document:
        proof: Any = document
    else:
        inner = document.get("poip")
        proof = inner.get("proof") if isinstance(inner, dict) else document.get("proof")
    if not isinstance(proof, dict) or "receipt" not in proof:
        raise InvalidInput(
            f"{file} is not an answer with a proof, nor a proof: it has no `poip.proof` and no `receipt`.{_kind(document)}",
            hint=WANTED,
        )
    if missing := sorted(REQUIRED - set(proof)):
        raise InvalidInput(
            f"{file} has a receipt, but is not a whole proof: {', '.join(missing)} missing.{_kind(document)}",
            hint=WANTED,
        )
    return proof


def _kind(document: dict[str, Any]) -> str:
    """What a file of ours is, if it is another one; '' if it is none that we know."""
    for fields, kind in OTHER_FILES:
        if fields <= set(document):
            return f" It looks like {kind}."
    return ""


def _texts(document: dict[str, Any]) -> dict[str, Any]:
    """What the file itself says about question and answer."""
    found: dict[str, Any] = {"messages": document.get("messages"), "answer": None, "user_nonce": None}
    if isinstance(document.get("answer"), str):
        found["answer"] = document["answer"]
    choices = document.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        text = message.get("content") if isinstance(message, dict) else choices[0].get("text")
        found["answer"] = text if isinstance(text, str) else None
    nonce = document.get("user_nonce")
    if isinstance(nonce, str) and "receipt" not in document:
        from poip_chain.spec.eip712 import parse_hex

        found["user_nonce"] = parse_hex(nonce, "user_nonce", 32)
    return found


def _json(path: Path) -> Any:
    from poip_chain.spec.strict_json import parse_json

    value = parse_json(path.read_bytes())
    return value.get("messages") if isinstance(value, dict) else value
