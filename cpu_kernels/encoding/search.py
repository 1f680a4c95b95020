"""Trying every scale: per group, the codebook entry whose weighted squared error is least.

Sixteen groups at a time lie in the lanes, as in `quantize`, whose four candidates this goes beyond. The
errors of a group are added in the order of its weights, whatever the vectors' width is.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.packed_rows.layout import GROUP_SIZE

_LANES = 16  # groups that are searched side by side


@numba.njit(cache=True)
def _turn(weights, importance, row, first_group, some, emphasis, turned, factors):
    """Lay up to 16 groups of a row side by side, and beside each weight what its squared error counts.

    turned, factors: float32 [16 weights, 16 groups], out.
    """
    for lane in range(some):
        first = (first_group + lane) * GROUP_SIZE
        half_of_mean = np.float32(0)
        for j in range(GROUP_SIZE):
            half_of_mean += weights[row, first + j] * weights[row, first + j]
        half_of_mean *= np.float32(0.5 / GROUP_SIZE)
        for j in range(GROUP_SIZE):
            weight = weights[row, first + j]
            turned[j, lane] = weight
            own = np.sqrt(half_of_mean + weight * weight) if emphasis else np.float32(1)
            factors[j, lane] = own * importance[first + j]


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _errors(turned, factors, steps, offset, errors):
    """Sum the weighted squared errors of 16 groups, each with its own step: float32 [16 groups]."""
    errors[:] = 0
    for j in range(GROUP_SIZE):
        for lane in range(_LANES):
            step = steps[lane]
            level = np.rint(turned[j, lane] * (np.float32(1.0) / step if step > 0 else np.float32(0)))
            difference = turned[j, lane] - min(max(level, -offset), offset) * step
            errors[lane] += difference * difference * factors[j, lane]


@numba.njit(cache=True, nogil=True)
def best_scales(weights, importance, emphasis, fractions, offset, scales, thread, threads):
    """Choose each group's scale among fractions of its largest magnitude.

    Args:
        weights: float32 [rows, columns], columns a multiple of 16.
        importance: float32 [columns]: what the squared error of a column's weights counts.
        emphasis: whether the squared error of a weight also counts with its size: with the root of its square and half
            the mean square of its group.
        fractions: float32 [n], of the largest magnitude, to try.
        offset: float32, h of the depth.
        scales: float32 [rows, columns / 16], out; 0 for a group of zeros.
        thread, threads: which of how many shares of the rows to compute, here and below.

    """
    rows, groups = scales.shape
    turned, factors = np.zeros((GROUP_SIZE, _LANES), np.float32), np.zeros((GROUP_SIZE, _LANES), np.float32)
    largest, steps = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    errors, least = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        for first in range(0, groups, _LANES):
            some = min(_LANES, groups - first)
            _turn(weights, importance, row, first, some, emphasis, turned, factors)
            largest[:], least[:] = 0, np.inf
            for j in range(GROUP_SIZE):
                for lane in range(_LANES):
                    largest[lane] = max(largest[lane], abs(turned[j, lane]))
            for fraction in fractions:
                for lane in range(_LANES):
                    steps[lane] = largest[lane] * fraction / offset
                _errors(turned, factors, steps, offset, errors)
                for lane in range(some):
                    if errors[lane] < least[lane]:
                        least[lane] = errors[lane]
                        scales[row, first + lane] = largest[lane] * fraction


@numba.njit(cache=True, nogil=True)
def round_to_best(weights, importance, emphasis, steps, offset, levels, indices, thread, threads):
    """Quantize each group with the codebook entry of least weighted squared error, the first of equals.

    Args:
        weights, importance, emphasis, offset: as above.
        steps: float32 [27], codebook / h, as the decoder computes it.
        levels: uint8 [rows, columns], out: level + h.
        indices: uint8 [rows, columns / 16], out.
        thread, threads: as above.

    Returns:
        (squared error, squared weights), float64 sums over the rows of this thread, unweighted.

    """
    rows, groups = indices.shape
    turned, factors = np.zeros((GROUP_SIZE, _LANES), np.float32), np.zeros((GROUP_SIZE, _LANES), np.float32)
    same_step = np.empty(_LANES, np.float32)
    errors, least, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.uint8)
    squared_error, power = 0.0, 0.0
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        for first in range(0, groups, _LANES):
            some = min(_LANES, groups - first)
            _turn(weights, importance, row, first, some, emphasis, turned, factors)
            least[:], best[:] = np.inf, 0
            for entry in range(len(steps)):
                same_step[:] = steps[entry]
                _errors(turned, factors, same_step, offset, errors)
                for lane in range(_LANES):
                    if errors[lane] < least[lane]:
                        least[lane], best[lane] = errors[lane], entry
            for lane in range(some):
                indices[row, first + lane] = best[lane]
                step = steps[best[lane]]
                for j in range(GROUP_SIZE):
                    weight = turned[j, lane]
                    level = np.rint(weight * (np.float32(1.0) / step if step > 0 else np.float32(0)))
                    level = min(max(level, -offset), offset)
                    levels[row, (first + lane) * GROUP_SIZE + j] = np.uint8(level + offset)
                    difference = np.float64(weight - level * step)
                    squared_error += difference * difference
                    power += np.float64(weight) * np.float64(weight)
    return squared_error, power
