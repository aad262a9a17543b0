# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Log and registry of models in one, which hold what a test told them; and the sampler's noise for itself
"""

from contracts.disputes import noise
from contracts.disputes import objects
from contracts.interfaces import IModelRegistry

known: HashMap[bytes32, bool]
_profile: IModelRegistry.Profile


@external
def hold(batch: objects.Batch, profile: IModelRegistry.Profile):
    self.known[objects._batch_hash(batch)] = True
    self._profile = profile


@external
@view
def matches(batch: objects.Batch) -> bool:
    return self.known[objects._batch_hash(batch)]


@external
@view
def limits(model_id: bytes32, profile_version: uint32, output_tokens: uint32) -> IModelRegistry.Limits:
    assert profile_version == 1, "models: unknown profile"
    return IModelRegistry.Limits(
        vocab_size=self._profile.vocab_size,
        margin_dead_zone=self._profile.margin_dead_zone,
        margin_hard_limit=self._profile.margin_hard_limit,
        margin_row=self._row(self._profile.margin_table, output_tokens),
        fingerprint_dead_zone=self._profile.fingerprint_dead_zone,
        fingerprint_tolerance=self._profile.fingerprint_tolerance,
        fingerprint_row=self._row(self._profile.fingerprint_table, output_tokens),
        weights_root=keccak256(model_id),
    )


@internal
@pure
def _row(table: DynArray[IModelRegistry.ThresholdRow, 8], tokens: uint32) -> IModelRegistry.ThresholdRow:
    found: IModelRegistry.ThresholdRow = empty(IModelRegistry.ThresholdRow)
    for row: IModelRegistry.ThresholdRow in table:
        if row.tokens <= tokens:
            found = row
    return found


@external
@pure
def gumbels(bits: DynArray[uint256, 1024]) -> DynArray[int256, 1024]:
    found: DynArray[int256, 1024] = []
    for b: uint256 in bits:
        found.append(noise._gumbel(b))
    return found


@external
@pure
def uniform_bits(
    seed: bytes32, positions: DynArray[uint256, 1024], tokens: DynArray[uint256, 1024]
) -> DynArray[uint256, 1024]:
    found: DynArray[uint256, 1024] = []
    for i: uint256 in range(len(positions), bound=1024):
        found.append(noise._uniform_bits(noise._position_key(seed, positions[i]), tokens[i]))
    return found


@external
@pure
def seed(client_seed: bytes32) -> bytes32:
    return noise._seed(client_seed)
