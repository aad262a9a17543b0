"""Ask a node directly, signed and paid with your own key"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import HASH, Context, key_context, sending_context
from poip_chain.cli.main import group
from poip_chain.errors import NotFound

if TYPE_CHECKING:
    from poip_chain.control.direct import Question
    from poip_chain.control.gateway.settings import ModelEntry
    from poip_chain.control.view import NetworkView
    from poip_chain.service.engine.tokenizer import Tokenizer
    from poip_chain.spec.types import Address

command = group("request", "Requests without a gateway: who trusts nobody signs for himself.")


@command.command("send")
@click.argument("prompt")
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="Prepared model directory (tokenizer and template)."
)
@click.option("--model-id", type=HASH, help="If the directory holds the tokenizer alone; default: computed from it.")
@click.option("--raw", is_flag=True, help="PROMPT is plain text to continue, not a chat message.")
@click.option("--node", help="Ask this node only; default: chosen by price and record.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.7, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, help="The same seed gives the same answer; default: random.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the answer with its proof, for `poip verify`.")
@sending_context
def send(
    context: Context,
    prompt: str,
    model: Path,
    model_id: bytes | None,
    raw: bool,
    node: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    save: Path | None,
) -> None:
    """Ask PROMPT and stream the answer. Needs escrow with the node: `poip funds deposit NODE AMOUNT`."""
    from poip_chain.control.client import KeySigner
    from poip_chain.control.direct import DirectClient
    from poip_chain.control.view import NetworkView
    from poip_chain.economic.money import format_amount

    view = NetworkView(context.network)
    address = context.address(node) if node else None
    tokenizer, question = _question(view, prompt, _entry(model, model_id), raw, address, max_tokens, temperature, seed)
    path, signer = _ledger(context), KeySigner(context.key.private_key)

    async def work() -> None:
        async with DirectClient.open(view, signer, path) as client:
            choice = await client.choose(question)
            need = question.params
            most = len(question.prompt_ids) * choice.offer.input_price + max_tokens * choice.offer.output_price
            if context.dry_run:
                data = {
                    "dry_run": "request",
                    "node": choice.node,
                    "most": str(most),
                    "prompt_tokens": len(question.prompt_ids),
                    "considered": [entry.to_json() for entry in choice.considered],
                }
                output.result(data, f"Would ask {choice.node}; the answer may cost {format_amount(most)}.")
                return
            output.confirm(f"Ask {choice.node} for at most {format_amount(most)}?", yes=context.yes)
            pieces: list[str] = []

            def show(text: str) -> None:
                pieces.append(text)
                if not output.json_mode():
                    click.echo(text, nl=False)
                    sys.stdout.flush()

            answer = await client.ask(question, choice, tokenizer, show)
            saved: dict[str, Any] = {
                "answer": "".join(pieces),
                "temperature_milli": need.temperature_milli,
                "proof": answer.proof(view.log_domain),
            }
            if not raw:
                saved["messages"] = [{"role": "user", "content": prompt}]
            if save is not None:
                save.write_text(json.dumps(saved, indent=1) + "\n")
            output.result({**saved, "fee": str(answer.receipt.fee), "node": choice.node}, "")
            output.note(
                f"{answer.receipt.output_tokens} tokens from {choice.node} for {format_amount(answer.receipt.fee)}; "
                f"request 0x{answer.receipt.request_hash.hex()}"
            )

    with context.chain:
        asyncio.run(work())


@command.command("show")
@click.argument("request_hash", type=HASH)
@key_context
def show(context: Context, request_hash: bytes) -> None:
    """Show what became of the request REQUEST_HASH that --key signed here."""
    from poip_chain.control.view import NetworkView
    from poip_chain.economic.money import format_amount

    address = context.address(None)
    with context.chain:
        ledger = _open_ledger(context, NetworkView(context.network), address)
    try:
        attempts = ledger.of_request(request_hash)
    finally:
        ledger.close()
    if not attempts:
        raise NotFound(
            f"{address} signed no request 0x{request_hash.hex()} here.", hint="Each data directory knows its own."
        )
    rows = [
        {
            "node": attempt.node,
            "state": attempt.state,
            "most": str(attempt.max_fee),
            "fee": None if attempt.receipt is None else str(attempt.receipt.fee),
            "receipt": None if attempt.receipt is None else attempt.receipt.to_json(),
            "signature": "0x" + attempt.signature.hex() if attempt.receipt else None,
            "reason": attempt.reason,
        }
        for attempt in attempts
    ]

    def text() -> None:
        output.table(
            ["node", "state", ">fee", "reason"],
            [[a.node, a.state, "" if a.receipt is None else format_amount(a.receipt.fee), a.reason] for a in attempts],
        )

    output.result({"request_hash": "0x" + request_hash.hex(), "attempts": rows}, text)


@command.command("settle")
@key_context
def settle(context: Context) -> None:
    """Fetch receipts that broken streams left open, check them and hand over vouchers."""
    from poip_chain.control.client import KeySigner
    from poip_chain.control.direct import DirectClient
    from poip_chain.control.view import NetworkView

    view, path, signer = NetworkView(context.network), _ledger(context), KeySigner(context.key.private_key)

    async def work() -> tuple[list[str], int]:
        async with DirectClient.open(view, signer, path) as client:
            troubles = await client.settle()
            return troubles, len(client.client.ledger.attempts("open", "abandoned"))

    with context.chain:
        troubles, left = asyncio.run(work())
    for trouble in troubles:
        output.warning(trouble)
    output.result({"open": left, "troubles": troubles}, f"{left} requests are still open." if left else "All settled.")


def _question(
    view: NetworkView,
    prompt: str,
    model: ModelEntry,
    raw: bool,
    node: Address | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
) -> tuple[Tokenizer, Question]:
    from poip_chain.control.direct import Question
    from poip_chain.control.gateway.catalogue import load_model
    from poip_chain.service.engine.tokenizer import conversation
    from poip_chain.spec.objects import SamplingParams, client_seed_from_integer

    served = load_model(view, model)
    if raw:
        ids = served.tokenizer.encode_text(prompt)
    else:
        ids = served.tokenizer.encode_chat(conversation([{"role": "user", "content": prompt}]))
    question = Question(
        model_id=served.model_id,
        profile_version=served.profile_version,
        prompt_ids=ids,
        params=SamplingParams(temperature_milli=round(temperature * 1000)),
        max_tokens=max_tokens,
        node=node,
        client_seed=None if seed is None else bytes(client_seed_from_integer(seed)),
    )
    return served.tokenizer, question


def _entry(directory: Path, model_id: bytes | None) -> ModelEntry:
    from poip_chain.control.gateway.settings import ModelEntry

    name = directory.resolve().name or "model"
    return ModelEntry(name=name, directory=directory, model_id=None if model_id is None else "0x" + model_id.hex())


def _ledger(context: Context) -> Path:
    return context.settings.data / "client" / f"{context.address(None)}.db"


def _open_ledger(context: Context, view: NetworkView, address: Address) -> Any:
    from poip_chain.control.ledger import Ledger
    from poip_chain.errors import Refused
    from poip_chain.spec.objects import Voucher

    def never(_: Voucher) -> bytes:
        raise Refused("this command signs nothing.")

    return Ledger(_ledger(context), address, view.vault_domain, never)
