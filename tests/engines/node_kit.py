"""What the node's tests share: a profile, clients that sign, an in-process engine, and a node put together from them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poip_chain.chain.keys import Key
from poip_chain.economic.types import Offer
from poip_chain.errors import Unavailable
from poip_chain.service.engine.client import EngineToken
from poip_chain.service.node.admission import Served, Submission
from poip_chain.service.node.node import Node, choose_served
from poip_chain.service.node.settings import NodeSettings
from poip_chain.service.node.store import Store
from poip_chain.spec.objects import Profile, Receipt, Request, SamplingParams, ThresholdRow, Voucher
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import ZERO_HASH, Address
from tests.engines.model_chain import CHAIN_ID, LOG, ModelChain
from tests.engines.scripted import choose, listed_tokens

MODEL_ID = hashlib.sha256(b"model").digest()
INPUT_PRICE, OUTPUT_PRICE = 3, 10
PROFILE = Profile(
    max_context=256,
    vocab_size=1000,
    dtype="float32",
    kv_dtype="float32",
    min_temperature_milli=100,
    max_temperature_milli=2000,
    end_token_ids=(2,),
    margin_dead_zone=1000,
    margin_hard_limit=100_000,
    margin_table=(ThresholdRow(1, 10_000),),
    fingerprint_dead_zone=1,
    fingerprint_tolerance=4,
    fingerprint_table=(ThresholdRow(1, 100),),
)


def key_of(name: str) -> Key:
    """A fixed key for a role in a test."""
    return Key.from_bytes(hashlib.sha256(name.encode()).digest())


@dataclass
class Client:
    """Signs requests and vouchers for one node."""

    served: Served
    key: Key = field(default_factory=lambda: key_of("client"))
    now: int = 1_000_000

    @property
    def address(self) -> Address:
        return self.key.address

    def body(
        self,
        prompt: Sequence[int] = (11, 12, 13),
        *,
        max_tokens: int = 40,
        params: SamplingParams | None = None,
        nonce: bytes | None = None,
        voucher: dict[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """A signed POST /v1/requests body; `changes` to the request before it is signed."""
        params = params or SamplingParams(700)
        request = Request(
            client=self.address,
            node=self.served.node,
            model_id=self.served.model_id,
            profile_version=self.served.profile_version,
            prompt_root=prompt_root(prompt),
            prompt_tokens=len(prompt),
            params_hash=params.params_hash(),
            max_tokens=max_tokens,
            input_price=self.served.input_price,
            output_price=self.served.output_price,
            client_seed=bytes(range(32)),
            client_nonce=nonce or secrets.token_bytes(32),
            deadline=self.now + 10**6,
        ).replace(**changes)
        return {
            "request": request.to_json(),
            "params": params.to_json(),
            "signature": "0x" + request.sign(self.served.log_domain, self.key.private_key).hex(),
            "prompt_ids": list(prompt),
            "voucher": voucher,
        }

    def voucher(self, cumulative: int, receipt: Receipt | bytes = ZERO_HASH, **changes: Any) -> dict[str, Any]:
        """A signed voucher body for POST /v1/vouchers."""
        name = receipt if isinstance(receipt, bytes) else receipt.struct_hash()
        voucher = Voucher(self.address, self.served.node, cumulative, name).replace(**changes)
        signature = voucher.sign(self.served.vault_domain, self.key.private_key)
        return {"voucher": voucher.to_json(), "signature": "0x" + signature.hex()}


def flat(voucher: dict[str, Any]) -> dict[str, Any]:
    """The form of a voucher that rides with a request."""
    return {**voucher["voucher"], "signature": voucher["signature"]}


def request_hash(body: dict[str, Any]) -> bytes:
    """The request hash of a body."""
    request: Request = Request.from_json(body["request"])
    return bytes(request.struct_hash())


class ScriptedGenerator:
    """The scripted engine without its process: the same tokens, no HTTP. `gate`, if set, holds every token back."""

    def __init__(self) -> None:
        self.fail_after: int | None = None
        self.gate: asyncio.Semaphore | None = None
        self.closed = 0
        self.started = 0

    async def health(self) -> bool:
        return True

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: bytes,
        temperature_milli: int,
        max_tokens: int,
        prompt_root: bytes,
        end_token_ids: Collection[int],
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[EngineToken]:
        self.started += 1
        last = set(stop_token_ids) | (set() if ignore_eos else set(end_token_ids))
        try:
            for position in range(max_tokens):
                if self.gate is not None:
                    await self.gate.acquire()
                if self.fail_after is not None and position >= self.fail_after:
                    raise Unavailable("the engine died.")
                listed = listed_tokens(list(prompt_ids), position, PROFILE.vocab_size, 2)
                chosen = choose(listed, seed, position, temperature_milli)
                ends = chosen in last
                finish = "stop" if ends else "length" if position == max_tokens - 1 else None
                yield EngineToken(chosen, dict(listed)[chosen], tuple(listed), finish)
                if finish:
                    return
                await asyncio.sleep(0)
        finally:
            self.closed += 1


def settings_for(data: Path, **changes: Any) -> NodeSettings:
    """Settings of a node under test."""
    values: dict[str, Any] = {
        "rpc_url": "http://127.0.0.1:1",
        "deployment": data / "deployment.json",
        "data": data,
        "key": data / "key.json",
        "batch_count": 4,
        "batch_age": 30.0,
        "escrow_cache": 0.0,
        "retry_delay": 0.0,
        "voucher_patience": 50.0,
        "heartbeat": 0.05,
    }
    return NodeSettings(**{**values, **changes})


@dataclass
class Kit:
    """A node with a model chain and an in-process engine. Time is the chain's."""

    data: Path
    changes: dict[str, Any] = field(default_factory=dict)
    key: Key = field(default_factory=lambda: key_of("node"))

    def __post_init__(self) -> None:
        self.chain = ModelChain(self.key.address, PROFILE, [Offer(MODEL_ID, 1, INPUT_PRICE, OUTPUT_PRICE)])  # type: ignore[arg-type]
        self.engine = ScriptedGenerator()
        self.start()
        self.client = Client(self.node.served)
        self.chain.state.escrow[self.client.address] = 10**9

    def start(self) -> None:
        """Open the node, as after a crash: only the database and the chain are still there."""
        settings = settings_for(self.data, **self.changes)
        store = Store(self.data / "node.db", node=self.key.address, chain_id=CHAIN_ID, log=LOG)
        self.node = Node(
            settings=settings,
            chain=self.chain,
            engine=self.engine,
            engine_statement="scripted",
            store=store,
            key=self.key,
            served=choose_served(settings, self.chain),
            clock=lambda: float(self.chain.state.time),
        )
        self.node.check_start()

    def restart(self) -> None:
        """Close and open again."""
        self.node.store.close()
        self.start()

    def round(self, seconds: int = 1) -> None:
        """A block and a round of the background jobs, twice, so that what was sent is mined and seen."""
        for _ in range(2):
            self.node.jobs.step()
            assert self.node.jobs.fatal is None
            self.chain.mine(seconds)
        self.node.jobs.step()
        assert self.node.jobs.fatal is None

    async def answer(self, body: dict[str, Any]) -> list[Any]:
        """Submit and return all events."""
        from poip_chain.service.node.admission import parse_submission
        from poip_chain.service.node.execution import ErrorEvent, ReceiptEvent
        from poip_chain.service.node.node import Stored

        outcome = await self.node.submit(parse_submission(body))
        if isinstance(outcome, Stored):
            return [outcome]
        events = []
        while not events or not isinstance(events[-1], ReceiptEvent | ErrorEvent):
            events.append(await outcome.events.get())
        assert outcome.task is not None
        await asyncio.wait([outcome.task])
        return events

    def ask(self, **changes: Any) -> Receipt:
        """One answered request; its receipt."""
        return self.ask_body(self.client.body(**changes))

    def ask_body(self, body: dict[str, Any]) -> Receipt:
        """One answered request; its receipt."""
        receipt: Receipt = asyncio.run(self.answer(body))[-1].stored.receipt
        return receipt

    def pay(self, cumulative: int, receipt: Receipt | bytes = ZERO_HASH) -> bool:
        """Give a voucher."""
        from poip_chain.service.node.admission import parse_voucher

        return self.node.accept_voucher(parse_voucher(self.client.voucher(cumulative, receipt), flat=False))


__all__ = ["Client", "Kit", "ScriptedGenerator", "Submission", "flat", "key_of", "request_hash", "settings_for"]
