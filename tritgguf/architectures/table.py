"""Hugging Face model classes and their GGUF form: tensors, names, shapes, row order.

One entry of `ARCHITECTURES` per class that config.json may name; `model_keys` and `model_config` say what its keys are.
The facts (names, the row permutation, what layers have which attention) are those of llama.cpp's
convert_hf_to_gguf.py and of its models, so that a stock file made from the same checkpoint and ours differ in nothing
but the packed matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED_MATRICES = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QUERY_KEY_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FOUR_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_OUTPUT_NORMS}


@dataclass(frozen=True)
class Architecture:
    """What sets one model class apart."""

    hf_class: str
    gguf_name: str
    default_context: int
    """`max_position_embeddings` where config.json leaves it out."""
    permutes_rotary_rows: bool = False
    """Whether GGUF interleaves the halves of each head's rows in Q and K (`llama` rotates pairs)."""
    biased: frozenset[str] = frozenset()
    """Matrices that always have a bias, by GGUF name."""
    may_be_biased: bool = False
    """Whether config.json's `attention_bias` and `mlp_bias` give the others one."""
    default_kv_heads: int | None = None
    """`num_key_value_heads` where config.json leaves it out; None stands for `num_attention_heads`."""
    default_head_dim: int | None = None
    """`head_dim` where config.json leaves it out; None stands for the width over the heads."""
    norms: Mapping[str, str] | None = None
    """GGUF name -> Hugging Face name of a layer's norms; None for Llama's two."""
    normalizes_together: bool = False
    """Whether all queries (and all keys) of a token have one norm, or each head its own."""
    norm_offset: int = 0
    """What Hugging Face adds to the weight of a norm; GGUF's is the sum."""
    fused: bool = False
    """Whether Q, K and V are one matrix, and gate and up."""
    gelu: bool = False
    """Whether the feed-forward's gate is GELU (tanh) instead of SiLU."""
    tied_by_default: bool = False
    """`tie_word_embeddings` where config.json leaves it out."""
    default_window: int | None = None
    """`sliding_window` where config.json leaves it out."""
    full_attention_every: int | None = None
    """Every so many layers attend to everything, the others to a sliding window, if there is one; 0: no layer does,
    None: all do."""
    unrotated_every: int = 0
    """Every so many layers rotate nothing; 0: all do."""
    sliding_rope: bool = False
    """Whether layers with a sliding window have a rotation of their own."""
    scales_embeddings: bool = False
    """Whether embeddings are multiplied with the root of the width."""

    def matrices(self) -> Mapping[str, str]:
        """Return GGUF name -> Hugging Face name of a layer's matrices."""
        return FUSED_MATRICES if self.fused else MATRICES

    def layer_norms(self) -> Mapping[str, str]:
        """Return GGUF name -> Hugging Face name of a layer's norms."""
        return _NORMS if self.norms is None else self.norms

    def slides(self, layer: int) -> bool:
        """Tell whether a layer attends to no more than the sliding window, if the model has one."""
        every = self.full_attention_every
        return every is not None and (every == 0 or (layer + 1) % every != 0)

    def rotates(self, layer: int) -> bool:
        """Tell whether a layer rotates its queries and keys."""
        return self.unrotated_every == 0 or (layer + 1) % self.unrotated_every != 0


QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_WITH_HEAD_NORMS = {**_NORMS, **_QUERY_KEY_NORMS}
ARCHITECTURES = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture(
            "LlamaForCausalLM",
            "llama",
            2048,
            permutes_rotary_rows=True,
            may_be_biased=True,
            full_attention_every=0,  # Mistral's files are of this kind too
        ),
        Architecture(
            "MistralForCausalLM",
            "llama",
            131072,
            permutes_rotary_rows=True,
            default_kv_heads=8,
            default_window=4096,
            full_attention_every=0,
        ),
        Architecture("Qwen2ForCausalLM", "qwen2", 32768, biased=QKV, default_kv_heads=32),
        Architecture("Qwen3ForCausalLM", "qwen3", 32768, default_head_dim=128, norms=_WITH_HEAD_NORMS),
        Architecture("GraniteForCausalLM", "granite", 2048, permutes_rotary_rows=True),
        Architecture(
            "SmolLM3ForCausalLM",
            "smollm3",
            32768,
            permutes_rotary_rows=True,
            default_kv_heads=4,
            tied_by_default=True,
            unrotated_every=4,
        ),
        Architecture(
            "Olmo2ForCausalLM", "olmo2", 2048, norms={**_OUTPUT_NORMS, **_QUERY_KEY_NORMS}, normalizes_together=True
        ),
        Architecture("Phi3ForCausalLM", "phi3", 4096, fused=True, full_attention_every=0),
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            8192,
            default_kv_heads=4,
            default_head_dim=256,
            norms=_FOUR_NORMS,
            norm_offset=1,
            gelu=True,
            tied_by_default=True,
            default_window=4096,
            full_attention_every=2,
            scales_embeddings=True,
        ),
        Architecture(
            "Gemma3ForCausalLM",
            "gemma3",
            131072,
            default_kv_heads=4,
            default_head_dim=256,
            norms={**_FOUR_NORMS, **_QUERY_KEY_NORMS},
            norm_offset=1,
            gelu=True,
            tied_by_default=True,
            default_window=4096,
            full_attention_every=6,
            sliding_rope=True,
            scales_embeddings=True,
        ),
    )
}
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
"""GGUF name -> the first class that has it."""
for _entry in ARCHITECTURES.values():
    GGUF_ARCHITECTURES.setdefault(_entry.gguf_name, _entry)
