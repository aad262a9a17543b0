"""Audit one record: every rule of protocol section 6, then re-execution, then a verdict with its numbers.

The rules come from spec/offences.py, the scores from scoring.py. Here they become findings that a contract can judge,
and evidence that a person can reproduce. Nothing here follows the chain or sends anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poip_chain.chain.rpc import Call
from poip_chain.economic.network import Network
from poip_chain.errors import ConfigurationError
from poip_chain.proof.evidence import Evidence
from poip_chain.proof.fetch import Record
from poip_chain.proof.reexecution import LogitSource
from poip_chain.proof.scoring import Judgement, judge
from poip_chain.proof.store import Observed
from poip_chain.spec.eip712 import Domain, parse_hex
from poip_chain.spec.merkle import merkle_proof
from poip_chain.spec.objects import Batch, Profile, Receipt
from poip_chain.spec.offences import Fault, receipt_fault, sequence_fault, transcript_faults
from poip_chain.spec.scores import Verdict
