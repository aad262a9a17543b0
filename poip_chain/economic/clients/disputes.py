"""The contracts that judge: offences at once, availability after its window."""

from __future__ import annotations

from collections.abc import Sequence

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.types import CaseStatus, ChallengeInfo, DemandInfo, Evidence
from poip_chain.spec.objects import Batch, Part, Receipt, Request, SamplingParams
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.types import Address, Hash32

NO_LEAF = 255
"""The `part` of prove_transcript that brings no leaf."""


class Offences(ContractClient):
    """Offences: equivocation, malformed receipts and transcripts."""

    NAME = "Offences"

    def prove_equivocation(self, a: Receipt, a_evidence: Evidence, b: Receipt, b_evidence: Evidence) -> Call:
        """Two different receipts with the same (node, seq) or (node, request)."""
        return self.call("prove_equivocation", a.values(), a_evidence.values(), b.values(), b_evidence.values())

    def prove_receipt(self, receipt: Receipt, evidence: Evidence, request: Request, params: SamplingParams) -> Call:
        """A receipt that contradicts its request."""
        return self.call("prove_receipt", receipt.values(), evidence.values(), request.values(), params.values())

    def prove_sequence(self, a: Receipt, a_evidence: Evidence, b: Receipt, b_evidence: Evidence) -> Call:
        """Two receipts of a node, `a` before `b` (or the same one twice), whose numbers do not add up."""
        return self.call("prove_sequence", a.values(), a_evidence.values(), b.values(), b_evidence.values())

    def prove_transcript(
        self,
        receipt: Receipt,
        evidence: Evidence,
        request: Request,
        params: SamplingParams,
        roots: TranscriptRoots,
        part: Part | int,
        leaf_index: int,
        leaf: bytes,
        leaf_proof: Sequence[bytes],
    ) -> Call:
        """A transcript that breaks a rule; `part` NO_LEAF for header and roots alone."""
        return self.call(
            "prove_transcript",
            receipt.values(),
            evidence.values(),
            request.values(),
            params.values(),
            roots.values(),
            int(part),
            leaf_index,
            leaf,
            list(leaf_proof),
        )


class Availability(ContractClient):
    """Availability: challenges to publish a transcript's leaves, demands to commit a receipt."""

    NAME = "Availability"

    def challenge_info(self, challenge_id: int) -> ChallengeInfo:
        """A challenge; `status` is 0 for an unknown one."""
        values = self.read("challenge_info", challenge_id)
        batch_id, index, part, first_leaf, deadline, status, bond = (int(value) for value in values[1:])
        challenger = Address(str(values[0]))
        return ChallengeInfo(challenger, batch_id, index, part, first_leaf, deadline, CaseStatus(status), bond)

    def demand_info(self, demand_id: int) -> DemandInfo:
        """A demand to commit; `status` is 0 for an unknown one."""
        values = self.read("demand_info", demand_id)
        return DemandInfo(
            Address(str(values[0])),
            Address(str(values[1])),
            values[2],
            values[3],
            CaseStatus(values[4]),
            Hash32(bytes(values[5])),
            values[6],
        )

    def claimable(self, account: Address) -> int:
        """What an account may claim, wei."""
        return int(self.read("credits", account))

    def challenge(self, batch: Batch, draw: int, part: Part, first_leaf: int) -> Call:
        """Ask for at most 8 leaves of the receipt that the audit's draw selects; the sender posts the bond."""
        return self.call("challenge", batch.values(), draw, int(part), first_leaf)

    def challenge_as_client(
        self, batch: Batch, part: Part, first_leaf: int, receipt: Receipt, signature: bytes
    ) -> Call:
        """The same by the payer of a receipt, selected or not."""
        return self.call("challenge_as_client", batch.values(), int(part), first_leaf, receipt.values(), signature)

    def answer(
        self,
        challenge_id: int,
        batch: Batch,
        receipt: Receipt,
        receipt_proof: Sequence[bytes],
        request: Request,
        params: SamplingParams,
        roots: TranscriptRoots,
        leaves: Sequence[bytes],
        proof: Sequence[bytes],
    ) -> Call:
        """Publish what was asked for; by anyone."""
        return self.call(
            "answer",
            challenge_id,
            batch.values(),
            receipt.values(),
            list(receipt_proof),
            request.values(),
            params.values(),
            roots.values(),
            list(leaves),
            list(proof),
        )

    def resolve(self, challenge_id: int, batch: Batch) -> Call:
        """Convict after the deadline, or return the bonds of a batch that was convicted meanwhile."""
        return self.call("resolve", challenge_id, batch.values())

    def demand_commit(self, receipt: Receipt, signature: bytes) -> Call:
        """Ask the node to commit a receipt that it delivered; the sender posts the bond."""
        return self.call("demand_commit", receipt.values(), signature)

    def resolve_demand(self, demand_id: int) -> Call:
        """After its window: slash if the receipt is not covered, else return the bond."""
        return self.call("resolve_demand", demand_id)

    def claim(self) -> Call:
        """Pay the sender its credits."""
        return self.call("claim")
