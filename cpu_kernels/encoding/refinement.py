"""Coordinate descent: quantize each group again, given the errors of all others as they are.

`tritgguf.calibration.refinement` says why. Every row is a problem of its own. Let H be the second moments of the
inputs and G = (target - decoded) H. If all other groups stay, the best continuous values of a group g are its decoded
values + G_g H_gg^-1, which lower the row's output error by G_g H_gg^-1 G_g^T. Quantized values that miss them by e give
back e H_gg e^T.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.encoding.error_feedback import LANES, add_products, new_quantized_group, quantize_group
from cpu_kernels.packed_rows.layout import GROUP_SIZE

_SMALLEST_GAIN = np.float32(1e-5)  # a part of a group's cost, above float32's rounding errors


class SecondMoments(NamedTuple):
    """Second moments of the inputs, H, with what each group of 16 columns needs of its own part of them.

    Attributes:
        whole: float32 [columns, columns].
        inverses: float32 [columns / 16, 16, 16], of each group's part.
        factors: float32 [columns / 16, 16, 16], upper triangular U with U^T U = inverse.

    """

    whole: np.ndarray
    inverses: np.ndarray
    factors: np.ndarray


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _refine_group(gradient, old, inverse, factor, steps, offset, found, gains, changes):
    """Quantize one group of 64 rows again, and keep what is better.

    Args:
        gradient, old: float32 [16 columns, 64 rows], as in `refine_columns`; `old` are the present values.
        inverse, factor: float32 [16, 16], the group's of `SecondMoments`.
        steps, offset: as in `refine_columns`.
        found: a `QuantizedGroup`, out.
        gains: float32 [64 rows], out: above 0 where the result is better.
        changes: float32 [16 columns, 64 rows], out: old - new values.

    """
    best = changes  # until the changes are known
    best[:], gains[:] = 0, 0
    add_products(gradient, inverse, 0, 0, best)
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            gains[row] += gradient[j, row] * best[j, row]
            best[j, row] += old[j, row]
    for row in range(LANES):
        gains[row] *= np.float32(1) - _SMALLEST_GAIN
    quantize_group(best, factor, 0, steps, offset, found)
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            gains[row] -= found.errors[j, row] * found.errors[j, row]
    for row in range(LANES):
        if found.steps[row] == 0:  # every error was infinite
            gains[row] = 0
    for j in range(GROUP_SIZE):
        for row in range(LANES):
            new = found.levels[j, row] * found.steps[row]
            changes[j, row] = old[j, row] - new if gains[row] > 0 else np.float32(0)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def refine_columns(gradient, moments, first, steps, offset, levels, indices, changes, thread, threads):
    """Quantize neighbouring groups of a matrix again, one after the other, and keep what is better.

    Args:
        gradient: float32 [rows, columns], (target - decoded) H.
        moments: a `SecondMoments`.
        first: the first of the columns; as many follow as `changes` has.
        steps, offset: as in `error_feedback.quantize_columns`.
        levels, indices: uint8 [rows, columns] and [rows, columns / 16], level + h and scale indices; changed.
        changes: float32 [rows, n], out: old - new values of the columns, with which the gradient grows.
        thread, threads: which of how many shares of the rows to compute.

    """
    rows, columns = changes.shape
    local, found = np.empty((columns, LANES), np.float32), new_quantized_group()
    old, change = np.empty((GROUP_SIZE, LANES), np.float32), np.empty((GROUP_SIZE, LANES), np.float32)
    gains = np.empty(LANES, np.float32)
    tiles = (rows + LANES - 1) // LANES
    for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first_row = tile * LANES
        count = min(LANES, rows - first_row)
        local[:], old[:] = 0, 0
        for row in range(count):
            local[:, row] = gradient[first_row + row, first : first + columns]
        for at in range(0, columns, GROUP_SIZE):
            column, after = first + at, at + GROUP_SIZE
            group = column // GROUP_SIZE
            for row in range(count):
                step = steps[indices[first_row + row, group]]
                for j in range(GROUP_SIZE):
                    old[j, row] = (np.float32(levels[first_row + row, column + j]) - offset) * step
            inverse, factor = moments.inverses[group], moments.factors[group]
            _refine_group(local[at:after], old, inverse, factor, steps, offset, found, gains, change)
            add_products(change, moments.whole, column, first + after, local[after:])
            for row in range(count):
                changes[first_row + row, at:after] = change[:, row]
                if gains[row] > 0:
                    indices[first_row + row, group] = found.entries[row]
                    for j in range(GROUP_SIZE):
                        levels[first_row + row, column + j] = np.uint8(found.levels[j, row] + offset)
