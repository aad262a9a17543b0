# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Accusations: a false computation is claimed, may be contested, and convicts its batch if the claim stands
@custom:contract-name Accusations
@license AGPL-3.0-only
@notice `commit` a hash inside the batch's window, reveal the claim with `accuse`, let it be contested, `resolve`. Points
        that pass the profile's thresholds are taken for true unless one contest (contracts/disputes/Contests.vy) shows
        that a logit or the trace behind them is false. One lost contest costs its contester its bond and nothing else;
        one won contest ends the accusation. Accusations of one batch do not touch each other, but for their order: the
        first committed one that stands is the one that convicts and is rewarded.
@custom:security
        - Nobody can shield a node: any number of accusations stand side by side, and a lost one ends no other.
        - What convicts is read from authentic evidence by the scoring contract. Here are order, time and money.
        - Bonds are counted inside (`total_held`) and credited, never pushed. In = held + claimed + burned, always;
          what is forfeited is held until `burn`.
        - Numbers are those of the batch's revision. The batch and an accusation's terms are passed again and checked.
        - State is changed before the log or the token is called, except that a bond comes in first. Neither calls back.
        - Who accuses and contests himself loses half of what he put in.
@custom:kill The log's owner removes this judge with `set_judge`: no new accusations and no more convictions. Open ones
        run on to their end, which then only returns bonds and frees the batches. Claims never stop.
"""

from ..governance import parameter_names
from ..interfaces import IAccusations
from ..interfaces import ICommitmentLog
from ..interfaces import IModelRegistry
from ..interfaces import INodeRegistry
from ..interfaces import IParameters
from ..interfaces import IPoipToken
from ..interfaces import IReferee
from ..interfaces import IScoring
from ..interfaces import ITraceMap
from . import faults
from . import objects

implements: IAccusations

COMMITTED: constant(uint256) = 1
ACCUSED: constant(uint256) = 2
EXPIRED: constant(uint256) = 3
LOST: constant(uint256) = 4
STOOD: constant(uint256) = 5

# An accusation's word from the lowest bit: accuser 160, status 4, whether the node has had its free contest 1, contests
# with a bond that were lost 30, contests made 31, contests open 30. Until the reveal the time of commitment stands where
# contests are counted. No block has room for 2**30 contests.
STATUS_AT: constant(uint256) = 160
FREE_AT: constant(uint256) = 164
LOST_AT: constant(uint256) = 165
MADE_AT: constant(uint256) = 195
OPEN_AT: constant(uint256) = 226
MASK_30: constant(uint256) = 2**30 - 1

# Numbers of a batch's accusations: a bit is set while one is open. Above the bits of the first word: how many there were
# (32 bits) and how many are open (32 bits).
FLAGS: constant(uint256) = 192
FLAGS_MASK: constant(uint256) = 2**192 - 1
ONE_MADE: constant(uint256) = 2**192
ONE_OPEN: constant(uint256) = 2**224


struct Info:
    accuser: address
    status: uint256
    committed_at: uint256
    contests: uint256
    open_contests: uint256
    lost_contests: uint256
    free_contest_used: bool
    digest: bytes32


token: public(immutable(address))
commitment_log: public(immutable(address))
registry: public(immutable(address))
models: public(immutable(address))
parameters: public(immutable(address))
scoring: public(immutable(address))
trace_map: public(immutable(address))
deployer: immutable(address)

# The only one that opens and closes contests.
contests: public(address)
# From the lowest bit: bonds of what is open, credits that are not claimed yet and what is to be burned, 128 bits; what is
# to be burned, 128 bits.
_held: uint256
credits: public(HashMap[address, uint256])
_words: HashMap[uint256, uint256]
# Until the reveal keccak(commitment || batch hash), then the hash of the terms.
_digests: HashMap[uint256, bytes32]
_order: HashMap[uint256, HashMap[uint256, uint256]]


event Committed:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    accuser: indexed(address)
    commitment: bytes32
    bond: uint256


event Accused:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    accuser: indexed(address)
    index: uint256
    terms: IAccusations.Terms
    margins: DynArray[IScoring.Point, 64]
    fingerprints: DynArray[IScoring.Point, 64]


# status: 3 not revealed in time, 4 a contest was won, 5 it stood (convicted: by this very call).
event Ended:
    id: indexed(uint256)
    batch_id: indexed(uint64)
    status: uint256
    convicted: bool


event Credited:
    account: indexed(address)
    amount: uint256
    credit: uint256


# What `burn` will destroy.
event Forfeited:
    id: indexed(uint256)
    amount: uint256


event Burned:
    amount: uint256


event Claimed:
    account: indexed(address)
    amount: uint256


event Initialized:
    contests: address


@deploy
def __init__(
    token_: address,
    log_: address,
    registry_: address,
    models_: address,
    parameters_: address,
    scoring_: address,
    trace_map_: address,
):
    """
    @notice Has no owner and no settings; the deployer names the contract of contests once.
    @param token_ The network's token, in which bonds are paid.
    @param log_ The commitment log.
    @param registry_ The node registry.
    @param models_ The model registry.
    @param parameters_ The protocol's parameters.
    @param scoring_ What checks and scores a claim.
    @param trace_map_ What counts a trace's leaves.
    """
    for part: address in [token_, log_, registry_, models_, parameters_, scoring_, trace_map_]:
        assert part.is_contract, "court: not a contract"
    token = token_
    commitment_log = log_
    registry = registry_
    models = models_
    parameters = parameters_
    scoring = scoring_
    trace_map = trace_map_
    deployer = msg.sender


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def initialize(contests_: address):
    """
    @notice By the deployer, once: name the contract of contests. Nothing can be committed before.
    """
    assert msg.sender == deployer, "court: not the deployer"
    assert self.contests == empty(address), "court: initialized already"
    assert contests_.is_contract, "court: not a contract"
    self.contests = contests_
    log Initialized(contests=contests_)


@external
def commit(batch: objects.Batch, commitment: bytes32) -> uint256:
    """
    @notice Commit to an accusation of a pending batch, inside its window. Takes the bond from the sender.
    @param batch The batch.
    @param commitment keccak(claim hash || salt || sender): see `claim_hash`.
    @return The accusation's id: batch id * 2**32 + its number in the order of commitment.
    """
    assert self.contests != empty(address), "court: not initialized"
    first: uint256 = self._order[convert(batch.id, uint256)][0]
    number: uint256 = (first >> 192) & (2**32 - 1)
    assert number < 2**32 - 1, "court: too many accusations"
    id: uint256 = (convert(batch.id, uint256) << 32) | number
    bond: uint256 = self._value(batch, parameter_names.ACCUSATION_BOND)
    self._take(msg.sender, bond)
    if number < FLAGS:
        first = first | (1 << number)
    else:
        self._order[convert(batch.id, uint256)][number // FLAGS] |= 1 << (number % FLAGS)
    self._order[convert(batch.id, uint256)][0] = first + ONE_MADE + ONE_OPEN
    self._words[id] = convert(msg.sender, uint256) | (COMMITTED << STATUS_AT) | (block.timestamp << LOST_AT)
    self._digests[id] = keccak256(concat(commitment, objects._batch_hash(batch)))
    log Committed(id=id, batch_id=batch.id, accuser=msg.sender, commitment=commitment, bond=bond)
    # One case of the log stands for all open accusations of a batch: their number is not limited by the log's.
    if first < ONE_OPEN:
        extcall ICommitmentLog(commitment_log).open_case(batch)
    else:
        window_end: uint256 = staticcall ICommitmentLog(commitment_log).window_end_of(batch)
        assert block.timestamp < window_end, "court: window is over"
        assert staticcall ICommitmentLog(commitment_log).convictable(self, batch), "court: batch cannot be convicted"
    return id


@external
def accuse(
    id: uint256,
    batch: objects.Batch,
    config: IModelRegistry.ModelConfig,
    claim: IScoring.Claim,
    salt: bytes32,
):
    """
    @notice Reveal a committed accusation within reveal_window. Reverts unless the claim is authentic and convicts.
    @param id The accusation.
    @param batch Its batch.
    @param config The dimensions of the batch's model.
    @param claim Receipt, request, the root of the canonical trace, and points of it.
    @param salt What the commitment was made with.
    """
    word: uint256 = self._words[id]
    assert (word >> STATUS_AT) & 15 == COMMITTED, "court: not a committed accusation"
    assert block.timestamp <= (word >> LOST_AT) + self._value(batch, parameter_names.REVEAL_WINDOW), "court: too late"
    accuser: address = convert(word & (2**160 - 1), address)
    points_hash: bytes32 = keccak256(abi_encode(claim.margins, claim.fingerprints))
    claim_hash: bytes32 = self._claim_hash(convert(claim.index, uint256), claim.trace_root, points_hash)
    commitment: bytes32 = keccak256(concat(claim_hash, salt, convert(accuser, bytes20)))
    assert self._digests[id] == keccak256(concat(commitment, objects._batch_hash(batch))), "court: not what was committed"
    scored: IScoring.Scored = staticcall IScoring(scoring).score(batch, claim)
    assert scored.convicts, "court: the points do not convict"
    config_hash: bytes32 = staticcall IModelRegistry(models).config_hash(scored.model_id)
    assert keccak256(abi_encode(config)) == config_hash, "court: not the model's dimensions"

    prompt_tokens: uint256 = convert(scored.prompt_tokens, uint256)
    output_tokens: uint256 = convert(scored.output_tokens, uint256)
    terms: IAccusations.Terms = IAccusations.Terms(
        node=batch.node,
        trace=IReferee.Trace(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            trace_root=claim.trace_root,
            weights_root=scored.weights_root,
            prompt_root=scored.prompt_root,
            output_root=scored.output_root,
        ),
        config=config,
        leaf_count=staticcall ITraceMap(trace_map).leaf_count(config, prompt_tokens, output_tokens),
        points=len(claim.margins) + len(claim.fingerprints),
        points_hash=points_hash,
        accusation_bond=self._value(batch, parameter_names.ACCUSATION_BOND),
        contest_bond=self._value(batch, parameter_names.CONTEST_BOND),
        clock=self._value(batch, parameter_names.DISPUTE_CLOCK),
        contest_end=block.timestamp + self._value(batch, parameter_names.CONTEST_WINDOW),
    )
    self._digests[id] = keccak256(abi_encode(terms))
    self._words[id] = convert(accuser, uint256) | (ACCUSED << STATUS_AT)
    log Accused(
        id=id,
        batch_id=batch.id,
        accuser=accuser,
        index=convert(claim.index, uint256),
        terms=terms,
        margins=claim.margins,
        fingerprints=claim.fingerprints,
    )


@external
def expire(id: uint256, batch: objects.Batch):
    """
    @notice End an accusation that was not revealed in time. By anyone. Its bond is burned.
    """
    word: uint256 = self._words[id]
    assert (word >> STATUS_AT) & 15 == COMMITTED, "court: not a committed accusation"
    assert convert(batch.id, uint256) == id >> 32, "court: not the accusation's batch"
    assert staticcall ICommitmentLog(commitment_log).matches(batch), "court: no such batch"
    assert block.timestamp > (word >> LOST_AT) + self._value(batch, parameter_names.REVEAL_WINDOW), (
        "court: it may still be revealed"
    )
    self._end(id, word & (2**160 - 1), EXPIRED, False)
    self._forfeit(id, self._value(batch, parameter_names.ACCUSATION_BOND))


@external
def resolve(id: uint256, terms: IAccusations.Terms, batch: objects.Batch) -> bool:
    """
    @notice End an accusation that stood: its contest window is over, no contest is open, and all accusations of the batch
            that were committed earlier are over. By anyone. The bond goes back to the accuser, who is the beneficiary of
            the conviction unless the batch was convicted before.
    @param id The accusation.
    @param terms Its terms.
    @param batch Its batch.
    @return Whether the batch was convicted by this call.
    """
    word: uint256 = self._words[id]
    assert (word >> STATUS_AT) & 15 == ACCUSED, "court: not an open accusation"
    self._check_terms(id, terms)
    assert convert(batch.id, uint256) == id >> 32, "court: not the accusation's batch"
    assert staticcall ICommitmentLog(commitment_log).matches(batch), "court: no such batch"
    assert block.timestamp > terms.contest_end, "court: it may still be contested"
    assert word >> OPEN_AT == 0, "court: a contest is open"
    self._check_first(id)
    self._credit(convert(word & (2**160 - 1), address), terms.accusation_bond + self._won_bonds(id, word, terms))
    convicted: bool = staticcall ICommitmentLog(commitment_log).convictable(self, batch)
    if convicted:
        extcall ICommitmentLog(commitment_log).convict(
            batch, convert(word & (2**160 - 1), address), convert(faults.COMPUTATION, bytes32), convert(id, bytes32)
        )
    self._end(id, word, STOOD, convicted)
    return convicted


@external
def claim() -> uint256:
    """
    @notice Pay the sender's credit.
    @return What was paid, in wei.
    """
    amount: uint256 = self.credits[msg.sender]
    assert amount != 0, "court: nothing to claim"
    self.credits[msg.sender] = 0
    self._held -= amount
    log Claimed(account=msg.sender, amount=amount)
    assert extcall IPoipToken(token).transfer(msg.sender, amount), "court: transfer failed"
    return amount


@external
def burn() -> uint256:
    """
    @notice Destroy what was forfeited until now. By anyone.
    @return How much, in wei.
    """
    amount: uint256 = self._held >> 128
    assert amount != 0, "court: nothing to burn"
    self._held -= (amount << 128) | amount
    log Burned(amount=amount)
    extcall IPoipToken(token).burn(amount)
    return amount


@external
def open_contest(id: uint256, terms: IAccusations.Terms, contester: address, free: bool) -> uint256:
    """
    @notice By the contests only: a contest of a revealed accusation, inside its contest window. Takes the bond from the
            contester; the node, by its operator or current key, contests once without.
    @return How many contests of this accusation there were before.
    """
    assert msg.sender == self.contests, "court: not the contests"
    word: uint256 = self._words[id]
    assert (word >> STATUS_AT) & 15 == ACCUSED, "court: not an open accusation"
    self._check_terms(id, terms)
    assert block.timestamp <= terms.contest_end, "court: contest window is over"
    number: uint256 = (word >> MADE_AT) & (2**31 - 1)
    assert number < MASK_30, "court: too many contests"
    if free:
        assert (word >> FREE_AT) & 1 == 0, "court: the node has had its free contest"
        known: bool = contester == staticcall INodeRegistry(registry).operator_of(terms.node)
        if not known:
            known = contester == staticcall INodeRegistry(registry).committer(terms.node)
        assert known, "court: sender is neither operator nor key of the node"
        word = word | (1 << FREE_AT)
    self._words[id] = word + (1 << MADE_AT) + (1 << OPEN_AT)
    if not free:
        self._take(contester, terms.contest_bond)
    return number


@external
def close_contest(id: uint256, terms: IAccusations.Terms, contester: address, free: bool, won: bool):
    """
    @notice By the contests only: a contest has ended. Won: half of the accusation's bond to the contester, the rest is
            forfeited, and the accusation is over. Lost: half of the contest's bond is the accuser's when the accusation
            ends, and the rest forfeited. If the accusation was over before, the contest's bond goes back.
    """
    assert msg.sender == self.contests, "court: not the contests"
    self._check_terms(id, terms)
    word: uint256 = self._words[id] - (1 << OPEN_AT)
    bond: uint256 = terms.contest_bond
    if free:
        bond = 0
    if (word >> STATUS_AT) & 15 != ACCUSED:
        self._words[id] = word
        if not free:
            self._credit(contester, bond)
    elif won:
        share: uint256 = terms.accusation_bond // 2
        self._credit(contester, bond + share)
        self._forfeit(id, terms.accusation_bond - share)
        earned: uint256 = self._won_bonds(id, word, terms)
        if earned != 0:
            self._credit(convert(word & (2**160 - 1), address), earned)
        self._end(id, word, LOST, False)
    elif free:
        self._words[id] = word
    else:
        self._words[id] = word + (1 << LOST_AT)


@external
@pure
def claim_hash(index: uint256, trace_root: bytes32, points_hash: bytes32) -> bytes32:
    """
    @notice What an accuser commits to: all in a claim that is his to choose.
    @param index The receipt's place in the batch.
    @param trace_root Root of the canonical trace.
    @param points_hash keccak(abi.encode(margins, fingerprints)).
    """
    return self._claim_hash(index, trace_root, points_hash)


@external
@view
def total_held() -> uint256:
    """
    @notice Bonds of what is open, credits that are not claimed yet and what is to be burned, in wei.
    """
    return self._held & (2**128 - 1)


@external
@view
def to_burn() -> uint256:
    """
    @notice What `burn` would destroy, in wei.
    """
    return self._held >> 128


@external
@view
def terms_hash(id: uint256) -> bytes32:
    """
    @notice The hash of a revealed accusation's terms, over or not.
    """
    status: uint256 = (self._words[id] >> STATUS_AT) & 15
    assert status != 0 and status != COMMITTED and status != EXPIRED, "court: not a revealed accusation"
    return self._digests[id]


@external
@view
def is_over(id: uint256) -> bool:
    """
    @notice Whether an accusation has ended.
    """
    return (self._words[id] >> STATUS_AT) & 15 >= EXPIRED


@external
@view
def accuser_of(id: uint256) -> address:
    """
    @notice Who committed to an accusation; zero for an unknown one.
    """
    return convert(self._words[id] & (2**160 - 1), address)


@external
@view
def accusation_count(batch_id: uint64) -> uint256:
    """
    @notice How many accusations of a batch were committed; their ids are batch id * 2**32 + 0 to this number less one.
    """
    return (self._order[convert(batch_id, uint256)][0] >> 192) & (2**32 - 1)


@external
@view
def accusation_info(id: uint256) -> Info:
    """
    @notice An accusation: status 1 committed, 2 revealed, 3 expired, 4 lost, 5 stood; `committed_at` until the reveal;
            `digest` of commitment and batch, from the reveal on of the terms.
    """
    word: uint256 = self._words[id]
    info: Info = empty(Info)
    info.accuser = convert(word & (2**160 - 1), address)
    info.status = (word >> STATUS_AT) & 15
    info.digest = self._digests[id]
    if info.status == COMMITTED:
        info.committed_at = word >> LOST_AT
    else:
        info.contests = (word >> MADE_AT) & (2**31 - 1)
        info.open_contests = word >> OPEN_AT
        info.lost_contests = (word >> LOST_AT) & MASK_30
        info.free_contest_used = (word >> FREE_AT) & 1 == 1
    return info


@internal
@view
def _value(batch: objects.Batch, name: bytes32) -> uint256:
    return staticcall IParameters(parameters).value_at(name, convert(batch.parameters_version, uint256))


@internal
@pure
def _claim_hash(index: uint256, trace_root: bytes32, points_hash: bytes32) -> bytes32:
    return keccak256(abi_encode(index, trace_root, points_hash))


@internal
@view
def _check_terms(id: uint256, terms: IAccusations.Terms):
    assert self._digests[id] == keccak256(abi_encode(terms)), "court: not the accusation's terms"


@internal
@view
def _check_first(id: uint256):
    """
    @dev All accusations of the batch with a lower number are over.
    """
    number: uint256 = id & (2**32 - 1)
    for i: uint256 in range(number // FLAGS, bound=2**25):
        assert self._order[id >> 32][i] & FLAGS_MASK == 0, "court: an earlier accusation is open"
    earlier: uint256 = (1 << (number % FLAGS)) - 1
    assert self._order[id >> 32][number // FLAGS] & earlier == 0, "court: an earlier accusation is open"


@internal
def _end(id: uint256, word: uint256, status: uint256, convicted: bool):
    """
    @dev Ends an open accusation: frees its place in the order, and the batch after the last.
    """
    self._words[id] = (word & ~(15 << STATUS_AT)) | (status << STATUS_AT)
    number: uint256 = id & (2**32 - 1)
    if number >= FLAGS:
        self._order[id >> 32][number // FLAGS] ^= 1 << (number % FLAGS)
    first: uint256 = self._order[id >> 32][0] - ONE_OPEN
    if number < FLAGS:
        first ^= 1 << number
    self._order[id >> 32][0] = first
    batch_id: uint64 = convert(id >> 32, uint64)
    log Ended(id=id, batch_id=batch_id, status=status, convicted=convicted)
    if first < ONE_OPEN:
        # The log closes a case by the batch's id alone.
        batch: objects.Batch = empty(objects.Batch)
        batch.id = batch_id
        extcall ICommitmentLog(commitment_log).close_case(batch)


@internal
def _won_bonds(id: uint256, word: uint256, terms: IAccusations.Terms) -> uint256:
    """
    @dev The accuser's part of the bonds of contests that were lost; the rest is forfeited.
    """
    lost: uint256 = (word >> LOST_AT) & MASK_30
    if lost == 0:
        return 0
    part: uint256 = terms.contest_bond // 2
    self._forfeit(id, lost * (terms.contest_bond - part))
    return lost * part


@internal
def _take(payer: address, bond: uint256):
    self._held += bond
    assert extcall IPoipToken(token).transferFrom(payer, self, bond), "court: transfer failed"


@internal
def _credit(account: address, amount: uint256):
    credit: uint256 = self.credits[account] + amount
    self.credits[account] = credit
    log Credited(account=account, amount=amount, credit=credit)


@internal
def _forfeit(id: uint256, amount: uint256):
    self._held += amount << 128
    log Forfeited(id=id, amount=amount)
