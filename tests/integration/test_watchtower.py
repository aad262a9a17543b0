"""The watchtower against the real contracts: what it finds, what it files, what it earns, and what it survives."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.economic.types import BatchStatus
from poip_chain.errors import Unavailable
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.reexecution import EngineSource
from poip_chain.proof.scoring import judge
from poip_chain.proof.settings import Mode
from poip_chain.proof.store import AuditState, BatchState, FilingState
from poip_chain.spec.objects import Batch
from poip_chain.spec.scores import Verdict
from tests.engines.serving import serving
from tests.integration.watch_world import (
    POIP,
    FixedSource,
    ScriptedEngine,
    ScriptedNode,
    Watcher,
    WatchWorld,
    running_watch_world,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BOND = POIP
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def module_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchWorld]:
    with running_watch_world(tmp_path_factory.mktemp("watch")) as world:
        yield world


@pytest.fixture
def world(module_world: WatchWorld) -> Iterator[WatchWorld]:
    yield module_world
    module_world.close_watchers()


@pytest.fixture
def node(world: WatchWorld) -> ScriptedNode:
    return world.add_node(f"node{next(NUMBERS)}")


def rounds(watcher: Watcher, until: Callable[[], Any], limit: int = 12) -> None:
    """Rounds until something holds; fails after `limit`."""
    for _ in range(limit):
        watcher.step()
        if until():
            return
    raise AssertionError(
        f"not within {limit} rounds: audits {watcher.store.audits()}, challenges {watcher.store.challenges()},"
        f" filings {watcher.filings()}"
    )


def state_of(watcher: Watcher, batch: Batch) -> BatchState | None:
    row = watcher.store.batch(batch.id)
    return None if row is None else row.state


def settled(world: WatchWorld, watcher: Watcher) -> bool:
    """Nothing stands and nothing is owed."""
    account = watcher.key.address
    return (
        watcher.store.bonds_standing() == 0
        and world.network.availability.claimable(account) == 0
        and world.network.registry.rewards(account) == 0
    )


def reward_of(world: WatchWorld, batch: Batch) -> int:
    """What the one conviction of a batch paid."""
    (event,) = world.convictions(batch)
    assert event["taken"] == batch.lock
    return int(event["paid"])


def test_an_honest_batch_is_audited_and_nothing_is_filed(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    batch = node.commit(node.answer(), node.answer(40))
    rounds(watcher, lambda: state_of(watcher, batch) is BatchState.DONE)
    audits = watcher.store.audits(batch_id=batch.id)
    assert audits and all(audit.verdict == Verdict.HONEST for audit in audits)
    assert [Evidence.read(Path(a.evidence or "")).result["verdict"] for a in audits] == ["honest"] * len(audits)
    assert watcher.filings() == [] and watcher.calls() == []
    world.mine(1, 220)
    node.send(world.network.log.finalize([batch]))
    watcher.step()
    row = watcher.store.batch(batch.id)
    assert row is not None and row.status == "final"
    world.mine(1, 700)
    watcher.restart()
    watcher.step()
    assert watcher.store.receipts(batch.id) is None  # nobody can be punished by them any more
    assert [a.verdict for a in watcher.store.audits(batch_id=batch.id)] == ["honest"] * len(audits)


def spoilt(node: ScriptedNode, offence: str) -> Batch:
    """A batch with one offence in it."""
    if offence == "fee":
        good = node.answer(book=False).receipt
        changes = {"fee": good.fee + 1, "payer_cum": good.payer_cum + 1, "node_cum": good.node_cum + 1}
        return node.commit(node.answer(receipt_changes=changes))
    if offence == "node_total":
        first = node.answer()
        # One unit that belongs to no receipt, within the batch's total: only two receipts side by side show it.
        second = node.answer(receipt_changes={"node_cum": node.answer(book=False).receipt.node_cum + 1})
        return node.commit(first, second, node.answer())
    if offence == "early_end":
        return node.commit(node.answer(transcript_changes={"output_ids": (300, 2, 302, 303, 304)}))
    if offence == "prompt_root":
        return node.commit(node.answer(transcript_changes={"prompt_ids": (20, 21, 22, 99)}))
    assert offence == "leaf_size"
    return node.commit(node.answer(transcript_changes={"output_ids": (300, 301, 302, 303)}))


@pytest.mark.parametrize("offence", ["fee", "node_total", "early_end", "prompt_root", "leaf_size"])
def test_what_a_contract_judges_is_convicted(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path, offence: str
) -> None:
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    batch = spoilt(node, offence)
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)
    rounds(watcher, lambda: settled(world, watcher) and watcher.balance() > before)
    (filing,) = watcher.filings(batch)
    assert (filing.kind, filing.state) == (offence, FilingState.DONE)
    assert watcher.balance() == before + reward_of(world, batch)
    assert state_of(watcher, batch) is BatchState.DONE


def test_a_receipt_handed_in_convicts_by_equivocation(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    other = node.answer(7, book=False)
    batch = node.commit(node.answer())
    watcher.step()
    watcher.store.observe(other.receipt, node.signed(other.receipt))
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)
    (filing,) = watcher.filings()
    assert (filing.kind, filing.state) == ("equivocation", FilingState.DONE)
    assert watcher.store.equivocations(unjudged=True) == []


def test_a_hidden_transcript_costs_the_node_its_lock(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    node.hidden = True
    batch = node.commit(node.answer())
    rounds(watcher, lambda: watcher.challenge(batch).state == "open" if watcher.store.challenges(batch.id) else False)
    assert watcher.balance() == before - BOND
    assert watcher.store.bonds_standing() == BOND
    world.mine(1, 25)
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)
    rounds(watcher, lambda: settled(world, watcher) and watcher.balance() > before)
    assert watcher.balance() == before + reward_of(world, batch)
    assert watcher.audit(batch).verdict == "withheld"
    assert watcher.calls().count("Availability.challenge") == 1
    assert watcher.calls().count("Availability.resolve") == 1


def test_hidden_receipts_do_not_help_a_node(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    node.silent = True
    batch = node.commit(node.answer())
    rounds(watcher, lambda: any(c.state == "open" for c in watcher.store.challenges(batch.id)))
    world.mine(1, 25)
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)


def test_receipts_that_come_late_are_checked_all_the_same(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path, budget=0)
    node.silent = True
    batch = spoilt(node, "node_total")
    watcher.step()
    assert state_of(watcher, batch) is BatchState.SELECTED
    node.silent = False
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)


def answering(world: WatchWorld, watcher: Watcher, node: ScriptedNode, batch: Batch) -> list[tuple[int, int]]:
    """Rounds in which the node answers every challenge on chain, until the audit is over; the chunks asked for."""
    asked = []
    for _ in range(40):
        if watcher.audit(batch).state is AuditState.DONE:
            return asked
        for challenge in watcher.store.challenges(batch.id, standing=True):
            if challenge.state == "open" and challenge.challenge_id is not None:
                asked.append((int(challenge.chunk[0]), challenge.chunk[1]))
                node.answer_challenge(challenge.challenge_id, batch)
        watcher.tower.step()
        # The window must outlast all the chunks: time moves just enough for the next try.
        world.mine(1, 2)
    raise AssertionError(f"no verdict: {watcher.store.audits(batch_id=batch.id)}")


@pytest.mark.parametrize(("cheated", "verdict"), [(False, Verdict.HONEST), (True, Verdict.FRAUD)])
def test_an_answer_on_chain_is_judged_as_one_over_http(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path, cheated: bool, verdict: Verdict
) -> None:
    watcher = world.watcher(tmp_path, cheated=cheated)
    before = watcher.balance()
    node.silent = True
    batch = node.commit(node.answer())
    watcher.step()
    asked = answering(world, watcher, node, batch)
    assert asked == [(1, 0), (0, 0), (2, 0)]
    assert watcher.audit(batch).verdict == verdict
    assert Evidence.read(Path(watcher.audit(batch).evidence or "")).batch == batch
    rounds(watcher, lambda: settled(world, watcher))
    assert watcher.balance() == before - 3 * (BOND // 4)  # a quarter of each bond pays for the answer
    assert world.status(batch) is BatchStatus.PENDING


def test_a_fault_that_an_answer_shows_is_filed_before_the_rest_is_published(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path)
    node.silent = True
    batch = spoilt(node, "prompt_root")
    watcher.step()
    assert answering(world, watcher, node, batch) == [(1, 0)]
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)


def test_wrong_computation_is_kept_as_evidence_that_reproduces(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path, cheated=True)
    batch = node.commit(node.answer())
    rounds(watcher, lambda: state_of(watcher, batch) is BatchState.DONE)
    audit = watcher.audit(batch)
    assert audit.verdict == Verdict.FRAUD and audit.evidence is not None
    (filing,) = watcher.filings(batch)
    assert (filing.kind, filing.state, filing.call) == ("wrong_computation", FilingState.EVIDENCE, None)
    assert watcher.calls() == []
    case = Evidence.read(Path(audit.evidence))
    again = judge([case.record], case.profile, FixedSource(cheated=True))[0]
    assert again.verdict == case.result["verdict"]
    assert again.scores.margin_sum == case.result["margin_sum"] == audit.detail["margin_sum"]
    assert judge([case.record], case.profile, FixedSource())[0].verdict is Verdict.HONEST


def test_the_bond_budget_is_never_exceeded(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path, budget=BOND)
    node.hidden = True
    first, second = node.commit(node.answer()), node.commit(node.answer())
    reports = [watcher.step() for _ in range(4)]
    challenges = watcher.store.challenges()
    assert [(c.batch_id in (first.id, second.id), c.state) for c in challenges] == [(True, "open")]
    assert watcher.store.bonds_standing() == BOND
    assert any(report.counts.get("over_budget") for report in reports)
    assert world.network.availability.read("total_held") <= BOND + world.network.availability.claimable(
        world.operator.address
    )


@pytest.mark.parametrize("mode", [Mode.WATCH, Mode.PROPOSE])
def test_modes_that_send_nothing(world: WatchWorld, node: ScriptedNode, tmp_path: Path, mode: Mode) -> None:
    watcher = world.watcher(tmp_path, mode)
    malformed = spoilt(node, "fee")
    node.hidden = True
    hidden = node.commit(node.answer())
    node.hidden = False
    rounds(watcher, lambda: watcher.filings(malformed))
    node.hidden = True
    rounds(watcher, lambda: watcher.filings(hidden) or watcher.audit(hidden).state is AuditState.DONE)
    assert world.chain.transaction_count(watcher.key.address) == 0
    assert world.status(malformed) is BatchStatus.PENDING
    assert {f.state for f in watcher.filings(malformed)} == {FilingState.PROPOSED}
    written = sorted(path.name.split("-")[0] for path in (tmp_path / "proposals").glob("*.json"))
    assert ("fee" in written) == (mode is Mode.PROPOSE)


def test_kills_at_every_write_change_nothing(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    node.hidden = True
    batch = node.commit(node.answer())
    kills = 0
    for _ in range(5):
        kills += watcher.mortal_step()
        if any(c.state == "open" for c in watcher.store.challenges(batch.id)):
            break
    world.mine(1, 25)
    for _ in range(6):
        kills += watcher.mortal_step()
    assert kills > 10
    assert world.status(batch) is BatchStatus.CONVICTED
    assert settled(world, watcher)
    assert watcher.balance() == before + reward_of(world, batch)
    assert watcher.calls().count("Availability.challenge") == 1
    assert watcher.calls().count("Availability.resolve") == 1
    assert watcher.audit(batch).verdict == "withheld"


def test_kills_at_every_write_lose_no_offence(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    batches = [spoilt(node, "node_total"), spoilt(world.add_node(f"node{next(NUMBERS)}"), "early_end")]
    for _ in range(5):
        watcher.mortal_step()
    assert [world.status(batch) for batch in batches] == [BatchStatus.CONVICTED] * 2
    assert watcher.balance() == before + sum(reward_of(world, batch) for batch in batches)
    assert len([call for call in watcher.calls() if call.startswith("Offences.")]) == 2


def test_a_reorganisation_that_drops_a_batch(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    answers = [node.answer()]
    batch = node.commit(*answers)  # its block and two more
    watcher.step()
    depth = world.chain.block_number() - batch.block_number + 1
    world.chain.request("devnet_reorg", depth, True)
    watcher.tower.step()
    row = watcher.store.batch(batch.id)
    assert row is None or row.status == "removed"
    # The node commits to something else under the same id.
    node.outbox.step()
    world.mine(1)
    node.outbox.step()
    current = world.network.log.find(world.network.log.batch_count(), batch.block_number)
    assert current is not None
    node.answers[current[0].id] = answers
    world.mine(2)
    rounds(watcher, lambda: state_of(watcher, current[0]) is BatchState.DONE)
    row = watcher.store.batch(current[0].id)
    assert row is not None and row.batch == current[0] != batch
    assert watcher.audit(current[0]).verdict == Verdict.HONEST


def test_a_reorganisation_of_three_blocks_under_a_challenge(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    node.hidden = True
    batch = node.commit(node.answer(), node.answer(6), node.answer(7))
    rounds(watcher, lambda: any(c.state == "open" for c in watcher.store.challenges(batch.id)))
    world.chain.request("devnet_reorg", 3, False)
    watcher.tower.step()
    assert watcher.store.bonds_standing() <= 10 * BOND
    rounds(watcher, lambda: any(c.state == "open" for c in watcher.store.challenges(batch.id)))
    world.mine(1, 25)
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED)
    rounds(watcher, lambda: settled(world, watcher) and watcher.balance() > before)
    assert watcher.balance() == before + reward_of(world, batch)
    rounds(watcher, lambda: state_of(watcher, batch) is BatchState.DONE)


def test_a_reorganisation_that_changes_the_beacon_draws_again(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path)
    batch = node.commit(*(node.answer() for _ in range(8)))
    watcher.step()
    drawn = watcher.store.batch(batch.id)
    assert drawn is not None and drawn.beacon is not None
    world.chain.request("devnet_reorg", world.chain.block_number() - batch.block_number, False)
    world.mine(3)
    rounds(watcher, lambda: state_of(watcher, batch) is BatchState.DONE)
    again = watcher.store.batch(batch.id)
    beacon = world.chain.block(batch.block_number + 2).mix_hash
    assert again is not None and again.beacon == beacon


def test_the_chain_goes_away_and_comes_back(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    batch = node.commit(node.answer())

    def away(*_: Any) -> Any:
        raise Unavailable("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watcher.chain.w3.provider, "_post", away)
        with pytest.raises(Unavailable):
            watcher.tower.step()
    rounds(watcher, lambda: state_of(watcher, batch) is BatchState.DONE)
    assert watcher.audit(batch).verdict == Verdict.HONEST


def counted(watcher: Watcher, name: str, limit: int = 40) -> None:
    """Rounds until one counts `name`: what is put off comes up again after seconds of chain time, which may stand still
    for a few blocks that came faster than the clock."""
    for _ in range(limit):
        if watcher.step().counts.get(name):
            return
    raise AssertionError(f"no {name} within {limit} rounds")


BROKEN = ("down", "error", "text", "nesting", "no rows", "short", "positive", "not a number", "names", "drip")


def test_an_engine_that_fails_blames_nobody_and_loses_nothing(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    """Whatever the re-executing server does: no verdict, no challenge, and the audit is done when it is back."""
    engine = ScriptedEngine()
    with serving(engine.app) as url:
        watcher = world.watcher(tmp_path, source=EngineSource("http://127.0.0.1:1", timeout=1))
        batch = node.commit(node.answer())
        for broken in BROKEN:
            engine.broken = broken
            counted(watcher, "not_executed")
            audit = watcher.audit(batch)
            assert (audit.state, audit.verdict, audit.attempts) == (AuditState.FETCH, None, 0), broken
            watcher.source = EngineSource(url, timeout=1)
            watcher.restart()
        assert watcher.store.challenges() == [] and watcher.filings() == [] and watcher.calls() == []
        # What needs no re-execution goes on meanwhile.
        malformed = spoilt(world.add_node(f"node{next(NUMBERS)}"), "early_end")
        engine.broken = "error"
        rounds(watcher, lambda: world.status(malformed) is BatchStatus.CONVICTED)
        assert watcher.audit(batch).state is AuditState.FETCH
        engine.broken = None
        rounds(watcher, lambda: watcher.audit(batch).state is AuditState.DONE)
    assert watcher.audit(batch).verdict == Verdict.HONEST
    assert world.status(batch) is BatchStatus.PENDING


def test_what_was_not_re_executed_in_time_is_reported(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path, source=EngineSource("http://127.0.0.1:1", timeout=1))
    batch = node.commit(node.answer())
    assert watcher.step().counts["not_executed"] == 1
    world.mine(1, 200)
    world.send(world.network.log.finalize([batch]))
    assert watcher.step().counts["missed"] == 1
    assert watcher.audit(batch).verdict == "missed"
    assert state_of(watcher, batch) is BatchState.DONE and watcher.filings() == []


def test_a_batch_that_is_not_confirmed_is_not_acted_on(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """A batch leaves the chain before it is confirmed, and comes back in another block: only that one counts."""
    watcher = world.watcher(tmp_path, confirmations=6)
    before = watcher.balance()
    node.hidden = True
    answers = [node.answer()]
    batch = node.commit(*answers)  # its block and two more
    watcher.step()
    assert watcher.store.batch(batch.id) is None
    world.chain.request("devnet_reorg", world.chain.block_number() - batch.block_number + 1, True)
    watcher.step()
    assert watcher.store.batch(batch.id) is None
    node.outbox.step()
    world.mine(1)
    node.outbox.step()
    found = world.network.log.find(world.network.log.batch_count(), batch.block_number)
    assert found is not None and found[0] != batch
    current = found[0]
    node.answers[current.id] = answers
    while world.chain.block_number() < current.block_number + 6:
        assert watcher.store.batches() == [] and watcher.calls() == []
        watcher.step()
    rounds(watcher, lambda: any(c.state == "open" for c in watcher.store.challenges(current.id)))
    row = watcher.store.batch(current.id)
    assert row is not None and row.batch == current
    world.mine(1, 25)
    rounds(watcher, lambda: world.status(current) is BatchStatus.CONVICTED)
    rounds(watcher, lambda: settled(world, watcher) and watcher.balance() > before)
    assert watcher.balance() == before + reward_of(world, current)


@pytest.mark.timeout(120)
def test_a_tarpit_withholds(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """An answer that drips for ever is none: it costs a bounded time, and ends as any transcript that is not served."""
    watcher = world.watcher(tmp_path, node_timeout=1)
    node.tarpit = True
    batch = node.commit(node.answer())
    for _ in range(6):
        started = time.monotonic()
        watcher.step()
        assert time.monotonic() - started < 30
        if any(c.state == "open" for c in watcher.store.challenges(batch.id)):
            break
    assert watcher.challenge(batch).state == "open"
    world.mine(1, 25)
    rounds(watcher, lambda: world.status(batch) is BatchStatus.CONVICTED and watcher.audit(batch).verdict)
    assert watcher.audit(batch).verdict == "withheld"


@pytest.mark.timeout(120)
def test_a_slow_node_does_not_hold_up_another(world: WatchWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """The slow node's batches come first and are many; the other's is audited in the same round."""
    watcher = world.watcher(tmp_path, node_timeout=1, attempts=3)
    slow = world.add_node(f"node{next(NUMBERS)}")
    slow.tarpit = True
    late = [slow.commit(*(slow.answer() for _ in range(3))) for _ in range(4)]
    batch = node.commit(node.answer())
    started = time.monotonic()
    watcher.step()
    # Asked one after the other, the slow node's four batches would take longer than the other's one round.
    assert time.monotonic() - started < 15
    assert watcher.audit(batch).verdict == Verdict.HONEST
    assert all(state_of(watcher, other) is BatchState.NEW for other in late)
    slow.tarpit = False
    rounds(watcher, lambda: all(state_of(watcher, other) is BatchState.DONE for other in late))
    assert {a.verdict for other in late for a in watcher.store.audits(batch_id=other.id)} == {Verdict.HONEST}
    assert watcher.calls() == []


def test_two_watchtowers_race_and_both_get_their_bonds_back(
    world: WatchWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watchers = [world.watcher(tmp_path / name) for name in ("one", "two")]
    before = [watcher.balance() for watcher in watchers]
    malformed = spoilt(world.add_node(f"node{next(NUMBERS)}"), "fee")
    node.hidden = True
    batch = node.commit(node.answer())
    for _ in range(5):
        for watcher in watchers:
            watcher.tower.step()
        world.mine(1, 3)
    world.mine(1, 25)
    for _ in range(5):
        for watcher in watchers:
            watcher.tower.step()
        world.mine(1, 1)
    assert world.status(batch) is BatchStatus.CONVICTED
    assert world.status(malformed) is BatchStatus.CONVICTED
    assert all(settled(world, watcher) for watcher in watchers)
    gained = [watcher.balance() - start for watcher, start in zip(watchers, before, strict=True)]
    assert min(gained) >= 0
    assert sum(gained) == reward_of(world, batch) + reward_of(world, malformed)
    states = [f.state for watcher in watchers for f in watcher.filings(malformed)]
    assert states.count(FilingState.DONE) == 1 and set(states) <= {FilingState.DONE, FilingState.MOOT}
    assert [watcher.audit(batch).verdict for watcher in watchers] == ["withheld", "withheld"]
