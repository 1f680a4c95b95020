"""Unpacking: packed rows -> levels, scale indices and weights.

Sixteen rows are unpacked at a time: their words are transposed, so that each row is a lane of the vector operations
that extract the digits.

No word decodes to a level or a scale index out of range: a digit of radix r is (fraction * r) >> 16, which is below r
for every 16-bit fraction. So damaged data gives wrong numbers, but never an access out of bounds.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import D1, D2, D3, D4, EXTRACT, RowLanes
from cpu_kernels.packed_rows.layout import (
    BLOCK_SIZE,
    GROUP_SIZE,
    PAIRS,
    QUADS,
    TABLE_SIZE,
    TILE_ROWS,
    WORDS_PER_BLOCK,
    level_offset,
)
from cpu_kernels.simd.transpose import transpose
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I8, I16, I32, I64, Vectors, vector
from cpu_kernels.threads.thread_pool import ThreadPool, default_thread_pool

_CACHE_LINE = 64
_PAIRED = 8
# Words per block in each plane of a row, by depth; planes with 8 have two words per group.
_PLANES = np.array([[0] * 5, [8, 0, 0, 0, 0], [8, 4, 2, 0, 0], [8, 8, 4, 1, 0], [8, 8, 8, 2, 1]])


def unpack(rows: np.ndarray, depth: int, thread_pool: ThreadPool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unpack rows: the inverse of `pack`.

    Args:
        rows: uint8 [rows, bytes of a row].
        depth: 1 to 4.
        thread_pool: the threads to use; None for all cores.

    Returns:
        levels uint8 [rows, columns] (level + h) and scale indices uint8 [rows, columns / 16].

    """
    words = rows.view(np.uint16)
    words.flags.writeable = False  # like arrays of a mapped file, so that Numba compiles one version only
    groups = words.shape[1] // WORDS_PER_BLOCK[depth] * (BLOCK_SIZE // GROUP_SIZE)
    levels = np.empty((len(rows), groups, GROUP_SIZE), np.uint8)
    indices = np.empty((len(rows), groups), np.uint8)
    thread_pool = thread_pool or default_thread_pool()
    thread_pool.run(_unpack_rows, thread_pool.isa, words, depth, levels, indices)
    return levels.reshape(len(rows), -1), indices


def dequantize(rows: np.ndarray, codebook: np.ndarray, depth: int, thread_pool: ThreadPool | None = None) -> np.ndarray:
    """Dequantize packed rows.

    A weight is step * level, rounded once to float32, where step = scale / h, rounded once to float32
    (`docs/format.md` section 4).

    Args:
        rows: uint8 [rows, bytes of a row].
        codebook: float32 [27], the scales: a scale is the magnitude of level h.
        depth: 1 to 4.
        thread_pool: the threads to use; None for all cores.

    Returns:
        float32 [rows, columns].

    """
    levels, indices = unpack(rows, depth, thread_pool)
    weights = np.empty(levels.shape, np.float32)
    steps = codebook / np.float32(level_offset(depth))
    (thread_pool or default_thread_pool()).run(_scale_rows, levels, indices, steps, level_offset(depth), weights)
    return weights


@numba.njit(cache=True, nogil=True)
def _unpack_rows(isa, rows, depth, levels, indices, thread, threads):
    groups = indices.shape[1]
    transposed = np.zeros(rows.shape[1] * TILE_ROWS, np.uint16)
    tile = np.empty((groups, QUADS, TILE_ROWS, 4), np.int8)
    tile_indices = np.empty((groups, TILE_ROWS), np.uint8)
    steps, tile_steps = np.zeros(TABLE_SIZE, np.float32), np.empty((groups, TILE_ROWS), np.float32)
    for first in range(TILE_ROWS * thread, len(rows), TILE_ROWS * threads):
        last = min(first + TILE_ROWS, len(rows))
        unpack_tile(isa, rows[first:last], depth, 0, steps, transposed, tile, tile_indices, tile_steps)
        for r in range(first, last):
            for g in range(groups):
                indices[r, g] = tile_indices[g, r - first]
                for p in range(GROUP_SIZE):
                    levels[r, g, p] = tile[g, p % PAIRS // 2, r - first, p % 2 + p // PAIRS * 2]


@numba.njit(cache=True, nogil=True)
def _scale_rows(levels, indices, steps, offset, weights, thread, threads):
    rows, columns = levels.shape
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        for k in range(columns):
            weights[r, k] = steps[indices[r, k // GROUP_SIZE]] * np.float32(np.int32(levels[r, k]) - offset)


@intrinsic
def _unpack_groups(typing_context, isa, depth, transposed, groups, tile, indices, steps, tile_steps):
    """Emit the unpacking of transposed words, see `unpack_tile`; arrays but `tile` are given as addresses."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        transposed, groups, tile_array, indices, steps, tile_steps = arguments[2:]
        address = builder.ptrtoint(context.make_array(tile)(context, builder, tile_array).data, I64)
        table = [vectors.load(steps, FLOAT, TILE_ROWS), vectors.load(steps, FLOAT, TILE_ROWS, offset=64)]
        bits = tile.dtype.bitwidth
        with cgutils.for_range(builder, builder.lshr(groups, I64(2))) as loop:
            for group_in_block in range(BLOCK_SIZE // GROUP_SIZE):
                group = builder.add(builder.shl(loop.index, I64(2)), I64(group_in_block))
                tile_group = builder.add(address, builder.mul(group, I64(TILE_ROWS * GROUP_SIZE * bits // 8)))
                step = RowLanes(vectors, transposed, groups, loop.index, group_in_block, tile_group, bits)
                entries = EXTRACT[depth.count](step)
                bytes_of_entries = builder.trunc(entries, vector(I8, TILE_ROWS))
                vectors.store(bytes_of_entries, builder.add(indices, builder.mul(group, I64(TILE_ROWS))))
                values = vectors.lookup(table, steps, entries)
                vectors.store(values, builder.add(tile_steps, builder.mul(group, I64(4 * TILE_ROWS))))
        return context.get_dummy_value()

    numbers = [types.intp] * 3
    return types.void(isa, depth, types.intp, types.intp, tile, *numbers), generate


@intrinsic
def _prefetch(typing_context, address):
    """Emit a prefetch of an address, which may be invalid."""

    def generate(context, builder, signature, arguments):
        Vectors(builder, PORTABLE).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@numba.njit(cache=True)
def _prefetch_next(rows, first_word, words):
    """Prefetch the same words of the next 16 rows: they are short pieces, which the hardware does not prefetch.

    Without it, a prompt of 512 tokens took 5 % longer.
    """
    row_bytes = rows.strides[0]
    start = rows.ctypes.data + TILE_ROWS * row_bytes + 2 * first_word
    for r in range(TILE_ROWS):
        for offset in range(0, 2 * words, _CACHE_LINE):
            _prefetch(start + r * row_bytes + offset)


def _transposing(pairs, paired):
    """Return an intrinsic that transposes pairs of words of 16 rows.

    Args:
        pairs: how many of each row, 16 or 8.
        paired: whether the words of a pair stay neighbours, or all rows' first words precede all second words.

    The intrinsic takes the address of the first row's words, the row stride in bytes, and the address of the result:
    uint16 [pairs, 16 rows, 2] if `paired`, else [pairs, 2, 16 rows].

    """

    @intrinsic
    def emit(typing_context, source, row_bytes, target):
        def generate(context, builder, signature, arguments):
            vectors = Vectors(builder, PORTABLE)
            source, row_bytes, target = arguments
            rows = []
            for _ in range(TILE_ROWS):
                row = vectors.load(source, I32, pairs)
                rows.append(row if pairs == TILE_ROWS else vectors.join(row, row))
                source = builder.add(source, row_bytes)
            for pair, column in enumerate(transpose(vectors, rows)[:pairs]):
                offset = 4 * TILE_ROWS * pair
                if paired:
                    vectors.store(column, target, offset)
                    continue
                second = builder.lshr(column, vectors.constant(I32, 16, TILE_ROWS))
                vectors.store(builder.trunc(column, vector(I16, TILE_ROWS)), target, offset)
                vectors.store(builder.trunc(second, vector(I16, TILE_ROWS)), target, offset + 2 * TILE_ROWS)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), generate

    return emit


_transpose_16_pairs, _transpose_8_pairs = _transposing(16, True), _transposing(8, True)
_transpose_32_words, _transpose_16_words = _transposing(16, False), _transposing(8, False)


@numba.njit(cache=True)
def _transpose_plane(rows, paired, first_word, words, transposed):
    """Transpose `words` words of up to 16 rows, from `first_word` on.

    transposed: uint16 [words / 2, 16 rows, 2] if `paired`, else [words, 16 rows], out.
    """
    done = 0
    if len(rows) == TILE_ROWS:
        source, target = rows.ctypes.data + 2 * first_word, transposed.ctypes.data
        while done + 16 <= words:
            count = 32 if done + 32 <= words else 16
            start, end = source + 2 * done, target + 2 * TILE_ROWS * done
            if paired:
                if count == 32:
                    _transpose_16_pairs(start, rows.strides[0], end)
                else:
                    _transpose_8_pairs(start, rows.strides[0], end)
            elif count == 32:
                _transpose_32_words(start, rows.strides[0], end)
            else:
                _transpose_16_words(start, rows.strides[0], end)
            done += count
    for w in range(done, words):
        for r in range(len(rows)):
            index = (w // 2 * TILE_ROWS + r) * 2 + w % 2 if paired else w * TILE_ROWS + r
            transposed[index] = rows[r, first_word + w]


@numba.njit(cache=True)
def _transpose(rows, depth, first_block, transposed):
    """Transpose all words of some blocks of up to 16 rows; planes with two words per group are transposed in pairs."""
    words_per_block = _PLANES[depth].sum()
    blocks, count = rows.shape[1] // words_per_block, len(transposed) // TILE_ROWS // words_per_block
    start = target = 0
    for words in _PLANES[depth]:
        source = start + first_block * words
        _prefetch_next(rows, source, count * words)
        _transpose_plane(rows, words == _PAIRED, source, count * words, transposed[target:])
        target += count * words * TILE_ROWS
        start += blocks * words


@numba.njit(cache=True)
def unpack_tile(isa, rows, depth, first_block, steps, transposed, tile, indices, tile_steps):
    """Unpack some blocks of up to 16 rows.

    Args:
        isa: the instruction set.
        rows: uint16 [rows, words of a row].
        depth: 1 to 4.
        first_block: the first block to unpack; the shape of the outputs gives the number of blocks.
        steps: float32 [32], codebook / h, padded.
        transposed: uint16 [words of the blocks * 16], scratch; lanes beyond the last row are not initialized.
        tile: int16 [groups, 8, 16 rows, 2], out: level + h of weights j and j + 8 of a group; or int8
            [groups, 4, 16 rows, 4]: of weights 2 j, 2 j + 1, 2 j + 8 and 2 j + 9.
        indices: uint8 [groups, 16 rows], out: scale indices.
        tile_steps: float32 [groups, 16 rows], out: the groups' steps.

    """
    groups = len(indices)
    words = transposed.ctypes.data
    out = (indices.ctypes.data, steps.ctypes.data, tile_steps.ctypes.data)
    _transpose(rows, depth, first_block, transposed)
    if depth == 1:
        _unpack_groups(isa, D1, words, groups, tile, *out)
    elif depth == 2:
        _unpack_groups(isa, D2, words, groups, tile, *out)
    elif depth == 3:
        _unpack_groups(isa, D3, words, groups, tile, *out)
    else:
        _unpack_groups(isa, D4, words, groups, tile, *out)
