"""The properties of a family of models: what `table` says about each class of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritgguf.architectures.delta_net import DELTA_NETS
from tritgguf.architectures.experts import EXPERTS, FEED_FORWARD_ENTRY, ExpertFamily
from tritgguf.architectures.key_rules import Rule
from tritgguf.architectures.keys import SHARED
from tritgguf.architectures.layer_names import ATTENTION_MATRICES, FUSED_MATRICES, MATRICES, NORMS
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
    bias_entries: frozenset[str] = frozenset()
    """Entries of config.json that say whether some matrices have biases; see `keys.BIASES`."""
    named_matrices: Mapping[str, str] | None = None
    """GGUF name -> Hugging Face name of the matrices of all kinds of layers; None for those of Llama."""
    norms: Mapping[str, str] | None = None
    """GGUF name -> Hugging Face name of a layer's norms; None for those of Llama."""
    final_norm: tuple[str, str] = ("output_norm", "model.norm")
    """GGUF name and Hugging Face name of the norm after the last layer."""
    convolves: bool = False
    """Whether layers may have a short convolution in place of attention, as LFM2's."""
    has_states: bool = False
    """Whether layers may have Gated DeltaNet in place of attention, as Qwen3.5's. Then attention rotates a part of each
    head, a gate follows each query head, and checkpoints may have layers that predict further tokens (MTP)."""
    feed_forward_norm: str = "ffn_norm"
    """GGUF name of the norm before the feed-forward."""
    has_layer_norms: bool = False
    """Whether all norms are LayerNorms, which subtract the mean and have a bias, instead of RMS norms."""
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
    long_rope: bool = False
    """Whether its rotation may have LongRoPE's two sets of factors."""
    has_mscales: bool = False
    """Whether LongRoPE's scale of queries and keys is `short_mscale` and `long_mscale` of config.json."""
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
        mixing = (*((CONVOLUTIONS,) if self.convolves else ()), *((DELTA_NETS,) if self.has_states else ()))
        return (*SHARED, *self.keys, *special, *mixing)

    def standard_entries(self, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return the entries of a config.json under the names that most families have; TritGgufError for bad ones."""
        return standard_entries(config, where) if self.convolves else config

    def own_entries(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries of config.json under the family's own names; the inverse of `standard_entries`."""
        if not self.has_dense_width:
            entries = {name: value for name, value in entries.items() if name != FEED_FORWARD_ENTRY}
        return own_entries(entries) if self.convolves else dict(entries)

    @property
    def has_dense_width(self) -> bool:
        """Whether config.json and GGUF have a width of dense feed-forwards."""
        return not (self.has_states and self.experts is not None)

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
