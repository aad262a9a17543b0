# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Commitment log: batches of receipts, stake locks, challenge windows, beacons, finality
@custom:contract-name CommitmentLog
@license AGPL-3.0-only
@notice A node commits to its receipts in batches without gaps in seq. A batch is pending until its challenge window has
        passed with no open case; then anyone makes it final. What an answer shows late in the window may be judged for one
        response window more. A judge contract may convict it while it is pending: the
        batch's stake lock is taken and its fees are void. Final and convicted never change again.
@custom:security
        - The log calls only the registry, the model registry and the parameters, all fixed at deployment. Every state
          change of `finalize`, `convict` and `commit` is made before the registry is called. The registry calls back
          only `next_seq`, which is `reentrant` and by then right.
        - `convict` and `finalize` do not depend on the node's state: the registry's `unlock` clamps and its `slash` is
          total. What a judge can take is at most the batch's lock.
        - A judge added after `seal` acts only on batches committed once everything that was staked when it was
          announced could have left: governance cannot seize stake by adding a judge.
        - Callers pass whole batches, checked against 240 bits of their hash: after a reorg, a transaction meant for
          another batch under the same id reverts.
        - A judge that is removed can still close its cases, so removal never leaves a batch pending for good.
@custom:kill There is no kill switch. To stop new batches, deprecate the models in the model registry: none is taken
        once challenge_window has passed since the sunset. Finality, convictions and payouts of what was committed go on. To stop a faulty judge, `set_judge(judge, False)`.
"""

from snekmate.auth import ownable
from snekmate.auth import ownable_2step
from snekmate.utils import eip712_domain_separator

from ..disputes import objects
from ..governance import parameter_names
from ..interfaces import ICommitmentLog
from ..interfaces import IModelRegistry
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from . import batches
from . import beacon

implements: ICommitmentLog

initializes: ownable
initializes: ownable_2step[ownable := ownable]
initializes: eip712_domain_separator
initializes: batches
initializes: beacon

exports: (
    # Administration.
    ownable_2step.owner,
    ownable_2step.pending_owner,
    ownable_2step.transfer_ownership,
    ownable_2step.accept_ownership,
    # Requests and receipts are signed for this contract (EIP-5267).
    eip712_domain_separator.eip712Domain,
    beacon.beacon_at,
)


PPM: constant(uint256) = 10**6
MAX_BATCH: constant(uint256) = 65536

registry: public(immutable(address))
models: public(immutable(address))
parameters: public(immutable(address))

sealed: public(bool)
# The commit time from which a judge may act on batches; zero for an address that is no judge.
judge_active_from: public(HashMap[address, uint64])
# Open cases by judge and batch: only who opened a case may close it or convict by it after the window.
_held: HashMap[address, HashMap[uint64, uint256]]
# By batch, the later end of its window where something came to light just before its end, or in a case after it.
_extended: HashMap[uint64, uint256]


event BatchCommitted:
    batch_id: indexed(uint64)
    node: indexed(address)
    batch: objects.Batch
    locator: String[128]


event BatchFinal:
    batch_id: indexed(uint64)
    node: indexed(address)


event BatchConvicted:
    batch_id: indexed(uint64)
    node: indexed(address)
    judge: indexed(address)
    beneficiary: address
    reason: bytes32
    evidence: bytes32
    taken: uint256
    paid: uint256


event CaseOpened:
    batch_id: indexed(uint64)
    judge: indexed(address)
    open_cases: uint256


event CaseClosed:
    batch_id: indexed(uint64)
    judge: indexed(address)
    open_cases: uint256


event WindowExtended:
    batch_id: indexed(uint64)
    judge: indexed(address)
    old_end: uint256
    new_end: uint256


event AuditRateRaised:
    node: indexed(address)
    old_raise: uint256
    new_raise: uint256


event JudgeSet:
    judge: indexed(address)
    old_active_from: uint64
    new_active_from: uint64


event Sealed:
    pass


@deploy
def __init__(registry_: address, models_: address, parameters_: address):
    """
    @notice The deployer owns the log and wires its judges before `seal`.
    @param registry_ The node registry.
    @param models_ The model registry.
    @param parameters_ The protocol's parameters.
    """
    assert registry_ != empty(address) and models_ != empty(address), "log: zero address"
    assert parameters_ != empty(address), "log: zero address"
    ownable.__init__()
    ownable_2step.__init__()
    eip712_domain_separator.__init__("PoIP", "1")
    batches.__init__()
    beacon.__init__()
    registry = registry_
    models = models_
    parameters = parameters_


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def commit(
    model_id: bytes32,
    profile_version: uint32,
    root: bytes32,
    first_seq: uint64,
    count: uint32,
    total_fee: uint192,
    locator: String[128],
) -> objects.Batch:
    """
    @notice Commit to the receipts first_seq .. first_seq + count - 1 of the node whose current node key is the sender.
            Locks stake by value at risk until the batch is final.
    @param model_id The model of all the batch's receipts; at most challenge_window past its sunset.
    @param profile_version The profile that their requests name.
    @param root Merkle root over the receipts' struct hashes in order of seq.
    @param first_seq The node's next seq.
    @param count How many receipts, 1 to 65536.
    @param total_fee The sum of their fees, in wei.
    @param locator Where the receipts are served, for the event alone.
    @return The batch with what was pinned for it.
    """
    node: address = staticcall INodeRegistry(registry).node_of_key(msg.sender)
    assert node != empty(address), "log: sender is no node key"
    next_seq: uint256 = 0
    audit_raise: uint256 = 0
    node_cum: uint256 = 0
    next_seq, audit_raise, node_cum = batches._node(node)
    assert convert(first_seq, uint256) == next_seq, "log: first seq is not the next"
    assert staticcall INodeRegistry(registry).signing_key(node, first_seq) == msg.sender, "log: not the current key"
    assert count != 0 and convert(count, uint256) <= MAX_BATCH, "log: count out of range"
    assert root != empty(bytes32), "log: empty root"
    terms: IParameters.BatchTerms = staticcall IParameters(parameters).batch_terms()
    # seq has no gaps: without the grace, receipts signed before the sunset would block all of the node's later batches.
    assert staticcall IModelRegistry(models).served_within(model_id, profile_version, terms.challenge_window), (
        "log: model is not servable"
    )

    node_cum += convert(total_fee, uint256)
    batch: objects.Batch = objects.Batch(
        id=batches._new_id(),
        node=node,
        model_id=model_id,
        profile_version=profile_version,
        root=root,
        first_seq=first_seq,
        count=count,
        total_fee=total_fee,
        node_cum=convert(node_cum, uint192),
        lock=self._lock_of(convert(total_fee, uint256), terms),
        audit_rate_ppm=convert(min(PPM, terms.audit_rate + audit_raise), uint32),
        parameters_version=convert(terms.revision, uint32),
        block_number=convert(block.number, uint64),
        committed_at=convert(block.timestamp, uint64),
        window_end=convert(block.timestamp + terms.challenge_window, uint64),
    )
    batches._store(batch)
    batches._set_node(node, next_seq + convert(count, uint256), audit_raise // 2, node_cum)
    extcall INodeRegistry(registry).lock(node, batch.lock)
    log BatchCommitted(batch_id=batch.id, node=node, batch=batch, locator=locator)
    return batch


@external
def finalize(batch_list: DynArray[objects.Batch, 32]):
    """
    @notice Make pending batches final whose window has passed with no open case, and free their stake locks. By anyone.
            Batches that are settled already are skipped, so that a race is no error.
    @param batch_list Up to 32 batches.
    """
    for batch: objects.Batch in batch_list:
        status: uint256 = batches._status_of(batch)
        assert status != batches.ABSENT, "log: no such batch"
        if status != batches.PENDING:
            continue
        assert block.timestamp >= self._window_end(batch), "log: window is still open"
        assert batches._open_cases(batch.id) == 0, "log: a case is open"
        batches._set_status(batch.id, batches.FINAL)
        extcall INodeRegistry(registry).unlock(batch.node, batch.lock)
        log BatchFinal(batch_id=batch.id, node=batch.node)


@external
def submit_beacon(header_rlp: Bytes[1024]) -> (uint256, bytes32):
    """
    @notice Prove a block's mixHash by its header. By anyone, within 8,191 blocks.
    @param header_rlp The block's RLP header.
    @return Its number and mixHash.
    """
    return beacon._submit(header_rlp)


@external
def open_case(batch: objects.Batch):
    """
    @notice By a judge: keep a pending batch from becoming final, inside its window.
    @param batch The batch.
    """
    assert self._may_judge(msg.sender, batch.committed_at), "log: caller is no judge of this batch"
    assert batches._status_of(batch) == batches.PENDING, "log: batch is not pending"
    assert self._in_window(batch), "log: window is over"
    batches._add_case(batch.id)
    self._held[msg.sender][batch.id] += 1
    log CaseOpened(batch_id=batch.id, judge=msg.sender, open_cases=batches._open_cases(batch.id))


@external
def close_case(batch: objects.Batch):
    """
    @notice Close a case that the caller opened, whatever became of the batch or of the caller's being a judge.
    @param batch The batch.
    """
    assert self._held[msg.sender][batch.id] != 0, "log: no open case"
    self._held[msg.sender][batch.id] -= 1
    batches._remove_case(batch.id)
    log CaseClosed(batch_id=batch.id, judge=msg.sender, open_cases=batches._open_cases(batch.id))


@external
def extend_window(batch: objects.Batch):
    """
    @notice By who holds a case of the batch, in which something came to light just now: it may be judged for one
            response_window from now on. Does nothing where the window lasts as long anyway, or the batch is settled.
    @param batch The batch.
    """
    assert self._held[msg.sender][batch.id] != 0, "log: no open case"
    if batches._status_of(batch) != batches.PENDING:
        return
    new_end: uint256 = block.timestamp + staticcall IParameters(parameters).value_at(
        parameter_names.RESPONSE_WINDOW, convert(batch.parameters_version, uint256)
    )
    old_end: uint256 = self._window_end(batch)
    if new_end > old_end:
        self._extended[batch.id] = new_end
        log WindowExtended(batch_id=batch.id, judge=msg.sender, old_end=old_end, new_end=new_end)


@external
def convict(
    batch: objects.Batch, beneficiary: address, reason: bytes32, evidence: bytes32
) -> (uint256, uint256):
    """
    @notice By a judge: void a pending batch and take its stake lock. Inside the window, or in a case that the judge
            opened inside it.
    @param batch The batch.
    @param beneficiary Who gets the reward.
    @param reason The fault's code.
    @param evidence What names the evidence, for the events.
    @return (what was taken from the node, what of it was credited to the beneficiary), in wei.
    """
    assert self._convictable(msg.sender, batch), "log: batch cannot be convicted"
    batches._set_status(batch.id, batches.CONVICTED)
    share: uint256 = staticcall IParameters(parameters).value_at(
        parameter_names.REWARD_SHARE, convert(batch.parameters_version, uint256)
    )
    extcall INodeRegistry(registry).unlock(batch.node, batch.lock)
    taken: uint256 = 0
    paid: uint256 = 0
    taken, paid = extcall INodeRegistry(registry).slash(
        batch.node, batch.lock, beneficiary, batch.lock * share // PPM, reason, evidence
    )
    log BatchConvicted(
        batch_id=batch.id,
        node=batch.node,
        judge=msg.sender,
        beneficiary=beneficiary,
        reason=reason,
        evidence=evidence,
        taken=taken,
        paid=paid,
    )
    return taken, paid


@external
def raise_audit_rate(node: address):
    """
    @notice By a judge: audit the node's next batches more often. Each batch halves the raise.
    @param node The node.
    """
    assert self._may_judge(msg.sender, convert(block.timestamp, uint64)), "log: caller is no judge"
    next_seq: uint256 = 0
    old_raise: uint256 = 0
    node_cum: uint256 = 0
    next_seq, old_raise, node_cum = batches._node(node)
    step: uint256 = staticcall IParameters(parameters).value(parameter_names.AUDIT_RATE_STEP)
    new_raise: uint256 = min(PPM, old_raise + step)
    batches._set_node(node, next_seq, new_raise, node_cum)
    log AuditRateRaised(node=node, old_raise=old_raise, new_raise=new_raise)


@external
def set_judge(judge: address, allowed: bool):
    """
    @notice By the owner: name or remove a judge. Before `seal` at once; later a new judge acts only on batches that are
            committed after 2 * unbonding_period: one covers the longest case of a batch that locks stake now (Parameters
            keeps it so), the other lets the stake leave. Removal counts at once.
    @param judge The judge contract.
    @param allowed Whether it shall be one.
    """
    ownable._check_owner()
    assert judge != empty(address), "log: zero address"
    old: uint64 = self.judge_active_from[judge]
    assert (old != 0) != allowed, "log: nothing to change"
    start: uint256 = 0
    if allowed:
        start = block.timestamp
        if self.sealed:
            start += 2 * staticcall IParameters(parameters).value(parameter_names.UNBONDING_PERIOD)
    self.judge_active_from[judge] = convert(start, uint64)
    log JudgeSet(judge=judge, old_active_from=old, new_active_from=convert(start, uint64))


@external
def seal():
    """
    @notice By the owner, once, when the deployment is wired: from now on new judges wait.
    """
    ownable._check_owner()
    assert not self.sealed, "log: sealed already"
    self.sealed = True
    log Sealed()


@external
@view
@reentrant
def next_seq(node: address) -> uint64:
    """
    @notice The seq that the node's next batch must start with. Reentrant: the registry reads it while a batch is being
            committed, when it is already the new one.
    """
    return convert(batches._node(node)[0], uint64)


@external
@view
def node_cum(node: address) -> uint256:
    """
    @notice The node's running total of fees after its last batch, in wei.
    """
    return batches._node(node)[2]


@external
@view
def next_audit_rate(node: address) -> uint256:
    """
    @notice The audit rate in ppm that the node's next batch would pin.
    """
    return min(PPM, staticcall IParameters(parameters).value(parameter_names.AUDIT_RATE) + batches._node(node)[1])


@external
@view
def batch_count() -> uint256:
    """
    @notice How many batches there are; their ids are 1 to this number.
    """
    return batches.batch_count


@external
@view
def status(batch_id: uint64) -> uint256:
    """
    @notice 0 none, 1 pending, 2 final, 3 convicted.
    """
    return batches._status(batch_id)


@external
@view
def status_of(batch: objects.Batch) -> uint256:
    """
    @notice The status of this very batch; 0 if the log holds another one under its id, or none.
    """
    return batches._status_of(batch)


@external
@view
def matches(batch: objects.Batch) -> bool:
    """
    @notice Whether the log holds this very batch.
    """
    return batches._status_of(batch) != batches.ABSENT


@external
@view
def open_cases(batch_id: uint64) -> uint256:
    """
    @notice How many cases keep the batch from becoming final.
    """
    return batches._open_cases(batch_id)


@external
@view
def window_end_of(batch: objects.Batch) -> uint256:
    """
    @notice The end of the batch's window: its window_end, or later where a late answer extended it.
    """
    return self._window_end(batch)


@external
@view
def beacon_of(batch: objects.Batch) -> bytes32:
    """
    @notice The batch's beacon, or zero while nobody has submitted it. `beacon.vy` tells which blocks count.
    """
    return self._beacon_of(batch)


@external
@view
def selected(batch: objects.Batch, draw: uint256) -> uint256:
    """
    @notice The index that one draw of the batch's audit selects: keccak(beacon || batch id || draw) mod count.
    @param batch The batch.
    @param draw Which draw, less than ceil(rate * count).
    """
    found: bytes32 = self._beacon_of(batch)
    assert found != empty(bytes32), "log: beacon is not known"
    assert draw < self._draws(batch), "log: no such draw"
    return self._drawn(found, batch, draw)


@external
@view
def is_selected(batch: objects.Batch, index: uint256) -> bool:
    """
    @notice Whether any draw selects `index`. Tries them all, up to 65536: for calls, not for transactions.
    """
    found: bytes32 = self._beacon_of(batch)
    if found == empty(bytes32):
        return False
    for draw: uint256 in range(self._draws(batch), bound=MAX_BATCH):
        if self._drawn(found, batch, draw) == index:
            return True
    return False


@external
@view
def may_judge(judge: address, committed_at: uint64) -> bool:
    """
    @notice Whether `judge` may act on a batch committed at that time.
    """
    return self._may_judge(judge, committed_at)


@external
@view
def convictable(judge: address, batch: objects.Batch) -> bool:
    """
    @notice Whether a conviction of the batch by `judge` would be let through now.
    """
    return self._convictable(judge, batch)


@internal
@view
def _may_judge(judge: address, committed_at: uint64) -> bool:
    start: uint64 = self.judge_active_from[judge]
    return start != 0 and start <= committed_at


@internal
@view
def _convictable(judge: address, batch: objects.Batch) -> bool:
    if batches._status_of(batch) != batches.PENDING or not self._may_judge(judge, batch.committed_at):
        return False
    return self._in_window(batch) or self._held[judge][batch.id] != 0


@internal
@view
def _in_window(batch: objects.Batch) -> bool:
    return block.timestamp < convert(batch.window_end, uint256) or block.timestamp < self._extended[batch.id]


@internal
@view
def _window_end(batch: objects.Batch) -> uint256:
    return max(convert(batch.window_end, uint256), self._extended[batch.id])


@internal
@pure
def _lock_of(total_fee: uint256, terms: IParameters.BatchTerms) -> uint256:
    """
    @dev Value at risk. total_fee < 2**192 and 10**18 < 2**60: the product fits. The divisor, audit_rate * detection_power
         * (PPM - reward_share), is at least 10**4 * 10**5 * 5 * 10**5 by the parameters' bounds.
    """
    divisor: uint256 = terms.eased_divisor
    return max(terms.eased_lock, (total_fee * 10**18 + divisor - 1) // divisor)


@internal
@view
def _beacon_of(batch: objects.Batch) -> bytes32:
    delay: uint256 = staticcall IParameters(parameters).value_at(
        parameter_names.BEACON_DELAY, convert(batch.parameters_version, uint256)
    )
    return beacon._of_target(convert(batch.block_number, uint256) + delay)


@internal
@pure
def _draws(batch: objects.Batch) -> uint256:
    """
    @dev ceil(rate * count).
    """
    return (convert(batch.count, uint256) * convert(batch.audit_rate_ppm, uint256) + PPM - 1) // PPM


@internal
@pure
def _drawn(found: bytes32, batch: objects.Batch, draw: uint256) -> uint256:
    return convert(keccak256(abi_encode(found, convert(batch.id, uint256), draw)), uint256) % convert(
        batch.count, uint256
    )

