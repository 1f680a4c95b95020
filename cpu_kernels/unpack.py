"""Packed rows -> levels, scale indices and weights.

Sixteen rows are unpacked at a time: their words are turned so that the rows lie side by side, and every digit then is
the same few operations on sixteen lanes, which LLVM turns into vector instructions.

No word can decode to a level or a scale index out of range: a digit of radix r is (fraction * r) >> 16, which is
below r for every 16-bit fraction, so damaged data gives wrong numbers but never a wild read.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.crew import Crew, default_crew
from cpu_kernels.layout import BLOCK_SIZE, GROUP_SIZE, PAIRS, WORDS_PER_BLOCK, level_offset

TILE_ROWS = 16


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
def _unpack_rows(rows, depth, levels, indices, thread, threads):
    row_words, groups = rows.shape[1], indices.shape[1]
    words = np.zeros((row_words, TILE_ROWS), np.uint16)
    tile = np.empty((groups, PAIRS, TILE_ROWS, 2), np.int16)
    tile_indices = np.empty((groups, TILE_ROWS), np.uint8)
    for first in range(TILE_ROWS * thread, len(rows), TILE_ROWS * threads):
        last = min(first + TILE_ROWS, len(rows))
        unpack_tile(rows[first:last], depth, words, tile, tile_indices)
        for r in range(first, last):
            for g in range(groups):
                indices[r, g] = tile_indices[g, r - first]
                for p in range(GROUP_SIZE):
                    levels[r, g, p] = tile[g, p % PAIRS, r - first, p // PAIRS]


@numba.njit(cache=True, nogil=True)
def _scale_rows(levels, indices, steps, offset, weights, thread, threads):
    rows, columns = levels.shape
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for k in range(columns):
            weights[r, k] = steps[indices[r, k // GROUP_SIZE]] * np.float32(np.int32(levels[r, k]) - offset)


@numba.njit(cache=True)
def unpack_tile(rows, depth, words, tile, indices):
    """Unpack up to 16 rows.

    Args:
        rows: uint16 [rows, words of a row].
        depth: 1 to 4.
        words: uint16 [words of a row, 16], scratch; lanes beyond the last row may hold anything.
        tile: int16 [groups, 8, 16 rows, 2], out: level + h of weights j and j + 8 of a group.
        indices: uint8 [groups, 16 rows], out: scale indices.

    """
    for r in range(len(rows)):
        for w in range(len(words)):
            words[w, r] = rows[r, w]
    if depth == 1:
        _unpack_1(words, tile, indices)
    elif depth == 2:
        _unpack_2(words, tile, indices)
    elif depth == 3:
        _unpack_3(words, tile, indices)
    else:
        _unpack_4(words, tile, indices)


@numba.njit(cache=True, inline="always")
def _first(word, radix):
    """Return the leading digit of a word."""
    return (np.uint32(word) * np.uint32(radix)) >> np.uint32(16)


@numba.njit(cache=True, inline="always")
def _digit(word, skip, radix):
    """Return the digit of `radix` behind leading digits whose radices multiply to `skip`, a power of three."""
    return (((np.uint32(word) * np.uint32(skip)) & np.uint32(0xFFFF)) * np.uint32(radix)) >> np.uint32(16)


@numba.njit(cache=True)
def _unpack_1(words, tile, indices):
    for g in range(len(indices)):
        for r in range(TILE_ROWS):
            low, high = words[2 * g, r], words[2 * g + 1, r]
            skip = 1
            for j in range(PAIRS):
                tile[g, j, r, 0] = _digit(low, skip, 3)
                tile[g, j, r, 1] = _digit(high, skip, 3)
                skip *= 3
            indices[g, r] = _digit(low, 3**8, 9) * 3 + _digit(high, 3**8, 3)


@numba.njit(cache=True)
def _unpack_2(words, tile, indices):
    groups = len(indices)
    for g in range(groups):
        odd = g % 2
        for r in range(TILE_ROWS):
            low, high = words[2 * g, r], words[2 * g + 1, r]
            b, c = words[2 * groups + g, r], words[3 * groups + g // 2, r]
            skip = 1
            for j in range(5):
                tile[g, j, r, 0] = _digit(low, skip, 9)
                tile[g, j, r, 1] = _digit(high, skip, 9)
                skip *= 9
            tile[g, 5, r, 0] = _first(b, 9)
            tile[g, 5, r, 1] = _digit(b, 9, 9)
            tile[g, 6, r, 0] = _digit(b, 9**2, 9)
            tile[g, 6, r, 1] = _digit(b, 9**3, 9)
            tile[g, 7, r, 0] = _digit(b, 9**4, 9)
            tile[g, 7, r, 1] = _digit(c, 9**odd, 9)
            indices[g, r] = _digit(c, 9**2 * 27**odd, 27)


@numba.njit(cache=True)
def _unpack_3(words, tile, indices):
    groups = len(indices)
    for g in range(groups):
        d_skip = 3 ** (g % 4)
        for r in range(TILE_ROWS):
            a0, a1 = words[2 * g, r], words[2 * g + 1, r]
            a2, a3 = words[2 * groups + 2 * g, r], words[2 * groups + 2 * g + 1, r]
            b, d = words[4 * groups + g, r], words[5 * groups + g // 4, r]
            skip = 1
            for j in range(3):
                tile[g, j, r, 0] = _digit(a0, skip, 27)
                tile[g, j, r, 1] = _digit(a1, skip, 27)
                tile[g, 3 + j, r, 0] = _digit(a2, skip, 27)
                tile[g, 3 + j, r, 1] = _digit(a3, skip, 27)
                skip *= 27
            tile[g, 6, r, 0] = _first(b, 27)
            tile[g, 6, r, 1] = _digit(b, 27, 27)
            tile[g, 7, r, 0] = _digit(b, 27**2, 27)
            tile[g, 7, r, 1] = _digit(a0, 3**9, 3) * 9 + _digit(a1, 3**9, 3) * 3 + _digit(a2, 3**9, 3)
            indices[g, r] = _digit(a3, 3**9, 3) * 9 + _digit(b, 3**9, 3) * 3 + _digit(d, d_skip, 3)


@numba.njit(cache=True)
def _unpack_4(words, tile, indices):
    groups = len(indices)
    c_plane = 6 * groups
    for g in range(groups):
        odd, d_skip = g % 2, 9 ** (g % 4)
        for r in range(TILE_ROWS):
            a0, a1 = words[2 * g, r], words[2 * g + 1, r]
            a2, a3 = words[2 * groups + 2 * g, r], words[2 * groups + 2 * g + 1, r]
            a4, a5 = words[4 * groups + 2 * g, r], words[4 * groups + 2 * g + 1, r]
            c, d = words[c_plane + g // 2, r], words[c_plane + groups // 2 + g // 4, r]
            skip = 1
            for j in range(2):
                tile[g, j, r, 0] = _digit(a0, skip, 81)
                tile[g, j, r, 1] = _digit(a1, skip, 81)
                tile[g, 2 + j, r, 0] = _digit(a2, skip, 81)
                tile[g, 2 + j, r, 1] = _digit(a3, skip, 81)
                tile[g, 4 + j, r, 0] = _digit(a4, skip, 81)
                tile[g, 4 + j, r, 1] = _digit(a5, skip, 81)
                skip *= 81
            tile[g, 6, r, 0] = _digit(a0, 81**2, 9) * 9 + _digit(a1, 81**2, 9)
            tile[g, 6, r, 1] = _digit(a2, 81**2, 9) * 9 + _digit(a3, 81**2, 9)
            tile[g, 7, r, 0] = _digit(a4, 81**2, 9) * 9 + _digit(a5, 81**2, 9)
            tile[g, 7, r, 1] = _digit(c, 81**odd, 81)
            indices[g, r] = _digit(c, 81**2 * 3**odd, 3) * 9 + _digit(d, d_skip, 9)
