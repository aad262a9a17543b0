# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title POIP, the network's token
@license AGPL-3.0-only
@notice ERC-20 with 18 decimals, EIP-2612 permit, EIP-3009 authorisations and ERC-5805 votes. Stake, escrow, bonds, fees
        and votes are amounts of it. Its supply never exceeds `max_supply`.
@custom:security Every function that moves a balance stands in this file and moves votes too; none of snekmate's own is
                 exported. The token calls no other contract. A contract that takes deposits by signature must use
                 `receiveWithAuthorization`, whose caller is the payee.
@custom:kill None. The owner can only name minters, who are bound by `max_supply`; nothing stops or seizes a balance.
"""

from ethereum.ercs import IERC20
from ethereum.ercs import IERC20Detailed
from ..interfaces import IPoipToken
from snekmate.auth import ownable
from snekmate.auth import ownable_2step
from snekmate.tokens import erc20
from . import eip3009
from . import votes

implements: IERC20
implements: IERC20Detailed
implements: IPoipToken

initializes: ownable
initializes: ownable_2step[ownable := ownable]
initializes: erc20[ownable := ownable]
initializes: votes[erc20 := erc20]
initializes: eip3009[erc20 := erc20]

exports: (
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
    erc20.name,
    erc20.symbol,
    erc20.decimals,
    erc20.totalSupply,
    erc20.balanceOf,
    erc20.allowance,
    erc20.approve,
    erc20.permit,
    erc20.nonces,
    erc20.DOMAIN_SEPARATOR,
    erc20.eip712Domain,
    erc20.is_minter,
    votes.delegates,
    votes.delegate,
    votes.delegateBySig,
    votes.clock,
    votes.CLOCK_MODE,
    votes.getVotes,
    votes.getPastVotes,
    votes.getPastTotalSupply,
    votes.numCheckpoints,
    votes.checkpoint,
    eip3009.TRANSFER_WITH_AUTHORIZATION_TYPEHASH,
    eip3009.RECEIVE_WITH_AUTHORIZATION_TYPEHASH,
    eip3009.CANCEL_AUTHORIZATION_TYPEHASH,
    eip3009.authorizationState,
    eip3009.cancelAuthorization,
)

# Stake and votes are packed into words that hold any amount below 2**96 (7.9 * 10**28 wei).
_SUPPLY_LIMIT: constant(uint256) = 2**96 - 1

max_supply: public(immutable(uint256))


@deploy
def __init__(holder: address, initial_supply: uint256, maximum_supply: uint256):
    """
    @notice Mint `initial_supply` to `holder`; the deployer becomes owner and names the minters.
    @param maximum_supply In wei, below 2**96; the supply never exceeds it.
    """
    assert 0 < maximum_supply and maximum_supply <= _SUPPLY_LIMIT, "token: max supply out of range"
    max_supply = maximum_supply
    ownable.__init__()
    ownable_2step.__init__()
    erc20.__init__("Proof of Inference", "POIP", 18, "Proof of Inference", "1")
    votes.__init__()
    eip3009.__init__()
    # snekmate makes the deployer a minter. Here every minter is named by `set_minter`, so that owning and minting are
    # different rights and a hand-over of one does not carry the other along.
    erc20.is_minter[msg.sender] = False
    log erc20.RoleMinterChanged(minter=msg.sender, status=False)
    if initial_supply > 0:
        self._mint(holder, initial_supply)


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
def set_minter(minter: address, allowed: bool):
    """
    @notice Allow or forbid `minter` to mint. Owner only.
    """
    ownable._check_owner()
    assert minter != empty(address), "token: minter is zero"
    erc20.is_minter[minter] = allowed
    log erc20.RoleMinterChanged(minter=minter, status=allowed)


@external
def mint(owner: address, amount: uint256):
    """
    @notice Create `amount` wei for `owner`. Minters only; the supply stays within `max_supply`.
    """
    assert erc20.is_minter[msg.sender], "token: not a minter"
    self._mint(owner, amount)


@external
def burn(amount: uint256):
    """
    @notice Destroy `amount` wei of the caller's.
    """
    self._burn(msg.sender, amount)


@external
def burn_from(owner: address, amount: uint256):
    """
    @notice Destroy `amount` wei of `owner`'s out of the caller's allowance.
    """
    erc20._spend_allowance(owner, msg.sender, amount)
    self._burn(owner, amount)


@external
def transfer(to: address, amount: uint256) -> bool:
    """
    @notice Move `amount` wei of the caller's to `to`.
    """
    self._transfer(msg.sender, to, amount)
    return True


@external
def transferFrom(owner: address, to: address, amount: uint256) -> bool:
    """
    @notice Move `amount` wei of `owner`'s to `to` out of the caller's allowance.
    """
    erc20._spend_allowance(owner, msg.sender, amount)
    self._transfer(owner, to, amount)
    return True


@external
def transferWithAuthorization(
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
    @notice Move `amount` wei from `owner` to `to` by `owner`'s signature; anyone may send it.
    @param valid_after The signature is good in seconds later than this one.
    @param valid_before The signature is good in seconds earlier than this one.
    @param nonce A random value that `owner` has not used.
    """
    eip3009._use(
        eip3009.TRANSFER_WITH_AUTHORIZATION_TYPEHASH, owner, to, amount, valid_after, valid_before, nonce, v, r, s
    )
    self._transfer(owner, to, amount)


@external
def receiveWithAuthorization(
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
    @notice Like `transferWithAuthorization`, but only `to` may send it, so that nobody can run ahead of a deposit.
    """
    assert msg.sender == to, "eip3009: caller must be the payee"
    eip3009._use(
        eip3009.RECEIVE_WITH_AUTHORIZATION_TYPEHASH, owner, to, amount, valid_after, valid_before, nonce, v, r, s
    )
    self._transfer(owner, to, amount)


@internal
def _transfer(owner: address, to: address, amount: uint256):
    erc20._transfer(owner, to, amount)
    votes._move_votes(owner, to, amount)


@internal
def _mint(owner: address, amount: uint256):
    erc20._mint(owner, amount)
    assert erc20.totalSupply <= max_supply, "token: max supply exceeded"
    votes._record_supply()
    votes._move_votes(empty(address), owner, amount)


@internal
def _burn(owner: address, amount: uint256):
    erc20._burn(owner, amount)
    votes._record_supply()
    votes._move_votes(owner, empty(address), amount)
