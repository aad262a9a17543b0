"""What an attack on the court costs whom: everybody's money before and after a game, to the wei. Knows no moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from poip_chain.spec.types import Address
from tests.contracts.court import ACCUSER, CONTESTER, Court
from tests.contracts.network import Committed
from tests.contracts.system import POIP, Account, account

BOND, CONTEST_BOND = 10 * POIP, 5 * POIP
PARTNER = account("partner")
"""Of whoever attacks."""


@dataclass
class Ledger:
    """What players have (tokens, credits, rewards), what the node has staked, and what is burned or will be."""

    court: Court
    committed: Committed
    people: dict[str, Address] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.people = {"accuser": ACCUSER.address, "contester": CONTESTER.address, "partner": PARTNER.address}
        self.people["node"] = self.committed.batch.node
        self.before = self._now()

    def changes(self) -> dict[str, int]:
        """By how much each differs from the start, in wei, those that do; `held` are bonds of what is open."""
        now = self._now()
        changes = {name: now[name] - self.before[name] for name in now if now[name] != self.before[name]}
        assert sum(changes.values()) == 0, "money neither appears nor disappears"
        return changes

    @property
    def lock(self) -> int:
        """What a conviction takes from the node."""
        return self.committed.batch.lock

    @property
    def reward(self) -> int:
        """What of it its beneficiary gets."""
        return self.lock * self.court.value("reward_share") // 10**6

    def conviction(self, who: str = "accuser", **bonds: int) -> dict[str, int]:
        """The changes that a conviction makes, with those of bonds added."""
        found = {who: self.reward, "stake": -self.lock, "burned": self.lock - self.reward}
        for name, amount in bonds.items():
            found[name] = found.get(name, 0) + amount
        return {name: amount for name, amount in found.items() if amount}

    def _now(self) -> dict[str, int]:
        network, court = self.court.network, self.court.accusations
        credits = {name: court.credits(who) for name, who in self.people.items()}
        found = {
            name: network.token.balanceOf(who) + network.registry.rewards(who) + credits[name]
            for name, who in self.people.items()
        }
        found["stake"] = network.stake_of(self.committed.batch.node)
        found["burned"] = court.to_burn() - network.token.totalSupply()
        found["held"] = court.total_held() - court.to_burn() - sum(credits.values())
        return found


def with_partner(court: Court) -> Account:
    """The partner, with tokens for its bonds."""
    court.fund(PARTNER.address)
    return PARTNER
