"""Show the effective settings and where each comes from."""

from __future__ import annotations

import click

from poip_chain.cli import output
from poip_chain.cli.context import Context, command_context

SECTIONS = {
    "node": "poip_chain.service.node.settings:NodeSettings",
    "gateway": "poip_chain.control.gateway.settings:GatewaySettings",
    "watchtower": "poip_chain.proof.settings:WatchtowerSettings",
}


@click.command("config")
@click.argument("section", required=False, type=click.Choice(sorted(SECTIONS)))
@command_context
def command(context: Context, section: str | None) -> None:
    """Show the effective settings with the source of each: a flag, the environment, the file, or the default.

    SECTION shows a program's settings instead of the common ones.
    """
    if section is None:
        effective = context.effective
        rows = [(name, str(value), effective.sources[name]) for name, value in effective.values.model_dump().items()]
        rows.append(("deployment (in use)", str(context.settings.deployment_path), ""))
    else:
        rows = _section(context, section)
    output.result(
        {"settings": {name: {"value": value, "source": source} for name, value, source in rows}},
        lambda: output.table(["setting", "value", "source"], rows),
    )


def _section(context: Context, section: str) -> list[tuple[str, str, str]]:
    """What a program would be started with. Mandatory values that are still missing are shown as such."""
    import importlib

    from poip_chain.cli.settings import collect

    module, _, name = SECTIONS[section].partition(":")
    model = getattr(importlib.import_module(module), name)
    values, sources = collect(model, section, context.config, context.flags)
    rows = []
    for field, info in model.model_fields.items():
        if field in values:
            rows.append((field, str(values[field]), sources[field]))
        elif info.is_required():
            rows.append((field, "missing", "must be set"))
        else:
            rows.append((field, str(info.get_default(call_default_factory=True)), "default"))
    return rows
