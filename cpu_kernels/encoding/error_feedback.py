"""GPTQ: quantize a matrix column by column and compensate each column's error in the later columns.

Source: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". Let
H be the Hessian (second moments of the inputs) and U the upper Cholesky factor of its inverse, H^-1 = U^T U. The error
of column j, divided by U[j, j], is subtracted from every later column l with the factor U[j, l]. The output error is
then the sum of the squares of these scaled errors. Here the search includes the scale: each codebook entry quantizes
the group's 16 columns with feedback among them, and the entry of least cost is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE

LANES = 64
"""Rows quantized at once: before each loop over them, the compiled code checks whether arrays overlap."""


class QuantizedGroup(NamedTuple):
    """What `quantize_group` finds for one group of 64 rows, and the memory that it needs.

    Attributes:
        entries: uint8 [64 rows], indices into the steps.
        steps: float32 [64 rows], the steps at these indices; 0 where every step has an infinite error.
        levels: float32 [16 columns, 64 rows], from -h to h.
        errors: float32 [16 columns, 64 rows], each divided by U's diagonal.
        scratch: float32 [19, 64 rows].

    """

    entries: np.ndarray
    steps: np.ndarray
    levels: np.ndarray
    errors: np.ndarray
    scratch: np.ndarray


@numba.njit(cache=True)
def new_quantized_group():
    """Return an uninitialized `QuantizedGroup`."""
    return QuantizedGroup(
        np.empty(LANES, np.uint8),
        np.empty(LANES, np.float32),
        np.empty((GROUP_SIZE, LANES), np.float32),
        np.empty((GROUP_SIZE, LANES), np.float32),
        np.empty((GROUP_SIZE + 3, LANES), np.float32),
    )


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def add_products(rows, coefficients, first_row, first, sums):
    """Add the products of 64 vectors with a part of a matrix.

    Args:
        rows: float32 [16, 64 vectors].
        coefficients: float32 [at least first_row + 16, at least first + len(sums)].
        first_row, first: the first row and column of the part.
        sums: float32 [columns, 64 vectors], changed.

    """
    for column in range(len(sums)):
        for k in range(GROUP_SIZE):
            coefficient = coefficients[first_row + k, first + column]
            for lane in range(LANES):
                sums[column, lane] += rows[k, lane] * coefficient


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _try_step(columns, factor, first, step, offset, errors, costs):
    """Compute what quantizing one group of 64 rows with one step costs.

    Args:
        columns: float32 [16 columns, 64 rows], the group's weights; modified.
        factor: float32 [columns, columns], U.
        first: the group's first column in `factor`.
        step: float32, the distance between levels.
        offset: float32, h of the depth.
        errors: float32 [64 rows], scratch memory.
        costs: float32 [64 rows], out: sums of the squares of the errors, each divided by U's diagonal.

    """
    per_step = np.float32(1.0) / step
    costs[:] = 0
    for j in range(GROUP_SIZE):
        per_diagonal = np.float32(1.0) / factor[first + j, first + j]
        for row in range(LANES):
            level = min(max(np.rint(columns[j, row] * per_step), -offset), offset)
            errors[row] = (columns[j, row] - level * step) * per_diagonal
            costs[row] += errors[row] * errors[row]
        for later in range(j + 1, GROUP_SIZE):
            coefficient = factor[first + j, first + later]
            for row in range(LANES):
                columns[later, row] -= errors[row] * coefficient


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _quantize_with_steps(columns, factor, first, offset, group):
    """Quantize one group of 64 rows with `group.steps`, of which 0 gives level 0; `columns` is modified."""
    for j in range(GROUP_SIZE):
        per_diagonal = np.float32(1.0) / factor[first + j, first + j]
        for row in range(LANES):
            step = group.steps[row]
            per_step = np.float32(1.0) / step if step > 0 else np.float32(0)
            level = min(max(np.rint(columns[j, row] * per_step), -offset), offset)
            group.levels[j, row], group.errors[j, row] = level, (columns[j, row] - level * step) * per_diagonal
        for later in range(j + 1, GROUP_SIZE):
            coefficient = factor[first + j, first + later]
            for row in range(LANES):
                columns[later, row] -= group.errors[j, row] * coefficient


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def quantize_group(columns, factor, first, steps, offset, group):
    """Quantize one group of 64 rows, each with the step of least cost.

    Args:
        columns: float32 [16 columns, 64 rows], the group's weights.
        factor, first, offset: as in `_try_step`.
        steps: float32 [27], see `quantize_columns`.
        group: a `QuantizedGroup`, out.

    """
    trial, tried_errors = group.scratch[:GROUP_SIZE], group.scratch[GROUP_SIZE]
    costs, least = group.scratch[GROUP_SIZE + 1], group.scratch[GROUP_SIZE + 2]
    least[:], group.entries[:], group.steps[:] = np.inf, 0, 0
    for entry in range(len(steps)):
        step = steps[entry]
        if step <= 0:
            continue
        trial[:] = columns
        _try_step(trial, factor, first, step, offset, tried_errors, costs)
        for row in range(LANES):
            better = costs[row] < least[row]
            least[row] = costs[row] if better else least[row]
            group.entries[row] = entry if better else group.entries[row]
            group.steps[row] = step if better else group.steps[row]
    trial[:] = columns
    _quantize_with_steps(trial, factor, first, offset, group)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def quantize_columns(weights, factor, steps, offset, levels, indices, errors, thread, threads):
    """Quantize neighbouring columns of a matrix, group by group.

    Args:
        weights: float32 [rows, columns], compensated for the errors of earlier columns; columns is a multiple of 16.
        factor: float32 [columns, columns], these columns' part of U, upper triangular with a positive diagonal.
        steps: float32 [27], codebook / h, as the decoder computes it; entries that are not positive are not used.
        offset: float32, h of the depth.
        levels: uint8 [rows, columns], out: level + h.
        indices: uint8 [rows, columns / 16], out: scale indices.
        errors: float32 [rows, columns], out: each column's error divided by U's diagonal, for the later columns.
        thread, threads: which of how many shares of the rows to compute.

    """
    rows, columns = weights.shape
    compensated, found = np.empty((columns, LANES), np.float32), new_quantized_group()
    tiles = (rows + LANES - 1) // LANES
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first_row = tile * LANES
        count = min(LANES, rows - first_row)
        compensated[:] = 0
        for row in range(count):
            compensated[:, row] = weights[first_row + row]
        for group in range(columns // GROUP_SIZE):
            first, last = group * GROUP_SIZE, (group + 1) * GROUP_SIZE
            quantize_group(compensated[first:last], factor, first, steps, offset, found)
            for row in range(count):
                indices[first_row + row, group] = found.entries[row]
                for j in range(GROUP_SIZE):
                    levels[first_row + row, first + j] = np.uint8(found.levels[j, row] + offset)
                    errors[first_row + row, first + j] = found.errors[j, row]
            for j in range(GROUP_SIZE):
                for row in range(LANES):
                    found.errors[j, row] = -found.errors[j, row]
            add_products(found.errors, factor, first, last, compensated[last:])
