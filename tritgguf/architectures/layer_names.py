"""Names of the matrices and norms of layers: GGUF name -> Hugging Face name."""

from __future__ import annotations

from tritgguf.architectures.delta_net import (
    DELTA_ALPHA,
    DELTA_BETA,
    DELTA_GATE,
    DELTA_INPUT,
    DELTA_NORM,
    DELTA_OUTPUT,
)
from tritgguf.architectures.short_convolutions import CONVOLUTION_INPUT, CONVOLUTION_OUTPUT

ATTENTION_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MATRICES = {
    **ATTENTION_MATRICES,
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
LFM2_MATRICES = {
    **ATTENTION_MATRICES,
    "attn_output": "self_attn.out_proj",
    CONVOLUTION_INPUT: "conv.in_proj",
    CONVOLUTION_OUTPUT: "conv.out_proj",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
LFM2_NORMS = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}
DELTA_MATRICES = {
    DELTA_INPUT: "linear_attn.in_proj_qkv",
    DELTA_GATE: "linear_attn.in_proj_z",
    DELTA_ALPHA: "linear_attn.in_proj_a",
    DELTA_BETA: "linear_attn.in_proj_b",
    DELTA_OUTPUT: "linear_attn.out_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QUERY_KEY_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
QWEN35_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **QUERY_KEY_NORMS,
    DELTA_NORM: "linear_attn.norm",
}
OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FOUR_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **OUTPUT_NORMS}
