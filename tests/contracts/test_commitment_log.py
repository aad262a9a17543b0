"""The commitment log: commits, stake locks, windows, finality, audit selection, judges and convictions."""

from __future__ import annotations

from typing import Any

import boa
import pytest
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.economic.locks import LockTerms
from poip_chain.spec.objects import Batch, audit_indices
from tests.contracts import system
from tests.contracts.network import CONVICTED, FINAL, PENDING, Network, Server, deploy_network
from tests.contracts.system import CONTRACTS, OWNER, POIP, account

CLIENT = account("client")
STRANGER = account("stranger").address
JUDGE = account("judge").address
REASON = (26).to_bytes(32, "big")


def open_judge(network: Network) -> None:
    """Make JUDGE an active judge of the batches that come now."""
    network.log.set_judge(JUDGE, True, sender=OWNER.address)
    boa.env.time_travel(seconds=2 * network.value("unbonding_period"))


class TestCommit:
    def test_pins_everything(self, network: Network, server: Server) -> None:
        answers = [server.serve(CLIENT, 10 + i) for i in range(5)]
        batch = server.commit(answers).batch
        total = sum(a.receipt.fee for a in answers)
        assert (batch.id, batch.node, batch.model_id) == (network.log.batch_count(), server.node, network.model_id)
        assert (batch.first_seq, batch.count, batch.total_fee, batch.node_cum) == (0, 5, total, total)
        assert batch.lock == network.value("minimum_lock"), "a small batch locks the minimum"
        assert batch.audit_rate_ppm == network.value("audit_rate")
        assert batch.parameters_version == network.parameters.revision()
        assert batch.block_number == boa.env.evm.patch.block_number
        assert batch.window_end - batch.committed_at == network.value("challenge_window")
        assert network.log.status(batch.id) == network.log.status_of(batch.values()) == PENDING
        assert network.log.matches(batch.values())
        assert network.log.next_seq(server.node) == 5
        assert network.log.node_cum(server.node) == total
        assert network.locked(server.node) == batch.lock

    def test_event_carries_the_batch(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        event = next(e for e in network.log.get_logs() if type(e).__name__ == "BatchCommitted")
        assert Batch(*event.batch) == batch
        assert (event.batch_id, event.node, event.locator) == (batch.id, server.node, "https://node.example/v1")

    def test_totals_continue(self, network: Network, server: Server) -> None:
        first = server.serve_and_commit(CLIENT, 2).batch
        second = server.serve_and_commit(CLIENT, 3).batch
        assert second.first_seq == 2
        assert second.id == first.id + 1
        assert second.node_cum == first.node_cum + second.total_fee
        assert network.locked(server.node) == first.lock + second.lock

    def test_lock_is_the_value_at_risk(self, network: Network, server: Server) -> None:
        total = 123_456_789 * 10**12 + 1
        answer = server.serve(CLIENT, book=False)
        batch = server.commit([answer], total_fee=total).batch
        terms = [network.value(name) for name in ("audit_rate", "detection_power")]
        divisor = terms[0] * terms[1] * (10**6 - network.value("reward_share"))
        assert batch.lock == -(-total * 10**18 // divisor) > network.value("minimum_lock")
        t = network.parameters.batch_terms()
        terms_now = LockTerms(t.audit_rate, t.detection_power, t.reward_share, t.minimum_lock)
        assert terms_now.lock(total) == batch.lock, "nodes reckon as the log does"
        # A harder lock counts a challenge_window after it was set: what is signed can be committed.
        with boa.env.anchor():
            minimum = network.value("minimum_lock")
            network.set_value("minimum_lock", 10**24)
            assert server.serve_and_commit(CLIENT).batch.lock == minimum
            boa.env.time_travel(seconds=network.value("challenge_window"))
            with boa.reverts("stakes: not enough free stake"):
                server.serve_and_commit(CLIENT)
        # What cheating on the whole batch would gain is less than what it may cost.
        assert batch.lock * terms[0] * terms[1] * (10**6 - network.value("reward_share")) >= total * 10**18

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"first_seq": 1}, "log: first seq is not the next"),
            ({"count": 0}, "log: count out of range"),
            ({"count": 65537}, "log: count out of range"),
            ({"root": bytes(32)}, "log: empty root"),
            ({"model_id": bytes(32)}, "log: model is not servable"),
            ({"profile_version": 2}, "log: model is not servable"),
            ({"total_fee": 2**168}, "log: total of fees does not fit"),
        ],
    )
    def test_refusals(self, server: Server, changes: dict[str, Any], reason: str) -> None:
        with boa.reverts(reason):
            server.commit([server.serve(CLIENT, book=False)], **changes)

    def test_largest_batch(self, network: Network, server: Server) -> None:
        batch = server.commit([server.serve(CLIENT)], count=65536).batch
        assert network.log.next_seq(server.node) == 65536
        assert batch.count == 65536

    def test_by_the_current_node_key_alone(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT)
        arguments = (network.model_id, 1, answer.receipt.struct_hash(), 0, 1, answer.receipt.fee, "")
        for sender in (STRANGER, server.operator, account("node peer").address):
            with boa.reverts("log: sender is no node key"):
                network.log.commit(*arguments, sender=sender)

    def test_needs_free_stake(self, network: Network, server: Server) -> None:
        with boa.reverts():
            server.commit([server.serve(CLIENT)], total_fee=10**6 * POIP)
        assert network.log.next_seq(server.node) == 0

    def test_parameters_are_pinned(self, network: Network, server: Server) -> None:
        old = server.serve_and_commit(CLIENT).batch
        network.set_value("challenge_window", 1000)
        network.set_value("audit_rate", 500_000)
        new = server.serve_and_commit(CLIENT).batch
        assert new.window_end - new.committed_at == 1000
        assert (old.audit_rate_ppm, new.audit_rate_ppm) == (100_000, 500_000)
        assert new.parameters_version == old.parameters_version + 2
        with boa.reverts("log: window is still open"):
            boa.env.time_travel(seconds=2000)
            network.log.finalize([old.values()])

    def test_what_was_signed_before_a_sunset_has_a_window_to_be_committed(
        self, network: Network, server: Server
    ) -> None:
        """seq has no gaps: a receipt that can never be committed would block every later batch of the node."""
        answers = [server.serve(CLIENT) for _ in range(2)]
        network.models.deprecate(network.model_id, system.now() + 10, sender=OWNER.address)
        boa.env.time_travel(seconds=10)
        assert not network.models.is_servable(network.model_id, 1)
        server.commit(answers[:1])
        boa.env.time_travel(seconds=network.value("challenge_window") - 1)
        server.commit(answers[1:])
        assert network.log.next_seq(server.node) == 2
        boa.env.time_travel(seconds=1)
        with boa.reverts("log: model is not servable"):
            server.commit([server.serve(CLIENT)])


class TestFinality:
    def test_final_after_the_window(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        boa.env.time_travel(seconds=batch.window_end - system.now() - 1)
        with boa.reverts("log: window is still open"):
            network.log.finalize([batch.values()])
        boa.env.time_travel(seconds=1)
        network.log.finalize([batch.values()], sender=STRANGER)
        assert network.log.status(batch.id) == FINAL
        assert network.locked(server.node) == 0

    def test_a_race_is_no_error(self, network: Network, server: Server) -> None:
        first, second = (server.serve_and_commit(CLIENT).batch for _ in range(2))
        network.finalize(first)
        network.finalize(first, second, first)
        assert network.log.status(second.id) == FINAL
        assert network.locked(server.node) == 0

    @settings(max_examples=25)
    @given(name=st.sampled_from([n for n in Batch.ABI if n not in ("node", "id")]), delta=st.integers(1, 3))
    def test_every_field_is_pinned(self, network: Network, name: str, delta: int) -> None:
        with boa.env.anchor():
            server = Server.start(network)
            batch = server.serve_and_commit(CLIENT).batch
            value = getattr(batch, name)
            forged = batch.replace(**{name: keccak(value) if isinstance(value, bytes) else value + delta})
            assert not network.log.matches(forged.values())
            assert network.log.status_of(forged.values()) == 0
            boa.env.time_travel(seconds=10**6)
            with boa.reverts("log: no such batch"):
                network.log.finalize([forged.values()])

    def test_unknown_batch(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        assert network.log.status(batch.id + 1) == 0
        with boa.reverts("log: no such batch"):
            network.log.finalize([batch.replace(id=batch.id + 1).values()])

    def test_32_at_once(self, network: Network, server: Server) -> None:
        batches = [server.serve_and_commit(CLIENT, 1).batch for _ in range(32)]
        network.finalize(*batches)
        assert {network.log.status(b.id) for b in batches} == {FINAL}
        assert network.locked(server.node) == 0


class TestSelection:
    def test_unknown_before_the_beacon(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        assert network.log.beacon_of(batch.values()) == bytes(32)
        assert not network.log.is_selected(batch.values(), 0)
        with boa.reverts("log: beacon is not known"):
            network.log.selected(batch.values(), 0)

    def test_is_the_specs(self, network: Network, server: Server) -> None:
        batch = server.commit([server.serve(CLIENT)], count=300).batch
        beacon = network.submit_beacon(batch, keccak(b"beacon"))
        assert network.log.beacon_of(batch.values()) == beacon
        expected = audit_indices(beacon, batch.id, 300, batch.audit_rate_ppm)
        drawn = {network.log.selected(batch.values(), draw) for draw in range(30)}
        assert sorted(drawn) == expected
        for index in (*expected[:3], next(i for i in range(300) if i not in expected)):
            assert network.log.is_selected(batch.values(), index) == (index in expected)
        with boa.reverts("log: no such draw"):
            network.log.selected(batch.values(), 30)

    def test_the_delay_is_pinned(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        old = network.value("beacon_delay")
        network.set_value("beacon_delay", old + 5)
        network.submit_beacon(batch)
        assert network.log.beacon_of(batch.values()) == bytes(32), "the block of the new delay does not count"
        network.set_value("beacon_delay", old)
        boa.env.evm.patch.block_number = batch.block_number
        network.submit_beacon(batch)
        assert network.log.beacon_of(batch.values()) != bytes(32)


class TestJudges:
    def test_conviction(self, network: Network, server: Server) -> None:
        batch = server.commit([server.serve(CLIENT)], total_fee=50 * POIP).batch
        before, supply = network.stake_of(server.node), network.token.totalSupply()
        taken, paid = network.log.convict(
            batch.values(), STRANGER, REASON, b"\x01" * 32, sender=network.offences.address
        )
        assert taken == batch.lock
        assert paid == batch.lock * network.value("reward_share") // 10**6
        assert network.stake_of(server.node) == before - taken
        assert network.registry.rewards(STRANGER) == paid
        assert network.token.totalSupply() == supply - (taken - paid), "the rest is burned"
        assert network.log.status(batch.id) == CONVICTED
        assert network.locked(server.node) == 0

    def test_convicted_is_for_good(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        arguments = (batch.values(), STRANGER, REASON, bytes(32))
        network.log.convict(*arguments, sender=network.offences.address)
        with boa.reverts("log: batch cannot be convicted"):
            network.log.convict(*arguments, sender=network.availability.address)
        network.finalize(batch)
        assert network.log.status(batch.id) == CONVICTED

    def test_final_is_for_good(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        network.finalize(batch)
        with boa.reverts("log: batch cannot be convicted"):
            network.log.convict(batch.values(), STRANGER, REASON, bytes(32), sender=network.offences.address)
        with boa.reverts("log: batch is not pending"):
            network.log.open_case(batch.values(), sender=network.offences.address)

    def test_not_after_the_window_without_a_case(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        boa.env.time_travel(seconds=network.value("challenge_window"))
        assert not network.log.convictable(network.offences, batch.values())
        with boa.reverts("log: batch cannot be convicted"):
            network.log.convict(batch.values(), STRANGER, REASON, bytes(32), sender=network.offences.address)
        with boa.reverts("log: window is over"):
            network.log.open_case(batch.values(), sender=network.offences.address)

    def test_a_case_holds_the_batch(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        judge = network.availability.address
        for _ in range(2):
            network.log.open_case(batch.values(), sender=judge)
        boa.env.time_travel(seconds=network.value("challenge_window"))
        for left in (2, 1):
            assert network.log.open_cases(batch.id) == left
            with boa.reverts("log: a case is open"):
                network.log.finalize([batch.values()])
            network.log.close_case(batch.values(), sender=judge)
        with boa.reverts("log: no open case"):
            network.log.close_case(batch.values(), sender=judge)
        network.log.finalize([batch.values()])

    def test_a_case_can_convict_after_the_window(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        network.log.open_case(batch.values(), sender=network.availability.address)
        boa.env.time_travel(seconds=network.value("challenge_window"))
        assert not network.log.convictable(network.offences, batch.values()), "another judge's case does not help"
        with boa.reverts("log: no open case"):
            network.log.close_case(batch.values(), sender=network.offences.address)
        network.log.convict(batch.values(), STRANGER, REASON, bytes(32), sender=network.availability.address)
        network.log.close_case(batch.values(), sender=network.availability.address)
        assert network.log.open_cases(batch.id) == 0
        assert network.log.status(batch.id) == CONVICTED

    def test_judges_alone(self, network: Network, server: Server) -> None:
        batch = server.serve_and_commit(CLIENT).batch
        for sender in (STRANGER, OWNER.address, server.operator):
            with boa.reverts("log: caller is no judge of this batch"):
                network.log.open_case(batch.values(), sender=sender)
            with boa.reverts("log: batch cannot be convicted"):
                network.log.convict(batch.values(), sender, REASON, bytes(32), sender=sender)
            with boa.reverts("log: caller is no judge"):
                network.log.raise_audit_rate(server.node, sender=sender)
            with boa.reverts("log: no open case"):
                network.log.close_case(batch.values(), sender=sender)

    def test_a_new_judge_waits_until_stake_could_leave(self, network: Network, server: Server) -> None:
        old = server.serve_and_commit(CLIENT).batch
        network.log.set_judge(JUDGE, True, sender=OWNER.address)
        wait = 2 * network.value("unbonding_period")
        assert network.log.judge_active_from(JUDGE) == system.now() + wait
        boa.env.time_travel(seconds=wait - 1)
        almost = server.serve_and_commit(CLIENT).batch
        boa.env.time_travel(seconds=1)
        new = server.serve_and_commit(CLIENT).batch
        for batch in (old, almost):
            assert not network.log.convictable(JUDGE, batch.values())
            with boa.reverts():
                network.log.open_case(batch.values(), sender=JUDGE)
        network.log.open_case(new.values(), sender=JUDGE)
        network.log.convict(new.values(), STRANGER, REASON, bytes(32), sender=JUDGE)

    def test_removal_leaves_no_batch_stuck(self, network: Network, server: Server) -> None:
        open_judge(network)
        batch = server.serve_and_commit(CLIENT).batch
        network.log.open_case(batch.values(), sender=JUDGE)
        network.log.set_judge(JUDGE, False, sender=OWNER.address)
        with boa.reverts("log: batch cannot be convicted"):
            network.log.convict(batch.values(), JUDGE, REASON, bytes(32), sender=JUDGE)
        network.log.close_case(batch.values(), sender=JUDGE)
        network.finalize(batch)
        assert network.log.status(batch.id) == FINAL

    def test_the_audit_rate_is_raised_and_halved(self, network: Network, server: Server) -> None:
        judge, rate, step = network.availability.address, network.value("audit_rate"), network.value("audit_rate_step")
        for raised in (1, 2):
            network.log.raise_audit_rate(server.node, sender=judge)
            assert network.log.next_audit_rate(server.node) == rate + raised * step
        rates = [server.serve_and_commit(CLIENT, 1).batch.audit_rate_ppm for _ in range(3)]
        assert rates == [rate + 2 * step, rate + step, rate + step // 2]

    def test_the_audit_rate_is_at_most_everything(self, network: Network, server: Server) -> None:
        network.set_value("audit_rate_step", 200_000)
        for _ in range(8):
            network.log.raise_audit_rate(server.node, sender=network.availability.address)
        assert network.log.next_audit_rate(server.node) == 10**6
        assert server.serve_and_commit(CLIENT).batch.audit_rate_ppm == 10**6

    def test_every_receipt_selected_at_full_rate(self, network: Network, server: Server) -> None:
        network.set_value("audit_rate", 10**6)
        batch = server.serve_and_commit(CLIENT, 1).batch
        network.submit_beacon(batch)
        assert network.log.is_selected(batch.values(), 0)


class TestAdministration:
    def test_before_seal_judges_are_active_at_once(self, network: Network) -> None:
        log = system.load(
            CONTRACTS / "commitments/CommitmentLog.vy", network.registry, network.models, network.parameters
        )
        log.set_judge(JUDGE, True, sender=OWNER.address)
        assert log.judge_active_from(JUDGE) == system.now()
        assert log.may_judge(JUDGE, system.now())
        log.seal(sender=OWNER.address)
        with boa.reverts("log: sealed already"):
            log.seal(sender=OWNER.address)

    def test_owner_alone(self, network: Network) -> None:
        for call in (
            lambda: network.log.set_judge(JUDGE, True, sender=STRANGER),
            lambda: network.log.seal(sender=STRANGER),
        ):
            with boa.reverts("ownable: caller is not the owner"):
                call()

    def test_set_judge_refusals(self, network: Network) -> None:
        with boa.reverts("log: zero address"):
            network.log.set_judge("0x" + "00" * 20, True, sender=OWNER.address)
        with boa.reverts("log: nothing to change"):
            network.log.set_judge(network.offences, True, sender=OWNER.address)
        with boa.reverts("log: nothing to change"):
            network.log.set_judge(JUDGE, False, sender=OWNER.address)

    def test_two_step_ownership(self, network: Network) -> None:
        network.log.transfer_ownership(STRANGER, sender=OWNER.address)
        assert network.log.owner() == OWNER.address
        network.log.accept_ownership(sender=STRANGER)
        assert network.log.owner() == STRANGER

    def test_domain_is_the_specs(self, network: Network) -> None:
        fields = network.log.eip712Domain()
        assert (fields[1], fields[2], fields[3], fields[4]) == (
            "PoIP",
            "1",
            boa.env.evm.patch.chain_id,
            network.log.address,
        )

    def test_zero_addresses(self, network: Network) -> None:
        with boa.reverts("log: zero address"):
            system.load(
                CONTRACTS / "commitments/CommitmentLog.vy", "0x" + "00" * 20, network.models, network.parameters
            )

    def test_network_can_be_deployed_with_other_windows(self) -> None:
        network = deploy_network({"challenge_window": 100, "response_window": 20})
        batch = Server.start(network).serve_and_commit(CLIENT).batch
        assert batch.window_end - batch.committed_at == 100
