"""The fast twin of spec/weights.py: the weights_root of a whole model in seconds, and the bounds of its arithmetic.

Knows arrays and the tree; nothing of files. Hashing and quantising themselves are those of `poip_chain/canonical`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical.keccak import keccak_many, root_of
from poip_chain.canonical.weights import extents, quantise_rows, row_leaf_hashes
from poip_chain.errors import InvalidInput
from poip_chain.spec import bounds, weights
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling
from poip_chain.spec.types import Hash32

Bytes = NDArray[np.uint8]
LoadTensor = Callable[[str], NDArray[np.float32]]

_ROWS = 4096
"""Rows quantised at a time: bounds the float64 scratch to 50 MB at 1,536 columns."""


def weights_root(
    config: ModelConfig,
    load: LoadTensor,
    progress: Callable[[int, int], None] | None = None,
    scaling: RopeScaling | None = None,
) -> Hash32:
    """`spec.weights.weights_root`. `load` gives a tensor by its checkpoint name as float32 (exact for bf16 and fp16).

    `progress` is told (rows done, rows in all). Raises InvalidInput if a tensor has another shape than the dimensions
    say, or the model breaks a bound of `spec.bounds` (naming tensor and bound), whatever `load` raises for a missing
    one, and InvalidInput for another `scaling` than the config names.
    """
    bounds.check_dimensions(config)
    found: dict[str, list[bounds.Extent]] = {}
    plan = weights.tensor_plan(config)
    total = sum(tensor.rows for tensor in plan)
    hashes = np.empty((total, 32), np.uint8)
    done = 0
    for tensor in plan:
        for part in _tensor_hashes(config, tensor, load, scaling, found.setdefault(tensor.name, [])):
            hashes[done : done + len(part)] = part
            done += len(part)
            if progress:
                progress(done, total)
    bounds.check_bounds(config, lambda tensor: found[tensor.name])
    return root_of(hashes.view(np.uint64))


def _tensor_hashes(
    config: ModelConfig,
    tensor: weights.TensorPlan,
    load: LoadTensor,
    scaling: RopeScaling | None,
    found: list[bounds.Extent],
) -> Iterator[Bytes]:
    if not tensor.source:
        table = np.array(list(weights.rope_rows(config, scaling)), dtype="<i4").reshape(tensor.rows, tensor.columns)
        yield row_leaf_hashes(np.full(tensor.rows, weights.ROPE_EXPONENT, "<i2"), table.view(np.uint8))
        return
    values = load(tensor.source)
    if values.ndim == 1:
        values = values[None]
    if values.shape != (tensor.rows, tensor.columns):
        raise InvalidInput(f"tensor {tensor.source} has shape {values.shape}, not {tensor.rows} x {tensor.columns}.")
    for start in range(0, tensor.rows, _ROWS):
        exponents, integers = quantise_rows(values[start : start + _ROWS])
        found.extend(extents(exponents, integers))
        yield row_leaf_hashes(exponents, np.ascontiguousarray(integers).view(np.uint8))


__all__ = ["keccak_many", "quantise_rows", "row_leaf_hashes", "weights_root"]
