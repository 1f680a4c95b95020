"""Exhaustive scale search: for each group, the codebook entry with the least weighted squared error.

`quantize` tries four candidates only. As there, each lane is a group, and a group's errors are summed in the order of
its weights, whatever the vector width is.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE

_LANES = 16  # groups searched at once


@numba.njit(cache=True)
def _transpose_groups(weights, importance, row, first_group, count, emphasis, transposed, factors):
    """Transpose up to 16 groups of a row, and compute the factor of each weight's squared error.

    transposed, factors: float32 [16 weights, 16 groups], out.
    """
    for lane in range(count):
        first = (first_group + lane) * GROUP_SIZE
        half_of_mean = np.float32(0)
        for j in range(GROUP_SIZE):
            half_of_mean += weights[row, first + j] * weights[row, first + j]
        half_of_mean *= np.float32(0.5 / GROUP_SIZE)
        for j in range(GROUP_SIZE):
            weight = weights[row, first + j]
            transposed[j, lane] = weight
            emphasis_factor = np.sqrt(half_of_mean + weight * weight) if emphasis else np.float32(1)
            factors[j, lane] = emphasis_factor * importance[first + j]


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _errors(transposed, factors, steps, offset, errors):
    """Compute the weighted squared errors of 16 groups with one step each; steps, errors: float32 [16 groups]."""
    errors[:] = 0
    for j in range(GROUP_SIZE):
        for lane in range(_LANES):
            step = steps[lane]
            level = np.rint(transposed[j, lane] * (np.float32(1.0) / step if step > 0 else np.float32(0)))
            difference = transposed[j, lane] - min(max(level, -offset), offset) * step
            errors[lane] += difference * difference * factors[j, lane]


@numba.njit(cache=True, nogil=True)
def best_scales(weights, importance, emphasis, fractions, offset, scales, thread, threads):
    """Choose each group's scale among fractions of its largest magnitude.

    Args:
        weights: float32 [rows, columns], columns is a multiple of 16.
        importance: float32 [columns], the factor of the squared errors in each column.
        emphasis: whether the squared error of a weight w is also multiplied with sqrt(w**2 + m / 2), where m is the
            mean square of its group.
        fractions: float32 [n], the fractions of the largest magnitude to try.
        offset: float32, h of the depth.
        scales: float32 [rows, columns / 16], out; 0 for a group of zeros.
        thread, threads: which of how many shares of the rows to compute.

    """
    rows, groups = scales.shape
    transposed, factors = np.zeros((GROUP_SIZE, _LANES), np.float32), np.zeros((GROUP_SIZE, _LANES), np.float32)
    largest, steps = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    errors, least = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        for first in range(0, groups, _LANES):
            count = min(_LANES, groups - first)
            _transpose_groups(weights, importance, row, first, count, emphasis, transposed, factors)
            largest[:], least[:] = 0, np.inf
            for j in range(GROUP_SIZE):
                for lane in range(_LANES):
                    largest[lane] = max(largest[lane], abs(transposed[j, lane]))
            for fraction in fractions:
                for lane in range(_LANES):
                    steps[lane] = largest[lane] * fraction / offset
                _errors(transposed, factors, steps, offset, errors)
                for lane in range(count):
                    if errors[lane] < least[lane]:
                        least[lane] = errors[lane]
                        scales[row, first + lane] = largest[lane] * fraction


@numba.njit(cache=True, nogil=True)
def round_to_best(weights, importance, emphasis, steps, offset, levels, indices, thread, threads):
    """Quantize each group with the codebook entry of least weighted squared error, the first in case of a tie.

    Args:
        weights, importance, emphasis, offset: as in `best_scales`.
        steps: float32 [27], codebook / h, as the decoder computes it.
        levels: uint8 [rows, columns], out: level + h.
        indices: uint8 [rows, columns / 16], out: scale indices.
        thread, threads: as in `best_scales`.

    Returns:
        (squared error, squared weights): unweighted float64 sums over this thread's rows.

    """
    rows, groups = indices.shape
    transposed, factors = np.zeros((GROUP_SIZE, _LANES), np.float32), np.zeros((GROUP_SIZE, _LANES), np.float32)
    step_in_all_lanes = np.empty(_LANES, np.float32)
    errors, least, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.uint8)
    squared_error, power = 0.0, 0.0
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        for first in range(0, groups, _LANES):
            count = min(_LANES, groups - first)
            _transpose_groups(weights, importance, row, first, count, emphasis, transposed, factors)
            least[:], best[:] = np.inf, 0
            for entry in range(len(steps)):
                step_in_all_lanes[:] = steps[entry]
                _errors(transposed, factors, step_in_all_lanes, offset, errors)
                for lane in range(_LANES):
                    if errors[lane] < least[lane]:
                        least[lane], best[lane] = errors[lane], entry
            for lane in range(count):
                indices[row, first + lane] = best[lane]
                step = steps[best[lane]]
                for j in range(GROUP_SIZE):
                    weight = transposed[j, lane]
                    level = np.rint(weight * (np.float32(1.0) / step if step > 0 else np.float32(0)))
                    level = min(max(level, -offset), offset)
                    levels[row, (first + lane) * GROUP_SIZE + j] = np.uint8(level + offset)
                    difference = np.float64(weight - level * step)
                    squared_error += difference * difference
                    power += np.float64(weight) * np.float64(weight)
    return squared_error, power
