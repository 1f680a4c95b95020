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

_LANES = 16  # rows quantized at once


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _try_step(columns, factor, first, step, offset, levels, errors, costs):
    """Quantize one group of 16 rows with one step.

    Args:
        columns: float32 [16 columns, 16 rows], the group's weights; modified.
        factor: float32 [columns, columns], U.
        first: the group's first column in `factor`.
        step: float32, the distance between levels.
        offset: float32, h of the depth.
        levels, errors: float32 [16 columns, 16 rows], out: levels from -h to h, and errors divided by U's diagonal.
        costs: float32 [16 rows], out: sums of the squares of `errors`.

    """
    per_step = np.float32(1.0) / step
    costs[:] = 0
    for j in range(GROUP_SIZE):
        per_diagonal = np.float32(1.0) / factor[first + j, first + j]
        for row in range(_LANES):
            level = min(max(np.rint(columns[j, row] * per_step), -offset), offset)
            error = (columns[j, row] - level * step) * per_diagonal
            levels[j, row], errors[j, row] = level, error
            costs[row] += error * error
        for later in range(j + 1, GROUP_SIZE):
            coefficient = factor[first + j, first + later]
            for row in range(_LANES):
                columns[later, row] -= errors[j, row] * coefficient


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
    compensated = np.empty((columns, _LANES), np.float32)
    trial, best_costs = np.empty((GROUP_SIZE, _LANES), np.float32), np.empty(_LANES, np.float32)
    trial_levels, best_levels = np.empty_like(trial), np.empty_like(trial)
    trial_errors, best_errors = np.empty_like(trial), np.empty_like(trial)
    costs, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.uint8)
    tiles = (rows + _LANES - 1) // _LANES
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first_row = tile * _LANES
        count = min(_LANES, rows - first_row)
        compensated[:] = 0
        for row in range(count):
            for column in range(columns):
                compensated[column, row] = weights[first_row + row, column]
        for group in range(columns // GROUP_SIZE):
            first = group * GROUP_SIZE
            best_costs[:], best[:] = np.inf, 0
            best_levels[:], best_errors[:] = 0, 0
            for entry in range(len(steps)):
                if steps[entry] <= 0:
                    continue
                trial[:] = compensated[first : first + GROUP_SIZE]
                _try_step(trial, factor, first, steps[entry], offset, trial_levels, trial_errors, costs)
                for row in range(_LANES):
                    if costs[row] < best_costs[row]:
                        best_costs[row], best[row] = costs[row], entry
                        best_levels[:, row], best_errors[:, row] = trial_levels[:, row], trial_errors[:, row]
            for row in range(count):
                indices[first_row + row, group] = best[row]
                for j in range(GROUP_SIZE):
                    levels[first_row + row, first + j] = np.uint8(best_levels[j, row] + offset)
                    errors[first_row + row, first + j] = best_errors[j, row]
            for j in range(GROUP_SIZE):
                for later in range(first + GROUP_SIZE, columns):
                    coefficient = factor[first + j, later]
                    for row in range(_LANES):
                        compensated[later, row] -= best_errors[j, row] * coefficient
