"""Which architectures have a canonical execution: a checkpoint's config.json to the dimensions that name the model.

The only place that decides this. Everything that would make the forward pass another function than `forward.py` is
refused with the name of what is missing; a feature that a file mentions but does not use is let pass. No files here:
service/engine/model.py reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poip_chain.errors import UnsupportedModel
from poip_chain.spec.objects import ModelConfig
from poip_chain.spec.rope_scaling import RopeScaling, scaling_hash

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_OFF: tuple[Any, ...] = (None, False, 0)
FEATURES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "hidden_act": ("an activation other than SiLU", (None, "silu", "swish")),
    "hidden_activation": ("an activation other than SiLU", (None, "silu", "swish")),
    "quantization_config": ("quantised weights", (None,)),
    "mlp_bias": ("biases in the feed-forward", _OFF),
    "attn_logit_softcapping": ("soft-capped attention scores", _OFF),
    "final_logit_softcapping": ("soft-capped logits", _OFF),
    "num_experts": ("a mixture of experts", _OFF),
    "num_local_experts": ("a mixture of experts", _OFF),
    "n_routed_experts": ("a mixture of experts", _OFF),
    "alibi": ("ALiBi positions", _OFF),
    "clip_qkv": ("clipped q, k and v", _OFF),
    "parallel_residual": ("attention and feed-forward in parallel", _OFF),
    "use_parallel_residual": ("attention and feed-forward in parallel", _OFF),
    "partial_rotary_factor": ("rotary embeddings over a part of each head", (None, 1)),
    "attention_multiplier": ("attention scores with a scale of their own", (None,)),
    "residual_multiplier": ("a scaled residual stream", (None, 1)),
    "embedding_multiplier": ("scaled embeddings", (None, 1)),
    "logits_scaling": ("scaled logits", (None, 1)),
}
"""config.json's key -> (what it would mean, the values that mean it is not used)."""


def model_config(settings: Mapping[str, Any], where: str = "the model") -> tuple[ModelConfig, RopeScaling | None]:
    """The dimensions of a checkpoint and its RoPE scaling, from the contents of config.json. `where` is for messages.

    Raises UnsupportedModel, naming what the canonical execution lacks or which dimension is missing.
    """
    s = settings
    name = (s.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where} is a {name}; supported architectures are {', '.join(ARCHITECTURES)}.",
            hint="Models of other architectures have no canonical execution yet.",
        )
    for key, (meaning, unused) in FEATURES.items():
        if s.get(key) not in unused:
            raise UnsupportedModel(f"{where} sets {key} = {s[key]!r:.80}: {meaning}, which is not supported.")
    if name != "Qwen2ForCausalLM" and s.get("attention_bias"):
        raise UnsupportedModel(f"{where} has a bias on the attention output, which is not supported.")
    try:
        heads = s["num_attention_heads"]
        positions = s["max_position_embeddings"]
        _refuse_sliding_window(s, name, positions, where)
        scaling, theta = _rotary(s, where)
        config = ModelConfig(
            hidden_size=s["hidden_size"],
            intermediate_size=s["intermediate_size"],
            num_layers=s["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=s.get("num_key_value_heads") or heads,
            head_dim=s.get("head_dim") or s["hidden_size"] // heads,
            vocab_size=s["vocab_size"],
            max_positions=positions,
            rms_norm_eps_e12=round(s["rms_norm_eps"] * 10**12),
            rope_theta=theta,
            rope_scaling_hash=scaling_hash(scaling),
            tied_embeddings=bool(s.get("tie_word_embeddings", False)),
            attention_bias=name == "Qwen2ForCausalLM",
            mlp_bias=False,
            qk_norm=name == "Qwen3ForCausalLM",
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModel(f"{where} lacks or misstates a dimension in config.json: {error}") from error
    return config, scaling


def _refuse_sliding_window(s: Mapping[str, Any], name: str, positions: int, where: str) -> None:
    """A window that no position leaves is none. Mistral's is in use wherever it is set; Qwen's has a switch."""
    kinds = set(s.get("layer_types") or ())
    used = s.get("use_sliding_window", name == "MistralForCausalLM") or "sliding_attention" in kinds
    if (s.get("sliding_window") or positions) < positions and used:
        raise UnsupportedModel(f"{where} uses sliding-window attention, which is not supported.")
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{where} has layers of type {', '.join(sorted(map(str, kinds)))}: not supported.")


def _rotary(s: Mapping[str, Any], where: str) -> tuple[RopeScaling | None, int]:
    """Scaling and base of the rotary embedding, which newer files keep together in rope_parameters."""
    parameters = s.get("rope_parameters") or s.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", s.get("rope_theta", 10_000))
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedModel(f"{where} uses rotary embeddings over a part of each head, which is not supported.")
    if theta != int(theta) or not 2 <= theta < 2**64:
        raise UnsupportedModel(f"{where} has the rotary base {theta!r:.40}; supported are whole numbers from 2.")
    return RopeScaling.parse(parameters), int(theta)
