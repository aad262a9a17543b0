"""Run an inference node until it is stopped"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from poip_chain.cli.context import Context, key_context


@click.command("run")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; default 8700.")
@click.option("--endpoint", metavar="URL", help="URL at which others reach this node; default http://HOST:PORT.")
@click.option("--engine", "engine_url", metavar="URL", help="The vLLM server; default http://127.0.0.1:8000.")
@click.option("--engine-model", metavar="NAME", help="The model's name at that server; default poip.")
@click.option("--capacity", type=click.IntRange(1, 4096), help="Requests that may run at the same time; default 16.")
@key_context
def command(context: Context, **flags: Any) -> None:
    """Serve requests, commit receipts, collect what is owed. --key is the node key; default: keys/node.json.

    All settings: section [node] of the settings file, and POIP_NODE_*. The node must be registered and have an offer
    (`poip node register`, `poip node offer`), and an engine must run (`poip engine serve`).
    """
    from poip_chain.cli.settings import load_section
    from poip_chain.service.node.app import run
    from poip_chain.service.node.settings import NodeSettings

    common = {name: value for name, value in context.flags.items() if name != "data"}
    effective = load_section(NodeSettings, "node", context.config, {**common, **flags})
    changes: dict[str, Path] = {}
    if effective.sources["data"] == "default":
        changes["data"] = context.settings.data / "node"
    # The commands that use the same key wait for it there: a key's nonces have one owner.
    if effective.sources["outbox"] == "default":
        changes["outbox"] = context.settings.data / "outbox"
    if context.key_name is not None:
        changes["key"] = context.key_path(context.key_name)
    elif effective.sources["key"] == "default":
        changes["key"] = context.settings.keys / "node.json"
    if context.password_file is not None:
        changes["password_file"] = context.password_file
    run(effective.values.model_copy(update=changes))
