"""Fetch what an audit needs from a node over HTTP, as a distrustful reader: bounded, parsed, checked.

Knows the node's HTTP API (docs/architecture.md) and nothing of the chain. Anything a node answers that does not prove
itself raises `NodeWithholds`: for an auditor, wrong data and no data are the same thing. A node that dawdles costs a
bounded time, and only its own.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import httpx

from poip_chain.chain.endpoints import node_transport
from poip_chain.errors import InvalidInput, Unavailable
from poip_chain.spec.eip712 import parse_hex
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import Batch, Part, Receipt, Request, SamplingParams
from poip_chain.spec.offences import TranscriptRoots, roots_fault, tokens_of
from poip_chain.spec.strict_json import parse_json
from poip_chain.spec.transcript import Transcript, leaf_count, statement_hash

T = TypeVar("T")

MAX_RECEIPTS_BYTES = 64 * 1024 * 1024
"""65,536 receipts of about 900 bytes of JSON each."""
MAX_TRANSCRIPT_BYTES = 16 * 1024 * 1024
NODES_AT_ONCE = 16


class NodeWithholds(Unavailable):
    """The node did not serve data that it must serve, or served data that does not match its commitment."""


@dataclass(frozen=True, slots=True)
class Record:
    """One audited answer with everything that its receipt commits to, roots checked.

    statement_hash is that of the engine statement: an answer published on chain brings the hash without the text.
    request_signature is empty then, too: the contract does not ask for it.
    """

    request: Request
    request_signature: bytes
    params: SamplingParams
    receipt: Receipt
    transcript: Transcript
    statement_hash: bytes

    def roots(self) -> TranscriptRoots:
        """What the receipt's transcript_root commits to. Raises InvalidInput if a part cannot be hashed."""
        header = self.transcript.request_hash, self.transcript.finish_reason, self.statement_hash
        return TranscriptRoots(*header, *self.transcript.part_roots())

    def to_json(self) -> dict[str, Any]:
        """JSON form, as evidence files keep it."""
        return {
            "request": self.request.to_json(),
            "request_signature": "0x" + self.request_signature.hex(),
            "params": self.params.to_json(),
            "receipt": self.receipt.to_json(),
            "transcript": self.transcript.to_json(),
            "statement_hash": "0x" + self.statement_hash.hex(),
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Parse `to_json`'s form, or a node's (which states no statement_hash). Raises InvalidInput."""
        fields = {"request", "request_signature", "params", "receipt", "transcript"}
        if not isinstance(data, dict) or not fields <= set(data):
            raise InvalidInput(f"a record must be a JSON object with the fields {sorted(fields)}.")
        transcript = Transcript.from_json(data["transcript"])
        stated = data.get("statement_hash")
        return cls(
            request=Request.from_json(data["request"]),
            request_signature=parse_hex(data["request_signature"], "request_signature"),
            params=SamplingParams.from_json(data["params"]),
            receipt=Receipt.from_json(data["receipt"]),
            transcript=transcript,
            statement_hash=(
                statement_hash(transcript.engine_statement)
                if stated is None
                else parse_hex(stated, "statement_hash", 32)
            ),
        )


class NodeReader:
    """Reads batches and transcripts from one node's endpoint. `timeout` seconds bound each question as a whole, however
    slowly the answer drips. Not to be called from inside an event loop.

    Unless `private_endpoints`, an endpoint at an address that is not public is not connected to: it counts as withheld,
    since nobody else could read there either.
    """

    def __init__(self, endpoint: str, timeout: float, *, private_endpoints: bool = True) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._timeout = timeout
        self._private_endpoints = private_endpoints

    def receipts(self, batch: Batch) -> list[dict[str, Any]]:
        """The batch's receipts in order, `{"receipt", "signature"}` each, matching the committed root and count."""
        body = self._get(f"/v1/batches/{batch.id}/receipts", MAX_RECEIPTS_BYTES)
        entries = body.get("receipts")
        if not isinstance(entries, list) or len(entries) != batch.count:
            raise NodeWithholds(f"batch {batch.id}: the node did not serve its {batch.count} receipts.")
        try:
            receipts = [Receipt.from_json(entry["receipt"]) for entry in entries]
            signatures = ["0x" + parse_hex(entry["signature"], "signature", 65).hex() for entry in entries]
        except (InvalidInput, KeyError, TypeError) as error:
            raise NodeWithholds(f"batch {batch.id}: the node served a malformed receipt: {error}") from error
        if merkle_root([receipt.struct_hash() for receipt in receipts]) != batch.root:
            raise NodeWithholds(f"batch {batch.id}: the receipts served do not have the committed root.")
        return [
            {"receipt": receipt.to_json(), "signature": signature}
            for receipt, signature in zip(receipts, signatures, strict=True)
        ]

    def record(self, batch: Batch, position: int, receipt: Receipt) -> Record:
        """The full record of the receipt at `position`, matching the receipt's hashes."""
        body = self._get(f"/v1/batches/{batch.id}/transcripts/{position}", MAX_TRANSCRIPT_BYTES)
        # A node brings the statement's text, and no hash that could stand for another one.
        body.pop("statement_hash", None)
        try:
            record = Record.from_json(body)
        except InvalidInput as error:
            raise NodeWithholds(f"batch {batch.id}, receipt {position}: malformed transcript: {error}") from error
        return checked_record(record, receipt)

    def _get(self, path: str, limit: int) -> dict[str, Any]:
        try:
            body = parse_json(asyncio.run(self._fetch(path, limit)))
        except TimeoutError as error:
            raise NodeWithholds(f"{path}: the node did not answer within {self._timeout:g} s.") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, InvalidInput, ExceptionGroup) as error:
            raise NodeWithholds(f"{path}: the node did not answer: {error!r:.300}.") from error
        if not isinstance(body, dict):
            raise NodeWithholds(f"{path}: the node did not answer with a JSON object.")
        return body

    async def _fetch(self, path: str, limit: int) -> bytes:
        url = _url(self._endpoint, path)
        # Compressed bodies are not asked for: their size would be known only after they are unpacked.
        headers = {"accept-encoding": "identity", "accept": "application/json"}
        transport = node_transport(self._private_endpoints, verify=_tls() if url.startswith("https://") else False)
        async with (
            asyncio.timeout(self._timeout),
            httpx.AsyncClient(timeout=self._timeout, transport=transport, trust_env=False, headers=headers) as client,
            client.stream("GET", url, follow_redirects=False) as reply,
        ):
            if reply.status_code != 200:
                raise NodeWithholds(f"{path}: the node answered {reply.status_code}.")
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise NodeWithholds(f"{path}: the node sent a compressed body, which was not asked for.")
            data = bytearray()
            async for chunk in reply.aiter_raw():
                data += chunk
                if len(data) > limit:
                    raise NodeWithholds(f"{path}: the node sent more than {limit} bytes.")
            return bytes(data)


def _url(endpoint: str, path: str) -> str:
    """The URL below an endpoint. Anybody writes endpoints into the registry: one whose path would end up in a query or a
    fragment, or that brings credentials, is no endpoint."""
    if not endpoint.startswith(("http://", "https://")) or any(mark in endpoint for mark in "?#@ "):
        raise NodeWithholds(f"the node's endpoint {endpoint!r:.200} is no plain http or https address.")
    if (port := httpx.URL(endpoint).port) is not None and not 0 < port < 2**16:
        raise NodeWithholds(f"the node's endpoint {endpoint!r:.200} has no possible port.")
    return endpoint + path


@cache
def _tls() -> ssl.SSLContext:
    """Built once: it takes a tenth of a second."""
    return httpx.create_ssl_context(trust_env=False)


def fetch_all(jobs: Sequence[tuple[str, Callable[[], T]]], seconds: float) -> list[T | NodeWithholds | None]:
    """Ask several nodes side by side: (node, question) each. A node's questions go one after the other.

    The results in order: what the question returned or the NodeWithholds that it raised; None where a node's time, at
    least `seconds` in all, ran out before the question was asked.
    """
    results: list[T | NodeWithholds | None] = [None] * len(jobs)
    by_node: dict[str, list[int]] = {}
    for i, (node, _) in enumerate(jobs):
        by_node.setdefault(node, []).append(i)

    def ask(indices: list[int]) -> None:
        until = time.monotonic() + seconds
        for i in indices:
            if time.monotonic() >= until:
                return
            try:
                results[i] = jobs[i][1]()
            except NodeWithholds as error:
                results[i] = error

    if by_node:
        with ThreadPoolExecutor(min(NODES_AT_ONCE, len(by_node)), thread_name_prefix="fetch") as pool:
            for future in [pool.submit(ask, indices) for indices in by_node.values()]:
                future.result()
    return results


def checked_record(record: Record, receipt: Receipt) -> Record:
    """`record` if it belongs to the committed `receipt`: same receipt, request, parameters and transcript root, and as
    many leaves in each part as request and receipt say.

    Raises NodeWithholds otherwise: a record that does not match is not the one that was committed. A transcript with
    too many or too few leaves has no proofs that a contract accepts, so nobody can publish it: it counts as withheld.
    """
    if record.receipt != receipt:
        raise NodeWithholds("the node served the record of another receipt.")
    if record.request.struct_hash() != receipt.request_hash:
        raise NodeWithholds("the request that the node served is not the one in its receipt.")
    if record.params.params_hash() != record.request.params_hash:
        raise NodeWithholds("the parameters that the node served are not those of the request.")
    try:
        roots = record.roots()
    except InvalidInput as error:
        raise NodeWithholds(f"the transcript cannot be hashed: {error}") from error
    if roots.transcript_root() != receipt.transcript_root:
        raise NodeWithholds("the transcript that the node served does not have the root in its receipt.")
    if roots_fault(receipt, record.request, roots) is not None:
        return record  # an offence that the roots alone prove
    for part in Part:
        expected = leaf_count(part, tokens_of(receipt, record.request, part))
        if len(record.transcript.leaves(part)) != expected:
            raise NodeWithholds(f"the transcript's part {part.name.lower()} does not have {expected} leaves.")
    return record
