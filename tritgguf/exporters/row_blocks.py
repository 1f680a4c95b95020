"""Decode a file's tensors and convert them to a stock type, in blocks of rows to limit memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32, TensorInfo
from tritgguf.formats.stacks import split_matrix_name

_WEIGHTS_AT_ONCE = 1 << 22

# The smallest magnitude that overflows to infinity in a type: halfway between its largest number and the next one. The
# largest weight of a block is its float16 scale times 127 (Q8_0) or 8 (Q4_0).
_F16_OVERFLOW = 65520.0
_OVERFLOW = {
    GGMLQuantizationType.F16: _F16_OVERFLOW,
    GGMLQuantizationType.BF16: float(np.uint32(0x7F7F8000).view(np.float32)),
    GGMLQuantizationType.Q8_0: 127 * _F16_OVERFLOW,
    GGMLQuantizationType.Q4_0: 8 * _F16_OVERFLOW,
}


@dataclass(frozen=True)
class RowBlocks:
    """Decodes a tensor, or a matrix of a stack (see `stacks`), in blocks of rows."""

    file: GgufFile
    name: str
    thread_pool: ThreadPool

    @property
    def count(self) -> int:
        """Number of rows; a vector has rows of one weight."""
        tensor, index = split_matrix_name(self.name)
        shape = self.file.tensors[tensor].shape
        return shape[0] if index is None else shape[-2]

    def decoded(self, multiple: int = 1) -> Iterator[np.ndarray]:
        """Yield the weights, float32 [rows, row length], in blocks of a multiple of `multiple` rows but for the last.

        A vector has rows of one weight.
        """
        tensor, index = split_matrix_name(self.name)
        info = self.file.tensors[tensor]
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        rows = info.n_weights // columns
        first, last = (0, rows) if index is None else (info.shape[-2] * index, info.shape[-2] * (index + 1))
        step = -(-max(1, _WEIGHTS_AT_ONCE // columns) // multiple) * multiple
        raw = self.file.raw(tensor).reshape(rows, -1)
        for start in range(first, last, step):
            yield self._decode(info, raw[start : min(start + step, last)], start)
        self.file.release(tensor, index)

    def stored_as(self, ggml_type: GGMLQuantizationType) -> Iterator[np.ndarray]:
        """Yield blocks in a stock type, uint8 or float16, contiguous. Raises TritGgufError as `to_type` does."""
        for block in self.decoded():
            yield self.to_type(block, ggml_type)

    def to_type(self, block: np.ndarray, ggml_type: GGMLQuantizationType) -> np.ndarray:
        """Convert float32 [rows, row length] to F16, BF16, Q8_0 or Q4_0, rounded to nearest.

        Raises TritGgufError for a weight that is NaN or too large: weights are never clipped silently.
        """
        largest = np.abs(block).max(initial=0.0)
        if not largest < _OVERFLOW[ggml_type]:
            raise TritGgufError(
                f"{self.file.path}: tensor {self.name} has a weight of {largest:.3g}, which {ggml_type.name} cannot"
                " hold; export --to bf16, which can, unless the file is damaged"
            )
        return quantize(block, ggml_type)

    def _decode(self, info: TensorInfo, raw: np.ndarray, first: int) -> np.ndarray:
        if not trit_types.is_trit_type(info.type_id) and info.type_id not in (F32, F16):
            raise TritGgufError(
                f"{self.file.path}: tensor {self.name} is {info.type_name}, which no trit file has;"
                " convert the model again"
            )
        return self.file.decode_rows(info.name, raw, self.thread_pool, first=first)


def stored_bytes(shape: tuple[int, ...], ggml_type: GGMLQuantizationType) -> int:
    """Return the size of a tensor in a stock type, in bytes."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    return int(np.prod(shape, dtype=np.int64)) // block * size
