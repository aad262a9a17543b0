"""Who earned and lost what on a local network, every sum reconciled with the chain.

A holding is what an account owns anywhere: wallet, stake, escrow, earnings, rewards, credits. The report compares each
actor's holdings at the start with those at the end; the changes must add up to what was burned, to the wei.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from poip_chain.chain.keys import development_key
from poip_chain.cli.local.network import GATEWAY, LIAR, WATCHTOWER, LocalNetwork
from poip_chain.economic.network import Network
from poip_chain.errors import IntegrityError
from poip_chain.spec.types import Address


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one actor owns, wei by place."""

    wallet: int
    stake: int
    escrow: int
    earned: int
    rewards: int
    credits: int

    @property
    def total(self) -> int:
        """The sum of all places."""
        return self.wallet + self.stake + self.escrow + self.earned + self.rewards + self.credits


@dataclass(frozen=True, slots=True)
class Books:
    """Every actor's holdings and all tokens in existence (wei) after one block, whose contracts `network` reads."""

    network: Network
    holdings: dict[str, Holdings]
    supply: int


def take(local: LocalNetwork, network: Network) -> Books:
    """The books after the newest block. One block: the processes go on paying while they are read."""
    network = network.at(network.chain.block_number())
    nodes = [node.node_key.address for node in local.nodes]
    actors: dict[str, tuple[Address, Address | None]] = {
        "gateway (client)": (development_key(GATEWAY).address, None),
        "watchtower": (development_key(WATCHTOWER).address, None),
        "liar": (development_key(LIAR).address, None),
        "treasury": (network.vault.treasury(), None),
    }
    for node in local.nodes:
        actors[node.name] = (node.operator.address, node.node_key.address)
    holdings = {name: _holdings(network, account, node, nodes) for name, (account, node) in actors.items()}
    return Books(network, holdings, network.token.total_supply())


def _holdings(network: Network, account: Address, node: Address | None, nodes: list[Address]) -> Holdings:
    info = None if node is None else network.registry.info(node)
    treasury = network.vault.treasury_due() if account == network.vault.treasury() else 0
    buckets = _buckets(network, account)
    # What a node wins in court comes to the key that contested.
    accounts = [account] if node is None else [account, node]
    return Holdings(
        wallet=sum(map(network.token.balance, accounts)),
        stake=0 if info is None else info.active + info.unbonding,
        escrow=sum(network.vault.escrow(account, other).balance for other in nodes) + buckets,
        earned=(0 if node is None else network.vault.earned(node)) + treasury,
        rewards=network.registry.rewards(account),
        credits=sum(network.availability.claimable(a) + network.accusations.claimable(a) for a in accounts),
    )


def _buckets(network: Network, payer: Address) -> int:
    """What the payer's vouchers have moved into batches that are not settled yet: still the payer's if convicted."""
    return sum(network.vault.bucket(batch_id, payer) for batch_id in range(1, network.log.batch_count() + 1))


@dataclass(frozen=True, slots=True)
class Report:
    """The demonstration's result. `reconciliation` maps each checked sum to (by the books, on chain), equal in pairs."""

    before: dict[str, Holdings]
    after: dict[str, Holdings]
    burned: int
    reconciliation: dict[str, tuple[int, int]]

    def change(self, name: str) -> int:
        """What an actor has gained, wei; negative if it lost."""
        return self.after[name].total - self.before[name].total

    def to_json(self) -> dict[str, Any]:
        """Amounts as decimal strings in wei."""
        return {
            "actors": {
                name: {
                    **{place: str(getattr(self.after[name], place)) for place in Holdings.__slots__},
                    "total": str(self.after[name].total),
                    "change": str(self.change(name)),
                }
                for name in self.after
            },
            "burned": str(self.burned),
            "reconciliation": {what: [str(books), str(chain)] for what, (books, chain) in self.reconciliation.items()},
        }


def reconcile(start: Books, end: Books) -> Report:
    """Compare books and chain. Raises IntegrityError with the sums if anything differs by a single wei."""
    network, before, after = end.network, start.holdings, end.holdings
    token, registry, vault, availability = network.token, network.registry, network.vault, network.availability
    burned = start.supply - end.supply
    rewards = sum(holdings.rewards for holdings in after.values())
    credits = sum(holdings.credits for holdings in after.values())
    in_court = network.accusations
    pairs = {
        "changes of all actors + burned = 0": (
            sum(after[name].total - before[name].total for name in after) + burned,
            0,
        ),
        "stake and rewards = registry's balance": (
            registry.total_staked() + rewards,
            token.balance(registry.address),
        ),
        "escrow, buckets, earnings = vault's balance": (vault.total_held(), token.balance(vault.address)),
        "credits = balances of availability and court (no bond stands)": (
            credits,
            token.balance(availability.address) + token.balance(in_court.address),
        ),
        "stake by node = total stake": (
            sum(holdings.stake for holdings in after.values()),
            registry.total_staked(),
        ),
    }
    wrong = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise IntegrityError(f"the books do not agree with the chain: {wrong}.")
    return Report(before, after, burned, pairs)
