# pragma version 0.4.3
# pragma nonreentrancy off
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Beacons: the mixHash (prevrandao) of fixed blocks, proven by their headers
@custom:contract-name beacon
@license AGPL-3.0-only
@notice A header is accepted if its keccak is the hash of the block that it numbers, by BLOCKHASH (256 blocks) or the
        EIP-2935 history contract (8,191 blocks). The mixHash is taken, not the block hash: a proposer can grind the
        contents of a header for free, while withholding a block costs it the block. A chain with a better source of
        randomness replaces this module.
"""

from snekmate.utils import block_hash


event BeaconSubmitted:
    block_number: indexed(uint256)
    mix_hash: bytes32


# Later targets of a batch whose beacon was missed. 8,192 is more than the 8,191 blocks that can be proven, so a later
# target can be submitted only when the earlier ones no longer can: a batch's beacon never changes.
TARGET_STEP: constant(uint256) = 8192
TARGETS: constant(uint256) = 4

_NUMBER_ITEM: constant(uint256) = 8
_MIX_HASH_ITEM: constant(uint256) = 13

# The mixHash of a block whose header was submitted; zero if it was not.
beacon_at: public(HashMap[uint256, bytes32])


@deploy
def __init__():
    pass


@internal
def _submit(header_rlp: Bytes[1024]) -> (uint256, bytes32):
    """
    @dev Check a block header against the chain and keep its mixHash. Submitting one again changes nothing.
    """
    number: uint256 = 0
    mix_hash: bytes32 = empty(bytes32)
    number, mix_hash = self._parse(header_rlp)
    expected: bytes32 = block_hash._block_hash(number)
    assert expected != empty(bytes32), "beacon: block hash is not available"
    assert keccak256(header_rlp) == expected, "beacon: header is not this chain's"
    assert mix_hash != empty(bytes32), "beacon: header has no mix hash"
    if self.beacon_at[number] == empty(bytes32):
        self.beacon_at[number] = mix_hash
        log BeaconSubmitted(block_number=number, mix_hash=mix_hash)
    return number, mix_hash


@internal
@view
def _of_target(target: uint256) -> bytes32:
    """
    @dev The first submitted beacon of `target` and the fixed blocks after it; zero if there is none.
    """
    for k: uint256 in range(TARGETS):
        found: bytes32 = self.beacon_at[target + k * TARGET_STEP]
        if found != empty(bytes32):
            return found
    return empty(bytes32)


@internal
@pure
def _parse(header_rlp: Bytes[1024]) -> (uint256, bytes32):
    """
    @dev Block number and mixHash of an RLP list of strings. It need not tell every malformed header from a good one:
         only bytes with the hash of a real block are used.
    """
    first: uint256 = self._byte(header_rlp, 0)
    assert first >= 248, "beacon: not a block header"
    position: uint256 = first - 246
    number: uint256 = 0
    mix_hash: bytes32 = empty(bytes32)
    for item: uint256 in range(_MIX_HASH_ITEM + 1):
        start: uint256 = 0
        size: uint256 = 0
        start, size = self._string_at(header_rlp, position)
        if item == _NUMBER_ITEM:
            assert size <= 8, "beacon: not a block header"
            number = self._integer(header_rlp, start, size)
        if item == _MIX_HASH_ITEM:
            assert size == 32, "beacon: not a block header"
            mix_hash = extract32(header_rlp, start)
        position = start + size
    return number, mix_hash


@internal
@pure
def _string_at(data: Bytes[1024], position: uint256) -> (uint256, uint256):
    """
    @dev Where the contents of the RLP string at `position` start, and their length.
    """
    prefix: uint256 = self._byte(data, position)
    if prefix < 128:
        return position, 1
    if prefix < 184:
        return position + 1, prefix - 128
    assert prefix < 186, "beacon: not a block header"
    width: uint256 = prefix - 183
    return position + 1 + width, self._integer(data, position + 1, width)


@internal
@pure
def _integer(data: Bytes[1024], start: uint256, size: uint256) -> uint256:
    """
    @dev The big-endian integer in `size` <= 8 bytes.
    """
    number: uint256 = 0
    for i: uint256 in range(8):
        if i == size:
            break
        number = number * 256 + self._byte(data, start + i)
    return number


@internal
@pure
def _byte(data: Bytes[1024], position: uint256) -> uint256:
    assert position < len(data), "beacon: not a block header"
    return convert(slice(data, position, 1), uint256)
