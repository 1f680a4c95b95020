"""A model's weights as views of its mapped file."""

from __future__ import annotations

import numpy as np

from cpu_kernels.crew import Crew
from cpu_kernels.projection import Matrix, Projection
from cpu_kernels.unpack import dequantize
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, GgufFile
from tritgguf.model_config import ATTENTION_INPUTS, ModelConfig, read_vector
from tritgguf.trit_types import TritType, is_trit_type


class LayerWeights:
    """One layer: norms and biases float32, matrices grouped by their input."""

    def __init__(self, file: GgufFile, config: ModelConfig, index: int) -> None:
        """Map layer `index`; TritGgufError for a tensor of a type that is not run."""
        sizes = config.dimensions
        shapes = sizes.shapes()

        def projection(*names: str) -> Projection:
            return Projection([_read_matrix(file, f"blk.{index}.{name}.weight") for name in names])

        def bias(name: str) -> np.ndarray:
            length = shapes[f"blk.{index}.{name}.weight"][0]
            if name not in sizes.biased:
                return np.zeros(length, np.float32)
            return read_vector(file, f"blk.{index}.{name}.bias", length)

        self.attention_norm = read_vector(file, f"blk.{index}.attn_norm.weight", sizes.hidden)
        self.qkv = projection(*ATTENTION_INPUTS)
        self.qkv_bias = np.concatenate([bias(name) for name in ATTENTION_INPUTS])
        self.output = projection("attn_output")
        self.output_bias = bias("attn_output")
        self.feed_forward_norm = read_vector(file, f"blk.{index}.ffn_norm.weight", sizes.hidden)
        self.gate_up = projection("ffn_gate", "ffn_up")
        self.down = projection("ffn_down")

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All matrices, in the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down


class Embeddings:
    """The embedding matrix, of which only the rows that are asked for are decoded."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self._rows = matrix.data.reshape(matrix.rows, -1)
        self._crew = Crew(1)  # a few rows are not worth a launch

    def __getitem__(self, tokens: int | np.ndarray) -> np.ndarray:
        """Return the rows of tokens [n], or of one token: float16 or float32 [n, columns]."""
        if self.matrix.codebook is None:
            return self._rows.view(np.float16)[tokens]
        packed = self._rows[np.atleast_1d(tokens)]
        return dequantize(packed, self.matrix.codebook, self.matrix.depth, self._crew)


class ModelWeights:
    """All of a model's weights."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """Map them; TritGgufError for a tensor of a type that is not run."""
        sizes = config.dimensions
        self.embeddings = Embeddings(_read_matrix(file, "token_embd.weight"))
        self.layers = [LayerWeights(file, config, index) for index in range(sizes.layers)]
        self.final_norm = read_vector(file, "output_norm.weight", sizes.hidden)
        head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        self.head = Projection([_read_matrix(file, head)])


def _read_matrix(file: GgufFile, name: str) -> Matrix:
    info = file.tensors[name]
    rows, columns = info.shape
    if is_trit_type(info.type_id):
        return Matrix(file.raw(name), rows, columns, TritType(info.type_id).depth, file.codebook(name))
    if info.type_id == F16:
        return Matrix(file.raw(name), rows, columns, depth=0)
    raise TritGgufError(
        f"{file.path}: tensor {name} is {info.type_name}, but only trit files are run; make one with `tritgguf convert`"
    )
