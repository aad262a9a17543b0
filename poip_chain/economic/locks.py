"""How much stake a batch locks: the value at risk of its fees (CommitmentLog, docs/contracts.md).

Pure arithmetic over the chain's terms; it asks no chain. Tests hold it against the contract.
"""

from __future__ import annotations

from dataclasses import dataclass

from poip_chain.economic.parameters import PPM


@dataclass(frozen=True, slots=True)
class LockTerms:
    """The parameters that the log takes for its next batch: rates in ppm, `minimum_lock` in wei."""

    audit_rate: int
    detection_power: int
    reward_share: int
    minimum_lock: int

    def lock(self, total_fee: int) -> int:
        """What one batch with fees of `total_fee` wei in all locks, wei; rounded up, as in CommitmentLog."""
        divisor = self.audit_rate * self.detection_power * (PPM - self.reward_share)
        return max(self.minimum_lock, -(-total_fee * PPM**3 // divisor))

    def most(self, total_fee: int, batches: int) -> int:
        """The most that fees of `total_fee` wei can lock, wei, however they are spread over `batches` batches.

        Each batch beyond the first adds at most a minimum lock and one wei of rounding. 0 for no batches.
        """
        return 0 if batches == 0 else self.lock(total_fee) + (batches - 1) * (self.minimum_lock + 1)
