"""Availability: challenges, answers, withholding, and demands to commit."""

from __future__ import annotations

from typing import Any

import boa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.spec.merkle import verify_proof
from poip_chain.spec.objects import FinishReason, Part
from tests.contracts import system
from tests.contracts.network import (
    CONVICTED,
    FINAL,
    Answer,
    Committed,
    Network,
    Server,
    chunk_arguments,
)
from tests.contracts.system import CONTRACTS, OWNER, POIP, account

CLIENT = account("client")
CHALLENGER = account("challenger").address
OPEN, ANSWERED, WITHHELD, VOID = 1, 2, 3, 4
BOND = POIP


@pytest.fixture
def full_audit(network: Network) -> Network:
    """Every receipt is selected by some draw, nearly always; the challenger and the client can pay bonds."""
    network.set_value("audit_rate", 10**6)
    for who in (CHALLENGER, CLIENT.address):
        network.give(who, 100 * POIP, network.availability)
    return network


def challenge(network: Network, committed: Committed, part: Part = Part.OUTPUT, first_leaf: int = 0) -> int:
    """Challenge the receipt of draw 0; its index is the challenge's."""
    if network.log.beacon_of(committed.batch.values()) == bytes(32):
        network.submit_beacon(committed.batch)
    return int(network.availability.challenge(committed.batch.values(), 0, int(part), first_leaf, sender=CHALLENGER))


def answer_arguments(network: Network, committed: Committed, challenge_id: int, **changes: Any) -> list[Any]:
    """Arguments of the right answer."""
    asked = network.availability.challenge_info(challenge_id)
    answer: Answer = committed.answers[asked.index]
    leaves, proof = chunk_arguments(answer, Part(asked.part), asked.first_leaf)
    arguments = {
        "id": challenge_id,
        "batch": committed.batch.values(),
        "receipt": answer.receipt.values(),
        "receipt_proof": committed.proof(asked.index),
        "request": answer.request.values(),
        "params": answer.params.values(),
        "roots": answer.roots().values(),
        "leaves": leaves,
        "proof": proof,
    }
    return list((arguments | changes).values())


class TestChallenge:
    def test_opens_a_case(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        asked = network.availability.challenge_info(challenge_id)
        index = network.log.selected(committed.batch.values(), 0)
        assert (asked.challenger, asked.batch_id, asked.index) == (CHALLENGER, committed.batch.id, index)
        assert (asked.part, asked.first_leaf, asked.status, asked.bond) == (Part.OUTPUT, 0, OPEN, BOND)
        assert asked.deadline == system.now() + network.value("response_window")
        assert network.log.open_cases(committed.batch.id) == 1
        assert network.availability.total_held() == network.token.balanceOf(network.availability) == BOND

    def test_a_chunk_is_challenged_once(self, full_audit: Network, server: Server) -> None:
        committed = server.serve_and_commit(CLIENT)
        challenge(full_audit, committed)
        with boa.reverts("availability: challenged already"):
            challenge(full_audit, committed)
        challenge(full_audit, committed, Part.PROMPT)
        challenge(full_audit, committed, Part.OUTPUT, 8)
        assert full_audit.availability.open_challenges(committed.batch.id) == 3

    def test_all_challenges_of_a_batch_are_one_case(self, full_audit: Network, server: Server) -> None:
        """The log counts 14 bits of cases: challenges past a part's end, which cost next to nothing, must not fill them."""
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        ids = [challenge(network, committed, Part.PROMPT, 8 * i) for i in range(5)]
        assert network.log.open_cases(committed.batch.id) == 1
        for number, challenge_id in enumerate(ids, start=1):
            network.availability.answer(*answer_arguments(network, committed, challenge_id))
            assert network.log.open_cases(committed.batch.id) == (number < len(ids))
        challenge(network, committed, Part.OUTPUT)
        assert network.log.open_cases(committed.batch.id) == 1

    def test_a_case_that_stands_lets_no_late_challenge_in(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge(network, committed)
        with boa.env.anchor():
            boa.env.time_travel(seconds=network.value("challenge_window"))
            with boa.reverts("availability: window is over"):
                challenge(network, committed, Part.PROMPT)
        network.log.convict(committed.batch.values(), CHALLENGER, bytes(32), bytes(32), sender=network.offences.address)
        with boa.reverts("availability: batch cannot be convicted"):
            challenge(network, committed, Part.PROMPT)

    def test_refusals(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        batch = committed.batch.values()
        with boa.reverts("log: beacon is not known"):
            network.availability.challenge(batch, 0, 1, 0, sender=CHALLENGER)
        network.submit_beacon(committed.batch)
        for arguments, reason in (
            ((batch, 3, 1, 0), "log: no such draw"),
            ((batch, 0, 3, 0), "availability: no such part"),
            ((batch, 0, 1, 1), "availability: first leaf is not a multiple of 8"),
            ((batch, 0, 1, 2**32), "availability: no such leaf"),
            ((committed.batch.replace(root=b"\1" * 32).values(), 0, 1, 0), "log: batch is not pending"),
        ):
            with boa.reverts(reason):
                network.availability.challenge(*arguments, sender=CHALLENGER)
        with boa.reverts():
            network.availability.challenge(batch, 0, 1, 0, sender=account("poor").address)
        boa.env.time_travel(seconds=network.value("challenge_window"))
        with boa.reverts("availability: window is over"):
            network.availability.challenge(batch, 0, 1, 0, sender=CHALLENGER)

    def test_the_window_is_pinned(self, full_audit: Network, server: Server) -> None:
        committed = server.serve_and_commit(CLIENT)
        old = full_audit.value("response_window")
        full_audit.set_value("response_window", old // 2)
        challenge_id = challenge(full_audit, committed)
        assert full_audit.availability.challenge_info(challenge_id).deadline == system.now() + old


class TestClient:
    def test_for_a_receipt_that_is_not_selected(self, network: Network, server: Server) -> None:
        network.give(CLIENT.address, POIP, network.availability)
        committed = server.serve_and_commit(CLIENT)
        receipt = committed.answers[2].receipt
        signature = system.sign(network.log, receipt, server.key)
        challenge_id = network.availability.challenge_as_client(
            committed.batch.values(), 2, 0, receipt.values(), signature, sender=CLIENT.address
        )
        assert network.availability.challenge_info(challenge_id).index == 2
        network.availability.answer(*answer_arguments(network, committed, challenge_id), sender=server.key.address)

    def test_refusals(self, network: Network, server: Server) -> None:
        network.give(CLIENT.address, POIP, network.availability)
        network.give(CHALLENGER, POIP, network.availability)
        first, second = server.serve_and_commit(CLIENT), server.serve_and_commit(CLIENT)
        receipt = second.answers[0].receipt
        signature = system.sign(network.log, receipt, server.key)
        challenge_as_client = network.availability.challenge_as_client
        values = receipt.values()
        with boa.reverts("availability: sender is not the receipt's payer"):
            challenge_as_client(second.batch.values(), 1, 0, values, signature, sender=CHALLENGER)
        with boa.reverts("availability: receipt is not in the batch"):
            challenge_as_client(first.batch.values(), 1, 0, values, signature, sender=CLIENT.address)
        early = first.answers[0].receipt
        with boa.reverts("availability: receipt is not in the batch"):
            challenge_as_client(
                second.batch.values(),
                1,
                0,
                early.values(),
                system.sign(network.log, early, server.key),
                sender=CLIENT.address,
            )
        with boa.reverts("availability: not signed by the node's key"):
            challenge_as_client(
                second.batch.values(),
                1,
                0,
                values,
                system.sign(network.log, receipt, CLIENT),
                sender=CLIENT.address,
            )
        with boa.reverts("availability: not the batch's node"):
            other = receipt.replace(node=CHALLENGER).values()
            challenge_as_client(second.batch.values(), 1, 0, other, signature, sender=CLIENT.address)


class TestAnswer:
    @pytest.mark.parametrize(
        ("part", "first_leaf", "prompt", "output"),
        [
            (Part.PROMPT, 0, 33, 40),
            (Part.PROMPT, 8, 300, 40),
            (Part.OUTPUT, 0, 33, 1),
            (Part.OUTPUT, 0, 33, 200),
            (Part.OUTPUT, 8, 33, 300),
            (Part.FINGERPRINT, 0, 33, 40),
            (Part.FINGERPRINT, 8, 33, 70),
            (Part.FINGERPRINT, 800, 33, 40),
            (Part.OUTPUT, 2**32 - 8, 33, 40),
        ],
    )
    def test_every_chunk_can_be_answered(
        self, full_audit: Network, server: Server, part: Part, first_leaf: int, prompt: int, output: int
    ) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT, 2, prompt_tokens=prompt, output_tokens=output)
        challenge_id = challenge(network, committed, part, first_leaf)
        network.availability.answer(*answer_arguments(network, committed, challenge_id), sender=server.operator)
        (event,) = (e for e in network.availability.get_logs() if type(e).__name__ == "Answered")
        asked = network.availability.challenge_info(challenge_id)
        answer = committed.answers[asked.index]
        assert list(event.leaves) == answer.transcript.leaves(part)[first_leaf : first_leaf + 8]
        assert tuple(event.receipt) == answer.receipt.values()
        assert tuple(event.request) == answer.request.values()
        assert verify_proof(
            committed.batch.root,
            [answer.receipt.struct_hash()],
            [asked.index],
            committed.batch.count,
            list(event.receipt_proof),
        )
        assert asked.status == ANSWERED
        assert network.log.open_cases(committed.batch.id) == 0

    def test_an_empty_answer(self, full_audit: Network, server: Server) -> None:
        committed = server.serve_and_commit(CLIENT, 1, output_tokens=0, reason=FinishReason.CANCELLED)
        challenge_id = challenge(full_audit, committed, Part.FINGERPRINT)
        full_audit.availability.answer(*answer_arguments(full_audit, committed, challenge_id))
        assert full_audit.availability.challenge_info(challenge_id).status == ANSWERED

    def test_the_bond_is_shared_and_the_rate_raised(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        network.set_value("audit_rate", 100_000)
        challenge_id = challenge(network, committed)
        arguments = answer_arguments(network, committed, challenge_id)
        network.availability.answer(*arguments, sender=account("anyone").address)
        payout = account("node payout").address
        assert network.availability.credits(payout) == BOND // 4
        assert network.availability.credits(CHALLENGER) == BOND - BOND // 4
        assert network.log.next_audit_rate(server.node) == 100_000 + network.value("audit_rate_step")
        before = network.token.balanceOf(CHALLENGER)
        assert network.availability.claim(sender=CHALLENGER) == BOND - BOND // 4
        assert network.token.balanceOf(CHALLENGER) == before + BOND - BOND // 4
        assert network.availability.claim(sender=payout) == BOND // 4
        assert network.availability.total_held() == 0
        with boa.reverts("availability: nothing to claim"):
            network.availability.claim(sender=CHALLENGER)
        with boa.reverts("availability: challenge is not open"):
            network.availability.answer(*arguments)
        with boa.reverts("availability: challenge is not open"):
            network.availability.resolve(challenge_id, committed.batch.values())
        with boa.reverts("availability: challenged already"):
            challenge(network, committed)
        network.finalize(committed.batch)
        assert network.log.status(committed.batch.id) == FINAL

    def test_wrong_answers(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT, 2, output_tokens=70)
        challenge_id = challenge(network, committed)
        index = network.availability.challenge_info(challenge_id).index
        answer, other = committed.answers[index], committed.answers[1 - index]
        leaves, proof = chunk_arguments(answer, Part.OUTPUT, 0)
        for changes, reason in (
            ({"receipt": other.receipt.values()}, "availability: receipt is not in the batch"),
            ({"receipt_proof": []}, "merkle: proof is too short"),
            ({"request": other.request.values()}, "availability: not the receipt's request"),
            ({"params": (701, 1000, 0, [11], False)}, "availability: not the request's parameters"),
            ({"roots": other.roots().values()}, "availability: not the receipt's transcript"),
            ({"leaves": leaves[:-1]}, "availability: not all leaves of the chunk"),
            ({"leaves": []}, "availability: not all leaves of the chunk"),
            ({"leaves": [*leaves, b""]}, "availability: not all leaves of the chunk"),
            ({"leaves": leaves[::-1]}, "availability: not the leaves"),
            ({"leaves": [*leaves[:-1], leaves[-1] + b"\0"]}, "availability: not the leaves"),
            ({"proof": [*proof, bytes(32)]}, "merkle: proof is too long"),
            ({"batch": committed.batch.replace(id=99).values()}, "availability: not the challenge's batch"),
            ({"batch": committed.batch.replace(root=b"\1" * 32).values()}, "availability: no such batch"),
            ({"id": challenge_id + 1}, "availability: challenge is not open"),
        ):
            with boa.reverts(reason):
                network.availability.answer(*answer_arguments(network, committed, challenge_id, **changes))
        network.availability.answer(*answer_arguments(network, committed, challenge_id))

    def test_until_the_deadline(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        boa.env.time_travel(seconds=network.value("response_window"))
        with boa.reverts("availability: the node may still answer"):
            network.availability.resolve(challenge_id, committed.batch.values())
        with boa.env.anchor():
            network.availability.answer(*answer_arguments(network, committed, challenge_id))
        boa.env.time_travel(seconds=1)
        with boa.reverts("availability: too late"):
            network.availability.answer(*answer_arguments(network, committed, challenge_id))

    @settings(max_examples=8)
    @given(
        prompt=st.integers(1, 300),
        output=st.integers(0, 200),
        part=st.sampled_from(list(Part)),
        chunk=st.integers(0, 3),
    )
    def test_an_honest_node_can_always_answer(
        self, network: Network, prompt: int, output: int, part: Part, chunk: int
    ) -> None:
        with boa.env.anchor():
            network.set_value("audit_rate", 10**6)
            network.give(CHALLENGER, POIP, network.availability)
            server = Server.start(network)
            reason = FinishReason.STOP if output else FinishReason.CANCELLED
            committed = server.serve_and_commit(CLIENT, 2, prompt_tokens=prompt, output_tokens=output, reason=reason)
            challenge_id = challenge(network, committed, part, 8 * chunk)
            network.availability.answer(*answer_arguments(network, committed, challenge_id))
            assert network.availability.challenge_info(challenge_id).status == ANSWERED


class TestLateAnswer:
    """What a challenge brings to light just before the window's end, or after it, can still be judged."""

    def late(self, network: Network, server: Server, **serve: Any) -> tuple[Committed, int]:
        """A challenge in the window's last second, answered at its deadline; (batch, index of the answered receipt)."""
        committed = server.serve_and_commit(CLIENT, 2, **serve)
        network.submit_beacon(committed.batch)
        boa.env.time_travel(seconds=committed.batch.window_end - 1 - system.now())
        challenge_id = challenge(network, committed)
        boa.env.time_travel(seconds=network.value("response_window"))
        network.availability.answer(*answer_arguments(network, committed, challenge_id))
        return committed, network.availability.challenge_info(challenge_id).index

    def test_an_offence_that_it_shows_convicts(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed, index = self.late(network, server, receipt_changes={"fee": 1})
        assert system.now() > committed.batch.window_end
        assert network.log.open_cases(committed.batch.id) == 0
        assert network.log.window_end_of(committed.batch.values()) == system.now() + network.value("response_window")
        answer = committed.answers[index]
        with boa.reverts("log: window is still open"):
            network.log.finalize([committed.batch.values()])
        boa.env.time_travel(seconds=network.value("response_window") - 1)
        network.offences.prove_receipt(
            answer.receipt.values(), committed.evidence(index), answer.request.values(), answer.params.values()
        )
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_a_judge_may_open_its_case(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed, _ = self.late(network, server)
        batch = committed.batch.values()
        end = network.log.window_end_of(batch)
        with boa.env.anchor():
            boa.env.time_travel(seconds=end - 1 - system.now())
            network.log.open_case(batch, sender=network.offences.address)
            boa.env.time_travel(seconds=100)
            network.log.convict(batch, CHALLENGER, bytes(32), bytes(32), sender=network.offences.address)
            assert network.log.status(committed.batch.id) == CONVICTED
        boa.env.time_travel(seconds=end - system.now())
        with boa.reverts("log: window is over"):
            network.log.open_case(batch, sender=network.offences.address)
        assert not network.log.convictable(network.offences, batch)
        network.log.finalize([batch])
        assert network.log.status(committed.batch.id) == FINAL

    def test_it_leads_to_no_further_challenge(self, full_audit: Network, server: Server) -> None:
        """Else one challenge after the other would keep a batch from its end."""
        committed, _ = self.late(full_audit, server)
        with boa.reverts("availability: window is over"):
            challenge(full_audit, committed, Part.PROMPT)

    @pytest.mark.slow
    @settings(max_examples=12)
    @given(plan=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), raised=st.booleans())
    def test_no_pair_keeps_a_batch_open_longer(
        self, network: Network, plan: list[tuple[float, float]], raised: bool
    ) -> None:
        """Challenger and node as one, with any challenges in the window and answers up to the deadline: two response
        windows of the batch's revision, and no more."""
        with boa.env.anchor():
            network.set_value("audit_rate", 10**6)
            network.give(CHALLENGER, 100 * POIP, network.availability)
            committed = Server.start(network).serve_and_commit(CLIENT)
            network.submit_beacon(committed.batch)
            batch, response = committed.batch.values(), network.value("response_window")
            if raised:
                for name, value in (("unbonding_period", 10**6), ("thaw_period", 10**6), ("response_window", 10**5)):
                    network.set_value(name, value)
            opened, end = system.now(), committed.batch.window_end
            moves: list[tuple[int, int, bool]] = []
            for number, (start, pause) in enumerate(plan):
                at = opened + int(start * (end - 1 - opened))
                moves += [(at, number, False), (at + int(pause * response), number, True)]
            ids: dict[int, int] = {}
            before = committed.batch.window_end
            for at, number, answers in sorted(moves, key=lambda move: (move[0], move[2])):
                boa.env.time_travel(seconds=max(0, at - system.now()))
                if answers:
                    network.availability.answer(*answer_arguments(network, committed, ids[number]))
                    now = network.log.window_end_of(batch)
                    assert now == max(before, system.now() + response) <= end + 2 * response
                    before = now
                else:
                    ids[number] = challenge(network, committed, Part.PROMPT, 8 * number)
            assert network.log.open_cases(committed.batch.id) == 0
            with boa.reverts("log: no open case"):
                network.log.extend_window(batch, sender=network.availability.address)
            boa.env.time_travel(seconds=max(0, before - 1 - system.now()))
            with boa.reverts("log: window is still open"):
                network.log.finalize([batch])
            boa.env.time_travel(seconds=1)
            network.log.finalize([batch])
            assert network.log.status(committed.batch.id) == FINAL

    def test_an_early_answer_extends_nothing(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        network.availability.answer(*answer_arguments(network, committed, challenge_id))
        assert network.log.window_end_of(committed.batch.values()) == committed.batch.window_end
        network.finalize(committed.batch)

    def test_only_who_holds_a_case_extends(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        for who in (CHALLENGER, network.offences.address, server.operator):
            with boa.reverts("log: no open case"):
                network.log.extend_window(committed.batch.values(), sender=who)
        network.log.convict(committed.batch.values(), CHALLENGER, bytes(32), bytes(32), sender=network.offences.address)
        boa.env.time_travel(seconds=network.value("response_window"))
        network.availability.answer(*answer_arguments(network, committed, challenge_id))
        assert network.log.status(committed.batch.id) == CONVICTED


class TestWithholding:
    def test_conviction(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        before = network.stake_of(server.node)
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        assert network.availability.resolve(challenge_id, committed.batch.values(), sender=account("x").address)
        assert network.log.status(committed.batch.id) == CONVICTED
        assert network.stake_of(server.node) == before - committed.batch.lock
        assert network.registry.rewards(CHALLENGER) == committed.batch.lock * network.value("reward_share") // 10**6
        assert network.availability.credits(CHALLENGER) == BOND
        assert network.availability.challenge_info(challenge_id).status == WITHHELD
        assert network.log.open_cases(committed.batch.id) == 0

    def test_after_the_window_of_the_batch(self, full_audit: Network, server: Server) -> None:
        """A challenge in the last second still ends in conviction."""
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        network.submit_beacon(committed.batch)
        boa.env.time_travel(seconds=committed.batch.window_end - system.now() - 1)
        challenge_id = challenge(network, committed)
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        with boa.reverts("log: a case is open"):
            network.log.finalize([committed.batch.values()])
        assert network.availability.resolve(challenge_id, committed.batch.values())
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_two_challenges_one_conviction(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        ids = [challenge(network, committed, part) for part in Part]
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        results = [network.availability.resolve(i, committed.batch.values()) for i in ids]
        assert results == [True, False, False]
        assert network.availability.credits(CHALLENGER) == 3 * BOND
        assert network.availability.challenge_info(ids[2]).status == VOID
        assert network.log.open_cases(committed.batch.id) == 0

    def test_a_batch_convicted_meanwhile(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        network.log.convict(committed.batch.values(), CHALLENGER, bytes(32), bytes(32), sender=network.offences.address)
        assert not network.availability.resolve(challenge_id, committed.batch.values())
        assert network.availability.credits(CHALLENGER) == BOND
        assert network.log.open_cases(committed.batch.id) == 0

    def test_a_judge_removed_meanwhile_returns_the_bond(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        answered, unanswered = challenge(network, committed, Part.PROMPT), challenge(network, committed)
        network.log.set_judge(network.availability, False, sender=OWNER.address)
        network.availability.answer(*answer_arguments(network, committed, answered))
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        assert not network.availability.resolve(unanswered, committed.batch.values())
        assert network.availability.credits(CHALLENGER) == 2 * BOND - BOND // 4
        network.finalize(committed.batch)
        assert network.log.status(committed.batch.id) == FINAL

    def test_another_batch(self, full_audit: Network, server: Server) -> None:
        network = full_audit
        committed = server.serve_and_commit(CLIENT)
        challenge_id = challenge(network, committed)
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        with boa.reverts("availability: no such batch"):
            network.availability.resolve(challenge_id, committed.batch.replace(root=b"\1" * 32).values())
        with boa.reverts("availability: not the challenge's batch"):
            network.availability.resolve(challenge_id, committed.batch.replace(id=9).values())
        with boa.reverts("availability: challenge is not open"):
            network.availability.resolve(challenge_id + 1, committed.batch.values())


class TestDemands:
    def demand(self, network: Network, server: Server, answer: Answer) -> int:
        network.give(CHALLENGER, BOND, network.availability)
        signature = system.sign(network.log, answer.receipt, server.key)
        return int(network.availability.demand_commit(answer.receipt.values(), signature, sender=CHALLENGER))

    def test_not_committed(self, network: Network, server: Server) -> None:
        demand_id = self.demand(network, server, server.serve(CLIENT))
        before = network.stake_of(server.node)
        boa.env.time_travel(seconds=network.value("response_window"))
        with boa.reverts("availability: the node may still commit"):
            network.availability.resolve_demand(demand_id)
        boa.env.time_travel(seconds=1)
        assert network.availability.resolve_demand(demand_id)
        assert network.stake_of(server.node) == before - before * network.value("fixed_slash_share") // 10**6
        assert network.registry.rewards(CHALLENGER) > 0
        assert network.availability.credits(CHALLENGER) == BOND
        assert network.availability.demand_info(demand_id).status == WITHHELD
        with boa.reverts("availability: demand is not open"):
            network.availability.resolve_demand(demand_id)

    def test_receipts_that_wait_together_are_one_fault(self, network: Network, server: Server) -> None:
        answers = [server.serve(CLIENT) for _ in range(3)]
        demands = [self.demand(network, server, answer) for answer in answers]
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        before = network.stake_of(server.node)
        assert [network.availability.resolve_demand(d) for d in demands] == [True, False, False]
        after = network.stake_of(server.node)
        assert after == before - before * network.value("fixed_slash_share") // 10**6
        assert network.availability.demand_info(demands[2]).status == VOID
        assert network.availability.credits(CHALLENGER) == 3 * BOND

        server.leave_jail()
        server.commit(answers)
        late = self.demand(network, server, server.serve(CLIENT))
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        assert network.availability.resolve_demand(late), "it had committed again, so this is another fault"
        assert network.stake_of(server.node) < after

    def test_a_harder_lock_slashes_nobody(self, network: Network, server: Server) -> None:
        """The node has the stake that the receipt called for when it was signed, and has the time to commit it."""
        answer = server.serve(CLIENT)
        for name, value in (("minimum_lock", 10**24), ("audit_rate", 10_000), ("reward_share", 500_000)):
            network.set_value(name, value)
        demand_id = self.demand(network, server, answer)
        boa.env.time_travel(seconds=network.value("response_window"))
        server.commit([answer])
        boa.env.time_travel(seconds=1)
        assert not network.availability.resolve_demand(demand_id)

    def test_committed(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT)
        demand_id = self.demand(network, server, answer)
        server.commit([answer])
        before = network.stake_of(server.node)
        assert not network.availability.resolve_demand(demand_id)
        assert network.stake_of(server.node) == before
        assert network.availability.credits(CHALLENGER) == BOND
        assert network.availability.claim(sender=CHALLENGER) == BOND

    def test_refusals(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT)
        self.demand(network, server, answer)
        with boa.reverts("availability: demanded already"):
            self.demand(network, server, answer)
        with boa.reverts("availability: not signed by the node's key"):
            network.availability.demand_commit(
                answer.receipt.values(), system.sign(network.log, answer.receipt, CLIENT), sender=CHALLENGER
            )
        server.commit([answer])
        with boa.reverts("availability: committed already"):
            self.demand(network, server, answer)

    def test_a_rotation_leaves_its_delay_to_use_the_old_keys_receipts(self, network: Network, server: Server) -> None:
        """The bounds of evidence by signature that docs/security.md states."""
        kept, voided, same = server.serve(CLIENT), server.serve(CLIENT), server.serve(CLIENT, book=False)
        late = server.serve(CLIENT)
        key = account("rotated key")
        role = system.ProofOfPossession.NODE_KEY
        proof = system.proof_of_possession(network.registry, server.operator, key, role, system.FOREVER)
        arguments = (server.node, key.address, voided.receipt.seq, system.FOREVER, proof)
        network.registry.rotate_node_key(*arguments, sender=server.operator)
        boa.env.time_travel(seconds=network.value("key_rotation_delay") - 1)
        demand_id = self.demand(network, server, voided)
        boa.env.time_travel(seconds=1)
        for answer in (late, voided):
            with boa.reverts("availability: not signed by the node's key"):
                self.demand(network, server, answer)
        pair = (*server.signed(late.receipt), *server.signed(same.receipt.replace(seq=late.receipt.seq)))
        with boa.reverts("evidence: not signed by the node's key"):
            network.offences.prove_equivocation(*pair, sender=CHALLENGER)
        self.demand(network, server, kept)  # below the new key's first number the old key counts for good
        boa.env.time_travel(seconds=network.value("response_window"))
        assert network.availability.resolve_demand(demand_id), "what was demanded in time stays demanded"

    def test_a_node_that_withdrew_everything_does_not_block_it(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT)
        network.registry.deregister(server.node, sender=server.operator)
        boa.env.time_travel(seconds=network.value("unbonding_period") + 1)
        network.registry.withdraw(server.node, 32, sender=server.operator)
        demand_id = self.demand(network, server, answer)
        boa.env.time_travel(seconds=network.value("response_window") + 1)
        assert network.availability.resolve_demand(demand_id)


def test_zero_addresses(network: Network) -> None:
    arguments = [network.token, network.log, network.registry, network.parameters]
    for i in range(4):
        with boa.reverts("availability: zero address"):
            changed = [*arguments[:i], "0x" + "00" * 20, *arguments[i + 1 :]]
            system.load(CONTRACTS / "disputes/Availability.vy", *changed)
