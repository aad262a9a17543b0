"""PoipToken: transfers, permits, authorisations, votes, minting, and that no path moves balances without votes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import boa
import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak

from poip_chain.spec.types import ZERO_ADDRESS, Address
from tests.contracts import system
from tests.contracts.system import Account, account, now, refuses, vrs

ALICE, BOB, CAROL = account("alice"), account("bob"), account("carol")
OWNER = system.OWNER


@dataclass(frozen=True)
class Typed:
    """EIP-712 structs of the token's domain, whose name differs from the protocol's."""

    NAMES: ClassVar[dict[str, str]] = {
        "Permit": "address owner,address spender,uint256 value,uint256 nonce,uint256 deadline",
        "Delegation": "address delegatee,uint256 nonce,uint256 expiry",
        "CancelAuthorization": "address authorizer,bytes32 nonce",
        **{
            f"{verb}WithAuthorization": "address from,address to,uint256 value,uint256 validAfter,"
            "uint256 validBefore,bytes32 nonce"
            for verb in ("Transfer", "Receive")
        },
    }

    @classmethod
    def sign(cls, token: Any, signer: Account, name: str, *values: Any) -> tuple[int, bytes, bytes]:
        """(v, r, s) over the named struct."""
        fields = cls.NAMES[name]
        types = [field.split(" ")[0] for field in fields.split(",")]
        struct = keccak(keccak(f"{name}({fields})".encode()) + encode(types, list(values)))
        signature = signer.key.sign_msg_hash(keccak(b"\x19\x01" + separator(token) + struct)).to_bytes()
        return vrs(signature[:64] + bytes([27 + signature[64]]))


def separator(token: Any) -> bytes:
    """The domain separator built from EIP-5267's answer, independent of the contract's own."""
    fields, name, version, chain_id, verifier, salt, extensions = token.eip712Domain()
    assert (fields, salt, extensions) == (b"\x0f", bytes(32), [])
    type_hash = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
    hashes = [type_hash, keccak(name.encode()), keccak(version.encode())]
    return keccak(encode(["bytes32"] * 3 + ["uint256", "address"], [*hashes, chain_id, verifier]))


def give(token: Any, to: Address, amount: int) -> None:
    token.transfer(to, amount, sender=OWNER.address)


def test_metadata_and_supply(token: Any) -> None:
    assert (token.name(), token.symbol(), token.decimals()) == ("Proof of Inference", "POIP", 18)
    assert token.totalSupply() == token.balanceOf(OWNER.address) == system.INITIAL_SUPPLY
    assert token.max_supply() == system.MAXIMUM_SUPPLY
    assert token.DOMAIN_SEPARATOR() == separator(token)
    assert token.version() == "0.1.0"


def test_constructor_bounds() -> None:
    path = system.CONTRACTS / "token/PoipToken.vy"
    for supply, maximum in ((0, 0), (0, 2**96), (11, 10)):
        with boa.reverts():
            system.load(path, OWNER.address, supply, maximum)
    assert system.load(path, OWNER.address, 0, 2**96 - 1).totalSupply() == 0


def test_transfer_and_allowance(token: Any) -> None:
    give(token, ALICE.address, 100)
    token.approve(BOB.address, 60, sender=ALICE.address)
    with boa.reverts("erc20: insufficient allowance"):
        token.transferFrom(ALICE.address, CAROL.address, 61, sender=BOB.address)
    token.transferFrom(ALICE.address, CAROL.address, 50, sender=BOB.address)
    assert token.allowance(ALICE.address, BOB.address) == 10
    assert (token.balanceOf(ALICE.address), token.balanceOf(CAROL.address)) == (50, 50)
    with boa.reverts("erc20: transfer amount exceeds balance"):
        token.transfer(BOB.address, 51, sender=ALICE.address)
    with boa.reverts("erc20: transfer to the zero address"):
        token.transfer(ZERO_ADDRESS, 1, sender=ALICE.address)


def test_permit_once(token: Any) -> None:
    give(token, ALICE.address, 100)
    deadline = now() + 60
    v, r, s = Typed.sign(token, ALICE, "Permit", ALICE.address, BOB.address, 70, 0, deadline)
    with boa.reverts("erc20: invalid signature"):
        token.permit(ALICE.address, BOB.address, 71, deadline, v, r, s)
    token.permit(ALICE.address, BOB.address, 70, deadline, v, r, s)
    assert token.allowance(ALICE.address, BOB.address) == 70
    with boa.reverts("erc20: invalid signature"):
        token.permit(ALICE.address, BOB.address, 70, deadline, v, r, s)
    v, r, s = Typed.sign(token, ALICE, "Permit", ALICE.address, BOB.address, 1, 1, deadline)
    boa.env.time_travel(seconds=61)
    with boa.reverts("erc20: expired deadline"):
        token.permit(ALICE.address, BOB.address, 1, deadline, v, r, s)


@pytest.mark.parametrize("verb", ["Transfer", "Receive"])
def test_authorization(token: Any, verb: str) -> None:
    give(token, ALICE.address, 100)
    send = token.transferWithAuthorization if verb == "Transfer" else token.receiveWithAuthorization
    start, end, nonce = now(), now() + 100, keccak(b"nonce")
    values = (ALICE.address, BOB.address, 40, start, end, nonce)
    signature = Typed.sign(token, ALICE, f"{verb}WithAuthorization", *values)
    sender = BOB.address if verb == "Receive" else CAROL.address
    with boa.reverts("eip3009: authorization not yet valid"):
        send(*values, *signature, sender=sender)
    boa.env.time_travel(seconds=1)
    changed: list[tuple[Any, ...]] = [
        (CAROL.address, *values[1:]),
        (*values[:2], 41, *values[3:]),
        (*values[:3], start - 1, end, nonce),
        (*values[:4], end + 1, nonce),
        (*values[:5], keccak(b"other")),
    ]
    for tampered in changed:
        with boa.reverts("eip3009: invalid signature"):
            send(*tampered, *signature, sender=sender)
    # The other kind of authorisation is another struct.
    other = token.receiveWithAuthorization if verb == "Transfer" else token.transferWithAuthorization
    with boa.reverts("eip3009: invalid signature"):
        other(*values, *signature, sender=BOB.address)
    send(*values, *signature, sender=sender)
    assert (token.balanceOf(BOB.address), token.authorizationState(ALICE.address, nonce)) == (40, True)
    with boa.reverts("eip3009: authorization used or canceled"):
        send(*values, *signature, sender=sender)
    late = (*values[:5], keccak(b"late"))
    signature = Typed.sign(token, ALICE, f"{verb}WithAuthorization", *late)
    boa.env.time_travel(seconds=99)
    with boa.reverts("eip3009: authorization expired"):
        send(*late, *signature, sender=sender)


def test_authorization_with_high_s_is_refused(token: Any) -> None:
    give(token, ALICE.address, 100)
    values = (ALICE.address, BOB.address, 40, 0, now() + 100, keccak(b"nonce"))
    v, r, s = Typed.sign(token, ALICE, "TransferWithAuthorization", *values)
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    twin = (order - int.from_bytes(s, "big")).to_bytes(32, "big")
    with boa.reverts("ecdsa: invalid signature `s` value"):
        token.transferWithAuthorization(*values, 55 - v, r, twin)


def test_cancel_authorization(token: Any) -> None:
    give(token, ALICE.address, 100)
    nonce = keccak(b"nonce")
    values = (ALICE.address, BOB.address, 40, 0, now() + 100, nonce)
    signature = Typed.sign(token, ALICE, "TransferWithAuthorization", *values)
    with boa.reverts("eip3009: invalid signature"):
        token.cancelAuthorization(
            ALICE.address, nonce, *Typed.sign(token, BOB, "CancelAuthorization", ALICE.address, nonce)
        )
    cancel = Typed.sign(token, ALICE, "CancelAuthorization", ALICE.address, nonce)
    token.cancelAuthorization(ALICE.address, nonce, *cancel, sender=CAROL.address)
    refuses(
        "eip3009: authorization used or canceled",
        lambda: token.transferWithAuthorization(*values, *signature),
        lambda: token.cancelAuthorization(ALICE.address, nonce, *cancel),
    )


def test_minting_stays_below_the_maximum(token: Any) -> None:
    with boa.reverts("token: not a minter"):
        token.mint(ALICE.address, 1, sender=OWNER.address)
    with boa.reverts("ownable: caller is not the owner"):
        token.set_minter(ALICE.address, True, sender=ALICE.address)
    with boa.reverts("token: minter is zero"):
        token.set_minter(ZERO_ADDRESS, True, sender=OWNER.address)
    token.set_minter(ALICE.address, True, sender=OWNER.address)
    room = system.MAXIMUM_SUPPLY - system.INITIAL_SUPPLY
    with boa.reverts("token: max supply exceeded"):
        token.mint(BOB.address, room + 1, sender=ALICE.address)
    token.mint(BOB.address, room, sender=ALICE.address)
    token.burn(5, sender=BOB.address)
    token.mint(BOB.address, 5, sender=ALICE.address)
    assert token.totalSupply() == system.MAXIMUM_SUPPLY
    token.set_minter(ALICE.address, False, sender=OWNER.address)
    token.burn(5, sender=BOB.address)
    with boa.reverts("token: not a minter"):
        token.mint(BOB.address, 5, sender=ALICE.address)


def test_ownership_takes_two_steps_and_no_minter_with_it(token: Any) -> None:
    token.transfer_ownership(ALICE.address, sender=OWNER.address)
    assert (token.owner(), token.pending_owner()) == (OWNER.address, ALICE.address)
    with boa.reverts("ownable_2step: caller is not the new owner"):
        token.accept_ownership(sender=BOB.address)
    token.accept_ownership(sender=ALICE.address)
    assert token.owner() == ALICE.address
    assert not token.is_minter(ALICE.address)
    assert not token.is_minter(OWNER.address)


def test_votes_follow_every_balance_path(token: Any) -> None:
    """Each function of the ABI that moves a balance is exercised with both sides delegating to themselves."""
    token.set_minter(OWNER.address, True, sender=OWNER.address)
    for who in (ALICE, BOB):
        token.delegate(who.address, sender=who.address)
    end = now() + 10**6
    transfer = (ALICE.address, BOB.address, 7, 0, end, keccak(b"1"))
    receive = (ALICE.address, BOB.address, 8, 0, end, keccak(b"2"))
    token.approve(CAROL.address, 100, sender=ALICE.address)
    moves: dict[str, Callable[[], Any]] = {
        "mint": lambda: token.mint(ALICE.address, 100, sender=OWNER.address),
        "transfer": lambda: token.transfer(BOB.address, 5, sender=ALICE.address),
        "transferFrom": lambda: token.transferFrom(ALICE.address, BOB.address, 6, sender=CAROL.address),
        "transferWithAuthorization": lambda: token.transferWithAuthorization(
            *transfer, *Typed.sign(token, ALICE, "TransferWithAuthorization", *transfer)
        ),
        "receiveWithAuthorization": lambda: token.receiveWithAuthorization(
            *receive, *Typed.sign(token, ALICE, "ReceiveWithAuthorization", *receive), sender=BOB.address
        ),
        "burn": lambda: token.burn(3, sender=BOB.address),
        "burn_from": lambda: token.burn_from(ALICE.address, 2, sender=CAROL.address),
    }
    for name, move in moves.items():
        before = token.balanceOf(ALICE.address), token.balanceOf(BOB.address)
        move()
        after = token.balanceOf(ALICE.address), token.balanceOf(BOB.address)
        assert after != before, name
        assert after == (token.getVotes(ALICE.address), token.getVotes(BOB.address)), name
    # Whatever else writes is known not to move a balance: a new function must be looked at here.
    writing = {f["name"] for f in token.abi if f["type"] == "function" and f["stateMutability"] == "nonpayable"}
    assert writing - set(moves) == {
        "approve", "permit", "delegate", "delegateBySig", "cancelAuthorization", "set_minter",
        "transfer_ownership", "accept_ownership",
    }  # fmt: skip


def test_delegation_moves_all_and_zero_ends_it(token: Any) -> None:
    give(token, ALICE.address, 100)
    give(token, BOB.address, 50)
    token.delegate(CAROL.address, sender=ALICE.address)
    token.delegate(CAROL.address, sender=BOB.address)
    assert token.getVotes(CAROL.address) == 150
    # Between two that share a delegate nothing changes.
    token.transfer(BOB.address, 30, sender=ALICE.address)
    assert (token.getVotes(CAROL.address), token.numCheckpoints(CAROL.address)) == (150, 1)
    token.delegate(ZERO_ADDRESS, sender=ALICE.address)
    assert (token.getVotes(CAROL.address), token.getVotes(ALICE.address)) == (80, 0)
    token.transfer(ALICE.address, 80, sender=BOB.address)
    assert token.getVotes(CAROL.address) == 0


def test_delegation_by_signature(token: Any) -> None:
    give(token, ALICE.address, 100)
    expiry = now() + 60
    signature = Typed.sign(token, ALICE, "Delegation", BOB.address, 0, expiry)
    token.delegateBySig(BOB.address, 0, expiry, *signature, sender=CAROL.address)
    assert (token.delegates(ALICE.address), token.getVotes(BOB.address)) == (BOB.address, 100)
    assert token.nonces(ALICE.address) == 1
    with boa.reverts("votes: invalid nonce"):
        token.delegateBySig(BOB.address, 0, expiry, *signature)
    late = Typed.sign(token, ALICE, "Delegation", CAROL.address, 1, expiry)
    boa.env.time_travel(seconds=61)
    with boa.reverts("votes: signature expired"):
        token.delegateBySig(CAROL.address, 1, expiry, *late)


def test_past_votes_and_clock(token: Any) -> None:
    assert (token.CLOCK_MODE(), token.clock()) == ("mode=timestamp", now())
    token.delegate(ALICE.address, sender=ALICE.address)
    history: list[tuple[int, int]] = []
    for step in range(1, 10):
        give(token, ALICE.address, step)
        give(token, ALICE.address, step)
        history.append((now(), step * (step + 1)))
        boa.env.time_travel(seconds=10)
    assert token.numCheckpoints(ALICE.address) == 9
    assert token.checkpoint(ALICE.address, 8) == history[8]
    for time, votes in history:
        assert token.getPastVotes(ALICE.address, time) == votes
        assert token.getPastVotes(ALICE.address, time + 9) == votes
    assert token.getPastVotes(ALICE.address, history[0][0] - 1) == 0
    refuses(
        "votes: timepoint not past",
        lambda: token.getPastVotes(ALICE.address, now()),
        lambda: token.getPastTotalSupply(now()),
    )
    with boa.reverts("votes: no such checkpoint"):
        token.checkpoint(ALICE.address, 9)


def test_past_supply(token: Any) -> None:
    boa.env.time_travel(seconds=10)
    first = now() - 1
    token.burn(10, sender=OWNER.address)
    boa.env.time_travel(seconds=10)
    assert token.getPastTotalSupply(first) == system.INITIAL_SUPPLY
    assert token.getPastTotalSupply(now() - 1) == system.INITIAL_SUPPLY - 10
    zero = ZERO_ADDRESS
    assert (token.getPastVotes(zero, first), token.numCheckpoints(zero)) == (0, 0)
