"""Attacks on the court by number, time and order: floods, options, copies, second convictions, reorganisations.

Named as the attack; each says what it wants and why it fails, and asserts what everybody has afterwards, to the wei.
"""

from __future__ import annotations

from typing import Any

import boa
import pytest

from poip_chain.spec.dispute import asked_cell
from poip_chain.spec.trace import Op
from tests.attack.court_ledger import BOND, CONTEST_BOND, PARTNER, Ledger
from tests.contracts import system
from tests.contracts.court import ACCUSED, ACCUSER, CONTESTER, LOST, NODE, SALT, STOOD, Court
from tests.contracts.network import CONVICTED, FINAL, PENDING, Committed, Server
from tests.contracts.system import account, refuses
from tests.support.tellings import Telling

pytestmark = pytest.mark.slow

HALF, QUARTER = BOND // 2, CONTEST_BOND // 2


def lying(telling: Telling, op: Op, offset: int = 0) -> Telling:
    """One element of the last layer's tensor off."""
    leaf = telling.layout.tensor(op, telling.layout.config.num_layers - 1).start + offset
    return Telling(telling.story, {leaf: telling.changed(leaf, 1)})


# Accusations that are no more than bonds


def test_withheld_accusation_kept_as_an_option(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger
) -> None:
    """A cheat's partner commits first and reveals only if somebody else accuses, to have the reward of the conviction
    back. The option holds for one reveal_window and costs a bond each time; whoever else accuses waits no longer than
    that, and the batch is final no later."""
    batch = committed.batch
    option = court.commit(batch, court.claim(committed, honest), PARTNER.address)
    boa.env.time_travel(seconds=court.value("reveal_window") - 1)
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=2)
    refuses("court: too late", lambda: court.open(option, batch.values(), court.claim(committed, honest)))
    boa.env.time_travel(seconds=court.value("contest_window"))
    refuses("court: an earlier accusation is open", lambda: court.end(id, batch.values()))
    court.accusations.expire(option, batch.values())
    assert court.end(id, batch.values())
    assert ledger.changes() == ledger.conviction(partner=-BOND, burned=BOND)


def test_withheld_accusation_against_finality(court: Court, committed: Committed, ledger: Ledger) -> None:
    """In the window's last second, to keep an honest node's stake locked: for reveal_window, once, at a bond."""
    batch = committed.batch
    boa.env.time_travel(seconds=batch.window_end - 1 - system.now())
    id = int(court.accusations.commit(batch.values(), bytes(32), sender=PARTNER.address))
    boa.env.time_travel(seconds=court.value("reveal_window"))
    with boa.reverts("log: a case is open"):
        court.network.log.finalize([batch.values()])
    refuses("court: it may still be revealed", lambda: court.accusations.expire(id, batch.values()))
    boa.env.time_travel(seconds=1)
    court.accusations.expire(id, batch.values())
    with boa.reverts("log: window is over"):
        court.accusations.commit(batch.values(), bytes(32), sender=PARTNER.address)
    court.network.finalize(batch)
    assert court.network.log.status(batch.id) == FINAL and court.network.locked(batch.node) == 0
    assert ledger.changes() == {"partner": -BOND, "burned": BOND}


def test_option_that_is_used(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """The partner did reveal, in time: the earlier commitment is the one that is rewarded. The node loses all the same,
    of which less than a third comes back into the same hands; the other accuser loses nothing."""
    batch, claim = committed.batch, court.claim(committed, honest)
    option = court.commit(batch, claim, PARTNER.address)
    id = court.accuse(committed, honest)
    court.reveal(option, batch, claim)
    assert court.resolve(option, batch) and not court.end(id, batch.values())
    assert 3 * ledger.reward < ledger.lock
    assert ledger.changes() == ledger.conviction("partner")


@pytest.mark.slow
def test_sibling_spam(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Hundreds of empty accusations of one batch, committed before the honest one, so that it cannot be resolved. Each
    costs a bond; the batch's case is one; and when their reveal_window is over anybody clears them away, long before the
    honest accusation's contest window is."""
    batch, claim = committed.batch, court.claim(committed, honest)
    count = 390
    court.fund(PARTNER.address, count * BOND)
    ledger = Ledger(court, committed)
    spam = [int(court.accusations.commit(batch.values(), bytes(32), sender=PARTNER.address)) for _ in range(count)]
    assert spam == [(batch.id << 32) | i for i in range(count)]
    id = court.commit(batch, claim)
    court.reveal(id, batch, claim)
    assert court.network.log.open_cases(batch.id) == 1
    assert court.value("contest_window") > court.value("reveal_window")
    boa.env.time_travel(seconds=court.value("contest_window") + 1)
    # Numbers below and above 192 are kept in different words: one of the first word is left for last.
    for number in [*range(384, count), *range(192), *range(193, 384)]:
        court.accusations.expire(spam[number], batch.values())
    refuses("court: an earlier accusation is open", lambda: court.end(id, batch.values()))
    court.accusations.expire(spam[192], batch.values())
    assert court.end(id, batch.values()) and court.network.log.open_cases(batch.id) == 0
    assert ledger.changes() == ledger.conviction(partner=-count * BOND, burned=count * BOND)


def test_sibling_spam_against_an_honest_node(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger
) -> None:
    """False accusations side by side, each revealed, to exhaust the node's bonds. It has one free contest in each, and
    earns half a bond by each: the more siblings, the more it is paid."""
    false = [lying(honest, op) for op in (Op.GATE, Op.UP, Op.HIDDEN, Op.OUTPUT)]
    court.fund(PARTNER.address)
    ledger = Ledger(court, committed)
    ids = [court.accuse(committed, lie, PARTNER.address, index=i % 2) for i, lie in enumerate(false)]
    for id, lie in zip(ids, false, strict=True):
        court.play(court.contest(id, committed.batch.node, free=True), lie, honest)
    assert {court.status(id) for id in ids} == {LOST}
    assert court.network.log.open_cases(committed.batch.id) == 0
    assert ledger.changes() == {"partner": -4 * BOND, "node": 4 * HALF, "burned": 4 * (BOND - HALF)}


# Contests that are no more than bonds


def test_contest_flood(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Ten contests down ten ways, so that the accuser runs out of time or gas. What is shown once is shown to all; each
    way down costs the flood a bond, of which half is the accuser's."""
    id = court.accuse(committed, honest)
    lies = [Telling(court.story, {leaf: honest.changed(leaf, 0)}) for leaf in range(0, 250, 25)]
    contests = [court.contest(id, PARTNER.address) for _ in lies]
    reveals = 0
    while any(court.is_open(contest) for contest in contests):
        boa.env.time_travel(seconds=60)
        for contest, lie in zip(contests, lies, strict=True):
            if not court.is_open(contest):
                continue
            if court.contests.contest_info(contest).revealed_at == 0:
                court.answer_for(contest, honest)
                reveals += 1
            court.move(contest, honest, lie)
    assert 11 <= reveals <= 1 + 3 * len(lies)
    assert court.resolve(id, committed.batch) and court.status(id) == STOOD
    paid, earned = len(lies) * CONTEST_BOND, len(lies) * QUARTER
    assert ledger.changes() == ledger.conviction(accuser=earned, partner=-paid, burned=paid - earned)


def test_bond_griefing(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Contests of the trace and of every point, all in the last second and never played, to tie up the accuser's bond
    and to make it pay for answers. It answers each place once, in one clock all is over, and it earns by each."""
    id = court.accuse(committed, honest)
    boa.env.time_travel(seconds=court.value("contest_window"))
    contests = [court.contest(id, PARTNER.address) for _ in range(3)]
    contests += [court.contest(id, PARTNER.address, point=number) for number in (0, 1, 2, 2)]
    for contest in (contests[0], *contests[3:6]):
        court.answer_for(contest, honest)
    boa.env.time_travel(seconds=court.value("dispute_clock"))
    refuses("court: a contest is open", lambda: court.end(id, committed.batch.values()))
    boa.env.time_travel(seconds=1)
    assert not any(court.settle(contest) for contest in contests if court.is_open(contest))
    assert court.end(id, committed.batch.values())
    assert ledger.changes() == ledger.conviction(accuser=7 * QUARTER, partner=-7 * CONTEST_BOND, burned=7 * QUARTER)


def test_bond_griefing_of_the_contester(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A liar sees that it loses, and its partner overtakes the honest contester's last step by the same step, for the
    contester's share. It saves half its bond so, and no more than if it had contested itself; the honest contester has
    its bond back and the accusation is over, which is what it contested for."""
    false = lying(honest, Op.HIDDEN)
    id = court.accuse(committed, false)
    slow, fast = court.contest(id), court.contest(id, PARTNER.address)
    court.play(fast, false, honest)
    refuses("court: no such contest", lambda: court.settle(fast))
    assert court.status(id) == LOST and not court.settle(slow)
    assert ledger.changes() == {"accuser": -BOND, "partner": HALF, "burned": BOND - HALF}


# Convictions and rewards


def test_second_conviction_in_one_batch(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Two false answers in one batch: the lock was reckoned for the batch and is taken once, and only the first committed
    accusation is rewarded. The second has its bond and what it earned by contests back, no share; no third is taken."""
    batch = committed.batch
    first = court.accuse(committed, honest)
    second = court.accuse(committed, honest, PARTNER.address, index=1)
    court.play(court.contest(second), honest, lying(honest, Op.Q))
    boa.env.time_travel(seconds=court.value("contest_window") + 1)
    refuses("court: an earlier accusation is open", lambda: court.end(second, batch.values()))
    assert court.end(first, batch.values()) and court.network.log.status(batch.id) == CONVICTED
    stake = court.network.stake_of(batch.node)
    assert not court.end(second, batch.values()) and court.status(second) == STOOD
    assert court.network.stake_of(batch.node) == stake
    with boa.reverts("log: batch is not pending"):
        court.accusations.commit(batch.values(), bytes(32), sender=PARTNER.address)
    assert ledger.changes() == ledger.conviction(contester=-CONTEST_BOND, partner=QUARTER, burned=QUARTER)


def test_convicted_by_another_judge_meanwhile(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger
) -> None:
    """A node that loses in the court has a friend convict it of something cheaper first. There is nothing cheaper: the
    same lock is taken, the accuser has its bond back."""
    id = court.accuse(committed, honest)
    log, offences = court.network.log, court.network.offences.address
    log.convict(committed.batch.values(), PARTNER.address, bytes(32), bytes(32), sender=offences)
    assert not court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction("partner")


def test_copied_accusation(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Three copies: the commitment out of the mempool and in front of it, the reveal in front of the accuser's, the claim
    after the reveal. A commitment names its accuser; a reveal is the accuser's whoever sends it; and what is committed
    after the reveal is later in the order. The copies gain nothing, and the first burns its bond."""
    batch, claim = committed.batch, court.claim(committed, honest)
    stolen = court.commitment(claim, ACCUSER.address)
    in_front = int(court.accusations.commit(batch.values(), stolen, sender=PARTNER.address))
    id = court.commit(batch, claim)
    wrong = "court: not what was committed"
    refuses(wrong, lambda: court.open(in_front, batch.values(), claim, SALT))
    with boa.env.prank(PARTNER.address):
        court.reveal(id, batch, claim)
    assert court.accusations.accuser_of(id) == ACCUSER.address
    refuses("court: not a committed accusation", lambda: court.open(id, batch.values(), claim, SALT))
    after = court.commit(batch, claim, PARTNER.address)
    court.reveal(after, batch, claim)
    boa.env.time_travel(seconds=court.value("contest_window") + 1)
    for waiting in (id, after):
        refuses("court: an earlier accusation is open", lambda waiting=waiting: court.end(waiting, batch.values()))
    court.accusations.expire(in_front, batch.values())
    refuses("court: an earlier accusation is open", lambda: court.end(after, batch.values()))
    assert court.end(id, batch.values()) and not court.end(after, batch.values())
    assert ledger.changes() == ledger.conviction(partner=-BOND, burned=BOND)


# Reorganisations


def test_reorg_swaps_the_batch(court: Court, honest: Telling) -> None:
    """The batch that was accused is gone and another node's has its number: commitment, reveal, contest, resolution and
    expiry all bring the batch or the terms, and refuse."""
    one, two = (Server.start(court.network, label) for label in ("first node", "second node"))
    with boa.env.anchor():
        seen = one.commit([court.answer(one)])
        claim = court.claim(seen, honest)
        id = court.accuse(seen, honest)
        terms = court.terms[id]
    actual = two.commit([court.answer(two)])
    assert actual.batch.id == seen.batch.id and actual.batch.node != seen.batch.node
    ledger = Ledger(court, actual)
    with boa.reverts("log: batch is not pending"):
        court.commit(seen.batch, claim)
    for call in (
        lambda: court.open(id, seen.batch.values(), claim),
        lambda: court.contests.contest_trace(id, terms, False, sender=CONTESTER.address),
        lambda: court.accusations.resolve(id, terms, seen.batch.values()),
        lambda: court.accusations.expire(id, seen.batch.values()),
    ):
        with boa.reverts():
            call()
    assert ledger.changes() == {} and court.network.log.status(actual.batch.id) == PENDING


def test_reorg_swaps_the_accusation(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """An honest contester is about to win; in the reorganisation the liar brings another trace under the same number. What
    the contester sent names the terms or is proven under a node: none of it is a move in the other game, and nothing of
    it can lose. It contests anew, and wins."""
    first, second = lying(honest, Op.GATE), lying(honest, Op.OUTPUT)
    sent: list[Any] = []
    with boa.env.anchor():
        id = court.accuse(committed, first)
        terms, contest = court.terms[id], court.contest(id)
        while court.is_open(contest):
            if court.contests.contest_info(contest).revealed_at == 0:
                court.answer_for(contest, first)
                continue
            court.move(contest, first, honest)
            sent.append(court.contests._computation.msg.data)
        assert court.status(id) == LOST
    assert court.accuse(committed, second) == id and court.terms[id] != terms
    assert court.contest(id) == contest
    court.answer_for(contest, second)
    before = court.contests.contest_info(contest)
    refuses("court: not the accusation's terms", lambda: court.contests.contest_trace(id, terms, False))
    for data in sent:
        done = boa.env.execute_code(court.contests.address, sender=CONTESTER.address, data=data)
        assert done.is_error
    assert court.contests.contest_info(contest) == before
    court.play(contest, second, honest)
    assert ledger.changes() == {"accuser": -BOND, "contester": HALF, "burned": BOND - HALF}


@pytest.mark.parametrize("swapped", ["cell", "accusation"])
def test_reorg_puts_an_answer_under_another_cell(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger, swapped: str
) -> None:
    """An honest accuser opens the cell that its contester named, and then the block in which it was named is replaced:
    the contester names another cell, or opens the same in another accusation. Nothing proves the top of a cell's tree,
    so the accuser's old answer would be a lie there, and lose a true accusation. It says which cell of which accusation
    it answers, and is no move in any other."""
    named, other = lying(honest, Op.GATE), lying(honest, Op.UP if swapped == "cell" else Op.GATE)
    id = court.accuse(committed, honest)
    contest = court.contest(id, PARTNER.address)

    def to_the_cell(lie: Telling) -> int:
        while not court.contests.contest_info(contest).cell:
            if court.contests.contest_info(contest).revealed_at == 0:
                court.answer_for(contest, honest)
            else:
                court.move(contest, honest, lie)
        return int(court.contests.contest_info(contest).cell)

    with boa.env.anchor():
        cell = to_the_cell(named)
        asked = asked_cell(court.accusations.terms_hash(id), cell)
        shown = b"".join(honest.open(cell))
        court.contests.reveal_leaves(contest, asked, shown, sender=ACCUSER.address)
    if swapped == "accusation":
        # The same cell, of an accusation that was opened a little later: other terms.
        boa.env.time_travel(seconds=1)
        asked = asked_cell(court.accusations.terms_hash(court.accuse(committed, honest, index=1)), cell)
    assert (to_the_cell(other) == cell) == (swapped == "accusation")
    before = court.contests.contest_info(contest)
    with boa.reverts("court: another cell is asked for"):
        court.contests.reveal_leaves(contest, asked, shown, sender=ACCUSER.address)
    assert court.contests.contest_info(contest) == before
    court.play(contest, honest, other)
    assert court.status(id) == ACCUSED and court.resolve(id, committed.batch)
    expected = ledger.conviction(accuser=QUARTER, partner=-CONTEST_BOND, burned=QUARTER)
    if swapped == "accusation":
        expected |= {"accuser": expected["accuser"] - BOND, "held": BOND}
    assert ledger.changes() == expected


def test_node_key_is_no_other_nodes(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """A free contest belongs to the accused node: who registers another node to contest without bonds is refused."""
    Server.start(court.network, "free rider")
    id = court.accuse(committed, honest)
    for who in (account("free rider"), account("free rider operator"), account(f"{NODE} payout")):
        with boa.reverts("court: sender is neither operator nor key of the node"):
            court.contest(id, who.address, free=True)
    assert court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction()
