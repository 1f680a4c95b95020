"""Search kernels of the encoders: weights -> best scale per group -> codebook index and levels."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.layout import CODEBOOK_SIZE, GROUP_SIZE

# The candidates for a group's scale are its sorted magnitudes at these places (the published codec's choice).
CANDIDATES = (10, 12, 14, 15)


@numba.njit(cache=True, inline="always")
def _group_error(group, scale, offset):
    """Return the squared error of rounding a group to the levels of `scale`."""
    to_level = offset / scale
    step = scale / offset
    error = np.float32(0.0)
    for k in range(GROUP_SIZE):
        level = min(max(np.rint(group[k] * to_level), -offset), offset)
        difference = group[k] - level * step
        error += difference * difference
    return error


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def best_candidates(weights, offset, scales, thread, threads):
    """Choose each group's scale: the candidate with the least squared error.

    Args:
        weights: float32 [rows, columns].
        offset: float32, h of the depth.
        scales: float32 [rows, columns / 16], out; 0 for a group of zeros.
        thread, threads: which of how many shares of the rows to compute, here and below.

    """
    rows, groups = scales.shape
    magnitudes = np.empty(GROUP_SIZE, np.float32)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            group = weights[r, g * GROUP_SIZE : (g + 1) * GROUP_SIZE]
            for k in range(GROUP_SIZE):
                value = abs(group[k])
                place = k
                while place > 0 and magnitudes[place - 1] > value:
                    magnitudes[place] = magnitudes[place - 1]
                    place -= 1
                magnitudes[place] = value
            best, least = np.float32(0.0), np.float32(np.inf)
            for candidate in CANDIDATES:
                scale = magnitudes[candidate]
                if scale > np.float32(1e-30):
                    error = _group_error(group, scale, offset)
                    if error < least:
                        best, least = scale, error
            scales[r, g] = best


@numba.njit(cache=True, nogil=True, error_model="numpy")
def round_to_codebook(weights, scales, thresholds, steps, offset, levels, indices, thread, threads):
    """Snap each group's scale to the codebook and round the group again with it.

    Args:
        weights: float32 [rows, columns].
        scales: float32 [rows, columns / 16], the wanted scales.
        thresholds: float32 [26], ascending: a scale above threshold i takes an entry beyond i.
        steps: float32 [27], codebook entry / h, as the decoder computes it.
        offset: float32, h of the depth.
        levels: uint8 [rows, columns], out: level + h.
        indices: uint8 [rows, columns / 16], out.

    Returns:
        (squared error, squared weights), float64 sums over the rows of this thread.

    """
    rows, groups = scales.shape
    error, power = 0.0, 0.0
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            index = 0
            for entry in range(CODEBOOK_SIZE - 1):
                index += scales[r, g] > thresholds[entry]
            indices[r, g] = index
            step = steps[index]
            to_level = np.float32(1.0) / step if step > 0 else np.float32(0.0)
            for k in range(g * GROUP_SIZE, (g + 1) * GROUP_SIZE):
                weight = weights[r, k]
                level = min(max(np.rint(weight * to_level), -offset), offset)
                difference = weight - level * step
                error += difference * difference
                power += weight * weight
                levels[r, k] = np.uint8(level + offset)
    return error, power


@numba.njit(cache=True, nogil=True)
def largest_magnitude(weights, thread, threads):
    """Return the largest |w| of this thread's rows of float32 [rows, columns]; NaN if a weight is NaN or infinite."""
    rows, columns = weights.shape
    largest = np.float32(0.0)
    broken = False
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for k in range(columns):
            magnitude = abs(weights[r, k])
            largest = max(largest, magnitude)
            broken |= not magnitude <= np.float32(3.4028234e38)
    return np.float32(np.nan) if broken else largest
