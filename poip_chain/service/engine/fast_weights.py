"""The fast twin of spec/weights.py: the weights_root of a whole model in seconds, by numpy.

Knows arrays and the tree; nothing of files. `keccak_many` hashes thousands of equally long messages side by side: per
message it costs about a fifth of a call into a C library from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from poip_chain.errors import InvalidInput
from poip_chain.spec import weights
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling
from poip_chain.spec.types import ZERO_HASH, Hash32

Bytes = NDArray[np.uint8]
LoadTensor = Callable[[str], NDArray[np.float32]]

_RATE = 136
_LANES = 1024
"""Messages hashed at a time: four arrays of 25 lanes of 8 bytes each, 800 kB, stay near the core."""
_ROWS = 4096
"""Rows quantised at a time: bounds the float64 scratch to 50 MB at 1,536 columns."""

_ROUND_CONSTANTS = [
    0x0000000000000001, 0x0000000000008082, 0x800000000000808A, 0x8000000080008000, 0x000000000000808B,
    0x0000000080000001, 0x8000000080008081, 0x8000000000008009, 0x000000000000008A, 0x0000000000000088,
    0x0000000080008009, 0x000000008000000A, 0x000000008000808B, 0x800000000000008B, 0x8000000000008089,
    0x8000000000008003, 0x8000000000008002, 0x8000000000000080, 0x000000000000800A, 0x800000008000000A,
    0x8000000080008081, 0x8000000000008080, 0x0000000080000001, 0x8000000080008008,
]  # fmt: skip
_ROTATIONS = [
    0, 1, 62, 28, 27, 36, 44, 6, 55, 20, 3, 10, 43, 25, 39, 41, 45, 15, 21, 8, 18, 2, 61, 56, 14,
]  # fmt: skip


_ONE, _SIXTY_THREE = np.uint64(1), np.uint64(63)
_LEFT, _RIGHT = np.array([4, 0, 1, 2, 3]), np.array([1, 2, 3, 4, 0])
_TURN = np.array(_ROTATIONS, np.uint64)[:, None]
_TURN_BACK = np.uint64(64) - _TURN
# Lane (x, y) goes to (y, 2 x + 3 y): the row that each row of the moved state is taken from, and the rows that chi
# wants beside it: the next lane of the plane, and the one after that.
_MOVED = np.empty(25, np.intp)
for _x in range(5):
    for _y in range(5):
        _MOVED[_y + 5 * ((2 * _x + 3 * _y) % 5)] = _x + 5 * _y
_MOVED_NEXT = _MOVED.reshape(5, 5)[:, _RIGHT].ravel()
_MOVED_AFTER = _MOVED.reshape(5, 5)[:, _RIGHT[_RIGHT]].ravel()


def keccak_many(messages: Bytes) -> Bytes:
    """keccak-256 of each row of a uint8 array [n, length] -> [n, 32]."""
    count, length = messages.shape
    result = np.empty((count, 32), np.uint8)
    blocks = length // _RATE + 1
    for start in range(0, count, _LANES):
        part = messages[start : start + _LANES]
        padded = np.zeros((len(part), blocks * _RATE), np.uint8)
        padded[:, :length] = part
        padded[:, length] = 1
        padded[:, -1] |= 0x80
        words = np.ascontiguousarray(padded.view("<u8").T)
        state = np.zeros((25, len(part)), np.uint64)
        for block in range(blocks):
            state[:17] ^= words[17 * block : 17 * (block + 1)]
            _permute(state)
        result[start : start + _LANES] = np.ascontiguousarray(state[:4].T).view(np.uint8)
    return result


def _permute(state: NDArray[np.uint64]) -> None:
    """Keccak-f[1600] in place on the columns of a [25, n] array; lane (x, y) is row x + 5 y."""
    planes = state.reshape(5, 5, -1)
    rotated, scratch, third = np.empty_like(state), np.empty_like(state), np.empty_like(state)
    for constant in _ROUND_CONSTANTS:
        columns = np.bitwise_xor.reduce(planes, axis=0)
        parity = (columns << _ONE) | (columns >> _SIXTY_THREE)
        parity = columns[_LEFT] ^ parity[_RIGHT]
        planes ^= parity
        np.left_shift(state, _TURN, out=rotated)
        np.right_shift(state, _TURN_BACK, out=scratch)
        rotated |= scratch
        # Lane 0 turns by 0, and a shift by 64 gives 0: so the three lines above are a rotation for it, too.
        np.take(rotated, _MOVED_NEXT, axis=0, out=scratch, mode="clip")
        np.take(rotated, _MOVED_AFTER, axis=0, out=third, mode="clip")
        np.invert(scratch, out=scratch)
        scratch &= third
        np.take(rotated, _MOVED, axis=0, out=state, mode="clip")
        state ^= scratch
        state[0] ^= np.uint64(constant)


def _prefixed(prefix: int, data: Bytes) -> Bytes:
    result = np.empty((data.shape[0], data.shape[1] + 1), np.uint8)
    result[:, 0] = prefix
    result[:, 1:] = data
    return result


def leaf_hashes(data: Bytes) -> Bytes:
    """`spec.merkle.leaf_hash` of each row of [n, length]."""
    return keccak_many(_prefixed(0, data))


def merkle_root_of_hashes(level: Bytes) -> Hash32:
    """The root over leaf hashes [n, 32]; bytes32(0) if there are none."""
    if not len(level):
        return ZERO_HASH
    while len(level) > 1:
        level = _parents(level[None])[0]
    return Hash32(level[0].tobytes())


def _parents(level: Bytes) -> Bytes:
    """One level up for many trees of the same size: [trees, n, 32] -> [trees, ceil(n / 2), 32]."""
    trees, count, _ = level.shape
    pairs = count // 2
    joined = np.ascontiguousarray(level[:, : 2 * pairs]).reshape(trees * pairs, 64)
    up = keccak_many(_prefixed(1, joined)).reshape(trees, pairs, 32)
    return np.concatenate([up, level[:, -1:]], axis=1) if count % 2 else up


def quantise_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """`spec.weights.quantise_row` for each row of [n, columns]: (exponents [n], integers [n, columns]).

    Raises InvalidInput if a weight is infinite or not a number.
    """
    wide = rows.astype(np.float64)
    largest = np.abs(wide).max(axis=1)
    if not np.isfinite(largest).all():
        raise InvalidInput("a weight is infinite or not a number: such a model has no canonical form.")
    exponents = np.where(largest > 0, np.frexp(largest)[1] - 1 - weights.MANTISSA_SHIFT, 0)
    # A multiplication by a power of two is exact in float64 for every float32, and rint takes halves to even.
    integers = np.rint(np.ldexp(wide, -exponents[:, None]))
    over = np.abs(integers).max(axis=1) > weights.MAX_WEIGHT
    if over.any():
        exponents = exponents + over
        integers[over] = np.rint(np.ldexp(wide[over], -exponents[over, None]))
    return exponents.astype("<i2"), integers.astype("<i2")


def row_leaf_hashes(exponents: NDArray[np.int16], rows: Bytes) -> Bytes:
    """Leaf hashes of rows given as bytes [n, length] with their exponents [n]: [n, 32]."""
    count, length = rows.shape
    size = weights.SEGMENT_BYTES
    whole = length // size
    parts: list[Bytes] = []
    if whole:
        full = np.ascontiguousarray(rows[:, : whole * size]).reshape(count * whole, size)
        parts.append(leaf_hashes(full).reshape(count, whole, 32))
    if length % size:
        parts.append(leaf_hashes(rows[:, whole * size :]).reshape(count, 1, 32))
    level = np.concatenate(parts, axis=1)
    while level.shape[1] > 1:
        level = _parents(level)
    heads = exponents.astype("<i2").view(np.uint8).reshape(count, 2)
    return leaf_hashes(np.concatenate([heads, level[:, 0]], axis=1))


def weights_root(
    config: ModelConfig,
    load: LoadTensor,
    progress: Callable[[int, int], None] | None = None,
    scaling: RopeScaling | None = None,
) -> Hash32:
    """`spec.weights.weights_root`. `load` gives a tensor by its checkpoint name as float32 (exact for bf16 and fp16).

    `progress` is told (rows done, rows in all). Raises InvalidInput if a tensor has another shape than the dimensions
    say, whatever `load` raises for a missing one, and InvalidInput for another `scaling` than the config names.
    """
    plan = weights.tensor_plan(config)
    total = sum(tensor.rows for tensor in plan)
    hashes = np.empty((total, 32), np.uint8)
    done = 0
    for tensor in plan:
        for part in _tensor_hashes(config, tensor, load, scaling):
            hashes[done : done + len(part)] = part
            done += len(part)
            if progress:
                progress(done, total)
    return merkle_root_of_hashes(hashes)


def _tensor_hashes(
    config: ModelConfig, tensor: weights.TensorPlan, load: LoadTensor, scaling: RopeScaling | None
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
        yield row_leaf_hashes(exponents, np.ascontiguousarray(integers).view(np.uint8))
