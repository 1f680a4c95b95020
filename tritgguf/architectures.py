"""Hugging Face model classes and their GGUF form: tensors, names, shapes, row order.

One entry of `ARCHITECTURES` per class that config.json may name; `model_keys` and `model_config` say what its keys are.
The facts (names, the row permutation, what layers have which attention) are those of llama.cpp's
convert_hf_to_gguf.py and of its models, so that a stock file made from the same checkpoint and ours differ in nothing
but the packed matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.hf_files import count_of, to_float32

_MAX_LAYERS = 1000

# GGUF name -> Hugging Face name, both without their `.weight` or `.bias`.
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_MATRICES = {
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

_INDEX = r"(0|[1-9][0-9]{0,5})"
_QUANTIZED = re.compile(rf"blk\.{_INDEX}\.({'|'.join({**_MATRICES, **_FUSED_MATRICES})})\.weight")
_GGUF_LAYER = re.compile(rf"blk\.{_INDEX}\.(\w+)\.(weight|bias)")
_HF_LAYER = re.compile(rf"model\.layers\.{_INDEX}\.([\w.]+)\.(weight|bias)")


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
        return _FUSED_MATRICES if self.fused else _MATRICES

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


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
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
        Architecture("Qwen2ForCausalLM", "qwen2", 32768, biased=_QKV, default_kv_heads=32),
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


def quantized_tensor(name: str) -> bool:
    """Tell whether a GGUF tensor is one of the matrices of a layer that are packed into trits."""
    return _QUANTIZED.fullmatch(name) is not None


def biased_matrices(names: Iterable[str]) -> frozenset[str]:
    """Return the GGUF names, without layer, of the matrices that have a bias among a model's tensors."""
    layers = (_GGUF_LAYER.fullmatch(name) for name in names)
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
    asked = {"attention_bias": _QKV | {"attn_output"}, "mlp_bias": {"ffn_gate", "ffn_up", "ffn_down"}}
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


def gguf_tensor_name(arch: str, hf_name: str) -> str | None:
    """Return the GGUF name of a Hugging Face tensor, or None when the architecture has no such tensor."""
    if layer := _HF_LAYER.fullmatch(hf_name):
        index, hf_stem, suffix = layer.groups()
        names = (name for name, of_hf in _layer_names(arch).items() if of_hf == hf_stem)
        return next((f"blk.{index}.{name}.{suffix}" for name in names), None)
    stem, _, suffix = hf_name.rpartition(".")
    names = (name for name, of_hf in _MODEL_NAMES.items() if of_hf == stem and suffix == "weight")
    return next((f"{name}.weight" for name in names), None)


def hf_tensor_name(arch: str, gguf_name: str) -> str:
    """Return the Hugging Face name of a tensor of a GGUF architecture.

    Raises TritGgufError for a tensor that a Hugging Face checkpoint does not have, such as rope_freqs.weight.
    """
    if layer := _GGUF_LAYER.fullmatch(gguf_name):
        index, name, suffix = layer.groups()
        if name in _layer_names(arch):
            return f"model.layers.{index}.{_layer_names(arch)[name]}.{suffix}"
    stem, _, suffix = gguf_name.rpartition(".")
    if suffix == "weight" and stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.weight"
    raise TritGgufError(f"tensor {gguf_name} has no counterpart in a Hugging Face checkpoint of architecture {arch}")


def _layer_names(arch: str) -> dict[str, str]:
    """Return GGUF name -> Hugging Face name of everything in a layer."""
    entry = GGUF_ARCHITECTURES[arch]
    return {**entry.layer_norms(), **entry.matrices()}


def from_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Return a Hugging Face tensor as GGUF has it: its rows in GGUF's order, norms with their offset; contiguous.

    In `llama`, row 2i of a head of Q or K (weight or bias) is what was row i, and row 2i + 1 what was row i +
    half.
    """
    if offset := _norm_offset(arch, gguf_name):
        return to_float32(array) + np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def to_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Return a GGUF tensor as Hugging Face has it; contiguous. The inverse of `from_hf`."""
    if offset := _norm_offset(arch, gguf_name):
        return array - np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def permutes_rotary_rows(arch: str) -> bool:
    """Tell whether a GGUF architecture interleaves each head's halves, so that pairs (2i, 2i + 1) rotate."""
    return GGUF_ARCHITECTURES[arch].permutes_rotary_rows


def _norm_offset(arch: str, gguf_name: str) -> int:
    return GGUF_ARCHITECTURES[arch].norm_offset if gguf_name.endswith("norm.weight") else 0


def _rotary_heads(arch: str, gguf_name: str, head_count: int, head_count_kv: int) -> int | None:
    """Return how many heads' rows are permuted in this tensor, or None."""
    layer = _GGUF_LAYER.fullmatch(gguf_name)
    if layer is None or not permutes_rotary_rows(arch):
        return None
    return {"attn_q": head_count, "attn_k": head_count_kv}.get(layer[2])
