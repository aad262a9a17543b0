"""The protocol's numbers as they stand on a chain."""

from __future__ import annotations

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.locks import LockTerms
from poip_chain.economic.parameters import parameter_key
from poip_chain.economic.types import ParameterInfo
from poip_chain.errors import NotFound, TransactionFailed


class Parameters(ContractClient):
    """Parameters. Names are ASCII, as in docs/contracts.md."""

    NAME = "Parameters"

    def value(self, name: str) -> int:
        """The current value. Raises NotFound for an unknown name."""
        try:
            return int(self.read("value", parameter_key(name)))
        except TransactionFailed as error:
            raise NotFound(f"there is no parameter {name!r}.", hint="`poip params list` shows all.") from error

    def value_at(self, name: str, revision: int) -> int:
        """The value in an earlier revision, as a batch pins it."""
        return int(self.read("value_at", parameter_key(name), revision))

    def lock_terms(self) -> LockTerms:
        """What decides how much stake a batch locks that is signed now. For a challenge_window after a number was made
        harder, the log still locks by the easier one: that is for receipts signed before."""
        terms = [int(value) for value in self.read("batch_terms")]
        _, audit_rate, detection_power, reward_share, _, minimum_lock = terms[:6]
        return LockTerms(audit_rate, detection_power, reward_share, minimum_lock)

    def revision(self) -> int:
        """How many changes there were."""
        return int(self.read("revision"))

    def names(self) -> list[str]:
        """All names."""
        return [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in self.read("names")]

    def describe(self, name: str) -> ParameterInfo:
        """A parameter with its bounds. Raises NotFound for an unknown name."""
        try:
            value, minimum, maximum, unit = self.read("describe", parameter_key(name))
        except TransactionFailed as error:
            raise NotFound(f"there is no parameter {name!r}.", hint="`poip params list` shows all.") from error
        return ParameterInfo(name, int(value), int(minimum), int(maximum), str(unit))

    def all(self) -> list[ParameterInfo]:
        """Every parameter with its bounds."""
        return [self.describe(name) for name in self.names()]

    def set_value(self, name: str, value: int) -> Call:
        """By the owner only, within the bounds."""
        return self.call("set_value", parameter_key(name), value)
