"""What a node refuses before it runs anything, each with its status and code."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.economic.locks import LockTerms
from poip_chain.economic.parameters import POIP
from poip_chain.economic.types import Offer
from poip_chain.errors import InvalidInput, InvalidSignature, PoipError
from poip_chain.service.node.admission import (
    MAX_TOTAL,
    Account,
    Credit,
    Served,
    check_credit,
    check_deadline,
    check_submission,
    parse_submission,
    parse_voucher,
)
from poip_chain.service.node.ports import Backing
from poip_chain.service.node.refusals import MAX_MESSAGE, RequestRefused, error_body
from poip_chain.service.node.schema import BatchState
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import SamplingParams
from poip_chain.spec.types import ZERO_ADDRESS, Hash32
from tests.engines.model_chain import CHAIN_ID, LOG, TERMS, VAULT, WINDOW
from tests.engines.node_kit import INPUT_PRICE, MODEL_ID, OUTPUT_PRICE, PROFILE, Client, Kit, flat, key_of

NODE = key_of("node").address
SERVED = Served(NODE, MODEL_ID, 1, PROFILE, INPUT_PRICE, OUTPUT_PRICE, Domain(CHAIN_ID, LOG), Domain(CHAIN_ID, VAULT))
CLIENT = Client(SERVED)


def code_of(body: Any) -> tuple[int, str]:
    with pytest.raises(PoipError) as caught:
        check_submission(parse_submission(body), SERVED)
    return caught.value.status, caught.value.code


def test_a_good_request_passes() -> None:
    for body in (
        CLIENT.body(),
        CLIENT.body(node=ZERO_ADDRESS),
        CLIENT.body(params=SamplingParams(0)),
        CLIENT.body(input_price=INPUT_PRICE + 5),
        CLIENT.body(range(16, 16 + 200), max_tokens=56),
        CLIENT.body(params=SamplingParams(2000, stop_token_ids=(5, 999), ignore_eos=True)),
    ):
        check_submission(parse_submission(body), SERVED)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"node": key_of("x").address}, 400, "wrong_node"),
        ({"model_id": b"z" * 32}, 404, "model_not_found"),
        ({"profile_version": 2}, 404, "model_not_found"),
        ({"max_tokens": 0}, 400, "invalid_request"),
        ({"max_tokens": 254}, 400, "context_length_exceeded"),
        ({"client": key_of("x").address}, 401, "invalid_signature"),
        ({"params_hash": bytes(32)}, 400, "params_mismatch"),
        ({"prompt_root": b"z" * 32}, 400, "prompt_mismatch"),
        ({"input_price": INPUT_PRICE - 1}, 402, "price_too_low"),
        ({"output_price": 0}, 402, "price_too_low"),
        ({"params": SamplingParams(99)}, 400, "unsupported_parameter"),
        ({"params": SamplingParams(2001)}, 400, "unsupported_parameter"),
        ({"params": SamplingParams(700, top_p_milli=999)}, 400, "unsupported_parameter"),
        ({"params": SamplingParams(700, top_k=1)}, 400, "unsupported_parameter"),
        ({"params": SamplingParams(700, stop_token_ids=(1000,))}, 400, "vocabulary"),
        ({"prompt": (1, 1000)}, 400, "vocabulary"),
        ({"prompt": ()}, 400, "invalid_request"),
    ],
)
def test_refusals(changes: dict[str, Any], status: int, code: str) -> None:
    assert code_of(CLIENT.body(**changes)) == (status, code)


@pytest.mark.parametrize("domain", [Domain(CHAIN_ID + 1, LOG), Domain(CHAIN_ID, VAULT)])
def test_a_signature_for_another_chain_or_contract(domain: Domain) -> None:
    other = Client(Served(NODE, MODEL_ID, 1, PROFILE, INPUT_PRICE, OUTPUT_PRICE, domain, Domain(CHAIN_ID, VAULT)))
    assert code_of(other.body()) == (401, "invalid_signature")


def spoil(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        place: Any = body
        for step in path[:-1]:
            place = place[step]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        spoil(["request"], KeyError),
        spoil(["extra"], 1),
        spoil(["request", "max_tokens"], -1),
        spoil(["request", "max_tokens"], 2**32),
        spoil(["request", "max_tokens"], 10**400),
        spoil(["request", "max_tokens"], True),
        spoil(["request", "max_tokens"], 1.0),
        spoil(["request", "max_tokens"], "40"),
        spoil(["request", "input_price"], "9" * 81),
        spoil(["request", "input_price"], 3),
        spoil(["request", "client"], "0x12"),
        spoil(["request", "client"], None),
        spoil(["request", "client_seed"], "0x" + "zz" * 32),
        spoil(["request", "extra"], 1),
        spoil(["params", "temperature_milli"], -1),
        spoil(["params", "temperature_milli"], float("1e300")),
        spoil(["params", "stop_token_ids"], [[1]]),
        spoil(["params", "stop_token_ids"], [9, 9]),
        spoil(["params", "stop_token_ids"], list(range(9))),
        spoil(["params", "ignore_eos"], 0),
        spoil(["prompt_ids"], [11, 12]),
        spoil(["prompt_ids"], [11, 12, 13, 14]),
        spoil(["prompt_ids"], [11, 12, -1]),
        spoil(["prompt_ids"], [11, 12, 1.5]),
        spoil(["prompt_ids"], [11, 12, [13]]),
        spoil(["prompt_ids"], "abc"),
        spoil(["prompt_ids"], None),
        spoil(["signature"], "0x" + "11" * 64),
        spoil(["signature"], 5),
        spoil(["voucher"], []),
        spoil(["voucher"], {"payer": 1}),
    ],
)
def test_malformed_bodies(change: Callable[[dict[str, Any]], None]) -> None:
    body = CLIENT.body()
    change(body)
    with pytest.raises(InvalidInput) as caught:
        parse_submission(body)
    assert caught.value.status == 400
    assert len(error_body(caught.value)["error"]["message"]) <= MAX_MESSAGE + 4


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_any_json_is_refused_properly(value: Any) -> None:
    for parse in (parse_submission, lambda v: parse_voucher(v, flat=False), lambda v: parse_voucher(v, flat=True)):
        with pytest.raises(InvalidInput):
            parse(value)


@given(st.sampled_from(["request", "params", "signature", "prompt_ids"]), JSON_VALUES)
def test_any_part_may_be_wrong(part: str, value: Any) -> None:
    body = copy.deepcopy(CLIENT.body(nonce=bytes(32)))
    body[part] = value
    with pytest.raises(InvalidInput):
        parse_submission(body)


def test_malleated_and_random_signatures() -> None:
    body = CLIENT.body()
    raw = bytearray.fromhex(body["signature"][2:])
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    high_s = (order - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big")
    for signature in (
        bytes(raw[:32]) + high_s + bytes([55 - raw[64]]),
        bytes(raw[:64]) + b"\x00",
        bytes(65),
        bytes([raw[0] ^ 1]) + bytes(raw[1:]),
    ):
        with pytest.raises(InvalidSignature):
            check_submission(parse_submission({**body, "signature": "0x" + signature.hex()}), SERVED)


def test_deadline() -> None:
    request = parse_submission(CLIENT.body()).request
    check_deadline(request, request.deadline - 2)
    with pytest.raises(RequestRefused) as caught:
        check_deadline(request, request.deadline - 1)
    assert (caught.value.status, caught.value.code) == (408, "deadline_passed")


CREDIT = Credit(known=1000, new=500, prepaid=5000)


@pytest.mark.parametrize(
    ("account", "code"),
    [
        (Account(0, 0, 0, 409, 0), ""),  # the request costs 3 * 3 + 40 * 10 = 409 at most
        (Account(0, 0, 0, 408, 0), "insufficient_escrow"),
        (Account(0, 0, 1, 409, 0), "insufficient_escrow"),
        (Account(500, 500, 0, 909, 0), ""),
        (Account(500, 500, 0, 908, 0), "insufficient_escrow"),
        (Account(500, 500, 0, 409, 500), ""),  # settled money has left the escrow already
        (Account(1500, 500, 0, 10**6, 0), ""),
        (Account(1501, 500, 0, 10**6, 0), "voucher_due"),
        (Account(1400, 500, 100, 10**6, 0), ""),
        (Account(1400, 500, 101, 10**6, 0), "voucher_due"),  # what runs will be owed, too
        (Account(91, 0, 0, 10**6, 0), ""),
        (Account(92, 0, 0, 10**6, 0), "voucher_due"),
        (Account(0, 0, 92, 10**6, 0), "voucher_due"),
        (Account(0, 409, 500, 10**6, 0), ""),  # prepaid, no history yet
        (Account(0, 409, 501, 10**6, 0), "voucher_due"),
        (Account(MAX_TOTAL - 409, MAX_TOTAL, 0, 2**200, 0), "insufficient_escrow"),
    ],
)
def test_credit(account: Account, code: str) -> None:
    submission = parse_submission(CLIENT.body())
    if not code:
        check_credit(submission, account, CREDIT)
        return
    with pytest.raises(RequestRefused) as caught:
        check_credit(submission, account, CREDIT)
    assert (caught.value.status, caught.value.code) == (402, code)


def test_one_escrow_serves_one_request_at_a_time(tmp_path: Path) -> None:
    """Two requests that the escrow covers singly, but not together."""
    kit = Kit(tmp_path)
    kit.chain.state.escrow[kit.client.address] = 600

    async def both() -> list[Any]:
        kit.engine.gate = asyncio.Semaphore(0)
        jobs = [kit.node.submit(parse_submission(kit.client.body())) for _ in range(2)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        await kit.node.executor.drain(5)
        return results

    results = asyncio.run(both())
    refused = [r for r in results if isinstance(r, RequestRefused)]
    assert len(refused) == 1 and refused[0].code == "insufficient_escrow"


def test_a_fresh_deposit_counts_at_once(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"escrow_cache": 1000.0})
    kit.chain.state.escrow[kit.client.address] = 0
    with pytest.raises(RequestRefused, match="escrow"):
        kit.ask()
    kit.chain.state.escrow[kit.client.address] = 10**6
    assert kit.ask().seq == 0


def test_prepaid_only_for_strangers(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"new_client_credit": 0})
    with pytest.raises(RequestRefused) as caught:
        kit.ask()
    assert caught.value.code == "voucher_due" and caught.value.details is not None
    prepaid = kit.client.voucher(int(caught.value.details["prepaid_voucher"]))
    receipt = kit.ask_body(kit.client.body(voucher=flat(prepaid)))
    # Now it has history: what it prepaid covers the answer, and the next one is on credit.
    assert receipt.payer_cum <= 409
    assert kit.ask().seq == 1


def test_who_owes_must_pay_first(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"credit_limit": 10, "new_client_credit": 10**6})
    first = kit.ask()
    kit.pay(first.payer_cum, first)
    second = kit.ask()
    with pytest.raises(RequestRefused) as caught:
        kit.ask()
    assert caught.value.code == "voucher_due" and caught.value.details is not None
    assert caught.value.details["unpaid_requests"] == ["0x" + second.request_hash.hex()]
    kit.restart()  # what is owed survives
    with pytest.raises(RequestRefused, match="owes"):
        kit.ask()
    kit.pay(second.payer_cum, second)
    assert kit.ask().seq == 2


def test_voucher_rules(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    receipt = kit.ask()
    cases: list[tuple[dict[str, Any], int, str]] = [
        (kit.client.voucher(5, node=key_of("x").address), 400, "wrong_node"),
        (kit.client.voucher(5, payer=key_of("x").address), 401, "invalid_signature"),
        (kit.client.voucher(5, b"z" * 32), 404, "unknown_receipt"),
        (kit.client.voucher(10**9), 400, "voucher_too_large"),
        ({"voucher": {}, "signature": "0x"}, 400, "invalid_request"),
    ]
    for body, status, code in cases:
        with pytest.raises(PoipError) as caught:
            kit.node.accept_voucher(parse_voucher(body, flat=False))
        assert (caught.value.status, caught.value.code) == (status, code)
    assert kit.node.store.paid(kit.client.address) == 0
    assert kit.pay(receipt.payer_cum, receipt)
    assert not kit.pay(receipt.payer_cum, receipt)
    assert not kit.pay(receipt.payer_cum - 1, receipt)
    # A voucher that rides with a request must be of the same payer.
    stranger = Client(kit.node.served, key_of("stranger"))
    with pytest.raises(RequestRefused, match="the request of"):
        kit.ask_body(kit.client.body(voucher=flat(stranger.voucher(1))))


# ------------------------------------------------------------------ stake

DEFAULT_TERMS = LockTerms(audit_rate=100_000, detection_power=800_000, reward_share=300_000, minimum_lock=POIP)


def test_what_a_batch_locks() -> None:
    """fee / (0.1 * 0.8 * 0.7), rounded up, at least the minimum."""
    assert DEFAULT_TERMS.lock(0) == DEFAULT_TERMS.lock(POIP * 56 // 1000) == POIP
    assert DEFAULT_TERMS.lock(POIP * 56 // 1000 + 1) == POIP + 18
    assert DEFAULT_TERMS.lock(57 * POIP) == -(-57 * POIP * 1000 // 56)


@given(st.lists(st.integers(0, 10 * POIP), min_size=1, max_size=20), st.integers(0, 2 * POIP))
def test_no_way_to_batch_locks_more_than_was_reserved(fees: list[int], minimum: int) -> None:
    terms = LockTerms(100_000, 800_000, 300_000, minimum)
    assert sum(map(terms.lock, fees)) <= terms.most(sum(fees), len(fees))
    assert terms.most(fees[0], 1) == terms.lock(fees[0])
    assert terms.most(0, 0) == 0


def refusal_of(kit: Kit, **changes: Any) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        kit.ask(**changes)
    return caught.value


def test_nobody_pays_more_than_the_offer(tmp_path: Path) -> None:
    """Fees lock stake: with a price of his own choice a client could make a batch that the node cannot commit."""
    kit = Kit(tmp_path, {"input_price": INPUT_PRICE - 1})
    kit.chain.state.escrow[kit.client.address] = 10**24
    for changes, param in (
        ({"output_price": OUTPUT_PRICE + 1}, "output_price"),
        ({"input_price": INPUT_PRICE + 1}, "input_price"),
        ({"output_price": 10**20, "max_tokens": 1}, "output_price"),
    ):
        kit.node._credit = Credit(10**30, 10**30, 10**30)
        refusal = refusal_of(kit, **changes)
        assert (refusal.status, refusal.code, refusal.param) == (402, "price_too_high", param)
        assert f"at most {INPUT_PRICE} wei per prompt token and {OUTPUT_PRICE} per" in str(refusal)
    assert kit.ask(input_price=INPUT_PRICE).seq == 0  # the registry's price, though the settings ask less
    # An offer that was raised while the node runs is what clients sign from then on.
    kit.chain._offers[:] = [Offer(Hash32(MODEL_ID), 1, INPUT_PRICE, OUTPUT_PRICE + 5)]
    assert kit.ask(output_price=OUTPUT_PRICE + 5).seq == 1


def test_stake_bounds_what_is_signed(tmp_path: Path) -> None:
    """Whatever is admitted can be committed, in however many batches; then nothing is until a batch is final."""
    kit = Kit(tmp_path, {"batch_count": 2, "batch_age": 10.0})
    kit.chain.state.stake = 3 * POIP + 2
    for _ in range(3):
        kit.ask()
        kit.round(11)  # each in a batch of its own
    assert kit.chain.state.next_seq == 3
    refusal = refusal_of(kit)
    assert (refusal.status, refusal.code, refusal.retry_after) == (503, "stake_busy", 30)
    kit.round(WINDOW)
    assert kit.ask().seq == 3
    kit.ask()
    kit.ask()
    kit.node.jobs.step()  # composes a batch of two, which is sent, but not mined
    assert [b.count for b in kit.node.store.batches(BatchState.COMPOSED)] == [2]
    kit.ask()
    kit.ask()
    # The batch on its way locks 1, the three receipts in none 2; with another request there would be a lock too many.
    assert refusal_of(kit).code == "stake_busy"


def test_high_fees_count_by_what_they_lock(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"input_price": 0, "output_price": POIP})
    kit.chain._offers[:] = [Offer(Hash32(MODEL_ID), 1, 0, POIP)]
    kit.chain.state.escrow[kit.client.address] = 10**24
    most = kit.client.body(max_tokens=40)
    kit.chain.state.stake = TERMS.lock(40 * POIP) - 1
    for attempt in range(2):
        with pytest.raises(RequestRefused) as caught:
            kit.ask_body(most)
        assert caught.value.code == "stake_busy", attempt
    kit.chain.state.stake += 1
    receipt = kit.ask_body(most)
    assert receipt.fee <= 40 * POIP
    kit.chain.demand(0, kit.chain.state.time + 50)
    kit.round()
    assert kit.chain.state.batches[1].lock == TERMS.lock(receipt.fee)


def test_running_requests_hold_stake(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.chain.state.stake = 2 * POIP + 1

    async def three() -> list[Any]:
        kit.engine.gate = asyncio.Semaphore(0)
        bodies = [kit.client.body() for _ in range(3)]
        results = await asyncio.gather(
            *(kit.node.submit(parse_submission(body)) for body in bodies), return_exceptions=True
        )
        await kit.node.executor.drain(5)
        return results

    refused = [r for r in asyncio.run(three()) if isinstance(r, RequestRefused)]
    assert [r.code for r in refused] == ["stake_busy"]


def test_stake_is_believed_for_a_while_but_commits_are_never_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free stake read before a commit, with the batch committed since: it counts as long as the old figure is used."""
    kit = Kit(tmp_path, {"escrow_cache": 1000.0, "batch_count": 1})
    kit.chain.state.stake = 2 * POIP
    kit.ask()
    kit.round()
    asked: list[Backing] = []
    backing = kit.chain.backing

    def counted() -> Backing:
        asked.append(backing())
        return asked[-1]

    monkeypatch.setattr(kit.chain, "backing", counted)
    kit.ask()
    assert not asked
    kit.round()
    asked.clear()  # the commit asked for itself
    assert refusal_of(kit).code == "stake_busy" and asked
