"""Coordinate descent: quantize each group again, given the errors of all others as they are.

`tritgguf.calibration.refinement` says why. Every row is a problem of its own. Let H be the second moments of the
inputs and G = (target - decoded) H. If all other groups stay, the best continuous values of a group g are its decoded
values + G_g H_gg^-1, which lower the row's output error by G_g H_gg^-1 G_g^T. Quantized values that miss them by e give
back e H_gg e^T.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.encoding.error_feedback import LANES, quantize_group
from cpu_kernels.packed_rows.layout import GROUP_SIZE


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _add_products(rows, coefficients, first_row, first, sums):
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
def _refine_group(
    gradient, old, inverse, factor, steps, offset, least_gain, scratch, gains, entries, best_steps, found, changes
):
    """Quantize one group of 64 rows again, and keep what is better.

    Args:
        gradient, old: float32 [16 columns, 64 rows], as in `refine_columns`; `old` are the present values.
        inverse, factor: float32 [16, 16], of the group, as in `refine_columns`.
        steps, offset, least_gain: as in `refine_columns`.
        scratch: float32 [51, 64 rows].
        gains: float32 [64 rows], out: above 0 where the result is better.
        entries, best_steps, found: what `quantize_group` finds.
        changes: float32 [16 columns, 64 rows], out: old - new values.

    """
    best, errors = scratch[:GROUP_SIZE], scratch[GROUP_SIZE : 2 * GROUP_SIZE]
    best[:], gains[:] = 0, 0
    _add_products(gradient, inverse, 0, 0, best)
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            gains[row] += gradient[j, row] * best[j, row]
            best[j, row] += old[j, row]
    for row in range(LANES):
        gains[row] *= np.float32(1) - least_gain
    rest = scratch[2 * GROUP_SIZE :]
    quantize_group(best, factor, 0, steps, offset, rest, entries, best_steps, found, errors)
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            gains[row] -= errors[j, row] * errors[j, row]
    for row in range(LANES):
        if best_steps[row] == 0:  # every error was infinite
            gains[row] = 0
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            new = found[j, row] * best_steps[row]
            changes[j, row] = old[j, row] - new if gains[row] > 0 else np.float32(0)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def refine_columns(
    gradient,
    decoded,
    moments,
    inverses,
    factors,
    first,
    steps,
    offset,
    least_gain,
    levels,
    indices,
    changes,
    thread,
    threads,
):
    """Quantize neighbouring groups of a matrix again, one after the other, and keep what is better.

    Args:
        gradient: float32 [rows, columns], (target - decoded) H.
        decoded: float32 [rows, columns], the present values; changed.
        moments: float32 [columns, columns], H.
        inverses: float32 [columns / 16, 16, 16], the inverse of each group's part of H.
        factors: float32 [columns / 16, 16, 16], upper triangular U with U^T U = inverse.
        first: the first of the columns; as many follow as `changes` has.
        steps, offset: as in `error_feedback.quantize_columns`.
        least_gain: float32, the part of a group's cost that a change must gain.
        levels, indices: uint8 [rows, columns] and [rows, columns / 16], level + h and scale indices; changed.
        changes: float32 [rows, n], out: old - new values of the columns, with which the gradient grows.
        thread, threads: which of how many shares of the rows to compute.

    """
    rows, columns = changes.shape
    local, scratch = np.empty((columns, LANES), np.float32), np.empty((3 * GROUP_SIZE + 3, LANES), np.float32)
    old, change = np.empty((GROUP_SIZE, LANES), np.float32), np.empty((GROUP_SIZE, LANES), np.float32)
    found, gains = np.empty((GROUP_SIZE, LANES), np.float32), np.empty(LANES, np.float32)
    entries, best_steps = np.empty(LANES, np.uint8), np.empty(LANES, np.float32)
    tiles = (rows + LANES - 1) // LANES
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first_row = tile * LANES
        count = min(LANES, rows - first_row)
        local[:], old[:] = 0, 0
        for row in range(count):
            local[:, row] = gradient[first_row + row, first : first + columns]
        for at in range(0, columns, GROUP_SIZE):
            group, here = (first + at) // GROUP_SIZE, local[at : at + GROUP_SIZE]
            for row in range(count):
                old[:, row] = decoded[first_row + row, first + at : first + at + GROUP_SIZE]
            of_group = inverses[group], factors[group]
            _refine_group(
                here, old, *of_group, steps, offset, least_gain, scratch, gains, entries, best_steps, found, change
            )
            _add_products(change, moments, first + at, first + at + GROUP_SIZE, local[at + GROUP_SIZE :])
            for row in range(count):
                changes[first_row + row, at : at + GROUP_SIZE] = change[:, row]
                if gains[row] > 0:
                    indices[first_row + row, group] = entries[row]
                    for j in range(GROUP_SIZE):
                        levels[first_row + row, first + at + j] = np.uint8(found[j, row] + offset)
                        decoded[first_row + row, first + at + j] = found[j, row] * best_steps[row]
