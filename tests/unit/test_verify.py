"""`verify_proof`: an honest proof passes every check, and each change to it fails the check that is about it."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_hash.auto import keccak

from poip_chain.control.client import Answer, KeySigner, NodeClient
from poip_chain.control.ledger import Ledger
from poip_chain.control.verify import Expected, Report, verify_proof
from poip_chain.control.view import BatchState
from poip_chain.errors import Unavailable
from poip_chain.proof.fetch import NodeWithholds
from poip_chain.service.engine.model import chat_template, tokenizer_hash
from poip_chain.service.engine.tokenizer import Tokenizer
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import (
    Batch,
    ModelSpec,
    Receipt,
    Request,
    SamplingParams,
    client_seed_from_integer,
    client_seed_from_nonces,
)
from poip_chain.spec.transcript import prompt_root
from poip_chain.spec.types import ZERO_ADDRESS
from tests.engines import scripted_chain
from tests.engines.scripted_chain import PROFILE, ScriptedChain
from tests.engines.scripted_node import ScriptedNode, private_key
from tests.engines.tiny_tokenizer import write_tokenizer

PAYER = KeySigner(private_key("payer"))
MESSAGES = [{"role": "user", "content": "Who are you?"}]
ANSWER = "Nobody, said the wörld."
USER_NONCE, GATEWAY_NONCE = b"\x01" * 32, b"\x02" * 32


@dataclass
class World:
    chain: ScriptedChain
    node: ScriptedNode
    directory: Path
    proof: dict[str, Any]
    receipt: Receipt

    def verify(self, proof: Any = None, **options: Any) -> Report:
        options.setdefault("tokenizer_dir", self.directory)
        return verify_proof(self.proof if proof is None else proof, self.chain, **options)

    def commit(self, state: BatchState, *, others: int = 2) -> Batch:
        """Put the receipt into a batch with some others, and let the node serve its leaves."""
        leaves = [(self.receipt, self.node.stored[self.receipt.request_hash][1])]
        for seq in range(1, 1 + others):
            other = self.receipt.replace(seq=seq, request_hash=secrets.token_bytes(32))
            leaves.append((other, other.sign(self.chain.log_domain, self.node.key)))
        root = merkle_root([receipt.struct_hash() for receipt, _ in leaves])
        batch = Batch(
            7, self.node.address, self.receipt.model_id, 1, root, 0, len(leaves), 0, 0, 1, 1, 1, 1, 1, 999
        )  # fmt: skip
        self.chain.batches = [(batch, state)]
        self.node.batches[7] = leaves
        return batch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One answer over the wire, with a tokenizer whose hashes are registered."""
    path = tmp_path_factory.mktemp("verify")
    directory = write_tokenizer(path / "model")
    spec = ModelSpec(bytes(32), tokenizer_hash(directory), keccak(chat_template(directory).encode()), bytes(32))
    tokenizer = Tokenizer(directory)
    chain = ScriptedChain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripted_chain, "SPEC", spec)
        patch.setattr(scripted_chain, "MODEL_ID", spec.model_id())
        ids = tokenizer.encode_text(ANSWER)
        with ScriptedNode(chain, reply=lambda _: ids).running() as node:
            chain.fund(PAYER.address, node.address, 10**6)
            answer = asyncio.run(_ask(chain, node, path, spec, tokenizer.encode_chat(MESSAGES)))
            proof = answer.proof(chain.log_domain, gateway_nonce=GATEWAY_NONCE, user_nonce=USER_NONCE)
            yield World(chain, node, directory, proof, answer.receipt)


async def _ask(chain: ScriptedChain, node: ScriptedNode, path: Path, spec: ModelSpec, ids: tuple[int, ...]) -> Answer:
    params = SamplingParams(temperature_milli=900)
    request = Request(
        client=PAYER.address,
        node=ZERO_ADDRESS,
        model_id=spec.model_id(),
        profile_version=1,
        prompt_root=prompt_root(ids),
        prompt_tokens=len(ids),
        params_hash=params.params_hash(),
        max_tokens=64,
        input_price=10,
        output_price=20,
        client_seed=client_seed_from_nonces(USER_NONCE, GATEWAY_NONCE),
        client_nonce=bytes(32),
        deadline=chain.now + 300,
    )
    domain = chain.vault_domain
    ledger = Ledger(path / "ledger.db", PAYER.address, domain, lambda voucher: PAYER.sign(voucher, domain))
    async with httpx.AsyncClient(verify=False) as http:
        client = NodeClient(http, PAYER, chain, ledger, clock=lambda: float(chain.now))
        async for item in client.stream(node.address, node.url, client.sign(request, params, ids), PROFILE):
            if isinstance(item, Answer):
                await client.aclose()
                ledger.close()
                return item
    raise AssertionError


@pytest.fixture
def world(made: World) -> Iterator[World]:
    yield made
    made.chain.batches.clear()
    made.node.batches.clear()
    made.chain.down = False


def results(report: Report) -> dict[str, str]:
    return {check.name: check.result for check in report.checks}


def test_an_honest_final_proof_passes_everything(world: World) -> None:
    world.commit(BatchState.FINAL)
    report = world.verify(expected=Expected(messages=MESSAGES, answer=ANSWER, user_nonce=USER_NONCE))
    assert report.ok and report.unchecked == []
    assert (report.status, report.batch_id) == ("final", 7)
    assert set(results(report).values()) == {"ok"}
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_what_cannot_be_checked_is_said(world: World) -> None:
    report = world.verify()
    assert report.ok and report.status == "not committed"
    assert {check.name for check in report.unchecked} == {"prompt", "answer text", "committed"}
    report = world.verify(messages=MESSAGES, tokenizer_dir=None)
    assert results(report)["tokenizer"] == "not checked"
    short = {name: value for name, value in world.proof.items() if name != "transcript"}
    assert results(world.verify(short))["transcript"] == "not checked"


def test_pending_and_convicted(world: World) -> None:
    world.commit(BatchState.PENDING)
    report = world.verify()
    assert report.ok and report.status == "pending"
    assert results(report)["finality"] == "not checked" and results(report)["committed"] == "ok"
    world.commit(BatchState.CONVICTED)
    report = world.verify()
    assert not report.ok and report.status == "convicted" and results(report)["finality"] == "failed"


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(proof: dict[str, Any]) -> None:
        target = proof
        for name in path[:-1]:
            target = target[name]
        old = target[path[-1]]
        target[path[-1]] = to(old) if callable(to) else to

    return apply


OTHER = "0x" + "ab" * 32
TAMPERED = {
    "fee": (change("receipt", "fee", to=lambda fee: str(int(fee) - 1)), {"receipt signature", "fee"}),
    "output count": (
        change("receipt", "output_tokens", to=lambda n: n + 1),
        {"receipt signature", "fee", "transcript counts"},
    ),
    "receipt's request": (change("receipt", "request_hash", to=OTHER), {"receipt signature", "request"}),
    "prompt ids": (
        change("transcript", "prompt_ids", to=lambda ids: [5, *ids[1:]]),
        {"transcript prompt", "transcript root"},
    ),
    "output ids": (change("transcript", "output_ids", to=lambda ids: [*ids[:-2], 9, ids[-1]]), {"transcript root"}),
    "dropped ids": (
        change("transcript", "output_ids", to=lambda ids: ids[:-1]),
        {"transcript counts", "transcript root", "end of answer"},
    ),
    "statement": (change("transcript", "engine_statement", to="better"), {"transcript root"}),
    "prompt root": (change("request", "prompt_root", to=OTHER), {"request signature", "request", "transcript prompt"}),
    "seed": (change("request", "client_seed", to=OTHER), {"request signature", "request", "client seed"}),
    "client": (
        change("request", "client", to="0x" + "12" * 20),
        {"request signature", "request", "payer"},
    ),
    "node": (change("receipt", "node", to="0x" + "12" * 20), {"node registered"}),
    "temperature": (change("params", "temperature_milli", to=500), {"parameters"}),
    "range": (change("params", "temperature_milli", to=50000), {"parameters", "parameter range"}),
    "signature": (change("signature", to="0x" + "00" * 65), {"receipt signature"}),
    "request signature": (change("request_signature", to="0x" + "11" * 65), {"request signature"}),
    "chain": (change("chain_id", to=1), {"chain"}),
    "log": (change("log", to="0x" + "12" * 20), {"commitment log"}),
    "model": (change("request", "model_id", to=OTHER), {"model registered", "request signature"}),
    "profile": (change("request", "profile_version", to=2), {"model registered", "request signature"}),
    "user nonce": (change("user_nonce", to=OTHER), {"client seed"}),
    "gateway nonce": (change("gateway_nonce", to=OTHER), {"client seed"}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_each_change_fails_its_check(world: World, name: str) -> None:
    apply, expected = TAMPERED[name]
    proof = copy.deepcopy(world.proof)
    apply(proof)
    report = world.verify(proof)
    assert expected <= {check.name for check in report.failed}


MALFORMED: list[Any] = [
    None,
    [],
    {},
    {"receipt": {}},
    "x",
]


@pytest.mark.parametrize("proof", MALFORMED)
def test_malformed_proofs_fail_the_format_check(world: World, proof: Any) -> None:
    report = verify_proof(proof, world.chain)
    assert [check.name for check in report.failed] == ["format"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("receipt", "fee"), -1),
        (("receipt", "fee"), "9" * 100),
        (("receipt", "seq"), 2**64),
        (("signature",), "0x12"),
        (("params", "stop_token_ids"), [3, 2]),
        (("transcript", "fingerprints"), "0x1234"),
        (("transcript", "output_ids"), ["1"]),
        (("chain_id",), "31337"),
        (("user_nonce",), 5),
    ],
)
def test_hostile_values_fail_the_format_check(world: World, path: tuple[str, ...], value: Any) -> None:
    proof = copy.deepcopy(world.proof)
    change(*path, to=value)(proof)
    assert [check.name for check in world.verify(proof).failed] == ["format"]
    proof["surprise"] = 1
    assert not world.verify(proof).ok


def test_another_question_or_answer_is_noticed(world: World) -> None:
    report = world.verify(messages=[{"role": "user", "content": "Who am I?"}])
    assert [check.name for check in report.failed] == ["prompt"]
    report = world.verify(messages="nonsense")
    assert [check.name for check in report.failed] == ["prompt"]
    assert world.verify(expected=Expected(answer=ANSWER)).ok
    assert world.verify(expected=Expected(answer=ANSWER[:6])).ok, "a stop string cuts"
    report = world.verify(expected=Expected(answer="Somebody."))
    assert [check.name for check in report.failed] == ["answer text"]


def test_the_users_own_seed_or_nonce_decides(world: World) -> None:
    assert not world.verify(expected=Expected(user_nonce=b"\x05" * 32)).ok
    assert not world.verify(expected=Expected(seed=5)).ok
    assert client_seed_from_integer(5).hex() != world.proof["request"]["client_seed"][2:]


def test_another_tokenizer_is_not_used(world: World, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = world.verify(messages=MESSAGES, tokenizer_dir=other)
    assert [check.name for check in report.failed] == ["tokenizer"]


def test_another_leaf_at_the_receipts_place(world: World) -> None:
    world.commit(BatchState.FINAL)
    leaves = world.node.batches[7]
    swapped = [leaves[1], leaves[0], leaves[2]]
    batch = world.chain.batches[0][0].replace(root=merkle_root([receipt.struct_hash() for receipt, _ in swapped]))
    world.chain.batches = [(batch, BatchState.FINAL)]
    world.node.batches[7] = swapped
    report = world.verify()
    assert [check.name for check in report.failed] == ["committed"]


def test_leaves_that_do_not_hash_to_the_root_prove_nothing(world: World) -> None:
    world.commit(BatchState.FINAL)
    world.node.batches[7].reverse()
    assert results(world.verify())["committed"] == "not checked"

    class Silent:
        def receipts(self, batch: Batch) -> list[dict[str, Any]]:
            raise NodeWithholds("gone")

    assert results(world.verify(reader=lambda _: Silent()))["committed"] == "not checked"


def test_without_a_chain_nothing_is_verified(world: World) -> None:
    world.chain.down = True
    with pytest.raises(Unavailable):
        world.verify()
