"""`python -m poip_chain.proof --config FILE`: one watchtower as a process, without the rest of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from poip_chain.errors import PoipError, Unavailable
from poip_chain.proof.app import run
from poip_chain.proof.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 ended by a signal, 1 refused or failed, 3 chain not reachable."""
    parser = argparse.ArgumentParser(prog="poip_chain.proof", description="Run a watchtower.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file; POIP_WATCHTOWER_* variables override it")
    given = parser.parse_args(arguments)
    try:
        run(load_settings(given.config))
    except PoipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Unavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
