"""Start the demonstration's network and leave it running."""

from __future__ import annotations

import time
from pathlib import Path

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path), help="A local safetensors directory; default: the shipped model."
)
@command_context
def command(context: Context, model: Path | None) -> None:
    """Start devnet, engines, nodes, gateway and watchtower; print where they are. `poip down` stops them."""
    from poip_chain.cli.local.network import MODEL_NAME, LocalNetwork
    from poip_chain.cli.local.processes import running
    from poip_chain.cli.local.pulse import Pulse
    from poip_chain.errors import Refused

    place = context.settings.data / "local"
    if running(place):
        raise Refused("the local network is running already.", hint="`poip down` stops it.")
    begin = time.monotonic()
    with Pulse(lambda text: output.note(f"[{time.monotonic() - begin:5.0f} s] {text}")) as pulse:
        local = LocalNetwork(place, pulse.tell)
        try:
            local.start(context.settings.data / "models", model)
        except BaseException:
            local.supervisor.stop()
            raise
    data = {
        "rpc_url": local.rpc_url,
        "openai_base_url": f"{local.gateway_url}/v1",
        "model": MODEL_NAME,
        "deployment": str(local.deployment_path),
        "nodes": {node.name: {"node": node.node_key.address, "url": node.url} for node in local.nodes},
    }

    def text() -> None:
        output.fields({"chain (RPC)": local.rpc_url, "OpenAI API": f"{local.gateway_url}/v1", "model": MODEL_NAME})
        output.table(["node", "address", "URL"], [(n.name, n.node_key.address, n.url) for n in local.nodes])
        click.echo(f"Use it with --data {place}; `poip down` stops it.")

    output.result(data, text)
