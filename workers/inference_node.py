"""Launcher of an inference node. All the work is in poip_chain.service.node."""

from __future__ import annotations

import sys

from poip_chain.service.node.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
