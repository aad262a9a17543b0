"""The background work on a model of the chain: batches, finality, money, duties - through restarts and reorganisations."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from poip_chain.errors import ConfigurationError, IntegrityError
from poip_chain.service.node.collection import plan_collection
from poip_chain.service.node.ports import Rotated
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import BatchState, CollectionState, StoredVoucher
from poip_chain.spec.objects import FinishReason, Part, Receipt, Voucher
from poip_chain.spec.types import ZERO_HASH
from tests.engines.model_chain import RESPONSE, TERMS, WINDOW
from tests.engines.node_kit import Client, Kit, key_of


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def ask(kit: Kit, count: int, pay: bool = True) -> list[Receipt]:
    """`count` answers, each paid by a voucher that names it."""
    receipts = []
    for _ in range(count):
        receipt = kit.ask(max_tokens=2)
        receipts.append(receipt)
        if pay:
            kit.pay(receipt.payer_cum, receipt)
    return receipts


def states(kit: Kit) -> list[str]:
    return [b.state.value for b in kit.node.store.batches(*BatchState)]


def settle_all(kit: Kit) -> None:
    for _ in range(6):
        kit.round(WINDOW)


def owed(receipts: list[Receipt]) -> int:
    return sum(r.fee for r in receipts)


def test_the_whole_way(kit: Kit) -> None:
    receipts = ask(kit, 4)
    kit.round()
    assert states(kit) == ["committed"]
    assert kit.chain.state.next_seq == 4 and kit.chain.state.node_cum == owed(receipts)
    kit.round()
    assert kit.chain.state.settled[kit.client.address] == owed(receipts)
    assert kit.chain.state.earned == 0
    settle_all(kit)
    assert states(kit) == ["final"]
    assert kit.chain.state.earned == owed(receipts)
    assert kit.node.ledger.collections()["settled"] == 1
    before = list(kit.chain.sends)
    settle_all(kit)
    assert kit.chain.sends == before, "nothing is left to send"


def test_batches_by_count_or_age(kit: Kit) -> None:
    ask(kit, 3)
    kit.round()
    assert states(kit) == []
    kit.chain.mine(30)
    kit.node.jobs.step()
    assert states(kit) == ["composed"]
    ask(kit, 9)
    for _ in range(4):
        kit.round()
    # 3 by age, twice 4 by count; one receipt waits.
    assert [b.count for b in kit.node.store.batches(*BatchState)] == [3, 4, 4]
    assert kit.chain.state.next_seq == 11


def test_earnings_are_withdrawn_from_the_threshold_on(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"withdraw_threshold": 1})
    receipts = ask(kit, 4)
    settle_all(kit)
    assert (kit.chain.state.earned, kit.chain.state.paid_out) == (0, owed(receipts))
    # The same amount a second time is another withdrawal.
    more = ask(kit, 4)
    settle_all(kit)
    assert kit.chain.state.paid_out == owed(receipts) + owed(more)


def test_a_kill_between_composing_and_sending(kit: Kit) -> None:
    ask(kit, 4)
    kit.chain.down = True
    kit.node.jobs.step()  # follows first: without a chain nothing is composed
    assert states(kit) == []
    kit.chain.down = False
    composed = kit.node.store.compose(maximum=4, now=1, due=lambda *_: True)
    assert composed is not None
    kit.restart()
    ask(kit, 4)
    kit.round()
    kit.round()
    batches = kit.node.store.batches(BatchState.COMMITTED)
    assert [(b.first_seq, b.count) for b in batches] == [(0, 4), (4, 4)]
    assert batches[0].root == composed.root


def test_kills_after_every_send(tmp_path: Path) -> None:
    """A restart after every round: each thing is done once, whatever was under way."""
    kit = Kit(tmp_path)
    receipts = ask(kit, 4)
    for _ in range(10):
        kit.node.jobs.step()
        kit.restart()
        kit.chain.mine(30)
        kit.restart()
    assert kit.chain.state.earned == owed(receipts)
    assert states(kit) == ["final"]


@pytest.mark.parametrize("forget", [False, True])
def test_a_reorganisation_of_three_blocks(kit: Kit, forget: bool) -> None:
    """The commitment disappears. With `forget` the outbox believes that it is mined, so that it must be sent anew."""
    receipts = ask(kit, 4)
    kit.node.jobs.step()
    kit.chain.mine()
    kit.node.jobs.step()
    assert states(kit) == ["committed"]
    kit.chain.mine()
    kit.chain.mine()
    kit.chain.reorganise(3, forget=forget)
    kit.chain.mine(5)  # another block in its place
    kit.node.jobs.step()
    assert kit.chain.state.next_seq in (0, 4)
    settle_all(kit)
    assert kit.chain.state.next_seq == 4
    assert kit.chain.state.earned == owed(receipts)
    assert len(kit.chain.state.batches) == 1


def test_a_reorganisation_of_a_collect(kit: Kit) -> None:
    receipts = ask(kit, 4)
    kit.round()
    kit.round()
    assert kit.chain.state.settled[kit.client.address] == owed(receipts)
    kit.chain.reorganise(2, forget=True)
    settle_all(kit)
    assert kit.chain.state.settled[kit.client.address] == owed(receipts)
    assert kit.chain.state.earned == owed(receipts)


@pytest.mark.slow
def test_random_faults_end_in_the_right_state(tmp_path: Path) -> None:
    """Restarts, outages, reorganisations and work in any order: every wei arrives once."""
    for seed in range(6):
        rng = random.Random(seed)
        kit = Kit(tmp_path / str(seed))
        receipts: list[Receipt] = []
        for _ in range(60):
            action = rng.choice(["ask", "step", "step", "mine", "mine", "restart", "down", "reorg"])
            if action == "ask":
                receipts += ask(kit, 1)
            elif action == "step":
                kit.node.jobs.step()
            elif action == "mine":
                kit.chain.mine(rng.choice([1, 40]))
            elif action == "restart":
                kit.restart()
            elif action == "down":
                kit.chain.down = True
                kit.node.jobs.step()
                kit.chain.down = False
            elif len(kit.chain._blocks) > 4:
                kit.chain.reorganise(rng.randint(1, 3), forget=rng.random() < 0.5)
            assert kit.node.jobs.fatal is None, kit.node.jobs.fatal
        settle_all(kit)
        settle_all(kit)
        state = kit.chain.state
        assert state.next_seq == len(receipts), seed
        assert state.earned == owed(receipts) == state.settled.get(kit.client.address, 0), seed
        assert state.escrow[kit.client.address] + state.earned == 10**9, seed
        kit.node.store.close()


def test_somebody_else_finalises(kit: Kit) -> None:
    ask(kit, 4)
    kit.round()
    kit.chain.mine(WINDOW)
    batch = kit.chain.state.batches[1]
    kit.chain.send_finalize("stranger", [batch])
    kit.node.jobs.step()
    kit.chain.mine()
    settle_all(kit)
    assert states(kit) == ["final"]
    assert kit.node.jobs.trouble() == {}


def test_a_convicted_batch_is_not_paid_and_does_not_hold_up_the_next(kit: Kit) -> None:
    lost = ask(kit, 4, pay=False)
    kit.round()
    kit.chain.convict(1)
    kit.pay(lost[-1].payer_cum, lost[-1])
    receipts = ask(kit, 4)
    settle_all(kit)
    assert states(kit) == ["convicted", "final"]
    assert kit.chain.state.earned == owed(receipts)
    assert kit.node.ledger.collections() == {"due": 0, "collected": 0, "settled": 1, "void": 1}


def test_an_open_case_holds_up_only_its_batch(kit: Kit) -> None:
    ask(kit, 8)
    kit.round()
    kit.round()
    kit.chain.state.cases[1] = 1
    settle_all(kit)
    assert states(kit) == ["committed", "final"]
    kit.chain.state.cases[1] = 0
    settle_all(kit)
    assert states(kit) == ["final", "final"]


def test_a_client_that_never_pays(kit: Kit) -> None:
    ask(kit, 4, pay=False)
    settle_all(kit)
    assert kit.node.ledger.collections()["void"] == 1
    assert kit.chain.state.earned == 0
    # It pays after all: nothing is lost.
    last = kit.node.store.receipt_at(3)
    assert last is not None
    kit.pay(last.receipt.payer_cum, last.receipt)
    settle_all(kit)
    assert kit.chain.state.earned == last.receipt.payer_cum
    assert kit.node.ledger.collections()["settled"] == 1


def test_later_vouchers_pay_earlier_batches(kit: Kit) -> None:
    first = ask(kit, 4, pay=False)
    second = ask(kit, 4, pay=False)
    kit.round()
    kit.round()
    kit.pay(second[-1].payer_cum, second[-1])
    settle_all(kit)
    assert kit.chain.state.earned == owed(first) + owed(second)


def test_a_voucher_for_a_part(kit: Kit) -> None:
    receipts = ask(kit, 4, pay=False)
    kit.pay(receipts[1].payer_cum, receipts[1])
    settle_all(kit)
    assert kit.chain.state.earned == receipts[1].payer_cum
    rest = ask(kit, 4)
    settle_all(kit)
    # The first batch was closed when the patience ended; what it lacked is given up, not demanded twice.
    assert kit.chain.state.earned == receipts[1].payer_cum + owed(rest)


def test_an_escrow_that_fills_again(kit: Kit) -> None:
    receipts = ask(kit, 4)
    kit.chain.state.escrow[kit.client.address] = receipts[0].fee + 1
    settle_all(kit)
    assert kit.chain.state.earned == receipts[0].fee + 1
    kit.chain.state.escrow[kit.client.address] = 10**6
    settle_all(kit)
    assert kit.chain.state.earned == owed(receipts)


def test_several_payers(kit: Kit) -> None:
    other = Client(kit.node.served, key_of("other"))
    kit.chain.state.escrow[other.address] = 10**6
    total = 0
    for client in (kit.client, other, other, kit.client):
        receipt = kit.ask_body(client.body(max_tokens=2))
        voucher = client.voucher(receipt.payer_cum, receipt)
        from poip_chain.service.node.admission import parse_voucher

        kit.node.accept_voucher(parse_voucher(voucher, flat=False))
        total += receipt.fee
    settle_all(kit)
    assert kit.chain.state.earned == total


def test_a_refused_transaction_is_tried_less_and_less(tmp_path: Path) -> None:
    kit = Kit(tmp_path, {"retry_delay": 5.0})
    ask(kit, 4)
    kit.node.jobs.step()
    batch = kit.node.store.batches(BatchState.COMPOSED)[0]
    job = f"commit:{kit.key.address}:{batch.first_seq}"
    delays = []
    now = 0.0
    for _ in range(12):
        delays.append(kit.node.ledger.put_off(job, now, 5.0, used=False) - now)
    assert delays[:4] == [5, 10, 20, 40] and delays[-1] == delays[-2] == 640


def test_a_rotated_key_signs_nothing_that_would_be_void(kit: Kit) -> None:
    """The old key counts until the rotation takes effect; what it signs beyond the new key's first number is void then."""
    ask(kit, 2)
    kit.chain.tell(Rotated(kit.key.address, 4), Rotated(key_of("another").address, 0))
    kit.round()
    ask(kit, 2)
    with pytest.raises(RequestRefused) as caught:
        kit.ask()
    assert (caught.value.status, caught.value.code) == (503, "key_rotated")
    kit.restart()  # it has receipts to commit
    kit.round()
    with pytest.raises(ConfigurationError, match="this one signs those below 4"):
        kit.restart()
    kit.chain.reorganise(5)
    kit.node.jobs.step()
    kit.node.check_start()
    ask(kit, 1)


def test_a_jailed_node_commits_what_it_signed(kit: Kit) -> None:
    """The jail stops new service. What was signed must be committed, and is paid."""
    receipts = ask(kit, 4)
    kit.chain.state.jailed = True
    settle_all(kit)
    assert kit.node.batching.blocked is None
    assert kit.chain.state.earned == owed(receipts)


def test_a_node_that_cannot_commit_takes_no_requests(kit: Kit) -> None:
    """What it signed is kept, nothing more is signed, and it goes on when it may."""
    receipts = ask(kit, 4)
    kit.chain.state.stake = 0
    kit.round()
    with pytest.raises(RequestRefused, match="free stake") as caught:
        kit.ask()
    assert (caught.value.status, caught.value.code) == (503, "cannot_commit")
    health = asyncio.run(kit.node.health())
    assert health["status"] == "degraded" and "free stake" in health["trouble"]["batches"]
    kit.chain.state.stake = 10**24
    settle_all(kit)
    assert kit.chain.state.earned == owed(receipts)
    ask(kit, 1)


def fees_lock_alone(kit: Kit, stake_for: int) -> None:
    """No least lock; stake for so many of the receipts that `ask` makes."""
    kit.chain.state.terms = dataclasses.replace(TERMS, minimum_lock=0)
    fee = kit.node.store.node_cum_before(1)
    kit.chain.state.stake = kit.chain.state.terms.lock(stake_for * fee)


def test_a_batch_above_the_free_stake_is_cut(kit: Kit) -> None:
    """Whatever took the stake, the receipts that the rest carries are committed, and the others when it is free again."""
    receipts = ask(kit, 4)
    fees_lock_alone(kit, 3)
    kit.round()
    assert [(b.first_seq, b.count, b.state.value) for b in kit.node.store.batches(*BatchState)] == [
        (0, 3, "committed"),
        (3, 1, "composed"),
    ]
    kit.restart()
    settle_all(kit)
    settle_all(kit)
    assert states(kit) == ["final", "final"]
    assert kit.chain.state.earned == owed(receipts)
    assert kit.node.ledger.collections()["settled"] == 2


def test_a_batch_that_was_sent_is_never_cut(kit: Kit) -> None:
    """It may still be mined: a second batch of the same receipts would be another history."""
    ask(kit, 4)
    kit.node.jobs.step()
    assert kit.chain.sends == [f"commit:{kit.key.address}:0#0"]
    fees_lock_alone(kit, 3)
    kit.chain.mine()
    for _ in range(3):
        kit.round()
    assert [(b.count, b.state.value) for b in kit.node.store.batches(*BatchState)] == [(4, "composed")]
    fees_lock_alone(kit, 4)
    kit.round()
    assert states(kit) == ["committed"]


def test_a_late_answer_puts_finality_off(kit: Kit) -> None:
    """The window stays open for what the answer shows; a finalize before its end would revert."""
    ask(kit, 4)
    kit.round()
    (batch,) = kit.chain.state.batches.values()
    kit.chain.mine(batch.window_end - 2 - kit.chain.state.time)
    number = kit.chain.challenge(1, 2, 1, 0, kit.chain.state.time + RESPONSE)
    kit.round()
    assert number in kit.chain.state.answered
    kit.round(5)
    assert kit.chain.state.time > batch.window_end
    assert not any(key.startswith("finalize:") for key in kit.chain.sends)
    kit.round(RESPONSE)
    kit.round()
    assert states(kit) == ["final"]


def test_a_batch_without_free_stake_is_tried_again(kit: Kit) -> None:
    """The stake was there when the requests were admitted; what took it may also give it back."""
    ask(kit, 4)
    kit.chain.state.stake = 0
    for _ in range(3):
        kit.round()
    assert states(kit) == ["composed"] and "not enough free stake" in (kit.node.batching.blocked or "")
    with pytest.raises(RequestRefused, match="free stake") as caught:
        kit.ask()
    assert caught.value.code == "cannot_commit"
    kit.chain.state.stake = 10**18
    kit.round()
    assert states(kit) == ["committed"]


def test_a_node_stops_before_a_sunset_and_commits_what_it_signed(kit: Kit) -> None:
    """A batch interval before the sunset nothing more is signed; what was signed is committed when it is due."""
    receipts = ask(kit, 2)
    now, interval = kit.chain.state.time, int(kit.node.settings.batch_age)
    kit.chain.state.sunset = now + interval + 6
    kit.node.jobs.step()
    receipts += ask(kit, 1)
    kit.chain.mine(6)
    with pytest.raises(RequestRefused, match=f"served until {now + interval + 6}") as caught:
        kit.ask()
    assert (caught.value.status, caught.value.code) == (503, "model_sunset")
    kit.restart()  # known before the first round
    with pytest.raises(RequestRefused, match="served until"):
        kit.ask()
    kit.chain.mine(interval - 6)
    kit.round()
    assert kit.chain.state.next_seq == 3 and kit.chain.state.batches[1].committed_at <= kit.chain.state.sunset
    settle_all(kit)
    assert kit.chain.state.earned == owed(receipts)
    kit.chain.state.sunset = kit.chain.state.time + 10**6  # moved by a later decision
    kit.node.jobs.step()
    ask(kit, 1)


def test_without_a_chain_it_waits_and_goes_on(kit: Kit) -> None:
    receipts = ask(kit, 4)
    kit.chain.down = True
    for _ in range(3):
        kit.node.jobs.step()
    assert "follow" in kit.node.jobs.trouble()
    kit.chain.down = False
    settle_all(kit)
    assert kit.node.jobs.trouble() == {}
    assert kit.chain.state.earned == owed(receipts)


def test_a_stranger_with_our_key_stops_the_node(kit: Kit) -> None:
    ask(kit, 4)
    kit.round()
    foreign = kit.chain.state.batches[1].replace(id=2, first_seq=4, root=b"x" * 32)
    from poip_chain.service.node.ports import Committed

    kit.chain.tell(Committed(foreign))
    kit.node.jobs.step()
    assert isinstance(kit.node.jobs.fatal, IntegrityError)


def test_a_lost_database_refuses_to_start(kit: Kit, tmp_path: Path) -> None:
    ask(kit, 4)
    kit.round()
    kit.node.store.close()
    (tmp_path / "node.db").rename(tmp_path / "lost.db")
    for name in ("node.db-wal", "node.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(IntegrityError, match="it is lost"):
        kit.start()


# ------------------------------------------------------------------ duties


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("first_leaf", [0, 8])
def test_challenges_are_answered(kit: Kit, part: Part, first_leaf: int) -> None:
    ask(kit, 1)
    long = kit.ask(prompt=tuple(range(20, 100)), max_tokens=100)
    ask(kit, 2)
    kit.round()
    number = kit.chain.challenge(1, long.seq, int(part), first_leaf, kit.chain.state.time + 50)
    kit.round()
    assert number in kit.chain.state.answered
    kit.round()
    kit.round()
    assert sum(key.startswith("answer:") for key in kit.chain.sends) == 1


def test_an_answer_that_a_reorganisation_removed_is_given_again(kit: Kit) -> None:
    ask(kit, 4)
    kit.round()
    number = kit.chain.challenge(1, 2, 1, 0, kit.chain.state.time + 500)
    kit.node.jobs.step()
    kit.chain.mine()
    kit.node.jobs.step()
    assert number in kit.chain.state.answered
    kit.chain.reorganise(1, forget=True)
    assert number not in kit.chain.state.answered
    kit.round()
    kit.round()
    assert number in kit.chain.state.answered


def test_challenges_of_others_are_not_ours(kit: Kit) -> None:
    ask(kit, 4)
    kit.round()
    kit.chain.challenge(99, 0, 1, 0, kit.chain.state.time + 50)
    kit.round()
    assert kit.node.jobs.trouble() == {}
    assert not any(key.startswith("answer:") for key in kit.chain.sends)


def test_a_demand_commits_at_once(kit: Kit) -> None:
    ask(kit, 1)
    kit.round()
    assert kit.chain.state.next_seq == 0
    kit.chain.demand(0, kit.chain.state.time + 50)
    kit.round()
    assert kit.chain.state.next_seq == 1
    kit.round()


def test_withholding_on_purpose(tmp_path: Path) -> None:
    """The demo's cheat: the first audited transcript is handed over, the second one hidden, also on chain."""
    kit = Kit(tmp_path, {"misbehave": "withhold_after=1"})
    ask(kit, 4)
    kit.round()
    kit.round()
    batch = kit.chain.state.batches[1]
    selected = [i for i in range(4) if kit.node.transcripts.is_selected(batch, i)]
    assert len(selected) >= 2, "the model's beacon selects two of four"
    first, second = selected[:2]
    assert kit.node.transcripts.transcript(1, first, None)["receipt"]["seq"] == first
    with pytest.raises(Exception, match="cannot be read"):
        kit.node.transcripts.transcript(1, second, None)
    a = kit.chain.challenge(1, first, 1, 0, kit.chain.state.time + 50)
    b = kit.chain.challenge(1, second, 1, 0, kit.chain.state.time + 50)
    kit.round()
    assert a in kit.chain.state.answered and b not in kit.chain.state.answered
    kit.restart()
    kit.round()
    assert b not in kit.chain.state.answered
    assert kit.node.transcripts.transcript(1, first, None)["receipt"]["seq"] == first


# ------------------------------------------------------------------ plans


def receipt(seq: int, cum: int, fee: int, reason: FinishReason = FinishReason.STOP) -> Receipt:
    node, payer = key_of("node").address, key_of("client").address
    return Receipt(node, seq, bytes(32), bytes(32), bytes(32), 1, int(reason), fee, payer, cum, cum, 1)


def held(cumulative: int, name: bytes = ZERO_HASH) -> StoredVoucher:
    node, payer = key_of("node").address, key_of("client").address
    return StoredVoucher(Voucher(payer, node, cumulative, name), b"")


A, B, C = receipt(0, 10, 10), receipt(1, 30, 20), receipt(2, 60, 30, FinishReason.CANCELLED)


@pytest.mark.parametrize(
    ("vouchers", "reach", "last"),
    [
        ([], None, None),
        ([held(0)], None, None),
        ([held(30)], 30, B),
        ([held(25)], 25, B),
        ([held(500)], 30, B),  # the cancelled one is not named
        ([held(60, C.struct_hash())], 60, C),
        ([held(45, C.struct_hash())], 45, C),
        ([held(30, B.struct_hash())], 30, B),
        ([held(20, B.struct_hash())], 20, B),
        ([held(20, b"later" * 6 + b"zz")], 10, A),  # names another receipt: only whole receipts below it
        ([held(90, b"later" * 6 + b"zz")], 30, B),
        ([held(90, b"later" * 6 + b"zz"), held(60, C.struct_hash())], 60, C),
    ],
)
def test_plans(vouchers: list[StoredVoucher], reach: int | None, last: Any) -> None:
    plan = plan_collection([A, B, C], vouchers)
    assert (plan and plan.reach) == reach
    assert (plan and plan.last) == last


@pytest.mark.parametrize(
    ("vouchers", "limit", "reach"),
    [
        ([held(500)], 30, 30),
        ([held(500)], 29, 10),
        ([held(500), held(25, B.struct_hash())], 29, 25),
        ([held(500)], 9, None),
    ],
)
def test_plans_keep_below_what_the_vault_takes(vouchers: list[StoredVoucher], limit: int, reach: int | None) -> None:
    plan = plan_collection([A, B, C], vouchers, limit)
    assert (plan and plan.reach) == reach


def test_no_collect_above_the_batch_total(kit: Kit) -> None:
    """The vault refuses what would make a batch's collects exceed its total: nothing of the kind is sent."""
    receipts = ask(kit, 4)
    kit.node.jobs.step()
    kit.chain.mine()
    kit.chain.state.collected[1, key_of("another payer").address] = receipts[0].fee
    for _ in range(3):
        kit.round(60)  # the payer's next voucher might be a better one: it waits
    assert kit.node.jobs.trouble() == {}
    paid = kit.chain.state.settled.get(kit.client.address, 0)
    assert paid == owed(receipts[:3])


def test_states_are_complete() -> None:
    assert {s.value for s in CollectionState} == {"due", "collected", "settled", "void"}
