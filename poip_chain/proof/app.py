"""Put a watchtower together from its settings and run it until it is told to stop."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import structlog
from prometheus_client import Counter, start_http_server

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.follower import Follower
from poip_chain.chain.keys import load, password_from
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.economic.network import Network
from poip_chain.errors import ConfigurationError
from poip_chain.proof.audit import Auditor
from poip_chain.proof.court import open_court
from poip_chain.proof.reexecution import EngineSource, LogitSource, TorchSource
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import open_store
from poip_chain.proof.watchtower import Watchtower
from poip_chain.spec.eip712 import parse_hex

ROUNDS = Counter("poip_watchtower_events", "What the rounds did.", ["event"])


@contextmanager
def open_watchtower(settings: WatchtowerSettings) -> Iterator[Watchtower]:
    """A watchtower with its chain, store and models, closed at the end.

    Raises ConfigurationError if the settings do not fit together, Unavailable without a chain.
    """
    if settings.mode is Mode.DEFEND and settings.key is None:
        raise ConfigurationError("mode defend needs a key to post bonds with.", hint="Name a keystore with --key.")
    with ExitStack() as stack:
        chain = stack.enter_context(Chain(settings.rpc_url))
        deployment = Deployment.load(settings.deployment)
        network = Network(chain, deployment)
        network.check()
        store = stack.enter_context(open_store(settings.data))
        sources = [network.log.event(name) for name in ("BatchCommitted", "BatchFinal", "BatchConvicted")]
        sources += [network.availability.event(name) for name in ("Challenged", "Answered", "Resolved")]
        follower = Follower(
            chain, settings.data / "follower.db", "watchtower", sources, deployment.block, settings.confirmations
        )
        stack.callback(follower.close)
        outbox = None
        if settings.mode is Mode.DEFEND and settings.key is not None:
            key = load(settings.key, password_from(settings.password_file))
            path = settings.data / "outbox" / f"{key.address}.db"
            outbox = stack.enter_context(Outbox(chain, key, path))
        auditor = Auditor(network, logit_sources(settings))
        court = open_court(settings, network, store, outbox)
        yield Watchtower(settings, chain, network, follower, store, auditor, outbox, court=court)


def logit_sources(settings: WatchtowerSettings) -> dict[bytes, LogitSource]:
    """What re-executes each model: its directory in this process, or a vLLM server that serves it."""
    from poip_chain.service.engine.model import prepare

    sources: dict[bytes, LogitSource] = {}
    for directory in settings.models:
        sources[prepare(directory).model_id] = TorchSource(directory, settings.torch_threads)
    for model_id, url in settings.engine_urls.items():
        sources[parse_hex(model_id, "model id", 32)] = EngineSource(url)
    return sources


def run(settings: WatchtowerSettings) -> None:
    """Run until SIGTERM or SIGINT. Every round is safe to be killed in."""
    configure_logging()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.metrics_port is not None:
        try:
            start_http_server(settings.metrics_port, addr="127.0.0.1")
        except OSError as error:
            raise ConfigurationError(
                f"cannot serve metrics on port {settings.metrics_port} (watchtower.metrics_port): {error.strerror}.",
                hint="Choose another port, or stop what listens there.",
            ) from error
    with open_watchtower(settings) as watchtower:
        watchtower.run(stop, lambda name, count: ROUNDS.labels(name).inc(count))


def configure_logging() -> None:
    """One JSON object a line on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
