"""What a watchtower does on chain: challenges what is withheld, resolves what is not answered, files what a contract
judges, claims what it is owed.

Everything goes through the outbox under a key that names the transaction's content, so nothing is sent twice; a revert
because somebody else was faster is no failure. Without an outbox (modes watch and propose) nothing is sent. It never
waits for a transaction: what depends on one is done in a later round.
"""

from __future__ import annotations

from typing import Any

import structlog
from eth_hash.auto import keccak

from poip_chain.chain.outbox import Outbox, State
from poip_chain.chain.rpc import Call, Chain
from poip_chain.economic.clients.log import BEACON_TARGET_DISTANCE
from poip_chain.economic.network import Network
from poip_chain.errors import InsufficientFunds, Refused, TransactionFailed
from poip_chain.proof.audit import Finding, digest, write_proposal
from poip_chain.proof.cases import LossLimit, possible_loss
from poip_chain.proof.publication import Chunk
from poip_chain.proof.report import Report
from poip_chain.proof.settings import Mode, WatchtowerSettings
from poip_chain.proof.store import AuditRow, AuditState, BatchRow, Challenge, Filing, FilingState, WatchtowerStore
from poip_chain.spec.objects import Batch, audit_selection
from poip_chain.spec.types import Address

log = structlog.get_logger("watchtower")

RETRY_SECONDS = 2.0
FILING_ATTEMPTS = 6
CHALLENGE = "challenge"


class Actions:
    """See the module's docstring."""

    def __init__(
        self,
        settings: WatchtowerSettings,
        chain: Chain,
        network: Network,
        store: WatchtowerStore,
        outbox: Outbox | None,
    ) -> None:
        self._settings = settings
        self._chain = chain
        self._network = network
        self._store = store
        self._outbox = outbox if settings.mode is Mode.DEFEND else None

    @property
    def account(self) -> Address | None:
        """Who posts bonds; None if nobody does."""
        return None if self._outbox is None else self._outbox.address

    def step(self, now: int, followed_to: int, report: Report) -> None:
        """Move on what is under way. `now` is chain time, `followed_to` the block up to which events are known."""
        if self._outbox is None:
            return
        for challenge in self._store.challenges(standing=True):
            self._tend(challenge, now, followed_to, report)
        self._file(now, report)
        self._claim()
        self._outbox.step()

    # findings

    def found(self, batch: Batch | None, finding: Finding, report: Report) -> None:
        """Record a finding, once. One that a contract judges is sent by `step`, or written down where that is not
        allowed."""
        if finding.call is None:
            state = FilingState.EVIDENCE
        elif self._outbox is not None:
            state = FilingState.FOUND
        else:
            state = FilingState.PROPOSED
            if self._settings.mode is Mode.PROPOSE:
                write_proposal(self._settings.data / "proposals", finding)
        batch_id = None if batch is None else batch.id
        if self._store.add_filing(finding.key, batch_id, finding.kind, state, finding.detail, finding.call):
            report.add("offences")
            log.warning("offence", kind=finding.kind, filing=state.value, **finding.detail)

    def _file(self, now: int, report: Report) -> None:
        for filing in self._store.filings(FilingState.SENT):
            self._follow_filing(filing)
        # What was proposed before the mode was changed is filed as well, but for challenges, which have their own way.
        in_flight = {filing.batch_id for filing in self._store.filings(FilingState.SENT)} - {None}
        for filing in self._store.filings(FilingState.FOUND, FilingState.PROPOSED, due=now):
            if filing.call is None or filing.kind == CHALLENGE or filing.batch_id in in_flight:
                continue
            if self._moot(filing):
                continue
            if self._send(filing.call, filing.key):
                self._store.set_filing(filing.key, FilingState.SENT)
                report.add("filed")
                if filing.batch_id is not None:
                    in_flight.add(filing.batch_id)
            elif filing.attempts + 1 >= FILING_ATTEMPTS:
                self._store.set_filing(filing.key, FilingState.REFUSED)
            else:
                self._store.delay_filing(filing.key, now + RETRY_SECONDS * 2**filing.attempts)

    def _follow_filing(self, filing: Filing) -> None:
        assert self._outbox is not None
        state = self._outbox.status(filing.key).state
        if state is State.MINED:
            self._store.set_filing(filing.key, FilingState.DONE)
        elif state in (State.REVERTED, State.STOPPED) and not self._moot(filing):
            self._store.set_filing(filing.key, FilingState.REFUSED)

    def _moot(self, filing: Filing) -> bool:
        """Whether the batch has nothing more to lose; the filing is closed then."""
        row = None if filing.batch_id is None else self._store.batch(filing.batch_id)
        if row is None or row.status in ("pending", "removed"):
            return False
        log.info("filing is moot", kind=filing.kind, batch=filing.batch_id, status=row.status)
        self._store.set_filing(filing.key, FilingState.MOOT)
        return True

    # challenges

    def challenge(
        self, row: BatchRow, audit: AuditRow, chunk: Chunk, reason: str, now: int, report: Report
    ) -> str | None:
        """Challenge a chunk of a selected receipt's record, within the budgets. `now` is chain time.

        Why it is not challenged, where a limit of ours is the reason; None if it is, or a later round tries again.
        """
        draws = audit_selection(row.beacon or bytes(32), row.batch.id, row.batch.count, row.batch.audit_rate_ppm)
        call = self._network.availability.challenge(row.batch, draws.index(audit.position), *chunk)
        key = f"{CHALLENGE}:{row.batch.id}:{audit.position}:{int(chunk[0])}:{chunk[1]}:{digest(call)}"
        where = {"node": row.batch.node, "batch": row.batch.id, "position": audit.position}
        if self._outbox is None:
            self.found(row.batch, Finding(key, CHALLENGE, call, {**where, "reason": reason}), report)
            return None
        # As the contract takes it: today's, not that of the batch's revision.
        bond = self._network.parameters.value("availability_bond")
        known = self._store.challenges(audit.batch_id, audit.position, standing=True)
        ours = [challenge for challenge in known if challenge.chunk == chunk]
        if any(c.sent_key is not None and self._outbox.known(c.sent_key) for c in ours):
            return None  # under way since a round that was cut short
        loss = LossLimit(row.batch.node, self._settings.losable(), now - self._settings.loss_period)
        if not ours:
            refused = self._over_a_limit(row.batch.id, audit.position, bond, loss, report)
            if refused is not None:
                log.warning(refused, bond=str(bond), **where)
                return refused
        ready = [self._beacon_submitted(row.batch), self._approved(bond)]
        if not all(ready):
            return None
        place = (row.batch.id, audit.position, chunk)
        # A challenge that reverted for a passing reason may be sent anew: each try has its own key.
        key = f"{key}:{audit.attempts}"
        if not self._store.reserve_bond(*place, bond, self._settings.bond_budget, key, loss=loss):
            return None
        if not self._send(call, key):
            # Somebody else's challenge of the same leaves serves as well as ours; anything else is tried again.
            self._store.release_bond(*place)
            return None
        log.warning("challenged", reason=reason, **where)
        self._store.move_audit(row.batch.id, audit.position, AuditState.FETCH, AuditState.CHALLENGED)
        report.add("challenged")
        return None

    def _over_a_limit(self, batch_id: int, position: int, bond: int, loss: LossLimit, report: Report) -> str | None:
        """What keeps a new challenge from being filed, None if nothing does."""
        if self._store.bonds_standing() + bond > self._settings.bond_budget:
            report.add("over_budget")
            return "not challenged: bond budget exhausted"
        if self._store.losses(loss.node, loss.since) + possible_loss(bond) > loss.amount:
            report.add("over_loss_budget")
            return f"not challenged: loss budget of node {loss.node} used"
        if not self._store.may_ask(batch_id, position):
            report.add("not_sampled")
            return f"not challenged: not in the sample of what node {loss.node} withholds in this batch"
        return None

    def target_block(self, batch: Batch) -> int:
        """The block whose mixHash is the batch's beacon, unless the contract says otherwise."""
        target = batch.block_number + self._network.parameters.value_at("beacon_delay", batch.parameters_version)
        head = self._chain.block_number()
        while head - target > BEACON_TARGET_DISTANCE:
            target += BEACON_TARGET_DISTANCE
        return target

    def _beacon_submitted(self, batch: Batch) -> bool:
        """Whether the contract has the batch's beacon; if not, it is sent, and a later round goes on."""
        if self._network.log.beacon_of(batch) is not None:
            return True
        target = self.target_block(batch)
        header = self._chain.raw_header(target)
        self._send(self._network.log.submit_beacon(header), f"beacon:{target}:{keccak(header).hex()[:16]}")
        return False

    def _approved(self, bond: int) -> bool:
        """Whether the contract may take a bond beside those on their way; if not, the budget is approved, and a later
        round goes on."""
        assert self._outbox is not None
        availability = self._network.availability.address
        waiting = sum(c.bond for c in self._store.challenges(standing=True) if c.state == "reserved")
        if self._network.token.allowance(self._outbox.address, availability) >= waiting + bond:
            return True
        self._send_unless_open("approve", self._network.token.approve(availability, self._settings.bond_budget))
        return False

    def _tend(self, challenge: Challenge, now: int, followed_to: int, report: Report) -> None:
        """Move on a challenge that stands: ours that waits for its block, or anybody's that is open."""
        row = self._store.batch(challenge.batch_id)
        if row is None:
            return
        if challenge.state == "reserved":
            self._tend_reserved(challenge, row, followed_to)
            return
        if challenge.bond and self._ended_in(challenge, State.REVERTED, State.STOPPED):
            self._store.lost_race(challenge.batch_id, challenge.position, challenge.chunk)
        over = challenge.deadline is not None and now > challenge.deadline
        if challenge.challenge_id is not None and row.status != "removed" and (over or row.status == "convicted"):
            # Refused if it was answered at the last moment, or resolved by somebody else: the next round reads which.
            call = self._network.availability.resolve(challenge.challenge_id, row.batch)
            if self._send(call, f"resolve:{challenge.challenge_id}:{digest(call)}"):
                report.add("resolved")

    def _tend_reserved(self, challenge: Challenge, row: BatchRow, followed_to: int) -> None:
        """Give a reservation up whose transaction came too late, never came, or opened something else."""
        assert self._outbox is not None
        place = (challenge.batch_id, challenge.position, challenge.chunk)
        sent = challenge.sent_key is not None and self._outbox.known(challenge.sent_key)
        if sent and not self._ended_in(challenge, State.REVERTED, State.STOPPED):
            receipt = self._outbox.status(challenge.sent_key or "").receipt
            # Mined and followed, but not under this receipt: the beacon changed in a reorganisation.
            if receipt is None or receipt.block_number > followed_to:
                return
        elif not sent:
            audits = self._store.audits(AuditState.FETCH, challenge.batch_id)
            if row.status == "pending" and any(audit.position == challenge.position for audit in audits):
                return
        self._store.release_bond(*place)
        self._store.move_audit(challenge.batch_id, challenge.position, AuditState.CHALLENGED, AuditState.FETCH)

    def _ended_in(self, challenge: Challenge, *states: State) -> bool:
        assert self._outbox is not None
        key = challenge.sent_key
        return key is not None and self._outbox.known(key) and self._outbox.status(key).state in states

    # money

    def _claim(self) -> None:
        """Fetch bonds and rewards that the contracts hold for us."""
        assert self._outbox is not None
        if self._network.availability.claimable(self._outbox.address):
            self._send_unless_open("claim", self._network.availability.claim())
        if self._network.registry.rewards(self._outbox.address):
            self._send_unless_open("reward", self._network.registry.claim_reward())

    def _send_unless_open(self, purpose: str, call: Call) -> None:
        """Send a call that may be due again and again, but only one at a time."""
        assert self._outbox is not None
        waiting = [t for t in self._outbox.transactions() if t.state is State.OPEN]
        if not any(t.idempotency_key.startswith(f"{purpose}:") for t in waiting):
            self._send(call, f"{purpose}:{self._chain.block_number()}")

    def _send(self, call: Call, key: str) -> bool:
        """Hand a transaction to the outbox; False if it would fail now."""
        assert self._outbox is not None
        details: dict[str, Any] = {"call": call.description, "key": key}
        try:
            self._outbox.send(call, key)
        except InsufficientFunds as error:
            log.error("cannot pay", reason=str(error), **details)
            return False
        except (TransactionFailed, Refused) as error:
            log.info("not sent", reason=str(error), **details)
            return False
        return True
