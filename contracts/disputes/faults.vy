# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Fault codes and the rules of receipts, sequences and transcripts
@custom:contract-name faults
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/offences.py: the same rules in the same order. Pure: what they judge is
        authentic already. No arithmetic here can revert because of a value that a node chose: everything is widened to
        uint256, differences are compared as sums, and a reverting rule would be an unpunishable fault.
"""

from ..interfaces import IModelRegistry
from . import objects

NO_FAULT: constant(uint256) = 0
FEE: constant(uint256) = 1
MAX_TOKENS: constant(uint256) = 2
DEADLINE: constant(uint256) = 3
MODEL: constant(uint256) = 4
PROFILE: constant(uint256) = 5
NODE: constant(uint256) = 6
PAYER: constant(uint256) = 7
CONTEXT: constant(uint256) = 8
SHORT_LENGTH: constant(uint256) = 9
NO_OUTPUT: constant(uint256) = 10
FINISH_REASON: constant(uint256) = 11
CUMULATIVE: constant(uint256) = 12
PARAMETERS: constant(uint256) = 13
SEQUENCE: constant(uint256) = 14
BATCH_TOTAL: constant(uint256) = 15
NODE_TOTAL: constant(uint256) = 16
PAYER_TOTAL: constant(uint256) = 17
TOKEN_ID: constant(uint256) = 18
LEAF_SIZE: constant(uint256) = 19
EARLY_END: constant(uint256) = 20
HEADER: constant(uint256) = 21
PROMPT_ROOT: constant(uint256) = 22
MISSING_END: constant(uint256) = 23
FINGERPRINT: constant(uint256) = 24
EQUIVOCATION: constant(uint256) = 25
WITHHOLDING: constant(uint256) = 26
COMPUTATION: constant(uint256) = 27

STOP: constant(uint8) = 0
LENGTH: constant(uint8) = 1
CANCELLED: constant(uint8) = 2

PROMPT_PART: constant(uint256) = 0
OUTPUT_PART: constant(uint256) = 1
FINGERPRINT_PART: constant(uint256) = 2
NO_PART: constant(uint256) = 255

IDS_PER_LEAF: constant(uint256) = 32
POSITIONS_PER_LEAF: constant(uint256) = 8
ENTRIES_PER_POSITION: constant(uint256) = 8
ENTRY_BYTES: constant(uint256) = 6
POSITION_BYTES: constant(uint256) = 48


# What a receipt is judged against. `params_known` and `profile_known` are False where no one can show them (a hash
# without a preimage, a model that is not registered): the rules that need them are left out.
struct Standard:
    params: objects.SamplingParams
    params_known: bool
    profile: IModelRegistry.Profile
    profile_known: bool


@internal
@pure
def _receipt_fault(
    receipt: objects.Receipt, request: objects.Request, standard: Standard, batch: objects.Batch
) -> uint256:
    """
    @dev The first fault that the receipt shows beside its request. batch.id is zero for an uncommitted receipt.
    """
    committed: bool = batch.id != 0
    prompt: uint256 = convert(request.prompt_tokens, uint256)
    output: uint256 = convert(receipt.output_tokens, uint256)
    # 32 + 128 bits twice: at most 161 bits.
    fee: uint256 = prompt * convert(request.input_price, uint256) + output * convert(request.output_price, uint256)
    if convert(receipt.fee, uint256) != fee:
        return FEE
    if receipt.output_tokens > request.max_tokens:
        return MAX_TOKENS
    if receipt.issued_at > request.deadline:
        return DEADLINE
    if receipt.model_id != request.model_id or (committed and receipt.model_id != batch.model_id):
        return MODEL
    if committed and request.profile_version != batch.profile_version:
        return PROFILE
    if request.node != empty(address) and request.node != receipt.node:
        return NODE
    if committed and receipt.node != batch.node:
        return NODE
    if receipt.payer != request.client:
        return PAYER
    if prompt == 0:
        return CONTEXT
    if standard.profile_known and prompt + output > convert(standard.profile.max_context, uint256):
        return CONTEXT
    if receipt.finish_reason == LENGTH and receipt.output_tokens < request.max_tokens:
        return SHORT_LENGTH
    if receipt.output_tokens == 0 and receipt.finish_reason != CANCELLED:
        return NO_OUTPUT
    if receipt.finish_reason > CANCELLED:
        return FINISH_REASON
    if receipt.fee > receipt.node_cum or receipt.fee > receipt.payer_cum:
        return CUMULATIVE
    if self._bad_params(standard):
        return PARAMETERS
    return NO_FAULT


@internal
@pure
def _bad_params(standard: Standard) -> bool:
    """
    @dev Sampling parameters that are not served, or outside the profile.
    """
    if not standard.params_known:
        return False
    if standard.params.top_p_milli != 1000 or standard.params.top_k != 0:
        return True
    temperature: uint32 = standard.params.temperature_milli
    if standard.profile_known and temperature != 0:
        if temperature < standard.profile.min_temperature_milli:
            return True
        if temperature > standard.profile.max_temperature_milli:
            return True
    next_id: uint256 = 0
    for token_id: uint32 in standard.params.stop_token_ids:
        if convert(token_id, uint256) < next_id:
            return True
        if standard.profile_known and token_id >= standard.profile.vocab_size:
            return True
        next_id = convert(token_id, uint256) + 1
    return False


@internal
@pure
def _place_fault(receipt: objects.Receipt, batch: objects.Batch, index: uint256) -> uint256:
    """
    @dev The first fault that a committed receipt shows at its place in its batch, without its request.
    """
    if receipt.model_id != batch.model_id:
        return MODEL
    if receipt.node != batch.node:
        return NODE
    if receipt.finish_reason > CANCELLED:
        return FINISH_REASON
    if receipt.fee > receipt.node_cum or receipt.fee > receipt.payer_cum:
        return CUMULATIVE
    if convert(receipt.seq, uint256) != convert(batch.first_seq, uint256) + index:
        return SEQUENCE
    node_cum: uint256 = convert(receipt.node_cum, uint256)
    batch_cum: uint256 = convert(batch.node_cum, uint256)
    if index + 1 == convert(batch.count, uint256) and node_cum != batch_cum:
        return BATCH_TOTAL
    # Every receipt's interval of the running total, from node_cum - fee to node_cum, lies within the batch's, from
    # node_cum - total_fee to node_cum; the first receipt's starts where the batch's does.
    start: uint256 = node_cum + convert(batch.total_fee, uint256)
    batch_start: uint256 = batch_cum + convert(receipt.fee, uint256)
    if node_cum > batch_cum or start < batch_start or (index == 0 and start != batch_start):
        return BATCH_TOTAL
    return NO_FAULT


@internal
@pure
def _sequence_fault(a: objects.Receipt, b: objects.Receipt) -> uint256:
    """
    @dev The first fault that two receipts of one node show side by side. Only a.seq < b.seq shows one.
    """
    if a.seq >= b.seq:
        return NO_FAULT
    reached: uint256 = convert(a.node_cum, uint256) + convert(b.fee, uint256)
    stated: uint256 = convert(b.node_cum, uint256)
    if stated < reached:
        return NODE_TOTAL
    if convert(a.seq, uint256) + 1 == convert(b.seq, uint256) and stated != reached:
        return NODE_TOTAL
    if a.payer == b.payer:
        if convert(b.payer_cum, uint256) < convert(a.payer_cum, uint256) + convert(b.fee, uint256):
            return PAYER_TOTAL
    return NO_FAULT


@internal
@pure
def _roots_fault(
    receipt: objects.Receipt, request: objects.Request, roots: objects.TranscriptRoots
) -> uint256:
    """
    @dev The first fault that the transcript's header and roots show.
    """
    if roots.request_hash != receipt.request_hash or roots.finish_reason != receipt.finish_reason:
        return HEADER
    if roots.prompt_root != request.prompt_root:
        return PROMPT_ROOT
    # A tree has the root zero if and only if it has no leaf.
    no_output: bool = receipt.output_tokens == 0
    if (roots.output_root == empty(bytes32)) != no_output:
        return LEAF_SIZE
    if (roots.fingerprint_root == empty(bytes32)) != no_output:
        return LEAF_SIZE
    if (roots.prompt_root == empty(bytes32)) != (request.prompt_tokens == 0):
        return LEAF_SIZE
    return NO_FAULT


@internal
@pure
def _tokens_of(receipt: objects.Receipt, request: objects.Request, part: uint256) -> uint256:
    """
    @dev How many tokens a part covers.
    """
    if part == PROMPT_PART:
        return convert(request.prompt_tokens, uint256)
    return convert(receipt.output_tokens, uint256)


@internal
@pure
def _leaf_count(part: uint256, tokens: uint256) -> uint256:
    """
    @dev How many leaves that many tokens make in this part.
    """
    if part == FINGERPRINT_PART:
        return (tokens + POSITIONS_PER_LEAF - 1) // POSITIONS_PER_LEAF
    return (tokens + IDS_PER_LEAF - 1) // IDS_PER_LEAF


@internal
@pure
def _leaf_fault(
    receipt: objects.Receipt,
    standard: Standard,
    part: uint256,
    leaf_index: uint256,
    leaf: Bytes[512],
    tokens: uint256,
) -> uint256:
    """
    @dev The first fault that one leaf shows. It stands at `leaf_index` < _leaf_count(part, tokens) of the part's tree.
    """
    if part == FINGERPRINT_PART:
        first_position: uint256 = leaf_index * POSITIONS_PER_LEAF
        positions: uint256 = min(POSITIONS_PER_LEAF, tokens - first_position)
        if len(leaf) != positions * POSITION_BYTES:
            return LEAF_SIZE
        return self._fingerprint_fault(standard, concat(leaf, empty(bytes32)), positions)

    first_token: uint256 = leaf_index * IDS_PER_LEAF
    ids: uint256 = min(IDS_PER_LEAF, tokens - first_token)
    if len(leaf) != ids * 4:
        return LEAF_SIZE
    if not standard.profile_known:
        return NO_FAULT
    padded: Bytes[544] = concat(leaf, empty(bytes32))
    for i: uint256 in range(ids, bound=IDS_PER_LEAF):
        if self._id_at(padded, i * 4) >= convert(standard.profile.vocab_size, uint256):
            return TOKEN_ID
    if part == PROMPT_PART or not standard.params_known:
        return NO_FAULT
    for i: uint256 in range(ids, bound=IDS_PER_LEAF):
        ends: bool = self._ends(standard, self._id_at(padded, i * 4))
        last: bool = first_token + i + 1 == tokens
        if ends and not last:
            return EARLY_END
        if last and not ends and receipt.finish_reason == STOP:
            return MISSING_END
    return NO_FAULT


@internal
@pure
def _ends(standard: Standard, token_id: uint256) -> bool:
    """
    @dev Whether an answer ends with this token.
    """
    if not standard.params.ignore_eos:
        for end_id: uint32 in standard.profile.end_token_ids:
            if convert(end_id, uint256) == token_id:
                return True
    for stop_id: uint32 in standard.params.stop_token_ids:
        if convert(stop_id, uint256) == token_id:
            return True
    return False


@internal
@pure
def _fingerprint_fault(standard: Standard, padded: Bytes[544], positions: uint256) -> uint256:
    """
    @dev Each position states 8 distinct ids by value descending, then id ascending.
    """
    for position: uint256 in range(positions, bound=POSITIONS_PER_LEAF):
        ids: uint256[ENTRIES_PER_POSITION] = empty(uint256[ENTRIES_PER_POSITION])
        old_value: uint256 = 0
        for i: uint256 in range(ENTRIES_PER_POSITION):
            offset: uint256 = position * POSITION_BYTES + i * ENTRY_BYTES
            ids[i] = self._id_at(padded, offset)
            if standard.profile_known and ids[i] >= convert(standard.profile.vocab_size, uint256):
                return TOKEN_ID
            # int16 little-endian, shifted into 0 .. 2**16 - 1 so that the order of values is that of the numbers.
            word: uint256 = extract32(padded, offset + 4, output_type=uint256)
            new_value: uint256 = ((word >> 248) | (((word >> 240) & 255) << 8)) ^ 32768
            if i != 0:
                if new_value > old_value or (new_value == old_value and ids[i] <= ids[i - 1]):
                    return FINGERPRINT
                for j: uint256 in range(i, bound=ENTRIES_PER_POSITION):
                    if ids[j] == ids[i]:
                        return FINGERPRINT
            old_value = new_value
    return NO_FAULT


@internal
@pure
def _id_at(padded: Bytes[544], offset: uint256) -> uint256:
    """
    @dev The little-endian uint32 at `offset`. `padded` ends in 32 bytes that are not data.
    """
    word: uint256 = extract32(padded, offset, output_type=uint256) >> 224
    return (word >> 24) | ((word >> 8) & 65280) | ((word << 8) & 16711680) | ((word & 255) << 24)
