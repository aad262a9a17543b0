"""What every contract client has: reads with our errors, and calls for the outbox. Signs and sends nothing."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, cast

from eth_typing import HexStr
from web3.contract import Contract
from web3.types import BlockIdentifier

from poip_chain.chain.rpc import Call, Chain
from poip_chain.spec.types import Address


class ContractClient:
    """One of our contracts on a chain. Views raise TransactionFailed for a revert and Unavailable without a chain."""

    NAME: ClassVar[str]

    def __init__(self, chain: Chain, address: Address) -> None:
        self.chain = chain
        self.address = address

    @cached_property
    def contract(self) -> Contract:
        """The web3 contract, for events and for what no method here covers."""
        return self.chain.contract(self.NAME, self.address)

    def read(self, function: str, *arguments: Any, block: BlockIdentifier | None = None) -> Any:
        """The result of a view as web3 decodes it (structs as tuples)."""
        return self.chain.read(self.contract.functions[function](*arguments), block=block)

    def call(self, function: str, *arguments: Any) -> Call:
        """A call for the outbox."""
        data = cast(HexStr, self.contract.encode_abi(function, list(arguments)))
        return Call(self.address, bytes.fromhex(data[2:]), f"{self.NAME}.{function}")

    def event(self, name: str) -> tuple[Contract, str]:
        """A source for `Follower`."""
        return self.contract, name

    def version(self) -> str:
        """The version that the contract states."""
        return str(self.read("version"))

    def owner(self) -> Address:
        """Who administers the contract."""
        return Address(str(self.read("owner")))
