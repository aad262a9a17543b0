"""The court with players: the contracts over a small model, accusations of one answer, and the moves of both sides.

Each side plays from its `Telling` (tests/support/tellings.py); it is honest if that is. Scoring is scripted: it believes
every claim, so that tests can accuse honest and false answers alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import boa
from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak

from poip_chain.spec.dispute import Node, asked_cell, cell_of, first_difference, path_within
from poip_chain.spec.merkle import merkle_proof
from poip_chain.spec.objects import Batch, FinishReason, ModelSpec, Profile, ThresholdRow
from poip_chain.spec.referee import LINEAR, Cell
from poip_chain.spec.trace import WIDE, Op, decode
from poip_chain.spec.transcript import id_leaves, prompt_root
from poip_chain.spec.types import Address
from tests.contracts import system
from tests.contracts.network import Answer, Committed, Network, Server, deploy_network
from tests.contracts.system import CONTRACTS, HARNESS, OWNER, POIP, account
from tests.support.referee_steps import Opening, Step, open_step
from tests.support.tellings import Story, Telling

COMMITTED, ACCUSED, EXPIRED, LOST, STOOD = 1, 2, 3, 4, 5
WON, FAILED, VOID = 1, 2, 3
ACCUSER, CONTESTER, NODE = account("accuser"), account("contester"), "node"
SALT = b"\x05" * 32
POINT_LEVEL = 255
POINTS = "(uint32,uint32,int32,int32)[]"


@dataclass
class Court:
    """The contracts, an accused answer, and the telling of whoever accuses by default."""

    network: Network
    accusations: Any
    contests: Any
    scoring: Any
    referee: Any
    trace_map: Any
    story: Story
    terms: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    claims: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    players: set[Address] = field(default_factory=set)

    def value(self, name: str) -> int:
        return self.network.value(name)

    def serve(self, count: int = 1, label: str = NODE) -> Committed:
        """A batch of `count` answers, each the story's, of a new node."""
        server = Server.start(self.network, label)
        self.players |= {server.node, server.operator}
        return server.commit([self.answer(server) for _ in range(count)])

    def answer(self, server: Server) -> Answer:
        told = self.story
        return server.serve(
            account("client"),
            len(told.output),
            prompt_tokens=len(told.prompt),
            reason=FinishReason.LENGTH,
            request_changes={"prompt_root": prompt_root(told.prompt)},
            transcript_changes={"prompt_ids": told.prompt, "output_ids": told.output},
        )

    def fund(self, who: Address, amount: int = 1000 * POIP) -> None:
        """Tokens for a player's bonds."""
        self.players.add(who)
        self.network.give(who, amount, self.accusations)

    def check_books(self) -> None:
        """Held are the bonds of what is open and the credits, and not a wei else."""
        held = sum(self.accusations.credits(who) for who in self.players) + self.accusations.to_burn()
        for batch in range(1, self.network.log.batch_count() + 1):
            for number in range(self.accusations.accusation_count(batch)):
                id = (batch << 32) | number
                info = self.accusations.accusation_info(id)
                if info.status in (COMMITTED, ACCUSED):
                    held += self.value("accusation_bond") + info.lost_contests * self.value("contest_bond")
                bonded = [c for c in range(id << 32, (id << 32) + info.contests) if self.is_open(c)]
                assert len(bonded) == info.open_contests
                held += sum(self.value("contest_bond") for c in bonded if not self.contests.contest_info(c).free)
        assert held == self.accusations.total_held() == self.network.token.balanceOf(self.accusations)

    def claim(self, committed: Committed, telling: Telling, index: int = 0, **changes: Any) -> tuple[Any, ...]:
        """A claim: every token of every position is a margin or fingerprint point somewhere; two of each here."""
        answer, told = committed.answers[index], self.story
        points = [
            (i, token, telling.logit(i, token), telling.logit(i, told.output[i]))
            for i, token in ((0, 4), (1, told.config.vocab_size - 1))
        ]
        fields: dict[str, Any] = {
            "receipt": answer.receipt.values(),
            "index": index,
            "receipt_proof": committed.proof(index),
            "request": answer.request.values(),
            "params": answer.params.values(),
            "roots": answer.roots().values(),
            "trace_root": telling.root,
            "margins": points,
            "fingerprints": [(1, 2, telling.logit(1, 2), telling.logit(1, told.output[1]))],
            "output_leaves": b"",
            "fingerprint_leaves": b"",
            "proof": [],
        } | changes
        return tuple(fields.values())

    def commitment(self, claim: tuple[Any, ...], accuser: Address, salt: bytes = SALT) -> bytes:
        """keccak(claim hash || salt || accuser)."""
        points = keccak(abi_encode([POINTS, POINTS], list(claim[7:9])))
        claimed = keccak(abi_encode(["uint256", "bytes32", "bytes32"], [claim[1], claim[6], points]))
        return keccak(claimed + salt + bytes.fromhex(accuser[2:]))

    def commit(self, batch: Batch, claim: tuple[Any, ...], accuser: Address = ACCUSER.address) -> int:
        return int(self.accusations.commit(batch.values(), self.commitment(claim, accuser), sender=accuser))

    def reveal(self, id: int, batch: Batch, claim: tuple[Any, ...]) -> None:
        """The reveal; keeps the terms as the event gives them."""
        self.open(id, batch.values(), claim)
        (event,) = (e for e in self.accusations.get_logs() if type(e).__name__ == "Accused")
        self.terms[id], self.claims[id] = event.terms, claim

    def open(self, id: int, batch: tuple[Any, ...], claim: tuple[Any, ...], salt: bytes = SALT) -> None:
        """The reveal alone."""
        self.accusations.accuse(id, batch, self.story.config.values(), claim, salt)

    def end(self, id: int, batch: tuple[Any, ...]) -> bool:
        """The resolution alone."""
        return bool(self.accusations.resolve(id, self.terms.get(id) or self.no_terms(), batch))

    def accuse(self, committed: Committed, telling: Telling, accuser: Address = ACCUSER.address, **changes: Any) -> int:
        """Commit and reveal."""
        claim = self.claim(committed, telling, **changes)
        id = self.commit(committed.batch, claim, accuser)
        self.reveal(id, committed.batch, claim)
        return id

    def no_terms(self) -> tuple[Any, ...]:
        """Terms of nothing."""
        zero = bytes(32)
        trace = (0, 0, zero, zero, zero, zero)
        return ("0x" + "00" * 20, trace, self.story.config.values(), 0, 0, zero, 0, 0, 0, 0)

    def contest(self, id: int, who: Address = CONTESTER.address, free: bool = False, point: int | None = None) -> int:
        if point is None:
            return int(self.contests.contest_trace(id, self.terms[id], free, sender=who))
        return int(self.contests.contest_point(id, self.terms[id], free, point, sender=who))

    def resolve(self, id: int, batch: Batch) -> bool:
        """After the contest window."""
        end = self.terms[id].contest_end
        if system.now() <= end:
            boa.env.time_travel(seconds=end + 1 - system.now())
        return self.end(id, batch.values())

    def settle(self, contest: int) -> bool:
        """Anyone ends what time has decided."""
        return bool(self.contests.settle(contest, self.terms[contest >> 32], sender=account("anyone").address))

    def is_open(self, contest: int) -> bool:
        return int(self.contests.contest_info(contest).since) != 0

    def status(self, id: int) -> int:
        return int(self.accusations.accusation_info(id).status)

    def play(self, contest: int, accuser: Telling, contester: Telling, pause: int = 7) -> Any:
        """Both sides move, a little time apart, until the contest has ended; the last event."""
        event = None
        while self.is_open(contest):
            boa.env.time_travel(seconds=pause)
            if self.contests.contest_info(contest).revealed_at == 0:
                self.answer_for(contest, accuser)
            else:
                self.move(contest, accuser, contester)
            event = next((e for e in self.contests.get_logs() if type(e).__name__ == "ContestEnded"), None)
        return event

    def answer_for(self, contest: int, telling: Telling) -> None:
        """The accuser's move."""
        info = self.contests.contest_info(contest)
        if info.level == POINT_LEVEL:
            self.show_point(contest, telling, info.index)
            return
        shown = telling.shown(info.cell, Node(info.level, info.index))
        accuser = self.accusations.accuser_of(contest >> 32)
        asked = asked_cell(self.accusations.terms_hash(contest >> 32), info.cell)
        if info.level <= 6:
            self.contests.reveal_leaves(contest, asked, b"".join(shown), sender=accuser)
        else:
            self.contests.reveal(contest, asked, shown, sender=accuser)

    def show_point(self, contest: int, telling: Telling, number: int, **changes: Any) -> None:
        told = self.story
        claim = self.claims[contest >> 32]
        margins, fingerprints = claim[7], claim[8]
        position, token = (*margins, *fingerprints)[number][:2]
        ids = id_leaves(told.output)
        indices = sorted({telling.layout.index(Op.LOGITS, 0, position, t) for t in (token, told.output[position])})
        fields: dict[str, Any] = {
            "margins": margins,
            "fingerprints": fingerprints,
            "ids": ids[position // 32],
            "ids_proof": list(merkle_proof(ids, [position // 32])),
            "leaves": b"".join(telling.leaves[i] for i in indices),
            "proof": list(merkle_proof(telling.leaves, indices)),
        } | changes
        self.contests.show_point(contest, self.terms[contest >> 32], *fields.values())

    def move(self, contest: int, accuser: Telling, own: Telling, sender: Address | None = None) -> None:
        """The contester's move: the first difference, down to a step. `accuser` is what was shown."""
        info = self.contests.contest_info(contest)
        who, terms = sender or info.contester, self.terms[contest >> 32]
        node, cell = Node(info.level, info.index), info.cell
        theirs = accuser.shown(cell, node)
        offset = first_difference(theirs, own.shown(cell, node))
        tree = accuser.tree(cell)[0]
        if offset is None and cell:
            leaf, element = cell_of(cell)
            opened = open_step(accuser.referee, Step(leaf, element), accuser.trees)
            root = accuser.tree(cell)[2][-1][0]
            self.contests.finish(contest, terms, accuser.leaves[leaf], root, arguments(opened), sender=who)
            return
        offset = offset or 0
        picked = tree.shown(node)[offset]
        if not tree.shows_leaves(node):
            self.contests.pick(contest, picked.index, theirs[offset], path_within(theirs, offset), sender=who)
            return
        hashes = [keccak(b"\0" + leaf) for leaf in theirs]
        path, leaf = path_within(hashes, offset), theirs[offset]
        wide = self.wide(cell, picked.index)
        mine = own.tree(cell)[1][picked.index]
        pairs = zip(decode(leaf, wide), decode(mine, wide), strict=True)
        element = next((i for i, (theirs_, ours) in enumerate(pairs) if theirs_ != ours), 0)
        place = own.layout.locate(picked.index) if not cell else None
        where = (contest, terms, picked.index, element, leaf, path)
        if place and (place.tensor.op in LINEAR or place.tensor.op is Op.ATTENTION) and element < place.count:
            self.contests.open_cell(*where, sender=who)
            return
        step = Step(picked.index, element)
        if cell:
            step = Step(*cell_of(cell), True, picked.index, element)
        opened = open_step(accuser.referee, step, accuser.trees)
        root = accuser.tree(cell)[2][-1][0] if cell else bytes(32)
        self.contests.step(*where, root, arguments(opened), sender=who)

    def wide(self, cell: int, index: int) -> bool:
        layout = self.story.layout
        if not cell:
            return layout.locate(index).tensor.op in WIDE
        at = Cell(*cell_of(cell))
        if layout.locate(at.index).tensor.op is not Op.ATTENTION:
            return True
        return not Telling(self.story).referee.attention_parts(at).narrow(index)


def arguments(opening: Opening) -> tuple[bytes, bytes, list[bytes]]:
    """`IReferee.Opened`."""
    return opening.leaves, opening.rows, opening.proof


def deploy_court(told: Story, overrides: Mapping[str, int] | None = None, profile: Profile | None = None) -> Court:
    """A network whose one model is the story's, with the court as a judge of it. Accuser and contester have tokens.

    With a profile claims are scored by it, by the real contract.
    """
    # The network's contracts last: the process that tests those compiles them at the same time.
    for name in ("TraceMap", "Referee", "Accusations", "Contests"):
        system.compiled(CONTRACTS / f"disputes/{name}.vy")
    network = deploy_network(overrides, seal=False)
    trace_map = system.load(CONTRACTS / "disputes/TraceMap.vy")
    referee = system.load(CONTRACTS / "disputes/Referee.vy", trace_map)
    if profile is None:
        scoring = system.load(HARNESS / "scripted_scoring.vy", network.models)
    else:
        scoring = system.load(CONTRACTS / "disputes/Scoring.vy", network.log, network.models)
    accusations = system.load(
        CONTRACTS / "disputes/Accusations.vy",
        *(network.token, network.log, network.registry, network.models, network.parameters, scoring, trace_map),
    )
    contests = system.load(CONTRACTS / "disputes/Contests.vy", accusations, referee, trace_map)
    with boa.env.prank(OWNER.address):
        accusations.initialize(contests)
        network.log.set_judge(accusations, True)
        network.log.seal()
        spec = ModelSpec(told.weights_root, keccak(b"tokenizer"), keccak(b"template"), told.config.config_hash())
        network.models.register_model(spec.values(), told.config.values(), "ipfs://court")
        table = (ThresholdRow(32, 1000),)
        context, vocabulary = told.config.max_positions, told.config.vocab_size
        plain = Profile(context, vocabulary, "bfloat16", "bfloat16", 100, 2000, (0,), 1, 2, table, 1, 2, table)
        network.models.add_profile(spec.model_id(), (profile or plain).values())
    court = Court(replace(network, model_id=spec.model_id()), accusations, contests, scoring, referee, trace_map, told)
    for who in (ACCUSER, CONTESTER):
        court.fund(who.address)
    return court
