"""Kernels of exact recovery: half-precision weights -> scales that reproduce a group -> scale indices and levels.

A half is the bit pattern of a float16 or bfloat16 number, as uint16. A scale is the bit pattern of a non-negative
float32 number, as an integer; these integers sort like the numbers.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import GROUP_SIZE


@numba.njit(cache=True, nogil=True)
def allowed_scales(magnitude_indices, lows, highs, ends, ranges):
    """Find, for each group, the ranges of scales that reproduce every weight at some level.

    Args:
        magnitude_indices: int32 [groups, 16], each weight's index into the magnitudes; -1 for a zero, which every scale
            reproduces.
        lows, highs: int64 [magnitudes, h]: scales from lows[m, k] to highs[m, k] reproduce magnitude m at level k + 1;
            the range is empty if lows[m, k] > highs[m, k]. Both decrease with k.
        ends: int64 [groups], out: the end of each group's ranges in `ranges`; they start at the previous group's end.
        ranges: int64 [groups * 16 * h, 2], out: first and last scale, ascending and disjoint; a group has none if all
            its weights are zero or if no scale reproduces it.

    """
    size = GROUP_SIZE * lows.shape[1]
    found, narrowed = np.empty((size, 2), np.int64), np.empty((size, 2), np.int64)
    own = np.empty((lows.shape[1], 2), np.int64)
    end = 0
    for g in range(len(magnitude_indices)):
        found[0, 0], found[0, 1] = 0, np.iinfo(np.int64).max
        count, magnitudes = 1, 0
        for p in range(GROUP_SIZE):
            index = magnitude_indices[g, p]
            if index >= 0 and (p == 0 or index != magnitude_indices[g, p - 1]):
                magnitudes += 1
                own_count = _ranges_of_magnitude(lows[index], highs[index], own)
                count = _intersect(found, count, own, own_count, narrowed)
                found, narrowed = narrowed, found
        if magnitudes:
            for k in range(count):
                ranges[end, 0], ranges[end, 1] = found[k, 0], found[k, 1]
                end += 1
        ends[g] = end


@numba.njit(cache=True)
def _ranges_of_magnitude(lows, highs, ranges):
    """Write the ranges of one magnitude in ascending order, merging those that overlap; return their number."""
    count = 0
    for k in range(len(lows) - 1, -1, -1):
        if lows[k] > highs[k]:
            continue
        if count and lows[k] <= ranges[count - 1, 1] + 1:
            ranges[count - 1, 1] = max(ranges[count - 1, 1], highs[k])
        else:
            ranges[count, 0], ranges[count, 1] = lows[k], highs[k]
            count += 1
    return count


@numba.njit(cache=True)
def _intersect(first, first_count, second, second_count, both):
    """Write the intersection of two ascending lists of disjoint ranges; return its number of ranges."""
    i, j, count = 0, 0, 0
    while i < first_count and j < second_count:
        low, high = max(first[i, 0], second[j, 0]), min(first[i, 1], second[j, 1])
        if low <= high:
            both[count, 0], both[count, 1] = low, high
            count += 1
        if first[i, 1] < second[j, 1]:
            i += 1
        else:
            j += 1
    return count


@numba.njit(cache=True, inline="always")
def _shared_entries(group, entries):
    """Return the codebook entries that reproduce every weight of a group, as a bit mask."""
    shared = entries[group[0]]
    for p in range(1, GROUP_SIZE):
        shared &= entries[group[p]]
    return shared


@numba.njit(cache=True, nogil=True)
def find_misfits(halves, entries, misfits, thread, threads):
    """List the groups that no codebook entry reproduces, until the list is full.

    Args:
        halves: uint16 [rows, groups, 16].
        entries: uint32 [65536]: for each half, the bit mask of the codebook entries that reproduce it at some level.
        misfits: int64 [threads, n], out: group numbers, row * groups + group.
        thread, threads: which of how many shares of the rows to search.

    Returns:
        The number of groups that this thread listed.

    """
    rows, groups, _ = halves.shape
    count = 0
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            if not _shared_entries(halves[r, g], entries):
                misfits[thread, count] = r * groups + g
                count += 1
                if count == misfits.shape[1]:
                    return count
    return count


@numba.njit(cache=True, nogil=True)
def encode_halves(halves, entries, table, levels, indices, counts, thread, threads):
    """Encode each group with the lowest codebook entry that reproduces it.

    Args:
        halves: uint16 [rows, groups, 16].
        entries: as in `find_misfits`.
        table: uint8 [27, 65536]: the level + h at which an entry reproduces a half.
        levels: uint8 [rows, groups, 16], out: level + h.
        indices: uint8 [rows, groups], out: scale indices.
        counts: int64 [threads, 27, 81], to whose row `thread` the counts of each entry's levels are added.
        thread, threads: which of how many shares of the rows to encode.

    Returns:
        The number of groups that no entry reproduces. The levels and indices of such groups are invalid.

    """
    rows, groups, _ = halves.shape
    misfits = 0
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            shared = _shared_entries(halves[r, g], entries)
            index = 0
            if shared:
                while not shared >> np.uint32(index) & np.uint32(1):
                    index += 1
            else:
                misfits += 1
            indices[r, g] = index
            for p in range(GROUP_SIZE):
                half = halves[r, g, p]
                level = table[index, half]
                levels[r, g, p] = level
                counts[thread, index, level] += 1
    return misfits
