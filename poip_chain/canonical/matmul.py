"""Exact products of integer matrices, several ways with the same bits.

    float64   BLAS over blocks of `bounds.BLOCK` columns, where every sum stays below 2**53 (`spec/bounds.py`)
    int8      both sides in signed bytes, `torch._int_mm` in int32, put together in int64: fast where the CPU has VNNI
    int16     weights as they are, inputs in limbs, by vector instructions of x86 CPUs with AVX2

A path prepares a weight matrix once and multiplies any int32 rows with it; sums leave it block by block of output
columns, so that nobody holds [positions, vocabulary] of them. `fastest` measures which to take. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical.compiled import HAVE_NUMBA, Workers, compiled, cpu_has
from poip_chain.errors import ConfigurationError
from poip_chain.spec.bounds import BLOCK

I16 = NDArray[np.int16]
I32 = NDArray[np.int32]
Array = NDArray[Any]
Done = Callable[[Array, int, int], None]
"""done(sums, first, last): exact sums of products [T, last - first], int64 or whole float64, of output columns
first..last. May be called from several threads for different columns."""

COLUMNS = 512
"""Output columns in flight: their weights as float64 (2.4 MB at 576 inputs) stay in a core's shared cache."""


class Path(Protocol):
    """One way to multiply."""

    name: str

    def prepare(self, weights: I16) -> Any:
        """What the path keeps of a matrix int16 [N, K], |W| <= 32,640."""

    def take(self, x: I32) -> Any:
        """Inputs int32 [T, K] in the path's own form, for any number of products."""

    def multiply(self, x: Any, prepared: Any, done: Done) -> None:
        """Inputs from `take` times the matrix transposed, given to `done`."""


class Float64:
    """By BLAS: torch's where torch is installed, else numpy's. Weights stay int16 and are widened block by block."""

    name = "float64"

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._product = blas_product()

    def prepare(self, weights: I16) -> I16:
        """The matrix itself, so that it may stay a mapped file."""
        return weights

    def take(self, x: I32) -> Array:
        """See Path."""
        return x.astype(np.float64)

    def multiply(self, x: Array, prepared: I16, done: Done) -> None:
        """See Path."""
        count, depth = prepared.shape
        wide = x
        if len(x) <= 2 and HAVE_NUMBA:
            self._few(wide, prepared, done)
            return
        for first in range(0, count, COLUMNS):
            part = prepared[first : first + COLUMNS].astype(np.float64)
            if depth <= BLOCK:
                done(self._product(wide, part.T), first, first + len(part))
                continue
            sums = np.zeros((len(x), len(part)), np.int64)
            for start in range(0, depth, BLOCK):
                piece = np.ascontiguousarray(wide[:, start : start + BLOCK])
                sums += self._product(piece, part[:, start : start + BLOCK].T).astype(np.int64)
            done(sums, first, first + len(part))

    def _few(self, x: Array, weights: I16, done: Done) -> None:
        """One or two rows: limited by reading the weights once, so nothing is widened in memory."""

        def work(first: int, last: int) -> None:
            sums = np.empty((len(x), last - first), np.int64)
            for row in range(len(x)):
                _vector(x[row], weights[first:last], sums[row], BLOCK)
            done(sums, first, last)

        self._workers.split(len(weights), work, 16)


class Int8:
    """By torch's int8 product. W = 256 hi + lo with both in -128..127; inputs in as many bytes as they need.

    Of the allowed weights only 32,640 has no such form (128 and -128): it is held as 32,384, and its columns are added.
    """

    name = "int8"

    def __init__(self, workers: Workers) -> None:
        import torch

        self._torch = torch

    def prepare(self, weights: I16) -> Any:
        """(int8 [2 N, K]: all high bytes, then all low ones; rows and columns of weights of 32,640)."""
        high, low = _bytes(weights.astype(np.int32))
        both = np.concatenate([np.minimum(high, 127), low]).astype(np.int8)
        return self._torch.from_numpy(both), *np.nonzero(weights == 32_640)

    def take(self, x: I32) -> Any:
        """(x, limbs, int8 [limbs * T, K]), as many limbs as the largest input needs."""
        limbs: list[Array] = []
        rest = x.astype(np.int64)
        while rest.any() or not limbs:
            rest, low = _bytes(rest)
            limbs.append(low.astype(np.int8))
        return x, len(limbs), self._torch.from_numpy(np.concatenate(limbs))

    def multiply(self, x: Any, prepared: Any, done: Done) -> None:
        """See Path. An int32 sum is at most 2**14 K, below 2**31 for every depth up to 2**17 - 1."""
        given, limbs, left = x
        bytes_of, largest_rows, largest_columns = prepared
        rows, count = len(given), len(bytes_of) // 2
        for first in range(0, count, COLUMNS):
            last = min(count, first + COLUMNS)
            high, low = (
                self._torch._int_mm(left, part.t()).numpy().reshape(limbs, rows, last - first)
                for part in (bytes_of[first:last], bytes_of[count + first : count + last])
            )
            sums = np.zeros((rows, last - first), np.int64)
            for i in range(limbs):
                sums += ((high[i].astype(np.int64) << 8) + low[i]) << (8 * i)
            for at in range(*np.searchsorted(largest_rows, (first, last))):
                sums[:, largest_rows[at] - first] += given[:, largest_columns[at]].astype(np.int64) << 8
            done(sums, first, last)


LIMB_BITS = 12
"""Inputs of the int16 path in limbs of -2048 to 2048: two hold |x| < 2**23, three every int32."""
_TWO_LIMBS = 2**23 - 2**11
_LANE = 2**20
"""An int32 lane sums limbs times weights: exact while the sum of |W| it covers stays below 2**31 / 2048. 32 columns
always do (32 * 32,640 < 2**20); how many more do is a property of a matrix's rows, found when it is prepared."""
_PANEL = 16
_TILE_BYTES = 192 * 1024
"""Inputs that are multiplied with a panel of weights after another: what stays in a core's second-level cache."""


class Int16:
    """By vpmaddwd (`simd.multiply_tile`): weights as they are, inputs in two limbs, for rows of large values in three.

    Weights are kept repacked, [N / 16][K / 2][16][2]: as large as the model, and read once per product in order.
    """

    name = "int16"

    def __init__(self, workers: Workers) -> None:
        if not HAVE_NUMBA or not cpu_has("avx2"):
            raise ImportError("the int16 path needs numba and a CPU with AVX2", name="numba and AVX2")
        self._workers = workers

    def prepare(self, weights: I16) -> tuple[I16, int, int]:
        """(packed weights, N, columns that an int32 lane may sum)."""
        count, depth = weights.shape
        padded = np.zeros((-(-count // _PANEL) * _PANEL, depth + depth % 2), np.int16)
        padded[:count, :depth] = weights
        packed = padded.reshape(-1, _PANEL, padded.shape[1] // 2, 2).swapaxes(1, 2)
        columns = 32
        while columns < depth and _block_sums(weights, 2 * columns) < _LANE:
            columns *= 2
        return np.ascontiguousarray(packed), count, columns

    def take(self, x: I32) -> list[tuple[int, int, Array, Array]]:
        """Groups of rows (tokens in a tile, limbs, packed tiles, which rows)."""
        size = np.maximum(x.max(axis=1), -x.min(axis=1).astype(np.int64))
        groups = []
        for limbs, rows in ((2, np.flatnonzero(size < _TWO_LIMBS)), (3, np.flatnonzero(size >= _TWO_LIMBS))):
            if len(rows):
                tokens = 1 if len(rows) == 1 else 6 // limbs
                tiles = np.zeros((-(-len(rows) // tokens), -(-x.shape[1] // 2), tokens * limbs, 2), np.int16)
                _pack(x, rows, tokens, limbs, tiles)
                groups.append((tokens, limbs, tiles.view(np.int32)[..., 0], rows))
        return groups

    def multiply(self, x: Any, prepared: Any, done: Done) -> None:
        """See Path."""
        packed, count, columns = prepared
        rows = sum(len(group[3]) for group in x)
        step = max(8 * _PANEL, 2**16 // rows // _PANEL * _PANEL)

        def work(first: int, last: int) -> None:
            for a in range(first, last, step):
                b = min(last, a + step)
                sums = np.empty((rows, -(-(b - a) // _PANEL) * _PANEL), np.int64)
                for tokens, limbs, tiles, which in x:
                    chunk = max(1, _TILE_BYTES // (4 * tiles.shape[1] * tiles.shape[2]))
                    panels = packed[a // _PANEL : -(-b // _PANEL)]
                    _tiles(tokens, limbs, tiles, which, panels, columns // 2, chunk, sums)
                done(sums[:, : b - a], a, b)

        self._workers.split(count, work, _PANEL)


def _block_sums(weights: I16, columns: int) -> int:
    """The largest sum of |W| over a block of columns of a row."""
    largest = 0
    for start in range(0, len(weights), 4096):
        size = np.abs(weights[start : start + 4096].astype(np.int32))
        sums = [size[:, i : i + columns].sum(axis=1).max() for i in range(0, weights.shape[1], columns)]
        largest = max(largest, int(max(sums)))
    return largest


def _bytes(x: Array) -> tuple[Array, Array]:
    """(x - low) / 256 and low, -128 <= low <= 127."""
    low = ((x + 128) & 255) - 128
    return (x - low) >> 8, low


def blas_product() -> Callable[[Array, Array], Array]:
    """The float64 product of two matrices by torch, whose threads follow torch.set_num_threads; without it by numpy,
    whose BLAS takes all cores unless OMP_NUM_THREADS says otherwise when it is loaded."""
    try:
        import torch
    except ImportError:
        return np.matmul

    def product(a: Array, b: Array) -> Array:
        result: Array = torch.mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        return result

    return product


@compiled
def _vector(x: Array, weights: I16, out: Array, block: int) -> None:
    rows, depth = weights.shape
    for n in range(rows):
        total = np.int64(0)
        for start in range(0, depth, block):
            a0, a1, a2, a3 = 0.0, 0.0, 0.0, 0.0
            end = min(depth, start + block)
            k = start
            while k + 4 <= end:
                a0 += weights[n, k] * x[k]
                a1 += weights[n, k + 1] * x[k + 1]
                a2 += weights[n, k + 2] * x[k + 2]
                a3 += weights[n, k + 3] * x[k + 3]
                k += 4
            while k < end:
                a0 += weights[n, k] * x[k]
                k += 1
            total += np.int64((a0 + a1) + (a2 + a3))
        out[n] = total


PATHS: dict[str, Callable[[Workers], Path]] = {"float64": Float64, "int8": Int8, "int16": Int16}


def make_path(name: str | None, workers: Workers) -> Path:
    """A path by name, or the fastest on this machine. Raises ConfigurationError if it is unknown or lacks a library."""
    if name is None:
        return fastest(workers)
    try:
        return PATHS[name](workers)
    except KeyError:
        raise ConfigurationError(f"there is no matmul path {name!r}; there are {', '.join(PATHS)}.") from None
    except ImportError as error:
        raise ConfigurationError(f"the matmul path {name} needs {error.name}.", hint="Install it.") from error


_ROWS, _DEPTH, _OUTPUTS = 48, 512, 1024
"""The product that `fastest` times: some milliseconds each way."""


VNNI = ("avx512vnni", "avxvnni", "amx-int8")
"""CPUs with one of these multiply bytes quickly; on others torch's int8 product is a plain loop, 30 times slower."""


def fastest(workers: Workers) -> Path:
    """The path that multiplies quickest here, the best of three after one that compiles. All give the same bits, so a
    wrong choice costs time only."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-32_640, 32_641, (_OUTPUTS, _DEPTH)).astype(np.int16)
    x = rng.integers(-(2**20), 2**20, (_ROWS, _DEPTH)).astype(np.int32)
    best: tuple[float, Path] | None = None
    for name, make in PATHS.items():
        if name == "int8" and not any(map(cpu_has, VNNI)):
            continue
        try:
            path = make(workers)
        except ImportError:
            continue
        prepared = path.prepare(weights)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            path.multiply(path.take(x), prepared, lambda _sums, _first, _last: None)
            times.append(time.perf_counter() - begin)
        if best is None or min(times[1:]) < best[0]:
            best = min(times[1:]), path
    if best is None:
        raise ConfigurationError("no way to multiply is available.")
    return best[1]


@compiled
def _pack(x: I32, rows: Array, tokens: int, limbs: int, tiles: Array) -> None:
    depth = x.shape[1]
    for number in range(len(rows)):
        row, tile, slot = rows[number], number // tokens, number % tokens * limbs
        for column in range(depth):
            rest = np.int64(x[row, column])
            for limb in range(limbs - 1):
                low = ((rest + 2048) & 4095) - 2048
                tiles[tile, column >> 1, slot + limb, column & 1] = low
                rest = (rest - low) >> 12
            tiles[tile, column >> 1, slot + limbs - 1, column & 1] = rest


if HAVE_NUMBA and cpu_has("avx2"):
    from poip_chain.canonical.simd import multiply_tile

    @compiled
    def _tiles(
        tokens: int, limbs: int, tiles: Array, rows: Array, panels: I16, steps: int, chunk: int, sums: Array
    ) -> None:
        count, depth, height = tiles.shape
        x, w = tiles.reshape(-1), panels.reshape(-1)
        out = np.empty(3 * 16, np.int64)
        for begin in range(0, count, chunk):
            for panel in range(len(panels)):
                for tile in range(begin, min(count, begin + chunk)):
                    out[:] = 0
                    for start in range(0, depth, steps):
                        x_at, w_at = (tile * depth + start) * height, (panel * depth + start) * 32
                        length = min(steps, depth - start)
                        if limbs == 2:
                            if tokens == 3:
                                multiply_tile(3, 2, 12, x, x_at, w, w_at, length, out)
                            else:
                                multiply_tile(1, 2, 12, x, x_at, w, w_at, length, out)
                        elif tokens == 2:
                            multiply_tile(2, 3, 12, x, x_at, w, w_at, length, out)
                        else:
                            multiply_tile(1, 3, 12, x, x_at, w, w_at, length, out)
                    for slot in range(min(tokens, len(rows) - tile * tokens)):
                        row = rows[tile * tokens + slot]
                        for i in range(16):
                            sums[row, panel * 16 + i] = out[slot * 16 + i]
