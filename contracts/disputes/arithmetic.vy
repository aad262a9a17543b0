# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Canonical arithmetic, version 1
@custom:contract-name arithmetic
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/canonical.py, and of the numbers in leaves and weight rows: little-endian
        two's complement, 32 or 64 bits in a leaf, 16 bits in a weight row, 32 in a RoPE table. Results are exact for
        whatever 64-bit inputs a trace may hold, possible ones or not. Stateless; knows no model and no trace.
"""

RESIDUAL_BITS: constant(uint256) = 20
NORM_BITS: constant(uint256) = 16
ROPE_SHIFT: constant(int256) = 34
QK_LIMIT: constant(int256) = 2**22 - 1
LINEAR_QK_LIMIT: constant(int256) = 2**26
HIDDEN_LIMIT: constant(int256) = 2**27 - 1
EXP_LIMIT: constant(int256) = 2**25
DISTANCE_LIMIT: constant(int256) = 2**33
LOG2E: constant(int256) = 1549082005

# A one in each group of 64, 32 or 16 bits of a word.
_EACH_64: constant(uint256) = 1 + 2**64 + 2**128 + 2**192
_EACH_32: constant(uint256) = _EACH_64 * (1 + 2**32)
_EACH_16: constant(uint256) = _EACH_32 * (1 + 2**16)

# Bytes of a word are addressed from the left, its integers hold their lowest byte first: masks to turn them around.
_BYTES: constant(uint256) = _EACH_16 * (2**8 - 1)
_PAIRS: constant(uint256) = _EACH_32 * (2**16 - 1)
_FOURS: constant(uint256) = _EACH_64 * (2**32 - 1)

# Four lanes of 64 bits with a 16- or 32-bit number in each, and the sign bits of those.
_LANES_16: constant(uint256) = _EACH_64 * (2**16 - 1)
_SIGNS_16: constant(uint256) = _EACH_64 * 2**15
_SIGNS_32: constant(uint256) = _EACH_64 * 2**31

# Two lanes of 128 bits with a 32-bit number in each, and their sign bits.
_HALVES: constant(uint256) = (1 + 2**128) * (2**32 - 1)
_SIGNS_HALVES: constant(uint256) = (1 + 2**128) * 2**31

# 64-bit quarters of a word, highest first.
_QUARTER_3: constant(uint256) = (2**64 - 1) * 2**192
_QUARTER_2: constant(uint256) = (2**64 - 1) * 2**128
_QUARTER_1: constant(uint256) = (2**64 - 1) * 2**64
_QUARTER_0: constant(uint256) = 2**64 - 1


# Numbers in bytes


@internal
@pure
def _signed(x: uint256, bits: uint256) -> int256:
    """
    @dev The `bits` highest bits of a word as a signed number.
    """
    return convert(convert(x, bytes32), int256) >> (256 - bits)


@internal
@pure
def _words_32(word: uint256) -> uint256:
    """
    @dev A word of eight little-endian 32-bit numbers, each turned around; the first stays highest.
    """
    x: uint256 = ((word & _BYTES) << 8) | ((word >> 8) & _BYTES)
    return ((x & _PAIRS) << 16) | ((x >> 16) & _PAIRS)


@internal
@pure
def _words_64(word: uint256) -> uint256:
    """
    @dev A word of four little-endian 64-bit numbers, each turned around; the first stays highest.
    """
    x: uint256 = self._words_32(word)
    return ((x & _FOURS) << 32) | ((x >> 32) & _FOURS)


@internal
@pure
def _narrow(leaves: Bytes[4096], element: uint256) -> int256:
    """
    @dev Element of leaves of int32, 32 in each.
    """
    word: uint256 = self._words_32(extract32(leaves, (element >> 3) << 5, output_type=uint256))
    return self._signed(word << ((element & 7) << 5), 32)


@internal
@pure
def _wide(leaves: Bytes[4096], element: uint256) -> int256:
    """
    @dev Element of leaves of int64, 16 in each.
    """
    word: uint256 = self._words_64(extract32(leaves, (element >> 2) << 5, output_type=uint256))
    return self._signed(word << ((element & 3) << 6), 64)


@internal
@pure
def _int16(low_first: uint256) -> int256:
    """
    @dev The little-endian int16 in the two highest bytes of a word.
    """
    return self._signed(((low_first >> 8) & (255 << 240)) | ((low_first << 8) & (255 << 248)), 16)


@internal
@pure
def _int32(low_first: uint256) -> int256:
    """
    @dev The little-endian int32 in the four highest bytes of a word.
    """
    return self._signed(self._words_32(low_first), 32)


# Sums of products. Numbers lie in lanes of a word so far apart that one multiplication forms several products and adds
# those wanted in the highest lane: lane i of one factor meets lane (last - i) of the other.


@internal
@pure
def _dot_weights(weights: Bytes[578], inputs: Bytes[4096], columns: uint256) -> int256:
    """
    @dev The sum of products of `columns` <= 128 int16 weights and int32 inputs. Weights must be zero-filled to a whole
         word. Of 16 columns, multiplication k forms those of columns k, k + 4, k + 8, k + 12. A lane's sum is below
         128 * 2**46 = 2**53 for any inputs.
    """
    lanes: uint256 = 0
    for i: uint256 in range((columns + 15) >> 4, bound=8):
        w: uint256 = extract32(weights, i << 5, output_type=uint256)
        w = ((w & _BYTES) << 8) | ((w >> 8) & _BYTES)
        a: uint256 = extract32(inputs, i << 6, output_type=uint256)
        b: uint256 = extract32(inputs, (i << 6) + 32, output_type=uint256)
        # Columns 0 1, 4 5, 8 9, 12 13 and 2 3, 6 7, 10 11, 14 15, lowest lane first.
        x: uint256 = self._words_32((a >> 192) | (a & _QUARTER_1) | ((b & _QUARTER_3) >> 64) | ((b & _QUARTER_1) << 128))
        y: uint256 = self._words_32(
            ((a & _QUARTER_2) >> 128) | ((a & _QUARTER_0) << 64) | ((b & _QUARTER_2)) | ((b & _QUARTER_0) << 192)
        )
        lanes = unsafe_add(
            lanes,
            unsafe_mul(
                unsafe_sub(((w >> 48) & _LANES_16) ^ _SIGNS_16, _SIGNS_16),
                unsafe_sub(((x >> 32) & _FOURS) ^ _SIGNS_32, _SIGNS_32),
            ),
        )
        lanes = unsafe_add(
            lanes,
            unsafe_mul(
                unsafe_sub(((w >> 32) & _LANES_16) ^ _SIGNS_16, _SIGNS_16),
                unsafe_sub((x & _FOURS) ^ _SIGNS_32, _SIGNS_32),
            ),
        )
        lanes = unsafe_add(
            lanes,
            unsafe_mul(
                unsafe_sub(((w >> 16) & _LANES_16) ^ _SIGNS_16, _SIGNS_16),
                unsafe_sub(((y >> 32) & _FOURS) ^ _SIGNS_32, _SIGNS_32),
            ),
        )
        lanes = unsafe_add(
            lanes,
            unsafe_mul(
                unsafe_sub((w & _LANES_16) ^ _SIGNS_16, _SIGNS_16), unsafe_sub((y & _FOURS) ^ _SIGNS_32, _SIGNS_32)
            ),
        )
    # The lanes below the highest are sums of signed numbers: half of its unit rounds their borrow away.
    return self._signed(unsafe_add(lanes, 1 << 191), 64)


@internal
@pure
def _dot(a: Bytes[4128], b: Bytes[4096], columns: uint256) -> int256:
    """
    @dev The sum of products of `columns` <= 512 int32 each. `a` must be zero-filled to a whole word. Of 8 columns,
         multiplication k forms those of columns k and k + 4. A lane's sum is below 2**72 for any numbers.
    """
    lanes: uint256 = 0
    for i: uint256 in range((columns + 7) >> 3, bound=64):
        x: uint256 = self._words_32(extract32(a, i << 5, output_type=uint256))
        y: uint256 = self._words_32(extract32(b, i << 5, output_type=uint256))
        y = (y << 128) | (y >> 128)
        for k: uint256 in range(4):
            lanes = unsafe_add(
                lanes,
                unsafe_mul(
                    unsafe_sub((x & _HALVES) ^ _SIGNS_HALVES, _SIGNS_HALVES),
                    unsafe_sub((y & _HALVES) ^ _SIGNS_HALVES, _SIGNS_HALVES),
                ),
            )
            x = x >> 32
            y = y >> 32
    return self._signed(unsafe_add(lanes, 1 << 127), 128)


@internal
@pure
def _total(leaf: Bytes[128]) -> int256:
    """
    @dev The sum of a leaf of int32.
    """
    total: int256 = 0
    for i: uint256 in range(4):
        word: uint256 = self._words_32(extract32(leaf, i << 5, output_type=uint256))
        for k: uint256 in range(8):
            total += self._signed(word << (k << 5), 32)
    return total


# Rounding


@internal
@pure
def _rsh(x: int256, s: int256) -> int256:
    """
    @dev x * 2**-s rounded to nearest, halves upwards, for |x| < 2**127. Beyond a shift of 255 it is 0 as at 255.
         A shift upwards that leaves 256 bits, of a model that `bounds.py` refuses, reverts.
    """
    if s > 0:
        right: uint256 = convert(min(s, 255), uint256)
        return (x + convert(1 << (right - 1), int256)) >> right
    if x == 0:
        return 0
    assert s > -128, "referee: exponent is out of range"
    return x << convert(-s, uint256)


@internal
@pure
def _clamp(x: int256, limit: int256) -> int256:
    return max(-limit, min(limit, x))


@internal
@pure
def _floor_div(a: int256, b: int256) -> int256:
    """
    @dev Rounded down, b > 0. Vyper's own division rounds towards zero.
    """
    quotient: int256 = a // b
    if a % b < 0:
        quotient -= 1
    return quotient


@internal
@pure
def _bit_length(x: uint256) -> uint256:
    """
    @dev Of x < 2**128.
    """
    rest: uint256 = x
    bits: uint256 = 0
    for step: uint256 in [64, 32, 16, 8, 4, 2, 1]:
        if rest >> step != 0:
            rest = rest >> step
            bits += step
    return bits + min(rest, 1)


# RMSNorm


@internal
@pure
def _norm_shift(largest: int256) -> int256:
    """
    @dev largest >= 0.
    """
    bits: uint256 = self._bit_length(convert(largest, uint256))
    return convert(max(bits, 24) - 24, int256)


@internal
@pure
def _norm_epsilon(eps_e12: uint256, columns: uint256, bits: uint256, shifted: int256) -> int256:
    start: uint256 = (((eps_e12 * columns) << (2 * bits)) + 5 * 10**11) // 10**12
    return convert(start >> convert(2 * shifted, uint256), int256)


@internal
@pure
def _norm_element(
    h: int256, shifted: int256, total: int256, columns: uint256, gain: int256, gain_exponent: int256
) -> int256:
    """
    @dev One element of the norm's output from the sum of squares `total`: norm_scale and norm_element of the spec.
    """
    assert 0 < total and total < 2**62, "referee: inputs are those of no forward pass"
    v: uint256 = convert(total, uint256)
    t: uint256 = 62 - self._bit_length(v)
    t -= t & 1
    multiplier: uint256 = (isqrt(columns << 40) << 36) // isqrt(v << t)
    y: int256 = self._rsh(self._rsh(h, shifted) * convert(multiplier, int256), convert(36 - t // 2, int256))
    return self._rsh(y * gain, convert(RESIDUAL_BITS - NORM_BITS, int256) - gain_exponent)


# Attention


@internal
@pure
def _rope(x0: int256, x1: int256, cosine: int256, sine: int256, second: bool) -> int256:
    """
    @dev The first or second coordinate of a rotated pair.
    """
    turned: int256 = x0 * cosine - x1 * sine
    if second:
        turned = x1 * cosine + x0 * sine
    return self._clamp(self._rsh(turned, ROPE_SHIFT), QK_LIMIT)


@internal
@pure
def _exp_negative(d: int256) -> (int256, int256):
    """
    @dev exp(-d) = r * 2**-(30 + n), d >= 0 in units of 2**-20.
    """
    z: int256 = min(d, EXP_LIMIT) * LOG2E
    f: int256 = (z >> 20) & (2**30 - 1)
    r: int256 = 117454
    r = -1369790 + ((r * f) >> 30)
    r = 10286509 + ((r * f) >> 30)
    r = -59583045 + ((r * f) >> 30)
    r = 257938938 + ((r * f) >> 30)
    r = -744260975 + ((r * f) >> 30)
    r = 1073741824 + ((r * f) >> 30)
    return r, z >> 50


@internal
@pure
def _score_multiplier(head_dim: uint256) -> int256:
    return convert((isqrt((1 << 62) // head_dim) + 1) >> 1, int256)


@internal
@pure
def _attention_weight(distance: int256, multiplier: int256) -> int256:
    """
    @dev distance >= 0.
    """
    r: int256 = 0
    n: int256 = 0
    r, n = self._exp_negative((min(distance, DISTANCE_LIMIT) * multiplier) >> 34)
    return self._rsh(r, min(n + 10, 40))


@internal
@pure
def _attend(products: int256, total: int256) -> int256:
    assert total > 0, "referee: inputs are those of no forward pass"
    return self._floor_div((products << 5) + total, 2 * total)


# Feed-forward


@internal
@pure
def _swiglu(gate: int256, up: int256) -> int256:
    r: int256 = 0
    n: int256 = 0
    r, n = self._exp_negative(abs(gate) << 4)
    e: int256 = r >> convert(min(n, 40), uint256)
    sigma: int256 = 2**60
    if gate < 0:
        sigma = e << 30
    sigma = sigma // (2**30 + e)
    silu: int256 = self._rsh(gate * sigma, 30)
    return self._clamp(self._rsh(silu * up, 18), HIDDEN_LIMIT)
