"""Escrow, vouchers and earnings. Amounts in wei of the token."""

from __future__ import annotations

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.types import Escrow, ReceiptInBatch
from poip_chain.spec.objects import Batch, Voucher
from poip_chain.spec.types import Address


class Vault(ContractClient):
    """PaymentVault."""

    NAME = "PaymentVault"

    def escrow(self, payer: Address, node: Address) -> Escrow:
        """A payer's money with a node."""
        return Escrow(*(int(value) for value in self.read("escrow", payer, node)))

    def available(self, payer: Address, node: Address) -> int:
        """What of it is not thawing."""
        return int(self.read("available", payer, node))

    def settled(self, payer: Address, node: Address) -> int:
        """How far of the payer's running total with the node is paid."""
        return int(self.read("settled", payer, node))

    def bucket(self, batch_id: int, payer: Address) -> int:
        """What was collected for a batch and waits for its outcome."""
        return int(self.read("bucket", batch_id, payer))

    def collected(self, batch_id: int) -> int:
        """What was collected for a batch from all payers; at most its total_fee."""
        return int(self.read("collected", batch_id))

    def earned(self, node: Address) -> int:
        """What the node may withdraw."""
        return int(self.read("earned", node))

    def total_held(self) -> int:
        """All that the vault owes to anyone."""
        return int(self.read("total_held"))

    def treasury_due(self) -> int:
        """Protocol fees that wait for the treasury."""
        return int(self.read("treasury_due"))

    def treasury(self) -> Address:
        """Who gets the protocol fee."""
        return Address(str(self.read("treasury")))

    def deposit(self, payer: Address, node: Address, amount: int) -> Call:
        """Add to a payer's escrow; the sender must have approved the vault."""
        return self.call("deposit", payer, node, amount)

    def deposit_with_permit(self, node: Address, amount: int, deadline: int, v: int, r: bytes, s: bytes) -> Call:
        """Add to the sender's own escrow with its permit for the vault, in one transaction."""
        return self.call("deposit_with_permit", node, amount, deadline, v, r, s)

    def thaw(self, node: Address, amount: int) -> Call:
        """Start to take escrow out; by the payer."""
        return self.call("thaw", node, amount)

    def cancel_thaw(self, node: Address) -> Call:
        """By the payer."""
        return self.call("cancel_thaw", node)

    def withdraw(self, node: Address) -> Call:
        """Pay the payer what has thawed."""
        return self.call("withdraw", node)

    def collect(
        self, voucher: Voucher, signature: bytes, batch: Batch, first: ReceiptInBatch, last: ReceiptInBatch
    ) -> Call:
        """Move what a voucher promises for a batch into its bucket; by the node's operator or key, in order."""
        return self.call("collect", voucher.values(), signature, batch.values(), first.values(), last.values())

    def settle(self, batch: Batch, payer: Address) -> Call:
        """Pay a final batch's bucket to the node, or a convicted one's back to the payer."""
        return self.call("settle", batch.values(), payer)

    def withdraw_earnings(self, node: Address) -> Call:
        """To the node's payout address; by anyone."""
        return self.call("withdraw_earnings", node)

    def withdraw_treasury(self) -> Call:
        """To the treasury; by anyone."""
        return self.call("withdraw_treasury")
