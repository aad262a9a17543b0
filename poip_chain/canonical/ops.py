"""The element-wise steps of `spec.canonical` over whole arrays: the compiled ones where numba is, else the plain ones.

All take and give exact integers; scores, weights of attention and sums of products may stand in float64, where every
value is a whole number below 2**53. Both writings give the same bits; tests compare each with the other and with spec.
"""

from __future__ import annotations

from types import ModuleType

from poip_chain.canonical import ops_plain
from poip_chain.canonical.compiled import HAVE_NUMBA

PLAIN: ModuleType = ops_plain
FAST: ModuleType = ops_plain
if HAVE_NUMBA:
    from poip_chain.canonical import ops_compiled

    FAST = ops_compiled
