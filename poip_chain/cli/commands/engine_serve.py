"""Serve a prepared model with vLLM and the protocol's sampler."""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context


@click.command(name="serve")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Prepared model directory.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--max-model-len", type=int, default=2048, show_default=True, help="Prompt and output tokens together.")
@click.option("--max-num-seqs", type=int, default=64, show_default=True, help="Requests in one batch.")
@click.option(
    "--dtype", default="auto", show_default=True, help="auto: bfloat16 where the hardware has it, or float32."
)
@click.option("--kv-cache-gib", type=int, default=1, show_default=True, help="CPU engines: memory for keys and values.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU engines: threads.")
@command_context
def command(
    context: Context,
    model: Path,
    host: str,
    port: int,
    max_model_len: int,
    max_num_seqs: int,
    dtype: str,
    kv_cache_gib: int,
    threads: int,
) -> None:
    """Run until stopped. The engine trusts whoever reaches its port: keep it on a private address."""
    from poip_chain.service.engine.server import EngineOptions, EngineServer

    options = EngineOptions(
        model=model,
        host=host,
        port=port,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        kv_cache_gib=kv_cache_gib,
        threads=threads,
        log_file=context.settings.data / "logs" / "engine.log",
    )
    with output.progress("starting vLLM") as show:
        server = EngineServer(options)
        server.start()
        try:
            server.wait_ready(show)
        except BaseException:
            server.stop()
            raise
    output.note(f"serving {model} at {server.url}; log: {server.log_file}. Stop with Ctrl-C.")
    try:
        server.wait()
    finally:
        server.stop()
