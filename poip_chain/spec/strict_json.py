"""JSON from strangers.

Python's own parser follows nesting with the C stack and stops at the interpreter's recursion limit. Importing web3
raises that limit to 100,000 (py-evm does it), and then a few hundred kilobytes of "[" end the whole process. So the
depth is measured first. Numbers that JSON does not have (NaN, Infinity) and repeated names are refused as well: two
readers would disagree about them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from poip_chain.errors import InvalidInput

MAX_DEPTH = 64
"""Far deeper than any object of the protocol or of the OpenAI API."""
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_QUOTE = ord('"')
_STRINGS = re.compile(rb'"[^"]*"')
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))


def parse_json(text: bytes | str) -> Any:
    """The JSON value of `text`. Raises InvalidInput for anything but strict JSON of at most MAX_DEPTH levels."""
    try:
        raw = text.encode() if isinstance(text, str) else bytes(text)
        _check_depth(raw)
        return json.loads(raw, parse_constant=_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError included
        raise InvalidInput(f"this is not valid JSON: {str(error)[:200]}.") from error


def parse_json_object(text: bytes | str) -> dict[str, Any]:
    """`parse_json` where an object must stand. Raises InvalidInput."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise InvalidInput(f"a JSON object belongs here, not a {type(value).__name__}.")
    return value


def _check_depth(raw: bytes) -> None:
    """Counts what stands outside of strings. Exact up to the first byte that no JSON has there, where the parser stops
    as well. Without escapes a quote is a boundary wherever it stands, so dropping all else first keeps that; dropping
    pairs of neighbouring quotes (most strings, by then) does too, and leaves little to search."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    if b"\\" in raw:
        raw = _ESCAPED.sub(b"", raw)
    depth = 0
    for bracket in _STRINGS.sub(b"", raw.translate(None, _NOT_STRUCTURE).replace(b'""', b"")):
        if bracket == _QUOTE:
            return  # a string without an end: the parser will say so
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a field twice")
    return value
