"""Scaled rotary embeddings: how a checkpoint's `rope_scaling` entry changes the angles of the committed RoPE table.

The scaling enters canonical execution only here: the table is rows of weights_root, and whoever uses it, the court
included, reads rows. `ModelConfig.rope_scaling_hash` names the entry; whoever derives the table needs the entry itself.
Version 1 knows two kinds, by their definition in the checkpoints' own reference code:

    linear   every frequency divided by `factor`
    llama3   frequencies of a wavelength above original / low_freq_factor divided by `factor`, those below
             original / high_freq_factor kept, and in between a mean of both, linear in original / wavelength

Others ("dynamic", "yarn", "longrope") are refused by name: they change with the length of the text, or scale attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from eth_hash.auto import keccak

from poip_chain.errors import UnsupportedModel
from poip_chain.spec.types import ZERO_HASH, Hash32

PI_BITS = 160
TWO_PI = Fraction(
    2 * 31_415_926_535_897_932_384_626_433_832_795_028_841_971_693_993_751_058_209_749_445_923_078_164_062_862,
    10**76,
)
"""2 pi, 77 digits: far beyond the 160 bits of the table's working precision."""


@dataclass(frozen=True)
class RopeScaling:
    """A rope_scaling entry of a supported kind. `entry` holds exactly the keys that its kind uses."""

    entry: Mapping[str, Any]

    @classmethod
    def parse(cls, entry: Mapping[str, Any] | None) -> RopeScaling | None:
        """The scaling of a checkpoint's rope_scaling or rope_parameters entry; None if it does not scale.

        Raises UnsupportedModel for another kind, or a parameter that is missing or out of range.
        """
        entry = entry or {}
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind == "default":
            return None
        keys = {
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }.get(kind)
        if keys is None:
            raise UnsupportedModel(
                f"rotary embeddings of type {kind!r:.40} are not supported; supported are default, linear and llama3."
            )
        for key in keys:
            value = entry.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**32:
                raise UnsupportedModel(f"rotary embeddings of type {kind!r} need a positive {key}, not {value!r:.40}.")
        if entry["factor"] < 1 or (kind == "llama3" and entry["low_freq_factor"] >= entry["high_freq_factor"]):
            raise UnsupportedModel(f"rotary embeddings of type {kind!r} have factors out of order.")
        return cls({"rope_type": kind, **{key: entry[key] for key in keys}})

    def hash(self) -> Hash32:
        """keccak of the canonical JSON: sorted keys, no spaces, whole numbers without a point."""
        entry = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in self.entry.items()}
        return Hash32(keccak(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()))

    def scale(self, angle: int) -> int:
        """The scaled angle per position, in the units of `angle` (2**-160), rounded to nearest."""
        factor = Fraction(self.entry["factor"])
        share = Fraction(0)  # of the unscaled angle
        if self.entry["rope_type"] == "llama3":
            turns = Fraction(self.entry["original_max_position_embeddings"]) * angle / (TWO_PI * 2**PI_BITS)
            low, high = Fraction(self.entry["low_freq_factor"]), Fraction(self.entry["high_freq_factor"])
            share = min(Fraction(1), max(Fraction(0), (turns - low) / (high - low)))
        return round((1 - share) * angle / factor + share * angle)


def scaling_hash(scaling: RopeScaling | None) -> Hash32:
    """ModelConfig.rope_scaling_hash."""
    return scaling.hash() if scaling else ZERO_HASH
