"""Measure honest noise and cheats on a model, and write the profile that follows."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context

STAGES = ("honest", "cheats", "report")


@click.command(name="calibrate")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of this calibration.")
@click.option("--tokens", type=click.IntRange(1), default=50_000, show_default=True, help="Honest output tokens.")
@click.option("--cheat-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of each cheat.")
@click.option("--max-context", type=click.IntRange(2), default=2048, show_default=True, help="Of the profile.")
@click.option("--dtype", default="bfloat16", show_default=True, help="What honest nodes serve with.")
@click.option("--longest", type=click.IntRange(4), default=256, show_default=True, help="Output tokens of an answer.")
@click.option("--longest-prompt", type=click.IntRange(1), default=1000, show_default=True, help="Tokens of a prompt.")
@click.option("--widen", type=click.FloatRange(1), default=1.5, show_default=True, help="Factor on all limits.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of prompts and seeds.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each engine.")
@click.option("--engine", default="", help="URL of an engine that runs already; default: start one.")
@click.option("--engine-label", default="this machine", show_default=True, help="Its hardware, for the report.")
@click.option("--stage", multiple=True, type=click.Choice(STAGES), help="Only these; default: all, in this order.")
@command_context
def command(
    context: Context,
    directory: Path,
    out: Path,
    tokens: int,
    cheat_tokens: int,
    max_context: int,
    dtype: str,
    longest: int,
    longest_prompt: int,
    widen: float,
    seed: int,
    threads: int,
    engine: str,
    engine_label: str,
    stage: tuple[str, ...],
) -> None:
    """Calibrate the model in DIRECTORY: honest answers of a real engine against the canonical one, then cheats.

    Takes hours on a CPU. It may be stopped at any time; the same command goes on where it stood. The folder gets
    profile.json for `poip model register --profile`, report.md and report.json, and the raw scores.
    """
    from poip_chain.proof.calibration.run import Calibration, Settings

    settings = Settings(
        model=directory,
        out=out,
        tokens=tokens,
        cheat_tokens=cheat_tokens,
        max_context=max_context,
        dtype=dtype,
        seed=seed,
        longest=longest,
        longest_prompt=longest_prompt,
        threads=threads,
        widen=widen,
        engine_url=engine,
        engine_label=engine_label,
        stages=tuple(name for name in STAGES if name in stage) if stage else STAGES,
    )
    with output.progress(f"calibrating {directory}") as show:
        found = Calibration(settings, show).run()
    if found is None:
        output.result({"out": str(out), "stages": list(settings.stages)}, f"done; the scores are in {out}.")
        return
    low, high = found.honesty.accusation
    data = {"out": str(out), **found.to_json()}
    output.result(
        data,
        lambda: output.fields(
            {
                "profile": out / "profile.json",
                "report": out / "report.md",
                "honest": f"{found.receipts} receipts, {found.tokens:,} tokens",
                "accusation": f"{low:.2g} to {high:.2g} of honest receipts (95 % confidence)",
                "cheats": len(found.detections),
            }
        ),
    )
