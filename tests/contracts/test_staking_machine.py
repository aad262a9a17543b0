"""Any sequence of stake operations moves money as a plain model of it says, and keeps the registry's promises.

Conservation: what the registry holds is stake, rewards and donations, and every burned token left the supply. A slash
is total, and never undone. Locks clamp. Unbondings stay in order of time.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import boa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from poip_chain.spec.types import Address
from tests.contracts import system
from tests.contracts.system import OWNER, account, now

LABELS = ("first", "second")
BENEFICIARIES = [account("accuser").address, account("first operator").address]
MINIMUM_STAKE, REWARD_SHARE, SLASH_SHARE = 50, 300_000, 200_000
UNBONDING, JAIL = 90, 20
PPM = 10**6
REASON, EVIDENCE = b"\1" * 32, b"\2" * 32
labels = st.sampled_from(LABELS)
amounts = st.one_of(st.integers(1, 300), st.just(2**96), st.just(2**256 - 1))


@dataclass
class Unbonding:
    """Stake on its way out."""

    id: int
    amount: int
    end: int


@dataclass
class Ghost:
    """What the model knows of one node."""

    name: Address
    active: int = 0
    locked: int = 0
    jailed_until: int = 0
    next_id: int = 0
    paid_out: int = 0
    registered: bool = True
    unbondings: list[Unbonding] = field(default_factory=list)

    @property
    def free(self) -> int:
        return max(0, self.active - self.locked)

    @property
    def unbonding(self) -> int:
        return sum(u.amount for u in self.unbondings)

    @property
    def stake(self) -> int:
        return self.active + self.unbonding


@cache
def deployed() -> system.Staking:
    """The system that every run starts from: short windows, two registered nodes, an owner who may stake all he has."""
    staking = system.deploy_staking(
        {
            "minimum_stake": MINIMUM_STAKE,
            "reward_share": REWARD_SHARE,
            "fixed_slash_share": SLASH_SHARE,
            "challenge_window": 30,
            "response_window": 20,
            "reveal_window": 5,
            "contest_window": 5,
            "dispute_clock": 5,
            "unbonding_period": UNBONDING,
            "jail_period": JAIL,
        }
    )
    for label in LABELS:
        system.register_node(staking.registry, label)
    staking.token.approve(staking.registry, 2**256 - 1, sender=OWNER.address)
    return staking


class StakingMachine(RuleBasedStateMachine):
    """Two nodes, one slasher, and a log whose locks tests decide."""

    def __init__(self) -> None:
        super().__init__()
        self.staking = deployed()
        self.registry: Any = self.staking.registry
        self.nodes = {label: Ghost(account(label).address) for label in LABELS}
        self.rewards = dict.fromkeys(BENEFICIARIES, 0)
        self.claimed = self.burned = self.donated = self.staked = 0
        self.undo = ExitStack()
        self.undo.enter_context(boa.env.anchor())

    def teardown(self) -> None:
        self.undo.close()

    # Money in and out

    @rule(label=labels, amount=st.integers(0, 300))
    def stake(self, label: str, amount: int) -> None:
        ghost = self.nodes[label]
        if amount == 0 or not ghost.registered:
            with boa.reverts():
                self.registry.stake(ghost.name, amount, sender=OWNER.address)
            return
        self.registry.stake(ghost.name, amount, sender=OWNER.address)
        ghost.active += amount
        self.staked += amount

    @rule(label=labels, amount=amounts)
    def unbond(self, label: str, amount: int) -> None:
        ghost = self.nodes[label]
        operator = account(f"{label} operator").address
        if amount > ghost.free:
            with boa.reverts("stakes: not enough free stake"):
                self.registry.unbond(ghost.name, amount, sender=operator)
        elif len(ghost.unbondings) == 32:
            with boa.reverts("stakes: too many unbondings"):
                self.registry.unbond(ghost.name, amount, sender=operator)
        else:
            assert self.registry.unbond(ghost.name, amount, sender=operator) == ghost.next_id
            self.ghost_unbond(ghost, amount)

    def ghost_unbond(self, ghost: Ghost, amount: int) -> None:
        ghost.active -= amount
        ghost.unbondings.append(Unbonding(ghost.next_id, amount, now() + UNBONDING))
        ghost.next_id += 1

    @rule(label=labels, pick=st.integers(0, 31))
    def cancel(self, label: str, pick: int) -> None:
        ghost = self.nodes[label]
        operator = account(f"{label} operator").address
        if pick >= len(ghost.unbondings) or not ghost.registered:
            with boa.reverts():
                self.registry.cancel_unbond(ghost.name, ghost.next_id, sender=operator)
            return
        unbonding = ghost.unbondings.pop(pick)
        self.registry.cancel_unbond(ghost.name, unbonding.id, sender=operator)
        ghost.active += unbonding.amount

    @rule(label=labels, count=st.integers(0, 3))
    def withdraw(self, label: str, count: int) -> None:
        ghost = self.nodes[label]
        ready = [u for u in ghost.unbondings if u.end <= now()][:count]
        if not ready:
            with boa.reverts("stakes: nothing to withdraw yet"):
                self.registry.withdraw(ghost.name, count)
            return
        amount = sum(u.amount for u in ready)
        assert self.registry.withdraw(ghost.name, count) == amount
        ghost.unbondings = ghost.unbondings[len(ready) :]
        ghost.paid_out += amount

    @rule(label=labels)
    def deregister(self, label: str) -> None:
        ghost = self.nodes[label]
        operator = account(f"{label} operator").address
        if not ghost.registered or ghost.locked or (ghost.active and len(ghost.unbondings) == 32):
            with boa.reverts():
                self.registry.deregister(ghost.name, sender=operator)
            return
        # Most runs should keep their nodes for longer.
        if ghost.stake and ghost.next_id < 3:
            return
        self.registry.deregister(ghost.name, sender=operator)
        if ghost.active:
            self.ghost_unbond(ghost, ghost.active)
        ghost.registered = False

    @rule(amount=st.integers(1, 50))
    def donate(self, amount: int) -> None:
        self.staking.token.transfer(self.registry, amount, sender=OWNER.address)
        self.donated += amount

    @rule()
    def sweep(self) -> None:
        if self.donated == 0:
            with boa.reverts("registry: no surplus"):
                self.registry.sweep_surplus(OWNER.address, sender=OWNER.address)
        else:
            assert self.registry.sweep_surplus(OWNER.address, sender=OWNER.address) == self.donated
            self.donated = 0

    # Locks

    @rule(label=labels, amount=st.integers(0, 200))
    def lock(self, label: str, amount: int) -> None:
        ghost = self.nodes[label]
        # Neither a jail nor the minimum stake keeps a node from committing what it has signed.
        if ghost.registered and ghost.locked + amount <= ghost.active:
            self.registry.lock(ghost.name, amount, sender=self.staking.log.address)
            ghost.locked += amount
        else:
            with boa.reverts():
                self.registry.lock(ghost.name, amount, sender=self.staking.log.address)

    @rule(label=labels, amount=amounts)
    def unlock(self, label: str, amount: int) -> None:
        ghost = self.nodes[label]
        self.registry.unlock(ghost.name, amount, sender=self.staking.log.address)
        ghost.locked -= min(amount, ghost.locked)

    # Slashes, which never fail

    @rule(label=labels, amount=amounts, reward=amounts, beneficiary=st.sampled_from(BENEFICIARIES))
    def slash(self, label: str, amount: int, reward: int, beneficiary: Address) -> None:
        result = self.registry.slash(
            self.nodes[label].name, amount, beneficiary, reward, REASON, EVIDENCE, sender=self.staking.slasher
        )
        self.ghost_slash(self.nodes[label], amount, reward, beneficiary, tuple(result))

    @rule(label=labels, beneficiary=st.sampled_from(BENEFICIARIES))
    def slash_fixed(self, label: str, beneficiary: Address) -> None:
        ghost = self.nodes[label]
        amount = -(-ghost.stake * SLASH_SHARE // PPM)
        result = self.registry.slash_fixed(ghost.name, beneficiary, REASON, EVIDENCE, sender=self.staking.slasher)
        self.ghost_slash(ghost, amount, amount, beneficiary, tuple(result))

    def ghost_slash(
        self, ghost: Ghost, amount: int, reward: int, beneficiary: Address, result: tuple[int, ...]
    ) -> None:
        taken = min(amount, ghost.stake)
        paid = min(reward, taken * REWARD_SHARE // PPM)
        assert result == (taken, paid)
        from_active = min(taken, ghost.active)
        ghost.active -= from_active
        cut = taken - from_active
        before = [(u.id, u.amount) for u in ghost.unbondings]
        total = ghost.unbonding
        kept = {u.id: u.amount for u in self.registry.unbondings(ghost.name)}
        # Pro rata: each loses its share rounded down, or up to one wei more for each entry before it.
        for position, (unbonding_id, old) in enumerate(before):
            lost = old - kept.get(unbonding_id, 0)
            share = old * cut // total
            assert share <= lost <= share + position + 1
        assert sum(kept.values()) == total - cut
        ghost.unbondings = [Unbonding(u.id, kept[u.id], u.end) for u in ghost.unbondings if kept.get(u.id, 0) > 0]
        ghost.jailed_until = max(ghost.jailed_until, now() + JAIL)
        self.rewards[beneficiary] += paid
        self.burned += taken - paid

    @rule(label=labels)
    def unjail(self, label: str) -> None:
        ghost = self.nodes[label]
        operator = account(f"{label} operator").address
        if ghost.jailed_until and now() >= ghost.jailed_until and ghost.active >= MINIMUM_STAKE:
            self.registry.unjail(ghost.name, sender=operator)
            ghost.jailed_until = 0
        else:
            with boa.reverts():
                self.registry.unjail(ghost.name, sender=operator)

    @precondition(lambda self: any(self.rewards.values()))
    @rule(beneficiary=st.sampled_from(BENEFICIARIES))
    def claim(self, beneficiary: Address) -> None:
        if self.rewards[beneficiary] == 0:
            with boa.reverts("stakes: no reward"):
                self.registry.claim_reward(sender=beneficiary)
            return
        assert self.registry.claim_reward(sender=beneficiary) == self.rewards[beneficiary]
        self.claimed += self.rewards[beneficiary]
        self.rewards[beneficiary] = 0

    @rule(seconds=st.sampled_from([1, JAIL, UNBONDING]))
    def pass_time(self, seconds: int) -> None:
        boa.env.time_travel(seconds=seconds)

    # Promises

    @invariant()
    def nodes_are_the_models(self) -> None:
        for ghost in self.nodes.values():
            info = self.registry.node_info(ghost.name)
            assert (info.active, info.unbonding, info.locked) == (ghost.active, ghost.unbonding, ghost.locked)
            assert info.jailed_until == ghost.jailed_until
            assert self.registry.free_stake(ghost.name) == ghost.free
            entries = self.registry.unbondings(ghost.name)
            assert [(u.id, u.amount, u.withdrawable_at) for u in entries] == [
                (u.id, u.amount, u.end) for u in ghost.unbondings
            ]
            ends = [u.withdrawable_at for u in entries]
            assert ends == sorted(ends)

    @invariant()
    def money_is_conserved(self) -> None:
        token, ghosts = self.staking.token, self.nodes.values()
        stake, rewards = sum(g.stake for g in ghosts), sum(self.rewards.values())
        paid_out = sum(g.paid_out for g in ghosts)
        assert self.registry.total_staked() == stake
        assert self.registry.total_rewards() == rewards
        assert self.registry.total_held() == stake + rewards
        assert token.balanceOf(self.registry) == stake + rewards + self.donated
        assert self.staked == stake + rewards + paid_out + self.claimed + self.burned
        assert token.totalSupply() == system.INITIAL_SUPPLY - self.burned
        assert sum(token.balanceOf(account(f"{label} payout").address) for label in LABELS) == paid_out


@pytest.mark.slow
def test_staking_machine() -> None:
    deployed()  # outside the runs, each of which is undone
    run_state_machine_as_test(StakingMachine, settings=settings(max_examples=10, stateful_step_count=20))
