"""Repeat an audit from its evidence file, or list audits."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context
from poip_chain.cli.main import group

command = group("audit", "Re-execute answers and judge them.")


@command.command()
@click.option("--evidence", required=True, type=click.Path(path_type=Path), help="Evidence file of a watchtower.")
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="Directory of the model to re-execute with."
)
@click.option("--positions", is_flag=True, help="Show every output position.")
@command_context
def run(context: Context, evidence: Path, model: Path, positions: bool) -> None:
    """Recompute an answer from its evidence file and a copy of the model; needs no chain and no node.

    Exit code 4 if the file has a verdict of a re-execution, and this is another.
    """
    from poip_chain.errors import InvalidInput
    from poip_chain.proof.evidence import Evidence
    from poip_chain.proof.reexecution import TorchSource
    from poip_chain.proof.scoring import judge
    from poip_chain.service.engine.model import prepare
    from poip_chain.spec.scores import Verdict

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
        (i, case.record.transcript.output_ids[i], p.best_token, f"{p.margin / 65536:.4f}", p.fingerprint)
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
        output.fields({"batch": case.batch.id, "receipt": case.position, "node": case.batch.node, **numbers})
        output.fields({"verdict": judgement.verdict, "in the file": stated, "recomputed with": judgement.source})
        if positions:
            output.table([">position", ">token", ">sampler's token", ">margin", ">fingerprint"], rows)

    output.result(data, text)
    if stated in set(Verdict) and stated != judgement.verdict:
        raise output.CheckFailed(f"the file says {stated}, re-execution says {judgement.verdict}.")


@command.command(name="list")
@command_context
def list_(context: Context) -> None:
    """Audits of the watchtower in this data directory."""
    from poip_chain.cli.commands.watch import data_of
    from poip_chain.proof.store import open_store

    with open_store(data_of(context)) as store:
        audits = store.audits()
    output.result(
        [{"batch": a.batch_id, "position": a.position, "verdict": a.verdict, "evidence": a.evidence} for a in audits],
        lambda: output.table(
            [">batch", ">receipt", "verdict", "evidence"],
            [(a.batch_id, a.position, a.verdict or a.state, a.evidence) for a in audits],
        ),
    )
