"""Gas of a whole dispute over a small model's trace at 512 positions, every move a transaction of the real contracts.

5,156,096 leaves are not computed: the tree is drawn at random but for the way down to the contested leaf and the leaves
that its step reads. Gas depends on shapes alone, up to zeros in what is opened. The accuser is right to the last step, so
that the dispute ends in a conviction. Figures are gas used: calldata at 4 and 16 or the EIP-7623 floor of 10 and 40 a byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey

from benchmarks.gas import BATCH_EVENT, POIP, _Bench, _Contract, _field
from benchmarks.rows import Row
from poip_chain.canonical.opening import Step
from poip_chain.chain.devnet.chain import Devnet
from poip_chain.chain.devnet.config import DevnetConfig
from poip_chain.economic.parameters import PARAMETERS
from poip_chain.spec.accusation import Claim, Point, Points
from poip_chain.spec.dispute import Descent, Node, asked_cell, cell_number, path_within
from poip_chain.spec.merkle import inner_hash, leaf_hash, merkle_levels, merkle_proof, merkle_root
from poip_chain.spec.objects import (
    Batch,
    ModelConfig,
    ModelSpec,
    Profile,
    Receipt,
    Request,
    SamplingParams,
    ThresholdRow,
)
from poip_chain.spec.referee import Referee
from poip_chain.spec.trace import WIDE, Layout, Op, decode
from poip_chain.spec.trace import encode as encode_leaf
from poip_chain.spec.transcript import Transcript
from tests.support.referee_steps import Opening, RandomInputs, Trees, open_step, sub_leaf, sub_leaf_count
from tests.vectors.generate_canonical import SMOLLM

ROOT = Path(__file__).resolve().parent.parent
PROMPT, OUTPUT = 449, 64
"""512 positions."""
POINTS = (16, 0)
"""Margin and fingerprint points of the accusation that is contested."""
ACCUSATIONS = ((1, 0), (4, 0), POINTS, (0, 16))
"""Of those that nobody contests."""
DISPUTE_GOAL, MOVES_GOAL, MOVE_GOAL, UNCONTESTED_GOAL = 1_600_000, 14, 2_000_000, 400_000
BATCH_SIZE = 64
TERMS_BYTES = 29 * 32


class SparseTree:
    """A tree of random hashes around some known leaves and what is shown on the way down to one of them."""

    def __init__(self, count: int, leaves: dict[int, bytes], contested: int) -> None:
        self.shape, self.leaves = Descent(count), leaves
        self.above = {(level, i >> level) for i in leaves for level in range(self.shape.height + 1)}
        node = self.shape.root
        while not self.shape.shows_leaves(node):
            shown = self.shape.shown(node)
            for below in shown:
                steps = range(1, node.level - below.level + 1)
                self.above |= {(below.level + step, below.index >> step) for step in steps}
            node = Node(shown[0].level, contested >> shown[0].level)
        self.made: dict[tuple[int, int], bytes] = {}

    def node(self, level: int, index: int) -> bytes:
        """The hash of a node."""
        if (level, index) not in self.above:
            return keccak(level.to_bytes(1, "big") + index.to_bytes(8, "big"))
        if (level, index) not in self.made:
            if level == 0:
                made: bytes = leaf_hash(self.leaves[index])
            elif 2 * index + 1 < self.shape.size(level - 1):
                made = inner_hash(self.node(level - 1, 2 * index), self.node(level - 1, 2 * index + 1))
            else:
                made = self.node(level - 1, 2 * index)
            self.made[level, index] = made
        return self.made[level, index]


class _KnownTrees(Trees):
    """Proofs out of sparse trees where there are any."""

    def __init__(self, rng: random.Random, sparse: dict[object, SparseTree]) -> None:
        super().__init__(rng)
        self.sparse = sparse

    def prove(self, name: object, leaves: dict[int, bytes], count: int) -> tuple[bytes, list[bytes]]:
        """As `Trees.prove`."""
        tree = self.sparse.get(name)
        if tree is None:
            return super().prove(name, leaves, count)
        known, proof = sorted(leaves), []
        for level in range(tree.shape.height):
            standing = set(known)
            proof += [
                tree.node(level, i ^ 1) for i in known if (i ^ 1) < tree.shape.size(level) and i ^ 1 not in standing
            ]
            known = sorted({i // 2 for i in known})
        return tree.node(tree.shape.height, 0), proof


@dataclass(frozen=True, slots=True)
class Move:
    """One transaction: what it is, whose, its gas and its calldata."""

    name: str
    side: str
    gas: int
    calldata: int


@dataclass
class Dispute:
    """All transactions of one dispute."""

    kind: str
    moves: list[Move] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Gas of both sides."""
        return sum(move.gas for move in self.moves)

    @property
    def account(self) -> str:
        """Each move and its gas."""
        return " + ".join(f"{move.name} {move.gas:,}" for move in self.moves)


@dataclass
class _Case:
    """A contested cell: the trace's tree around it, its own tree, and the opened step, whose value the leaf holds."""

    layout: Layout
    step: Step
    opening: Opening
    trace: SparseTree
    sub_leaves: list[bytes]
    leaf: bytes


def cases(layout: Layout) -> Iterator[tuple[str, Step]]:
    """The dearest cell of each way to the last step: a single step, a running sum, an attention cell's product."""
    last, layer = layout.positions - 1, layout.config.num_layers - 1
    yield "single step (norm: running sum of squares)", Step(layout.index(Op.INPUT_SUM, layer, last, 1), 1)
    leaf = layout.index(Op.OUTPUT, layer, last, 77)
    yield "linear (running sum of down)", Step(leaf, 77 % 16, True, 0, 1)
    leaf = layout.index(Op.ATTENTION, layer, last, 100)
    yield "attention (running product)", Step(leaf, 100 % 32, True, 50, 2)


def _case(layout: Layout, step: Step) -> _Case:
    rng = random.Random(9)
    inputs = RandomInputs(layout, rng, 0)
    referee = Referee(layout, inputs)
    plain = open_step(referee, step, Trees(rng))
    assert plain.value is not None
    wide = layout.locate(step.leaf).tensor.op in WIDE
    subs: list[bytes] = []
    if step.inside:
        subs = [sub_leaf(referee, step.cell, i) for i in range(sub_leaf_count(referee, step.cell))]
        subs[step.sub_leaf] = _with(subs[step.sub_leaf], True, step.sub_element, plain.value)
        if layout.locate(step.leaf).tensor.op is Op.ATTENTION:
            inputs.kept.update({(step.cell, i): leaf for i, leaf in enumerate(subs)})
        else:
            values = [value for leaf in subs for value in decode(leaf, True)]
            inputs.numbers.update({(step.cell, i): value for i, value in enumerate(values)})
    else:
        inputs.kept["leaf", step.leaf] = _with(inputs.leaf(step.leaf), wide, step.element, plain.value)
    known = {i: inputs.leaf(i) for i in range(step.leaf & ~31, (step.leaf | 31) + 1)}
    known |= {name[1]: leaf for name, leaf in inputs.kept.items() if isinstance(name, tuple) and name[0] == "leaf"}
    trace = SparseTree(layout.count, known, step.leaf)
    sparse: dict[object, SparseTree] = {"trace": trace}
    if subs:
        sparse[step.cell] = SparseTree(len(subs), dict(enumerate(subs)), step.sub_leaf)
    opening = open_step(referee, step, _KnownTrees(random.Random(10), sparse))
    assert opening.value == plain.value
    if opening.weights_root == bytes(32):
        opening.weights_root = keccak(b"weights that the step does not read")
    return _Case(layout, step, opening, trace, subs, inputs.leaf(step.leaf))


def _with(leaf: bytes, wide: bool, element: int, value: int) -> bytes:
    values = list(decode(leaf, wide))
    values[element] = value
    return encode_leaf(values, wide)


class _CourtBench(_Bench):
    """The whole system with the court, one node with one batch, an accuser and a contester with tokens."""

    def __init__(self, case: _Case, points: tuple[int, int] = POINTS) -> None:
        self.case, self.points = case, points
        self.chain = Devnet(DevnetConfig(block_time=None, automine=True))
        self.owner, self.node, self.peer, self.accuser, self.contester = (
            PrivateKey(bytes(account.key)) for account in self.chain.accounts[:5]
        )
        token = self._deploy("PoipToken", self._address(self.owner), 10**9 * POIP, 10**10 * POIP)
        parameters = self._deploy("Parameters", [p.as_tuple() for p in PARAMETERS])
        models = self._deploy("ModelRegistry")
        self.registry = self._deploy("NodeRegistry", token.address, parameters.address, models.address)
        self.log = self._deploy("CommitmentLog", self.registry.address, models.address, parameters.address)
        trace_map = self._deploy("TraceMap")
        referee = self._deploy("Referee", trace_map.address)
        scoring = self._deploy("Scoring", self.log.address, models.address)
        parts = (token, self.log, self.registry, models, parameters, scoring, trace_map)
        self.accusations = self._deploy("Accusations", *(part.address for part in parts))
        self.contests = self._deploy("Contests", self.accusations.address, referee.address, trace_map.address)
        self._send(self.owner, self.accusations, "initialize", self.contests.address)
        self._send(self.owner, self.registry, "initialize", self.log.address)
        self._send(self.owner, self.registry, "set_slasher", self.log.address, True)
        self._send(self.owner, self.log, "set_judge", self.accusations.address, True)
        self._send(self.owner, self.registry, "seal")
        self._send(self.owner, self.log, "seal")
        self.model_id = self._add_model(models)
        self._register()
        self._send(self.owner, token, "approve", self.registry.address, 10**6 * POIP)
        self._send(self.owner, self.registry, "stake", self._address(self.node), 10**6 * POIP)
        for key in (self.accuser, self.contester):
            self._send(self.owner, token, "transfer", self._address(key), 1000 * POIP)
            self._send(key, token, "approve", self.accusations.address, 2**256 - 1)
        self.dispute = Dispute("")

    def _add_model(self, models: _Contract) -> bytes:
        config: ModelConfig = self.case.layout.config
        spec = ModelSpec(self.case.opening.weights_root, keccak(b"t"), keccak(b"c"), config.config_hash())
        table = (ThresholdRow(32, 1), ThresholdRow(128, 4), ThresholdRow(512, 16))
        profile = Profile(4096, config.vocab_size, "bfloat16", "bfloat16", 100, 2000, (0, 2), 1, 2, table, 1, 1, table)
        self._send(self.owner, models, "register_model", spec.values(), config.values(), "")
        self._send(self.owner, models, "add_profile", spec.model_id(), profile.values())
        return spec.model_id()

    def move(self, name: str, side: str, contract: _Contract, function: str, *arguments: Any) -> Any:
        """One transaction of the dispute; its logs."""
        data = contract.encode(function, *arguments)
        key = self.accuser if side == "accuser" else self.contester
        gas, logs = self._transact(key, contract.address, data)
        self.dispute.moves.append(Move(name, side, gas, len(data)))
        return logs

    def accuse(self) -> None:
        """A batch, and the accusation of one of its receipts with points over the whole output."""
        # The court's daily state: it holds something already.
        answer, receipts = self._answer()
        hashes = [receipt.struct_hash() for receipt in receipts]
        self.batch = self._commit_batch(receipts, 0)
        transcript, request, params, receipt = answer
        margins, fingerprints = (
            tuple(Point(OUTPUT // many * i, token * i, 900_000 + i, 100_000 + i) for i in range(many))
            for many, token in zip(self.points, (17, 1), strict=True)
        )
        points = Points(margins, fingerprints)
        root = self.case.trace.node(self.case.trace.shape.height, 0)
        proof = merkle_proof(hashes, [receipt.seq])
        claim = Claim.of(receipt, receipt.seq, proof, request, params, transcript, root, points)
        salt, layout = keccak(b"salt"), self.case.layout
        commitment = claim.commitment(salt, self._address(self.accuser))
        other = self._commit_batch(receipts[-1:], BATCH_SIZE)
        self._send(self.contester, self.accusations, "commit", other, commitment)
        self.id = self.batch[0] << 32
        self.move("commit", "accuser", self.accusations, "commit", self.batch, commitment)
        logs = self.move(
            *("accuse", "accuser", self.accusations, "accuse", self.id, self.batch, layout.config.values()),
            *(claim.values(), salt),
        )
        values = {p.name: p.value for p in PARAMETERS}
        opening = self.case.opening
        roots = (request.prompt_root, claim.roots.output_root)
        trace = (PROMPT, OUTPUT, root, opening.weights_root, *roots)
        bonds = (values["accusation_bond"], values["contest_bond"], values["dispute_clock"])
        # The terms stand second in the event; their last word is the end of the contest window.
        end = int.from_bytes(logs[-1].data[TERMS_BYTES : TERMS_BYTES + 32], "big")
        self.terms = (
            self._address(self.node), trace, layout.config.values(), layout.count, sum(self.points),
            points.points_hash(), *bonds, end,
        )  # fmt: skip

    def _commit_batch(self, receipts: list[Receipt], first_seq: int) -> tuple[Any, ...]:
        root, total = merkle_root([receipt.struct_hash() for receipt in receipts]), sum(r.fee for r in receipts)
        arguments = (self.model_id, 1, root, first_seq, len(receipts), total, "https://node-1.example.org/v1")
        return _batch(self._send(self.node, self.log, "commit", *arguments)[1])

    def _answer(self) -> tuple[Any, list[Receipt]]:
        params = SamplingParams(700)
        prompt, output = tuple(range(PROMPT)), tuple(range(500, 500 + OUTPUT))
        node = self._address(self.node)
        request = Request(
            self._address(self.owner), node, self.model_id, 1, merkle_root([b"p"]), PROMPT, params.params_hash(), OUTPUT,
            10**9, 10**9, keccak(b"seed"), keccak(b"nonce"), 2**40,
        )  # fmt: skip
        transcript = Transcript(
            request.struct_hash(),
            1,
            "vllm 0.1",
            prompt,
            output,
            tuple(tuple((i, -i) for i in range(8)) for _ in output),
        )
        fee, receipts = (PROMPT + OUTPUT) * 10**9, []
        for seq in range(BATCH_SIZE):
            total = fee * (seq + 1)
            receipts.append(
                Receipt(
                    node,
                    seq,
                    request.struct_hash(),
                    self.model_id,
                    transcript.root(),
                    OUTPUT,
                    1,
                    fee,
                    self._address(self.owner),
                    total,
                    total,
                    self.chain.now(),
                )
            )
        return (transcript, request, params, receipts[37]), receipts

    def descend(self) -> None:
        """The contest, from the root to the step."""
        case, contest = self.case, self.id << 32
        self.move("contest", "contester", self.contests, "contest_trace", self.id, self.terms, False)
        node = case.trace.shape.root
        while not case.trace.shape.shows_leaves(node):
            shown = case.trace.shape.shown(node)
            nodes = [case.trace.node(n.level, n.index) for n in shown]
            self.move("reveal", "accuser", self.contests, "reveal", contest, bytes(32), nodes)
            offset = (case.step.leaf >> shown[0].level) - shown[0].index
            node, path = shown[offset], path_within(nodes, offset)
            self.move("pick", "contester", self.contests, "pick", contest, node.index, nodes[offset], path)
        leaves = [case.trace.leaves[n.index] for n in case.trace.shape.shown(node)]
        self.move("reveal leaves", "accuser", self.contests, "reveal_leaves", contest, bytes(32), b"".join(leaves))
        offset = case.step.leaf - (node.index << node.level)
        path = path_within([leaf_hash(leaf) for leaf in leaves], offset)
        opened = (case.opening.leaves, case.opening.rows, case.opening.proof)
        where = (contest, self.terms, case.step.leaf, case.step.element, case.leaf, path)
        if not case.step.inside:
            self.move("step", "contester", self.contests, "step", *where, bytes(32), opened)
            return
        self.move("open cell", "contester", self.contests, "open_cell", *where)
        levels = merkle_levels(case.sub_leaves)
        assert len(levels) <= 7, "one reveal opens the cell's tree"
        # All of the terms' fields are static, so they stand in a call's data as they are hashed.
        terms_hash = keccak(self.contests.encode("settle", self.id, self.terms)[4 + 32 :])
        asked = asked_cell(terms_hash, cell_number(case.step.leaf, case.step.element))
        self.move("reveal cell", "accuser", self.contests, "reveal_leaves", contest, asked, b"".join(case.sub_leaves))
        path = path_within(levels[0], case.step.sub_leaf)
        leaf = case.sub_leaves[case.step.sub_leaf]
        where = (contest, self.terms, case.step.sub_leaf, case.step.sub_element, leaf, path)
        self.move("step", "contester", self.contests, "step", *where, levels[-1][0], opened)

    def resolve(self) -> None:
        """The accusation stands and convicts."""
        self.chain.increase_time(5 * 3600)
        self.move("resolve", "accuser", self.accusations, "resolve", self.id, self.terms, self.batch)


def _batch(logs: Any) -> tuple[Any, ...]:
    """The batch out of its event."""
    (data,) = (log.data for log in logs if log.topics[0] == int.from_bytes(BATCH_EVENT, "big"))
    words = [data[i : i + 32] for i in range(0, 32 * len(Batch.ABI), 32)]
    return tuple(_field(kind, word) for kind, word in zip(Batch.ABI.values(), words, strict=True))


def measure(config: ModelConfig = SMOLLM) -> list[Dispute]:
    """A dispute of each kind, contested to the last step, over the trace of PROMPT + OUTPUT - 1 positions."""
    layout = Layout(config, PROMPT, OUTPUT)
    found = []
    for kind, step in cases(layout):
        bench = _CourtBench(_case(layout, step))
        bench.dispute.kind = kind
        bench.accuse()
        bench.descend()
        bench.resolve()
        found.append(bench.dispute)
    return found


def uncontested(config: ModelConfig = SMOLLM) -> list[Dispute]:
    """Accusations that nobody contests, by their points: committed, revealed and scored, resolved with a conviction."""
    layout = Layout(config, PROMPT, OUTPUT)
    case, found = _case(layout, next(cases(layout))[1]), []
    for points in ACCUSATIONS:
        bench = _CourtBench(case, points)
        bench.dispute.kind = " and ".join(
            f"{many} {kind} points" for many, kind in zip(points, ("margin", "fingerprint"), strict=True) if many
        )
        bench.accuse()
        bench.resolve()
        found.append(bench.dispute)
    return found


def run() -> list[Row]:
    """One row for each kind of dispute, one for each uncontested accusation, one for the dearest move."""
    rows, disputes = [], measure()
    for dispute in disputes:
        rows.append(
            Row(
                f"gas of a whole dispute, {dispute.kind}",
                dispute.total,
                "gas",
                f"SmolLM2-135M at 512 positions, {len(dispute.moves)} transactions of both sides, py-evm",
                compared_with=f"goal {DISPUTE_GOAL:,}",
                ratio=dispute.total / DISPUTE_GOAL,
                goal=f"< {DISPUTE_GOAL:,} in {MOVES_GOAL}",
            )
        )
    moves = [move for dispute in disputes for move in dispute.moves]
    dearest = max(moves, key=lambda move: move.gas)
    for what, gas, how, limit in (
        *(
            (f"gas of an uncontested accusation, {one.kind}", one.total, one.account, UNCONTESTED_GOAL)
            for one in uncontested()
        ),
        ("gas of the dearest move of a dispute", dearest.gas, dearest.name, MOVE_GOAL),
    ):
        rows.append(Row(what, gas, "gas", f"{how}, py-evm", f"goal {limit:,}", gas / limit, f"< {limit:,}"))
    return rows


if __name__ == "__main__":
    for dispute in (*uncontested(), *measure()):
        print(f"{dispute.kind}: {dispute.total:,} gas in {len(dispute.moves)}")
        for move in dispute.moves:
            print(f"    {move.name:14} {move.side:10} {move.gas:9,} {move.calldata:7,}")
