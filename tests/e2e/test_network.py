"""A node on a real vLLM engine: killed in the middle of its work, paid to the wei, and found honest by a watchtower."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from poip_chain.economic.profiles import model_profile
from poip_chain.proof.app import open_watchtower
from poip_chain.proof.settings import WatchtowerSettings
from poip_chain.proof.store import AuditState, open_store
from poip_chain.spec.objects import Receipt
from tests.e2e.conftest import Engine
from tests.integration.node_world import NodeProcess, RegisteredModel, World, running_world, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# "The capital of France is" and two more beginnings, in the default model's vocabulary.
PROMPTS = ((504, 3575, 282, 4649, 314), (504, 6330, 314, 4461), (504, 939, 282, 253, 2190))
KILLS = ("mid_stream:3", "before_sign", "after_sign")
WINDOW = 120


@dataclass
class SharedEngine:
    """The session's engine in the place of the world's own: the world does not stop it."""

    url: str

    def close(self) -> None:
        """Leave it running for other tests."""


@pytest.fixture(scope="module")
def world(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    hashes = engine.hashes
    profile = model_profile(hashes.config, hashes.end_token_ids, 1024)
    model = RegisteredModel(hashes.spec, hashes.config, profile)
    folder = tmp_path_factory.mktemp("network")
    windows: dict[str, Any] = {"challenge_window": WINDOW, "unbonding_period": 600, "thaw_period": 400}
    with running_world(folder, model=model, engine=SharedEngine(engine.url), **windows) as made:
        yield made


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[NodeProcess]:
    made = world.add_node("node", engine_model="poip", batch_count=1, stall_timeout=120.0)
    world.send(world.network.registry.set_endpoint(made.address, made.url))
    world.interval(0.5)
    yield made
    made.kill()


def test_killed_with_a_real_engine_and_found_honest(world: World, node: NodeProcess, engine: Engine) -> None:
    signed: dict[bytes, Receipt] = {}
    for prompt, kill in zip(PROMPTS, KILLS, strict=True):
        body = node.client.body(prompt, max_tokens=16)
        node.start(kill)
        assert node.ask(body) is None
        node.wait_crashed(120)
        kept = node.receipts()
        assert len(kept) == len(signed) + (kill == "after_sign")

        node.start()
        receipt = node.ask(body)
        assert receipt is not None, node.log()[-3000:]
        if kill == "after_sign":
            assert receipt == kept[-1], "a receipt that was signed before the kill is the one that is given after it"
        assert node.pay(receipt)
        assert node.ask(body) == receipt, "a retried request gets the stored receipt again"
        signed[receipt.request_hash] = receipt
        node.kill()
    node.start()
    assert [receipt.seq for receipt in node.receipts()] == [0, 1, 2]

    settings = WatchtowerSettings(
        rpc_url=world.rpc_url,
        deployment=world.deployment_path,
        data=world.folder / "watchtower",
        models=[engine.model_dir],
    )
    wait_until(lambda: world.network.log.batch_count() == len(PROMPTS), 120, "three batches of one receipt each")
    with open_watchtower(settings) as watchtower:

        def audited() -> bool:
            watchtower.step()
            with open_store(settings.data) as store:
                audits = store.audits()
            return len(audits) == len(PROMPTS) and all(audit.state is AuditState.DONE for audit in audits)

        wait_until(audited, 300, "all audits are done")
    with open_store(settings.data) as store:
        audits, filings = store.audits(), store.filings()
    assert [audit.verdict for audit in audits] == ["honest"] * len(PROMPTS), json.dumps([a.detail for a in audits])
    assert all(audit.detail["tokens"] > 0 for audit in audits) and filings == []

    world.pass_time(WINDOW)
    total, payer, vault = sum(receipt.fee for receipt in signed.values()), node.client.address, world.network.vault
    wait_until(
        lambda: vault.earned(node.address) + vault.treasury_due() == total,
        180,
        lambda: f"all fees settle: {node.log()[-3000:]}",
    )
    assert vault.settled(payer, node.address) == total
    assert vault.escrow(payer, node.address).balance == 10**18 - total
