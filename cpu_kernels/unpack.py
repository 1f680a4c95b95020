"""Packed rows -> levels, scale indices and weights; the scalar counterpart of the GEMV's extraction.

No word can decode to a level or a scale index out of range: a digit of radix r is (fraction * r) >> 16, which is
below r for every 16-bit fraction, so damaged data gives wrong numbers but never a wild read.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.crew import Crew, default_crew
from cpu_kernels.layout import BLOCK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK, level_offset


def unpack(rows: np.ndarray, depth: int, crew: Crew | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unpack rows: the inverse of `pack`.

    Args:
        rows: uint8 [rows, bytes of a row].
        depth: 1 to 4.
        crew: the threads to use; None for all cores.

    Returns:
        levels uint8 [rows, columns] (level + h) and scale indices uint8 [rows, columns / 16].

    """
    words = rows.view(np.uint16)
    groups = words.shape[1] // WORDS_PER_BLOCK[depth] * (BLOCK_SIZE // GROUP_SIZE)
    levels = np.empty((len(rows), groups, GROUP_SIZE), np.uint8)
    indices = np.empty((len(rows), groups), np.uint8)
    (crew or default_crew()).run(_unpack_rows, words, depth, levels, indices)
    return levels.reshape(len(rows), -1), indices


def dequantize(rows: np.ndarray, codebook: np.ndarray, depth: int, crew: Crew | None = None) -> np.ndarray:
    """Decode packed rows to weights.

    A weight is step * level, rounded once to float32, where step = scale / h, rounded once to float32
    (`docs/format.md` section 4).

    Args:
        rows: uint8 [rows, bytes of a row].
        codebook: float32 [27], the scales: magnitudes of the largest level.
        depth: 1 to 4.
        crew: the threads to use; None for all cores.

    Returns:
        float32 [rows, columns].

    """
    levels, indices = unpack(rows, depth, crew)
    weights = np.empty(levels.shape, np.float32)
    steps = codebook / np.float32(level_offset(depth))
    (crew or default_crew()).run(_scale_rows, levels, indices, steps, level_offset(depth), weights)
    return weights


@numba.njit(cache=True, nogil=True)
def _unpack_rows(words, depth, levels, indices, thread, threads):
    rows = len(words)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        if depth == 1:
            unpack_row_1(words[r], levels[r], indices[r])
        elif depth == 2:
            unpack_row_2(words[r], levels[r], indices[r])
        elif depth == 3:
            unpack_row_3(words[r], levels[r], indices[r])
        else:
            unpack_row_4(words[r], levels[r], indices[r])


@numba.njit(cache=True, nogil=True)
def _scale_rows(levels, indices, steps, offset, weights, thread, threads):
    rows, columns = levels.shape
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for k in range(columns):
            weights[r, k] = steps[indices[r, k // GROUP_SIZE]] * np.float32(np.int32(levels[r, k]) - offset)


@numba.njit(cache=True, inline="always")
def _digit(fraction, radix):
    """Return the leading digit of a 16-bit fraction, and the fraction behind it."""
    product = np.uint32(fraction) * np.uint32(radix)
    return np.uint8(product >> np.uint32(16)), product & np.uint32(0xFFFF)


@numba.njit(cache=True)
def unpack_row_1(words, levels, indices):
    """Unpack one row of depth 1: words uint16 -> levels uint8 [groups, 16], indices uint8 [groups]."""
    for g in range(len(indices)):
        first, second = np.uint32(words[2 * g]), np.uint32(words[2 * g + 1])
        for p in range(8):
            levels[g, p], first = _digit(first, 3)
            levels[g, 8 + p], second = _digit(second, 3)
        indices[g] = _digit(first, 9)[0] * 3 + _digit(second, 3)[0]


@numba.njit(cache=True)
def unpack_row_2(words, levels, indices):
    """Unpack one row of depth 2; arguments as in `unpack_row_1`."""
    groups = len(indices)
    for g in range(groups):
        first, second = np.uint32(words[2 * g]), np.uint32(words[2 * g + 1])
        for p in range(5):
            levels[g, p], first = _digit(first, 9)
            levels[g, 8 + p], second = _digit(second, 9)
        rest = np.uint32(words[2 * groups + g])
        levels[g, 5], rest = _digit(rest, 9)
        levels[g, 13], rest = _digit(rest, 9)
        levels[g, 6], rest = _digit(rest, 9)
        levels[g, 14], rest = _digit(rest, 9)
        levels[g, 7], rest = _digit(rest, 9)
    for pair in range(groups // 2):
        rest = np.uint32(words[3 * groups + pair])
        levels[2 * pair, 15], rest = _digit(rest, 9)
        levels[2 * pair + 1, 15], rest = _digit(rest, 9)
        indices[2 * pair], rest = _digit(rest, 27)
        indices[2 * pair + 1], rest = _digit(rest, 27)


@numba.njit(cache=True)
def unpack_row_3(words, levels, indices):
    """Unpack one row of depth 3; arguments as in `unpack_row_1`."""
    groups = len(indices)
    for g in range(groups):
        a0, a1 = np.uint32(words[2 * g]), np.uint32(words[2 * g + 1])
        a2, a3 = (np.uint32(words[2 * groups + 2 * g]), np.uint32(words[2 * groups + 2 * g + 1]))
        for p in range(3):
            levels[g, p], a0 = _digit(a0, 27)
            levels[g, 8 + p], a1 = _digit(a1, 27)
            levels[g, 3 + p], a2 = _digit(a2, 27)
            levels[g, 11 + p], a3 = _digit(a3, 27)
        rest = np.uint32(words[4 * groups + g])
        levels[g, 6], rest = _digit(rest, 27)
        levels[g, 14], rest = _digit(rest, 27)
        levels[g, 7], rest = _digit(rest, 27)
        levels[g, 15] = _digit(a0, 3)[0] * 9 + _digit(a1, 3)[0] * 3 + _digit(a2, 3)[0]
        indices[g] = _digit(a3, 3)[0] * 9 + _digit(rest, 3)[0] * 3
    for quad in range(groups // 4):
        rest = np.uint32(words[5 * groups + quad])
        for g in range(4 * quad, 4 * quad + 4):
            trit, rest = _digit(rest, 3)
            indices[g] += trit


@numba.njit(cache=True)
def unpack_row_4(words, levels, indices):
    """Unpack one row of depth 4; arguments as in `unpack_row_1`."""
    groups = len(indices)
    for g in range(groups):
        for w in range(3):
            first = np.uint32(words[2 * groups * w + 2 * g])
            second = np.uint32(words[2 * groups * w + 2 * g + 1])
            for p in range(2):
                levels[g, 2 * w + p], first = _digit(first, 81)
                levels[g, 8 + 2 * w + p], second = _digit(second, 81)
            split = _digit(first, 9)[0] * 9 + _digit(second, 9)[0]
            if w == 0:
                levels[g, 6] = split
            elif w == 1:
                levels[g, 14] = split
            else:
                levels[g, 7] = split
    for pair in range(groups // 2):
        rest = np.uint32(words[6 * groups + pair])
        levels[2 * pair, 15], rest = _digit(rest, 81)
        levels[2 * pair + 1, 15], rest = _digit(rest, 81)
        trit, rest = _digit(rest, 3)
        indices[2 * pair] = trit * 9
        trit, rest = _digit(rest, 3)
        indices[2 * pair + 1] = trit * 9
    for quad in range(groups // 4):
        rest = np.uint32(words[6 * groups + groups // 2 + quad])
        for g in range(4 * quad, 4 * quad + 4):
            digit, rest = _digit(rest, 9)
            indices[g] += digit
