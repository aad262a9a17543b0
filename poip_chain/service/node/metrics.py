"""The node's Prometheus metrics: prefix `poip_node_`, one base unit each; no addresses, hashes or prompts as labels.

What vLLM exports itself (queue, cache, time to first token) is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from poip_chain.service.node.schema import BatchState, CollectionState

WEI = 10**18


class NodeMetrics:
    """All metrics of one node, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("poip_node_requests", "Requests that ran, by how they ended.", ["outcome"], registry=r)
        self.refusals = Counter("poip_node_refusals", "Requests refused, by code.", ["code"], registry=r)
        self._tokens = Counter("poip_node_tokens", "Tokens in signed receipts.", ["kind"], registry=r)
        self.vouchers = Counter("poip_node_vouchers", "Vouchers that came in.", ["result"], registry=r)
        self.transcripts = Counter(
            "poip_node_audited_transcripts", "Audited transcripts asked for.", ["result"], registry=r
        )
        self.running = Gauge("poip_node_running_requests", "Requests that run now.", registry=r)
        self.capacity = Gauge("poip_node_capacity_requests", "Requests that may run at the same time.", registry=r)
        self.receipts = Gauge("poip_node_receipts", "Receipts signed so far.", registry=r)
        self.fees = Gauge("poip_node_fees_tokens", "Fees of all receipts, in whole tokens.", registry=r)
        self.unbatched = Gauge("poip_node_unbatched_receipts", "Receipts that are in no batch yet.", registry=r)
        self.batches = Gauge("poip_node_batches", "Batches by state.", ["state"], registry=r)
        self.collections = Gauge(
            "poip_node_collections", "Payers' shares of batches by state of their payment.", ["state"], registry=r
        )
        self.duties = Gauge("poip_node_open_duties", "Challenges and demands that wait.", ["kind"], registry=r)
        self.job_errors = Counter("poip_node_job_errors", "Failed rounds of background jobs.", ["job"], registry=r)
        self.chain_up = Gauge("poip_node_chain_up", "Whether the last question to the chain was answered.", registry=r)
        self.engine_up = Gauge("poip_node_engine_up", "Whether the engine answered last time.", registry=r)
        self.info = Gauge("poip_node_info", "Constant 1, with the version.", ["version"], registry=r)
        for outcome in ("stop", "length", "cancelled", "abandoned", "unavailable", "integrity_error", "input_mismatch"):
            self.requests.labels(outcome=outcome)
        for batch_state in BatchState:
            self.batches.labels(state=batch_state.value)
        for collection_state in CollectionState:
            self.collections.labels(state=collection_state.value)
        for job in ("follow", "duties", "batches", "finality", "collection", "withdrawal", "upkeep"):
            self.job_errors.labels(job=job)

    def answered(self, prompt_tokens: int, output_tokens: int) -> None:
        """Count the tokens of one receipt."""
        self._tokens.labels(kind="prompt").inc(prompt_tokens)
        self._tokens.labels(kind="output").inc(output_tokens)

    def exposition(self, refresh: Callable[[NodeMetrics], None]) -> bytes:
        """The text format, after `refresh` has set the gauges."""
        refresh(self)
        return generate_latest(self.registry)
