"""A scripted inference node: the node's HTTP API with real signatures and a script in place of a model.

It stands in for a node where a test needs an exact answer or an exact fault. It is honest unless a fault is queued:
each request takes the next entry of `faults`. Its fingerprints are made up so that they agree with the seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from eth_keys.datatypes import PrivateKey
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from poip_chain.control.view import Offer
from poip_chain.errors import InvalidInput
from poip_chain.spec.eip712 import parse_hex
from poip_chain.spec.objects import FinishReason, Receipt, Request, SamplingParams, Voucher
from poip_chain.spec.sampler import gumbel, position_key, uniform_bits
from poip_chain.spec.transcript import Transcript, prompt_root
from poip_chain.spec.types import Address
from tests.engines.scripted_chain import LOG, MODEL_ID, PROFILE, REGISTRY, VAULT, ScriptedChain
from tests.engines.serving import serving
from tests.engines.tiny_tokenizer import IM_END

Change = Callable[["Draft"], None]


def private_key(name: str) -> PrivateKey:
    """A fixed key for a role in a test."""
    return PrivateKey(hashlib.sha256(name.encode()).digest())


@dataclass
class Draft:
    """An answer before it is signed; a fault may change any part of it."""

    request: Request
    params: SamplingParams
    receipt: Receipt
    transcript: Transcript
    sign_with: PrivateKey


@dataclass
class Fault:
    """One deviation. `refuse`: (status, code); `stop_after`: close the connection after so many tokens;
    `silent_after`: say nothing more after so many tokens, until `ScriptedNode.release`; `drop_receipt`: close in place
    of the receipt event; `raw`: an event to send in place of the first token; `change`: rewrite the answer."""

    refuse: tuple[int, str] | None = None
    stop_after: int | None = None
    silent_after: int | None = None
    drop_receipt: bool = False
    raw: bytes | None = None
    change: Change | None = None
    forget: bool = False
    error_after: int | None = None


@dataclass
class ScriptedNode:
    """See the module's docstring. `reply` maps prompt ids to output ids; the end id is added if there is room."""

    chain: ScriptedChain
    name: str = "node"
    reply: Callable[[Sequence[int]], Sequence[int]] = lambda _: list(b"Hello, world.")
    input_price: int = 10
    output_price: int = 20
    demand_voucher: bool = False
    faults: deque[Fault] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.key = private_key(self.name)
        self.address = Address(self.key.public_key.to_checksum_address())
        self.url = ""
        self.next_seq = 0
        self.node_cum = 0
        self.payer_cum: defaultdict[str, int] = defaultdict(int)
        self.stored: dict[bytes, tuple[Draft, bytes]] = {}
        self.in_progress: set[bytes] = set()
        self.vouchers: list[Voucher] = []
        self.received: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/info", self._info),
                Route("/v1/requests", self._post, methods=["POST"]),
                Route("/v1/requests/{request_hash}", self._stored),
                Route("/v1/vouchers", self._voucher, methods=["POST"]),
                Route("/v1/batches/{batch_id}/receipts", self._batch),
            ]
        )
        self.batches: dict[int, list[tuple[Receipt, bytes]]] = {}

    @contextmanager
    def running(self) -> Iterator[ScriptedNode]:
        """Serve on a free port and register with the chain."""
        with serving(self.app) as url:
            self.url = url
            self.chain.register(self.address, self.address, url, self.offer())
            yield self

    def offer(self) -> Offer:
        """What the node asks in the registry."""
        return Offer(MODEL_ID, 1, self.input_price, self.output_price)

    def release(self) -> None:
        """Let a silent answer go on."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._gate.set)

    @property
    def paid(self) -> int:
        """The most that vouchers promise, in wei."""
        return max((voucher.cumulative for voucher in self.vouchers), default=0)

    # --- handlers ----------------------------------------------------------------------------------------------

    async def _info(self, http: HttpRequest) -> Response:
        return JSONResponse(
            {
                "node": self.address,
                "node_key": self.address,
                "chain_id": self.chain.chain_id,
                "deployment": {"log": LOG, "vault": VAULT, "registry": REGISTRY},
                "model_id": "0x" + MODEL_ID.hex(),
                "profile_version": 1,
                "input_price": str(self.input_price),
                "output_price": str(self.output_price),
                "max_context": PROFILE.max_context,
                "engine_statement": "scripted",
                "next_seq": self.next_seq,
                "running": len(self.in_progress),
                "capacity": 8,
                "version": "test",
            }
        )

    async def _post(self, http: HttpRequest) -> Response:
        self._loop = asyncio.get_running_loop()
        body = await http.json()
        self.received.append(body)
        request: Request = Request.from_json(body["request"])
        params = SamplingParams.from_json(body["params"])
        request_hash = request.struct_hash()
        if request.recover(self.chain.log_domain, parse_hex(body["signature"], "signature", 65)) != request.client:
            return _error(401, "invalid_signature")
        if request_hash in self.stored:
            draft, signature = self.stored[request_hash]
            return _stream(_once(_receipt_event(draft, signature)))
        if request_hash in self.in_progress:
            return _error(409, "in_progress")
        if prompt_root(body["prompt_ids"]) != request.prompt_root:
            return _error(400, "prompt_mismatch")
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.refuse:
            return _error(*fault.refuse)
        if self.chain.escrow(request.client, self.address).available < request.fee(request.max_tokens):
            return _error(402, "insufficient_escrow")
        if body["voucher"] is not None:
            signature = body["voucher"].pop("signature")
            self._keep(Voucher.from_json(body["voucher"]), parse_hex(signature, "signature", 65))
        elif self.demand_voucher and self.paid < self.payer_cum[request.client] + request.fee(request.max_tokens):
            return _error(402, "voucher_due")
        self.in_progress.add(request_hash)
        return _stream(self._answer(request, params, tuple(body["prompt_ids"]), fault))

    async def _answer(
        self, request: Request, params: SamplingParams, prompt_ids: tuple[int, ...], fault: Fault
    ) -> AsyncIterator[bytes]:
        ids = list(self.reply(prompt_ids))
        reason = FinishReason.STOP
        if len(ids) + 1 > request.max_tokens:
            ids, reason = ids[: request.max_tokens], FinishReason.LENGTH
        else:
            ids.append(params.stop_token_ids[0] if params.stop_token_ids else IM_END)
        sent = 0
        finished = False
        try:
            yield b": heartbeat\n\n"
            if fault.raw is not None:
                yield fault.raw
            for index, token_id in enumerate(ids):
                if fault.silent_after == index:
                    await self._gate.wait()
                if fault.error_after == index:
                    yield b'event: error\ndata: {"error": {"message": "engine died", "code": "engine_failed"}}\n\n'
                    return
                if fault.stop_after == index:
                    finished = fault.forget
                    return
                yield f'event: token\ndata: {{"i": {index}, "id": {token_id}}}\n\n'.encode()
                sent += 1
            finished = True
            draft, signature = self._finish(request, params, prompt_ids, ids, reason, fault)
            if not fault.drop_receipt:
                yield _receipt_event(draft, signature)
        finally:
            if not finished and sent and not fault.forget:
                self._finish(request, params, prompt_ids, ids[:sent], FinishReason.CANCELLED, fault)
            self.in_progress.discard(request.struct_hash())
            if not finished:
                self.cancelled.set()

    def _finish(
        self,
        request: Request,
        params: SamplingParams,
        prompt_ids: tuple[int, ...],
        ids: list[int],
        reason: FinishReason,
        fault: Fault,
    ) -> tuple[Draft, bytes]:
        transcript = Transcript(
            request.struct_hash(), int(reason), "scripted", prompt_ids, tuple(ids), fingerprints(request, params, ids)
        )
        fee = request.fee(len(ids))
        receipt = Receipt(
            node=self.address,
            seq=self.next_seq,
            request_hash=request.struct_hash(),
            model_id=request.model_id,
            transcript_root=transcript.root(),
            output_tokens=len(ids),
            finish_reason=int(reason),
            fee=fee,
            payer=request.client,
            payer_cum=self.payer_cum[request.client] + fee,
            node_cum=self.node_cum + fee,
            issued_at=self.chain.now,
        )
        draft = Draft(request, params, receipt, transcript, self.key)
        if fault.change:
            fault.change(draft)
        self.next_seq += 1
        self.payer_cum[request.client] += fee
        self.node_cum += fee
        signature = draft.receipt.sign(self.chain.log_domain, draft.sign_with)
        self.stored[request.struct_hash()] = draft, signature
        return draft, signature

    async def _stored(self, http: HttpRequest) -> Response:
        request_hash = bytes.fromhex(http.path_params["request_hash"][2:])
        if request_hash in self.in_progress:
            return _error(409, "in_progress")
        if request_hash not in self.stored:
            return _error(404, "not_found")
        draft, signature = self.stored[request_hash]
        return JSONResponse({"receipt": draft.receipt.to_json(), "signature": "0x" + signature.hex()})

    async def _voucher(self, http: HttpRequest) -> Response:
        body = await http.json()
        self._keep(Voucher.from_json(body["voucher"]), parse_hex(body["signature"], "signature", 65))
        return Response(status_code=204)

    def _keep(self, voucher: Voucher, signature: bytes) -> None:
        if voucher.recover(self.chain.vault_domain, signature) != voucher.payer or voucher.node != self.address:
            raise InvalidInput("a forged voucher")
        self.vouchers.append(voucher)

    async def _batch(self, http: HttpRequest) -> Response:
        receipts = self.batches.get(int(http.path_params["batch_id"]))
        if receipts is None:
            return _error(404, "not_found")
        return JSONResponse({"receipts": [{"receipt": r.to_json(), "signature": "0x" + s.hex()} for r, s in receipts]})


def fingerprints(
    request: Request, params: SamplingParams, ids: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Stated logits under which the sampler would choose just these ids with the request's seed."""
    rows = []
    for position, chosen in enumerate(ids):
        key = position_key(request.seed(), position)
        temperature = params.temperature_milli
        others = [token_id for token_id in range(9) if token_id != chosen][:8]
        row = []
        for token_id in others:
            lead = temperature * (gumbel(uniform_bits(key, chosen)) - gumbel(uniform_bits(key, token_id)))
            row.append((token_id, max(-(2**15), min(2**15 - 1, lead // (1000 * 1024) - 1))))
        rows.append(tuple(sorted(row, key=lambda entry: (-entry[1], entry[0]))))
    return tuple(rows)


def change_receipt(**changes: Any) -> Change:
    """A fault's `change` that replaces fields of the receipt by values, or by functions of the receipt."""

    def apply(draft: Draft) -> None:
        values = {name: value(draft.receipt) if callable(value) else value for name, value in changes.items()}
        draft.receipt = draft.receipt.replace(**values)

    return apply


def change_transcript(**changes: Any) -> Change:
    """Like change_receipt for the transcript; the receipt's root follows, so only the content is wrong."""

    def apply(draft: Draft) -> None:
        values = {name: value(draft.transcript) if callable(value) else value for name, value in changes.items()}
        draft.transcript = replace(draft.transcript, **values)
        draft.receipt = draft.receipt.replace(transcript_root=draft.transcript.root())

    return apply


def _receipt_event(draft: Draft, signature: bytes) -> bytes:
    payload = {
        "receipt": draft.receipt.to_json(),
        "signature": "0x" + signature.hex(),
        "transcript": draft.transcript.to_json(),
    }
    return f"event: receipt\ndata: {json.dumps(payload)}\n\n".encode()


async def _once(event: bytes) -> AsyncIterator[bytes]:
    yield event


def _stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream")


def _error(status: int, code: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": f"scripted refusal: {code}", "type": "x", "param": None, "code": code}}, status
    )
