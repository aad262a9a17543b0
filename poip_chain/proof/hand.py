"""Who makes the watchtower's moves in the court: its account, through `service.court.sending.Sender`, or a person, who
finds each transaction as a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from poip_chain.chain.rpc import Call
from poip_chain.service.court.sending import Progress
from poip_chain.spec.types import Address


class Hand(Protocol):
    """What `Sender` does: each job once. `refused` says why a job could not be done the last time."""

    refused: dict[str, str]

    @property
    def address(self) -> Address:
        """Whose moves these are."""

    def step(self) -> None:
        """Push what is under way. Raises Unavailable."""

    def progress(self, job: str) -> Progress:
        """How a job stands."""

    def ensure(self, job: str, call: Callable[[], Call], *, again: bool = False) -> Progress:
        """Move a job on. Raises Unavailable."""


class Proposer:
    """Writes each transaction into `directory`, once, for a person with the account `address` to look at and send."""

    def __init__(self, directory: Path, address: Address) -> None:
        self._directory, self._address = directory, address
        self.refused: dict[str, str] = {}

    @property
    def address(self) -> Address:
        """Who is to send them."""
        return self._address

    def step(self) -> None:
        """Nothing is under way here."""

    def progress(self, job: str) -> Progress:
        """Never known: the chain shows what was sent."""
        return Progress.NONE

    def ensure(self, job: str, call: Callable[[], Call], *, again: bool = False) -> Progress:
        """Write the transaction, unless its file is there."""
        path = self._directory / (job.replace(":", "-") + ".json")
        if not path.exists():
            proposed = call()
            document = {
                "from": self._address,
                "to": proposed.to,
                "data": "0x" + proposed.data.hex(),
                "description": proposed.description,
            }
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1) + "\n")
            temporary.replace(path)
        return Progress.NONE
