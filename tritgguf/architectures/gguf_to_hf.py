"""GGUF keys -> the JSON files of a Hugging Face folder: config.json, generation_config.json, the tokenizer's.

The other direction is `hf_to_gguf.gguf_metadata` and `tokenizer_metadata`. Of a checkpoint's own files GGUF keeps
what a model needs, not their words: a Mistral model without a sliding window becomes a LlamaForCausalLM, which computes
the same, and training settings have their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures import dimensions, hf_to_gguf
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.errors import TritGgufError
from tritgguf.formats.dtypes import shortest_decimal

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile

_HEAD = "output.weight"
_YARN_KEYS = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def model_config(file: GgufFile, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json of a file's model, with weights in float16; `special_ids` as in `hf_folder_files`.

    In the layout that every version of transformers reads (rope_theta and rope_scaling, torch_dtype). Raises
    TritGgufError for keys that are missing or impossible, and when a tensor is not what they demand.
    """
    where, arch = str(file.path), file.metadata.get("general.architecture")
    if "token_embd.weight" not in file.tensors:
        raise TritGgufError(f"{where}: has no tensor token_embd.weight; it is no language model")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise TritGgufError(f"{where}: architecture {arch} is not supported")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    entries = config_entries(file.metadata, shapes, where)
    rope = entries.pop("rope_parameters")
    config = {
        "architectures": [hf_class_of(file.metadata)],
        "model_type": model_type_of(file.metadata),
        "torch_dtype": "float16",
        **entries,
        # The classes of some families make up a padding token, which may lie beyond the vocabulary.
        "pad_token_id": None,
        **{f"{name}_token_id": token for name, token in special_ids.items()},
        **_rope_entries(rope),
    }
    activation = ("hidden_activation", "gelu_pytorch_tanh") if GGUF_ARCHITECTURES[arch].gelu else ("hidden_act", "silu")
    config[activation[0]] = activation[1]
    if f"{arch}.attention.key_length" not in file.metadata:
        del config["head_dim"]
    if ROPE_FREQS in file.tensors:
        config["rope_scaling"] = _llama3_scaling(file.read_float32(ROPE_FREQS), config, where)
    _check_shapes(shapes, config, where)
    return config


def config_entries(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Return the arguments of a transformers configuration that the keys of a GGUF model stand for.

    `shapes` are those of its tensors: they tell the vocabulary's size, whether the head is tied and whether
    the attention is biased. Raises TritGgufError for a missing key and for a rope scaling other than linear
    and yarn (Llama 3's is a tensor, not a key).
    """
    arch = metadata["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{arch}.{key}", default)
        if found is None:
            raise TritGgufError(f"{where}: the key {arch}.{key} is missing")
        return shortest_decimal(found)

    heads, hidden = value("attention.head_count"), value("embedding_length")
    rope = {"rope_type": value("rope.scaling.type", "none"), "rope_theta": value("rope.freq_base", 10000.0)}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    elif rope["rope_type"] in ("linear", "yarn"):
        rope["factor"] = value("rope.scaling.factor")
    else:
        raise TritGgufError(f"{where}: rope scaling {rope['rope_type']} is not supported (linear and yarn are)")
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
        for name, key in _YARN_KEYS.items():
            if f"{arch}.rope.scaling.{key}" in metadata:
                rope[name] = value(f"rope.scaling.{key}")
    entries = {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": _HEAD not in shapes,
    }
    if GGUF_ARCHITECTURES[arch].sliding_rope:
        sliding = {"rope_type": "default", "rope_theta": value("rope.freq_base_swa", 10000.0)}
        entries["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding}
    return {**entries, **_family_entries(metadata, shapes, where)}


def hf_class_of(metadata: Mapping[str, Any]) -> str:
    """Return the model class of a GGUF model; several of llama.cpp's kind `llama` are one class but for windows."""
    arch = metadata["general.architecture"]
    if arch == "llama" and "llama.attention.sliding_window" in metadata:
        return "MistralForCausalLM"
    return GGUF_ARCHITECTURES[arch].hf_class


def model_type_of(metadata: Mapping[str, Any]) -> str:
    """Return transformers' `model_type` of a GGUF model."""
    name = hf_class_of(metadata).removesuffix("ForCausalLM").lower()
    return {"gemma3": "gemma3_text"}.get(name, name)


def _rope_entries(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rope_parameters in the older words."""
    entries = {}
    if "sliding_attention" in rope:
        entries["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    entries["rope_theta"] = rope["rope_theta"]
    entries["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    return entries


def _family_entries(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Return what single families have besides: biases, windows, scales and soft caps."""
    arch = metadata["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        return shortest_decimal(metadata.get(f"{arch}.{key}", default))

    entries: dict[str, Any] = {}
    if GGUF_ARCHITECTURES[arch].may_be_biased and hf_class_of(metadata) == "LlamaForCausalLM":
        entries["attention_bias"] = "blk.0.attn_q.bias" in shapes
        entries["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if GGUF_ARCHITECTURES[arch].full_attention_every is not None and hf_class_of(metadata) != "LlamaForCausalLM":
        entries["sliding_window"] = value("attention.sliding_window")
    if arch == "granite":
        entries["attention_multiplier"] = value("attention.scale", 1.0)
        entries["embedding_multiplier"] = value("embedding_scale", 1.0)
        entries["residual_multiplier"] = value("residual_scale", 1.0)
        entries["logits_scaling"] = value("logit_scale", 1.0)
    if arch in ("gemma2", "gemma3"):
        scale = metadata.get(f"{arch}.attention.scale")
        if scale is not None and not (isinstance(scale, float) and 1e-6 < scale < 1e6):
            raise TritGgufError(f"{where}: {arch}.attention.scale is {scale!r}, which is no scale")
        entries["query_pre_attn_scalar"] = value("attention.key_length") if scale is None else round(scale**-2)
        entries["attn_logit_softcapping"] = value("attn_logit_softcapping")
        entries["final_logit_softcapping"] = value("final_logit_softcapping")
    return entries


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the rope scaling of Llama 3 whose `rope_factors` are these: float32 [head_dim / 2].

    Reads the formula of `rope_factors` backwards. Between the two borders a pair's share is
    (original * frequency / 2 pi - low) / (high - low), a line in the frequency. It leaves a common factor of
    original, low and high open; with low = 1, as Llama 3.1 has it, they are its own.
    """
    factor = float(factors.max())
    share = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones(len(factors))
    frequencies = config["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
    between = (share > 1e-5) & (share < 1 - 1e-5)
    low, high = 1.0, 4.0
    if between.sum() >= 2:
        slope, intercept = np.polyfit(frequencies[between], share[between], 1)
        high = round(low - low / intercept, 4)
    elif between.any():
        slope = ((share + low / (high - low)) / frequencies)[between][0]
    else:
        slope = math.nan
    original = slope * 2 * math.pi * (high - low)
    scaling = {
        "rope_type": "llama3",
        "factor": shortest_decimal(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(original) if math.isfinite(original) else 0,
    }
    if scaling["original_max_position_embeddings"] > 0 and high != low:
        again = hf_to_gguf.rope_factors({**config, "rope_scaling": scaling}, where)
        if again is not None and np.allclose(again, factors, rtol=1e-4):
            return scaling
    raise TritGgufError(f"{where}: config.json has no words for tensor {ROPE_FREQS}; export a GGUF file instead")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str) -> None:
    """Raise TritGgufError unless the tensors are exactly those of a model with this config."""
    expected = dimensions.dimensions_from_config(config, where).shapes()
    if config["tie_word_embeddings"]:
        del expected[_HEAD]
    for name in {**expected, **shapes}:
        if name != ROPE_FREQS and shapes.get(name) != expected.get(name):
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            demand = f"its keys demand {expected[name]}" if name in expected else "its keys know no such tensor"
            raise TritGgufError(f"{where}: tensor {name} {found}, but {demand}; convert the model again")
