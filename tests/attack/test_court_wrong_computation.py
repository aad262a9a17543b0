"""Cheats in the computation, through the real contracts: what one receipt convicts, what it does not, and what it costs.

Each cheat answers with torch and the protocol's sampler (poip_chain/proof/calibration/cheats.py) and claims that the
default model did. The accuser is the watchtower's own: canonical trace, shortest list of points, commitment, reveal; the
contracts score the points and recompute the noise. Nobody contests here: a contest could only repeat the trace
(tests/contracts/test_contests.py).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import boa
import pytest
import torch
import transformers
from eth_hash.auto import keccak

from poip_chain.canonical.points import ScoredPoint, fingerprint_points, margin_points
from poip_chain.economic.profiles import model_profile
from poip_chain.proof.calibration import cheats
from poip_chain.proof.calibration.cheats import Cheat, generate
from poip_chain.proof.calibration.prompts import Prompts
from poip_chain.proof.claims import Grounds, grounds_of
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.reexecution import TorchSource
from poip_chain.service.court.traces import Traces
from poip_chain.service.engine import model as models
from poip_chain.service.engine.client import EngineToken, fingerprint_entries
from poip_chain.service.engine.model import ModelHashes
from poip_chain.spec.accusation import MAX_POINTS, Claim, Point, Points
from poip_chain.spec.objects import FinishReason, Profile, Request, SamplingParams
from poip_chain.spec.transcript import IDS_PER_LEAF, prompt_root
from tests.contracts import system
from tests.contracts.network import CONVICTED, Answer, Committed, Network, Server, deploy_network
from tests.contracts.system import CONTRACTS, OWNER, account

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent.parent
CONTEXT, PROMPT, TOKENS, TEMPERATURE = 1024, 40, 64, 700
SALT = b"\x07" * 32
SEED = Request.seed(cast(Request, SimpleNamespace(client_seed=keccak(b"seed"))))
"""The sampler's, of every request that tests.contracts.network makes."""


@dataclass(frozen=True)
class World:
    """The contracts with the default model, its canonical engine, and torch."""

    network: Network
    accusations: Any
    hashes: ModelHashes
    profile: Profile
    traces: Traces
    true_model: Any
    prompts: tuple[tuple[int, ...], ...]

    def torch_model(self) -> Any:
        """The true model in float32, a copy: a cheat changes it."""
        return copy.deepcopy(self.true_model)


@dataclass(frozen=True)
class Claimed:
    """What a node claims: an answer of the true model to `prompt` at `temperature`."""

    prompt: tuple[int, ...]
    tokens: tuple[EngineToken, ...]
    temperature: int = TEMPERATURE
    reason: FinishReason = FinishReason.LENGTH


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    directory = Path(os.environ.get("POIP_TEST_MODEL", ROOT / ".build" / "models" / "smollm2-135m-instruct"))
    hashes = models.prepare_default(directory)
    network = deploy_network(seal=False)
    trace_map = system.load(CONTRACTS / "disputes/TraceMap.vy")
    referee = system.load(CONTRACTS / "disputes/Referee.vy", trace_map)
    scoring = system.load(CONTRACTS / "disputes/Scoring.vy", network.log, network.models)
    accusations = system.load(
        CONTRACTS / "disputes/Accusations.vy",
        *(network.token, network.log, network.registry, network.models, network.parameters, scoring, trace_map),
    )
    contests = system.load(CONTRACTS / "disputes/Contests.vy", accusations, referee, trace_map)
    profile = model_profile(hashes.config, hashes.end_token_ids, CONTEXT)
    with boa.env.prank(OWNER.address):
        accusations.initialize(contests)
        network.log.set_judge(accusations, True)
        network.log.seal()
        network.models.register_model(hashes.spec.values(), hashes.config.values(), "")
        network.models.add_profile(hashes.model_id, profile.values())
    prompts = Prompts(directory, hashes.config.vocab_size, seed=1)
    asked = tuple(prompts.prompt(kind, number)[:PROMPT] for kind, number in (("prose", 3), ("code", 4)))
    traces = Traces(directory, threads=1)
    transformers.utils.logging.disable_progress_bar()
    true_model = TorchSource(directory, threads=1).model
    network = replace(network, model_id=hashes.model_id)
    yield World(network, accusations, hashes, profile, traces, true_model, asked)
    traces.release()


# What cheats claim


def answer_of(world: World, cheat: Cheat) -> Claimed:
    """One answer of a cheat."""
    model = world.torch_model()
    if cheat.degrade is not None:
        cheat.degrade(model)
    mine, other = world.prompts
    served = other if cheat.other_prompt else (*other[: cheat.edit], *mine)
    claimed = TEMPERATURE if cheat.claimed_temperature is None else cheat.claimed_temperature
    used = claimed if cheat.served_temperature is None else cheat.served_temperature
    seed = keccak(SEED) if cheat.wrong_seed else SEED
    return Claimed(mine, generate(model, [served], [seed], [used], TOKENS)[0], claimed)


def stated_by(world: World, prompt: tuple[int, ...], output: list[int]) -> tuple[EngineToken, ...]:
    """The tokens of an answer with what the true model lists beside each."""
    with torch.inference_mode():
        logits = world.true_model(input_ids=torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
    found = []
    for row, token in zip(logits.float(), output, strict=True):
        top = torch.topk(row, 9)
        listed = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        found.append(EngineToken(token, float(row[token]), listed))
    return tuple(found)


def honest(world: World) -> Claimed:
    """An honest answer, of an engine in bfloat16."""
    model = world.torch_model().bfloat16()
    return Claimed(world.prompts[0], generate(model, world.prompts[:1], [SEED], [TEMPERATURE], TOKENS)[0])


def named(world: World, name: str) -> Claimed:
    """One of the cheats that a calibration measures."""
    (cheat,) = (c for c in cheats.cheats(world.hashes.config.num_layers) if c.name == name)
    return answer_of(world, cheat)


def with_honest_prefill(world: World, claimed: Claimed) -> Claimed:
    """The same tokens, beside what the true model says of them."""
    return replace(claimed, tokens=stated_by(world, claimed.prompt, [token.token_id for token in claimed.tokens]))


def stopped_early(world: World) -> Claimed:
    """An honest answer, cut short by an end of text that nobody computed, with honest fingerprints."""
    output = [token.token_id for token in honest(world).tokens[:24]]
    end = world.hashes.end_token_ids[0]
    assert end not in output
    prompt = world.prompts[0]
    return Claimed(prompt, stated_by(world, prompt, [*output, end]), reason=FinishReason.STOP)


def with_one_flip(world: World) -> Claimed:
    """An honest answer but for one token, the most unlikely of those listed there, and honest fingerprints."""
    tokens = honest(world).tokens
    at = min(range(8, len(tokens)), key=lambda i: tokens[i].top[7][1] - tokens[i].top[0][1])
    output = [token.token_id for token in tokens[: at + 1]]
    output[at] = tokens[at].top[7][0]
    prompt = world.prompts[0]
    rest = generate(world.true_model, [(*prompt, *output)], [SEED], [TEMPERATURE], 8)[0]
    return Claimed(prompt, stated_by(world, prompt, [*output, *(token.token_id for token in rest)]))


def with_other_ids(world: World) -> Claimed:
    """int4 weights; of each position the true values of unlikely tokens are stated, so that none of them is false."""
    claimed = named(world, "int4")
    output = [token.token_id for token in claimed.tokens]
    with torch.inference_mode():
        ids = torch.tensor([[*claimed.prompt, *output[:-1]]])
        logits = world.true_model(input_ids=ids).logits[0, len(claimed.prompt) - 1 :].float()
    hidden = []
    for row, token in zip(logits, output, strict=True):
        top = torch.topk(row, 40)
        listed = tuple(zip(top.indices.tolist()[30:], top.values.tolist()[30:], strict=True))
        hidden.append(EngineToken(token, float(row[token]), listed))
    return replace(claimed, tokens=tuple(hidden))


Make = Callable[[World], Claimed]
CONVICTED_BY_ONE_RECEIPT: dict[str, Make] = {
    "int4 weights": lambda world: named(world, "int4"),
    "a cheaper model": lambda world: named(world, "drop-half"),
    "a cheaper model with an honest prefill": lambda w: with_honest_prefill(w, named(w, "drop-half")),
    "a cached answer": lambda world: named(world, "other-prompt"),
    "fingerprint ids chosen to hide": with_other_ids,
}
CLEARED: dict[str, Make] = {
    "an honest answer": honest,
    "int8 weights": lambda world: named(world, "int8"),
    "fp8 weights": lambda world: named(world, "fp8"),
    "weights perturbed by 1 %": lambda world: named(world, "noise-1"),
    "weights perturbed by 5 %": lambda world: named(world, "noise-5"),
    "one layer dropped": lambda world: named(world, "drop-1"),
    "an edited prompt": lambda world: named(world, "edited-prompt"),
    "a wrong seed": lambda world: named(world, "wrong-seed"),
    "a slightly wrong temperature": lambda world: named(world, "temperature-0.8"),
    "an early stop": stopped_early,
    "one flipped token": with_one_flip,
}
"""What one receipt of this length does not convict: too few points of a claim pass a limit, or none do."""


# On trial


def commit(world: World, server: Server, claimed: Claimed) -> Committed:
    """A batch with the answer between two others."""
    output = tuple(token.token_id for token in claimed.tokens)
    answer: Answer = server.serve(
        account("client"),
        len(output),
        prompt_tokens=len(claimed.prompt),
        reason=claimed.reason,
        params=SamplingParams(claimed.temperature),
        request_changes={"prompt_root": prompt_root(claimed.prompt)},
        transcript_changes={
            "prompt_ids": claimed.prompt,
            "output_ids": output,
            "fingerprints": tuple(fingerprint_entries(token) for token in claimed.tokens),
        },
    )
    return server.commit([server.serve(account("client")), answer, server.serve(account("client"))])


def grounds(world: World, committed: Committed) -> Grounds:
    """What the watchtower finds against the answer."""
    answer = committed.answers[1]
    evidence = SimpleNamespace(
        batch=committed.batch, position=1, receipt_proof=committed.proof(1), profile=world.profile, record=answer
    )
    player = world.traces.player(world.hashes.weights_root, answer.transcript.prompt_ids, answer.transcript.output_ids)
    return grounds_of(cast(Evidence, evidence), player)


def every_point(world: World, committed: Committed) -> Claim:
    """A claim of all points that add anything, as far as a claim holds them."""
    answer, profile = committed.answers[1], world.profile
    output = answer.transcript.output_ids
    player = world.traces.player(world.hashes.weights_root, answer.transcript.prompt_ids, output)
    logits, temperature = player.trace.logits, answer.params.temperature_milli
    margins = margin_points(logits, output, answer.request.seed(), temperature, profile.margin_dead_zone)
    zones = (profile.fingerprint_dead_zone, profile.fingerprint_tolerance)
    stated = fingerprint_points(logits, output, answer.transcript.fingerprints, *zones)
    first = [point for point in stated if point.position < 16 * IDS_PER_LEAF]
    return Claim.of(
        answer.receipt,
        1,
        committed.proof(1),
        answer.request,
        answer.params,
        answer.transcript,
        player.root,
        Points(_dearest(margins), _dearest(first)),
    )


def _dearest(points: list[ScoredPoint]) -> tuple[Point, ...]:
    chosen = sorted(points, key=lambda point: -point.value)[:MAX_POINTS]
    ordered = sorted(chosen, key=lambda point: (point.position, point.token))
    return tuple(Point(p.position, p.token, p.logit, p.claimed_logit) for p in ordered)


def accuse(world: World, committed: Committed, claim: Claim) -> int:
    """Commit to the claim, which takes the bond, and reveal it."""
    accuser = account("accuser").address
    batch = committed.batch.values()
    id = int(world.accusations.commit(batch, claim.commitment(SALT, accuser), sender=accuser))
    world.accusations.accuse(id, batch, world.hashes.config.values(), claim.values(), SALT, sender=accuser)
    return id


def terms_of(accusations: Any) -> Any:
    (event,) = (e for e in accusations.get_logs() if type(e).__name__ == "Accused")
    return event.terms


@pytest.mark.parametrize("cheat", CONVICTED_BY_ONE_RECEIPT)
def test_convicted(world: World, cheat: str) -> None:
    """The batch's lock is taken: the accuser gets its share and its bond, the rest is burned."""
    network, accuser = world.network, account("accuser").address
    server = Server.start(network, f"node {cheat}")
    committed = commit(world, server, CONVICTED_BY_ONE_RECEIPT[cheat](world))
    found = grounds(world, committed)
    assert found.claim is not None, found.reason
    bond = network.value("accusation_bond")
    network.give(accuser, bond, world.accusations)
    stake, supply = network.stake_of(server.node), network.token.totalSupply()
    before = network.token.balanceOf(accuser) + network.registry.rewards(accuser)
    id = accuse(world, committed, found.claim)
    terms = terms_of(world.accusations)
    boa.env.time_travel(seconds=terms.contest_end + 1 - system.now())
    assert world.accusations.resolve(id, terms, committed.batch.values())
    world.accusations.claim(sender=accuser)
    assert network.log.status(committed.batch.id) == CONVICTED
    reward = committed.batch.lock * network.value("reward_share") // 10**6
    assert stake - network.stake_of(server.node) == committed.batch.lock
    assert network.token.balanceOf(accuser) + network.registry.rewards(accuser) - before == reward
    assert supply - network.token.totalSupply() == committed.batch.lock - reward


@pytest.mark.parametrize("answer", CLEARED)
def test_cleared(world: World, answer: str) -> None:
    """The watchtower accuses of nothing; who accuses all the same, with every point there is, loses its bond."""
    network, accuser = world.network, account("accuser").address
    server = Server.start(network, f"node {answer}")
    committed = commit(world, server, CLEARED[answer](world))
    found = grounds(world, committed)
    assert found.claim is None
    bond = network.value("accusation_bond")
    network.give(accuser, bond, world.accusations)
    stake = network.stake_of(server.node)
    claim = every_point(world, committed)
    batch = committed.batch.values()
    id = int(world.accusations.commit(batch, claim.commitment(SALT, accuser), sender=accuser))
    arguments = (id, batch, world.hashes.config.values(), claim.values(), SALT)
    system.refuses("court: the points do not convict", lambda: world.accusations.accuse(*arguments, sender=accuser))
    boa.env.time_travel(seconds=network.value("reveal_window") + 1)
    held = network.token.balanceOf(accuser)
    world.accusations.expire(id, batch)
    assert world.accusations.credits(accuser) == 0 and network.token.balanceOf(accuser) == held
    network.finalize(committed.batch)
    assert network.stake_of(server.node) == stake and network.locked(server.node) == 0
