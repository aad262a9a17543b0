"""How the node says no: one exception for every refusal that a client may see, and its JSON form.

The codes are part of the HTTP API (docs/architecture.md).
"""

from __future__ import annotations

from typing import Any

from poip_chain.errors import PoipError

MAX_MESSAGE = 600
"""Messages quote what the client sent; a hostile body must not come back in full."""


class RequestRefused(PoipError):
    """A request that is not served. `param` names the field at fault; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str = "",
        param: str | None = None,
        retry_after: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.details = details


def error_body(error: PoipError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, with `details` where there are some."""
    text = str(error)
    body: dict[str, Any] = {
        "message": text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + " ...",
        "type": error_type(error.status),
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    if details := getattr(error, "details", None):
        body["details"] = details
    return {"error": body}


def error_type(status: int) -> str:
    """OpenAI's name for a class of errors."""
    if status == 401:
        return "authentication_error"
    if status == 402:
        return "insufficient_quota"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
