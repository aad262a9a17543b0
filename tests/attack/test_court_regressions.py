"""Incidents of other dispute systems, by name, tried on the court. Offences, challenges: test_dispute_regressions.py."""

from __future__ import annotations

import boa
import pytest

from poip_chain.spec.trace import Op
from tests.attack.court_ledger import BOND, CONTEST_BOND, PARTNER, Ledger
from tests.contracts.court import ACCUSER, CONTESTER, LOST, NODE, Court
from tests.contracts.network import CONVICTED, Committed
from tests.contracts.system import OWNER, account, refuses
from tests.support.tellings import Telling

pytestmark = pytest.mark.slow

HALF, QUARTER = BOND // 2, CONTEST_BOND // 2

RELAY = """
# pragma version 0.4.3
# pragma evm-version cancun
interface Court:
    def commit(batch: Batch, commitment: bytes32) -> uint256: nonpayable
    def claim() -> uint256: nonpayable

interface Token:
    def approve(spender: address, amount: uint256) -> bool: nonpayable

struct Batch:
    id: uint64
    node: address
    model_id: bytes32
    profile_version: uint32
    root: bytes32
    first_seq: uint64
    count: uint32
    total_fee: uint192
    node_cum: uint192
    lock: uint256
    audit_rate_ppm: uint32
    parameters_version: uint32
    block_number: uint64
    committed_at: uint64
    window_end: uint64

@external
def commit(court: address, token: address, batch: Batch, commitment: bytes32) -> uint256:
    extcall Token(token).approve(court, max_value(uint256))
    return extcall Court(court).commit(batch, commitment)

@external
def claim(court: address) -> uint256:
    return extcall Court(court).claim()
"""


def lying(telling: Telling, op: Op) -> Telling:
    """One element off."""
    leaf = telling.layout.tensor(op, 1).start
    return Telling(telling.story, {leaf: telling.changed(leaf, 1)})


def test_tx_origin_bond_theft(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Optimism M-3: the bond was credited to tx.origin. Bond and reward belong to the contract that committed."""
    relay = boa.loads(RELAY)
    court.players.add(relay.address)
    token, batch = court.network.token, committed.batch
    token.transfer(relay, BOND, sender=OWNER.address)
    claim = court.claim(committed, honest)
    promised = court.commitment(claim, relay.address)
    id = relay.commit(court.accusations, token, batch.values(), promised, sender=PARTNER.address)
    assert court.accusations.accuser_of(id) == relay.address
    court.reveal(id, batch, claim)
    assert court.resolve(id, batch)
    refuses("court: nothing to claim", lambda: court.accusations.claim(sender=PARTNER.address))
    assert relay.claim(court.accusations, sender=PARTNER.address) == BOND == token.balanceOf(relay)
    assert court.network.registry.rewards(relay) == ledger.reward
    assert court.network.registry.rewards(PARTNER.address) == 0


def test_bond_withdraw_more_than_own(court: Court, committed: Committed, honest: Telling) -> None:
    """Taiko 2025: a bond's owner withdrew more than it had. A credit is paid once; what others have in the court, and what
    is to be burned, stays there."""
    false = lying(honest, Op.GATE)
    lost = court.accuse(committed, false)
    court.accuse(committed, honest, PARTNER.address)
    court.play(court.contest(lost), false, honest)
    assert court.accusations.claim(sender=CONTESTER.address) == CONTEST_BOND + HALF
    for who in (CONTESTER, ACCUSER, PARTNER):
        refuses("court: nothing to claim", lambda who=who: court.accusations.claim(sender=who.address))
    held = court.accusations.total_held()
    assert held == court.network.token.balanceOf(court.accusations) == BOND + BOND - HALF
    assert court.accusations.burn() == BOND - HALF
    refuses("court: nothing to burn", court.accusations.burn)
    assert court.network.token.balanceOf(court.accusations) == BOND


def test_action_after_parent_resolved(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Optimism 5.2.1: a move was possible after the game was over. A contest that is open when its accusation is lost can
    be played on; whatever comes of it, its bond goes back and nothing else moves."""
    false = lying(honest, Op.HIDDEN)
    id = court.accuse(committed, false)
    one, won, lost = court.contest(id), court.contest(id, PARTNER.address), court.contest(id, PARTNER.address)
    court.play(one, false, honest)
    over = ledger.changes()
    assert court.status(id) == LOST and over["held"] == 2 * CONTEST_BOND
    court.play(won, false, honest)
    court.play(lost, false, lying(honest, Op.EMBED))
    refuses("court: not an open accusation", lambda: court.contest(id))
    refuses("court: not an open accusation", lambda: court.end(id, committed.batch.values()))
    assert ledger.changes() == {"accuser": -BOND, "contester": HALF, "burned": BOND - HALF}


def test_special_challenge_steals_bond(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """Optimism 5.2.2: a challenge of another kind took the bond. Contests of points and of the trace, with and without a
    bond, each move their own and no other's."""
    id = court.accuse(committed, honest)
    node = committed.batch.node
    trace, point, free = court.contest(id), court.contest(id, PARTNER.address, point=1), court.contest(id, node, True)
    court.play(point, honest, honest)
    assert ledger.changes() == {
        "accuser": -BOND,
        "contester": -CONTEST_BOND,
        "partner": -CONTEST_BOND,
        "held": 4 * HALF,
    }
    court.play(free, honest, lying(honest, Op.Q))
    court.play(trace, honest, lying(honest, Op.UP))
    assert court.resolve(id, committed.batch)
    expected = ledger.conviction(
        accuser=2 * QUARTER, contester=-CONTEST_BOND, partner=-CONTEST_BOND, burned=2 * (CONTEST_BOND - QUARTER)
    )
    assert ledger.changes() == expected


def test_both_attestations_wrong(court: Court, committed: Committed, honest: Telling, ledger: Ledger) -> None:
    """The Graph TRST-M-8: both sides may be wrong. A false accusation and a false contest of it: the first false cell that
    is named decides, and where the contester names none that is false, its bond is lost and the accusation still open to
    others."""
    false = lying(honest, Op.OUTPUT)
    id = court.accuse(committed, false)
    court.play(court.contest(id, PARTNER.address), false, lying(honest, Op.K))
    court.play(court.contest(id), false, honest)
    assert court.status(id) == LOST
    assert ledger.changes() == {
        "accuser": QUARTER - BOND,
        "partner": -CONTEST_BOND,
        "contester": HALF,
        "burned": BOND - HALF + CONTEST_BOND - QUARTER,
    }


@pytest.mark.parametrize("state", ["without stake", "leaving", "jailed", "paused"])
def test_slash_reverts_by_state_of_the_node(
    court: Court, committed: Committed, honest: Telling, ledger: Ledger, state: str
) -> None:
    """The Graph H-02, CR-01: the accused brought itself into a state in which it could not be slashed. A conviction takes
    what is there and comes through."""
    registry, node = court.network.registry, committed.batch.node
    judge, operator = court.network.availability.address, account(f"{NODE} operator").address
    id = court.accuse(committed, honest)
    if state == "without stake":
        registry.slash(node, 10**40, PARTNER.address, 0, bytes(32), bytes(32), sender=judge)
    elif state == "jailed":
        registry.slash(node, 1, PARTNER.address, 0, bytes(32), bytes(32), sender=judge)
    elif state == "leaving":
        registry.unbond(node, registry.free_stake(node), sender=operator)
        with boa.reverts():
            registry.deregister(node, sender=operator)
    else:
        registry.pause_intake(14 * 86400, sender=OWNER.address)
    before = Ledger(court, committed).before["stake"]
    assert court.resolve(id, committed.batch)
    assert court.network.log.status(committed.batch.id) == CONVICTED
    taken = 0 if state == "without stake" else ledger.lock
    assert before - court.network.stake_of(node) == taken
    assert court.network.registry.rewards(ACCUSER.address) == taken * court.value("reward_share") // 10**6
