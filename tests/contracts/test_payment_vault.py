"""The payment vault: escrow, thaws, vouchers, collection, settlement."""

from __future__ import annotations

from typing import Any

import boa
import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import FinishReason, Voucher
from tests.contracts import system
from tests.contracts.network import Committed, Network, Server, voucher_for
from tests.contracts.system import CONTRACTS, OWNER, POIP, account

CLIENT = account("client")
OTHER = account("other client")
STRANGER = account("stranger").address
REASON = (1).to_bytes(32, "big")


@pytest.fixture
def funded(network: Network, server: Server) -> Server:
    """A node with whom CLIENT has 10 POIP in escrow."""
    network.deposit(CLIENT.address, server.node, 10 * POIP)
    return server


def collect_all(server: Server, committed: Committed, **changes: Any) -> int:
    """Collect a one-client batch with the voucher for its last receipt."""
    return server.collect(*voucher_for(server.network, CLIENT, committed.answers[-1].receipt, **changes), committed)


def convict(network: Network, committed: Committed) -> None:
    network.log.convict(committed.batch.values(), STRANGER, REASON, bytes(32), sender=network.offences.address)


class TestDeposits:
    def test_for_oneself_and_for_others(self, network: Network, server: Server) -> None:
        network.deposit(CLIENT.address, server.node, 5)
        network.give(STRANGER, 7, network.vault)
        network.vault.deposit(CLIENT.address, server.node, 7, sender=STRANGER)
        assert network.vault.escrow(CLIENT.address, server.node) == (12, 0, 0)
        assert network.vault.total_held() == network.token.balanceOf(network.vault) == 12

    def test_refusals(self, network: Network, server: Server) -> None:
        network.give(CLIENT.address, 5, network.vault)
        with boa.reverts("vault: zero amount"):
            network.vault.deposit(CLIENT.address, server.node, 0, sender=CLIENT.address)
        with boa.reverts("vault: zero address"):
            network.vault.deposit("0x" + "00" * 20, server.node, 5, sender=CLIENT.address)
        with boa.reverts("vault: zero address"):
            network.vault.deposit(CLIENT.address, "0x" + "00" * 20, 5, sender=CLIENT.address)
        with boa.reverts():
            network.vault.deposit(CLIENT.address, server.node, 6, sender=CLIENT.address)

    def permit(self, network: Network, amount: int, deadline: int) -> tuple[int, bytes, bytes]:
        token = network.token
        type_hash = keccak(b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)")
        struct = keccak(
            encode(
                ["bytes32", "address", "address", "uint256", "uint256", "uint256"],
                [
                    type_hash,
                    CLIENT.address,
                    network.vault.address,
                    amount,
                    token.nonces(CLIENT.address),
                    deadline,
                ],
            )
        )
        signature = CLIENT.key.sign_msg_hash(keccak(b"\x19\x01" + token.DOMAIN_SEPARATOR() + struct))
        raw = signature.to_bytes()
        return 27 + signature.v, raw[:32], raw[32:64]

    def test_with_permit(self, network: Network, server: Server) -> None:
        network.token.transfer(CLIENT.address, 100, sender=OWNER.address)
        deadline = system.now() + 60
        signature = self.permit(network, 100, deadline)
        network.vault.deposit_with_permit(server.node, 100, deadline, *signature, sender=CLIENT.address)
        assert network.vault.available(CLIENT.address, server.node) == 100

    def test_a_permit_used_by_someone_else_is_no_error(self, network: Network, server: Server) -> None:
        network.token.transfer(CLIENT.address, 100, sender=OWNER.address)
        deadline = system.now() + 60
        signature = self.permit(network, 100, deadline)
        network.token.permit(CLIENT.address, network.vault, 100, deadline, *signature, sender=STRANGER)
        network.vault.deposit_with_permit(server.node, 100, deadline, *signature, sender=CLIENT.address)
        assert network.vault.available(CLIENT.address, server.node) == 100
        with boa.reverts("vault: permit is not valid"):
            network.vault.deposit_with_permit(server.node, 100, deadline, *signature, sender=CLIENT.address)

    def authorization(self, network: Network, node: str, amount: int, salt: bytes) -> tuple[Any, ...]:
        token = network.token
        nonce = keccak(encode(["address", "bytes32"], [node, salt]))
        type_hash = keccak(
            b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
            b"bytes32 nonce)"
        )
        before = system.now() + 60
        struct = keccak(
            encode(
                ["bytes32", "address", "address", "uint256", "uint256", "uint256", "bytes32"],
                [type_hash, CLIENT.address, network.vault.address, amount, 0, before, nonce],
            )
        )
        signature = CLIENT.key.sign_msg_hash(keccak(b"\x19\x01" + token.DOMAIN_SEPARATOR() + struct))
        raw = signature.to_bytes()
        return 0, before, salt, 27 + signature.v, raw[:32], raw[32:64]

    def test_with_authorization(self, network: Network, server: Server) -> None:
        network.token.transfer(CLIENT.address, 100, sender=OWNER.address)
        signed = self.authorization(network, server.node, 100, b"\x01" * 32)
        network.vault.deposit_with_authorization(CLIENT.address, server.node, 100, *signed, sender=STRANGER)
        assert network.vault.available(CLIENT.address, server.node) == 100
        with boa.reverts():
            network.vault.deposit_with_authorization(CLIENT.address, server.node, 100, *signed, sender=STRANGER)

    def test_an_authorization_is_for_its_node(self, network: Network, server: Server) -> None:
        network.token.transfer(CLIENT.address, 100, sender=OWNER.address)
        signed = self.authorization(network, server.node, 100, b"\x01" * 32)
        with boa.reverts():
            network.vault.deposit_with_authorization(CLIENT.address, STRANGER, 100, *signed, sender=STRANGER)
        with boa.reverts():
            network.vault.deposit_with_authorization(CLIENT.address, server.node, 99, *signed, sender=STRANGER)


class TestThaw:
    def test_withdraw_after_the_period(self, network: Network, funded: Server) -> None:
        vault, node = network.vault, funded.node
        vault.thaw(node, 4 * POIP, sender=CLIENT.address)
        assert vault.available(CLIENT.address, node) == 6 * POIP
        boa.env.time_travel(seconds=network.value("thaw_period") - 1)
        with boa.reverts("vault: still thawing"):
            vault.withdraw(node, sender=CLIENT.address)
        boa.env.time_travel(seconds=1)
        assert vault.withdraw(node, sender=CLIENT.address) == 4 * POIP
        assert network.token.balanceOf(CLIENT.address) == 4 * POIP
        assert vault.escrow(CLIENT.address, node) == (6 * POIP, 0, 0)
        with boa.reverts("vault: nothing is thawing"):
            vault.withdraw(node, sender=CLIENT.address)

    def test_a_second_thaw_restarts_the_clock(self, network: Network, funded: Server) -> None:
        vault, node = network.vault, funded.node
        vault.thaw(node, POIP, sender=CLIENT.address)
        boa.env.time_travel(seconds=network.value("thaw_period") - 1)
        vault.thaw(node, 2 * POIP, sender=CLIENT.address)
        assert vault.escrow(CLIENT.address, node) == (
            10 * POIP,
            3 * POIP,
            system.now() + network.value("thaw_period"),
        )

    def test_cancel(self, network: Network, funded: Server) -> None:
        network.vault.thaw(funded.node, POIP, sender=CLIENT.address)
        network.vault.cancel_thaw(funded.node, sender=CLIENT.address)
        assert network.vault.escrow(CLIENT.address, funded.node) == (10 * POIP, 0, 0)
        with boa.reverts("vault: nothing is thawing"):
            network.vault.cancel_thaw(funded.node, sender=CLIENT.address)

    def test_refusals(self, network: Network, funded: Server) -> None:
        with boa.reverts("vault: zero amount"):
            network.vault.thaw(funded.node, 0, sender=CLIENT.address)
        network.vault.thaw(funded.node, 9 * POIP, sender=CLIENT.address)
        with boa.reverts("vault: not so much is available"):
            network.vault.thaw(funded.node, POIP + 1, sender=CLIENT.address)

    def test_what_thaws_can_still_be_collected(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        network.vault.thaw(funded.node, 10 * POIP, sender=CLIENT.address)
        paid = collect_all(funded, committed)
        assert paid == committed.batch.total_fee
        assert network.vault.escrow(CLIENT.address, funded.node)[:2] == (10 * POIP - paid, 10 * POIP - paid)
        boa.env.time_travel(seconds=network.value("thaw_period"))
        assert network.vault.withdraw(funded.node, sender=CLIENT.address) == 10 * POIP - paid

    def test_the_period_is_that_of_the_request(self, network: Network, funded: Server) -> None:
        network.vault.thaw(funded.node, POIP, sender=CLIENT.address)
        end = network.vault.escrow(CLIENT.address, funded.node)[2]
        network.set_value("thaw_period", 5 * network.value("thaw_period"))
        assert network.vault.escrow(CLIENT.address, funded.node)[2] == end


class TestCollect:
    def test_pays_the_batch(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT, 4)
        amount = collect_all(funded, committed)
        assert amount == committed.batch.total_fee
        assert network.vault.bucket(committed.batch.id, CLIENT.address) == amount
        assert network.vault.settled(CLIENT.address, funded.node) == amount
        assert network.vault.escrow(CLIENT.address, funded.node)[0] == 10 * POIP - amount
        assert network.vault.total_held() == 10 * POIP

    def test_by_the_node_key_too(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        voucher = voucher_for(network, CLIENT, committed.answers[-1].receipt)
        assert funded.collect(*voucher, committed, sender=funded.node) == committed.batch.total_fee

    def test_two_clients_in_one_batch(self, network: Network, funded: Server) -> None:
        network.deposit(OTHER.address, funded.node, POIP)
        answers = [funded.serve(who) for who in (CLIENT, OTHER, CLIENT, OTHER, CLIENT)]
        committed = funded.commit(answers)
        fee = answers[0].receipt.fee
        assert funded.collect(*voucher_for(network, CLIENT, answers[4].receipt), committed, 0, 4) == 3 * fee
        assert funded.collect(*voucher_for(network, OTHER, answers[3].receipt), committed, 1, 3) == 2 * fee
        assert network.vault.bucket(committed.batch.id, OTHER.address) == 2 * fee

    def test_nothing_twice(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        collect_all(funded, committed)
        for changes in ({}, {"cumulative": 2**192 - 1}, {"last_receipt_hash": bytes(32)}):
            with boa.reverts("vault: nothing to collect"):
                collect_all(funded, committed, **changes)

    def test_step_by_step(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT, 3)
        fees = [a.receipt.fee for a in committed.answers]
        for i, answer in enumerate(committed.answers):
            voucher = voucher_for(network, CLIENT, answer.receipt)
            assert funded.collect(*voucher, committed, 0, i) == fees[i]

    def test_the_voucher_bounds_it(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT, 3)
        fee = committed.answers[0].receipt.fee
        assert collect_all(funded, committed, cumulative=fee + 5) == fee + 5
        assert collect_all(funded, committed, cumulative=2 * fee) == fee - 5

    def test_a_prepaid_voucher(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT, 3)
        assert collect_all(funded, committed, cumulative=POIP, last_receipt_hash=bytes(32)) == committed.batch.total_fee

    def test_a_later_voucher_pays_an_earlier_batch(self, network: Network, funded: Server) -> None:
        first, second = funded.serve_and_commit(CLIENT), funded.serve_and_commit(CLIENT)
        voucher = voucher_for(network, CLIENT, second.answers[-1].receipt)
        assert funded.collect(*voucher, first) == first.batch.total_fee
        assert funded.collect(*voucher, second) == second.batch.total_fee

    def test_a_named_receipt_that_comes_before_the_last(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        voucher = voucher_for(network, CLIENT, committed.answers[0].receipt)
        with boa.reverts("vault: voucher ends before the last receipt"):
            funded.collect(*voucher, committed)
        assert funded.collect(*voucher, committed, 0, 0) == committed.answers[0].receipt.fee

    def test_a_partial_collection_is_continued(self, network: Network, server: Server) -> None:
        committed = server.serve_and_commit(CLIENT)
        total = committed.batch.total_fee
        network.deposit(CLIENT.address, server.node, total - 100)
        assert collect_all(server, committed) == total - 100
        with boa.reverts("vault: escrow is empty"):
            collect_all(server, committed)
        network.deposit(CLIENT.address, server.node, 1000)
        assert collect_all(server, committed) == 100
        assert network.vault.bucket(committed.batch.id, CLIENT.address) == total

    def test_cancelled_receipts_must_be_named(self, network: Network, funded: Server) -> None:
        answers = [funded.serve(CLIENT), funded.serve(CLIENT, 5, reason=FinishReason.CANCELLED)]
        committed = funded.commit(answers)
        for named in (bytes(32), keccak(b"a later receipt")):
            voucher = voucher_for(network, CLIENT, answers[1].receipt, last_receipt_hash=named, cumulative=2**192 - 1)
            with boa.reverts("vault: voucher does not name the cancelled receipt"):
                funded.collect(*voucher, committed)
        assert funded.collect(*voucher_for(network, CLIENT, answers[1].receipt), committed) == committed.batch.total_fee

    def test_a_convicted_interval_is_never_paid(self, network: Network, funded: Server) -> None:
        first, second = funded.serve_and_commit(CLIENT), funded.serve_and_commit(CLIENT)
        convict(network, first)
        with boa.reverts("vault: batch is neither pending nor final"):
            collect_all(funded, first)
        assert collect_all(funded, second) == second.batch.total_fee
        assert network.vault.settled(CLIENT.address, funded.node) == second.answers[-1].receipt.payer_cum

    def test_a_forged_total_after_a_refund_is_not_paid_again(self, network: Network, funded: Server) -> None:
        first = funded.serve_and_commit(CLIENT)
        collect_all(funded, first)
        convict(network, first)
        network.vault.settle(first.batch.values(), CLIENT.address)
        funded.leave_jail()
        forged = funded.serve(CLIENT, receipt_changes={"payer_cum": POIP, "fee": POIP})
        second = funded.commit([forged])
        voucher = voucher_for(network, CLIENT, first.answers[-1].receipt, last_receipt_hash=bytes(32))
        with boa.reverts("vault: nothing to collect"):
            funded.collect(*voucher, second)

    def test_by_the_node_alone(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        voucher = voucher_for(network, CLIENT, committed.answers[-1].receipt)
        for sender in (STRANGER, CLIENT.address, account("node payout").address):
            with boa.reverts("vault: caller is not the node's"):
                funded.collect(*voucher, committed, sender=sender)

    def test_refusals(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        receipt = committed.answers[-1].receipt
        voucher, signature = voucher_for(network, CLIENT, receipt)
        with boa.reverts("vault: voucher is not signed by its payer"):
            funded.collect(voucher, system.sign(network.vault, voucher, OTHER), committed)
        with boa.reverts("vault: voucher is not signed by its payer"):
            funded.collect(voucher, system.sign(network.log, voucher, CLIENT), committed)
        elsewhere = Domain(boa.env.evm.patch.chain_id + 1, network.vault.address)
        with boa.reverts("vault: voucher is not signed by its payer"):
            funded.collect(voucher, voucher.sign(elsewhere, CLIENT.key), committed)
        with boa.reverts("vault: voucher is not signed by its payer"):
            funded.collect(voucher.replace(payer="0x" + "00" * 20), b"\x00" * 65, committed)
        with boa.reverts("vault: not the voucher's node"):
            funded.collect(*voucher_for(network, CLIENT, receipt, node=STRANGER), committed)
        with boa.reverts("vault: first is after last"):
            funded.collect(voucher, signature, committed, 1, 0)
        with boa.reverts("vault: not the voucher's payer"):
            funded.collect(*voucher_for(network, OTHER, receipt), committed)
        forged = Committed(committed.batch.replace(root=b"\x01" * 32), committed.answers)
        with boa.reverts("vault: batch is neither pending nor final"):
            funded.collect(voucher, signature, forged)
        with boa.reverts("vault: receipt is not in the batch"):
            tampered = committed.answers[-1].with_receipt(payer_cum=receipt.payer_cum + 1)
            network.vault.collect(
                voucher.values(),
                signature,
                committed.batch.values(),
                committed.in_batch(0),
                (tampered.receipt.values(), 2, committed.proof(2)),
                sender=funded.operator,
            )

    def test_a_receipt_that_names_another_node(self, network: Network, funded: Server) -> None:
        victim = Server.start(network, "victim")
        network.deposit(CLIENT.address, victim.node, POIP)
        committed = funded.commit([funded.serve(CLIENT, receipt_changes={"node": victim.node})])
        with boa.reverts("vault: not the batch's node"):
            collect_all(funded, committed, node=funded.node)

    def test_a_fee_above_its_total_is_refused_cleanly(self, network: Network, funded: Server) -> None:
        committed = funded.commit([funded.serve(CLIENT, receipt_changes={"payer_cum": 1})])
        with boa.reverts("vault: malformed receipt"):
            collect_all(funded, committed, cumulative=POIP, last_receipt_hash=bytes(32))


class TestSettle:
    def test_final_pays_node_and_treasury(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        total = collect_all(funded, committed)
        with boa.reverts("vault: batch is neither final nor convicted"):
            network.vault.settle(committed.batch.values(), CLIENT.address)
        network.finalize(committed.batch)
        fee = total * network.value("protocol_fee") // 10**6
        assert network.vault.settle(committed.batch.values(), CLIENT.address, sender=STRANGER) == total
        assert network.vault.earned(funded.node) == total - fee
        assert network.vault.treasury_due() == fee
        with boa.reverts("vault: bucket is empty"):
            network.vault.settle(committed.batch.values(), CLIENT.address)

        assert network.vault.withdraw_earnings(funded.node, sender=STRANGER) == total - fee
        assert network.token.balanceOf(account("node payout").address) == total - fee
        assert network.vault.withdraw_treasury(sender=STRANGER) == fee
        assert network.token.balanceOf(network.treasury) == fee
        assert network.vault.total_held() == 10 * POIP - total == network.token.balanceOf(network.vault)

    def test_conviction_refunds(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        total = collect_all(funded, committed)
        convict(network, committed)
        assert network.vault.settle(committed.batch.values(), CLIENT.address, sender=STRANGER) == total
        assert network.vault.escrow(CLIENT.address, funded.node) == (10 * POIP, 0, 0)
        assert network.vault.earned(funded.node) == network.vault.treasury_due() == 0
        with boa.reverts("vault: nothing is earned"):
            network.vault.withdraw_earnings(funded.node)

    def test_the_fee_is_that_of_the_batch(self, network: Network, funded: Server) -> None:
        fee = network.value("protocol_fee")
        committed = funded.serve_and_commit(CLIENT)
        total = collect_all(funded, committed)
        network.set_value("protocol_fee", 200_000)
        network.finalize(committed.batch)
        network.vault.settle(committed.batch.values(), CLIENT.address)
        assert network.vault.treasury_due() == total * fee // 10**6

    def test_collect_after_finality(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        network.finalize(committed.batch)
        total = collect_all(funded, committed)
        network.vault.settle(committed.batch.values(), CLIENT.address)
        assert network.vault.earned(funded.node) + network.vault.treasury_due() == total

    def test_another_batch_under_the_id(self, network: Network, funded: Server) -> None:
        committed = funded.serve_and_commit(CLIENT)
        collect_all(funded, committed)
        network.finalize(committed.batch)
        with boa.reverts("vault: batch is neither final nor convicted"):
            network.vault.settle(committed.batch.replace(node=STRANGER).values(), CLIENT.address)


class TestAdministration:
    def test_treasury(self, network: Network) -> None:
        with boa.reverts("ownable: caller is not the owner"):
            network.vault.set_treasury(STRANGER, sender=STRANGER)
        with boa.reverts("vault: zero address"):
            network.vault.set_treasury("0x" + "00" * 20, sender=OWNER.address)
        network.vault.set_treasury(STRANGER, sender=OWNER.address)
        assert network.vault.treasury() == STRANGER
        with boa.reverts("vault: nothing is due"):
            network.vault.withdraw_treasury()

    def test_sweep_takes_donations_alone(self, network: Network, funded: Server) -> None:
        with boa.reverts("vault: nothing to sweep"):
            network.vault.sweep()
        network.token.transfer(network.vault, 77, sender=OWNER.address)
        assert network.vault.sweep(sender=STRANGER) == 77
        assert network.token.balanceOf(network.treasury) == 77
        assert network.vault.total_held() == network.token.balanceOf(network.vault) == 10 * POIP

    def test_voucher_domain(self, network: Network, funded: Server) -> None:
        fields = network.vault.eip712Domain()
        assert (fields[1], fields[2], fields[4]) == ("PoIP", "1", network.vault.address)
        voucher = Voucher(CLIENT.address, funded.node, 1, bytes(32))
        assert system.sign(network.vault, voucher, CLIENT) != system.sign(network.log, voucher, CLIENT)

    def test_zero_addresses(self, network: Network) -> None:
        arguments = [network.token, network.log, network.registry, network.parameters, network.treasury]
        for i in range(5):
            with boa.reverts("vault: zero address"):
                changed = [*arguments[:i], "0x" + "00" * 20, *arguments[i + 1 :]]
                system.load(CONTRACTS / "payments/PaymentVault.vy", *changed)
