"""GPTQ: quantize a matrix column by column and compensate each column's error in the later columns.

Source: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". Let
H be the Hessian (second moments of the inputs) and U the upper Cholesky factor of its inverse, H^-1 = U^T U. The error
of column j, divided by U[j, j], is subtracted from every later column l with the factor U[j, l]. The output error is
then the sum of the squares of these scaled errors. Here the search includes the scale: each codebook entry quantizes
the group's 16 columns with feedback among them, and the entry of least cost is chosen.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE

LANES = 64
"""Rows quantized at once: before each loop over them, the compiled code checks whether arrays overlap."""


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
def _quantize_with_steps(columns, factor, first, steps, offset, levels, errors):
    """Quantize one group of 64 rows with a step for each row; the arguments are those of `quantize_group`.

    `columns` is modified. A step of 0 gives level 0.
    """
    for j in range(GROUP_SIZE):
        per_diagonal = np.float32(1.0) / factor[first + j, first + j]
        for row in range(LANES):
            step = steps[row]
            per_step = np.float32(1.0) / step if step > 0 else np.float32(0)
            level = min(max(np.rint(columns[j, row] * per_step), -offset), offset)
            levels[j, row], errors[j, row] = level, (columns[j, row] - level * step) * per_diagonal
        for later in range(j + 1, GROUP_SIZE):
            coefficient = factor[first + j, first + later]
            for row in range(LANES):
                columns[later, row] -= errors[j, row] * coefficient


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def quantize_group(columns, factor, first, steps, offset, scratch, entries, best_steps, levels, errors):
    """Quantize one group of 64 rows, each with the step of least cost.

    Args:
        columns: float32 [16 columns, 64 rows], the group's weights.
        factor, first, offset: as in `_try_step`.
        steps: float32 [27], see `quantize_columns`.
        scratch: float32 [19, 64 rows].
        entries: uint8 [64 rows], out: indices into `steps`.
        best_steps: float32 [64 rows], out: the steps at these indices.
        levels, errors: float32 [16 columns, 64 rows], out: levels from -h to h, and errors divided by U's diagonal.

    """
    trial, tried_errors = scratch[:GROUP_SIZE], scratch[GROUP_SIZE]
    costs, least = scratch[GROUP_SIZE + 1], scratch[GROUP_SIZE + 2]
    least[:], entries[:], best_steps[:] = np.inf, 0, 0
    for entry in range(len(steps)):
        step = steps[entry]
        if step <= 0:
            continue
        trial[:] = columns
        _try_step(trial, factor, first, step, offset, tried_errors, costs)
        for row in range(LANES):
            better = costs[row] < least[row]
            least[row] = costs[row] if better else least[row]
            entries[row] = entry if better else entries[row]
            best_steps[row] = step if better else best_steps[row]
    trial[:] = columns
    _quantize_with_steps(trial, factor, first, best_steps, offset, levels, errors)


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
    compensated, scratch = np.empty((columns, LANES), np.float32), np.empty((GROUP_SIZE + 3, LANES), np.float32)
    group_levels, group_errors = np.empty((GROUP_SIZE, LANES), np.float32), np.empty((GROUP_SIZE, LANES), np.float32)
    entries, best_steps = np.empty(LANES, np.uint8), np.empty(LANES, np.float32)
    tiles = (rows + LANES - 1) // LANES
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first_row = tile * LANES
        count = min(LANES, rows - first_row)
        compensated[:] = 0
        for row in range(count):
            for column in range(columns):
                compensated[column, row] = weights[first_row + row, column]
        for group in range(columns // GROUP_SIZE):
            first = group * GROUP_SIZE
            here = compensated[first : first + GROUP_SIZE]
            quantize_group(here, factor, first, steps, offset, scratch, entries, best_steps, group_levels, group_errors)
            for row in range(count):
                indices[first_row + row, group] = entries[row]
                for j in range(GROUP_SIZE):
                    levels[first_row + row, first + j] = np.uint8(group_levels[j, row] + offset)
                    errors[first_row + row, first + j] = group_errors[j, row]
            for j in range(GROUP_SIZE):
                for later in range(first + GROUP_SIZE, columns):
                    coefficient = factor[first + j, later]
                    for row in range(LANES):
                        compensated[later, row] -= group_errors[j, row] * coefficient
