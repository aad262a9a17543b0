# pragma version 0.4.3
# pragma evm-version cancun
# pragma nonreentrancy on
# SPDX-License-Identifier: AGPL-3.0-only
"""
@title Stands in for the commitment log where only the registry is tested
@license AGPL-3.0-only
@custom:security For tests only.
@custom:kill None.
"""

next_seq: public(HashMap[address, uint64])


@external
def set_next_seq(node: address, seq: uint64):
    """
    @notice Say which seq the node's next batch starts with.
    """
    self.next_seq[node] = seq
