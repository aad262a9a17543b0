"""Reading of requests and parameters: whatever comes is answered, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.chain.devnet import params
from poip_chain.chain.devnet.errors import ExecutionReverted, InvalidParams, ParseError
from poip_chain.chain.devnet.filters import IDLE_SECONDS, Filter, FilterRegistry
from poip_chain.chain.devnet.params import LogCriteria, log_criteria
from poip_chain.chain.devnet.rpc import Dispatcher, method, parse
from poip_chain.errors import PoipError
from poip_chain.spec.strict_json import MAX_DEPTH

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


class Methods:
    @method
    def test_add(self, left: int, right: int = 1) -> int:
        return left + right

    @method
    def test_revert(self) -> None:
        raise ExecutionReverted("execution reverted", data="0x01")

    @method
    def test_crash(self) -> None:
        raise RuntimeError("secret detail")

    def hidden(self) -> int:
        return 1


DISPATCHER = Dispatcher(Methods())


def ask(**request: Any) -> dict[str, Any]:
    return dict(json.loads(DISPATCHER.answer({"jsonrpc": "2.0", "id": 1, **request})))


def test_results_and_errors() -> None:
    assert ask(method="test_add", params=[1]) == {"jsonrpc": "2.0", "id": 1, "result": 2}
    assert ask(method="test_revert")["error"] == {"code": 3, "message": "execution reverted", "data": "0x01"}
    assert ask(method="hidden")["error"]["code"] == -32601
    assert ask(method="test_add", params=[])["error"]["code"] == -32602
    assert ask(method="test_add", params=[1, 2, 3])["error"]["code"] == -32602
    assert ask(method="test_crash")["error"] == {"code": -32603, "message": "internal error: RuntimeError"}
    assert DISPATCHER.answer({"method": "test_add", "params": [1]}) == ""
    assert DISPATCHER.names == {"test_add", "test_revert", "test_crash"}


@given(_JSON)
def test_any_json_gets_a_json_answer(request: Any) -> None:
    answer = DISPATCHER.answer(request)
    assert answer == "" or json.loads(answer)


@given(st.binary(max_size=60))
def test_any_bytes_get_an_answer(body: bytes) -> None:
    assert json.loads(DISPATCHER.answer_text(body) or "0") is not None


@pytest.mark.parametrize("opening,closing", [("[", "]"), ('{"a":', "}"), ('["[[]]",', "]")])
def test_deep_nesting_is_counted_before_it_is_parsed(opening: str, closing: str) -> None:
    for depth in (MAX_DEPTH + 1, 200_000):
        with pytest.raises(ParseError, match="nested deeper"):
            parse(opening * depth)
    assert parse(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)
    brackets = json.dumps(["[{" * 1000, '\\"[' * 1000])
    assert parse(brackets) == json.loads(brackets)


@given(_JSON)
def test_parsers_refuse_by_name_or_accept(value: Any) -> None:
    for parser in (params.quantity, params.data, params.address, params.block_reference, params.call_request):
        try:
            parser(value, "it")
        except InvalidParams as error:
            assert "it" in error.message
    for reader in (params.state_overrides, lambda item: log_criteria(params.mapping(item, "filter"))):
        try:
            reader(value)
        except InvalidParams as error:
            assert isinstance(error, PoipError)


@pytest.mark.parametrize("value,number", [("0x0", 0), ("0x0a", 10), ("0xFF", 255), (7, 7), (7.0, 7)])
def test_quantities(value: object, number: int) -> None:
    assert params.quantity(value, "n") == number


@pytest.mark.parametrize("value", ["", "0x", "7", "0xg", -1, 1.5, True, None, [], "0x" + "f" * 65, float("inf")])
def test_what_is_no_quantity(value: object) -> None:
    with pytest.raises(InvalidParams, match=r"^n must be"):
        params.quantity(value, "n")


def test_block_references() -> None:
    block_hash = "0x" + "ab" * 32
    assert params.block_reference(None) == "latest"
    assert params.block_reference("finalized") == "finalized"
    assert params.block_reference("0x10") == params.block_reference({"blockNumber": "0x10"}) == 16
    assert params.block_reference(block_hash) == params.block_reference({"blockHash": block_hash}) == b"\xab" * 32
    for bad in ({}, {"blockHash": block_hash, "blockNumber": "0x1"}, {"blockHash": "0x1"}, "newest"):
        with pytest.raises(InvalidParams):
            params.block_reference(bad)


def test_call_requests_do_not_contradict_themselves() -> None:
    assert params.call_request({"input": "0x01", "data": "0x01"}).data == b"\x01"
    for bad in ({"input": "0x01", "data": "0x02"}, {"gasPrice": "0x1", "maxFeePerGas": "0x1"}, {"to": "0x12"}):
        with pytest.raises(InvalidParams):
            params.call_request(bad)


def test_log_criteria_match_as_the_specification_says() -> None:
    anything = LogCriteria(frozenset(), ())
    assert anything.match(b"a" * 20, [])
    second = LogCriteria(frozenset(), (None, frozenset({5, 6})))
    assert second.match(b"a" * 20, [1, 5, 9])
    assert not second.match(b"a" * 20, [1, 7])
    assert not second.match(b"a" * 20, [1])
    one = log_criteria({"address": "0x" + "61" * 20})
    assert one.match(b"a" * 20, [1])
    assert not one.match(b"b" * 20, [1])
    assert not second.may_be_in(0)
    assert anything.may_be_in(0)


def test_filters_that_nobody_polls_disappear() -> None:
    now = [0.0]
    registry = FilterRegistry(lambda: now[0])
    kept, lost = registry.add(Filter("blocks")), registry.add(Filter("blocks"))
    now[0] = IDLE_SECONDS - 1
    registry.get(kept)
    now[0] = IDLE_SECONDS + 1
    registry.add(Filter("blocks"))
    assert registry.remove(kept) is True
    assert registry.remove(lost) is False
    assert registry.remove([]) is False
