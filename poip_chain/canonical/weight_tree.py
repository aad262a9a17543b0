"""The tree over a model's rows of weights, to prove rows that a step reads. 64 bytes a row: 13 MB for the default model."""

from __future__ import annotations

from poip_chain.canonical import keccak
from poip_chain.canonical.weights import Weights
from poip_chain.errors import IntegrityError
from poip_chain.spec.types import Hash32


class WeightTree:
    """All nodes of weights_root, by hashing every row once. With `root`: raises IntegrityError if it is another."""

    def __init__(self, weights: Weights, root: bytes | None = None) -> None:
        self._levels = [weights.row_hashes()]
        while len(self._levels[-1]) > 1:
            self._levels.append(keccak.parents(self._levels[-1]))
        if root is not None and self.root != root:
            raise IntegrityError(
                "the canonical weights in use are not those of the model's weights_root.",
                hint="Check the model's files with `poip model verify`.",
            )

    @property
    def root(self) -> Hash32:
        """weights_root."""
        return self.node(len(self._levels) - 1, 0)

    def node(self, level: int, index: int) -> Hash32:
        """A node; level 0 are the rows."""
        return Hash32(self._levels[level][index].tobytes())
