# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The models that may be served, named by their content
@license AGPL-3.0-only
@notice A model's id is the hash of its weights, tokenizer, chat template and dimensions. How it is served and judged
        stands in numbered profiles. Neither ever changes; a batch names both, so later additions concern later work only.
@custom:security Registration is an allow-list of the owner, after the weights were recomputed. Entries are written once.
                 It calls nothing.
@custom:kill `deprecate` sets the time from which a model takes no new batches. Nothing is ever deleted, so what was
             committed stays provable.
"""

from ..interfaces import IModelRegistry
from snekmate.auth import ownable
from snekmate.auth import ownable_2step

implements: IModelRegistry

initializes: ownable
initializes: ownable_2step[ownable := ownable]

exports: (
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
)

event ModelRegistered:
    model_id: indexed(bytes32)
    spec: IModelRegistry.ModelSpec
    config: IModelRegistry.ModelConfig
    metadata_uri: String[256]


event ProfileAdded:
    model_id: indexed(bytes32)
    version: uint32
    profile_hash: bytes32


event ModelDeprecated:
    model_id: indexed(bytes32)
    old_sunset: uint64
    new_sunset: uint64


# A model's state word: presence in bit 255, the count of its profiles in bits 64..95, its sunset in the lower 64.
PRESENT: constant(uint256) = 2**255
COUNT_SHIFT: constant(uint256) = 64
COUNT_MASK: constant(uint256) = 2**32 - 1
SUNSET_MASK: constant(uint256) = 2**64 - 1

_ids: HashMap[uint256, bytes32]
_count: uint256
_state: HashMap[bytes32, uint256]
_specs: HashMap[bytes32, IModelRegistry.ModelSpec]
_configs: HashMap[bytes32, IModelRegistry.ModelConfig]
_profiles: HashMap[bytes32, HashMap[uint32, IModelRegistry.Profile]]


@deploy
def __init__():
    """
    @notice The deployer becomes owner.
    """
    ownable.__init__()
    ownable_2step.__init__()


@external
@view
def version() -> String[16]:
    """
    @notice The version of this contract.
    """
    return "0.1.0"


@external
def register_model(
    spec: IModelRegistry.ModelSpec, config: IModelRegistry.ModelConfig, metadata_uri: String[256]
) -> bytes32:
    """
    @notice Admit a model. Owner only.
    @param config Must hash to spec.config_hash.
    @param metadata_uri Where files and a description are found; kept in the event only.
    @return The model's id, keccak(abi.encode(spec)).
    """
    ownable._check_owner()
    assert spec.config_hash == keccak256(abi_encode(config)), "models: config does not match its hash"
    assert spec.weights_root != empty(bytes32), "models: no weights"
    assert config.vocab_size > 0 and config.head_dim > 0 and config.max_positions > 0, "models: empty dimension"
    assert config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads == 0, "models: heads do not group"
    model_id: bytes32 = keccak256(abi_encode(spec))
    assert self._state[model_id] == 0, "models: already registered"
    self._state[model_id] = PRESENT
    self._specs[model_id] = spec
    self._configs[model_id] = config
    self._ids[self._count] = model_id
    self._count += 1
    log ModelRegistered(model_id=model_id, spec=spec, config=config, metadata_uri=metadata_uri)
    return model_id


@external
def add_profile(model_id: bytes32, new_profile: IModelRegistry.Profile) -> uint32:
    """
    @notice Add the next profile of a model. Owner only.
    @return Its version: 1, 2, ...
    """
    ownable._check_owner()
    state: uint256 = self._known(model_id)
    self._check_profile(new_profile, self._configs[model_id])
    number: uint256 = ((state >> COUNT_SHIFT) & COUNT_MASK) + 1
    assert number <= COUNT_MASK, "models: too many profiles"
    self._state[model_id] = state + (1 << COUNT_SHIFT)
    profile_version: uint32 = convert(number, uint32)
    self._profiles[model_id][profile_version] = new_profile
    log ProfileAdded(model_id=model_id, version=profile_version, profile_hash=keccak256(abi_encode(new_profile)))
    return profile_version


@external
def deprecate(model_id: bytes32, sunset: uint64):
    """
    @notice End a model's service at `sunset`: no new offers from then on, and batches only for the grace that the
            commitment log gives for what was signed before. A later call moves a sunset. Owner only.
    @param sunset Unix seconds, not in the past.
    """
    ownable._check_owner()
    state: uint256 = self._known(model_id)
    assert convert(sunset, uint256) >= block.timestamp, "models: sunset in the past"
    self._state[model_id] = (state & ~SUNSET_MASK) | convert(sunset, uint256)
    log ModelDeprecated(
        model_id=model_id, old_sunset=convert(state & SUNSET_MASK, uint64), new_sunset=sunset
    )


@external
@view
def is_servable(model_id: bytes32, profile_version: uint32) -> bool:
    """
    @notice Whether new offers and requests may name this model and profile: both exist and no sunset has passed.
    """
    return self._served_within(model_id, profile_version, 0)


@external
@view
def served_within(model_id: bytes32, profile_version: uint32, grace: uint256) -> bool:
    """
    @notice Whether the model and profile are servable now, or were less than `grace` seconds ago.
    """
    return self._served_within(model_id, profile_version, grace)


@external
@view
def model_count() -> uint256:
    """
    @notice How many models were ever registered.
    """
    return self._count


@external
@view
def model_at(index: uint256) -> bytes32:
    """
    @notice The id of the `index`-th model, in order of registration.
    """
    assert index < self._count, "models: no such index"
    return self._ids[index]


@external
@view
def model_spec(model_id: bytes32) -> IModelRegistry.ModelSpec:
    """
    @notice What the model is. Reverts for an unknown id.
    """
    self._known(model_id)
    return self._specs[model_id]


@external
@view
def model_config(model_id: bytes32) -> IModelRegistry.ModelConfig:
    """
    @notice The model's dimensions. Reverts for an unknown id.
    """
    self._known(model_id)
    return self._configs[model_id]


@external
@view
def profile(model_id: bytes32, profile_version: uint32) -> IModelRegistry.Profile:
    """
    @notice One profile of a model. Reverts if it does not exist.
    """
    self._check_known(model_id, profile_version)
    return self._profiles[model_id][profile_version]


@external
@view
def limits(model_id: bytes32, profile_version: uint32, output_tokens: uint32) -> IModelRegistry.Limits:
    """
    @notice Of a profile only what an answer of `output_tokens` is scored against: a third of the reads of all of it.
            Reverts if the profile does not exist.
    """
    self._check_known(model_id, profile_version)
    margin_row: IModelRegistry.ThresholdRow = empty(IModelRegistry.ThresholdRow)
    rows: uint256 = 0
    for i: uint256 in range(len(self._profiles[model_id][profile_version].margin_table), bound=8):
        tokens: uint32 = self._profiles[model_id][profile_version].margin_table[i].tokens
        if tokens > output_tokens:
            break
        margin_row.tokens = tokens
        rows = i + 1
    if rows != 0:
        margin_row.limit = self._profiles[model_id][profile_version].margin_table[rows - 1].limit
    fingerprint_row: IModelRegistry.ThresholdRow = empty(IModelRegistry.ThresholdRow)
    rows = 0
    for i: uint256 in range(len(self._profiles[model_id][profile_version].fingerprint_table), bound=8):
        tokens: uint32 = self._profiles[model_id][profile_version].fingerprint_table[i].tokens
        if tokens > output_tokens:
            break
        fingerprint_row.tokens = tokens
        rows = i + 1
    if rows != 0:
        fingerprint_row.limit = self._profiles[model_id][profile_version].fingerprint_table[rows - 1].limit
    return IModelRegistry.Limits(
        vocab_size=self._profiles[model_id][profile_version].vocab_size,
        margin_dead_zone=self._profiles[model_id][profile_version].margin_dead_zone,
        margin_hard_limit=self._profiles[model_id][profile_version].margin_hard_limit,
        margin_row=margin_row,
        fingerprint_dead_zone=self._profiles[model_id][profile_version].fingerprint_dead_zone,
        fingerprint_tolerance=self._profiles[model_id][profile_version].fingerprint_tolerance,
        fingerprint_row=fingerprint_row,
        weights_root=self._specs[model_id].weights_root,
    )


@external
@view
def config_hash(model_id: bytes32) -> bytes32:
    """
    @notice The hash of the model's dimensions. Reverts for an unknown id.
    """
    self._known(model_id)
    return self._specs[model_id].config_hash


@external
@view
def profile_count(model_id: bytes32) -> uint32:
    """
    @notice How many profiles a model has; 0 for an unknown id.
    """
    return convert((self._state[model_id] >> COUNT_SHIFT) & COUNT_MASK, uint32)


@external
@view
def deprecated_at(model_id: bytes32) -> uint64:
    """
    @notice The model's sunset in Unix seconds, or 0 if none is set.
    """
    return convert(self._state[model_id] & SUNSET_MASK, uint64)


@internal
@view
def _served_within(model_id: bytes32, profile_version: uint32, grace: uint256) -> bool:
    state: uint256 = self._state[model_id]
    sunset: uint256 = state & SUNSET_MASK
    number: uint256 = convert(profile_version, uint256)
    if number == 0 or number > (state >> COUNT_SHIFT) & COUNT_MASK:
        return False
    return sunset == 0 or block.timestamp < sunset or block.timestamp - sunset < grace


@internal
@view
def _known(model_id: bytes32) -> uint256:
    state: uint256 = self._state[model_id]
    assert state != 0, "models: unknown model"
    return state


@internal
@view
def _check_known(model_id: bytes32, profile_version: uint32):
    number: uint256 = convert(profile_version, uint256)
    count: uint256 = (self._known(model_id) >> COUNT_SHIFT) & COUNT_MASK
    assert 0 < number and number <= count, "models: unknown profile"


@internal
@pure
def _check_profile(profile: IModelRegistry.Profile, config: IModelRegistry.ModelConfig):
    assert 0 < profile.vocab_size and profile.vocab_size <= config.vocab_size, "models: vocab_size out of range"
    assert 0 < profile.max_context and profile.max_context <= config.max_positions, "models: max_context out of range"
    assert profile.dtype != empty(bytes32) and profile.kv_dtype != empty(bytes32), "models: no dtype"
    assert profile.min_temperature_milli <= profile.max_temperature_milli, "models: temperatures out of order"
    assert len(profile.end_token_ids) > 0, "models: no end token"
    for token_id: uint32 in profile.end_token_ids:
        assert token_id < profile.vocab_size, "models: end token out of range"
    self._check_table(profile.margin_table)
    self._check_table(profile.fingerprint_table)


@internal
@pure
def _check_table(table: DynArray[IModelRegistry.ThresholdRow, 8]):
    for i: uint256 in range(1, max(1, len(table)), bound=7):
        assert table[i - 1].tokens < table[i].tokens, "models: table out of order"
