"""Every protocol number: name, default, hard bounds and unit, and the devnet's short windows.

`contracts/governance/Parameters.vy` is deployed with these lists and keeps the bounds for good. Knows no chain and no
contract; tests hold the names here against contracts/governance/parameter_names.vy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from poip_chain.errors import InvalidInput

PPM = 10**6
"""Parts per million, the one base of every rate and share."""
POIP = 10**18
"""One token in wei."""
MAX_VALUE = 2**192 - 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One protocol number. `value` is what it starts with; minimum <= value <= maximum, always.

    Raises InvalidInput if the name, the bounds or the value are out of range.
    """

    name: str
    value: int
    minimum: int
    maximum: int
    unit: str
    meaning: str

    def __post_init__(self) -> None:
        if not self.name.isascii() or not 0 < len(self.name) <= 32:
            raise InvalidInput(f"a parameter's name is 1 to 32 ASCII characters, not {self.name!r}.")
        if not 0 <= self.minimum <= self.maximum <= MAX_VALUE:
            raise InvalidInput(f"the bounds of {self.name} are out of order: {self.minimum} to {self.maximum}.")
        if not self.minimum <= self.value <= self.maximum:
            raise InvalidInput(
                f"{self.name} must be from {self.minimum} to {self.maximum} {self.unit}, not {self.value}."
            )

    @property
    def key(self) -> bytes:
        """The name as the contract takes it: ASCII, left-aligned in 32 bytes."""
        return parameter_key(self.name)

    def as_tuple(self) -> tuple[bytes, int, int, int, str]:
        """The row of the contract's constructor: (key, value, minimum, maximum, unit)."""
        return (self.key, self.value, self.minimum, self.maximum, self.unit)


def parameter_key(name: str) -> bytes:
    """A parameter's name as the contract takes it: ASCII, left-aligned in 32 bytes. Raises InvalidInput."""
    if not name.isascii() or not 0 < len(name) <= 32:
        raise InvalidInput(f"a parameter's name is 1 to 32 ASCII characters, not {name!r}.")
    return name.encode("ascii").ljust(32, b"\0")


def with_values(parameters: tuple[Parameter, ...], values: Mapping[str, int]) -> tuple[Parameter, ...]:
    """`parameters` with some values replaced, in the same order.

    Raises InvalidInput for an unknown name, a value outside its bounds, or periods that break a relation.
    """
    unknown = sorted(set(values) - {parameter.name for parameter in parameters})
    if unknown:
        raise InvalidInput(f"there is no parameter {unknown[0]!r}. `poip params list` shows them all.")
    result = tuple(replace(p, value=values[p.name]) if p.name in values else p for p in parameters)
    check_relations({parameter.name: parameter.value for parameter in result})
    return result


def check_relations(values: Mapping[str, int]) -> None:
    """What the contract demands between periods, so that stake and escrow stay in reach of the longest case.

    Raises InvalidInput if unbonding_period or thaw_period is too short.
    """
    window, response = values["challenge_window"], values["response_window"]
    accusation = values["reveal_window"] + values["contest_window"] + 2 * values["dispute_clock"]
    least = window + 2 * response + accusation
    for name in ("unbonding_period", "thaw_period"):
        if values[name] < least:
            raise InvalidInput(
                f"{name} is {values[name]} seconds, but must be at least {least} with a challenge_window of {window}, "
                f"two response_windows of {response} and an accusation of up to {accusation} (reveal_window + "
                f"contest_window + 2 * dispute_clock). Raise {name} first."
            )


HOUR = 3600
DAY = 24 * HOUR

PARAMETERS: tuple[Parameter, ...] = (
    Parameter("audit_rate", 100_000, 10_000, PPM, "ppm", "share of a batch's receipts that the beacon selects"),
    Parameter(
        "audit_rate_step",
        20_000,
        0,
        200_000,
        "ppm",
        "added to a node's audit rate by each answered availability challenge; halved by each batch",
    ),
    Parameter(
        "detection_power", 800_000, 100_000, PPM, "ppm", "the court's chance to convict a cheated, audited receipt"
    ),
    Parameter("reward_share", 300_000, 0, 500_000, "ppm", "most of what a slash took that is given to anyone"),
    Parameter("minimum_lock", POIP, 0, 10**24, "wei", "least stake that a batch locks"),
    Parameter("minimum_stake", 100 * POIP, 1, 10**27, "wei", "least active stake of a node that commits"),
    Parameter(
        "fixed_slash_share",
        200_000,
        10_000,
        PPM,
        "ppm",
        "share of stake lost by equivocation or an uncommitted receipt; pinned at registration",
    ),
    Parameter("challenge_window", DAY, 5, 30 * DAY, "seconds", "from a batch's commitment to its finality"),
    Parameter(
        "response_window", 2 * HOUR, 5, 7 * DAY, "seconds", "to answer an availability challenge or a demand to commit"
    ),
    Parameter(
        "unbonding_period",
        14 * DAY,
        10,
        90 * DAY,
        "seconds",
        "until unbonding stake may leave; at least challenge_window + the longest case",
    ),
    Parameter(
        "thaw_period",
        2 * DAY,
        5,
        90 * DAY,
        "seconds",
        "until thawing escrow may leave; at least challenge_window + the longest case",
    ),
    Parameter("jail_period", DAY, 0, 90 * DAY, "seconds", "after a slash, before the operator may end the jail"),
    Parameter("key_rotation_delay", HOUR, 0, 7 * DAY, "seconds", "before a new node key signs"),
    Parameter(
        "beacon_delay", 4, 1, 256, "blocks", "from a batch's block to the block whose mixHash selects its audits"
    ),
    Parameter("availability_bond", POIP, 1, 10**24, "wei", "bond of an availability challenge or a demand to commit"),
    Parameter(
        "evidence_window",
        14 * DAY,
        10,
        90 * DAY,
        "seconds",
        "signed evidence of a committed seq expires this long after it",
    ),
    Parameter("protocol_fee", 10_000, 0, 200_000, "ppm", "share of final fees for the treasury"),
    Parameter("minimum_input_price", 0, 0, 10**24, "wei", "least price of a prompt token that a node may offer"),
    Parameter("minimum_output_price", 0, 0, 10**24, "wei", "least price of an output token that a node may offer"),
    Parameter("accusation_bond", 10 * POIP, 1, 10**24, "wei", "bond of an accusation of wrong computation"),
    Parameter("contest_bond", 5 * POIP, 1, 10**24, "wei", "bond of a contest of an accusation"),
    Parameter("reveal_window", HOUR, 5, DAY, "seconds", "from an accusation's commitment to its reveal"),
    Parameter("contest_window", 4 * HOUR, 5, 7 * DAY, "seconds", "from an accusation's reveal, to contest it"),
    Parameter("dispute_clock", 6 * HOUR, 5, 7 * DAY, "seconds", "for all moves of one side in one contest"),
)
"""The defaults of a real network, in the order in which the contract lists them."""

DEVNET_PARAMETERS: tuple[Parameter, ...] = with_values(
    PARAMETERS,
    {
        # A devnet's batches are small; audits should be seen all the same.
        "audit_rate": 500_000,
        "minimum_stake": 10 * POIP,
        "challenge_window": 40,
        "response_window": 20,
        "unbonding_period": 400,
        "thaw_period": 400,
        "jail_period": 20,
        "key_rotation_delay": 5,
        "beacon_delay": 2,
        "evidence_window": 600,
        "reveal_window": 10,
        "contest_window": 45,
        "dispute_clock": 120,
    },
)
"""The same network with windows of seconds, for a devnet whose blocks come every second or so."""
