# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Availability: a node shows what it committed to, and commits to what it signed, or it is convicted
@custom:contract-name Availability
@license AGPL-3.0-only
@notice `challenge` asks for up to eight leaves of one part of a transcript that the audit selected (anyone), or that
        belongs to a client's own receipt. `answer` publishes them with everything that re-execution needs. No answer in
        time is withholding: the batch is convicted. `demand_commit` does the same for a signed receipt that is in no
        batch.
@custom:security
        - A challenger need not hold the receipt: a node that hides its receipts cannot answer either.
        - Each chunk of eight leaves is challenged once, and its answer publishes it for good. So a node cannot keep
          others from one chunk by challenging itself on another, and nobody can make it publish a chunk twice.
        - Bonds are counted inside (`total_held`) and credited, never pushed: no receiver blocks a resolution. A bond
          goes back to its challenger, less a quarter for the node where it answered. Nobody else's bond is touched.
        - An answer keeps the batch's window open for one response window, so that what it shows can be judged. Challenges
          are taken in the original window only: a batch waits for two response windows more at most.
        - Any number of challenges is one case of the log, so nobody can use up the log's counter of cases.
        - Windows are those of the batch's revision. What a challenge asks for is fixed when it is made; the struct of
          the batch is passed again and checked, so a reorg cannot exchange it.
        - State is changed before the log or the registry is called; they do not call back. The token is called first
          when a bond comes in and last when a credit goes out.
@custom:kill The log's owner removes this judge with `set_judge`: no new challenges; open ones can still be answered,
        and resolving them returns the bonds and frees the batches. Claims never stop.
"""

from ..commitments import merkle
from ..governance import parameter_names
from ..interfaces import ICommitmentLog
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from ..interfaces import IPoipToken
from . import faults
from . import objects


OPEN: constant(uint8) = 1
ANSWERED: constant(uint8) = 2
WITHHELD: constant(uint8) = 3
VOID: constant(uint8) = 4

CHUNK: constant(uint256) = 8
PENDING: constant(uint256) = 1


struct Challenge:
    challenger: address
    batch_id: uint64
    index: uint32
    part: uint8
    first_leaf: uint32
    deadline: uint64
    status: uint8
    bond: uint256


# The commitment of one signed receipt was demanded.
struct Demand:
    demander: address
    node: address
    seq: uint64
    deadline: uint64
    status: uint8
    receipt_hash: bytes32
    bond: uint256


token: public(immutable(address))
commitment_log: public(immutable(address))
registry: public(immutable(address))
parameters: public(immutable(address))

challenge_count: public(uint256)
demand_count: public(uint256)
# Bonds of what is open, and credits that are not claimed yet.
total_held: public(uint256)
credits: public(HashMap[address, uint256])
# The challenge of a chunk, by keccak(batch id, index, part, first leaf); zero if there was none.
challenge_of: public(HashMap[bytes32, uint256])
# The demand for a node's seq; zero if there was none.
demand_of: public(HashMap[address, HashMap[uint64, uint256]])
# One more than the next seq at which a node was last slashed for not committing.
_withheld_at: HashMap[address, uint256]
_challenges: HashMap[uint256, Challenge]
_demands: HashMap[uint256, Demand]
# Open challenges by batch. One case of the log stands for them all: their number is not limited by the log's.
open_challenges: public(HashMap[uint64, uint256])


event Challenged:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    challenger: indexed(address)
    index: uint256
    part: uint256
    first_leaf: uint256
    deadline: uint256
    bond: uint256


# All that an accusation or a re-execution needs, also where the answer came through another contract.
event Answered:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    receipt: objects.Receipt
    receipt_proof: DynArray[bytes32, 32]
    request: objects.Request
    params: objects.SamplingParams
    roots: objects.TranscriptRoots
    leaves: DynArray[Bytes[512], CHUNK]
    proof: DynArray[bytes32, 64]


event Resolved:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    convicted: bool


event CommitDemanded:
    id: indexed(uint256)
    node: indexed(address)
    demander: indexed(address)
    seq: uint64
    receipt_hash: bytes32
    deadline: uint256
    bond: uint256


event DemandResolved:
    id: indexed(uint256)
    node: indexed(address)
    slashed: bool


event Credited:
    account: indexed(address)
    amount: uint256
    credit: uint256


event Claimed:
    account: indexed(address)
    amount: uint256


@deploy
def __init__(token_: address, log_: address, registry_: address, parameters_: address):
    """
    @notice Has no owner and no settings.
    @param token_ The network's token, in which bonds are paid.
    @param log_ The commitment log.
    @param registry_ The node registry.
    @param parameters_ The protocol's parameters.
    """
    assert token_ != empty(address) and log_ != empty(address), "availability: zero address"
    assert registry_ != empty(address) and parameters_ != empty(address), "availability: zero address"
    token = token_
    commitment_log = log_
    registry = registry_
    parameters = parameters_


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def challenge(batch: objects.Batch, draw: uint256, part: uint256, first_leaf: uint256) -> uint256:
    """
    @notice Ask for eight leaves of a transcript that the batch's beacon selects. Takes the bond from the sender.
    @param batch A pending batch inside its window.
    @param draw The draw that selects the receipt (see the log's `selected`).
    @param part 0 prompt, 1 output, 2 fingerprints.
    @param first_leaf A multiple of eight. Past the part's end, the answer brings no leaves but shows the roots.
    @return The challenge's id.
    """
    index: uint256 = staticcall ICommitmentLog(commitment_log).selected(batch, draw)
    return self._challenge(batch, index, part, first_leaf)


@external
def challenge_as_client(
    batch: objects.Batch, part: uint256, first_leaf: uint256, receipt: objects.Receipt, signature: Bytes[65]
) -> uint256:
    """
    @notice Ask for eight leaves of the sender's own transcript, selected or not. The node's signed receipt shows which.
    @param batch The pending batch, inside its window, that covers the receipt's seq.
    @param part 0 prompt, 1 output, 2 fingerprints.
    @param first_leaf A multiple of eight.
    @param receipt The receipt whose payer the sender is.
    @param signature The node's, 65 bytes.
    @return The challenge's id.
    """
    assert msg.sender == receipt.payer, "availability: sender is not the receipt's payer"
    assert receipt.node == batch.node, "availability: not the batch's node"
    self._check_signature(receipt, objects._receipt_hash(receipt), signature)
    assert receipt.seq >= batch.first_seq, "availability: receipt is not in the batch"
    return self._challenge(batch, convert(receipt.seq - batch.first_seq, uint256), part, first_leaf)


@external
def answer(
    id: uint256,
    batch: objects.Batch,
    receipt: objects.Receipt,
    receipt_proof: DynArray[bytes32, 32],
    request: objects.Request,
    params: objects.SamplingParams,
    roots: objects.TranscriptRoots,
    leaves: DynArray[Bytes[512], CHUNK],
    proof: DynArray[bytes32, 64],
):
    """
    @notice Publish what a challenge asks for. By anyone; a quarter of the bond is the node's.
    @param id The challenge.
    @param batch Its batch.
    @param receipt The receipt at the challenged index.
    @param receipt_proof Its Merkle proof in the batch.
    @param request The receipt's request.
    @param params The request's sampling parameters.
    @param roots What the receipt's transcript_root was made from.
    @param leaves The part's leaves from the challenged one on: eight, or as many as are left, or none.
    @param proof Their Merkle multi-proof in the part.
    """
    asked: Challenge = self._challenges[id]
    assert asked.status == OPEN, "availability: challenge is not open"
    assert block.timestamp <= convert(asked.deadline, uint256), "availability: too late"
    assert batch.id == asked.batch_id, "availability: not the challenge's batch"
    assert staticcall ICommitmentLog(commitment_log).matches(batch), "availability: no such batch"
    root: bytes32 = merkle._root_of_one(
        merkle._leaf_of_hash(objects._receipt_hash(receipt)),
        convert(asked.index, uint256),
        convert(batch.count, uint256),
        receipt_proof,
    )
    assert root == batch.root, "availability: receipt is not in the batch"
    assert objects._request_hash(request) == receipt.request_hash, "availability: not the receipt's request"
    assert objects._params_hash(params) == request.params_hash, "availability: not the request's parameters"
    assert objects._transcript_root(roots) == receipt.transcript_root, "availability: not the receipt's transcript"
    self._check_leaves(asked, receipt, request, roots, leaves, proof)

    self._challenges[id].status = ANSWERED
    compensation: uint256 = asked.bond // 4
    self._credit(staticcall INodeRegistry(registry).payout_of(batch.node), compensation)
    self._credit(asked.challenger, asked.bond - compensation)
    log Answered(
        id=id,
        batch_id=batch.id,
        receipt=receipt,
        receipt_proof=receipt_proof,
        request=request,
        params=params,
        roots=roots,
        leaves=leaves,
        proof=proof,
    )
    # Whoever saw the answer come has time to judge what it shows.
    extcall ICommitmentLog(commitment_log).extend_window(batch)
    self._close(batch)
    # A judge that was removed meanwhile must still let the node answer.
    if staticcall ICommitmentLog(commitment_log).may_judge(self, convert(block.timestamp, uint64)):
        extcall ICommitmentLog(commitment_log).raise_audit_rate(batch.node)


@external
def resolve(id: uint256, batch: objects.Batch) -> bool:
    """
    @notice End a challenge that was not answered in time, or whose batch was convicted meanwhile. By anyone. The bond
            goes back to the challenger, who is the beneficiary of the conviction.
    @param id The challenge.
    @param batch Its batch.
    @return Whether the batch was convicted by this call.
    """
    asked: Challenge = self._challenges[id]
    assert asked.status == OPEN, "availability: challenge is not open"
    assert batch.id == asked.batch_id, "availability: not the challenge's batch"
    status: uint256 = staticcall ICommitmentLog(commitment_log).status_of(batch)
    assert status != 0, "availability: no such batch"
    if status == PENDING:
        assert block.timestamp > convert(asked.deadline, uint256), "availability: the node may still answer"
    convicted: bool = staticcall ICommitmentLog(commitment_log).convictable(self, batch)
    self._challenges[id].status = VOID
    if convicted:
        self._challenges[id].status = WITHHELD
    self._credit(asked.challenger, asked.bond)
    log Resolved(id=id, batch_id=batch.id, convicted=convicted)
    if convicted:
        extcall ICommitmentLog(commitment_log).convict(
            batch, asked.challenger, convert(faults.WITHHOLDING, bytes32), convert(id, bytes32)
        )
    self._close(batch)
    return convicted


@external
def demand_commit(receipt: objects.Receipt, signature: Bytes[65]) -> uint256:
    """
    @notice Demand that a node commits to a batch that covers a receipt it signed. Takes the bond from the sender.
    @param receipt The receipt.
    @param signature The node's, 65 bytes.
    @return The demand's id.
    """
    receipt_hash: bytes32 = objects._receipt_hash(receipt)
    self._check_signature(receipt, receipt_hash, signature)
    assert not self._covered(receipt.node, receipt.seq), "availability: committed already"
    assert self.demand_of[receipt.node][receipt.seq] == 0, "availability: demanded already"
    bond: uint256 = self._take_bond()
    self.demand_count += 1
    id: uint256 = self.demand_count
    deadline: uint256 = block.timestamp + staticcall IParameters(parameters).value(parameter_names.RESPONSE_WINDOW)
    self.demand_of[receipt.node][receipt.seq] = id
    self._demands[id] = Demand(
        demander=msg.sender,
        node=receipt.node,
        seq=receipt.seq,
        deadline=convert(deadline, uint64),
        status=OPEN,
        receipt_hash=receipt_hash,
        bond=bond,
    )
    log CommitDemanded(
        id=id,
        node=receipt.node,
        demander=msg.sender,
        seq=receipt.seq,
        receipt_hash=receipt_hash,
        deadline=deadline,
        bond=bond,
    )
    return id


@external
def resolve_demand(id: uint256) -> bool:
    """
    @notice End a demand: once the seq is covered, or after its deadline. By anyone. The bond goes back to the demander,
            who is the beneficiary if the node is slashed. Receipts are committed in order, so all that wait at one next
            seq are one fault: a node is slashed once until it commits again.
    @param id The demand.
    @return Whether the node was slashed.
    """
    asked: Demand = self._demands[id]
    assert asked.status == OPEN, "availability: demand is not open"
    slashed: bool = False
    self._demands[id].status = ANSWERED
    if not self._covered(asked.node, asked.seq):
        assert block.timestamp > convert(asked.deadline, uint256), "availability: the node may still commit"
        next_seq: uint64 = staticcall ICommitmentLog(commitment_log).next_seq(asked.node)
        slashed = self._withheld_at[asked.node] != convert(next_seq, uint256) + 1
        self._withheld_at[asked.node] = convert(next_seq, uint256) + 1
        self._demands[id].status = VOID
        if slashed:
            self._demands[id].status = WITHHELD
    self._credit(asked.demander, asked.bond)
    log DemandResolved(id=id, node=asked.node, slashed=slashed)
    if slashed:
        extcall INodeRegistry(registry).slash_fixed(
            asked.node, asked.demander, convert(faults.WITHHOLDING, bytes32), asked.receipt_hash
        )
    return slashed


@external
def claim() -> uint256:
    """
    @notice Pay the sender's credit: bonds that came back, and a node's compensation for answers to its payout address.
    @return What was paid, in wei.
    """
    amount: uint256 = self.credits[msg.sender]
    assert amount != 0, "availability: nothing to claim"
    self.credits[msg.sender] = 0
    self.total_held -= amount
    log Claimed(account=msg.sender, amount=amount)
    assert extcall IPoipToken(token).transfer(msg.sender, amount), "availability: transfer failed"
    return amount


@external
@view
def challenge_info(id: uint256) -> Challenge:
    """
    @notice A challenge; status 1 open, 2 answered, 3 withheld (the batch was convicted), 4 void.
    """
    return self._challenges[id]


@external
@view
def demand_info(id: uint256) -> Demand:
    """
    @notice A demand to commit; status 1 open, 2 committed, 3 withheld (the node was slashed), 4 withheld together with
            another demand that the node was slashed for.
    """
    return self._demands[id]


@internal
def _challenge(batch: objects.Batch, index: uint256, part: uint256, first_leaf: uint256) -> uint256:
    """
    @dev For a batch that is pending and inside its window.
    """
    assert index < convert(batch.count, uint256), "availability: receipt is not in the batch"
    assert part <= faults.FINGERPRINT_PART, "availability: no such part"
    assert first_leaf % CHUNK == 0, "availability: first leaf is not a multiple of 8"
    assert first_leaf < 2**32, "availability: no such leaf"
    chunk: bytes32 = keccak256(abi_encode(convert(batch.id, uint256), index, part, first_leaf))
    assert self.challenge_of[chunk] == 0, "availability: challenged already"
    bond: uint256 = self._take_bond()
    self.challenge_count += 1
    id: uint256 = self.challenge_count
    window: uint256 = staticcall IParameters(parameters).value_at(
        parameter_names.RESPONSE_WINDOW, convert(batch.parameters_version, uint256)
    )
    deadline: uint256 = block.timestamp + window
    self.challenge_of[chunk] = id
    self._challenges[id] = Challenge(
        challenger=msg.sender,
        batch_id=batch.id,
        index=convert(index, uint32),
        part=convert(part, uint8),
        first_leaf=convert(first_leaf, uint32),
        deadline=convert(deadline, uint64),
        status=OPEN,
        bond=bond,
    )
    log Challenged(
        id=id,
        batch_id=batch.id,
        challenger=msg.sender,
        index=index,
        part=part,
        first_leaf=first_leaf,
        deadline=deadline,
        bond=bond,
    )
    # Not in a window that an answer extended: one answer must not lead to the next challenge, on and on.
    assert block.timestamp < convert(batch.window_end, uint256), "availability: window is over"
    self.open_challenges[batch.id] += 1
    if self.open_challenges[batch.id] == 1:
        extcall ICommitmentLog(commitment_log).open_case(batch)
    else:
        assert staticcall ICommitmentLog(commitment_log).convictable(self, batch), (
            "availability: batch cannot be convicted"
        )
    return id


@internal
def _close(batch: objects.Batch):
    """
    @dev One challenge of the batch is over.
    """
    self.open_challenges[batch.id] -= 1
    if self.open_challenges[batch.id] == 0:
        extcall ICommitmentLog(commitment_log).close_case(batch)


@internal
@pure
def _check_leaves(
    asked: Challenge,
    receipt: objects.Receipt,
    request: objects.Request,
    roots: objects.TranscriptRoots,
    leaves: DynArray[Bytes[512], CHUNK],
    proof: DynArray[bytes32, 64],
):
    """
    @dev The leaves are the chunk's, all of it, and stand in the part's tree.
    """
    part: uint256 = convert(asked.part, uint256)
    first_leaf: uint256 = convert(asked.first_leaf, uint256)
    count: uint256 = faults._leaf_count(part, faults._tokens_of(receipt, request, part))
    if first_leaf >= count:
        assert len(leaves) == 0 and len(proof) == 0, "availability: the part has no such leaves"
        return
    assert len(leaves) == min(CHUNK, count - first_leaf), "availability: not all leaves of the chunk"
    hashes: DynArray[bytes32, CHUNK] = []
    indices: DynArray[uint256, CHUNK] = []
    for i: uint256 in range(len(leaves), bound=CHUNK):
        hashes.append(merkle._leaf(leaves[i]))
        indices.append(first_leaf + i)
    root: bytes32 = roots.prompt_root
    if part == faults.OUTPUT_PART:
        root = roots.output_root
    elif part == faults.FINGERPRINT_PART:
        root = roots.fingerprint_root
    assert merkle._root_of_many(hashes, indices, count, proof) == root, "availability: not the leaves"


@internal
@view
def _check_signature(receipt: objects.Receipt, receipt_hash: bytes32, signature: Bytes[65]):
    signer: address = objects._signer(receipt_hash, commitment_log, signature)
    key: address = staticcall INodeRegistry(registry).signing_key(receipt.node, receipt.seq)
    assert signer != empty(address) and signer == key, "availability: not signed by the node's key"


@internal
@view
def _covered(node: address, seq: uint64) -> bool:
    return seq < staticcall ICommitmentLog(commitment_log).next_seq(node)


@internal
def _take_bond() -> uint256:
    bond: uint256 = staticcall IParameters(parameters).value(parameter_names.AVAILABILITY_BOND)
    self.total_held += bond
    assert extcall IPoipToken(token).transferFrom(msg.sender, self, bond), "availability: transfer failed"
    return bond


@internal
def _credit(account: address, amount: uint256):
    self.credits[account] += amount
    log Credited(account=account, amount=amount, credit=self.credits[account])
