"""Batch commitments: their status, beacons and finality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poip_chain.chain.rpc import Call
from poip_chain.economic.clients.base import ContractClient
from poip_chain.economic.types import BatchStatus
from poip_chain.spec.objects import Batch
from poip_chain.spec.types import ZERO_HASH, Address, Hash32

MAX_FINALIZED = 32
BEACON_TARGETS = 4
BEACON_TARGET_DISTANCE = 8192


class Log(ContractClient):
    """CommitmentLog."""

    NAME = "CommitmentLog"

    def next_seq(self, node: Address) -> int:
        """The first receipt number of the node that no batch covers."""
        return int(self.read("next_seq", node))

    def node_cum(self, node: Address) -> int:
        """The node's running total of fees after its last batch, wei."""
        return int(self.read("node_cum", node))

    def next_audit_rate(self, node: Address) -> int:
        """The audit rate in ppm that the node's next batch would pin."""
        return int(self.read("next_audit_rate", node))

    def batch_count(self) -> int:
        """How many batches there are; their ids run from 1 to this."""
        return int(self.read("batch_count"))

    def status(self, batch_id: int) -> BatchStatus:
        """The status of whatever batch has this id."""
        return BatchStatus(int(self.read("status", batch_id)))

    def status_of(self, batch: Batch) -> BatchStatus:
        """The status of this very batch: NONE also where the log holds another one under its id."""
        return BatchStatus(int(self.read("status_of", batch.values())))

    def matches(self, batch: Batch) -> bool:
        """Whether the log holds exactly this batch."""
        return bool(self.read("matches", batch.values()))

    def open_cases(self, batch_id: int) -> int:
        """How many cases keep the batch from becoming final."""
        return int(self.read("open_cases", batch_id))

    def window_end_of(self, batch: Batch) -> int:
        """The end of the batch's window, Unix seconds: later than its `window_end` where a late answer extended it."""
        return int(self.read("window_end_of", batch.values()))

    def beacon_at(self, block_number: int) -> Hash32 | None:
        """The mixHash of a block that somebody has submitted."""
        value = Hash32(bytes(self.read("beacon_at", block_number)))
        return None if value == ZERO_HASH else value

    def beacon_of(self, batch: Batch) -> Hash32 | None:
        """The batch's beacon, None until it is submitted."""
        value = Hash32(bytes(self.read("beacon_of", batch.values())))
        return None if value == ZERO_HASH else value

    def is_selected(self, batch: Batch, index: int) -> bool:
        """Whether the batch's audit selects the receipt at `index`."""
        return bool(self.read("is_selected", batch.values(), index))

    def batch_of(self, event_args: dict[str, Any]) -> Batch:
        """The batch that a BatchCommitted event carries (`Event.args` of a Follower)."""
        return Batch(**event_args["batch"])

    def find(self, batch_id: int, from_block: int) -> tuple[Batch, str] | None:
        """A batch and its locator by id, from its event at or after `from_block`."""
        topic = "0x" + batch_id.to_bytes(32, "big").hex()
        found = self.events("BatchCommitted", from_block, topics=[topic])
        return (self.batch_of(found[-1]), str(found[-1]["locator"])) if found else None

    def events(
        self, name: str, from_block: int, to_block: int | None = None, topics: Sequence[str | None] = ()
    ) -> list[dict[str, Any]]:
        """Decoded arguments of the log's events `name` in a range of blocks, oldest first.

        `topics` filters by indexed arguments, in order. For one-off questions; programs use a Follower.
        """
        from eth_utils.abi import event_abi_to_log_topic

        decoder = self.contract.events[name]()
        first, last = from_block, self.chain.block_number() if to_block is None else to_block
        found: list[dict[str, Any]] = []
        while first <= last:
            end = min(last, first + 1999)
            logs = self.chain.logs(
                {
                    "address": self.contract.address,
                    "fromBlock": first,
                    "toBlock": end,
                    "topics": ["0x" + event_abi_to_log_topic(decoder.abi).hex(), *topics],
                }
            )
            found += [dict(decoder.process_log(log)["args"]) for log in logs]
            first = end + 1
        return found

    def commit(
        self,
        model_id: bytes,
        profile_version: int,
        root: bytes,
        first_seq: int,
        count: int,
        total_fee: int,
        locator: str,
    ) -> Call:
        """A new batch, by the node's current key; first_seq must be next_seq."""
        return self.call("commit", model_id, profile_version, root, first_seq, count, total_fee, locator)

    def finalize(self, batches: Sequence[Batch]) -> Call:
        """Make up to 32 batches final; those that are already are skipped."""
        return self.call("finalize", [batch.values() for batch in batches])

    def submit_beacon(self, header_rlp: bytes) -> Call:
        """Bring a block's header (`Chain.raw_header`), whose mixHash becomes a beacon."""
        return self.call("submit_beacon", header_rlp)
