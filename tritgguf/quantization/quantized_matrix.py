"""The output of encoders: levels, scale indices and a codebook, whole or in parts.

Groups of 16 weights in a row share a scale, which is an entry of the matrix's codebook of 27 scales. A weight is stored
as a level from -h to h, h = (3**depth - 1) / 2, and decodes to scale / h * level (`docs/format.md` section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpu_kernels.packed_rows import pack
from cpu_kernels.packed_rows.layout import level_offset
from cpu_kernels.threads.thread_pool import ThreadPool


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix or block of rows before packing.

    Attributes:
        depth: trits per weight, 1 to 4.
        levels: uint8 [rows, columns], level + h.
        scale_indices: uint8 [rows, columns / 16].
        codebook: float32 [27], ascending scales.
        squared_error: sum of (weight - decoded weight)**2.
        squared_weights: sum of weight**2.

    """

    depth: int
    levels: np.ndarray
    scale_indices: np.ndarray
    codebook: np.ndarray
    squared_error: float
    squared_weights: float

    def pack(self, thread_pool: ThreadPool | None = None) -> np.ndarray:
        """Return the packed rows: uint8 [rows, bytes of a row]."""
        return pack.pack(self.levels, self.scale_indices, self.depth, thread_pool)

    def decoded(self) -> np.ndarray:
        """Return the weights that the packed rows decode to, bit for bit: float32 [rows, columns]."""
        offset = level_offset(self.depth)
        steps = (self.codebook / np.float32(offset))[self.scale_indices]
        levels = self.levels.astype(np.float32).reshape(*steps.shape, -1)
        levels -= np.float32(offset)
        levels *= steps[..., np.newaxis]
        return levels.reshape(self.levels.shape)


@dataclass(frozen=True)
class QuantizedRows:
    """A quantized matrix as an iterator of row blocks, which are encoded on demand.

    Attributes:
        codebook: float32 [27], shared by all parts.
        parts: blocks of rows in order; each part has its own error sums.

    """

    codebook: np.ndarray
    parts: Iterator[QuantizedMatrix]
