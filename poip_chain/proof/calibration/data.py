"""Raw terms of scores before dead zones, one receipt after another, and the folder that keeps them.

    folder/header.json       what the run is about; a folder is continued only under an equal header
    folder/part-00012.npz    the receipts of one batch, written whole or not at all

A part is named by its place in the plan, so a run that was killed goes on where it stood, and machines may each do parts
and be joined later. `pack` joins all parts into one compressed file; `Data.load` reads either. Knows arrays and files;
nothing of engines or statistics.

Terms: margin in 2**-16 logits; `free` in 2**-16 logits, the largest margin that any seed could have given at that
position as far as the listed tokens show; `ending`: the margin that a false end of text would have had there. `listed`:
stated minus canonical of the eight stated entries, `unlisted`: canonical minus lowest stated of the eight highest tokens
that were not stated, both in 1/64 nat and saturated to int16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poip_chain.errors import InvalidInput
from poip_chain.spec.strict_json import parse_json_object
from poip_chain.spec.transcript import ENTRIES_PER_POSITION

FORMAT = 1
HEADER = "header.json"
WIDTH = ENTRIES_PER_POSITION
MAX_FILE_BYTES = 1 << 30
Array = NDArray[Any]

# name: (dtype, columns; 0 for a plain vector). Receipts, their ids, positions.
RECEIPTS = {
    "content": ("u1", 0),
    "temperature": ("<u4", 0),
    "seed": ("u1", 32),
    "prompt_tokens": ("<u4", 0),
    "tokens": ("<u4", 0),
}
IDS = {"prompt_ids": ("<u4", 0), "output_ids": ("<u4", 0)}
POSITIONS = {
    "margin": ("<i4", 0),
    "free": ("<i4", 0),
    "ending": ("<i4", 0),
    "listed": ("<i2", WIDTH),
    "unlisted": ("<i2", WIDTH),
}
FIELDS = {**RECEIPTS, **IDS, **POSITIONS}


@dataclass(frozen=True, slots=True)
class Scored:
    """The raw terms of one receipt. content is an index into `prompts.CONTENTS`; `temperature` is the claimed
    one in thousandths; the arrays have one row for each output position."""

    content: int
    temperature: int
    seed: bytes
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    margin: Array
    free: Array
    ending: Array
    listed: Array
    unlisted: Array


@dataclass(frozen=True)
class Data:
    """Receipts one after another: arrays by the names of FIELDS, and `first`, where each receipt's positions start."""

    arrays: dict[str, Array]

    @property
    def receipts(self) -> int:
        """How many receipts there are."""
        return len(self.arrays["tokens"])

    @property
    def tokens(self) -> int:
        """How many output positions there are."""
        return len(self.arrays["margin"])

    @property
    def first(self) -> NDArray[np.int64]:
        """Where each receipt's positions start, and the end of the last: [receipts + 1]."""
        return np.concatenate([[0], np.cumsum(self.arrays["tokens"], dtype=np.int64)])

    def select(self, mask: NDArray[np.bool_]) -> Data:
        """The receipts of a mask, without their token ids."""
        rows = np.repeat(mask, self.arrays["tokens"])
        chosen = {name: self.arrays[name][mask] for name in RECEIPTS}
        return Data(chosen | {name: self.arrays[name][rows] for name in POSITIONS})

    @staticmethod
    def of(scored: Sequence[Scored]) -> Data:
        """The receipts as arrays."""
        arrays: dict[str, Array] = {
            "content": np.array([s.content for s in scored], FIELDS["content"][0]),
            "temperature": np.array([s.temperature for s in scored], FIELDS["temperature"][0]),
            "seed": np.array([list(s.seed) for s in scored], np.uint8).reshape(-1, 32),
            "prompt_tokens": np.array([len(s.prompt_ids) for s in scored], FIELDS["prompt_tokens"][0]),
            "tokens": np.array([len(s.output_ids) for s in scored], FIELDS["tokens"][0]),
        }
        for name, (kind, columns) in {**IDS, **POSITIONS}.items():
            shape = (0, columns) if columns else (0,)
            arrays[name] = np.concatenate([np.empty(shape, kind), *(getattr(s, name) for s in scored)]).astype(kind)
        return Data(arrays)

    @staticmethod
    def join(parts: Iterable[Data]) -> Data:
        """All receipts of several."""
        found = list(parts)
        if not found:
            return Data.of([])
        names = set.intersection(*(set(part.arrays) for part in found))
        return Data({name: np.concatenate([part.arrays[name] for part in found]) for name in FIELDS if name in names})

    @staticmethod
    def load(path: Path) -> Data:
        """Read one file. Raises InvalidInput if it is not what `save` writes."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidInput(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
            # Opened here, since numpy leaves a damaged file open.
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in FIELDS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidInput(f"{path} holds no scores: {error}", hint="Delete it; the run makes it again.") from error
        data = Data(arrays)
        sums = {
            **dict.fromkeys(RECEIPTS, data.receipts),
            **dict.fromkeys(POSITIONS, int(arrays["tokens"].sum())),
            "prompt_ids": int(arrays["prompt_tokens"].sum()),
            "output_ids": int(arrays["tokens"].sum()),
        }
        for name, (kind, columns) in FIELDS.items():
            shape = (sums[name], columns) if columns else (sums[name],)
            if arrays[name].dtype != np.dtype(kind) or arrays[name].shape != shape:
                raise InvalidInput(f"{path}: {name} is {arrays[name].dtype} {arrays[name].shape}, not {kind} {shape}.")
        return data

    def save(self, path: Path) -> None:
        """Write one compressed file, whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                arrays: dict[str, Any] = {name: self.arrays[name] for name in FIELDS}
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Header:
    """What a folder of parts is about. Parts that were made under other values may not be mixed.

    what: "honest" or the cheat's name. batch: receipts a part. engine: the statement of what generated.
    """

    what: str
    model_id: str
    weights_root: str
    dtype: str
    engine: str
    plan_seed: int
    batch: int
    contents: tuple[str, ...]
    temperatures: tuple[int, ...]
    lengths: tuple[int, ...]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        data = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


class Store:
    """A folder of parts under one header. Raises InvalidInput if the folder belongs to another run."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / HEADER
        if path.is_file():
            found = parse_json_object(path.read_bytes())
            wanted = header.to_json()
            other = [name for name in wanted if found.get(name) != wanted[name]]
            if other:
                name = other[0]
                raise InvalidInput(
                    f"{folder} holds scores of another run: {name} is {found.get(name)!r}, not {wanted[name]!r}.",
                    hint="Continue with the same options, or give another --out.",
                )
            return
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(header.to_json(), indent=1) + "\n")
        partial.replace(path)

    def path(self, index: int) -> Path:
        """Where part `index` is or will be."""
        return self.folder / f"part-{index:05}.npz"

    def has(self, index: int) -> bool:
        """Whether the part is done."""
        return self.path(index).is_file()

    def write(self, index: int, scored: Sequence[Scored]) -> None:
        """Keep a part."""
        Data.of(scored).save(self.path(index))

    def read(self) -> Data:
        """All receipts so far, in the order of the plan."""
        return read_folder(self.folder)


def read_folder(folder: Path) -> Data:
    """All receipts of a folder's parts. Raises InvalidInput for a damaged one."""
    return Data.join(Data.load(path) for path in sorted(folder.glob("part-*.npz")))
