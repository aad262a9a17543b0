"""Accusations: commitment, reveal, order, what each end does to money, batch and node. Contests: test_contests.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import boa
import pytest
from eth_hash.auto import keccak

from poip_chain.spec.offences import Fault
from tests.contracts import system
from tests.contracts.court import (
    ACCUSED,
    ACCUSER,
    COMMITTED,
    CONTESTER,
    EXPIRED,
    NODE,
    SALT,
    STOOD,
    Court,
    deploy_court,
)
from tests.contracts.network import CONVICTED, FINAL, Committed, Server
from tests.contracts.system import OWNER, account, refuses
from tests.support.tellings import Story, Telling, story

OTHER = account("other accuser")


@pytest.fixture(scope="module")
def told() -> Story:
    return story()


@pytest.fixture(scope="module")
def honest(told: Story) -> Telling:
    return Telling(told)


@pytest.fixture(scope="module")
def deployed(told: Story) -> Court:
    return deploy_court(told)


@pytest.fixture
def court(deployed: Court) -> Iterator[Court]:
    deployed.fund(OTHER.address)
    yield deployed
    deployed.check_books()


@pytest.fixture
def committed(court: Court) -> Committed:
    return court.serve(3)


def balance(court: Court, who: Any) -> int:
    return int(court.network.token.balanceOf(who.address))


# One accusation


def test_an_uncontested_accusation_convicts(court: Court, committed: Committed, honest: Telling) -> None:
    bond, before = court.value("accusation_bond"), balance(court, ACCUSER)
    claim = court.claim(committed, honest, index=1)
    id = court.commit(committed.batch, claim)
    (event,) = (e for e in court.accusations.get_logs() if type(e).__name__ == "Committed")
    assert (event.id, event.accuser, event.bond) == (id, ACCUSER.address, bond)
    assert id == committed.batch.id << 32 and balance(court, ACCUSER) == before - bond
    assert court.network.log.open_cases(committed.batch.id) == 1
    court.reveal(id, committed.batch, claim)
    info = court.accusations.accusation_info(id)
    assert (info.accuser, info.status, info.contests) == (ACCUSER.address, ACCUSED, 0)
    assert court.terms[id].contest_end == system.now() + court.value("contest_window")
    terms = court.terms[id]
    assert (terms.node, terms.leaf_count, terms.points) == (committed.batch.node, honest.layout.count, 3)
    assert terms.trace.trace_root == honest.root and terms.trace.weights_root == court.story.weights_root
    assert terms.config == court.story.config.values() and terms.clock == court.value("dispute_clock")
    with boa.reverts("court: it may still be contested"):
        court.end(id, committed.batch.values())
    assert court.resolve(id, committed.batch)
    (ended,) = (e for e in court.accusations.get_logs() if type(e).__name__ == "Ended")
    assert (ended.id, ended.status, ended.convicted) == (id, STOOD, True)
    assert court.status(id) == STOOD and court.accusations.is_over(id)
    assert court.network.log.status(committed.batch.id) == CONVICTED
    assert court.network.log.open_cases(committed.batch.id) == 0
    assert court.accusations.claim(sender=ACCUSER.address) == bond and balance(court, ACCUSER) == before
    assert court.network.registry.rewards(ACCUSER.address) > 0
    refuses(
        "court: not an open accusation",
        lambda: court.end(id, committed.batch.values()),
    )
    refuses("court: nothing to claim", lambda: court.accusations.claim(sender=ACCUSER.address))


def test_the_conviction_names_its_reason(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("contest_window") + 1)
    court.end(id, committed.batch.values())
    (event,) = (e for e in court.accusations.get_logs() if type(e).__name__ == "BatchConvicted")
    assert int.from_bytes(event.reason, "big") == Fault.COMPUTATION
    assert int.from_bytes(event.evidence, "big") == id and event.beneficiary == ACCUSER.address


def test_only_what_was_committed_is_revealed(court: Court, committed: Committed, honest: Telling) -> None:
    claim, batch = court.claim(committed, honest), committed.batch.values()
    id = court.commit(committed.batch, claim)
    wrong = "court: not what was committed"
    other = court.claim(committed, honest, margins=[])
    second = Server(
        court.network, account(NODE), committed.batch.node, account("x").address, 3, committed.batch.node_cum
    )
    later = second.commit([court.answer(second)]).batch
    refuses(
        wrong,
        lambda: court.open(id, batch, claim, b"\x06" * 32),
        lambda: court.open(id, batch, other, SALT),
        lambda: court.open(id, later.values(), claim, SALT),
        lambda: court.open(id, committed.batch.replace(count=4).values(), claim, SALT),
    )
    refuses(
        "court: not a committed accusation",
        lambda: court.open(id + 1, batch, claim, SALT),
    )
    court.reveal(id, committed.batch, claim)
    refuses(
        "court: not a committed accusation",
        lambda: court.open(id, batch, claim, SALT),
    )


def test_what_does_not_convict_cannot_be_revealed(court: Court, committed: Committed, honest: Telling) -> None:
    claim = court.claim(committed, honest)
    id = court.commit(committed.batch, claim)
    court.scoring.set_acquits(True)
    refuses(
        "court: the points do not convict",
        lambda: court.open(id, committed.batch.values(), claim, SALT),
    )
    assert court.status(id) == COMMITTED


def test_an_unrevealed_accusation_expires(court: Court, committed: Committed, honest: Telling) -> None:
    claim, batch = court.claim(committed, honest), committed.batch
    id, supply = court.commit(batch, claim), court.network.token.totalSupply()
    refuses("court: nothing to burn", court.accusations.burn)
    boa.env.time_travel(seconds=court.value("reveal_window"))
    refuses("court: it may still be revealed", lambda: court.accusations.expire(id, batch.values()))
    boa.env.time_travel(seconds=1)
    refuses(
        "court: too late",
        lambda: court.open(id, batch.values(), claim, SALT),
    )
    refuses("court: not the accusation's batch", lambda: court.accusations.expire(id, batch.replace(id=9).values()))
    refuses("court: no such batch", lambda: court.accusations.expire(id, batch.replace(parameters_version=1).values()))
    court.accusations.expire(id, batch.values())
    assert court.status(id) == EXPIRED
    assert court.accusations.to_burn() == court.value("accusation_bond") == court.accusations.burn()
    assert supply - court.network.token.totalSupply() == court.value("accusation_bond")
    assert court.accusations.to_burn() == court.accusations.total_held() == 0
    refuses("court: not a committed accusation", lambda: court.accusations.expire(id, batch.values()))
    refuses("court: not an open accusation", lambda: court.accusations.resolve(id, court.no_terms(), batch.values()))
    refuses("court: not a revealed accusation", lambda: court.accusations.terms_hash(id))
    court.network.finalize(batch)
    assert court.network.log.status(batch.id) == FINAL


def test_a_revealed_accusation_does_not_expire(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("reveal_window") + 1)
    refuses("court: not a committed accusation", lambda: court.accusations.expire(id, committed.batch.values()))


def test_only_inside_the_window_of_a_pending_batch(court: Court, honest: Telling) -> None:
    first, batch = court.serve(), court.serve(label="second node").batch
    claim = court.claim(first, honest)
    strange = first.batch.replace(count=2).values()
    refuses("log: batch is not pending", lambda: court.accusations.commit(strange, b"", sender=ACCUSER.address))
    boa.env.time_travel(seconds=court.value("challenge_window") - 10)
    id = court.commit(first.batch, claim)
    refuses("court: batch cannot be convicted", lambda: court.accusations.commit(strange, b"", sender=OTHER.address))
    boa.env.time_travel(seconds=10)
    for late in (batch, first.batch):
        with boa.reverts("log: window is over" if late == batch else "court: window is over"):
            court.accusations.commit(late.values(), b"", sender=OTHER.address)
    court.reveal(id, first.batch, claim)
    assert court.resolve(id, first.batch), "a case opened inside the window convicts after it"


def test_what_an_answer_showed_late_can_be_accused(court: Court, honest: Telling) -> None:
    """An answer extends the log's window; the first accusation of a batch and the later ones are taken in it."""
    committed, log = court.serve(), court.network.log
    batch = committed.batch
    judge = court.network.availability.address
    log.open_case(batch.values(), sender=judge)
    boa.env.time_travel(seconds=court.value("challenge_window"))
    log.extend_window(batch.values(), sender=judge)
    log.close_case(batch.values(), sender=judge)
    claim = court.claim(committed, honest)
    id = court.commit(batch, claim)
    court.accusations.commit(batch.values(), b"", sender=OTHER.address)
    court.reveal(id, batch, claim)
    boa.env.time_travel(seconds=court.value("response_window"))
    refuses("court: window is over", lambda: court.accusations.commit(batch.values(), b"", sender=OTHER.address))
    assert court.resolve(id, batch)


def test_the_longest_case_ends_within_what_the_parameters_cover(court: Court, honest: Telling) -> None:
    """A challenge in the window's last second, answered in its last; an accusation in the last second of what that
    extends, revealed and contested as late as may be, and both sides use up their time."""
    committed, log, value = court.serve(), court.network.log, court.value
    batch, judge = committed.batch, court.network.availability.address
    longest = value("challenge_window") + 2 * value("response_window")
    longest += value("reveal_window") + value("contest_window") + 2 * value("dispute_clock")
    assert longest <= min(value("unbonding_period"), value("thaw_period"))
    boa.env.time_travel(seconds=batch.window_end - 1 - system.now())
    log.open_case(batch.values(), sender=judge)
    boa.env.time_travel(seconds=value("response_window"))
    log.extend_window(batch.values(), sender=judge)
    log.close_case(batch.values(), sender=judge)
    boa.env.time_travel(seconds=value("response_window") - 1)
    claim = court.claim(committed, honest)
    id = court.commit(batch, claim)
    boa.env.time_travel(seconds=value("reveal_window"))
    court.reveal(id, batch, claim)
    boa.env.time_travel(seconds=value("contest_window"))
    contest = court.contest(id)
    boa.env.time_travel(seconds=value("dispute_clock"))
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=value("dispute_clock"))
    refuses("court: a contest is open", lambda: court.end(id, batch.values()))
    boa.env.time_travel(seconds=1)
    court.settle(contest)
    assert court.end(id, batch.values()) and log.status(batch.id) == CONVICTED
    assert longest - 2 <= system.now() - batch.committed_at <= longest


def test_a_bond_must_be_paid(court: Court, committed: Committed) -> None:
    poor = account("poor").address
    with boa.reverts():
        court.accusations.commit(committed.batch.values(), bytes(32), sender=poor)
    assert court.accusations.accusation_count(committed.batch.id) == 0


def test_numbers_are_those_of_the_batch(court: Court, committed: Committed, honest: Telling) -> None:
    """A change of parameters meets neither bond nor windows of batches committed before."""
    bond, before = court.value("accusation_bond"), balance(court, ACCUSER)
    for name, value in (("accusation_bond", 1), ("contest_bond", 1), ("contest_window", 5), ("dispute_clock", 5)):
        court.network.set_value(name, value)
    id = court.accuse(committed, honest)
    assert balance(court, ACCUSER) == before - bond
    assert court.terms[id].accusation_bond == bond and court.terms[id].clock > 5 and court.terms[id].contest_bond > 1
    boa.env.time_travel(seconds=6)
    refuses(
        "court: it may still be contested",
        lambda: court.end(id, committed.batch.values()),
    )
    for name, value in (("accusation_bond", bond), ("contest_bond", court.terms[id].contest_bond)):
        court.network.set_value(name, value)


# Several accusations of one batch


def test_the_order_is_that_of_commitment(court: Court, committed: Committed, honest: Telling) -> None:
    batch = committed.batch
    first, second = court.claim(committed, honest), court.claim(committed, honest, index=2)
    early = court.commit(batch, first, ACCUSER.address)
    late = court.commit(batch, second, OTHER.address)
    court.reveal(late, batch, second)
    boa.env.time_travel(seconds=600)
    court.reveal(early, batch, first)
    boa.env.time_travel(seconds=court.value("contest_window") - 599)
    refuses(
        "court: an earlier accusation is open",
        lambda: court.end(late, batch.values()),
    )
    assert court.resolve(early, batch) and not court.end(late, batch.values())
    assert court.network.registry.rewards(ACCUSER.address) > 0 == court.network.registry.rewards(OTHER.address)
    assert court.network.log.open_cases(batch.id) == 0


def test_resolving_takes_the_accusations_own_terms_and_batch(court: Court, honest: Telling) -> None:
    mine, other = court.serve(), court.serve(label="second node")
    id = court.accuse(mine, honest)
    boa.env.time_travel(seconds=court.value("contest_window") + 1)
    terms, batch = court.terms[id], mine.batch
    wrong = terms._replace(accusation_bond=terms.accusation_bond + 1)
    refuses("court: not the accusation's terms", lambda: court.accusations.resolve(id, wrong, batch.values()))
    refuses("court: not the accusation's batch", lambda: court.accusations.resolve(id, terms, other.batch.values()))
    forged = batch.replace(node=other.batch.node).values()
    refuses("court: no such batch", lambda: court.accusations.resolve(id, terms, forged))
    assert court.accusations.resolve(id, terms, batch.values())


def test_only_the_models_own_dimensions(court: Court, committed: Committed, honest: Telling) -> None:
    claim = court.claim(committed, honest)
    id, batch = court.commit(committed.batch, claim), committed.batch.values()
    other = replace(court.story.config, num_layers=1).values()
    refuses("court: not the model's dimensions", lambda: court.accusations.accuse(id, batch, other, claim, SALT))


# Node and judge in every state


def test_a_removed_judge_returns_bonds_and_convicts_nobody(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    waiting = court.commit(committed.batch, court.claim(committed, honest, index=1), OTHER.address)
    contest = court.contest(id)
    court.network.log.set_judge(court.accusations, False, sender=OWNER.address)
    refuses(
        "court: batch cannot be convicted",
        lambda: court.accusations.commit(committed.batch.values(), bytes(32), sender=OTHER.address),
    )
    court.answer_for(contest, honest)
    boa.env.time_travel(seconds=court.value("contest_window") + court.value("dispute_clock") + 1)
    assert not court.settle(contest)
    assert not court.resolve(id, committed.batch) and court.status(id) == STOOD
    court.accusations.expire(waiting, committed.batch.values())
    assert (
        court.accusations.credits(ACCUSER.address) == court.value("accusation_bond") + court.value("contest_bond") // 2
    )
    court.network.finalize(committed.batch)
    with boa.reverts("log: caller is no judge of this batch"):
        court.accusations.commit(court.serve(label="second node").batch.values(), bytes(32), sender=OTHER.address)


def test_a_batch_older_than_its_judge(court: Court, committed: Committed, honest: Telling) -> None:
    court.network.log.set_judge(court.accusations, False, sender=OWNER.address)
    court.network.log.set_judge(court.accusations, True, sender=OWNER.address)
    with boa.reverts("log: caller is no judge of this batch"):
        court.commit(committed.batch, court.claim(committed, honest))


def test_a_node_without_stake_is_convicted_all_the_same(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    registry, node = court.network.registry, committed.batch.node
    registry.slash(node, 10**30, OTHER.address, 0, bytes(32), bytes(32), sender=court.network.availability.address)
    assert court.network.stake_of(node) == 0
    assert court.resolve(id, committed.batch)
    assert court.network.log.status(committed.batch.id) == CONVICTED
    assert registry.rewards(ACCUSER.address) == 0


def test_unbonding_stake_is_in_reach(court: Court, committed: Committed, honest: Telling) -> None:
    """The node takes out what it can at once; the locked part waits for the case, and what leaves is slashable."""
    registry, batch = court.network.registry, committed.batch
    operator = account(f"{NODE} operator").address
    registry.unbond(batch.node, registry.free_stake(batch.node), sender=operator)
    assert registry.node_info(batch.node).active == batch.lock
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("challenge_window"))
    with boa.reverts("log: a case is open"):
        court.network.log.finalize([batch.values()])
    stake = court.network.stake_of(batch.node)
    assert court.resolve(id, batch)
    assert court.network.stake_of(batch.node) == stake - batch.lock


def test_the_longest_case_ends_before_stake_may_leave(court: Court) -> None:
    longest = court.value("challenge_window") + court.value("reveal_window") + court.value("contest_window")
    longest += 2 * (court.value("response_window") + court.value("dispute_clock"))
    assert court.value("unbonding_period") >= longest <= court.value("thaw_period")


# Who may call


def test_only_the_contests_open_and_close_contests(court: Court, committed: Committed, honest: Telling) -> None:
    id = court.accuse(committed, honest)
    terms, who = court.terms[id], CONTESTER.address
    refuses(
        "court: not the contests",
        lambda: court.accusations.open_contest(id, terms, who, False, sender=who),
        lambda: court.accusations.close_contest(id, terms, who, False, True, sender=who),
    )


def test_the_contests_are_named_once(court: Court) -> None:
    told = (court.network.token, court.network.log, court.network.registry, court.network.models)
    rest = (court.network.parameters, court.scoring, court.trace_map)
    path = system.CONTRACTS / "disputes/Accusations.vy"
    deployer = account("another deployer").address
    fresh = system.load(path, *told, *rest, sender=deployer)
    with boa.reverts("court: not initialized"):
        fresh.commit(court.serve().batch.values(), bytes(32), sender=ACCUSER.address)
    with boa.reverts("court: not the deployer"):
        fresh.initialize(court.contests, sender=ACCUSER.address)
    with boa.reverts("court: not a contract"):
        fresh.initialize(ACCUSER.address, sender=deployer)
    fresh.initialize(court.contests, sender=deployer)
    with boa.reverts("court: initialized already"):
        fresh.initialize(court.contests, sender=deployer)
    with boa.reverts("court: not a contract"):
        system.load(path, *told, *rest[:2], ACCUSER.address)
    assert fresh.version() == court.contests.version() == "0.1.0"


def test_status_of_nothing(court: Court) -> None:
    assert tuple(court.accusations.accusation_info(7)) == ("0x" + "00" * 20, 0, 0, 0, 0, 0, False, bytes(32))
    points = bytes(range(32))
    expected = keccak((3).to_bytes(32, "big") + b"\x01" * 32 + points)
    assert court.accusations.claim_hash(3, b"\x01" * 32, points) == expected
    assert not court.accusations.is_over(7)
