"""The outbox against a chain in memory: one transaction per intent, whatever happens in between."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from eth_keys.datatypes import Signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poip_chain.chain.keys import Key
from poip_chain.chain.outbox import FeePolicy, Outbox, State
from poip_chain.chain.rpc import Call
from poip_chain.chain.signing import Fees
from poip_chain.errors import InsufficientFunds, IntegrityError, NotFound, Refused, TransactionFailed, Unavailable
from poip_chain.spec.types import Address
from tests.support.fake_chain import FakeChain

KEY = Key.from_bytes(b"\x11" * 32)
TARGET = Address("0x000000000000000000000000000000000000dEaD")


class Clock:
    """Time that tests move."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def call(number: int, value: int = 0) -> Call:
    return Call(TARGET, bytes([number]), f"call {number}", value)


@pytest.fixture
def chain() -> FakeChain:
    return FakeChain()


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Opener:
    """Opens outboxes on one file, as a restarted process would."""

    def __init__(self, chain: FakeChain, path: Path, clock: Clock) -> None:
        self.chain, self.path, self.clock = chain, path, clock

    def __call__(self, **options: object) -> Outbox:
        return Outbox(self.chain, KEY, self.path, clock=self.clock, **options)  # type: ignore[arg-type]


@pytest.fixture
def open_outbox(chain: FakeChain, tmp_path: Path, clock: Clock) -> Opener:
    return Opener(chain, tmp_path / "outbox.db", clock)


def test_send_and_wait(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        sent = outbox.send(call(1), "a")
        assert outbox.status("a").state is State.OPEN
        chain.mine()
        receipt = outbox.wait("a", 5)
        assert receipt.hash == sent and receipt.status and receipt.fee == 42_000 * 10**9
        assert outbox.status("a").state is State.MINED
    assert [t.data for t in chain.mined()] == [b"\x01"]


def test_signed_bytes_are_what_the_chain_would_recover(chain: FakeChain, open_outbox: Opener) -> None:
    import rlp
    from eth_account import Account
    from eth_hash.auto import keccak

    with open_outbox() as outbox:
        outbox.send(call(1, value=7), "a")
    raw = chain.sent[0].raw
    assert Account.recover_transaction(raw) == KEY.address
    fields = rlp.decode(raw[1:])
    v, r, s = (int.from_bytes(value, "big") for value in fields[9:])
    digest = keccak(b"\x02" + rlp.encode(fields[:9]))
    assert Signature(vrs=(v, r, s)).recover_public_key_from_msg_hash(digest).to_checksum_address() == KEY.address
    assert int.from_bytes(fields[0], "big") == 1337 and int.from_bytes(fields[6], "big") == 7


def test_the_same_key_is_sent_once(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        first = outbox.send(call(1), "a")
        assert outbox.send(call(1), "a") == first
        chain.mine()
        outbox.step()
        assert outbox.send(call(1), "a") == first
        with pytest.raises(Refused, match="another transaction"):
            outbox.send(call(2), "a")
        with pytest.raises(Refused):
            outbox.send(call(1, value=1), "a")
    assert len(chain.mined()) == 1


def test_a_simulated_revert_sends_and_stores_nothing(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        chain.reverts = "the contract refused: registry: no stake."
        with pytest.raises(TransactionFailed, match="no stake"):
            outbox.send(call(1), "a")
        assert not outbox.known("a") and not chain.sent
        with pytest.raises(NotFound):
            outbox.status("a")
        chain.reverts = ""
        outbox.send(call(1), "a")
        chain.reverts = "the contract refused."
        with pytest.raises(TransactionFailed, match="1 earlier transactions"):
            outbox.send(call(2), "b")


def test_no_money_for_gas(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        price = 3 * 10**9
        gas = 50_000 * 6 // 5 + 20_000
        chain.coin = gas * price
        outbox.send(call(1), "a")
        # The balance on chain has not changed yet, but it is promised.
        with pytest.raises(InsufficientFunds, match="under way"):
            outbox.send(call(2), "b")
        assert not outbox.known("b")
        chain.mine()
        outbox.step()
        outbox.send(call(2), "b")


def test_gas_above_the_bound_is_refused(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(fees=FeePolicy(max_fee=10**9)) as outbox:
        with pytest.raises(Refused, match="above the bound"):
            outbox.send(call(1), "a")
        assert not chain.sent


def test_unavailable_before_the_intent_is_stored(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        chain.away = True
        with pytest.raises(Unavailable):
            outbox.send(call(1), "a")
        assert not outbox.known("a")
        with pytest.raises(Unavailable):
            outbox.step()


def test_the_chain_goes_away_at_the_hand_over(
    chain: FakeChain, open_outbox: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_outbox() as outbox:
        with monkeypatch.context() as patch:

            def gone(raw: bytes) -> str:
                raise Unavailable("gone")

            patch.setattr(chain, "send_raw", gone)
            sent = outbox.send(call(1), "a")
        assert not chain.mempool
        outbox.step()
        chain.mine()
        assert outbox.wait("a", 5).hash == sent
    assert len(chain.mined()) == 1


def test_accepted_but_the_answer_was_lost(
    chain: FakeChain, open_outbox: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = chain.send_raw

    def accepted(raw: bytes) -> str:
        honest(raw)
        raise Unavailable("the answer was lost")

    with open_outbox() as outbox:
        with monkeypatch.context() as patch:
            patch.setattr(chain, "send_raw", accepted)
            outbox.send(call(1), "a")
        outbox.step()
        assert outbox.status("a").error == ""
        chain.mine()
        outbox.step()
        assert outbox.status("a").state is State.MINED
    assert len(chain.mined()) == 1


def test_a_restart_sends_the_same_bytes_again(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        sent = outbox.send(call(1), "a")
    chain.mempool.clear()
    with open_outbox(rebroadcast_after=0.0) as outbox:
        outbox.step()
        assert chain.mempool[0].hash == sent
        chain.mine()
        outbox.step()
        assert outbox.status("a").state is State.MINED


def test_a_forgotten_transaction_keeps_its_nonce(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(rebroadcast_after=0.0) as outbox:
        outbox.send(call(1), "a")
        chain.mempool.clear()
        outbox.send(call(2), "b")
        assert (outbox.status("a").nonce, outbox.status("b").nonce) == (0, 1)
        outbox.step()
        chain.mine()
        outbox.step()
        assert outbox.status("a").state is State.MINED and outbox.status("b").state is State.MINED


def test_one_process_owns_an_outbox(open_outbox: Opener) -> None:
    with open_outbox(), pytest.raises(Refused, match="another process"):
        open_outbox()
    with open_outbox():
        pass


def test_a_file_belongs_to_one_key_and_chain(chain: FakeChain, open_outbox: Opener, tmp_path: Path) -> None:
    open_outbox().close()
    with pytest.raises(IntegrityError, match="another address"):
        Outbox(chain, Key.from_bytes(b"\x22" * 32), open_outbox.path)  # type: ignore[arg-type]
    other = FakeChain()
    other.blocks[0].hash = b"\x01" * 32
    with pytest.raises(IntegrityError, match="another genesis"):
        Outbox(other, KEY, open_outbox.path)  # type: ignore[arg-type]
    # Neither left the file locked.
    open_outbox().close()


def test_a_stuck_transaction_gets_bounded_bumps(chain: FakeChain, open_outbox: Opener, clock: Clock) -> None:
    fees = FeePolicy(max_fee=4 * 10**9, bump_after=20, max_bumps=10)
    with open_outbox(fees=fees) as outbox:
        outbox.send(call(1), "a")
        for _ in range(30):
            clock.now += 21
            outbox.step()
        attempts = outbox.status("a").attempts
        for old, new in itertools.pairwise(attempts):
            assert new.max_fee * 1000 >= old.max_fee * 1125 and new.tip * 1000 >= old.tip * 1125
        assert 2 <= len(attempts) <= 11 and attempts[-1].max_fee <= 4 * 10**9
        assert {t.data for t in chain.sent} == {b"\x01"} and {t.nonce for t in chain.sent} == {0}
        assert chain.mempool[0].hash == attempts[-1].hash
        chain.mine()
        outbox.step()
        assert outbox.status("a").hash == attempts[-1].hash
    assert len(chain.mined()) == 1


def test_the_number_of_bumps_is_bounded(chain: FakeChain, open_outbox: Opener, clock: Clock) -> None:
    with open_outbox(fees=FeePolicy(bump_after=1, max_bumps=3)) as outbox:
        outbox.send(call(1), "a")
        for _ in range(20):
            clock.now += 10
            outbox.step()
        assert len(outbox.status("a").attempts) == 4


def test_an_earlier_form_may_be_the_one_that_is_mined(chain: FakeChain, open_outbox: Opener, clock: Clock) -> None:
    with open_outbox() as outbox:
        first = outbox.send(call(1), "a")
        original = chain.mempool[0]
        clock.now += 60
        outbox.step()
        assert len(outbox.status("a").attempts) == 2
        chain.mempool[0] = original
        chain.mine()
        outbox.step()
        assert outbox.status("a").hash == first and outbox.status("a").state is State.MINED


def test_a_transaction_that_fees_cannot_refuse_is_not_bumped_early(
    chain: FakeChain, open_outbox: Opener, clock: Clock
) -> None:
    with open_outbox(fees=FeePolicy(bump_after=20), rebroadcast_after=5) as outbox:
        outbox.send(call(1), "a")
        for _ in range(3):
            clock.now += 6
            outbox.step()
        assert len(outbox.status("a").attempts) == 1
        # Sending it again does not make it young: it is bumped 20 seconds after it was first sent.
        clock.now += 3
        outbox.step()
        assert len(outbox.status("a").attempts) == 2


def test_a_mined_revert_is_reported_and_never_tried_again(chain: FakeChain, open_outbox: Opener, clock: Clock) -> None:
    with open_outbox() as outbox:
        outbox.send(call(1), "a")
        chain.reverting.add(b"\x01")
        chain.reverts = "the contract refused: too late"
        chain.mine()
        with pytest.raises(TransactionFailed, match="too late"):
            outbox.wait("a", 5)
        assert outbox.status("a").state is State.REVERTED
        chain.reverts = ""
        outbox.send(call(1), "a")
        clock.now += 1000
        outbox.step()
        assert len(chain.sent) == 1


def test_a_nonce_used_elsewhere_is_replaced_once_it_is_deep(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(finality_blocks=3) as outbox:
        outbox.send(call(1), "a")
        chain.mempool.clear()
        chain.mine(foreign=1)
        outbox.step()
        # The foreign use may still be reorganised away: signing anew now could pay twice.
        assert len(chain.sent) == 1 and outbox.status("a").nonce == 0
        chain.mine(2)
        outbox.step()
        assert len(chain.sent) == 1
        chain.mine()
        outbox.step()
        assert outbox.status("a").nonce == 1 and outbox.status("a").state is State.OPEN
        chain.mine()
        outbox.step()
        assert outbox.status("a").state is State.MINED
    assert [t.data for t in chain.mined()] == [b"\x01"]


def test_a_lost_transaction_that_would_revert_by_now_stops(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(finality_blocks=0) as outbox:
        outbox.send(call(1), "a")
        chain.mempool.clear()
        chain.mine(foreign=1)
        chain.reverts = "the contract refused: already done"
        outbox.step()
        transaction = outbox.status("a")
        assert transaction.state is State.STOPPED and "already done" in transaction.error
        with pytest.raises(TransactionFailed, match="already done"):
            outbox.wait("a", 5)
        assert outbox.step() == 0 and len(chain.sent) == 1
        # Asked for again, it is tried again.
        chain.reverts = ""
        outbox.send(call(1), "a")
        chain.mine()
        assert outbox.wait("a", 5).status


def test_reorganised_away_and_mined_again(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(rebroadcast_after=0.0) as outbox:
        outbox.send(call(1), "a")
        chain.mine(2)
        outbox.step()
        assert outbox.status("a").state is State.MINED
        chain.drop(2, keep=False)
        outbox.step()
        assert outbox.status("a").state is State.OPEN and 0 in chain.mempool
        chain.mine(2)
        outbox.step()
        assert outbox.status("a").state is State.MINED and outbox.status("a").receipt is not None
    assert len(chain.mined()) == 1


def test_a_settled_transaction_is_not_asked_about_again(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox(finality_blocks=3) as outbox:
        outbox.send(call(1), "a")
        chain.mine(4)
        outbox.step()
        before = chain.calls
        outbox.step()
        assert chain.calls - before == 2


def test_wait_ends(chain: FakeChain, open_outbox: Opener) -> None:
    with open_outbox() as outbox:
        outbox.send(call(1), "a")
        with pytest.raises(Unavailable, match="not mined"):
            outbox.wait("a", 0.05)
        chain.away = True
        with pytest.raises(Unavailable, match="away"):
            outbox.wait("a", 0.05)


def test_fees_of_a_replacement() -> None:
    policy = FeePolicy(max_fee=1000)
    assert policy.bumped(Fees(80, 8), Fees(10, 1)) == Fees(91, 10)
    assert policy.bumped(Fees(80, 8), Fees(500, 1)) == Fees(500, 10)
    assert policy.bumped(Fees(900, 8), Fees(10, 1)) is None


EVENTS = st.sampled_from(
    ["send", "mine", "forget", "restart", "reorg", "away", "lost answer", "foreign", "late", "step"]
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=40))
def test_every_intent_is_mined_exactly_once(tmp_path_factory: pytest.TempPathFactory, events: list[str]) -> None:
    chain, clock = FakeChain(), Clock()
    path = tmp_path_factory.mktemp("outbox") / "outbox.db"

    def opened() -> Outbox:
        return Outbox(chain, KEY, path, clock=clock, rebroadcast_after=0.0, finality_blocks=3)  # type: ignore[arg-type]

    outbox, wanted = opened(), 0
    for event in events:
        if event == "send":
            outbox.send(call(wanted), f"k{wanted}")
            wanted += 1
        elif event == "mine":
            chain.mine()
        elif event == "forget":
            chain.mempool.clear()
        elif event == "restart":
            outbox.close()
            outbox = opened()
        elif event == "reorg":
            # Foreign transactions stay in the blocks that stay: depth 2 is within the finality of 3.
            depth = min(2, len(chain.blocks) - 1)
            if not any(block.foreign for block in chain.blocks[len(chain.blocks) - depth :]):
                chain.drop(depth, keep=False)
                chain.mine(depth, fill=False)
        elif event == "away":
            chain.away = True
            with pytest.raises(Unavailable):
                outbox.step()
            chain.away = False
        elif event == "lost answer":
            honest = chain.send_raw

            def lossy(raw: bytes, honest: object = honest) -> str:
                honest(raw)  # type: ignore[operator]
                raise Unavailable("lost")

            chain.send_raw = lossy  # type: ignore[method-assign]
            outbox.send(call(wanted), f"k{wanted}")
            wanted += 1
            chain.send_raw = honest  # type: ignore[method-assign]
        elif event == "foreign":
            chain.mine(fill=False, foreign=1)
        elif event == "late":
            clock.now += 30
            outbox.step()
        else:
            outbox.step()
    for _ in range(12):
        clock.now += 1
        outbox.step()
        chain.mine()
    outbox.step()
    assert sorted(t.data for t in chain.mined()) == sorted(bytes([n]) for n in range(wanted))
    assert all(outbox.status(f"k{n}").state is State.MINED for n in range(wanted))
    outbox.close()
