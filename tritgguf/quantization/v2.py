"""The encoder `v2` of the published codec: four candidate scales for every group.

The codebook is log-spaced up to the largest magnitude. The published codec does not say how its lowest entry is chosen;
we use `LOWEST_QUANTILE`, and `docs/quality.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpu_kernels.encoding.quantize import as_stored, best_candidates, round_to_codebook
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool, default_thread_pool
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.codebooks import log_spaced_codebook
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows

LOWEST_QUANTILE = 0.005
"""Quantile of the groups' ideal scales that becomes the lowest entry of the codebook."""


def quantize(weights: np.ndarray, depth: int, thread_pool: ThreadPool | None = None) -> QuantizedMatrix:
    """Quantize a matrix [rows, columns], columns a multiple of 64, at `depth` trits per weight.

    `weights` are float32, float16, or uint16 for the bits of bfloat16. Raises ValueError for NaN or infinite weights.
    """
    (quantized,) = quantize_v2(MatrixRows.of(weights), depth, thread_pool or default_thread_pool()).parts
    return quantized


def quantize_v2(matrix: MatrixRows, depth: int, thread_pool: ThreadPool) -> QuantizedRows:
    """Quantize a matrix in blocks of rows, with the same result as `quantize`; raises before the first part.

    The matrix is read twice; its ideal scales stay in memory in between.
    """
    offset = np.float32(level_offset(depth))
    ideal: list[np.ndarray] = []
    largest = np.float32(0)
    for block in matrix.blocks():
        stored, dtype_id = as_stored(block)
        scales = np.empty((len(stored), stored.shape[1] // GROUP_SIZE), np.float32)
        largest = np.max([largest, *thread_pool.run(best_candidates, stored, dtype_id, offset, scales)])
        if np.isnan(largest):
            raise ValueError("has a weight that is NaN or infinite")
        ideal.append(scales)
    codebook = log_spaced_codebook(ideal, float(largest), LOWEST_QUANTILE)
    # The nearest entry on the logarithmic scale changes at the geometric mean of its neighbours.
    thresholds = np.sqrt(codebook[1:].astype(np.float64) * codebook[:-1]).astype(np.float32)
    steps = codebook / offset

    def parts() -> Iterator[QuantizedMatrix]:
        for block, scales in zip(matrix.blocks(), ideal, strict=True):
            stored, dtype_id = as_stored(block)
            levels = np.empty(stored.shape, np.uint8)
            indices = np.empty(scales.shape, np.uint8)
            sums = thread_pool.run(
                round_to_codebook, stored, dtype_id, scales, thresholds, steps, offset, levels, indices
            )
            error, power = np.sum(sums, axis=0)
            yield QuantizedMatrix(depth, levels, indices, codebook, float(error), float(power))

    return QuantizedRows(codebook, parts())
