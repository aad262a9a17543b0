"""Reading what a node sends: server-sent events and error bodies, bounded and validated.

Pure parsing over byte streams. Raises InvalidInput for anything malformed; what that means is the client's decision.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from poip_chain.errors import InvalidInput
from poip_chain.spec.strict_json import parse_json_object

MAX_EVENT_BYTES = 4 * 2**20
"""The node API's bound for one body or event: a receipt with the transcript of a long answer fits well."""
MAX_MESSAGE = 300
"""Texts of a node are cut to this many characters before they go into an error or a log."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event. A heartbeat comment is an event of the name "" without data."""

    name: str
    data: str

    def json(self) -> dict[str, Any]:
        """The data as a JSON object. Raises InvalidInput."""
        return parse_json_object(self.data)


async def server_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[ServerEvent]:
    """Split a byte stream into events (WHATWG HTML, section 9.2; the fields `event` and `data`).

    Raises InvalidInput if an event grows over MAX_EVENT_BYTES or is not UTF-8.
    """
    buffer = bytearray()
    name, size = "message", 0
    data: list[str] = []
    async for chunk in chunks:
        buffer += chunk
        lines = bytes(buffer).split(b"\n")
        buffer = bytearray(lines.pop())
        if len(buffer) > MAX_EVENT_BYTES:
            raise InvalidInput(f"an event is longer than {MAX_EVENT_BYTES} bytes.")
        for raw in lines:
            try:
                line = raw.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise InvalidInput("an event is not UTF-8.") from error
            size += len(line)
            if size > MAX_EVENT_BYTES:
                raise InvalidInput(f"an event is longer than {MAX_EVENT_BYTES} bytes.")
            if not line:
                if data:
                    yield ServerEvent(name, "\n".join(data))
                name, data, size = "message", [], 0
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not field:
                size = 0 if not data else size
                yield ServerEvent("", "")
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)


def error_body(raw: bytes) -> tuple[str, str]:
    """(code, message) of an OpenAI-style error body; neutral texts if it is anything else."""
    try:
        error = parse_json_object(raw).get("error")
    except InvalidInput:
        error = None
    if not isinstance(error, dict):
        return "unknown", raw[:MAX_MESSAGE].decode(errors="replace")
    code, message = error.get("code"), error.get("message")
    return (
        code[:64] if isinstance(code, str) else "unknown",
        message[:MAX_MESSAGE] if isinstance(message, str) else "no message",
    )
