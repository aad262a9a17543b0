"""Run an OpenAI-compatible gateway and manage its API keys"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import AMOUNT, Context, command_context
from poip_chain.cli.main import group
from poip_chain.errors import ConfigurationError, InvalidInput, Unavailable

if TYPE_CHECKING:
    from poip_chain.control.gateway.settings import GatewaySettings
    from poip_chain.control.gateway.store import GatewayStore

command = group("gateway", "The OpenAI API over the network's nodes, paid from the gateway's own escrow.")

API_KEY_VARIABLE = "POIP_API_KEY"


@command.command("run")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; default 8800.")
@click.option("--key", type=click.Path(path_type=Path), help="Key file that signs and pays; default keys/gateway.json.")
@click.option("--password-file", type=click.Path(path_type=Path), help="File with the key's password (mode 0600).")
@click.option("--model", "models", multiple=True, metavar="[NAME=]DIRECTORY", help="Model to serve; may be repeated.")
@click.option("--escrow-per-node", type=AMOUNT, help="Keep this much escrow with each usable node.")
@click.option("--no-api-keys", is_flag=True, help="Serve everyone who reaches the port, at this key's expense.")
@command_context
def run(context: Context, models: tuple[str, ...], no_api_keys: bool, **flags: Any) -> None:
    """Run the gateway until it is stopped. Settings: [gateway] in the settings file, POIP_GATEWAY_*, and flags."""
    from poip_chain.control.gateway.app import run

    flags["models"] = [_model(text) for text in models] or None
    flags["require_api_key"] = False if no_api_keys else None
    run(_settings(context, flags))


@command.group("key")
def keys() -> None:
    """API keys of the people who may use the gateway."""


@keys.command("new")
@click.argument("name")
@click.option("--cap", type=AMOUNT, help="Most that the key may spend in all; default: no limit.")
@command_context
def new_key(context: Context, name: str, cap: int | None) -> None:
    """Make an API key for NAME and print it: it is shown this once and stored only as a hash."""
    store = _store(context)
    key, text = store.create_key(name, cap, int(time.time()))
    store.close()
    output.note("Keep this key; it is not shown again.")
    output.result({**key.to_json(), "api_key": text}, text)


@keys.command("list")
@command_context
def list_keys(context: Context) -> None:
    """Show all API keys with what they have spent."""
    from poip_chain.economic.money import format_amount

    store = _store(context)
    found = store.api_keys()
    store.close()

    def text() -> None:
        output.table(
            ["id", "name", ">spent", ">open", ">cap", "state"],
            [
                [
                    key.id,
                    key.name,
                    format_amount(key.spent),
                    format_amount(key.open),
                    "none" if key.cap is None else format_amount(key.cap),
                    "valid" if key.revoked_at is None else "revoked",
                ]
                for key in found
            ],
            empty="no API keys; `poip gateway key new NAME` makes one",
        )

    output.result({"keys": [key.to_json() for key in found]}, text)


@keys.command("revoke")
@click.argument("key_id")
@command_context
def revoke_key(context: Context, key_id: str) -> None:
    """End the API key with the id KEY_ID at once."""
    store = _store(context)
    try:
        key = store.revoke_key(key_id, int(time.time()))
    finally:
        store.close()
    output.result(key.to_json(), f"The key of {key.name} is revoked.")


@command.command("nodes")
@click.option("--url", default="http://127.0.0.1:8800", show_default=True, help="The gateway.")
@command_context
def nodes(context: Context, url: str) -> None:
    """Show what a running gateway knows of each node, and why it does not choose it. [POIP_API_KEY]"""
    import httpx

    from poip_chain.spec.strict_json import parse_json_object

    try:
        answer = httpx.get(f"{url.rstrip('/')}/poip/v1/nodes", headers=api_headers(), timeout=10)
        rows = parse_json_object(answer.content)["nodes"] if answer.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL, InvalidInput, KeyError) as error:
        raise Unavailable(f"the gateway at {url} does not answer ({type(error).__name__}).") from error
    if rows is None:
        raise InvalidInput(
            f"the gateway at {url} refuses ({answer.status_code}).", hint=f"Set {API_KEY_VARIABLE} to an API key."
        )

    def text() -> None:
        output.table(
            ["node", ">running", ">success", ">first token (s)", "why not chosen"],
            [
                [
                    row["node"],
                    f"{row['running']}/{row['capacity']}",
                    f"{row['success_ratio']:.0%}",
                    "" if row["first_token_seconds"] is None else f"{row['first_token_seconds']:.2f}",
                    row["why_not_chosen"] or "",
                ]
                for row in rows
            ],
            empty="the gateway knows no nodes",
        )

    output.result({"nodes": rows}, text)


def api_headers() -> dict[str, str]:
    """The authorization header with the API key from the environment, if there is one."""
    key = os.environ.get(API_KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def _settings(context: Context, flags: dict[str, Any]) -> GatewaySettings:
    from poip_chain.cli.settings import load_section
    from poip_chain.control.gateway.settings import GatewaySettings

    common = {name: value for name, value in context.flags.items() if name != "data"}
    effective = load_section(GatewaySettings, "gateway", context.config, {**common, **flags})
    settings, changes = effective.values, {}
    if effective.sources["data"] == "default":
        changes["data"] = context.settings.data / "gateway"
    if effective.sources["key"] == "default":
        changes["key"] = context.settings.keys / "gateway.json"
    return settings.model_copy(update=changes)


def _store(context: Context) -> GatewayStore:
    """The key store, wherever the settings put it; the other settings need not be complete."""
    from poip_chain.cli.settings import load_section
    from poip_chain.control.gateway.settings import GatewayPlace
    from poip_chain.control.gateway.store import GatewayStore

    effective = load_section(GatewayPlace, "gateway", context.config, {})
    data = context.settings.data / "gateway" if effective.sources["data"] == "default" else effective.values.data
    return GatewayStore(data / "gateway.db")


def _model(text: str) -> dict[str, Any]:
    name, separator, directory = text.rpartition("=")
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise ConfigurationError(f"there is no model directory {path}.", hint="`poip model prepare` makes one.")
    return {"name": name if separator else path.resolve().name, "directory": path}
