"""The claim of an accuser of false computation: its evidence, its points, and their score (protocol section 7.1).

A point is one logit of the canonical trace at an output position, beside the claimed token's. A margin point says that
its token should have been drawn; a fingerprint point says that a stated difference is false, or that a token should have
been stated. `score` takes the logits for true and computes the rest: noise, terms, sums, limits.

    claim_hash = keccak(abi.encode(uint256 index, trace_root, keccak(abi.encode(margins, fingerprints))))
    commitment = keccak(claim_hash || salt || accuser)

Every term is >= 0 and stands alone, so the sum over some points is a lower bound of the whole answer's: what is left out
can only weaken the case. What a transcript may break and still be scored, and what is a fault that is judged at once
instead (offences.py), stands at `score`.

contracts/disputes/Scoring.vy is the second writing. This file knows no trace: where logits come from, and whether they
are true, is not asked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.errors import InvalidInput
from poip_chain.spec import sampler, scores
from poip_chain.spec.eip712 import checked
from poip_chain.spec.merkle import merkle_proof, root_from_proof, verify_proof
from poip_chain.spec.objects import Batch, Part, Profile, Receipt, Request, SamplingParams
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.scores import FingerprintEntry
from poip_chain.spec.transcript import (
    IDS_PER_LEAF,
    POSITIONS_PER_LEAF,
    Transcript,
    leaf_count,
    leaf_size,
    parse_fingerprints,
)
from poip_chain.spec.types import Address, Hash32

MAX_POINTS = 64
"""Of each kind in one claim."""
MAX_BYTES = {Part.OUTPUT: 4096, Part.FINGERPRINT: 8192}
MAX_LEAVES = {Part.OUTPUT: 32, Part.FINGERPRINT: 21}
"""Whole leaves in so many bytes."""
MAX_PROOF = 160
"""Hashes of both parts' proofs together."""

_POINTS_ABI = "(uint32,uint32,int32,int32)[]"
_PER_LEAF = {Part.OUTPUT: IDS_PER_LEAF, Part.FINGERPRINT: POSITIONS_PER_LEAF}


@dataclass(frozen=True, slots=True)
class Point:
    """A logit against the claimed token's at an output position, both of the canonical trace, in 2**-16."""

    position: int
    token: int
    logit: int
    claimed_logit: int

    def __post_init__(self) -> None:
        for name in ("position", "token"):
            checked("uint32", getattr(self, name), f"Point.{name}")
        for name in ("logit", "claimed_logit"):
            if not -(2**31) <= getattr(self, name) < 2**31:
                raise InvalidInput(f"Point.{name} is an int32, not {getattr(self, name)}.")

    def values(self) -> tuple[int, int, int, int]:
        """The struct as the contracts take it."""
        return self.position, self.token, self.logit, self.claimed_logit


@dataclass(frozen=True, slots=True)
class Points:
    """The points of a claim. margins: strictly increasing by position. fingerprints: by position, then token."""

    margins: tuple[Point, ...] = ()
    fingerprints: tuple[Point, ...] = ()

    def values(self) -> tuple[list[Any], list[Any]]:
        """Both lists as the contracts take them."""
        return [point.values() for point in self.margins], [point.values() for point in self.fingerprints]

    def points_hash(self) -> Hash32:
        """keccak(abi.encode(margins, fingerprints))."""
        return Hash32(keccak(encode([_POINTS_ABI, _POINTS_ABI], self.values())))

    def places(self, part: Part) -> list[int]:
        """The leaves of a part that hold what these points need: OUTPUT for all points, FINGERPRINT for their own."""
        points = self.fingerprints if part is Part.FINGERPRINT else (*self.margins, *self.fingerprints)
        return sorted({point.position // _PER_LEAF[part] for point in points})


def claim_hash(index: int, trace_root: bytes, points_hash: bytes) -> Hash32:
    """All in a claim that is the accuser's to choose; the rest follows from the batch and `index`."""
    return Hash32(keccak(encode(["uint256", "bytes32", "bytes32"], [index, trace_root, points_hash])))


def commitment(claimed: bytes, salt: bytes, accuser: Address) -> Hash32:
    """What an accuser commits to. Raises InvalidInput unless the salt is 32 bytes."""
    if len(salt) != 32:
        raise InvalidInput(f"a salt has 32 bytes, not {len(salt)}.")
    return Hash32(keccak(claimed + salt + bytes.fromhex(accuser[2:])))


@dataclass(frozen=True, slots=True)
class Term:
    """What one point is worth: a margin before the dead zone (2**-16 logits), or a fingerprint term (1/64 nat)."""

    point: Point
    value: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What an accusation reveals, field for field as the contracts take it.

    The leaves are those of `points.places`, end to end; proof: one multi-leaf proof of the output leaves, then one of the
    fingerprint leaves. params matter only where there are margins.
    """

    receipt: Receipt
    index: int
    receipt_proof: tuple[bytes, ...]
    request: Request
    params: SamplingParams
    roots: TranscriptRoots
    trace_root: bytes
    points: Points
    output_leaves: bytes
    fingerprint_leaves: bytes
    proof: tuple[bytes, ...]

    @classmethod
    def of(
        cls,
        receipt: Receipt,
        index: int,
        receipt_proof: Sequence[bytes],
        request: Request,
        params: SamplingParams,
        transcript: Transcript,
        trace_root: bytes,
        points: Points,
    ) -> Self:
        """The claim with leaves and proofs out of the whole transcript.

        Raises InvalidInput if a point stands past the transcript, or if the points need more than a claim can hold.
        """
        brought, proof = {}, []
        for part in (Part.OUTPUT, Part.FINGERPRINT):
            leaves, places = transcript.leaves(part), points.places(part)
            if len(places) > MAX_LEAVES[part]:
                raise InvalidInput(
                    f"a claim brings at most {MAX_LEAVES[part]} leaves of {part.name}, not {len(places)}."
                )
            if places and places[-1] >= len(leaves):
                raise InvalidInput("a point stands past the end of the transcript.")
            brought[part] = b"".join(leaves[place] for place in places)
            proof += merkle_proof(leaves, places) if places else []
        if len(proof) > MAX_PROOF or max(len(points.margins), len(points.fingerprints)) > MAX_POINTS:
            raise InvalidInput(
                f"a claim holds at most {MAX_POINTS} points of a kind and {MAX_PROOF} hashes of proofs.",
                hint="Name fewer points, or such that stand in fewer leaves.",
            )
        return cls(
            receipt, index, tuple(receipt_proof), request, params, TranscriptRoots.of(transcript), trace_root, points,
            brought[Part.OUTPUT], brought[Part.FINGERPRINT], tuple(proof),
        )  # fmt: skip

    def values(self) -> tuple[Any, ...]:
        """The struct as the contracts take it."""
        return (
            self.receipt.values(),
            self.index,
            list(self.receipt_proof),
            self.request.values(),
            self.params.values(),
            self.roots.values(),
            self.trace_root,
            *self.points.values(),
            self.output_leaves,
            self.fingerprint_leaves,
            list(self.proof),
        )

    def claim_hash(self) -> Hash32:
        """See the module's docstring."""
        return claim_hash(self.index, self.trace_root, self.points.points_hash())

    def commitment(self, salt: bytes, accuser: Address) -> Hash32:
        """What the accuser commits to. Raises InvalidInput unless the salt is 32 bytes."""
        return commitment(self.claim_hash(), salt, accuser)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a claim comes to: sums above the dead zones and the largest margin, 2**-16 logits and 1/64 nat; then what a
    trace on trial is about."""

    convicts: bool
    margin_sum: int
    margin_max: int
    fingerprint_sum: int
    model_id: bytes
    prompt_tokens: int
    output_tokens: int
    prompt_root: bytes
    output_root: bytes
    weights_root: bytes


def margin_of(point: Point, claimed: int, seed: bytes, temperature_milli: int) -> int:
    """The margin of the claimed token against the point's, in 2**-16 logits, before the dead zone."""
    key = sampler.position_key(seed, point.position)

    def noised(token: int, logit: int) -> int:
        return sampler.noised(logit, temperature_milli, sampler.gumbel(sampler.uniform_bits(key, token)))

    return scores.margin_between(noised(point.token, point.logit), noised(claimed, point.claimed_logit))


def fingerprint_term(point: Point, claimed: int, entries: Sequence[FingerprintEntry], profile: Profile) -> int:
    """What the point's token adds to the fingerprint score, in 1/64 nat.

    entries: the eight stated at the position, well formed or not. The first that names a token is its own, the last of
    all the lowest: so it is where they are in order, and where they are not that is a fault by itself. Whoever states the
    claimed token, which no honest node does, states a difference that is 0.
    """
    canonical = scores.canonical_value(point.logit, point.claimed_logit)
    for token, stated in entries:
        if token == point.token:
            return scores.listed_term(stated, canonical, profile.fingerprint_dead_zone)
    if point.token == claimed:
        return 0
    return scores.unlisted_term(canonical, entries[-1][1], profile.fingerprint_tolerance)


def convicts(profile: Profile, tokens: int, margin_sum: int, margin_max: int, fingerprint_sum: int) -> bool:
    """Whether sums of an answer of `tokens` output tokens are above a limit of the profile."""
    if margin_max > profile.margin_hard_limit:
        return True
    for total, table in ((margin_sum, profile.margin_table), (fingerprint_sum, profile.fingerprint_table)):
        limit = scores.threshold(table, tokens)
        if limit is not None and total > limit:
            return True
    return False


def position_terms(
    position: int,
    logits: Sequence[int],
    claimed: int,
    entries: Sequence[FingerprintEntry],
    seed: bytes,
    temperature_milli: int,
    profile: Profile,
) -> tuple[Term, list[Term]]:
    """The margin against the sampler's choice and all fingerprint terms above 0 at an output position.

    logits: of the whole vocabulary, 2**-16, at the row that predicts the position.
    """
    best = sampler.sample(logits, seed, position, temperature_milli)
    found = []
    for token, logit in enumerate(logits):
        point = Point(position, token, logit, logits[claimed])
        value = fingerprint_term(point, claimed, entries, profile)
        if value:
            found.append(Term(point, value))
    point = Point(position, best, logits[best], logits[claimed])
    return Term(point, margin_of(point, claimed, seed, temperature_milli)), found


def cheapest_points(
    margins: Iterable[Term], fingerprints: Iterable[Term], tokens: int, profile: Profile
) -> Points | None:
    """The shortest list of points that passes a limit of the profile; None if none that fits a claim does.

    margins: at most one a position. tokens: of the whole output. One margin above the hard limit, else the largest terms
    of one kind, a small one that stands alone in a leaf exchanged for one in a leaf that is brought anyway. Among equally
    long lists of both kinds the one that brings fewer bytes. Where a claim cannot hold all leaves that the largest terms
    stand in, those that come too late are left out: then a shorter list may exist. None does not mean that the answer is
    honest: a score spread thinly over a long answer does not fit a claim.
    """
    largest = sorted(margins, key=lambda term: (-term.value, term.point.position))
    if largest and largest[0].value > profile.margin_hard_limit:
        return Points(margins=(largest[0].point,))
    above = [Term(term.point, scores.margin_term(term.value, profile.margin_dead_zone)) for term in largest]
    lists = []
    chosen = _enough(above, scores.threshold(profile.margin_table, tokens), (Part.OUTPUT,))
    if chosen is not None:
        lists.append(Points(margins=tuple(sorted(chosen, key=lambda point: point.position))))
    largest = sorted(fingerprints, key=lambda term: (-term.value, term.point.position, term.point.token))
    limit = scores.threshold(profile.fingerprint_table, tokens)
    chosen = _enough(largest, limit, (Part.FINGERPRINT, Part.OUTPUT))
    if chosen is not None:
        lists.append(Points(fingerprints=tuple(sorted(chosen, key=lambda point: (point.position, point.token)))))

    def cost(points: Points) -> tuple[int, int]:
        leaves = 128 * len(points.places(Part.OUTPUT)) + 384 * len(points.places(Part.FINGERPRINT))
        return len(points.margins) + len(points.fingerprints), leaves

    return min(lists, key=cost, default=None)


def _enough(terms: Sequence[Term], limit: int | None, parts: Sequence[Part]) -> list[Point] | None:
    """As many of the terms, which come in descending order, as pass the limit, as far as their leaves fit a claim."""
    chosen: list[Term] = []
    places: dict[Part, set[int]] = {part: set() for part in parts}
    total = 0
    for term in terms:
        if limit is None or term.value == 0 or len(chosen) == MAX_POINTS:
            return None
        wanted = {part: places[part] | {term.point.position // _PER_LEAF[part]} for part in parts}
        if any(len(wanted[part]) > MAX_LEAVES[part] for part in parts):
            continue
        places, total = wanted, total + term.value
        chosen.append(term)
        if total > limit:
            return [term.point for term in _in_fewer_leaves(chosen, terms, total - limit - 1, _PER_LEAF[parts[0]])]
    return None


def _in_fewer_leaves(chosen: Sequence[Term], terms: Sequence[Term], spare: int, per_leaf: int) -> list[Term]:
    """The chosen ones, the smallest first exchanged where one more in another chosen leaf costs at most what is spare."""
    kept = list(chosen)
    left = [term for term in terms if term not in kept]
    for lonely in reversed(chosen):
        others = {term.point.position // per_leaf for term in kept if term is not lonely}
        if lonely.point.position // per_leaf in others:
            continue
        near = (term for term in left if term.point.position // per_leaf in others)
        other = next(near, None)
        if other is not None and lonely.value - other.value <= spare:
            spare -= lonely.value - other.value
            kept[kept.index(lonely)] = other
            left.remove(other)
    return kept


def score(batch: Batch, claim: Claim, profile: Profile, weights_root: bytes) -> Scored:
    """Check a claim's evidence and score its points.

    profile: that of the batch's model and version, which judge whatever receipt and request name; weights_root: the
    model's. That the batch is one of the log is the caller's to know.

    Raises InvalidInput for evidence that is not authentic and for points that are not in order, stand past the output, or
    name a token past the vocabulary. Of what a node may do to make itself impossible to score:

    * faults in receipt, header, prompt or stated fingerprint do not matter here. Nor does a claimed token that is stated;
    * parameters that nobody can show leave the fingerprint, which needs none;
    * leaves of a wrong length and ids past the vocabulary are refused: LEAF_SIZE and TOKEN_ID of offences.py, judged at
      once. Roots of no tree are withholding.
    """
    receipt, points, tokens = claim.receipt, claim.points, claim.receipt.output_tokens
    place = [receipt.struct_hash()]
    if not verify_proof(batch.root, place, [claim.index], batch.count, claim.receipt_proof):
        raise InvalidInput(f"the receipt does not stand at index {claim.index} of the batch.")
    if claim.request.struct_hash() != receipt.request_hash:
        raise InvalidInput("the request is not the one that the receipt names.")
    if claim.roots.transcript_root() != receipt.transcript_root:
        raise InvalidInput("the roots are not those of the transcript that the receipt names.")
    if points.margins and claim.params.params_hash() != claim.request.params_hash:
        raise InvalidInput("the parameters are not those that the request names.")
    _check_points(points, tokens, profile.vocab_size)
    ids, stated = _read_leaves(claim)
    seed, temperature = claim.request.seed(), claim.params.temperature_milli

    margins, terms = [0], 0
    for point in (*points.margins, *points.fingerprints):
        if ids[point.position] >= profile.vocab_size:
            raise InvalidInput(f"the claimed token {ids[point.position]} is outside the vocabulary.")
        if point.token == ids[point.position] and point.logit != point.claimed_logit:
            raise InvalidInput(f"token {point.token} cannot have two logits at position {point.position}.")
    for point in points.margins:
        margins.append(margin_of(point, ids[point.position], seed, temperature))
    for point in points.fingerprints:
        terms += fingerprint_term(point, ids[point.position], stated[point.position], profile)
    total = sum(scores.margin_term(margin, profile.margin_dead_zone) for margin in margins)
    return Scored(
        convicts=convicts(profile, tokens, total, max(margins), terms),
        margin_sum=total,
        margin_max=max(margins),
        fingerprint_sum=terms,
        model_id=batch.model_id,
        prompt_tokens=claim.request.prompt_tokens,
        output_tokens=tokens,
        prompt_root=claim.request.prompt_root,
        output_root=claim.roots.output_root,
        weights_root=weights_root,
    )


def _check_points(points: Points, tokens: int, vocab_size: int) -> None:
    if max(len(points.margins), len(points.fingerprints)) > MAX_POINTS:
        raise InvalidInput(f"a claim holds at most {MAX_POINTS} points of a kind.")
    if any(b.position <= a.position for a, b in pairwise(points.margins)):
        raise InvalidInput("margins must strictly increase by position.")
    if any((b.position, b.token) <= (a.position, a.token) for a, b in pairwise(points.fingerprints)):
        raise InvalidInput("fingerprint points must strictly increase by position, then token.")
    for point in (*points.margins, *points.fingerprints):
        if point.position >= tokens:
            raise InvalidInput(f"position {point.position} is past an output of {tokens} tokens.")
        if point.token >= vocab_size:
            raise InvalidInput(f"token {point.token} is outside the vocabulary of {vocab_size}.")


def _read_leaves(claim: Claim) -> tuple[dict[int, int], dict[int, tuple[FingerprintEntry, ...]]]:
    """The claimed ids and the stated entries that the points need, by position. Raises InvalidInput."""
    tokens, proof = claim.receipt.output_tokens, list(claim.proof)
    ids: dict[int, int] = {}
    stated: dict[int, tuple[FingerprintEntry, ...]] = {}
    for part, data in ((Part.OUTPUT, claim.output_leaves), (Part.FINGERPRINT, claim.fingerprint_leaves)):
        places = claim.points.places(part)
        sizes = [leaf_size(part, place, tokens) for place in places]
        if len(data) > MAX_BYTES[part] or len(data) != sum(sizes):
            raise InvalidInput(f"the leaves of {part.name} have {len(data)} bytes, not {sum(sizes)}.")
        if not places:
            continue
        leaves = [data[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        count = leaf_count(part, tokens)
        needed = _proof_length(places, count)
        if root_from_proof(leaves, places, count, proof[:needed]) != claim.roots.part_root(part):
            raise InvalidInput(f"the leaves of {part.name} are not those of the transcript.")
        del proof[:needed]
        for place, leaf in zip(places, leaves, strict=True):
            first = place * _PER_LEAF[part]
            if part is Part.OUTPUT:
                ids |= {first + i: int.from_bytes(leaf[4 * i : 4 * i + 4], "little") for i in range(len(leaf) // 4)}
            else:
                stated |= dict(enumerate(parse_fingerprints(leaf), start=first))
    if proof:
        raise InvalidInput("the proofs of the leaves are too long.")
    return ids, stated


def _proof_length(places: Sequence[int], count: int) -> int:
    """How many hashes prove the leaves at `places` among `count`."""
    length, known = 0, set(places)
    while count > 1:
        length += sum(1 for i in known if i ^ 1 not in known and i ^ 1 < count)
        known, count = {i // 2 for i in known}, (count + 1) // 2
    return length
