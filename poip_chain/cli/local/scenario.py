"""What the demonstration does with a running local network, and when it is over.

It asks real questions through the unmodified OpenAI SDK, then follows the chain until honest fees are final and
withdrawn, the cheat has lost its stake for what it withheld and, in court, for what it computed, and a liar its bond;
telling each event as it happens. Nothing is scripted beyond the questions and the habits of cheat and liar: the cheat is
found by the beacon's random selection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from poip_chain.cli.local.network import MODEL_NAME, LocalNetwork, LocalNode
from poip_chain.cli.local.pulse import QUIET_SECONDS, Pulse
from poip_chain.cli.local.trials import Trials
from poip_chain.economic.money import format_amount
from poip_chain.economic.network import Network
from poip_chain.economic.types import BatchStatus
from poip_chain.errors import ConfigurationError, Unavailable
from poip_chain.proof.store import AuditRow, open_store
from poip_chain.spec.scores import Verdict

QUESTIONS = (
    "What is a blockchain? Answer in two sentences.",
    "Name three planets and say one thing about each.",
    "Write a short poem about the sea.",
    "What does a hash function do?",
    "Explain gravity to a child.",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "What is the capital of France, and what is it known for?",
)
SAMPLING: dict[str, Any] = {"max_tokens": 48, "temperature": 0.7, "extra_body": {"ignore_eos": True}}
"""Every answer of full length: of a very short one no audit can tell who computed it."""
FIRST_QUESTIONS = 8
MAX_QUESTIONS = 60
ENOUGH_FOR_THE_CHEAT = 2
"""Answers that the cheat must have given: it answers for its first audited transcript and withholds the next."""
POLL_SECONDS = 1.0


@dataclass
class Progress:
    """What has happened so far, to tell each thing once."""

    told: set[str] = field(default_factory=set)
    answers: dict[str, int] = field(default_factory=dict)


class Scenario:
    """One run over a started network. `pulse` gets a line for each event, and what is awaited between them."""

    def __init__(self, local: LocalNetwork, network: Network, pulse: Pulse, seconds: float) -> None:
        self._local = local
        self._network = network
        self._pulse, self._tell = pulse, pulse.tell
        self._deadline = time.monotonic() + seconds
        self._progress = Progress()
        self._names = {node.node_key.address: node.name for node in local.nodes}
        self._start_block = network.deployment.block
        self._trials = Trials(local, network, lambda key, text: self._once(self._progress.told, key, text), self._names)

    def run(self) -> None:
        """Ask, wait, tell. Raises Unavailable if the network does not get there in time."""
        questions = cycle(QUESTIONS)
        asked = 0
        while not self._over():
            self._local.supervisor.check()
            if time.monotonic() > self._deadline:
                raise Unavailable(
                    f"the demonstration did not finish in time; still open: {', '.join(self._open_ends())}.",
                    hint=f"The logs are in {self._local.directory / 'logs'}.",
                )
            self._tell_chain()
            if self._pulse.quiet_for > QUIET_SECONDS / 2:
                self._tell_awaited()
            self._end_the_jail()
            if asked < MAX_QUESTIONS and self._may_ask() and self._traffic_needed(asked):
                self._ask(next(questions), stream=asked % 2 == 0)
                asked += 1
            else:
                time.sleep(POLL_SECONDS)
        self._tell_chain()
        self._pulse.wait_for("")

    # questions

    def _ask(self, question: str, *, stream: bool) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigurationError(
                "the demonstration asks its questions through the openai package, which is not installed.",
                hint="pip install openai",
            ) from error
        client = OpenAI(base_url=f"{self._local.gateway_url}/v1", api_key="demo", max_retries=0, timeout=120.0)
        messages: list[Any] = [{"role": "user", "content": question}]
        self._pulse.wait_for(f'an answer to "{question}"')
        begin = time.monotonic()
        if stream:
            text = ""
            extra: dict[str, Any] = {}
            for chunk in client.chat.completions.create(model=MODEL_NAME, messages=messages, **SAMPLING, stream=True):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                extra = (chunk.model_extra or {}).get("poip") or extra
        else:
            answer = client.chat.completions.create(model=MODEL_NAME, messages=messages, **SAMPLING)
            text, extra = answer.choices[0].message.content or "", (answer.model_extra or {}).get("poip") or {}
        receipt = extra["proof"]["receipt"]
        name = self._names.get(receipt["node"], receipt["node"])
        self._progress.answers[name] = self._progress.answers.get(name, 0) + 1
        seconds = time.monotonic() - begin
        self._tell(f'  "{question}"')
        self._tell(f"    -> {' '.join(text.split())[:100]}...")
        self._tell(
            f"    {name}, receipt {receipt['seq']}, {receipt['output_tokens']} tokens in {seconds:.1f} s, "
            f"fee {format_amount(int(receipt['fee']))}{', streamed' if stream else ''}"
        )

    def _may_ask(self) -> bool:
        """Whether the machine is free for questions: traces are computed against the clock, but a cheat that is convicted
        for its first answer before it gave a second one has nothing to withhold."""
        return self._progress.answers.get(self._cheat().name, 0) < ENOUGH_FOR_THE_CHEAT or not self._trials.busy()

    def _end_the_jail(self) -> None:
        """Convicted for its computation, the cheat goes on as soon as it may, unless it has withheld by then."""
        cheat, now = self._cheat(), self._network.chain.timestamp()
        until = self._network.registry.info(cheat.node_key.address).jailed_until
        if 0 < until <= now and not self._withheld() and f"unjailed {until}" not in self._progress.told:
            with self._local.outbox(cheat.operator) as outbox:
                outbox.execute(self._network.registry.unjail(cheat.node_key.address), f"unjail:{until}")
            self._once(self._progress.told, f"unjailed {until}", "the cheat's operator ends its jail, and serves on")

    def _withheld(self) -> bool:
        """Whether the cheat did not hand over a transcript that was asked for."""
        return any(a.verdict == "withheld" or a.state == "challenged" for _, a in self._audits_of(self._cheat()))

    def _traffic_needed(self, asked: int) -> bool:
        """Whether the cheat has too few batches, or an honest node none to live by or to be accused of: then more
        questions are asked."""
        if asked < FIRST_QUESTIONS or self._trials.wants_an_honest_answer():
            return True
        committed = {name: 0 for name in self._names.values()}
        for event in self._committed():
            committed[self._names[event["node"]]] += 1
        cheat = self._cheat()
        if self._convicted(cheat) or self._network.registry.info(cheat.node_key.address).jailed_until:
            return any(not committed[node.name] for node in self._honest())
        return not self._withheld() or any(not committed[node.name] for node in self._honest())

    # the chain

    def _cheat(self) -> LocalNode:
        return next(node for node in self._local.nodes if node.degradation)

    def _honest(self) -> list[LocalNode]:
        return [node for node in self._local.nodes if not node.degradation]

    def _committed(self) -> list[dict[str, Any]]:
        return self._network.log.events("BatchCommitted", self._start_block)

    def _audits_of(self, node: LocalNode) -> Iterator[tuple[int, AuditRow]]:
        with open_store(self._local.directory / "watchtower") as store:
            nodes = {row.batch.id: row.batch.node for row in store.batches()}
            audits = store.audits()
        for audit in audits:
            if nodes.get(audit.batch_id) == node.node_key.address:
                yield audit.batch_id, audit

    def _convicted(self, node: LocalNode) -> bool:
        """Whether it was, for withholding."""
        found = self._network.log.events("BatchConvicted", self._start_block, topics=[None, _topic(node)])
        return any(event["judge"] == self._network.availability.address for event in found)

    def _over(self) -> bool:
        return not self._open_ends()

    def _open_ends(self) -> list[str]:
        """What still has to happen."""
        ends = []
        cheat = self._cheat()
        if not any(audit.verdict == "fraud" for _, audit in self._audits_of(cheat)):
            ends.append("the verdict on the cheat's weights")
        if not self._convicted(cheat):
            ends.append("the cheat's conviction for withholding")
        pending = [
            e["batch_id"] for e in self._committed() if self._network.log.status(e["batch_id"]) is BatchStatus.PENDING
        ]
        if pending:
            ends.append(f"finality of batches {pending}")
        ends += [f"{node.name}'s withdrawal" for node in self._honest() if not self._withdrew(node)]
        return ends + self._trials.open_ends()

    def _withdrew(self, node: LocalNode) -> bool:
        """Whether everything that the node has committed is final, collected, settled and paid out."""
        address = node.node_key.address
        vault = self._network.vault
        payers = [self._gateway()]
        fees = self._network.log.node_cum(address)
        return (
            bool(fees)
            and vault.earned(address) == 0
            and all(vault.settled(p, address) == fees for p in payers)
            and not any(
                vault.bucket(event["batch_id"], payer)
                for event in self._committed()
                if event["node"] == address
                for payer in payers
            )
        )

    def _gateway(self) -> Any:
        from poip_chain.chain.keys import development_key
        from poip_chain.cli.local.network import GATEWAY

        return development_key(GATEWAY).address

    def _tell_awaited(self) -> None:
        """Have the pulse say where things stand, and when the last window of a pending batch ends."""
        log = self._network.log
        committed = [log.batch_of(event) for event in self._committed()]
        states = {batch.id: log.status(batch.id) for batch in committed}
        counts = [f"{sum(s is state for s in states.values())} {state.name.lower()}" for state in BatchStatus if state]
        audits = [audit for node in self._local.nodes for _, audit in self._audits_of(node)]
        done = sum(bool(audit.verdict) for audit in audits)
        ends = [batch.window_end for batch in committed if states[batch.id] is BatchStatus.PENDING]
        self._pulse.wait_for(
            f"block {self._network.chain.block_number()}; {len(committed)} batches committed ({', '.join(counts)}), "
            f"{done} of {len(audits)} audits done; open: {', '.join(self._open_ends())}",
            seconds=max(ends) - self._network.chain.timestamp() if ends else None,
            until="the last window ends",
        )

    def _tell_chain(self) -> None:
        log, told = self._network.log, self._progress.told
        for event in self._committed():
            batch = log.batch_of(event)
            self._once(
                told,
                f"commit {batch.id}",
                f"batch {batch.id}: {self._names[batch.node]} commits "
                f"{batch.count} {'receipt' if batch.count == 1 else 'receipts'} worth "
                f"{format_amount(batch.total_fee)}, {format_amount(batch.lock)} of its stake locked",
            )
        for event in log.events("BatchFinal", self._start_block):
            number = event["batch_id"]
            if f"final {number}" not in told:
                self._once(told, f"final {number}", f"batch {number}: final, stake released{self._why_final(number)}")
        for event in log.events("BatchConvicted", self._start_block):
            self._once(
                told,
                f"convicted {event['batch_id']}",
                f"batch {event['batch_id']}: CONVICTED for {self._fault(event['judge'])}, "
                f"{self._names[event['node']]} loses "
                f"{format_amount(event['taken'])}, the watchtower gets {format_amount(event['paid'])}",
            )
        self._trials.step()
        for node in self._local.nodes:
            for batch_id, audit in self._audits_of(node):
                if audit.state == "challenged":
                    text = f"audit of batch {batch_id}, receipt {audit.position}: withheld, challenged on chain"
                    self._once(told, f"challenge {batch_id} {audit.position}", f"{text} ({node.name})")
                if audit.verdict:
                    self._once(told, f"audit {batch_id} {audit.position}", _audit_line(node, batch_id, audit))

    def _fault(self, judge: Any) -> str:
        return "withholding" if judge == self._network.availability.address else "wrong computation"

    def _why_final(self, batch_id: int) -> str:
        """Why a batch is final in which an audit found fraud; '' for any other."""
        found = (audit for node in self._local.nodes for number, audit in self._audits_of(node) if number == batch_id)
        if not any(audit.verdict == Verdict.FRAUD for audit in found):
            return ""
        return " (an audit's verdict of fraud is evidence, not a judgement: what the court decides is told apart)"

    def _once(self, told: set[str], key: str, text: str) -> None:
        if key not in told:
            told.add(key)
            self._tell(text)


def _topic(node: LocalNode) -> str:
    return "0x" + node.node_key.address[2:].lower().rjust(64, "0")


def _audit_line(node: LocalNode, batch_id: int, audit: AuditRow) -> str:
    line = f"audit of batch {batch_id}, receipt {audit.position} ({node.name}): {audit.verdict}"
    if "margin_sum" in audit.detail:
        detail = audit.detail
        line += (
            f" (over {detail['tokens']} tokens: margin {detail['margin_sum'] / 65536:.2f} logits, largest "
            f"{detail['margin_max'] / 65536:.2f}, fingerprint {detail['fingerprint_sum'] / 64:.1f} nat)"
        )
    return line
