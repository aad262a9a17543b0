"""Model directories: check them, compute the hashes that name the model, and remember the result.

`prepare(directory)` takes any local safetensors directory of a supported architecture; `prepare_default(directory)`
first builds the default model, SmolLM2-135M-Instruct, from a package of the Python index. Knows files and spec/;
nothing of chains, nodes or engines. Never runs code from a model: pickled weights are refused, safetensors are only
read.

    tokenizer_hash      Merkle root over the tokenizer's files, sorted by name; leaf = name || 0x00 || keccak(file)
    chat_template_hash  keccak of the template in UTF-8 (of the empty string where there is none)

The hashes are kept beside the model in `poip-model.json` with each file's size and time of change: a second `prepare`
is instant, and recomputes if a file has changed. `verify` recomputes always.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eth_hash.auto import keccak

from poip_chain.errors import IntegrityError, InvalidInput, PoipError, UnsupportedModel
from poip_chain.spec import architecture
from poip_chain.spec.merkle import merkle_root
from poip_chain.spec.objects import ModelConfig, ModelSpec
from poip_chain.spec.rope_scaling import RopeScaling
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Hash32

Progress = Callable[[str], None]

RECORD = "poip-model.json"
RECORD_FORMAT = 1
MAX_JSON_BYTES = 64 << 20
"""Bound of config and tokenizer files: the largest tokenizers in use have about 20 MB."""

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class ModelHashes:
    """What names a model, and what a profile of it needs. end_token_ids are the checkpoint's own, ascending."""

    weights_root: Hash32
    tokenizer_hash: Hash32
    chat_template_hash: Hash32
    config: ModelConfig
    end_token_ids: tuple[int, ...]

    @property
    def config_hash(self) -> Hash32:
        """keccak of the dimensions."""
        return self.config.config_hash()

    @property
    def spec(self) -> ModelSpec:
        """The object whose hash is the model's id."""
        return ModelSpec(self.weights_root, self.tokenizer_hash, self.chat_template_hash, self.config_hash)

    @property
    def model_id(self) -> Hash32:
        """The model's name on chain."""
        return self.spec.model_id()

    def to_json(self) -> dict[str, Any]:
        """JSON form, hashes as 0x-hex; `from_json` reads it back."""
        config = {k: _hex(v) if isinstance(v, bytes) else v for k, v in asdict(self.config).items()}
        return {
            "model_id": _hex(self.model_id),
            "weights_root": _hex(self.weights_root),
            "tokenizer_hash": _hex(self.tokenizer_hash),
            "chat_template_hash": _hex(self.chat_template_hash),
            "config_hash": _hex(self.config_hash),
            "config": config,
            "end_token_ids": list(self.end_token_ids),
        }

    @classmethod
    def from_json(cls, data: Any) -> ModelHashes:
        """Parse `to_json`'s form. Raises InvalidInput if it is malformed or its model_id is not that of its parts."""
        try:
            config = dict(data["config"])
            config["rope_scaling_hash"] = _unhex(config["rope_scaling_hash"])
            hashes = cls(
                weights_root=_unhex(data["weights_root"]),
                tokenizer_hash=_unhex(data["tokenizer_hash"]),
                chat_template_hash=_unhex(data["chat_template_hash"]),
                config=ModelConfig(**config),
                end_token_ids=tuple(data["end_token_ids"]),
            )
            if data["model_id"] != _hex(hashes.model_id):
                raise InvalidInput("the model_id in the record is not that of its parts.")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"the record of a model's hashes is malformed: {error}") from error
        return hashes


def prepare_default(directory: Path, progress: Progress | None = None) -> ModelHashes:
    """Build the default model in `directory` if it is not there yet, and return its hashes.

    Raises Unavailable if its package can be neither found nor fetched, ConfigurationError if a tool is missing.
    """
    from poip_chain.service.engine import default_model

    if not (directory / "config.json").is_file():
        default_model.build(directory, progress or _silent)
    return prepare(directory, progress)


def prepare(directory: Path, progress: Progress | None = None) -> ModelHashes:
    """Check a model directory and return its hashes, from its record if no file has changed since.

    Raises UnsupportedModel with the reason if it cannot be served.
    """
    state = _file_state(directory)
    record = directory / RECORD
    try:
        stored = parse_json_object(record.read_bytes())
        if stored["format"] == RECORD_FORMAT and stored["files"] == state:
            return ModelHashes.from_json(stored["hashes"])
    except (OSError, ValueError, KeyError, TypeError, InvalidInput):
        pass  # no record, or an unusable one: compute it
    hashes = compute(directory, progress)
    text = json.dumps({"format": RECORD_FORMAT, "files": state, "hashes": hashes.to_json()}, indent=1)
    partial = record.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(record)
    return hashes


def verify(directory: Path, progress: Progress | None = None) -> ModelHashes:
    """Recompute a directory's hashes and compare them with its record. Raises IntegrityError if they differ."""
    hashes = compute(directory, progress)
    record = directory / RECORD
    if record.is_file():
        try:
            stored = ModelHashes.from_json(parse_json_object(record.read_bytes())["hashes"])
        except (ValueError, KeyError, TypeError, PoipError) as error:
            raise IntegrityError(f"{record} is damaged.", hint="Delete it and run `poip model prepare`.") from error
        if stored != hashes:
            raise IntegrityError(
                f"the files in {directory} make model {_hex(hashes.model_id)}, its record {_hex(stored.model_id)}.",
                hint="The weights or the tokenizer were changed after they were prepared.",
            )
    return hashes


def compute(directory: Path, progress: Progress | None = None) -> ModelHashes:
    """All hashes of a model directory from its files. About 20 s for 135 million weights on one core."""
    from poip_chain.service.engine import fast_weights
    from poip_chain.service.engine.checkpoint import Checkpoint

    say = progress or _silent
    settings = _settings(directory)
    config, scaling = model_config(directory, settings)
    tokenizer = tokenizer_hash(directory)
    template = Hash32(keccak(chat_template(directory).encode()))
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // total
        if tenth > told:
            told = tenth
            say(f"model: hashing weights, {10 * tenth} %")

    with Checkpoint(directory) as checkpoint:
        root = fast_weights.weights_root(config, checkpoint.load, tell, scaling)
    return ModelHashes(root, tokenizer, template, config, end_token_ids(directory, settings))


def model_config(directory: Path, settings: dict[str, Any] | None = None) -> tuple[ModelConfig, RopeScaling | None]:
    """The dimensions and RoPE scaling of the model in `directory`, as `spec.architecture` has them."""
    return architecture.model_config(_settings(directory) if settings is None else settings, str(directory))


def tokenizer_hash(directory: Path) -> Hash32:
    """See the module's docstring. Raises UnsupportedModel if there is no tokenizer.json."""
    if not (directory / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{directory} has no tokenizer.json.", hint="Save a fast tokenizer beside the weights (save_pretrained)."
        )
    names = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return merkle_root([name.encode() + b"\0" + keccak((directory / name).read_bytes()) for name in sorted(names)])


def chat_template(directory: Path) -> str:
    """The model's chat template: chat_template.jinja, or the entry of tokenizer_config.json; empty if there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    config = directory / "tokenizer_config.json"
    value = _read_json(config).get("chat_template", "") if config.is_file() else ""
    if isinstance(value, list):  # several named templates
        value = next((t["template"] for t in value if isinstance(t, dict) and t.get("name") == "default"), "")
    return value if isinstance(value, str) else ""


def end_token_ids(directory: Path, settings: dict[str, Any] | None = None) -> tuple[int, ...]:
    """The ids that end an answer, by config.json and generation_config.json. Raises UnsupportedModel if none is
    named.
    """
    found: set[int] = set()
    generation = directory / "generation_config.json"
    for source in (settings or _settings(directory), _read_json(generation) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        found.update(i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
    if not found:
        raise UnsupportedModel(f"{directory} names no end token (eos_token_id): answers could only end by length.")
    return tuple(sorted(found))


def _settings(directory: Path) -> dict[str, Any]:
    """config.json of a directory that holds safetensors and no pickles."""
    if not (directory / "config.json").is_file():
        raise UnsupportedModel(f"{directory} is not a model directory: it has no config.json.")
    files = sorted(path.name for path in directory.iterdir())
    if not any(name.endswith(".safetensors") for name in files):
        pickles = [name for name in files if name.endswith(PICKLES)]
        raise UnsupportedModel(
            f"{directory} has no .safetensors file" + (f", only pickles ({pickles[0]})." if pickles else "."),
            hint="Pickled weights can run code when loaded: convert them to safetensors first.",
        )
    for name in files:
        if name.endswith(PICKLES):
            raise UnsupportedModel(
                f"{directory} holds {name}, a pickle, which can run code when loaded.", hint="Remove it."
            )
    return _read_json(directory / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UnsupportedModel(f"{path} is larger than {MAX_JSON_BYTES} bytes.")
        return parse_json_object(path.read_bytes())
    except (OSError, InvalidInput) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from error


def _file_state(directory: Path) -> dict[str, list[int]]:
    """Size and time of change of each file that the hashes depend on."""
    state: dict[str, list[int]] = {}
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            relevant = path.name.endswith((".safetensors", ".json", ".jinja", ".txt", *PICKLES)) and path.name != RECORD
            if relevant and path.is_file():
                info = path.stat()
                state[path.name] = [info.st_size, info.st_mtime_ns]
    return state


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _unhex(text: str) -> Hash32:
    return Hash32(bytes.fromhex(text.removeprefix("0x")))


def _silent(_: str) -> None:
    return None
