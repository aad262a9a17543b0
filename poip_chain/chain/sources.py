"""Finds the Vyper sources of the contracts: in a checkout, or inside the installed package.

It must not compile or read them; that is the work of its callers.
"""

from __future__ import annotations

from pathlib import Path

from poip_chain.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent.parent


def contracts_directory() -> Path:
    """The folder that holds token/, staking/ and the other folders of .vy files.

    A checkout keeps it beside the package, a wheel inside of it. The package's own copy is taken first, so
    that an installed package never picks up a stranger's folder named contracts. Raises
    `ConfigurationError` if there is neither.
    """
    for folder in (_PACKAGE / "contracts", _PACKAGE.parent / "contracts"):
        if (folder / "LICENSE").is_file():
            return folder
    raise ConfigurationError(
        f"No contract sources found in {_PACKAGE / 'contracts'} or {_PACKAGE.parent / 'contracts'}.",
        hint="Install poip-chain again: its wheel carries them, and so does a checkout.",
    )
