"""What a node has signed, read from its database by others: by the command that gives it a new key.

Reads only, also while the node runs; knows nothing of chains.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from poip_chain.errors import ConfigurationError
from poip_chain.spec.types import Address


@dataclass(frozen=True, slots=True)
class Issued:
    """`next_seq`: one above the highest number that was signed. `running`: a process holds the database and may sign on."""

    next_seq: int
    running: bool


def issued(path: Path, *, node: Address, chain_id: int, log: Address) -> Issued | None:
    """What the database `path` says; None if there is none, or it is of another node, chain or log.

    Raises ConfigurationError if it is there and cannot be read.
    """
    if not path.is_file():
        return None
    # Asked first: a node that starts in between is only taken for stopped if it had signed nothing then.
    running = _is_held(path.with_suffix(".lock"))
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
            meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
            next_seq = int(db.execute("SELECT coalesce(max(seq) + 1, 0) FROM receipts").fetchone()[0])
    except sqlite3.Error as error:
        raise ConfigurationError(
            f"the node's database {path} cannot be read: {error}.",
            hint="It says which numbers are signed. Run this as the user of the node, or name another --data.",
        ) from error
    identity = {"node": str(node), "chain_id": str(chain_id), "log": str(log)}
    if any(meta.get(name) != value for name, value in identity.items()):
        return None
    return Issued(next_seq, running)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock file, as `Store` does."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigurationError(f"{lock} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
