"""A model's sizes, read from config.json or from GGUF keys, and the resulting tensor shapes.

This module also finds the model's family and rejects unsupported models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tritgguf.architectures import keys
from tritgguf.architectures.architecture import Architecture
from tritgguf.architectures.delta_net import (
    DELTA_BIAS,
    DELTA_NORM,
    DeltaNet,
    delta_net_from_config,
    delta_net_from_gguf,
)
from tritgguf.architectures.experts import (
    COUNT_KEY,
    SHARED_WIDTH_KEY,
    Experts,
    experts_from_config,
    experts_from_gguf,
)
from tritgguf.architectures.layer_names import ATTENTION_MATRICES
from tritgguf.architectures.rope_keys import rotated_dim_from_config
from tritgguf.architectures.short_convolutions import (
    ShortConvolutions,
    convolutions_from_config,
    convolutions_from_gguf,
    kv_heads_from_gguf,
)
from tritgguf.architectures.table import ARCHITECTURES, GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_names import GGUF_LAYER, with_suffix
from tritgguf.architectures.unsupported import why_not
from tritgguf.errors import TritGgufError

_BIASED_MATRICES = (*ATTENTION_MATRICES, "ffn_gate", "ffn_up", "ffn_down")
"""The matrices that may have biases, if every layer has them."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes that determine the shapes of all tensors."""

    layers: int
    vocabulary: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    biased: frozenset[str] = frozenset()
    """GGUF names of the matrices with a bias."""
    architecture: str = "llama"
    """GGUF name of the architecture."""
    experts: Experts | None = None
    """The experts of every layer that has some; None for a dense model."""
    convolutions: ShortConvolutions | None = None
    """The layers with a short convolution in place of attention; None if no layer has one."""
    delta_net: DeltaNet | None = None
    """The layers with Gated DeltaNet in place of attention; None if no layer has it."""
    rotated_dim: int | None = None
    """How many elements of a head of attention rotate; None for all."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return GGUF tensor name -> shape in NumPy order for all tensors of the model.

        The result includes `output.weight`, which a model with tied embeddings lacks.
        """
        entry = GGUF_ARCHITECTURES[self.architecture]
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            f"{entry.final_norm[0]}.weight": (self.hidden,),
            "output.weight": (self.vocabulary, self.hidden),
        }
        if "output" in self.biased and keys.HEAD_BIAS_ENTRY in entry.bias_entries:
            shapes["output.bias"] = (self.vocabulary,)
        if entry.has_layer_norms:
            shapes[f"{entry.final_norm[0]}.bias"] = (self.hidden,)
        for index in range(self.layers):
            matrices, norms = self.layer_matrices(index), self._layer_norms(index)
            biased = {name for name in self.biased if name in matrices or name in entry.biased}
            experts = self.experts.shapes(self.hidden) if self.experts and self.is_mixture(index) else {}
            for name, shape in {**norms, **matrices, **experts}.items():
                shapes[f"blk.{index}.{with_suffix(name)}"] = shape
                if name in norms and entry.has_layer_norms:
                    shapes[f"blk.{index}.{name}.bias"] = shape
                elif name in biased and name not in norms:
                    shapes[f"blk.{index}.{name}.bias"] = shape[:-1]
            if entry.sinks:
                shapes[f"blk.{index}.attn_sinks.weight"] = (self.heads,)
        return shapes

    def is_mixture(self, layer: int) -> bool:
        """Tell whether a layer has experts."""
        return self.experts is not None and layer >= self.experts.dense_layers

    def convolves(self, layer: int) -> bool:
        """Tell whether a layer has a short convolution in place of attention."""
        return self.convolutions is not None and layer in self.convolutions.layers

    def has_state(self, layer: int) -> bool:
        """Tell whether a layer has Gated DeltaNet in place of attention."""
        return self.delta_net is not None and layer in self.delta_net.layers

    @property
    def query_rows(self) -> int:
        """Rows of the matrix of queries, the gates behind them included."""
        return self.heads * self.head_dim * (2 if GGUF_ARCHITECTURES[self.architecture].has_states else 1)

    def layer_matrices(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return GGUF name without layer -> shape of a layer's matrices, those of experts aside."""
        rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fused = GGUF_ARCHITECTURES[self.architecture].fused
        sizes = {
            "attn_q": (self.query_rows, self.hidden),
            "attn_k": (kv_rows, self.hidden),
            "attn_v": (kv_rows, self.hidden),
            "attn_qkv": (rows + 2 * kv_rows, self.hidden),
            "attn_output": (self.hidden, rows),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": ((2 if fused else 1) * self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        entry = GGUF_ARCHITECTURES[self.architecture]
        mixing = [name for name in entry.matrices() if name in ATTENTION_MATRICES or (fused and name == "attn_qkv")]
        dense = [] if self.is_mixture(layer) else [name for name in entry.dense_matrices() if name not in mixing]
        if self.convolutions is not None and self.convolves(layer):
            return {**self.convolutions.shapes(self.hidden), **{name: sizes[name] for name in dense}}
        if self.delta_net is not None and self.has_state(layer):
            return {**self.delta_net.shapes(self.hidden), **{name: sizes[name] for name in dense}}
        return {name: sizes[name] for name in (*mixing, *dense)}

    def _layer_norms(self, layer: int) -> dict[str, tuple[int, ...]]:
        entry = GGUF_ARCHITECTURES[self.architecture]
        query_norm = self.heads * self.head_dim if entry.normalizes_together else self.head_dim
        key_norm = self.kv_heads * self.head_dim if entry.normalizes_together else self.head_dim
        of_attention = {"attn_q_norm": query_norm, "attn_k_norm": key_norm}
        of_states = {} if self.delta_net is None else {DELTA_NORM: self.delta_net.value_dim}
        others = of_attention if self.convolves(layer) or self.has_state(layer) else of_states
        sizes = {**of_attention, **of_states}
        return {name: (sizes.get(name, self.hidden),) for name in entry.layer_norms() if name not in others}


def biased_matrices(names: Iterable[str]) -> frozenset[str]:
    """Return the matrices that have a bias among these GGUF tensor names, as names without layer."""
    stored = list(names)
    layers = (GGUF_LAYER.fullmatch(name) for name in stored)
    biased = {f"{layer[2]}.bias": layer[2] for layer in layers if layer is not None and layer[3] == "bias"}
    head = {"output"} if "output.bias" in stored else set()
    return frozenset(matrix for name, matrix in biased.items() if name != DELTA_BIAS) | head


def find_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the entry for the class in a config.json; TritGgufError if there is none."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise TritGgufError(
            f"{where}: names no model class under `architectures`; this is not the config of a causal language model"
        )
    if classes[0] not in ARCHITECTURES:
        raise _unsupported(classes[0], ARCHITECTURES, where)
    return ARCHITECTURES[classes[0]]


def _unsupported(name: Any, supported: Iterable[str], where: str) -> TritGgufError:
    reason = why_not(name) if isinstance(name, str) else None
    if reason is not None:
        return TritGgufError(f"{where}: {name} is not supported: {reason}")
    return TritGgufError(f"{where}: architecture {name} is not supported (supported: {', '.join(supported)})")


def dimensions_from_config(config: Mapping[str, Any], where: str = "config.json") -> Dimensions:
    """Return the sizes in a config.json; TritGgufError for a missing or impossible size."""
    architecture = find_architecture(config, where)
    config = architecture.standard_entries(config, where)
    layers = keys.LAYERS.in_config(config, architecture, where)
    hidden = keys.HIDDEN.in_config(config, architecture, where)
    heads = keys.HEADS.in_config(config, architecture, where)
    head_dim = keys.HEAD_DIM.in_config(config, architecture, where, default=hidden // heads)
    experts = experts_from_config(config, architecture, where)
    dimensions = Dimensions(
        layers=layers,
        vocabulary=keys.VOCABULARY.in_config(config, architecture, where),
        hidden=hidden,
        feed_forward=keys.FEED_FORWARD.in_config(
            config, architecture, where, default=_width_without_dense(architecture, experts)
        ),
        heads=heads,
        kv_heads=keys.KV_HEADS.in_config(config, architecture, where, default=heads),
        head_dim=head_dim,
        biased=_biased(config, architecture, where),
        architecture=architecture.gguf_name,
        experts=experts,
        convolutions=convolutions_from_config(config, architecture, layers, where),
        delta_net=delta_net_from_config(config, architecture, layers, where),
        rotated_dim=rotated_dim_from_config(config, head_dim, where) if architecture.has_states else None,
    )
    check_heads(dimensions, where)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in (None, architecture.activation):
        raise TritGgufError(f"{where}: activation {activation} is not supported ({architecture.activation} is)")
    return dimensions


def _width_without_dense(architecture: Architecture, experts: Experts | None) -> int | None:
    """Return the width of feed-forwards in a family that has no dense ones; None for others."""
    return None if architecture.has_dense_width or experts is None else experts.width


def _biased(config: Mapping[str, Any], architecture: Architecture, where: str) -> frozenset[str]:
    biased = set(architecture.biased)
    for entry, names in keys.BIASES.items():
        always = architecture.biased.issuperset(names)
        if config.get(entry) and entry not in architecture.bias_entries and not always:
            raise TritGgufError(f"{where}: biases ({entry}) of a {architecture.hf_class} are not supported")
        if config.get(entry) is False and always:
            raise TritGgufError(f"{where}: a {architecture.hf_class} without biases ({entry}) is not supported")
        if config.get(entry):
            biased.update(names)
    return frozenset(biased)


def find_gguf_architecture(metadata: Mapping[str, Any], where: str) -> Architecture:
    """Return the entry for a GGUF model.

    If several classes share the GGUF name, this is the first one with experts, a shared expert and a sliding window if
    the model has these. Raises TritGgufError for an architecture that is not in the table.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise _unsupported(arch, GGUF_ARCHITECTURES, where)
    entries = [entry for entry in ARCHITECTURES.values() if entry.gguf_name == arch]
    has_experts, has_shared = bool(metadata.get(f"{arch}.{COUNT_KEY}")), f"{arch}.{SHARED_WIDTH_KEY}" in metadata
    has_window = f"{arch}.{keys.WINDOW_KEY}" in metadata

    def suits(entry: Architecture) -> tuple[bool, bool, bool]:
        has_shared_entry = entry.experts is not None and entry.experts.shared_width_entry is not None
        return (
            (entry.experts is not None) == has_experts,
            has_shared_entry == has_shared,
            has_window and entry.full_attention_every is not None,
        )

    return max(entries, key=suits)  # the first of those that suit best


def dimensions_from_gguf(
    metadata: Mapping[str, Any], vocabulary: int, biased: frozenset[str], where: str
) -> Dimensions:
    """Return the sizes in the keys of a GGUF file.

    `vocabulary` (rows of the embedding) and `biased` come from its tensors; biases that the architecture always has are
    added. Raises TritGgufError for an architecture that is not in the table, for a missing or impossible size, for
    experts of other families and for partial rotation.
    """
    architecture = find_gguf_architecture(metadata, where)
    hidden = keys.HIDDEN.in_gguf(metadata, architecture, where)
    layers = keys.LAYERS.in_gguf(metadata, architecture, where)
    heads = keys.HEADS.in_gguf(metadata, architecture, where)
    if architecture.convolves:
        kv_heads = max(kv_heads_from_gguf(metadata, architecture, layers, where))
    else:
        kv_heads = keys.KV_HEADS.in_gguf(metadata, architecture, where, default=heads)
    head_dim = keys.HEAD_DIM.in_gguf(metadata, architecture, where, default=hidden // heads)
    rotated_dim = keys.ROTATED_DIM.in_gguf(metadata, architecture, where, default=head_dim)
    for rule in (keys.VALUE_DIM, keys.ROTATED_DIM):
        key = f"{architecture.gguf_name}.{rule.gguf}"
        is_supported = architecture.has_states and rule is keys.ROTATED_DIM
        if metadata.get(key, head_dim) != head_dim and not is_supported:
            raise TritGgufError(
                f"{where}: {key} is {metadata[key]}, but only the head dimension {head_dim} is supported"
            )
    if architecture.fused and biased:
        raise TritGgufError(f"{where}: biases of fused matrices ({min(biased)}) are not supported")
    experts = experts_from_gguf(metadata, architecture, where)
    dimensions = Dimensions(
        layers=layers,
        vocabulary=vocabulary,
        hidden=hidden,
        feed_forward=keys.FEED_FORWARD.in_gguf(
            metadata, architecture, where, default=_width_without_dense(architecture, experts)
        ),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        biased=biased | architecture.biased,
        architecture=architecture.gguf_name,
        experts=experts,
        convolutions=convolutions_from_gguf(metadata, architecture, layers, where),
        delta_net=delta_net_from_gguf(metadata, architecture, layers, where),
        rotated_dim=rotated_dim if architecture.has_states else None,
    )
    check_heads(dimensions, where)
    _check_biases(dimensions, where)
    return dimensions


def _check_biases(dimensions: Dimensions, where: str) -> None:
    """Raise TritGgufError for the bias of a matrix that only some layers have, or of none that is computed with it."""
    matrices = [dimensions.layer_matrices(layer) for layer in range(dimensions.layers)]
    for name in sorted(dimensions.biased):
        has_it = [name in of_layer for of_layer in matrices]
        if any(has_it) and not (all(has_it) and name in _BIASED_MATRICES):
            raise TritGgufError(f"{where}: biases of {name} are not supported beside layers of another kind")


def check_heads(dimensions: Dimensions, where: str) -> None:
    """Raise TritGgufError unless the heads divide into key-value groups and the head dimension is even."""
    heads, kv_heads = dimensions.heads, dimensions.kv_heads
    if heads % kv_heads:
        raise TritGgufError(f"{where}: {heads} heads cannot share {kv_heads} key-value heads evenly")
    if dimensions.convolutions is not None and heads * dimensions.head_dim != dimensions.hidden:
        raise TritGgufError(
            f"{where}: {heads} heads of {dimensions.head_dim} elements beside convolutions of {dimensions.hidden}"
            " channels are not supported"
        )
    delta_net = dimensions.delta_net
    if delta_net is not None and heads * dimensions.head_dim != delta_net.values:
        raise TritGgufError(
            f"{where}: {heads} heads of {dimensions.head_dim} elements beside layers with linear attention of"
            f" {delta_net.values} are not supported"
        )
    rotated = dimensions.rotated_dim
    if rotated is not None and (rotated % 2 or rotated > dimensions.head_dim):
        raise TritGgufError(
            f"{where}: {rotated} of {dimensions.head_dim} elements of a head cannot be rotated in pairs"
        )
    if dimensions.head_dim % 2:
        raise TritGgufError(f"{where}: a head of {dimensions.head_dim} elements cannot be rotated in pairs")
