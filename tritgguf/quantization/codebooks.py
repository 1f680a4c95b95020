"""The 27 scales of a matrix, chosen from those that its groups want."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_kernels.packed_rows.layout import CODEBOOK_SIZE


def log_spaced_codebook(wanted: Sequence[np.ndarray], largest: float, low_quantile: float) -> np.ndarray:
    """Return 27 log-spaced scales from a low quantile of the wanted scales to the largest magnitude.

    `wanted` are float32 [rows, groups] of each block; a group of zeros wants no scale and has 0. The codebook is
    ascending; it holds zeros where no group wants a scale.
    """
    total = sum(scales.size for scales in wanted)
    above_zero = int(sum(np.count_nonzero(scales) for scales in wanted))
    if above_zero == 0:
        return np.zeros(CODEBOOK_SIZE, np.float32)
    rank = int(low_quantile * (above_zero - 1))
    lowest = float(in_ascending_order(wanted, total - above_zero + rank))
    codebook = np.geomspace(lowest, largest, CODEBOOK_SIZE).astype(np.float32)
    codebook[-1] = largest
    return codebook


def in_ascending_order(blocks: Sequence[np.ndarray], place: int) -> np.float32:
    """Return the number at a place, from 0, of float32 numbers that are not negative, without sorting them.

    As integers, their bits have the same order: the upper halves are counted first, then the lower halves below the
    upper one that was found.
    """
    bits = [block.reshape(-1).view(np.uint32) for block in blocks]
    uppers = np.cumsum(sum(np.bincount(part >> 16, minlength=1 << 16) for part in bits))
    upper = int(np.searchsorted(uppers, place, side="right"))
    same = (part[part >> 16 == upper] & 0xFFFF for part in bits)
    lowers = np.cumsum(sum(np.bincount(part, minlength=1 << 16) for part in same))
    if upper:
        place -= int(uppers[upper - 1])
    lower = int(np.searchsorted(lowers, place, side="right"))
    return np.uint32(upper << 16 | lower).view(np.float32)
