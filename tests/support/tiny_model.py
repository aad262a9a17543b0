"""A model directory of some hundred weights: everything that `prepare` reads, hashed in a fraction of a second."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from poip_chain.spec import weights
from poip_chain.spec.objects import ModelConfig
from tests.engines.tiny_tokenizer import write_tokenizer
from tests.vectors.generate_numeric import TINY, tiny_tensors

CONFIG = dataclasses.replace(TINY, attention_bias=False)


def write_tiny_model(directory: Path, seed: int = 1, config: ModelConfig = CONFIG) -> Path:
    """Write a model of these dimensions into `directory`; another seed makes another model. Has QK-norm, no biases."""
    write_tokenizer(directory)
    known = tiny_tensors(config, seed)
    tensors = {}
    for plan in weights.tensor_plan(config):
        if plan.source:
            tensor = np.array(known[plan.source], dtype=np.float32)
            tensors[plan.source] = tensor[0].copy() if plan.rows == 1 else tensor
    save_file(tensors, directory / "model.safetensors")
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(config.rope_theta),
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "eos_token_id": [3, 2],
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return directory
