"""A small real network for the watchtower's tests: a devnet with all contracts, and nodes that are a script.

The nodes are registered and staked for real and commit real batches. What they serve over HTTP, and whether, is up to
the test (one HTTP server plays all of them). Re-execution is a stand-in with fixed logits: `FixedSource`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from eth_hash.auto import keccak
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from poip_chain.chain.deployment import deploy
from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.follower import Follower
from poip_chain.chain.keys import Key, development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Call, Chain
from poip_chain.economic.network import Network
from poip_chain.economic.onboarding import register_call, stake_call
from poip_chain.economic.profiles import deployment_settings
from poip_chain.economic.types import BatchStatus
from poip_chain.proof.audit import Auditor
from poip_chain.proof.court import Court, open_court
from poip_chain.proof.reexecution import Answer as Executed
from poip_chain.proof.reexecution import LogitSource, Row
from poip_chain.proof.report import Report
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import DATABASE, AuditRow, Challenge, Filing, WatchtowerStore
from poip_chain.proof.watchtower import Watchtower
from poip_chain.service.court.settings import CourtSettings
from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.objects import (
    Batch,
    FinishReason,
    ModelConfig,
    ModelSpec,
    Part,
    Receipt,
    Request,
    SamplingParams,
)
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript, prompt_root
from poip_chain.spec.types import Address
from tests.engines.node_kit import PROFILE, key_of
from tests.engines.serving import serving

POIP = 10**18
LOGIT = 2**16
CHOSEN, WRONG = 10 * LOGIT, 40 * LOGIT
"""Logits of the token that was answered, and of the one that a cheat should have answered; all others are 0."""
CONFIG = ModelConfig(64, 128, 2, 4, 2, 16, 1000, 256, 10**7, 10_000, bytes(32), True, False, False, False)
SPEC = ModelSpec(b"w" * 32, b"t" * 32, b"c" * 32, CONFIG.config_hash())
# Chain time runs with the wall clock at least: the window must outlast a test on a busy machine. Stake and escrow stay
# in reach of the longest case.
WINDOWS = {"challenge_window": 200, "unbonding_period": 600, "thaw_period": 600}
INPUT_PRICE, OUTPUT_PRICE = 10**13, 3 * 10**13
PARAMS = SamplingParams(0)


class FixedSource:
    """A LogitSource with made-up logits: every answer is right, or (`cheated`) every answer is wrong."""

    name = "fixed rows"

    def __init__(self, cheated: bool = False) -> None:
        self.cheated = cheated
        self.executed = 0

    def rows(self, answers: Sequence[Executed]) -> Iterator[tuple[int, int, Row]]:
        for i, answer in enumerate(answers):
            self.executed += 1
            for position, token in enumerate(answer.output_ids):
                values = np.zeros(PROFILE.vocab_size, dtype=np.int64)
                values[token] = CHOSEN
                if self.cheated:
                    values[(token + 1) % PROFILE.vocab_size] = WRONG
                yield i, position, Row(values)


def fingerprint(token: int) -> tuple[tuple[int, int], ...]:
    """What an honest node states of FixedSource's logits."""
    others = [other for other in range(9) if other != token][:8]
    return tuple((other, -(CHOSEN >> 10)) for other in others)


@dataclass(frozen=True)
class Answer:
    """One request with its answer, as the node keeps it."""

    request: Request
    params: SamplingParams
    receipt: Receipt
    transcript: Transcript

    def to_json(self) -> dict[str, Any]:
        """What the node serves for an audit."""
        return {
            "request": self.request.to_json(),
            "request_signature": "0x" + "11" * 65,
            "params": self.params.to_json(),
            "receipt": self.receipt.to_json(),
            "signature": "0x" + "22" * 65,
            "transcript": self.transcript.to_json(),
        }


@dataclass
class ScriptedNode:
    """A registered node and its books. `silent` hides everything, `hidden` the transcripts alone; a `tarpit` answers
    every question with a byte now and then, for ever."""

    world: WatchWorld
    name: str
    key: Key
    outbox: Outbox
    seq: int = 0
    node_cum: int = 0
    payer_cum: dict[Address, int] = field(default_factory=dict)
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    silent: bool = False
    hidden: bool = False
    tarpit: bool = False
    sent: int = 0

    @property
    def address(self) -> Address:
        return self.key.address

    def answer(
        self,
        output_tokens: int = 5,
        *,
        prompt_tokens: int = 4,
        receipt_changes: Mapping[str, Any] | None = None,
        transcript_changes: Mapping[str, Any] | None = None,
        request_changes: Mapping[str, Any] | None = None,
        book: bool = True,
    ) -> Answer:
        """A right answer, but for the changes. Totals move on unless `book` is False."""
        payer = key_of("a client").address
        prompt_ids = tuple(range(20, 20 + prompt_tokens))
        output_ids = tuple(300 + i for i in range(output_tokens))
        request = Request(
            client=payer,
            node=self.address,
            model_id=self.world.spec.model_id(),
            profile_version=1,
            prompt_root=prompt_root(prompt_ids),
            prompt_tokens=prompt_tokens,
            params_hash=PARAMS.params_hash(),
            max_tokens=output_tokens,
            input_price=INPUT_PRICE,
            output_price=OUTPUT_PRICE,
            client_seed=keccak(b"seed"),
            client_nonce=keccak(f"{self.name} {self.seq} {book}".encode()),
            deadline=self.world.chain.timestamp() + 600,
        ).replace(**(request_changes or {}))
        fields: dict[str, Any] = {
            "request_hash": request.struct_hash(),
            "finish_reason": int(FinishReason.LENGTH),
            "engine_statement": "script",
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            **(transcript_changes or {}),
        }
        fields.setdefault("fingerprints", tuple(fingerprint(token) for token in fields["output_ids"]))
        transcript = Transcript(**fields)
        fee = request.fee(output_tokens)
        receipt = Receipt(
            node=self.address,
            seq=self.seq,
            request_hash=request.struct_hash(),
            model_id=self.world.spec.model_id(),
            transcript_root=transcript.root(),
            output_tokens=output_tokens,
            finish_reason=int(FinishReason.LENGTH),
            fee=fee,
            payer=payer,
            payer_cum=self.payer_cum.get(payer, 0) + fee,
            node_cum=self.node_cum + fee,
            issued_at=self.world.chain.timestamp(),
        ).replace(**(receipt_changes or {}))
        if book:
            self.seq += 1
            self.node_cum += fee
            self.payer_cum[payer] = self.payer_cum.get(payer, 0) + fee
        return Answer(request, PARAMS, receipt, transcript)

    def commit(self, *answers: Answer) -> Batch:
        """Commit to answers; beyond the beacon's block when this returns."""
        log = self.world.network.log
        first = log.next_seq(self.address)
        root = merkle_root([a.receipt.struct_hash() for a in answers])
        total = sum(a.receipt.fee for a in answers)
        start = self.world.chain.block_number() + 1
        self.send(log.commit(self.world.spec.model_id(), 1, root, first, len(answers), total, self.name))
        found = log.find(log.batch_count(), start)
        assert found is not None
        self.answers[found[0].id] = list(answers)
        self.world.mine(2)
        return found[0]

    def send(self, call: Call) -> None:
        """The node's transaction, mined."""
        self.sent += 1
        self.outbox.execute(call, f"node:{self.sent}", 60)

    def answer_challenge(self, challenge_id: int, batch: Batch) -> None:
        """Publish what is asked for."""
        asked = self.world.network.availability.challenge_info(challenge_id)
        answers = self.answers[batch.id]
        answer = answers[asked.index]
        leaves = answer.transcript.leaves(Part(asked.part))
        indices = list(range(asked.first_leaf, min(asked.first_leaf + 8, len(leaves))))
        self.send(
            self.world.network.availability.answer(
                challenge_id,
                batch,
                answer.receipt,
                merkle_proof([a.receipt.struct_hash() for a in answers], [asked.index]),
                answer.request,
                answer.params,
                TranscriptRoots.of(answer.transcript),
                [leaves[i] for i in indices],
                merkle_proof(leaves, indices) if indices else [],
            )
        )

    def signed(self, receipt: Receipt) -> bytes:
        """The node's signature under a receipt."""
        return receipt.sign(self.world.network.domain("log"), self.key.private_key)

    def document(self, batch_id: int, position: int | None) -> Any:
        """What it serves of a batch; None for nothing."""
        answers = self.answers.get(batch_id)
        if self.silent or answers is None or (self.hidden and position is not None):
            return None
        if position is not None:
            return answers[position].to_json()
        return {
            "receipts": [
                {"receipt": a.receipt.to_json(), "signature": "0x" + self.signed(a.receipt).hex()} for a in answers
            ]
        }


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class MortalStore(WatchtowerStore):
    """A store whose process dies right after a number of commits."""

    fuse: int | None = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        with super()._transaction() as db:
            yield db
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                raise Killed


@dataclass
class Watcher:
    """A watchtower's data directory, and the watchtower that runs on it; `restart` kills it and starts it anew."""

    world: WatchWorld
    data: Path
    key: Key
    mode: Mode
    budget: int
    source: LogitSource
    start_block: int
    attempts: int = 1
    confirmations: int = 0
    node_timeout: float = 5
    models: tuple[Path, ...] = ()
    defence_budget: int = 0
    court: Court | None = None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Open everything on the data directory."""
        network = self.world.network
        settings = WatchtowerSettings(
            rpc_url=self.world.url,
            deployment=self.world.folder / "deployment.json",
            data=self.data,
            mode=self.mode,
            bond_budget=self.budget,
            node_timeout=self.node_timeout,
            confirmations=self.confirmations,
            fetch_attempts=self.attempts,
            models=list(self.models),
            court=CourtSettings(defence_budget=self.defence_budget),
            key=self.data / "key.json" if self.mode is Mode.PROPOSE else None,
        )
        sources = [network.log.event(name) for name in ("BatchCommitted", "BatchFinal", "BatchConvicted")]
        sources += [network.availability.event(name) for name in ("Challenged", "Answered", "Resolved")]
        self.chain = Chain(self.world.url)
        self.store = MortalStore(self.data / DATABASE)
        database = self.data / "follower.db"
        self.follower = Follower(self.chain, database, "watchtower", sources, self.start_block, self.confirmations)
        self.outbox = Outbox(self.chain, self.key, self.data / "outbox.db") if self.mode is Mode.DEFEND else None
        auditor = Auditor(network, {self.world.spec.model_id(): self.source})
        self.court = open_court(settings, Network(self.chain, self.world.deployment), self.store, self.outbox)
        parts = (settings, self.chain, network, self.follower, self.store, auditor, self.outbox)
        self.tower = Watchtower(*parts, court=self.court)

    def close(self) -> None:
        """Close everything."""
        if self.outbox is not None:
            self.outbox.close()
        self.follower.close()
        self.store.close()
        self.chain.close()

    def restart(self) -> None:
        """As after a kill: a new watchtower on the same data."""
        self.close()
        self.start()

    def step(self) -> Report:
        """One round; time moves on by a few seconds after it."""
        report = self.tower.step()
        self.world.mine(1, 3)
        return report

    def mortal_step(self) -> int:
        """One round that is killed after its first commit, then after its second, and so on until one comes through.

        The number of kills.
        """
        kills = 0
        while True:
            self.store.fuse = kills + 1
            try:
                self.tower.step()
            except Killed:
                kills += 1
                self.restart()
                continue
            self.store.fuse = None
            self.world.mine(1, 3)
            return kills

    def audit(self, batch: Batch, position: int = 0) -> AuditRow:
        """The audit of one receipt."""
        (row,) = [a for a in self.store.audits(batch_id=batch.id) if a.position == position]
        return row

    def filings(self, batch: Batch | None = None) -> list[Filing]:
        """Filings, of one batch or all."""
        return [f for f in self.store.filings() if batch is None or f.batch_id == batch.id]

    def challenge(self, batch: Batch) -> Challenge:
        """The one challenge of a batch that stands."""
        (challenge,) = [c for c in self.store.challenges(batch.id) if c.state in ("reserved", "open")]
        return challenge

    def calls(self) -> list[str]:
        """What it has sent, oldest first, without repeats of the same purpose."""
        return [] if self.outbox is None else [t.description for t in reversed(self.outbox.transactions())]

    def balance(self) -> int:
        """Its tokens."""
        return self.world.network.token.balance(self.key.address)


class WatchWorld:
    """See the module's docstring. Blocks come one per transaction, and by `mine`."""

    def __init__(
        self,
        url: str,
        folder: Path,
        endpoint: str,
        nodes: dict[str, ScriptedNode],
        spec: ModelSpec = SPEC,
        config: ModelConfig = CONFIG,
        windows: Mapping[str, int] = WINDOWS,
    ) -> None:
        self.spec = spec
        self.url, self.folder, self._endpoint, self._nodes = url, folder, endpoint, nodes
        self.chain = Chain(url, timeout=30)
        self.operator = development_key(0)
        path = folder / "deployment.json"
        settings = deployment_settings("devnet", values={"audit_rate": 10**6, **windows})
        outbox_path = folder / "operator.db"
        self.deployment = deploy(self.chain, self.operator, settings, path, outbox_path=outbox_path, timeout=120)
        self.network = Network(self.chain, self.deployment)
        self.outbox = Outbox(self.chain, self.operator, outbox_path)
        self._calls = 0
        self.send(self.network.models.register(spec, config, "test"))
        self.send(self.network.models.add_profile(spec.model_id(), PROFILE))
        self._watchers: list[Watcher] = []

    def send(self, call: Call) -> None:
        """The operator's transaction, mined."""
        self._calls += 1
        self.outbox.execute(call, f"world:{self._calls}", 120)

    def mine(self, blocks: int = 1, seconds: int = 1) -> None:
        """Empty blocks, `seconds` of chain time apart."""
        for _ in range(blocks):
            self.chain.request("evm_increaseTime", seconds)
            self.chain.request("evm_mine")

    def add_node(self, name: str) -> ScriptedNode:
        """Register and stake a node that serves under the test server."""
        key = key_of(f"{name} of {self.folder}")
        self.chain.request("anvil_setBalance", key.address, hex(10**21))
        peer = key_of(f"peer of {name} of {self.folder}")
        operator = self.operator
        endpoint = f"{self._endpoint}/{name}"
        self.send(register_call(self.network, operator.address, key, peer, operator.address, endpoint))
        self.send(stake_call(self.network, operator, key.address, 1000 * POIP))
        node = ScriptedNode(self, name, key, Outbox(self.chain, key, self.folder / f"{name}.db", rebroadcast_after=0.0))
        self._nodes[name] = node
        return node

    def watcher(
        self,
        folder: Path,
        mode: Mode = Mode.DEFEND,
        *,
        budget: int = 10 * POIP,
        cheated: bool = False,
        source: LogitSource | None = None,
        **options: Any,
    ) -> Watcher:
        """A watchtower with an account of its own, which sees what happens from now on."""
        key = key_of(f"watchtower {folder}")
        if mode is Mode.DEFEND:
            self.chain.request("anvil_setBalance", key.address, hex(10**21))
            self.send(self.network.token.transfer(key.address, 100 * POIP))
        start = self.chain.block_number() + 1
        watcher = Watcher(self, folder, key, mode, budget, source or FixedSource(cheated), start, **options)
        self._watchers.append(watcher)
        return watcher

    def status(self, batch: Batch) -> BatchStatus:
        """What the log says."""
        return self.network.log.status_of(batch)

    def convictions(self, batch: Batch) -> list[dict[str, Any]]:
        """The events of convictions of one batch."""
        found = self.network.log.events("BatchConvicted", batch.block_number)
        return [event for event in found if event["batch_id"] == batch.id]

    def close_watchers(self) -> None:
        """Close the watchtowers of a test."""
        for watcher in self._watchers:
            watcher.close()
        self._watchers.clear()

    def close(self) -> None:
        """Close everything."""
        self.close_watchers()
        for node in self._nodes.values():
            node.outbox.close()
        self.outbox.close()
        self.chain.close()


async def drops() -> AsyncIterator[bytes]:
    """JSON that never ends, a byte at a time."""
    while True:
        yield b" "
        await asyncio.sleep(0.05)


class ScriptedEngine:
    """A vLLM server as EngineSource knows it, which serves FixedSource's logits, or what `broken` says instead."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.asked = 0
        self.app = Starlette(
            routes=[Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        )

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"data": [{"id": "the model"}]})

    async def complete(self, request: HttpRequest) -> Response:
        self.asked += 1
        ids = (await request.json())["prompt"]
        rows: list[Any] = [None]
        for token in ids[1:]:
            listed = {other: -(CHOSEN / LOGIT) for other in range(16)} | {token: 0.0}
            rows.append({str(other): {"logprob": value} for other, value in listed.items()})
        if self.broken == "error":
            return JSONResponse({"error": {"message": "out of memory"}}, status_code=500)
        if self.broken == "drip":
            return StreamingResponse(drops(), media_type="application/json")
        if self.broken == "text":
            return Response("<html>")
        if self.broken == "nesting":
            return Response('{"choices":' + "[" * 300_000)
        if self.broken == "no rows":
            rows = [None] * len(ids)
        elif self.broken == "short":
            rows = rows[:-1]
        elif self.broken == "positive":
            rows[-1] = {name: {"logprob": 7.5} for name in rows[-1]}
        elif self.broken == "not a number":
            rows[-1] = {name: {"logprob": "nan"} for name in rows[-1]}
        elif self.broken == "names":
            rows[-1] = {"the": {"logprob": -1.0}}
        return JSONResponse({"choices": [{"prompt_logprobs": rows}]})


@contextlib.contextmanager
def running_watch_world(folder: Path, **model: Any) -> Iterator[WatchWorld]:
    """A world that lives as long as the block. model: spec, config and windows of another one."""
    nodes: dict[str, ScriptedNode] = {}

    async def serve(request: HttpRequest) -> Response:
        values = request.path_params
        position = values.get("position")
        if nodes[values["name"]].tarpit:
            return StreamingResponse(drops(), media_type="application/json")
        document = nodes[values["name"]].document(values["batch"], position)
        if document is None:
            return JSONResponse({"error": {"message": "no"}}, status_code=403)
        return Response(json.dumps(document), media_type="application/json")

    app = Starlette(
        routes=[
            Route("/{name}/v1/batches/{batch:int}/receipts", serve),
            Route("/{name}/v1/batches/{batch:int}/transcripts/{position:int}", serve),
        ]
    )
    with running_devnet() as url, serving(app) as endpoint:
        world = WatchWorld(url, folder, endpoint, nodes, **model)
        try:
            yield world
        finally:
            world.close()
