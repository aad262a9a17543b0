"""A node that refuses over HTTP and answers on chain, against the real contracts: what it takes, and what is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from poip_chain.proof.store import NOTE, AuditState
from poip_chain.spec.objects import Batch
from tests.integration.watch_world import POIP, ScriptedNode, Watcher, WatchWorld, running_watch_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BOND = POIP
DAY = 86_400


@pytest.fixture(scope="module")
def module_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchWorld]:
    with running_watch_world(tmp_path_factory.mktemp("budget")) as world:
        yield world


@pytest.fixture
def world(module_world: WatchWorld) -> Iterator[WatchWorld]:
    yield module_world
    module_world.close_watchers()


def answered(world: WatchWorld, watcher: Watcher, node: ScriptedNode, batches: list[Batch], limit: int) -> int:
    """Rounds in which the node answers all that is asked, until it is asked nothing more; how often it was told so."""
    told = 0
    for _ in range(limit):
        report = watcher.tower.step()
        told += report.counts.get("over_loss_budget", 0)
        for batch in batches:
            for challenge in watcher.store.challenges(batch.id, standing=True):
                if challenge.state == "open" and challenge.challenge_id is not None:
                    node.answer_challenge(challenge.challenge_id, batch)
        world.mine(1, 2)
        if told >= 3 and watcher.store.bonds_standing() == 0:
            break
    return told


def test_answers_take_no_more_than_the_loss_budget_and_what_is_not_asked_is_told(
    world: WatchWorld, tmp_path: Path
) -> None:
    node = world.add_node("taker")
    watcher = world.watcher(tmp_path, budget=4 * BOND)  # so a loss budget of one bond: four answers
    before = watcher.balance()
    node.silent = True
    # The one with most at stake last: it comes first all the same.
    batches = [node.commit(node.answer()), node.commit(node.answer()), node.commit(node.answer(40))]
    assert answered(world, watcher, node, batches, 30) >= 3
    watcher.restart()
    assert answered(world, watcher, node, batches, 4) >= 1
    challenges = [c for batch in batches for c in watcher.store.challenges(batch.id)]
    assert [c.state for c in challenges] == ["answered"] * 4
    assert watcher.store.challenges(batches[2].id)
    assert watcher.store.losses_by_node() == {node.address: BOND}
    for _ in range(3):
        watcher.step()
    assert watcher.balance() == before - BOND  # what the contract took, to the last wei

    open_audits = [a for batch in batches for a in watcher.store.audits(AuditState.FETCH, batch.id)]
    assert open_audits
    assert {a.detail[NOTE] for a in open_audits} == {f"not challenged: loss budget of node {node.address} used"}
    world.mine(1, 200)
    world.send(world.network.log.finalize(batches))
    assert watcher.step().counts["verdict_not_challenged"] == len(open_audits)
    assert {watcher.audit(batch).verdict for batch in batches} >= {"not_challenged"}

    # A day later its answers count no more.
    world.mine(1, DAY + 600)
    later = node.commit(node.answer())
    for _ in range(6):
        watcher.step()
        if watcher.store.challenges(later.id):
            break
    assert watcher.store.challenges(later.id)
    assert NOTE not in watcher.audit(later).detail
