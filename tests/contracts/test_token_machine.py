"""Any sequence of token operations keeps supply, balances, votes and the past as a plain model of them says."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from functools import cache
from typing import Any

import boa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from poip_chain.spec.types import ZERO_ADDRESS, Address
from tests.contracts import system
from tests.contracts.system import OWNER, account, now

HOLDERS = [account(label).address for label in ("alice", "bob", "carol")]
MAXIMUM = 10_000
holders = st.sampled_from(HOLDERS)
delegates = st.sampled_from([*HOLDERS, ZERO_ADDRESS])
amounts = st.integers(0, 400)


@cache
def deployed() -> Any:
    """The token that every run starts from: a small supply, and an owner who may mint."""
    token = system.load(system.CONTRACTS / "token/PoipToken.vy", HOLDERS[0], 3000, MAXIMUM)
    token.set_minter(OWNER.address, True, sender=OWNER.address)
    return token


class TokenMachine(RuleBasedStateMachine):
    """Three holders; the ghost model is three dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.token = deployed()
        self.balances: dict[Address, int] = defaultdict(int, {HOLDERS[0]: 3000})
        self.delegates: dict[Address, Address] = {}
        self.past: list[tuple[int, dict[Address, int], int]] = []
        self.undo = ExitStack()
        self.undo.enter_context(boa.env.anchor())

    def teardown(self) -> None:
        self.undo.close()

    def votes(self) -> dict[Address, int]:
        result = dict.fromkeys(HOLDERS, 0)
        for holder, delegate in self.delegates.items():
            if delegate != ZERO_ADDRESS:
                result[delegate] += self.balances[holder]
        return result

    @rule(source=holders, receiver=holders, amount=amounts, by_allowance=st.booleans())
    def transfer(self, source: Address, receiver: Address, amount: int, by_allowance: bool) -> None:
        def act() -> None:
            if by_allowance:
                self.token.approve(receiver, amount, sender=source)
                self.token.transferFrom(source, receiver, amount, sender=receiver)
            else:
                self.token.transfer(receiver, amount, sender=source)

        if amount > self.balances[source]:
            with boa.reverts("erc20: transfer amount exceeds balance"):
                act()
        else:
            act()
            self.balances[source] -= amount
            self.balances[receiver] += amount

    @rule(holder=holders, delegate=delegates)
    def delegate(self, holder: Address, delegate: Address) -> None:
        self.token.delegate(delegate, sender=holder)
        self.delegates[holder] = delegate

    @rule(holder=holders, amount=st.integers(0, 4000))
    def mint(self, holder: Address, amount: int) -> None:
        if sum(self.balances.values()) + amount > MAXIMUM:
            with boa.reverts("token: max supply exceeded"):
                self.token.mint(holder, amount, sender=OWNER.address)
        else:
            self.token.mint(holder, amount, sender=OWNER.address)
            self.balances[holder] += amount

    @rule(holder=holders, amount=amounts)
    def burn(self, holder: Address, amount: int) -> None:
        if amount > self.balances[holder]:
            with boa.reverts("erc20: burn amount exceeds balance"):
                self.token.burn(amount, sender=holder)
        else:
            self.token.burn(amount, sender=holder)
            self.balances[holder] -= amount

    @rule(seconds=st.integers(1, 100))
    def pass_time(self, seconds: int) -> None:
        self.past.append((now(), self.votes(), sum(self.balances.values())))
        boa.env.time_travel(seconds=seconds)

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        time, votes, supply = data.draw(st.sampled_from(self.past))
        assert self.token.getPastTotalSupply(time) == supply
        assert {holder: self.token.getPastVotes(holder, time) for holder in HOLDERS} == votes

    @invariant()
    def state_is_the_models(self) -> None:
        assert {holder: self.token.balanceOf(holder) for holder in HOLDERS} == {h: self.balances[h] for h in HOLDERS}
        assert self.token.totalSupply() == sum(self.balances.values()) <= MAXIMUM
        assert {holder: self.token.getVotes(holder) for holder in HOLDERS} == self.votes()


def test_token_machine() -> None:
    deployed()  # outside the runs, each of which is undone
    run_state_machine_as_test(TokenMachine, settings=settings(max_examples=12, stateful_step_count=20))
