"""The families of mixtures of experts: their tensor names and what differs between them."""

from __future__ import annotations

from tritgguf.architectures.experts import (
    ROUTER,
    SELECTION_BIAS,
    SHARED_MATRICES,
    SHARED_ROUTER,
    STACKS,
    ExpertFamily,
)

_GATE, _UP, _DOWN = STACKS
_SHARED_GATE, _SHARED_UP, _SHARED_DOWN = SHARED_MATRICES
_SINGLE = {
    "mlp.gate.weight": (ROUTER,),
    "mlp.experts.{}.gate_proj.weight": (_GATE,),
    "mlp.experts.{}.up_proj.weight": (_UP,),
    "mlp.experts.{}.down_proj.weight": (_DOWN,),
}
_FUSED = {
    "mlp.gate.weight": (ROUTER,),
    "mlp.experts.gate_up_proj": (_GATE, _UP),
    "mlp.experts.down_proj": (_DOWN,),
}
_SHARED = {
    "mlp.shared_expert_gate.weight": (SHARED_ROUTER,),
    "mlp.shared_expert.gate_proj.weight": (_SHARED_GATE,),
    "mlp.shared_expert.up_proj.weight": (_SHARED_UP,),
    "mlp.shared_expert.down_proj.weight": (_SHARED_DOWN,),
}
_GRANITE_SHARED = {
    "shared_mlp.input_linear.weight": (_SHARED_GATE, _SHARED_UP),
    "shared_mlp.output_linear.weight": (_SHARED_DOWN,),
}
_GRANITE = {
    "block_sparse_moe.router.layer.weight": (ROUTER,),
    "block_sparse_moe.input_linear.weight": (_GATE, _UP),
    "block_sparse_moe.output_linear.weight": (_DOWN,),
    **_GRANITE_SHARED,
}
_GRANITE_MODULE = {
    "block_sparse_moe.router.weight": (ROUTER,),
    "block_sparse_moe.experts.gate_up_proj": (_GATE, _UP),
    "block_sparse_moe.experts.down_proj": (_DOWN,),
    **_GRANITE_SHARED,
}

QWEN2_MOE = ExpertFamily(
    {**_SINGLE, **_SHARED},
    {**_FUSED, **_SHARED},
    width_entry="moe_intermediate_size",
    shared_width_entry="shared_expert_intermediate_size",
    has_shared_router=True,
    may_normalize=True,
)
QWEN3_MOE = ExpertFamily(_SINGLE, _FUSED, width_entry="moe_intermediate_size", normalizes=True, may_normalize=True)
QWEN35_MOE = ExpertFamily(
    {**_SINGLE, **_SHARED},
    {**_FUSED, **_SHARED},
    width_entry="moe_intermediate_size",
    shared_width_entry="shared_expert_intermediate_size",
    has_shared_router=True,
    normalizes=True,
)
OLMOE = ExpertFamily(_SINGLE, _FUSED, may_normalize=True)
_MIXTRAL = {
    "block_sparse_moe.gate.weight": (ROUTER,),
    "block_sparse_moe.experts.{}.w1.weight": (_GATE,),
    "block_sparse_moe.experts.{}.w3.weight": (_UP,),
    "block_sparse_moe.experts.{}.w2.weight": (_DOWN,),
}
MIXTRAL = ExpertFamily(_MIXTRAL, _FUSED, count_entry="num_local_experts", normalizes=True)
PHIMOE = ExpertFamily(
    _MIXTRAL,
    {
        "mlp.router.weight": (ROUTER,),
        "mlp.experts.gate_up_proj": (_GATE, _UP),
        "mlp.experts.down_proj": (_DOWN,),
    },
    count_entry="num_local_experts",
    sparse_mixer=True,
)
GRANITE_MOE = ExpertFamily(_GRANITE, _GRANITE_MODULE, count_entry="num_local_experts", normalizes=True)
GRANITE_MOE_SHARED = ExpertFamily(
    _GRANITE,
    _GRANITE_MODULE,
    count_entry="num_local_experts",
    shared_width_entry="shared_intermediate_size",
    normalizes=True,
)
_GPT_OSS = {
    "mlp.router.weight": (ROUTER,),
    "mlp.router.bias": (f"{ROUTER}.bias",),
    "mlp.experts.gate_up_proj": (_GATE, _UP),
    "mlp.experts.gate_up_proj_bias": (f"{_GATE}.bias", f"{_UP}.bias"),
    "mlp.experts.down_proj": (_DOWN,),
    "mlp.experts.down_proj_bias": (f"{_DOWN}.bias",),
}
GPT_OSS = ExpertFamily(
    _GPT_OSS,
    _GPT_OSS,
    count_entry="num_local_experts",
    softmax_of_chosen=True,
    writes_width=True,
    alternates=True,
    transposes=True,
    may_be_mxfp4=True,
)
_LFM2_ROUTER = {
    "feed_forward.gate.weight": (ROUTER,),
    "feed_forward.expert_bias": (SELECTION_BIAS,),
}
LFM2_MOE = ExpertFamily(
    {
        **_LFM2_ROUTER,
        "feed_forward.experts.{}.w1.weight": (_GATE,),
        "feed_forward.experts.{}.w3.weight": (_UP,),
        "feed_forward.experts.{}.w2.weight": (_DOWN,),
    },
    {
        **_LFM2_ROUTER,
        "feed_forward.experts.gate_up_proj": (_GATE, _UP),
        "feed_forward.experts.down_proj": (_DOWN,),
    },
    width_entry="moe_intermediate_size",
    normalizes=True,
    may_normalize=True,
    sigmoid=True,
    dense_layers_entry="num_dense_layers",
)
