"""Attacks on what a batch states and on a node's ability to commit what it signed."""

from __future__ import annotations

from typing import Any

import boa
import pytest

from tests.contracts.network import CONVICTED, Committed, Network, Server, voucher_for
from tests.contracts.system import POIP, account

CLIENT = account("client")
SYBIL = account("sybil")
ATTACKER = account("attacker").address
FREE = {"input_price": 0, "output_price": 0}


def understated(network: Network, server: Server) -> Committed:
    """A batch that states no fees, with a receipt of 50 POIP between two free ones."""
    network.deposit(CLIENT.address, server.node, 60 * POIP)
    first = server.serve(SYBIL, request_changes=FREE)
    paid = server.serve(CLIENT, 1, prompt_tokens=1, request_changes={"input_price": 0, "output_price": 50 * POIP})
    last = server.serve(SYBIL, request_changes=FREE).with_receipt(node_cum=0)
    return server.commit([first, paid, last], total_fee=0)


def test_understated_total_is_not_paid_out(network: Network) -> None:
    """The stake lock follows total_fee; without the bound, 50 POIP went out behind the smallest lock."""
    server = Server.start(network, stake=100 * POIP)
    committed = understated(network, server)
    voucher, signature = voucher_for(network, CLIENT, committed.answers[1].receipt)
    with boa.reverts("vault: above the batch's total"):
        server.collect(voucher, signature, committed, 1, 1)
    assert network.vault.collected(committed.batch.id) == 0
    assert network.vault.available(CLIENT.address, server.node) == 60 * POIP


def test_batch_pays_its_total_and_no_more(network: Network) -> None:
    """Two payers' fees come to more than the batch states: the first is collected, the second is refused."""
    server = Server.start(network)
    for payer in (CLIENT, SYBIL):
        network.deposit(payer.address, server.node, 60 * POIP)
    a, b = server.serve(CLIENT), server.serve(SYBIL)
    committed = server.commit([a, b], total_fee=a.receipt.fee + b.receipt.fee - 1)
    assert server.collect(*voucher_for(network, CLIENT, a.receipt), committed, 0, 0) == a.receipt.fee
    assert network.vault.collected(committed.batch.id) == a.receipt.fee
    with boa.reverts("vault: above the batch's total"):
        server.collect(*voucher_for(network, SYBIL, b.receipt), committed, 1, 1)


def test_understated_total_is_a_fault_at_every_place(network: Network) -> None:
    """The client of a receipt in the middle convicts with its own receipt alone."""
    server = Server.start(network, stake=100 * POIP)
    committed = understated(network, server)
    accusation = committed.accuse(1)
    network.offences.prove_sequence(*accusation, *accusation, sender=CLIENT.address)
    assert network.log.status(committed.batch.id) == CONVICTED


def demanded(network: Network, server: Server) -> tuple[Any, int]:
    """An honest receipt that the attacker demands the commitment of."""
    network.give(ATTACKER, 10 * POIP, network.availability)
    answer = server.serve(CLIENT)
    receipt, evidence = server.signed(answer.receipt)
    return answer, int(network.availability.demand_commit(receipt, evidence[3], sender=ATTACKER))


@pytest.mark.parametrize("cause", ["jail", "minimum stake"])
def test_demand_to_a_node_kept_from_service_is_no_second_slash(network: Network, cause: str) -> None:
    """A jail or a raised minimum stops new service, not the commitment of what was signed before."""
    server = Server.start(network, stake=1000 * POIP)
    if cause == "jail":
        bad = server.serve(CLIENT, receipt_changes={"fee": 1})
        committed = server.commit([bad])
        answer, demand = demanded(network, server)
        network.offences.prove_receipt(
            bad.receipt.values(), committed.evidence(0), bad.request.values(), bad.params.values(), sender=ATTACKER
        )
    else:
        answer, demand = demanded(network, server)
        network.set_value("minimum_stake", 2000 * POIP)
    assert not network.registry.is_active(server.node)
    stake = network.stake_of(server.node)
    server.commit([answer])
    boa.env.time_travel(seconds=network.value("response_window") + 1)
    assert not network.availability.resolve_demand(demand)
    assert network.stake_of(server.node) == stake
