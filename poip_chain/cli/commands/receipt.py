"""Show a receipt in plain words"""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.commands.verify import find_proof, read_document
from poip_chain.cli.context import Context, command_context, when
from poip_chain.cli.main import group

command = group("receipt", "Receipts: a node's signed statement of one answer.")


@command.command("show")
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@command_context
def show(context: Context, file: Path) -> None:
    """Show the receipt in FILE (an answer, a proof or a header; - for standard input). Nothing is checked: see `verify`."""
    from poip_chain.control.verify import Proof
    from poip_chain.economic.money import format_amount
    from poip_chain.spec.objects import FinishReason

    proof = Proof.from_json(find_proof(read_document(file), file))
    receipt, request = proof.receipt, proof.request
    reasons = {int(reason): reason.name.lower() for reason in FinishReason}

    def text() -> None:
        output.fields(
            {
                "node": receipt.node,
                "receipt number": receipt.seq,
                "receipt hash": "0x" + receipt.struct_hash().hex(),
                "request hash": "0x" + receipt.request_hash.hex(),
                "model": "0x" + receipt.model_id.hex(),
                "tokens": f"{request.prompt_tokens} prompt, {receipt.output_tokens} answer (limit {request.max_tokens})",
                "ended by": reasons.get(receipt.finish_reason, f"unknown ({receipt.finish_reason})"),
                "temperature": f"{proof.params.temperature_milli / 1000:g}",
                "fee": format_amount(receipt.fee),
                "paid by": receipt.payer,
                "payer's total with this node": format_amount(receipt.payer_cum),
                "issued": when(receipt.issued_at),
                "chain": proof.chain_id,
            }
        )

    data = {
        "receipt_hash": "0x" + receipt.struct_hash().hex(),
        "receipt": receipt.to_json(),
        "request": request.to_json(),
        "params": proof.params.to_json(),
        "chain_id": proof.chain_id,
    }
    output.result(data, text)
