"""Incidents of other dispute systems, by name, tried on our offences, availability challenges and conviction.

Sources are audits and post-mortems of The Graph, Arbitrum BoLD, Optimism's dispute games and Taiko's bonds.
"""

from __future__ import annotations

from typing import Any

import boa
import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.spec.objects import Part
from poip_chain.spec.offences import Fault
from tests.contracts import system
from tests.contracts.network import CONVICTED, PENDING, Answer, Committed, Network, Server, chunk_arguments
from tests.contracts.system import OWNER, POIP, account

CLIENT = account("client")
ATTACKER = account("attacker").address
HONEST = account("honest challenger").address
FULL = b"\xff" * 32

RELAY = """
# pragma version 0.4.3
# pragma evm-version cancun
interface Availability:
    def challenge(batch: Batch, draw: uint256, part: uint256, first_leaf: uint256) -> uint256: nonpayable
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
def challenge(availability: address, token: address, batch: Batch) -> uint256:
    extcall Token(token).approve(availability, max_value(uint256))
    return extcall Availability(availability).challenge(batch, 0, 1, 0)

@external
def claim(availability: address) -> uint256:
    return extcall Availability(availability).claim()
"""


@pytest.fixture
def audited(network: Network) -> Network:
    """Every draw count is full; attacker and honest challenger can pay bonds."""
    network.set_value("audit_rate", 10**6)
    for who in (ATTACKER, HONEST):
        network.give(who, 1000 * POIP, network.availability)
    return network


def challenge(
    network: Network,
    committed: Committed,
    sender: str,
    part: Part = Part.OUTPUT,
    first_leaf: int = 0,
    draw: int = 0,
) -> int:
    if network.log.beacon_of(committed.batch.values()) == bytes(32):
        network.submit_beacon(committed.batch)
    batch = committed.batch.values()
    return int(network.availability.challenge(batch, draw, int(part), first_leaf, sender=sender))


def answer(network: Network, committed: Committed, challenge_id: int) -> None:
    asked = network.availability.challenge_info(challenge_id)
    given: Answer = committed.answers[asked.index]
    network.availability.answer(
        challenge_id,
        committed.batch.values(),
        given.receipt.values(),
        committed.proof(asked.index),
        given.request.values(),
        given.params.values(),
        given.roots().values(),
        *chunk_arguments(given, Part(asked.part), asked.first_leaf),
    )


def prove_fee(network: Network, committed: Committed, index: int = 0, sender: str = HONEST) -> int:
    bad = committed.answers[index]
    return int(
        network.offences.prove_receipt(
            bad.receipt.values(),
            committed.evidence(index),
            bad.request.values(),
            bad.params.values(),
            sender=sender,
        )
    )


def test_same_evidence_second_time(network: Network, server: Server) -> None:
    """One piece of evidence is paid for once, whoever brings it again and in whatever wrapping."""
    committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
    prove_fee(network, committed)
    stake, reward = network.stake_of(server.node), network.registry.rewards(HONEST)
    for sender in (HONEST, ATTACKER):
        with boa.reverts():
            prove_fee(network, committed, sender=sender)
    bad = committed.answers[0]
    with boa.reverts():
        network.offences.prove_receipt(
            bad.receipt.values(),
            server.signed(bad.receipt)[1],
            bad.request.values(),
            bad.params.values(),
            sender=ATTACKER,
        )
    assert (network.stake_of(server.node), network.registry.rewards(HONEST)) == (stake, reward)
    assert network.registry.rewards(ATTACKER) == 0


def test_both_attestations_wrong(network: Network, server: Server) -> None:
    """The Graph TRST-M-8: of two conflicting attestations, both may be wrong. Each order convicts one batch."""
    a = server.serve(CLIENT)
    b = a.with_receipt(transcript_root=FULL, seq=1)
    first, second = server.commit([a]), server.commit([b])
    network.offences.prove_equivocation(*first.accuse(0), *second.accuse(0), sender=HONEST)
    network.offences.prove_equivocation(*second.accuse(0), *first.accuse(0), sender=HONEST)
    assert {network.log.status(c.batch.id) for c in (first, second)} == {CONVICTED}


def test_pause_does_not_block_slash(network: Network, server: Server) -> None:
    """The Graph CR-01: pausing the service blocked slashing. Paused intake, a deprecated model and a node that left
    block no conviction, no answer and no payout."""
    committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
    network.registry.pause_intake(14 * 86400, sender=OWNER.address)
    network.models.deprecate(network.model_id, system.now() + 1, sender=OWNER.address)
    boa.env.time_travel(seconds=10)
    assert prove_fee(network, committed) == Fault.FEE
    assert network.log.status(committed.batch.id) == CONVICTED


def test_slash_reverts_by_state_of_the_node(network: Network, server: Server) -> None:
    """The Graph H-02, H-05, M-05: values chosen by the accused made its slash revert. Whatever state ours is in
    (jailed, unbonding, without stake), the conviction goes through."""
    batches = [server.commit([server.serve(CLIENT, receipt_changes={"fee": i})]) for i in range(4)]
    free = network.registry.free_stake(server.node)
    network.registry.unbond(server.node, free, sender=server.operator)
    for committed in batches[:2]:
        assert prove_fee(network, committed) == Fault.FEE
    network.registry.slash(server.node, 10**40, ATTACKER, 10**40, bytes(32), FULL, sender=network.offences.address)
    assert network.stake_of(server.node) == 0
    for committed in batches[2:]:
        assert prove_fee(network, committed) == Fault.FEE
        assert network.log.status(committed.batch.id) == CONVICTED


def test_reorg_swaps_claim(audited: Network, server: Server) -> None:
    """Optimism M-4: after a reorg, another claim stood under the same index. Ours names the whole batch."""
    with boa.env.anchor():
        seen = server.serve_and_commit(CLIENT, 2)
    other = Server.start(audited, "other node")
    actual = other.serve_and_commit(CLIENT, 2)
    assert actual.batch.id == seen.batch.id
    audited.submit_beacon(actual.batch)
    calls: list[Any] = [
        lambda: audited.availability.challenge(seen.batch.values(), 0, 1, 0, sender=HONEST),
        lambda: audited.log.open_case(seen.batch.values(), sender=audited.availability.address),
        lambda: audited.log.convict(seen.batch.values(), HONEST, FULL, FULL, sender=audited.offences.address),
        lambda: audited.log.finalize([seen.batch.values()]),
        lambda: audited.vault.settle(seen.batch.values(), CLIENT.address),
    ]
    for call in calls:
        with boa.reverts():
            call()
    assert audited.log.status(actual.batch.id) == PENDING


def test_tx_origin_bond_theft(audited: Network, server: Server) -> None:
    """Optimism M-3: the bond was credited to tx.origin. Ours belongs to the contract that paid it."""
    relay = boa.loads(RELAY)
    audited.token.transfer(relay, POIP, sender=OWNER.address)
    committed = server.serve_and_commit(CLIENT)
    audited.submit_beacon(committed.batch)
    challenge_id = relay.challenge(audited.availability, audited.token, committed.batch.values(), sender=ATTACKER)
    assert audited.availability.challenge_info(challenge_id).challenger == relay.address
    boa.env.time_travel(seconds=audited.value("response_window") + 1)
    audited.availability.resolve(challenge_id, committed.batch.values(), sender=ATTACKER)
    with boa.reverts("availability: nothing to claim"):
        audited.availability.claim(sender=ATTACKER)
    assert audited.registry.rewards(ATTACKER) == 0
    assert relay.claim(audited.availability, sender=ATTACKER) == POIP
    assert audited.token.balanceOf(relay) == POIP


def test_self_challenge_refund(audited: Network, server: Server) -> None:
    """Nobody gains by accusing itself: what comes back as reward is less than what is taken."""
    committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
    before = audited.stake_of(server.node)
    prove_fee(audited, committed, sender=server.operator)
    lost = before - audited.stake_of(server.node)
    assert audited.registry.rewards(server.operator) * 2 <= lost == committed.batch.lock


def test_self_challenge_shields_nothing(audited: Network, server: Server) -> None:
    """A node that withholds one chunk cannot keep others from it: by challenging other chunks of the receipt, or past
    its end, it blocks only those; by challenging the chunk itself it must show it."""
    committed = server.serve_and_commit(CLIENT, 1, output_tokens=60)
    audited.submit_beacon(committed.batch)
    accomplice = ATTACKER
    for part, first_leaf in ((Part.PROMPT, 0), (Part.FINGERPRINT, 0), (Part.OUTPUT, 8), (Part.OUTPUT, 16)):
        answer(audited, committed, challenge(audited, committed, accomplice, part, first_leaf))
        challenge(audited, committed, accomplice, part, first_leaf + 80)
    wanted = challenge(audited, committed, HONEST, Part.OUTPUT, 0)
    boa.env.time_travel(seconds=audited.value("response_window") + 1)
    assert audited.availability.resolve(wanted, committed.batch.values())
    assert audited.log.status(committed.batch.id) == CONVICTED


def test_sibling_spam_bond_exhaustion(audited: Network, server: Server) -> None:
    """Spearbit 5.1.3: a rich attacker opened siblings until the honest side ran out of bonds. An honest node pays no
    bond to answer, is paid for each answer, and the attacker's money is gone; an honest challenger's one bond is
    enough, whatever else is open."""
    committed = server.serve_and_commit(CLIENT, 2, output_tokens=70)
    audited.submit_beacon(committed.batch)
    ids = [
        challenge(audited, committed, ATTACKER, part, first_leaf, draw)
        for draw in range(2)
        for part in Part
        for first_leaf in (0, 8)
        if not _challenged(audited, committed, part, first_leaf, draw)
    ]
    for challenge_id in ids:
        answer(audited, committed, challenge_id)
    payout = account("node payout").address
    assert audited.availability.credits(payout) == len(ids) * (POIP // 4)
    assert audited.availability.credits(ATTACKER) == len(ids) * (POIP - POIP // 4)
    audited.finalize(committed.batch)


def _challenged(network: Network, committed: Committed, part: Part, first_leaf: int, draw: int) -> bool:
    index = network.log.selected(committed.batch.values(), draw)
    chunk = keccak(encode(["uint256"] * 4, [committed.batch.id, index, int(part), first_leaf]))
    return bool(network.availability.challenge_of(chunk))


def test_bond_withdraw_more_than_own(audited: Network, server: Server) -> None:
    """Taiko 2025: a bond's owner withdrew more than it had. Credits are what came back, once."""
    committed = server.serve_and_commit(CLIENT, 1)
    first = challenge(audited, committed, ATTACKER, Part.PROMPT)
    challenge(audited, committed, HONEST, Part.OUTPUT)
    answer(audited, committed, first)
    owed = audited.availability.credits(ATTACKER)
    assert audited.availability.claim(sender=ATTACKER) == owed == POIP - POIP // 4
    with boa.reverts("availability: nothing to claim"):
        audited.availability.claim(sender=ATTACKER)
    held = audited.availability.total_held()
    assert held == audited.token.balanceOf(audited.availability) == POIP + POIP // 4


def test_action_after_parent_resolved(audited: Network, server: Server) -> None:
    """Optimism 5.2.1: a move was possible after the game was over."""
    committed = server.serve_and_commit(CLIENT, 1)
    opened = challenge(audited, committed, HONEST)
    audited.log.convict(committed.batch.values(), HONEST, FULL, FULL, sender=audited.offences.address)
    with boa.reverts("availability: batch cannot be convicted"):
        challenge(audited, committed, ATTACKER, Part.PROMPT)
    audited.availability.resolve(opened, committed.batch.values())
    with boa.reverts("availability: challenge is not open"):
        audited.availability.resolve(opened, committed.batch.values())
    with boa.reverts("availability: challenge is not open"):
        answer(audited, committed, opened)


def test_special_challenge_steals_bond(audited: Network, server: Server) -> None:
    """Optimism 5.2.2: another kind of challenge took the bond. A demand to commit and a challenge never share one."""
    uncommitted = server.serve(CLIENT)
    signature = system.sign(audited.log, uncommitted.receipt, server.key)
    demand = audited.availability.demand_commit(uncommitted.receipt.values(), signature, sender=HONEST)
    committed = server.commit([uncommitted])
    opened = challenge(audited, committed, ATTACKER)
    audited.availability.resolve_demand(demand, sender=ATTACKER)
    assert audited.availability.credits(HONEST) == POIP
    answer(audited, committed, opened)
    assert audited.availability.credits(HONEST) == POIP
    assert audited.availability.total_held() == 2 * POIP


def test_slasher_cannot_seize_by_a_new_judge(network: Network, server: Server) -> None:
    """Governance that turns hostile: everything staked when a judge is announced can leave before the judge acts."""
    committed = server.serve_and_commit(CLIENT)
    network.log.set_judge(ATTACKER, True, sender=OWNER.address)
    active = network.log.judge_active_from(ATTACKER)
    assert active >= system.now() + network.value("unbonding_period") + network.value("challenge_window")
    boa.env.time_travel(seconds=active - system.now())
    with boa.reverts("log: batch cannot be convicted"):
        network.log.convict(committed.batch.values(), ATTACKER, FULL, FULL, sender=ATTACKER)


def test_readd_allocation_immediately_slashable(network: Network, server: Server) -> None:
    """EigenLayer EGSL-10: what was removed and added again had power over old stake at once. A judge or slasher that
    comes back is a new one: nothing that was staked before it is in its reach before it could have left."""
    committed = server.serve_and_commit(CLIENT)
    offences = network.offences.address
    for allowed in (False, True):
        network.log.set_judge(offences, allowed, sender=OWNER.address)
        network.registry.set_slasher(offences, allowed, sender=OWNER.address)
    stake = network.stake_of(server.node)
    with boa.reverts("log: batch cannot be convicted"):
        network.log.convict(committed.batch.values(), ATTACKER, FULL, FULL, sender=offences)
    with boa.reverts("registry: slasher not active yet"):
        network.registry.slash(server.node, POIP, ATTACKER, POIP, FULL, FULL, sender=offences)
    assert network.registry.slasher_active_at(offences) == system.now() + 2 * network.value("unbonding_period")
    assert network.stake_of(server.node) == stake


def test_verifier_node_collusion_instant_exit(network: Network, server: Server) -> None:
    """The Graph L-18: node and verifier colluded to take stake out at once. A conviction burns at least half."""
    committed = server.commit([server.serve(CLIENT)], total_fee=1000 * POIP)
    supply = network.token.totalSupply()
    taken, paid = network.log.convict(
        committed.batch.values(), server.operator, FULL, FULL, sender=network.offences.address
    )
    assert paid * 2 <= taken
    assert network.token.totalSupply() == supply - (taken - paid)


def test_another_signature_of_one_receipt_is_no_equivocation(network: Network, server: Server) -> None:
    """Signatures are never compared: a second valid signature of the same receipt frames nobody."""
    receipt = server.serve(CLIENT).receipt
    one = server.signed(receipt)
    with boa.reverts("offences: the same receipt"):
        network.offences.prove_equivocation(*one, *one, sender=ATTACKER)
