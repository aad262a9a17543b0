"""The gateway's Prometheus metrics. Labels are few and fixed: no addresses, request hashes, keys or texts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ENDPOINTS = ("chat", "completions", "models", "nodes")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "poip_gateway_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self.tokens = Counter("poip_gateway_tokens", "Tokens of completed answers.", ("kind",), registry=self.registry)
        self.node_failures = Counter(
            "poip_gateway_node_failures", "Attempts that failed at a node.", ("reason",), registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "poip_gateway_first_token_seconds",
            "From sending a request to a node to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.response_seconds = Histogram(
            "poip_gateway_response_seconds",
            "Until a response, or the first bytes of a streamed one.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.running = Gauge("poip_gateway_requests_running", "Requests under way.", registry=self.registry)
        self.nodes = Gauge("poip_gateway_nodes", "Known nodes by state.", ("state",), registry=self.registry)
        self.open_attempts = Gauge(
            "poip_gateway_attempts_open", "Attempts whose outcome is not settled.", registry=self.registry
        )
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind=kind)
        for state in ("usable", "unfit"):
            self.nodes.labels(state=state)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
