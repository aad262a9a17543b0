# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Which key belongs to which node, and from which receipt on
@license AGPL-3.0-only
@dev A node key signs receipts and sends batches; a peer key is the node's identity in the peer-to-peer network. Each key
     address is bound once, ever, and proves by a signature that its owner agrees. A node's name is its first node key.

     A rotation names the first seq that the new key signs, and takes effect after a delay, in which the old key signs
     on: whoever holds a receipt by the old key above that seq has this time to use it as evidence.
"""

from snekmate.utils import ecdsa
from snekmate.utils import eip712_domain_separator

uses: eip712_domain_separator

event NodeKeyRotated:
    node: indexed(address)
    old_key: indexed(address)
    new_key: indexed(address)
    next_seq: uint64
    active_at: uint64


ROLE_NODE: constant(uint256) = 1
ROLE_PEER: constant(uint256) = 2
# Rotations are never forgotten: each key stays accountable for its receipts. A node that used them up registers anew.
MAX_ROTATIONS: constant(uint256) = 64
PROOF_TYPE_HASH: constant(bytes32) = keccak256(
    "ProofOfPossession(address operator,address key,uint8 role,uint64 deadline)"
)

# A binding's word: the node in bits 0..159, the role in bits 160..167, and in the word of a node's first key the number
# of its rotations in bits 168..199. A batch by a node that never rotated needs this one word.
ROLE_SHIFT: constant(uint256) = 160
ROTATIONS_SHIFT: constant(uint256) = 168
ADDRESS_MASK: constant(uint256) = 2**160 - 1
ROLE_MASK: constant(uint256) = 2**8 - 1

# A rotation's word: the key in bits 0..159, its first seq in bits 160..215, when it takes effect in bits 216..255.
SEQ_SHIFT: constant(uint256) = 160
SEQ_MASK: constant(uint256) = 2**56 - 1
TIME_SHIFT: constant(uint256) = 216

_bindings: HashMap[address, uint256]
# Numbered from 1; number 0 is the first key.
_rotations: HashMap[address, HashMap[uint256, uint256]]


@deploy
def __init__():
    pass


@external
@view
def node_of_key(key: address) -> address:
    """
    @notice The node that the node key `key` belongs to or belonged to, or zero.
    """
    return self._node_of_key(key)


@external
@view
def signing_key(node: address, seq: uint64) -> address:
    """
    @notice The key whose signature counts for receipt `seq` of `node`; zero for an unknown node.
    """
    return self._signing_key(node, convert(seq, uint256))


@internal
@view
def _node_of_key(key: address) -> address:
    word: uint256 = self._bindings[key]
    if (word >> ROLE_SHIFT) & ROLE_MASK != ROLE_NODE:
        return empty(address)
    return self._key(word)


@internal
@view
def _check_unbound(key: address):
    assert self._bindings[key] == 0, "keys: key already bound"


@internal
@pure
def _key(word: uint256) -> address:
    return convert(word & ADDRESS_MASK, address)


@internal
@view
def _signing_key(node: address, seq: uint256) -> address:
    binding: uint256 = self._bindings[node]
    if binding & (ADDRESS_MASK | (ROLE_MASK << ROLE_SHIFT)) != convert(node, uint256) | (ROLE_NODE << ROLE_SHIFT):
        return empty(address)
    count: uint256 = binding >> ROTATIONS_SHIFT
    for back: uint256 in range(MAX_ROTATIONS):
        if back == count:
            return node
        word: uint256 = self._rotations[node][count - back]
        if word >> TIME_SHIFT <= block.timestamp and (word >> SEQ_SHIFT) & SEQ_MASK <= seq:
            return self._key(word)
    return node


@internal
def _bind(node: address, key: address, role: uint256, operator: address, deadline: uint256, signature: Bytes[65]):
    """
    @dev Binds `key` to `node` by the key's own signature over the operator, its role and a deadline.
    """
    assert block.timestamp <= deadline, "keys: proof expired"
    assert key != operator, "keys: operator must differ"
    self._check_unbound(key)
    digest: bytes32 = eip712_domain_separator._hash_typed_data_v4(
        keccak256(abi_encode(PROOF_TYPE_HASH, operator, key, role, deadline))
    )
    assert ecdsa._recover_sig(digest, signature) == key, "keys: invalid proof"
    self._bindings[key] = (role << ROLE_SHIFT) | convert(node, uint256)


@internal
def _rotate(node: address, new_key: address, next_seq: uint256, active_at: uint256):
    """
    @dev Records a rotation to a key that is bound already. One at a time waits to take effect.
    """
    assert next_seq <= SEQ_MASK, "keys: next_seq too large"
    count: uint256 = self._bindings[node] >> ROTATIONS_SHIFT
    assert count < MAX_ROTATIONS, "keys: no rotations left"
    old_key: address = node
    if count > 0:
        last: uint256 = self._rotations[node][count]
        old_key = self._key(last)
        assert last >> TIME_SHIFT <= block.timestamp, "keys: a rotation is pending"
        assert (last >> SEQ_SHIFT) & SEQ_MASK <= next_seq, "keys: next_seq below last"
    self._bindings[node] += 1 << ROTATIONS_SHIFT
    self._rotations[node][count + 1] = (
        (active_at << TIME_SHIFT) | (next_seq << SEQ_SHIFT) | convert(new_key, uint256)
    )
    log NodeKeyRotated(
        node=node,
        old_key=old_key,
        new_key=new_key,
        next_seq=convert(next_seq, uint64),
        active_at=convert(active_at, uint64),
    )
