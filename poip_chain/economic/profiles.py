"""Ready-made settings of a deployment: a real network's, and a devnet's with short windows and funded accounts."""

from __future__ import annotations

from collections.abc import Mapping

from poip_chain.chain.deployment import DeploymentSettings
from poip_chain.economic.money import TOKEN
from poip_chain.economic.parameters import DEVNET_PARAMETERS, PARAMETERS, with_values
from poip_chain.errors import InvalidInput
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
