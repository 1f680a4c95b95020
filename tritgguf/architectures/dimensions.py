"""The sizes of a model, read from config.json or from GGUF keys, and the tensor shapes that follow from them.

Reading the sizes is also where a model's family is found, and where what no family has is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tritgguf.architectures import keys
from tritgguf.architectures.table import ARCHITECTURES, GGUF_ARCHITECTURES, Architecture
from tritgguf.architectures.tensor_names import GGUF_LAYER
from tritgguf.errors import TritGgufError


@dataclass(frozen=True)
class Dimensions:
    """The sizes that fix every tensor's shape."""

    layers: int
    vocabulary: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    biased: frozenset[str] = frozenset()
    """Matrices with a bias, by GGUF name."""
    architecture: str = "llama"
    """GGUF name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return GGUF tensor name -> shape in NumPy order, for every tensor the model must have.

        `output.weight` is among them; a model with tied embeddings does without it.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            "output_norm.weight": (self.hidden,),
            "output.weight": (self.vocabulary, self.hidden),
        }
        matrices, norms = self._layer_matrices(), self._layer_norms()
        for index in range(self.layers):
            for name, shape in {**norms, **matrices}.items():
                shapes[f"blk.{index}.{name}.weight"] = shape
                if name in self.biased and name in matrices:
                    shapes[f"blk.{index}.{name}.bias"] = shape[:1]
        return shapes

    def _layer_matrices(self) -> dict[str, tuple[int, ...]]:
        rows, rows_kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fused = GGUF_ARCHITECTURES[self.architecture].fused
        sizes = {
            "attn_q": (rows, self.hidden),
            "attn_k": (rows_kv, self.hidden),
            "attn_v": (rows_kv, self.hidden),
            "attn_qkv": (rows + 2 * rows_kv, self.hidden),
            "attn_output": (self.hidden, rows),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": ((2 if fused else 1) * self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        return {name: sizes[name] for name in GGUF_ARCHITECTURES[self.architecture].matrices()}

    def _layer_norms(self) -> dict[str, tuple[int, ...]]:
        entry = GGUF_ARCHITECTURES[self.architecture]
        of_queries = self.heads * self.head_dim if entry.normalizes_together else self.head_dim
        of_keys = self.kv_heads * self.head_dim if entry.normalizes_together else self.head_dim
        sizes = {"attn_q_norm": of_queries, "attn_k_norm": of_keys}
        return {name: (sizes.get(name, self.hidden),) for name in entry.layer_norms()}


def biased_matrices(names: Iterable[str]) -> frozenset[str]:
    """Return the GGUF names, without layer, of the matrices that have a bias among a model's tensors."""
    layers = (GGUF_LAYER.fullmatch(name) for name in names)
    return frozenset(layer[2] for layer in layers if layer is not None and layer[3] == "bias")


def find_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the entry for the class that a config.json names; TritGgufError when there is none."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise TritGgufError(
            f"{where}: names no model class under `architectures`; this is no causal language model's config"
        )
    if classes[0] not in ARCHITECTURES:
        raise TritGgufError(
            f"{where}: architecture {classes[0]} is not supported (supported: {', '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[classes[0]]


def dimensions_from_config(config: Mapping[str, Any], where: str = "config.json") -> Dimensions:
    """Return the sizes that a config.json states; TritGgufError for a missing or impossible one."""
    architecture = find_architecture(config, where)
    hidden = keys.HIDDEN.in_config(config, architecture, where)
    heads = keys.HEADS.in_config(config, architecture, where)
    dimensions = Dimensions(
        layers=keys.LAYERS.in_config(config, architecture, where),
        vocabulary=keys.VOCABULARY.in_config(config, architecture, where),
        hidden=hidden,
        feed_forward=keys.FEED_FORWARD.in_config(config, architecture, where),
        heads=heads,
        kv_heads=keys.KV_HEADS.in_config(config, architecture, where, default=heads),
        head_dim=keys.HEAD_DIM.in_config(config, architecture, where, default=hidden // heads),
        biased=_biased(config, architecture, where),
        architecture=architecture.gguf_name,
    )
    check_heads(dimensions, where)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in (None, architecture.activation):
        raise TritGgufError(f"{where}: activation {activation} is not supported ({architecture.activation} is)")
    return dimensions


def _biased(config: Mapping[str, Any], architecture: Architecture, where: str) -> frozenset[str]:
    biased = set(architecture.biased)
    for entry, names in keys.BIASES.items():
        if config.get(entry) and not architecture.may_be_biased:
            raise TritGgufError(f"{where}: biases ({entry}) of a {architecture.hf_class} are not supported")
        if config.get(entry):
            biased.update(names)
    return frozenset(biased)


def find_gguf_architecture(metadata: Mapping[str, Any], where: str) -> Architecture:
    """Return the entry for a GGUF model: of the classes that share its name the first that has windows if it has.

    Raises TritGgufError for an architecture that is not in the table.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise TritGgufError(
            f"{where}: architecture {arch} is not supported (supported: {', '.join(GGUF_ARCHITECTURES)})"
        )
    if f"{arch}.{keys.WINDOW_KEY}" in metadata:
        for entry in ARCHITECTURES.values():
            if entry.gguf_name == arch and entry.full_attention_every is not None:
                return entry
    return GGUF_ARCHITECTURES[arch]


def dimensions_from_gguf(
    metadata: Mapping[str, Any], vocabulary: int, biased: frozenset[str], where: str
) -> Dimensions:
    """Return the sizes that a stock GGUF file's keys state.

    `vocabulary` (rows of the embedding) and `biased` come from its tensors. Raises TritGgufError for an
    architecture that is not in the table, for a missing or impossible size and for what no entry has:
    experts, partial rotation.
    """
    architecture = find_gguf_architecture(metadata, where)
    hidden = keys.HIDDEN.in_gguf(metadata, architecture, where)
    heads = keys.HEADS.in_gguf(metadata, architecture, where)
    head_dim = keys.HEAD_DIM.in_gguf(metadata, architecture, where, default=hidden // heads)
    for rule in (keys.VALUE_DIM, keys.ROTATED_DIM):
        key = f"{architecture.gguf_name}.{rule.gguf}"
        if metadata.get(key, head_dim) != head_dim:
            raise TritGgufError(
                f"{where}: {key} is {metadata[key]}, but only {head_dim}, the head's length, is supported"
            )
    if metadata.get(f"{architecture.gguf_name}.expert_count"):
        raise TritGgufError(f"{where}: models with experts are not supported")
    if architecture.fused and biased:
        raise TritGgufError(f"{where}: biases of fused matrices ({min(biased)}) are not supported")
    dimensions = Dimensions(
        layers=keys.LAYERS.in_gguf(metadata, architecture, where),
        vocabulary=vocabulary,
        hidden=hidden,
        feed_forward=keys.FEED_FORWARD.in_gguf(metadata, architecture, where),
        heads=heads,
        kv_heads=keys.KV_HEADS.in_gguf(metadata, architecture, where, default=heads),
        head_dim=head_dim,
        biased=biased,
        architecture=architecture.gguf_name,
    )
    check_heads(dimensions, where)
    return dimensions


def check_heads(dimensions: Dimensions, where: str) -> None:
    """Raise TritGgufError unless the heads can be grouped and rotated."""
    heads, kv_heads = dimensions.heads, dimensions.kv_heads
    if heads % kv_heads:
        raise TritGgufError(f"{where}: {heads} heads cannot share {kv_heads} key-value heads evenly")
    if dimensions.head_dim % 2:
        raise TritGgufError(f"{where}: a head of {dimensions.head_dim} elements cannot be rotated in pairs")
