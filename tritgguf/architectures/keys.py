"""The table of keys: which entry of config.json corresponds to which GGUF key.

`SHARED` applies to all families; the groups after it are for `Architecture.keys` of some. The rules have llama.cpp's
order, which is the order of the keys in a file. `hf_to_gguf` and `gguf_to_hf` apply them, and `runtime.config` reads
numbers with them.
"""

from __future__ import annotations

import math
from typing import Any

from tritgguf.architectures import rope_keys
from tritgguf.architectures.key_rules import GgufKeys, HfConfig, KeyRule, Rule, SizeRule, SpecialRule, Transform
from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of

_MAX_LAYERS = 1000
_QWEN_WINDOW, _QWEN_FIRST = 4096, 28  # transformers' defaults of sliding_window and max_window_layers
_PATTERN_ENTRY = "sliding_window_pattern"  # older checkpoints of Gemma 3 have it in place of layer_types

HEAD_BIAS_ENTRY = "lm_head_bias"
BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_up", "ffn_gate", "ffn_down"),
    HEAD_BIAS_ENTRY: ("output",),
}
"""Entry of config.json -> the matrices that it gives a bias."""


def _writes_head_dim(config: HfConfig) -> bool:
    sizes = config.dimensions
    return (
        config.architecture.always_writes_head_dim
        or sizes.head_dim != sizes.hidden // sizes.heads
        or bool(config.entries.get("head_dim"))
    )


def _permutes_rows(config: HfConfig) -> bool:
    # llama.cpp converts these families with Llama's converter, which writes two more keys.
    return config.architecture.permutes_rotary_rows


def _has_dense_width(config: HfConfig) -> bool:
    return config.architecture.has_dense_width


def _head_is_tied(keys: GgufKeys) -> dict[str, Any]:
    return {"tie_word_embeddings": "output.weight" not in keys.tensors}


def _biases(keys: GgufKeys) -> dict[str, Any]:
    def has_bias(matrix: str) -> bool:
        return (f"{matrix}.bias" if matrix == "output" else f"blk.0.{matrix}.bias") in keys.tensors

    entries = keys.architecture.bias_entries
    return {entry: has_bias(matrices[0]) for entry, matrices in BIASES.items() if entry in entries}


def _window_to_gguf(config: HfConfig) -> dict[str, int | float | str]:
    """Return the sliding window in tokens; TritGgufError if its layers differ from the family's."""
    architecture, where = config.architecture, config.where
    stored = config.get("sliding_window")
    if architecture.full_attention_every is None:
        if _switches_window_on(config):
            raise TritGgufError(
                f"{where}: a sliding window of a {architecture.hf_class} (use_sliding_window) is not supported"
            )
        return {}
    if stored is not None or architecture.sliding_rope:
        _check_sliding_layers(config)
    return {} if stored is None else {WINDOW_KEY: count_of({"sliding_window": stored}, "sliding_window", where)}


def _switches_window_on(config: HfConfig) -> bool:
    """Tell whether layers may have a window in a family that has none here; Qwen and SmolLM3 have a switch for it."""
    entries, architecture = config.entries, config.architecture
    if not entries.get("use_sliding_window") or entries.get("sliding_window", _QWEN_WINDOW) is None:
        return False
    if architecture.experts is not None or architecture.no_rope_layer_interval:
        return True  # Qwen's mixtures and SmolLM3 have other rules for the layers
    if isinstance(layer_types := entries.get("layer_types"), list):
        return "sliding_attention" in layer_types
    return count_of(entries, "max_window_layers", config.where, default=_QWEN_FIRST) < config.dimensions.layers


def _check_sliding_layers(config: HfConfig) -> None:
    """Raise TritGgufError if other layers have the window, and the rotation that goes with it, than the family's."""
    architecture, layer_types = config.architecture, config.entries.get("layer_types")
    every = architecture.full_attention_every
    if layer_types is None and architecture.sliding_rope and config.entries.get(_PATTERN_ENTRY, every) != every:
        raise TritGgufError(f"{config.where}: {_PATTERN_ENTRY} is not {every}, which is supported")
    expected = [
        "sliding_attention" if architecture.uses_sliding_window(layer) else "full_attention"
        for layer in range(config.dimensions.layers)
    ]
    if layer_types is not None and layer_types != expected:
        raise TritGgufError(
            f"{config.where}: layer_types are not those of a {architecture.hf_class}, which are supported"
        )


def _window_to_hf(keys: GgufKeys) -> dict[str, Any]:
    if keys.architecture.full_attention_every is None:
        return {}
    window = keys.get(WINDOW_KEY)
    return {"sliding_window": None if window is None else keys.number(WINDOW_KEY, whole=True)}


def _check_no_rope_layers(config: HfConfig) -> dict[str, int | float | str]:
    """Raise TritGgufError if the layers without rotary embedding differ from the family's."""
    every, stored = config.architecture.no_rope_layer_interval, config.entries.get("no_rope_layers")
    if not every or (stored is None and config.entries.get("no_rope_layer_interval", every) == every):
        return {}
    if stored != [int(config.architecture.uses_rope(layer)) for layer in range(config.dimensions.layers)]:
        raise TritGgufError(
            f"{config.where}: other layers without rotation (no_rope_layers) than every {every}th are not supported"
        )
    return {}


def _check_no_attention_softcap(config: HfConfig) -> dict[str, int | float | str]:
    if config.entries.get("attn_logit_softcapping") is not None:
        raise TritGgufError(
            f"{config.where}: attn_logit_softcapping of a {config.architecture.hf_class} is not supported:"
            " transformers does not apply it"
        )
    return {}


def _check_causal(config: HfConfig) -> dict[str, int | float | str]:
    if config.entries.get("use_bidirectional_attention"):
        raise TritGgufError(f"{config.where}: attention to later tokens (use_bidirectional_attention) is not supported")
    return {}


def _scale_of_scalar(scalar: float, config: HfConfig) -> float | None:
    return None if scalar == config.dimensions.head_dim else 1.0 / math.sqrt(scalar)


def _scalar_of_scale(scale: Any, keys: GgufKeys) -> int:
    if scale is None:
        return keys.dimensions.head_dim
    if not 1e-6 < scale < 1e6:
        name = f"{keys.architecture.gguf_name}.{QUERY_SCALAR.gguf}"
        raise TritGgufError(f"{keys.where}: {name} is {scale!r:.40}, which is not a valid scale")
    return round(scale**-2)


LAYERS = SizeRule("layers", "num_hidden_layers", "block_count", most=_MAX_LAYERS)
CONTEXT = KeyRule("max_position_embeddings", "context_length", whole=True, required=True)
HIDDEN = SizeRule("hidden", "hidden_size", "embedding_length")
FEED_FORWARD = SizeRule("feed_forward", "intermediate_size", "feed_forward_length", when=_has_dense_width)
HEADS = SizeRule("heads", "num_attention_heads", "attention.head_count")
KV_HEADS = SizeRule("kv_heads", "num_key_value_heads", "attention.head_count_kv")
ROPE = SpecialRule(rope_keys.rope_to_gguf, rope_keys.rope_to_hf)
EPSILON = KeyRule("rms_norm_eps", "attention.layer_norm_rms_epsilon", 1e-6, required=True)
HEAD_DIM = SizeRule("head_dim", "head_dim", "attention.key_length", when=_writes_head_dim)
VALUE_DIM = SizeRule("head_dim", "head_dim", "attention.value_length", when=_writes_head_dim)
VOCABULARY = SizeRule("vocabulary", "vocab_size", "vocab_size", when=_permutes_rows)
ROTATED_DIM = SizeRule("head_dim", "head_dim", "rope.dimension_count", when=_permutes_rows)
TIED = SpecialRule(to_hf=_head_is_tied)
BIASED = SpecialRule(to_hf=_biases)
WINDOW_KEY = "attention.sliding_window"
WINDOW = SpecialRule(_window_to_gguf, _window_to_hf)
NO_ROPE = SpecialRule(_check_no_rope_layers)
SHARED: tuple[Rule, ...] = (
    LAYERS,
    CONTEXT,
    HIDDEN,
    FEED_FORWARD,
    HEADS,
    KV_HEADS,
    ROPE,
    EPSILON,
    HEAD_DIM,
    VALUE_DIM,
    VOCABULARY,
    ROTATED_DIM,
    TIED,
    BIASED,
    WINDOW,
    NO_ROPE,
)

ATTENTION_SCALE = KeyRule("attention_multiplier", "attention.scale", 1.0, absent=1.0)
EMBEDDING_SCALE = KeyRule("embedding_multiplier", "embedding_scale", 1.0, absent=1.0)
RESIDUAL_SCALE = KeyRule("residual_multiplier", "residual_scale", 1.0, absent=1.0)
LOGIT_SCALE = KeyRule("logits_scaling", "logit_scale", 1.0, absent=1.0)
MULTIPLIERS: tuple[Rule, ...] = (ATTENTION_SCALE, EMBEDDING_SCALE, RESIDUAL_SCALE, LOGIT_SCALE)

QUERY_SCALAR = KeyRule(
    "query_pre_attn_scalar", ATTENTION_SCALE.gguf, 256, transform=Transform(_scale_of_scalar, _scalar_of_scale)
)
ATTENTION_SOFTCAP = KeyRule("attn_logit_softcapping", "attn_logit_softcapping", nullable=True)
LOGIT_SOFTCAP = KeyRule("final_logit_softcapping", "final_logit_softcapping", nullable=True)
CAUSAL = SpecialRule(_check_causal)
NO_ATTENTION_SOFTCAP = SpecialRule(_check_no_attention_softcap)
GEMMA2_KEYS: tuple[Rule, ...] = (QUERY_SCALAR, ATTENTION_SOFTCAP, LOGIT_SOFTCAP, CAUSAL)
GEMMA3_KEYS: tuple[Rule, ...] = (QUERY_SCALAR, NO_ATTENTION_SOFTCAP, LOGIT_SOFTCAP, CAUSAL)
