"""A tiny LFM2 with random weights: short convolutions between attention layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import random_weights, tiny_config, write_shards, write_tokenizer

from tritgguf.architectures.table import ARCHITECTURES
from tritgguf.architectures.tensor_names import gguf_tensor_name

TYPES = ("conv", "full_attention", "conv", "conv")


def lfm2_config(**entries: Any) -> dict[str, Any]:
    """Return a config.json of four layers, one of them with attention; convolutions of three taps."""
    entries = {
        "model_type": "lfm2",
        "num_hidden_layers": len(TYPES),
        "layer_types": list(TYPES),
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
        "tokenizer": "qwen2",
        **entries,
    }
    config = tiny_config("Lfm2ForCausalLM", **entries)
    config["norm_eps"] = config.pop("rms_norm_eps")
    return config


def write_tiny_lfm2(folder: Path, **entries: Any) -> Path:
    """Write a folder of this model and return it; `entries` replace some of config.json."""
    config = lfm2_config(**entries)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, "qwen2")
    write_shards(folder, lfm2_weights(config), "F32")
    return folder


def lfm2_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face name."""
    generator, hidden = np.random.default_rng(5), config["hidden_size"]
    of_llama, of_lfm2 = (
        {**ARCHITECTURES[name].matrices(), **ARCHITECTURES[name].layer_norms()}
        for name in ("LlamaForCausalLM", "Lfm2ForCausalLM")
    )
    weights = {}
    for name, values in random_weights(config).items():
        gguf_name = gguf_tensor_name("llama", name) or ""
        place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
        if place is None:
            weights[name.replace("model.norm", "model.embedding_norm")] = values
        elif not place[2].startswith("attn_") or place[2] == "attn_norm" or _has_attention(config, int(place[1])):
            weights[name.replace(of_llama[place[2]], of_lfm2[place[2]])] = values
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        if _has_attention(config, layer):
            head_dim = hidden // config["num_attention_heads"]
            for norm in ("q_layernorm", "k_layernorm"):
                weights[f"{prefix}.self_attn.{norm}.weight"] = np.ones(head_dim, np.float32)
            continue
        kernel = (hidden, 1, config["conv_L_cache"])
        shapes = {"in_proj": (3 * hidden, hidden), "out_proj": (hidden, hidden), "conv": kernel}
        for name, shape in shapes.items():
            values = generator.standard_normal(shape) / np.sqrt(shape[-1])
            weights[f"{prefix}.conv.{name}.weight"] = values.astype(np.float32)
    return weights


def _has_attention(config: dict[str, Any], layer: int) -> bool:
    return bool(config["layer_types"][layer] == "full_attention")
