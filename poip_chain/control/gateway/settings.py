"""What a gateway needs to know. Values only: no chain, network or database access here.

`poip gateway run` reads them from the [gateway] section of the settings file, POIP_GATEWAY_* and flags; a program that
embeds the gateway makes a GatewaySettings itself, or calls `load_settings`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from poip_chain.errors import ConfigurationError

ENVIRONMENT_PREFIX = "POIP_GATEWAY_"


class ModelEntry(BaseModel):
    """A model that the gateway serves: the name that clients use, and the directory with its tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128)
    directory: Path
    model_id: str | None = Field(
        None, pattern="^0x[0-9a-fA-F]{64}$", description="default: computed from the directory, weights included"
    )
    profile_version: int | None = Field(None, ge=1, description="default: the newest that may be served")


class GatewayPlace(BaseModel):
    """Where a gateway keeps its files: all that a tool needs that looks at them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: Path = Path("~/.poip/gateway")


class GatewaySettings(BaseModel):
    """Settings of one gateway. Times in seconds, money in wei of the network's token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpc_url: str
    deployment: Path = Field(description="deployment file that `poip deploy` wrote")
    data: Path = Field(
        Path("~/.poip/gateway"), description="directory of gateway.db, the ledger and the outbox; one process at a time"
    )
    key: Path = Field(
        Path("~/.poip/keys/gateway.json"), description="keystore v3 file of the key that signs requests and pays"
    )
    password_file: Path | None = Field(None, description="password of the key; else POIP_PASSWORD or a prompt")
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="models served, each with its directory")

    host: str = "127.0.0.1"
    port: int = Field(8800, ge=0, le=65535)
    require_api_key: bool = Field(True, description="false: anyone who reaches the port spends this key's escrow")
    private_endpoints: bool | None = Field(
        None, description="call nodes on private addresses; default: only on development chains (id 31337)"
    )

    default_max_tokens: int = Field(256, ge=1, description="where a client names no limit")
    max_body_bytes: int = Field(2 * 2**20, ge=1024, le=2**26)
    body_timeout: float = Field(20.0, gt=0, description="time a client has to send its request")
    max_concurrent: int = Field(64, ge=1, le=4096, description="requests that may run at the same time")
    max_attempts: int = Field(3, ge=1, le=16, description="nodes that are asked for one request")
    heartbeat: float = Field(5.0, gt=0, description="silence after which a stream gets a comment line")

    request_lifetime: float = Field(300.0, ge=5, le=86_400, description="from signing to the request's deadline")
    connect_timeout: float = Field(5.0, gt=0)
    first_token_timeout: float = Field(60.0, gt=0)
    token_timeout: float = Field(30.0, gt=0, description="silence within an answer")
    receipt_wait: float = Field(5.0, ge=0, description="wait for the receipt of an answer that a stop string ended")
    refresh_interval: float = Field(10.0, gt=0, description="between looks at registry and nodes")
    settle_interval: float = Field(5.0, gt=0, description="between rounds of settling what streams left open")
    rpc_timeout: float = Field(10.0, gt=0)
    startup_timeout: float = Field(120.0, gt=0, description="how long to wait for the chain at the start")

    escrow_per_node: int = Field(0, ge=0, description="target for each usable node; 0: deposit nothing by itself")
    escrow_low_water: int | None = Field(None, ge=0, description="top up below this; default: half the target")
    escrow_total: int | None = Field(None, ge=0, description="most that all deposits together may hold; default: none")
    escrow_thaw_after: float = Field(7 * 86_400.0, gt=0, description="unused for so long: escrow is taken back")
    allow_prepaid: bool = Field(True, description="pay a request's maximum in advance where a node demands it")

    @field_validator("data", "key", "deployment", "password_file")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()


def load_settings(path: Path | None, **given: Any) -> GatewaySettings:
    """Settings from a TOML file (its [gateway] section if it has one), the environment and `given` (None: ignored).

    Relative paths in the file are relative to the file; lists in the environment are JSON. Raises ConfigurationError
    with all faults at once.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"cannot read the settings file {path}: {error}.") from error
        values = values.get("gateway", values)
        for name in ("deployment", "data", "key", "password_file"):
            if isinstance(values.get(name), str):
                values[name] = path.parent / values[name]
        for entry in values.get("models") or ():
            if isinstance(entry, dict) and isinstance(entry.get("directory"), str):
                entry["directory"] = path.parent / entry["directory"]
    for name in GatewaySettings.model_fields:
        if (text := os.environ.get(ENVIRONMENT_PREFIX + name.upper())) is not None:
            values[name] = _list(text) if name == "models" else text
    values.update({name: value for name, value in given.items() if value is not None})
    try:
        return GatewaySettings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(
            f"the gateway's settings are not usable: {faults}.",
            hint=f"Set them in the TOML file or as {ENVIRONMENT_PREFIX}NAME.",
        ) from error


def _list(text: str) -> Any:
    try:
        return TypeAdapter(list[Any]).validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"{ENVIRONMENT_PREFIX}MODELS must be a JSON list.") from error
