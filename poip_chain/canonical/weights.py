"""Canonical weights of a model directory: int16 rows and exponents, read from safetensors tensor by tensor.

Quantising 135 million weights takes some seconds, so the result is kept beside the model in `poip-canonical.weights`
and mapped from then on: it costs no memory of its own, several processes share it, and a model larger than memory runs.
The file is bound to size and time of change of config.json and of each safetensors file; another state is recomputed.
`verify` hashes all rows and compares with a weights_root: nobody has to trust the file.

    file   8 bytes length of the JSON head || head || for each tensor of `spec.weights.tensor_plan`, at multiples of 64:
           int16 exponents, int16 integers (int32 for RoPE tables, without exponents)

Nothing of a checkpoint is executed; pickles are not read at all.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical import keccak
from poip_chain.errors import IntegrityError, InvalidInput, UnsupportedModel
from poip_chain.spec import architecture, bounds
from poip_chain.spec import weights as spec
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.types import Hash32

CACHE = "poip-canonical.weights"
CACHE_FORMAT = 1
MAX_HEAD_BYTES = 64 << 20
_ROWS = 4096
"""Rows handled at a time: bounds float64 scratch to 50 MB at 1,536 columns."""
_ALIGN = 64
Load = Callable[[str], NDArray[np.float32]]
I16 = NDArray[np.int16]


@dataclass(frozen=True)
class Weights:
    """All rows of a model by the names of `spec.weights.tensor_plan`: integers [rows, columns] and exponents [rows]."""

    config: ModelConfig
    scaling: RopeScaling | None
    integers: Mapping[str, NDArray[Any]]
    exponents: Mapping[str, I16]

    def extents(self, plan: spec.TensorPlan) -> Iterator[bounds.Extent]:
        """What `spec.bounds.check_bounds` asks of a tensor's rows."""
        return extents(self.exponents[plan.name], self.integers[plan.name])

    def row_hashes(self) -> keccak.Words:
        """The leaf hashes of weights_root [rows, 4], from the rows as they are held."""
        parts = []
        for plan in spec.tensor_plan(self.config):
            exponents, rows = self.exponents[plan.name], self.integers[plan.name]
            for start in range(0, plan.rows, _ROWS):
                part = np.ascontiguousarray(rows[start : start + _ROWS])
                parts.append(row_leaf_hashes(exponents[start : start + _ROWS], part.view(np.uint8)))
        return np.concatenate(parts).view(np.uint64)

    def root(self) -> Hash32:
        """weights_root."""
        return keccak.root_of(self.row_hashes())

    def verify(self, root: bytes) -> None:
        """Raises IntegrityError unless these rows make `root`."""
        if self.root() != root:
            raise IntegrityError(
                "the canonical weights in use are not those of the model's weights_root.",
                hint=f"Delete {CACHE} in the model's folder and check its files with `poip model verify`.",
            )


def load(directory: Path, root: bytes | None = None, progress: Callable[[str], None] | None = None) -> Weights:
    """The canonical weights of a model directory, from the kept file if it is still that of the checkpoint.

    Checks the bounds of `spec.bounds` when the file is written, and `root` (weights_root) whenever it is given.
    Raises UnsupportedModel or InvalidInput with the reason if the model has no canonical execution.
    """
    say = progress or (lambda _: None)
    config, scaling = read_config(directory)
    bounds.check_dimensions(config)
    state = _state(directory)
    path = directory / CACHE
    weights = _mapped(path, config, scaling, state)
    if weights is None:
        say("model: making canonical weights")
        with SafeTensors(directory) as tensors:
            weights = _write(path, config, scaling, state, tensors.load)
    if root is not None:
        say("model: checking canonical weights")
        weights.verify(root)
    return weights


def read_config(directory: Path) -> tuple[ModelConfig, RopeScaling | None]:
    """Dimensions and RoPE scaling by config.json. Raises UnsupportedModel."""
    try:
        settings = parse_json_object((directory / "config.json").read_bytes())
    except (OSError, InvalidInput) as error:
        raise UnsupportedModel(f"{directory / 'config.json'} cannot be read: {error}") from error
    return architecture.model_config(settings, str(directory))


def from_rows(
    config: ModelConfig, rows: Mapping[str, Sequence[tuple[int, Sequence[int]]]], scaling: RopeScaling | None = None
) -> Weights:
    """Weights from the rows of `spec.forward.CanonicalWeights`."""
    integers = {
        name: np.array([row for _, row in tensor], np.int32 if name == "rope" else np.int16)
        for name, tensor in rows.items()
    }
    exponents = {name: np.array([exponent for exponent, _ in tensor], np.int16) for name, tensor in rows.items()}
    return Weights(config, scaling, integers, exponents)


# Quantising and hashing rows


def quantise_rows(rows: NDArray[np.float32]) -> tuple[I16, I16]:
    """`spec.weights.quantise_row` for each row of [n, columns]: (exponents [n], integers [n, columns]).

    Raises InvalidInput if a weight is infinite or not a number.
    """
    wide = rows.astype(np.float64)
    largest = np.abs(wide).max(axis=1)
    if not np.isfinite(largest).all():
        raise InvalidInput("a weight is infinite or not a number: such a model has no canonical form.")
    exponents = np.where(largest > 0, np.frexp(largest)[1] - 1 - spec.MANTISSA_SHIFT, 0)
    # A multiplication by a power of two is exact in float64 for every float32, and rint takes halves to even.
    integers = np.rint(np.ldexp(wide, -exponents[:, None]))
    over = np.abs(integers).max(axis=1) > spec.MAX_WEIGHT
    if over.any():
        exponents = exponents + over
        integers[over] = np.rint(np.ldexp(wide[over], -exponents[over, None]))
    return exponents.astype("<i2"), integers.astype("<i2")


def row_leaf_hashes(exponents: I16, rows: keccak.Bytes) -> keccak.Bytes:
    """Leaf hashes of rows given as bytes [n, length] with their exponents [n]: [n, 32]."""
    count, length = rows.shape
    size = spec.SEGMENT_BYTES
    whole = length // size
    parts: list[keccak.Bytes] = []
    if whole:
        full = np.ascontiguousarray(rows[:, : whole * size]).reshape(count * whole, size)
        parts.append(_prefixed_hashes(0, full).reshape(count, whole, 32))
    if length % size:
        parts.append(_prefixed_hashes(0, rows[:, whole * size :]).reshape(count, 1, 32))
    level = np.concatenate(parts, axis=1)
    while level.shape[1] > 1:
        pairs = level.shape[1] // 2
        joined = np.ascontiguousarray(level[:, : 2 * pairs]).reshape(count * pairs, 64)
        up = _prefixed_hashes(1, joined).reshape(count, pairs, 32)
        level = np.concatenate([up, level[:, -1:]], axis=1) if level.shape[1] % 2 else up
    heads = np.ascontiguousarray(exponents.astype("<i2")).view(np.uint8).reshape(count, 2)
    return _prefixed_hashes(0, np.concatenate([heads, level[:, 0]], axis=1))


def _prefixed_hashes(prefix: int, data: keccak.Bytes) -> keccak.Bytes:
    messages = np.empty((data.shape[0], data.shape[1] + 1), np.uint8)
    messages[:, 0] = prefix
    messages[:, 1:] = data
    return keccak.keccak_many(messages)


def extents(exponents: I16, integers: NDArray[Any]) -> Iterator[bounds.Extent]:
    """`spec.bounds.extent` of each row of a tensor."""
    columns = integers.shape[1]
    for start in range(0, len(integers), _ROWS):
        size = np.abs(integers[start : start + _ROWS].astype(np.int64))
        sums = np.stack([size[:, i : i + bounds.BLOCK].sum(axis=1) for i in range(0, columns, bounds.BLOCK)], axis=1)
        largest, total, block = size.max(axis=1).tolist(), sums.sum(axis=1).tolist(), sums.max(axis=1).tolist()
        for row, exponent in enumerate(exponents[start : start + _ROWS].tolist()):
            yield bounds.Extent(exponent, largest[row], total[row], block[row])


# The kept file


def _state(directory: Path) -> dict[str, list[int]]:
    paths = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()}


def _places(config: ModelConfig) -> tuple[list[tuple[spec.TensorPlan, int, int]], int]:
    """(tensor, offset of its exponents, offset of its integers) for all tensors, and the end of the data."""
    places, at = [], 0
    for plan in spec.tensor_plan(config):
        width = 2 if plan.source else 4
        first = at
        at += -(-2 * plan.rows // _ALIGN) * _ALIGN if plan.source else 0
        places.append((plan, first, at))
        at += -(-width * plan.rows * plan.columns // _ALIGN) * _ALIGN
    return places, at


def _views(buffer: NDArray[np.uint8], config: ModelConfig, scaling: RopeScaling | None) -> Weights:
    integers: dict[str, NDArray[Any]] = {}
    exponents: dict[str, I16] = {}
    for plan, first, second in _places(config)[0]:
        kind, width = ("<i2", 2) if plan.source else ("<i4", 4)
        data = buffer[second : second + width * plan.rows * plan.columns]
        integers[plan.name] = data.view(kind).reshape(plan.rows, plan.columns)
        exponents[plan.name] = (
            buffer[first : first + 2 * plan.rows].view("<i2")
            if plan.source
            else np.full(plan.rows, spec.ROPE_EXPONENT, np.int16)
        )
    return Weights(config, scaling, integers, exponents)


def _mapped(
    path: Path, config: ModelConfig, scaling: RopeScaling | None, state: dict[str, list[int]]
) -> Weights | None:
    """The kept file's weights; None if there is none of this state."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEAD_BYTES:
                return None
            head = json.loads(file.read(size))
            start = -(-(8 + size) // _ALIGN) * _ALIGN
            wanted = {"format": CACHE_FORMAT, "config": config.config_hash().hex(), "files": state}
            if head != wanted or os.fstat(file.fileno()).st_size != start + _places(config)[1]:
                return None
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    return _views(np.frombuffer(view, np.uint8)[start:], config, scaling)


def _write(
    path: Path, config: ModelConfig, scaling: RopeScaling | None, state: dict[str, list[int]], load_tensor: Load
) -> Weights:
    """Quantise all tensors into the file (or into memory where it cannot be written), check the bounds."""
    head = json.dumps({"format": CACHE_FORMAT, "config": config.config_hash().hex(), "files": state}).encode()
    start = -(-(8 + len(head)) // _ALIGN) * _ALIGN
    size = start + _places(config)[1]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    buffer: NDArray[np.uint8] | np.memmap[Any, np.dtype[np.uint8]]
    try:
        with partial.open("wb") as file:
            # Places are taken now: a full disk would otherwise kill the process when a mapped page is written.
            os.posix_fallocate(file.fileno(), 0, size)
        buffer = np.memmap(partial, np.uint8, "r+", shape=(size,))
    except OSError:  # a read-only folder or a full disk: memory has to do
        partial.unlink(missing_ok=True)
        buffer = np.zeros(size, np.uint8)
    try:
        buffer[: 8 + len(head)] = np.frombuffer(len(head).to_bytes(8, "little") + head, np.uint8)
        weights = _views(np.asarray(buffer)[start:], config, scaling)
        for plan in spec.tensor_plan(config):
            if not plan.source:
                for position, row in enumerate(spec.rope_rows(config, scaling)):
                    weights.integers[plan.name][position] = row
                continue
            values = load_tensor(plan.source)
            values = values[None] if values.ndim == 1 else values
            if values.shape != (plan.rows, plan.columns):
                raise UnsupportedModel(
                    f"tensor {plan.source} has shape {values.shape}, not {plan.rows} x {plan.columns}."
                )
            for first in range(0, plan.rows, _ROWS):
                part = slice(first, first + _ROWS)
                exponents, integers = quantise_rows(values[part])
                weights.exponents[plan.name][part] = exponents
                weights.integers[plan.name][part] = integers
        bounds.check_bounds(config, weights.extents)
        if not isinstance(buffer, np.memmap):
            return weights
        buffer.flush()
        del weights, buffer
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    mapped = _mapped(path, config, scaling, state)
    if mapped is None:
        raise IntegrityError(f"{path} changed while it was written.", hint="Run it again.")
    return mapped


class SafeTensors:
    """The tensors of a directory's safetensors files by name, as float32. Use as a context manager.

    Reads the format itself (a JSON head of offsets, then raw data), so that torch need not be there: numpy has no
    bfloat16, but its bits are the upper half of a float32. Raises UnsupportedModel for a damaged file or another type.
    """

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            try:
                with path.open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    if size > MAX_HEAD_BYTES:
                        raise ValueError("its head is too long")
                    head = parse_json_object(file.read(size))
                    for name, entry in head.items():
                        if name != "__metadata__":
                            self._where[name] = (path, 8 + size, entry)
            except (OSError, ValueError, InvalidInput) as error:
                raise UnsupportedModel(f"{path} cannot be read: {error}") from error

    def load(self, name: str) -> NDArray[np.float32]:
        """One tensor. bfloat16, float16 and float32 are exact; others are refused."""
        if name not in self._where:
            raise UnsupportedModel(f"the checkpoint has no tensor {name}.")
        path, base, entry = self._where[name]
        kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            if kind not in kinds:
                raise UnsupportedModel(
                    f"tensor {name} has type {kind!r:.20}; supported are bfloat16, float16, float32."
                )
            raw = np.memmap(path, np.uint8, "r", offset=base + first, shape=(last - first,))
            values = raw.view(kinds[kind]).reshape(shape)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UnsupportedModel(f"tensor {name} in {path} is damaged: {error}") from error
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def __enter__(self) -> SafeTensors:
        return self

    def __exit__(self, *_: object) -> None:
        return None
