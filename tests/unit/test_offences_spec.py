"""The rules of offences: honest receipts show none, each rule catches its fault, and no value makes a rule fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from eth_hash.auto import keccak
from hypothesis import given, settings

from poip_chain.spec.objects import FinishReason, Part, SamplingParams
from poip_chain.spec.offences import (
    NO_PART,
    Fault,
    Place,
    TranscriptFault,
    TranscriptRoots,
    evidence_hash,
    is_equivocation,
    leaf_fault,
    params_fault,
    place_fault,
    receipt_fault,
    roots_fault,
    sequence_fault,
    transcript_faults,
)
from tests import fault_cases
from tests.fault_cases import PROFILE, Case, honest

OTHER = "0x" + "33" * 20


HONEST = [
    honest(),
    honest(tuple(range(300, 364)), FinishReason.LENGTH),
    honest((300,), FinishReason.CANCELLED),
    honest((), FinishReason.CANCELLED),
    honest((300, 11), FinishReason.STOP),
    honest((2, 7, 11), FinishReason.STOP, SamplingParams(0, stop_token_ids=(11,), ignore_eos=True)),
]


@pytest.mark.parametrize("case", HONEST)
def test_honest_receipts_show_nothing(case: Case) -> None:
    for batch in (None, case.batch):
        assert receipt_fault(case.receipt, case.request, case.params, PROFILE, batch) is None
    assert transcript_faults(case.receipt, case.request, case.params, PROFILE, case.transcript) == []
    assert sequence_fault(case.receipt, case.receipt, None, Place(case.batch, 0)) is None  # type: ignore[arg-type]
    assert not is_equivocation(case.receipt, case.receipt)


@pytest.mark.parametrize(
    ("receipt_changes", "request_changes", "fault"),
    [
        ({"fee": 1}, {}, Fault.FEE),
        ({}, {"max_tokens": 2}, Fault.MAX_TOKENS),
        ({"issued_at": 1001}, {}, Fault.DEADLINE),
        ({"model_id": bytes(32)}, {}, Fault.MODEL),
        ({"model_id": bytes(32)}, {"model_id": bytes(32)}, Fault.MODEL),
        ({}, {"profile_version": 2}, Fault.PROFILE),
        ({}, {"node": OTHER}, Fault.NODE),
        ({"node": OTHER}, {"node": OTHER}, Fault.NODE),
        ({"payer": OTHER}, {}, Fault.PAYER),
        ({"finish_reason": 1}, {}, Fault.SHORT_LENGTH),
        ({"finish_reason": 3}, {}, Fault.FINISH_REASON),
        ({"finish_reason": 255}, {}, Fault.FINISH_REASON),
        ({"node_cum": 1}, {}, Fault.CUMULATIVE),
        ({"payer_cum": 1}, {}, Fault.CUMULATIVE),
        ({"issued_at": 1000}, {}, None),
        ({}, {"node": "0x" + "00" * 20}, None),
    ],
)
def test_receipt_rules(receipt_changes: dict[str, Any], request_changes: dict[str, Any], fault: Fault | None) -> None:
    case = honest()
    receipt, request = case.receipt.replace(**receipt_changes), case.request.replace(**request_changes)
    assert receipt_fault(receipt, request, case.params, PROFILE, case.batch) is fault


def test_context_and_empty_rules() -> None:
    case = honest(tuple(range(300, 364)), FinishReason.LENGTH)
    small = replace(PROFILE, max_context=103)
    assert receipt_fault(case.receipt, case.request, case.params, small) is Fault.CONTEXT
    assert receipt_fault(case.receipt, case.request, case.params, replace(PROFILE, max_context=104)) is None
    assert receipt_fault(case.receipt, case.request, case.params, None) is None, "unknown profile"
    request = case.request.replace(prompt_tokens=0)
    receipt = case.receipt.replace(fee=request.fee(64))
    assert receipt_fault(receipt, request, case.params, None) is Fault.CONTEXT
    empty = honest((), FinishReason.CANCELLED)
    receipt = empty.receipt.replace(finish_reason=FinishReason.STOP)
    assert receipt_fault(receipt, empty.request, empty.params, PROFILE) is Fault.EMPTY


@pytest.mark.parametrize(
    ("fields", "broken"),
    [
        ((0, 1000, 0, ()), False),
        ((100, 1000, 0, (0, 999)), False),
        ((2000, 1000, 0, ()), False),
        ((99, 1000, 0, ()), True),
        ((2001, 1000, 0, ()), True),
        ((700, 999, 0, ()), True),
        ((700, 1000, 1, ()), True),
        ((700, 1000, 0, (1000,)), True),
        ((700, 1000, 0, (5, 5)), True),
        ((700, 1000, 0, (6, 5)), True),
    ],
)
def test_params_rule(fields: tuple[Any, ...], broken: bool) -> None:
    assert params_fault(*fields, PROFILE) is broken


def test_params_rule_is_left_out_where_they_are_unknown() -> None:
    case = honest(params=SamplingParams(99))
    assert receipt_fault(case.receipt, case.request, case.params, PROFILE) is Fault.PARAMETERS
    assert receipt_fault(case.receipt, case.request, None, PROFILE) is None
    assert receipt_fault(case.receipt, case.request, case.params, None) is None


@pytest.mark.parametrize(
    ("receipt_changes", "batch_changes", "index", "fault"),
    [
        ({"model_id": bytes(32)}, {}, 0, Fault.MODEL),
        ({"node": OTHER}, {}, 0, Fault.NODE),
        ({"finish_reason": 3}, {}, 0, Fault.FINISH_REASON),
        ({"payer_cum": 0}, {}, 0, Fault.CUMULATIVE),
        ({"seq": 4}, {}, 0, Fault.SEQUENCE),
        ({}, {"count": 2}, 1, Fault.SEQUENCE),
        ({"seq": 6}, {"count": 2}, 1, None),
        ({"seq": 6, "node_cum": 10**30}, {"count": 2}, 1, Fault.BATCH_TOTAL),
        ({}, {"node_cum": 1}, 0, Fault.BATCH_TOTAL),
        ({}, {"total_fee": 1}, 0, Fault.BATCH_TOTAL),
        ({}, {"count": 2, "total_fee": 1}, 0, Fault.BATCH_TOTAL),
    ],
)
def test_place_rules(
    receipt_changes: dict[str, Any], batch_changes: dict[str, Any], index: int, fault: Fault | None
) -> None:
    case = honest()
    assert case.batch is not None
    place = Place(case.batch.replace(**batch_changes), index)
    receipt = case.receipt.replace(**receipt_changes)
    assert place_fault(receipt, place) is fault
    assert sequence_fault(receipt, receipt, place, place) is fault
    assert sequence_fault(receipt, receipt) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"node_cum": 0}, Fault.NODE_TOTAL),
        ({"node_cum": 10**30}, Fault.NODE_TOTAL),
        ({"seq": 9, "node_cum": 10**30}, None),
        ({"seq": 9, "node_cum": 0}, Fault.NODE_TOTAL),
        ({"payer_cum": 0}, Fault.PAYER_TOTAL),
        ({"payer_cum": 10**30}, None),
        ({"payer": OTHER, "payer_cum": 0}, None),
        ({"seq": 5, "node_cum": 0}, None),
        ({"seq": 4, "node_cum": 0}, None),
        ({"node": OTHER, "node_cum": 0}, None),
    ],
)
def test_sequence_rules(changes: dict[str, Any], fault: Fault | None) -> None:
    case = honest()
    a = case.receipt
    b = a.replace(seq=6, fee=7, node_cum=a.node_cum + 7, payer_cum=a.payer_cum + 7, request_hash=keccak(b"b"))
    b = b.replace(**changes)
    assert sequence_fault(a, b) is fault
    assert case.batch is not None
    foreign = Place(case.batch.replace(node=OTHER), 0)
    assert sequence_fault(a, b, foreign) is None, "another node's batch is no evidence"


def test_equivocation() -> None:
    a = honest().receipt
    assert is_equivocation(a, a.replace(fee=a.fee + 1))
    assert is_equivocation(a, a.replace(seq=6))
    assert is_equivocation(a, a.replace(request_hash=bytes(32)))
    assert not is_equivocation(a, a.replace(seq=6, request_hash=bytes(32)))
    assert not is_equivocation(a, a.replace(node=OTHER))
    assert evidence_hash(b"\x01" * 32, b"\x02" * 32) == keccak(b"\x01" * 32 + b"\x02" * 32)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"request_hash": bytes(32)}, Fault.HEADER),
        ({"finish_reason": FinishReason.LENGTH}, Fault.HEADER),
        ({"prompt_ids": (1, 2, 3)}, Fault.PROMPT_ROOT),
        ({"output_ids": ()}, Fault.LEAF_SIZE),
        ({"fingerprints": ()}, Fault.LEAF_SIZE),
    ],
)
def test_header_and_root_rules(changes: dict[str, Any], fault: Fault) -> None:
    case = honest()
    transcript = replace(case.transcript, **changes)
    found = transcript_faults(case.receipt, case.request, case.params, PROFILE, transcript)
    assert found == [TranscriptFault(fault, NO_PART, 0)]


def test_roots_of_an_empty_answer() -> None:
    case = honest((), FinishReason.CANCELLED)
    roots = TranscriptRoots.of(case.transcript)
    assert roots.transcript_root() == case.receipt.transcript_root
    assert roots_fault(case.receipt, case.request, roots) is None
    assert roots_fault(case.receipt, case.request, replace(roots, output_root=b"\1" * 32)) is Fault.LEAF_SIZE
    assert roots_fault(case.receipt, case.request, replace(roots, fingerprint_root=b"\1" * 32)) is Fault.LEAF_SIZE


@pytest.mark.parametrize(
    ("output_ids", "reason", "fault", "leaf_index"),
    [
        ((300, 1000, 2), FinishReason.STOP, Fault.TOKEN_ID, 0),
        ((300, 2, 301), FinishReason.CANCELLED, Fault.EARLY_END, 0),
        ((300, 11, 2), FinishReason.STOP, Fault.EARLY_END, 0),
        ((300, 301), FinishReason.STOP, Fault.MISSING_END, 0),
        ((*range(300, 331), 7, 2), FinishReason.STOP, Fault.EARLY_END, 0),
        (tuple(range(300, 333)), FinishReason.STOP, Fault.MISSING_END, 1),
    ],
)
def test_output_rules(output_ids: tuple[int, ...], reason: FinishReason, fault: Fault, leaf_index: int) -> None:
    case = honest(output_ids, reason)
    found = transcript_faults(case.receipt, case.request, case.params, PROFILE, case.transcript)
    assert found == [TranscriptFault(fault, Part.OUTPUT, leaf_index)]


def test_an_end_id_is_no_end_if_it_is_ignored() -> None:
    case = honest((300, 301, 2), FinishReason.STOP, SamplingParams(0, stop_token_ids=(11,), ignore_eos=True))
    found = transcript_faults(case.receipt, case.request, case.params, PROFILE, case.transcript)
    assert found == [TranscriptFault(Fault.MISSING_END, Part.OUTPUT, 0)]


def test_prompt_and_size_rules() -> None:
    case = honest()
    leaf = case.transcript.leaves(Part.PROMPT)[1]
    arguments = (case.receipt, case.request, case.params, PROFILE, Part.PROMPT, 1)
    assert leaf_fault(*arguments, leaf) is None
    for wrong in (b"", leaf[:-1], leaf + b"\0", leaf + leaf):
        assert leaf_fault(*arguments, wrong) is Fault.LEAF_SIZE
    assert leaf_fault(*arguments, b"\xff" * len(leaf)) is Fault.TOKEN_ID


RIGHT = tuple((500 + i, -i) for i in range(8))


@pytest.mark.parametrize(
    ("position", "fault"),
    [
        (RIGHT, None),
        (tuple((500 + i, 0) for i in range(8)), None),
        (tuple((i, 2**15 - 1 - 9000 * i) for i in range(8)), None),
        (RIGHT[::-1], Fault.FINGERPRINT),
        ((RIGHT[1], RIGHT[0], *RIGHT[2:]), Fault.FINGERPRINT),
        (tuple((507 - i, 0) for i in range(8)), Fault.FINGERPRINT),
        ((*RIGHT[:7], (500, -7)), Fault.FINGERPRINT),
        ((*RIGHT[:7], (506, -6)), Fault.FINGERPRINT),
        ((*RIGHT[:7], (1000, -7)), Fault.TOKEN_ID),
    ],
)
def test_fingerprint_rules(position: tuple[tuple[int, int], ...], fault: Fault | None) -> None:
    case = honest(tuple(range(300, 309)), FinishReason.CANCELLED)
    transcript = replace(case.transcript, fingerprints=(*case.transcript.fingerprints[:8], position))
    found = transcript_faults(case.receipt, case.request, case.params, PROFILE, transcript)
    assert found == ([TranscriptFault(fault, Part.FINGERPRINT, 1)] if fault else [])


@settings(max_examples=80)
@given(fault_cases.cases(spoil_most=3))
def test_no_value_makes_a_receipt_rule_fail(case: Case) -> None:
    receipt_fault(case.receipt, case.request, case.params, PROFILE, case.batch)
    if case.batch is not None:
        place_fault(case.receipt, Place(case.batch, case.index))
    transcript_faults(case.receipt, case.request, case.params, PROFILE, case.transcript)


@settings(max_examples=50)
@given(fault_cases.cases(spoil_most=0))
def test_what_is_right_beside_its_batch_is_right_alone(case: Case) -> None:
    """A batch only adds rules."""
    alone = receipt_fault(case.receipt, case.request, case.params, PROFILE)
    committed = receipt_fault(case.receipt, case.request, case.params, PROFILE, case.batch)
    assert committed is not None or alone is None


@settings(max_examples=50)
@given(fault_cases.leaf_cases())
def test_no_value_makes_a_leaf_rule_fail(found: tuple[Case, Part, int, bytes]) -> None:
    case, part, index, leaf = found
    arguments = (case.receipt, case.request)
    with_all = leaf_fault(*arguments, case.params, PROFILE, part, index, leaf)
    for params, profile in ((None, PROFILE), (case.params, None), (None, None)):
        with_less = leaf_fault(*arguments, params, profile, part, index, leaf)
        assert with_less is None or with_all is not None, "knowing less shows no fault that knowing more hides"
