"""Hugging Face model classes and their GGUF form: names, keys, shapes, row order.

One entry of `ARCHITECTURES` per class that config.json may name. The facts (keys and their order, the row
permutation, the rope factors) are those of llama.cpp's convert_hf_to_gguf.py, so that a stock file made from
the same checkpoint and ours differ in nothing but the packed matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.hf_files import count_of, positive_number

if TYPE_CHECKING:
    from gguf import GGUFValue

_MAX_LAYERS = 1000

# GGUF name -> Hugging Face name, both without their `.weight` or `.bias`.
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES_TO_GGUF = {hf: gguf for gguf, hf in _MODEL_NAMES.items()}
_LAYER_NAMES_TO_GGUF = {hf: gguf for gguf, hf in _LAYER_NAMES.items()}
_INDEX = r"(0|[1-9][0-9]{0,5})"
_QUANTIZED = re.compile(rf"blk\.{_INDEX}\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight")
_GGUF_LAYER = re.compile(rf"blk\.{_INDEX}\.(\w+)\.(weight|bias)")
_HF_LAYER = re.compile(rf"model\.layers\.{_INDEX}\.([\w.]+)\.(weight|bias)")

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """What sets one model class apart."""

    hf_class: str
    gguf_name: str
    permutes_rotary_rows: bool
    """Whether GGUF interleaves the halves of each head's rows in Q and K (`llama` rotates pairs)."""
    biased: frozenset[str]
    """Projections that always have a bias, by GGUF name."""
    default_context: int
    """`max_position_embeddings` where config.json leaves it out."""
    default_kv_heads: int | None = None
    """`num_key_value_heads` where config.json leaves it out; None stands for `num_attention_heads`."""


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ARCHITECTURES = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", "llama", True, frozenset(), default_context=2048),
        Architecture("MistralForCausalLM", "llama", True, frozenset(), default_context=131072, default_kv_heads=8),
        Architecture("Qwen2ForCausalLM", "qwen2", False, _QKV, default_context=32768, default_kv_heads=32),
    )
}
GGUF_ARCHITECTURES = tuple(sorted({architecture.gguf_name for architecture in ARCHITECTURES.values()}))


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
    """Projections with a bias, by GGUF name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return GGUF tensor name -> shape in NumPy order, for every tensor the model must have.

        `output.weight` is among them; a model with tied embeddings does without it.
        """
        rows, rows_kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (self.hidden,),
            "attn_q": (rows, self.hidden),
            "attn_k": (rows_kv, self.hidden),
            "attn_v": (rows_kv, self.hidden),
            "attn_output": (self.hidden, rows),
            "ffn_norm": (self.hidden,),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": (self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            "output_norm.weight": (self.hidden,),
            "output.weight": (self.vocabulary, self.hidden),
        }
        for index in range(self.layers):
            for name, shape in layer.items():
                shapes[f"blk.{index}.{name}.weight"] = shape
                if name in self.biased:
                    shapes[f"blk.{index}.{name}.bias"] = shape[:1]
        return shapes


def quantized_tensor(name: str) -> bool:
    """Tell whether a GGUF tensor is one of the seven matrices of a layer that are packed into trits."""
    return _QUANTIZED.fullmatch(name) is not None


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
    biased = architecture.biased
    if architecture.hf_class == "LlamaForCausalLM" and config.get("attention_bias"):
        biased = _QKV | {"attn_output"}
    dimensions = Dimensions(
        layers=count_of(config, "num_hidden_layers", where, most=_MAX_LAYERS),
        vocabulary=count_of(config, "vocab_size", where),
        hidden=hidden,
        feed_forward=count_of(config, "intermediate_size", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=count_of(config, "head_dim", where, default=hidden // heads),
        biased=biased,
    )
    check_heads(dimensions, where)
    if config.get("hidden_act", "silu") != "silu":
        raise TritGgufError(f"{where}: activation {config['hidden_act']} is not supported (silu is)")
    if config.get("mlp_bias"):
        raise TritGgufError(f"{where}: biases in the feed-forward layers (mlp_bias) are not supported")
    return dimensions


def dimensions_from_gguf(
    metadata: Mapping[str, Any], vocabulary: int, biased: frozenset[str], where: str
) -> Dimensions:
    """Return the sizes that a stock GGUF file's keys state.

    `vocabulary` (rows of the embedding) and `biased` come from its tensors. Raises TritGgufError for an
    architecture that is not in the table, for a missing or impossible size and for what no entry has:
    experts, partial rotation.
    """
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
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
    dimensions = Dimensions(
        layers=count_of(metadata, f"{arch}.block_count", where, most=_MAX_LAYERS),
        vocabulary=vocabulary,
        hidden=hidden,
        feed_forward=count_of(metadata, f"{arch}.feed_forward_length", where),
        heads=heads,
        kv_heads=count_of(metadata, f"{arch}.attention.head_count_kv", where, default=heads),
        head_dim=head_dim,
        biased=biased,
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


def rope_parameters(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and what the type needs, from both layouts of config.json.

    Before transformers 5, `rope_theta` stood beside `rope_scaling`; since then both are in `rope_parameters`.
    """
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(stored, dict):
        raise TritGgufError(f"{where}: rope_parameters is not an object")
    context = config.get("max_position_embeddings", find_architecture(config, where).default_context)
    defaults = {
        "rope_type": stored.get("type", "default"),
        "rope_theta": config.get("rope_theta", 10000.0),
        "original_max_position_embeddings": config.get("original_max_position_embeddings", context),
    }
    parameters = {**defaults, **stored}
    kind = parameters["rope_type"]
    # `dynamic` changes nothing up to max_position_embeddings, where the model's context ends.
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise TritGgufError(
            f"{where}: rope type {kind} is not supported (default, linear, dynamic, yarn and llama3 are)"
        )
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise TritGgufError(f"{where}: rotating only a part of each head (partial_rotary_factor) is not supported")
    numbers = ["rope_theta", *(("factor",) if kind in ("linear", "yarn") else ())]
    if kind == "llama3":
        parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
        numbers += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in numbers:
        positive_number(parameters.get(key), key, where)
    if kind == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
        raise TritGgufError(f"{where}: low_freq_factor and high_freq_factor of the rope scaling are equal")
    return parameters


def gguf_metadata(config: Mapping[str, Any], where: str = "config.json") -> dict[str, GGUFValue]:
    """Return general.architecture and the keys `llama.*` or `qwen2.*`, in llama.cpp's order."""
    from gguf import GGUFWriter

    architecture = find_architecture(config, where)
    dimensions = dimensions_from_config(config, where)
    rope = rope_parameters(config, where)
    writer = GGUFWriter(path=None, arch=architecture.gguf_name)
    writer.add_block_count(dimensions.layers)
    writer.add_context_length(count_of(config, "max_position_embeddings", where, default=architecture.default_context))
    writer.add_embedding_length(dimensions.hidden)
    writer.add_feed_forward_length(dimensions.feed_forward)
    writer.add_head_count(dimensions.heads)
    writer.add_head_count_kv(dimensions.kv_heads)
    _add_rope_scaling(writer, rope, where)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(positive_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where))
    # transformers always fills in head_dim for Llama and Mistral, never for Qwen2, and llama.cpp writes what
    # it finds.
    if architecture.gguf_name == "llama" or config.get("head_dim") is not None:
        writer.add_key_length(dimensions.head_dim)
        writer.add_value_length(dimensions.head_dim)
    if architecture.gguf_name == "llama":
        writer.add_vocab_size(dimensions.vocabulary)
        writer.add_rope_dimension_count(dimensions.head_dim)
    return dict(writer.kv_data[0])


def _add_rope_scaling(writer: Any, rope: Mapping[str, Any], where: str) -> None:
    from gguf import RopeScalingType

    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(count_of(rope, "original_max_position_embeddings", where))
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(positive_number(rope[key], key, where))


def rope_factors(config: Mapping[str, Any], where: str = "config.json") -> np.ndarray | None:
    """Return `rope_freqs.weight` of a model with Llama 3's rope scaling, else None.

    float32 [head_dim / 2]: what each pair's rotation frequency is divided by. Waves shorter than the original
    context over `high_freq_factor` keep their frequency, those longer than it over `low_freq_factor` are
    slowed by `factor`, and between the two the reciprocal goes over linearly in the number of turns per
    original context (Llama 3.1).
    """
    rope = rope_parameters(config, where)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = dimensions_from_config(config, where).head_dim
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.float32(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] * frequencies.astype(np.float64) / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def gguf_tensor_name(hf_name: str) -> str | None:
    """Return the GGUF name of a Hugging Face tensor, or None when the table has no such tensor."""
    if layer := _HF_LAYER.fullmatch(hf_name):
        index, name, suffix = layer.groups()
        return f"blk.{index}.{_LAYER_NAMES_TO_GGUF[name]}.{suffix}" if name in _LAYER_NAMES_TO_GGUF else None
    stem, _, suffix = hf_name.rpartition(".")
    return f"{_MODEL_NAMES_TO_GGUF[stem]}.weight" if suffix == "weight" and stem in _MODEL_NAMES_TO_GGUF else None


def hf_tensor_name(arch: str, gguf_name: str) -> str:
    """Return the Hugging Face name of a tensor of a GGUF architecture (`llama` or `qwen2`).

    Raises TritGgufError for a tensor that a Hugging Face checkpoint does not have, such as rope_freqs.weight.
    """
    if layer := _GGUF_LAYER.fullmatch(gguf_name):
        index, name, suffix = layer.groups()
        if name in _LAYER_NAMES:
            return f"model.layers.{index}.{_LAYER_NAMES[name]}.{suffix}"
    stem, _, suffix = gguf_name.rpartition(".")
    if suffix == "weight" and stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.weight"
    raise TritGgufError(f"tensor {gguf_name} has no counterpart in a Hugging Face checkpoint of architecture {arch}")


def from_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Return a Hugging Face tensor with its rows in GGUF's order; contiguous.

    In `llama`, row 2i of a head of Q or K (weight or bias) is what was row i, and row 2i + 1 what was row i +
    half.
    """
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def to_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Return a GGUF tensor with its rows in Hugging Face's order; contiguous. The inverse of `from_hf`."""
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def permutes_rotary_rows(arch: str) -> bool:
    """Tell whether a GGUF architecture interleaves each head's halves, so that pairs (2i, 2i + 1) rotate."""
    return any(a.permutes_rotary_rows for a in ARCHITECTURES.values() if a.gguf_name == arch)


def _rotary_heads(arch: str, gguf_name: str, head_count: int, head_count_kv: int) -> int | None:
    """Return how many heads' rows are permuted in this tensor, or None."""
    layer = _GGUF_LAYER.fullmatch(gguf_name)
    if layer is None or not permutes_rotary_rows(arch):
        return None
    return {"attn_q": head_count, "attn_k": head_count_kv}.get(layer[2])
