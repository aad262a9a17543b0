"""One inference node: its parts put together, and what the HTTP layer may ask of it.

`Node` takes ready parts, so that tests can give it a model of the chain and a scripted engine; `open_node` makes the
real ones from settings.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import structlog

from poip_chain.chain.keys import Key
from poip_chain.errors import ConfigurationError, PoipError, Unavailable
from poip_chain.service.node.admission import (
    Account,
    Credit,
    Served,
    SignedVoucher,
    Submission,
    check_credit,
    check_deadline,
    check_submission,
)
from poip_chain.service.node.answers import Duties, Transcripts
from poip_chain.service.node.batching import Batching
from poip_chain.service.node.collection import Collector
from poip_chain.service.node.execution import Engine, Executor, Job
from poip_chain.service.node.jobs import Jobs
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.metrics import NodeMetrics
from poip_chain.service.node.ports import Escrow, NodeChain
from poip_chain.service.node.receipts import ReceiptWriter, read_record
from poip_chain.service.node.refusals import RequestRefused
from poip_chain.service.node.schema import StoredReceipt
from poip_chain.service.node.settings import NodeSettings
from poip_chain.service.node.store import Store
from poip_chain.service.node.transactions import Transactions
from poip_chain.service.node.vouchers import accept_voucher
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address

log = structlog.get_logger("poip.node")
T = TypeVar("T")

MAX_LOCATOR_BYTES = 128
_MAX_CACHED_PAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A request that has its receipt already."""

    stored: StoredReceipt
    transcript: Transcript


class EscrowCache:
    """Escrow figures, asked of the chain at most every `lifetime` seconds per payer. Thread-safe."""

    def __init__(self, chain: NodeChain, lifetime: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain, self._lifetime, self._clock = chain, lifetime, clock
        self._known: dict[Address, tuple[float, Escrow]] = {}
        self._lock = threading.Lock()

    def get(self, payer: Address, *, fresh: bool = False) -> Escrow:
        """The payer's escrow with this node. Raises Unavailable without a chain."""
        with self._lock:
            known = self._known.get(payer)
        if known is not None and not fresh and self._clock() - known[0] < self._lifetime:
            return known[1]
        asked = self._clock()
        escrow = self._chain.escrow(payer)
        with self._lock:
            if len(self._known) >= _MAX_CACHED_PAYERS:
                self._known.pop(next(iter(self._known)))
            self._known[payer] = (asked, escrow)
        return escrow


class Node:
    """See the module's docstring. `submit` and `drain` belong to the event loop; everything else is synchronous."""

    def __init__(
        self,
        *,
        settings: NodeSettings,
        chain: NodeChain,
        engine: Engine,
        engine_statement: str,
        store: Store,
        key: Key,
        served: Served,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self.chain, self.engine, self.store, self.served = settings, chain, engine, store, served
        self.key_address = key.address
        self.engine_statement = engine_statement
        self.metrics = NodeMetrics()
        self.metrics.capacity.set(settings.capacity)
        self.metrics.info.labels(version=package_version()).set(1)
        self.ledger = Ledger(store)
        self._clock = clock
        full = served.full_context_fee()
        known = settings.credit_limit if settings.credit_limit is not None else settings.capacity * full
        self._credit = Credit(
            known=known,
            new=settings.new_client_credit if settings.new_client_credit is not None else known,
            prepaid=settings.max_prepaid if settings.max_prepaid is not None else 1000 * full,
        )
        self._escrows = EscrowCache(chain, settings.escrow_cache)
        transactions = Transactions(chain, self.ledger, clock, settings.retry_delay)
        writer = ReceiptWriter(store, key.private_key, served.log_domain, clock)
        self.executor = Executor(
            engine=engine,
            engine_statement=engine_statement,
            writer=writer,
            profile=served.profile,
            capacity=settings.capacity,
            stall_timeout=settings.stall_timeout,
            metrics=self.metrics,
            clock=clock,
        )
        self.transcripts = Transcripts(
            store, self.ledger, chain, self.metrics, withhold_after=settings.withhold_after, clock=clock
        )
        self.collector = Collector(
            store,
            self.ledger,
            chain,
            transactions,
            patience=settings.voucher_patience,
            withdraw_threshold=settings.withdraw_threshold,
            depth=settings.finality_blocks,
        )
        self.batching = Batching(
            store,
            chain,
            transactions,
            batch_count=settings.batch_count,
            batch_age=settings.batch_age,
            locator=settings.public_endpoint,
            clock=clock,
        )
        self.jobs = Jobs(
            store=store,
            ledger=self.ledger,
            chain=chain,
            batching=self.batching,
            collector=self.collector,
            duties=Duties(store, self.ledger, chain, transactions, withhold_after=settings.withhold_after),
            metrics=self.metrics,
            retention=settings.transcript_retention,
            clock=clock,
        )

    def check_start(self) -> None:
        """Compare database, key and chain; raises IntegrityError or ConfigurationError if this node must not sign."""
        self.ledger.retry_now()
        self.store.check_against_chain(self.chain.next_seq(), self.chain.node_cum())
        seq = self.store.next_seq()
        signer = self.chain.signing_key(seq)
        if signer != self.key_address:
            raise ConfigurationError(
                f"receipt {seq} of node {self.chain.node} must be signed by {signer}, not by {self.key_address}.",
                hint="Register the node, or give the key that is valid now.",
            )
        endpoint = self.settings.public_endpoint
        if len(endpoint) > MAX_LOCATOR_BYTES or not endpoint.isascii():
            raise ConfigurationError(f"the endpoint must be at most {MAX_LOCATOR_BYTES} ASCII characters.")

    async def submit(self, submission: Submission) -> Job | Stored:
        """Admit a request, or find that it was answered before. Raises PoipError for every refusal."""
        await asyncio.to_thread(check_submission, submission, self.served)
        payer = submission.request.client
        if submission.voucher is not None:
            await asyncio.to_thread(self.accept_voucher, submission.voucher, payer)
        if (known := await asyncio.to_thread(self._stored, submission)) is not None:
            return known
        self._check_committing()
        self.executor.check_room(submission)
        # By the wall clock, which also dates the receipt; chain time plays no part in an answer.
        check_deadline(submission.request, int(self._clock()))
        escrow = await asyncio.to_thread(self._escrows.get, payer)
        try:
            return self._start(submission, escrow)
        except RequestRefused as refusal:
            if refusal.code != "insufficient_escrow":
                raise
        # The figures may be older than the deposit that the client just made.
        return self._start(submission, await asyncio.to_thread(self._escrows.get, payer, fresh=True))

    def _check_committing(self) -> None:
        """A receipt that cannot be committed is worth nothing to the client and may cost the node its stake."""
        if self.jobs.fatal is not None or self.batching.blocked is not None:
            raise RequestRefused(
                503,
                "cannot_commit",
                f"this node takes no requests: it cannot commit its receipts ({self.jobs.fatal or self.batching.blocked}).",
                retry_after=60,
            )

    def _start(self, submission: Submission, escrow: Escrow) -> Job | Stored:
        """The last checks and the start, without a pause in between in which another request could slip in."""
        # It may have been answered while the escrow was asked for.
        if (known := self._stored(submission)) is not None:
            return known
        self.executor.check_room(submission)
        payer = submission.request.client
        account = Account(
            payer_cum=self.store.payer_cum(payer),
            paid=self.store.paid(payer),
            running=self.executor.running_fee(payer),
            available=escrow.available,
            settled=escrow.settled,
        )
        try:
            check_credit(submission, account, self._credit)
        except RequestRefused as refusal:
            if refusal.code == "voucher_due" and refusal.details is not None:
                refusal.details["unpaid_requests"] = ["0x" + h.hex() for h in self.store.unpaid(payer, 16)]
            raise
        return self.executor.start(submission)

    def _stored(self, submission: Submission) -> Stored | None:
        known = self.store.receipt_of(submission.request_hash)
        return None if known is None else Stored(known, read_record(self.store, known.receipt.seq).transcript)

    def accept_voucher(self, signed: SignedVoucher, payer: Address | None = None) -> bool:
        """Check and keep a voucher; see vouchers.accept_voucher."""
        running = self.executor.running_fee(signed.voucher.payer)
        try:
            news = accept_voucher(
                self.store, self.served, signed, max_prepaid=self._credit.prepaid, running=running, payer=payer
            )
        except PoipError:
            self.metrics.vouchers.labels(result="refused").inc()
            raise
        self.metrics.vouchers.labels(result="new" if news else "known").inc()
        return news

    def receipt(self, request_hash: bytes) -> StoredReceipt:
        """The receipt of a request. Raises RequestRefused (409) while it runs, (404) if there is none."""
        stored = self.store.receipt_of(request_hash)
        if stored is not None:
            return stored
        if self.executor.is_running(request_hash):
            raise RequestRefused(409, "in_progress", "this request is being answered now.", retry_after=1)
        raise RequestRefused(404, "not_found", "this node has no receipt for this request.")

    def info(self) -> dict[str, Any]:
        """GET /v1/info."""
        served = self.served
        return {
            "node": served.node,
            "node_key": self.key_address,
            "chain_id": self.chain.chain_id,
            "deployment": {
                "log": served.log_domain.verifying_contract,
                "vault": served.vault_domain.verifying_contract,
                "registry": self.chain.registry_address,
            },
            "model_id": "0x" + served.model_id.hex(),
            "profile_version": served.profile_version,
            "input_price": str(served.input_price),
            "output_price": str(served.output_price),
            "max_context": served.profile.max_context,
            "engine_statement": self.engine_statement,
            "next_seq": self.store.next_seq(),
            "running": self.executor.running(),
            "capacity": self.settings.capacity,
            "version": package_version(),
        }

    async def health(self) -> dict[str, Any]:
        """Whether the node can serve; `status` is ok, degraded (serves, but a job has trouble) or down."""
        engine = await self.engine.health()
        self.metrics.engine_up.set(engine)
        trouble = self.jobs.trouble()
        if self.batching.blocked is not None:
            trouble["batches"] = self.batching.blocked
        down = not engine or self.jobs.fatal is not None or "follow" in trouble
        status = "down" if down else "degraded" if trouble else "ok"
        counts = await asyncio.to_thread(self.jobs.counts)
        return {
            "status": status,
            "engine": engine,
            "trouble": trouble,
            **dataclasses.asdict(counts),
            "fees": str(counts.fees),
        }

    def exposition(self) -> bytes:
        """GET /metrics."""
        self.metrics.running.set(self.executor.running())
        return self.metrics.exposition(self.jobs.refresh)


def choose_served(settings: NodeSettings, chain: NodeChain) -> Served:
    """What the node serves: its settings, completed from its offer in the registry. Raises ConfigurationError."""
    wanted = None if settings.model_id is None else bytes.fromhex(settings.model_id[2:])
    offers = [offer for offer in chain.offers() if wanted in (None, offer.model_id)]
    if len(offers) != 1:
        raise ConfigurationError(
            f"node {chain.node} has {len(offers)} offers in the registry"
            + (f" for model 0x{wanted.hex()}." if wanted else "."),
            hint="`poip node offer` makes one; with several, name the model in the settings (model_id).",
        )
    offer = offers[0]
    return Served(
        node=chain.node,
        model_id=bytes(offer.model_id),
        profile_version=offer.profile_version,
        profile=chain.profile(offer.model_id, offer.profile_version),
        input_price=offer.input_price if settings.input_price is None else settings.input_price,
        output_price=offer.output_price if settings.output_price is None else settings.output_price,
        log_domain=chain.log_domain,
        vault_domain=chain.vault_domain,
    )


def patiently(what: Callable[[], T], timeout: float, sleep: Callable[[float], None] = time.sleep) -> T:
    """Call `what` until it does not raise Unavailable any more, for at most `timeout` seconds."""
    until = time.monotonic() + timeout
    delay = 0.1
    while True:
        try:
            return what()
        except Unavailable as error:
            if time.monotonic() + delay > until:
                raise
            log.info("waiting", error=str(error)[:200])
            sleep(delay)
            delay = min(delay * 2, 2.0)


def package_version() -> str:
    """The version of this package."""
    try:
        return version("poip-chain")
    except PackageNotFoundError:
        return "unknown"
