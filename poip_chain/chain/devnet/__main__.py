"""`python -m poip_chain.chain.devnet`: the node as a subprocess for tests and scripts."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from poip_chain.chain.devnet.config import BLOCK_GAS_LIMIT, CHAIN_ID, DevnetConfig
from poip_chain.chain.devnet.server import run
from poip_chain.errors import PoipError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit status: 0 after a signal, 1 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m poip_chain.chain.devnet", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8545, help="0 for any free port")
    parser.add_argument("--db", type=Path, help="SQLite file that keeps the chain (default: memory)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--block-time", type=float, default=1.0, help="seconds between blocks (default 1)")
    pace.add_argument("--automine", action="store_true", help="seal each transaction at once")
    pace.add_argument("--no-mining", action="store_true", help="seal only when asked to")
    parser.add_argument("--chain-id", type=int, default=CHAIN_ID)
    parser.add_argument("--gas-limit", type=int, default=BLOCK_GAS_LIMIT)
    parser.add_argument("--backend", choices=["embedded", "anvil"], default="embedded")
    parser.add_argument("--ready-file", type=Path, help="gets the URL once requests are answered")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(
            DevnetConfig(
                host=options.host,
                port=options.port,
                database=options.db,
                block_time=None if options.automine or options.no_mining else options.block_time,
                automine=options.automine,
                chain_id=options.chain_id,
                gas_limit=options.gas_limit,
                backend=options.backend,
                ready_file=options.ready_file,
            )
        )
    except PoipError as error:
        print(f"devnet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
