"""What a node refuses before it runs anything, each with its status and code."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from poip_chain.service.node.refusals import MAX_MESSAGE, RequestRefused, error_body
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.objects import SamplingParams
from poip_chain.spec.types import ZERO_ADDRESS
from tests.engines.model_chain import CHAIN_ID, LOG, VAULT
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


@settings(deadline=None)
@given(JSON_VALUES)
def test_any_json_is_refused_properly(value: Any) -> None:
    for parse in (parse_submission, lambda v: parse_voucher(v, flat=False), lambda v: parse_voucher(v, flat=True)):
        with pytest.raises(InvalidInput):
            parse(value)


@settings(deadline=None)
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
