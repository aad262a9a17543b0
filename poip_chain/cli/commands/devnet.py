"""Run a local development chain"""

from __future__ import annotations

from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context


@click.command("devnet")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8545, show_default=True, help="0: any free port.")
@click.option("--block-time", type=float, help="Seconds from one block to the next, empty ones too. [default: 1]")
@click.option("--automine", is_flag=True, help="Seal a block with every transaction instead.")
@click.option("--memory", is_flag=True, help="Forget the chain at the end; otherwise it is kept in the data directory.")
@click.option("--chain-id", type=click.IntRange(1), default=31337, show_default=True)
@click.option("--backend", type=click.Choice(["embedded", "anvil"]), default="embedded", show_default=True)
@click.option("--ready-file", type=click.Path(path_type=Path), help="Gets the URL once requests are answered.")
@command_context
def command(
    context: Context,
    host: str,
    port: int,
    block_time: float | None,
    automine: bool,
    memory: bool,
    chain_id: int,
    backend: str,
    ready_file: Path | None,
) -> None:
    """Run a development chain until Ctrl-C.

    Its ten accounts are those of every development chain ("test test ... junk"), with 10,000 coins each.
    """
    if automine and block_time is not None:
        raise click.UsageError("--automine and --block-time exclude each other.")
    from poip_chain.chain.devnet.config import DevnetConfig
    from poip_chain.chain.devnet.server import run

    database = None if memory or backend != "embedded" else context.settings.data / "devnet" / "chain.db"
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    output.note(f"development chain on http://{host}:{port}; {database or 'kept in memory'}. Ctrl-C ends it.")
    run(
        DevnetConfig(
            host=host,
            port=port,
            database=database,
            block_time=None if automine else (1.0 if block_time is None else block_time),
            automine=automine,
            chain_id=chain_id,
            backend="anvil" if backend == "anvil" else "embedded",
            ready_file=ready_file,
        )
    )
