"""The demonstration is never silent for long, and says why a batch with a verdict of fraud became final."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from poip_chain.cli.local import scenario
from poip_chain.cli.local.pulse import QUIET_SECONDS, Pulse
from poip_chain.cli.local.scenario import Scenario
from poip_chain.economic.types import BatchStatus

CHEAT = "0x" + "c" * 40
HONEST = "0x" + "a" * 40


def test_silence_ends_in_time() -> None:
    """The limit of the demonstration, with room for a slow machine."""
    assert QUIET_SECONDS <= 13


def test_a_quiet_step_is_seen_to_live() -> None:
    lines: queue.Queue[str] = queue.Queue()
    with Pulse(lines.put, quiet=0.02) as pulse:
        pulse.tell("starting three vLLM engines")
        assert lines.get(timeout=10) == "starting three vLLM engines"
        assert lines.get(timeout=10) == "  ... still at: starting three vLLM engines"
        pulse.wait_for("block 7", seconds=90, until="the last window ends")
        while "waiting" not in (line := lines.get(timeout=10)):
            pass
        assert line in [f"  ... waiting: block 7; the last window ends in {left} s" for left in range(80, 91)]
        pulse.wait_for("finality", seconds=0, until="the last window ends")
        while line.startswith("  ... waiting: block 7"):
            line = lines.get(timeout=10)
        assert line == "  ... waiting: finality"
        pulse.wait_for("")
        while line == "  ... waiting: finality":
            line = lines.get(timeout=10)
        assert line == "  ... still at: starting three vLLM engines"
    assert "pulse" not in {thread.name for thread in threading.enumerate()}


def test_nothing_is_added_while_there_are_lines() -> None:
    lines: list[str] = []
    with Pulse(lines.append, quiet=60) as pulse:
        pulse.tell("one")
        assert 0 <= pulse.quiet_for < 60
        pulse.tell("two")
    assert lines == ["one", "two"]


def batch(number: int, node: str, count: int, window_end: int) -> Any:
    return SimpleNamespace(id=number, node=node, count=count, total_fee=10**18, lock=10**18, window_end=window_end)


BATCHES = [batch(1, HONEST, 1, 900), batch(2, CHEAT, 2, 950), batch(3, CHEAT, 1, 1042)]
STATES = {1: BatchStatus.FINAL, 2: BatchStatus.FINAL, 3: BatchStatus.PENDING}


class Log:
    """The log's client over BATCHES."""

    def events(self, name: str, *_: object, **__: object) -> list[dict[str, Any]]:
        if name == "BatchConvicted":
            return []
        wanted = [b for b in BATCHES if name == "BatchCommitted" or STATES[b.id] is BatchStatus.FINAL]
        return [{"batch_id": b.id, "node": b.node} for b in wanted]

    def batch_of(self, event: dict[str, Any]) -> Any:
        return next(b for b in BATCHES if b.id == event["batch_id"])

    def status(self, number: int) -> BatchStatus:
        return STATES[number]


class Stage(Scenario):
    """A scenario that ends when `enough` says so, over a network that is only looked at."""

    enough: Callable[[], bool]

    def _ask(self, question: str, *, stream: bool) -> None:
        self._tell(f"asked {question}")

    def _traffic_needed(self, asked: int) -> bool:
        return False

    def _over(self) -> bool:
        return self.enough()

    def _open_ends(self) -> list[str]:
        return ["finality of batches [3]", "bravo's withdrawal"]

    def _audits_of(self, node: Any) -> Iterator[tuple[int, Any]]:
        for number, verdict in ((1, "honest"), (2, "fraud"), (3, None)):
            if next(b.node for b in BATCHES if b.id == number) == node.node_key.address:
                yield number, SimpleNamespace(position=0, state="done", verdict=verdict, detail={})


class Outbox:
    """Notes what is sent."""

    sent: ClassVar[list[tuple[str, str]]] = []

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def execute(self, call: str, intent: str) -> None:
        self.sent.append((call, intent))


def stage(pulse: Pulse, monkeypatch: pytest.MonkeyPatch, jailed_until: int = 0) -> Stage:
    trials = SimpleNamespace(step=lambda: None, open_ends=lambda: [], busy=lambda: False)
    monkeypatch.setattr(scenario, "Trials", lambda *_: trials)
    monkeypatch.setattr(scenario, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scenario, "QUIET_SECONDS", 0.02)
    nodes = [
        SimpleNamespace(name=name, operator=name, node_key=SimpleNamespace(address=address), degradation=degradation)
        for name, address, degradation in (("bravo", HONEST, ""), ("cheat", CHEAT, "int4"))
    ]
    local: Any = SimpleNamespace(
        nodes=nodes, directory=Path("x"), supervisor=SimpleNamespace(check=lambda: None), outbox=lambda _: Outbox()
    )
    registry = SimpleNamespace(
        info=lambda _: SimpleNamespace(jailed_until=jailed_until), unjail=lambda node: f"unjail {node[:4]}"
    )
    chain = SimpleNamespace(block_number=lambda: 143, timestamp=lambda: 1000)
    network: Any = SimpleNamespace(deployment=SimpleNamespace(block=0), log=Log(), chain=chain, registry=registry)
    return Stage(local, network, pulse, 60)


def test_the_demonstration_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def waited() -> list[str]:
        return [line for line in lines if "waiting: block" in line]

    with Pulse(lines.append, quiet=0.05) as pulse:
        play = stage(pulse, monkeypatch)
        play.enough = lambda: len(waited()) >= 2
        play.run()
    for words in (
        "block 143",
        "3 batches committed (1 pending, 2 final, 0 convicted)",
        "2 of 3 audits done",
        "finality of batches [3], bravo's withdrawal",
        "the last window ends in 4",
    ):
        assert words in waited()[-1], lines


def test_events_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    play = stage(Pulse(lines.append), monkeypatch)
    for _ in range(2):
        play._tell_chain()
    assert len(set(lines)) == len(lines)
    assert any("bravo commits 1 receipt worth" in line for line in lines)
    assert any("cheat commits 2 receipts worth" in line for line in lines)
    (honest,) = [line for line in lines if line.startswith("batch 1: final")]
    (fraud,) = [line for line in lines if line.startswith("batch 2: final")]
    assert honest == "batch 1: final, stake released"
    assert "verdict of fraud" in fraud and "evidence" in fraud and "court" in fraud


@pytest.mark.parametrize(("jailed_until", "withheld", "ends"), [(900, False, 1), (1100, False, 0), (900, True, 0)])
def test_a_cheat_that_is_convicted_too_early_serves_on(
    monkeypatch: pytest.MonkeyPatch, jailed_until: int, withheld: bool, ends: int
) -> None:
    """It has a second transcript to withhold, else the demonstration would wait for that in vain."""
    lines: list[str] = []
    monkeypatch.setattr(Outbox, "sent", [])
    play = stage(Pulse(lines.append), monkeypatch, jailed_until)
    monkeypatch.setattr(play, "_withheld", lambda: withheld)
    for _ in range(2):
        play._end_the_jail()
    assert Outbox.sent == [(f"unjail {CHEAT[:4]}", "unjail:900")] * ends
    assert lines == ["the cheat's operator ends its jail, and serves on"] * ends


def test_questions_go_on_until_the_cheat_has_answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    play = stage(Pulse(lambda _: None), monkeypatch)
    monkeypatch.setattr(play._trials, "busy", lambda: True)
    for answers, may in ((0, True), (1, True), (2, False)):
        play._progress.answers["cheat"] = answers
        assert play._may_ask() is may
