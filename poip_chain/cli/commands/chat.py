"""Talk to a model through a gateway"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from poip_chain.cli import output
from poip_chain.cli.commands.gateway import api_headers
from poip_chain.cli.context import Context, command_context
from poip_chain.errors import InvalidInput, PoipError, Unavailable

MAX_LINE = 16 * 2**20


@click.command("chat")
@click.argument("prompt", required=False)
@click.option("--url", default="http://127.0.0.1:8800", show_default=True, help="The gateway.")
@click.option("--model", help="Default: the gateway's first model.")
@click.option("--system", help="Instructions that stand before the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the last answer with its proof, for `poip verify`."
)
@command_context
def command(
    context: Context,
    prompt: str | None,
    url: str,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    save: Path | None,
) -> None:
    """Ask PROMPT, or hold a conversation if none is given (an empty line ends it). The API key comes from POIP_API_KEY.

    Each question carries a random nonce of yours, so that nobody can choose the answer's seed for you.
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    name = model or _first_model(url)
    while True:
        question = prompt if prompt is not None else click.prompt("you", default="", show_default=False, err=True)
        if not question:
            return
        messages.append({"role": "user", "content": question})
        body: dict[str, Any] = {"model": name, "messages": messages, "poip_user_nonce": secrets.token_hex(32)}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if temperature is not None:
            body["temperature"] = temperature
        saved = _ask(url, body)
        if save is not None:
            save.write_text(json.dumps(saved, indent=1) + "\n")
        messages.append({"role": "assistant", "content": saved["answer"]})
        if prompt is not None:
            output.result(saved, "")
            return


def _ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Stream one answer to the terminal; everything that `poip verify` needs."""
    text, last = "", {}
    for chunk in _chunks(url, body):
        for choice in chunk.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            text += piece
            if not output.json_mode():
                click.echo(piece, nl=False)
                sys.stdout.flush()
        last = chunk
    if not output.json_mode():
        click.echo("")
    poip = last.get("poip") or {}
    return {
        "model": body["model"],
        "messages": body["messages"],
        "answer": text,
        "user_nonce": "0x" + body["poip_user_nonce"],
        "proof": poip.get("proof"),
    }


def _chunks(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import httpx

    from poip_chain.spec.strict_json import parse_json_object

    address = f"{url.rstrip('/')}/v1/chat/completions"
    try:
        timeout = httpx.Timeout(60, connect=5)
        with httpx.stream(
            "POST", address, json={**body, "stream": True}, headers=api_headers(), timeout=timeout
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                _raise_error(parse_json_object(answer.content[:65536]), answer.status_code)
            for line in answer.iter_lines():
                if len(line) > MAX_LINE:
                    raise InvalidInput("the gateway sent an endless line.")
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                chunk = parse_json_object(line[5:])
                if "error" in chunk:
                    _raise_error(chunk, 502)
                yield chunk
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(
            f"the gateway at {url} does not answer ({type(error).__name__}).", hint="`poip gateway run` starts one."
        ) from error


def _raise_error(body: dict[str, Any], status: int) -> None:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    text = message if isinstance(message, str) else f"status {status}"
    raise (Unavailable if status >= 500 else PoipError)(f"the gateway says: {text}")


def _first_model(url: str) -> str:
    import httpx

    from poip_chain.spec.strict_json import parse_json_object

    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=api_headers(), timeout=10)
        body = parse_json_object(answer.content)
    except (httpx.HTTPError, httpx.InvalidURL, InvalidInput) as error:
        raise Unavailable(
            f"the gateway at {url} does not answer ({type(error).__name__}).", hint="`poip gateway run` starts one."
        ) from error
    if answer.status_code != 200:
        _raise_error(body, answer.status_code)
    return str(body["data"][0]["id"])
