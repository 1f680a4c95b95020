"""The table of model families: `ARCHITECTURES` has one entry per supported class of config.json.

An entry has the properties of a family: tensor names, row order, the attention type of each layer, defaults of
config.json and keys beyond the shared ones (`keys`). The rest of this package and the forward pass use the entry. The
properties are those of llama.cpp's convert_hf_to_gguf.py and its models, so that our file differs from a stock file of
the same checkpoint only in the packed matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritgguf.architectures import expert_families
from tritgguf.architectures.experts import EXPERTS, ROUTER, STACKS, ExpertFamily
from tritgguf.architectures.key_rules import Rule
from tritgguf.architectures.keys import MULTIPLIERS, SCALAR_AND_SOFTCAPS, SHARED
from tritgguf.architectures.layer_names import (
    ATTENTION_MATRICES,
    FOUR_NORMS,
    FUSED_MATRICES,
    LFM2_MATRICES,
    LFM2_NORMS,
    MATRICES,
    NORMS,
    OUTPUT_NORMS,
    QUERY_KEY_NORMS,
)
from tritgguf.architectures.short_convolutions import CONVOLUTIONS, own_entries, standard_entries


@dataclass(frozen=True)
class Architecture:
    """The properties of one model class."""

    hf_class: str
    gguf_name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' defaults for entries that config.json lacks, beyond those in `keys`. Otherwise, the key-value heads
    default to the heads, the head dimension to hidden size / heads, and the output head is not tied."""
    keys: tuple[Rule, ...] = ()
    """Rules of the family in addition to the shared ones."""
    model_type: str | None = None
    """transformers' `model_type`; None for the class name in lower case without `ForCausalLM`."""
    permutes_rotary_rows: bool = False
    """Whether GGUF interleaves the halves of each head's rows in Q and K, because llama.cpp rotates adjacent pairs."""
    biased: frozenset[str] = frozenset()
    """GGUF names of matrices that always have a bias."""
    may_be_biased: bool = False
    """Whether `attention_bias` and `mlp_bias` of config.json add biases."""
    named_matrices: Mapping[str, str] | None = None
    """GGUF name -> Hugging Face name of the matrices of all kinds of layers; None for those of Llama."""
    norms: Mapping[str, str] | None = None
    """GGUF name -> Hugging Face name of a layer's norms; None for those of Llama."""
    final_norm: tuple[str, str] = ("output_norm", "model.norm")
    """GGUF name and Hugging Face name of the norm after the last layer."""
    convolves: bool = False
    """Whether layers may have a short convolution in place of attention, as LFM2's."""
    feed_forward_norm: str = "ffn_norm"
    """GGUF name of the norm before the feed-forward."""
    normalizes_together: bool = False
    """Whether the query and key norms run over all heads of a token together instead of each head."""
    norm_offset: int = 0
    """Number that transformers adds to norm weights; GGUF stores the sum."""
    fused: bool = False
    """Whether Q, K and V are one matrix, and gate and up too."""
    experts: ExpertFamily | None = None
    """The experts of every layer's feed-forward; None for a dense one."""
    gelu: bool = False
    """Whether the gate activation of the feed-forward is GELU (tanh) instead of SiLU."""
    clamped_swiglu: bool = False
    """Whether the feed-forward has gpt-oss's SwiGLU, whose inputs are clamped."""
    activation_entry: str = "hidden_act"
    """The entry of config.json with the name of the gate activation."""
    full_attention_every: int | None = None
    """n: if the model has a sliding window, every nth layer has full attention and the others use the window. 0: all
    layers use the window. None: all have full attention."""
    no_rope_layer_interval: int = 0
    """n: every nth layer has no rotary embedding. 0: all layers have it."""
    sliding_rope: bool = False
    """Whether layers with a sliding window have their own rotary base."""
    truncates_yarn: bool = True
    """Whether YaRN's range of pairs is rounded to whole pairs (`truncate` of a rope scaling)."""
    sinks: bool = False
    """Whether each query head has an attention sink: a learned score in the denominator of its softmax."""
    scales_embeddings: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    always_writes_head_dim: bool = False
    """Whether GGUF has the head dimension even if it is hidden size / heads."""
    writes_space_prefix: bool = False
    """Whether GGUF has a key for `add_prefix_space` of tokenizer_config.json."""

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of all keys in file order."""
        special = (EXPERTS,) if self.experts else ()
        return (*SHARED, *self.keys, *special, *((CONVOLUTIONS,) if self.convolves else ()))

    def standard_entries(self, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return the entries of a config.json under the names that most families have; TritGgufError for bad ones."""
        return standard_entries(config, where) if self.convolves else config

    def own_entries(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries of config.json under the family's own names; the inverse of `standard_entries`."""
        return own_entries(entries) if self.convolves else dict(entries)

    @property
    def activation(self) -> str:
        """The name of the gate activation in config.json."""
        return "gelu_pytorch_tanh" if self.gelu else "silu"

    @property
    def hf_model_type(self) -> str:
        """The `model_type` of config.json."""
        return self.model_type or self.hf_class.removesuffix("ForCausalLM").lower()

    def matrices(self) -> Mapping[str, str]:
        """Return GGUF name -> Hugging Face name of a layer's matrices, without those of experts."""
        if self.named_matrices is not None:
            return self.named_matrices
        if self.experts is not None:
            return ATTENTION_MATRICES
        return FUSED_MATRICES if self.fused else MATRICES

    def dense_matrices(self) -> list[str]:
        """Return the GGUF names of the matrices of a dense feed-forward."""
        return [name for name in self.matrices() if name.startswith("ffn_")]

    def layer_norms(self) -> Mapping[str, str]:
        """Return GGUF name -> Hugging Face name of a layer's norms."""
        return NORMS if self.norms is None else self.norms

    def uses_sliding_window(self, layer: int) -> bool:
        """Tell whether a layer uses the sliding window, if the model has one."""
        every = self.full_attention_every
        return every is not None and (every == 0 or (layer + 1) % every != 0)

    def uses_rope(self, layer: int) -> bool:
        """Tell whether a layer has rotary embedding."""
        return self.no_rope_layer_interval == 0 or (layer + 1) % self.no_rope_layer_interval != 0


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
ARCHITECTURES = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture(
            "LlamaForCausalLM",
            "llama",
            {"max_position_embeddings": 2048},
            permutes_rotary_rows=True,
            may_be_biased=True,
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
            "Qwen3ForCausalLM", "qwen3", {"max_position_embeddings": 32768, "head_dim": 128}, norms=_WITH_HEAD_NORMS
        ),
        Architecture(
            "MixtralForCausalLM",
            "llama",
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
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
            {"max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True},
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
        ),
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
            keys=SCALAR_AND_SOFTCAPS,
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
                "tie_word_embeddings": True,
                "sliding_window": 4096,
            },
            keys=SCALAR_AND_SOFTCAPS,
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
    )
}
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
"""GGUF name -> the first class with that name."""
for _entry in ARCHITECTURES.values():
    GGUF_ARCHITECTURES.setdefault(_entry.gguf_name, _entry)
