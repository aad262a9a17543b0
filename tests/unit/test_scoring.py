"""The fast scores equal the plain ones of spec/scores.py, on full and on listed rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.proof.fetch import Record
from poip_chain.proof.reexecution import Row
from poip_chain.proof.scoring import judge, score_position
from poip_chain.spec import scores
from poip_chain.spec.objects import Profile, Receipt, Request, SamplingParams, ThresholdRow
from poip_chain.spec.sampler import sample
from poip_chain.spec.scores import Verdict
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import ZERO_ADDRESS

VOCABULARY = 40
PROFILE = Profile(
    max_context=64,
    vocab_size=VOCABULARY,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    min_temperature_milli=100,
    max_temperature_milli=2000,
    end_token_ids=(0,),
    margin_dead_zone=1000,
    margin_hard_limit=3 * 65536,
    margin_table=(ThresholdRow(1, 65536),),
    fingerprint_dead_zone=2,
    fingerprint_tolerance=3,
    fingerprint_table=(ThresholdRow(1, 64),),
)


def record(output_ids: tuple[int, ...], fingerprints: tuple, temperature: int, seed: bytes) -> Record:
    params = SamplingParams(temperature)
    request = Request(
        client=ZERO_ADDRESS,
        node=ZERO_ADDRESS,
        model_id=bytes(32),
        profile_version=1,
        prompt_root=bytes(32),
        prompt_tokens=2,
        params_hash=params.params_hash(),
        max_tokens=len(output_ids),
        input_price=0,
        output_price=0,
        client_seed=seed,
        client_nonce=bytes(32),
        deadline=1,
    )
    receipt = Receipt(
        ZERO_ADDRESS, 0, request.struct_hash(), bytes(32), bytes(32), len(output_ids), 1, 0, ZERO_ADDRESS, 0, 0, 1
    )
    transcript = Transcript(request.struct_hash(), 1, "", (1, 2), output_ids, fingerprints)
    return Record(request, b"", params, receipt, transcript, bytes(32))


logit_rows = st.lists(st.integers(-20 * 65536, 20 * 65536), min_size=VOCABULARY, max_size=VOCABULARY)


@st.composite
def stated_positions(draw: st.DrawFn) -> tuple[int, tuple[tuple[int, int], ...]]:
    chosen = draw(st.integers(0, VOCABULARY - 1))
    others = [token for token in range(VOCABULARY) if token != chosen]
    ids = draw(st.lists(st.sampled_from(others), min_size=8, max_size=8, unique=True))
    values = draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=8, max_size=8))
    return chosen, tuple(sorted(zip(ids, values, strict=True), key=lambda entry: (-entry[1], entry[0])))


@given(logit_rows, stated_positions(), st.sampled_from([0, 100, 700, 2000]), st.binary(min_size=32, max_size=32))
@settings(max_examples=60)
def test_full_rows_score_as_the_spec_does(
    logits: list[int], position: tuple[int, tuple[tuple[int, int], ...]], temperature: int, client_seed: bytes
) -> None:
    chosen, entries = position
    case = record((chosen,), (entries,), temperature, client_seed)
    found = score_position(case, 0, Row(np.array(logits, dtype=np.int64)), PROFILE)
    seed = case.request.seed()
    assert found.best_token == sample(logits, seed, 0, temperature)
    assert found.margin == scores.margin(logits, chosen, seed, 0, temperature)
    assert found.fingerprint == scores.fingerprint(
        logits, chosen, entries, PROFILE.fingerprint_dead_zone, PROFILE.fingerprint_tolerance
    )


@given(logit_rows, stated_positions(), st.sampled_from([0, 700]), st.integers(9, VOCABULARY - 1))
@settings(max_examples=60)
def test_a_row_of_listed_tokens_never_scores_higher(
    logits: list[int], position: tuple[int, tuple[tuple[int, int], ...]], temperature: int, size: int
) -> None:
    chosen, entries = position
    case = record((chosen,), (entries,), temperature, bytes(32))
    top = sorted({*sorted(range(VOCABULARY), key=lambda token: -logits[token])[:size], chosen})
    listed = Row(np.array([logits[token] for token in top], dtype=np.int64), np.array(top, dtype=np.int64))
    part = score_position(case, 0, listed, PROFILE)
    whole = score_position(case, 0, Row(np.array(logits, dtype=np.int64)), PROFILE)
    assert part.margin <= whole.margin
    assert part.fingerprint <= whole.fingerprint


class FixedSource:
    """Serves given rows: stands in for a model."""

    name = "fixed rows"

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def rows(self, answers):
        for i, answer in enumerate(answers):
            for position in range(len(answer.output_ids)):
                yield i, position, Row(np.array(self._rows[position], dtype=np.int64))


def entries_of(logits: list[int], chosen: int) -> tuple[tuple[int, int], ...]:
    values = [(t, scores.canonical_value(logits[t], logits[chosen])) for t in range(VOCABULARY) if t != chosen]
    return tuple(sorted(values, key=lambda entry: (-entry[1], entry[0]))[:8])


def test_verdicts_of_an_honest_and_a_wrong_answer() -> None:
    generator = np.random.default_rng(7)
    rows = [[int(x) for x in generator.normal(0, 4 * 65536, VOCABULARY)] for _ in range(4)]
    seed = record((0,), (), 0, bytes(32)).request.seed()
    honest = tuple(sample(row, seed, i, 700) for i, row in enumerate(rows))
    stated = tuple(entries_of(row, token) for row, token in zip(rows, honest, strict=True))
    good = record(honest, stated, 700, bytes(32))
    assert judge([good], PROFILE, FixedSource(rows))[0].verdict is Verdict.HONEST

    worst = min(range(VOCABULARY), key=rows[2].__getitem__)
    wrong = (*honest[:2], worst, honest[3])
    flipped = record(wrong, (*stated[:2], entries_of(rows[2], worst), stated[3]), 700, bytes(32))
    judgement = judge([flipped], PROFILE, FixedSource(rows))[0]
    assert judgement.verdict is Verdict.FRAUD
    assert max(range(4), key=lambda i: judgement.positions[i].margin) == 2


def test_ids_outside_the_vocabulary_are_not_executed() -> None:
    bad = record((VOCABULARY,), (entries_of([0] * VOCABULARY, 0),), 0, bytes(32))
    with pytest.raises(InvalidInput):
        judge([bad], PROFILE, FixedSource([[0] * VOCABULARY]))
