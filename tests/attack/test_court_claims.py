"""Attacks on the court by what is claimed of an answer, or by an answer of which nothing can be claimed. Real scoring.

Named as the attack; each says what it wants and why it fails, and asserts what everybody has afterwards, to the wei. An
honest node here is one whose engine is off by less than the profile's dead zone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import boa
import pytest
from eth_hash.auto import keccak

from poip_chain.spec import accusation, sampler
from poip_chain.spec.accusation import Claim, Point, Points
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import FinishReason, Part, Profile, SamplingParams, ThresholdRow
from poip_chain.spec.offences import Fault, TranscriptRoots
from poip_chain.spec.transcript import header_hash, prompt_root, statement_hash, transcript_root
from tests.attack.court_ledger import BOND, Ledger, with_partner
from tests.contracts.court import CONTESTER, LOST, SALT, Court, deploy_court
from tests.contracts.network import CONVICTED, Answer, Committed, Server, leaf_arguments
from tests.contracts.system import account, refuses
from tests.support.tellings import Story, Telling, story
from tests.vectors.generate_canonical import TOKENS, traced
from tests.vectors.generate_numeric import TINY

pytestmark = pytest.mark.slow

ONE = 2**16
"""A logit of 1."""
DEAD_ZONE, HARD_LIMIT, ROW = ONE // 4, 2 * ONE, ThresholdRow(1, ONE // 8)
PROFILE = Profile(
    *(TINY.max_positions, TINY.vocab_size, "bfloat16", "bfloat16", 100, 2000, (0,)),
    *(DEAD_ZONE, HARD_LIMIT, (ROW,), 16, 32, (ROW,)),
)
LIMIT = 2 * ROW.limit
"""Of an answer of two tokens."""
SEEDS = [keccak(b"ground %d" % number) for number in range(4000)]
PROMPT = TOKENS[:4]


@pytest.fixture(scope="module")
def scored() -> Court:
    return deploy_court(story(), profile=PROFILE)


@pytest.fixture
def court(scored: Court) -> Iterator[Court]:
    with_partner(scored)
    yield scored
    scored.check_books()


@dataclass(frozen=True)
class Said:
    """An answer of two tokens to PROMPT, with the margin of its first."""

    story: Story
    seed: bytes
    temperature: int
    best: int
    margin: int

    @property
    def telling(self) -> Telling:
        return Telling(self.story)


def noised(row: list[int], seed: bytes, position: int, temperature: int) -> list[int]:
    """Logits with the sampler's noise, each to 1/1000 of its unit, best first by `sorted`."""
    key = sampler.position_key(keccak(b"PoIP seed" + seed), position)
    return [1000 * logit + temperature * sampler.gumbel(sampler.uniform_bits(key, v)) for v, logit in enumerate(row)]


def said(temperature: int, wanted: Callable[[int], bool]) -> Said:
    """A seed and a first token of which the margin is wanted; the second token is what the rule says."""
    vocabulary = range(TINY.vocab_size)
    first = Telling(Story(TINY, PROMPT, (1, 1), traced(TINY, (*PROMPT, 1), 2)))
    row = [first.logit(0, token) for token in vocabulary]
    for seed in SEEDS:
        scores = noised(row, seed, 0, temperature)
        best = max(vocabulary, key=lambda token: scores[token])
        for token in vocabulary:
            margin = (scores[best] - scores[token]) // 1000
            if token != best and wanted(margin):
                leaves = traced(TINY, (*PROMPT, token), 2)
                then = Telling(Story(TINY, PROMPT, (token, 1), leaves))
                scores = noised([then.logit(1, v) for v in vocabulary], seed, 1, temperature)
                second = max(vocabulary, key=lambda token: scores[token])
                return Said(Story(TINY, PROMPT, (token, second), leaves), seed, temperature, best, margin)
    raise AssertionError("no seed gives such a margin")


def commit(court: Court, answer: Said) -> tuple[Court, Committed]:
    """A batch with the answer, of an honest fingerprint; the court with its story."""
    server, told, telling = Server.start(court.network), answer.story, answer.telling
    served = server.serve(
        account("client"),
        2,
        prompt_tokens=len(PROMPT),
        reason=FinishReason.LENGTH,
        params=SamplingParams(answer.temperature),
        request_changes={"prompt_root": prompt_root(PROMPT), "client_seed": answer.seed},
        transcript_changes={
            "prompt_ids": PROMPT,
            "output_ids": told.output,
            "fingerprints": tuple(stated(telling, position) for position in range(2)),
        },
    )
    return replace(court, story=told), server.commit([served])


def stated(telling: Telling, position: int) -> tuple[tuple[int, int], ...]:
    """An honest fingerprint: the eight largest others, by their difference to the chosen one in 1/64."""
    chosen = telling.story.output[position]
    values = [
        (token, (telling.logit(position, token) - telling.logit(position, chosen) + 512) >> 10)
        for token in range(TINY.vocab_size)
        if token != chosen
    ]
    return tuple(sorted(values, key=lambda entry: (-entry[1], entry[0]))[:8])


def point(answer: Said, position: int, token: int) -> Point:
    """A true point."""
    telling = answer.telling
    claimed = telling.logit(position, answer.story.output[position])
    return Point(position, token, telling.logit(position, token), claimed)


def claim_of(committed: Committed, points: Points, root: bytes) -> Claim:
    """A claim of the batch's only answer."""
    given = committed.answers[0]
    evidence = (given.receipt, 0, committed.proof(0), given.request, given.params, given.transcript)
    return Claim.of(*evidence, root, points)


def accuse(court: Court, committed: Committed, claim: Claim, refusal: str | None) -> int:
    """Commit and reveal; where that is refused, the commitment expires."""
    batch = committed.batch
    id = court.commit(batch, claim.values())
    if refusal is None:
        court.reveal(id, batch, claim.values())
        return id
    refuses(refusal, lambda: court.open(id, batch.values(), claim.values(), SALT))
    boa.env.time_travel(seconds=court.value("reveal_window") + 1)
    court.accusations.expire(id, batch.values())
    return id


BURNED = {"accuser": -BOND, "burned": BOND}
"""An accusation that could not be revealed."""


# Claims against honest nodes


def test_low_temperature_framing(court: Court) -> None:
    """A client asks at the lowest temperature that the profile allows, where dividing by it would make a hundredth of a
    logit a whole one. Margins are in logits, at any temperature: an honest near tie stays in the dead zone."""
    answer = said(PROFILE.min_temperature_milli, lambda margin: DEAD_ZONE // 2 < margin <= DEAD_ZONE)
    divided = answer.margin * 1000 // answer.temperature
    assert divided - DEAD_ZONE > LIMIT and divided > HARD_LIMIT // 2
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    points = Points((point(answer, 0, answer.best), point(answer, 1, 3)))
    claim = claim_of(committed, points, answer.telling.root)
    assert accusation.score(committed.batch, claim, PROFILE, answer.story.weights_root).margin_max == answer.margin
    accuse(court, committed, claim, "court: the points do not convict")
    assert ledger.changes() == BURNED
    court.network.finalize(committed.batch)


def test_nonce_grinding_for_near_ties(court: Court) -> None:
    """A client searches thousands of seeds for one where two words are all but level, so that an honest node's rounding
    takes the other. That is what the dead zone is for, and the search finds nothing above it."""
    answer = said(1000, lambda margin: 0 < margin < ONE // 500)
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    claim = claim_of(committed, Points((point(answer, 0, answer.best),)), answer.telling.root)
    accuse(court, committed, claim, "court: the points do not convict")
    assert ledger.changes() == BURNED
    court.network.finalize(committed.batch)


def test_nonce_grinding_by_a_cheat(court: Court) -> None:
    """The other way round: a node that is also the client grinds seeds until the word that it wants is the second best, and
    takes it. Free of charge is what lies inside the dead zone; a word that loses by more than the limit convicts."""
    answer = said(1000, lambda margin: DEAD_ZONE + LIMIT < margin < HARD_LIMIT)
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    claim = claim_of(committed, Points((point(answer, 0, answer.best),)), answer.telling.root)
    id = accuse(court, committed, claim, None)
    assert court.resolve(id, committed.batch)
    assert ledger.changes() == ledger.conviction()


@pytest.mark.parametrize("kind", ["margins", "fingerprints"])
def test_duplicate_points(court: Court, kind: str) -> None:
    """A deviation that the profile tolerates, named twice. Points must strictly increase: one position, one margin; one
    position and token, one fingerprint term; in either order."""
    answer = said(1000, lambda margin: LIMIT // 2 < margin - DEAD_ZONE <= LIMIT)
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    one = point(answer, 0, answer.best)
    other = point(answer, 0, answer.best - 1 if answer.best else 1)
    for count, second in enumerate((one, other), start=1):
        twice = (one, second)
        points = Points(twice) if kind == "margins" else Points((), (max(twice, key=_place), min(twice, key=_place)))
        claim = claim_of(committed, points, answer.telling.root)
        accuse(court, committed, claim, f"scoring: {kind} are out of order")
        assert ledger.changes() == {"accuser": -count * BOND, "burned": count * BOND}
    claim = claim_of(committed, Points((one,)), answer.telling.root)
    accuse(court, committed, claim, "court: the points do not convict")
    assert ledger.changes() == {"accuser": -3 * BOND, "burned": 3 * BOND}


def _place(one: Point) -> tuple[int, int]:
    return one.position, one.token


def test_invented_logit(court: Court) -> None:
    """Scoring takes logits for true, so a liar convicts on paper whom it likes. Any one point that is contested must be
    shown to stand in the trace."""
    answer = said(1000, lambda margin: margin < DEAD_ZONE)
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    true = point(answer, 0, answer.best)
    claim = claim_of(committed, Points((replace(true, logit=true.logit + 9 * ONE),)), answer.telling.root)
    id = accuse(court, committed, claim, None)
    contest = court.contest(id, CONTESTER.address, point=0)
    refuses("court: the logit is another", lambda: court.answer_for(contest, answer.telling))
    boa.env.time_travel(seconds=court.value("dispute_clock") + 1)
    assert court.settle(contest) and court.status(id) == LOST
    assert ledger.changes() == {"accuser": -BOND, "contester": BOND // 2, "burned": BOND - BOND // 2}


def test_unsigned_field_tampered(court: Court) -> None:
    """A field that no signature covered was changed by whoever passed it on. A commitment covers place, root and points;
    whoever reveals in the accuser's stead, and changes one of the others, is refused, and the accuser reveals after it."""
    answer = said(1000, lambda margin: DEAD_ZONE + LIMIT < margin < HARD_LIMIT)
    court, committed = commit(court, answer)
    ledger = Ledger(court, committed)
    claim = claim_of(committed, Points((point(answer, 0, answer.best),)), answer.telling.root)
    batch = committed.batch
    id = court.commit(batch, claim.values())
    for changes in (
        {"receipt": claim.receipt.replace(output_tokens=1)},
        {"request": claim.request.replace(client_seed=bytes(32))},
        {"params": SamplingParams(100)},
        {"roots": replace(claim.roots, output_root=bytes(32))},
        {"output_leaves": claim.output_leaves[:4] + b"\x01\0\0\0"},
        {"proof": (bytes(32),)},
    ):
        tampered = replace(claim, **changes)
        with boa.reverts(), boa.env.prank(CONTESTER.address):
            court.open(id, batch.values(), tampered.values(), SALT)
    court.reveal(id, batch, claim.values())
    assert court.resolve(id, batch)
    assert ledger.changes() == ledger.conviction()


# Transcripts of which no trace or no score exists


def faulty(court: Court, output: tuple[int, ...], prompt: tuple[int, ...] = PROMPT) -> tuple[Server, Answer]:
    """An answer that breaks a rule of form."""
    server = Server.start(court.network)
    return server, server.serve(
        account("client"),
        len(output),
        prompt_tokens=len(prompt),
        reason=FinishReason.LENGTH,
        request_changes={"prompt_root": prompt_root(prompt)},
        transcript_changes={
            "prompt_ids": prompt,
            "output_ids": output,
            "fingerprints": tuple(tuple((i, 0) for i in range(8)) for _ in output),
        },
    )


def convicted_of_form(court: Court, committed: Committed, fault: Fault, *leaf: object, part: object = None) -> None:
    """Offences judges it at once, of the receipt or of one leaf."""
    given, offences = committed.answers[0], court.network.offences
    evidence = (given.receipt.values(), committed.evidence(0), given.request.values(), given.params.values())
    if not leaf:
        assert offences.prove_receipt(*evidence, sender=CONTESTER.address) == fault
    else:
        roots = part or given.roots()
        assert offences.prove_transcript(*evidence, roots.values(), *leaf, sender=CONTESTER.address) == fault  # type: ignore[attr-defined]
    assert court.network.log.status(committed.batch.id) == CONVICTED


def test_unrepresentable_id_past_the_vocabulary(court: Court) -> None:
    """A claimed id that has no logit and no row of embeddings: the court cannot score it, and refuses. It need not: one
    leaf of the transcript convicts the node at once, for the same lock."""
    server, answer = faulty(court, (3, TINY.vocab_size))
    committed = server.commit([answer])
    ledger = Ledger(court, committed)
    claim = claim_of(committed, Points((Point(1, 2, 9 * ONE, 0),)), b"\x05" * 32)
    accuse(court, committed, claim, "scoring: claimed token is outside the vocabulary")
    assert ledger.changes() == BURNED
    convicted_of_form(court, committed, Fault.TOKEN_ID, *leaf_arguments(answer, Part.OUTPUT, 0))
    assert ledger.changes() == ledger.conviction("contester", accuser=-BOND, burned=BOND)


def test_unrepresentable_prompt_id(court: Court) -> None:
    """The same in the prompt, which scoring never reads. An accuser could state any trace, because no step over such an id
    can be computed; but whoever serves it has broken a rule of form, and is convicted by one leaf of its prompt."""
    server, answer = faulty(court, (3, 5), (*PROMPT[:3], 2**32 - 1))
    committed = server.commit([answer])
    ledger = Ledger(court, committed)
    convicted_of_form(court, committed, Fault.TOKEN_ID, *leaf_arguments(answer, Part.PROMPT, 0))
    assert ledger.changes() == ledger.conviction("contester")


def test_unrepresentable_length(court: Court) -> None:
    """More tokens than max_context: there are no positions to trace, and the claim is refused. The receipt alone
    convicts."""
    server, answer = faulty(court, tuple(range(3, 9 + TINY.max_positions - len(PROMPT))))
    assert answer.request.prompt_tokens + answer.receipt.output_tokens > TINY.max_positions + 1
    committed = server.commit([answer])
    ledger = Ledger(court, committed)
    claim = claim_of(committed, Points((Point(1, 2, 9 * ONE, 0),)), b"\x05" * 32)
    accuse(court, committed, claim, "referee: context is too long")
    convicted_of_form(court, committed, Fault.CONTEXT)
    assert ledger.changes() == ledger.conviction("contester", accuser=-BOND, burned=BOND)


@pytest.mark.parametrize("size", [0, 7, 9, 400])
def test_unrepresentable_encoding(court: Court, size: int) -> None:
    """The transcript's leaf of output ids is not two ids long, so that no id can be read out of it. The court reads only
    leaves of the right length; that this one is not convicts at once."""
    server, answer = faulty(court, (3, 5))
    raw = (b"\x01\0\0\0" * 100)[:size]
    root, told = merkle_root([raw]), answer.request.struct_hash()
    statement = statement_hash("x")
    roots = TranscriptRoots(told, int(FinishReason.LENGTH), statement, answer.request.prompt_root, root, root)
    header = header_hash(told, int(FinishReason.LENGTH), statement)
    answer = answer.with_receipt(transcript_root=transcript_root(header, answer.request.prompt_root, root, root))
    committed = server.commit([answer])
    ledger = Ledger(court, committed)
    claim = replace(claim_of(committed, Points((Point(1, 2, 9 * ONE, 0),)), b"\x05" * 32), roots=roots)
    for leaves, reason in (
        (claim.output_leaves, "scoring: output leaves are not the transcript's"),
        (raw, "scoring: leaves are of the wrong length"),
    ):
        brought = replace(claim, output_leaves=leaves, proof=())
        with boa.env.anchor():
            accuse(court, committed, brought, reason)
            assert ledger.changes() == BURNED
    convicted_of_form(court, committed, Fault.LEAF_SIZE, int(Part.OUTPUT), 0, raw, [], part=roots)
    assert ledger.changes() == ledger.conviction("contester")
