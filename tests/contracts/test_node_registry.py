"""NodeRegistry: set-up, registration, keys and their rotation, stake, locks, slashes, offers and the pause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import boa
import pytest

from poip_chain.spec.objects import ProofOfPossession
from poip_chain.spec.types import ZERO_ADDRESS, Address
from tests.contracts import system
from tests.contracts.system import (
    FOREVER,
    OWNER,
    POIP,
    Staking,
    account,
    add_model,
    add_stake,
    now,
    proof_of_possession,
    refuses,
    register_node,
    set_parameter,
    value_of,
)

NODE_KEY, PEER_KEY = ProofOfPossession.NODE_KEY, ProofOfPossession.PEER_KEY
STRANGER = account("stranger").address
OPERATOR = account("node operator").address
PAYOUT = account("node payout").address
REASON, EVIDENCE = b"reason".ljust(32, b"\0"), b"\7" * 32
DAY = 86400


@pytest.fixture(scope="module")
def node(staking: Staking) -> Address:
    """A registered node with 1000 POIP."""
    name = register_node(staking.registry)
    add_stake(staking.token, staking.registry, name, 1000 * POIP)
    return name


def registration(registry: Any, **changes: Any) -> tuple[Any, ...]:
    """The arguments of `register` for the account "new", some changed."""
    arguments = {
        "node_key": account("new").address,
        "payout": PAYOUT,
        "peer_key": account("new peer").address,
        "endpoint": "https://new.example",
        "deadline": FOREVER,
        "node_signature": proof_of_possession(registry, OPERATOR, account("new"), NODE_KEY, FOREVER),
        "peer_signature": proof_of_possession(registry, OPERATOR, account("new peer"), PEER_KEY, FOREVER),
    }
    assert set(changes) <= set(arguments)
    return tuple((arguments | changes).values())


# Set-up ----------------------------------------------------------------------------------------------------------------


def test_setup_in_order() -> None:
    token, parameters, models = system.deploy_token(), system.deploy_parameters(), system.deploy_models()
    registry = system.deploy_registry(token, parameters, models)
    log = account("log").address
    with boa.reverts("registry: nothing to seal"):
        registry.seal(sender=OWNER.address)
    with boa.reverts("registry: not sealed"):
        registry.register(*registration(registry), sender=OPERATOR)
    for call in (registry.seal, lambda sender: registry.initialize(log, sender=sender)):
        with boa.reverts("ownable: caller is not the owner"):
            call(sender=STRANGER)
    with boa.reverts("registry: log is zero"):
        registry.initialize(ZERO_ADDRESS, sender=OWNER.address)
    registry.initialize(log, sender=OWNER.address)
    with boa.reverts("registry: already initialized"):
        registry.initialize(STRANGER, sender=OWNER.address)
    assert (registry.log_address(), registry.is_sealed()) == (log, False)
    registry.set_slasher(STRANGER, True, sender=OWNER.address)
    assert registry.slasher_active_at(STRANGER) == now()
    registry.seal(sender=OWNER.address)
    assert registry.is_sealed()
    with boa.reverts("registry: nothing to seal"):
        registry.seal(sender=OWNER.address)


def test_late_slasher_waits_longer_than_unbonding(staking: Staking, node: Address) -> None:
    registry, late = staking.registry, account("late slasher").address
    with boa.reverts("ownable: caller is not the owner"):
        registry.set_slasher(late, True, sender=STRANGER)
    registry.set_slasher(late, True, sender=OWNER.address)
    wait = 2 * value_of(staking.parameters, "unbonding_period")
    assert registry.slasher_active_at(late) == now() + wait
    for allowed, slasher in ((True, late), (False, STRANGER)):
        with boa.reverts("registry: slasher unchanged"):
            registry.set_slasher(slasher, allowed, sender=OWNER.address)
    boa.env.time_travel(seconds=wait - 1)
    with boa.reverts("registry: slasher not active yet"):
        registry.slash(node, 1, STRANGER, 0, REASON, EVIDENCE, sender=late)
    boa.env.time_travel(seconds=1)
    registry.slash(node, 1, STRANGER, 0, REASON, EVIDENCE, sender=late)
    registry.set_slasher(late, False, sender=OWNER.address)
    with boa.reverts("registry: not a slasher"):
        registry.slash_fixed(node, STRANGER, REASON, EVIDENCE, sender=late)


# Registration and keys -------------------------------------------------------------------------------------------------


def test_registration(staking: Staking) -> None:
    registry, new = staking.registry, account("new").address
    registry.register(*registration(registry), sender=OPERATOR)
    info = registry.node_info(new)
    assert (info.operator, info.payout, info.node_key) == (OPERATOR, PAYOUT, new)
    assert (info.peer_key, info.endpoint) == (account("new peer").address, "https://new.example")
    assert (info.active, info.registered_at, info.fixed_slash_ppm) == (0, now(), 200_000)
    assert (registry.node_of_key(new), registry.node_of_key(info.peer_key)) == (new, ZERO_ADDRESS)
    assert registry.signing_key(new, 2**64 - 1) == registry.committer(new) == new
    assert (registry.operator_of(new), registry.payout_of(new)) == (OPERATOR, PAYOUT)
    assert registry.node_at(registry.node_count() - 1) == new
    assert not registry.is_active(new)
    with boa.reverts("registry: no such index"):
        registry.node_at(registry.node_count())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payout": ZERO_ADDRESS}, "registry: payout out of range"),
        ({"deadline": 1}, "keys: proof expired"),
        ({"deadline": FOREVER + 1}, "keys: invalid proof"),
        ({"node_key": STRANGER}, "keys: invalid proof"),
        ({"peer_key": STRANGER}, "keys: invalid proof"),
        ({"node_signature": b""}, "keys: invalid proof"),
        ({"node_key": OPERATOR}, "keys: operator must differ"),
        ({"peer_key": account("new").address}, "keys: key already bound"),
    ],
)
def test_registration_refuses(staking: Staking, changes: dict[str, Any], reason: str) -> None:
    with boa.reverts(reason):
        staking.registry.register(*registration(staking.registry, **changes), sender=OPERATOR)


def test_proof_names_operator_and_role(staking: Staking) -> None:
    registry, key, peer = staking.registry, account("new"), account("new peer")
    with boa.reverts("keys: invalid proof"):
        registry.register(*registration(registry), sender=STRANGER)
    swapped = proof_of_possession(registry, OPERATOR, key, PEER_KEY, FOREVER)
    with boa.reverts("keys: invalid proof"):
        registry.register(*registration(registry, node_signature=swapped), sender=OPERATOR)
    elsewhere = proof_of_possession(staking.token, OPERATOR, peer, PEER_KEY, FOREVER)
    with boa.reverts("keys: invalid proof"):
        registry.register(*registration(registry, peer_signature=elsewhere), sender=OPERATOR)


def test_key_is_bound_once_ever(staking: Staking, node: Address) -> None:
    registry = staking.registry
    with boa.reverts("keys: key already bound"):
        register_node(registry)
    registry.deregister(node, sender=OPERATOR)
    with boa.reverts("keys: key already bound"):
        register_node(registry)
    # A bound key cannot be an operator either.
    with boa.reverts("keys: key already bound"):
        registry.register(*registration(registry), sender=node)


def rotate(staking: Staking, node: Address, label: str, next_seq: int) -> Address:
    key = account(label)
    signature = proof_of_possession(staking.registry, OPERATOR, key, NODE_KEY, FOREVER)
    staking.registry.rotate_node_key(node, key.address, next_seq, FOREVER, signature, sender=OPERATOR)
    return key.address


def test_rotation_takes_effect_at_its_seq_after_the_delay(staking: Staking, node: Address) -> None:
    registry = staking.registry
    staking.log.set_next_seq(node, 10)
    with boa.reverts("registry: next_seq is committed"):
        rotate(staking, node, "second", 9)
    second = rotate(staking, node, "second", 20)
    assert registry.node_of_key(second) == node
    assert registry.signing_key(node, 20) == node
    with boa.reverts("keys: a rotation is pending"):
        rotate(staking, node, "third", 20)
    boa.env.time_travel(seconds=value_of(staking.parameters, "key_rotation_delay"))
    assert [registry.signing_key(node, seq) for seq in (0, 19, 20, 2**64 - 1)] == [node, node, second, second]
    assert registry.committer(node) == node
    staking.log.set_next_seq(node, 20)
    assert registry.committer(node) == registry.node_info(node).node_key == second
    with boa.reverts("keys: key already bound"):
        rotate(staking, node, "node", 30)
    third = rotate(staking, node, "third", 30)
    boa.env.time_travel(seconds=DAY)
    assert [registry.signing_key(node, seq) for seq in (19, 29, 30)] == [node, second, third]
    with boa.reverts("keys: next_seq below last"):
        rotate(staking, node, "fourth", 29)
    # A key that was never used can be passed over.
    fourth = rotate(staking, node, "fourth", 30)
    boa.env.time_travel(seconds=DAY)
    assert [registry.signing_key(node, seq) for seq in (29, 30)] == [second, fourth]


def test_rotation_needs_operator_and_proof(staking: Staking, node: Address) -> None:
    key = account("second")
    good = proof_of_possession(staking.registry, OPERATOR, key, NODE_KEY, FOREVER)
    peer = proof_of_possession(staking.registry, OPERATOR, key, PEER_KEY, FOREVER)
    with boa.reverts("registry: not the operator"):
        staking.registry.rotate_node_key(node, key.address, 0, FOREVER, good, sender=STRANGER)
    with boa.reverts("keys: invalid proof"):
        staking.registry.rotate_node_key(node, key.address, 0, FOREVER, peer, sender=OPERATOR)


def test_rotations_are_bounded_and_never_forgotten(staking: Staking, node: Address) -> None:
    set_parameter(staking.parameters, "key_rotation_delay", 0)
    keys = [rotate(staking, node, f"key {i}", 10 + i) for i in range(64)]
    with boa.reverts("keys: no rotations left"):
        rotate(staking, node, "one more", 100)
    assert staking.registry.signing_key(node, 9) == node
    assert [staking.registry.signing_key(node, 10 + i) for i in range(64)] == keys


def test_names_of_other_kinds_sign_nothing(staking: Staking, node: Address) -> None:
    second = rotate(staking, node, "second", 0)
    for name in (second, account("node peer").address, STRANGER, ZERO_ADDRESS):
        assert staking.registry.signing_key(name, 0) == ZERO_ADDRESS


def test_operator_hands_over_in_two_steps(staking: Staking, node: Address) -> None:
    registry, heir = staking.registry, account("heir").address
    registry.transfer_operator(node, heir, sender=OPERATOR)
    assert registry.operator_of(node) == OPERATOR
    with boa.reverts("registry: not the next operator"):
        registry.accept_operator(node, sender=STRANGER)
    registry.accept_operator(node, sender=heir)
    assert registry.operator_of(node) == heir
    with boa.reverts("registry: not the next operator"):
        registry.accept_operator(node, sender=heir)
    with boa.reverts("registry: not the operator"):
        registry.unbond(node, 1, sender=OPERATOR)
    registry.transfer_operator(node, node, sender=heir)
    with boa.reverts("keys: key already bound"):
        registry.accept_operator(node, sender=node)


def test_every_operator_call_is_the_operators(staking: Staking, node: Address) -> None:
    registry = staking.registry
    calls: list[Callable[..., Any]] = [
        lambda **k: registry.set_endpoint(node, "x", **k),
        lambda **k: registry.set_payout(node, STRANGER, **k),
        lambda **k: registry.transfer_operator(node, STRANGER, **k),
        lambda **k: registry.unbond(node, 1, **k),
        lambda **k: registry.cancel_unbond(node, 0, **k),
        lambda **k: registry.deregister(node, **k),
        lambda **k: registry.unjail(node, **k),
    ]
    for call in calls:
        for sender in (STRANGER, node, OWNER.address, PAYOUT):
            with boa.reverts("registry: not the operator"):
                call(sender=sender)


def test_endpoint_and_payout(staking: Staking, node: Address) -> None:
    registry = staking.registry
    registry.set_endpoint(node, "https://other.example", sender=OPERATOR)
    (event,) = registry.get_logs()
    assert (event.old_endpoint, event.new_endpoint) == ("https://node.example", "https://other.example")
    registry.set_payout(node, STRANGER, sender=OPERATOR)
    (event,) = registry.get_logs()
    assert (event.old_payout, event.new_payout) == (PAYOUT, STRANGER)
    assert registry.node_info(node).endpoint == "https://other.example"
    for payout in (ZERO_ADDRESS, registry.address):
        with boa.reverts("registry: payout out of range"):
            registry.set_payout(node, payout, sender=OPERATOR)


# Stake -----------------------------------------------------------------------------------------------------------------


def test_stake_by_anyone(staking: Staking, node: Address) -> None:
    add_stake(staking.token, staking.registry, node, 5 * POIP, staker=STRANGER)
    assert staking.registry.node_info(node).active == 1005 * POIP
    assert staking.registry.total_staked() == staking.registry.total_held() == 1005 * POIP
    with boa.reverts("stakes: zero amount"):
        staking.registry.stake(node, 0, sender=STRANGER)
    with boa.reverts("stakes: node not in service"):
        staking.registry.stake(STRANGER, 1, sender=STRANGER)
    with boa.reverts("erc20: insufficient allowance"):
        staking.registry.stake(node, 1, sender=STRANGER)


def test_unbond_wait_withdraw(staking: Staking, node: Address) -> None:
    registry, period = staking.registry, value_of(staking.parameters, "unbonding_period")
    first = registry.unbond(node, 100 * POIP, sender=OPERATOR)
    boa.env.time_travel(seconds=10)
    second = registry.unbond(node, 200 * POIP, sender=OPERATOR)
    assert [u.id for u in registry.unbondings(node)] == [first, second] == [0, 1]
    assert (registry.node_info(node).unbonding, registry.free_stake(node)) == (300 * POIP, 700 * POIP)
    with boa.reverts("stakes: not enough free stake"):
        registry.unbond(node, 700 * POIP + 1, sender=OPERATOR)
    with boa.reverts("stakes: zero amount"):
        registry.unbond(node, 0, sender=OPERATOR)
    boa.env.time_travel(seconds=period - 11)
    with boa.reverts("stakes: nothing to withdraw yet"):
        registry.withdraw(node, 32, sender=STRANGER)
    boa.env.time_travel(seconds=1)
    assert registry.withdraw(node, 32, sender=STRANGER) == 100 * POIP
    boa.env.time_travel(seconds=10)
    with boa.reverts("stakes: nothing to withdraw yet"):
        registry.withdraw(node, 0, sender=STRANGER)
    registry.withdraw(node, 1, sender=STRANGER)
    assert staking.token.balanceOf(PAYOUT) == 300 * POIP
    assert (registry.total_staked(), len(registry.unbondings(node))) == (700 * POIP, 0)


def test_cancel_unbond(staking: Staking, node: Address) -> None:
    registry = staking.registry
    ids = [registry.unbond(node, 10 * POIP, sender=OPERATOR) for _ in range(3)]
    registry.cancel_unbond(node, ids[1], sender=OPERATOR)
    assert [u.id for u in registry.unbondings(node)] == [0, 2]
    assert registry.node_info(node).active == 980 * POIP
    with boa.reverts("stakes: no such unbonding"):
        registry.cancel_unbond(node, ids[1], sender=OPERATOR)
    assert registry.unbond(node, POIP, sender=OPERATOR) == 3


def test_unbondings_are_bounded_and_in_order_of_time(staking: Staking, node: Address) -> None:
    registry = staking.registry
    registry.unbond(node, POIP, sender=OPERATOR)
    set_parameter(staking.parameters, "unbonding_period", 8 * DAY)
    for _ in range(31):
        registry.unbond(node, POIP, sender=OPERATOR)
    with boa.reverts("stakes: too many unbondings"):
        registry.unbond(node, POIP, sender=OPERATOR)
    assert {u.withdrawable_at for u in registry.unbondings(node)} == {now() + 14 * DAY}
    boa.env.time_travel(seconds=14 * DAY)
    assert registry.withdraw(node, 5) == 5 * POIP
    assert [u.id for u in registry.unbondings(node)] == list(range(5, 32))


def test_deregister(staking: Staking, node: Address) -> None:
    registry, log = staking.registry, staking.log.address
    model = add_model(staking.models)
    registry.set_offer(node, model, 1, 5, 6, sender=OPERATOR)
    registry.lock(node, POIP, sender=log)
    with boa.reverts("registry: batches are pending"):
        registry.deregister(node, sender=OPERATOR)
    registry.unlock(node, POIP, sender=log)
    unbonding = registry.unbond(node, POIP, sender=OPERATOR)
    registry.deregister(node, sender=OPERATOR)
    info = registry.node_info(node)
    assert (info.active, info.unbonding, info.deregistered_at) == (0, 1000 * POIP, now())
    assert list(registry.offers(node)) == []
    assert not registry.is_active(node)
    refuses(
        "stakes: node not in service",
        lambda: registry.stake(node, 1, sender=OWNER.address),
        lambda: registry.deregister(node, sender=OPERATOR),
        lambda: registry.cancel_unbond(node, unbonding, sender=OPERATOR),
        lambda: registry.lock(node, 0, sender=log),
        lambda: registry.set_offer(node, model, 1, 5, 6, sender=OPERATOR),
    )
    # It stays slashable until the stake has left.
    taken, _ = registry.slash(node, 100 * POIP, STRANGER, 0, REASON, EVIDENCE, sender=staking.slasher)
    assert taken == 100 * POIP
    boa.env.time_travel(seconds=14 * DAY)
    registry.withdraw(node, 32)
    assert staking.token.balanceOf(PAYOUT) == 900 * POIP


# Locks -----------------------------------------------------------------------------------------------------------------


def test_lock_and_unlock(staking: Staking, node: Address) -> None:
    registry, log = staking.registry, staking.log.address
    for call in (registry.lock, registry.unlock):
        for sender in (STRANGER, OPERATOR, OWNER.address, staking.slasher):
            with boa.reverts("registry: not the log"):
                call(node, 1, sender=sender)
    registry.lock(node, 600 * POIP, sender=log)
    registry.lock(node, 400 * POIP, sender=log)
    assert (registry.node_info(node).locked, registry.free_stake(node)) == (1000 * POIP, 0)
    with boa.reverts("stakes: not enough free stake"):
        registry.lock(node, 1, sender=log)
    with boa.reverts("stakes: not enough free stake"):
        registry.unbond(node, 1, sender=OPERATOR)
    registry.unlock(node, 400 * POIP, sender=log)
    registry.unlock(node, 2**256 - 1, sender=log)
    registry.unlock(node, 1, sender=log)
    registry.unlock(STRANGER, 1, sender=log)
    assert (registry.node_info(node).locked, registry.free_stake(node)) == (0, 1000 * POIP)


def test_lock_needs_free_stake_alone_while_in_service(staking: Staking, node: Address) -> None:
    registry, log = staking.registry, staking.log.address
    registry.unbond(node, 900 * POIP + 1, sender=OPERATOR)
    assert not registry.is_active(node)
    registry.lock(node, 1, sender=log)
    registry.cancel_unbond(node, 0, sender=OPERATOR)
    assert registry.is_active(node)
    registry.slash(node, POIP, STRANGER, 0, REASON, EVIDENCE, sender=staking.slasher)
    assert not registry.is_active(node)
    registry.lock(node, 1, sender=log)
    with boa.reverts("stakes: not enough free stake"):
        registry.lock(node, registry.free_stake(node) + 1, sender=log)
    with boa.reverts("stakes: node not in service"):
        registry.lock(STRANGER, 1, sender=log)


# Slashes ---------------------------------------------------------------------------------------------------------------


def test_slash_takes_active_first_and_burns_the_rest(staking: Staking, node: Address) -> None:
    registry, supply = staking.registry, staking.token.totalSupply()
    registry.unbond(node, 400 * POIP, sender=OPERATOR)
    paid = 30 * POIP
    result = registry.slash(node, 100 * POIP, STRANGER, 50 * POIP, REASON, EVIDENCE, sender=staking.slasher)
    logs = {type(event).__name__: event for event in registry.get_logs()}
    slashed = logs["Slashed"]
    assert tuple(result) == (100 * POIP, paid)
    assert (slashed.node, slashed.slasher, slashed.reason, slashed.evidence, slashed.beneficiary) == (
        node, staking.slasher, REASON, EVIDENCE, STRANGER,
    )  # fmt: skip
    assert (slashed.taken, slashed.paid, slashed.burned) == (100 * POIP, paid, 70 * POIP)
    assert logs["Jailed"].until == now() + DAY
    info = registry.node_info(node)
    assert (info.active, info.unbonding, info.jailed_until) == (500 * POIP, 400 * POIP, now() + DAY)
    assert staking.token.totalSupply() == supply - 70 * POIP
    assert (registry.rewards(STRANGER), registry.total_rewards()) == (paid, paid)
    assert registry.claim_reward(sender=STRANGER) == staking.token.balanceOf(STRANGER) == paid
    with boa.reverts("stakes: no reward"):
        registry.claim_reward(sender=STRANGER)


def test_slash_of_unbondings_is_pro_rata(staking: Staking, node: Address) -> None:
    registry = staking.registry
    for amount in (1, 2, 7):
        registry.unbond(node, amount, sender=OPERATOR)
    registry.unbond(node, 1000 * POIP - 10, sender=OPERATOR)
    cut = 500 * POIP
    taken, _ = registry.slash(node, cut, STRANGER, 0, REASON, EVIDENCE, sender=staking.slasher)
    assert taken == cut
    amounts = {u.id: u.amount for u in registry.unbondings(node)}
    assert sum(amounts.values()) == registry.node_info(node).unbonding == 500 * POIP
    # Shares round down, and what is left over falls on the last one.
    assert (amounts[0], amounts[1], amounts[2]) == (1, 1, 4)


def test_reward_is_bounded_by_share_and_claim(staking: Staking, node: Address) -> None:
    registry = staking.registry
    for reward, expected in ((0, 0), (1, 1), (3, 3), (4, 3), (2**256 - 1, 3)):
        with boa.env.anchor():
            result = registry.slash(node, 10, STRANGER, reward, REASON, EVIDENCE, sender=staking.slasher)
            assert tuple(result) == (10, expected)
    assert tuple(
        registry.slash(node, 10, ZERO_ADDRESS, 5, REASON, EVIDENCE, sender=staking.slasher)
    ) == (10, 0)  # fmt: skip
    set_parameter(staking.parameters, "reward_share", 0)
    assert tuple(registry.slash(node, 10, STRANGER, 5, REASON, EVIDENCE, sender=staking.slasher)) == (10, 0)


def test_fixed_slash_is_pinned_at_registration(staking: Staking, node: Address) -> None:
    set_parameter(staking.parameters, "fixed_slash_share", 1_000_000)
    staking.registry.unbond(node, 400 * POIP, sender=OPERATOR)
    result = staking.registry.slash_fixed(node, STRANGER, REASON, EVIDENCE, sender=staking.slasher)
    assert tuple(result) == (200 * POIP, 60 * POIP)
    assert register_node(staking.registry, "later")
    assert staking.registry.node_info(account("later").address).fixed_slash_ppm == 1_000_000


def test_jail(staking: Staking, node: Address) -> None:
    registry = staking.registry
    with boa.reverts("stakes: node not jailed"):
        registry.unjail(node, sender=OPERATOR)
    registry.slash(node, 950 * POIP, STRANGER, 0, REASON, EVIDENCE, sender=staking.slasher)
    until = now() + DAY
    boa.env.time_travel(seconds=100)
    set_parameter(staking.parameters, "jail_period", 0)
    registry.slash(node, 1, STRANGER, 0, REASON, EVIDENCE, sender=staking.slasher)
    assert registry.node_info(node).jailed_until == until
    with boa.reverts("stakes: jail period not over"):
        registry.unjail(node, sender=OPERATOR)
    boa.env.time_travel(seconds=DAY)
    assert not registry.is_active(node)
    with boa.reverts("stakes: below minimum stake"):
        registry.unjail(node, sender=OPERATOR)
    add_stake(staking.token, registry, node, 51 * POIP)
    assert registry.node_info(node).jailed_until == until
    registry.unjail(node, sender=OPERATOR)
    assert (registry.is_active(node), registry.node_info(node).jailed_until) == (True, 0)


# Offers ----------------------------------------------------------------------------------------------------------------


def test_offers(staking: Staking, node: Address) -> None:
    registry = staking.registry
    first, second, third = (add_model(staking.models, tag, profiles=2) for tag in ("a", "b", "c"))
    registry.set_offer(node, first, 1, 5, 6, sender=OPERATOR)
    registry.set_offer(node, second, 2, 7, 8, sender=node)
    registry.set_offer(node, third, 1, 1, 2, sender=node)
    registry.set_offer(node, first, 2, 9, 2**128 - 1, sender=node)
    assert [tuple(offer) for offer in registry.offers(node)] == [
        (first, 2, 9, 2**128 - 1), (second, 2, 7, 8), (third, 1, 1, 2),
    ]  # fmt: skip
    registry.remove_offer(node, first, sender=node)
    assert [offer.model_id for offer in registry.offers(node)] == [third, second]
    with boa.reverts("offers: no such offer"):
        registry.remove_offer(node, first, sender=OPERATOR)
    registry.remove_offer(node, second, sender=OPERATOR)
    refuses(
        "registry: not operator or key",
        lambda: registry.set_offer(node, first, 1, 5, 6, sender=STRANGER),
        lambda: registry.remove_offer(node, third, sender=STRANGER),
        lambda: registry.set_offer(STRANGER, first, 1, 5, 6, sender=STRANGER),
    )
    with boa.reverts("registry: model not servable"):
        registry.set_offer(node, first, 3, 5, 6, sender=OPERATOR)


def test_offers_respect_price_floors_and_their_number(staking: Staking, node: Address) -> None:
    registry = staking.registry
    models = [add_model(staking.models, str(i)) for i in range(17)]
    set_parameter(staking.parameters, "minimum_input_price", 5)
    set_parameter(staking.parameters, "minimum_output_price", 6)
    for prices, reason in (((4, 6), "registry: input price too low"), ((5, 5), "registry: output price too low")):
        with boa.reverts(reason):
            registry.set_offer(node, models[0], 1, *prices, sender=OPERATOR)
    for model in models[:16]:
        registry.set_offer(node, model, 1, 5, 6, sender=OPERATOR)
    with boa.reverts("offers: too many offers"):
        registry.set_offer(node, models[16], 1, 5, 6, sender=OPERATOR)
    registry.set_offer(node, models[15], 1, 6, 6, sender=OPERATOR)


# Administration --------------------------------------------------------------------------------------------------------


def test_pause_stops_intake_and_expires(staking: Staking, node: Address) -> None:
    registry = staking.registry
    with boa.reverts("ownable: caller is not the owner"):
        registry.pause_intake(1, sender=STRANGER)
    with boa.reverts("registry: pause too long"):
        registry.pause_intake(14 * DAY + 1, sender=OWNER.address)
    registry.pause_intake(14 * DAY, sender=OWNER.address)
    refuses(
        "registry: intake is paused",
        lambda: registry.stake(node, 1, sender=OWNER.address),
        lambda: registry.register(*registration(registry), sender=OPERATOR),
        lambda: registry.set_offer(node, b"\1" * 32, 1, 5, 6, sender=OPERATOR),
    )
    boa.env.time_travel(seconds=14 * DAY)
    add_stake(staking.token, registry, node, 1)
    registry.pause_intake(100, sender=OWNER.address)
    registry.pause_intake(0, sender=OWNER.address)
    add_stake(staking.token, registry, node, 1)


def test_surplus_is_what_nobody_staked(staking: Staking, node: Address) -> None:
    registry, token = staking.registry, staking.token
    registry.slash(node, 100, STRANGER, 100, REASON, EVIDENCE, sender=staking.slasher)
    with boa.reverts("registry: no surplus"):
        registry.sweep_surplus(OWNER.address, sender=OWNER.address)
    token.transfer(registry, 77, sender=OWNER.address)
    with boa.reverts("ownable: caller is not the owner"):
        registry.sweep_surplus(STRANGER, sender=STRANGER)
    assert registry.sweep_surplus(PAYOUT, sender=OWNER.address) == token.balanceOf(PAYOUT) == 77
    assert token.balanceOf(registry) == registry.total_held()
