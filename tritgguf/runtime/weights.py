"""A model's weights as views of its mapped file."""

from __future__ import annotations

import numpy as np

from cpu_kernels.packed_rows.unpack import dequantize
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.delta_net import DeltaNet
from cpu_kernels.transformer.layer_options import DELTA_NET, SHORT_CONVOLUTION
from cpu_kernels.transformer.projection import Matrix, Projection
from tritgguf.architectures import delta_net as names
from tritgguf.architectures.short_convolutions import CONVOLUTION_INPUT, CONVOLUTION_KERNEL, CONVOLUTION_OUTPUT
from tritgguf.errors import DamagedFileError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16
from tritgguf.formats.trit_types import TritType, is_trit_type
from tritgguf.machine import fits_in_memory
from tritgguf.runtime.config import ModelConfig, read_vector
from tritgguf.runtime.expert_weights import ExpertWeights, gather_experts, read_float32


class LayerWeights:
    """One layer: norms and biases float32, matrices grouped by their input. Norms that it has not are [0].

    In a mixture of experts, gate, up and down are those of the shared expert; without one they have no weights.
    """

    def __init__(self, file: GgufFile, config: ModelConfig, index: int) -> None:
        """Map layer `index`; TritGgufError for a tensor of a type that is not run."""
        sizes, feed_forward = config.dimensions, config.feed_forward
        shapes = sizes.shapes()
        rows, rows_kv = sizes.query_rows, sizes.kv_heads * sizes.head_dim

        def matrix(name: str) -> Matrix:
            return _read_matrix(file, f"blk.{index}.{name}.weight")

        def bias(name: str, length: int) -> np.ndarray:
            if name not in sizes.biased:
                return np.zeros(length, np.float32)
            return read_vector(file, f"blk.{index}.{name}.bias", length)

        def norm(name: str) -> np.ndarray:
            if f"blk.{index}.{name}.weight" not in shapes:
                return np.zeros(0, np.float32)
            return _read_norm(file, f"blk.{index}.{name}", config)

        kind = config.layer_options.kinds[index]
        if kind == SHORT_CONVOLUTION:
            self.qkv = Projection(_split(matrix(CONVOLUTION_INPUT), *[sizes.hidden] * 3))
        elif kind == DELTA_NET and sizes.delta_net is not None:
            of_keys, of_values = _split(matrix(names.DELTA_INPUT), 2 * sizes.delta_net.keys, sizes.delta_net.values)
            self.qkv = Projection([of_keys, of_values, matrix(names.DELTA_GATE)])
        elif config.architecture.fused:
            self.qkv = Projection(_split(matrix("attn_qkv"), rows, rows_kv, rows_kv))
        else:
            self.qkv = Projection([matrix("attn_q"), matrix("attn_k"), matrix("attn_v")])
        outputs = {SHORT_CONVOLUTION: CONVOLUTION_OUTPUT, DELTA_NET: names.DELTA_OUTPUT}
        self.output = Projection([matrix(outputs.get(int(kind), "attn_output"))])
        self.convolution = _read_convolution(file, config, index)
        is_mixture = sizes.is_mixture(index)
        self.experts = ExpertWeights(file, index) if is_mixture else None
        if is_mixture and not config.has_shared_expert:
            nothing = np.zeros(0, np.uint8)
            self.gate_up = Projection([Matrix(nothing, 0, sizes.hidden, depth=0)] * 2)
            self.down = Projection([Matrix(nothing, sizes.hidden, 0, depth=0)])
        elif config.architecture.fused:
            self.gate_up = Projection(_split(matrix("ffn_up"), feed_forward, feed_forward))
            self.down = Projection([matrix("ffn_down")])
        else:
            shared = "_shexp" if self.experts else ""
            self.gate_up = Projection([matrix(f"ffn_gate{shared}"), matrix(f"ffn_up{shared}")])
            self.down = Projection([matrix(f"ffn_down{shared}")])
        self.qkv_bias = np.concatenate([bias("attn_q", rows), bias("attn_k", rows_kv), bias("attn_v", rows_kv)])
        self.output_bias = bias("attn_output", sizes.hidden)
        self.gate_bias, self.up_bias = bias("ffn_gate", feed_forward), bias("ffn_up", feed_forward)
        self.down_bias = bias("ffn_down", sizes.hidden)
        self.attention_norm = norm("attn_norm")
        self.feed_forward_norm = norm(config.architecture.feed_forward_norm)
        has_output_norm = config.architecture.feed_forward_norm != "post_attention_norm"
        self.attention_output_norm = norm("post_attention_norm") if has_output_norm else np.zeros(0, np.float32)
        self.feed_forward_output_norm = norm("post_ffw_norm")
        self.query_key_norm = _query_key_norm(norm("attn_q_norm"), norm("attn_k_norm"), config)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All matrices, in the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down


def _query_key_norm(of_queries: np.ndarray, of_keys: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the norms of all query and key heads; zeros if only other layers have them."""
    sizes = config.dimensions
    if not len(of_queries) and "attn_q_norm" in config.architecture.layer_norms():
        return np.zeros(sizes.query_rows + sizes.kv_heads * sizes.head_dim, np.float32)
    if config.layer_options.gates_heads:
        of_queries = np.concatenate([of_queries, np.zeros_like(of_queries)])  # nothing normalizes the gates
    if not config.layer_options.normalizes_together:
        of_queries, of_keys = np.tile(of_queries, sizes.heads), np.tile(of_keys, sizes.kv_heads)
    return np.concatenate([of_queries, of_keys])


def _read_convolution(file: GgufFile, config: ModelConfig, index: int) -> np.ndarray:
    """Return the kernel of a layer's convolution, float32 [taps, hidden], last position first; zeros without one."""
    sizes = config.dimensions
    if sizes.convolutions is None:
        return np.zeros((0, 0), np.float32)
    if index not in sizes.convolutions.layers:
        return np.zeros((sizes.convolutions.taps, sizes.hidden), np.float32)
    kernel = read_float32(file, f"blk.{index}.{CONVOLUTION_KERNEL}.weight")
    return np.ascontiguousarray(kernel.T[::-1])


def _read_delta_net(file: GgufFile, config: ModelConfig) -> DeltaNet:
    """Return what the layers with a state have besides their packed matrices."""
    sizes = config.dimensions.delta_net
    if sizes is None:
        none, no_rows = np.zeros((0, 0), np.float32), np.zeros((0, 0, 0), np.float32)
        return DeltaNet(key_heads=1, kernels=no_rows, gates=no_rows, decays=none, biases=none, norms=none)
    layers = [f"blk.{layer}" for layer in sorted(sizes.layers)]

    def read(name: str) -> list[np.ndarray]:
        return [read_float32(file, f"{layer}.{name}") for layer in layers]

    kernels = [kernel.T[::-1] for kernel in read(f"{names.DELTA_KERNEL}.weight")]
    betas, alphas = read(f"{names.DELTA_BETA}.weight"), read(f"{names.DELTA_ALPHA}.weight")
    return DeltaNet(
        key_heads=sizes.key_heads,
        kernels=np.ascontiguousarray(np.stack(kernels)),
        gates=np.stack([np.concatenate(both) for both in zip(betas, alphas, strict=True)]),
        decays=np.stack(read(names.DELTA_DECAY)),
        biases=np.stack(read(names.DELTA_BIAS)),
        norms=np.stack(read(f"{names.DELTA_NORM}.weight")),
    )


def _split(matrix: Matrix, *rows: int) -> list[Matrix]:
    """Return parts of a matrix with so many rows each, as views."""
    data = matrix.data.reshape(matrix.rows, -1)
    ends = np.cumsum(rows)
    return [
        Matrix(data[end - count : end].reshape(-1), count, matrix.columns, matrix.depth, matrix.codebook)
        for end, count in zip(ends.tolist(), rows, strict=True)
    ]


class Embeddings:
    """The embedding matrix, of which only the rows that are asked for are decoded."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._rows = matrix.data.reshape(matrix.rows, -1)
        self._thread_pool = ThreadPool(1)  # a few rows are not worth a launch

    def __getitem__(self, tokens: int | np.ndarray) -> np.ndarray:
        """Return the rows of tokens [n], or of one token: float16 or float32 [n, columns]."""
        if self.matrix.codebook is None:
            return self._rows.view(np.float16)[tokens]
        packed = self._rows[np.atleast_1d(tokens)]
        return dequantize(packed, self.matrix.codebook, self.matrix.depth, self._thread_pool)


class ModelWeights:
    """All of a model's weights."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """Map them; TritGgufError for a tensor of a type that is not run."""
        sizes = config.dimensions
        self.embeddings = Embeddings(_read_matrix(file, "token_embd.weight"))
        self.layers = [LayerWeights(file, config, index) for index in range(sizes.layers)]
        experts = [layer.experts for layer in self.layers]
        reads_ahead = not fits_in_memory(file.path.stat().st_size)
        self.delta_net = _read_delta_net(file, config)
        self.experts = gather_experts(config.routing, experts, sizes.hidden, reads_ahead=reads_ahead)
        self.final_norm = _read_norm(file, config.architecture.final_norm[0], config)
        head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        self.head = Projection([_read_matrix(file, head)])
        has_bias = "output.bias" in sizes.shapes()
        self.head_bias = read_vector(file, "output.bias", sizes.vocabulary) if has_bias else np.zeros(0, np.float32)


def _read_norm(file: GgufFile, name: str, config: ModelConfig) -> np.ndarray:
    """Return a norm's weights, float32 [columns], with the biases of a LayerNorm behind them; read-only."""
    (length,) = file.tensors[f"{name}.weight"].shape
    weights = read_vector(file, f"{name}.weight", length)
    if config.architecture.has_layer_norms:
        weights = np.concatenate([weights, read_vector(file, f"{name}.bias", length)])
        weights.flags.writeable = False
    return weights


def _read_matrix(file: GgufFile, name: str) -> Matrix:
    info = file.tensors[name]
    rows, columns = info.shape
    if is_trit_type(info.type_id):
        return Matrix(file.raw(name), rows, columns, TritType(info.type_id).depth, file.codebook(name))
    if info.type_id == F16:
        return Matrix(file.raw(name), rows, columns, depth=0)
    raise DamagedFileError(
        f"{file.path}: tensor {name} is {info.type_name}, but only trit files are run; make one with `tritgguf convert`"
    )
