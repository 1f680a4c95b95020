"""Tiny mixtures of experts with random weights, in the layouts in which checkpoints store them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import random_weights, tiny_config, write_shards, write_tokenizer

EXPERTS = 4
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "Qwen3MoeForCausalLM",
        {"num_experts": EXPERTS, "moe_intermediate_size": 64, "norm_topk_prob": True, "head_dim": 32},
    ),
    "qwen2": (
        "Qwen2MoeForCausalLM",
        {"num_experts": EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": EXPERTS}),
    "granite": ("GraniteMoeSharedForCausalLM", {"num_local_experts": EXPERTS, "shared_intermediate_size": 64}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": 64,
            "head_dim": 32,
            "attention_bias": True,
            "sliding_window": 16,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
            },
        },
    ),
    "phimoe": (
        "PhiMoEForCausalLM", {"num_local_experts": EXPERTS, "attention_bias": True, "lm_head_bias": True}
    ),
}  # fmt: skip
MODEL_TYPES = {
    "qwen3": "qwen3_moe",
    "qwen2": "qwen2_moe",
    "mixtral": "mixtral",
    "granite": "granitemoeshared",
    "gpt-oss": "gpt_oss",
    "phimoe": "phimoe",
}
KINDS = tuple(_CLASSES)


def mixture_config(kind: str, **entries: Any) -> dict[str, Any]:
    """Return a config.json: 2 layers of 4 experts, of which a token uses 2."""
    hf_class, of_kind = _CLASSES[kind]
    return tiny_config(
        hf_class,
        **{"model_type": MODEL_TYPES[kind], "num_experts_per_tok": 2, "tokenizer": "qwen2", **of_kind, **entries},
    )


def random_experts(config: Mapping[str, Any], layer: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a layer's experts by GGUF name: float32 [experts, rows, columns]."""
    generator = np.random.default_rng((seed, layer))
    hidden, width = config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
    count = config.get("num_experts", config.get("num_local_experts"))
    shapes = {"ffn_gate_exps": (width, hidden), "ffn_up_exps": (width, hidden), "ffn_down_exps": (hidden, width)}
    # Magnitudes differ between experts, so that a wrong codebook shows.
    sizes = np.geomspace(0.01, 1, count)[:, np.newaxis, np.newaxis]
    stacks = {}
    for name, shape in shapes.items():
        weights: np.ndarray = generator.standard_normal((count, *shape)) * sizes / np.sqrt(shape[1])
        stacks[name] = weights.astype(np.float32)
    return stacks


def mixture_weights(kind: str, config: Mapping[str, Any], *, fused: bool = False) -> dict[str, np.ndarray]:
    """Return all weights by Hugging Face name, float32; `fused` as transformers 5 has them in memory."""
    weights = {name: value for name, value in random_weights(config).items() if ".mlp." not in name}
    generator = np.random.default_rng(1)
    hidden = config["hidden_size"]
    if kind == "phimoe":
        names = [name.replace(".weight", ".bias") for name in weights if "norm" in name]
        weights |= {name: generator.standard_normal(hidden).astype(np.float32) for name in names}
        weights["lm_head.bias"] = generator.standard_normal(config["vocab_size"]).astype(np.float32)
    for layer in range(config["num_hidden_layers"]):
        prefix, experts = f"model.layers.{layer}.", random_experts(config, layer)
        if kind == "qwen2":
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = weights[f"{prefix}self_attn.{name}.weight"].shape[0]
                weights[f"{prefix}self_attn.{name}.bias"] = np.asarray(generator.standard_normal(rows), np.float32)
        if kind == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{prefix}self_attn.{name}.weight"] = np.ones(config["head_dim"], np.float32)
        if kind == "gpt-oss":
            sinks = generator.standard_normal(config["num_attention_heads"]).astype(np.float32)
            weights |= {f"{prefix}self_attn.sinks": sinks, **_biases_of_gpt_oss(f"{prefix}mlp.", generator, experts)}
        router = generator.standard_normal((len(experts["ffn_up_exps"]), hidden)).astype(np.float32)
        feed_forward = {_router_name(kind, fused=fused): router, **_stored_experts(kind, experts, fused=fused)}
        shared = config.get("shared_expert_intermediate_size") or config.get("shared_intermediate_size")
        if shared:
            feed_forward |= _stored_shared(kind, generator, shared, hidden)
        weights |= {prefix + name: value for name, value in feed_forward.items()}
    return weights


def write_tiny_mixture(
    folder: Path, kind: str = "qwen3", *, fused: bool = False, dtype: str = "F16", **entries: Any
) -> Path:
    """Write a tiny mixture and return its folder; `entries` go into config.json."""
    config = mixture_config(kind, **entries)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(folder, "qwen2")
    write_shards(folder, mixture_weights(kind, config, fused=fused), dtype)
    return folder


def _biases_of_gpt_oss(
    prefix: str, generator: np.random.Generator, experts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    count, hidden, width = experts["ffn_down_exps"].shape
    shapes = {
        "router.bias": (count,),
        "experts.gate_up_proj_bias": (count, 2 * width),
        "experts.down_proj_bias": (count, hidden),
    }
    return {prefix + name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _router_name(kind: str, *, fused: bool) -> str:
    if kind == "gpt-oss" or (kind == "phimoe" and fused):
        return "mlp.router.weight"
    if kind == "granite":
        return "block_sparse_moe.router.weight" if fused else "block_sparse_moe.router.layer.weight"
    return "block_sparse_moe.gate.weight" if kind in ("mixtral", "phimoe") and not fused else "mlp.gate.weight"


def _stored_experts(kind: str, experts: Mapping[str, np.ndarray], *, fused: bool) -> dict[str, np.ndarray]:
    gate, up, down = experts["ffn_gate_exps"], experts["ffn_up_exps"], experts["ffn_down_exps"]
    if kind == "gpt-oss":
        alternating = np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[2])
        return {
            "mlp.experts.gate_up_proj": np.ascontiguousarray(alternating.swapaxes(1, 2)),
            "mlp.experts.down_proj": np.ascontiguousarray(down.swapaxes(1, 2)),
        }
    gate_up = np.concatenate([gate, up], axis=1)
    if kind == "granite" and not fused:
        return {"block_sparse_moe.input_linear.weight": gate_up, "block_sparse_moe.output_linear.weight": down}
    if fused:
        block = "block_sparse_moe" if kind == "granite" else "mlp"
        return {f"{block}.experts.gate_up_proj": gate_up, f"{block}.experts.down_proj": down}
    pattern, names = "mlp.experts.{}.{}_proj.weight", ("gate", "up", "down")
    if kind in ("mixtral", "phimoe"):
        pattern, names = "block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")
    return {
        pattern.format(expert, name): stack[expert]
        for name, stack in zip(names, (gate, up, down), strict=True)
        for expert in range(len(stack))
    }


def _stored_shared(kind: str, generator: np.random.Generator, width: int, hidden: int) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    if kind == "granite":
        return {
            "shared_mlp.input_linear.weight": matrix(2 * width, hidden),
            "shared_mlp.output_linear.weight": matrix(hidden, width),
        }
    return {
        "mlp.shared_expert_gate.weight": matrix(1, hidden),
        "mlp.shared_expert.gate_proj.weight": matrix(width, hidden),
        "mlp.shared_expert.up_proj.weight": matrix(width, hidden),
        "mlp.shared_expert.down_proj.weight": matrix(hidden, width),
    }
