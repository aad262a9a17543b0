"""Audit records: every rule of protocol section 6, then re-execution, then a verdict with its numbers.

The rules come from spec/offences.py, the scores from scoring.py. Here they become findings that a contract can judge,
and evidence that a person can reproduce. Nothing here follows the chain or sends anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from eth_hash.auto import keccak

from poip_chain.chain.rpc import Call
from poip_chain.economic.network import Network
from poip_chain.economic.types import Evidence as ReceiptEvidence
from poip_chain.errors import InvalidSignature, NotFound, Unavailable
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.fetch import Record
from poip_chain.proof.publication import Answer
from poip_chain.proof.receipts import check_receipt
from poip_chain.proof.reexecution import LogitSource
from poip_chain.proof.scoring import Judgement, judge
from poip_chain.proof.store import Observed
from poip_chain.spec.merkle import merkle_levels, merkle_proof
from poip_chain.spec.objects import Batch, Part, Profile, Receipt, Request, SamplingParams
from poip_chain.spec.offences import (
    NO_PART,
    Fault,
    Place,
    TranscriptFault,
    TranscriptRoots,
    is_equivocation,
    leaf_fault,
    receipt_fault,
    roots_fault,
    sequence_fault,
)
from poip_chain.spec.scores import Verdict
from poip_chain.spec.types import Hash32

MALFORMED = "malformed"
NOT_EXECUTED = "not_executed"
"""Verdict where no copy of the model is at hand: everything but the computation was checked."""


class BatchReceipts:
    """The receipts of a batch, and where each stands in its tree; the tree is built once, on demand."""

    def __init__(self, batch: Batch, receipts: Sequence[Receipt]) -> None:
        self.batch = batch
        self.receipts = receipts
        self._levels: list[list[Hash32]] | None = None

    def evidence(self, position: int) -> ReceiptEvidence:
        """The proof that the receipt stands at its position."""
        if self._levels is None:
            self._levels = merkle_levels([receipt.struct_hash() for receipt in self.receipts])
        proof, index = [], position
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):  # else it is promoted without a sibling
                proof.append(level[index ^ 1])
            index //= 2
        return ReceiptEvidence(batch=self.batch, index=position, proof=tuple(proof))


@dataclass(frozen=True, slots=True)
class Finding:
    """An offence. `call` is the transaction that proves it; None for what no contract judges yet (wrong computation).

    `key` names finding and transaction, so after a reorganisation the same offence in another batch is another key.
    """

    key: str
    kind: str
    call: Call | None
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an audit of one record came to: honest, fraud, cannot_tell, malformed or not_executed."""

    verdict: str
    judgement: Judgement | None = None
    findings: tuple[Finding, ...] = ()
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The numbers behind the verdict. Margins in 2**-16 logits, fingerprint in 1/64 nat."""
        document: dict[str, Any] = {"verdict": self.verdict, **self.detail}
        if self.judgement is not None:
            scores = self.judgement.scores
            document |= {
                "tokens": scores.tokens,
                "margin_sum": scores.margin_sum,
                "margin_max": scores.margin_max,
                "fingerprint_sum": scores.fingerprint_sum,
                "source": self.judgement.source,
            }
        if self.findings:
            document["findings"] = [{"kind": f.kind, **f.detail} for f in self.findings]
        return document


ReceiptsOf = Callable[[int], BatchReceipts | None]


class Auditor:
    """Audits for one network. `sources` re-execute, by model id; a model without one is checked but not executed."""

    def __init__(self, network: Network, sources: Mapping[bytes, LogitSource]) -> None:
        self._network = network
        self._sources = sources
        self._profiles: dict[tuple[bytes, int], Profile] = {}

    def profile(self, batch: Batch) -> Profile:
        """The profile that the batch pins; asked of the chain once, since profiles are immutable."""
        key = (batch.model_id, batch.profile_version)
        if key not in self._profiles:
            self._profiles[key] = self._network.models.profile(*key)
        return self._profiles[key]

    def audit(self, fetched: Sequence[tuple[ReceiptEvidence, Record]]) -> list[Outcome | Unavailable]:
        """Outcomes for records with their places in batches, in order. Answers of one profile share forwards.

        Unavailable, as a value, where what re-executes was away: that says nothing of the answer, nor of the others.
        """
        outcomes: dict[int, Outcome | Unavailable] = {}
        to_execute: dict[tuple[bytes, int], list[int]] = {}
        for i, (place, record) in enumerate(fetched):
            batch = committed_in(place)
            findings = self.record_findings(place, record)
            if findings:
                outcomes[i] = Outcome(MALFORMED, findings=tuple(findings))
            elif batch.model_id not in self._sources:
                outcomes[i] = Outcome(NOT_EXECUTED, detail={"reason": f"no copy of model 0x{batch.model_id.hex()}"})
            elif not record.transcript.output_ids:
                outcomes[i] = Outcome(Verdict.HONEST, detail={"reason": "cancelled before the first token"})
            else:
                to_execute.setdefault((batch.model_id, batch.profile_version), []).append(i)
        for (model_id, _), indices in to_execute.items():
            profile = self.profile(committed_in(fetched[indices[0]][0]))
            try:
                judgements = judge([fetched[i][1] for i in indices], profile, self._sources[model_id])
            except Unavailable as error:
                outcomes |= dict.fromkeys(indices, error)
                continue
            for i, judgement in zip(indices, judgements, strict=True):
                outcomes[i] = _executed(fetched[i][0], judgement)
        return [outcomes[i] for i in range(len(fetched))]

    def record_findings(self, place: ReceiptEvidence, record: Record) -> list[Finding]:
        """What the receipt shows beside its request, and the transcript beside both."""
        batch = committed_in(place)
        fault = receipt_fault(record.receipt, record.request, record.params, self.profile(batch), batch)
        if fault is not None:
            call = self._network.offences.prove_receipt(record.receipt, place, record.request, record.params)
            return [_finding(place, fault, call)]
        leaves = {part: record.transcript.leaves(part) for part in Part}
        return self._leaf_findings(place, record.receipt, record.request, record.params, record.roots(), leaves)

    def published_findings(
        self, place: ReceiptEvidence, known: Answer, leaves: Mapping[Part, Sequence[bytes]]
    ) -> list[Finding]:
        """The same for an answer that was published on chain, whose leaves may not even parse. `leaves` holds the parts
        that are published whole so far."""
        batch = committed_in(place)
        fault = receipt_fault(known.receipt, known.request, known.params, self.profile(batch), batch)
        if fault is not None:
            call = self._network.offences.prove_receipt(known.receipt, place, known.request, known.params)
            return [_finding(place, fault, call)]
        return self._leaf_findings(place, known.receipt, known.request, known.params, known.roots, leaves)

    def _leaf_findings(
        self,
        place: ReceiptEvidence,
        receipt: Receipt,
        request: Request,
        params: SamplingParams,
        roots: TranscriptRoots,
        leaves: Mapping[Part, Sequence[bytes]],
    ) -> list[Finding]:
        batch = committed_in(place)
        found = _first_fault(receipt, request, params, self.profile(batch), roots, leaves)
        if found is None:
            return []
        if found.part == NO_PART:
            leaf, leaf_proof = b"", []
        else:
            part = leaves[Part(found.part)]
            leaf, leaf_proof = part[found.leaf_index], merkle_proof(part, [found.leaf_index])
        call = self._network.offences.prove_transcript(
            receipt, place, request, params, roots, found.part, found.leaf_index, leaf, leaf_proof
        )
        return [_finding(place, found.fault, call)]

    def sequence_findings(self, known: BatchReceipts) -> list[Finding]:
        """What the batch's receipts show without their requests: places, totals, overlaps of a payer's running total."""
        batch, receipts = known.batch, known.receipts
        last_of_payer: dict[str, int] = {}
        pairs = [(i, i) for i in range(len(receipts))] + list(pairwise(range(len(receipts))))
        for i, receipt in enumerate(receipts):
            if receipt.payer in last_of_payer:
                pairs.append((last_of_payer[receipt.payer], i))
            last_of_payer[receipt.payer] = i
        for i, j in pairs:
            fault = sequence_fault(receipts[i], receipts[j], Place(batch, i), Place(batch, j))
            if fault is not None:
                first, second = known.evidence(i), known.evidence(j)
                call = self._network.offences.prove_sequence(receipts[i], first, receipts[j], second)
                return [_finding(second, fault, call)]  # one conviction is all that a batch has to give
        return []

    def equivocation_finding(self, a: Observed, b: Observed, receipts_of: ReceiptsOf) -> Finding | None:
        """The offence that two receipts of one node make together, None if they do not, or cannot be shown to."""
        if not is_equivocation(a.receipt, b.receipt):
            return None
        sides = []
        for observed in (a, b):
            committed = None if observed.batch_id is None else receipts_of(observed.batch_id)
            if committed is not None and observed.position is not None:
                sides.append(committed.evidence(observed.position))
            elif self._signed(observed):
                sides.append(ReceiptEvidence(signature=observed.signature))
            else:
                return None
        call = self._network.offences.prove_equivocation(a.receipt, sides[0], b.receipt, sides[1])
        hashes = sorted((a.receipt.struct_hash().hex(), b.receipt.struct_hash().hex()))
        detail = {"node": a.receipt.node, "seqs": [a.receipt.seq, b.receipt.seq], "receipts": hashes}
        return Finding(f"equivocation:{hashes[0][:16]}:{hashes[1][:16]}:{digest(call)}", "equivocation", call, detail)

    def _signed(self, observed: Observed) -> bool:
        try:
            check_receipt(self._network, observed.receipt, observed.signature)
        except (InvalidSignature, NotFound):
            return False
        return True

    def write_evidence(self, path: Path, place: ReceiptEvidence, record: Record, outcome: Outcome) -> Path:
        """Keep everything that somebody else needs to repeat the audit."""
        batch = committed_in(place)
        evidence = Evidence(
            chain_id=self._network.chain.chain_id,
            log=self._network.log.address,
            batch=batch,
            position=place.index,
            receipt_proof=list(place.proof),
            profile=self.profile(batch),
            record=record,
            result=outcome.to_json(),
        )
        return evidence.write(path)


def committed_in(place: ReceiptEvidence) -> Batch:
    """The batch of a committed receipt's evidence."""
    if place.batch is None:
        raise ValueError("an uncommitted receipt has no batch.")
    return place.batch


def digest(call: Call) -> str:
    """A short name of a transaction's content."""
    return keccak(call.data).hex()[:16]


def write_proposal(directory: Path, finding: Finding) -> Path:
    """Write a transaction that the watchtower would send, for a person to look at and send."""
    if finding.call is None:
        raise ValueError("only a finding with a transaction can be proposed.")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (finding.key.replace(":", "-") + ".json")
    document = {
        "kind": finding.kind,
        "detail": finding.detail,
        "to": finding.call.to,
        "data": "0x" + finding.call.data.hex(),
        "description": finding.call.description,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
    return path


def _first_fault(
    receipt: Receipt,
    request: Request,
    params: SamplingParams,
    profile: Profile,
    roots: TranscriptRoots,
    leaves: Mapping[Part, Sequence[bytes]],
) -> TranscriptFault | None:
    fault = roots_fault(receipt, request, roots)
    if fault is not None:
        return TranscriptFault(fault, NO_PART, 0)
    for part, data in leaves.items():
        for index, leaf in enumerate(data):
            fault = leaf_fault(receipt, request, params, profile, part, index, leaf)
            if fault is not None:
                return TranscriptFault(fault, part, index)
    return None


def _finding(place: ReceiptEvidence, fault: Fault, call: Call) -> Finding:
    kind = fault.name.lower()
    return Finding(f"{_key(kind, place)}:{digest(call)}", kind, call, _where(place))


def _executed(place: ReceiptEvidence, judgement: Judgement) -> Outcome:
    verdict = judgement.verdict
    if verdict is not Verdict.FRAUD:
        return Outcome(verdict, judgement)
    # Wrong computation is judged by the dispute court; until it stands, the evidence is kept for it.
    worst = max(range(len(judgement.positions)), key=lambda i: judgement.positions[i].margin)
    detail = {**_where(place), "worst_token": worst, "worst_margin": judgement.positions[worst].margin}
    kind = "wrong_computation"
    return Outcome(verdict, judgement, (Finding(_key(kind, place), kind, None, detail),))


def _key(kind: str, place: ReceiptEvidence) -> str:
    batch = committed_in(place)
    return f"{kind}:{batch.id}:{batch.root.hex()[:16]}:{place.index}"


def _where(place: ReceiptEvidence) -> dict[str, Any]:
    batch = committed_in(place)
    return {"node": batch.node, "batch": batch.id, "position": place.index}
