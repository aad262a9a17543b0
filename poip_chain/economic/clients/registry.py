"""Nodes, their keys, stake and offers. A node is named by the address of its first node key."""

from __future__ import annotations

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.types import NodeInfo, Offer, Unbonding
from poip_chain.errors import NotFound
from poip_chain.spec.types import ZERO_ADDRESS, Address, Hash32


class Registry(ContractClient):
    """NodeRegistry."""

    NAME = "NodeRegistry"

    def node_count(self) -> int:
        """How many nodes were ever registered."""
        return int(self.read("node_count"))

    def nodes(self) -> list[Address]:
        """All nodes, oldest first."""
        return [Address(str(self.read("node_at", index))) for index in range(self.node_count())]

    def info(self, node: Address) -> NodeInfo:
        """A node. Raises NotFound if it was never registered."""
        values = self.read("node_info", node)
        if str(values[0]) == ZERO_ADDRESS:
            raise NotFound(f"there is no node {node}.", hint="`poip node list` shows the registered ones.")
        addresses = [Address(str(value)) for value in values[:4]]
        return NodeInfo(
            addresses[0], addresses[1], addresses[2], addresses[3], str(values[4]), *(int(v) for v in values[5:])
        )

    def node_of_key(self, key: Address) -> Address | None:
        """The node that a node key belongs or belonged to."""
        node = str(self.read("node_of_key", key))
        return None if node == ZERO_ADDRESS else Address(node)

    def signing_key(self, node: Address, seq: int) -> Address:
        """The key whose signature counts for the node's receipt `seq`."""
        return Address(str(self.read("signing_key", node, seq)))

    def committer(self, node: Address) -> Address:
        """The key that may commit the node's next batch."""
        return Address(str(self.read("committer", node)))

    def is_active(self, node: Address) -> bool:
        """Whether the node may take new work: registered, not jailed, staked enough."""
        return bool(self.read("is_active", node))

    def free_stake(self, node: Address) -> int:
        """Stake that stands behind nothing."""
        return int(self.read("free_stake", node))

    def offers(self, node: Address) -> list[Offer]:
        """What the node offers."""
        return [Offer(Hash32(bytes(o[0])), int(o[1]), int(o[2]), int(o[3])) for o in self.read("offers", node)]

    def unbondings(self, node: Address) -> list[Unbonding]:
        """Stake on its way out, in order of time."""
        return [Unbonding(int(u[0]), int(u[1]), int(u[2])) for u in self.read("unbondings", node)]

    def total_staked(self) -> int:
        """All stake, unbonding included."""
        return int(self.read("total_staked"))

    def rewards(self, account: Address) -> int:
        """What an account may claim for convictions."""
        return int(self.read("rewards", account))

    def register(
        self,
        node_key: Address,
        payout: Address,
        peer_key: Address,
        endpoint: str,
        deadline: int,
        node_signature: bytes,
        peer_signature: bytes,
    ) -> Call:
        """By the operator; the signatures are ProofOfPossession by the node key and the peer key."""
        return self.call("register", node_key, payout, peer_key, endpoint, deadline, node_signature, peer_signature)

    def set_endpoint(self, node: Address, endpoint: str) -> Call:
        """By the operator."""
        return self.call("set_endpoint", node, endpoint)

    def set_payout(self, node: Address, payout: Address) -> Call:
        """By the operator."""
        return self.call("set_payout", node, payout)

    def rotate_node_key(self, node: Address, new_key: Address, next_seq: int, deadline: int, signature: bytes) -> Call:
        """By the operator: receipts from `next_seq` on are signed by the new key, after the rotation delay."""
        return self.call("rotate_node_key", node, new_key, next_seq, deadline, signature)

    def stake(self, node: Address, amount: int) -> Call:
        """Add stake; the sender must have approved the registry."""
        return self.call("stake", node, amount)

    def stake_with_permit(self, node: Address, amount: int, deadline: int, v: int, r: bytes, s: bytes) -> Call:
        """Add stake with the sender's permit for the registry, in one transaction."""
        return self.call("stake_with_permit", node, amount, deadline, v, r, s)

    def unbond(self, node: Address, amount: int) -> Call:
        """Start to take free stake out; by the operator."""
        return self.call("unbond", node, amount)

    def cancel_unbond(self, node: Address, unbonding_id: int) -> Call:
        """Make unbonding stake active again; by the operator."""
        return self.call("cancel_unbond", node, unbonding_id)

    def withdraw(self, node: Address, maximum_count: int = 32) -> Call:
        """Pay out what has finished unbonding."""
        return self.call("withdraw", node, maximum_count)

    def deregister(self, node: Address) -> Call:
        """Leave for good; by the operator."""
        return self.call("deregister", node)

    def unjail(self, node: Address) -> Call:
        """After the jail period; by the operator."""
        return self.call("unjail", node)

    def set_offer(self, node: Address, offer: Offer) -> Call:
        """By the operator or the node key."""
        return self.call(
            "set_offer", node, offer.model_id, offer.profile_version, offer.input_price, offer.output_price
        )

    def remove_offer(self, node: Address, model_id: bytes) -> Call:
        """By the operator or the node key."""
        return self.call("remove_offer", node, model_id)

    def claim_reward(self) -> Call:
        """Pay the sender its rewards."""
        return self.call("claim_reward")
