"""What the devnet answers when it refuses a request, with the codes of EIP-1474. Knows no transport."""

from __future__ import annotations

from poip_chain.errors import PoipError


class RpcError(PoipError):
    """A JSON-RPC error object: `code`, the message, and `data` (0x hex) where a contract returned some."""

    rpc_code = -32603

    def __init__(self, message: str, *, data: str | None = None) -> None:
        super().__init__(message)
        self.data = data

    def as_object(self) -> dict[str, object]:
        """The `error` member of a JSON-RPC response."""
        answer: dict[str, object] = {"code": self.rpc_code, "message": self.message}
        if self.data is not None:
            answer["data"] = self.data
        return answer


class ParseError(RpcError):
    """The body is no JSON."""

    rpc_code = -32700


class InvalidRequest(RpcError):
    """JSON, but no JSON-RPC request."""

    rpc_code = -32600


class MethodNotFound(RpcError):
    """No such method."""

    rpc_code = -32601


class InvalidParams(RpcError):
    """A parameter is missing, too many, malformed or out of range."""

    rpc_code = -32602


class InvalidInput(RpcError):
    """Well-formed parameters that make no sense in the chain's present state."""

    rpc_code = -32000


class ResourceNotFound(RpcError):
    """A block, transaction or filter does not exist."""

    rpc_code = -32001


class TransactionRejected(RpcError):
    """A transaction that cannot be taken into the pool."""

    rpc_code = -32003


class Unsupported(RpcError):
    """The method exists, but not what was asked of it."""

    rpc_code = -32004


class LimitExceeded(RpcError):
    """The request or its answer is too large."""

    rpc_code = -32005


class ExecutionReverted(RpcError):
    """A call reverted; `data` is what the contract returned."""

    rpc_code = 3
