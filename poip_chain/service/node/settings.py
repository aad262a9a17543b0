"""What an inference node needs to know. Values only: no chain, network or database access here.

Sources, the later wins: defaults, a TOML file, the environment (POIP_NODE_*), values given by the caller.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from poip_chain.errors import ConfigurationError
from poip_chain.service.court.settings import CourtSettings
from poip_chain.spec.strict_json import parse_json_object

ENVIRONMENT_PREFIX = "POIP_NODE_"


class NodeSettings(BaseModel):
    """Settings of one node. Times in seconds, money in wei of the network's token, prices in wei per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpc_url: str = "http://127.0.0.1:8545"
    deployment: Path = Field(Path("~/.poip/deployment.json"), description="deployment file that `poip deploy` wrote")
    data: Path = Field(Path("~/.poip/node"), description="directory of the databases; for one node process at a time")
    key: Path = Field(Path("~/.poip/keys/node.json"), description="keystore v3 file of the node key")
    outbox: Path | None = Field(
        None, description="directory of the key's outbox; default: outbox in the data directory"
    )
    password_file: Path | None = Field(None, description="password of the key; else POIP_PASSWORD or a prompt")
    node: str | None = Field(None, description="the node's name: its first node key; default: this key's address")

    host: str = "127.0.0.1"
    port: int = Field(8700, ge=0, le=65535)
    endpoint: str | None = Field(None, description="public URL, written into batches; default: http://host:port")

    engine_url: str = "http://127.0.0.1:8000"
    engine_model: str = Field("poip", description="the model's name at the engine")
    model_id: str | None = Field(None, description="0x-hex; default: the node's only offer in the registry")
    input_price: int | None = Field(None, ge=0, description="default: from the node's offer")
    output_price: int | None = Field(None, ge=0, description="default: from the node's offer")
    capacity: int = Field(16, ge=1, le=4096, description="requests that may run at the same time")

    credit_limit: int | None = Field(
        None,
        ge=0,
        description="most a payer with history may owe in vouchers, running requests included; default: twice capacity "
        "full contexts",
    )
    new_client_credit: int | None = Field(
        None,
        ge=0,
        description="most a payer that never paid may cost; 0: prepaid only; default: credit_limit, else capacity full "
        "contexts",
    )
    max_prepaid: int | None = Field(
        None, ge=0, description="most that vouchers may run ahead of receipts; default: 1000 full contexts"
    )
    escrow_cache: float = Field(
        1.0, ge=0, description="how long a payer's escrow and the node's free stake, once read, are believed"
    )

    stall_timeout: float = Field(60.0, gt=0, description="silence of the engine after which a request has failed")
    heartbeat: float = Field(5.0, gt=0)
    body_timeout: float = Field(20.0, gt=0, description="time a client has to send its request")

    batch_count: int = Field(256, ge=1, le=65_536, description="a batch is committed when it has this many receipts")
    batch_age: float = Field(60.0, ge=0, description="or when its oldest receipt is this old")
    voucher_patience: float = Field(
        3600.0, ge=0, description="how long after commitment a batch waits for vouchers that are still missing"
    )
    withdraw_threshold: int | None = Field(
        None, ge=1, description="earnings are withdrawn to the payout address from this amount on; default: on demand"
    )
    confirmations: int = Field(0, ge=0, le=256, description="blocks before an event is believed")
    finality_blocks: int = Field(
        3, ge=0, le=128, description="blocks after which a payment is believed for good; views are asked that far back"
    )
    poll_interval: float = Field(1.0, gt=0)
    retry_delay: float = Field(5.0, ge=0, description="first wait before a failed transaction is tried again")
    transcript_retention: float = Field(30 * 86_400.0, ge=0, description="how long transcripts are kept after finality")
    startup_timeout: float = Field(120.0, gt=0, description="how long to wait for chain and engine at the start")
    rpc_timeout: float = Field(10.0, gt=0)

    court: CourtSettings = Field(
        CourtSettings(), description="section: how the node defends itself against accusations (docs/court.md)"
    )

    misbehave: str = Field(
        "none",
        description="FOR TESTS AND THE DEMO ONLY. withhold_after=N serves N audited transcripts and hides all later "
        "ones, which costs the node its stake; contest contests every accusation to the last step with a false trace, "
        "right ones too, which it loses; both, separated by a comma",
    )

    @field_validator("misbehave")
    @classmethod
    def _known_misbehaviour(cls, value: str) -> str:
        if not re.fullmatch(r"none|contest|withhold_after=\d{1,9}(,contest)?", value):
            raise ValueError("must be 'none', 'withhold_after=N', 'contest' or 'withhold_after=N,contest'")
        return value

    @field_validator("model_id")
    @classmethod
    def _hash(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"0x[0-9a-fA-F]{64}", value):
            raise ValueError("must be 0x and 64 hex digits")
        return value

    @field_validator("deployment", "data", "key", "outbox", "password_file")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @property
    def withhold_after(self) -> int | None:
        """How many audited transcripts are served before the node starts to hide them; None for an honest node."""
        withheld = re.match(r"withhold_after=(\d+)", self.misbehave)
        return int(withheld[1]) if withheld else None

    @property
    def contests_everything(self) -> bool:
        """Whether accusations are contested with a false trace."""
        return self.misbehave.endswith("contest")

    @property
    def public_endpoint(self) -> str:
        """The URL at which others reach this node."""
        return self.endpoint or f"http://{self.host}:{self.port}"


def load_settings(path: Path | None, **given: Any) -> NodeSettings:
    """Settings from a TOML file, the environment and `given` (None values are ignored). Relative paths in the file are
    relative to the file. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"cannot read the settings file {path}: {error}.") from error
        for name in ("deployment", "data", "key", "outbox", "password_file"):
            if isinstance(values.get(name), str):
                values[name] = path.parent / values[name]
        court = values.get("court")
        if isinstance(court, dict) and isinstance(court.get("model"), str):
            court["model"] = path.parent / Path(court["model"]).expanduser()
    for name in NodeSettings.model_fields:
        if (text := os.environ.get(ENVIRONMENT_PREFIX + name.upper())) is not None:
            values[name] = parse_json_object(text.encode()) if name == "court" else text
    values.update({name: value for name, value in given.items() if value is not None})
    try:
        return NodeSettings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(
            f"the node's settings are not usable: {faults}.",
            hint=f"Set them in the TOML file or as {ENVIRONMENT_PREFIX}NAME.",
        ) from error
