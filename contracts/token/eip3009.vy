# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Transfers by signed authorisation (EIP-3009)
@license AGPL-3.0-only
@notice The owner signs; anyone pays the gas. Nonces are random 32-byte values, so authorisations are independent of
        each other and of `permit`.
@dev This module checks and marks an authorisation; the token moves the money. A contract that takes a deposit must use
     `receiveWithAuthorization`: `transferWithAuthorization` can be sent by anyone, so a contract that counts on being
     called itself would miss the deposit.
"""

from snekmate.tokens import erc20
from snekmate.utils import ecdsa

uses: erc20

event AuthorizationUsed:
    authorizer: indexed(address)
    nonce: indexed(bytes32)


event AuthorizationCanceled:
    authorizer: indexed(address)
    nonce: indexed(bytes32)


TRANSFER_WITH_AUTHORIZATION_TYPEHASH: public(constant(bytes32)) = keccak256(
    "TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
RECEIVE_WITH_AUTHORIZATION_TYPEHASH: public(constant(bytes32)) = keccak256(
    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
CANCEL_AUTHORIZATION_TYPEHASH: public(constant(bytes32)) = keccak256(
    "CancelAuthorization(address authorizer,bytes32 nonce)"
)

_used: HashMap[address, HashMap[bytes32, bool]]


@deploy
def __init__():
    pass


@external
@view
def authorizationState(authorizer: address, nonce: bytes32) -> bool:
    """
    @notice Whether `authorizer` has used or cancelled `nonce`.
    """
    return self._used[authorizer][nonce]


@external
def cancelAuthorization(authorizer: address, nonce: bytes32, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Make an unused authorisation worthless, by its owner's signature.
    """
    assert not self._used[authorizer][nonce], "eip3009: authorization used or canceled"
    struct_hash: bytes32 = keccak256(abi_encode(CANCEL_AUTHORIZATION_TYPEHASH, authorizer, nonce))
    self._check_signer(authorizer, struct_hash, v, r, s)
    self._used[authorizer][nonce] = True
    log AuthorizationCanceled(authorizer=authorizer, nonce=nonce)


@internal
def _use(
    type_hash: bytes32,
    owner: address,
    to: address,
    amount: uint256,
    valid_after: uint256,
    valid_before: uint256,
    nonce: bytes32,
    v: uint8,
    r: bytes32,
    s: bytes32,
):
    """
    @dev Marks the authorisation used, or reverts if it is not good now.
    """
    assert block.timestamp > valid_after, "eip3009: authorization not yet valid"
    assert block.timestamp < valid_before, "eip3009: authorization expired"
    assert not self._used[owner][nonce], "eip3009: authorization used or canceled"
    struct_hash: bytes32 = keccak256(abi_encode(type_hash, owner, to, amount, valid_after, valid_before, nonce))
    self._check_signer(owner, struct_hash, v, r, s)
    self._used[owner][nonce] = True
    log AuthorizationUsed(authorizer=owner, nonce=nonce)


@internal
@view
def _check_signer(authorizer: address, struct_hash: bytes32, v: uint8, r: bytes32, s: bytes32):
    digest: bytes32 = erc20.eip712_domain_separator._hash_typed_data_v4(struct_hash)
    signer: address = ecdsa._recover_vrs(digest, convert(v, uint256), convert(r, uint256), convert(s, uint256))
    assert signer == authorizer, "eip3009: invalid signature"
