"""The table of model families: `ARCHITECTURES` has one entry per supported class of config.json.

An entry has the properties of a family: tensor names, row order, the attention type of each layer, defaults of
config.json and keys beyond the shared ones (`keys`). The rest of this package and the forward pass use the entry. The
properties are those of llama.cpp's convert_hf_to_gguf.py and its models, so that our file differs from a stock file of
the same checkpoint only in the packed matrices.
"""

from __future__ import annotations

from typing import Any

from tritgguf.architectures import expert_families
from tritgguf.architectures.architecture import Architecture
from tritgguf.architectures.experts import ROUTER, STACKS
from tritgguf.architectures.keys import GEMMA2_KEYS, GEMMA3_KEYS, MULTIPLIERS
from tritgguf.architectures.layer_names import (
    ATTENTION_MATRICES,
    DELTA_MATRICES,
    FOUR_NORMS,
    LFM2_MATRICES,
    LFM2_NORMS,
    MATRICES,
    NORMS,
    OUTPUT_NORMS,
    QUERY_KEY_NORMS,
    QWEN35_NORMS,
)

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_YARN_OF_GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_WITH_HEAD_NORMS = {**NORMS, **QUERY_KEY_NORMS}
_LFM2_DEFAULTS = {
    "max_position_embeddings": 128000,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "conv_L_cache": 3,
}
_LFM2: dict[str, Any] = {
    "named_matrices": LFM2_MATRICES,
    "norms": LFM2_NORMS,
    "final_norm": ("token_embd_norm", "model.embedding_norm"),
    "convolves": True,
}
_QWEN35_DEFAULTS = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_QWEN35: dict[str, Any] = {
    "norms": QWEN35_NORMS,
    "norm_offset": 1,
    "feed_forward_norm": "post_attention_norm",
    "has_states": True,
}
_PHIMOE: dict[str, Any] = {
    "model_type": "phimoe",
    "bias_entries": frozenset({"attention_bias", "lm_head_bias"}),
    "has_layer_norms": True,
    "experts": expert_families.PHIMOE,
    "full_attention_every": 0,
    "long_rope": True,
    "has_mscales": True,
}
_PHIMOE_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
ARCHITECTURES = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture(
            "LlamaForCausalLM",
            "llama",
            {"max_position_embeddings": 2048},
            permutes_rotary_rows=True,
            bias_entries=frozenset({"attention_bias", "mlp_bias"}),
            always_writes_head_dim=True,
            writes_space_prefix=True,
        ),
        Architecture(
            "MistralForCausalLM",
            "llama",
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            permutes_rotary_rows=True,
            full_attention_every=0,
            always_writes_head_dim=True,
            writes_space_prefix=True,
        ),
        Architecture(
            "Qwen2ForCausalLM", "qwen2", {"max_position_embeddings": 32768, "num_key_value_heads": 32}, biased=QKV
        ),
        Architecture(
            "Qwen3ForCausalLM",
            "qwen3",
            {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
            norms=_WITH_HEAD_NORMS,
        ),
        Architecture(
            "MixtralForCausalLM",
            "llama",
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            permutes_rotary_rows=True,
            experts=expert_families.MIXTRAL,
            full_attention_every=0,
            always_writes_head_dim=True,
            writes_space_prefix=True,
        ),
        Architecture(
            "Qwen2MoeForCausalLM",
            "qwen2moe",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 16,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_experts_per_tok": 4,
                "num_experts": 60,
            },
            model_type="qwen2_moe",
            biased=QKV,
            experts=expert_families.QWEN2_MOE,
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3moe",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts_per_tok": 8,
                "num_experts": 128,
            },
            model_type="qwen3_moe",
            norms=_WITH_HEAD_NORMS,
            experts=expert_families.QWEN3_MOE,
        ),
        Architecture(
            "OlmoeForCausalLM",
            "olmoe",
            {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64},
            norms=_WITH_HEAD_NORMS,
            normalizes_together=True,
            experts=expert_families.OLMOE,
        ),
        Architecture(
            "GraniteMoeForCausalLM",
            "granitemoe",
            {"max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2},
            keys=MULTIPLIERS,
            permutes_rotary_rows=True,
            experts=expert_families.GRANITE_MOE,
        ),
        Architecture(
            "GraniteMoeSharedForCausalLM",
            "granitemoe",
            {"max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2},
            keys=MULTIPLIERS,
            permutes_rotary_rows=True,
            experts=expert_families.GRANITE_MOE_SHARED,
        ),
        Architecture(
            "GptOssForCausalLM",
            "gpt-oss",
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "sliding_window": 128,
                "rope_theta": 150000.0,
                "rope_scaling": _YARN_OF_GPT_OSS,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
            },
            model_type="gpt_oss",
            biased=QKV | {"attn_output", ROUTER, *STACKS},
            norms={"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
            feed_forward_norm="post_attention_norm",
            experts=expert_families.GPT_OSS,
            clamped_swiglu=True,
            full_attention_every=2,
            truncates_yarn=False,
            sinks=True,
        ),
        Architecture(
            "GraniteForCausalLM",
            "granite",
            {"max_position_embeddings": 2048},
            keys=MULTIPLIERS,
            permutes_rotary_rows=True,
        ),
        Architecture(
            "SmolLM3ForCausalLM",
            "smollm3",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
            },
            permutes_rotary_rows=True,
            no_rope_layer_interval=4,
        ),
        Architecture(
            "Olmo2ForCausalLM",
            "olmo2",
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
            norms={**OUTPUT_NORMS, **QUERY_KEY_NORMS},
            normalizes_together=True,
        ),
        Architecture(
            "Phi3ForCausalLM",
            "phi3",
            {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            fused=True,
            full_attention_every=0,
            long_rope=True,
        ),
        Architecture("PhimoeForCausalLM", "phimoe", _PHIMOE_DEFAULTS, **_PHIMOE),
        Architecture("PhiMoEForCausalLM", "phimoe", _PHIMOE_DEFAULTS, **_PHIMOE),  # the published checkpoint's name
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            {
                "max_position_embeddings": 8192,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            keys=GEMMA2_KEYS,
            norms=FOUR_NORMS,
            norm_offset=1,
            gelu=True,
            activation_entry="hidden_activation",
            full_attention_every=2,
            scales_embeddings=True,
        ),
        Architecture(
            "Gemma3ForCausalLM",
            "gemma3",
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "rope_theta": 1e6,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
            },
            keys=GEMMA3_KEYS,
            model_type="gemma3_text",
            norms={**FOUR_NORMS, **QUERY_KEY_NORMS},
            norm_offset=1,
            gelu=True,
            activation_entry="hidden_activation",
            full_attention_every=6,
            sliding_rope=True,
            scales_embeddings=True,
        ),
        Architecture("Lfm2ForCausalLM", "lfm2", _LFM2_DEFAULTS, **_LFM2),
        Architecture(
            "Lfm2MoeForCausalLM",
            "lfm2moe",
            {
                **_LFM2_DEFAULTS,
                "moe_intermediate_size": 1792,
                "num_experts": 32,
                "num_experts_per_tok": 4,
                "num_dense_layers": 2,
                "norm_topk_prob": True,
            },
            model_type="lfm2_moe",
            experts=expert_families.LFM2_MOE,
            **_LFM2,
        ),
        Architecture(
            "Qwen3_5ForCausalLM",
            "qwen35",
            {**_QWEN35_DEFAULTS, "num_key_value_heads": 4},
            model_type="qwen3_5_text",
            named_matrices={**MATRICES, **DELTA_MATRICES},
            **_QWEN35,
        ),
        Architecture(
            "Qwen3_5MoeForCausalLM",
            "qwen35moe",
            {
                **_QWEN35_DEFAULTS,
                "num_key_value_heads": 2,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "num_experts_per_tok": 8,
                "num_experts": 256,
            },
            model_type="qwen3_5_moe_text",
            named_matrices={**ATTENTION_MATRICES, **DELTA_MATRICES},
            experts=expert_families.QWEN35_MOE,
            **_QWEN35,
        ),
    )
}
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
"""GGUF name -> the first class with that name."""
for _entry in ARCHITECTURES.values():
    GGUF_ARCHITECTURES.setdefault(_entry.gguf_name, _entry)
