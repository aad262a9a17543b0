"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from poip_chain.errors import InsufficientFunds, InvalidInput, NotFound, PoipError, Unavailable

MAX_MESSAGE = 1000
RETRY_AFTER_SECONDS = 2


class ApiError(PoipError):
    """An error with everything that its body and status need."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


def bad_request(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """A 400."""
    return ApiError(400, code, message, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """A 400 for a parameter that this network cannot honour; it is never silently ignored."""
    return ApiError(400, "unsupported_parameter", message, param=param)


def error_body(error: PoipError) -> dict[str, Any]:
    """The JSON body for an error."""
    status = status_of(error)
    text = str(error)
    if status == 500:
        # Inner faults are for the operator's log: their texts may name files, keys or other people's data.
        text = "the gateway has an internal problem."
    return {
        "error": {
            "message": text[:MAX_MESSAGE],
            "type": _type(status),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def status_of(error: PoipError) -> int:
    """The HTTP status for an error: what the client did wrong is 4xx, what nodes or chain did is 5xx."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, InvalidInput):
        return 400
    if isinstance(error, InsufficientFunds):
        return 402
    if isinstance(error, NotFound):
        return 404
    return 503 if isinstance(error, Unavailable) else 500


def error_response(error: PoipError) -> JSONResponse:
    """The whole response."""
    status = status_of(error)
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else {}
    return JSONResponse(error_body(error), status, headers)


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 402:
        return "insufficient_quota"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
