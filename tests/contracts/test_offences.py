"""Offences: the contract's rules against the specification's on the same cases, evidence, and sentences."""

from __future__ import annotations

from typing import Any

import boa
import pytest
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import FinishReason, Part, Receipt, SamplingParams
from poip_chain.spec.offences import (
    NO_PART,
    Fault,
    Place,
    TranscriptRoots,
    leaf_fault,
    place_fault,
    receipt_fault,
    roots_fault,
    sequence_fault,
)
from poip_chain.spec.transcript import header_hash, prompt_root, statement_hash, transcript_root
from tests import fault_cases
from tests.contracts import system
from tests.contracts.network import (
    CONVICTED,
    NO_BATCH,
    PENDING,
    Answer,
    Network,
    Server,
    leaf_arguments,
)
from tests.contracts.system import CONTRACTS, HARNESS, POIP, account
from tests.fault_cases import PROFILE, Case

CLIENT = account("client")
ACCUSER = account("accuser").address
FULL = b"\xff" * 32


def code(fault: Fault | None) -> int:
    return 0 if fault is None else int(fault)


@pytest.fixture(scope="module")
def rules() -> Any:
    """The rules alone, without a network."""
    return system.load(HARNESS / "faults_harness.vy")


def standard(params: SamplingParams, params_known: bool = True, profile_known: bool = True) -> tuple[Any, ...]:
    return (params.values(), params_known, PROFILE.values(), profile_known)


class TestRulesAreTheSpecs:
    @settings(max_examples=60)
    @given(case=fault_cases.cases(), params_known=st.booleans(), profile_known=st.booleans())
    def test_receipts(self, rules: Any, case: Case, params_known: bool, profile_known: bool) -> None:
        batch = case.batch or NO_BATCH
        judged = rules.receipt_fault(
            case.receipt.values(),
            case.request.values(),
            standard(case.params, params_known, profile_known),
            batch.values(),
        )
        params = case.params if params_known else None
        profile = PROFILE if profile_known else None
        in_batch = batch if batch.id else None
        assert judged == code(receipt_fault(case.receipt, case.request, params, profile, in_batch))

    @settings(max_examples=40)
    @given(case=fault_cases.cases())
    def test_places(self, rules: Any, case: Case) -> None:
        batch = case.batch or NO_BATCH
        judged = rules.place_fault(case.receipt.values(), batch.values(), case.index)
        assert judged == code(place_fault(case.receipt, Place(batch, case.index)))

    @settings(max_examples=40)
    @given(pair=fault_cases.receipt_pairs())
    def test_sequences(self, rules: Any, pair: tuple[Receipt, Receipt]) -> None:
        a, b = pair
        expected = sequence_fault(a, b.replace(node=a.node)) if a != b else None
        assert rules.sequence_fault(a.values(), b.values()) == code(expected)

    @settings(max_examples=30)
    @given(case=fault_cases.cases(), data=st.data())
    def test_roots(self, rules: Any, case: Case, data: st.DataObject) -> None:
        roots = TranscriptRoots.of(case.transcript)
        hashes = [
            data.draw(st.sampled_from([root, root, bytes(32), FULL]))
            for root in (roots.request_hash, roots.prompt_root, roots.output_root, roots.fingerprint_root)
        ]
        reason = data.draw(st.sampled_from([roots.finish_reason, roots.finish_reason, 255]))
        roots = TranscriptRoots(hashes[0], reason, roots.statement_hash, *hashes[1:])
        judged = rules.roots_fault(case.receipt.values(), case.request.values(), roots.values())
        assert judged == code(roots_fault(case.receipt, case.request, roots))

    @settings(max_examples=80)
    @given(found=fault_cases.leaf_cases(), params_known=st.booleans(), profile_known=st.booleans())
    def test_leaves(
        self, rules: Any, found: tuple[Case, Part, int, bytes], params_known: bool, profile_known: bool
    ) -> None:
        case, part, index, leaf = found
        tokens = case.request.prompt_tokens if part is Part.PROMPT else case.receipt.output_tokens
        if tokens == 0:
            return
        judged = rules.leaf_fault(
            case.receipt.values(),
            case.request.values(),
            standard(case.params, params_known, profile_known),
            int(part),
            index,
            leaf,
        )
        params = case.params if params_known else None
        profile = PROFILE if profile_known else None
        assert judged == code(leaf_fault(case.receipt, case.request, params, profile, part, index, leaf))

    def test_stop_ids_that_do_not_increase(self, rules: Any) -> None:
        params = (700, 1000, 0, [13, 11], False)
        answer = fault_cases.honest()
        judged = rules.receipt_fault(
            answer.receipt.values(),
            answer.request.values(),
            (params, True, PROFILE.values(), True),
            NO_BATCH.values(),
        )
        assert judged == Fault.PARAMETERS


def prove(network: Network, answer: Answer, evidence: Any, sender: str = ACCUSER) -> int:
    return int(
        network.offences.prove_receipt(
            answer.receipt.values(), evidence, answer.request.values(), answer.params.values(), sender=sender
        )
    )


def prove_transcript(network: Network, answer: Answer, evidence: Any, *leaf: Any) -> int:
    leaf = leaf or (NO_PART, 0, b"", [])
    return int(
        network.offences.prove_transcript(
            answer.receipt.values(),
            evidence,
            answer.request.values(),
            answer.params.values(),
            answer.roots().values(),
            *leaf,
            sender=ACCUSER,
        )
    )


@pytest.mark.slow
class TestEveryRule:
    """Deterministic sweeps that reach each fault code, so that the random comparisons above need not."""

    def test_receipts_and_places(self, rules: Any) -> None:
        reached = set()
        for case in fault_cases.single_changes():
            batch = case.batch or NO_BATCH
            judged = rules.receipt_fault(
                case.receipt.values(), case.request.values(), standard(case.params), batch.values()
            )
            in_batch = batch if batch.id else None
            assert judged == code(receipt_fault(case.receipt, case.request, case.params, PROFILE, in_batch)), case
            placed = rules.place_fault(case.receipt.values(), batch.values(), case.index)
            assert placed == code(place_fault(case.receipt, Place(batch, case.index))), case
            reached |= {judged, placed}
        assert reached >= set(range(Fault.SEQUENCE)) | {Fault.SEQUENCE, Fault.BATCH_TOTAL}

    def test_pairs(self, rules: Any) -> None:
        reached = set()
        for a, b in fault_cases.pairs_with_faults():
            judged = rules.sequence_fault(a.values(), b.values())
            assert judged == code(sequence_fault(a, b) if a != b else None), (a, b)
            reached.add(judged)
        assert reached == {0, Fault.NODE_TOTAL, Fault.PAYER_TOTAL}

    def test_leaves(self, rules: Any) -> None:
        reached = set()
        for case, part, index, leaf in fault_cases.leaves_with_faults():
            values = (case.receipt.values(), case.request.values(), standard(case.params), int(part), index, leaf)
            judged = rules.leaf_fault(*values)
            expected = leaf_fault(case.receipt, case.request, case.params, PROFILE, part, index, leaf)
            assert judged == code(expected), (case, part, index)
            reached.add(judged)
        leaf_codes = {Fault.TOKEN_ID, Fault.LEAF_SIZE, Fault.EARLY_END, Fault.MISSING_END, Fault.FINGERPRINT}
        assert reached == {0, *leaf_codes}


class TestReceipts:
    @pytest.mark.parametrize(
        ("receipt_changes", "request_changes", "fault"),
        [
            ({"fee": 1}, {}, Fault.FEE),
            ({}, {"max_tokens": 39}, Fault.MAX_TOKENS),
            ({}, {"deadline": 1}, Fault.DEADLINE),
            ({"model_id": bytes(32)}, {}, Fault.MODEL),
            ({}, {"profile_version": 2}, Fault.PROFILE),
            ({}, {"profile_version": 2**32 - 1}, Fault.PROFILE),
            ({}, {"node": ACCUSER}, Fault.NODE),
            ({"node": ACCUSER}, {"node": ACCUSER}, Fault.NODE),
            ({"payer": ACCUSER}, {}, Fault.PAYER),
            ({"finish_reason": 1}, {}, Fault.SHORT_LENGTH),
            ({"finish_reason": 255}, {}, Fault.FINISH_REASON),
            ({"node_cum": 0}, {}, Fault.CUMULATIVE),
            ({"payer_cum": 0}, {}, Fault.CUMULATIVE),
        ],
    )
    def test_committed(
        self,
        network: Network,
        server: Server,
        receipt_changes: dict[str, Any],
        request_changes: dict[str, Any],
        fault: Fault,
    ) -> None:
        answer = server.serve(CLIENT, receipt_changes=receipt_changes, request_changes=request_changes)
        committed = server.commit([answer])
        before = network.stake_of(server.node)
        assert prove(network, answer, committed.evidence(0)) == fault
        assert network.log.status(committed.batch.id) == CONVICTED
        assert network.stake_of(server.node) == before - committed.batch.lock
        reward = committed.batch.lock * network.value("reward_share") // 10**6
        assert network.registry.rewards(ACCUSER) == reward

    def test_long_context(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, prompt_tokens=480, output_tokens=33)
        committed = server.commit([answer])
        assert prove(network, answer, committed.evidence(0)) == Fault.CONTEXT

    def test_parameters(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, params=SamplingParams(99))
        committed = server.commit([answer])
        known = Answer(answer.request, SamplingParams(98), answer.receipt, answer.transcript)
        with boa.reverts("offences: no fault"):
            prove(network, known, committed.evidence(0))
        assert prove(network, answer, committed.evidence(0)) == Fault.PARAMETERS

    def test_uncommitted(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, receipt_changes={"fee": 1})
        before = network.stake_of(server.node)
        values, evidence = server.signed(answer.receipt)
        assert values == answer.receipt.values()
        assert prove(network, answer, evidence) == Fault.FEE
        share = network.value("fixed_slash_share")
        assert network.stake_of(server.node) == before - before * share // 10**6
        with boa.reverts("evidence: sentenced already"):
            prove(network, answer, evidence)

    @pytest.mark.slow
    def test_an_honest_node_is_never_convicted(self, network: Network, server: Server) -> None:
        for reason in FinishReason:
            answer = server.serve(CLIENT, reason=reason)
            committed = server.commit([answer])
            for evidence in (committed.evidence(0), server.signed(answer.receipt)[1]):
                with boa.reverts("offences: no fault"):
                    prove(network, answer, evidence)
                with boa.reverts("offences: no fault"):
                    prove_transcript(network, answer, evidence)
            for part in Part:
                for index in range(len(answer.transcript.leaves(part))):
                    with boa.reverts("offences: no fault"):
                        prove_transcript(network, answer, committed.evidence(0), *leaf_arguments(answer, part, index))
            with boa.reverts("offences: no fault"):
                network.offences.prove_sequence(*committed.accuse(0), *committed.accuse(0))

    def test_another_request_is_no_evidence(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT)
        committed = server.commit([answer])
        forged = Answer(answer.request.replace(max_tokens=1), answer.params, answer.receipt, answer.transcript)
        with boa.reverts("offences: not the receipt's request"):
            prove(network, forged, committed.evidence(0))

    def test_an_unregistered_profile_leaves_its_rules_out(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, prompt_tokens=500, output_tokens=33, request_changes={"profile_version": 9})
        with boa.reverts("offences: no fault"):
            prove(network, answer, server.signed(answer.receipt)[1])
        bad = server.serve(CLIENT, request_changes={"profile_version": 9}, receipt_changes={"fee": 1})
        assert prove(network, bad, server.signed(bad.receipt)[1]) == Fault.FEE


class TestEvidence:
    def test_signature_of_another_key(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, receipt_changes={"fee": 1})
        for signer in (CLIENT, account("node operator"), account("node peer")):
            with boa.reverts("evidence: not signed by the node's key"):
                prove(network, answer, server.signed(answer.receipt, signer)[1])
        with boa.reverts("evidence: not signed by the node's key"):
            prove(network, answer, (NO_BATCH.values(), 0, [], b""))
        stranger = answer.with_receipt(node=ACCUSER)
        with boa.reverts("evidence: not signed by the node's key"):
            prove(network, stranger, (NO_BATCH.values(), 0, [], b"\x00" * 65))

    def test_signature_for_another_contract_or_chain(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, receipt_changes={"fee": 1})
        for contract in (network.vault, network.registry, network.offences):
            signature = system.sign(contract, answer.receipt, server.key)
            with boa.reverts("evidence: not signed by the node's key"):
                prove(network, answer, (NO_BATCH.values(), 0, [], signature))

    def test_wrong_place_or_proof(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": i}) for i in range(3)])
        answer, (batch, index, proof, _) = committed.answers[1], committed.evidence(1)
        for evidence in ((batch, 0, proof, b""), (batch, index, [FULL, *proof[1:]], b"")):
            with boa.reverts("evidence: receipt is not in the batch"):
                prove(network, answer, evidence)
        with boa.reverts("merkle: index is outside the tree"):
            prove(network, answer, (batch, 3, proof, b""))
        with boa.reverts("merkle: proof is too short"):
            prove(network, answer, (batch, index, proof[:-1], b""))

    def test_a_batch_that_the_log_does_not_hold(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        forged = committed.batch.replace(lock=committed.batch.lock + 1)
        with boa.reverts("evidence: no such batch"):
            prove(network, committed.answers[0], (forged.values(), 0, [], b""))

    def test_evidence_expires(self, network: Network, server: Server) -> None:
        """From when its seq is committed on: until then nobody may have had an occasion to use it."""
        answer = server.serve(CLIENT, receipt_changes={"fee": 1})
        evidence = server.signed(answer.receipt)[1]
        boa.env.time_travel(seconds=network.value("evidence_window") + 1)
        with boa.env.anchor():
            assert prove(network, answer, evidence) == Fault.FEE
        server.commit([answer.with_receipt(fee=2)])
        with boa.reverts("evidence: expired"):
            prove(network, answer, evidence)
        boa.env.time_travel(seconds=-1)
        assert prove(network, answer, evidence) == Fault.FEE

    @pytest.mark.parametrize("age", [0, None])
    def test_a_receipt_dated_long_ago_counts_until_it_is_committed(
        self, network: Network, server: Server, age: int | None
    ) -> None:
        """Its date is the node's own statement: it must not let evidence expire that nobody could have used before."""
        window = network.value("evidence_window")
        old = 0 if age is None else system.now() - window - 1
        answer = server.serve(CLIENT, receipt_changes={"fee": 1, "issued_at": old})
        twin = answer.with_receipt(fee=2)
        first, second = (server.signed(r)[1] for r in (answer.receipt, twin.receipt))
        with boa.env.anchor():
            network.offences.prove_equivocation(answer.receipt.values(), first, twin.receipt.values(), second)
        with boa.env.anchor():
            assert prove(network, answer, first) == Fault.FEE
        # Committed, it convicts its batch and so does its twin; what is signed beside it is old.
        committed = server.commit([answer])
        with boa.env.anchor():
            network.offences.prove_equivocation(
                twin.receipt.values(), second, answer.receipt.values(), committed.evidence(0)
            )
            assert network.log.status(committed.batch.id) == CONVICTED
        network.finalize(committed.batch)
        with boa.reverts("evidence: expired"):
            prove(network, twin, second)

    def test_a_final_batch_is_settled(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        network.finalize(committed.batch)
        with boa.reverts("evidence: sentenced already, or its batch is settled"):
            prove(network, committed.answers[0], committed.evidence(0))

    def test_sentenced_in_a_batch_is_not_sentenced_by_signature(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        answer = committed.answers[0]
        prove(network, answer, committed.evidence(0))
        before = network.stake_of(server.node)
        with boa.reverts("evidence: sentenced already"):
            prove(network, answer, server.signed(answer.receipt)[1])
        assert network.stake_of(server.node) == before

    def test_by_signature_first_still_refunds_the_batch(self, network: Network, server: Server) -> None:
        """A node that has itself slashed early does not keep its batch."""
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        answer = committed.answers[0]
        prove(network, answer, server.signed(answer.receipt)[1], sender=server.operator)
        assert prove(network, answer, committed.evidence(0)) == Fault.FEE
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_event(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        prove(network, committed.answers[0], committed.evidence(0))
        (event,) = (e for e in network.offences.get_logs() if type(e).__name__ == "Convicted")
        assert (event.node, event.fault, event.beneficiary, event.batch_id) == (
            server.node,
            Fault.FEE,
            ACCUSER,
            committed.batch.id,
        )
        assert event.receipt_hash == committed.answers[0].receipt.struct_hash()
        assert event.taken == committed.batch.lock


class TestEquivocation:
    def pair(self, server: Server, **changes: Any) -> tuple[Answer, Answer]:
        first = server.serve(CLIENT)
        return first, first.with_receipt(**({"transcript_root": FULL} | changes))

    def test_two_signatures(self, network: Network, server: Server) -> None:
        a, b = self.pair(server)
        before = network.stake_of(server.node)
        arguments = (*server.signed(a.receipt), *server.signed(b.receipt))
        network.offences.prove_equivocation(*arguments, sender=ACCUSER)
        assert network.stake_of(server.node) == before - before * network.value("fixed_slash_share") // 10**6
        with boa.reverts("evidence: sentenced already"):
            network.offences.prove_equivocation(*arguments, sender=ACCUSER)

    def test_committed_and_signed(self, network: Network, server: Server) -> None:
        a, b = self.pair(server)
        committed = server.commit([a])
        arguments = (*committed.accuse(0), *server.signed(b.receipt))
        network.offences.prove_equivocation(*arguments, sender=ACCUSER)
        assert network.log.status(committed.batch.id) == CONVICTED
        before = network.stake_of(server.node)
        with boa.reverts("evidence: sentenced already"):
            network.offences.prove_equivocation(*arguments, sender=ACCUSER)
        with boa.reverts("evidence: sentenced already, or its batch is settled"):
            network.offences.prove_equivocation(*arguments[2:], *arguments[:2], sender=ACCUSER)
        assert network.stake_of(server.node) == before

    def test_one_request_twice(self, network: Network, server: Server) -> None:
        a, b = self.pair(server, seq=1)
        assert b.receipt.seq != a.receipt.seq
        committed = server.commit([a, b])
        network.offences.prove_equivocation(*committed.accuse(0), *committed.accuse(1), sender=ACCUSER)
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_the_second_receipts_batch_is_convicted(self, network: Network, server: Server) -> None:
        a, b = self.pair(server, seq=1)
        first, second = server.commit([a]), server.commit([b])
        arguments = (*first.accuse(0), *second.accuse(0))
        network.offences.prove_equivocation(*arguments, sender=ACCUSER)
        assert [network.log.status(c.batch.id) for c in (first, second)] == [PENDING, CONVICTED]
        with boa.reverts("evidence: sentenced already"):
            network.offences.prove_equivocation(*arguments, sender=ACCUSER)

    def test_one_in_a_final_batch_is_still_evidence(self, network: Network, server: Server) -> None:
        a, b = self.pair(server, seq=1)
        first = server.commit([a])
        network.finalize(first.batch)
        second = server.commit([b])
        network.offences.prove_equivocation(*first.accuse(0), *second.accuse(0), sender=ACCUSER)
        assert network.log.status(second.batch.id) == CONVICTED

    def test_the_same_receipt_is_none(self, network: Network, server: Server) -> None:
        a = server.serve(CLIENT)
        committed = server.commit([a])
        with boa.reverts("offences: the same receipt"):
            network.offences.prove_equivocation(*committed.accuse(0), *server.signed(a.receipt), sender=ACCUSER)

    def test_different_seqs_and_requests_are_none(self, network: Network, server: Server) -> None:
        a, b = server.serve(CLIENT), server.serve(CLIENT)
        with boa.reverts("offences: no fault"):
            network.offences.prove_equivocation(*server.signed(a.receipt), *server.signed(b.receipt))

    def test_another_node_cannot_frame_it(self, network: Network, server: Server) -> None:
        """A liar commits a receipt that names the victim, with the victim's seq."""
        liar = Server.start(network, "liar")
        honest = server.serve_and_commit(CLIENT, 1)
        forged = liar.commit([honest.answers[0].with_receipt(transcript_root=FULL)])
        for arguments in (
            (*honest.accuse(0), *forged.accuse(0)),
            (*forged.accuse(0), *honest.accuse(0)),
            (*server.signed(honest.answers[0].receipt), *forged.accuse(0)),
        ):
            with boa.reverts("offences: not one node's receipts"):
                network.offences.prove_equivocation(*arguments, sender=liar.operator)
        # The forged receipt convicts the liar alone.
        network.offences.prove_sequence(*forged.accuse(0), *forged.accuse(0), sender=ACCUSER)
        assert network.log.status(forged.batch.id) == CONVICTED
        assert network.log.status(honest.batch.id) == PENDING


class TestSequences:
    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"seq": 7}, Fault.SEQUENCE),
            ({"node_cum": 2**192 - 1}, Fault.BATCH_TOTAL),
            ({"model_id": FULL}, Fault.MODEL),
            ({"node": ACCUSER}, Fault.NODE),
            ({"finish_reason": 3}, Fault.FINISH_REASON),
            ({"payer_cum": 0}, Fault.CUMULATIVE),
        ],
    )
    def test_one_committed_receipt(
        self, network: Network, server: Server, changes: dict[str, Any], fault: Fault
    ) -> None:
        committed = server.commit([server.serve(CLIENT), server.serve(CLIENT, receipt_changes=changes)])
        one = committed.accuse(1)
        assert network.offences.prove_sequence(*one, *one, sender=ACCUSER) == fault
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_batch_total(self, network: Network, server: Server) -> None:
        answers = [server.serve(CLIENT) for _ in range(2)]
        committed = server.commit(answers, total_fee=sum(a.receipt.fee for a in answers) + 1)
        one = committed.accuse(1)
        assert network.offences.prove_sequence(*one, *one, sender=ACCUSER) == Fault.BATCH_TOTAL

    def test_start_of_a_batch(self, network: Network, server: Server) -> None:
        """The last total is right, the first does not follow on the batch before."""
        first = server.serve(CLIENT, receipt_changes={"node_cum": 10**30})
        committed = server.commit([first, server.serve(CLIENT)])
        one = committed.accuse(0)
        assert network.offences.prove_sequence(*one, *one, sender=ACCUSER) == Fault.BATCH_TOTAL

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [({"node_cum": 10**30}, Fault.NODE_TOTAL), ({"payer_cum": 1530000000000000}, Fault.PAYER_TOTAL)],
    )
    def test_two_receipts(self, network: Network, server: Server, changes: dict[str, Any], fault: Fault) -> None:
        answers = [server.serve(CLIENT), server.serve(CLIENT, receipt_changes=changes), server.serve(CLIENT)]
        committed = server.commit(answers)
        with boa.reverts("offences: no fault"):
            network.offences.prove_sequence(*committed.accuse(1), *committed.accuse(0), sender=ACCUSER)
        judged = network.offences.prove_sequence(*committed.accuse(0), *committed.accuse(1), sender=ACCUSER)
        assert judged == fault
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_overlap_with_a_convicted_batch(self, network: Network, server: Server) -> None:
        """A node that claims a refunded interval again, by forged totals in its next batch, is convicted again."""
        first = server.serve_and_commit(CLIENT, 1)
        network.log.convict(first.batch.values(), ACCUSER, bytes(32), bytes(32), sender=network.offences.address)
        server.leave_jail()
        again = server.serve(CLIENT, receipt_changes={"payer_cum": first.answers[0].receipt.payer_cum})
        second = server.commit([again])
        judged = network.offences.prove_sequence(*first.accuse(0), *second.accuse(0), sender=ACCUSER)
        assert judged == Fault.PAYER_TOTAL
        assert network.log.status(second.batch.id) == CONVICTED

    def test_uncommitted_alone_has_no_place(self, network: Network, server: Server) -> None:
        one = server.signed(server.serve(CLIENT, receipt_changes={"seq": 9}).receipt)
        with boa.reverts("offences: the receipt is not committed"):
            network.offences.prove_sequence(*one, *one, sender=ACCUSER)

    def test_honest_pairs_show_nothing(self, network: Network, server: Server) -> None:
        other = account("other client")
        committed = server.commit([server.serve(who) for who in (CLIENT, other, CLIENT, CLIENT)])
        next_batch = server.commit([server.serve(other), server.serve(CLIENT)])
        places = [committed.accuse(i) for i in range(4)] + [next_batch.accuse(i) for i in range(2)]
        for i, a in enumerate(places):
            for b in places[i:]:
                with boa.reverts("offences: no fault"):
                    network.offences.prove_sequence(*a, *b, sender=ACCUSER)


class TestTranscripts:
    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"request_hash": FULL}, Fault.HEADER),
            ({"finish_reason": 1}, Fault.HEADER),
            ({"prompt_ids": (1, 2)}, Fault.PROMPT_ROOT),
            ({"output_ids": ()}, Fault.LEAF_SIZE),
            ({"fingerprints": ()}, Fault.LEAF_SIZE),
        ],
    )
    def test_header_and_roots(self, network: Network, server: Server, changes: dict[str, Any], fault: Fault) -> None:
        committed = server.commit([server.serve(CLIENT, transcript_changes=changes)])
        assert prove_transcript(network, committed.answers[0], committed.evidence(0)) == fault
        assert network.log.status(committed.batch.id) == CONVICTED

    @pytest.mark.parametrize(
        ("ids", "leaf", "fault"),
        [
            ((*range(300, 339), 1000), 1, Fault.TOKEN_ID),
            ((300, 2, *range(301, 339)), 0, Fault.EARLY_END),
            ((300, 11, *range(301, 339)), 0, Fault.EARLY_END),
            (tuple(range(300, 340)), 1, Fault.MISSING_END),
        ],
    )
    def test_output(self, network: Network, server: Server, ids: tuple[int, ...], leaf: int, fault: Fault) -> None:
        committed = server.commit([server.serve(CLIENT, transcript_changes={"output_ids": ids})])
        answer = committed.answers[0]
        assert (
            prove_transcript(network, answer, committed.evidence(0), *leaf_arguments(answer, Part.OUTPUT, leaf))
            == fault
        )

    def test_prompt_id_outside_the_vocabulary(self, network: Network, server: Server) -> None:
        ids = (*range(20, 52), 1000)
        committed = server.commit(
            [
                server.serve(
                    CLIENT,
                    request_changes={"prompt_root": prompt_root(ids)},
                    transcript_changes={"prompt_ids": ids},
                )
            ]
        )
        answer = committed.answers[0]
        leaf = leaf_arguments(answer, Part.PROMPT, 1)
        assert prove_transcript(network, answer, committed.evidence(0), *leaf) == Fault.TOKEN_ID

    def test_fingerprint(self, network: Network, server: Server) -> None:
        wrong = tuple((500 + i, i) for i in range(8))
        committed = server.commit([server.serve(CLIENT, transcript_changes={"fingerprints": (wrong,) * 40})])
        answer = committed.answers[0]
        leaf = leaf_arguments(answer, Part.FINGERPRINT, 4)
        assert prove_transcript(network, answer, committed.evidence(0), *leaf) == Fault.FINGERPRINT

    def test_uncommitted(self, network: Network, server: Server) -> None:
        answer = server.serve(CLIENT, transcript_changes={"prompt_ids": (1, 2)})
        before = network.stake_of(server.node)
        assert prove_transcript(network, answer, server.signed(answer.receipt)[1]) == Fault.PROMPT_ROOT
        assert network.stake_of(server.node) < before

    def test_refusals(self, network: Network, server: Server) -> None:
        committed = server.commit([server.serve(CLIENT, transcript_changes={"output_ids": tuple(range(300, 340))})])
        answer, evidence = committed.answers[0], committed.evidence(0)
        part, index, leaf, proof = leaf_arguments(answer, Part.OUTPUT, 1)
        with boa.reverts("offences: not the leaf"):
            prove_transcript(network, answer, evidence, part, index, leaf[:-1], proof)
        with boa.reverts("offences: not the leaf"):
            prove_transcript(network, answer, evidence, part, 0, leaf, proof)
        with boa.reverts("merkle: index is outside the tree"):
            prove_transcript(network, answer, evidence, part, 2, leaf, proof)
        with boa.reverts("offences: no such part"):
            prove_transcript(network, answer, evidence, 3, index, leaf, proof)
        other = server.serve(CLIENT, book=False)
        mixed = Answer(answer.request, answer.params, answer.receipt, other.transcript)
        with boa.reverts("offences: not the receipt's transcript"):
            prove_transcript(network, mixed, evidence)


class TestHostileValues:
    """Extremes that a node signs or commits: whatever they are, the fault is found and the node convicted."""

    @settings(max_examples=15)
    @given(data=st.data())
    def test_extreme_receipts_are_convicted(self, network: Network, data: st.DataObject) -> None:
        with boa.env.anchor():
            server = Server.start(network)
            changes = {
                name: data.draw(st.sampled_from([0, 2 ** fault_cases.bits_of(kind) - 1]))
                for name, kind in Receipt.ABI.items()
                if kind.startswith("uint")
            }
            answer = server.serve(CLIENT, receipt_changes=changes)
            committed = server.commit([answer], total_fee=1)
            expected = receipt_fault(
                answer.receipt, answer.request, answer.params, system.profile(), committed.batch
            ) or place_fault(answer.receipt, Place(committed.batch, 0))
            assert expected is not None
            if receipt_fault(answer.receipt, answer.request, answer.params, system.profile(), committed.batch):
                assert prove(network, answer, committed.evidence(0)) == expected
            else:
                one = committed.accuse(0)
                assert network.offences.prove_sequence(*one, *one, sender=ACCUSER) == expected
            assert network.log.status(committed.batch.id) == CONVICTED

    @settings(max_examples=12)
    @given(data=st.data())
    def test_extreme_pairs_are_convicted(self, network: Network, data: st.DataObject) -> None:
        with boa.env.anchor():
            server = Server.start(network)
            extremes = st.sampled_from([0, 1, 2**191, 2**192 - 1])
            first = {name: data.draw(extremes) for name in ("fee", "payer_cum", "node_cum")}
            second = {name: data.draw(extremes) for name in ("fee", "payer_cum", "node_cum")}
            seqs = data.draw(st.sampled_from([(0, 1), (0, 2**64 - 1), (2**64 - 2, 2**64 - 1)]))
            a = server.serve(CLIENT, receipt_changes=first | {"seq": seqs[0]})
            b = server.serve(CLIENT, receipt_changes=second | {"seq": seqs[1]})
            fault = sequence_fault(a.receipt, b.receipt)
            arguments = (*server.signed(a.receipt), *server.signed(b.receipt))
            if fault is None:
                with boa.reverts("offences: no fault"):
                    network.offences.prove_sequence(*arguments, sender=ACCUSER)
            else:
                assert network.offences.prove_sequence(*arguments, sender=ACCUSER) == fault

    def test_a_node_without_stake_is_still_convicted(self, network: Network) -> None:
        server = Server.start(network, stake=200 * POIP)
        committed = server.commit([server.serve(CLIENT, receipt_changes={"fee": 1})])
        for _ in range(40):
            network.registry.slash(
                server.node, 10**30, ACCUSER, 10**30, bytes(32), keccak(b"x"), sender=network.offences.address
            )
        assert network.stake_of(server.node) == 0
        assert prove(network, committed.answers[0], committed.evidence(0)) == Fault.FEE
        assert network.log.status(committed.batch.id) == CONVICTED

    def test_a_leaf_of_any_length(self, network: Network, server: Server) -> None:
        """The contract takes leaves of up to 512 bytes; a longer one cannot be shown, which is withholding."""
        for size in (0, 1, 127, 129, 512):
            with boa.env.anchor():
                fresh = Server.start(network, f"node {size}")
                answer = fresh.serve(CLIENT, 8)
                root = merkle_root([b"\x01" * size])
                header = header_hash(answer.request.struct_hash(), 0, statement_hash("x"))
                roots = TranscriptRoots(
                    answer.request.struct_hash(), 0, statement_hash("x"), answer.request.prompt_root, root, root
                )
                receipt = answer.receipt.replace(
                    transcript_root=transcript_root(header, answer.request.prompt_root, root, root)
                )
                committed = fresh.commit([Answer(answer.request, answer.params, receipt, answer.transcript)])
                judged = network.offences.prove_transcript(
                    receipt.values(),
                    committed.evidence(0),
                    answer.request.values(),
                    answer.params.values(),
                    roots.values(),
                    int(Part.OUTPUT),
                    0,
                    b"\x01" * size,
                    [],
                    sender=ACCUSER,
                )
                assert judged == Fault.LEAF_SIZE


def test_zero_addresses(network: Network) -> None:
    arguments = [network.log, network.registry, network.models, network.parameters]
    for i in range(4):
        with boa.reverts():
            changed = [*arguments[:i], "0x" + "00" * 20, *arguments[i + 1 :]]
            system.load(CONTRACTS / "disputes/Offences.vy", *changed)
