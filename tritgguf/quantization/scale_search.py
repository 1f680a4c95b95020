"""The search encoder: it tries all 27 scales of the codebook for every group and keeps the one with the least error.

The squared error of a weight is multiplied by the importance of its column, the mean square of the column's input.
Without an importance matrix, it is multiplied by the weight's magnitude. `docs/quality.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpu_kernels.encoding.search import best_scales, round_to_best
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.quantization.codebooks import log_spaced_codebook
from tritgguf.quantization.quantized_matrix import QuantizedMatrix, QuantizedRows

LOWEST_QUANTILE = 0.0005
"""Quantile of the groups' ideal scales that becomes the lowest entry of the codebook."""
_FRACTIONS_BY_DEPTH = {
    1: np.linspace(0.4, 1.1, 15, dtype=np.float32),
    2: np.linspace(0.4, 1.1, 15, dtype=np.float32),
    3: np.linspace(0.6, 1.05, 10, dtype=np.float32),
    4: np.linspace(0.6, 1.05, 10, dtype=np.float32),
}
_LEAST_IMPORTANCE = 1e-6  # relative to the mean; a column whose input was always zero is still quantized


def quantize_searched(
    matrix: MatrixRows, depth: int, thread_pool: ThreadPool, *, importance: np.ndarray | None = None
) -> QuantizedRows:
    """Quantize every group with the best scale of the codebook.

    Args:
        matrix: the number of columns is a multiple of 64; the matrix is read twice.
        depth: 1 to 4.
        thread_pool: the threads to use.
        importance: float32 [columns], nonnegative: factors of squared errors. None: the factors are the weights'
            magnitudes.

    Raises:
        ValueError: a weight is NaN or infinite.

    """
    factors, emphasis = _factors(importance, matrix.shape[1]), importance is None
    ideal = [_ideal_scales(to_float32(block), factors, emphasis, depth, thread_pool) for block in matrix.blocks()]
    codebook = log_spaced_codebook(ideal, float(max(scales.max() for scales in ideal)), LOWEST_QUANTILE)
    offset = np.float32(level_offset(depth))
    steps = codebook / offset

    def parts() -> Iterator[QuantizedMatrix]:
        for block in matrix.blocks():
            weights = to_float32(block)
            levels = np.empty(weights.shape, np.uint8)
            indices = np.empty((len(weights), weights.shape[1] // GROUP_SIZE), np.uint8)
            sums = thread_pool.run(round_to_best, weights, factors, emphasis, steps, offset, levels, indices)
            error, power = np.sum(sums, axis=0)
            yield QuantizedMatrix(depth, levels, indices, codebook, float(error), float(power))

    return QuantizedRows(codebook, parts())


def quantized_and_decoded(
    weights: np.ndarray, depth: int, thread_pool: ThreadPool, *, importance: np.ndarray | None = None
) -> np.ndarray:
    """Quantize weights, float32 [rows, columns], as `quantize_searched` does, and return what they decode to."""
    quantized = quantize_searched(MatrixRows.of(weights), depth, thread_pool, importance=importance)
    return np.concatenate([part.decoded() for part in quantized.parts])


def searched_codebook(weights: np.ndarray, importance: np.ndarray, depth: int, thread_pool: ThreadPool) -> np.ndarray:
    """Return the 27 scales, float32, that `quantize_searched` would choose for float32 weights [rows, columns]."""
    scales = _ideal_scales(weights, _factors(importance, weights.shape[1]), False, depth, thread_pool)
    return log_spaced_codebook([scales], float(scales.max()), LOWEST_QUANTILE)


def _factors(importance: np.ndarray | None, columns: int) -> np.ndarray:
    """Return the kernels' error factors: importance scaled to a mean of 1 and bounded below, float32 [columns]."""
    if importance is None or not (mean := float(np.mean(importance, dtype=np.float64))) > 0:
        return np.ones(columns, np.float32)
    return np.maximum(importance / np.float32(mean), np.float32(_LEAST_IMPORTANCE)).astype(np.float32, copy=False)


def _ideal_scales(
    weights: np.ndarray, factors: np.ndarray, emphasis: bool, depth: int, thread_pool: ThreadPool
) -> np.ndarray:
    """Return each group's best scale, not limited to a codebook: float32 [rows, columns / 16]."""
    if not np.isfinite(weights).all():
        raise ValueError("has a weight that is NaN or infinite")
    scales = np.zeros((len(weights), weights.shape[1] // GROUP_SIZE), np.float32)
    fractions = _FRACTIONS_BY_DEPTH[depth]
    thread_pool.run(best_scales, weights, factors, emphasis, fractions, np.float32(level_offset(depth)), scales)
    return scales
