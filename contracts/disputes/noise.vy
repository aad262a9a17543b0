# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title The sampler's noise
@custom:contract-name noise
@license AGPL-3.0-only
@notice The second writing of poip_chain/spec/sampler.py: seed, key of a position, 32 random bits of a token, and their
        Gumbel noise in integers. Bit for bit the same. Stateless.
        Why nothing overflows: coefficients of a polynomial sum to less than 2**30, its argument is at most 2**30, so every
        product is below 2**60; logarithms are below 36 * ln 2 * 2**30 < 2**35.
"""

_GOLDEN: constant(uint256) = 11400714819323198485
_MIX_1: constant(uint256) = 13787848793156543929
_MIX_2: constant(uint256) = 10723151780598845931
_MASK: constant(uint256) = 2**64 - 1

LN2: constant(uint256) = 744261118


@internal
@pure
def _seed(client_seed: bytes32) -> bytes32:
    """
    @dev The seed of an off-chain request.
    """
    return keccak256(concat(b"PoIP seed", client_seed))


@internal
@pure
def _position_key(seed: bytes32, position: uint256) -> uint256:
    """
    @dev position < 2**32.
    """
    return convert(keccak256(concat(seed, convert(convert(position, uint32), bytes4))), uint256) >> 192


@internal
@pure
def _uniform_bits(key: uint256, token: uint256) -> uint256:
    """
    @dev key < 2**64, token < 2**32. No product reaches 2**128.
    """
    z: uint256 = unsafe_add(key, unsafe_mul(unsafe_add(token, 1), _GOLDEN)) & _MASK
    z = unsafe_mul(z ^ (z >> 30), _MIX_1) & _MASK
    z = unsafe_mul(z ^ (z >> 27), _MIX_2) & _MASK
    return (z ^ (z >> 31)) >> 32


@internal
@pure
def _gumbel(bits: uint256) -> int256:
    """
    @dev -ln(-ln((bits + 1/2) / 2**32)) in units of 2**-16, bits < 2**32.
    """
    g: uint256 = 0
    if bits >> 31 == 1:
        x: uint256 = unsafe_add(unsafe_mul(2, unsafe_sub(2**32 - 1, bits)), 1)
        g = unsafe_sub(unsafe_sub(33 * LN2, self._ln(x)), self._tail(x >> 2))
    else:
        y: uint256 = unsafe_sub(33 * LN2, self._ln(unsafe_add(unsafe_mul(2, bits), 1)))
        g = unsafe_sub(30 * LN2, self._ln(y))
    # Below zero only here: two's complement until now.
    return unsafe_add(convert(convert(g, bytes32), int256), 2**13) >> 14


@internal
@pure
def _ln(x: uint256) -> uint256:
    """
    @dev ln x in units of 2**-30, 1 <= x < 2**36.
    """
    m: uint256 = x
    octave: uint256 = 36 * LN2
    if m < 2**20:
        m = m << 16
        octave = unsafe_sub(octave, 16 * LN2)
        if m < 2**20:
            m = m << 16
            octave = unsafe_sub(octave, 16 * LN2)
    if m < 2**28:
        m = m << 8
        octave = unsafe_sub(octave, 8 * LN2)
    if m < 2**32:
        m = m << 4
        octave = unsafe_sub(octave, 4 * LN2)
    if m < 2**34:
        m = m << 2
        octave = unsafe_sub(octave, 2 * LN2)
    if m < 2**35:
        m = m << 1
        octave = unsafe_sub(octave, LN2)
    s: uint256 = unsafe_sub(2**31, m >> 5)
    r: uint256 = unsafe_add(47662, unsafe_mul(40737, s) >> 30)
    r = unsafe_add(233016, unsafe_mul(unsafe_add(104857, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(1198372, unsafe_mul(unsafe_add(524288, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(6710886, unsafe_mul(unsafe_add(2796202, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(44739242, unsafe_mul(unsafe_add(16777216, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(536870912, unsafe_mul(unsafe_add(134217728, unsafe_mul(r, s) >> 30), s) >> 30)
    return unsafe_sub(octave, unsafe_mul(r, s) >> 30)


@internal
@pure
def _tail(s: uint256) -> uint256:
    """
    @dev ln(-ln(1 - s/2) / (s/2)) in units of 2**-30 for s <= 2**30 in the same units.
    """
    r: uint256 = unsafe_add(154595, unsafe_mul(120131, s) >> 30)
    r = unsafe_add(882458, unsafe_mul(unsafe_add(364574, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(5848723, unsafe_mul(unsafe_add(2213660, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(55924053, unsafe_mul(unsafe_add(16777216, unsafe_mul(r, s) >> 30), s) >> 30)
    r = unsafe_add(268435456, unsafe_mul(r, s) >> 30)
    return unsafe_mul(r, s) >> 30
