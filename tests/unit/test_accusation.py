"""Claims and their scores in the spec: whole answers, subsets, the shortest list that convicts, what a claim can hold."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec import accusation, scores
from poip_chain.spec.accusation import Point, Points, Term, cheapest_points, convicts, position_terms
from poip_chain.spec.objects import Part, Profile, ThresholdRow
from poip_chain.spec.types import Address
from tests.support.claims import LOGIT, PROFILE, answered, one_margin_each, random_points
from tests.vectors.generate_numeric import render
from tests.vectors.generate_scoring import scoring_vectors

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
SMALL = dataclasses.replace(PROFILE, vocab_size=40)
TABLES = dataclasses.replace(
    PROFILE,
    margin_dead_zone=10,
    margin_hard_limit=1000,
    margin_table=(ThresholdRow(100, 300),),
    fingerprint_table=(ThresholdRow(100, 200),),
)


def margin(position: int, value: int) -> Term:
    return Term(Point(position, 1, value, 0), value)


def stated(position: int, token: int, value: int) -> Term:
    return Term(Point(position, token, value, 0), value)


def test_vectors_are_what_the_spec_gives() -> None:
    assert (VECTORS / "scoring.json").read_text() == render(scoring_vectors())
    cases = json.loads((VECTORS / "scoring.json").read_text())["cases"]
    assert {case["scored"][0] for case in cases} == {False, True}


# The score of a whole answer, and of parts of it


@settings(max_examples=40)
@given(st.integers(0, 2**64), st.sampled_from([0, 1, 700, 2000]))
def test_terms_of_a_position_are_its_scores(seed: int, temperature: int) -> None:
    """The margin against the sampler's choice and the sum over all tokens are those of spec/scores.py."""
    rng = random.Random(seed)
    answer = answered(rng, 3, temperature_milli=temperature, vocab_size=SMALL.vocab_size)
    logits = [rng.randint(-12 * LOGIT, 12 * LOGIT) for _ in range(SMALL.vocab_size)]
    position, key = rng.randrange(3), answer.request.seed()
    claimed, entries = answer.transcript.output_ids[position], answer.transcript.fingerprints[position]
    of_margin, others = position_terms(position, logits, claimed, entries, key, temperature, SMALL)
    assert of_margin.value == scores.margin(logits, claimed, key, position, temperature)
    zones = SMALL.fingerprint_dead_zone, SMALL.fingerprint_tolerance
    assert sum(term.value for term in others) == scores.fingerprint(logits, claimed, entries, *zones)
    assert all(term.value > 0 for term in others)
    # Any other token at the position is at most as good a margin point: no choice of points adds to the score.
    for token in range(SMALL.vocab_size):
        point = Point(position, token, logits[token], logits[claimed])
        assert accusation.margin_of(point, claimed, key, temperature) <= of_margin.value


@settings(max_examples=40)
@given(st.integers(0, 2**64))
def test_fewer_points_never_score_more(seed: int) -> None:
    rng = random.Random(seed)
    answer = answered(rng, 60)
    points = random_points(rng, answer, 12, 12)
    whole = accusation.score(answer.batch, answer.claim(points), PROFILE, bytes(32))
    fewer = Points(
        tuple(p for p in points.margins if rng.random() < 0.6),
        tuple(p for p in points.fingerprints if rng.random() < 0.6),
    )
    part = accusation.score(answer.batch, answer.claim(fewer), PROFILE, bytes(32))
    for name in ("margin_sum", "margin_max", "fingerprint_sum", "convicts"):
        assert getattr(part, name) <= getattr(whole, name)


@pytest.mark.parametrize(
    ("tokens", "sums", "verdict"),
    [
        (100, (300, 1000, 200), False),
        (100, (301, 0, 0), True),
        (100, (0, 1001, 0), True),
        (100, (0, 0, 201), True),
        (99, (10**9, 1000, 10**9), False),
        (1, (0, 1001, 0), True),
        (150, (450, 0, 300), False),
        (150, (451, 0, 0), True),
        (101, (303, 0, 0), False),
    ],
)
def test_limits(tokens: int, sums: tuple[int, int, int], verdict: bool) -> None:
    assert convicts(TABLES, tokens, *sums) is verdict


# The cheapest list


def test_one_margin_above_the_hard_limit_is_enough() -> None:
    margins = [margin(i, value) for i, value in enumerate((1000, 1001, 1500, 900))]
    points = cheapest_points(margins, [stated(0, 1, 10**6)], 100, TABLES)
    assert points == Points(margins=(margins[2].point,))
    # At any length, table or not.
    assert cheapest_points(margins, [], 1, TABLES) == points
    assert cheapest_points(margins[:1], [], 1, TABLES) is None


def test_nothing_to_name() -> None:
    assert cheapest_points([], [], 100, TABLES) is None
    assert cheapest_points([margin(0, 310)], [stated(0, 1, 200)], 100, TABLES) is None, "both are at their limits"
    assert cheapest_points([margin(0, 311)], [], 100, TABLES) is not None
    assert cheapest_points([], [stated(0, 1, 201)], 100, TABLES) is not None
    assert cheapest_points([margin(0, 311)], [stated(0, 1, 201)], 99, TABLES) is None, "below the first length"


def test_the_shorter_kind_is_taken_and_at_equal_length_the_one_with_fewer_bytes() -> None:
    margins, fingerprints = [margin(0, 200), margin(70, 200)], [stated(0, 2, 150), stated(0, 1, 150)]
    assert cheapest_points(margins, [stated(3, 1, 201)], 100, TABLES) == Points((), (Point(3, 1, 201, 0),))
    # Two margins in two leaves of 128 bytes against two tokens that need 128 and 384.
    points = cheapest_points(margins, fingerprints, 100, TABLES)
    assert points == Points(margins=tuple(term.point for term in margins))
    # In order, whatever order the terms come in.
    points = cheapest_points(margins[:1], fingerprints, 100, TABLES)
    assert points == Points((), (Point(0, 1, 150, 0), Point(0, 2, 150, 0)))


def test_a_lonely_point_gives_way_to_one_in_a_leaf_that_is_brought_anyway() -> None:
    margins = [margin(0, 260), margin(40, 75), margin(5, 71), margin(6, 70)]
    points = cheapest_points(margins, [], 100, TABLES)
    assert points is not None
    # 250 + 65 > 300 in two leaves; 250 + 61 too, in one.
    assert [p.position for p in points.margins] == [0, 5]
    margins[2] = margin(5, 60)
    points = cheapest_points([*margins[:3]], [], 100, TABLES)
    assert points is not None and [p.position for p in points.margins] == [0, 40]


terms = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(0, 160)), max_size=9)


@settings(max_examples=200)
@given(terms, terms)
def test_no_shorter_list_convicts(first: list[tuple[int, int, int]], second: list[tuple[int, int, int]]) -> None:
    """Against all subsets: the list convicts, none shorter does, and there is one if all terms together convict."""
    margins = [margin(position, value) for position, value in {p: v for p, _, v in first}.items()]
    fingerprints = [stated(p, t, v) for (p, t), v in {(p, t): v for p, t, v in second}.items()]

    def enough(chosen: list[Term], kind: str) -> bool:
        if kind == "margins":
            total = sum(scores.margin_term(term.value, TABLES.margin_dead_zone) for term in chosen)
            return convicts(TABLES, 100, total, max((term.value for term in chosen), default=0), 0)
        return convicts(TABLES, 100, 0, 0, sum(term.value for term in chosen))

    points = cheapest_points(margins, fingerprints, 100, TABLES)
    sizes = [
        size
        for kind, of_kind in (("margins", margins), ("fingerprints", fingerprints))
        for size in range(len(of_kind) + 1)
        if any(enough(list(chosen), kind) for chosen in combinations(of_kind, size))
    ]
    if points is None:
        assert not sizes
        return
    assert len(points.margins) + len(points.fingerprints) == min(sizes)
    assert not points.margins or not points.fingerprints
    for kind, of_kind, chosen in (
        ("margins", margins, points.margins),
        ("fingerprints", fingerprints, points.fingerprints),
    ):
        values = {term.point: term for term in of_kind}
        assert enough([values[point] for point in chosen], kind) or not chosen
        assert list(chosen) == sorted(chosen, key=lambda p: (p.position, p.token))


def test_a_list_fits_a_claim_or_there_is_none() -> None:
    """64 points at most, in 32 leaves of ids or 21 of the fingerprint: what stands elsewhere is left out."""
    thin = dataclasses.replace(TABLES, margin_table=(ThresholdRow(1, 1),), fingerprint_table=(ThresholdRow(1, 1),))
    tokens = 4096
    limit = scores.threshold(thin.margin_table, tokens)
    assert limit == tokens
    # 64 of one leaf and more make it, 65 are too many.
    enough = [margin(i, 10 + limit // 64 + 1) for i in range(64)]
    points = cheapest_points(enough, [], tokens, thin)
    assert points is not None and len(points.margins) == 64
    assert cheapest_points([margin(i, 10 + limit // 64) for i in range(65)], [], tokens, thin) is None
    # One in each leaf of ids: the 33rd largest finds no room, another in a leaf that is brought does.
    spread = [margin(32 * i, 10 + limit // 33) for i in range(33)]
    assert cheapest_points(spread, [], tokens, thin) is None
    points = cheapest_points([*spread, margin(1, 10 + limit // 34), margin(2, 999)], [], tokens, thin)
    assert points is not None
    answer = answered(random.Random(1), tokens, vocab_size=PROFILE.vocab_size)
    assert len(answer.claim(points).output_leaves) <= accusation.MAX_BYTES[Part.OUTPUT]
    spread = [stated(8 * i, 1, limit // 21 + 1) for i in range(0, 44, 2)]
    points = cheapest_points([], spread, tokens, thin)
    assert points is not None and len(points.fingerprints) == 21
    assert len(answer.claim(points).fingerprint_leaves) <= accusation.MAX_BYTES[Part.FINGERPRINT]
    assert cheapest_points([], [stated(8 * i, 1, limit // 22 + 1) for i in range(0, 44, 2)], tokens, thin) is None


# Claims


def test_a_claim_of_what_it_cannot_hold_is_refused() -> None:
    rng = random.Random(1)
    answer = answered(rng, 2200)
    with pytest.raises(InvalidInput, match="64 points"):
        answer.claim(one_margin_each(rng, answer, 65, False))
    with pytest.raises(InvalidInput, match="at most 32 leaves of OUTPUT"):
        answer.claim(one_margin_each(rng, answer, 33, True))
    with pytest.raises(InvalidInput, match="at most 21 leaves of FINGERPRINT"):
        answer.claim(Points((), tuple(Point(8 * i, 1, 2, 1) for i in range(22))))
    with pytest.raises(InvalidInput, match="past the end"):
        answer.claim(Points((Point(2208, 1, 2, 1),)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("position", -1), ("position", 2**32), ("token", 2**32), ("logit", 2**31), ("claimed_logit", -(2**31) - 1)],
)
def test_a_point_is_what_the_contract_takes(field: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=field):
        Point(**{"position": 0, "token": 0, "logit": 0, "claimed_logit": 0, field: value})


def test_what_an_accuser_commits_to() -> None:
    """Everything that is his to choose moves the commitment, and nobody can use another's."""
    rng = random.Random(2)
    answer = answered(rng, 20)
    claim = answer.claim(one_margin_each(rng, answer, 3, True))
    accuser, other = (Address("0x" + digit * 40) for digit in "34")
    made = claim.commitment(b"\x01" * 32, accuser)
    changed = [
        claim.commitment(b"\x02" * 32, accuser),
        claim.commitment(b"\x01" * 32, other),
        dataclasses.replace(claim, trace_root=bytes(32)).commitment(b"\x01" * 32, accuser),
        dataclasses.replace(claim, index=claim.index + 1).commitment(b"\x01" * 32, accuser),
        dataclasses.replace(claim, points=Points(claim.points.margins[1:])).commitment(b"\x01" * 32, accuser),
        dataclasses.replace(claim, points=Points((), claim.points.margins)).commitment(b"\x01" * 32, accuser),
    ]
    assert len({made, *changed}) == 7
    with pytest.raises(InvalidInput, match="32 bytes"):
        claim.commitment(b"short", accuser)


def test_the_profile_of_the_batch_judges() -> None:
    """A request of another profile or model is scored by the batch's, which the caller brings."""
    rng = random.Random(3)
    answer = answered(rng, 16, request_changes={"profile_version": 9}, temperature_milli=0)
    claim = answer.claim(one_margin_each(rng, answer, 1, False))
    strict: Profile = dataclasses.replace(PROFILE, margin_hard_limit=0)
    assert accusation.score(answer.batch, claim, strict, bytes(32)).convicts
    lax = dataclasses.replace(PROFILE, margin_hard_limit=2**63, margin_table=())
    assert not accusation.score(answer.batch, claim, lax, bytes(32)).convicts
