"""The tensors of a file a few rows at a time: decoded, and turned into a stock type. No tensor is ever whole."""

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
from tritgguf.formats.gguf_header import F16, F32

_WEIGHTS_AT_ONCE = 1 << 22

# The magnitude from which on a weight is infinite in a type: halfway between the largest number and what would be
# the next. The largest weight of a block is its float16 scale times 127 (Q8_0) or 8 (Q4_0).
_LARGEST_F16 = 65520.0
_TOO_LARGE = {
    GGMLQuantizationType.F16: _LARGEST_F16,
    GGMLQuantizationType.BF16: float(np.uint32(0x7F7F8000).view(np.float32)),
    GGMLQuantizationType.Q8_0: 127 * _LARGEST_F16,
    GGMLQuantizationType.Q4_0: 8 * _LARGEST_F16,
}


@dataclass(frozen=True)
class RowBlocks:
    """A tensor's rows in parts, decoded by the threads of a thread_pool."""

    file: GgufFile
    name: str
    thread_pool: ThreadPool

    def decoded(self, multiple: int = 1) -> Iterator[np.ndarray]:
        """Yield the weights: float32 [rows, row length], in blocks of a multiple of `multiple` rows but for the last.

        A vector has rows of one weight.
        """
        info = self.file.tensors[self.name]
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        rows = info.n_weights // columns
        step = -(-max(1, _WEIGHTS_AT_ONCE // columns) // multiple) * multiple
        raw = self.file.raw(self.name).reshape(rows, -1)
        for start in range(0, rows, step):
            yield self._decode(raw[start : start + step])
        self.file.release(self.name)

    def stored_as(self, kind: GGMLQuantizationType) -> Iterator[np.ndarray]:
        """Yield the rows in a stock type: uint8 or float16, contiguous. Raises TritGgufError as `narrow` does."""
        for block in self.decoded():
            yield self.narrow(block, kind)

    def narrow(self, block: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        """Return float32 [rows, row length] in F16, BF16, Q8_0 or Q4_0, rounded to nearest.

        Raises TritGgufError for a weight that is NaN or too large: it is never cut off silently.
        """
        largest = np.abs(block).max(initial=0.0)
        if not largest < _TOO_LARGE[kind]:
            raise TritGgufError(
                f"{self.file.path}: tensor {self.name} has a weight of {largest:.3g}, which {kind.name} cannot hold;"
                " export --to bf16, which can, unless the file is damaged"
            )
        return quantize(block, kind)

    def _decode(self, raw: np.ndarray) -> np.ndarray:
        info = self.file.tensors[self.name]
        if not trit_types.is_trit_type(info.type_id) and info.type_id not in (F32, F16):
            raise TritGgufError(
                f"{self.file.path}: tensor {self.name} is {info.type_name}, which no trit file has;"
                " convert the model again"
            )
        return self.file.decode_rows(self.name, raw, self.thread_pool)


def stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Return the bytes that a tensor takes in a stock type."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size
