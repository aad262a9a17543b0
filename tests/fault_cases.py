"""Hypothesis strategies for the rules of offences, shared by the tests of the specification and of the contracts.

A case starts from what an honest node would sign and spoils up to three fields with neighbours of the right value or
with extremes, so that most examples sit beside the line that a rule draws.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from eth_hash.auto import keccak
from hypothesis import strategies as st

from poip_chain.spec.objects import (
    Batch,
    FinishReason,
    Part,
    Profile,
    Receipt,
    Request,
    SamplingParams,
    ThresholdRow,
)
from poip_chain.spec.transcript import Transcript, leaf_count, prompt_root
from poip_chain.spec.types import Address

NODE = Address("0x" + "11" * 20)
CLIENT = Address("0x" + "22" * 20)
MODEL = keccak(b"model")
VOCABULARY = 1000
END_IDS = (2, 7)
STOP_IDS = (11, 13)
PROFILE = Profile(
    256,
    VOCABULARY,
    "bfloat16",
    "bfloat16",
    100,
    2000,
    END_IDS,
    1,
    2,
    (ThresholdRow(1, 1),),
    1,
    1,
    (ThresholdRow(1, 1),),
)
ADDRESSES = st.sampled_from(
    [NODE, CLIENT, Address("0x" + "00" * 20), Address("0x" + "33" * 20), Address("0x" + "ff" * 20)]
)
HASHES = st.sampled_from([MODEL, bytes(32), b"\xff" * 32, keccak(b"other")])


@dataclass(frozen=True)
class Case:
    """A receipt with everything that it is judged against."""

    receipt: Receipt
    request: Request
    params: SamplingParams
    batch: Batch | None
    index: int
    transcript: Transcript


def honest(
    output_ids: tuple[int, ...] = (300, 301, 2),
    reason: FinishReason = FinishReason.STOP,
    params: SamplingParams | None = None,
    max_tokens: int = 64,
) -> Case:
    """What an honest node signs for this answer."""
    params = params or SamplingParams(700, stop_token_ids=(11,))
    prompt_ids = tuple(range(20, 60))
    request = Request(
        CLIENT,
        NODE,
        MODEL,
        1,
        prompt_root(prompt_ids),
        len(prompt_ids),
        params.params_hash(),
        max_tokens,
        10**13,
        3 * 10**13,
        bytes(32),
        bytes(32),
        1000,
    )
    transcript = Transcript(
        request.struct_hash(),
        reason,
        "test",
        prompt_ids,
        output_ids,
        tuple(tuple((500 + i, -i) for i in range(8)) for _ in output_ids),
    )
    fee = request.fee(len(output_ids))
    receipt = Receipt(
        NODE,
        5,
        request.struct_hash(),
        MODEL,
        transcript.root(),
        len(output_ids),
        reason,
        fee,
        CLIENT,
        fee + 10,
        fee + 20,
        990,
    )
    batch = Batch(1, NODE, MODEL, 1, bytes(32), 5, 1, fee, fee + 20, 1, 1, 1, 1, 1, 1)
    return Case(receipt, request, params, batch, 0, transcript)


def bits_of(abi_type: str) -> int:
    """The width of an unsigned ABI type."""
    return int(abi_type.removeprefix("uint"))


def spoiled(value: Any, abi_type: str) -> st.SearchStrategy[Any]:
    """A neighbour of a field's value, or an extreme."""
    if abi_type == "address":
        return ADDRESSES
    if abi_type == "bytes32":
        return HASHES
    top = 2 ** bits_of(abi_type) - 1
    near = {min(max(value + delta, 0), top) for delta in (-2, -1, 1, 2)}
    return st.one_of(st.sampled_from(sorted(near | {0, 1, top, top - 1})), st.integers(0, top))


def spoil(draw: Any, item: Any, most: int) -> Any:
    """`item` with up to `most` fields spoiled."""
    names = draw(st.lists(st.sampled_from(sorted(item.ABI)), max_size=most, unique=True))
    return item.replace(**{name: draw(spoiled(getattr(item, name), item.ABI[name])) for name in names})


@st.composite
def cases(draw: Any, spoil_most: int = 2) -> Case:
    """A case, more often than not with something wrong."""
    prompt_tokens = draw(st.integers(1, 70))
    output_tokens = draw(st.integers(0, 70))
    reason = draw(st.sampled_from([0, 1, 2])) if output_tokens else 2
    params = SamplingParams(
        draw(st.sampled_from([0, 100, 700, 2000] * 3 + [99, 2001])),
        draw(st.sampled_from([1000] * 8 + [999])),
        draw(st.sampled_from([0] * 8 + [1])),
        draw(st.sampled_from([STOP_IDS, (), STOP_IDS, (999,), (1000,)])),
        draw(st.booleans()),
    )
    ends = STOP_IDS if params.ignore_eos else END_IDS
    prompt_ids = tuple(20 + i for i in range(prompt_tokens))
    output_ids = tuple(300 + i for i in range(output_tokens))
    if reason == 0:
        output_ids = (*output_ids[:-1], draw(st.sampled_from(ends)))
    wrong_ids = st.sampled_from([*END_IDS, *STOP_IDS, 999, 1000, 2**32 - 1])
    if draw(st.booleans()) and output_ids:
        at = draw(st.integers(0, len(output_ids) - 1))
        output_ids = (*output_ids[:at], draw(wrong_ids), *output_ids[at + 1 :])
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(prompt_ids) - 1))
        prompt_ids = (*prompt_ids[:at], draw(wrong_ids), *prompt_ids[at + 1 :])
    right = tuple((500 + i, -i) for i in range(8))
    wrong = st.lists(
        st.tuples(
            st.sampled_from([500, 501, 507, 999, 1000, 2**32 - 1]),
            st.sampled_from([-(2**15), -1, 0, 1, 2**15 - 1]),
        ),
        min_size=8,
        max_size=8,
    ).map(lambda entries: tuple(sorted(entries, key=lambda e: (-e[1], e[0]))))
    fingerprints = [right] * output_tokens
    if draw(st.booleans()) and output_tokens:
        fingerprints[draw(st.integers(0, output_tokens - 1))] = draw(wrong)

    request = Request(
        client=CLIENT,
        node=draw(st.sampled_from([NODE, Address("0x" + "00" * 20)])),
        model_id=MODEL,
        profile_version=1,
        prompt_root=prompt_root(prompt_ids),
        prompt_tokens=prompt_tokens,
        params_hash=params.params_hash(),
        max_tokens=output_tokens if reason == 1 else output_tokens + draw(st.integers(0, 9)),
        input_price=draw(st.sampled_from([0, 10**13, 2**128 - 1])),
        output_price=draw(st.sampled_from([0, 10**13, 2**128 - 1])),
        client_seed=bytes(32),
        client_nonce=bytes(32),
        deadline=1_800_000_000,
    )
    request = spoil(draw, request, 1 if draw(st.integers(0, 3)) == 0 else 0)
    transcript = Transcript(
        request_hash=request.struct_hash(),
        finish_reason=reason,
        engine_statement="test",
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        fingerprints=tuple(fingerprints),
    )
    fee = min(request.fee(output_tokens), 2**192 - 1)
    first_seq, index, count = draw(st.sampled_from([(0, 0, 1), (5, 0, 3), (5, 1, 3), (5, 2, 3), (2**64 - 3, 2, 3)]))
    before, after = draw(st.sampled_from([(0, 0), (12345, 777), (10**30, 10**20)]))
    before = before if index else 0
    receipt = Receipt(
        node=NODE,
        seq=first_seq + index,
        request_hash=request.struct_hash(),
        model_id=MODEL,
        transcript_root=transcript.root(),
        output_tokens=output_tokens,
        finish_reason=reason,
        fee=fee,
        payer=CLIENT,
        payer_cum=fee + draw(st.sampled_from([0, 10**20])),
        node_cum=10**25 + before + fee,
        issued_at=1_799_999_990,
    )
    after = 0 if index == count - 1 else after
    batch = Batch(
        7, NODE, MODEL, 1, bytes(32), first_seq, count, before + fee + after, receipt.node_cum + after, 1, 1, 1, 1, 1, 1
    )
    receipt = spoil(draw, receipt, spoil_most)
    batch = spoil(draw, batch, 1 if draw(st.integers(0, 3)) == 0 else 0)
    committed = draw(st.booleans())
    return Case(receipt, request, params, batch if committed else None, index, transcript)


@st.composite
def receipt_pairs(draw: Any) -> tuple[Receipt, Receipt]:
    """Two receipts, often of one node and one after the other, with totals near to right."""
    first = draw(cases()).receipt
    fee = draw(st.sampled_from([0, 1, 10**15, 2**192 - 1]))
    second = first.replace(
        seq=min(first.seq + draw(st.integers(0, 2)), 2**64 - 1),
        request_hash=keccak(b"next"),
        fee=fee,
        node_cum=min(first.node_cum + fee, 2**192 - 1),
        payer_cum=min(first.payer_cum + fee, 2**192 - 1),
    )
    pair = [first, spoil(draw, second, 1)]
    return (pair[1], pair[0]) if draw(st.integers(0, 5)) == 0 else (pair[0], pair[1])


@st.composite
def leaf_cases(draw: Any) -> tuple[Case, Part, int, bytes]:
    """A leaf that stands in a part of the case's transcript, sometimes of a wrong length."""
    case = draw(cases(spoil_most=draw(st.sampled_from([0, 0, 1]))))
    part = draw(st.sampled_from(list(Part)))
    tokens = case.request.prompt_tokens if part is Part.PROMPT else case.receipt.output_tokens
    count = leaf_count(part, tokens)
    if count == 0:
        part, count = Part.PROMPT, leaf_count(Part.PROMPT, max(case.request.prompt_tokens, 1))
    index = draw(st.one_of(st.integers(0, count - 1), st.just(count - 1)))
    leaves = case.transcript.leaves(part)
    leaf = leaves[index] if index < len(leaves) else draw(st.binary(max_size=400))
    change = draw(st.sampled_from(["none"] * 8 + ["shorter", "longer", "random"]))
    if change == "shorter":
        leaf = leaf[:-1]
    elif change == "longer":
        leaf += b"\0"
    elif change == "random":
        leaf = draw(st.binary(min_size=len(leaf), max_size=len(leaf)))
    return case, part, index, leaf


def neighbours(value: Any, abi_type: str) -> list[Any]:
    """Other values for a field: beside the right one, and extremes."""
    if abi_type == "address":
        return [NODE, CLIENT, Address("0x" + "00" * 20), Address("0x" + "33" * 20)]
    if abi_type == "bytes32":
        return [bytes(32), b"\xff" * 32]
    top = 2 ** bits_of(abi_type) - 1
    return sorted({max(value - 1, 0), min(value + 1, top), 0, 1, 2, 3, top} - {value})


def honest_cases() -> list[Case]:
    """One honest case for each way to end, and sampling parameters that are not served."""
    return [
        honest(),
        honest(tuple(range(300, 364)), FinishReason.LENGTH),
        honest((300,), FinishReason.CANCELLED),
        honest((), FinishReason.CANCELLED),
        honest((2, 7, 11), FinishReason.STOP, SamplingParams(0, stop_token_ids=(11,), ignore_eos=True)),
        *(honest(params=params) for params in (SamplingParams(99), SamplingParams(2001), SamplingParams(700, 999))),
        *(honest(params=params) for params in (SamplingParams(700, 1000, 1), SamplingParams(1, 1000, 0, (1000,)))),
    ]


def single_changes() -> list[Case]:
    """Honest cases, and three of them with each field of receipt, request and batch changed, one at a time."""
    honest_ones = honest_cases()
    found = [*honest_ones, *(dataclasses.replace(case, batch=None) for case in honest_ones)]
    for case in (honest_ones[0], honest_ones[1], honest_ones[3]):
        for name in ("receipt", "request", "batch"):
            item = getattr(case, name)
            for field, kind in item.ABI.items():
                for value in neighbours(getattr(item, field), kind):
                    changes: dict[str, Any] = {name: item.replace(**{field: value})}
                    if name == "request":
                        # The fee follows, so that the first rule does not hide the others.
                        fee = changes["request"].fee(case.receipt.output_tokens)
                        if fee <= min(case.receipt.payer_cum, case.receipt.node_cum):
                            changes["receipt"] = case.receipt.replace(fee=fee)
                    found.append(dataclasses.replace(case, **changes))
    return found


def leaves_with_faults() -> list[tuple[Case, Part, int, bytes]]:
    """Leaves that break each rule of leaves, and leaves that break none."""
    found: list[tuple[Case, Part, int, bytes]] = []
    ends = SamplingParams(0, stop_token_ids=(11,), ignore_eos=True)
    for ids in ((300, 2), (300, 11), (300, 301), (2, 300), (11, 300), (300, 999), (300, 1000), (7, 2**32 - 1)):
        for tail in (ids, (*range(300, 331), *ids), (*range(300, 330), *ids)):
            for reason in FinishReason:
                for params in (None, ends):
                    case = honest(tail, reason, params)
                    leaves = case.transcript.leaves(Part.OUTPUT)
                    found += [(case, Part.OUTPUT, i, leaf) for i, leaf in enumerate(leaves)]
    right = [(500 + i, -i) for i in range(8)]
    positions = [right, right[::-1], [(500 + i, 0) for i in range(8)], [(507 - i, 0) for i in range(8)]]
    positions += [[*right[:7], entry] for entry in ((500, -7), (506, -6), (999, -7), (1000, -7), (507, -(2**15)))]
    positions += [[(507, 2**15 - 1), *right[:7]], [(i, v) for i, v in enumerate((9, 8, 1, 0, -1, -2, -300, -(2**15)))]]
    for position in positions:
        case = honest(tuple(range(300, 309)), FinishReason.CANCELLED)
        fingerprints = (*case.transcript.fingerprints[:8], tuple(position))
        transcript = dataclasses.replace(case.transcript, fingerprints=fingerprints)
        found.append((case, Part.FINGERPRINT, 1, transcript.leaves(Part.FINGERPRINT)[1]))
    for case, part, index, leaf in list(found[:6]) + list(found[-2:]):
        found += [(case, part, index, wrong) for wrong in (b"", leaf[:-1], leaf + b"\0", leaf * 2)]
    return found


def pairs_with_faults() -> list[tuple[Receipt, Receipt]]:
    """An honest pair of receipts with each field of the second changed, one at a time, in both orders."""
    a = honest().receipt
    b = a.replace(seq=6, fee=7, node_cum=a.node_cum + 7, payer_cum=a.payer_cum + 7, request_hash=keccak(b"b"))
    pairs = [(a, b)]
    for field, kind in b.ABI.items():
        if field != "node":
            pairs += [(a, b.replace(**{field: value})) for value in neighbours(getattr(b, field), kind)]
            pairs += [(a.replace(**{field: value}), b) for value in neighbours(getattr(a, field), kind)]
    return pairs + [(second, first) for first, second in pairs]
