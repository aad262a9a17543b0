"""Run a watchtower, and see what it has found."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, command_context, key_context
from poip_chain.cli.main import group

MAX_RECEIPT_FILE_BYTES = 64 * 1024

command = group("watch", "Follow batches, audit what is selected, act on what is wrong.")


def _data(context: Context) -> Path:
    return context.settings.data / "watchtower"


@command.command()
@click.option(
    "--mode",
    type=click.Choice(["watch", "propose", "defend"]),
    default="watch",
    show_default=True,
    help="watch: report only. propose: also write the transactions as files. defend: send them.",
)
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path), help="Prepared model to re-execute.")
@click.option(
    "--engine", "engines", multiple=True, metavar="MODEL_ID=URL", help="vLLM server that re-executes instead."
)
@click.option("--bond-budget", type=AMOUNT, default=0, help="Most that may stand in bonds at one time.")
@click.option("--poll-interval", type=float, default=1.0, show_default=True, help="Seconds between rounds.")
@click.option("--confirmations", type=int, default=0, show_default=True, help="Blocks before a batch is believed.")
@click.option("--metrics-port", type=int, help="Serve Prometheus metrics on this port of 127.0.0.1.")
@key_context
def run(
    context: Context,
    mode: str,
    models: tuple[Path, ...],
    engines: tuple[str, ...],
    bond_budget: int,
    poll_interval: float,
    confirmations: int,
    metrics_port: int | None,
) -> None:
    """Run until stopped. Without --model or --engine everything but the computation is checked."""
    from poip_chain.proof import app
    from poip_chain.proof.settings import Mode, WatchtowerSettings

    wrong = [entry for entry in engines if "=" not in entry]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not MODEL_ID=URL.", param_hint="--engine")
    settings = WatchtowerSettings(
        rpc_url=context.settings.rpc_url,
        deployment=context.settings.deployment_path,
        data=_data(context),
        key=context.key_path(context.key_name) if context.key_name else None,
        password_file=context.password_file,
        mode=Mode(mode),
        bond_budget=bond_budget,
        models=list(models),
        engine_urls=dict(entry.split("=", 1) for entry in engines),
        poll_interval=poll_interval,
        confirmations=confirmations,
        metrics_port=metrics_port,
    )
    app.run(settings)


@command.command()
@command_context
def status(context: Context) -> None:
    """What the watchtower of this data directory has seen: batches, verdicts, challenges, offences."""
    from poip_chain.economic.money import format_amount
    from poip_chain.proof.store import open_store

    with open_store(_data(context)) as store:
        audits, challenges, filings = store.audits(), store.challenges(), store.filings()
        batches = store.batches()
    data = {
        "batches": [{"id": b.batch.id, "node": b.batch.node, "status": b.status, "state": b.state} for b in batches],
        "audits": [
            {"batch": a.batch_id, "position": a.position, "state": a.state, "verdict": a.verdict, **a.detail,
             "evidence": a.evidence}
            for a in audits
        ],
        "challenges": [challenge.to_json() for challenge in challenges],
        "offences": [filing.to_json() for filing in filings],
    }  # fmt: skip

    def text() -> None:
        nodes = {b.batch.id: b.batch.node for b in batches}
        output.table(
            [">batch", ">receipt", "node", "verdict", ">margin sum", ">largest", ">fingerprint", "evidence"],
            [
                (
                    a.batch_id, a.position, nodes.get(a.batch_id, "?"), a.verdict or a.state,
                    a.detail.get("margin_sum"), a.detail.get("margin_max"), a.detail.get("fingerprint_sum"), a.evidence,
                )
                for a in audits
            ],
            title="audits",
        )  # fmt: skip
        output.table(
            [">batch", ">receipt", "challenge", "state", ">bond"],
            [(c.batch_id, c.position, c.challenge_id, c.state, format_amount(c.bond)) for c in challenges],
            title="challenges",
        )
        output.table(["offence", "batch", "state"], [(f.kind, f.batch_id, f.state) for f in filings])

    output.result(data, text)


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@command_context
def submit(context: Context, file: Path) -> None:
    """Hand in a signed receipt (FILE: JSON with `receipt` and `signature`), to be compared with all others of its node."""
    from poip_chain.errors import InvalidInput
    from poip_chain.proof.receipts import check_receipt
    from poip_chain.proof.store import open_store
    from poip_chain.spec.eip712 import parse_hex
    from poip_chain.spec.objects import Receipt
    from poip_chain.spec.strict_json import parse_json

    try:
        if file.stat().st_size > MAX_RECEIPT_FILE_BYTES:
            raise InvalidInput(f"{file} is too large for one signed receipt.")
        document = parse_json(file.read_bytes())
        receipt = Receipt.from_json(document["receipt"])
        signature = parse_hex(document["signature"], "signature", 65)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{file} holds no signed receipt: {error!r:.200}.") from error
    check_receipt(context.network, receipt, signature)
    with open_store(_data(context)) as store:
        store.observe(receipt, signature)
        pairs = len(store.equivocations())
    output.result(
        {"observed": receipt.struct_hash(), "contradictions": pairs},
        f"Receipt {receipt.seq} of {receipt.node} is kept. Contradicting pairs known: {pairs}.",
    )
