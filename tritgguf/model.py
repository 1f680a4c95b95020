"""The transformer: configuration, weights as views of the mapped file, key-value cache and forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpu_kernels.activations import gate, normalize
from cpu_kernels.attention import attend, rotate_and_store
from cpu_kernels.projection import Activations, Matrix, Projection
from cpu_kernels.threads import use_threads
from tritgguf.architectures import ROPE_FREQS, Dimensions, dimensions_from_gguf, permutes_rotary_rows
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, F32, GgufFile
from tritgguf.trit_types import TritType, is_trit_type

BATCH_TOKENS = 512
_ATTENTION = ("attn_q", "attn_k", "attn_v")


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
        biased = frozenset(
            name for name in (*_ATTENTION, "attn_output") if f"blk.0.{name}.bias" in file.tensors
        )
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise TritGgufError(
            f"{file.path}: {key} is {value!r}, which is no positive number; convert the model again"
        )
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
        factors = _vector(file, ROPE_FREQS, head_dim // 2).astype(np.float64)
        if not (factors > 0).all():
            raise TritGgufError(f"{file.path}: tensor {ROPE_FREQS} has a factor that is not positive")
        frequencies /= factors
    return frequencies


def _vector(file: GgufFile, name: str, length: int) -> np.ndarray:
    """Return a vector of weights: float32 [length], a view of the map."""
    info = file.tensors[name]
    if info.type_id != F32 or info.shape != (length,):
        raise TritGgufError(
            f"{file.path}: tensor {name} is {info.type_name} {info.shape}, not F32 ({length},)"
        )
    return file.raw(name).view(np.float32)


def _matrix(file: GgufFile, name: str) -> Matrix:
    info = file.tensors[name]
    rows, columns = info.shape
    if is_trit_type(info.type_id):
        return Matrix(file.raw(name), rows, columns, TritType(info.type_id).depth, file.codebook(name))
    if info.type_id == F16:
        return Matrix(file.raw(name), rows, columns, depth=0)
    raise TritGgufError(
        f"{file.path}: tensor {name} is {info.type_name}, but only trit files are run; make one with `tritgguf convert`"
    )


class _Layer:
    """One layer's weights."""

    def __init__(self, file: GgufFile, index: int, dimensions: Dimensions) -> None:
        def projection(*names: str) -> Projection:
            return Projection([_matrix(file, f"blk.{index}.{name}.weight") for name in names])

        self.attention_norm = _vector(file, f"blk.{index}.attn_norm.weight", dimensions.hidden)
        self.feed_forward_norm = _vector(file, f"blk.{index}.ffn_norm.weight", dimensions.hidden)
        self.qkv = projection(*_ATTENTION)
        self.output = projection("attn_output")
        self.gate_up = projection("ffn_gate", "ffn_up")
        self.down = projection("ffn_down")
        shapes = dimensions.shapes()
        biases = [
            _vector(file, name, shapes[name][0])
            if (name := f"blk.{index}.{part}.bias") in shapes
            else np.zeros(shapes[f"blk.{index}.{part}.weight"][0], np.float32)
            for part in (*_ATTENTION, "attn_output")
        ]
        empty = np.zeros(0, np.float32)
        self.qkv_bias = np.concatenate(biases[:3]) if dimensions.biased & set(_ATTENTION) else empty
        self.output_bias = biases[3] if "attn_output" in dimensions.biased else None


class _Workspace:
    """Every buffer of the forward pass for a batch of tokens, allocated once."""

    def __init__(self, tokens: int, sizes: Dimensions) -> None:
        head_columns = sizes.heads * sizes.head_dim
        self.stream = np.zeros((tokens, sizes.hidden), np.float32)
        self.residual = np.zeros((tokens, sizes.hidden), np.float32)
        self.hidden = Activations(tokens, sizes.hidden)
        self.qkv = np.zeros((tokens, head_columns + 2 * sizes.kv_heads * sizes.head_dim), np.float32)
        self.attended = Activations(tokens, head_columns)
        self.gate_up = np.zeros((tokens, 2 * sizes.feed_forward), np.float32)
        self.gated = Activations(tokens, sizes.feed_forward)

    def first(self, tokens: int) -> _Workspace:
        """Return the buffers of the first tokens, as views."""
        view = _Workspace.__new__(_Workspace)
        for name, buffer in vars(self).items():
            setattr(view, name, buffer.first(tokens) if isinstance(buffer, Activations) else buffer[:tokens])
        return view


class Model:
    """A model that runs straight from its file, with a cache of the tokens it has seen.

    Attributes:
        config: the model's sizes.
        context: how many tokens the cache holds.
        position: how many tokens are in it.

    Raises TritGgufError for a file that is no trit model or is damaged.

    """

    def __init__(self, file: GgufFile, *, context: int | None = None, threads: int | None = None) -> None:
        """Map the weights of `file`; `context` None takes the trained length, `threads` None the physical cores."""
        self.config = ModelConfig.from_file(file)
        self.threads = use_threads(threads)
        sizes = self.config.dimensions
        self.context = context or self.config.context_length
        self.position = 0
        self._file = file
        self._layers = [_Layer(file, index, sizes) for index in range(sizes.layers)]
        self._final_norm = _vector(file, "output_norm.weight", sizes.hidden)
        if file.tensors["token_embd.weight"].type_id != F16:
            raise TritGgufError(
                f"{file.path}: tensor token_embd.weight is not F16; make the file with `tritgguf convert`"
            )
        self._embeddings = (
            file.raw("token_embd.weight").view(np.float16).reshape(sizes.vocabulary, sizes.hidden)
        )
        head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        self._head = Projection([_matrix(file, head)])
        # Zeroed pages are not resident until a token is written to them.
        cache_shape = (sizes.layers, sizes.kv_heads, self.context, sizes.head_dim)
        self._keys = np.zeros(cache_shape, np.float32)
        self._values = np.zeros(cache_shape, np.float32)
        angles = np.outer(np.arange(self.context), self.config.rotation_frequencies)
        self._cosines, self._sines = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        self._scores = np.zeros((sizes.heads, self.context), np.float32)
        self._logits = np.zeros((1, sizes.vocabulary), np.float32)
        self._workspace = _Workspace(1, sizes)

    def truncate(self, position: int) -> None:
        """Forget the cache from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError("a cache can only be cut within what it holds")
        self.position = position

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append tokens to the cache and return logits.

        Args:
            tokens: token ids, at least one.
            all_logits: whether to return every token's logits, not only the last one's.

        Returns:
            float32 [vocab_size], valid until the next call, or [tokens, vocab_size].

        Raises:
            TritGgufError: the cache cannot hold so many tokens, or a token does not exist.

        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise TritGgufError(f"{self._file.path}: tokens must be from 0 to {self.config.vocab_size - 1}")
        if self.position + ids.size > self.context:
            raise TritGgufError(
                f"{self.position + ids.size} tokens do not fit into a context of {self.context}; use a larger one (-c)"
            )
        logits = np.empty((ids.size, self.config.vocab_size), np.float32) if all_logits else self._logits
        for start in range(0, ids.size, BATCH_TOKENS):
            batch = ids[start : start + BATCH_TOKENS]
            space = self._buffers(len(batch))
            self._run_layers(batch, space)
            if all_logits:
                normalize(
                    space.stream, space.residual, self._final_norm, self._epsilon, *space.hidden.buffers
                )
                self._head.multiply(space.hidden, logits[start : start + len(batch)], self.threads)
        if all_logits:
            return logits
        last = self._workspace.first(1)
        last.stream[0], last.residual[0] = space.stream[-1], space.residual[-1]
        normalize(last.stream, last.residual, self._final_norm, self._epsilon, *last.hidden.buffers)
        self._head.multiply(last.hidden, logits, self.threads)
        return logits[0]

    @property
    def _epsilon(self) -> np.float32:
        return np.float32(self.config.norm_epsilon)

    def _buffers(self, tokens: int) -> _Workspace:
        if len(self._workspace.stream) < tokens:
            self._workspace = _Workspace(tokens, self.config.dimensions)
        return self._workspace.first(tokens)

    def _run_layers(self, tokens: np.ndarray, space: _Workspace) -> None:
        """Leave the last layer's stream in `space.stream`, its last addition still in `space.residual`."""
        heads, interleaved = (self.config.dimensions.heads, self.config.interleaved_rotation)
        hidden, attended, gated = space.hidden, space.attended, space.gated
        space.stream[:] = self._embeddings[tokens]
        space.residual[:] = 0.0
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            normalize(space.stream, space.residual, layer.attention_norm, self._epsilon, *hidden.buffers)
            layer.qkv.multiply(hidden, space.qkv, self.threads)
            rotate_and_store(
                space.qkv,
                layer.qkv_bias,
                self._cosines,
                self._sines,
                interleaved,
                heads,
                keys,
                values,
                self.position,
            )
            attend(space.qkv, keys, values, self.position, heads, self._scores, attended.x)
            attended.quantize()
            layer.output.multiply(attended, space.residual, self.threads)
            if layer.output_bias is not None:
                space.residual += layer.output_bias
            normalize(space.stream, space.residual, layer.feed_forward_norm, self._epsilon, *hidden.buffers)
            layer.gate_up.multiply(hidden, space.gate_up, self.threads)
            gate(space.gate_up, *gated.buffers)
            layer.down.multiply(gated, space.residual, self.threads)
        self.position += len(tokens)
