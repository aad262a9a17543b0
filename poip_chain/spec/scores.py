"""Scores of an answer against recomputed logits, and the verdict (protocol section 12; verification.md's two
scores).

All integers. Logits are in units of 2**-16; `logits[v]` is the logit of token v at the row that predicts the
position.

* **Margin** in 2**-16 logits: by how much the claimed token loses against the sampler's choice, floored. Its
  term in the sum is the part above the profile's dead zone. One margin above `margin_hard_limit` is fraud by
  itself.
* **Fingerprint** in 1/64 nat: how far the eight stated differences to the chosen token lie from the
  recomputed ones, plus how far a token that is not stated outranks the lowest stated one.

Every term is >= 0, so a sum over some positions, or over some unlisted tokens, is a lower bound of the whole:
an accuser who leaves terms out can only weaken the case. Rounding is downwards wherever the accused would
lose by it. The contracts of the court are the second writing of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from poip_chain.errors import InvalidInput
from poip_chain.spec import sampler
from poip_chain.spec.objects import Profile, ThresholdRow

FingerprintEntry = tuple[int, int]
"""(token id, stated logit minus the chosen token's logit in 1/64 nat, saturated to int16)."""

NAT_SHIFT = 10
"""2**-16 logits to 1/64 nat: a division by 2**10."""
VALUE_MIN, VALUE_MAX = -(2**15), 2**15 - 1

SUSPICION_DIVISOR = 2
"""Between 1/2 of a limit and the limit the verdict is `cannot_tell`: look at more receipts, file nothing."""


class Verdict(StrEnum):
    """The three verdicts of protocol section 5. Only FRAUD, confirmed on the canonical engine, is filed."""

    HONEST = "honest"
    FRAUD = "fraud"
    CANNOT_TELL = "cannot_tell"


@dataclass(frozen=True, slots=True)
class Scores:
    """The sums of one answer. margin_* in 2**-16 logits, fingerprint_sum in 1/64 nat, dead zones already
    taken off.

    margin_max is the largest single margin, before the dead zone.
    """

    tokens: int
    margin_sum: int
    margin_max: int
    fingerprint_sum: int


def margin_between(best_noised: int, claimed_noised: int) -> int:
    """The margin of two `sampler.noised` values in 2**-16 logits: floor(difference / 1000), at least 0."""
    return max(0, (best_noised - claimed_noised) // 1000)


def margin(logits: Sequence[int], claimed: int, seed: bytes, position: int, temperature_milli: int) -> int:
    """The margin of the claimed token at an output position: 0 if the sampler chooses it (or one that ties
    with it).
    """
    key = sampler.position_key(seed, position)

    def noised(token: int) -> int:
        noise = sampler.gumbel(sampler.uniform_bits(key, token))
        return sampler.noised(logits[token], temperature_milli, noise)

    best = sampler.sample(logits, seed, position, temperature_milli)
    return margin_between(noised(best), noised(claimed))


def margin_term(value: int, dead_zone: int) -> int:
    """What a margin adds to the sum: the part above the dead zone."""
    return max(0, value - dead_zone)


def canonical_value(logit: int, chosen_logit: int) -> int:
    """A recomputed fingerprint value: the difference to the chosen token's logit in 1/64 nat, rounded half
    up, int16.
    """
    value = (logit - chosen_logit + (1 << (NAT_SHIFT - 1))) >> NAT_SHIFT
    return max(VALUE_MIN, min(VALUE_MAX, value))


def listed_term(stated: int, canonical: int, dead_zone: int) -> int:
    """What a stated entry adds: its distance to the recomputed value, above the dead zone."""
    return max(0, abs(stated - canonical) - dead_zone)


def unlisted_term(canonical: int, lowest_stated: int, tolerance: int) -> int:
    """What a token adds that is neither stated nor chosen: by how much it should have been stated."""
    return max(0, canonical - lowest_stated - tolerance)


def fingerprint(
    logits: Sequence[int], chosen: int, entries: Sequence[FingerprintEntry], dead_zone: int, tolerance: int
) -> int:
    """The fingerprint score of one position over the whole vocabulary, in 1/64 nat.

    Raises InvalidInput if the entries are not well formed: see `check_entries`.
    """
    check_entries(entries, chosen, len(logits))
    stated = dict(entries)
    lowest = min(stated.values())
    total = 0
    for token, logit in enumerate(logits):
        canonical = canonical_value(logit, logits[chosen])
        if token in stated:
            total += listed_term(stated[token], canonical, dead_zone)
        elif token != chosen:
            total += unlisted_term(canonical, lowest, tolerance)
    return total


def check_entries(entries: Sequence[FingerprintEntry], chosen: int, vocab_size: int) -> None:
    """Raises InvalidInput unless the entries are distinct ids of the vocabulary without the chosen one, int16
    values, ordered by value descending, then id ascending. Their number is the transcript's business.
    """
    if not entries:
        raise InvalidInput("a fingerprint position has no entries.")
    for token, value in entries:
        if not 0 <= token < vocab_size or token == chosen or not VALUE_MIN <= value <= VALUE_MAX:
            raise InvalidInput(f"fingerprint entry ({token}, {value}) is out of range or names the chosen token.")
    if len({token for token, _ in entries}) != len(entries):
        raise InvalidInput("a fingerprint position names a token twice.")
    order = [(-value, token) for token, value in entries]
    if order != sorted(order):
        raise InvalidInput("fingerprint entries must be ordered by value descending, then id ascending.")


def threshold(table: Sequence[ThresholdRow], tokens: int) -> int | None:
    """The largest sum that an honest answer of `tokens` output tokens may reach; None below the table's first
    length.

    The row with the largest length <= tokens applies (one of no tokens never does), its limit scaled per token and
    rounded up: limit * tokens / length. The tolerated mean falls with length, so the shorter row's mean is the lenient
    one in between, and past the last row.
    """
    chosen = None
    for row in table:
        if 0 < row.tokens <= tokens:
            chosen = row
    return None if chosen is None else -(-chosen.limit * tokens // chosen.tokens)


def verdict(scores: Scores, profile: Profile) -> Verdict:
    """The verdict on one answer.

    `fraud`: a margin above the hard limit, or a sum above its threshold. `honest`: no margin above half the
    hard limit and both sums at most half their thresholds (below a table's first length: half the first row's
    limit). Else `cannot_tell`.
    """
    suspect = SUSPICION_DIVISOR * scores.margin_max > profile.margin_hard_limit
    if scores.margin_max > profile.margin_hard_limit:
        return Verdict.FRAUD
    for total, table in (
        (scores.margin_sum, profile.margin_table),
        (scores.fingerprint_sum, profile.fingerprint_table),
    ):
        limit = threshold(table, scores.tokens)
        if limit is not None and total > limit:
            return Verdict.FRAUD
        line = limit if limit is not None else (table[0].limit if table else None)
        suspect = suspect or (line is not None and SUSPICION_DIVISOR * total > line)
    return Verdict.CANNOT_TELL if suspect else Verdict.HONEST
