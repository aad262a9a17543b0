"""The fast engine of canonical arithmetic: the same bits as `poip_chain/spec`, at the speed of a float library.

    keccak    hashes of many equal messages          simd, compiled   numba, and the instructions it would not find
    weights   int16 rows of a model directory        matmul           exact products, several ways, the same bits
    ops       element-wise steps                     model            prefill and cached decode
    trace     the Merkle tree over a forward pass    selftest         refuses a machine that computes anything else

Knows no chain, no game and no network. Without numba everything runs on numpy, slowly.
"""
