"""A network whose model can be accused: real contracts, real node processes, and accusers that are scripts.

The model is small and random, with all of canonical execution. Answers come from the scripted engine, so they are not
what the model would say: true traces convict them, and false ones, and what is tested is the game. Accusers play by
`canonical.moves` from a trace, falsified or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from poip_chain.canonical.moves import Player
from poip_chain.canonical.points import margin_points
from poip_chain.chain.keys import create
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.court import POINT_LEVEL
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import TransactionFailed
from poip_chain.service.court.contester import Answer, Contester
from poip_chain.service.court.lies import Lie, LyingTraces
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.traces import Traces
from poip_chain.service.court.view import Accused, CourtView
from poip_chain.service.engine.model import prepare
from poip_chain.service.node.receipts import unpack
from poip_chain.spec.accusation import Claim, Point, Points
from poip_chain.spec.dispute import LEVELS, Node, asked_cell
from poip_chain.spec.merkle import merkle_proof
from poip_chain.spec.objects import Batch, Receipt, Request, SamplingParams
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address
from tests.engines.node_kit import PROFILE, key_of
from tests.integration.node_world import FORKS, PASSWORD, NodeProcess, RegisteredModel, World, running_world, wait_until
from tests.support.tiny_model import CONFIG as SMALL
from tests.support.tiny_model import write_tiny_model

POIP = 10**18
CONFIG = dataclasses.replace(
    SMALL, hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=PROFILE.vocab_size,
    max_positions=PROFILE.max_context,
    tied_embeddings=True,
)  # fmt: skip
PROMPT = tuple(range(100, 140))
"""Long enough for traces of more than 4,096 leaves: two reveals of hashes, then leaves."""
# Interval blocks drive chain time ahead of the clock, and a busy machine is slow: no window may decide a game here.
WINDOWS = {
    "challenge_window": 3000, "reveal_window": 600, "contest_window": 1200, "dispute_clock": 3600,
    "unbonding_period": 15_000, "thaw_period": 15_000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer of a node in a committed batch, with all that a claim is made of."""

    node: NodeProcess
    batch: Batch
    index: int
    receipts: tuple[Receipt, ...]
    request: Request
    params: SamplingParams
    transcript: Transcript

    @property
    def answer(self) -> Answer:
        return Answer(tuple(self.transcript.prompt_ids), tuple(self.transcript.output_ids))


class Known:
    """The answers that a third party defends: these."""

    def __init__(self, *answers: Answered) -> None:
        self._answers = {(a.batch.id, a.index): a.answer for a in answers}

    def first_block(self) -> int:
        return 0

    def accused(self, accused: Accused) -> Answer | None:
        return self._answers.get((accused.batch_id, accused.index))


class Accuser:
    """Accuses and answers contests by a script, with an account of its own. `player` tells its trace."""

    def __init__(self, world: CourtWorld, name: str, answered: Answered, player: Player) -> None:
        self.world, self.answered, self.player = world, answered, player
        self.network, self.view = world.network, world.view
        self.key = key_of(f"{name} of {world.folder}")
        self.outbox = Outbox(world.chain, self.key, world.folder / f"{name}.db")
        world.give(self.key.address)
        self._sent = itertools.count()
        self.send(self.network.token.approve(self.network.accusations.address, 10**24))
        self.id = 0
        self.points = Points()

    def send(self, call: Call) -> None:
        """Mined."""
        self.outbox.execute(call, f"accuser:{next(self._sent)}", 60)

    def accuse(self, *false_logits: int) -> int:
        """Commit and reveal. The points are two margins of the player's trace; each of `false_logits` makes one more that
        is not of it: a logit so much larger."""
        answered, logits, network = self.answered, self.player.trace.logits, self.network
        output, temperature = answered.transcript.output_ids, answered.params.temperature_milli
        found = margin_points(logits, output, answered.request.seed(), temperature, PROFILE.margin_dead_zone)
        points = [Point(p.position, p.token, p.logit, p.claimed_logit) for p in found[:2]]
        for i, by in enumerate(false_logits, points[-1].position + 1):
            points.append(Point(i, 8, int(logits[i, 8]) + by, int(logits[i, output[i]])))
        self.points = Points(tuple(points))
        proof = merkle_proof([receipt.struct_hash() for receipt in answered.receipts], [answered.index])
        receipt, transcript = answered.receipts[answered.index], answered.transcript
        evidence = (receipt, answered.index, proof, answered.request, answered.params, transcript)
        claim, salt = Claim.of(*evidence, self.player.root, self.points), b"\x05" * 32
        number = network.accusations.count(answered.batch.id)
        self.send(network.accusations.commit(answered.batch, claim.commitment(salt, self.key.address)))
        self.id = answered.batch.id << 32 | number
        self.send(network.accusations.accuse(self.id, answered.batch, self.world.world.model.config, claim, salt))
        return self.id

    @cached_property
    def accused(self) -> Accused:
        """The accusation as the chain has it."""
        found = self.view.accused(self.id)
        assert found is not None
        return found

    def respond(self) -> bool:
        """Answer every contest that waits for the accuser; whether there was one."""
        moved = False
        for contest in self.view.contests(self.id):
            at = self.view.contest(contest.id)
            if at.is_open and at.revealed_at == 0:
                moved = True
                # A contest that ended, or another's reveal of the same node, may come in between.
                with contextlib.suppress(TransactionFailed):
                    self.send(self._reveal(contest.id, at.level, at.index, at.cell))
        return moved

    def _reveal(self, contest: int, level: int, index: int, cell: int) -> Call:
        contests = self.network.contests
        if level == POINT_LEVEL:
            point = self.points.margins[index]
            proof = self.player.point(point.position, point.token)
            ids, leaves = (proof.ids, proof.ids_proof), (proof.leaves, proof.proof)
            return contests.show_point(contest, self.accused.terms, (self.points.margins, ()), ids, leaves)
        shown = self.player.reveal(cell, Node(level, index))
        asked = asked_cell(contests.terms_hash(self.accused.terms), cell)
        if level > LEVELS:
            return contests.reveal(contest, asked, shown)
        return contests.reveal_leaves(contest, asked, b"".join(shown))

    def resolve(self) -> None:
        """After the contest window."""
        self.send(self.network.accusations.resolve(self.id, self.accused.terms, self.answered.batch))

    def close(self) -> None:
        """Release its files."""
        self.outbox.close()


def run_watchtower(config: Path, log: Path) -> None:
    """The body of a forked watchtower: as `python -m poip_chain.proof`, with its output in a file."""
    from poip_chain.proof.__main__ import main

    os.environ["POIP_PASSWORD"] = PASSWORD
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main(["--config", str(config)]))


class WatchtowerProcess:
    """A watchtower as a process: killed, and started again on the same data."""

    def __init__(self, world: CourtWorld, name: str, budget: int) -> None:
        self._world, self._folder = world, world.folder / name
        self._folder.mkdir()
        self.key = key_of(f"{name} of {world.folder}")
        create(self._folder / "key.json", PASSWORD, key=self.key, light=True)
        world.give(self.key.address)
        (self._folder / "watchtower.toml").write_text(
            f"""rpc_url = "{world.world.rpc_url}"
deployment = "{world.world.deployment_path}"
data = "."
key = "key.json"
mode = "defend"
bond_budget = {budget}
models = ["{world.model}"]
poll_interval = 0.2
"""
        )
        self._process: Any = None

    def start(self) -> None:
        """Start it; it is at work some seconds later."""
        arguments = (self._folder / "watchtower.toml", self._folder / "log")
        self._process = FORKS.Process(target=run_watchtower, args=arguments, daemon=True)
        self._process.start()

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def log(self) -> str:
        """What it wrote."""
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, call: str) -> None:
        """Wait until it has handed a transaction over."""

        def seen() -> bool:
            assert self._process.exitcode is None, self.log()[-3000:]
            return f'"call": "{call}"' in self.log()

        wait_until(seen, 250, lambda: f"{call}; log: {self.log()[-3000:]}")

    def sent(self) -> list[str]:
        """What it has sent, each purpose once, oldest first; while it does not run."""
        with Outbox(self._world.chain, self.key, self._folder / "outbox" / f"{self.key.address}.db") as outbox:
            return [t.description for t in reversed(outbox.transactions())]


class CourtWorld:
    """See the module's docstring."""

    def __init__(self, world: World, model: Path) -> None:
        self.world, self.model = world, model
        self.chain, self.network, self.folder = world.chain, world.network, world.folder
        self.view = CourtView(self.network)
        self.traces = Traces(model)
        self.accusers: list[Accuser] = []

    @property
    def weights_root(self) -> bytes:
        return self.world.model.spec.weights_root

    def give(self, address: Address) -> None:
        """Coins for gas, tokens for bonds."""
        self.world.fund(address)
        self.world.send(self.network.token.transfer(address, 100 * POIP))

    def node(self, name: str, **settings: Any) -> NodeProcess:
        """A node that defends itself; not started."""
        node = self.world.add_node(name, batch_count=1, court={"model": str(self.model)}, **settings)
        self.world.send(self.network.registry.set_endpoint(node.address, node.url))
        return node

    def ask(self, node: NodeProcess, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 24) -> Answered:
        """A question whose answer is a batch of its own."""
        body = node.client.body(prompt, max_tokens=max_tokens)
        receipt = node.ask(body)
        assert receipt is not None, node.log()[-3000:]
        assert node.pay(receipt)

        def committed() -> Any:
            rows = node.rows(f"SELECT batch FROM batches WHERE first_seq = {receipt.seq} AND batch IS NOT NULL")
            return Batch.from_json(json.loads(rows[0][0])) if rows else None

        batch = wait_until(committed, 60, lambda: f"the batch is committed; log: {node.log()[-3000:]}")
        packed = node.rows(f"SELECT transcript FROM transcripts WHERE seq = {receipt.seq}")[0][0]
        transcript = Transcript.from_json(unpack(packed))
        request, params = Request.from_json(body["request"]), SamplingParams.from_json(body["params"])
        return Answered(node, batch, 0, (receipt,), request, params, transcript)

    def player(self, answered: Answered, lie: Lie | None = None) -> Player:
        """Who plays for an answer: honestly, or with a falsified element from which everything else follows."""
        traces = self.traces if lie is None else LyingTraces(self.model, lambda *_: lie)
        return traces.player(self.weights_root, answered.answer.prompt, answered.answer.output)

    def accuser(self, name: str, answered: Answered, lie: Lie | None = None) -> Accuser:
        """Somebody who accuses an answer, with a true or a falsified trace."""
        self.accusers.append(Accuser(self, name, answered, self.player(answered, lie)))
        return self.accusers[-1]

    def contester(self, name: str, answered: Answered, budget: int) -> tuple[Contester, Outbox]:
        """A third party that defends an answer."""
        key = key_of(f"{name} of {self.folder}")
        self.give(key.address)
        outbox = Outbox(self.chain, key, self.folder / f"{name}.db")
        sender = Sender(outbox, pause=0.2)
        return Contester(CourtView(self.network), Traces(self.model), sender, Known(answered), budget), outbox

    def pass_time(self, until: int) -> None:
        """Let chain time run past a moment. Interval blocks may have put it ahead of the clock already."""
        while (now := self.chain.timestamp()) <= until:
            self.world.pass_time(until + 1 - now)
            self.chain.request("evm_mine")

    def status(self, batch: Batch) -> BatchStatus:
        """What the log says."""
        return self.network.log.status_of(batch)

    def close(self) -> None:
        """Release files."""
        for accuser in self.accusers:
            accuser.close()


@contextlib.contextmanager
def running_court_world(folder: Path, **windows: int) -> Iterator[CourtWorld]:
    """A world that lives as long as the block; blocks come one per transaction until `world.interval` is called."""
    directory = folder / "model"
    directory.mkdir()
    write_tiny_model(directory, config=CONFIG)
    prepared = prepare(directory)
    model = RegisteredModel(prepared.spec, prepared.config, PROFILE)
    with running_world(folder, model=model, **{"audit_rate": 10**6, **WINDOWS, **windows}) as world:
        court = CourtWorld(world, directory)
        try:
            yield court
        finally:
            court.close()
