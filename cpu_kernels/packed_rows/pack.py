"""Packing: levels and scale indices -> packed rows."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, TRIT_CODES, WORDS_PER_BLOCK
from cpu_kernels.threads.thread_pool import ThreadPool, default_thread_pool


def pack(
    levels: np.ndarray, scale_indices: np.ndarray, depth: int, thread_pool: ThreadPool | None = None
) -> np.ndarray:
    """Pack a quantized matrix.

    Args:
        levels: uint8 [rows, columns], level + h, below 3**depth; columns is a multiple of 64.
        scale_indices: uint8 [rows, columns / 16], below 27.
        depth: 1 to 4.
        thread_pool: the threads to use; None for all cores.

    Returns:
        uint8 [rows, bytes of a row], as in `docs/format.md`.

    """
    rows, columns = levels.shape
    words = np.empty((rows, columns // BLOCK_SIZE * WORDS_PER_BLOCK[depth]), np.uint16)
    # Contiguous arrays only, so that Numba compiles one version.
    groups = np.ascontiguousarray(levels).reshape(rows, -1, GROUP_SIZE)
    (thread_pool or default_thread_pool()).run(_PACKERS[depth], groups, np.ascontiguousarray(scale_indices), words)
    return words.view(np.uint8)


@numba.njit(cache=True, inline="always")
def _word(code):
    """Return the word for ten trits, given as an integer below 3**10: a fixed-point fraction."""
    return np.uint16((code * 65536 + TRIT_CODES - 1) // TRIT_CODES)


@numba.njit(cache=True, nogil=True)
def _pack_1(levels, scale_indices, words, thread, threads):
    rows, groups, _ = levels.shape
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            u = levels[r, g]
            first, second = 0, 0
            for p in range(8):
                first = first * 3 + u[p]
                second = second * 3 + u[8 + p]
            index = np.int64(scale_indices[r, g])
            words[r, 2 * g] = _word(first * 9 + index // 3)
            words[r, 2 * g + 1] = _word((second * 3 + index % 3) * 3)


@numba.njit(cache=True, nogil=True)
def _pack_2(levels, scale_indices, words, thread, threads):
    rows, groups, _ = levels.shape
    b, c = 2 * groups, 3 * groups
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            u = levels[r, g]
            first, second = 0, 0
            for p in range(5):
                first = first * 9 + u[p]
                second = second * 9 + u[8 + p]
            words[r, 2 * g] = _word(first)
            words[r, 2 * g + 1] = _word(second)
            words[r, b + g] = _word((((np.int64(u[5]) * 9 + u[13]) * 9 + u[6]) * 9 + u[14]) * 9 + u[7])
        for pair in range(groups // 2):
            g = 2 * pair
            last = np.int64(levels[r, g, 15]) * 9 + levels[r, g + 1, 15]
            words[r, c + pair] = _word((last * 27 + scale_indices[r, g]) * 27 + scale_indices[r, g + 1])


@numba.njit(cache=True, inline="always")
def _three_digits(u, p):
    """Join three digits of radix 27."""
    return (np.int64(u[p]) * 27 + u[p + 1]) * 27 + u[p + 2]


@numba.njit(cache=True, nogil=True)
def _pack_3(levels, scale_indices, words, thread, threads):
    rows, groups, _ = levels.shape
    a1, b, d = 2 * groups, 4 * groups, 5 * groups
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            u = levels[r, g]
            last, index = np.int64(u[15]), np.int64(scale_indices[r, g])
            words[r, 2 * g] = _word(_three_digits(u, 0) * 3 + last // 9)
            words[r, 2 * g + 1] = _word(_three_digits(u, 8) * 3 + last // 3 % 3)
            words[r, a1 + 2 * g] = _word(_three_digits(u, 3) * 3 + last % 3)
            words[r, a1 + 2 * g + 1] = _word(_three_digits(u, 11) * 3 + index // 9)
            words[r, b + g] = _word(((np.int64(u[6]) * 27 + u[14]) * 27 + u[7]) * 3 + index // 3 % 3)
        for quad in range(groups // 4):
            code = 0
            for g in range(4 * quad, 4 * quad + 4):
                code = code * 3 + scale_indices[r, g] % 3
            words[r, d + quad] = _word(code * 729)


@numba.njit(cache=True, nogil=True)
def _pack_4(levels, scale_indices, words, thread, threads):
    rows, groups, _ = levels.shape
    c, d = 6 * groups, 6 * groups + groups // 2
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for g in range(groups):
            u = levels[r, g]
            split = (np.int64(u[6]), np.int64(u[14]), np.int64(u[7]))
            for w in range(3):
                a = 2 * groups * w + 2 * g
                first = np.int64(u[2 * w]) * 81 + u[2 * w + 1]
                second = np.int64(u[8 + 2 * w]) * 81 + u[9 + 2 * w]
                words[r, a] = _word(first * 9 + split[w] // 9)
                words[r, a + 1] = _word(second * 9 + split[w] % 9)
        for pair in range(groups // 2):
            g = 2 * pair
            last = np.int64(levels[r, g, 15]) * 81 + levels[r, g + 1, 15]
            high = scale_indices[r, g] // 9 * 3 + scale_indices[r, g + 1] // 9
            words[r, c + pair] = _word(last * 9 + high)
        for quad in range(groups // 4):
            code = 0
            for g in range(4 * quad, 4 * quad + 4):
                code = code * 9 + scale_indices[r, g] % 9
            words[r, d + quad] = _word(code * 9)


_PACKERS = {1: _pack_1, 2: _pack_2, 3: _pack_3, 4: _pack_4}
