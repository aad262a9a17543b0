"""What the watchtower has at stake or under way on chain: challenges with their bonds, answers to them, filings.

A bond is reserved before its transaction is sent, so the budgets hold over a kill in between. What challenges cost is
not booked apart but read from the challenges themselves, so it follows the chain through a reorganisation. A filing
carries its transaction from the moment it is found, so whatever happens, a later round sends it. Knows nothing of the
chain.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from poip_chain.chain.rpc import Call
from poip_chain.proof.accusations import AccusationStore
from poip_chain.proof.publication import Answer, Chunk
from poip_chain.spec.objects import Part
from poip_chain.spec.types import Address

STANDING = "('reserved','open')"
ASKED_FREELY = 2
"""Receipts of one batch that are challenged as they come up; of the others that are withheld, a sample."""
SAMPLE_DIVISOR = 4
"""The sample: this part of a batch's withheld receipts, rounded up, beside ASKED_FREELY."""
SAMPLE_SECRET = "sample_secret"


def possible_loss(bond: int) -> int:
    """What an answer costs its challenger, wei: the share of the bond that Availability.answer credits to the node."""
    return bond // 4


@dataclass(frozen=True, slots=True)
class LossLimit:
    """At most `amount` (wei) for answers of one node to challenges that stand or whose deadline is not before `since`.

    A deadline is never before its answer, so no more than `amount` is lost in any period as long as the one from
    `since` to the clock.
    """

    node: Address
    amount: int
    since: int


class FilingState(StrEnum):
    """How far a finding is."""

    FOUND = "found"
    """To be sent."""
    PROPOSED = "proposed"
    """Told to a person, not sent: the mode does not allow it."""
    EVIDENCE = "evidence"
    """Nothing that a contract judges yet; the evidence is kept."""
    SENT = "sent"
    DONE = "done"
    """Its transaction is mined."""
    MOOT = "moot"
    """There is nothing left to win: the batch is final, was convicted by somebody else, or is gone."""
    REFUSED = "refused"
    """The contract refused it again and again."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenge of one chunk. `bond` is ours alone (0 for somebody else's), `sent_key` our outbox's key for it."""

    batch_id: int
    position: int
    chunk: Chunk
    challenge_id: int | None
    bond: int
    state: str
    deadline: int | None
    sent_key: str | None

    def to_json(self) -> dict[str, Any]:
        """For people: the bond as a decimal string of wei."""
        part, first_leaf = self.chunk
        return {
            "batch_id": self.batch_id,
            "position": self.position,
            "part": part.name.lower(),
            "first_leaf": first_leaf,
            "challenge_id": self.challenge_id,
            "bond": str(self.bond),
            "state": self.state,
            "deadline": self.deadline,
        }


@dataclass(frozen=True, slots=True)
class Filing:
    """A finding with the transaction that proves it; `call` None where no contract judges it."""

    key: str
    batch_id: int | None
    kind: str
    state: FilingState
    detail: dict[str, Any]
    call: Call | None
    attempts: int

    def to_json(self) -> dict[str, Any]:
        """For people: without the transaction."""
        return {
            "key": self.key,
            "batch_id": self.batch_id,
            "kind": self.kind,
            "state": self.state,
            "detail": self.detail,
        }


class CaseStore(AccusationStore):
    """See the module's docstring."""

    # challenges and bonds

    def reserve_bond(
        self,
        batch_id: int,
        position: int,
        chunk: Chunk,
        bond: int,
        budget: int,
        sent_key: str | None = None,
        *,
        loss: LossLimit,
    ) -> bool:
        """Reserve `bond` for a challenge unless the bonds that stand would exceed `budget`, or the answers `loss`.

        True if it is reserved, now or by an earlier call; False for want of either budget, or if the chunk is
        challenged already. `loss.node` is the batch's node, and the batch is known.
        """
        with self._transaction() as db:
            key = (batch_id, position, _chunk_text(chunk))
            known = db.execute(
                "SELECT state FROM challenges WHERE batch_id=? AND position=? AND chunk=?", key
            ).fetchone()
            if known is not None:
                if known["state"] != "reserved":
                    return False
                db.execute(
                    "UPDATE challenges SET sent_key=? WHERE batch_id=? AND position=? AND chunk=?", (sent_key, *key)
                )
                return True
            if self._standing(db) + bond > budget:
                return False
            if self._at_risk(db, loss.node, loss.since) + possible_loss(bond) > loss.amount:
                return False
            db.execute("INSERT INTO challenges VALUES(?,?,?,NULL,?,'reserved',NULL,?)", (*key, str(bond), sent_key))
            return True

    def _standing(self, db: sqlite3.Connection) -> int:
        rows = db.execute(f"SELECT bond FROM challenges WHERE state IN {STANDING}").fetchall()
        return sum(int(row["bond"]) for row in rows) + self._accusation_bonds(db)

    def bonds_standing(self) -> int:
        """What is reserved or posted in bonds of challenges and accusations, wei."""
        with self._lock:
            return self._standing(self._db)

    @staticmethod
    def _at_risk(db: sqlite3.Connection, node: Address, since: int) -> int:
        rows = db.execute(
            "SELECT bond FROM challenges JOIN batches ON batches.id=batch_id WHERE node=? AND bond<>'0'"
            f" AND (challenges.state IN {STANDING} OR (challenges.state='answered' AND deadline>=?))",
            (node, since),
        ).fetchall()
        return sum(possible_loss(int(row["bond"])) for row in rows)

    def losses(self, node: Address, since: int) -> int:
        """What answers of `node` took, or still may take, of bonds of ours, wei (see LossLimit)."""
        with self._lock:
            return self._at_risk(self._db, node, since)

    def losses_by_node(self) -> dict[Address, int]:
        """What answers took of bonds of ours so far, wei, by node."""
        taken: dict[Address, int] = {}
        for row in self._rows(
            "SELECT node, bond FROM challenges JOIN batches ON batches.id=batch_id"
            " WHERE challenges.state='answered' AND bond<>'0' ORDER BY batch_id"
        ):
            node = Address(row["node"])
            taken[node] = taken.get(node, 0) + possible_loss(int(row["bond"]))
        return taken

    def may_ask(self, batch_id: int, position: int) -> bool:
        """Whether a withheld receipt is challenged: one of the first of its batch, or in the sample of the others.

        One that is not answered for convicts the batch, so more bonds win nothing from a node that stays silent; from
        one that answers, they only take longer to run out. The sample hangs on a secret that is drawn once, so a
        node cannot know which receipts it may withhold unasked.
        """
        with self._transaction() as db:
            rows = db.execute(
                "SELECT DISTINCT position FROM challenges WHERE batch_id=? AND bond<>'0'", (batch_id,)
            ).fetchall()
            asked = {row["position"] for row in rows}
            if position in asked or len(asked) < ASKED_FREELY:
                return True
            db.execute("INSERT OR IGNORE INTO notes VALUES(?,?)", (SAMPLE_SECRET, secrets.token_hex(16)))
            secret = db.execute("SELECT value FROM notes WHERE name=?", (SAMPLE_SECRET,)).fetchone()["value"]
            rows = db.execute(
                "SELECT position FROM audits WHERE batch_id=? AND state='fetch' AND attempts>0", (batch_id,)
            ).fetchall()
        withheld = asked | {row["position"] for row in rows} | {position}

        def place(other: int) -> bytes:
            return hashlib.sha256(f"{secret}:{batch_id}:{other}".encode()).digest()

        rank = sum(place(other) < place(position) for other in withheld)
        return rank < ASKED_FREELY + -(-len(withheld) // SAMPLE_DIVISOR)

    def release_bond(self, batch_id: int, position: int, chunk: Chunk) -> None:
        """Drop a reservation whose transaction was never accepted."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM challenges WHERE batch_id=? AND position=? AND chunk=? AND state='reserved'",
                (batch_id, position, _chunk_text(chunk)),
            )

    def lost_race(self, batch_id: int, position: int, chunk: Chunk) -> None:
        """Somebody else's challenge stands and ours reverted: no bond of ours is in it."""
        with self._transaction() as db:
            db.execute(
                "UPDATE challenges SET bond='0' WHERE batch_id=? AND position=? AND chunk=?",
                (batch_id, position, _chunk_text(chunk)),
            )

    def open_challenge(
        self, batch_id: int, position: int, chunk: Chunk, challenge_id: int, deadline: int, bond: int | None = None
    ) -> None:
        """A challenge is on chain. `bond` if it is ours; None for somebody else's, beside which a reservation of ours
        stands until its own transaction has failed."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO challenges VALUES(?1,?2,?3,?4,COALESCE(?5,'0'),'open',?6,NULL) ON CONFLICT DO UPDATE SET"
                " challenge_id=?4, state='open', deadline=?6, bond=COALESCE(?5,bond)",
                (batch_id, position, _chunk_text(chunk), challenge_id, None if bond is None else str(bond), deadline),
            )

    def close_challenge(self, challenge_id: int, state: str) -> Challenge | None:
        """A challenge ended: answered or resolved. The challenge, None if it is not known."""
        return self._move_challenge(challenge_id, state)

    def reopen_challenge(self, challenge_id: int) -> Challenge | None:
        """A reorganisation took a challenge's end away."""
        return self._move_challenge(challenge_id, "open")

    def _move_challenge(self, challenge_id: int, state: str) -> Challenge | None:
        with self._transaction() as db:
            db.execute("UPDATE challenges SET state=? WHERE challenge_id=?", (state, challenge_id))
            row = db.execute("SELECT * FROM challenges WHERE challenge_id=?", (challenge_id,)).fetchone()
            return None if row is None else _challenge(row)

    def unchallenge(self, challenge_id: int) -> None:
        """A reorganisation took a challenge away: what we sent waits again, what others sent is forgotten."""
        with self._transaction() as db:
            db.execute("DELETE FROM challenges WHERE challenge_id=? AND sent_key IS NULL", (challenge_id,))
            db.execute(
                "UPDATE challenges SET state='reserved', challenge_id=NULL, deadline=NULL WHERE challenge_id=?",
                (challenge_id,),
            )

    def challenges(
        self, batch_id: int | None = None, position: int | None = None, *, standing: bool = False
    ) -> list[Challenge]:
        """All challenges, those of one receipt, or those that stand (reserved or open)."""
        rows = self._rows(
            "SELECT * FROM challenges WHERE (?1 IS NULL OR batch_id=?1) AND (?2 IS NULL OR position=?2)"
            + (f" AND state IN {STANDING}" if standing else "")
            + " ORDER BY batch_id, position, chunk",
            batch_id,
            position,
        )
        return [_challenge(row) for row in rows]

    def add_answer(self, challenge: Challenge, answer: Answer) -> None:
        """Keep what was published on chain."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO answers VALUES(?,?,?,?)",
                (
                    challenge.batch_id,
                    challenge.position,
                    _chunk_text(challenge.chunk),
                    json.dumps(answer.to_json()),
                ),
            )

    def drop_answer(self, challenge: Challenge) -> None:
        """A reorganisation took an answer away."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM answers WHERE batch_id=? AND position=? AND chunk=?",
                (challenge.batch_id, challenge.position, _chunk_text(challenge.chunk)),
            )

    def answers(self, batch_id: int, position: int) -> dict[Chunk, Answer]:
        """What was published on chain of one receipt's record, by chunk."""
        rows = self._rows("SELECT * FROM answers WHERE batch_id=? AND position=?", batch_id, position)
        return {_parse_chunk(row["chunk"]): Answer.from_json(json.loads(row["answer"])) for row in rows}

    # filings

    def add_filing(
        self, key: str, batch_id: int | None, kind: str, state: FilingState, detail: dict[str, Any], call: Call | None
    ) -> bool:
        """Record a finding once; False if it is known already."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO filings(key,batch_id,kind,state,detail,call) VALUES(?,?,?,?,?,?)",
                (key, batch_id, kind, state, json.dumps(detail), None if call is None else _call_text(call)),
            )
            return cursor.rowcount == 1

    def set_filing(self, key: str, state: FilingState) -> None:
        """Move a filing on."""
        with self._transaction() as db:
            db.execute("UPDATE filings SET state=? WHERE key=?", (state, key))

    def delay_filing(self, key: str, until: float) -> None:
        """Count a refusal and try again after `until` (chain time, Unix seconds)."""
        with self._transaction() as db:
            db.execute("UPDATE filings SET attempts=attempts+1, next_try=? WHERE key=?", (until, key))

    def filings(self, *states: FilingState, due: float | None = None) -> list[Filing]:
        """All filings, or those in some states, oldest first; `due`: those alone whose next try is not later."""
        marks = ",".join("?" * len(states))
        rows = self._rows(
            "SELECT * FROM filings WHERE 1"
            + (f" AND state IN ({marks})" if states else "")
            + ("" if due is None else " AND next_try<=?")
            + " ORDER BY rowid",
            *states,
            *(() if due is None else (due,)),
        )
        return [
            Filing(
                key=row["key"],
                batch_id=row["batch_id"],
                kind=row["kind"],
                state=FilingState(row["state"]),
                detail=json.loads(row["detail"]),
                call=_parse_call(row["call"]) if row["call"] else None,
                attempts=row["attempts"],
            )
            for row in rows
        ]


def _challenge(row: sqlite3.Row) -> Challenge:
    return Challenge(
        batch_id=row["batch_id"],
        position=row["position"],
        chunk=_parse_chunk(row["chunk"]),
        challenge_id=row["challenge_id"],
        bond=int(row["bond"]),
        state=row["state"],
        deadline=row["deadline"],
        sent_key=row["sent_key"],
    )


def _chunk_text(chunk: Chunk) -> str:
    return f"{int(chunk[0])}:{chunk[1]}"


def _parse_chunk(text: str) -> Chunk:
    part, first_leaf = text.split(":")
    return Part(int(part)), int(first_leaf)


def _call_text(call: Call) -> str:
    return json.dumps({"to": call.to, "data": call.data.hex(), "description": call.description})


def _parse_call(text: str) -> Call:
    data = json.loads(text)
    return Call(Address(data["to"]), bytes.fromhex(data["data"]), data["description"])
