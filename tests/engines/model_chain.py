"""A model of the contracts in memory, as one node sees them: log, vault and challenges, with blocks that can be undone.

For the node's unit tests. It applies the rules of docs/contracts.md that concern a node and refuses what the contracts
refuse. Transactions wait until `mine`; `reorganise` takes blocks away again and puts their transactions back into the
queue, as a real reorganisation does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eth_hash.auto import keccak

from poip_chain.economic.locks import LockTerms
from poip_chain.economic.types import BatchStatus, Offer, ReceiptInBatch
from poip_chain.errors import NotFound, TransactionFailed, Unavailable
from poip_chain.service.node.ports import Answered, Asked, Backing, Change, Committed, Ended, Escrow, SentState
from poip_chain.service.node.schema import Duty, DutyKind
from poip_chain.spec.eip712 import Domain
from poip_chain.spec.merkle import root_from_proof, verify_proof
from poip_chain.spec.objects import Batch, FinishReason, Part, Profile, Request, SamplingParams, Voucher
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript, leaf_count
from poip_chain.spec.types import ZERO_HASH, Address

LOG = Address("0x1111111111111111111111111111111111111111")
VAULT = Address("0x2222222222222222222222222222222222222222")
REGISTRY = Address("0x3333333333333333333333333333333333333333")
CHAIN_ID = 31337
WINDOW = 100
RESPONSE = 60
RATE_PPM = 500_000
TERMS = LockTerms(audit_rate=RATE_PPM, detection_power=800_000, reward_share=300_000, minimum_lock=10**18)


@dataclass
class State:
    """Everything that a block can change."""

    number: int = 1
    time: int = 1_000_000
    batches: dict[int, Batch] = field(default_factory=dict)
    status: dict[int, BatchStatus] = field(default_factory=dict)
    cases: dict[int, int] = field(default_factory=dict)
    extended: dict[int, int] = field(default_factory=dict)
    next_seq: int = 0
    node_cum: int = 0
    escrow: dict[Address, int] = field(default_factory=dict)
    thawing: dict[Address, int] = field(default_factory=dict)
    settled: dict[Address, int] = field(default_factory=dict)
    buckets: dict[tuple[int, Address], int] = field(default_factory=dict)
    collected: dict[tuple[int, Address], int] = field(default_factory=dict)
    earned: int = 0
    paid_out: int = 0
    challenges: dict[int, Duty] = field(default_factory=dict)
    stake: int = 10**24
    terms: LockTerms = TERMS
    jailed: bool = False
    """As in the registry: it stops new service, not the commitment of what was signed."""
    sunset: int = 0
    answered: dict[int, list[bytes]] = field(default_factory=dict)
    demands: dict[int, Duty] = field(default_factory=dict)


@dataclass
class Sent:
    """One transaction."""

    run: Callable[[State], list[object]]
    state: SentState = SentState.OPEN


class ModelChain:
    """See the module's docstring. `down` makes every question raise Unavailable."""

    def __init__(self, node: Address, profile: Profile, offers: list[Offer]) -> None:
        self.node, self._profile, self._offers = node, profile, offers
        self.chain_id = CHAIN_ID
        self.log_domain, self.vault_domain = Domain(CHAIN_ID, LOG), Domain(CHAIN_ID, VAULT)
        self.registry_address = REGISTRY
        self.signer = node
        self.state = State()
        self.down = False
        self.sends: list[str] = []
        self._blocks: list[tuple[State, list[object], list[str]]] = []
        self._transactions: dict[str, Sent] = {}
        self._news: list[Change] = []

    # driving it

    def mine(self, seconds: int = 1) -> None:
        """One block with all waiting transactions."""
        before = copy.deepcopy(self.state)
        self.state.number += 1
        self.state.time += seconds
        events: list[object] = []
        included = []
        for key, sent in self._transactions.items():
            if sent.state is SentState.OPEN:
                included.append(key)
                attempt = copy.deepcopy(self.state)
                try:
                    events += sent.run(attempt)
                    self.state = attempt
                    sent.state = SentState.MINED
                except TransactionFailed:
                    sent.state = SentState.FAILED
        self._blocks.append((before, events, included))
        self._news += [Change(what, False, object()) for what in events]  # type: ignore[arg-type]

    def reorganise(self, depth: int, *, forget: bool = False) -> None:
        """Take `depth` blocks away. Their transactions wait again, or (`forget`) stay as if they were mined."""
        for _ in range(depth):
            self.state, events, included = self._blocks.pop()
            for what in reversed(events):
                unseen = next((c for c in self._news if c.what is what), None)
                if unseen is not None:
                    self._news.remove(unseen)
                else:
                    self._news.append(Change(what, True, object()))  # type: ignore[arg-type]
            for key in included:
                if not forget:
                    self._transactions[key].state = SentState.OPEN

    def tell(self, *events: object) -> None:
        """Events from outside, in a block of their own."""
        self._blocks.append((copy.deepcopy(self.state), list(events), []))
        self._news += [Change(what, False, object()) for what in events]  # type: ignore[arg-type]

    def challenge(self, batch_id: int, index: int, part: int, first_leaf: int, deadline: int) -> int:
        """Somebody challenges."""
        number = len(self.state.challenges) + 1
        duty = Duty(DutyKind.CHALLENGE, number, batch_id, index, part, first_leaf, deadline)
        self.state.challenges[number] = duty
        self.state.cases[batch_id] = self.state.cases.get(batch_id, 0) + 1
        self.tell(Asked(duty))
        return number

    def demand(self, seq: int, deadline: int) -> int:
        """Somebody demands a receipt's commitment."""
        number = len(self.state.demands) + 1
        duty = Duty(DutyKind.DEMAND, number, 0, seq, 0, 0, deadline)
        self.state.demands[number] = duty
        self.tell(Asked(duty))
        return number

    def convict(self, batch_id: int) -> None:
        """A judge convicts."""
        before = copy.deepcopy(self.state)
        self.state.status[batch_id] = BatchStatus.CONVICTED
        event = Ended(batch_id, BatchStatus.CONVICTED)
        self._blocks.append((before, [event], []))
        self._news.append(Change(event, False, object()))

    # NodeChain: views

    def _up(self) -> State:
        if self.down:
            raise Unavailable("the model chain is down.")
        return self.state

    def timestamp(self) -> int:
        return self._up().time

    def signing_key(self, seq: int) -> Address:
        self._up()
        return self.signer

    def next_seq(self) -> int:
        return self._up().next_seq

    def node_cum(self) -> int:
        return self._up().node_cum

    def offers(self) -> list[Offer]:
        self._up()
        return self._offers

    def profile(self, model_id: bytes, version: int) -> Profile:
        self._up()
        return self._profile

    def sunset(self, model_id: bytes) -> int:
        return self._up().sunset

    def escrow(self, payer: Address) -> Escrow:
        state = self._up()
        balance = state.escrow.get(payer, 0)
        return Escrow(balance - state.thawing.get(payer, 0), state.settled.get(payer, 0))

    def backing(self) -> Backing:
        state = self._up()
        return Backing(state.next_seq, _free_stake(state), state.terms, tuple(self._offers))

    def collectable(self, payer: Address) -> int:
        return self._up().escrow.get(payer, 0)

    def status(self, batch: Batch) -> BatchStatus:
        state = self._up()
        return state.status[batch.id] if state.batches.get(batch.id) == batch else BatchStatus.NONE

    def open_cases(self, batch: Batch) -> int:
        return self._up().cases.get(batch.id, 0)

    def window_end(self, batch: Batch) -> int:
        return max(batch.window_end, self._up().extended.get(batch.id, 0))

    def collected(self, batch: Batch) -> int:
        return sum(amount for (number, _), amount in self._up().collected.items() if number == batch.id)

    def _at(self, depth: int) -> State:
        now = self._up()
        return self._blocks[-min(depth, len(self._blocks))][0] if depth and self._blocks else now

    def settled(self, payer: Address, depth: int = 0) -> int:
        return self._at(depth).settled.get(payer, 0)

    def bucket(self, batch: Batch, payer: Address, depth: int = 0) -> int:
        return self._at(depth).buckets.get((batch.id, payer), 0)

    def earned(self) -> int:
        return self._up().earned

    def beacon(self, batch: Batch) -> bytes | None:
        return keccak(b"beacon") if self._up().number >= batch.block_number + 2 else None

    def changes(self) -> Sequence[Change]:
        self._up()
        return list(self._news)

    def acknowledge(self, change: Change) -> None:
        assert self._news[0] is change
        self._news.pop(0)

    def sent(self, key: str) -> SentState:
        known = self._transactions.get(key)
        return SentState.UNKNOWN if known is None else known.state

    def step(self) -> None:
        self._up()

    # NodeChain: transactions

    def _send(self, key: str, run: Callable[[State], list[object]]) -> None:
        if key in self._transactions:
            return
        run(copy.deepcopy(self._up()))  # the simulation
        self._transactions[key] = Sent(run)
        self.sends.append(key)

    def send_commit(self, key: str, *, batch: Batch, locator: str) -> None:
        def run(state: State) -> list[object]:
            _require(batch.first_seq == state.next_seq, "log: first_seq is not next")
            lock = state.terms.lock(batch.total_fee)
            _require(lock <= _free_stake(state), "stakes: not enough free stake")
            state.node_cum += batch.total_fee
            state.next_seq += batch.count
            number = len(state.batches) + 1
            committed = batch.replace(
                id=number,
                node_cum=state.node_cum,
                lock=lock,
                audit_rate_ppm=RATE_PPM,
                block_number=state.number,
                committed_at=state.time,
                window_end=state.time + WINDOW,
            )
            state.batches[number] = committed
            state.status[number] = BatchStatus.PENDING
            return [Committed(committed)]

        self._send(key, run)

    def send_finalize(self, key: str, batches: Sequence[Batch]) -> None:
        def run(state: State) -> list[object]:
            events: list[object] = []
            for batch in batches:
                if state.status.get(batch.id) is BatchStatus.FINAL:
                    continue
                _require(state.status.get(batch.id) is BatchStatus.PENDING, "log: batch is not pending")
                window_end = max(batch.window_end, state.extended.get(batch.id, 0))
                _require(state.time >= window_end, "log: window is open")
                _require(state.cases.get(batch.id, 0) == 0, "log: a case is open")
                state.status[batch.id] = BatchStatus.FINAL
                events.append(Ended(batch.id, BatchStatus.FINAL))
            return events

        self._send(key, run)

    def send_collect(
        self, key: str, voucher: Voucher, signature: bytes, batch: Batch, first: ReceiptInBatch, last: ReceiptInBatch
    ) -> None:
        def run(state: State) -> list[object]:
            payer = voucher.payer
            _require(state.batches.get(batch.id) == batch, "vault: not this batch")
            _require(
                state.status[batch.id] in (BatchStatus.PENDING, BatchStatus.FINAL), "vault: neither pending nor final"
            )
            _require(voucher.recover(self.vault_domain, signature) == payer, "vault: not signed by its payer")
            for place in (first, last):
                leaf = place.receipt.struct_hash()
                _require(
                    verify_proof(batch.root, [leaf], [place.index], batch.count, place.proof), "vault: not in batch"
                )
                _require(place.receipt.payer == payer and place.receipt.node == voucher.node, "vault: another payer")
            _require(first.index <= last.index, "vault: first is after last")
            if voucher.last_receipt_hash != last.receipt.struct_hash():
                _require(last.receipt.finish_reason != FinishReason.CANCELLED, "vault: cancelled is not named")
                if voucher.last_receipt_hash != ZERO_HASH:
                    _require(
                        last.receipt.payer_cum <= voucher.cumulative, "vault: voucher ends before the last receipt"
                    )
            low = max(first.receipt.payer_cum - first.receipt.fee, state.settled.get(payer, 0))
            high = min(last.receipt.payer_cum, voucher.cumulative)
            _require(high > low, "vault: nothing to collect")
            amount = min(high - low, state.escrow.get(payer, 0))
            _require(amount > 0, "vault: escrow is empty")
            collected = sum(paid for (number, _), paid in state.collected.items() if number == batch.id)
            _require(collected + amount <= batch.total_fee, "vault: above the batch's total")
            state.collected[batch.id, payer] = state.collected.get((batch.id, payer), 0) + amount
            state.settled[payer] = low + amount
            state.escrow[payer] -= amount
            state.buckets[batch.id, payer] = state.buckets.get((batch.id, payer), 0) + amount
            return []

        self._send(key, run)

    def send_settle(self, key: str, batch: Batch, payer: Address) -> None:
        def run(state: State) -> list[object]:
            amount = state.buckets.get((batch.id, payer), 0)
            _require(amount > 0, "vault: bucket is empty")
            _require(state.status[batch.id] is BatchStatus.FINAL, "vault: not final")
            state.buckets[batch.id, payer] = 0
            state.earned += amount
            return []

        self._send(key, run)

    def send_withdraw(self, key: str) -> None:
        def run(state: State) -> list[object]:
            _require(state.earned > 0, "vault: nothing is earned")
            state.paid_out += state.earned
            state.earned = 0
            return []

        self._send(key, run)

    def send_answer(
        self,
        key: str,
        duty: Duty,
        batch: Batch,
        place: ReceiptInBatch,
        request: Request,
        params: SamplingParams,
        transcript: Transcript,
        part: Part,
        leaves: Sequence[bytes],
        proof: Sequence[bytes],
    ) -> None:
        def run(state: State) -> list[object]:
            asked = state.challenges[duty.id]
            receipt = place.receipt
            _require(state.time <= asked.deadline, "availability: too late")
            _require(place.index == asked.seq, "availability: another receipt")
            in_batch = verify_proof(batch.root, [receipt.struct_hash()], [place.index], batch.count, place.proof)
            _require(in_batch, "availability: not in batch")
            _require(request.struct_hash() == receipt.request_hash, "availability: another request")
            _require(params.params_hash() == request.params_hash, "availability: other params")
            _require(transcript.root() == receipt.transcript_root, "availability: another transcript")
            roots = TranscriptRoots.of(transcript)
            root = (roots.prompt_root, roots.output_root, roots.fingerprint_root)[asked.part]
            tokens = request.prompt_tokens if part is Part.PROMPT else receipt.output_tokens
            count = leaf_count(part, tokens)
            wanted = range(asked.first_leaf, min(asked.first_leaf + 8, count))
            _require(len(leaves) == len(wanted), "availability: wrong number of leaves")
            if leaves:
                _require(root_from_proof(leaves, list(wanted), count, proof) == root, "availability: wrong leaves")
            state.answered[duty.id] = list(leaves)
            state.cases[batch.id] -= 1
            state.extended[batch.id] = state.time + RESPONSE
            return [Answered(DutyKind.CHALLENGE, duty.id)]

        self._send(key, run)


def _free_stake(state: State) -> int:
    pending = (state.batches[i].lock for i, status in state.status.items() if status is BatchStatus.PENDING)
    return state.stake - sum(pending)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise TransactionFailed(f"the contract refused: {reason}.")


__all__ = [
    "CHAIN_ID",
    "LOG",
    "RATE_PPM",
    "REGISTRY",
    "RESPONSE",
    "TERMS",
    "VAULT",
    "WINDOW",
    "ModelChain",
    "NotFound",
    "State",
]
