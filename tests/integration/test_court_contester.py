"""False accusations are contested to the last step: by the node itself, and by anybody who knows the answer.

A real node process on a devnet with all contracts; see court_world.py for what is scripted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from poip_chain.chain.outbox import Outbox
from poip_chain.cli.main import cli
from poip_chain.economic.clients.court import AccusationStatus, ContestOutcome
from poip_chain.economic.types import BatchStatus
from poip_chain.service.court.contester import Contester
from poip_chain.service.court.lies import Lie
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.traces import Traces
from poip_chain.spec.trace import Op
from tests.engines.node_kit import key_of
from tests.integration.court_world import (
    POIP,
    Accuser,
    Answered,
    CourtWorld,
    Known,
    WatchtowerProcess,
    running_court_world,
)
from tests.integration.node_world import NodeProcess, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GATE = Lie(Op.GATE, 1, 10, 5)
BOND = 10 * POIP
CONTEST_BOND = 5 * POIP


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CourtWorld]:
    with running_court_world(tmp_path_factory.mktemp("court")) as made:
        yield made


@pytest.fixture(scope="module")
def node(world: CourtWorld) -> Iterator[NodeProcess]:
    made = world.node("node")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def answered(world: CourtWorld, node: NodeProcess) -> Iterator[Answered]:
    world.world.interval(0)
    if node.ended():
        node.start()
    yield world.ask(node)


def play(world: CourtWorld, accuser: Accuser, *steps: Callable[[], object]) -> AccusationStatus:
    """Both sides move until the accusation is over; how it ended. `steps`: rounds of programs that run in this process."""

    def over() -> bool:
        for step in steps:
            step()
        accuser.respond()
        return world.view.info(accuser.id).is_over

    wait_until(over, 200, lambda: f"the accusation ends; {world.view.contests(accuser.id)}")
    return world.view.info(accuser.id).status


def command(world: CourtWorld, *arguments: str) -> Any:
    """The result of a `poip` command as JSON."""
    shared = ["--json", "--rpc", world.world.rpc_url, "--deployment", str(world.world.deployment_path)]
    result = CliRunner().invoke(cli, ["case", *arguments, *shared, "--data", str(world.folder)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


def test_a_node_that_contests_what_is_right_is_convicted(world: CourtWorld) -> None:
    """Watchtower against cheat, both as processes, on interval blocks: the node contests with a false trace to the last
    step, which shows it wrong. The watchtower is killed after its commitment and in mid-game, and accuses once. Comes before
    the others: a watchtower looks after every batch that there is."""
    cheat = world.node("cheat", misbehave="contest")
    cheat.start()
    answered = world.ask(cheat)
    watchtower = WatchtowerProcess(world, "watchtower", BOND)
    token, accusations, view = world.network.token, world.network.accusations, world.view

    def kept() -> tuple[int, int]:
        return token.balance(accusations.address), int(accusations.read("to_burn"))

    before = kept()
    world.world.interval(0.3)
    watchtower.start()
    for move in ("Accusations.commit", "Contests.reveal"):
        watchtower.wait_for(move)
        watchtower.kill()
        watchtower.start()
    accusation = answered.batch.id << 32

    def state() -> str:
        return f"{view.record(accusation).contests}; {cheat.log()[-1500:]}; {watchtower.log()[-1500:]}"

    wait_until(lambda: any(c.ended for c in view.contests(accusation)), 200, lambda: f"the contest ends; {state()}")
    (contest,) = view.contests(accusation)
    assert (contest.contester, contest.free) == (cheat.address, True)
    assert contest.ended is not None and (contest.ended.outcome, contest.ended.by) == (ContestOutcome.LOST, 1)
    replayed = command(world, "replay", f"{answered.batch.id}-0", "--contest", "0", "--model", str(world.model))
    assert replayed["right"] == "the accuser" and replayed["recomputed"] == replayed["accuser_states"]
    known = view.accused(accusation)
    assert known is not None and known.accuser == watchtower.key.address
    world.pass_time(known.terms.contest_end)
    wait_until(lambda: world.status(answered.batch) is BatchStatus.CONVICTED, 150, lambda: f"it resolves; {state()}")
    wait_until(lambda: token.balance(watchtower.key.address) > 100 * POIP, 150, lambda: f"it is paid; {state()}")
    wait_until(lambda: view.credit(watchtower.key.address) == 0, 150, lambda: f"its bond comes back; {state()}")
    watchtower.kill()
    cheat.kill()
    world.world.interval(0)
    sent = watchtower.sent()
    assert [sent.count(f"Accusations.{call}") for call in ("commit", "accuse", "resolve")] == [1, 1, 1]
    assert accusations.count(answered.batch.id) == 1
    assert kept() == before, "all that moved beside fees is the node's stake"


def test_the_node_contests_for_itself(world: CourtWorld, node: NodeProcess, answered: Answered) -> None:
    """Without a bond, to the step; half of the accuser's bond is paid to the node's key. Then the case is read back."""
    before = world.network.token.balance(node.address)
    accuser = world.accuser("liar", answered, GATE)
    accuser.accuse()
    assert play(world, accuser) is AccusationStatus.LOST
    (contest,) = world.view.contests(accuser.id)
    assert contest.ended is not None and contest.ended.outcome is ContestOutcome.WON and contest.ended.by == 1
    assert contest.free and contest.contester == node.address
    paid = before + BOND // 2
    wait_until(lambda: world.network.token.balance(node.address) == paid, 120, "the node claims its share")
    assert world.status(answered.batch) is BatchStatus.PENDING

    name = f"{answered.batch.id}-0"
    (listed,) = [case for case in command(world, "list")["cases"] if case["id"] == name]
    assert listed["status"] == "lost" and listed["contests"] == 1 and listed["bonds"] == "0"
    assert command(world, "list", "--open", "--batch", str(answered.batch.id))["cases"] == []
    shown = command(world, "show", name)
    assert shown["contest_list"][0]["outcome"] == "won" and len(shown["contest_list"][0]["moves"]) == 7
    replayed = command(world, "replay", name, "--model", str(world.model))
    assert replayed["right"] == "the contester" and "1.gate, row 10, column 5" in replayed["cell"]
    honest = int(world.player(answered).trace.tensor(Op.GATE, 1)[10, 5])
    assert (replayed["recomputed"], replayed["accuser_states"]) == (honest, honest + 1)


def test_killed_in_the_middle_of_a_game(world: CourtWorld, node: NodeProcess, answered: Answered) -> None:
    """kill -9 right after a move was handed over, twice, on interval blocks: no move is made twice, and none is missing."""
    accuser = world.accuser("patient liar", answered, Lie(Op.ATTENTION, 0, 7, 3))
    accuser.accuse()
    world.world.interval(0.3)
    for move in ("Contests.contest_trace", "Contests.open_cell"):
        seen = node.log().count(move)

        def moved(move: str = move, seen: int = seen) -> bool:
            accuser.respond()
            return node.log().count(move) > seen

        wait_until(moved, 150, lambda: f"the move; log: {node.log()[-3000:]}")
        node.kill()
        node.start(wait=False)
    assert play(world, accuser) is AccusationStatus.LOST
    record = world.view.record(accuser.id)
    (contest,) = record.contests
    assert contest.ended is not None and contest.ended.outcome is ContestOutcome.WON and contest.ended.by == 1
    assert len({(p.cell, p.node) for p in record.picks}) == len(record.picks)


def test_a_false_point_in_a_true_trace(world: CourtWorld, node: NodeProcess, answered: Answered) -> None:
    """The accuser cannot show it: its time runs out."""
    accuser = world.accuser("stretcher", answered)
    accuser.accuse(0, 1)
    (contest,) = wait_until(lambda: world.view.contests(accuser.id), 150, "the node contests")
    assert contest.point == 3
    assert accuser.respond()
    assert world.view.contest(contest.id).is_open
    world.pass_time(world.chain.timestamp() + accuser.accused.terms.clock)
    wait_until(lambda: world.view.info(accuser.id).is_over, 150, lambda: f"the node settles; log: {node.log()[-3000:]}")
    (ended,) = world.view.contests(accuser.id)
    assert ended.ended is not None and ended.ended.outcome is ContestOutcome.WON and ended.ended.by == 2


def test_a_true_accusation_is_left_alone(world: CourtWorld, node: NodeProcess, answered: Answered) -> None:
    accuser = world.accuser("honest", answered)
    accuser.accuse()

    def judged() -> bool:
        lines = [json.loads(line) for line in node.log().splitlines() if line.startswith("{")]
        return any(e.get("event") == "judged an accusation" and e["accusation"] == accuser.id for e in lines)

    wait_until(judged, 150, "the node judges")
    world.pass_time(accuser.accused.terms.contest_end)
    accuser.resolve()
    assert world.view.info(accuser.id).contests == 0
    assert world.view.info(accuser.id).status is AccusationStatus.STOOD
    assert world.status(answered.batch) is BatchStatus.CONVICTED


def test_a_third_party_defends_with_a_bond(
    world: CourtWorld, node: NodeProcess, answered: Answered, tmp_path: Path
) -> None:
    """Within its budget; a new process each round, as if it were killed after each. Its bond comes back with half of the
    accuser's."""
    node.kill()
    accuser = world.accuser("another liar", answered, Lie(Op.LOGITS, 0, 3, 17, -5))
    accuser.accuse()
    poor, outbox = world.contester("poor friend", answered, CONTEST_BOND - 1)
    poor.step()
    assert "defence budget" in poor.trouble()[f"accusation {accuser.id}"]
    outbox.close()
    key, path = key_of(f"friend of {world.folder}"), tmp_path / "friend.db"
    world.give(key.address)
    traces = Traces(world.model)
    traces_kept = traces.weights(world.weights_root)

    def step() -> None:
        with Outbox(world.chain, key, path) as used:
            Contester(world.view, traces, Sender(used, pause=0.2), Known(answered), CONTEST_BOND).step()

    assert play(world, accuser, step) is AccusationStatus.LOST
    (contest,) = world.view.contests(accuser.id)
    assert contest.ended is not None and contest.ended.outcome is ContestOutcome.WON and not contest.free
    step()
    assert world.network.token.balance(key.address) == 100 * POIP + BOND // 2 and traces_kept
