"""Run a watchtower, and see what it has found."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, command_context, key_context
from poip_chain.cli.main import group

MAX_RECEIPT_FILE_BYTES = 64 * 1024
SCORES = {"margin_sum": output.logits, "margin_max": output.logits, "fingerprint_sum": output.nats}

command = group("watch", "Follow batches, audit what is selected, act on what is wrong.")


def data_of(context: Context) -> Path:
    """The watchtower's directory, wherever the settings put it; the other settings need not be complete."""
    from poip_chain.cli.settings import load_section
    from poip_chain.proof.settings import WatchtowerPlace

    place = load_section(WatchtowerPlace, "watchtower", context.config, context.flags)
    if place.sources["data"] == "default":
        return context.settings.data / "watchtower"
    return place.values.data.expanduser()


def database_of(context: Context) -> Path:
    """`data_of`, where a watchtower has run. Raises NotFound: a look must not make an empty database and find nothing."""
    from poip_chain.errors import NotFound
    from poip_chain.proof.store import DATABASE

    place = data_of(context)
    if not (place / DATABASE).is_file():
        raise NotFound(
            f"no watchtower has run here: there is no {place / DATABASE}.",
            hint="--data (or POIP_DATA) names its data directory, for example ~/.poip/local after `make up`; "
            "`poip watch run` starts one.",
        )
    return place


@command.command()
@click.option(
    "--mode",
    type=click.Choice(["watch", "propose", "defend"]),
    help="watch (default): report only. propose: also write the transactions as files. defend: send them.",
)
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path), help="Prepared model to re-execute.")
@click.option(
    "--engine", "engines", multiple=True, metavar="MODEL_ID=URL", help="vLLM server that re-executes instead."
)
@click.option("--bond-budget", type=AMOUNT, help="Most that may stand in bonds at one time.")
@click.option(
    "--loss-budget",
    type=AMOUNT,
    help="Most that one node's answers may take of bonds in a day; default: a quarter of the bond budget.",
)
@click.option("--court/--no-court", "court", default=None, help="Accuse what is found false; default: with a --model.")
@click.option(
    "--defence-budget", type=AMOUNT, help="Most that may stand in bonds against false accusations; default 0."
)
@click.option(
    "--keep-open", is_flag=True, default=None, help="Keep the court's engine open: for networks with short windows."
)
@click.option("--poll-interval", type=float, help="Seconds between rounds; default 1.")
@click.option("--confirmations", type=int, help="Blocks before a batch is believed; default 0.")
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics on this port of 127.0.0.1."
)
@key_context
def run(
    context: Context,
    models: tuple[Path, ...],
    engines: tuple[str, ...],
    court: bool | None,
    defence_budget: int | None,
    keep_open: bool | None,
    **flags: Any,
) -> None:
    """Run until stopped. Without --model or --engine everything but the computation is checked.

    What is found false is computed again in the court's arithmetic and accused, within the bond budget; that needs the
    model's directory (--model). In mode propose, --key names the account for which accusations are proposed.

    All settings: section [watchtower] of the settings file, and POIP_WATCHTOWER_*.
    """
    from poip_chain.cli.settings import load_section
    from poip_chain.proof import app
    from poip_chain.proof.settings import WatchtowerSettings

    wrong = [entry for entry in engines if "=" not in entry]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not MODEL_ID=URL.", param_hint="--engine")
    given = {
        **{name: value for name, value in context.flags.items() if name != "data"},
        **flags,
        "key": context.key_path(context.key_name) if context.key_name else None,
        "password_file": context.password_file,
        "models": list(models) or None,
        "engine_urls": dict(entry.split("=", 1) for entry in engines) or None,
    }
    settings = load_section(WatchtowerSettings, "watchtower", context.config, {"data": context.settings.data, **given})
    given_court = {"enabled": court, "defence_budget": defence_budget, "keep_open": keep_open}
    own = {name: value for name, value in given_court.items() if value is not None}
    in_court = settings.values.court.model_copy(update=own)
    app.run(settings.values.model_copy(update={"data": data_of(context), "court": in_court}))


@command.command()
@command_context
def status(context: Context) -> None:
    """What the watchtower of this data directory has seen: batches, verdicts, challenges, accusations, offences."""
    from poip_chain.economic.money import format_amount
    from poip_chain.proof.store import NOTE, open_store

    with open_store(database_of(context)) as store:
        audits, challenges, filings = store.audits(), store.challenges(), store.filings()
        batches, losses, accusations = store.batches(), store.losses_by_node(), store.accusations()
    data = {
        "batches": [{"id": b.batch.id, "node": b.batch.node, "status": b.status, "state": b.state} for b in batches],
        "audits": [
            {"batch": a.batch_id, "position": a.position, "state": a.state, "verdict": a.verdict, **a.detail,
             "evidence": a.evidence}
            for a in audits
        ],
        "challenges": [challenge.to_json() for challenge in challenges],
        "accusations": [accusation.to_json() for accusation in accusations],
        "lost_to_answers": {node: str(amount) for node, amount in losses.items()},
        "offences": [filing.to_json() for filing in filings],
    }  # fmt: skip

    def text() -> None:
        nodes = {b.batch.id: b.batch.node for b in batches}
        output.table(
            [">batch", ">receipt", "node", "verdict", ">margin sum", ">largest", ">fingerprint", "evidence"],
            [
                (
                    a.batch_id, a.position, nodes.get(a.batch_id, "?"),
                    a.detail.get(NOTE, a.verdict or a.state),
                    *(unit(a.detail[name]) if name in a.detail else None for name, unit in SCORES.items()), a.evidence,
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
        if losses:
            rows = [(node, format_amount(amount)) for node, amount in losses.items()]
            output.table(["node", ">taken by its answers"], rows, title="lost bonds")
        if accusations:
            output.table(
                [">batch", ">receipt", "case", "state", ">bond", "reason"],
                [
                    (
                        a["batch"], a["position"], a["case"] or "", a["state"], format_amount(int(a["bond"])), a["reason"],
                    )
                    for a in (accusation.to_json() for accusation in accusations)
                ],
                title="accusations",
            )  # fmt: skip
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
    with open_store(data_of(context)) as store:
        store.observe(receipt, signature, int(time.time()))
        pairs = len(store.equivocations())
    output.result(
        {"observed": receipt.struct_hash(), "contradictions": pairs},
        f"Receipt {receipt.seq} of {receipt.node} is kept. Contradicting pairs known: {pairs}.",
    )
