"""A watchtower's world with a model that computes: honest answers, and those of a node that runs a degraded model.

The model is small and random, with all of canonical execution; its cheap stand-in is another one with the same dimensions.
Scores, contracts and games are real. Re-execution for the verdict takes the canonical logits, so that nothing here depends
on floating point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poip_chain.canonical.engine import open_model
from poip_chain.canonical.model import Cache, CanonicalModel
from poip_chain.chain.keys import create
from poip_chain.chain.outbox import Outbox
from poip_chain.proof.reexecution import Answer as Executed
from poip_chain.proof.reexecution import Row
from poip_chain.proof.settings import Mode
from poip_chain.service.court.contester import Answer as Defended
from poip_chain.service.court.contester import Contester
from poip_chain.service.court.lies import Lie, LyingTraces
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.traces import Traces
from poip_chain.service.court.view import Accused, CourtView
from poip_chain.service.engine.model import prepare
from poip_chain.spec.sampler import sample
from poip_chain.spec.scores import canonical_value
from poip_chain.spec.transcript import prompt_root
from tests.engines.node_kit import PROFILE, key_of
from tests.integration.watch_world import POIP, Answer, Killed, ScriptedNode, Watcher, WatchWorld, running_watch_world
from tests.support.tiny_model import CONFIG as SMALL
from tests.support.tiny_model import write_tiny_model

CONFIG = dataclasses.replace(
    SMALL, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=PROFILE.vocab_size,
    max_positions=PROFILE.max_context, tied_embeddings=True,
)  # fmt: skip
# Chain time runs with the clock at least: no window may end by itself on a busy machine.
WINDOWS = {
    "challenge_window": 3000, "reveal_window": 600, "contest_window": 1200, "dispute_clock": 3600,
    "unbonding_period": 15_000, "thaw_period": 15_000, "evidence_window": 20_000,
}  # fmt: skip
PROMPTS = itertools.count(7)


class CanonicalSource:
    """A LogitSource with the canonical logits."""

    name = "canonical rows"

    def __init__(self, model: CanonicalModel) -> None:
        self._model = model

    def rows(self, answers: Sequence[Executed]) -> Iterator[tuple[int, int, Row]]:
        for i, answer in enumerate(answers):
            tokens = (*answer.prompt_ids, *answer.output_ids[:-1])
            logits = self._model.forward(tokens, None, len(answer.output_ids))
            for position, row in enumerate(logits):
                yield i, position, Row(row.astype(np.int64))


class AccuseWorld:
    """See the module's docstring."""

    def __init__(self, world: WatchWorld, directory: Path, true: CanonicalModel, cheap: CanonicalModel) -> None:
        self.world, self.directory, self.true, self.cheap = world, directory, true, cheap
        self.network = world.network
        self._open: list[Outbox] = []

    def answer(self, node: ScriptedNode, cheat: bool = False, tokens: int = 12, prompt_tokens: int = 20) -> Answer:
        """What the node answers, by the registered model or by the cheap one."""
        model = self.cheap if cheat else self.true
        while True:
            start = next(PROMPTS)
            prompt = tuple((start * 37 + 11 * i) % 900 + 50 for i in range(prompt_tokens))
            output, fingerprints = generated(model, prompt, tokens)
            if 2 not in output:
                break
        return node.answer(
            tokens,
            prompt_tokens=prompt_tokens,
            request_changes={"prompt_root": prompt_root(prompt)},
            transcript_changes={"prompt_ids": prompt, "output_ids": output, "fingerprints": fingerprints},
        )

    def watcher(self, folder: Path, mode: Mode = Mode.DEFEND, **options: Any) -> Watcher:
        """A watchtower that accuses."""
        if mode is Mode.PROPOSE:
            folder.mkdir(parents=True, exist_ok=True)
            create(folder / "key.json", "test only", key=key_of(f"watchtower {folder}"), light=True)
        given = {"budget": 100 * POIP, "models": (self.directory,), **options}
        return self.world.watcher(folder, mode, source=CanonicalSource(self.true), **given)

    def contester(self, name: str, answer: Answer, lie: Lie | None) -> Contester:
        """Somebody who defends an answer, with tokens for bonds: honestly, or with a falsified trace."""
        key = key_of(f"{name} of {self.world.folder}")
        self.world.chain.request("anvil_setBalance", key.address, hex(10**21))
        self.world.send(self.network.token.transfer(key.address, 100 * POIP))
        outbox = Outbox(self.world.chain, key, self.world.folder / f"{name}.db")
        self._open.append(outbox)
        defended = Defended(answer.transcript.prompt_ids, answer.transcript.output_ids)
        traces = Traces(self.directory) if lie is None else LyingTraces(self.directory, lambda *_: lie)
        return Contester(CourtView(self.network), traces, Sender(outbox, pause=0.1), Known(answer, defended), 50 * POIP)

    def pass_time(self, until: int) -> None:
        """Let chain time run past a moment."""
        now = self.world.chain.timestamp()
        if now <= until:
            self.world.mine(1, until + 1 - now)

    def close(self) -> None:
        """Release files."""
        for outbox in self._open:
            outbox.close()


class Known:
    """The one answer that a contester defends."""

    def __init__(self, answer: Answer, defended: Defended) -> None:
        self._answer, self._defended = answer, defended

    def first_block(self) -> int:
        return 0

    def accused(self, accused: Accused) -> Defended | None:
        same = accused.terms.trace.output_root == prompt_root(self._answer.transcript.output_ids)
        return self._defended if same else None


def generated(
    model: CanonicalModel, prompt: Sequence[int], tokens: int
) -> tuple[tuple[int, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Greedy output ids and the fingerprints that an honest engine states of them."""
    cache, output, fingerprints = Cache(), list[int](), []
    given: Sequence[int] = prompt
    for position in range(tokens):
        row = model.forward(given, cache, 1)[0].tolist()
        token = sample(row, b"\0" * 32, position, 0)
        values = [(other, canonical_value(logit, row[token])) for other, logit in enumerate(row) if other != token]
        fingerprints.append(tuple(sorted(values, key=lambda entry: (-entry[1], entry[0]))[:8]))
        output.append(token)
        given = [token]
    return tuple(output), tuple(fingerprints)


class Fuse:
    """Kills a watcher right after its n-th write, whether of its own database or of its outbox."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.left, self.kills = watcher, 0, 0

    def court_step(self) -> None:
        """A round of the court that is killed after its first write, then after its second, until one comes through."""
        writes = 1
        while True:
            self.left = writes
            assert self.watcher.court is not None
            try:
                with self._armed():
                    self.watcher.court.step()
                return
            except Killed:
                self.kills += 1
                writes += 1
            self.watcher.restart()

    @contextlib.contextmanager
    def _armed(self) -> Iterator[None]:
        store, outbox = self.watcher.store, self.watcher.outbox
        assert outbox is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_transaction", self._mortal(store._transaction))
            patch.setattr(outbox._store, "_write", self._mortal(outbox._store._write))
            yield

    def _mortal(self, write: Any) -> Any:
        @contextlib.contextmanager
        def mortal() -> Iterator[Any]:
            with write() as db:
                yield db
            self.left -= 1
            if self.left == 0:
                raise Killed

        return mortal


@contextlib.contextmanager
def running_accuse_world(folder: Path) -> Iterator[AccuseWorld]:
    """A world that lives as long as the block."""
    directories = []
    for seed in (1, 2):
        directories.append(folder / f"model{seed}")
        directories[-1].mkdir()
        write_tiny_model(directories[-1], seed, CONFIG)
    models = [open_model(directory, path="float64") for directory in directories]
    spec = prepare(directories[0]).spec
    config = prepare(directories[0]).config
    with running_watch_world(folder, spec=spec, config=config, windows=WINDOWS) as world:
        made = AccuseWorld(world, directories[0], *models)
        try:
            yield made
        finally:
            made.close()
