"""The whole system of contracts wired together, and an honest node and client that use it, for contract tests.

`deploy_network` deploys; a `Server` keeps the books of one node (seq, running totals) and makes right receipts, of which
tests spoil one field at a time; `Committed` is a batch with everything that evidence and collection need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import boa
from eth_hash.auto import keccak

from poip_chain.spec.merkle import merkle_proof, merkle_root
from poip_chain.spec.objects import (
    Batch,
    FinishReason,
    Part,
    Receipt,
    Request,
    SamplingParams,
    Voucher,
)
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript, prompt_root
from poip_chain.spec.types import ZERO_ADDRESS, Address
from tests.contracts import system
from tests.contracts.headers import header
from tests.contracts.system import CONTRACTS, OWNER, POIP, Account, account

NO_BATCH = Batch(0, ZERO_ADDRESS, bytes(32), 0, bytes(32), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
INPUT_PRICE = 10**13
OUTPUT_PRICE = 3 * 10**13
PENDING, FINAL, CONVICTED = 1, 2, 3


@dataclass(frozen=True)
class Network:
    """All contracts, sealed, with one model of one profile."""

    token: Any
    parameters: Any
    models: Any
    registry: Any
    log: Any
    vault: Any
    offences: Any
    availability: Any
    model_id: bytes
    treasury: Address

    def value(self, name: str) -> int:
        """A parameter's present value."""
        return system.value_of(self.parameters, name)

    def set_value(self, name: str, value: int) -> None:
        """Change a parameter as its owner."""
        system.set_parameter(self.parameters, name, value)

    def give(self, who: Address, amount: int, spender: Any) -> None:
        """Tokens for `who`, allowed to `spender`."""
        self.token.transfer(who, amount, sender=OWNER.address)
        allowed = self.token.allowance(who, spender)
        self.token.approve(spender, allowed + amount, sender=who)

    def deposit(self, payer: Address, node: Address, amount: int) -> None:
        """Escrow for a payer, paid by itself."""
        self.give(payer, amount, self.vault)
        self.vault.deposit(payer, node, amount, sender=payer)

    def stake_of(self, node: Address) -> int:
        """Active and unbonding stake of a node."""
        info = self.registry.node_info(node)
        return int(info.active + info.unbonding)

    def locked(self, node: Address) -> int:
        """What of a node's stake is locked."""
        return int(self.registry.node_info(node).locked)

    def finalize(self, *batches: Batch) -> None:
        """Let the windows of the batches pass and make them final."""
        last = max(batch.window_end for batch in batches)
        if system.now() < last:
            boa.env.time_travel(seconds=last - system.now())
        self.log.finalize([batch.values() for batch in batches])

    def submit_beacon(self, batch: Batch, mix_hash: bytes = b"\x42" * 32) -> bytes:
        """Make the block of the batch's beacon pass, with this mixHash, and submit its header."""
        target = batch.block_number + self.value("beacon_delay")
        raw = header(target, mix_hash)
        boa.env.evm.patch.block_number = target + 1
        boa.env.evm.patch.prev_hashes = [keccak(raw), *[bytes(32)] * 255]
        self.log.submit_beacon(raw)
        return mix_hash

    def draw_of(self, batch: Batch, index: int) -> int:
        """A draw of the batch's audit that selects `index`; the batch's beacon is submitted if it is not."""
        if self.log.beacon_of(batch.values()) == bytes(32):
            self.submit_beacon(batch)
        draws = -(-batch.count * batch.audit_rate_ppm // 10**6)
        for draw in range(draws):
            if self.log.selected(batch.values(), draw) == index:
                return draw
        raise AssertionError(f"index {index} is not selected by any of {draws} draws")


def deploy_network(overrides: Mapping[str, int] | None = None, seal: bool = True) -> Network:
    """Deploy and wire everything, in the order of docs/contracts.md. Sealed last, unless more judges are to be named."""
    token, parameters, models = (
        system.deploy_token(),
        system.deploy_parameters(overrides),
        system.deploy_models(),
    )
    registry = system.deploy_registry(token, parameters, models)
    log = system.load(CONTRACTS / "commitments/CommitmentLog.vy", registry, models, parameters)
    treasury = account("treasury").address
    vault = system.load(CONTRACTS / "payments/PaymentVault.vy", token, log, registry, parameters, treasury)
    offences = system.load(CONTRACTS / "disputes/Offences.vy", log, registry, models, parameters)
    availability = system.load(CONTRACTS / "disputes/Availability.vy", token, log, registry, parameters)
    with boa.env.prank(OWNER.address):
        registry.initialize(log)
        for slasher in (log, offences, availability):
            registry.set_slasher(slasher, True)
        for judge in (offences, availability):
            log.set_judge(judge, True)
        registry.seal()
        if seal:
            log.seal()
    model_id = system.add_model(models)
    return Network(token, parameters, models, registry, log, vault, offences, availability, model_id, treasury)


@dataclass(frozen=True)
class Answer:
    """One request with its answer, as node and client keep it."""

    request: Request
    params: SamplingParams
    receipt: Receipt
    transcript: Transcript

    def roots(self) -> TranscriptRoots:
        """What transcript_root commits to."""
        return TranscriptRoots.of(self.transcript)

    def with_receipt(self, **changes: Any) -> Answer:
        """The same answer with another receipt."""
        return Answer(self.request, self.params, self.receipt.replace(**changes), self.transcript)


@dataclass(frozen=True)
class Committed:
    """A batch on the chain and the answers that it covers."""

    batch: Batch
    answers: tuple[Answer, ...]

    def proof(self, index: int) -> list[bytes]:
        """The receipt's Merkle proof."""
        return list(merkle_proof([a.receipt.struct_hash() for a in self.answers], [index]))

    def in_batch(self, index: int) -> tuple[Any, ...]:
        """ReceiptInBatch for the vault."""
        return (self.answers[index].receipt.values(), index, self.proof(index))

    def evidence(self, index: int) -> tuple[Any, ...]:
        """Committed evidence of the receipt at `index`."""
        return (self.batch.values(), index, self.proof(index), b"")

    def accuse(self, index: int) -> tuple[Any, ...]:
        """(receipt, evidence) of the receipt at `index`."""
        return (self.answers[index].receipt.values(), self.evidence(index))


@dataclass
class Server:
    """A registered, staked node and its books."""

    network: Network
    key: Account
    node: Address
    operator: Address
    seq: int = 0
    node_cum: int = 0
    payer_cum: dict[Address, int] = field(default_factory=dict)

    @classmethod
    def start(cls, network: Network, label: str = "node", stake: int = 1_000_000 * POIP) -> Server:
        """Register and stake a node."""
        node = system.register_node(network.registry, label)
        system.add_stake(network.token, network.registry, node, stake)
        return cls(network, account(label), node, account(f"{label} operator").address)

    def serve(
        self,
        client: Account | Address,
        output_tokens: int = 40,
        *,
        prompt_tokens: int = 33,
        reason: FinishReason = FinishReason.STOP,
        params: SamplingParams | None = None,
        request_changes: Mapping[str, Any] | None = None,
        receipt_changes: Mapping[str, Any] | None = None,
        transcript_changes: Mapping[str, Any] | None = None,
        book: bool = True,
    ) -> Answer:
        """Answer a request rightly, but for the changes. Totals move on unless `book` is False."""
        payer = client if isinstance(client, str) else client.address
        params = params or SamplingParams(700, stop_token_ids=(11,))
        prompt_ids = tuple(range(20, 20 + prompt_tokens))
        output_ids = tuple(300 + i for i in range(output_tokens))
        if reason == FinishReason.STOP and output_tokens:
            output_ids = (*output_ids[:-1], 2)
        request = Request(
            client=payer,
            node=self.node,
            model_id=self.network.model_id,
            profile_version=1,
            prompt_root=prompt_root(prompt_ids),
            prompt_tokens=prompt_tokens,
            params_hash=params.params_hash(),
            max_tokens=output_tokens if reason == FinishReason.LENGTH else max(output_tokens, 64),
            input_price=INPUT_PRICE,
            output_price=OUTPUT_PRICE,
            client_seed=keccak(b"seed"),
            client_nonce=keccak(f"nonce {self.node} {self.seq} {book}".encode()),
            deadline=system.now() + 600,
        ).replace(**(request_changes or {}))
        transcript_fields: dict[str, Any] = {
            "request_hash": request.struct_hash(),
            "finish_reason": int(reason),
            "engine_statement": "vllm test",
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            "fingerprints": tuple(tuple((500 + i, -i) for i in range(8)) for _ in output_ids),
        } | dict(transcript_changes or {})
        transcript = Transcript(**transcript_fields)
        fee = request.fee(output_tokens)
        receipt = Receipt(
            node=self.node,
            seq=self.seq,
            request_hash=request.struct_hash(),
            model_id=self.network.model_id,
            transcript_root=transcript.root(),
            output_tokens=output_tokens,
            finish_reason=int(reason),
            fee=fee,
            payer=payer,
            payer_cum=self.payer_cum.get(payer, 0) + fee,
            node_cum=self.node_cum + fee,
            issued_at=system.now(),
        ).replace(**(receipt_changes or {}))
        if book:
            self.seq += 1
            self.node_cum += fee
            self.payer_cum[payer] = self.payer_cum.get(payer, 0) + fee
        return Answer(request, params, receipt, transcript)

    def commit(self, answers: Sequence[Answer], **changes: Any) -> Committed:
        """Commit to answers; first seq, count and total follow from the log and the receipts unless changed."""
        log = self.network.log
        arguments = {
            "model_id": self.network.model_id,
            "profile_version": 1,
            "root": merkle_root([a.receipt.struct_hash() for a in answers]),
            "first_seq": log.next_seq(self.node),
            "count": len(answers),
            "total_fee": sum(a.receipt.fee for a in answers),
            "locator": "https://node.example/v1",
        } | changes
        batch = Batch(*log.commit(*arguments.values(), sender=self.key.address))
        return Committed(batch, tuple(answers))

    def serve_and_commit(self, client: Account | Address, count: int = 3, **options: Any) -> Committed:
        """A batch of right answers to one client."""
        return self.commit([self.serve(client, **options) for _ in range(count)])

    def signed(self, receipt: Receipt, signer: Account | None = None) -> tuple[Any, ...]:
        """(receipt, evidence) of an uncommitted receipt."""
        signature = system.sign(self.network.log, receipt, signer or self.key)
        return (receipt.values(), (NO_BATCH.values(), 0, [], signature))

    def leave_jail(self) -> None:
        """Wait for the jail period to end and go back to work."""
        boa.env.time_travel(seconds=self.network.value("jail_period") + 1)
        self.network.registry.unjail(self.node, sender=self.operator)

    def collect(
        self,
        voucher: Voucher,
        signature: bytes,
        committed: Committed,
        first: int = 0,
        last: int | None = None,
        sender: Address | None = None,
    ) -> int:
        """Collect with the vault as the operator; the amount."""
        end = len(committed.answers) - 1 if last is None else last
        return int(
            self.network.vault.collect(
                voucher.values(),
                signature,
                committed.batch.values(),
                committed.in_batch(first),
                committed.in_batch(end),
                sender=sender or self.operator,
            )
        )


def voucher_for(network: Network, client: Account, receipt: Receipt, **changes: Any) -> tuple[Voucher, bytes]:
    """The client's voucher that runs up to a receipt, and its signature."""
    voucher = Voucher(client.address, receipt.node, receipt.payer_cum, receipt.struct_hash()).replace(**changes)
    return voucher, system.sign(network.vault, voucher, client)


def leaf_arguments(answer: Answer, part: Part, leaf_index: int) -> tuple[Any, ...]:
    """(part, leaf index, leaf, proof) of one leaf of the transcript."""
    leaves = answer.transcript.leaves(part)
    return (int(part), leaf_index, leaves[leaf_index], list(merkle_proof(leaves, [leaf_index])))


def chunk_arguments(answer: Answer, part: Part, first_leaf: int) -> tuple[list[bytes], list[bytes]]:
    """(leaves, proof) of the challenged chunk of eight leaves."""
    leaves = answer.transcript.leaves(part)
    indices = list(range(first_leaf, min(first_leaf + 8, len(leaves))))
    if not indices:
        return [], []
    return [leaves[i] for i in indices], list(merkle_proof(leaves, indices))
