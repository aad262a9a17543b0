"""Ready-made settings: of a deployment (a real network's, or a devnet's with short windows), and of a model's profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from poip_chain.chain.deployment import DeploymentSettings
from poip_chain.economic.money import TOKEN
from poip_chain.economic.parameters import DEVNET_PARAMETERS, PARAMETERS, with_values
from poip_chain.errors import InvalidInput
from poip_chain.spec.objects import ModelConfig, Profile, ThresholdRow
from poip_chain.spec.types import Address

PROFILES = ("devnet", "standard")
DEVNET_ACCOUNTS = 10
DEVNET_GRANT = 1_000_000 * TOKEN
"""What each account of the development mnemonic gets on a devnet, wei."""


def deployment_settings(
    profile: str,
    *,
    values: Mapping[str, int] | None = None,
    treasury: Address | None = None,
    admin: Address | None = None,
    grants: Mapping[Address, int] | None = None,
) -> DeploymentSettings:
    """Settings by the name of a profile, with some protocol numbers replaced.

    On 'devnet' the accounts of the development mnemonic are granted tokens besides `grants`.
    Raises InvalidInput for an unknown profile, an unknown parameter, or a value out of its bounds.
    """
    if profile not in PROFILES:
        raise InvalidInput(f"there is no profile {profile!r}.", hint=f"Choose one of: {', '.join(PROFILES)}.")
    parameters = with_values(DEVNET_PARAMETERS if profile == "devnet" else PARAMETERS, values or {})
    funded: dict[Address, int] = {}
    if profile == "devnet":
        from poip_chain.chain.keys import development_key

        funded = {development_key(index).address: DEVNET_GRANT for index in range(DEVNET_ACCOUNTS)}
    return DeploymentSettings(
        parameters=tuple(parameter.as_tuple() for parameter in parameters),
        treasury=treasury,
        admin=admin,
        grants={**funded, **(grants or {})},
    )


CALIBRATED_MODEL = bytes.fromhex("2c596bb043f243abd0c7bd5fa48c2e932a4e6ef4799083bf32f9981fe3f2ef30")
"""The model, the default one, to which the limits of `model_profile` belong."""


def model_profile(
    config: ModelConfig, end_token_ids: Sequence[int], max_context: int, dtype: str = "bfloat16"
) -> Profile:
    """A profile with the limits that were calibrated for the default model, an engine in bfloat16 on CPUs.

    53,504 honest tokens, false conviction of an honest receipt below 1e-9 by the bound of docs/calibration.md;
    docs/data/calibration holds scores and report. For other models, number types and hardware they are no more than a
    place to start from: `poip model calibrate`. Limits are sums by length, margins in 2**-16 logits, fingerprints in
    1/64 nat.
    """
    return Profile(
        max_context=max_context,
        vocab_size=config.vocab_size,
        dtype=dtype,
        kv_dtype=dtype,
        min_temperature_milli=100,
        max_temperature_milli=2000,
        end_token_ids=tuple(end_token_ids),
        margin_dead_zone=32_768,
        margin_hard_limit=1_265_664,
        margin_table=_table((16, 913_408), (32, 1_825_792), (64, 2_774_016), (128, 3_928_064)),
        fingerprint_dead_zone=22,
        fingerprint_tolerance=93,
        fingerprint_table=_table((16, 4649), (32, 7776), (64, 8088), (128, 14_750)),
    )


def _table(*rows: tuple[int, int]) -> tuple[ThresholdRow, ...]:
    return tuple(ThresholdRow(tokens, limit) for tokens, limit in rows)


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """A profile as JSON; `profile_from_json` reads it back."""
    data = dataclasses.asdict(profile)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def profile_from_json(data: Any) -> Profile:
    """Parse `profile_to_json`'s form. Raises InvalidInput."""
    names = {field.name for field in dataclasses.fields(Profile)}
    if not isinstance(data, dict) or set(data) != names:
        raise InvalidInput(f"a profile is a JSON object with exactly the fields {sorted(names)}.")
    try:
        tables = {
            name: tuple(ThresholdRow(int(row["tokens"]), int(row["limit"])) for row in data[name])
            for name in ("margin_table", "fingerprint_table")
        }
        return Profile(**{**data, **tables, "end_token_ids": tuple(data["end_token_ids"])})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InvalidInput(f"the profile is malformed: {error!r}.") from error
