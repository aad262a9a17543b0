"""Dispatch of JSON-RPC requests: envelopes, batches, errors. Knows no method and no transport."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from poip_chain.chain.devnet.errors import (
    InvalidParams,
    InvalidRequest,
    LimitExceeded,
    MethodNotFound,
    ParseError,
    RpcError,
)
from poip_chain.errors import InvalidInput, PoipError
from poip_chain.spec.strict_json import parse_json

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 5 * 1024 * 1024
MAX_BATCH = 1_000
MAX_BATCH_RESPONSE_BYTES = 64 * 1024 * 1024

_METHOD_MARK = "_is_json_rpc_method"
Function = TypeVar("Function", bound=Callable[..., Any])


def method(function: Function) -> Function:
    """Mark a function as a JSON-RPC method: its name is the method's, its parameters are the method's."""
    setattr(function, _METHOD_MARK, True)
    return function


class Dispatcher:
    """Answers requests with the marked methods of some objects. Safe for several threads if they are."""

    def __init__(self, *groups: object) -> None:
        self._methods: dict[str, tuple[Callable[..., Any], inspect.Signature]] = {}
        for group in groups:
            for name, function in inspect.getmembers(group, inspect.ismethod):
                if getattr(function, _METHOD_MARK, False):
                    self._methods[name] = (function, inspect.signature(function))

    @property
    def names(self) -> frozenset[str]:
        """Every method that is answered."""
        return frozenset(self._methods)

    def answer_text(self, text: str | bytes) -> str:
        """The response to one request or a batch, as JSON; empty if only notifications came."""
        try:
            request = parse(text)
        except ParseError as error:
            return encode(error_response(None, error))
        return self.answer(request)

    def answer(self, request: object) -> str:
        """The response to a parsed request or batch, as JSON; empty if only notifications came."""
        if not isinstance(request, list):
            response = self._answer_one(request)
            return "" if response is None else encode(response)
        if not request:
            return encode(error_response(None, InvalidRequest("the batch is empty")))
        if len(request) > MAX_BATCH:
            return encode(
                error_response(None, LimitExceeded(f"{len(request)} requests in a batch; at most {MAX_BATCH}"))
            )
        answers: list[str] = []
        size = 0
        for item in request:
            if size > MAX_BATCH_RESPONSE_BYTES:
                error = LimitExceeded("the answer to the batch is too large; ask for less at once")
                response = error_response(_identifier(item), error)
            else:
                response = self._answer_one(item)
            if response is not None:
                answers.append(encode(response))
                size += len(answers[-1])
        return f"[{','.join(answers)}]" if answers else ""

    def _answer_one(self, request: object) -> dict[str, Any] | None:
        identifier = _identifier(request)
        try:
            result = self._call(request)
        except RpcError as error:
            response = error_response(identifier, error)
        except PoipError as error:
            response = error_response(identifier, RpcError(str(error)))
        except Exception as error:
            log.exception("a request failed")
            response = error_response(identifier, RpcError(f"internal error: {type(error).__name__}"))
        else:
            response = {"jsonrpc": "2.0", "id": identifier, "result": result}
        is_notification = isinstance(request, dict) and "id" not in request and "method" in request
        return None if is_notification else response

    def _call(self, request: object) -> Any:
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            raise InvalidRequest("a request is an object with a method")
        found = self._methods.get(request["method"])
        if found is None:
            raise MethodNotFound(f"the method {request['method'][:100]} does not exist")
        function, signature = found
        parameters = request.get("params")
        if parameters is None:
            parameters = []
        if not isinstance(parameters, list):
            raise InvalidParams("params must be an array")
        try:
            signature.bind(*parameters)
        except TypeError as error:
            raise InvalidParams(f"{request['method']}: {error}") from None
        return function(*parameters)


def parse(text: str | bytes) -> Any:
    """JSON from outside. Raises ParseError if it is none, or nested deeper than any request is."""
    try:
        return parse_json(text)
    except InvalidInput as error:
        raise ParseError(f"the request cannot be read: {error}") from None


def encode(value: object) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def error_response(identifier: object, error: RpcError) -> dict[str, Any]:
    """A JSON-RPC error response."""
    return {"jsonrpc": "2.0", "id": identifier, "error": error.as_object()}


def _identifier(request: object) -> object:
    identifier = request.get("id") if isinstance(request, dict) else None
    return identifier if isinstance(identifier, (str, int, float)) else None
