"""Gas of committing and finalising a batch, as whole transactions on the devnet."""

from __future__ import annotations

import pytest

from benchmarks.gas import batch_gas


def test_a_batch_of_1000(capsys: pytest.CaptureFixture[str]) -> None:
    gas = batch_gas(1000)
    with capsys.disabled():
        print(f"\ngas of a batch of 1000 receipts: {gas}")
    assert gas["commit"] + gas["finalize"] < 150_000
    # A node's first batch writes empty slots.
    assert gas["first_commit"] + gas["first_finalize"] < 185_000
