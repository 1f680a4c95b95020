"""Layers with Gated DeltaNet in place of attention (Qwen3.5): sizes, tensors, order of value heads, keys both ways.

A layer has more value heads than key heads. transformers lays the value heads of a key head side by side, GGUF (as
llama.cpp) has first the first value head of every key head, then the second of every one, and so on. GGUF has -exp of
A_log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures.key_rules import GgufKeys, HfConfig, SpecialRule
from tritgguf.architectures.keys import LAYERS, ROTATED_DIM
from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.checked import count_of
from tritgguf.formats.dtypes import to_float32

if TYPE_CHECKING:
    from tritgguf.architectures.architecture import Architecture

DELTA_INPUT, DELTA_GATE, DELTA_OUTPUT = "attn_qkv", "attn_gate", "ssm_out"
DELTA_ALPHA, DELTA_BETA, DELTA_KERNEL, DELTA_NORM = "ssm_alpha", "ssm_beta", "ssm_conv1d", "ssm_norm"
DELTA_DECAY, DELTA_BIAS = "ssm_a", "ssm_dt.bias"  # the first one is a whole name: it has no suffix
FURTHER_LEFT_OUT = "its layers that predict further tokens (mtp) are left out"
DELTA_VECTORS = {"linear_attn.A_log": (DELTA_DECAY,), "linear_attn.dt_bias": (DELTA_BIAS,)}
"""Hugging Face name -> GGUF name, of tensors whose names do not end in `.weight`."""

_TYPES_ENTRY, _INTERVAL_ENTRY = "layer_types", "full_attention_interval"
_ATTENTION_TYPE, _DELTA_TYPE = "full_attention", "linear_attention"
_LAYERS_KEY, _INTERVAL_KEY = "attention.recurrent_layers", "full_attention_interval"
_TAPS_KEY, _KEY_DIM_KEY, _KEY_HEADS_KEY = "ssm.conv_kernel", "ssm.state_size", "ssm.group_count"
_VALUE_HEADS_KEY, _VALUES_KEY = "ssm.time_step_rank", "ssm.inner_size"
_FURTHER_KEY = "nextn_predict_layers"
_INTERVAL = 4
_MAX_TAPS, _MAX_HEADS, _MAX_DIM = 16, 1024, 512
_LANES = 16  # the kernels want heads of a multiple of so many columns


@dataclass(frozen=True)
class DeltaNet:
    """The layers of a model that have Gated DeltaNet.

    Attributes:
        layers: their indices.
        taps: how many positions their convolution's results are computed from, a token's own included.
        key_heads, value_heads: heads of queries and keys, and of values; each key head serves as many value heads.
        key_dim, value_dim: the lengths of these heads.

    """

    layers: frozenset[int]
    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def keys(self) -> int:
        """Elements of all queries, or of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Elements of all values."""
        return self.value_heads * self.value_dim

    @property
    def state_numbers(self) -> int:
        """Numbers of a layer's part of a sequence's state, see `cpu_kernels.transformer.delta_net`."""
        return (self.taps - 1) * (2 * self.keys + self.values) + self.value_heads * self.key_dim * self.value_dim

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return GGUF name without layer -> shape in NumPy order, of one layer's tensors."""
        channels = 2 * self.keys + self.values
        return {
            DELTA_INPUT: (channels, hidden),
            DELTA_GATE: (self.values, hidden),
            DELTA_ALPHA: (self.value_heads, hidden),
            DELTA_BETA: (self.value_heads, hidden),
            DELTA_KERNEL: (channels, self.taps),
            DELTA_DECAY: (self.value_heads,),
            DELTA_BIAS: (self.value_heads,),
            DELTA_OUTPUT: (hidden, self.values),
        }

    def mixes_rows(self, name: str) -> bool:
        """Tell whether rows of a tensor (GGUF name without layer) have another order here than in transformers."""
        moved = (DELTA_INPUT, DELTA_GATE, DELTA_ALPHA, DELTA_BETA, DELTA_KERNEL, DELTA_DECAY, DELTA_BIAS)
        return self.value_heads != self.key_heads and name in moved

    def order(self, name: str, array: Any, *, to_gguf: bool) -> Any:
        """Return an array of NumPy or torch with one row for each row of a tensor, in the other order.

        All rows must be there; of the output matrix, an array with columns has these in the other order.
        """
        if self.value_heads == self.key_heads:
            return array
        if name == DELTA_OUTPUT:
            return self.order_columns(array, to_gguf=to_gguf) if array.ndim > 1 else array
        if not self.mixes_rows(name):
            return array
        first = 2 * self.keys if name in (DELTA_INPUT, DELTA_KERNEL) else 0
        ordered = array.copy() if isinstance(array, np.ndarray) else array.clone()
        ordered[first:] = array[first:][self._indices(len(array) - first, to_gguf=to_gguf)]
        return ordered

    def order_columns(self, array: Any, *, to_gguf: bool) -> Any:
        """Return an array whose last axis is that of all values, or of equal parts of them, in the other order."""
        return array[..., self._indices(array.shape[-1], to_gguf=to_gguf)]

    def _indices(self, count: int, *, to_gguf: bool) -> np.ndarray:
        """Return where each element of all value heads is taken from."""
        heads = (self.key_heads, -1) if to_gguf else (-1, self.key_heads)
        indices = np.arange(count).reshape(self.value_heads, -1)
        return indices.reshape(*heads, indices.shape[1]).swapaxes(0, 1).reshape(-1)


def decay_from_hf(a_log: np.ndarray) -> np.ndarray:
    """Return GGUF's decay for A_log: float32, rounded once."""
    decays: np.ndarray = -np.exp(to_float32(a_log).astype(np.float64))
    return decays.astype(np.float32)


def decay_to_hf(decay: np.ndarray) -> np.ndarray:
    """Return A_log for GGUF's decay: float32, of which `decay_from_hf` gives the same bits if some number does."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(-decay.astype(np.float64)).astype(np.float32)


def delta_net_from_config(
    entries: Mapping[str, Any], architecture: Architecture, layers: int, where: str
) -> DeltaNet | None:
    """Return the DeltaNet layers of a config.json; None if the family has none. TritGgufError for impossible ones."""
    if not architecture.has_states:
        return None
    if entries.get("attn_output_gate") is False:
        raise TritGgufError(f"{where}: attention without gates (attn_output_gate) is not supported in this family")

    def count(entry: str, most: int) -> int:
        return count_of(entries, entry, where, default=architecture.defaults[entry], most=most)

    delta_net = DeltaNet(
        layers=frozenset(_layers_of_config(entries, layers, where)),
        taps=count("linear_conv_kernel_dim", _MAX_TAPS),
        key_heads=count("linear_num_key_heads", _MAX_HEADS),
        value_heads=count("linear_num_value_heads", _MAX_HEADS),
        key_dim=count("linear_key_head_dim", _MAX_DIM),
        value_dim=count("linear_value_head_dim", _MAX_DIM),
    )
    return _checked(delta_net, layers, where)


def _layers_of_config(entries: Mapping[str, Any], layers: int, where: str) -> list[int]:
    types = entries.get(_TYPES_ENTRY)
    if types is None:
        interval = count_of(entries, _INTERVAL_ENTRY, where, default=_INTERVAL)
        return _regular(layers, interval)
    known = [kind for kind in types if kind in (_ATTENTION_TYPE, _DELTA_TYPE)] if isinstance(types, list) else []
    if len(known) != layers or len(types) != layers:
        raise DamagedFileError(
            f"{where}: {_TYPES_ENTRY} is {types!r:.80}, which is no list of {layers} times {_ATTENTION_TYPE} or"
            f" {_DELTA_TYPE}"
        )
    return [layer for layer, kind in enumerate(types) if kind == _DELTA_TYPE]


def _regular(layers: int, interval: int) -> list[int]:
    return [layer for layer in range(layers) if (layer + 1) % interval]


def delta_net_from_gguf(
    metadata: Mapping[str, Any], architecture: Architecture, layers: int, where: str
) -> DeltaNet | None:
    """Return the DeltaNet layers of a GGUF model; None if the family has none. Raises TritGgufError as above."""
    if not architecture.has_states:
        return None
    prefix = f"{architecture.gguf_name}."
    if metadata.get(prefix + _FURTHER_KEY):
        raise TritGgufError(
            f"{where}: it has layers that predict further tokens ({_FURTHER_KEY}), which are not run; convert it, and"
            " they are left out"
        )

    def count(key: str, most: int) -> int:
        return count_of(metadata, prefix + key, where, most=most)

    value_heads, values = count(_VALUE_HEADS_KEY, _MAX_HEADS), count(_VALUES_KEY, _MAX_HEADS * _MAX_DIM)
    if values % value_heads:
        raise DamagedFileError(
            f"{where}: {prefix}{_VALUES_KEY} is {values}, which is no multiple of {value_heads} heads"
        )
    delta_net = DeltaNet(
        layers=frozenset(_layers_of_gguf(metadata, prefix, layers, where)),
        taps=count(_TAPS_KEY, _MAX_TAPS),
        key_heads=count(_KEY_HEADS_KEY, _MAX_HEADS),
        value_heads=value_heads,
        key_dim=count(_KEY_DIM_KEY, _MAX_DIM),
        value_dim=values // value_heads,
    )
    return _checked(delta_net, layers, where)


def _layers_of_gguf(metadata: Mapping[str, Any], prefix: str, layers: int, where: str) -> list[int]:
    flags = metadata.get(prefix + _LAYERS_KEY)
    if flags is None:
        return _regular(layers, count_of(metadata, prefix + _INTERVAL_KEY, where, default=_INTERVAL))
    if not isinstance(flags, list) or len(flags) != layers or not all(isinstance(flag, bool) for flag in flags):
        raise DamagedFileError(f"{where}: {prefix}{_LAYERS_KEY} is {flags!r:.80}, which is no list of {layers} flags")
    return [layer for layer, flag in enumerate(flags) if flag]


def _checked(delta_net: DeltaNet, layers: int, where: str) -> DeltaNet:
    """Raise TritGgufError for sizes that are not run."""
    if len(delta_net.layers) == layers:
        raise TritGgufError(f"{where}: a model without attention in any layer is not supported")
    if not delta_net.layers:
        raise TritGgufError(f"{where}: a model of this family without linear attention in any layer is not supported")
    if delta_net.taps < 2:
        raise TritGgufError(f"{where}: a convolution of one tap (linear_conv_kernel_dim) is not supported")
    if delta_net.value_heads % delta_net.key_heads:
        raise TritGgufError(
            f"{where}: {delta_net.value_heads} value heads cannot share {delta_net.key_heads} key heads evenly"
        )
    for size in (delta_net.key_dim, delta_net.value_dim):
        if size % _LANES:
            raise TritGgufError(
                f"{where}: heads of {size} elements in layers with linear attention are not supported, only multiples"
                f" of {_LANES}"
            )
    return delta_net


def without_further_layers(metadata: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    """Return new values of a stock file's keys, None for none, that leave out the layers that predict further tokens.

    There are none for a file without such layers, which are the last ones. Raises TritGgufError for impossible keys.
    """
    prefix = f"{architecture.gguf_name}."
    if not architecture.has_states or not metadata.get(prefix + _FURTHER_KEY):
        return {}
    layers = count_of(metadata, prefix + LAYERS.gguf, where)
    kept = layers - count_of(metadata, prefix + _FURTHER_KEY, where, most=max(1, layers - 1))
    changes: dict[str, Any] = {prefix + _FURTHER_KEY: None, prefix + LAYERS.gguf: kept}
    flags = metadata.get(prefix + _LAYERS_KEY)
    return {**changes, prefix + _LAYERS_KEY: flags[:kept]} if isinstance(flags, list) else changes


def delta_net_of(metadata: Mapping[str, Any], architecture: Architecture, where: str) -> DeltaNet | None:
    """Return the DeltaNet layers of a GGUF model, whose number of layers is a key too."""
    if not architecture.has_states:
        return None
    return delta_net_from_gguf(metadata, architecture, metadata[f"{architecture.gguf_name}.{LAYERS.gguf}"], where)


def _to_gguf(config: HfConfig) -> dict[str, int | list[bool]]:
    sizes = config.dimensions
    delta_net = sizes.delta_net
    assert delta_net is not None
    keys: dict[str, int | list[bool]] = {
        _TAPS_KEY: delta_net.taps,
        _KEY_DIM_KEY: delta_net.key_dim,
        _KEY_HEADS_KEY: delta_net.key_heads,
        _VALUE_HEADS_KEY: delta_net.value_heads,
        _VALUES_KEY: delta_net.values,
    }
    if config.entries.get(_TYPES_ENTRY) is not None:
        keys[_LAYERS_KEY] = [layer in delta_net.layers for layer in range(sizes.layers)]
    interval = count_of(config.entries, _INTERVAL_ENTRY, config.where, default=_INTERVAL)
    return {**keys, _INTERVAL_KEY: interval, ROTATED_DIM.gguf: sizes.rotated_dim or sizes.head_dim}


def _to_hf(keys: GgufKeys) -> dict[str, Any]:
    sizes = keys.dimensions
    delta_net = sizes.delta_net
    assert delta_net is not None
    types: Sequence[str] = [
        _DELTA_TYPE if layer in delta_net.layers else _ATTENTION_TYPE for layer in range(sizes.layers)
    ]
    return {
        _TYPES_ENTRY: types,
        "linear_conv_kernel_dim": delta_net.taps,
        "linear_key_head_dim": delta_net.key_dim,
        "linear_value_head_dim": delta_net.value_dim,
        "linear_num_key_heads": delta_net.key_heads,
        "linear_num_value_heads": delta_net.value_heads,
    }


DELTA_NETS = SpecialRule(_to_gguf, _to_hf)
"""The kinds of layers, the sizes of their heads, and how much of a head of attention rotates."""
