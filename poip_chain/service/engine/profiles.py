"""The profile that a model is registered with when nobody has calibrated one.

The limits are for suspicion: they are wide against the honest noise that was measured for bf16 engines on CPUs (margins
above 0.36 logits in none of 14,000 tokens, listed differences of 0.07 nat on average), and narrow against int4 weights or
a dropped layer. A profile whose limits convict comes out of a calibration on the model and hardware in question.
"""

from __future__ import annotations

from poip_chain.service.engine.model import ModelHashes
from poip_chain.spec.objects import Profile, ThresholdRow

LOGIT = 2**16
NAT = 64

MARGIN_DEAD_ZONE = LOGIT // 4
MARGIN_HARD_LIMIT = 3 * LOGIT
MARGIN_TABLE = tuple(ThresholdRow(tokens, limit * LOGIT) for tokens, limit in ((16, 2), (64, 3), (256, 6), (1024, 16)))
FINGERPRINT_DEAD_ZONE = NAT // 4
FINGERPRINT_TOLERANCE = NAT // 2
FINGERPRINT_TABLE = tuple(
    ThresholdRow(tokens, per_token * tokens) for tokens, per_token in ((16, 40), (64, 24), (256, 16), (1024, 12))
)


def uncalibrated_profile(hashes: ModelHashes, max_context: int = 2048, dtype: str = "bfloat16") -> Profile:
    """A profile for a prepared model, served with `max_context` tokens (bounded by what the model was made for)."""
    return Profile(
        max_context=min(max_context, hashes.config.max_positions),
        vocab_size=hashes.config.vocab_size,
        dtype=dtype,
        kv_dtype=dtype,
        min_temperature_milli=100,
        max_temperature_milli=2000,
        end_token_ids=hashes.end_token_ids,
        margin_dead_zone=MARGIN_DEAD_ZONE,
        margin_hard_limit=MARGIN_HARD_LIMIT,
        margin_table=MARGIN_TABLE,
        fingerprint_dead_zone=FINGERPRINT_DEAD_ZONE,
        fingerprint_tolerance=FINGERPRINT_TOLERANCE,
        fingerprint_table=FINGERPRINT_TABLE,
    )
