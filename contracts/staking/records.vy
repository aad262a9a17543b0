# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Who runs a node, who is paid, and where it is reached
@license AGPL-3.0-only
@dev The part of NodeRegistry that no lock and no slash reads.
"""

from . import keys

uses: keys

struct Record:
    operator: address
    payout: address
    peer_key: address
    registered_at: uint64
    deregistered_at: uint64
    fixed_slash_ppm: uint32


event NodeRegistered:
    node: indexed(address)
    operator: indexed(address)
    payout: address
    peer_key: address
    endpoint: String[256]
    fixed_slash_ppm: uint32


event EndpointChanged:
    node: indexed(address)
    old_endpoint: String[256]
    new_endpoint: String[256]


event PayoutChanged:
    node: indexed(address)
    old_payout: address
    new_payout: address


event OperatorTransferStarted:
    node: indexed(address)
    operator: indexed(address)
    new_operator: indexed(address)


event OperatorTransferred:
    node: indexed(address)
    old_operator: indexed(address)
    new_operator: indexed(address)


pending_operator: public(HashMap[address, address])
_records: HashMap[address, Record]
_endpoints: HashMap[address, String[256]]
_nodes: HashMap[uint256, address]
_node_count: uint256


@deploy
def __init__():
    pass


@external
def set_endpoint(node: address, endpoint: String[256]):
    """
    @notice Change where clients reach the node. Operator only.
    """
    self._check_operator(node)
    log EndpointChanged(node=node, old_endpoint=self._endpoints[node], new_endpoint=endpoint)
    self._endpoints[node] = endpoint


@external
def set_payout(node: address, payout: address):
    """
    @notice Change who receives the node's earnings and withdrawn stake. Operator only.
    """
    self._check_operator(node)
    self._check_payout(payout)
    log PayoutChanged(node=node, old_payout=self._records[node].payout, new_payout=payout)
    self._records[node].payout = payout


@external
def transfer_operator(node: address, new_operator: address):
    """
    @notice Offer the node to a new operator, who must accept; zero withdraws the offer. Operator only.
    """
    self._check_operator(node)
    self.pending_operator[node] = new_operator
    log OperatorTransferStarted(node=node, operator=msg.sender, new_operator=new_operator)


@external
def accept_operator(node: address):
    """
    @notice Become the operator of a node that was offered to the caller.
    """
    assert self.pending_operator[node] == msg.sender, "registry: not the next operator"
    keys._check_unbound(msg.sender)
    log OperatorTransferred(node=node, old_operator=self._records[node].operator, new_operator=msg.sender)
    self.pending_operator[node] = empty(address)
    self._records[node].operator = msg.sender


@external
@view
def node_count() -> uint256:
    """
    @notice How many nodes were ever registered.
    """
    return self._node_count


@external
@view
def node_at(index: uint256) -> address:
    """
    @notice The `index`-th node, in order of registration.
    """
    assert index < self._node_count, "registry: no such index"
    return self._nodes[index]


@external
@view
def operator_of(node: address) -> address:
    """
    @notice The node's operator, or zero for an unknown node.
    """
    return self._records[node].operator


@external
@view
def payout_of(node: address) -> address:
    """
    @notice Who receives the node's earnings and withdrawn stake, or zero for an unknown node.
    """
    return self._records[node].payout


@internal
@view
def _check_operator(node: address):
    assert msg.sender == self._records[node].operator, "registry: not the operator"


@internal
@view
def _check_payout(payout: address):
    assert payout != empty(address) and payout != self, "registry: payout out of range"


@internal
def _add(
    node: address, operator: address, payout: address, peer_key: address, endpoint: String[256], fixed_slash_ppm: uint32
):
    self._check_payout(payout)
    self._records[node] = Record(
        operator=operator,
        payout=payout,
        peer_key=peer_key,
        registered_at=convert(block.timestamp, uint64),
        deregistered_at=0,
        fixed_slash_ppm=fixed_slash_ppm,
    )
    self._endpoints[node] = endpoint
    self._nodes[self._node_count] = node
    self._node_count += 1
    log NodeRegistered(
        node=node,
        operator=operator,
        payout=payout,
        peer_key=peer_key,
        endpoint=endpoint,
        fixed_slash_ppm=fixed_slash_ppm,
    )
