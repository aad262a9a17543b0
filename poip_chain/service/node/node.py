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
    check_backing,
    check_credit,
    check_deadline,
    check_submission,
)
from poip_chain.service.node.answers import Duties, Transcripts
from poip_chain.service.node.batching import Batching
from poip_chain.service.node.collection import Collector
from poip_chain.service.node.court import Defence
from poip_chain.service.node.execution import Engine, Executor, Job
from poip_chain.service.node.jobs import Jobs
from poip_chain.service.node.ledger import Ledger
from poip_chain.service.node.metrics import NodeMetrics
from poip_chain.service.node.ports import Backing, Escrow, NodeChain
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


class BackingCache:
    """The node's free stake and what belongs to it, asked of the chain at most every `lifetime` seconds. Thread-safe."""

    def __init__(self, chain: NodeChain, lifetime: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain, self._lifetime, self._clock = chain, lifetime, clock
        self._known: tuple[float, Backing] | None = None

    def get(self, *, fresh: bool = False) -> Backing:
        """What stands behind the node's next receipts. Raises Unavailable without a chain."""
        known = self._known
        if known is not None and not fresh and self._clock() - known[0] < self._lifetime:
            return known[1]
        asked = self._clock()
        backing = self._chain.backing()
        self._known = (asked, backing)
        return backing


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
        defence: Defence | None = None,
    ) -> None:
        self.settings, self.chain, self.engine, self.store, self.served = settings, chain, engine, store, served
        self.defence = defence
        self.key_address = key.address
        self.engine_statement = engine_statement
        self.metrics = NodeMetrics()
        self.metrics.capacity.set(settings.capacity)
        self.metrics.info.labels(version=package_version()).set(1)
        self.ledger = Ledger(store)
        self._clock = clock
        full = served.full_context_fee()
        # As much again for what runs: who fills the node's places may owe for as many answers when the next ones begin.
        known = settings.credit_limit if settings.credit_limit is not None else 2 * settings.capacity * full
        fallback = settings.credit_limit if settings.credit_limit is not None else settings.capacity * full
        self._credit = Credit(
            known=known,
            new=settings.new_client_credit if settings.new_client_credit is not None else fallback,
            prepaid=settings.max_prepaid if settings.max_prepaid is not None else 1000 * full,
        )
        self._escrows = EscrowCache(chain, settings.escrow_cache)
        self._backing = BackingCache(chain, settings.escrow_cache)
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
            model_id=served.model_id,
            retention=settings.transcript_retention,
            clock=clock,
        )

    def check_start(self) -> None:
        """Compare database, key and chain; raises IntegrityError or ConfigurationError if this node must not sign."""
        self.ledger.retry_now()
        self.jobs.see_time()
        self.store.check_against_chain(self.chain.next_seq(), self.chain.node_cum())
        self._check_key(self.chain.next_seq(), self.store.next_seq())
        endpoint = self.settings.public_endpoint
        if len(endpoint) > MAX_LOCATOR_BYTES or not endpoint.isascii():
            raise ConfigurationError(f"the endpoint must be at most {MAX_LOCATOR_BYTES} ASCII characters.")

    def _check_key(self, committed: int, next_seq: int) -> None:
        """A batch is sent by the key of its first receipt, so a key has work until its last receipt is committed."""
        waiting = committed < next_seq
        first = committed if waiting else next_seq
        key = self.chain.signing_key(first)
        if key != self.key_address:
            why = f"receipt {first} of node {self.chain.node} is the key {key}'s, not {self.key_address}'s"
            raise ConfigurationError(
                f"{why}, and it waits to be committed." if waiting else f"{why}.",
                hint="Register the node, or give that key. After a rotation the old key commits its own receipts first.",
            )
        if self.chain.signing_key(next_seq) != self.key_address and self.store.key_limit(self.key_address) is None:
            self.store.set_key_limit(self.key_address, next_seq)
        limit = self.store.key_limit(self.key_address)
        if limit is not None and next_seq >= limit and not waiting:
            raise ConfigurationError(
                f"receipt {next_seq} of node {self.chain.node} will be another key's: this one signs those below {limit}.",
                hint="Start the node with its new key when that has taken effect.",
            )

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
        backing = await asyncio.to_thread(self._backing.get)
        try:
            return self._start(submission, escrow, backing)
        except RequestRefused as refusal:
            if refusal.code not in ("insufficient_escrow", "price_too_high", "stake_busy"):
                raise
        # The figures may be older than a deposit, a new offer or a batch that just became final.
        escrow = await asyncio.to_thread(self._escrows.get, payer, fresh=True)
        backing = await asyncio.to_thread(self._backing.get, fresh=True)
        return self._start(submission, escrow, backing)

    def _check_committing(self) -> None:
        """A receipt that cannot be committed is worth nothing to the client and may cost the node its stake."""
        if self.jobs.fatal is not None or self.batching.blocked is not None:
            raise RequestRefused(
                503,
                "cannot_commit",
                f"this node takes no requests: it cannot commit its receipts ({self.jobs.fatal or self.batching.blocked}).",
                retry_after=60,
            )
        # A batch interval early: what is signed is committed about then, and the log's grace stays for what goes wrong.
        now = max(self._clock(), self.jobs.chain_time)
        if self.jobs.sunset and now + self.settings.batch_age >= self.jobs.sunset:
            raise RequestRefused(
                503,
                "model_sunset",
                f"this node takes no requests: its model is served until {self.jobs.sunset} (now {int(now)}).",
                hint="Ask for a model that stays: `poip model list` shows them.",
                retry_after=60,
            )
        limit = self.store.key_limit(self.key_address)
        if limit is not None and self.store.next_seq() + self.executor.running() >= limit:
            raise RequestRefused(
                503,
                "key_rotated",
                "this node takes no requests: its next receipts are for its new key.",
                retry_after=60,
            )

    def _start(self, submission: Submission, escrow: Escrow, backing: Backing) -> Job | Stored:
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
        check_backing(
            submission,
            self.served,
            backing,
            self.store.uncommitted(backing.next_seq),
            running=self.executor.running(),
            running_fees=self.executor.running_fees(),
            batch_count=self.settings.batch_count,
        )
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
        if self.defence is not None:
            trouble.update(self.defence.trouble())
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
