"""Incidents of other staking systems and tokens, replayed against ours. Each test is named after the incident.

Sources: audit reports of Livepeer, The Graph Horizon and EigenLayer; EIP-3009's own security section.
"""

from __future__ import annotations

import re
from typing import Any

import boa
import pytest
from eth_hash.auto import keccak

from poip_chain.economic.parameters import PARAMETERS, parameter_key
from poip_chain.spec.types import ZERO_ADDRESS, Address
from tests.contracts import system
from tests.contracts.system import (
    OWNER,
    POIP,
    Staking,
    account,
    add_stake,
    now,
    refuses,
    register_node,
    set_parameter,
    value_of,
)
from tests.contracts.test_token import Typed

ATTACKER = account("attacker")
OPERATOR = account("node operator").address
PAYOUT = account("node payout").address
REASON, EVIDENCE = b"\1" * 32, b"\2" * 32
DAY = 86400
HUGE = 2**256 - 1


@pytest.fixture(scope="module")
def staking() -> Staking:
    """A registry with its surroundings."""
    return system.deploy_staking()


@pytest.fixture(scope="module")
def node(staking: Staking) -> Address:
    """A registered node with 1000 POIP."""
    name = register_node(staking.registry)
    add_stake(staking.token, staking.registry, name, 1000 * POIP)
    return name


def slash(staking: Staking, node: Address, amount: int, reward: int = 0, to: Address = ATTACKER.address) -> Any:
    result = staking.registry.slash(node, amount, to, reward, REASON, EVIDENCE, sender=staking.slasher)
    return tuple(result)


def test_force_cancel_unlock_by_third_party(staking: Staking, node: Address) -> None:
    """Livepeer: bonding to somebody else's transcoder cancelled its pending unlock."""
    registry = staking.registry
    registry.unbond(node, 400 * POIP, sender=OPERATOR)
    before = [tuple(u) for u in registry.unbondings(node)]
    add_stake(staking.token, registry, node, 1, staker=ATTACKER.address)
    assert [tuple(u) for u in registry.unbondings(node)] == before
    with boa.reverts("registry: not the operator"):
        registry.cancel_unbond(node, 0, sender=ATTACKER.address)
    boa.env.time_travel(seconds=value_of(staking.parameters, "unbonding_period"))
    # Anyone may push the payout, but only to where it belongs.
    registry.withdraw(node, 32, sender=ATTACKER.address)
    assert staking.token.balanceOf(PAYOUT) == 400 * POIP
    assert staking.token.balanceOf(ATTACKER.address) == 0


def test_dust_unbondings_by_others_cannot_fill_the_queue(staking: Staking, node: Address) -> None:
    """The bounded queue is the operator's alone: strangers cannot take its places."""
    refuses(
        "registry: not the operator",
        lambda: staking.registry.unbond(node, 1, sender=ATTACKER.address),
        lambda: staking.registry.deregister(node, sender=ATTACKER.address),
    )
    assert len(staking.registry.unbondings(node)) == 0


def test_wei_stake_for_victim_blocks_rewards(staking: Staking, node: Address) -> None:
    """Livepeer: a stake of one wei for somebody else reset the victim's claim. Here it adds one wei and no more."""
    registry, log = staking.registry, staking.log.address
    registry.lock(node, 10 * POIP, sender=log)
    slash(staking, node, 10 * POIP, HUGE, to=OPERATOR)
    before = registry.node_info(node)
    add_stake(staking.token, registry, node, 1, staker=ATTACKER.address)
    after = registry.node_info(node)
    assert after.active == before.active + 1
    assert tuple(after)[6:] == tuple(before)[6:]
    assert registry.claim_reward(sender=OPERATOR) == 3 * POIP
    registry.unlock(node, 10 * POIP, sender=log)
    assert registry.node_info(node).locked == 0


def test_two_percent_bases() -> None:
    """Livepeer H-01: 1e6 and 1e27 as 100 % in one code base. Here every share is in ppm, and none can exceed 10**6."""
    shares = [p for p in PARAMETERS if p.unit == "ppm"]
    assert shares
    assert max(p.maximum for p in shares) <= 10**6
    sources = "".join(path.read_text() for path in sorted(system.CONTRACTS.rglob("*.vy")))
    bases = set(re.findall(r"^PPM: constant\(uint256\) = (.*)$", sources, re.MULTILINE))
    assert bases == {"10**6"}
    assert not re.search(r"10\*\*27|1e27|10_000\b|PERC_DIVISOR|BASIS_POINTS", sources)


@pytest.mark.parametrize("reward", [0, 1, POIP, HUGE])
@pytest.mark.parametrize("amount", [0, 1, 999 * POIP, 1001 * POIP, HUGE])
def test_slash_reverts_by_cut(staking: Staking, node: Address, amount: int, reward: int) -> None:
    """The Graph H-02, 2024 M-05, 2025 M-02: a cut over 100 %, a slash over the balance or a large reward made it revert."""
    staking.registry.unbond(node, 300 * POIP, sender=OPERATOR)
    staking.registry.lock(node, 700 * POIP, sender=staking.log.address)
    taken, paid = slash(staking, node, amount, reward)
    assert taken == min(amount, 1000 * POIP)
    assert paid == min(reward, taken * 300_000 // 10**6)


def test_slash_is_total_in_every_state(staking: Staking, node: Address) -> None:
    """Unknown, empty, jailed, full of unbondings, deregistered, paid out: a slash takes what is there."""
    registry = staking.registry
    assert slash(staking, ATTACKER.address, HUGE, HUGE) == (0, 0)
    empty = register_node(registry, "empty")
    assert slash(staking, empty, HUGE, HUGE) == (0, 0)
    for _ in range(32):
        registry.unbond(node, 10 * POIP, sender=OPERATOR)
    assert slash(staking, node, 1000 * POIP - 5, HUGE)[0] == 1000 * POIP - 5
    assert slash(staking, node, 3)[0] == 3
    boa.env.time_travel(seconds=14 * DAY)
    registry.deregister(node, sender=OPERATOR)
    assert registry.withdraw(node, 32) == 2
    assert slash(staking, node, HUGE, HUGE) == (0, 0)
    result = registry.slash_fixed(node, ZERO_ADDRESS, REASON, EVIDENCE, sender=staking.slasher)
    assert tuple(result) == (0, 0)


def test_timestamp_plus_period_overflow(staking: Staking, node: Address) -> None:
    """The Graph 2025 M-01: timestamp + period wrapped around 64 bits and thawed at once."""
    for name in ("unbonding_period", "jail_period", "key_rotation_delay"):
        with boa.reverts("parameters: above maximum"):
            set_parameter(staking.parameters, name, 2**64 - 1)
        (parameter,) = [p for p in PARAMETERS if p.name == name]
        set_parameter(staking.parameters, name, parameter.maximum)
    staking.registry.unbond(node, POIP, sender=OPERATOR)
    slash(staking, node, POIP)
    info = staking.registry.node_info(node)
    assert info.jailed_until == staking.registry.unbondings(node)[0].withdrawable_at == now() + 90 * DAY
    with boa.reverts("stakes: nothing to withdraw yet"):
        staking.registry.withdraw(node, 32)
    with boa.reverts("registry: pause too long"):
        staking.registry.pause_intake(HUGE, sender=OWNER.address)


def test_unbounded_delay_param(staking: Staking) -> None:
    """EigenLayer EGSL-09: a delay without a maximum freezes funds for ever. Every period here has hard bounds."""
    periods = [p for p in PARAMETERS if p.unit == "seconds"]
    assert len(periods) == 10
    for parameter in periods:
        assert parameter.maximum <= 90 * DAY
        with boa.reverts("parameters: above maximum"):
            staking.parameters.set_value(parameter_key(parameter.name), parameter.maximum + 1, sender=OWNER.address)


def test_shortened_period_is_not_retroactive(staking: Staking, node: Address) -> None:
    """A change of unbonding_period moves neither stake that is leaving already nor its order."""
    registry = staking.registry
    registry.unbond(node, POIP, sender=OPERATOR)
    end = registry.unbondings(node)[0].withdrawable_at
    set_parameter(staking.parameters, "unbonding_period", 2 * DAY)
    assert registry.unbondings(node)[0].withdrawable_at == end
    boa.env.time_travel(seconds=2 * DAY)
    with boa.reverts("stakes: nothing to withdraw yet"):
        registry.withdraw(node, 32)


def test_rounding_slash_zero_effect(staking: Staking) -> None:
    """EigenLayer EGSL-13: a slash small enough to round to nothing. A share of any stake is at least one wei here."""
    for stake in (1, 2, 4, 5, 6):
        name = register_node(staking.registry, f"dust {stake}")
        add_stake(staking.token, staking.registry, name, stake)
        supply = staking.token.totalSupply()
        result = staking.registry.slash_fixed(name, ATTACKER.address, REASON, EVIDENCE, sender=staking.slasher)
        expected = -(-stake // 5)
        assert tuple(result) == (expected, expected * 3 // 10)
        assert staking.registry.node_info(name).active == stake - expected
        assert staking.token.totalSupply() == supply - result[0] + result[1]


def test_full_slash_then_deposit(staking: Staking, node: Address) -> None:
    """The Graph: after a slash of everything, the next deposit divided by zero or revived the slashed shares."""
    registry, log = staking.registry, staking.log.address
    registry.lock(node, 500 * POIP, sender=log)
    registry.unbond(node, 500 * POIP, sender=OPERATOR)
    assert slash(staking, node, HUGE)[0] == 1000 * POIP
    assert len(registry.unbondings(node)) == 0
    add_stake(staking.token, registry, node, 600 * POIP)
    info = registry.node_info(node)
    assert (info.active, info.unbonding, registry.total_staked()) == (600 * POIP, 0, 600 * POIP)
    # The pending batches still count on their locks.
    assert registry.free_stake(node) == 100 * POIP
    registry.unlock(node, 500 * POIP, sender=log)
    assert registry.free_stake(node) == 600 * POIP
    boa.env.time_travel(seconds=14 * DAY)
    with boa.reverts("stakes: nothing to withdraw yet"):
        registry.withdraw(node, 32)


def test_release_after_slash_frees_no_other_batch(staking: Staking, node: Address) -> None:
    """Were `locked` lowered by a slash, releasing one batch would free the stake that another still counts on."""
    registry, log = staking.registry, staking.log.address
    for _ in range(2):
        registry.lock(node, 450 * POIP, sender=log)
    slash(staking, node, 200 * POIP)
    registry.unlock(node, 450 * POIP, sender=log)
    assert registry.node_info(node).locked == 450 * POIP
    assert registry.free_stake(node) == 350 * POIP


def test_verifier_node_collusion_instant_exit(staking: Staking, node: Address) -> None:
    """The Graph 2025 L-18, 2024 L-02: a node convicts itself with its own accuser to leave at once, with all its stake."""
    registry, token = staking.registry, staking.token
    taken, paid = slash(staking, node, HUGE, HUGE, to=OPERATOR)
    assert (taken, paid) == (1000 * POIP, 300 * POIP)
    registry.claim_reward(sender=OPERATOR)
    assert token.balanceOf(OPERATOR) == 300 * POIP < taken / 2
    # Not even the owner can raise the share to where it would pay.
    with boa.reverts("parameters: above maximum"):
        set_parameter(staking.parameters, "reward_share", 500_001)


def test_thaw_after_misbehaving(staking: Staking, node: Address) -> None:
    """The Graph TRST-L-6: stake that is on its way out when the offence is proven is still taken."""
    staking.registry.unbond(node, 1000 * POIP, sender=OPERATOR)
    period, window = (value_of(staking.parameters, n) for n in ("unbonding_period", "challenge_window"))
    assert period >= window + 2 * value_of(staking.parameters, "response_window")
    boa.env.time_travel(seconds=period - 1)
    assert slash(staking, node, 1000 * POIP)[0] == 1000 * POIP
    boa.env.time_travel(seconds=1)
    with boa.reverts("stakes: nothing to withdraw yet"):
        staking.registry.withdraw(node, 32)


def test_slash_after_reprovision(staking: Staking, node: Address) -> None:
    """The Graph H-05: overwriting a provision lost the record that a slash needed. A node's name is never free again."""
    registry = staking.registry
    registry.deregister(node, sender=OPERATOR)
    with boa.reverts("keys: key already bound"):
        register_node(registry)
    assert slash(staking, node, 10 * POIP)[0] == 10 * POIP


def test_rebond_uninitialised_factor(staking: Staking, node: Address) -> None:
    """Livepeer: bonding again what was unbonding, by a cumulative factor that was never set, minted stake from nothing.
    What comes back is what a slash left of it, wei for wei, and after a whole slash nothing."""
    registry = staking.registry
    first = registry.unbond(node, 300 * POIP, sender=OPERATOR)
    second = registry.unbond(node, 100 * POIP, sender=OPERATOR)
    assert slash(staking, node, 800 * POIP)[0] == 800 * POIP
    left = registry.unbondings(node)
    assert [unbonding.amount for unbonding in left] == [150 * POIP, 50 * POIP]
    registry.cancel_unbond(node, first, sender=OPERATOR)
    info = registry.node_info(node)
    assert (info.active, info.unbonding) == (150 * POIP, 50 * POIP)
    assert slash(staking, node, HUGE)[0] == 200 * POIP
    with boa.reverts():
        registry.cancel_unbond(node, first, sender=OPERATOR)
    if any(unbonding.id == second for unbonding in registry.unbondings(node)):
        registry.cancel_unbond(node, second, sender=OPERATOR)
    info = registry.node_info(node)
    assert (info.active, info.unbonding) == (0, 0)
    assert registry.total_staked() == 0


def test_new_slasher_cannot_reach_stake_that_may_leave(staking: Staking, node: Address) -> None:
    """EigenLayer EGSL-10: stake became slashable at once under a rule added later."""
    seizer = account("seizer").address
    staking.registry.set_slasher(seizer, True, sender=OWNER.address)
    staking.registry.unbond(node, 1000 * POIP, sender=OPERATOR)
    boa.env.time_travel(seconds=value_of(staking.parameters, "unbonding_period"))
    with boa.reverts("registry: slasher not active yet"):
        staking.registry.slash(node, HUGE, seizer, HUGE, REASON, EVIDENCE, sender=seizer)
    assert staking.registry.withdraw(node, 32) == 1000 * POIP


def test_pause_does_not_block_slash(staking: Staking, node: Address) -> None:
    """The Graph CR-01: a pause gave a cheat the time to leave. Here it stops intake alone."""
    registry, log = staking.registry, staking.log.address
    registry.unbond(node, 100 * POIP, sender=OPERATOR)
    boa.env.time_travel(seconds=14 * DAY)
    registry.pause_intake(14 * DAY, sender=OWNER.address)
    registry.lock(node, 10 * POIP, sender=log)
    assert slash(staking, node, 10 * POIP, HUGE) == (10 * POIP, 3 * POIP)
    registry.unlock(node, 10 * POIP, sender=log)
    assert registry.withdraw(node, 32) == 100 * POIP
    assert registry.claim_reward(sender=ATTACKER.address) == 3 * POIP
    registry.unbond(node, POIP, sender=OPERATOR)


def test_donation_is_not_stake(staking: Staking, node: Address) -> None:
    """Tokens sent past `stake` change no balance that anything is computed from."""
    before = tuple(staking.registry.node_info(node)), staking.registry.total_held()
    staking.token.transfer(staking.registry, 10**6 * POIP, sender=OWNER.address)
    assert (tuple(staking.registry.node_info(node)), staking.registry.total_held()) == before
    assert slash(staking, node, HUGE)[0] == 1000 * POIP


def test_3009_frontrun_transfer(staking: Staking) -> None:
    """EIP-3009: anyone can send a transfer authorisation first, so a deposit must be one that only its payee can send."""
    token, victim, contract = staking.token, account("victim"), account("depositor contract").address
    token.transfer(victim.address, 100, sender=OWNER.address)
    values = (victim.address, contract, 100, 0, now() + 100, keccak(b"deposit"))
    signature = Typed.sign(token, victim, "ReceiveWithAuthorization", *values)
    with boa.reverts("eip3009: caller must be the payee"):
        token.receiveWithAuthorization(*values, *signature, sender=ATTACKER.address)
    with boa.reverts("eip3009: invalid signature"):
        token.transferWithAuthorization(*values, *signature, sender=ATTACKER.address)
    assert not token.authorizationState(victim.address, values[5])
    token.receiveWithAuthorization(*values, *signature, sender=contract)
    assert token.balanceOf(contract) == 100


def test_permit_frontrun_does_not_stop_the_stake(staking: Staking, node: Address) -> None:
    """A permit taken out of the mempool and sent first must not make the transaction that carried it fail."""
    token, registry, staker = staking.token, staking.registry, account("staker")
    token.transfer(staker.address, 2 * POIP, sender=OWNER.address)
    deadline = now() + 100
    for nonce, frontrun in enumerate((False, True)):
        values = (staker.address, registry.address, POIP, nonce, deadline)
        v, r, s = Typed.sign(token, staker, "Permit", *values)
        if frontrun:
            token.permit(staker.address, registry.address, POIP, deadline, v, r, s, sender=ATTACKER.address)
        registry.stake_with_permit(node, POIP, deadline, v, r, s, sender=staker.address)
    assert registry.node_info(node).active == 1002 * POIP
    used = Typed.sign(token, staker, "Permit", staker.address, registry.address, POIP, 1, deadline)
    with boa.reverts("erc20: insufficient allowance"):
        registry.stake_with_permit(node, POIP, deadline, *used, sender=staker.address)


def test_unsigned_field_tampered(staking: Staking) -> None:
    """The Graph H-08: a field left out of the signed struct could be changed. Every argument of an authorisation counts."""
    token, victim = staking.token, account("victim")
    token.transfer(victim.address, 100, sender=OWNER.address)
    permit = (victim.address, ATTACKER.address, 10, 0, now() + 100)
    signature = Typed.sign(token, victim, "Permit", *permit)
    for changed in (
        (victim.address, account("other").address, 10, permit[4]),
        (victim.address, ATTACKER.address, 11, permit[4]),
        (victim.address, ATTACKER.address, 10, permit[4] + 1),
        (OWNER.address, ATTACKER.address, 10, permit[4]),
    ):
        with boa.reverts("erc20: invalid signature"):
            token.permit(*changed, *signature)


def test_tx_origin_bond_theft() -> None:
    """Rights follow the direct caller, never the account that started the transaction."""
    for path in sorted(system.CONTRACTS.rglob("*.vy")):
        assert "tx.origin" not in path.read_text(), path.name
