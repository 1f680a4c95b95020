"""config.json -> the GGUF keys of a model, in llama.cpp's order and with its names.

The other direction is `hf_config`; what a file's keys mean for the forward pass is said in `model_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tritgguf.architectures import rope
from tritgguf.architectures.dimensions import Dimensions, dimensions_from_config, find_architecture
from tritgguf.architectures.table import Architecture
from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of, positive_number

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFValue

# Where a family leaves them out, config.json means these.
_GEMMA_QUERY_SCALAR = 256
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def gguf_metadata(config: Mapping[str, Any], where: str = "config.json") -> dict[str, GGUFValue]:
    """Return general.architecture and the keys `llama.*`, `qwen2.*` and so on.

    Raises TritGgufError for an entry of config.json that is impossible or asks for what is not there.
    """
    from gguf import GGUFWriter

    architecture = find_architecture(config, where)
    dimensions = dimensions_from_config(config, where)
    parameters = rope.rope_parameters(config, architecture.default_context, where)
    writer = GGUFWriter(path=None, arch=architecture.gguf_name)
    writer.add_block_count(dimensions.layers)
    writer.add_context_length(count_of(config, "max_position_embeddings", where, default=architecture.default_context))
    writer.add_embedding_length(dimensions.hidden)
    writer.add_feed_forward_length(dimensions.feed_forward)
    writer.add_head_count(dimensions.heads)
    writer.add_head_count_kv(dimensions.kv_heads)
    rope.add_rope_scaling(writer, parameters, where)
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    if architecture.sliding_rope:
        writer.add_float32(f"{architecture.gguf_name}.rope.freq_base_swa", rope.sliding_rope_base(config, where))
    default_epsilon = 1e-5 if architecture.gguf_name in ("olmo2", "phi3") else 1e-6
    epsilon = positive_number(config.get("rms_norm_eps", default_epsilon), "rms_norm_eps", where)
    writer.add_layer_norm_rms_eps(epsilon)
    # transformers always fills in head_dim for Llama and Mistral, never for Qwen2, and llama.cpp writes what
    # it finds.
    if (
        architecture.gguf_name == "llama"
        or dimensions.head_dim != dimensions.hidden // dimensions.heads
        or config.get("head_dim")
    ):
        writer.add_key_length(dimensions.head_dim)
        writer.add_value_length(dimensions.head_dim)
    if architecture.permutes_rotary_rows:
        writer.add_vocab_size(dimensions.vocabulary)
        writer.add_rope_dimension_count(dimensions.head_dim)
    _add_family(writer, config, architecture, dimensions, where)
    return dict(writer.kv_data[0])


def rope_factors(config: Mapping[str, Any], where: str = "config.json") -> np.ndarray | None:
    """Return `rope_freqs.weight` of a model with Llama 3's rope scaling, else None: float32 [head_dim / 2]."""
    parameters = rope.rope_parameters(config, find_architecture(config, where).default_context, where)
    return rope.llama3_factors(parameters, dimensions_from_config(config, where).head_dim)


def is_tied(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Tell whether config.json says that the output head is the embeddings."""
    return bool(config.get("tie_word_embeddings", architecture.tied_by_default))


def _add_family(
    writer: Any, config: Mapping[str, Any], architecture: Architecture, dimensions: Dimensions, where: str
) -> None:
    """Add what single families have: windows, scales and soft caps."""
    name = architecture.gguf_name
    window = _window(config, architecture, dimensions.layers, where)
    if window is not None:
        writer.add_sliding_window(window)
    if name == "granite":
        for entry, add in (
            ("attention_multiplier", writer.add_attention_scale),
            ("embedding_multiplier", writer.add_embedding_scale),
            ("residual_multiplier", writer.add_residual_scale),
            ("logits_scaling", writer.add_logit_scale),
        ):
            add(positive_number(config.get(entry, 1.0), entry, where))
    if name == "smollm3":
        _check_unrotated(config, architecture, dimensions.layers, where)
    if name in ("gemma2", "gemma3"):
        scalar = positive_number(
            config.get("query_pre_attn_scalar", _GEMMA_QUERY_SCALAR), "query_pre_attn_scalar", where
        )
        if scalar != dimensions.head_dim:
            writer.add_attention_scale(1.0 / math.sqrt(scalar))
        if config.get("use_bidirectional_attention"):
            raise TritGgufError(f"{where}: attention to later tokens (use_bidirectional_attention) is not supported")
        for entry, default in _SOFTCAPS.items():
            cap = config.get(entry, default if name == "gemma2" else None)
            if cap is not None:
                writer.add_float32(f"{name}.{entry}", positive_number(cap, entry, where))


def _window(config: Mapping[str, Any], architecture: Architecture, layers: int, where: str) -> int | None:
    """Return the sliding window in tokens, or None; TritGgufError where other layers have it than the family's."""
    stored = config.get("sliding_window", architecture.default_window)
    # transformers knows none for Llama, and one for Qwen behind a switch.
    if stored is None or not config.get("use_sliding_window", architecture.hf_class != "LlamaForCausalLM"):
        return None
    kinds = config.get("layer_types")
    if architecture.full_attention_every is None:
        first = config.get("max_window_layers", layers)
        slides = "sliding_attention" in kinds if isinstance(kinds, list) else first != layers
        if config.get("use_sliding_window") and slides:
            raise TritGgufError(f"{where}: a sliding window of a {architecture.hf_class} is not supported")
        return None
    expected = ["sliding_attention" if architecture.slides(layer) else "full_attention" for layer in range(layers)]
    if kinds is not None and kinds != expected:
        raise TritGgufError(f"{where}: layer_types are not those of a {architecture.hf_class}, which are supported")
    return count_of({"sliding_window": stored}, "sliding_window", where)


def _check_unrotated(config: Mapping[str, Any], architecture: Architecture, layers: int, where: str) -> None:
    expected = [int(architecture.rotates(layer)) for layer in range(layers)]
    interval = config.get("no_rope_layer_interval", architecture.unrotated_every)
    stored = config.get("no_rope_layers")
    if stored is None and interval == architecture.unrotated_every:
        return
    if stored != expected:
        raise TritGgufError(
            f"{where}: other layers without rotation (no_rope_layers) than every {architecture.unrotated_every}th"
            " are not supported"
        )
