"""The network's token (ERC-20, permit, EIP-3009). Amounts in wei."""

from __future__ import annotations

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.spec.types import Address


class Token(ContractClient):
    """PoipToken."""

    NAME = "PoipToken"

    def balance(self, owner: Address) -> int:
        """What an account holds."""
        return int(self.read("balanceOf", owner))

    def allowance(self, owner: Address, spender: Address) -> int:
        """What `spender` may still take from `owner`."""
        return int(self.read("allowance", owner, spender))

    def total_supply(self) -> int:
        """All tokens in existence."""
        return int(self.read("totalSupply"))

    def transfer(self, receiver: Address, amount: int) -> Call:
        """Send tokens."""
        return self.call("transfer", receiver, amount)

    def approve(self, spender: Address, amount: int) -> Call:
        """Let a contract take up to `amount`."""
        return self.call("approve", spender, amount)

    def mint(self, receiver: Address, amount: int) -> Call:
        """New tokens, by a minter only."""
        return self.call("mint", receiver, amount)

    def set_minter(self, minter: Address, allowed: bool) -> Call:
        """By the owner only."""
        return self.call("set_minter", minter, allowed)
