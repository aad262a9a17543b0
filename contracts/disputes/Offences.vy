# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Offences judged at once: equivocation, malformed receipts, sequences and transcripts
@custom:contract-name Offences
@license AGPL-3.0-only
@notice Whoever shows the evidence is the beneficiary. Nothing here needs a model to run: each rule compares what the
        node committed to or signed with what the client signed.
@custom:security
        - No value in a receipt, request, transcript or leaf can make a rule revert (see `faults.vy`). What reverts is
          evidence that is not authentic, or shows no fault.
        - A receipt in one node's batch is never evidence against another node. Signatures are never compared, so a
          second signature of one receipt is no equivocation.
        - `sentenced` is written before the log or the registry is called, and neither calls back.
        - The log's `convict` and the registry's `slash_fixed` are total: no state of the node blocks a sentence.
        - Evidence in the public mempool can be copied; the copier gets the reward, and the node is convicted all the
          same. A node that accuses itself loses more than the reward.
@custom:kill The log's owner removes this judge with `set_judge`, the registry's owner this slasher with `set_slasher`;
        batches then become final without it. It holds no tokens.
"""

from ..commitments import merkle
from ..interfaces import IModelRegistry
from . import evidence
from . import faults
from . import objects

initializes: evidence

exports: (evidence.commitment_log, evidence.registry, evidence.parameters, evidence.sentenced)


models: public(immutable(address))


@deploy
def __init__(log_: address, registry_: address, models_: address, parameters_: address):
    """
    @notice Has no owner and no settings.
    @param log_ The commitment log.
    @param registry_ The node registry.
    @param models_ The model registry.
    @param parameters_ The protocol's parameters.
    """
    assert models_ != empty(address), "offences: zero address"
    evidence.__init__(log_, registry_, parameters_)
    models = models_


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def prove_equivocation(
    a: objects.Receipt, a_evidence: objects.Evidence, b: objects.Receipt, b_evidence: objects.Evidence
):
    """
    @notice Two different receipts of one node with the same seq or the same request.
    @param a One receipt.
    @param a_evidence That it is the node's.
    @param b The other; its batch is the one convicted if it can be.
    @param b_evidence That it is the node's.
    """
    a_hash: bytes32 = objects._receipt_hash(a)
    b_hash: bytes32 = objects._receipt_hash(b)
    assert a_hash != b_hash, "offences: the same receipt"
    assert a.node == b.node, "offences: not one node's receipts"
    assert a.seq == b.seq or a.request_hash == b.request_hash, "offences: no fault"
    node: address = self._one_node(a, a_hash, a_evidence, b, b_hash, b_evidence)
    evidence._sentence(faults.EQUIVOCATION, node, a, a_hash, a_evidence, b, b_hash, b_evidence)


@external
def prove_sequence(
    a: objects.Receipt, a_evidence: objects.Evidence, b: objects.Receipt, b_evidence: objects.Evidence
) -> uint256:
    """
    @notice Seqs and running totals that do not add up: of two receipts of one node, or of one committed receipt at its
            place in its batch (then a and b are the same).
    @param a The receipt with the lower seq.
    @param a_evidence That it is the node's.
    @param b The receipt with the higher seq; its batch is the one convicted if it can be.
    @param b_evidence That it is the node's.
    @return The fault's code.
    """
    a_hash: bytes32 = objects._receipt_hash(a)
    b_hash: bytes32 = objects._receipt_hash(b)
    fault: uint256 = 0
    node: address = empty(address)
    if a_hash == b_hash:
        node = evidence._check(b, b_hash, b_evidence)
        assert b_evidence.batch.id != 0, "offences: the receipt is not committed"
        fault = faults._place_fault(b, b_evidence.batch, b_evidence.index)
        assert fault != faults.NO_FAULT, "offences: no fault"
        evidence._sentence(fault, node, b, b_hash, b_evidence, b, b_hash, b_evidence)
        return fault
    node = self._one_node(a, a_hash, a_evidence, b, b_hash, b_evidence)
    fault = faults._sequence_fault(a, b)
    assert fault != faults.NO_FAULT, "offences: no fault"
    evidence._sentence(fault, node, a, a_hash, a_evidence, b, b_hash, b_evidence)
    return fault


@external
def prove_receipt(
    receipt: objects.Receipt,
    proof: objects.Evidence,
    request: objects.Request,
    params: objects.SamplingParams,
) -> uint256:
    """
    @notice A receipt that does not keep to its request, its batch or its model's profile.
    @param receipt The receipt.
    @param proof That it is the node's.
    @param request The request that it answers.
    @param params The request's sampling parameters. If they are not those, the rules that need them are left out.
    @return The fault's code.
    """
    receipt_hash: bytes32 = objects._receipt_hash(receipt)
    node: address = evidence._check(receipt, receipt_hash, proof)
    assert objects._request_hash(request) == receipt.request_hash, "offences: not the receipt's request"
    fault: uint256 = faults._receipt_fault(receipt, request, self._standard(request, params), proof.batch)
    assert fault != faults.NO_FAULT, "offences: no fault"
    evidence._sentence(fault, node, receipt, receipt_hash, proof, receipt, receipt_hash, proof)
    return fault


@external
def prove_transcript(
    receipt: objects.Receipt,
    proof: objects.Evidence,
    request: objects.Request,
    params: objects.SamplingParams,
    roots: objects.TranscriptRoots,
    part: uint256,
    leaf_index: uint256,
    leaf: Bytes[512],
    leaf_proof: DynArray[bytes32, 32],
) -> uint256:
    """
    @notice A transcript whose header, roots or one leaf break a rule.
    @param receipt The receipt that commits to it.
    @param proof That it is the node's.
    @param request The request that it answers.
    @param params The request's sampling parameters. If they are not those, the rules that need them are left out.
    @param roots What the receipt's transcript_root was made from.
    @param part 0 prompt, 1 output, 2 fingerprints, 255 no leaf: header and roots alone.
    @param leaf_index Which leaf of the part.
    @param leaf Its bytes.
    @param leaf_proof Its Merkle proof.
    @return The fault's code.
    """
    receipt_hash: bytes32 = objects._receipt_hash(receipt)
    node: address = evidence._check(receipt, receipt_hash, proof)
    assert objects._request_hash(request) == receipt.request_hash, "offences: not the receipt's request"
    assert objects._transcript_root(roots) == receipt.transcript_root, "offences: not the receipt's transcript"
    fault: uint256 = faults._roots_fault(receipt, request, roots)
    if fault == faults.NO_FAULT and part != faults.NO_PART:
        fault = self._judge_leaf(receipt, request, params, roots, part, leaf_index, leaf, leaf_proof)
    assert fault != faults.NO_FAULT, "offences: no fault"
    evidence._sentence(fault, node, receipt, receipt_hash, proof, receipt, receipt_hash, proof)
    return fault


@internal
@view
def _judge_leaf(
    receipt: objects.Receipt,
    request: objects.Request,
    params: objects.SamplingParams,
    roots: objects.TranscriptRoots,
    part: uint256,
    leaf_index: uint256,
    leaf: Bytes[512],
    leaf_proof: DynArray[bytes32, 32],
) -> uint256:
    """
    @dev The fault of a leaf that is proven to stand in its part.
    """
    assert part <= faults.FINGERPRINT_PART, "offences: no such part"
    root: bytes32 = roots.prompt_root
    if part == faults.OUTPUT_PART:
        root = roots.output_root
    elif part == faults.FINGERPRINT_PART:
        root = roots.fingerprint_root
    tokens: uint256 = faults._tokens_of(receipt, request, part)
    count: uint256 = faults._leaf_count(part, tokens)
    assert merkle._root_of_one(merkle._leaf(leaf), leaf_index, count, leaf_proof) == root, "offences: not the leaf"
    return faults._leaf_fault(receipt, self._standard(request, params), part, leaf_index, leaf, tokens)


@internal
@view
def _one_node(
    a: objects.Receipt,
    a_hash: bytes32,
    a_evidence: objects.Evidence,
    b: objects.Receipt,
    b_hash: bytes32,
    b_evidence: objects.Evidence,
) -> address:
    """
    @dev The node that two receipts name and are evidence against. One that another node committed is no evidence.
    """
    node: address = evidence._check(a, a_hash, a_evidence)
    assert node == evidence._check(b, b_hash, b_evidence), "offences: not one node's receipts"
    assert a.node == node and b.node == node, "offences: not one node's receipts"
    return node


@internal
@view
def _standard(request: objects.Request, params: objects.SamplingParams) -> faults.Standard:
    """
    @dev What the request is judged against, as far as it can be known.
    """
    standard: faults.Standard = empty(faults.Standard)
    standard.params = params
    standard.params_known = objects._params_hash(params) == request.params_hash
    profiles: uint32 = staticcall IModelRegistry(models).profile_count(request.model_id)
    if request.profile_version != 0 and request.profile_version <= profiles:
        standard.profile_known = True
        standard.profile = staticcall IModelRegistry(models).profile(request.model_id, request.profile_version)
    return standard
