"""keccak-256 of many equally long messages, and Merkle trees over 128-byte leaves (the shapes of `spec.merkle`).

One keccak alone keeps a core's vector units idle; hashed side by side, lane by lane, four or eight cost as much as one.
The compiled way is `simd.keccak_f`; without numba the same on numpy arrays, some five times slower. Knows bytes only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poip_chain.canonical.compiled import HAVE_NUMBA, Workers, compiled
from poip_chain.spec.types import ZERO_HASH, Hash32

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

_RATE = 136
_RATE_WORDS = 17
_CHUNK = 1024
"""Messages hashed at a time without numba: four arrays of 25 lanes of 8 bytes each, 800 kB, stay near the core."""

_ROUND_CONSTANTS = np.array([
    0x0000000000000001, 0x0000000000008082, 0x800000000000808A, 0x8000000080008000, 0x000000000000808B,
    0x0000000080000001, 0x8000000080008081, 0x8000000000008009, 0x000000000000008A, 0x0000000000000088,
    0x0000000080008009, 0x000000008000000A, 0x000000008000808B, 0x800000000000008B, 0x8000000000008089,
    0x8000000000008003, 0x8000000000008002, 0x8000000000000080, 0x000000000000800A, 0x800000008000000A,
    0x8000000080008081, 0x8000000000008080, 0x0000000080000001, 0x8000000080008008,
], dtype=np.uint64)  # fmt: skip
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
    result = np.empty((count, 4), np.uint64)
    blocks = length // _RATE + 1
    step = _CHUNK * 16
    for start in range(0, count, step):
        part = messages[start : start + step]
        padded = np.zeros((len(part), blocks * _RATE), np.uint8)
        padded[:, :length] = part
        padded[:, length] = 1
        padded[:, -1] |= 0x80
        sponge = _sponge if HAVE_NUMBA else sponge_plain
        sponge(padded.view(np.uint64), result[start : start + step], _ROUND_CONSTANTS)
    return result.view(np.uint8)


def hash_nodes(words: Words, domain: int, out: Words, workers: Workers | None = None) -> None:
    """keccak(domain byte || row) of each row of uint64 [n, 16] (leaves) or [n, 8] (pairs of nodes) into out [n, 4]."""
    if not HAVE_NUMBA:
        data = np.empty((len(words), 8 * words.shape[1] + 1), np.uint8)
        data[:, 0] = domain
        data[:, 1:] = np.ascontiguousarray(words).view(np.uint8)
        out[:] = keccak_many(data).view(np.uint64)
    elif workers is None or len(words) < 512:
        _nodes(words, domain, out, _ROUND_CONSTANTS)
    else:
        workers.split(len(words), lambda a, b: _nodes(words[a:b], domain, out[a:b], _ROUND_CONSTANTS), 8)


def leaf_nodes(leaves: Words, workers: Workers | None = None) -> Words:
    """Hashes of 128-byte leaves, uint64 [n, 16] -> [n, 4]."""
    out = np.empty((len(leaves), 4), np.uint64)
    hash_nodes(leaves, 0, out, workers)
    return out


def parents(level: Words, workers: Workers | None = None) -> Words:
    """One level up: [n, 4] -> [ceil(n / 2), 4]; an odd node at the end is promoted."""
    pairs = len(level) // 2
    out = np.empty((len(level) - pairs, 4), np.uint64)
    hash_nodes(np.ascontiguousarray(level[: 2 * pairs]).reshape(pairs, 8), 1, out[:pairs], workers)
    if len(level) % 2:
        out[-1] = level[-1]
    return out


def root_of(level: Words) -> Hash32:
    """The root over leaf hashes [n, 4]; bytes32(0) if there are none."""
    if not len(level):
        return ZERO_HASH
    while len(level) > 1:
        level = parents(level)
    return Hash32(level[0].tobytes())


def sponge_plain(words: Words, out: Words, _constants: Words) -> None:
    """Absorb padded messages [n, 17 * blocks] and squeeze [n, 4], on numpy arrays."""
    for start in range(0, len(words), _CHUNK):
        part = np.ascontiguousarray(words[start : start + _CHUNK].T)
        state = np.zeros((25, part.shape[1]), np.uint64)
        for block in range(len(part) // _RATE_WORDS):
            state[:_RATE_WORDS] ^= part[_RATE_WORDS * block : _RATE_WORDS * (block + 1)]
            _permute(state)
        out[start : start + _CHUNK] = state[:4].T


def _permute(state: Words) -> None:
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
        state[0] ^= constant


if HAVE_NUMBA:
    from poip_chain.canonical.simd import LANES, keccak_f

    @compiled
    def _nodes(words: Words, domain: int, out: Words, constants: Words) -> None:
        count, length = words.shape
        state = np.zeros(25 * LANES, np.uint64)
        eight, back = np.uint64(8), np.uint64(56)
        for start in range(0, count, LANES):
            lanes = min(LANES, count - start)
            state[:] = 0
            for lane in range(lanes):
                carry = np.uint64(domain)
                for i in range(length):
                    word = words[start + lane, i]
                    state[i * LANES + lane] = (word << eight) | carry
                    carry = word >> back
                state[length * LANES + lane] = carry | np.uint64(0x100)
                state[16 * LANES + lane] |= np.uint64(0x8000000000000000)
            keccak_f(state, constants)
            for lane in range(lanes):
                for i in range(4):
                    out[start + lane, i] = state[i * LANES + lane]

    @compiled
    def _sponge(words: Words, out: Words, constants: Words) -> None:
        count, length = words.shape
        state = np.zeros(25 * LANES, np.uint64)
        for start in range(0, count, LANES):
            lanes = min(LANES, count - start)
            state[:] = 0
            for block in range(0, length, 17):
                for lane in range(lanes):
                    for i in range(17):
                        state[i * LANES + lane] ^= words[start + lane, block + i]
                keccak_f(state, constants)
            for lane in range(lanes):
                for i in range(4):
                    out[start + lane, i] = state[i * LANES + lane]
