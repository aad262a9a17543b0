"""What a watchtower needs to know. Values only: no chain, network or database access here.

Sources, the later wins: defaults, a TOML file, the environment (POIP_WATCHTOWER_*).
"""

from __future__ import annotations

import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from poip_chain.errors import ConfigurationError
from poip_chain.service.court.settings import CourtSettings
from poip_chain.spec.strict_json import parse_json_object

ENVIRONMENT_PREFIX = "POIP_WATCHTOWER_"
PATHS = ("deployment", "data", "key", "password_file")
NOT_FROM_ENVIRONMENT = ("models", "engine_urls")


class Mode(StrEnum):
    """How far a watchtower goes on its own."""

    WATCH = "watch"
    """Check and report; never prepare a transaction."""
    PROPOSE = "propose"
    """Also write each transaction that it would send as a file for a person to send; send nothing."""
    DEFEND = "defend"
    """Send them, within the bond budget and each node's loss budget."""


class WatchtowerPlace(BaseModel):
    """Where a watchtower keeps its files: all that a tool needs that looks at them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: Path = Path("~/.poip/watchtower")


class WatchtowerSettings(BaseModel):
    """Settings of one watchtower. Times in seconds, money in wei of the network's token."""

    model_config = ConfigDict(extra="forbid")

    rpc_url: str
    deployment: Path
    data: Path = Field(Path("~/.poip/watchtower"), description="directory of the databases and evidence files")
    key: Path | None = Field(
        None,
        description="keystore v3 of the account that posts bonds; needed in mode defend. In mode propose its address alone "
        "is read: accusations are proposed for it",
    )
    password_file: Path | None = None
    mode: Mode = Mode.WATCH
    bond_budget: int = Field(
        0, ge=0, description="most that may stand in bonds of challenges and accusations at one time, wei"
    )
    loss_budget: int | None = Field(
        None,
        ge=0,
        description="most that answers of one node may take of bonds within loss_period, wei; a quarter of bond_budget"
        " if it is not set: what is taken if all of it stands against one node and is answered once",
    )
    loss_period: int = Field(86_400, ge=1, description="seconds after which a challenge's cost no longer counts")
    models: list[Path] = Field(default_factory=list, description="prepared model directories to re-execute with")
    engine_urls: dict[str, str] = Field(
        default_factory=dict,
        description="model id (0x-hex) -> vLLM server to re-execute with instead of torch",
    )
    poll_interval: float = Field(1.0, gt=0)
    confirmations: int = Field(0, ge=0, description="blocks to wait before a batch is believed")
    node_timeout: float = Field(10.0, gt=0, description="for one question to a node, however slowly it answers")
    private_endpoints: bool | None = Field(
        None, description="read from nodes on private addresses; default: only on development chains (id 31337)"
    )
    fetch_attempts: int = Field(
        3, ge=1, description="tries before a node that does not serve is challenged; one in the window's second half"
    )
    audits_per_round: int = Field(64, ge=1, description="receipts fetched and re-executed in one round at most")
    torch_threads: int = Field(1, ge=1)
    court: CourtSettings = Field(
        CourtSettings(),
        description="section: accusing what was found false, and contesting false accusations of answers that are held"
        " (docs/court.md); the model's directory is needed there only if it is not under models",
    )
    metrics_port: int | None = Field(None, ge=1, le=65535, description="Prometheus metrics on this port of 127.0.0.1")

    def losable(self) -> int:
        """The loss budget of each node, wei."""
        return self.bond_budget // 4 if self.loss_budget is None else self.loss_budget

    @field_validator("deployment", "data", "key", "password_file")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()


def load_settings(path: Path) -> WatchtowerSettings:
    """Settings from a TOML file and the environment. Relative paths in the file are relative to the file.

    Raises ConfigurationError.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the settings file {path}: {error}.") from error
    for name in PATHS:
        if isinstance(values.get(name), str):
            values[name] = path.parent / Path(values[name]).expanduser()
    if isinstance(values.get("models"), list):
        values["models"] = [path.parent / Path(str(model)).expanduser() for model in values["models"]]
    court = values.get("court")
    if isinstance(court, dict) and isinstance(court.get("model"), str):
        court["model"] = path.parent / Path(court["model"]).expanduser()
    for name in WatchtowerSettings.model_fields:
        text = os.environ.get(ENVIRONMENT_PREFIX + name.upper())
        if text is not None and name not in NOT_FROM_ENVIRONMENT:
            values[name] = parse_json_object(text.encode()) if name == "court" else text
    try:
        return WatchtowerSettings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(
            f"the watchtower's settings are not usable: {faults}.",
            hint=f"Set them in the TOML file or as {ENVIRONMENT_PREFIX}NAME.",
        ) from error
