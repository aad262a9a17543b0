"""Incidents of other payment systems, by name, tried on ours.

Sources are audits and post-mortems of Livepeer's tickets, The Graph's receipts and escrow, EIP-3009 deposits.
"""

from __future__ import annotations

from typing import Any

import boa
import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import Voucher
from tests.contracts import system
from tests.contracts.network import Network, Server, voucher_for
from tests.contracts.system import OWNER, POIP, account

CLIENT = account("client")
ATTACKER = account("attacker")
REASON = bytes(32)


@pytest.fixture
def funded(network: Network, server: Server) -> Server:
    network.deposit(CLIENT.address, server.node, POIP)
    return server


def test_force_cancel_unlock_by_third_party(network: Network, funded: Server) -> None:
    """Livepeer 2023: funding somebody else's deposit cancelled its unlock. Ours changes no thaw, not by one second."""
    network.vault.thaw(funded.node, POIP, sender=CLIENT.address)
    before = network.vault.escrow(CLIENT.address, funded.node)
    network.give(ATTACKER.address, 2, network.vault)
    boa.env.time_travel(seconds=10)
    network.vault.deposit(CLIENT.address, funded.node, 1, sender=ATTACKER.address)
    assert network.vault.escrow(CLIENT.address, funded.node) == (before[0] + 1, before[1], before[2])
    with boa.reverts("vault: zero amount"):
        network.vault.deposit(CLIENT.address, funded.node, 0, sender=ATTACKER.address)
    for call in (network.vault.cancel_thaw, network.vault.withdraw):
        with boa.reverts("vault: nothing is thawing"):
            call(funded.node, sender=ATTACKER.address)
    boa.env.time_travel(seconds=network.value("thaw_period"))
    assert network.vault.withdraw(funded.node, sender=CLIENT.address) == POIP


def test_dust_top_up_burns_voucher(network: Network, server: Server) -> None:
    """Livepeer 2026: with one wei of deposit a winning ticket paid one wei and was used up. Ours pays the rest later."""
    committed = server.serve_and_commit(CLIENT)
    voucher = voucher_for(network, CLIENT, committed.answers[-1].receipt)
    network.give(ATTACKER.address, 1, network.vault)
    network.vault.deposit(CLIENT.address, server.node, 1, sender=ATTACKER.address)
    assert server.collect(*voucher, committed) == 1
    network.deposit(CLIENT.address, server.node, POIP)
    assert server.collect(*voucher, committed) == committed.batch.total_fee - 1


def test_partial_payout_consumes_voucher(network: Network, server: Server) -> None:
    """Livepeer 2026: the check and the payment used different quantities. Ours pays what it checked and records that."""
    first, second = server.serve_and_commit(CLIENT), server.serve_and_commit(CLIENT)
    voucher = voucher_for(network, CLIENT, second.answers[-1].receipt)
    paid = 0
    for step in (1, 10**15, POIP):
        network.deposit(CLIENT.address, server.node, step)
        for committed in (first, second):
            done = network.vault.settled(CLIENT.address, server.node) >= committed.answers[-1].receipt.payer_cum
            if not done and network.vault.escrow(CLIENT.address, server.node)[0]:
                paid += server.collect(*voucher, committed)
                break
    paid += server.collect(*voucher, second)
    assert paid == first.batch.total_fee + second.batch.total_fee
    assert network.vault.settled(CLIENT.address, server.node) == paid


def test_rav_twice_after_signer_change(network: Network, funded: Server) -> None:
    """The Graph TRST-M-10: a receipt was paid again after its signer was authorised for another payer. Our payer is the
    signer itself, and what was paid is remembered by payer and node: no other signature opens it again."""
    committed = funded.serve_and_commit(CLIENT)
    receipt = committed.answers[-1].receipt
    voucher, signature = voucher_for(network, CLIENT, receipt)
    funded.collect(voucher, signature, committed)
    other = account("other payer")
    network.deposit(other.address, funded.node, POIP)
    for forged in (voucher.replace(payer=other.address), voucher):
        for signer in (CLIENT, other):
            with boa.reverts():
                funded.collect(forged, system.sign(network.vault, forged, signer), committed)
    assert network.vault.available(other.address, funded.node) == POIP


def test_rav_foreign_service_drains_escrow(network: Network, funded: Server) -> None:
    """The Graph TRST-H-1: an attacker's own service collected a payer's escrow. A voucher is good for its node alone."""
    thief = Server.start(network, "thief")
    stolen = thief.serve_and_commit(CLIENT)
    honest = funded.serve_and_commit(CLIENT)
    voucher, signature = voucher_for(network, CLIENT, honest.answers[-1].receipt)
    with boa.reverts("vault: not the voucher's node"):
        thief.collect(voucher, signature, stolen)
    with boa.reverts("vault: voucher is not signed by its payer"):
        thief.collect(voucher.replace(node=thief.node), signature, stolen)
    with boa.reverts("vault: caller is not the node's"):
        funded.collect(voucher, signature, honest, sender=thief.operator)
    mixed = thief.commit([honest.answers[0]])
    with boa.reverts("vault: not the voucher's node"):
        thief.collect(voucher, signature, mixed)
    assert network.vault.available(CLIENT.address, funded.node) == POIP


@settings(max_examples=20)
@given(name=st.sampled_from(list(Voucher.ABI)), delta=st.integers(1, 2**64))
def test_unsigned_field_tampered(network: Network, name: str, delta: int) -> None:
    """The Graph H-08: a field of the voucher was not covered by the signature. Every field of ours is."""
    with boa.env.anchor():
        funded = Server.start(network)
        network.deposit(CLIENT.address, funded.node, POIP)
        committed = funded.serve_and_commit(CLIENT)
        voucher, signature = voucher_for(network, CLIENT, committed.answers[-1].receipt)
        value: Any = getattr(voucher, name)
        changed: Any = value + delta if isinstance(value, int) else keccak(encode(["uint256"], [delta]))
        if Voucher.ABI[name] == "address":
            changed = "0x" + changed[:20].hex()
        with boa.reverts():
            funded.collect(voucher.replace(**{name: changed}), signature, committed)
        assert network.vault.settled(CLIENT.address, funded.node) == 0


def test_voucher_replayed_on_another_chain_or_vault(network: Network, funded: Server) -> None:
    """A signature is good on one chain, for one vault."""
    committed = funded.serve_and_commit(CLIENT)
    voucher, _ = voucher_for(network, CLIENT, committed.answers[-1].receipt)
    chain = boa.env.evm.patch.chain_id
    for domain in (Domain(chain + 1, network.vault.address), Domain(chain, network.log.address)):
        with boa.reverts("vault: voucher is not signed by its payer"):
            funded.collect(voucher, voucher.sign(domain, CLIENT.key), committed)


def test_client_makes_the_node_skip_an_interval(network: Network, funded: Server) -> None:
    """What lies below a collected interval is given up. So nobody but the node decides the order of its collections."""
    first, second = funded.serve_and_commit(CLIENT), funded.serve_and_commit(CLIENT)
    voucher = voucher_for(network, CLIENT, second.answers[-1].receipt)
    for sender in (CLIENT.address, ATTACKER.address):
        with boa.reverts("vault: caller is not the node's"):
            funded.collect(*voucher, second, sender=sender)
    total = funded.collect(*voucher, first) + funded.collect(*voucher, second)
    assert total == first.batch.total_fee + second.batch.total_fee


def test_3009_frontrun_transfer(network: Network, server: Server) -> None:
    """EIP-3009: a watcher who takes the signature out of the mempool can neither move the tokens past the vault nor
    deposit them with another node."""
    token, thief = network.token, Server.start(network, "thief")
    token.transfer(CLIENT.address, 100, sender=OWNER.address)
    salt, before = b"\x07" * 32, system.now() + 60
    nonce = keccak(encode(["address", "bytes32"], [server.node, salt]))
    type_hash = keccak(
        b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
        b"bytes32 nonce)"
    )
    struct = keccak(
        encode(
            ["bytes32", "address", "address", "uint256", "uint256", "uint256", "bytes32"],
            [type_hash, CLIENT.address, network.vault.address, 100, 0, before, nonce],
        )
    )
    signed = CLIENT.key.sign_msg_hash(keccak(b"\x19\x01" + token.DOMAIN_SEPARATOR() + struct))
    vrs = (27 + signed.v, signed.to_bytes()[:32], signed.to_bytes()[32:64])
    arguments = (CLIENT.address, network.vault.address, 100, 0, before, nonce, *vrs)
    for call in (token.receiveWithAuthorization, token.transferWithAuthorization):
        with boa.reverts():
            call(*arguments, sender=ATTACKER.address)
    with boa.reverts():
        network.vault.deposit_with_authorization(
            CLIENT.address, thief.node, 100, 0, before, salt, *vrs, sender=thief.operator
        )
    network.vault.deposit_with_authorization(CLIENT.address, server.node, 100, 0, before, salt, *vrs)
    assert network.vault.available(CLIENT.address, server.node) == 100


def test_thaw_then_work(network: Network, funded: Server) -> None:
    """The Graph M-04: a payer thaws, is served, and withdraws first. The thaw outlasts every window, what thaws can be
    collected, and `available` shows the node what is left."""
    assert network.value("thaw_period") >= network.value("challenge_window") + network.value("response_window")
    network.vault.thaw(funded.node, POIP, sender=CLIENT.address)
    assert network.vault.available(CLIENT.address, funded.node) == 0
    committed = funded.serve_and_commit(CLIENT)
    boa.env.time_travel(seconds=network.value("thaw_period"))
    paid = funded.collect(*voucher_for(network, CLIENT, committed.answers[-1].receipt), committed)
    assert network.vault.withdraw(funded.node, sender=CLIENT.address) == POIP - paid


def test_bot_frontrun_is_success(network: Network, funded: Server) -> None:
    """Trail of Bits on BoLD: whatever anyone may do, somebody may have done already. Finality repeats harmlessly, and
    the money goes to the same place whoever sends the transaction."""
    committed = funded.serve_and_commit(CLIENT)
    funded.collect(*voucher_for(network, CLIENT, committed.answers[-1].receipt), committed)
    network.finalize(committed.batch)
    network.log.finalize([committed.batch.values()], sender=funded.operator)
    network.vault.settle(committed.batch.values(), CLIENT.address, sender=ATTACKER.address)
    network.vault.withdraw_earnings(funded.node, sender=ATTACKER.address)
    assert network.token.balanceOf(ATTACKER.address) == 0
    assert network.token.balanceOf(account("node payout").address) > 0


def test_parameter_change_is_not_retroactive(network: Network, funded: Server) -> None:
    """Fees and windows of what is under way are those of when it began."""
    committed = funded.serve_and_commit(CLIENT)
    total = funded.collect(*voucher_for(network, CLIENT, committed.answers[-1].receipt), committed)
    fee = network.value("protocol_fee")
    network.set_value("protocol_fee", 200_000)
    network.set_value("challenge_window", 5)
    with boa.reverts("log: window is still open"):
        network.log.finalize([committed.batch.values()])
    network.finalize(committed.batch)
    network.vault.settle(committed.batch.values(), CLIENT.address)
    assert network.vault.earned(funded.node) == total - total * fee // 10**6


def test_refund_is_paid_once(network: Network, funded: Server) -> None:
    """A convicted batch gives back what it drew, once, and draws no more."""
    committed = funded.serve_and_commit(CLIENT)
    voucher = voucher_for(network, CLIENT, committed.answers[-1].receipt)
    funded.collect(*voucher, committed, 0, 0)
    network.log.convict(committed.batch.values(), ATTACKER.address, REASON, REASON, sender=network.offences.address)
    with boa.reverts("vault: batch is neither pending nor final"):
        funded.collect(*voucher, committed)
    network.vault.settle(committed.batch.values(), CLIENT.address)
    with boa.reverts("vault: bucket is empty"):
        network.vault.settle(committed.batch.values(), CLIENT.address)
    assert network.vault.available(CLIENT.address, funded.node) == POIP == network.vault.total_held()
