"""Domain types of the protocol: names for plain ints, bytes and strings, checked by the type checker alone."""

from __future__ import annotations

from typing import NewType

Address = NewType("Address", str)
"""An EIP-55 checksummed address, '0x' + 40 hex digits."""
Hash32 = NewType("Hash32", bytes)
"""A keccak-256 digest or Merkle root: exactly 32 bytes."""
Wei = NewType("Wei", int)
"""An amount of the network's token in its smallest unit, >= 0."""
Seq = NewType("Seq", int)
"""A receipt's number within its node: 0, 1, 2, ... without gaps."""
TokenId = NewType("TokenId", int)
"""An index into a model's vocabulary, 0 <= id < vocab_size <= 2**32."""

ZERO_ADDRESS = Address("0x0000000000000000000000000000000000000000")
ZERO_HASH = Hash32(bytes(32))
