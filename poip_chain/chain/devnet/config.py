"""What a development chain is started with. Knows no EVM and does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eth_account import Account
from eth_account.hdaccount.mnemonic import Mnemonic
from eth_account.signers.local import LocalAccount

from poip_chain.chain.keys import DEVELOPMENT_MNEMONIC
from poip_chain.errors import ConfigurationError

CHAIN_ID = 31337
BLOCK_GAS_LIMIT = 60_000_000
WEI_PER_ETHER = 10**18
MAX_BLOCK_TIME = 3_600.0

Backend = Literal["embedded", "anvil"]


@dataclass(frozen=True, slots=True)
class DevnetConfig:
    """Settings of one development chain; invalid ones raise ConfigurationError.

    port            TCP port, 0..65535; 0 lets the system choose one (see `ready_file`).
    database        SQLite file that keeps the chain; None keeps it in memory only.
    block_time      seconds from one block to the next, empty blocks too; None seals none by the clock.
    automine        seal a block with every transaction, at once.
    balance         wei that each of the `accounts` keys of `mnemonic` (path m/44'/60'/0'/0/i) starts with.
    gas_limit       of every block.
    ready_file      receives the URL, one line, when requests are answered.
    """

    host: str = "127.0.0.1"
    port: int = 8545
    database: Path | None = None
    block_time: float | None = 1.0
    automine: bool = False
    chain_id: int = CHAIN_ID
    mnemonic: str = DEVELOPMENT_MNEMONIC
    accounts: int = 10
    balance: int = 10_000 * WEI_PER_ETHER
    gas_limit: int = BLOCK_GAS_LIMIT
    backend: Backend = "embedded"
    ready_file: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port {self.port} is not between 0 and 65535.")
        if self.block_time is not None and not 0 < self.block_time <= MAX_BLOCK_TIME:
            raise ConfigurationError(
                f"a block time of {self.block_time} seconds is not between 0 and {MAX_BLOCK_TIME:.0f}.",
                hint="Ask for automine, or give the seconds between two blocks.",
            )
        if self.automine and self.block_time is not None:
            raise ConfigurationError("automine and a block time exclude each other.", hint="Choose one of the two.")
        if not 1 <= self.chain_id < 2**53:
            raise ConfigurationError(f"chain id {self.chain_id} is not between 1 and 2**53.")
        if not 0 <= self.accounts <= 1000:
            raise ConfigurationError(f"{self.accounts} accounts were asked for; 0 to 1000 are possible.")
        if not 0 <= self.balance < 2**128:
            raise ConfigurationError(f"a balance of {self.balance} wei is not between 0 and 2**128.")
        if not 1_000_000 <= self.gas_limit < 2**63:
            raise ConfigurationError(f"a block gas limit of {self.gas_limit} is below 1,000,000 or too large.")
        if self.backend not in ("embedded", "anvil"):
            raise ConfigurationError(f"backend {self.backend!r} does not exist.", hint="Choose 'embedded' or 'anvil'.")
        if not Mnemonic().is_mnemonic_valid(self.mnemonic):
            raise ConfigurationError("the mnemonic is no valid BIP-39 phrase of English words.")


def development_accounts(mnemonic: str, count: int) -> tuple[LocalAccount, ...]:
    """The first `count` keys of a mnemonic, at m/44'/60'/0'/0/i as every development chain has them."""
    Account.enable_unaudited_hdwallet_features()
    return tuple(Account.from_mnemonic(mnemonic, account_path=f"m/44'/60'/0'/0/{index}") for index in range(count))
