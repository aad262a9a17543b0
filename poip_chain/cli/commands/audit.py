"""Repeat an audit from its evidence file, or list audits."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, local_context
from poip_chain.cli.main import group

command = group("audit", "Re-execute answers and judge them.")


@command.command()
@click.option("--evidence", required=True, type=click.Path(path_type=Path), help="Evidence file of a watchtower.")
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="Directory of the model to re-execute with."
)
@click.option("--positions", is_flag=True, help="Show every output position.")
@local_context
def run(context: Context, evidence: Path, model: Path, positions: bool) -> None:
    """Recompute an answer from its evidence file and a copy of the model; needs no chain and no node.

    Exit code 4 if the verdict is fraud, or if the file states the verdict of a re-execution and this is another. In JSON
    margins are in 2**-16 logits, fingerprints in 1/64 nat.
    """
    from poip_chain.errors import InvalidInput, NotFound
    from poip_chain.proof.evidence import Evidence
    from poip_chain.proof.reexecution import TorchSource
    from poip_chain.proof.scoring import judge
    from poip_chain.service.engine.model import prepare
    from poip_chain.spec.scores import Verdict

    if not evidence.is_file():
        raise NotFound(
            f"there is no evidence file {evidence}.",
            hint="A watchtower writes one for each answer that it audits; `poip audit list` names them.",
        )
    case = Evidence.read(evidence)
    with output.progress("preparing the model") as show:
        hashes = prepare(model, show)
        if hashes.model_id != case.batch.model_id:
            raise InvalidInput(
                f"{model} is model 0x{hashes.model_id.hex()}, the batch is of 0x{case.batch.model_id.hex()}."
            )
        show("re-executing")
        judgement = judge([case.record], case.profile, TorchSource(model))[0]
    scores = judgement.scores
    numbers = {
        "tokens": scores.tokens,
        "margin_sum": scores.margin_sum,
        "margin_max": scores.margin_max,
        "fingerprint_sum": scores.fingerprint_sum,
    }
    stated = case.result.get("verdict")
    rows = [
        (i, case.record.transcript.output_ids[i], p.best_token, p.margin, p.fingerprint)
        for i, p in enumerate(judgement.positions)
    ]
    data = {
        "batch": case.batch.id, "position": case.position, "verdict": judgement.verdict, "stated": stated, **numbers,
        "source": judgement.source,
    }  # fmt: skip
    if positions:
        columns = ("position", "token", "best", "margin", "fingerprint")
        data["positions"] = [dict(zip(columns, row, strict=True)) for row in rows]

    def text() -> None:
        output.fields(
            {
                "batch": case.batch.id,
                "receipt": case.position,
                "node": case.batch.node,
                "tokens": scores.tokens,
                "margin, sum": output.logits(scores.margin_sum),
                "margin, largest": output.logits(scores.margin_max),
                "fingerprint, sum": output.nats(scores.fingerprint_sum),
                "verdict": judgement.verdict,
                "in the file": stated,
                "recomputed with": judgement.source,
            }
        )
        if positions:
            readable = [(*row[:3], output.logits(row[3]), output.nats(row[4])) for row in rows]
            output.table([">position", ">token", ">sampler's token", ">margin", ">fingerprint"], readable)

    output.result(data, text)
    if stated in set(Verdict) and stated != judgement.verdict:
        raise output.CheckFailed(f"the file says {stated}, re-execution says {judgement.verdict}.")
    if judgement.verdict == Verdict.FRAUD:
        raise output.CheckFailed("the verdict is fraud: this answer was not computed as the model computes it.")


@command.command(name="list")
@local_context
def list_(context: Context) -> None:
    """Audits of the watchtower in this data directory. Reads its database alone, no chain."""
    from poip_chain.cli.commands.watch import database_of
    from poip_chain.proof.store import open_store

    with open_store(database_of(context)) as store:
        audits = store.audits()
    rows = [{"batch": a.batch_id, "position": a.position, "verdict": a.verdict, "evidence": a.evidence} for a in audits]
    output.result(
        {"audits": rows},
        lambda: output.table(
            [">batch", ">receipt", "verdict", "evidence"],
            [(a.batch_id, a.position, a.verdict or a.state, a.evidence) for a in audits],
            empty="no audits yet",
        ),
    )
