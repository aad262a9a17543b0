# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title What nodes offer to serve, and for how much
@license AGPL-3.0-only
@dev Offers are advertisements: the price that binds is the one in the client's signed request.
"""

from ..interfaces import INodeRegistry

event OfferSet:
    node: indexed(address)
    model_id: indexed(bytes32)
    profile_version: uint32
    input_price: uint128
    output_price: uint128


event OfferRemoved:
    node: indexed(address)
    model_id: indexed(bytes32)


MAX_OFFERS: constant(uint256) = 16

_offers: HashMap[address, DynArray[INodeRegistry.Offer, MAX_OFFERS]]


@deploy
def __init__():
    pass


@external
@view
def offers(node: address) -> DynArray[INodeRegistry.Offer, MAX_OFFERS]:
    """
    @notice What `node` offers, one entry a model; prices in wei per token.
    """
    return self._offers[node]


@internal
def _set(node: address, offer: INodeRegistry.Offer):
    count: uint256 = len(self._offers[node])
    position: uint256 = self._position(node, offer.model_id, count)
    if position < count:
        self._offers[node][position] = offer
    else:
        assert count < MAX_OFFERS, "offers: too many offers"
        self._offers[node].append(offer)
    log OfferSet(
        node=node,
        model_id=offer.model_id,
        profile_version=offer.profile_version,
        input_price=offer.input_price,
        output_price=offer.output_price,
    )


@internal
def _remove(node: address, model_id: bytes32):
    count: uint256 = len(self._offers[node])
    position: uint256 = self._position(node, model_id, count)
    assert position < count, "offers: no such offer"
    last: INodeRegistry.Offer = self._offers[node].pop()
    if position < count - 1:
        self._offers[node][position] = last
    log OfferRemoved(node=node, model_id=model_id)


@internal
def _remove_all(node: address):
    for offer: INodeRegistry.Offer in self._offers[node]:
        log OfferRemoved(node=node, model_id=offer.model_id)
    self._offers[node] = []


@internal
@view
def _position(node: address, model_id: bytes32, count: uint256) -> uint256:
    """
    @dev Where the offer for `model_id` stands, or `count` if there is none.
    """
    for i: uint256 in range(count, bound=MAX_OFFERS):
        if self._offers[node][i].model_id == model_id:
            return i
    return count
