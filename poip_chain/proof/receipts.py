"""Whether a receipt that somebody hands in is a registered node's own."""

from __future__ import annotations

from poip_chain.economic.network import Network
from poip_chain.errors import InvalidSignature, NotFound, TransactionFailed
from poip_chain.spec.objects import Receipt


def check_receipt(network: Network, receipt: Receipt, signature: bytes) -> None:
    """Raises InvalidSignature unless the node's key for the receipt's seq signed it, NotFound for an unknown node."""
    try:
        signer = network.registry.signing_key(receipt.node, receipt.seq)
    except TransactionFailed as error:
        raise NotFound(f"{receipt.node} is not a registered node.") from error
    recovered = receipt.recover(network.domain("log"), signature)
    if recovered != signer:
        raise InvalidSignature(
            f"the receipt is signed by {recovered}, not by {signer}, the key of node {receipt.node}."
        )
