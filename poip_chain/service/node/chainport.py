"""`NodeChain` over a real network: contract views, the outbox of the node key, and one follower of events.

Translates; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from web3.types import BlockIdentifier

from poip_chain.chain.follower import Added, Event, Follower
from poip_chain.chain.keys import Key
from poip_chain.chain.outbox import Outbox, State
from poip_chain.chain.rpc import Call
from poip_chain.economic.network import Network
from poip_chain.economic.types import BatchStatus, Offer, ReceiptInBatch
from poip_chain.errors import NotFound
from poip_chain.service.node.ports import Answered, Asked, Backing, Change, Committed, Ended, Escrow, Rotated, SentState
from poip_chain.service.node.schema import Duty, DutyKind
from poip_chain.spec.objects import Batch, Part, Profile, Request, SamplingParams, Voucher
from poip_chain.spec.offences import TranscriptRoots
from poip_chain.spec.transcript import Transcript
from poip_chain.spec.types import Address

_SENT = {
    State.OPEN: SentState.OPEN,
    State.LOST: SentState.OPEN,
    State.MINED: SentState.MINED,
    State.REVERTED: SentState.FAILED,
    State.STOPPED: SentState.FAILED,
}
_LOG_EVENTS = ("BatchCommitted", "BatchFinal", "BatchConvicted")
_AVAILABILITY_EVENTS = ("Challenged", "Answered", "Resolved", "CommitDemanded", "DemandResolved")


class NetworkChain:
    """See `NodeChain`. `data` is the node's directory; the outbox locks its file against other processes."""

    def __init__(
        self,
        network: Network,
        key: Key,
        node: Address,
        data: Path,
        *,
        confirmations: int = 0,
        outbox_path: Path,
    ) -> None:
        self._network = network
        self.node = node
        self.chain_id = network.chain.chain_id
        self.log_domain = network.domain("log")
        self.vault_domain = network.domain("vault")
        # The last of the contracts is there from this block on: a view cannot be asked of an earlier one.
        self._first_block = max(deployed.block for deployed in network.deployment.contracts.values())
        self.registry_address = network.address("NodeRegistry")
        self._outbox = Outbox(network.chain, key, outbox_path)
        self._follower = Follower(
            network.chain,
            data / "follower.db",
            f"node {node}",
            [
                *(network.log.event(name) for name in _LOG_EVENTS),
                *(network.availability.event(name) for name in _AVAILABILITY_EVENTS),
                network.registry.event("NodeKeyRotated"),
            ],
            network.deployment.block,
            confirmations,
        )

    @property
    def outbox(self) -> Outbox:
        """The outbox of the node key: it has only one."""
        return self._outbox

    def close(self) -> None:
        """Release files and connections."""
        self._follower.close()
        self._outbox.close()
        self._network.chain.close()

    # views

    def timestamp(self) -> int:
        """See NodeChain."""
        return self._network.chain.timestamp()

    def signing_key(self, seq: int) -> Address:
        """See NodeChain."""
        return self._network.registry.signing_key(self.node, seq)

    def next_seq(self) -> int:
        """See NodeChain."""
        return self._network.log.next_seq(self.node)

    def node_cum(self) -> int:
        """See NodeChain."""
        return self._network.log.node_cum(self.node)

    def offers(self) -> list[Offer]:
        """See NodeChain."""
        return self._network.registry.offers(self.node)

    def profile(self, model_id: bytes, version: int) -> Profile:
        """See NodeChain."""
        return self._network.models.profile(model_id, version)

    def sunset(self, model_id: bytes) -> int:
        """See NodeChain."""
        return self._network.models.deprecated_at(model_id)

    def escrow(self, payer: Address) -> Escrow:
        """See NodeChain."""
        settled = self._network.vault.settled(payer, self.node)
        return Escrow(self._network.vault.available(payer, self.node), settled)

    def backing(self) -> Backing:
        """See NodeChain."""
        next_seq = self._network.log.next_seq(self.node)
        free = self._network.registry.free_stake(self.node)
        return Backing(next_seq, free, self._network.parameters.lock_terms(), tuple(self.offers()))

    def collectable(self, payer: Address) -> int:
        """See NodeChain."""
        return self._network.vault.escrow(payer, self.node).balance

    def status(self, batch: Batch) -> BatchStatus:
        """See NodeChain."""
        return self._network.log.status_of(batch)

    def open_cases(self, batch: Batch) -> int:
        """See NodeChain."""
        return self._network.log.open_cases(batch.id)

    def window_end(self, batch: Batch) -> int:
        """See NodeChain."""
        return self._network.log.window_end_of(batch)

    def collected(self, batch: Batch) -> int:
        """See NodeChain."""
        return self._network.vault.collected(batch.id)

    def settled(self, payer: Address, depth: int = 0) -> int:
        """See NodeChain."""
        return int(self._network.vault.read("settled", payer, self.node, block=self._block(depth)))

    def bucket(self, batch: Batch, payer: Address, depth: int = 0) -> int:
        """See NodeChain."""
        return int(self._network.vault.read("bucket", batch.id, payer, block=self._block(depth)))

    def _block(self, depth: int) -> BlockIdentifier:
        """The block `depth` below the newest, but not before the network was there."""
        if depth == 0:
            return "latest"
        return cast(BlockIdentifier, max(self._network.chain.block_number() - depth, self._first_block))

    def earned(self) -> int:
        """See NodeChain."""
        return self._network.vault.earned(self.node)

    def beacon(self, batch: Batch) -> bytes | None:
        """See NodeChain."""
        submitted = self._network.log.beacon_of(batch)
        if submitted is not None:
            return submitted
        delay = self._network.parameters.value_at("beacon_delay", batch.parameters_version)
        try:
            return self._network.chain.block(batch.block_number + delay).mix_hash
        except NotFound:
            return None

    # events

    def changes(self) -> Sequence[Change]:
        """See NodeChain."""
        changes = []
        for change in self._follower.poll():
            what = self._understand(change.event)
            changes.append(Change(what, not isinstance(change, Added), change))
        return changes

    def acknowledge(self, change: Change) -> None:
        """See NodeChain."""
        self._follower.commit(change.token)  # type: ignore[arg-type]

    def _understand(self, event: Event) -> Committed | Ended | Rotated | Asked | Answered | None:
        args = event.args
        if event.name == "BatchCommitted":
            if str(args["node"]) != self.node:
                return None
            return Committed(self._network.log.batch_of(args))
        if event.name in ("BatchFinal", "BatchConvicted"):
            if str(args["node"]) != self.node:
                return None
            status = BatchStatus.FINAL if event.name == "BatchFinal" else BatchStatus.CONVICTED
            return Ended(int(args["batch_id"]), status)
        if event.name == "Challenged":
            return Asked(
                Duty(
                    DutyKind.CHALLENGE,
                    int(args["id"]),
                    int(args["batch_id"]),
                    int(args["index"]),
                    int(args["part"]),
                    int(args["first_leaf"]),
                    int(args["deadline"]),
                )
            )
        if event.name in ("Answered", "Resolved"):
            return Answered(DutyKind.CHALLENGE, int(args["id"]))
        if str(args["node"]) != self.node:
            return None
        if event.name == "NodeKeyRotated":
            return Rotated(Address(str(args["old_key"])), int(args["next_seq"]))
        if event.name == "DemandResolved":
            return Answered(DutyKind.DEMAND, int(args["id"]))
        return Asked(Duty(DutyKind.DEMAND, int(args["id"]), 0, int(args["seq"]), 0, 0, int(args["deadline"])))

    # transactions

    def sent(self, key: str) -> SentState:
        """See NodeChain."""
        return _SENT[self._outbox.status(key).state] if self._outbox.known(key) else SentState.UNKNOWN

    def step(self) -> None:
        """See NodeChain."""
        self._outbox.step()

    def _send(self, call: Call, key: str) -> None:
        self._outbox.send(call, key)

    def send_commit(self, key: str, *, batch: Batch, locator: str) -> None:
        """See NodeChain."""
        call = self._network.log.commit(
            batch.model_id, batch.profile_version, batch.root, batch.first_seq, batch.count, batch.total_fee, locator
        )
        self._send(call, key)

    def send_finalize(self, key: str, batches: Sequence[Batch]) -> None:
        """See NodeChain."""
        self._send(self._network.log.finalize(batches), key)

    def send_collect(
        self, key: str, voucher: Voucher, signature: bytes, batch: Batch, first: ReceiptInBatch, last: ReceiptInBatch
    ) -> None:
        """See NodeChain."""
        self._send(self._network.vault.collect(voucher, signature, batch, first, last), key)

    def send_settle(self, key: str, batch: Batch, payer: Address) -> None:
        """See NodeChain."""
        self._send(self._network.vault.settle(batch, payer), key)

    def send_withdraw(self, key: str) -> None:
        """See NodeChain."""
        self._send(self._network.vault.withdraw_earnings(self.node), key)

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
        """See NodeChain."""
        call = self._network.availability.answer(
            duty.id,
            batch,
            place.receipt,
            place.proof,
            request,
            params,
            TranscriptRoots.of(transcript),
            leaves,
            proof,
        )
        self._send(call, key)
