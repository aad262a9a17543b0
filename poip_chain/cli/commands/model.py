"""Register and show models on chain"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poip_chain.cli import output
from poip_chain.cli.context import HASH, Context, command_context, sending_context, when
from poip_chain.cli.main import group
from poip_chain.errors import InvalidInput

if TYPE_CHECKING:
    from poip_chain.economic.network import Network
    from poip_chain.spec.objects import Profile

command = group("model", "Models: named by the hash of their weights, tokenizer, template and dimensions.")

MAX_PROFILE_BYTES = 64 * 1024


@command.command("register")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--profile", type=click.Path(path_type=Path), help="Profile as JSON; default: the default model's.")
@click.option(
    "--max-context", type=click.IntRange(1), default=2048, show_default=True, help="Tokens; without --profile."
)
@click.option("--uri", default="", help="Where people can read about the model.")
@sending_context
def register(context: Context, directory: Path, profile: Path | None, max_context: int, uri: str) -> None:
    """Register the model in DIRECTORY (see `poip model prepare`) and its first profile.

    By the owner of the model registry only: the list of models is an allow-list. A model that is registered already
    with the same profile is left as it is.
    """
    from poip_chain.economic.profiles import CALIBRATED_MODEL, model_profile
    from poip_chain.service.engine.model import prepare
    from poip_chain.spec.trace import check_context

    with output.progress(f"reading {directory}") as show:
        hashes = prepare(directory, show)
    if profile is None and hashes.model_id != CALIBRATED_MODEL:
        output.note(
            "The score limits are those that were measured for the default model. By limits that are too narrow for this "
            "one an honest node loses its stake: `poip model calibrate` makes a --profile."
        )
    models = context.network.models
    wanted = (
        _read_profile(profile)
        if profile is not None
        else model_profile(hashes.config, hashes.end_token_ids, min(max_context, hashes.config.max_positions))
    )
    check_context(hashes.config, wanted.max_context)
    model_id = hashes.model_id
    calls, count = [], models.profile_count(model_id) if model_id in models.model_ids() else None
    if count is None:
        calls.append(models.register(hashes.spec, hashes.config, uri))
    version = next((v for v in range(1, (count or 0) + 1) if models.profile(model_id, v) == wanted), None)
    if version is None:
        version = (count or 0) + 1
        calls.append(models.add_profile(model_id, wanted))
    details = {"model_id": "0x" + model_id.hex(), "profile_version": version}
    title = f"register model 0x{model_id.hex()} with profile {version}"
    if not calls:
        output.result({"done": title, **details, "transactions": []}, f"{title}: it is there already.")
        return
    context.transact_all(title, calls, question=f"{title.capitalize()}?", **details)


def _read_profile(path: Path) -> Profile:
    from poip_chain.economic.profiles import profile_from_json
    from poip_chain.spec.strict_json import parse_json

    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise InvalidInput("it is too large.")
        return profile_from_json(parse_json(path.read_bytes()))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error}.") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path} holds no profile: {error}") from error


@command.command("list")
@command_context
def list_models(context: Context) -> None:
    """List the registered models."""
    network, now = context.network, context.chain.timestamp()
    rows = []
    for model_id in network.models.model_ids():
        config, sunset = network.models.config(model_id), network.models.deprecated_at(model_id)
        rows.append(
            {
                "model_id": "0x" + model_id.hex(),
                "profiles": network.models.profile_count(model_id),
                "layers": config.num_layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "served": not sunset or sunset > now,
            }
        )
    output.result(
        {"models": rows},
        lambda: output.table(
            ["model", ">profiles", ">layers", ">hidden", ">vocabulary", "served"],
            [list(row.values()) for row in rows],
            empty="no models",
        ),
    )


@command.command("show")
@click.argument("model_id", type=HASH)
@command_context
def show(context: Context, model_id: bytes) -> None:
    """Show a model, its profiles and who offers it."""
    from poip_chain.economic.money import format_price
    from poip_chain.economic.profiles import profile_to_json

    network = context.network
    spec, config = network.models.spec(model_id), network.models.config(model_id)
    profiles = {
        version: network.models.profile(model_id, version)
        for version in range(1, network.models.profile_count(model_id) + 1)
    }
    offers = _offers(network, model_id)
    sunset = network.models.deprecated_at(model_id)
    data = {
        "model_id": "0x" + model_id.hex(),
        "spec": spec.to_json(),
        "config": config.to_json(),
        "profiles": {version: profile_to_json(profile) for version, profile in profiles.items()},
        "deprecated_at": sunset,
        "offers": offers,
    }

    def text() -> None:
        output.fields({"model": data["model_id"], **spec.to_json(), **config.to_json(), "served until": when(sunset)})
        for version, profile in profiles.items():
            click.echo(f"\nprofile {version}")
            output.fields(profile_to_json(profile))
        click.echo("")
        output.table(
            ["node", ">profile", ">input", ">output"],
            [
                [o["node"], o["profile_version"], *(format_price(int(o[n])) for n in ("input_price", "output_price"))]
                for o in offers
            ],
            empty="no node offers it",
        )

    output.result(data, text)


def _offers(network: Network, model_id: bytes) -> list[dict[str, Any]]:
    return [
        {
            "node": node,
            "profile_version": offer.profile_version,
            "input_price": str(offer.input_price),
            "output_price": str(offer.output_price),
        }
        for node in network.registry.nodes()
        for offer in network.registry.offers(node)
        if offer.model_id == model_id
    ]
