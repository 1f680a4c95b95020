"""Choice of a matrix's codebook: 27 scales from the ideal scales of its groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_kernels.packed_rows.layout import CODEBOOK_SIZE


def log_spaced_codebook(ideal: Sequence[np.ndarray], largest: float, low_quantile: float) -> np.ndarray:
    """Return 27 log-spaced scales, float32, from a low quantile of the groups' ideal scales to `largest`.

    `ideal` are float32 [rows, groups] of each block, 0 for a group of zeros. The codebook ascends; it is all zeros if
    all groups are.
    """
    total = sum(scales.size for scales in ideal)
    above_zero = int(sum(np.count_nonzero(scales) for scales in ideal))
    if above_zero == 0:
        return np.zeros(CODEBOOK_SIZE, np.float32)
    rank = int(low_quantile * (above_zero - 1))
    lowest = float(kth_smallest(ideal, total - above_zero + rank))
    codebook = np.geomspace(lowest, largest, CODEBOOK_SIZE).astype(np.float32)
    codebook[-1] = largest
    return codebook


def kth_smallest(blocks: Sequence[np.ndarray], rank: int) -> np.float32:
    """Return the number of a rank, counted from 0, among nonnegative float32 numbers, without sorting them.

    Their bits, read as integers, have the same order. A radix selection counts the upper 16 bits first, then the lower
    16 bits of the numbers with the selected upper bits.
    """
    bits = [block.reshape(-1).view(np.uint32) for block in blocks]
    uppers = np.cumsum(sum(np.bincount(part >> 16, minlength=1 << 16) for part in bits))
    upper = int(np.searchsorted(uppers, rank, side="right"))
    same = (part[part >> 16 == upper] & 0xFFFF for part in bits)
    lowers = np.cumsum(sum(np.bincount(part, minlength=1 << 16) for part in same))
    if upper:
        rank -= int(uppers[upper - 1])
    lower = int(np.searchsorted(lowers, rank, side="right"))
    return np.uint32(upper << 16 | lower).view(np.float32)
