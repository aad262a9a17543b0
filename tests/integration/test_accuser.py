"""The watchtower as an accuser: from the verdict to the conviction, against contests, kills, reorganisations and others.

Real contracts with real scoring, a small model with all of canonical execution; see accuse_world.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call
from poip_chain.cli.local.liar import Liar, lying_traces
from poip_chain.economic.clients.court import AccusationStatus, ContestOutcome
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import ConfigurationError
from poip_chain.proof import canonical
from poip_chain.proof.accusations import AccusationRow, AccusationState, Ending
from poip_chain.proof.audit import Finding
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.settings import Mode
from poip_chain.proof.store import FilingState, open_store
from poip_chain.service.court import traces
from poip_chain.service.court.lies import Lie, LyingTraces
from poip_chain.service.court.view import Accused, CourtView
from poip_chain.spec.objects import Batch
from poip_chain.spec.scores import Verdict
from poip_chain.spec.trace import Op
from tests.engines.node_kit import key_of
from tests.integration.accuse_world import WINDOWS, AccuseWorld, Fuse, running_accuse_world
from tests.integration.watch_world import POIP, Answer, FixedSource, ScriptedNode, Watcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BOND, CONTEST_BOND = 10 * POIP, 5 * POIP
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def module_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccuseWorld]:
    with running_accuse_world(tmp_path_factory.mktemp("accuse")) as world:
        yield world


@pytest.fixture
def world(module_world: AccuseWorld) -> Iterator[AccuseWorld]:
    yield module_world
    module_world.world.close_watchers()


@pytest.fixture
def node(world: AccuseWorld) -> ScriptedNode:
    return world.world.add_node(f"node{next(NUMBERS)}")


def court(watcher: Watcher) -> dict[str, int]:
    """One round of the court; a block after it."""
    assert watcher.court is not None
    counts = watcher.court.step().counts
    watcher.world.mine(1, 1)
    return counts


def rounds(watcher: Watcher, until: Callable[[], Any], *others: Callable[[], object], seconds: float = 150) -> None:
    """Rounds of the court, and of others, until something holds."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise AssertionError(f"not in time: {watcher.store.accusations()} {watcher.calls()}")
        court(watcher)
        for other in others:
            other()


def convicted_by(watcher: Watcher, batch: Batch, *others: Callable[[], object]) -> None:
    """From a verdict of fraud to the end, the contest window included."""
    rounds(watcher, lambda: accused(watcher, batch) is not None, *others)
    rounds(watcher, lambda: CourtView(watcher.world.network).info(id_of(watcher, batch)).open_contests == 0, *others)
    end_window(watcher, batch)
    rounds(watcher, lambda: row_of(watcher, batch).state is AccusationState.ENDED, *others)


def row_of(watcher: Watcher, batch: Batch) -> AccusationRow:
    (row,) = watcher.store.accusations(batch_id=batch.id)
    return row


def id_of(watcher: Watcher, batch: Batch) -> int:
    accusation = row_of(watcher, batch).accusation
    assert accusation is not None
    return accusation


def accused(watcher: Watcher, batch: Batch) -> Accused | None:
    """The accusation as it was revealed."""
    rows = watcher.store.accusations(batch_id=batch.id)
    if not rows or rows[0].accusation is None:
        return None
    return CourtView(watcher.world.network).accused(rows[0].accusation)


def end_window(watcher: Watcher, batch: Batch) -> None:
    known = accused(watcher, batch)
    assert known is not None
    now = watcher.world.chain.timestamp()
    watcher.world.mine(1, max(1, known.terms.contest_end + 1 - now))


def false_batch(world: AccuseWorld, node: ScriptedNode, watcher: Watcher, *answers: Answer) -> Batch:
    """A batch of a degraded model, audited: its verdict is fraud."""
    batch = node.commit(*(answers or (world.answer(node, cheat=True),)))
    watcher.step()
    assert {audit.verdict for audit in watcher.store.audits(batch_id=batch.id)} == {Verdict.FRAUD}
    return batch


def settled(watcher: Watcher) -> bool:
    account = watcher.key.address
    network = watcher.world.network
    return network.accusations.claimable(account) == 0 and network.registry.rewards(account) == 0


def sent(watcher: Watcher, prefix: str = "") -> list[str]:
    return [call for call in watcher.calls() if call.startswith(prefix)]


def test_a_degraded_model_is_convicted(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """Uncontested: commit, accuse, resolve; the bond comes back with the reward, and nothing stands any more."""
    watcher = world.watcher(tmp_path)
    before = watcher.balance()
    dear, cheap = world.answer(node, True, tokens=20), world.answer(node, True, tokens=8)
    batch = false_batch(world, node, watcher, dear, cheap)
    assert watcher.store.bonds_standing() == 0
    court(watcher)
    assert watcher.store.bonds_standing() == BOND
    convicted_by(watcher, batch)
    assert world.world.status(batch) is BatchStatus.CONVICTED
    row = row_of(watcher, batch)
    # The beacon may have drawn one of the two twice.
    cheapest = max(audit.position for audit in watcher.store.audits(batch_id=batch.id))
    assert (row.reason, row.position) == (Ending.CONVICTED, cheapest), "the cheapest audited receipt is accused"
    rounds(watcher, lambda: settled(watcher), watcher.tower.step)
    (event,) = world.world.convictions(batch)
    assert event["beneficiary"] == watcher.key.address
    assert watcher.balance() == before + event["paid"] and event["paid"] > 0
    assert watcher.store.bonds_standing() == 0
    for call in ("commit", "accuse", "resolve", "claim"):
        assert sent(watcher).count(f"Accusations.{call}") == 1
    assert [f.state for f in watcher.filings(batch) if f.detail["position"] == cheapest] == [FilingState.DONE]
    # The other receipt of the batch is not accused as well.
    for _ in range(3):
        assert "accusing" not in court(watcher)


def test_contested_to_the_last_step_and_killed_at_every_write(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    """A stubborn contester descends into an attention cell; the accuser dies after each of its writes. Nothing is sent
    twice, the contester's own step defeats it, and half of its bond is the accuser's."""
    watcher = world.watcher(tmp_path)
    answer = world.answer(node, cheat=True)
    batch = false_batch(world, node, watcher, answer)
    before = watcher.balance()
    fuse = Fuse(watcher)
    contester = world.contester(f"stubborn{next(NUMBERS)}", answer, Lie(Op.ATTENTION, 1, 9, 3))
    view = CourtView(world.network)

    def until(condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < end, f"{watcher.store.accusations()} {watcher.calls()}"
            fuse.court_step()
            world.world.mine(1, 1)
            contester.step()

    until(lambda: accused(watcher, batch))
    until(lambda: view.record(id_of(watcher, batch)).contests)
    until(lambda: all(c.ended for c in view.record(id_of(watcher, batch)).contests))
    (contest,) = view.record(id_of(watcher, batch)).contests
    assert contest.ended is not None and (contest.ended.outcome, contest.ended.by) == (ContestOutcome.LOST, 1)
    end_window(watcher, batch)
    until(lambda: row_of(watcher, batch).state is AccusationState.ENDED)
    assert fuse.kills >= len(sent(watcher))
    assert world.world.status(batch) is BatchStatus.CONVICTED
    until(lambda: world.network.accusations.claimable(watcher.key.address) == 0)
    assert watcher.balance() == before + CONTEST_BOND // 2
    for call in ("Accusations.commit", "Accusations.accuse", "Accusations.resolve"):
        assert sent(watcher).count(call) == 1
    record = view.record(id_of(watcher, batch))
    assert len(sent(watcher, "Contests.")) == len(record.reveals) == 3


def test_a_contested_point_is_shown(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    answer = world.answer(node, cheat=True)
    batch = false_batch(world, node, watcher, answer)
    rounds(watcher, lambda: accused(watcher, batch))
    known = accused(watcher, batch)
    assert known is not None
    operator, contests = world.world.operator, world.network.contests
    world.world.send(world.network.token.approve(world.network.accusations.address, 10**24))
    for _ in range(2):  # two at once: one showing answers both, the other is settled
        world.world.send(contests.contest_point(known.id, known.terms, False, 0))
    view = CourtView(world.network)
    rounds(watcher, lambda: all(c.ended for c in view.contests(known.id)))
    assert [c.ended.outcome for c in view.contests(known.id) if c.ended] == [ContestOutcome.LOST] * 2
    assert {c.contester for c in view.contests(known.id)} == {operator.address}
    assert sent(watcher).count("Contests.show_point") == 1
    convicted_by(watcher, batch)
    assert row_of(watcher, batch).reason == Ending.CONVICTED


def test_others_that_stand_in_the_way_are_moved(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """Earlier: a commitment that is never revealed, and an accusation that its accuser forgets to resolve."""
    first = world.watcher(tmp_path / "first")
    second = world.watcher(tmp_path / "second")
    batch = false_batch(world, node, first)
    second.step()
    world.world.send(world.network.token.approve(world.network.accusations.address, 10**24))
    world.world.send(world.network.accusations.commit(batch, b"\x01" * 32))
    rounds(first, lambda: accused(first, batch))
    before = second.balance()
    rounds(second, lambda: accused(second, batch))
    assert id_of(second, batch) & 0xFFFF == 2
    end_window(second, batch)
    rounds(second, lambda: row_of(second, batch).state is AccusationState.ENDED)
    assert world.world.status(batch) is BatchStatus.CONVICTED
    assert row_of(second, batch).reason == Ending.STOOD, "who committed first is rewarded"
    (event,) = world.world.convictions(batch)
    assert event["beneficiary"] == first.key.address
    assert sent(second).count("Accusations.expire") == 1 and sent(second).count("Accusations.resolve") == 2
    rounds(second, lambda: settled(second))
    assert second.balance() == before
    rounds(first, lambda: row_of(first, batch).state is AccusationState.ENDED)
    assert row_of(first, batch).reason == Ending.CONVICTED and sent(first).count("Accusations.resolve") == 0


@contextlib.contextmanager
def liar_of(world: AccuseWorld, folder: Path, evidence: Evidence, plays: bool) -> Iterator[Liar]:
    """The demo's liar, with coins and tokens of its own."""
    key = key_of(f"liar {folder}")
    world.world.chain.request("anvil_setBalance", key.address, hex(10**21))
    world.world.send(world.network.token.transfer(key.address, BOND))
    with Outbox(world.world.chain, key, folder / "liar" / "outbox.db") as outbox, open_store(folder / "liar") as store:
        yield Liar(world.network, outbox, store, lying_traces(world.directory), evidence, plays)


@pytest.mark.parametrize("plays", [True, False], ids=["plays on", "silent"])
def test_a_liar_loses_its_bond_to_a_third_party(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path, plays: bool
) -> None:
    """The watchtower holds the transcript, knows the answer to be honest, and wins half of the liar's bond."""
    defender = world.watcher(tmp_path / "defender", defence_budget=CONTEST_BOND)
    batch = node.commit(world.answer(node))
    defender.step()
    assert defender.audit(batch).verdict == Verdict.HONEST
    before, view, network = defender.balance(), CourtView(world.network), world.network
    evidence = Evidence.read(Path(defender.audit(batch).evidence or ""))
    with liar_of(world, tmp_path, evidence, plays) as liar:

        def lied() -> int | None:
            liar.step()
            row = liar.row()
            return None if row is None or row.accusation is None else row.accusation

        rounds(defender, lambda: (known := lied()) is not None and view.info(known).open_contests == 1)
        accusation = lied()
        assert accusation is not None
        if not plays:
            world.pass_time(world.world.chain.timestamp() + WINDOWS["dispute_clock"])
        rounds(defender, liar.step)
        (contest,) = view.contests(accusation)
        assert contest.ended is not None and contest.ended.outcome is ContestOutcome.WON
        assert contest.ended.by == (1 if plays else 2)
        assert view.info(accusation).status is AccusationStatus.LOST
        row = liar.row()
        assert row is not None and (not plays or row.reason == Ending.LOST_BY_STEP)
        assert network.token.balance(row.claim.accuser if row.claim else "") == 0
    rounds(defender, lambda: settled(defender) and defender.balance() > before)
    assert defender.balance() == before + BOND // 2
    assert world.world.status(batch) is BatchStatus.PENDING


def test_who_is_contradicted_by_the_referee_files_nothing_for_a_while(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its canonical engine computes a wrong trace of an answer that is false all the same: the bond is lost by a step."""
    monkeypatch.setattr(canonical, "Traces", lambda directory, threads: LyingTraces(directory, threads=threads))
    watcher = world.watcher(tmp_path)
    answer = world.answer(node, cheat=True)
    batch = false_batch(world, node, watcher, answer)
    contester = world.contester(f"honest{next(NUMBERS)}", answer, None)
    rounds(watcher, lambda: accused(watcher, batch))
    rounds(watcher, lambda: row_of(watcher, batch).state is AccusationState.ENDED, contester.step)
    assert row_of(watcher, batch).reason == Ending.LOST_BY_STEP
    assert CourtView(world.network).info(id_of(watcher, batch)).status is AccusationStatus.LOST
    other = false_batch(world, world.world.add_node(f"node{next(NUMBERS)}"), watcher)
    assert "accusing" not in court(watcher)
    assert "contradicted" in row_of(watcher, other).reason
    assert world.world.status(batch) is BatchStatus.PENDING


def test_what_the_canonical_engine_does_not_confirm_is_not_accused(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path)
    watcher.source = FixedSource(cheated=True)
    watcher.restart()
    batch = node.commit(world.answer(node))
    watcher.step()
    assert watcher.audit(batch).verdict == Verdict.FRAUD
    assert court(watcher)["not_confirmed"] == 1
    row = row_of(watcher, batch)
    assert row.state is AccusationState.REFUSED and "does not confirm" in row.reason
    assert court(watcher) == {} and watcher.calls() == []
    assert watcher.audit(batch).verdict == Verdict.FRAUD, "the verdict stays"


def test_an_engine_that_computes_wrong_bits_files_nothing(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigurationError("this machine's canonical engine computes wrong bits: refused.")

    watcher = world.watcher(tmp_path)
    batch = false_batch(world, node, watcher)
    monkeypatch.setattr(traces, "open_model", refused)
    assert court(watcher)["accusation_trouble"] == 1
    assert "wrong bits" in row_of(watcher, batch).reason and watcher.calls() == []
    assert court(watcher) == {}, "it is tried again after a pause"
    monkeypatch.undo()
    rounds(watcher, lambda: accused(watcher, batch))


def test_the_bond_budget_holds_one_accusation_after_the_other(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path, budget=2 * BOND - 1)
    first = false_batch(world, node, watcher)
    second = false_batch(world, world.world.add_node(f"node{next(NUMBERS)}"), watcher)
    before, most = watcher.balance(), 0

    def spent() -> None:
        nonlocal most
        most = max(most, before - watcher.balance(), watcher.store.bonds_standing())

    rounds(watcher, lambda: accused(watcher, first), spent)
    rounds(watcher, lambda: watcher.store.accusations(batch_id=second.id), spent)
    assert row_of(watcher, second).state is AccusationState.WAITING
    assert "bond budget" in row_of(watcher, second).reason
    end_window(watcher, first)
    rounds(watcher, lambda: row_of(watcher, first).state is AccusationState.ENDED, spent)
    rounds(watcher, lambda: row_of(watcher, second).state is AccusationState.STANDING, spent)
    assert most == BOND


@pytest.mark.parametrize("limit", ["time", "budget", "tokens"])
def test_nothing_is_committed_that_cannot_be_kept(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path, limit: str
) -> None:
    watcher = world.watcher(tmp_path, budget=BOND - 1 if limit == "budget" else 100 * POIP)
    batch = false_batch(world, node, watcher)
    if limit == "time":
        world.pass_time(batch.window_end - 40)
    if limit == "tokens":
        assert watcher.outbox is not None
        watcher.outbox.execute(world.network.token.transfer(world.world.operator.address, watcher.balance()), "x", 30)
    for _ in range(3):
        court(watcher)
    row = row_of(watcher, batch)
    assert row.state is AccusationState.WAITING
    assert {"time": "left of the batch's window", "budget": "bond budget", "tokens": "needs a bond"}[
        limit
    ] in row.reason
    assert sent(watcher, "Accusations.") == [] and watcher.store.bonds_standing() == 0


def test_modes_that_send_nothing(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watching = world.watcher(tmp_path / "watch", Mode.WATCH)
    proposing = world.watcher(tmp_path / "propose", Mode.PROPOSE)
    batch = false_batch(world, node, watching)
    proposing.step()
    assert court(watching)["accusable"] == 1 and "accusable" not in court(watching)
    row = row_of(watching, batch)
    assert row.state is AccusationState.REPORTED and row.detail["points"] >= 1
    # A person sends what is proposed; the watchtower goes on from what the chain shows.
    key = proposing.key
    world.world.chain.request("anvil_setBalance", key.address, hex(10**21))
    world.world.send(world.network.token.transfer(key.address, 100 * POIP))
    done: set[str] = set()
    with Outbox(world.world.chain, key, tmp_path / "person.db") as outbox:

        def send_proposals() -> None:
            for path in sorted((tmp_path / "propose" / "proposals").glob("*.json")):
                if path.name not in done:
                    done.add(path.name)
                    document = json.loads(path.read_text())
                    call = Call(document["to"], bytes.fromhex(document["data"][2:]), document["description"])
                    outbox.execute(call, path.name, 30)

        convicted_by(proposing, batch, send_proposals)
        rounds(proposing, lambda: world.network.accusations.claimable(key.address) == 0, send_proposals)
    assert row_of(proposing, batch).reason == Ending.CONVICTED
    assert world.network.token.balance(key.address) == 100 * POIP
    assert proposing.store.bonds_standing() == 0


def test_a_reorganisation_drops_the_commitment(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """The commitment and the reveal leave the chain and come back under another number; the batch stays."""
    watcher = world.watcher(tmp_path)
    batch = false_batch(world, node, watcher)
    assert watcher.court is not None
    rounds(watcher, lambda: sent(watcher, "PoipToken.approve"))
    start = world.world.chain.block_number()
    for _ in range(3):  # each transaction is a block
        watcher.court.step()
    assert accused(watcher, batch) is not None
    depth = world.world.chain.block_number() - start
    assert depth == 2, "no deeper than what is believed to be final"
    world.world.chain.request("devnet_reorg", depth, True)
    world.world.send(world.network.token.approve(world.network.accusations.address, 10**24))
    world.world.send(world.network.accusations.commit(batch, b"\x02" * 32))
    rounds(watcher, lambda: (known := accused(watcher, batch)) is not None and known.id & 0xFFFF == 1)
    assert watcher.store.bonds_standing() == BOND
    end_window(watcher, batch)
    rounds(watcher, lambda: row_of(watcher, batch).state is AccusationState.ENDED)
    assert row_of(watcher, batch).reason == Ending.CONVICTED
    assert world.world.status(batch) is BatchStatus.CONVICTED


def test_a_reorganisation_drops_the_batch(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    """The claim of the batch that is gone ends; the batch that takes its place is accused anew."""
    watcher = world.watcher(tmp_path)
    answer = world.answer(node, cheat=True)
    batch = false_batch(world, node, watcher, answer)
    court(watcher)
    assert row_of(watcher, batch).state is AccusationState.STANDING
    depth = world.world.chain.block_number() - batch.block_number + 1
    world.world.chain.request("devnet_reorg", depth, True)
    world.world.mine(1, 5)
    watcher.tower.step()
    node.outbox.step()
    world.world.mine(1)
    node.outbox.step()
    found = world.network.log.find(world.network.log.batch_count(), batch.block_number)
    assert found is not None
    current = found[0]
    assert current.id == batch.id and current != batch
    node.answers[current.id] = [answer]
    world.world.mine(2)

    def ended(ending: Ending) -> list[AccusationRow]:
        return [row for row in watcher.store.accusations(batch_id=batch.id) if row.reason == ending]

    rounds(watcher, lambda: ended(Ending.DROPPED), watcher.tower.step)
    rounds(watcher, lambda: watcher.store.accusations(AccusationState.STANDING, batch.id), watcher.tower.step)
    (row,) = watcher.store.accusations(AccusationState.STANDING, batch.id)
    assert row.claim is not None and row.claim.batch == current and row.attempt == 1

    def revealed() -> Any:
        (row,) = watcher.store.accusations(AccusationState.STANDING, batch.id)
        return row.accusation is not None and CourtView(world.network).accused(row.accusation)

    rounds(watcher, revealed)
    end_of = revealed().terms.contest_end
    world.pass_time(end_of)
    rounds(watcher, lambda: ended(Ending.CONVICTED))
    assert watcher.store.bonds_standing() == 0


def test_what_is_not_revealed_in_time_is_expired_and_tried_once_more(
    world: AccuseWorld, node: ScriptedNode, tmp_path: Path
) -> None:
    watcher = world.watcher(tmp_path)
    batch = false_batch(world, node, watcher)
    rounds(
        watcher,
        lambda: watcher.store.accusations() and row_of(watcher, batch).claim and sent(watcher, "Accusations.commit"),
    )
    world.world.mine(1, WINDOWS["reveal_window"] + 1)
    rounds(watcher, lambda: watcher.store.accusations()[0].reason == Ending.EXPIRED)
    assert sent(watcher).count("Accusations.expire") == 1
    rounds(watcher, lambda: len(watcher.store.accusations(batch_id=batch.id)) == 2)
    second = watcher.store.accusations(AccusationState.STANDING, batch.id)[0]
    assert second.attempt == 1


def test_findings_of_other_kinds_are_left_alone(world: AccuseWorld, node: ScriptedNode, tmp_path: Path) -> None:
    watcher = world.watcher(tmp_path)
    batch = node.commit(world.answer(node))
    watcher.step()
    watcher.store.add_filing("k", batch.id, "other", FilingState.EVIDENCE, {}, Finding("k", "other", None, {}).call)
    assert court(watcher) == {} and watcher.store.accusations() == []
