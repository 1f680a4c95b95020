"""A tiny Qwen3.5 with random weights: layers with Gated DeltaNet between attention layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import tiny_config, write_shards, write_tokenizer

from tritgguf.architectures.dimensions import dimensions_from_config
from tritgguf.architectures.tensor_names import hf_tensors

TYPES = ("linear_attention", "full_attention", "linear_attention", "linear_attention")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
_OF_MIXTURE = {
    "model_type": "qwen3_5_moe_text",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}


def qwen35_config(*, is_mixture: bool = False, **entries: Any) -> dict[str, Any]:
    """Return a config.json of four layers, one of them with attention; each key head serves two value heads."""
    of_kind = _OF_MIXTURE if is_mixture else {"model_type": "qwen3_5_text"}
    entries = {
        **of_kind,
        "num_hidden_layers": len(TYPES),
        "layer_types": list(TYPES),
        "head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": ROPE,
        "tokenizer": "qwen2",
        **entries,
    }
    config = tiny_config("Qwen3_5MoeForCausalLM" if is_mixture else "Qwen3_5ForCausalLM", **entries)
    if is_mixture:
        del config["intermediate_size"]
    return config


def qwen35_weights(config: dict[str, Any], seed: int = 5) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face name."""
    generator, dimensions = np.random.default_rng(seed), dimensions_from_config(config)
    weights = {}
    for name, tensor in hf_tensors(dimensions.architecture, dimensions.shapes()).items():
        numbers = generator.standard_normal(tensor.shape)
        if name.endswith("A_log"):
            numbers = np.log(generator.uniform(0.01, 2.0, tensor.shape))
        elif name.endswith("linear_attn.norm.weight"):
            numbers = 1 + 0.2 * numbers
        elif name.endswith("norm.weight"):
            numbers *= 0.2
        elif len(tensor.shape) > 1 and "embed_tokens" not in name:
            numbers /= np.sqrt(tensor.shape[-1])
        weights[name] = numbers.astype(np.float16).astype(np.float32)
    return weights


def fused_experts(weights: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights of a mixture as they are published: all experts of a layer in two tensors."""
    fused = {name: values for name, values in weights.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([weights[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(config["num_experts"])])
            for kind in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    return fused


def write_tiny_qwen35(folder: Path, *, is_mixture: bool = False, fused: bool = False, **entries: Any) -> Path:
    """Write a folder of this model and return it; `entries` replace some of config.json."""
    config = qwen35_config(is_mixture=is_mixture, **entries)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, "qwen2")
    weights = qwen35_weights(config)
    write_shards(folder, fused_experts(weights, config) if fused else weights, "F32")
    return folder
