"""The table of model families: one entry of `ARCHITECTURES` for each class that config.json may name.

An entry says what sets a family apart: the names of its tensors, the order of their rows, which layers have which
attention, what config.json means where it is silent, and which keys it has beside those of all families (`keys`).
Everything else in this package, and the forward pass, asks the entry. The facts are those of llama.cpp's
convert_hf_to_gguf.py and of its models, so that a stock file made from the same checkpoint and ours differ in nothing
but the packed matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritgguf.architectures.key_rules import Rule
from tritgguf.architectures.keys import MULTIPLIERS, SCALAR_AND_SOFTCAPS, SHARED

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
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where config.json leaves an entry out, if `keys` do not say it. Without an entry here,
    there are as many key-value heads as heads, a head is the width over the heads, and the head is not tied."""
    keys: tuple[Rule, ...] = ()
    """The rules of keys that the family has beside those of all."""
    model_type: str | None = None
    """transformers' name for the family; None for the class's, without `ForCausalLM` and in small letters."""
    permutes_rotary_rows: bool = False
    """Whether GGUF interleaves the halves of each head's rows in Q and K (`llama` rotates pairs)."""
    biased: frozenset[str] = frozenset()
    """Matrices that always have a bias, by GGUF name."""
    may_be_biased: bool = False
    """Whether config.json's `attention_bias` and `mlp_bias` give the others one."""
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
    activation_entry: str = "hidden_act"
    """The entry of config.json that names the gate's function."""
    full_attention_every: int | None = None
    """Every so many layers attend to everything, the others to a sliding window, if there is one; 0: no layer does,
    None: all do."""
    unrotated_every: int = 0
    """Every so many layers rotate nothing; 0: all do."""
    sliding_rope: bool = False
    """Whether layers with a sliding window have a rotation of their own."""
    scales_embeddings: bool = False
    """Whether embeddings are multiplied with the root of the width."""
    always_states_head_dim: bool = False
    """Whether GGUF has the length of a head even where it is the width over the heads."""
    states_space_prefix: bool = False
    """Whether GGUF has the `add_prefix_space` of tokenizer_config.json."""

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of all keys, in the order of a file."""
        return (*SHARED, *self.keys)

    @property
    def activation(self) -> str:
        """The name of the gate's function in config.json."""
        return "gelu_pytorch_tanh" if self.gelu else "silu"

    @property
    def hf_model_type(self) -> str:
        """The `model_type` of config.json."""
        return self.model_type or self.hf_class.removesuffix("ForCausalLM").lower()

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
            {"max_position_embeddings": 2048},
            permutes_rotary_rows=True,
            may_be_biased=True,
            always_states_head_dim=True,
            states_space_prefix=True,
        ),
        Architecture(
            "MistralForCausalLM",
            "llama",
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            permutes_rotary_rows=True,
            full_attention_every=0,
            always_states_head_dim=True,
            states_space_prefix=True,
        ),
        Architecture(
            "Qwen2ForCausalLM", "qwen2", {"max_position_embeddings": 32768, "num_key_value_heads": 32}, biased=QKV
        ),
        Architecture(
            "Qwen3ForCausalLM", "qwen3", {"max_position_embeddings": 32768, "head_dim": 128}, norms=_WITH_HEAD_NORMS
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
            unrotated_every=4,
        ),
        Architecture(
            "Olmo2ForCausalLM",
            "olmo2",
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
            norms={**_OUTPUT_NORMS, **_QUERY_KEY_NORMS},
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
            norms=_FOUR_NORMS,
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
            norms={**_FOUR_NORMS, **_QUERY_KEY_NORMS},
            norm_offset=1,
            gelu=True,
            activation_entry="hidden_activation",
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
