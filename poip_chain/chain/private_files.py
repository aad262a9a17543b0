"""Files that only their owner may read: databases with prompts, answers, signatures and what is to be sent.

Knows nothing of what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE_FILE, PRIVATE_DIRECTORY = 0o600, 0o700


def prepare_private(path: Path) -> None:
    """Make sure that `path` exists with mode 0600 before anything is written to it.

    SQLite gives the files beside a database (-wal, -shm, -journal) the database's own mode, but creates the database as
    the umask says. Its directory is made with 0700 where it is missing; one that is there is left to whoever made it.
    SQLite's name for a database in memory is no file. Raises OSError.
    """
    if str(path) == ":memory:":
        return
    directory = path.parent
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    for name in ("", "-wal", "-shm"):
        file = path.with_name(path.name + name)
        if file.exists():  # from a version that left them readable
            file.chmod(PRIVATE_FILE)
