"""Conversion of tensors between Hugging Face and GGUF: names, row order and norm offsets.

`table` has the names and the order of each family.
"""

from __future__ import annotations

import re

import numpy as np

from tritgguf.architectures.table import FUSED_MATRICES, GGUF_ARCHITECTURES, MATRICES
from tritgguf.errors import TritGgufError
from tritgguf.formats.dtypes import to_float32

# GGUF name -> Hugging Face name, both without their `.weight` or `.bias`.
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_INDEX = r"(0|[1-9][0-9]{0,5})"
_QUANTIZED = re.compile(rf"blk\.{_INDEX}\.({'|'.join({**MATRICES, **FUSED_MATRICES})})\.weight")
GGUF_LAYER = re.compile(rf"blk\.{_INDEX}\.(\w+)\.(weight|bias)")
_HF_LAYER = re.compile(rf"model\.layers\.{_INDEX}\.([\w.]+)\.(weight|bias)")


def quantized_tensor(name: str) -> bool:
    """Tell whether a GGUF tensor is one of a layer's matrices, which are packed into trits."""
    return _QUANTIZED.fullmatch(name) is not None


def gguf_tensor_name(arch: str, hf_name: str) -> str | None:
    """Return the GGUF name of a Hugging Face tensor; None if the architecture has no such tensor."""
    if layer := _HF_LAYER.fullmatch(hf_name):
        index, hf_stem, suffix = layer.groups()
        names = (name for name, hf in _layer_names(arch).items() if hf == hf_stem)
        return next((f"blk.{index}.{name}.{suffix}" for name in names), None)
    stem, _, suffix = hf_name.rpartition(".")
    names = (name for name, hf in _MODEL_NAMES.items() if hf == stem and suffix == "weight")
    return next((f"{name}.weight" for name in names), None)


def hf_tensor_name(arch: str, gguf_name: str) -> str:
    """Return the Hugging Face name of a tensor of a GGUF architecture.

    Raises TritGgufError for a tensor that a Hugging Face checkpoint does not have, such as rope_freqs.weight.
    """
    if layer := GGUF_LAYER.fullmatch(gguf_name):
        index, name, suffix = layer.groups()
        if name in _layer_names(arch):
            return f"model.layers.{index}.{_layer_names(arch)[name]}.{suffix}"
    stem, _, suffix = gguf_name.rpartition(".")
    if suffix == "weight" and stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.weight"
    raise TritGgufError(f"tensor {gguf_name} has no counterpart in a Hugging Face checkpoint of architecture {arch}")


def _layer_names(arch: str) -> dict[str, str]:
    """Return GGUF name -> Hugging Face name of a layer's matrices and norms."""
    entry = GGUF_ARCHITECTURES[arch]
    return {**entry.layer_norms(), **entry.matrices()}


def from_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Convert a Hugging Face tensor to GGUF: rows in GGUF's order, norms with their offset; contiguous.

    In `llama`, row i of a head of Q or K (weight or bias) becomes row 2i, and row i + head_dim / 2 becomes row
    2i + 1.
    """
    if offset := _norm_offset(arch, gguf_name):
        return to_float32(array) + np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def to_hf(arch: str, gguf_name: str, array: np.ndarray, head_count: int, head_count_kv: int) -> np.ndarray:
    """Convert a GGUF tensor to Hugging Face; contiguous. The inverse of `from_hf`."""
    if offset := _norm_offset(arch, gguf_name):
        return array - np.float32(offset)
    heads = _rotary_heads(arch, gguf_name, head_count, head_count_kv)
    if heads is None:
        return np.ascontiguousarray(array)
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def permutes_rotary_rows(arch: str) -> bool:
    """Tell whether a GGUF architecture interleaves the halves of each head, so that pairs (2i, 2i + 1) rotate."""
    return GGUF_ARCHITECTURES[arch].permutes_rotary_rows


def _norm_offset(arch: str, gguf_name: str) -> int:
    return GGUF_ARCHITECTURES[arch].norm_offset if gguf_name.endswith("norm.weight") else 0


def _rotary_heads(arch: str, gguf_name: str, head_count: int, head_count_kv: int) -> int | None:
    """Return the number of heads whose rows are permuted in this tensor; None if none are."""
    layer = GGUF_LAYER.fullmatch(gguf_name)
    if layer is None or not permutes_rotary_rows(arch):
        return None
    return {"attn_q": head_count, "attn_k": head_count_kv}.get(layer[2])
