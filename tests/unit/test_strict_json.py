"""JSON from strangers: what is taken, what is refused, and that depth cannot end the process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poip_chain.errors import InvalidInput
from poip_chain.spec.strict_json import MAX_DEPTH, parse_json, parse_json_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_json_writes_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")) == value


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"b":'])
def test_depth_is_refused_even_with_a_raised_recursion_limit(opening: str) -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        with pytest.raises(InvalidInput, match="nested deeper"):
            parse_json(opening * 300_000)
    finally:
        sys.setrecursionlimit(before)


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[" * 1000 + '\\"' + "{"
    assert parse_json(json.dumps([text, text])) == [text, text]


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(st.lists(values | st.text('[]{}"\\\\,:ab')), st.booleans())
def test_depth_is_what_the_parser_meets(found: list[Any], ascii_only: bool) -> None:
    """Strings full of brackets, quotes and backslashes do not confuse the count, in either direction."""
    depth = depth_of(found)
    text = json.dumps([found] * (MAX_DEPTH + 1), ensure_ascii=ascii_only)
    for levels in range(MAX_DEPTH - depth - 1):
        text = f"[{text}]" if levels % 2 else f'{{"[\\\\": {text}}}'
    assert parse_json(text.encode(errors="surrogatepass")) is not None
    with pytest.raises(InvalidInput, match="nested deeper"):
        parse_json(f"[{text}]".encode(errors="surrogatepass"))


def test_the_greatest_depth_is_read() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(InvalidInput):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 2}', b"\xff\xfe\xfd", b'"\xc3"', "9" * 5000, '["\\']
)
def test_refused(text: bytes | str) -> None:
    with pytest.raises(InvalidInput):
        parse_json(text)


def test_an_object_is_an_object() -> None:
    assert parse_json_object(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(InvalidInput, match="list"):
        parse_json_object("[]")
