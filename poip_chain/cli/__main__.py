"""`python -m poip_chain.cli` is `poip`."""

from __future__ import annotations

from poip_chain.cli.main import main

if __name__ == "__main__":
    main()
