"""What is published on chain chunk by chunk reads as the transcript that was committed, or shows its fault."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.proof.publication import CHUNK, FIRST_CHUNK, Answer, assemble, missing_chunks, published_leaves
from poip_chain.spec.objects import Part
from poip_chain.spec.offences import Fault, leaf_fault
from tests.engines.node_kit import PROFILE
from tests.support.records import published, record


def test_chunks_are_asked_for_in_order() -> None:
    found = record(prompt_tokens=300, output_tokens=70)
    answers = published(found)
    known: dict[tuple[Part, int], Answer] = {}
    order = []
    while missing := missing_chunks(known):
        chunk = missing[0]
        order.append(chunk)
        known[chunk] = answers[chunk]
    assert order[0] == FIRST_CHUNK
    assert order[1:] == [(Part.PROMPT, 0), (Part.PROMPT, 8), (Part.FINGERPRINT, 0), (Part.FINGERPRINT, 8)]
    assert set(known) == set(answers)


def test_an_answer_without_tokens_has_no_chunks_but_the_first() -> None:
    found = record(output_tokens=0)
    answers = published(found)
    first = {FIRST_CHUNK: answers[FIRST_CHUNK]}
    assert missing_chunks(first)[0] == (Part.PROMPT, 0)
    assert published_leaves(first) == {Part.OUTPUT: [], Part.FINGERPRINT: []}
    both = first | {(Part.PROMPT, 0): answers[Part.PROMPT, 0]}
    assert missing_chunks(both) == []
    assert assemble(both).transcript.output_ids == ()


def test_a_part_counts_once_it_is_whole() -> None:
    answers = published(record(prompt_tokens=300, output_tokens=70))
    some = {chunk: answers[chunk] for chunk in ((Part.OUTPUT, 0), (Part.PROMPT, 0))}
    assert set(published_leaves(some)) == {Part.OUTPUT}
    assert missing_chunks(some)[0] == (Part.PROMPT, 8)


@given(st.integers(1, 700), st.integers(0, 300), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_what_is_assembled_is_the_original(prompt: int, output: int, order: random.Random) -> None:
    found = record(prompt, output)
    answers = list(published(found).items())
    order.shuffle(answers)
    again = assemble(dict(answers))
    transcript = found.transcript
    assert (again.transcript.prompt_ids, again.transcript.output_ids) == (transcript.prompt_ids, transcript.output_ids)
    assert again.transcript.fingerprints == transcript.fingerprints
    assert (again.receipt, again.request, again.params) == (found.receipt, found.request, found.params)
    assert again.roots().transcript_root() == found.receipt.transcript_root


def test_an_enormous_claim_costs_no_time() -> None:
    """A receipt may claim 2**32 - 1 tokens; whoever reads its answers must not count them all."""
    found = record()
    receipt = found.receipt.replace(output_tokens=2**32 - 1)
    answer = Answer(receipt, found.request, found.params, found.roots(), (), ())
    assert set(published_leaves({FIRST_CHUNK: answer})) == set()
    assert missing_chunks({FIRST_CHUNK: answer})[0] == (Part.PROMPT, 0)


@pytest.mark.parametrize(
    ("part", "leaf", "fault"),
    [
        (Part.OUTPUT, b"\x01\x02\x03", Fault.LEAF_SIZE),
        (Part.OUTPUT, b"", Fault.LEAF_SIZE),
        (Part.FINGERPRINT, b"\0" * 144, Fault.FINGERPRINT),
        (Part.OUTPUT, b"\xff" * 12, Fault.TOKEN_ID),
    ],
)
def test_leaves_that_do_not_parse_are_faults_not_errors(part: Part, leaf: bytes, fault: Fault) -> None:
    found = record()
    answers = published(found)
    known = answers[part, 0]
    answers[part, 0] = Answer(known.receipt, known.request, known.params, known.roots, (leaf,), known.receipt_proof)
    leaves = published_leaves(answers)
    assert leaves[part] == [leaf]
    assert leaf_fault(found.receipt, found.request, found.params, PROFILE, part, 0, leaf) is fault


def test_events_are_read_as_they_are() -> None:
    """As the follower gives them: structs as dictionaries. Parameters may be ones that nobody may sign."""
    found = record()
    roots = found.roots()
    args = {
        "receipt": dict(zip(found.receipt.ABI, found.receipt.values(), strict=True)),
        "request": dict(zip(found.request.ABI, found.request.values(), strict=True)),
        "params": {
            "temperature_milli": 0,
            "top_p_milli": 1000,
            "top_k": 0,
            "stop_token_ids": [9, 3, 3],
            "ignore_eos": False,
        },
        "roots": {
            "request_hash": roots.request_hash,
            "finish_reason": roots.finish_reason,
            "statement_hash": roots.statement_hash,
            "prompt_root": roots.prompt_root,
            "output_root": roots.output_root,
            "fingerprint_root": roots.fingerprint_root,
        },
        "leaves": found.transcript.leaves(Part.OUTPUT),
    }
    answer = Answer.from_event({**args, "receipt_proof": [b"p" * 32]})
    assert (answer.receipt, answer.request, answer.roots) == (found.receipt, found.request, roots)
    assert answer.params.stop_token_ids == (9, 3, 3)
    assert len(answer.params.params_hash()) == 32
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
    assert CHUNK == 8
