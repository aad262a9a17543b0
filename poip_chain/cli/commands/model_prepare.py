"""Check a model directory and compute the hashes that name the model."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context

DEFAULT_MODEL = "smollm2-135m-instruct"


@click.command(name="prepare")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--recompute", is_flag=True, help="Compute all hashes again, and fail if they differ from the record.")
@command_context
def command(context: Context, directory: Path | None, recompute: bool) -> None:
    """Prepare the model in DIRECTORY (safetensors, never pickles); without DIRECTORY, build the default model.

    The hashes depend on the files' content alone: everybody who has the model computes the same.
    """
    from poip_chain.service.engine.model import prepare, prepare_default, verify

    place = directory or context.settings.data / "models" / DEFAULT_MODEL
    with output.progress(f"preparing {place.name}") as show:
        hashes = prepare(place, show) if directory else prepare_default(place, show)
        if recompute:
            hashes = verify(place, show)
    data = {"directory": str(place), **hashes.to_json()}
    shown = ("directory", "model_id", "weights_root", "tokenizer_hash", "chat_template_hash", "config_hash")
    output.result(data, lambda: output.fields({name: data[name] for name in shown}))
