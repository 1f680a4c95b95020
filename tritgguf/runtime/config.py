"""What the forward pass needs to know about a model, read from its file and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cpu_kernels.transformer.layer_options import (
    ATTENTION,
    CLAMPED_SILU,
    DELTA_NET,
    GELU,
    SHORT_CONVOLUTION,
    SILU,
    LayerOptions,
)
from cpu_kernels.transformer.router import SOFTMAX, SPARSE_MIXER, Routing
from tritgguf.architectures import keys
from tritgguf.architectures.architecture import Architecture
from tritgguf.architectures.dimensions import (
    Dimensions,
    biased_matrices,
    dimensions_from_gguf,
    find_gguf_architecture,
)
from tritgguf.architectures.experts import Experts
from tritgguf.architectures.key_rules import KeyRule
from tritgguf.architectures.rope import (
    DEFAULT_BASE,
    FACTOR_TENSORS,
    LONG_FACTORS,
    LONG_ROPE_TENSORS,
    ORIGINAL_KEY,
    ROPE_FREQS,
    SHORT_FACTORS,
    SLIDING_BASE_KEY,
    Rotation,
    rotation_from_base,
    rotation_from_metadata,
)
from tritgguf.errors import DamagedFileError
from tritgguf.formats.checked import count_of
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F32

_NO_SOFTCAP = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know about a model."""

    architecture: Architecture
    dimensions: Dimensions
    context_length: int
    layer_options: LayerOptions
    rotations: tuple[Rotation, ...]
    """Which `layer_options.rotations` counts from 0."""
    long_rotations: tuple[Rotation, ...]
    """Those of a context that is longer than `original_context`; the same without LongRoPE."""
    original_context: int
    """Up to how many tokens a context has `rotations`."""
    embedding_scale: float
    """What an embedding is multiplied with."""
    logit_scale: float
    """What logits are multiplied with."""
    logit_softcap: float
    """Softcap c of the logits: c tanh(logit / c); 0 for none."""
    routing: Routing
    """How a mixture of experts weighs them."""
    feed_forward: int
    """Width of the dense feed-forward; in a mixture without dense layers, that of the shared expert, or 0."""
    expert_feed_forward: int
    """Width of each expert; 0 without experts."""

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

    @property
    def slots(self) -> np.ndarray:
        """The place of each layer among those of its kind: int64 [layers]."""
        kinds = self.layer_options.kinds
        return np.array([np.count_nonzero(kinds[:layer] == kind) for layer, kind in enumerate(kinds)], np.int64)

    @property
    def attention_layers(self) -> int:
        """Number of layers with keys and values."""
        return int(np.count_nonzero(self.layer_options.kinds == ATTENTION))

    @property
    def state_shape(self) -> tuple[int, int]:
        """Layers with a state, and numbers of each layer's part of it; (0, 0) if there are none."""
        delta_net = self.dimensions.delta_net
        return (0, 0) if delta_net is None else (len(delta_net.layers), delta_net.state_numbers)

    @property
    def has_shared_expert(self) -> bool:
        """Whether a shared expert stands beside the experts."""
        return self.dimensions.experts is not None and self.dimensions.experts.shared_width > 0

    @property
    def projected_columns(self) -> int:
        """Rows of the input matrices of a layer without attention; 0 if there is none."""
        sizes = self.dimensions
        if sizes.delta_net is not None:
            return 2 * (sizes.delta_net.keys + sizes.delta_net.values)
        return 0 if sizes.convolutions is None else 3 * sizes.hidden

    @property
    def qkv_columns(self) -> int:
        """Rows of the matrices of queries, keys and values of a layer with attention, gates included."""
        return self.dimensions.query_rows + 2 * self.dimensions.kv_heads * self.dimensions.head_dim

    @property
    def delta_gates(self) -> int:
        """Numbers beta and decay of all heads of a layer with a state; 0 if there is none."""
        return 0 if self.dimensions.delta_net is None else 2 * self.dimensions.delta_net.value_heads

    @classmethod
    def from_file(cls, file: GgufFile) -> ModelConfig:
        """Read and check a file's configuration, and that it has every tensor in the right shape."""
        if "token_embd.weight" not in file.tensors:
            raise DamagedFileError(f"{file.path}: has no tensor token_embd.weight; it is no language model")
        vocabulary = file.tensors["token_embd.weight"].shape[0]
        biased = biased_matrices(file.tensors)
        dimensions = dimensions_from_gguf(file.metadata, vocabulary, biased, str(file.path))
        _check_shapes(file, dimensions)
        architecture = find_gguf_architecture(file.metadata, str(file.path))

        def number(rule: KeyRule, default: float | None = None) -> float:
            key = f"{architecture.gguf_name}.{rule.gguf}"
            return _number(file, key, rule.absent if default is None else default)

        def softcap(rule: KeyRule) -> float:
            return number(rule) if f"{architecture.gguf_name}.{rule.gguf}" in file.metadata else _NO_SOFTCAP

        long_rope, context_length = _has_long_rope(file), int(number(keys.CONTEXT))
        rotations, of_layers = _rotations(file, architecture, dimensions, SHORT_FACTORS if long_rope else ROPE_FREQS)
        experts = dimensions.experts
        default_embedding_scale = math.sqrt(dimensions.hidden) if architecture.scales_embeddings else 1.0
        return cls(
            architecture=architecture,
            dimensions=dimensions,
            context_length=context_length,
            layer_options=LayerOptions(
                epsilon=np.float32(number(keys.EPSILON)),
                residual_scale=np.float32(number(keys.RESIDUAL_SCALE)),
                activation=_activation(architecture),
                interleaved=architecture.permutes_rotary_rows,
                rotated_pairs=_rotated_dim(dimensions) // 2,
                gates_heads=architecture.has_states,
                attention_scale=np.float32(number(keys.ATTENTION_SCALE, dimensions.head_dim**-0.5)),
                softcap=np.float32(softcap(keys.ATTENTION_SOFTCAP)),
                normalizes_together=architecture.normalizes_together,
                kinds=_kinds(dimensions),
                windows=_windows(file, architecture, dimensions.layers),
                rotations=of_layers,
                sinks=_sinks(file, architecture, dimensions),
            ),
            rotations=rotations,
            long_rotations=_rotations(file, architecture, dimensions, LONG_FACTORS)[0] if long_rope else rotations,
            original_context=_original_context(file, architecture, context_length) if long_rope else context_length,
            embedding_scale=number(keys.EMBEDDING_SCALE, default_embedding_scale),
            logit_scale=1.0 / number(keys.LOGIT_SCALE),
            logit_softcap=softcap(keys.LOGIT_SOFTCAP),
            routing=_routing(experts),
            feed_forward=_dense_width(dimensions),
            expert_feed_forward=0 if experts is None else experts.width,
        )


def _check_shapes(file: GgufFile, dimensions: Dimensions) -> None:
    """Check that every tensor of the model is there in the right shape, and no other, whose shape would be unknown."""
    shapes = dimensions.shapes()
    for name, shape in shapes.items():
        if name not in file.tensors:
            if name == "output.weight":
                continue
            raise DamagedFileError(f"{file.path}: tensor {name} is missing; convert the model again")
        if file.tensors[name].shape != shape:
            found = file.tensors[name].shape
            raise DamagedFileError(
                f"{file.path}: tensor {name} has the shape {found}, not {shape}; convert the model again"
            )
    for name in file.tensors:
        if name not in shapes and name not in FACTOR_TENSORS:
            raise DamagedFileError(
                f"{file.path}: tensor {name} does not belong to a model with these keys; convert the model again"
            )


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise DamagedFileError(
            f"{file.path}: {key} is {value!r:.40}, which is no positive number; convert the model again"
        )
    return value


def _routing(experts: Experts | None) -> Routing:
    """Return how the router's scores become weights; no expert is chosen in a model without them."""
    if experts is None:
        return Routing(chosen=0, gating=SOFTMAX, normalizes=False, scale=np.float32(1.0))
    gating = SPARSE_MIXER if experts.gating is None else experts.gating
    return Routing(experts.used, gating, experts.normalizes, np.float32(experts.scale))


def _dense_width(dimensions: Dimensions) -> int:
    experts = dimensions.experts
    return dimensions.feed_forward if experts is None or experts.dense_layers else experts.shared_width


def _kinds(dimensions: Dimensions) -> np.ndarray:
    """Return what mixes the tokens of each layer: int64 [layers]."""
    layers = range(dimensions.layers)
    convolves, has_state = ([of(layer) for layer in layers] for of in (dimensions.convolves, dimensions.has_state))
    return np.where(convolves, SHORT_CONVOLUTION, np.where(has_state, DELTA_NET, ATTENTION)).astype(np.int64)


def _rotated_dim(dimensions: Dimensions) -> int:
    return dimensions.head_dim if dimensions.rotated_dim is None else dimensions.rotated_dim


def _activation(architecture: Architecture) -> int:
    if architecture.clamped_swiglu:
        return CLAMPED_SILU
    return GELU if architecture.gelu else SILU


def _sinks(file: GgufFile, architecture: Architecture, dimensions: Dimensions) -> np.ndarray:
    """Return the attention sinks: float32 [layers, heads], or [layers, 0] for none."""
    if not architecture.sinks:
        return np.zeros((dimensions.layers, 0), np.float32)
    names = [f"blk.{layer}.attn_sinks.weight" for layer in range(dimensions.layers)]
    return np.stack([read_vector(file, name, dimensions.heads) for name in names])


def _windows(file: GgufFile, architecture: Architecture, layers: int) -> np.ndarray:
    """Return how many positions each layer's tokens see, 0 for all: int64 [layers]."""
    key = f"{architecture.gguf_name}.{keys.WINDOW_KEY}"
    if key not in file.metadata:
        return np.zeros(layers, np.int64)
    window = count_of(file.metadata, key, str(file.path))
    return np.array([window if architecture.uses_sliding_window(layer) else 0 for layer in range(layers)], np.int64)


def _has_long_rope(file: GgufFile) -> bool:
    found = [name for name in LONG_ROPE_TENSORS if name in file.tensors]
    if len(found) == 1:
        names = " and ".join(LONG_ROPE_TENSORS)
        raise DamagedFileError(f"{file.path}: has only one of the tensors {names}; convert the model again")
    return bool(found)


def _original_context(file: GgufFile, architecture: Architecture, context_length: int) -> int:
    """Return the length that a model with LongRoPE had before it was made longer."""
    return count_of(file.metadata, f"{architecture.gguf_name}.{ORIGINAL_KEY}", str(file.path), default=context_length)


def _rotations(
    file: GgufFile, architecture: Architecture, dimensions: Dimensions, factor_tensor: str
) -> tuple[tuple[Rotation, ...], np.ndarray]:
    """Return a model's rotations, and which each layer has: int64 [layers].

    The tensor divides the frequencies of the first one, if it is there.
    """
    head_dim, layers = dimensions.head_dim, range(dimensions.layers)
    truncates = architecture.truncates_yarn
    rotation = rotation_from_metadata(file.metadata, _rotated_dim(dimensions), str(file.path), truncates=truncates)
    still = np.zeros(head_dim // 2 - len(rotation.frequencies))  # of the tables' columns that no head has a pair for
    rotation = Rotation(np.concatenate([rotation.frequencies, still]), rotation.attention_factor)
    if factor_tensor in file.tensors:
        factors = read_vector(file, factor_tensor, head_dim // 2).astype(np.float64)
        if not (factors > 0).all():
            raise DamagedFileError(f"{file.path}: tensor {factor_tensor} has a factor that is not positive")
        rotation = Rotation(rotation.frequencies / factors, rotation.attention_factor)
    if architecture.no_rope_layer_interval:
        return (rotation, Rotation(np.zeros(head_dim // 2))), np.array(
            [int(not architecture.uses_rope(layer)) for layer in layers], np.int64
        )
    if architecture.sliding_rope:
        base = _number(file, f"{architecture.gguf_name}.{SLIDING_BASE_KEY}", DEFAULT_BASE)
        sliding = rotation_from_base(base, head_dim)
        return (rotation, sliding), np.array(
            [int(architecture.uses_sliding_window(layer)) for layer in layers], np.int64
        )
    return (rotation,), np.zeros(dimensions.layers, np.int64)


def read_vector(file: GgufFile, name: str, length: int) -> np.ndarray:
    """Return a vector of weights: float32 [length], a view of the map."""
    info = file.tensors[name]
    if info.type_id != F32 or info.shape != (length,):
        raise DamagedFileError(f"{file.path}: tensor {name} is {info.type_name} {info.shape}, not F32 ({length},)")
    return file.raw(name).view(np.float32)
