"""Reading the tensors of a safetensors directory, and making degraded copies of it for tests.

Knows the file format alone. Needs torch, because numpy has no bfloat16.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from poip_chain.errors import InvalidInput, UnsupportedModel
from poip_chain.spec.strict_json import parse_json_object

DEGRADATIONS = ("int4", "drop_layer", "noise")
INT4_GROUP = 64
NOISE = 0.05
"""Relative weight noise of the `noise` cheat."""


class Checkpoint:
    """The tensors of a directory by name. Use as a context manager. Raises UnsupportedModel for a damaged file."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        try:
            for path in sorted(directory.glob("*.safetensors")):
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
                self._where.update({name: handle for name in handle.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise UnsupportedModel(f"a .safetensors file in {directory} cannot be read: {error}") from error

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises UnsupportedModel if there is none of this name."""
        if name not in self._where:
            raise UnsupportedModel(f"the checkpoint has no tensor {name}.")
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor

    def load(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, which holds bf16, fp16 and fp32 exactly. Other types are refused."""
        tensor = self.tensor(name)
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedModel(f"tensor {name} has type {tensor.dtype}; supported are bfloat16, float16, float32.")
        array: NDArray[np.float32] = tensor.to(torch.float32).numpy()
        return array

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def degrade(directory: Path, out: Path, kind: str) -> None:
    """Write a copy of a model that computes something cheaper or else: the cheat of the demo and of the attack tests.

    kind: "int4" rounds each linear weight to 4 bits in groups of 64 (served in the usual float type: the outputs are
    those of an int4 model), "drop_layer" leaves out the middle layer, "noise" adds 5 % Gaussian noise to each linear
    weight. A node that serves it under the true model's name is what audits are for; nothing else may call this.
    Raises InvalidInput for another kind or an existing `out`.
    """
    if kind not in DEGRADATIONS:
        raise InvalidInput(f"unknown degradation {kind!r}; known are {', '.join(DEGRADATIONS)}.")
    if out.exists():
        raise InvalidInput(f"{out} exists already.", hint="Remove it or name another directory.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = parse_json_object((directory / "config.json").read_bytes())
    with Checkpoint(directory) as checkpoint:
        if kind == "drop_layer":
            tensors = _without_layer(checkpoint, settings["num_hidden_layers"] // 2)
            settings["num_hidden_layers"] -= 1
        else:
            change = _to_int4 if kind == "int4" else _with_noise()
            tensors = {
                name: change(tensor) if re.search(r"_proj\.weight$", name) else tensor
                for name, tensor in ((name, checkpoint.tensor(name)) for name in checkpoint.names())
            }
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(settings, indent=2))
    for path in directory.iterdir():
        copied = path.suffix in (".json", ".jinja", ".txt") and not path.name.startswith(("poip-", "config.json"))
        if copied and not path.name.endswith(".index.json"):
            shutil.copy2(path, partial / path.name)
    partial.replace(out)


def _without_layer(checkpoint: Checkpoint, dropped: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in checkpoint.names():
        match = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
        if match is None:
            tensors[name] = checkpoint.tensor(name)
        elif (layer := int(match[2])) != dropped:
            tensors[f"{match[1]}{layer - (layer > dropped)}{match[3]}"] = checkpoint.tensor(name)
    return tensors


def _to_int4(tensor: torch.Tensor) -> torch.Tensor:
    """Symmetric rounding to -8..7 with one scale per group of 64 columns (the last group may be shorter)."""
    rows, columns = tensor.shape
    pad = -columns % INT4_GROUP
    wide = torch.nn.functional.pad(tensor.float(), (0, pad)).reshape(rows, -1, INT4_GROUP)
    scale = wide.abs().amax(dim=2, keepdim=True).clamp_min(1e-12) / 7
    rounded = (wide / scale).round().clamp(-8, 7) * scale
    return rounded.reshape(rows, columns + pad)[:, :columns].to(tensor.dtype).contiguous()


def _with_noise() -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor.float() * (1 + NOISE * noise)).to(tensor.dtype)

    return change
