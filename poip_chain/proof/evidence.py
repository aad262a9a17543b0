"""Evidence files: everything that somebody else needs to repeat an audit, in one JSON document.

A file holds the committed record (request, receipt, transcript), where it stands in its batch, and the numbers that the
audit found. `reproduce` names the command that recomputes them from the file and a copy of the model alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.economic.profiles import profile_from_json, profile_to_json
from poip_chain.errors import InvalidInput
from poip_chain.proof.fetch import NodeWithholds, Record, checked_record
from poip_chain.spec.eip712 import parse_hex
from poip_chain.spec.merkle import verify_proof
from poip_chain.spec.objects import Batch, Profile
from poip_chain.spec.strict_json import parse_json

VERSION = 1
MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Evidence:
    """One audited receipt. `receipt_proof` proves it into the batch at `position`; `result` is a verdict's JSON."""

    chain_id: int
    log: str
    batch: Batch
    position: int
    receipt_proof: list[bytes]
    profile: Profile
    record: Record
    result: dict[str, Any]

    def write(self, path: Path) -> Path:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "version": VERSION,
            "reproduce": f"poip audit run --evidence {path.name} --model <directory of the model>",
            "chain_id": self.chain_id,
            "log": self.log,
            "batch": self.batch.to_json(),
            "position": self.position,
            "receipt_proof": ["0x" + node.hex() for node in self.receipt_proof],
            "profile": profile_to_json(self.profile),
            "record": self.record.to_json(),
            "result": self.result,
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """Read a file and check that record, receipt and batch belong together. Raises InvalidInput."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidInput(f"{path} is larger than {MAX_FILE_BYTES} bytes; it is no evidence file.")
            data = parse_json(path.read_bytes())
            if data["version"] != VERSION:
                raise InvalidInput(f"{path} has version {data['version']!r}; this program reads version {VERSION}.")
            evidence = cls(
                chain_id=_integer(data["chain_id"], "chain_id"),
                log=str(data["log"]),
                batch=Batch.from_json(data["batch"]),
                position=_integer(data["position"], "position"),
                receipt_proof=[parse_hex(node, "receipt_proof", 32) for node in data["receipt_proof"]],
                profile=profile_from_json(data["profile"]),
                record=Record.from_json(data["record"]),
                result=dict(data["result"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InvalidInput(f"{path} is not an evidence file: {error!r}.") from error
        try:
            checked_record(evidence.record, evidence.record.receipt)
        except NodeWithholds as error:
            raise InvalidInput(f"{path}: the record does not belong together: {error}") from error
        leaf = evidence.record.receipt.struct_hash()
        batch = evidence.batch
        if not verify_proof(batch.root, [leaf], [evidence.position], batch.count, evidence.receipt_proof):
            raise InvalidInput(f"{path}: the receipt is not at position {evidence.position} of batch {batch.id}.")
        return evidence


def _integer(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise InvalidInput(f"{name} must be a whole number, not {value!r:.60}.")
    return value
