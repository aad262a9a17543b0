"""Settings: defaults, a TOML file, the environment and flags; the later wins, and each value knows where it came from.

Common settings stand at the top of the file; each program has its section:

    rpc_url = "http://127.0.0.1:8545"
    [node]
    port = 8700

The environment has the same names: POIP_RPC_URL, POIP_NODE_PORT. Relative paths in the file are relative to the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from poip_chain.errors import ConfigurationError

M = TypeVar("M", bound=BaseModel)

MAX_FILE_BYTES = 1024 * 1024
SECTIONS = ("node", "gateway", "watchtower", "devnet", "engine", "demo")
"""Sections that programs read from the file."""
SHARED = ("rpc_url", "deployment")
"""Common settings that a section takes over unless it sets them itself."""


class CommonSettings(BaseModel):
    """What every command needs. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(Path("~/.poip"), description="directory of keys, databases and the deployment file")
    rpc_url: str = Field("http://127.0.0.1:8545", description="JSON-RPC endpoint of the chain")
    rpc_timeout: float = Field(10.0, gt=0, le=600, description="limit of one RPC call")
    deployment: Path | None = Field(None, description="deployment file; default: deployment.json in the data directory")
    transaction_timeout: float = Field(120.0, gt=0, description="how long a command waits for a transaction")
    max_fee_gwei: float = Field(500.0, gt=0, description="never pay more for one unit of gas")

    @property
    def deployment_path(self) -> Path:
        """The deployment file."""
        return self.deployment or self.data / "deployment.json"

    @property
    def keys(self) -> Path:
        """The directory of key files."""
        return self.data / "keys"


@dataclass(frozen=True)
class Effective(Generic[M]):
    """Validated settings with the source of each field: 'flag', 'environment NAME', 'file PATH' or 'default'."""

    values: M
    sources: dict[str, str]


def load_common(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Effective[CommonSettings]:
    """The common settings. `config` None: POIP_CONFIG, else poip.toml in the data directory if there is one.

    Raises ConfigurationError with all faults at once.
    """
    values, sources = _collect(CommonSettings, "", _common_file(config, flags or {}), flags or {}, {})
    effective = _validate(CommonSettings, "", values, sources)
    data = Path(effective.values.data).expanduser().absolute()
    return Effective(effective.values.model_copy(update={"data": data}), effective.sources)


def load_section(
    model: type[M], section: str, config: Path | None = None, flags: Mapping[str, Any] | None = None
) -> Effective[M]:
    """The settings of one program: its section of the file, POIP_<SECTION>_<NAME>, and flags (None: not given).

    Fields named in SHARED are taken from the common settings where nothing else sets them.
    Raises ConfigurationError with all faults at once.
    """
    values, sources = collect(model, section, config, flags)
    return _validate(model, section, values, sources)


def collect(
    model: type[BaseModel], section: str, config: Path | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `load_section` validates: the values that are set anywhere, and the source of every field."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    common = load_common(config, {name: value for name, value in given.items() if name in CommonSettings.model_fields})
    shared = {
        "rpc_url": (common.values.rpc_url, common.sources["rpc_url"]),
        "deployment": (common.values.deployment_path, common.sources["deployment"]),
    }
    fallback = {name: entry for name, entry in shared.items() if name in model.model_fields}
    # --data names the common directory; a program's own `data` is a setting of its section.
    own = {name: value for name, value in given.items() if name != "data" and name in model.model_fields}
    return _collect(model, section, _common_file(config, given), own, fallback)


def _common_file(config: Path | None, flags: Mapping[str, Any]) -> Path | None:
    if config is None and os.environ.get("POIP_CONFIG"):
        config = Path(os.environ["POIP_CONFIG"])
    if config is not None:
        if not config.is_file():
            raise ConfigurationError(
                f"there is no settings file {config}.",
                hint='The README has an example (under "Node operators"); `poip config node` lists a node\'s settings, and '
                "`poip config gateway` and `poip config watchtower` those of the others.",
            )
        return config
    data = Path(flags.get("data") or os.environ.get("POIP_DATA") or "~/.poip").expanduser()
    default = data / "poip.toml"
    return default if default.is_file() else None


def _collect(
    model: type[BaseModel],
    section: str,
    file: Path | None,
    flags: Mapping[str, Any],
    fallback: Mapping[str, tuple[Any, str]],
) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    sources: dict[str, str] = dict.fromkeys(model.model_fields, "default")
    for name, (value, source) in fallback.items():
        values[name], sources[name] = value, source
    for name, value in _from_file(model, section, file).items():
        values[name], sources[name] = value, f"file {file}"
    prefix = f"POIP_{section.upper()}_" if section else "POIP_"
    for name, value in _from_environment(model, prefix).items():
        values[name], sources[name] = value, f"environment {prefix}{name.upper()}"
    for name, value in flags.items():
        if value is not None:
            values[name], sources[name] = value, "flag"
    return values, sources


def _validate(model: type[M], section: str, values: dict[str, Any], sources: dict[str, str]) -> Effective[M]:
    try:
        validated = model.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_faults(error, section, values, sources), hint="`poip config` shows all.") from None
    return Effective(validated, sources)


def _faults(error: ValidationError, section: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in ((section,) if section else ()) + tuple(fault["loc"]))
        name = str(fault["loc"][0]) if fault["loc"] else ""
        source = sources.get(name, "")
        given = f" = {values[name]!r}" if name in values else ""
        origin = f" (from {source})" if source and source != "default" else ""
        lines.append(f"{path}{given}{origin}: {fault['msg']}")
    return "the settings are not usable: " + "; ".join(lines) + "."


def _from_file(model: type[BaseModel], section: str, file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"the settings file {file} is too large.")
        body = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the settings file {file}: {error}.") from error
    if section:
        chosen = body.get(section, {})
        if not isinstance(chosen, dict):
            raise ConfigurationError(f"[{section}] in {file} must be a section.")
    else:
        chosen = {name: value for name, value in body.items() if not (name in SECTIONS and isinstance(value, dict))}
    _resolve_paths(model, chosen, file.parent)
    return chosen


def _resolve_paths(model: type[BaseModel], chosen: dict[str, Any], folder: Path) -> None:
    """Make the paths of a section, and of the tables in it, relative to the file's folder."""
    for name, field in model.model_fields.items():
        value, kind = chosen.get(name), field.annotation
        if isinstance(value, str) and _is_path(kind):
            chosen[name] = folder / Path(value).expanduser()
        elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
            _resolve_paths(kind, value, folder)


def _is_path(annotation: Any) -> bool:
    return annotation is Path or Path in get_args(annotation)


def _from_environment(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    """The environment's values for a model's fields, lists and tables as JSON, by pydantic-settings' own rules."""
    fields: dict[str, Any] = {name: (field.annotation, None) for name, field in model.model_fields.items()}
    from pydantic import create_model

    class Reader(BaseSettings):
        model_config = SettingsConfigDict(extra="ignore", env_prefix=prefix, protected_namespaces=())

    reader = create_model(f"{model.__name__}Environment", __base__=Reader, **fields)
    source: PydanticBaseSettingsSource = EnvSettingsSource(reader, env_prefix=prefix)
    try:
        return {name: value for name, value in source().items() if name in model.model_fields}
    except Exception as error:
        # pydantic-settings raises its own error for a value that is no JSON.
        raise ConfigurationError(f"a {prefix}... variable cannot be read: {error}.") from error
