"""Layers with a short convolution in place of attention (LFM2): their sizes, tensors and keys in both directions.

LFM2's config.json has names of its own for entries that other families have as well. `standard_entries` translates them
before anything else reads them, `own_entries` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritgguf.architectures.key_rules import GgufKeys, HfConfig, SpecialRule
from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.checked import count_of, positive_number

if TYPE_CHECKING:
    from tritgguf.architectures.architecture import Architecture

CONVOLUTION_INPUT, CONVOLUTION_KERNEL, CONVOLUTION_OUTPUT = "shortconv.in_proj", "shortconv.conv", "shortconv.out_proj"
_KV_HEADS_KEY, _TAPS_KEY = "attention.head_count_kv", "shortconv.l_cache"
_TAPS_ENTRY, _TYPES_ENTRY = "conv_L_cache", "layer_types"
_ATTENTION_TYPE, _CONVOLUTION_TYPE = "full_attention", "conv"
_MAX_TAPS = 16  # a page keeps the inputs of 32 positions
_OWN_NAMES = {"rms_norm_eps": "norm_eps"}


@dataclass(frozen=True)
class ShortConvolutions:
    """The layers of a model that have a short convolution.

    Attributes:
        layers: their indices.
        taps: how many positions a result is computed from, its own included.

    """

    layers: frozenset[int]
    taps: int

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return GGUF name without layer -> shape in NumPy order, of one layer's tensors."""
        return {
            CONVOLUTION_INPUT: (3 * hidden, hidden),
            CONVOLUTION_KERNEL: (hidden, self.taps),
            CONVOLUTION_OUTPUT: (hidden, hidden),
        }


def standard_entries(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of an LFM2's config.json under the names of other families; TritGgufError for bad ones."""
    entries = dict(config)
    for name, own_name in (*_OWN_NAMES.items(), ("tie_word_embeddings", "tie_embedding")):
        if own_name in entries:
            entries[name] = entries[own_name]
    if "block_ff_dim" in entries:
        entries["intermediate_size"] = entries["block_ff_dim"]
    adjusts = entries.get("block_auto_adjust_ff_dim", True) and _is_dense(config)
    if "intermediate_size" in entries and adjusts:
        entries["intermediate_size"] = _adjusted_width(entries, where)
    if entries.get(_TYPES_ENTRY) is None and isinstance(attention := entries.get("full_attn_idxs"), list):
        layers = count_of(entries, "num_hidden_layers", where)
        kinds = _CONVOLUTION_TYPE, _ATTENTION_TYPE
        entries[_TYPES_ENTRY] = [kinds[layer in attention] for layer in range(layers)]
    return entries


def own_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries under LFM2's names; the width of the feed-forward is the final one."""
    own = {_OWN_NAMES.get(name, name): value for name, value in entries.items()}
    return {**own, "block_auto_adjust_ff_dim": False} if _is_dense(own) else own


def _is_dense(config: Mapping[str, Any]) -> bool:
    return "num_experts" not in config and "moe_intermediate_size" not in config


def _adjusted_width(entries: Mapping[str, Any], where: str) -> int:
    """Return the rows of gate and up: two thirds of the given width, times a factor, rounded up to a multiple."""
    width = 2 * count_of(entries, "intermediate_size", where) // 3
    factor = entries.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width
    width = int(positive_number(factor, "block_ffn_dim_multiplier", where) * width)
    multiple = count_of(entries, "block_multiple_of", where, default=256)
    return -(-width // multiple) * multiple


def convolutions_from_config(
    entries: Mapping[str, Any], architecture: Architecture, layers: int, where: str
) -> ShortConvolutions | None:
    """Return the short convolutions of a config.json; None if the family has none.

    Raises TritGgufError for impossible entries and for biases.
    """
    if not architecture.convolves:
        return None
    if entries.get("conv_bias"):
        raise TritGgufError(f"{where}: biases of convolutions (conv_bias) are not supported")
    types = entries.get(_TYPES_ENTRY)
    if types is None:
        types = [_ATTENTION_TYPE] * layers
    known = [kind for kind in types if kind in (_ATTENTION_TYPE, _CONVOLUTION_TYPE)] if isinstance(types, list) else []
    if len(known) != layers or len(types) != layers:
        raise DamagedFileError(
            f"{where}: {_TYPES_ENTRY} is {types!r:.80}, which is no list of {layers} times {_ATTENTION_TYPE} or"
            f" {_CONVOLUTION_TYPE}"
        )
    taps = count_of(entries, _TAPS_ENTRY, where, default=architecture.defaults.get(_TAPS_ENTRY), most=_MAX_TAPS)
    indices = frozenset(layer for layer, kind in enumerate(types) if kind == _CONVOLUTION_TYPE)
    return _checked(ShortConvolutions(indices, taps), layers, where)


def kv_heads_from_gguf(metadata: Mapping[str, Any], architecture: Architecture, layers: int, where: str) -> list[int]:
    """Return each layer's key-value heads, 0 for a convolution, of a family that has them; TritGgufError for others."""
    key = f"{architecture.gguf_name}.{_KV_HEADS_KEY}"
    stored = metadata.get(key)
    counts = stored if isinstance(stored, list) and all(type(count) is int for count in stored) else []
    if len(counts) != layers or len({*counts, 0}) != 2 or min(counts) < 0:
        raise DamagedFileError(
            f"{where}: {key} is {stored!r:.80}, which is no list of {layers} equal numbers of heads, or 0 for a"
            " convolution"
        )
    return counts


def convolutions_from_gguf(
    metadata: Mapping[str, Any], architecture: Architecture, layers: int, where: str
) -> ShortConvolutions | None:
    """Return the short convolutions of a GGUF model; None if the family has none. Raises TritGgufError as above."""
    if not architecture.convolves:
        return None
    if (window := f"{architecture.gguf_name}.attention.sliding_window") in metadata:
        raise TritGgufError(f"{where}: a sliding window ({window}) is not supported in this architecture")
    counts = kv_heads_from_gguf(metadata, architecture, layers, where)
    taps = count_of(metadata, f"{architecture.gguf_name}.{_TAPS_KEY}", where, most=_MAX_TAPS)
    indices = frozenset(layer for layer, count in enumerate(counts) if not count)
    return _checked(ShortConvolutions(indices, taps), layers, where)


def _checked(convolutions: ShortConvolutions, layers: int, where: str) -> ShortConvolutions:
    if len(convolutions.layers) == layers:
        raise TritGgufError(f"{where}: a model without attention in any layer is not supported")
    return convolutions


def _to_gguf(config: HfConfig) -> dict[str, int | list[int]]:
    sizes = config.dimensions
    assert sizes.convolutions is not None
    heads = [0 if layer in sizes.convolutions.layers else sizes.kv_heads for layer in range(sizes.layers)]
    return {_KV_HEADS_KEY: heads, "vocab_size": sizes.vocabulary, _TAPS_KEY: sizes.convolutions.taps}


def _to_hf(keys: GgufKeys) -> dict[str, Any]:
    sizes = keys.dimensions
    assert sizes.convolutions is not None
    types = [
        _CONVOLUTION_TYPE if layer in sizes.convolutions.layers else _ATTENTION_TYPE for layer in range(sizes.layers)
    ]
    return {_TYPES_ENTRY: types, _TAPS_ENTRY: sizes.convolutions.taps, "conv_bias": False}


CONVOLUTIONS = SpecialRule(_to_gguf, _to_hf)
"""The kinds of layers, their key-value heads and the taps."""
