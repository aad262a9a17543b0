"""Scoring.vy and noise.vy against the spec: sums bit for bit, every refusal by its name, hostile transcripts, noise."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boa
import pytest
from eth_abi.abi import decode
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec import accusation, sampler
from poip_chain.spec.accusation import Claim, Point, Points
from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.objects import Batch, Part, Profile, SamplingParams, ThresholdRow
from poip_chain.spec.offences import Fault, leaf_fault
from tests.contracts import system
from tests.support.claims import PROFILE, Answered, answered, one_margin_each, point, random_points
from tests.vectors.generate_numeric import EDGE_BITS
from tests.vectors.generate_scoring import from_plain

DISPUTES = system.CONTRACTS / "disputes"
VECTORS = Path(__file__).resolve().parent.parent / "vectors"
FIELDS = [field.name for field in dataclasses.fields(accusation.Scored)]
SCORED = "(bool,uint256,uint256,uint256,bytes32,uint32,uint32,bytes32,bytes32,bytes32)"
TEMPERATURES = (0, 1, 100, 700, 2000, 2**32 - 1)


@pytest.fixture(scope="module")
def held() -> Any:
    """Log and registry of models, as told."""
    return system.load(system.HARNESS / "scoring_harness.vy")


@pytest.fixture(scope="module")
def contract(held: Any) -> Any:
    return system.load(DISPUTES / "Scoring.vy", held, held)


def expected(batch: Batch, claim: Claim, profile: Profile) -> tuple[Any, ...] | None:
    """What the spec says; None for a refusal."""
    try:
        scored = accusation.score(batch, claim, profile, keccak(batch.model_id))
    except InvalidInput:
        return None
    return tuple(getattr(scored, name) for name in FIELDS)


def ask(contract: Any, batch: Batch, claim: Claim) -> tuple[Any, ...] | str:
    """What the contract says, or the reason of its refusal."""
    data = contract.score.prepare_calldata(batch.values(), claim.values())
    # Without the contract's source at hand: titanoboa fails to read the variables of a call that stopped half-way.
    computation = boa.env.execute_code(contract.address, data=data)
    if not computation.is_error:
        return decode([SCORED], computation.output)[0]  # type: ignore[no-any-return]
    assert computation.output[:4] == keccak(b"Error(string)")[:4], "every refusal gives a reason"
    return str(decode(["string"], computation.output[4:])[0])


def found(held: Any, contract: Any, batch: Batch, claim: Claim, profile: Profile) -> tuple[Any, ...] | None:
    """What the contract says; None for a refusal."""
    held.hold(batch.values(), profile.values())
    scored = ask(contract, batch, claim)
    return None if isinstance(scored, str) else scored


tables = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2**22)), max_size=8).map(
    lambda rows: tuple(ThresholdRow(*row) for row in sorted(dict(rows).items()))
)
profiles = st.builds(
    lambda **changes: dataclasses.replace(PROFILE, **changes),
    margin_dead_zone=st.sampled_from([0, 2**14, 2**64 - 1]),
    margin_hard_limit=st.sampled_from([0, 2**18, 2**64 - 1]),
    margin_table=tables,
    fingerprint_dead_zone=st.sampled_from([0, 16, 2**64 - 1]),
    fingerprint_tolerance=st.sampled_from([0, 32, 2**64 - 1]),
    fingerprint_table=tables,
)


# Agreement with the spec


def compare(
    held: Any,
    contract: Any,
    profile: Profile,
    outputs: int,
    margins: int,
    fingerprints: int,
    temperature: int,
    batch_size: int,
    seed: int,
) -> None:
    """Whatever is claimed of whatever answer, both say the same, to the last bit."""
    rng = random.Random(seed)
    answer = answered(rng, outputs, temperature_milli=temperature, batch_size=batch_size)
    points = random_points(rng, answer, margins, fingerprints)
    if len(points.places(Part.FINGERPRINT)) > accusation.MAX_LEAVES[Part.FINGERPRINT]:
        points = Points(points.margins, points.fingerprints[:10])
    claim = answer.claim(points)
    scored = expected(answer.batch, claim, profile)
    assert scored is not None
    assert found(held, contract, answer.batch, claim, profile) == scored


claims = st.tuples(
    profiles,
    st.integers(1, 300),
    st.integers(0, 24),
    st.integers(0, 24),
    st.sampled_from(TEMPERATURES),
    st.integers(1, 70),
    st.integers(0, 2**64),
)


@pytest.mark.slow
@settings(max_examples=15)
@given(claims)
def test_random_claims(held: Any, contract: Any, drawn: tuple[Any, ...]) -> None:
    compare(held, contract, *drawn)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=250)
@given(claims)
def test_many_random_claims(held: Any, contract: Any, drawn: tuple[Any, ...]) -> None:
    compare(held, contract, *drawn)


def test_vectors(held: Any, contract: Any) -> None:
    vectors = json.loads((VECTORS / "scoring.json").read_text())
    for case in vectors["cases"]:
        batch, profile, claim = (from_plain(case[name]) for name in ("batch", "profile", "claim"))
        held.hold(batch, profile)
        scored = contract.score(batch, claim)
        assert [*scored][:-1] == from_plain(case["scored"])[:-1]


def test_most_that_a_claim_holds(held: Any, contract: Any) -> None:
    """64 points of each kind in 32 leaves of ids; fingerprints in 21 whole leaves and one of a single position."""
    rng = random.Random(3)
    answer = answered(rng, 1017, temperature_milli=700)
    output = answer.transcript.output_ids
    margins = [point(rng, answer, 1016 - 16 * i, rng.randrange(1000)) for i in reversed(range(64))]
    positions = [1016, *(8 * (126 - i) - 8 * (i % 2) for i in range(0, 42, 2))]
    points = Points(
        tuple(sorted(margins, key=lambda p: p.position)),
        tuple(
            point(rng, answer, position, token)
            for position in sorted(positions)
            for token in sorted({output[position], *(t for t, _ in answer.transcript.fingerprints[position][:2])})
        )[:64],
    )
    assert (len(points.margins), len(points.fingerprints)) == (64, 64)
    places = points.places(Part.FINGERPRINT)
    leaves = answer.transcript.leaves(Part.FINGERPRINT)
    assert len(points.places(Part.OUTPUT)) == 32 and len(places) == 22
    claim = dataclasses.replace(
        answer.claim(Points(points.margins)),
        points=points,
        fingerprint_leaves=b"".join(leaves[place] for place in places),
        proof=(
            *proof_of(answer, Part.OUTPUT, points.places(Part.OUTPUT)),
            *proof_of(answer, Part.FINGERPRINT, places),
        ),
    )
    scored = expected(answer.batch, claim, PROFILE)
    assert scored is not None and scored[1] > 0 and scored[3] > 0
    assert found(held, contract, answer.batch, claim, PROFILE) == scored


def proof_of(answer: Answered, part: Part, places: list[int]) -> list[bytes]:
    return list(merkle_proof(answer.transcript.leaves(part), places))


@pytest.mark.parametrize("kind", ["margin", "fingerprint"])
@pytest.mark.parametrize("by", [-1, 0, 1])
def test_limits(held: Any, contract: Any, kind: str, by: int) -> None:
    """At the limit nobody is convicted, one above it everybody is. It is scaled by length and rounded up."""
    answer = answered(random.Random(5), 50, temperature_milli=0)
    # 321 for 16 tokens are 1003.125 for 50; the row after concerns longer answers only, that of no tokens none.
    limit, table = 1004, (ThresholdRow(0, 0), ThresholdRow(16, 321), ThresholdRow(51, 0))
    quiet = {"margin_hard_limit": 2**63, "margin_table": (), "fingerprint_table": ()}
    profile = dataclasses.replace(PROFILE, **{**quiet, f"{kind}_table": table})
    claimed, stated = answer.transcript.output_ids[30], dict(answer.transcript.fingerprints[30])
    token = next(t for t in range(PROFILE.vocab_size) if t != claimed and t not in stated)
    if kind == "margin":
        points = Points((Point(30, token, PROFILE.margin_dead_zone + limit + by - 7, -7),))
    else:
        value = min(stated.values()) + PROFILE.fingerprint_tolerance + limit + by
        points = Points((), (Point(30, token, value * 1024 - 7, -7),))
    scored = hostile(held, contract, answer, points, profile)
    assert scored is not None and scored[f"{kind}_sum"] == limit + by
    assert scored["convicts"] == (by > 0)


@pytest.mark.parametrize("tokens", [15, 16])
def test_no_limit_below_the_first_length(held: Any, contract: Any, tokens: int) -> None:
    """A sum convicts only an answer as long as the table's first row."""
    rng = random.Random(5)
    answer = answered(rng, tokens, temperature_milli=0)
    profile = dataclasses.replace(PROFILE, margin_hard_limit=2**63)
    scored = hostile(held, contract, answer, one_margin_each(rng, answer, 8, False), profile)
    assert scored is not None and scored["convicts"] == (tokens == 16)


@pytest.mark.parametrize("by", [-1, 0, 1])
def test_dead_zones(held: Any, contract: Any, by: int) -> None:
    """What is not above them adds nothing: margins, stated tokens to either side, tokens that are not stated."""
    answer = answered(random.Random(9), 4, temperature_milli=0)
    claimed, entries = answer.transcript.output_ids[2], answer.transcript.fingerprints[2]
    other = next(t for t in range(PROFILE.vocab_size) if t != claimed and t not in dict(entries))
    extra = max(by, 0)
    points = Points((Point(2, other, PROFILE.margin_dead_zone + by, 0),))
    scored = hostile(held, contract, answer, points)
    assert scored is not None
    assert (scored["margin_sum"], scored["margin_max"]) == (extra, PROFILE.margin_dead_zone + by)
    token, value = entries[3]
    for distance in (PROFILE.fingerprint_dead_zone + by, -PROFILE.fingerprint_dead_zone - by):
        scored = hostile(held, contract, answer, Points((), (Point(2, token, (value + distance) * 1024, 0),)))
        assert scored is not None and scored["fingerprint_sum"] == extra
    value = entries[-1][1] + PROFILE.fingerprint_tolerance + by
    scored = hostile(held, contract, answer, Points((), (Point(2, other, value * 1024, 0),)))
    assert scored is not None and scored["fingerprint_sum"] == extra


def test_hard_limit(held: Any, contract: Any) -> None:
    """One margin above it convicts at any length and without a table; at it, none does."""
    answer = answered(random.Random(1), 3, temperature_milli=0)
    claim = answer.claim(one_margin_each(random.Random(1), answer, 1, False))
    largest = accusation.score(answer.batch, claim, PROFILE, bytes(32)).margin_max
    for limit, convicts in ((largest, False), (largest - 1, True)):
        profile = dataclasses.replace(PROFILE, margin_hard_limit=limit, margin_table=(), fingerprint_table=())
        scored = found(held, contract, answer.batch, claim, profile)
        assert scored is not None and scored[0] is convicts


# Refusals


def changed_leaf(claim: Claim, name: str) -> Claim:
    data = bytearray(getattr(claim, name))
    data[-1] ^= 1
    return dataclasses.replace(claim, **{name: bytes(data)})


def with_points(claim: Claim, margins: Any = None, fingerprints: Any = None) -> Claim:
    points = claim.points
    margins = points.margins if margins is None else margins
    fingerprints = points.fingerprints if fingerprints is None else fingerprints
    return dataclasses.replace(claim, points=Points(tuple(margins), tuple(fingerprints)))


def moved(claim: Claim, **changes: Any) -> Claim:
    """The last margin changed."""
    *rest, last = claim.points.margins
    return with_points(claim, [*rest, dataclasses.replace(last, **changes)])


REFUSALS: dict[str, tuple[str, Callable[[Claim], Claim]]] = {
    "another receipt": (
        "scoring: receipt is not in the batch",
        lambda c: dataclasses.replace(c, receipt=c.receipt.replace(fee=c.receipt.fee + 1)),
    ),
    "another place": (
        "scoring: receipt is not in the batch",
        lambda c: dataclasses.replace(c, index=c.index - 1 if c.index % 2 else c.index + 1),
    ),
    "past the batch": ("merkle: index is outside the tree", lambda c: dataclasses.replace(c, index=16)),
    "receipt's proof too short": (
        "merkle: proof is too short",
        lambda c: dataclasses.replace(c, receipt_proof=c.receipt_proof[:-1]),
    ),
    "receipt's proof too long": (
        "merkle: proof is too long",
        lambda c: dataclasses.replace(c, receipt_proof=(*c.receipt_proof, bytes(32))),
    ),
    "another request": (
        "scoring: not the receipt's request",
        lambda c: dataclasses.replace(c, request=c.request.replace(max_tokens=1)),
    ),
    "other parameters": (
        "scoring: not the request's parameters",
        lambda c: dataclasses.replace(c, params=SamplingParams(701)),
    ),
    "other roots": (
        "scoring: not the receipt's transcript",
        lambda c: dataclasses.replace(c, roots=dataclasses.replace(c.roots, statement_hash=bytes(32))),
    ),
    "past the output": ("scoring: position is past the output", lambda c: moved(c, position=64)),
    "token outside": (
        "scoring: token is outside the vocabulary",
        lambda c: moved(c, token=PROFILE.vocab_size),
    ),
    "one position twice": (
        "scoring: margins are out of order",
        lambda c: with_points(c, [c.points.margins[0], *c.points.margins]),
    ),
    "margins backwards": ("scoring: margins are out of order", lambda c: with_points(c, c.points.margins[:2][::-1])),
    "one token twice": (
        "scoring: fingerprints are out of order",
        lambda c: with_points(c, None, [c.points.fingerprints[0], *c.points.fingerprints]),
    ),
    "fingerprints backwards": (
        "scoring: fingerprints are out of order",
        lambda c: with_points(c, None, c.points.fingerprints[1::-1]),
    ),
    "claimed token with two logits": (
        "scoring: one token with two logits",
        lambda c: moved(c, token=int.from_bytes(c.output_leaves[-4:], "little"), logit=1, claimed_logit=2),
    ),
    "ids changed": (
        "scoring: output leaves are not the transcript's",
        lambda c: dataclasses.replace(c, output_leaves=bytes([c.output_leaves[0] ^ 1]) + c.output_leaves[1:]),
    ),
    "stated changed": (
        "scoring: fingerprint leaves are not the transcript's",
        lambda c: changed_leaf(c, "fingerprint_leaves"),
    ),
    "ids too short": (
        "scoring: leaves are of the wrong length",
        lambda c: dataclasses.replace(c, output_leaves=c.output_leaves[:-4]),
    ),
    "ids too long": (
        "scoring: leaves are of the wrong length",
        lambda c: dataclasses.replace(c, output_leaves=c.output_leaves + bytes(4)),
    ),
    "stated too short": (
        "scoring: leaves are of the wrong length",
        lambda c: dataclasses.replace(c, fingerprint_leaves=c.fingerprint_leaves[:-1]),
    ),
    "stated too long": (
        "scoring: leaves are of the wrong length",
        lambda c: dataclasses.replace(c, fingerprint_leaves=c.fingerprint_leaves + bytes(1)),
    ),
    "leaves without points": (
        "scoring: leaves are of the wrong length",
        lambda c: with_points(c, None, ()),
    ),
    "proof too short": ("referee: proof is too short", lambda c: dataclasses.replace(c, proof=c.proof[:-1])),
    "proof too long": (
        "scoring: proof is too long",
        lambda c: dataclasses.replace(c, proof=(*c.proof, bytes(32))),
    ),
    "proof changed": (
        "scoring: fingerprint leaves are not the transcript's",
        lambda c: dataclasses.replace(c, proof=(*c.proof[:-1], bytes(32))),
    ),
}


@pytest.fixture(scope="module")
def sound() -> tuple[Answered, Claim]:
    """A right claim of margins and fingerprints, with ids, stated entries and proofs in it."""
    rng = random.Random(8)
    answer = answered(rng, 64, batch_size=16)
    margins = tuple(point(rng, answer, position, 3) for position in (40, 50, 63))
    fingerprints = tuple(point(rng, answer, position, token) for position, token in ((40, 1), (40, 2), (41, 0)))
    return answer, answer.claim(Points(margins, fingerprints))


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(held: Any, contract: Any, sound: tuple[Answered, Claim], name: str) -> None:
    """Each refusal has its name, and the spec refuses the same."""
    answer, claim = sound
    assert expected(answer.batch, claim, PROFILE) is not None
    reason, change = REFUSALS[name]
    spoiled = change(claim)
    assert spoiled != claim
    held.hold(answer.batch.values(), PROFILE.values())
    assert ask(contract, answer.batch, spoiled) == reason
    assert expected(answer.batch, spoiled, PROFILE) is None


def test_unknown_batch(held: Any, contract: Any, sound: tuple[Answered, Claim]) -> None:
    answer, claim = sound
    held.hold(answer.batch.values(), PROFILE.values())
    assert ask(contract, answer.batch.replace(lock=1), claim) == "scoring: no such batch"


def test_too_many_leaves(held: Any, contract: Any) -> None:
    """More than 32 leaves are refused before anything is read outside of what was brought."""
    rng = random.Random(2)
    answer = answered(rng, 1056)
    claim = answer.claim(Points())
    margins = tuple(point(rng, answer, 32 * i, 3) for i in range(33))
    leaves = b"".join(answer.transcript.leaves(Part.OUTPUT)[:32])
    claim = dataclasses.replace(claim, points=Points(margins), output_leaves=leaves)
    held.hold(answer.batch.values(), PROFILE.values())
    assert ask(contract, answer.batch, claim) == "scoring: points stand in too many leaves"
    assert expected(answer.batch, claim, PROFILE) is None


def test_constructor(held: Any) -> None:
    nobody = "0x" + "9" * 40
    for arguments in ((nobody, held), (held, nobody)):
        with boa.reverts("scoring: not a contract"):
            system.load(DISPUTES / "Scoring.vy", *arguments)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(0, 2**64))
def test_random_changes(held: Any, contract: Any, sound: tuple[Answered, Claim], seed: int) -> None:
    """A field or byte of a right claim changed at random: both refuse, or both score the same."""
    rng = random.Random(seed)
    answer, claim = sound
    name = rng.choice([field.name for field in dataclasses.fields(Claim)])
    value = getattr(claim, name)
    if isinstance(value, bytes) and value:
        at = rng.randrange(len(value))
        claim = dataclasses.replace(claim, **{name: value[:at] + rng.randbytes(1) + value[at + rng.randrange(3) :]})
        if name == "trace_root":
            claim = dataclasses.replace(claim, trace_root=rng.randbytes(32))
    elif name == "points":
        kept = [p for p in value.margins + value.fingerprints if rng.random() < 0.8]
        cut = rng.randrange(len(kept) + 1)
        claim = dataclasses.replace(claim, points=Points(tuple(kept[:cut]), tuple(kept[cut:])))
    elif name == "index":
        claim = dataclasses.replace(claim, index=rng.choice([0, value ^ 1, 2**32 - 1]))
    elif isinstance(value, tuple):
        at = rng.randrange(len(value))
        claim = dataclasses.replace(claim, **{name: (*value[:at], rng.randbytes(32), *value[at + rng.randrange(2) :])})
    assert found(held, contract, answer.batch, claim, PROFILE) == expected(answer.batch, claim, PROFILE)


# Transcripts that a node made so that they could not be scored


def hostile(
    held: Any, contract: Any, answer: Answered, points: Points, profile: Profile = PROFILE
) -> dict[str, Any] | None:
    """The score, the same in both; None for a refusal."""
    claim = answer.claim(points)
    scored = found(held, contract, answer.batch, claim, profile)
    assert scored == expected(answer.batch, claim, profile)
    return None if scored is None else dict(zip(FIELDS, scored, strict=True))


def test_faults_elsewhere_do_not_matter(held: Any, contract: Any) -> None:
    """Header, prompt root, model, profile, lengths, prices: an answer that breaks these rules is scored all the same."""
    strange = keccak(b"strange")
    for changes in (
        {"transcript_changes": {"request_hash": strange, "finish_reason": 200, "prompt_ids": (2**32 - 1,)}},
        {"receipt_changes": {"model_id": strange, "fee": 0, "finish_reason": 255, "node": "0x" + "7" * 40}},
        {"request_changes": {"model_id": strange, "profile_version": 77, "max_tokens": 1, "prompt_tokens": 0}},
        {"temperature_milli": 2**32 - 1},
    ):
        rng = random.Random(4)
        answer = answered(rng, 20, **changes)  # type: ignore[arg-type]
        scored = hostile(held, contract, answer, one_margin_each(rng, answer, 5, True))
        assert scored is not None and scored["model_id"] == answer.batch.model_id
        assert scored["prompt_root"] == answer.request.prompt_root


def test_parameters_that_nobody_shows(held: Any, contract: Any) -> None:
    """Without them there are no margins; the fingerprint convicts all the same."""
    rng = random.Random(4)
    answer = answered(rng, 20, request_changes={"params_hash": keccak(b"no one knows")})
    assert hostile(held, contract, answer, one_margin_each(rng, answer, 1, True)) is None
    points = [Point(i, answer.transcript.fingerprints[i][0][0], 2**30, 0) for i in range(3)]
    scored = hostile(held, contract, answer, Points((), tuple(points)))
    assert scored is not None and scored["convicts"]


def fingerprints(answer: Answered, position: int, listed: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    every = answer.transcript.fingerprints
    return {"fingerprints": (*every[:position], listed, *every[position + 1 :])}


def test_the_claimed_token_is_stated(held: Any, contract: Any) -> None:
    """No rule that is judged at once sees it. It is a stated difference, and the true one is 0."""
    rng = random.Random(4)
    chosen = answered(rng, 1).transcript.output_ids[0]
    for value, term in ((0, 0), (16, 0), (-100, 84), (-(2**15), 2**15 - 16)):
        rng = random.Random(4)
        listed = tuple(
            sorted([(chosen, value), *((chosen + 1 + i, 5 - i) for i in range(7))], key=lambda e: (-e[1], e[0]))
        )
        answer = answered(rng, 1, transcript_changes={"fingerprints": (listed,)})
        assert answer.transcript.output_ids[0] == chosen
        same = Point(0, chosen, -77, -77)
        scored = hostile(held, contract, answer, Points((), (same,)))
        assert scored is not None and scored["fingerprint_sum"] == term
        # The rest of the position counts as ever.
        true = Point(0, (chosen + 500) % 1000, 2**24, 0)
        scored = hostile(held, contract, answer, Points((), tuple(sorted((same, true), key=lambda p: p.token))))
        lowest = min(value for _, value in listed)
        unlisted = max(0, 2**14 - lowest - PROFILE.fingerprint_tolerance)
        assert scored is not None and scored["fingerprint_sum"] == term + unlisted


def test_the_claimed_token_need_not_be_stated(held: Any, contract: Any) -> None:
    """An honest fingerprint leaves it out, however far below its 0 the stated ones are."""
    rng = random.Random(4)
    chosen = answered(rng, 1).transcript.output_ids[0]
    listed = tuple((chosen + 1 + i, -500 - i) for i in range(8))
    answer = answered(random.Random(4), 1, transcript_changes={"fingerprints": (listed,)})
    scored = hostile(held, contract, answer, Points((), (Point(0, chosen, 9, 9),)))
    assert scored is not None and scored["fingerprint_sum"] == 0


@pytest.mark.parametrize(
    "listed",
    [
        tuple((i, i) for i in range(8)),
        tuple((7, 3) for _ in range(8)),
        ((2**32 - 1, 9), *((i, -i) for i in range(7))),
    ],
    ids=["out of order", "one id eight times", "id outside the vocabulary"],
)
def test_a_stated_fingerprint_out_of_order(held: Any, contract: Any, listed: tuple[tuple[int, int], ...]) -> None:
    """A fault by itself; scored the same way by both, and the other positions as ever."""
    rng = random.Random(4)
    answer = answered(rng, 9, transcript_changes=None)
    broken = answered(random.Random(4), 9, transcript_changes=fingerprints(answer, 3, listed))
    leaf = broken.transcript.leaves(Part.FINGERPRINT)[0]
    fault = leaf_fault(broken.receipt, broken.request, broken.params, PROFILE, Part.FINGERPRINT, 0, leaf)
    assert fault in (Fault.FINGERPRINT, Fault.TOKEN_ID)
    points = Points((), tuple(Point(position, token, 2**20, 0) for position in (2, 3) for token in (1, 7, 999)))
    scored = hostile(held, contract, broken, points)
    assert scored is not None and scored["fingerprint_sum"] > 0


def test_a_claimed_id_outside_the_vocabulary(held: Any, contract: Any) -> None:
    """It has no logit, so it is refused, and is a fault that is judged at once."""
    rng = random.Random(4)
    output = (*answered(rng, 8).transcript.output_ids, PROFILE.vocab_size)
    answer = answered(random.Random(4), 9, transcript_changes={"output_ids": output})
    claim = answer.claim(Points((Point(8, 1, 5, 4),)))
    held.hold(answer.batch.values(), PROFILE.values())
    assert ask(contract, answer.batch, claim) == "scoring: claimed token is outside the vocabulary"
    assert expected(answer.batch, claim, PROFILE) is None
    leaf = answer.transcript.leaves(Part.OUTPUT)[0]
    judged = leaf_fault(answer.receipt, answer.request, answer.params, PROFILE, Part.OUTPUT, 0, leaf)
    assert judged is Fault.TOKEN_ID


def test_leaves_of_another_length(held: Any, contract: Any) -> None:
    """They cannot be proven to hold what they must; the fault is judged at once."""
    rng = random.Random(4)
    answer = answered(rng, 9, receipt_changes={"output_tokens": 10})
    claim = answer.claim(Points((Point(8, 1, 5, 4),)))
    assert found(held, contract, answer.batch, claim, PROFILE) is None is expected(answer.batch, claim, PROFILE)
    leaf = answer.transcript.leaves(Part.OUTPUT)[0]
    judged = leaf_fault(answer.receipt, answer.request, answer.params, PROFILE, Part.OUTPUT, 0, leaf)
    assert judged is Fault.LEAF_SIZE


def test_no_output(held: Any, contract: Any) -> None:
    """An answer of no tokens has no points, and is not convicted."""
    answer = answered(random.Random(4), 0)
    scored = hostile(held, contract, answer, Points())
    assert scored is not None and not scored["convicts"]
    assert merkle_root([]) == answer.transcript.part_roots()[Part.OUTPUT]
    claim = dataclasses.replace(answer.claim(Points()), points=Points((Point(0, 1, 5, 4),)))
    assert ask(contract, answer.batch, claim) == "scoring: position is past the output"


# Noise


@pytest.mark.slow
def test_noise_of_thousands(held: Any) -> None:
    """Keys, bits and noise of 4,096 random (position, token) are the spec's, and of all edges."""
    rng = random.Random(6)
    for _ in range(4):
        seed = rng.randbytes(32)
        positions = [rng.choice([0, 2**32 - 1, rng.randrange(2**32), rng.randrange(2**10)]) for _ in range(1024)]
        tokens = [rng.choice([0, 2**32 - 1, rng.randrange(2**32), rng.randrange(2**17)]) for _ in range(1024)]
        bits = held.uniform_bits(seed, positions, tokens)
        keys = [sampler.position_key(seed, position) for position in positions]
        assert bits == [sampler.uniform_bits(key, token) for key, token in zip(keys, tokens, strict=True)]
        assert held.gumbels(bits) == [sampler.gumbel(b) for b in bits]
    assert held.gumbels(EDGE_BITS) == [sampler.gumbel(b) for b in EDGE_BITS]


def test_noise_of_every_magnitude(held: Any) -> None:
    """Inputs near both ends and around the middle, where each branch of the normalisation is taken."""
    rng = random.Random(7)
    bits = [rng.randrange(2**k) for k in range(33) for _ in range(15)]
    bits += [2**32 - 1 - b for b in bits]
    assert len(bits) < 1024
    assert held.gumbels(bits) == [sampler.gumbel(b) for b in bits]


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32))
def test_seed(held: Any, client_seed: bytes) -> None:
    request = answered(random.Random(1), 1, request_changes={"client_seed": client_seed}).request
    assert held.seed(client_seed) == request.seed()
