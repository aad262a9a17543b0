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


LOGIT = 2**16
NAT = 64


def model_profile(
    config: ModelConfig, end_token_ids: Sequence[int], max_context: int, dtype: str = "bfloat16"
) -> Profile:
    """A profile with the score limits that were measured for small models in bfloat16 on CPUs, widened by half.

    The limits are sums by length: margins in 2**-16 logits (honest ones reached 0.74 once in 14,000 tokens; more than 3
    is fraud by itself), fingerprints in 1/64 nat over eight entries a position. Other hardware and larger models need
    their own calibration before stake depends on it.
    """
    return Profile(
        max_context=max_context,
        vocab_size=config.vocab_size,
        dtype=dtype,
        kv_dtype=dtype,
        min_temperature_milli=100,
        max_temperature_milli=2000,
        end_token_ids=tuple(end_token_ids),
        margin_dead_zone=LOGIT // 4,
        margin_hard_limit=3 * LOGIT,
        margin_table=(
            ThresholdRow(16, 4 * LOGIT),
            ThresholdRow(64, 6 * LOGIT),
            ThresholdRow(128, 8 * LOGIT),
            ThresholdRow(512, 13 * LOGIT),
            ThresholdRow(2048, 24 * LOGIT),
        ),
        fingerprint_dead_zone=2,
        fingerprint_tolerance=NAT // 2,
        fingerprint_table=(
            ThresholdRow(16, 70 * NAT),
            ThresholdRow(128, 245 * NAT),
            ThresholdRow(512, 635 * NAT),
            ThresholdRow(2048, 2040 * NAT),
        ),
    )


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
