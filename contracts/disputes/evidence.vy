# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Evidence: which receipts are a node's own, and what a fault costs it
@custom:contract-name evidence
@license AGPL-3.0-only
@notice A receipt is evidence against a node if it stands in one of the node's batches, or if the node's key for its seq
        signed it. Sentence: the batch of the later evidence is convicted if it can still be, else that of the earlier;
        else an uncommitted receipt costs the share of stake pinned at registration, once a receipt, until its seq is
        committed and inside the evidence window.
"""

from ..commitments import merkle
from ..governance import parameter_names
from ..interfaces import ICommitmentLog
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from . import objects


event Convicted:
    node: indexed(address)
    fault: indexed(uint256)
    beneficiary: indexed(address)
    batch_id: uint64
    receipt_hash: bytes32
    other_receipt_hash: bytes32
    taken: uint256
    paid: uint256


commitment_log: public(immutable(address))
registry: public(immutable(address))
parameters: public(immutable(address))

# Struct hashes of receipts that were sentenced, alone or in a pair: never again by signature. And hashes of evidence
# (keccak of the two struct hashes): a pair convicts one batch, in each order.
sentenced: public(HashMap[bytes32, bool])


@deploy
def __init__(log_: address, registry_: address, parameters_: address):
    assert log_ != empty(address) and registry_ != empty(address), "evidence: zero address"
    assert parameters_ != empty(address), "evidence: zero address"
    commitment_log = log_
    registry = registry_
    parameters = parameters_


@internal
@view
def _check(receipt: objects.Receipt, receipt_hash: bytes32, proof: objects.Evidence) -> address:
    """
    @dev Whose evidence the receipt is; reverts if it is nobody's. A committed one is the batch's node's, whatever node
         it names.
    """
    if proof.batch.id != 0:
        assert staticcall ICommitmentLog(commitment_log).matches(proof.batch), "evidence: no such batch"
        root: bytes32 = merkle._root_of_one(
            merkle._leaf_of_hash(receipt_hash), proof.index, convert(proof.batch.count, uint256), proof.proof
        )
        assert root == proof.batch.root, "evidence: receipt is not in the batch"
        return proof.batch.node
    signer: address = objects._signer(receipt_hash, commitment_log, proof.signature)
    key: address = staticcall INodeRegistry(registry).signing_key(receipt.node, receipt.seq)
    assert signer != empty(address) and signer == key, "evidence: not signed by the node's key"
    return receipt.node


@internal
def _sentence(
    fault: uint256,
    node: address,
    a: objects.Receipt,
    a_hash: bytes32,
    a_evidence: objects.Evidence,
    b: objects.Receipt,
    b_hash: bytes32,
    b_evidence: objects.Evidence,
):
    """
    @dev The sender is the beneficiary. a and b are the same for a fault that one receipt shows.
    """
    evidence_hash: bytes32 = keccak256(concat(a_hash, b_hash))
    if self._convict(fault, node, b_evidence.batch, b_hash, a_hash, evidence_hash):
        return
    assert not self.sentenced[evidence_hash], "evidence: sentenced already"
    if self._convict(fault, node, a_evidence.batch, a_hash, b_hash, evidence_hash):
        return
    b_fresh: bool = b_evidence.batch.id == 0 and not self.sentenced[b_hash]
    a_fresh: bool = a_evidence.batch.id == 0 and not self.sentenced[a_hash]
    assert a_fresh or b_fresh, "evidence: sentenced already, or its batch is settled"
    # issued_at is the node's own statement, so it lets nothing expire that the node has yet to commit.
    next_seq: uint64 = staticcall ICommitmentLog(commitment_log).next_seq(node)
    if not ((a_fresh and a.seq >= next_seq) or (b_fresh and b.seq >= next_seq)):
        window: uint256 = staticcall IParameters(parameters).value(parameter_names.EVIDENCE_WINDOW)
        issued_at: uint256 = convert(max(a.issued_at, b.issued_at), uint256)
        assert block.timestamp <= issued_at + window, "evidence: expired"
    self._mark(a_hash, b_hash, evidence_hash)
    taken: uint256 = 0
    paid: uint256 = 0
    taken, paid = extcall INodeRegistry(registry).slash_fixed(node, msg.sender, convert(fault, bytes32), evidence_hash)
    log Convicted(
        node=node,
        fault=fault,
        beneficiary=msg.sender,
        batch_id=0,
        receipt_hash=b_hash,
        other_receipt_hash=a_hash,
        taken=taken,
        paid=paid,
    )


@internal
def _convict(
    fault: uint256,
    node: address,
    batch: objects.Batch,
    receipt_hash: bytes32,
    other_hash: bytes32,
    evidence_hash: bytes32,
) -> bool:
    """
    @dev Convict the batch if there is one and it can still be convicted.
    """
    if batch.id == 0:
        return False
    if not staticcall ICommitmentLog(commitment_log).convictable(self, batch):
        return False
    self._mark(receipt_hash, other_hash, evidence_hash)
    taken: uint256 = 0
    paid: uint256 = 0
    taken, paid = extcall ICommitmentLog(commitment_log).convict(
        batch, msg.sender, convert(fault, bytes32), evidence_hash
    )
    log Convicted(
        node=node,
        fault=fault,
        beneficiary=msg.sender,
        batch_id=batch.id,
        receipt_hash=receipt_hash,
        other_receipt_hash=other_hash,
        taken=taken,
        paid=paid,
    )
    return True


@internal
def _mark(receipt_hash: bytes32, other_hash: bytes32, evidence_hash: bytes32):
    self.sentenced[receipt_hash] = True
    self.sentenced[other_hash] = True
    self.sentenced[evidence_hash] = True
