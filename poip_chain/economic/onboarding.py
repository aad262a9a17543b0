"""The transactions that make an operator's machine a node: register with three keys, stake, offer a model."""

from __future__ import annotations

from poip_chain.chain.keys import Key
from poip_chain.chain.rpc import Call
from poip_chain.economic.network import Network
from poip_chain.spec.objects import ProofOfPossession
from poip_chain.spec.types import Address

SIGNATURE_LIFETIME = 3600
"""Seconds of chain time in which a proof of possession can be used."""


def proof_of_possession(network: Network, operator: Address, key: Key, role: int, deadline: int) -> bytes:
    """The signature by which `key` lets `operator` bind it as its node key or peer key."""
    statement = ProofOfPossession(operator=operator, key=key.address, role=role, deadline=deadline)
    return statement.sign(network.domain("registry"), key.private_key)


def register_call(
    network: Network, operator: Address, node_key: Key, peer_key: Key, payout: Address, endpoint: str
) -> Call:
    """The operator's transaction that registers the node named by `node_key`'s address."""
    deadline = network.chain.timestamp() + SIGNATURE_LIFETIME
    return network.registry.register(
        node_key.address,
        payout,
        peer_key.address,
        endpoint,
        deadline,
        proof_of_possession(network, operator, node_key, ProofOfPossession.NODE_KEY, deadline),
        proof_of_possession(network, operator, peer_key, ProofOfPossession.PEER_KEY, deadline),
    )


def stake_call(network: Network, staker: Key, node: Address, amount: int) -> Call:
    """Add stake to a node with the staker's permit: one transaction, no approval left over."""
    deadline = network.chain.timestamp() + SIGNATURE_LIFETIME
    v, r, s = network.token.permit(staker, network.registry.address, amount, deadline)
    return network.registry.stake_with_permit(node, amount, deadline, v, r, s)
