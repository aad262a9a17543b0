"""Gas per receipt of committing and finalising a batch, with the real contracts."""

from __future__ import annotations

from benchmarks.gas import batch_gas
from benchmarks.rows import Row

SIZES = (1, 100, 1000)
GOAL_AT_1000 = 150


def run() -> list[Row]:
    """One row for each batch size; intrinsic gas and the EIP-7623 calldata floor are included."""
    rows = []
    for size in SIZES:
        gas = batch_gas(size)
        per_receipt = (gas["commit"] + gas["finalize"]) / size
        limit = GOAL_AT_1000 if size == SIZES[-1] else None
        rows.append(
            Row(
                f"gas per receipt, batch of {size:,}",
                per_receipt,
                "gas",
                f"commit {gas['commit']:,} + finalize with release of the stake lock {gas['finalize']:,}, py-evm",
                compared_with=f"goal {limit}" if limit else "",
                ratio=per_receipt / limit if limit else None,
                goal=f"< {limit}" if limit else "",
            )
        )
    return rows
