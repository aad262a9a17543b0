"""Every exception that this library raises on purpose.

    PoipError
    +-- InvalidInput          a value from outside breaks a rule of the protocol or a bound (HTTP 400)
    |   +-- InvalidSignature  a signature is malformed, or not by the key that should have signed (401)
    |   +-- UnsupportedModel  a model directory or architecture that cannot be served (400)
    +-- NotFound              something named does not exist (404)
    +-- Refused               understood, but not allowed in the present state (402, 403, 409)
    |   +-- InsufficientFunds  escrow, stake, balance or bond does not cover the action (402)
    +-- Unavailable           a remote part (RPC, engine, node, gateway) does not answer; trying again may help (503)
    +-- TransactionFailed     a transaction reverted or cannot succeed
    +-- ConfigurationError    settings, files or keys are missing or wrong
    +-- IntegrityError        data on disk or from a peer contradicts itself: never continue over it

Each message says what was wrong, which value it was, and what to do next. The command line prints it without a
traceback; HTTP servers map the classes to the status codes above.
"""

from __future__ import annotations


class PoipError(Exception):
    """Base of all deliberate errors. `hint` is one sentence on what to do next."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InvalidInput(PoipError):
    """A value from outside breaks a rule of the protocol or a bound."""

    status = 400
    code = "invalid_request"


class InvalidSignature(InvalidInput):
    """A signature is malformed, or was not made by the key that should have signed."""

    status = 401
    code = "invalid_signature"


class UnsupportedModel(InvalidInput):
    """A model directory or architecture that cannot be served."""

    code = "unsupported_model"


class NotFound(PoipError):
    """Something that was named does not exist."""

    status = 404
    code = "not_found"


class Refused(PoipError):
    """Understood, but not allowed in the present state."""

    status = 409
    code = "refused"


class InsufficientFunds(Refused):
    """Escrow, stake, balance or bond does not cover the action."""

    status = 402
    code = "insufficient_funds"


class Unavailable(PoipError):
    """A remote part does not answer; trying again may help."""

    status = 503
    code = "unavailable"


class TransactionFailed(PoipError):
    """A transaction reverted, or its simulation shows that it would."""

    status = 502
    code = "transaction_failed"


class ConfigurationError(PoipError):
    """Settings, files or keys are missing or wrong."""

    code = "configuration_error"


class IntegrityError(PoipError):
    """Data on disk or from a peer contradicts itself: never continue over it."""

    code = "integrity_error"
