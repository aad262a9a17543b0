"""The node's database: tables, and the records read from them. SQL and plain values only.

Amounts are decimal text, because SQLite integers end at 63 bits. Signed columns can be neither changed nor deleted: the
triggers below refuse it, whatever the program above them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from poip_chain.spec.objects import Batch, Receipt, Voucher
from poip_chain.spec.types import Address

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE IF NOT EXISTS key_limits(key TEXT PRIMARY KEY, next_seq INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS receipts(
    seq INTEGER PRIMARY KEY,
    request_hash BLOB NOT NULL UNIQUE,
    struct_hash BLOB NOT NULL UNIQUE,
    payer TEXT NOT NULL,
    fee TEXT NOT NULL,
    payer_cum TEXT NOT NULL,
    node_cum TEXT NOT NULL,
    profile_version INTEGER NOT NULL,
    receipt TEXT NOT NULL,
    signature BLOB NOT NULL,
    first_seq INTEGER REFERENCES batches(first_seq));
CREATE INDEX IF NOT EXISTS receipts_payer ON receipts(payer, seq);
CREATE INDEX IF NOT EXISTS receipts_batch ON receipts(first_seq, seq);
CREATE TRIGGER IF NOT EXISTS receipts_fixed BEFORE UPDATE OF
    seq, request_hash, struct_hash, payer, fee, payer_cum, node_cum, profile_version, receipt, signature ON receipts
    BEGIN SELECT RAISE(ABORT, 'a signed receipt never changes'); END;
CREATE TRIGGER IF NOT EXISTS receipts_kept BEFORE DELETE ON receipts
    BEGIN SELECT RAISE(ABORT, 'a signed receipt is never deleted'); END;

CREATE TABLE IF NOT EXISTS transcripts(
    seq INTEGER PRIMARY KEY REFERENCES receipts(seq), request TEXT NOT NULL, request_signature BLOB NOT NULL,
    params TEXT NOT NULL, transcript BLOB NOT NULL);

CREATE TABLE IF NOT EXISTS payers(payer TEXT PRIMARY KEY, paid TEXT NOT NULL, receipt_hash BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS vouchers(
    payer TEXT NOT NULL, receipt_hash BLOB NOT NULL, cumulative TEXT NOT NULL, signature BLOB NOT NULL,
    PRIMARY KEY(payer, receipt_hash));

CREATE TABLE IF NOT EXISTS batches(
    first_seq INTEGER PRIMARY KEY, count INTEGER NOT NULL, total_fee TEXT NOT NULL, root BLOB NOT NULL,
    model_id BLOB NOT NULL, profile_version INTEGER NOT NULL, composed_at INTEGER NOT NULL,
    state TEXT NOT NULL, batch_id INTEGER, batch TEXT, ended_at INTEGER);
CREATE INDEX IF NOT EXISTS batches_id ON batches(batch_id);
CREATE INDEX IF NOT EXISTS batches_state ON batches(state, first_seq);
CREATE TRIGGER IF NOT EXISTS batches_fixed BEFORE UPDATE OF
    first_seq, count, total_fee, root, model_id, profile_version ON batches
    BEGIN SELECT RAISE(ABORT, 'the composition of a batch never changes'); END;

CREATE TABLE IF NOT EXISTS collections(
    first_seq INTEGER NOT NULL REFERENCES batches(first_seq), payer TEXT NOT NULL,
    low TEXT NOT NULL, high TEXT NOT NULL, state TEXT NOT NULL, PRIMARY KEY(first_seq, payer));
CREATE INDEX IF NOT EXISTS collections_state ON collections(state, payer, first_seq);

CREATE TABLE IF NOT EXISTS attempts(
    job TEXT PRIMARY KEY, number INTEGER NOT NULL, failures INTEGER NOT NULL, not_before REAL NOT NULL);

CREATE TABLE IF NOT EXISTS duties(
    kind TEXT NOT NULL, id INTEGER NOT NULL, batch_id INTEGER NOT NULL, seq INTEGER NOT NULL, part INTEGER NOT NULL,
    first_leaf INTEGER NOT NULL, deadline INTEGER NOT NULL, state TEXT NOT NULL, PRIMARY KEY(kind, id));

CREATE TABLE IF NOT EXISTS served(seq INTEGER PRIMARY KEY);
"""


class BatchState(StrEnum):
    """Where a batch stands. REMOVED commitments go back to COMPOSED."""

    COMPOSED = "composed"
    COMMITTED = "committed"
    FINAL = "final"
    CONVICTED = "convicted"


class CollectionState(StrEnum):
    """Where the money of one payer in one batch stands."""

    DUE = "due"
    """Nothing, or only a part, was collected; more may be."""
    COLLECTED = "collected"
    """In the vault's bucket for this batch; nothing more can be collected."""
    SETTLED = "settled"
    """Earned."""
    VOID = "void"
    """Never will be paid: the batch was convicted, or the payer moved on without paying it."""


class DutyKind(StrEnum):
    """What the chain may ask of a node."""

    CHALLENGE = "challenge"
    DEMAND = "demand"


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """A signed receipt. `first_seq` names its batch, None while it is in none."""

    receipt: Receipt
    signature: bytes
    profile_version: int
    first_seq: int | None


@dataclass(frozen=True, slots=True)
class Record:
    """Everything about an answer but its receipt, as stored: JSON texts, and the transcript's JSON packed by zlib."""

    request: str
    request_signature: bytes
    params: str
    transcript: bytes


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch as composed, and as the chain has it (None while it is not committed)."""

    first_seq: int
    count: int
    total_fee: int
    root: bytes
    model_id: bytes
    profile_version: int
    composed_at: int
    state: BatchState
    batch: Batch | None


@dataclass(frozen=True, slots=True)
class Uncommitted:
    """Receipts that lock no stake yet: the fees of each batch composed, and of the `loose_count` receipts in none."""

    batch_fees: tuple[int, ...]
    loose_fees: int
    loose_count: int


@dataclass(frozen=True, slots=True)
class StoredVoucher:
    """A payer's voucher and its signature."""

    voucher: Voucher
    signature: bytes


@dataclass(frozen=True, slots=True)
class Collection:
    """The interval (low, high] of a payer's running total that a batch holds, in wei."""

    first_seq: int
    payer: Address
    low: int
    high: int
    state: CollectionState


@dataclass(frozen=True, slots=True)
class Duty:
    """A challenge or demand that waits for this node. deadline in chain time; seq is the receipt asked about."""

    kind: DutyKind
    id: int
    batch_id: int
    seq: int
    part: int
    first_leaf: int
    deadline: int
