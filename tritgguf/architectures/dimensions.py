"""The sizes of a model, from config.json or from GGUF keys, and the tensor shapes that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tritgguf.architectures.table import ARCHITECTURES, GGUF_ARCHITECTURES, QKV, Architecture
from tritgguf.architectures.tensor_names import GGUF_LAYER
from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of

_MAX_LAYERS = 1000


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
    hidden = count_of(config, "hidden_size", where)
    heads = count_of(config, "num_attention_heads", where)
    kv_heads = count_of(config, "num_key_value_heads", where, default=architecture.default_kv_heads or heads)
    dimensions = Dimensions(
        layers=count_of(config, "num_hidden_layers", where, most=_MAX_LAYERS),
        vocabulary=count_of(config, "vocab_size", where),
        hidden=hidden,
        feed_forward=count_of(config, "intermediate_size", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=count_of(config, "head_dim", where, default=architecture.default_head_dim or hidden // heads),
        biased=_biased(config, architecture, where),
        architecture=architecture.gguf_name,
    )
    check_heads(dimensions, where)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    expected = "gelu_pytorch_tanh" if architecture.gelu else "silu"
    if activation not in (None, expected):
        raise TritGgufError(f"{where}: activation {activation} is not supported ({expected} is)")
    return dimensions


def _biased(config: Mapping[str, Any], architecture: Architecture, where: str) -> frozenset[str]:
    asked = {"attention_bias": QKV | {"attn_output"}, "mlp_bias": {"ffn_gate", "ffn_up", "ffn_down"}}
    biased = set(architecture.biased)
    for key, names in asked.items():
        if config.get(key) and not architecture.may_be_biased:
            raise TritGgufError(f"{where}: biases ({key}) of a {architecture.hf_class} are not supported")
        if config.get(key):
            biased |= names
    return frozenset(biased)


def dimensions_from_gguf(
    metadata: Mapping[str, Any], vocabulary: int, biased: frozenset[str], where: str
) -> Dimensions:
    """Return the sizes that a stock GGUF file's keys state.

    `vocabulary` (rows of the embedding) and `biased` come from its tensors. Raises TritGgufError for an
    architecture that is not in the table, for a missing or impossible size and for what no entry has:
    experts, partial rotation.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise TritGgufError(
            f"{where}: architecture {arch} is not supported (supported: {', '.join(GGUF_ARCHITECTURES)})"
        )
    hidden = count_of(metadata, f"{arch}.embedding_length", where)
    heads = count_of(metadata, f"{arch}.attention.head_count", where)
    head_dim = count_of(metadata, f"{arch}.attention.key_length", where, default=hidden // heads)
    for key, expected in (
        (f"{arch}.attention.value_length", head_dim),
        (f"{arch}.rope.dimension_count", head_dim),
    ):
        if metadata.get(key, expected) != expected:
            raise TritGgufError(
                f"{where}: {key} is {metadata[key]}, but only {expected}, the head's length, is supported"
            )
    if metadata.get(f"{arch}.expert_count"):
        raise TritGgufError(f"{where}: models with experts are not supported")
    if GGUF_ARCHITECTURES[arch].fused and biased:
        raise TritGgufError(f"{where}: biases of fused matrices ({min(biased)}) are not supported")
    dimensions = Dimensions(
        layers=count_of(metadata, f"{arch}.block_count", where, most=_MAX_LAYERS),
        vocabulary=vocabulary,
        hidden=hidden,
        feed_forward=count_of(metadata, f"{arch}.feed_forward_length", where),
        heads=heads,
        kv_heads=count_of(metadata, f"{arch}.attention.head_count_kv", where, default=heads),
        head_dim=head_dim,
        biased=biased,
        architecture=arch,
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
