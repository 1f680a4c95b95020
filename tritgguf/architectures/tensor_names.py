"""Conversion of tensors between Hugging Face and GGUF: names, row order and norm offsets.

`table` has the names and the order of each family.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tritgguf.architectures.delta_net import (
    DELTA_ALPHA,
    DELTA_BETA,
    DELTA_DECAY,
    DELTA_GATE,
    DELTA_KERNEL,
    DELTA_NORM,
    DELTA_OUTPUT,
    DELTA_VECTORS,
    DeltaNet,
    decay_from_hf,
    decay_to_hf,
)
from tritgguf.architectures.experts import ROUTER, SHARED_MATRICES, SHARED_ROUTER, STACKS, HfNames
from tritgguf.architectures.keys import HEAD_BIAS_ENTRY
from tritgguf.architectures.layer_names import FUSED_MATRICES, MATRICES
from tritgguf.architectures.short_convolutions import CONVOLUTION_INPUT, CONVOLUTION_KERNEL, CONVOLUTION_OUTPUT
from tritgguf.architectures.table import ARCHITECTURES, GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_part import WHOLE, TensorPart
from tritgguf.errors import TritGgufError
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.stacks import matrix_names, split_matrix_name

EMBEDDINGS, HEAD, HEAD_BIAS = "token_embd.weight", "output.weight", "output.bias"
"""GGUF names; a model without the second one uses its embeddings as the head, too. Few have the third."""

_SINKS: HfNames = {"self_attn.sinks": ("attn_sinks",)}
# GGUF name -> Hugging Face name, both without their `.weight` or `.bias`.
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head"}

_INDEX = r"(0|[1-9][0-9]{0,5})"
_PACKED_NAMES = (
    *{**MATRICES, **FUSED_MATRICES},
    *STACKS,
    *SHARED_MATRICES,
    CONVOLUTION_INPUT,
    CONVOLUTION_OUTPUT,
    DELTA_GATE,
    DELTA_OUTPUT,
)
_FLOAT32_NAMES = (ROUTER, CONVOLUTION_KERNEL, DELTA_KERNEL, DELTA_ALPHA, DELTA_BETA)
_KERNELS = tuple(f".{name}.weight" for name in (CONVOLUTION_KERNEL, DELTA_KERNEL))
_QUANTIZED = re.compile(rf"blk\.{_INDEX}\.({'|'.join(map(re.escape, _PACKED_NAMES))})\.weight")
_FLOAT32 = re.compile(
    rf"blk\.{_INDEX}\.(({'|'.join(map(re.escape, _FLOAT32_NAMES))})\.weight|({'|'.join(STACKS)})\.bias)"
)
GGUF_LAYER = re.compile(rf"blk\.{_INDEX}\.([\w.]+)\.(weight|bias)")
GGUF_LAYER_INDEX = re.compile(rf"blk\.{_INDEX}\.")
_LAYER_TENSOR = re.compile(rf"blk\.{_INDEX}\.([\w.]+)")
_HF_LAYER = re.compile(rf"model\.layers\.{_INDEX}\.([\w.]+)\.(weight|bias)")
_HF_EXPERT_TENSOR = re.compile(rf"model\.layers\.{_INDEX}\.([\w.]+)")
_EXPERT_NUMBER = re.compile(rf"(?<=\.){_INDEX}(?=\.)")


@dataclass(frozen=True)
class Place:
    """The weights that a Hugging Face tensor holds: GGUF name of a tensor or matrix (see `stacks`), and its part."""

    name: str
    part: TensorPart = WHOLE


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint.

    Attributes:
        shape: in NumPy order.
        matrices: the matrices (see `stacks`) whose rows it has, in order; the halves of a matrix are a tuple.
        part: how each of them lies in it; which half does not matter.

    """

    shape: tuple[int, ...]
    matrices: tuple[tuple[str, ...], ...]
    part: TensorPart = WHOLE


def quantized_tensor(name: str) -> bool:
    """Tell whether a GGUF tensor, or a matrix of a stack, is one of a layer's that are packed into trits."""
    return _QUANTIZED.fullmatch(split_matrix_name(name)[0]) is not None


def kept_in_float32(name: str) -> bool:
    """Tell whether a GGUF tensor is kept in float32 although it is no vector.

    These are small and decide much: routers, experts' biases, kernels of convolutions, gates of a state.
    """
    return _FLOAT32.fullmatch(name) is not None


def places_of(arch: str, hf_name: str) -> list[Place]:
    """Return the GGUF tensors or matrices that a Hugging Face tensor holds; none if the architecture has no such."""
    if name := gguf_tensor_name(arch, hf_name):
        return [Place(name)]
    layer = _HF_EXPERT_TENSOR.fullmatch(hf_name)
    if layer is None:
        return []
    expert = _EXPERT_NUMBER.search(layer[2])
    pattern = layer[2] if expert is None else _EXPERT_NUMBER.sub("{}", layer[2], count=1)
    names = _other_names(arch, in_module=True).get(pattern) or _other_names(arch, in_module=False).get(pattern, ())
    place = "" if expert is None else f"[{expert[1]}]"
    return [
        Place(f"blk.{layer[1]}.{with_suffix(name)}{place}", _part(arch, names, index))
        for index, name in enumerate(names)
    ]


def hf_tensors(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HfTensor]:
    """Return the tensors of a Hugging Face checkpoint, as its family publishes them, by name.

    `shapes` are those of the GGUF tensors, in NumPy order. Raises TritGgufError for a tensor without a counterpart.
    """
    tensors: dict[str, HfTensor] = {}
    for name, shape in shapes.items():
        hf_name, part = _stored_name(arch, name)
        if "{}" in hf_name:
            for expert, matrix in enumerate(matrix_names(name, shape)):
                tensors[hf_name.format(expert)] = HfTensor(shape[1:], ((matrix,),))
        elif part.half is None:
            stored = _with_unit_axis(name, shape) or part.shape(shape)
            tensors[hf_name] = HfTensor(stored, tuple((matrix,) for matrix in matrix_names(name, shape)), part)
        elif hf_name not in tensors:
            halves = [place.name for place in places_of(arch, hf_name)]
            sizes = [shapes[half] for half in halves if half in shapes]
            axis = -1 if part.of_vectors else -2
            whole = [*shape[:axis], sum(size[axis] for size in sizes), *shape[len(shape) + axis + 1 :]]
            matrices = zip(*(matrix_names(half, shape) for half in halves), strict=True)
            tensors[hf_name] = HfTensor(replace(part, half=None).shape(tuple(whole)), tuple(matrices), part)
    return tensors


def module_parameter(arch: str, gguf_name: str) -> tuple[str, TensorPart]:
    """Return the parameter of transformers' model that holds a GGUF tensor, and which part of it that is.

    Raises TritGgufError as `hf_tensor_name` does.
    """
    layer = _LAYER_TENSOR.fullmatch(gguf_name)
    found = None if layer is None else _other_tensor(arch, layer[2], in_module=True)
    if layer is None or found is None:
        return hf_tensor_name(arch, gguf_name), WHOLE
    return f"model.layers.{layer[1]}.{found[0]}", found[1]


def gguf_tensor_name(arch: str, hf_name: str) -> str | None:
    """Return the GGUF name of a Hugging Face tensor; None if the architecture has no such tensor."""
    if layer := _HF_LAYER.fullmatch(hf_name):
        index, hf_stem, suffix = layer.groups()
        names = (name for name, hf in _layer_names(arch).items() if hf == hf_stem)
        return next((f"blk.{index}.{name}.{suffix}" for name in names), None)
    return next((name for name, hf in _model_tensors(arch).items() if hf == hf_name), None)


def hf_tensor_name(arch: str, gguf_name: str) -> str:
    """Return the Hugging Face name of a tensor of a GGUF architecture, or of a matrix of a stack (see `stacks`).

    The name of a stack has `*` in place of the expert's number if each expert is a tensor of its own. Raises
    TritGgufError for a tensor that a Hugging Face checkpoint does not have, such as rope_freqs.weight.
    """
    tensor, expert = split_matrix_name(gguf_name)
    return _stored_name(arch, tensor)[0].replace("{}", "*" if expert is None else str(expert))


def _stored_name(arch: str, gguf_name: str) -> tuple[str, TensorPart]:
    """Return the Hugging Face name of a GGUF tensor, with `{}` for an expert's number, and its part of that tensor."""
    if layer := GGUF_LAYER.fullmatch(gguf_name):
        index, name, suffix = layer.groups()
        if name in _layer_names(arch):
            return f"model.layers.{index}.{_layer_names(arch)[name]}.{suffix}", WHOLE
    if (layer := _LAYER_TENSOR.fullmatch(gguf_name)) and (found := _other_tensor(arch, layer[2], in_module=False)):
        return f"model.layers.{layer[1]}.{found[0]}", found[1]
    if gguf_name in _model_tensors(arch):
        return _model_tensors(arch)[gguf_name], WHOLE
    raise TritGgufError(f"tensor {gguf_name} has no counterpart in a Hugging Face checkpoint of architecture {arch}")


def _with_unit_axis(gguf_name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a Hugging Face tensor that has an axis of length 1 more than GGUF's; None for others."""
    if gguf_name.endswith(f".{SHARED_ROUTER}.weight"):
        return (1, *shape)
    return (shape[0], 1, *shape[1:]) if gguf_name.endswith(_KERNELS) else None


def without_unit_axis(gguf_name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a Hugging Face tensor without the axis of length 1 that the GGUF tensor lacks, if any."""
    shorter = stored[:1] + stored[2:] if gguf_name.endswith(_KERNELS) else stored[1:]
    return shorter if _with_unit_axis(gguf_name, shorter) == stored else stored


@functools.cache
def _model_tensors(arch: str) -> dict[str, str]:
    """Return GGUF name -> Hugging Face name of the tensors outside of layers."""
    entry = GGUF_ARCHITECTURES[arch]
    norm, hf_norm = entry.final_norm
    names = {**_MODEL_NAMES, norm: hf_norm}
    biased = [norm] if entry.has_layer_norms else []
    biased += ["output"] if HEAD_BIAS_ENTRY in entry.bias_entries else []
    tensors = {f"{name}.weight": f"{hf}.weight" for name, hf in names.items()}
    return {**tensors, **{f"{name}.bias": f"{names[name]}.bias" for name in biased}}


@functools.cache
def _layer_names(arch: str) -> dict[str, str]:
    """Return GGUF name -> Hugging Face name of a layer's matrices and norms, without those of experts."""
    entry = GGUF_ARCHITECTURES[arch]
    kernels = {CONVOLUTION_KERNEL: "conv.conv"} if entry.convolves else {}
    kernels |= {DELTA_KERNEL: "linear_attn.conv1d"} if entry.has_states else {}
    return {**entry.layer_norms(), **entry.matrices(), **kernels}


@functools.cache
def _other_names(arch: str, *, in_module: bool) -> HfNames:
    """Return the Hugging Face names of a layer's tensors of experts, sinks and states, of all classes of a family."""
    entries = [entry for entry in ARCHITECTURES.values() if entry.gguf_name == arch]
    families = [entry.experts for entry in entries if entry.experts]
    names = {
        name: tensors
        for family in families
        for name, tensors in (family.module if in_module else family.stored).items()
    }
    names |= _SINKS if any(entry.sinks for entry in entries) else {}
    return {**names, **DELTA_VECTORS} if any(entry.has_states for entry in entries) else names


def _other_tensor(arch: str, name: str, *, in_module: bool) -> tuple[str, TensorPart] | None:
    """Return the Hugging Face tensor with a GGUF tensor (name without layer) of `_other_names`, and the part of it."""
    for hf_name, tensors in _other_names(arch, in_module=in_module).items():
        full_names = [with_suffix(tensor) for tensor in tensors]
        if name in full_names:
            return hf_name, _part(arch, tensors, full_names.index(name))
    return None


def _part(arch: str, names: tuple[str, ...], index: int) -> TensorPart:
    """Return how one of some GGUF tensors lies in the Hugging Face tensor of all of them."""
    families = (entry.experts for entry in ARCHITECTURES.values() if entry.gguf_name == arch and entry.experts)
    family = next(families, None)
    return WHOLE if family is None else family.part(names, index)


def with_suffix(name: str) -> str:
    """Return the name of a tensor, which is a weight unless its name is a whole one."""
    return name if name.endswith(".bias") or name == DELTA_DECAY else f"{name}.weight"


def from_hf(
    arch: str,
    gguf_name: str,
    array: np.ndarray,
    head_count: int,
    head_count_kv: int,
    delta_net: DeltaNet | None = None,
) -> np.ndarray:
    """Convert a Hugging Face tensor to GGUF: rows in GGUF's order, norms with their offset; contiguous.

    In `llama`, row i of a head of Q or K (weight or bias) becomes row 2i, and row i + head_dim / 2 becomes row
    2i + 1. A family with states needs its `DeltaNet`, and all rows of a tensor that `reorders_rows` names.
    """
    if delta_net is not None:
        if _is_decay(gguf_name):
            array = decay_from_hf(array)
        array = delta_net.order(_name_in_layer(gguf_name), array, to_gguf=True)
    if offset := _norm_offset(arch, gguf_name):
        return to_float32(array) + np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def to_hf(
    arch: str,
    gguf_name: str,
    array: np.ndarray,
    head_count: int,
    head_count_kv: int,
    delta_net: DeltaNet | None = None,
) -> np.ndarray:
    """Convert a GGUF tensor to Hugging Face; contiguous. The inverse of `from_hf`."""
    if delta_net is not None:
        if _is_decay(gguf_name):
            array = decay_to_hf(array)
        array = delta_net.order(_name_in_layer(gguf_name), array, to_gguf=False)
    if offset := _norm_offset(arch, gguf_name):
        return array - np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def reorders_rows(gguf_name: str, delta_net: DeltaNet | None) -> bool:
    """Tell whether a tensor's rows have another order in GGUF, all of them together; `from_hf` needs them all then."""
    return delta_net is not None and delta_net.mixes_rows(_name_in_layer(gguf_name))


def inputs_in_order(gguf_name: str, inputs: Any, delta_net: DeltaNet | None, *, to_gguf: bool) -> Any:
    """Return a matrix's inputs, [..., columns] of NumPy or torch, in GGUF's order of columns, or in transformers'."""
    if delta_net is None or _name_in_layer(gguf_name) != DELTA_OUTPUT:
        return inputs
    return delta_net.order_columns(inputs, to_gguf=to_gguf)


def has_own_parameters(gguf_name: str) -> bool:
    """Tell whether a vector is what transformers' parameter is, up to an offset and the order."""
    return not _is_decay(gguf_name)


def _is_decay(gguf_name: str) -> bool:
    return gguf_name.endswith(f".{DELTA_DECAY}")


def _name_in_layer(gguf_name: str) -> str:
    """Return a tensor's name without its layer, and without `.weight`."""
    layer = _LAYER_TENSOR.fullmatch(gguf_name)
    return "" if layer is None else layer[2].removesuffix(".weight")


def permutes_rotary_rows(arch: str) -> bool:
    """Tell whether a GGUF architecture interleaves the halves of each head, so that pairs (2i, 2i + 1) rotate."""
    return GGUF_ARCHITECTURES[arch].permutes_rotary_rows


def _norm_offset(arch: str, gguf_name: str) -> int:
    if gguf_name.endswith(f".{DELTA_NORM}.weight"):
        return 0
    return GGUF_ARCHITECTURES[arch].norm_offset if gguf_name.endswith("norm.weight") else 0


def _rotary_heads(arch: str, gguf_name: str, head_count: int, head_count_kv: int) -> int | None:
    """Return the number of heads whose rows are permuted in this tensor; None if none are."""
    layer = GGUF_LAYER.fullmatch(gguf_name)
    if layer is None or not permutes_rotary_rows(arch):
        return None
    return {"attn_q": head_count, "attn_k": head_count_kv}.get(layer[2])
