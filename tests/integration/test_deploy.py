"""Deployment on a real node: complete, idempotent, resumable after a kill, and usable through the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from poip_chain.chain import deployment as module
from poip_chain.chain.deployment import CONTRACTS, Deployment, DeploymentSettings, deploy
from poip_chain.chain.devnet.testing import running_devnet
from poip_chain.chain.keys import Key, development_key
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.cli.local.network import GATEWAY, WATCHTOWER
from poip_chain.cli.local.report import take
from poip_chain.economic.clients.token import Token
from poip_chain.economic.network import Network
from poip_chain.economic.parameters import DEVNET_PARAMETERS, PARAMETERS
from poip_chain.economic.profiles import DEVNET_GRANT, deployment_settings, model_profile
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import ConfigurationError, NotFound, TransactionFailed
from poip_chain.spec.objects import ModelConfig, ModelSpec, ProofOfPossession
from poip_chain.spec.types import Address

DEPLOYER = development_key(0)


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    with running_devnet() as url, Chain(url) as chain:
        yield chain


@pytest.fixture(scope="module")
def settings() -> DeploymentSettings:
    return deployment_settings("devnet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def network(chain: Chain, settings: DeploymentSettings, folder: Path) -> Network:
    return Network(chain, deploy(chain, DEPLOYER, settings, folder / "deployment.json"))


def test_everything_is_in_place(network: Network) -> None:
    network.check()
    assert list(network.deployment.addresses) == list(CONTRACTS)
    for client in (
        network.token,
        network.parameters,
        network.models,
        network.registry,
        network.log,
        network.vault,
        network.offences,
        network.availability,
    ):
        assert client.version()
    at = network.address
    assert network.registry.read("is_sealed") and network.log.read("sealed")
    assert network.registry.read("log_address") == at("CommitmentLog")
    for judge in ("Offences", "Availability", "Accusations"):
        assert network.log.read("judge_active_from", at(judge)) > 0
    for slasher in ("CommitmentLog", "Offences", "Availability"):
        assert network.registry.read("slasher_active_at", at(slasher)) > 0
    # The court convicts through the log, and takes no stake by itself.
    assert network.registry.read("slasher_active_at", at("Accusations")) == 0
    assert network.vault.treasury() == DEPLOYER.address
    assert network.token.owner() == DEPLOYER.address
    assert network.deployment.block == network.deployment.contracts["PoipToken"].block


COURT = {
    "Referee": {"trace_map": "TraceMap"},
    "Scoring": {"commitment_log": "CommitmentLog", "models": "ModelRegistry"},
    "Accusations": {
        "token": "PoipToken",
        "commitment_log": "CommitmentLog",
        "registry": "NodeRegistry",
        "models": "ModelRegistry",
        "parameters": "Parameters",
        "scoring": "Scoring",
        "trace_map": "TraceMap",
        "contests": "Contests",
    },
    "Contests": {"accusations": "Accusations", "referee": "Referee", "trace_map": "TraceMap"},
}


@pytest.mark.parametrize("name", COURT)
def test_the_court_is_bound_to_the_right_contracts(chain: Chain, network: Network, name: str) -> None:
    for getter, other in COURT[name].items():
        contract = chain.contract(name, network.address(name))
        assert chain.read(contract.functions[getter]()) == network.address(other)


def test_money_and_numbers(network: Network) -> None:
    assert network.token.balance(development_key(3).address) == DEVNET_GRANT
    assert network.token.total_supply() == 10**27
    found = {info.name: info for info in network.parameters.all()}
    assert list(found) == [parameter.name for parameter in DEVNET_PARAMETERS]
    for parameter in DEVNET_PARAMETERS:
        info = found[parameter.name]
        assert (info.value, info.minimum, info.maximum, info.unit) == (
            parameter.value,
            parameter.minimum,
            parameter.maximum,
            parameter.unit,
        )
    with pytest.raises(NotFound):
        network.parameters.value("no_such_number")


def test_again_sends_nothing(chain: Chain, network: Network, settings: DeploymentSettings, folder: Path) -> None:
    before, count = chain.block_number(), chain.transaction_count(DEPLOYER.address)
    assert deploy(chain, DEPLOYER, settings, folder / "deployment.json") == network.deployment
    assert (chain.block_number(), chain.transaction_count(DEPLOYER.address)) == (before, count)
    assert Deployment.load(folder / "deployment.json") == network.deployment


class Killed(BaseException):
    """Stands for kill -9 at a given point."""


@pytest.mark.parametrize("after", [4, 10, 16])
def test_resumes_where_it_stopped(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: DeploymentSettings, after: int
) -> None:
    """Stopped right after its n-th transaction was handed over, before anything of it was recorded in the file."""
    path, key = tmp_path / "deployment.json", development_key(5)
    small = replace(settings, grants={development_key(6).address: 7})
    before = chain.transaction_count(key.address)
    sent = [0]
    real = Outbox.send

    def send(self: Outbox, *arguments: object, **options: object) -> str:
        done = real(self, *arguments, **options)  # type: ignore[arg-type]
        sent[0] += 1
        if sent[0] == after + 1:
            raise Killed
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "send", send)
        with pytest.raises(Killed):
            deploy(chain, key, small, path)
    if path.exists():
        assert json.loads(path.read_text())["complete"] is False
        with pytest.raises(ConfigurationError, match="not complete"):
            Deployment.load(path)
    finished = deploy(chain, key, small, path)
    assert finished.complete
    # The contracts, 8 calls of wiring, 2 seals, 1 grant: none was sent twice.
    assert chain.transaction_count(key.address) - before == len(CONTRACTS) + 8 + 2 + 1
    assert Network(chain, finished).token.balance(development_key(6).address) == 7


def test_the_file_belongs_to_a_chain_and_a_deployer(
    chain: Chain, network: Network, settings: DeploymentSettings, folder: Path, tmp_path: Path
) -> None:
    good = json.loads((folder / "deployment.json").read_text())
    path = tmp_path / "deployment.json"

    def written(**changes: object) -> Path:
        path.write_text(json.dumps({**good, **changes}))
        return path

    with pytest.raises(ConfigurationError, match="another chain"):
        deploy(chain, DEPLOYER, settings, written(chain_id=5))
    with pytest.raises(ConfigurationError, match="another chain"):
        deploy(chain, DEPLOYER, settings, written(genesis="0x" + "00" * 32))
    with pytest.raises(ConfigurationError, match="begun by"):
        deploy(chain, development_key(1), settings, written(complete=False))
    contracts = json.loads(json.dumps(good["contracts"]))
    contracts["PaymentVault"]["address"] = contracts["PoipToken"]["address"]
    with pytest.raises(ConfigurationError, match="another code"):
        deploy(chain, DEPLOYER, settings, written(contracts=contracts))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", '{"schema": 2}', '{"schema": 1, "chain_id": -1, "genesis": "", "deployer": "x"}'],
)
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "deployment.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError):
        Deployment.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="poip deploy"):
        Deployment.load(tmp_path / "none.json")


def test_profiles() -> None:
    standard = deployment_settings("standard", values={"challenge_window": 100})
    values = {row[0].rstrip(b"\0").decode(): row[1] for row in standard.parameters}
    assert values["challenge_window"] == 100 and not standard.grants
    assert values["audit_rate"] == PARAMETERS[0].value
    with pytest.raises(ConfigurationError, match="not covered"):
        replace(standard, grants={development_key(0).address: 10**30})


def test_ownership_is_offered_to_the_admin(chain: Chain, tmp_path: Path, settings: DeploymentSettings) -> None:
    admin = development_key(8)
    chosen = replace(settings, grants={}, admin=admin.address, treasury=development_key(7).address)
    network = Network(chain, deploy(chain, development_key(5), chosen, tmp_path / "deployment.json"))
    assert network.vault.treasury() == development_key(7).address
    for name in module.OWNED:
        contract = chain.contract(name, network.address(name))
        assert chain.read(contract.functions.pending_owner()) == admin.address


CONFIG = ModelConfig(64, 128, 2, 4, 2, 16, 300, 512, 10**7, 10000, bytes(32), True, False, False, False)


def test_clients_round_trip(chain: Chain, network: Network, tmp_path: Path) -> None:
    """Every client writes and reads through the real contracts: model, profile, node, stake, offer, escrow."""
    from poip_chain.economic.types import Offer

    spec = ModelSpec(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, CONFIG.config_hash())
    profile = model_profile(CONFIG, [2], 256)
    operator, node, peer, client = development_key(1), Key.generate(), Key.generate(), development_key(2)
    with Outbox(chain, DEPLOYER, tmp_path / "deployer.db") as outbox:
        outbox.execute(network.models.register(spec, CONFIG, "a test"), "model")
        outbox.execute(network.models.add_profile(spec.model_id(), profile), "profile")
    model_id = spec.model_id()
    assert network.models.model_ids() == [model_id]
    assert network.models.spec(model_id) == spec and network.models.config(model_id) == CONFIG
    assert network.models.profile(model_id, 1) == profile and network.models.profile_count(model_id) == 1
    assert network.models.is_servable(model_id, 1) and not network.models.is_servable(model_id, 2)

    deadline, domain, registry = chain.timestamp() + 600, network.domain("registry"), network.registry
    signatures = [
        ProofOfPossession(operator.address, key.address, role, deadline).sign(domain, key.private_key)
        for key, role in ((node, 1), (peer, 2))
    ]
    name, stake = node.address, 100 * 10**18
    with pytest.raises(NotFound):
        registry.info(name)
    with Outbox(chain, operator, tmp_path / "operator.db") as outbox:
        outbox.execute(
            registry.register(name, operator.address, peer.address, "http://127.0.0.1:1", deadline, *signatures), "r"
        )
        v, r, s = network.token.permit(operator, registry.address, stake, deadline)
        outbox.execute(registry.stake_with_permit(name, stake, deadline, v, r, s), "stake")
        offer = Offer(model_id, 1, 5, 10**12)
        outbox.execute(registry.set_offer(name, offer), "offer")
        outbox.execute(registry.unbond(name, 10**18), "unbond")
        with pytest.raises(TransactionFailed):
            outbox.send(registry.unbond(name, 10**27), "too much")
    info = registry.info(name)
    assert (info.operator, info.node_key, info.peer_key) == (operator.address, name, peer.address)
    assert (info.active, info.unbonding, info.locked) == (99 * 10**18, 10**18, 0)
    assert info.endpoint == "http://127.0.0.1:1" and info.registered
    assert registry.nodes() == [name] and registry.offers(name) == [offer] and registry.is_active(name)
    assert registry.node_of_key(name) == name and registry.node_of_key(peer.address) is None
    assert registry.signing_key(name, 0) == registry.committer(name) == name
    (unbonding,) = registry.unbondings(name)
    assert unbonding.amount == 10**18 and unbonding.withdrawable_at > chain.timestamp()

    with Outbox(chain, client, tmp_path / "client.db") as outbox:
        v, r, s = network.token.permit(client, network.vault.address, 50, deadline)
        outbox.execute(network.vault.deposit_with_permit(name, 50, deadline, v, r, s), "deposit")
        outbox.execute(network.vault.thaw(name, 20), "thaw")
    escrow = network.vault.escrow(client.address, name)
    assert (escrow.balance, escrow.thawing, escrow.available) == (50, 20, 30)
    assert network.vault.available(client.address, name) == 30 and network.vault.total_held() == 50

    with Outbox(chain, DEPLOYER, tmp_path / "again.db") as outbox:
        outbox.execute(network.token.transfer(name, 1), "token")
    chain.request("anvil_setBalance", name, hex(10**18))
    with Outbox(chain, node, tmp_path / "node.db") as outbox:
        outbox.execute(network.log.commit(model_id, 1, b"\x09" * 32, 0, 3, 300, "here"), "commit")
    found = network.log.find(1, network.deployment.block)
    assert found is not None
    batch, locator = found
    assert (batch.node, batch.count, batch.total_fee, locator) == (name, 3, 300, "here")
    assert network.log.matches(batch) and network.log.status_of(batch) is BatchStatus.PENDING
    assert network.log.next_seq(name) == 3 and network.log.node_cum(name) == 300 and network.log.batch_count() == 1
    assert not network.log.matches(batch.replace(count=4))
    assert network.log.beacon_of(batch) is None
    delay = network.parameters.value_at("beacon_delay", batch.parameters_version)
    chain.request("hardhat_mine", hex(delay + 1))
    with Outbox(chain, client, tmp_path / "client.db") as outbox:
        target = batch.block_number + delay
        outbox.execute(network.log.submit_beacon(chain.raw_header(target)), "beacon")
    assert network.log.beacon_of(batch) == network.log.beacon_at(target) == chain.block(target).mix_hash
    with Outbox(chain, client, tmp_path / "client.db") as outbox:
        with pytest.raises(TransactionFailed):
            outbox.send(network.log.finalize([batch]), "early")
        chain.request("evm_setNextBlockTimestamp", batch.window_end)
        chain.request("evm_mine")
        outbox.execute(network.log.finalize([batch]), "final")
    assert network.log.status_of(batch) is BatchStatus.FINAL
    assert registry.info(name).locked == 0


def test_books_are_those_of_one_block(
    network: Network, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Money moves while the demonstration's books are read: nothing is counted twice."""
    local: Any = SimpleNamespace(nodes=[])
    payer, payee = development_key(GATEWAY), development_key(WATCHTOWER).address
    before = take(local, network)
    honest = Token.balance
    with Outbox(chain, payer, tmp_path / "payer.db") as outbox:

        def balance(token: Token, owner: Address) -> int:
            found = honest(token, owner)
            if owner == payer.address:
                outbox.execute(network.token.transfer(payee, 7), "between two reads")
            return found

        monkeypatch.setattr(Token, "balance", balance)
        during = take(local, network)
    monkeypatch.undo()
    assert during.holdings == before.holdings
    after = take(local, network)
    changes = {name: after.holdings[name].total - held.total for name, held in before.holdings.items()}
    assert changes == {"gateway (client)": -7, "watchtower": 7, "liar": 0, "treasury": 0}
    assert before.network.token.balance(payee) + 7 == network.token.balance(payee)
