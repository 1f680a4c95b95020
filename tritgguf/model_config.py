"""What the forward pass needs to know about a model, read from its file and checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tritgguf.architectures import ROPE_FREQS, Dimensions, dimensions_from_gguf, permutes_rotary_rows
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F32, GgufFile

ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know about a model."""

    architecture: str
    dimensions: Dimensions
    context_length: int
    norm_epsilon: float
    interleaved_rotation: bool
    rotation_frequencies: np.ndarray
    """float64 [head_dim / 2]: radians per token of each rotated pair."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model knows."""
        return self.dimensions.vocabulary

    @property
    def embedding_length(self) -> int:
        """Width of the residual stream."""
        return self.dimensions.hidden

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return self.dimensions.layers

    @classmethod
    def from_file(cls, file: GgufFile) -> ModelConfig:
        """Read and check a file's configuration, and that it has every tensor in the right shape."""
        if "token_embd.weight" not in file.tensors:
            raise TritGgufError(f"{file.path}: has no tensor token_embd.weight; it is no language model")
        projections = (*ATTENTION_INPUTS, "attn_output")
        biased = frozenset(name for name in projections if any(t.endswith(f".{name}.bias") for t in file.tensors))
        vocabulary = file.tensors["token_embd.weight"].shape[0]
        dimensions = dimensions_from_gguf(file.metadata, vocabulary, biased, str(file.path))
        for name, shape in dimensions.shapes().items():
            if name not in file.tensors:
                if name == "output.weight":
                    continue
                raise TritGgufError(f"{file.path}: tensor {name} is missing; convert the model again")
            if file.tensors[name].shape != shape:
                found = file.tensors[name].shape
                raise TritGgufError(
                    f"{file.path}: tensor {name} has the shape {found}, not {shape}; convert the model again"
                )
        architecture = file.metadata["general.architecture"]
        return cls(
            architecture=architecture,
            dimensions=dimensions,
            context_length=int(_number(file, f"{architecture}.context_length")),
            norm_epsilon=_number(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
            interleaved_rotation=permutes_rotary_rows(architecture),
            rotation_frequencies=_rotation_frequencies(file, architecture, dimensions.head_dim),
        )


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise TritGgufError(f"{file.path}: {key} is {value!r}, which is no positive number; convert the model again")
    return value


def _rotation_frequencies(file: GgufFile, architecture: str, head_dim: int) -> np.ndarray:
    """Return base ** (-2i / head_dim), slowed by linear scaling or by the file's `rope_freqs.weight`."""
    base = _number(file, f"{architecture}.rope.freq_base", 10000.0)
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "linear":
        frequencies /= _number(file, f"{architecture}.rope.scaling.factor")
    elif scaling != "none":
        raise TritGgufError(f"{file.path}: rope scaling {scaling} cannot be run (linear and Llama 3's can)")
    if ROPE_FREQS in file.tensors:
        factors = read_vector(file, ROPE_FREQS, head_dim // 2).astype(np.float64)
        if not (factors > 0).all():
            raise TritGgufError(f"{file.path}: tensor {ROPE_FREQS} has a factor that is not positive")
        frequencies /= factors
    return frequencies


def read_vector(file: GgufFile, name: str, length: int) -> np.ndarray:
    """Return a vector of weights: float32 [length], a view of the map."""
    info = file.tensors[name]
    if info.type_id != F32 or info.shape != (length,):
        raise TritGgufError(f"{file.path}: tensor {name} is {info.type_name} {info.shape}, not F32 ({length},)")
    return file.raw(name).view(np.float32)
