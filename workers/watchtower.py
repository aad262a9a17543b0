"""Launcher of a watchtower. All the work is in poip_chain.proof."""

from __future__ import annotations

import sys

from poip_chain.proof.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
