"""Launcher of a gateway. All the work is in poip_chain.control.gateway."""

from __future__ import annotations

import sys

from poip_chain.control.gateway.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
