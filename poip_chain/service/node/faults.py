"""Crash points: named places where a test may have the process killed, as if the power had gone.

They do nothing unless POIP_ALLOW_CRASH_POINTS=1 and POIP_CRASH_AT names the place ("name", or "name:3" for its third
passage). The kill is SIGKILL: no handler runs, nothing is flushed. Every name is in CRASH_POINTS; tests/integration/
test_node_kill_matrix.py goes through all of them.
"""

from __future__ import annotations

import os
import signal
import threading

CRASH_POINTS = (
    "admitted",
    "first_token",
    "mid_stream",
    "before_sign",
    "inside_sign",
    "after_sign",
    "after_release",
    "after_voucher",
    "batch_composed",
    "commit_sent",
    "commit_mined",
    "before_finalize",
    "finalize_sent",
    "finalised",
    "collect_sent",
    "settle_sent",
    "settled",
)

_passages: dict[str, int] = {}
_lock = threading.Lock()


def crash_point(name: str) -> None:
    """Kill this process here if the environment asks for it. `name` is one of CRASH_POINTS."""
    if os.environ.get("POIP_ALLOW_CRASH_POINTS") != "1":
        return
    wanted, _, count = os.environ.get("POIP_CRASH_AT", "").partition(":")
    if wanted != name:
        return
    with _lock:
        _passages[name] = _passages.get(name, 0) + 1
        if _passages[name] == int(count or "1"):
            os.kill(os.getpid(), signal.SIGKILL)
