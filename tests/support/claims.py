"""Random answers, committed and claimed against, for tests and measurements of scoring.

Logits are whatever a caller says: scoring takes them for true. Nothing here knows the chain.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from eth_hash.auto import keccak

from poip_chain.spec.accusation import Claim, Point, Points
from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.objects import Batch, Part, Profile, Receipt, Request, SamplingParams, ThresholdRow
from poip_chain.spec.transcript import Transcript, prompt_root
from poip_chain.spec.types import Address, Hash32

NODE, CLIENT = (Address("0x" + f"{digit}" * 40) for digit in (1, 2))
LOGIT = 2**16
PROFILE = Profile(
    max_context=8192,
    vocab_size=1000,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    min_temperature_milli=100,
    max_temperature_milli=2000,
    end_token_ids=(2, 7),
    margin_dead_zone=LOGIT // 4,
    margin_hard_limit=3 * LOGIT,
    margin_table=tuple(ThresholdRow(n, limit * LOGIT) for n, limit in ((16, 2), (64, 3), (256, 6), (1024, 16))),
    fingerprint_dead_zone=16,
    fingerprint_tolerance=32,
    fingerprint_table=tuple(ThresholdRow(n, limit) for n, limit in ((16, 640), (64, 1280), (256, 4096), (1024, 8192))),
)
"""As a model's profile is: four rows a table."""


@dataclass(frozen=True)
class Answered:
    """An answer at `index` of a batch, with all that a client holds of it."""

    batch: Batch
    hashes: tuple[bytes, ...]
    index: int
    receipt: Receipt
    request: Request
    params: SamplingParams
    transcript: Transcript

    def claim(self, points: Points, trace_root: bytes = b"\x05" * 32) -> Claim:
        """A right claim of these points."""
        proof = merkle_proof(self.hashes, [self.index])
        return Claim.of(self.receipt, self.index, proof, self.request, self.params, self.transcript, trace_root, points)


def answered(
    rng: random.Random,
    outputs: int,
    *,
    temperature_milli: int = 700,
    vocab_size: int = PROFILE.vocab_size,
    batch_size: int = 5,
    prompt: int = 7,
    receipt_changes: dict[str, Any] | None = None,
    request_changes: dict[str, Any] | None = None,
    transcript_changes: dict[str, Any] | None = None,
) -> Answered:
    """A random answer of well-formed parts, but for the changes, committed at a random index."""
    params = SamplingParams(temperature_milli)
    ids = tuple(rng.randrange(vocab_size) for _ in range(prompt))
    request = Request(
        client=CLIENT,
        node=NODE,
        model_id=keccak(b"model"),
        profile_version=1,
        prompt_root=prompt_root(ids),
        prompt_tokens=prompt,
        params_hash=params.params_hash(),
        max_tokens=outputs + rng.randrange(3),
        input_price=10**12,
        output_price=3 * 10**12,
        client_seed=rng.randbytes(32),
        client_nonce=rng.randbytes(32),
        deadline=1_800_000_000,
    ).replace(**(request_changes or {}))
    output = tuple(rng.randrange(vocab_size) for _ in range(outputs))
    transcript = Transcript(
        request_hash=request.struct_hash(),
        finish_reason=1,
        engine_statement="test",
        prompt_ids=ids,
        output_ids=output,
        fingerprints=tuple(entries(rng, chosen, vocab_size) for chosen in output),
    )
    transcript = dataclasses.replace(transcript, **(transcript_changes or {}))
    fee = request.fee(outputs)
    index = rng.randrange(batch_size)
    receipt = Receipt(
        node=NODE,
        seq=index,
        request_hash=request.struct_hash(),
        model_id=request.model_id,
        transcript_root=transcript.root(),
        output_tokens=outputs,
        finish_reason=1,
        fee=fee,
        payer=CLIENT,
        payer_cum=fee,
        node_cum=fee,
        issued_at=1_700_000_000,
    ).replace(**(receipt_changes or {}))
    hashes = [rng.randbytes(32) for _ in range(batch_size)]
    hashes[index] = receipt.struct_hash()
    batch = Batch(
        id=3,
        node=NODE,
        model_id=keccak(b"model"),
        profile_version=1,
        root=merkle_root(hashes),
        first_seq=0,
        count=batch_size,
        total_fee=fee * batch_size,
        node_cum=fee * batch_size,
        lock=10**18,
        audit_rate_ppm=50_000,
        parameters_version=1,
        block_number=9,
        committed_at=1_700_000_100,
        window_end=1_700_090_000,
    )
    return Answered(batch, tuple(hashes), index, receipt, request, params, transcript)


def entries(rng: random.Random, chosen: int, vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Eight stated tokens as an honest node states them, with values of ordinary size and, now and then, any size."""
    ids = rng.sample([token for token in range(vocab_size) if token != chosen], 8)
    edge = rng.random() < 0.1
    values = [rng.randint(-(2**15), 2**15 - 1) if edge else rng.randint(-640, 640) for _ in ids]
    return tuple(sorted(zip(ids, values, strict=True), key=lambda entry: (-entry[1], entry[0])))


def logit(rng: random.Random) -> int:
    """A logit: of ordinary size, or now and then anything that an int32 holds."""
    if rng.random() < 0.1:
        return rng.choice([-(2**31), 2**31 - 1, 0, rng.randint(-(2**31), 2**31 - 1)])
    return rng.randint(-12 * LOGIT, 12 * LOGIT)


def random_points(
    rng: random.Random, answer: Answered, margins: int, fingerprints: int, vocab_size: int = PROFILE.vocab_size
) -> Points:
    """Well-ordered points, at most so many: of fingerprints many stated ones and the claimed token, too."""
    output = answer.transcript.output_ids
    found: list[Point] = []
    for position in sorted(rng.sample(range(len(output)), min(margins, len(output)))):
        found.append(point(rng, answer, position, rng.randrange(vocab_size)))
    wanted = set()
    for _ in range(fingerprints):
        position = rng.randrange(len(output))
        listed = [token for token, _ in answer.transcript.fingerprints[position]]
        wanted.add((position, rng.choice([*listed, output[position], rng.randrange(vocab_size)])))
    stated = [point(rng, answer, position, token % vocab_size) for position, token in sorted(wanted)]
    return Points(tuple(found), tuple(stated))


def point(rng: random.Random, answer: Answered, position: int, token: int) -> Point:
    """A point at a position, of random logits; those of the claimed token are equal."""
    at_claimed = logit(rng)
    same = token == answer.transcript.output_ids[position]
    return Point(position, token, at_claimed if same else logit(rng), at_claimed)


def one_margin_each(rng: random.Random, answer: Answered, count: int, spread: bool) -> Points:
    """`count` margin points that convict together: in as few leaves as can be, or spread over the whole output."""
    step = len(answer.transcript.output_ids) // count if spread else 1
    found = []
    for i in range(count):
        claimed = answer.transcript.output_ids[i * step]
        token = rng.choice([token for token in range(PROFILE.vocab_size) if token != claimed])
        found.append(Point(i * step, token, 20 * LOGIT + rng.randrange(LOGIT), 2 * LOGIT + rng.randrange(LOGIT)))
    return Points(tuple(found))


def leaves_of(answer: Answered, part: Part) -> list[bytes]:
    """The leaves of one part of the transcript."""
    return answer.transcript.leaves(part)


__all__ = ["PROFILE", "Answered", "Hash32", "answered", "leaves_of", "one_margin_each", "point", "random_points"]
