# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Whether an accuser's points convict an answer
@custom:contract-name Scoring
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/accusation.py. A claim names logits at some output positions. Here its
        evidence is proven against the batch, the sampler's noise is computed again, and the terms of margins and
        fingerprints are summed and held against the limits of the batch's profile. Whether the logits are those of the
        canonical execution is not asked: that is for a contest to deny.
@custom:security
        - Every term is >= 0 and counted once (points strictly increase), and more tokens and positions can only add. So a
          sum over true logits is a lower bound of the answer's score, and no choice of points convicts an honest answer.
        - Every transcript whose output ids are proven can be scored, however its receipt, header or stated fingerprint
          breaks the rules; a listed token that should not be listed is a stated one. What cannot be scored is a fault that
          Offences judges at once: leaves of a wrong length, ids outside the vocabulary. Only margins need the parameters.
        - The batch's own model and profile judge, whatever receipt and request name.
        - Logits are int32, noise below 2**21 in magnitude, temperatures below 2**32: no sum of 128 points comes near 2**64.
        - Only views. Calls the log and the registry of models, whose addresses are fixed.
@custom:kill Holds nothing and decides nothing. An accusation contract with another scoring contract replaces it.
"""

from ..commitments import merkle
from ..interfaces import ICommitmentLog
from ..interfaces import IModelRegistry
from ..interfaces import IScoring
from . import faults
from . import noise
from . import objects
from . import openings

implements: IScoring

_ID_LEAF_BYTES: constant(uint256) = 128
_STATED_LEAF_BYTES: constant(uint256) = 384
_MAX_POINTS: constant(uint256) = 128
_MAX_LEAVES: constant(uint256) = 32

VALUE_MIN: constant(int256) = -(2**15)
VALUE_MAX: constant(int256) = 2**15 - 1


commitment_log: public(immutable(address))
models: public(immutable(address))


@deploy
def __init__(log_: address, models_: address):
    """
    @notice Has no owner and no settings.
    @param log_ The commitment log.
    @param models_ The model registry.
    """
    assert log_.is_contract and models_.is_contract, "scoring: not a contract"
    commitment_log = log_
    models = models_


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
@view
def score(batch: objects.Batch, claim: IScoring.Claim) -> IScoring.Scored:
    """
    @notice Check a claim's evidence and score its points.
    @param batch A batch of the log, in whatever status.
    @param claim Evidence and points.
    @return The sums, whether they convict, and what a trace on trial is about.
    """
    assert staticcall ICommitmentLog(commitment_log).matches(batch), "scoring: no such batch"
    assert batch.root == merkle._root_of_one(
        merkle._leaf_of_hash(objects._receipt_hash(claim.receipt)),
        convert(claim.index, uint256),
        convert(batch.count, uint256),
        claim.receipt_proof,
    ), "scoring: receipt is not in the batch"
    assert objects._request_hash(claim.request) == claim.receipt.request_hash, "scoring: not the receipt's request"
    assert objects._transcript_root(claim.roots) == claim.receipt.transcript_root, "scoring: not the receipt's transcript"
    temperature: int256 = convert(claim.params.temperature_milli, int256)
    if len(claim.margins) != 0:
        assert objects._params_hash(claim.params) == claim.request.params_hash, "scoring: not the request's parameters"
    limits: IModelRegistry.Limits = staticcall IModelRegistry(models).limits(
        batch.model_id, batch.profile_version, claim.receipt.output_tokens
    )

    tokens: uint256 = convert(claim.receipt.output_tokens, uint256)
    vocabulary: uint256 = convert(limits.vocab_size, uint256)
    seed: bytes32 = noise._seed(claim.request.client_seed)
    scored: IScoring.Scored = IScoring.Scored(
        convicts=False,
        margin_sum=0,
        margin_max=0,
        fingerprint_sum=0,
        model_id=batch.model_id,
        prompt_tokens=claim.request.prompt_tokens,
        output_tokens=claim.receipt.output_tokens,
        prompt_root=claim.request.prompt_root,
        output_root=claim.roots.output_root,
        weights_root=limits.weights_root,
    )

    # All points in order of position, so that the leaves that hold them are met in order, too.
    outputs: DynArray[uint256, _MAX_LEAVES] = []
    stated: DynArray[uint256, _MAX_LEAVES] = []
    output_leaf: uint256 = max_value(uint256)
    stated_leaf: uint256 = max_value(uint256)
    # Padded, so that every id can be read with the 28 bytes after it.
    ids: Bytes[4128] = concat(claim.output_leaves, empty(bytes32))
    margins: uint256 = 0
    fingerprints: uint256 = 0
    next_margin: uint256 = 0
    next_fingerprint: uint256 = 0
    for _: uint256 in range(_MAX_POINTS):
        point: IScoring.Point = empty(IScoring.Point)
        is_margin: bool = margins < len(claim.margins)
        if is_margin:
            point = claim.margins[margins]
        if fingerprints < len(claim.fingerprints):
            other: IScoring.Point = claim.fingerprints[fingerprints]
            if not is_margin or other.position < point.position:
                is_margin = False
                point = other
        elif not is_margin:
            break
        position: uint256 = convert(point.position, uint256)
        token: uint256 = convert(point.token, uint256)
        assert position < tokens, "scoring: position is past the output"
        assert token < vocabulary, "scoring: token is outside the vocabulary"
        if output_leaf != position >> 5:
            assert len(outputs) < _MAX_LEAVES, "scoring: points stand in too many leaves"
            output_leaf = position >> 5
            outputs.append(output_leaf)
        at: uint256 = unsafe_add(unsafe_mul(unsafe_sub(len(outputs), 1), _ID_LEAF_BYTES), unsafe_mul(position & 31, 4))
        assert unsafe_add(at, 4) <= len(claim.output_leaves), "scoring: leaves are of the wrong length"
        claimed: uint256 = self._little_endian(extract32(ids, at, output_type=uint256) >> 224)
        assert claimed < vocabulary, "scoring: claimed token is outside the vocabulary"
        assert token != claimed or point.logit == point.claimed_logit, "scoring: one token with two logits"

        if is_margin:
            assert position >= next_margin, "scoring: margins are out of order"
            next_margin = position + 1
            margins += 1
            best: int256 = 1000 * (convert(point.logit, int256) - convert(point.claimed_logit, int256))
            if temperature != 0:
                key: uint256 = noise._position_key(seed, position)
                best += temperature * (
                    noise._gumbel(noise._uniform_bits(key, token)) - noise._gumbel(noise._uniform_bits(key, claimed))
                )
            if best > 0:
                margin: uint256 = convert(best, uint256) // 1000
                scored.margin_max = max(scored.margin_max, margin)
                dead_zone: uint256 = convert(limits.margin_dead_zone, uint256)
                scored.margin_sum += max(margin, dead_zone) - dead_zone
        else:
            order: uint256 = (position << 32) | token
            assert order >= next_fingerprint, "scoring: fingerprints are out of order"
            next_fingerprint = order + 1
            fingerprints += 1
            if stated_leaf != position >> 3:
                assert len(stated) < _MAX_LEAVES, "scoring: points stand in too many leaves"
                stated_leaf = position >> 3
                stated.append(stated_leaf)
            at = (len(stated) - 1) * _STATED_LEAF_BYTES + (position & 7) * faults.POSITION_BYTES
            assert at + faults.POSITION_BYTES <= len(claim.fingerprint_leaves), (
                "scoring: leaves are of the wrong length"
            )
            scored.fingerprint_sum += self._fingerprint_term(
                extract32(claim.fingerprint_leaves, at, output_type=uint256),
                extract32(claim.fingerprint_leaves, at + 16, output_type=uint256),
                token,
                convert(point.logit, int256) - convert(point.claimed_logit, int256),
                token == claimed,
                convert(limits.fingerprint_dead_zone, int256),
                convert(limits.fingerprint_tolerance, int256),
            )

    used: uint256 = 0
    root: bytes32 = empty(bytes32)
    hashes: DynArray[bytes32, _MAX_LEAVES] = self._hashes(claim.output_leaves, outputs, _ID_LEAF_BYTES, 4 * tokens)
    if len(hashes) != 0:
        root, used = openings._root(hashes, outputs, (tokens + 31) >> 5, claim.proof, 0)
        assert root == claim.roots.output_root, "scoring: output leaves are not the transcript's"
    hashes = self._hashes(claim.fingerprint_leaves, stated, _STATED_LEAF_BYTES, faults.POSITION_BYTES * tokens)
    if len(hashes) != 0:
        root, used = openings._root(hashes, stated, (tokens + 7) >> 3, claim.proof, used)
        assert root == claim.roots.fingerprint_root, "scoring: fingerprint leaves are not the transcript's"
    assert used == len(claim.proof), "scoring: proof is too long"

    scored.convicts = scored.margin_max > convert(limits.margin_hard_limit, uint256)
    if not scored.convicts:
        scored.convicts = self._exceeds(scored.margin_sum, limits.margin_row, tokens)
    if not scored.convicts:
        scored.convicts = self._exceeds(scored.fingerprint_sum, limits.fingerprint_row, tokens)
    return scored


@internal
@pure
def _fingerprint_term(
    first: uint256,
    last: uint256,
    token: uint256,
    difference: int256,
    is_claimed: bool,
    dead_zone: int256,
    tolerance: int256,
) -> uint256:
    """
    @dev What a token adds at a position.
    @param first The first 32 of the 48 bytes stated there: entries 0 to 4.
    @param last The last 32 of them: entries 3 to 7 from the 16th bit on.
    @param difference The token's logit less the claimed one's.
    @param is_claimed Whether it is the claimed token itself, which need not be stated.
    """
    value: int256 = max(VALUE_MIN, min(VALUE_MAX, (difference + 512) >> 10))
    wanted: uint256 = self._little_endian(token)
    entries: uint256 = first
    for i: uint256 in range(8):
        if i == 4:
            entries = last << 64
        entry: uint256 = entries >> 208
        if entry >> 16 == wanted:
            return self._positive(abs(self._stated(entry) - value) - dead_zone)
        entries = entries << 48
    if is_claimed:
        return 0
    return self._positive(value - self._stated(last & (2**48 - 1)) - tolerance)


@internal
@pure
def _stated(entry: uint256) -> int256:
    """
    @dev The value of an entry of six bytes: the last two, an int16, lowest byte first.
    """
    value: int256 = convert(((entry & 255) << 8) | ((entry >> 8) & 255), int256)
    if value > VALUE_MAX:
        value -= 2**16
    return value


@internal
@pure
def _little_endian(x: uint256) -> uint256:
    """
    @dev A uint32 of which the bytes stand lowest first.
    """
    return (x >> 24) | ((x >> 8) & 65280) | ((x << 8) & 16711680) | ((x & 255) << 24)


@internal
@pure
def _positive(x: int256) -> uint256:
    return convert(max(x, 0), uint256)


@internal
@pure
def _exceeds(total: uint256, row: IModelRegistry.ThresholdRow, tokens: uint256) -> bool:
    """
    @dev Whether a sum is above the limit for so many tokens. A row of no tokens says nothing about answers, and is none.
    """
    length: uint256 = convert(row.tokens, uint256)
    return length != 0 and total > (convert(row.limit, uint256) * tokens + length - 1) // length


@internal
@pure
def _hashes(
    leaves: Bytes[8192], places: DynArray[uint256, _MAX_LEAVES], leaf_bytes: uint256, total_bytes: uint256
) -> DynArray[bytes32, _MAX_LEAVES]:
    """
    @dev The hashes of leaves that stand at `places` of a part of `total_bytes`. Its last leaf may be shorter than the others.
    """
    size: uint256 = len(places) * leaf_bytes
    if len(places) != 0:
        end: uint256 = (places[len(places) - 1] + 1) * leaf_bytes
        size -= max(end, total_bytes) - total_bytes
    assert len(leaves) == size, "scoring: leaves are of the wrong length"
    hashes: DynArray[bytes32, _MAX_LEAVES] = []
    # Padded by the length of the longest leaf, so that a slice of that length never ends outside.
    padded: Bytes[8576] = concat(
        leaves,
        empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32),
        empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32), empty(bytes32),
    )
    at: uint256 = 0
    for _: uint256 in range(len(places), bound=_MAX_LEAVES):
        window: Bytes[_STATED_LEAF_BYTES] = slice(padded, at, _STATED_LEAF_BYTES)
        hashes.append(keccak256(concat(0x00, slice(window, 0, min(leaf_bytes, size - at)))))
        at += leaf_bytes
    return hashes
