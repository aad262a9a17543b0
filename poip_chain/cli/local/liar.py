"""A liar: it accuses an honest answer with invented numbers, and loses its bond. FOR TESTS AND THE DEMO ONLY.

It takes the evidence file that a watchtower keeps of an audited answer, computes the answer's trace with one logit far too
low, so that the answer seems to have lost against another token, and accuses with that. It then plays the accuser's part
like an honest one until a step shows the logit, or says nothing (`--silent`) until its time is over. An evidence file that
is not there yet is waited for, with the engine open: windows may be short.

    python -m poip_chain.cli.local.liar --rpc URL --deployment FILE --key KEYSTORE --data DIRECTORY --model DIRECTORY
        --evidence FILE [--silent]
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from pathlib import Path

from poip_chain.chain.deployment import Deployment
from poip_chain.chain.keys import load, password_from
from poip_chain.chain.outbox import Outbox
from poip_chain.chain.rpc import Chain
from poip_chain.economic.network import Network
from poip_chain.errors import InvalidInput, PoipError, Unavailable
from poip_chain.proof.accusations import AccusationRow, AccusationState, Claim
from poip_chain.proof.accuser import Accuser
from poip_chain.proof.claims import grounds_of
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import WatchtowerStore, open_store
from poip_chain.service.court.lies import Lie, LyingTraces
from poip_chain.service.court.sending import Sender
from poip_chain.service.court.view import CourtView
from poip_chain.spec.trace import Op

READY = "ready"
"""A file in the data directory: the engine is open."""
BEYOND = 4096 << 16
"""By so much is a logit falsified, in 2**-16: far more than any limit of a margin."""


def lying_traces(model: Path) -> LyingTraces:
    """Traces over `model` in which the first output token seems to have lost by far."""
    return LyingTraces(model, lambda _prompt, output: Lie(Op.LOGITS, 0, 0, output[0], -BEYOND))


class Liar:
    """One false accusation of the answer in `evidence`, from an account of its own. `plays`: whether it answers contests."""

    def __init__(
        self,
        network: Network,
        outbox: Outbox,
        store: WatchtowerStore,
        traces: LyingTraces,
        evidence: Evidence,
        plays: bool = True,
    ) -> None:
        self._network, self._store, self._evidence, self._plays = network, store, evidence, plays
        self._traces = traces
        self._view, self._sender = CourtView(network), Sender(outbox)
        self._bond = network.parameters.value_at("accusation_bond", evidence.batch.parameters_version)
        settings = WatchtowerSettings(rpc_url="", deployment=Path(), mode=Mode.DEFEND, bond_budget=self._bond)
        self._accuser = Accuser(settings, self._view, self._traces, store, self._sender, None)

    def row(self) -> AccusationRow | None:
        """How its accusation stands."""
        return next(iter(self._store.accusations(batch_id=self._evidence.batch.id)), None)

    def step(self) -> bool:
        """One round; whether it is over. Raises InvalidInput if no lie convicts the answer, Unavailable without a chain."""
        row = self.row()
        if row is None:
            self._store_claim()
        elif row.state is AccusationState.ENDED:
            return True
        if self._plays or row is None or row.accusation is None or self._view.accused(row.accusation) is None:
            self._accuser.step()
            return False
        return self._view.info(row.accusation).is_over

    def _store_claim(self) -> None:
        evidence, record = self._evidence, self._evidence.record
        models, batch = self._network.models, evidence.batch
        weights_root = models.spec(batch.model_id).weights_root
        player = self._traces.player(weights_root, record.transcript.prompt_ids, record.transcript.output_ids)
        grounds = grounds_of(evidence, player)
        if grounds.claim is None:
            raise InvalidInput(f"even the false trace does not convict this answer: {grounds.reason}")
        salt = secrets.token_bytes(32)
        call = self._network.accusations.accuse(0, batch, models.config(batch.model_id), grounds.claim, salt)
        claim = Claim(
            batch=batch,
            position=evidence.position,
            accuser=self._sender.address,
            commitment=grounds.claim.commitment(salt, self._sender.address),
            salt=salt,
            reveal=call.data,
            weights_root=weights_root,
            prompt=tuple(record.transcript.prompt_ids),
            output=tuple(record.transcript.output_ids),
            bond=self._bond,
        )
        self._store.add_batch(batch)
        self._store.store_claim(claim, 0, grounds.detail, self._bond)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 the accusation is over, 1 refused or failed, 3 chain not reachable."""
    parser = argparse.ArgumentParser(
        prog="poip_chain.cli.local.liar", description="Accuse an honest answer. For tests and the demo only."
    )
    parser.add_argument("--rpc", required=True)
    for name in ("deployment", "key", "data", "model", "evidence"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--silent", action="store_true", help="answer no contest")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between rounds")
    given = parser.parse_args(arguments)
    try:
        key, traces = load(given.key, password_from()), lying_traces(given.model)
        traces.weights_root()
        (given.data / READY).touch()
        while not given.evidence.exists():
            time.sleep(given.pause)
        evidence = Evidence.read(given.evidence)
        with (
            Chain(given.rpc) as chain,
            open_store(given.data) as store,
            Outbox(chain, key, given.data / "outbox" / f"{key.address}.db") as outbox,
        ):
            network = Network(chain, Deployment.load(given.deployment))
            liar = Liar(network, outbox, store, traces, evidence, not given.silent)
            while not liar.step():
                time.sleep(given.pause)
            row = liar.row()
            print(json.dumps(None if row is None else row.to_json()))
    except PoipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Unavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
