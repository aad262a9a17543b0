"""Ready-made settings: of a deployment (a real network's, or a devnet's with short windows), and of a model's profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poip_chain.chain.deployment import DeploymentSettings
from poip_chain.economic.money import TOKEN
from poip_chain.economic.parameters import DEVNET_PARAMETERS, PARAMETERS, with_values
from poip_chain.errors import InvalidInput
from poip_chain.spec.objects import ModelConfig, Profile, ThresholdRow
from poip_chain.spec.strict_json import parse_json
from poip_chain.spec.types import Address

CALIBRATED = Path(__file__).parent / "calibrated"
"""Profiles that `poip model calibrate` made, by model id; docs/calibration.md says where their scores are."""
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
    """A profile with uncalibrated score limits: for suspicion, not for conviction.

    Measured on CPUs with the default model (80 answers, 9,579 tokens, bf16 engine against fp32): honest margins reached
    0.41 logits, their sums above the dead zone were next to nothing; fingerprints above the dead zone came to 1.1 a token,
    8.9 in the worst answer. int4 weights give about one logit and a hundred of these units a token. Limits are sums by
    length, margins in 2**-16 logits, fingerprints in 1/64 nat. Other hardware and models need a calibration of their own.
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
        margin_table=tuple(
            ThresholdRow(tokens, limit * LOGIT) for tokens, limit in ((16, 2), (64, 3), (256, 6), (1024, 16))
        ),
        fingerprint_dead_zone=NAT // 4,
        fingerprint_tolerance=NAT // 2,
        fingerprint_table=tuple(
            ThresholdRow(tokens, per_token * tokens)
            for tokens, per_token in ((16, 40), (64, 24), (256, 16), (1024, 12))
        ),
    )


def registered_profile(
    model_id: bytes, config: ModelConfig, end_token_ids: Sequence[int], max_context: int, dtype: str = "bfloat16"
) -> Profile:
    """What to register a model with: the calibrated profile that ships with the package, else `model_profile`.

    A context shorter than the calibrated one is as safe: limits were made for the longest answer.
    """
    path = CALIBRATED / f"{model_id.hex()}.json"
    if not path.is_file():
        return model_profile(config, end_token_ids, max_context, dtype)
    shipped = profile_from_json(parse_json(path.read_bytes()))
    if shipped.dtype != dtype:
        return model_profile(config, end_token_ids, max_context, dtype)
    return dataclasses.replace(shipped, max_context=min(max_context, shipped.max_context))


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
