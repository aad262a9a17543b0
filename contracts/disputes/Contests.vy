# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Contests: what an accusation says of a trace is tested, down to one step of arithmetic
@custom:contract-name Contests
@license AGPL-3.0-only
@notice A point contest asks for the logits of one point, proven into the accuser's trace. A trace contest descends that
        trace: who answers for the accuser shows the nodes six levels below (`reveal`, at the end the leaves:
        `reveal_leaves`), the contester names the first that differs from its own (`pick`) and at a leaf the first cell.
        A linear or attention cell is opened into its own tree (`open_cell`) and descended the same way. The cell that is
        left is recomputed by the referee (`step`, `finish`): if the accuser's value is right the contest is lost,
        otherwise the accusation is. Contests run side by side; what was shown for one is shown for all.
@custom:security
        - Whoever contests states no position and no value: places are derived, leaves are proven, arithmetic is done.
        - A move that is malformed, out of turn or too late reverts and changes no clock. A step that cannot be computed
          is such a move.
        - Chess clocks: each side has terms.clock in all, counted from what is stored, so nothing must be called in time
          but the moves. Any reveal that hashes right is right, whoever brings it; a cell's tree, which hashes to nothing yet, only the
          accuser's, who names cell and terms. Only the contester moves for itself.
        - No money here: Accusations takes and gives it, and tolerates every end of a contest.
        - Calls go to Accusations, whose calls do not come back, and to views.
@custom:kill None of its own: without new accusations there are no new contests. Open ones always end by `settle`.
"""

from ..commitments import merkle
from ..interfaces import IAccusations
from ..interfaces import IReferee
from ..interfaces import IScoring
from ..interfaces import ITraceMap
from . import descent
from . import openings
from . import trace_layout

# A contest's id is its accusation's * 2**32 + its number. Its word from the lowest bit: index 32 and level 8 of the node at
# which it stands, 1 + 32 * leaf + element of the cell whose own tree that is in 40 (0: the trace), leaves of the tree 40,
# when it came to stand there 40, what accuser and contester have left 24 each. A point stands at level 255.
LEVEL_AT: constant(uint256) = 32
CELL_AT: constant(uint256) = 40
COUNT_AT: constant(uint256) = 80
SINCE_AT: constant(uint256) = 120
ACCUSER_AT: constant(uint256) = 160
CONTESTER_AT: constant(uint256) = 184
MASK_24: constant(uint256) = 2**24 - 1
MASK_32: constant(uint256) = 2**32 - 1
MASK_40: constant(uint256) = 2**40 - 1
# Of the node alone, and of its tree.
NODE_MASK: constant(uint256) = 2**80 - 1
TREE_MASK: constant(uint256) = 2**80 - 2**40
CLOCKS_MASK: constant(uint256) = 2**208 - 2**120
POINT: constant(uint256) = 255
# Who contests: the contester's address and, above it, whether it is the node's free contest.
FREE_AT: constant(uint256) = 160

# What was shown: when, in the lowest 40 bits; at a root of a cell's tree also the highest 216 bits of its hash.
HASH_MASK: constant(uint256) = max_value(uint256) - MASK_40

LEAF_BYTES: constant(uint256) = 128


struct Info:
    contester: address
    free: bool
    since: uint256
    accuser_left: uint256
    contester_left: uint256
    level: uint256
    index: uint256
    cell: uint256
    leaf_count: uint256
    node: bytes32
    revealed_at: uint256


accusations: public(immutable(address))
referee: public(immutable(address))
trace_map: public(immutable(address))

_contesters: HashMap[uint256, uint256]
_places: HashMap[uint256, uint256]
# The node at which a contest stands. Inside a cell's tree: the leaf of the trace that holds the cell.
_nodes: HashMap[uint256, bytes32]
# Inside a cell's tree, below its root.
_sub_nodes: HashMap[uint256, bytes32]
# By node, see `_key`.
_shown: HashMap[uint256, uint256]


event ContestOpened:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    contester: indexed(address)
    free: bool
    level: uint256
    index: uint256


event PointShown:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    number: uint256


event Revealed:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    cell: uint256
    level: uint256
    index: uint256
    nodes: DynArray[bytes32, 64]


event LeavesRevealed:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    cell: uint256
    level: uint256
    index: uint256
    leaves: Bytes[8192]


event Picked:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    cell: uint256
    level: uint256
    index: uint256


# outcome: 1 the contester won, 2 it lost, 3 the accusation was over. by: 1 a step, 2 time, 3 a proven point, 4 nothing.
event ContestEnded:
    contest: indexed(uint256)
    accusation: indexed(uint256)
    contester: indexed(address)
    outcome: uint256
    by: uint256


@deploy
def __init__(accusations_: address, referee_: address, trace_map_: address):
    """
    @notice Bind the contests to the accusations that they are about and to the referee.
    """
    for part: address in [accusations_, referee_, trace_map_]:
        assert part.is_contract, "court: not a contract"
    accusations = accusations_
    referee = referee_
    trace_map = trace_map_


@external
@pure
def version() -> String[16]:
    """
    @notice The version of this contract's code.
    """
    return "0.1.0"


@external
def contest_trace(accusation: uint256, terms: IAccusations.Terms, free: bool) -> uint256:
    """
    @notice Contest the trace of an accusation. Accusations takes the bond from the sender, unless it is the node's free one.
    @param accusation A revealed accusation inside its contest window.
    @param terms Its terms.
    @param free By operator or current key of the node, once.
    @return The contest's id.
    """
    level: uint256 = descent._height(terms.leaf_count)
    id: uint256 = self._open(accusation, terms, free, (terms.leaf_count << COUNT_AT) | (level << LEVEL_AT))
    self._nodes[id] = terms.trace.trace_root
    return id


@external
def contest_point(accusation: uint256, terms: IAccusations.Terms, free: bool, number: uint256) -> uint256:
    """
    @notice Contest that the logits of one point stand in the trace.
    @param accusation A revealed accusation inside its contest window.
    @param terms Its terms.
    @param free By operator or current key of the node, once.
    @param number The point's, margins before fingerprints. A point that was proven is not contested again.
    @return The contest's id.
    """
    assert number < terms.points, "court: no such point"
    id: uint256 = self._open(accusation, terms, free, (POINT << LEVEL_AT) | number)
    assert self._shown[self._key(id, self._places[id])] == 0, "court: the point was proven"
    return id


@external
def show_point(
    id: uint256,
    terms: IAccusations.Terms,
    margins: DynArray[IScoring.Point, 64],
    fingerprints: DynArray[IScoring.Point, 64],
    ids: Bytes[128],
    ids_proof: DynArray[bytes32, 32],
    leaves: Bytes[256],
    proof: DynArray[bytes32, 160],
):
    """
    @notice Prove a contested point: the logits of its token and of the claimed one are those stated. Ends the contest, and
            every other one over this point. By anyone.
    @param id The contest.
    @param terms The accusation's terms.
    @param margins All margin points.
    @param fingerprints All fingerprint points.
    @param ids The leaf of output ids that holds the claimed token.
    @param ids_proof Its Merkle proof in the transcript's output.
    @param leaves The one or two leaves of logits, in order.
    @param proof Their Merkle multi-proof in the trace.
    """
    place: uint256 = self._places[id]
    assert place != 0, "court: no such contest"
    assert (place >> LEVEL_AT) & 255 == POINT, "court: not a point contest"
    self._check_terms(id, terms)
    self._show(id, place, empty(bytes32), empty(bytes32))
    assert keccak256(abi_encode(margins, fingerprints)) == terms.points_hash, "court: not the accusation's points"
    number: uint256 = place & MASK_32
    point: IScoring.Point = empty(IScoring.Point)
    if number < len(margins):
        point = margins[number]
    else:
        point = fingerprints[number - len(margins)]

    position: uint256 = convert(point.position, uint256)
    outputs: uint256 = terms.trace.output_tokens
    assert len(ids) == 4 * min(32, outputs - (position & ~31)), "court: ids are of the wrong length"
    assert terms.trace.output_root == merkle._root_of_one(
        merkle._leaf(ids), position >> 5, (outputs + 31) >> 5, ids_proof
    ), "court: ids of another transcript"
    claimed: uint256 = self._id(ids, position & 31)
    token: uint256 = convert(point.token, uint256)
    indices: DynArray[uint256, 32] = [self._logit(terms, position, min(claimed, token))]
    other: uint256 = self._logit(terms, position, max(claimed, token))
    if other != indices[0]:
        indices.append(other)
    assert len(leaves) == LEAF_BYTES * len(indices), "court: leaves are of the wrong length"
    root: bytes32 = empty(bytes32)
    used: uint256 = 0
    root, used = openings._root(openings._hashes(leaves, 0, len(indices)), indices, terms.leaf_count, proof, 0)
    assert used == len(proof) and root == terms.trace.trace_root, "court: leaves of another trace"
    # Both leaves, or the one twice: the lower token's first.
    high: Bytes[128] = slice(leaves, len(leaves) - LEAF_BYTES, LEAF_BYTES)
    low: Bytes[128] = slice(leaves, 0, LEAF_BYTES)
    if token < claimed:
        assert self._is_logit(low, token, point.logit), "court: the logit is another"
        assert self._is_logit(high, claimed, point.claimed_logit), "court: the claimed logit is another"
    else:
        assert self._is_logit(high, token, point.logit), "court: the logit is another"
        assert self._is_logit(low, claimed, point.claimed_logit), "court: the claimed logit is another"
    log PointShown(contest=id, accusation=id >> 32, number=number)
    self._end(id, terms, 2, 3)


@external
def reveal(id: uint256, asked: bytes32, nodes: DynArray[bytes32, 64]):
    """
    @notice Show the nodes six levels below the one at which a contest stands. By anyone; in the accuser's time.
    @param id A contest that stands more than six levels above the leaves.
    @param asked At the root of a cell's tree keccak(hash of the terms || cell), for nothing else says which tree this is;
           not looked at elsewhere.
    @param nodes 64 of them, fewer only where the level ends.
    """
    place: uint256 = self._places[id]
    level: uint256 = (place >> LEVEL_AT) & 255
    assert level != POINT and level > descent.LEVELS, "court: the leaves are due here"
    count: uint256 = (place >> COUNT_AT) & MASK_40
    assert len(nodes) == descent._many(count, level, place & MASK_32), "court: wrong number of nodes"
    self._show(id, place, asked, openings._root_of_nodes(nodes))
    log Revealed(
        contest=id,
        accusation=id >> 32,
        cell=(place >> CELL_AT) & MASK_40,
        level=level,
        index=place & MASK_32,
        nodes=nodes,
    )


@external
def reveal_leaves(id: uint256, asked: bytes32, leaves: Bytes[8192]):
    """
    @notice Show the leaves below the node at which a contest stands. By anyone; in the accuser's time.
    @param id A contest that stands at most six levels above the leaves.
    @param asked As in `reveal`.
    @param leaves 128 bytes each.
    """
    place: uint256 = self._places[id]
    level: uint256 = (place >> LEVEL_AT) & 255
    assert place != 0 and level <= descent.LEVELS, "court: no leaves are due here"
    many: uint256 = descent._many((place >> COUNT_AT) & MASK_40, level, place & MASK_32)
    assert len(leaves) == LEAF_BYTES * many, "court: wrong number of leaves"
    nodes: DynArray[bytes32, 64] = []
    for i: uint256 in range(many, bound=64):
        nodes.append(keccak256(concat(0x00, slice(leaves, LEAF_BYTES * i, LEAF_BYTES))))
    self._show(id, place, asked, openings._root_of_nodes(nodes))
    log LeavesRevealed(
        contest=id,
        accusation=id >> 32,
        cell=(place >> CELL_AT) & MASK_40,
        level=level,
        index=place & MASK_32,
        leaves=leaves,
    )


@external
def pick(id: uint256, index: uint256, node: bytes32, path: DynArray[bytes32, 6]):
    """
    @notice By the contester: the first of the shown nodes that differs from its own. The contest stands there next.
    @param id A contest that stands more than six levels above the leaves, and whose node was shown.
    @param index The node's number in its level of the tree.
    @param node What was shown there.
    @param path Its siblings, from below upwards, among what was shown.
    """
    place: uint256 = self._places[id]
    level: uint256 = (place >> LEVEL_AT) & 255
    assert level != POINT and level > descent.LEVELS, "court: nothing to pick here"
    clocks: uint256 = self._turn(id, place)
    level -= descent.LEVELS
    self._prove(id, place, level, index, node, path)
    self._places[id] = clocks | (place & (2**120 - 2**40)) | (level << LEVEL_AT) | index
    cell: uint256 = (place >> CELL_AT) & MASK_40
    if cell == 0:
        self._nodes[id] = node
    else:
        self._sub_nodes[id] = node
    log Picked(contest=id, accusation=id >> 32, cell=cell, level=level, index=index)


@external
def open_cell(
    id: uint256,
    terms: IAccusations.Terms,
    index: uint256,
    element: uint256,
    leaf: Bytes[128],
    path: DynArray[bytes32, 6],
):
    """
    @notice By the contester: the first cell of the trace that differs is a linear or an attention cell. The accuser has to
            open it into its tree next.
    @param id A contest in the trace whose leaves were shown.
    @param terms The accusation's terms.
    @param index The leaf.
    @param element The cell in it.
    @param leaf What was shown there.
    @param path Its siblings, from below upwards, among what was shown.
    """
    place: uint256 = self._places[id]
    assert (place >> CELL_AT) & MASK_40 == 0, "court: in the tree of a cell already"
    clocks: uint256 = self._leaf_turn(id, place, index, leaf, path)
    self._check_terms(id, terms)
    count: uint256 = staticcall ITraceMap(trace_map).sub_leaf_count(
        terms.config, terms.trace.prompt_tokens, terms.trace.output_tokens, index, element
    )
    assert count != 0, "court: such a cell is not opened: step"
    cell: uint256 = 1 + 32 * index + element
    level: uint256 = descent._height(count)
    self._places[id] = clocks | (count << COUNT_AT) | (cell << CELL_AT) | (level << LEVEL_AT)
    self._nodes[id] = merkle._leaf(leaf)
    log Picked(contest=id, accusation=id >> 32, cell=cell, level=level, index=0)


@external
def step(
    id: uint256,
    terms: IAccusations.Terms,
    index: uint256,
    element: uint256,
    leaf: Bytes[128],
    path: DynArray[bytes32, 6],
    sub_root: bytes32,
    opened: IReferee.Opened,
):
    """
    @notice By the contester: the first cell that differs, of the trace or of the tree in which the contest stands, and what
            it is computed from. Ends the contest.
    @param id A contest whose leaves were shown.
    @param terms The accusation's terms.
    @param index The leaf.
    @param element The cell in it.
    @param leaf What was shown there.
    @param path Its siblings, from below upwards, among what was shown.
    @param sub_root The root of the tree of the cell in which the contest stands; not looked at in the trace.
    @param opened What `TraceMap.inputs_of` lists for the cell, with proofs.
    """
    place: uint256 = self._places[id]
    self._leaf_turn(id, place, index, leaf, path)
    cell: uint256 = (place >> CELL_AT) & MASK_40
    part: ITraceMap.Step = ITraceMap.Step(leaf=index, element=element, inside=False, sub_leaf=0, sub_element=0)
    if cell != 0:
        part = ITraceMap.Step(
            leaf=(cell - 1) >> 5, element=(cell - 1) & 31, inside=True, sub_leaf=index, sub_element=element
        )
    self._judge(id, place, terms, part, sub_root, opened, leaf)


@external
def finish(
    id: uint256, terms: IAccusations.Terms, leaf: Bytes[128], sub_root: bytes32, opened: IReferee.Opened
):
    """
    @notice By the contester: nothing in the cell's tree differs, but the cell itself does not follow from it. Ends the
            contest.
    @param id A contest in the tree of a cell, of which something was shown.
    @param terms The accusation's terms.
    @param leaf The leaf of the trace that holds the cell.
    @param sub_root The root of the cell's tree.
    @param opened What `TraceMap.inputs_of` lists for the cell, with proofs.
    """
    place: uint256 = self._places[id]
    cell: uint256 = (place >> CELL_AT) & MASK_40
    assert cell != 0, "court: not in the tree of a cell"
    self._turn(id, place)
    assert merkle._leaf(leaf) == self._nodes[id], "court: not the cell's leaf"
    part: ITraceMap.Step = ITraceMap.Step(
        leaf=(cell - 1) >> 5, element=(cell - 1) & 31, inside=False, sub_leaf=0, sub_element=0
    )
    self._judge(id, place, terms, part, sub_root, opened, leaf)


@external
def settle(id: uint256, terms: IAccusations.Terms) -> bool:
    """
    @notice End a contest in which one side's time is over, whose point was proven for another contest, or whose accusation
            is over. By anyone.
    @return Whether the contester won.
    """
    place: uint256 = self._places[id]
    assert place != 0, "court: no such contest"
    self._check_terms(id, terms)
    if staticcall IAccusations(accusations).is_over(id >> 32):
        self._end(id, terms, 3, 4)
        return False
    since: uint256 = (place >> SINCE_AT) & MASK_40
    due: uint256 = since + ((place >> ACCUSER_AT) & MASK_24)
    shown: uint256 = self._shown[self._key(id, place)] & MASK_40
    if shown == 0 or shown > due:
        assert block.timestamp > due, "court: the accuser has time left"
        self._end(id, terms, 1, 2)
        return True
    if (place >> LEVEL_AT) & 255 == POINT:
        self._end(id, terms, 2, 3)
        return False
    due = max(shown, since) + ((place >> CONTESTER_AT) & MASK_24)
    assert block.timestamp > due, "court: the contester has time left"
    self._end(id, terms, 2, 2)
    return False


@external
@view
def contest_info(id: uint256) -> Info:
    """
    @notice An open contest: where it stands (level 255: at point `index`), what each side had left when it came to stand
            there, and when what is below was shown (0: the accuser is to move). All zero once it has ended.
    """
    place: uint256 = self._places[id]
    who: uint256 = self._contesters[id]
    return Info(
        contester=convert(who & (2**160 - 1), address),
        free=who >> FREE_AT != 0,
        since=(place >> SINCE_AT) & MASK_40,
        accuser_left=(place >> ACCUSER_AT) & MASK_24,
        contester_left=(place >> CONTESTER_AT) & MASK_24,
        level=(place >> LEVEL_AT) & 255,
        index=place & MASK_32,
        cell=(place >> CELL_AT) & MASK_40,
        leaf_count=(place >> COUNT_AT) & MASK_40,
        node=self._standing(id, place),
        revealed_at=self._shown[self._key(id, place)] & MASK_40,
    )


@external
@view
def shown_at(accusation: uint256, cell: uint256, level: uint256, index: uint256) -> uint256:
    """
    @notice When what stands below a node was shown; 0 if it was not. cell: 0 for the trace, else 1 + 32 * leaf + element.
    """
    return self._shown[self._key(accusation << 32, (cell << CELL_AT) | (level << LEVEL_AT) | index)] & MASK_40


@internal
def _open(accusation: uint256, terms: IAccusations.Terms, free: bool, place: uint256) -> uint256:
    number: uint256 = extcall IAccusations(accusations).open_contest(accusation, terms, msg.sender, free)
    id: uint256 = (accusation << 32) | number
    self._contesters[id] = convert(msg.sender, uint256) | (convert(free, uint256) << FREE_AT)
    self._places[id] = (
        place | (block.timestamp << SINCE_AT) | (terms.clock << ACCUSER_AT) | (terms.clock << CONTESTER_AT)
    )
    log ContestOpened(
        contest=id,
        accusation=accusation,
        contester=msg.sender,
        free=free,
        level=(place >> LEVEL_AT) & 255,
        index=place & MASK_32,
    )
    return id


@internal
@pure
def _key(id: uint256, place: uint256) -> uint256:
    """
    @dev A node among all trees of all accusations: accusation, cell, level, index.
    """
    return ((id >> 32) << 80) | (place & NODE_MASK)


@internal
@view
def _check_terms(id: uint256, terms: IAccusations.Terms):
    assert self._terms_hash(id) == keccak256(abi_encode(terms)), "court: not the accusation's terms"


@internal
@view
def _terms_hash(id: uint256) -> bytes32:
    return staticcall IAccusations(accusations).terms_hash(id >> 32)


@internal
def _show(id: uint256, place: uint256, asked: bytes32, node: bytes32):
    """
    @dev What is due at a node is shown now, once, and hashes to it; it makes the root of a cell's tree, which nothing
         proves: there only the accuser speaks, and says of which cell of which trace. Else a reorganisation could put his
         answer under another cell, and a right accusation would be lost by it. A point is shown by its leaves.
    """
    key: uint256 = self._key(id, place)
    assert self._shown[key] == 0, "court: shown already"
    due: uint256 = ((place >> SINCE_AT) & MASK_40) + ((place >> ACCUSER_AT) & MASK_24)
    assert block.timestamp <= due, "court: the accuser's time is over"
    mark: uint256 = block.timestamp
    if self._is_sub_root(place):
        cell: uint256 = (place >> CELL_AT) & MASK_40
        assert asked == keccak256(abi_encode(self._terms_hash(id), cell)), "court: another cell is asked for"
        assert msg.sender == staticcall IAccusations(accusations).accuser_of(id >> 32), "court: not the accuser"
        mark = mark | (convert(node, uint256) & HASH_MASK)
    elif (place >> LEVEL_AT) & 255 != POINT:
        assert self._standing(id, place) == node, "court: not the node's"
    self._shown[key] = mark


@internal
@view
def _turn(id: uint256, place: uint256) -> uint256:
    """
    @dev The contester may move: the clocks of the contest's word as they are after the move.
    """
    assert msg.sender == convert(self._contesters[id] & (2**160 - 1), address), "court: not the contester"
    shown: uint256 = self._shown[self._key(id, place)] & MASK_40
    assert shown != 0, "court: the accuser is to move"
    since: uint256 = (place >> SINCE_AT) & MASK_40
    accuser_left: uint256 = (place >> ACCUSER_AT) & MASK_24
    contester_left: uint256 = (place >> CONTESTER_AT) & MASK_24
    if shown > since:
        assert shown - since <= accuser_left, "court: the accuser was too late: settle"
        accuser_left -= shown - since
        since = shown
    assert block.timestamp - since <= contester_left, "court: the contester's time is over"
    contester_left -= block.timestamp - since
    return (block.timestamp << SINCE_AT) | (accuser_left << ACCUSER_AT) | (contester_left << CONTESTER_AT)


@internal
@view
def _leaf_turn(
    id: uint256, place: uint256, index: uint256, leaf: Bytes[128], path: DynArray[bytes32, 6]
) -> uint256:
    """
    @dev The contester may move at the leaves, and this leaf was shown.
    """
    assert (place >> LEVEL_AT) & 255 <= descent.LEVELS, "court: not at the leaves"
    clocks: uint256 = self._turn(id, place)
    assert len(leaf) == LEAF_BYTES, "court: leaf is not 128 bytes"
    self._prove(id, place, 0, index, merkle._leaf(leaf), path)
    return clocks


@internal
@view
def _prove(
    id: uint256, place: uint256, low: uint256, index: uint256, node: bytes32, path: DynArray[bytes32, 6]
):
    """
    @dev A node at level `low` stands below the one at which the contest stands.
    """
    level: uint256 = (place >> LEVEL_AT) & 255
    assert index >> (level - low) == place & MASK_32, "court: not below the contested node"
    found: bytes32 = descent._climb((place >> COUNT_AT) & MASK_40, low, index, node, level, path)
    if self._is_sub_root(place):
        self._check_sub_root(id, place, found)
    else:
        assert found == self._standing(id, place), "court: not what was shown"


@internal
@pure
def _is_sub_root(place: uint256) -> bool:
    """
    @dev Whether a contest stands at the root of a cell's tree.
    """
    if (place >> CELL_AT) & MASK_40 == 0:
        return False
    return (place >> LEVEL_AT) & 255 == descent._height((place >> COUNT_AT) & MASK_40)


@internal
@view
def _check_sub_root(id: uint256, place: uint256, root: bytes32):
    """
    @dev The tree of the cell, in which the contest stands, has this root.
    """
    level: uint256 = descent._height((place >> COUNT_AT) & MASK_40)
    shown: uint256 = self._shown[self._key(id, (place & TREE_MASK) | (level << LEVEL_AT))]
    assert shown & HASH_MASK == convert(root, uint256) & HASH_MASK, "court: not what was shown"


@internal
@view
def _standing(id: uint256, place: uint256) -> bytes32:
    """
    @dev The node at which a contest stands, but for the root of a cell's tree.
    """
    if (place >> CELL_AT) & MASK_40 == 0:
        return self._nodes[id]
    return self._sub_nodes[id]


@internal
def _judge(
    id: uint256,
    place: uint256,
    terms: IAccusations.Terms,
    part: ITraceMap.Step,
    sub_root: bytes32,
    opened: IReferee.Opened,
    leaf: Bytes[128],
):
    self._check_terms(id, terms)
    if (place >> CELL_AT) & MASK_40 != 0:
        self._check_sub_root(id, place, sub_root)
    right: bool = staticcall IReferee(referee).holds(terms.config, terms.trace, sub_root, part, opened, leaf)
    if right:
        self._end(id, terms, 2, 1)
    else:
        self._end(id, terms, 1, 1)


@internal
def _end(id: uint256, terms: IAccusations.Terms, outcome: uint256, by: uint256):
    who: uint256 = self._contesters[id]
    contester: address = convert(who & (2**160 - 1), address)
    self._contesters[id] = 0
    self._places[id] = 0
    self._nodes[id] = empty(bytes32)
    log ContestEnded(contest=id, accusation=id >> 32, contester=contester, outcome=outcome, by=by)
    extcall IAccusations(accusations).close_contest(id >> 32, terms, contester, who >> FREE_AT != 0, outcome == 1)


@internal
@view
def _logit(terms: IAccusations.Terms, position: uint256, token: uint256) -> uint256:
    return staticcall ITraceMap(trace_map).index_of(
        terms.config,
        terms.trace.prompt_tokens,
        terms.trace.output_tokens,
        trace_layout.LOGITS,
        0,
        position,
        token,
    )


@internal
@view
def _is_logit(leaf: Bytes[128], token: uint256, logit: int32) -> bool:
    return staticcall IReferee(referee).value(False, leaf, token & 31) == convert(logit, int256)


@internal
@pure
def _id(ids: Bytes[128], number: uint256) -> uint256:
    """
    @dev A little-endian id.
    """
    result: uint256 = 0
    for i: uint256 in range(4):
        result = (result << 8) | convert(slice(ids, 4 * number + 3 - i, 1), uint256)
    return result
