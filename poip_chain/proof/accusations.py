"""What the watchtower remembers of its own accusations: claims with their salts and bonds, from before they are committed
until they are over, and why an answer that was found false is not accused.

A claim is stored whole, with its salt and its bond reserved, in one write before its commitment leaves: whatever happens
then, it can be revealed and answered for. How it stands on chain is asked of the chain. Knows nothing of the chain.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from poip_chain.proof.database import Database
from poip_chain.spec.objects import Batch
from poip_chain.spec.types import Address, Hash32


class AccusationState(StrEnum):
    """What became of an answer that was found false."""

    WAITING = "waiting"
    """Not accused yet, for a reason that may pass."""
    REFUSED = "refused"
    """Not accused, and not to be."""
    REPORTED = "reported"
    """It could be accused; the mode does not allow it."""
    STANDING = "standing"
    """Its claim is stored and its bond reserved or posted."""
    ENDED = "ended"
    """Over, or never committed. `reason` says how: Ending."""


class Ending(StrEnum):
    """How an accusation of ours ended."""

    CONVICTED = "convicted"
    STOOD = "stood"
    """It stood, and the batch had been convicted before."""
    EXPIRED = "expired"
    """It was not revealed in time."""
    LOST_BY_STEP = "lost by a step"
    """The referee contradicted this machine's canonical execution."""
    LOST_BY_TIME = "lost by time"
    DROPPED = "dropped"
    """It was never committed: the batch is gone or settled, or its window is over."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An accusation as it is stored before its commitment is sent.

    reveal: data of `Accusations.accuse` for the id 0; the id stands in the 32 bytes after the selector. prompt, output: all
    token ids of the answer. bond in wei, 0 where nothing is sent.
    """

    batch: Batch
    position: int
    accuser: Address
    commitment: Hash32
    salt: bytes = field(repr=False)
    reveal: bytes = field(repr=False)
    weights_root: bytes = field(repr=False)
    prompt: tuple[int, ...] = field(repr=False)
    output: tuple[int, ...] = field(repr=False)
    bond: int

    def reveal_of(self, accusation: int) -> bytes:
        """The data of the reveal, for the accusation's id on chain."""
        return self.reveal[:4] + accusation.to_bytes(32, "big") + self.reveal[36:]

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        return {
            "batch": self.batch.to_json(),
            "position": self.position,
            "accuser": self.accuser,
            "commitment": self.commitment.hex(),
            "salt": self.salt.hex(),
            "reveal": self.reveal.hex(),
            "weights_root": self.weights_root.hex(),
            "prompt": list(self.prompt),
            "output": list(self.output),
            "bond": str(self.bond),
        }

    @classmethod
    def from_json(cls, data: Any) -> Claim:
        """Parse `to_json`'s form."""
        return cls(
            batch=Batch.from_json(data["batch"]),
            position=int(data["position"]),
            accuser=Address(data["accuser"]),
            commitment=Hash32(bytes.fromhex(data["commitment"])),
            salt=bytes.fromhex(data["salt"]),
            reveal=bytes.fromhex(data["reveal"]),
            weights_root=bytes.fromhex(data["weights_root"]),
            prompt=tuple(data["prompt"]),
            output=tuple(data["output"]),
            bond=int(data["bond"]),
        )


@dataclass(frozen=True, slots=True)
class AccusationRow:
    """An answer found false. `attempt` counts its accusations from 0; `claim` is None unless one was stored.

    accusation: its id on chain as last seen; detail: numbers for people; ended_at: chain time, Unix seconds, 0 before.
    """

    batch_id: int
    position: int
    attempt: int
    state: AccusationState
    reason: str
    accusation: int | None
    claim: Claim | None
    detail: dict[str, Any]
    ended_at: int

    def to_json(self) -> dict[str, Any]:
        """For people: without salt and claim."""
        name = None if self.accusation is None else f"{self.accusation >> 32}-{self.accusation & (2**32 - 1)}"
        return {
            "batch": self.batch_id,
            "position": self.position,
            "attempt": self.attempt,
            "state": self.state,
            "reason": self.reason,
            "case": name,
            "bond": str(self.claim.bond) if self.claim is not None else "0",
            **self.detail,
        }


class AccusationStore(Database):
    """See the module's docstring."""

    @staticmethod
    def _accusation_bonds(db: sqlite3.Connection) -> int:
        rows = db.execute("SELECT bond FROM accusations WHERE state='standing'").fetchall()
        return sum(int(row["bond"]) for row in rows)

    def _standing(self, db: sqlite3.Connection) -> int:
        raise NotImplementedError

    def store_claim(self, claim: Claim, attempt: int, detail: dict[str, Any], budget: int | None) -> bool:
        """Store a claim and reserve its bond, unless all bonds that stand would exceed `budget` (None: no limit).

        False for want of budget, or if an accusation of the batch stands already.
        """
        with self._transaction() as db:
            standing = db.execute(
                "SELECT 1 FROM accusations WHERE batch_id=? AND state='standing'", (claim.batch.id,)
            ).fetchone()
            if standing is not None or (budget is not None and self._standing(db) + claim.bond > budget):
                return False
            db.execute(
                "INSERT OR REPLACE INTO accusations(batch_id,position,attempt,state,bond,claim,detail)"
                " VALUES(?,?,?,'standing',?,?,?)",
                (
                    *(claim.batch.id, claim.position, attempt, str(claim.bond)),
                    *(json.dumps(claim.to_json()), json.dumps(detail)),
                ),
            )
            return True

    def note_accusation(
        self,
        batch_id: int,
        position: int,
        attempt: int,
        state: AccusationState,
        reason: str,
        detail: dict[str, Any] | None = None,
    ) -> bool:
        """Keep why an answer is not accused; whether that is new. A claim that is stored already stays."""
        with self._transaction() as db:
            key = (batch_id, position, attempt)
            known = db.execute(
                "SELECT state, reason FROM accusations WHERE batch_id=? AND position=? AND attempt=?", key
            ).fetchone()
            if known is not None and (known["state"] in ("standing", "ended") or tuple(known) == (state, reason)):
                return False
            db.execute(
                "INSERT OR REPLACE INTO accusations(batch_id,position,attempt,state,reason,detail) VALUES(?,?,?,?,?,?)",
                (*key, state, reason, json.dumps(detail or {})),
            )
            return True

    def see_accusation(self, row: AccusationRow, accusation: int | None) -> None:
        """Remember the id under which an accusation stands on chain, for people."""
        if row.accusation != accusation:
            with self._transaction() as db:
                db.execute(
                    "UPDATE accusations SET accusation=? WHERE batch_id=? AND position=? AND attempt=?",
                    (None if accusation is None else str(accusation), row.batch_id, row.position, row.attempt),
                )

    def end_accusation(self, row: AccusationRow, ending: Ending, now: int) -> None:
        """An accusation is over, at `now` by chain time: its bond no longer stands."""
        with self._transaction() as db:
            db.execute(
                "UPDATE accusations SET state='ended', reason=?, ended_at=?"
                " WHERE batch_id=? AND position=? AND attempt=? AND state='standing'",
                (ending, now, row.batch_id, row.position, row.attempt),
            )

    def accusations(self, state: AccusationState | None = None, batch_id: int | None = None) -> list[AccusationRow]:
        """All, those of one state, or of one batch; oldest first."""
        rows = self._rows(
            "SELECT * FROM accusations WHERE (?1 IS NULL OR state=?1) AND (?2 IS NULL OR batch_id=?2)"
            " ORDER BY batch_id, position, attempt",
            state,
            batch_id,
        )
        return [
            AccusationRow(
                batch_id=row["batch_id"],
                position=row["position"],
                attempt=row["attempt"],
                state=AccusationState(row["state"]),
                reason=row["reason"],
                accusation=int(row["accusation"]) if row["accusation"] else None,
                claim=Claim.from_json(json.loads(row["claim"])) if row["claim"] else None,
                detail=json.loads(row["detail"]),
                ended_at=row["ended_at"],
            )
            for row in rows
        ]
