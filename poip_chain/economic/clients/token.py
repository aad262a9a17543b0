"""The network's token (ERC-20, permit, EIP-3009). Amounts in wei."""

from __future__ import annotations

from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.chain.keys import Key
from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.spec.types import Address

_PERMIT_TYPE = b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"


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

    def permit(self, key: Key, spender: Address, amount: int, deadline: int) -> tuple[int, bytes, bytes]:
        """The owner's ERC-2612 signature (v, r, s) that lets `spender` take `amount` until `deadline` (Unix seconds)."""
        nonce = int(self.read("nonces", key.address))
        struct = encode(
            ["bytes32", "address", "address", "uint256", "uint256", "uint256"],
            [keccak(_PERMIT_TYPE), key.address, spender, amount, nonce, deadline],
        )
        digest = keccak(b"\x19\x01" + bytes(self.read("DOMAIN_SEPARATOR")) + keccak(struct))
        signature = key.private_key.sign_msg_hash(digest)
        return 27 + signature.v, signature.r.to_bytes(32, "big"), signature.s.to_bytes(32, "big")

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
