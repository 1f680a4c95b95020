"""Matrix times a batch of vectors: the prefill kernels.

Sixteen packed rows at a time are unpacked into a tile that a register-tiled integer micro-kernel multiplies with
all vectors of the batch: the same int16 products and integer sums as in `gemv`, so both give the same numbers up to
the order of the float additions over the groups.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.layout import BLOCK_TOKENS, PAIRS
from cpu_kernels.simd import FLOAT, HALF, I16, I32, I64, Vectors, vector
from cpu_kernels.unpack import TILE_ROWS, unpack_tile

_TOKENS_8, _TOKENS_4, _TOKENS_1 = ((0,) * 8, (0,) * 4, (0,))  # tokens of one micro-kernel call, as a type


@intrinsic
def _tile_dot(typing_context, isa, tile, tile_steps, pairs, offsets, scales, out, groups):
    """Emit a tile of 16 rows times a block of 8 tokens; addresses as integers.

    tile int16 [groups, 8, 16, 2], tile_steps float32 [groups, 16], pairs int16 [groups, 8, 8 tokens, 2], offsets int32
    [groups, 8 tokens], scales float32 [groups, 8 tokens], out float32 [8 tokens, 16]. All offsets within a group are
    constants: computed ones form a chain of additions longer than the multiplications.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        tile, tile_steps, pairs, offsets, scales, out, groups = arguments[1:]
        totals = [cgutils.alloca_once(builder, vector(FLOAT, TILE_ROWS)) for _ in range(BLOCK_TOKENS)]
        for total in totals:
            builder.store(vectors.constant(FLOAT, 0.0, TILE_ROWS), total)
        with cgutils.for_range(builder, groups) as loop:

            def group(base, n_bytes):
                return builder.add(base, builder.mul(loop.index, I64(n_bytes)))

            tile_group, x_group = group(tile, 4 * PAIRS * TILE_ROWS), group(pairs, 4 * PAIRS * BLOCK_TOKENS)
            offset_group, scale_group = group(offsets, 4 * BLOCK_TOKENS), group(scales, 4 * BLOCK_TOKENS)
            sums = [vectors.splat(offset_group, I32, TILE_ROWS, 4 * token) for token in range(BLOCK_TOKENS)]
            for pair in range(PAIRS):
                weights = vectors.load(tile_group, I16, 2 * TILE_ROWS, 4 * pair * TILE_ROWS)
                for token in range(BLOCK_TOKENS):
                    both = vectors.splat(x_group, I32, TILE_ROWS, 4 * (pair * BLOCK_TOKENS + token))
                    x = builder.bitcast(both, vector(I16, 2 * TILE_ROWS))
                    sums[token] = vectors.dot_pairs(sums[token], weights, x)
            steps = vectors.load(group(tile_steps, 4 * TILE_ROWS), FLOAT, TILE_ROWS)
            for token, total in enumerate(totals):
                scale = builder.fmul(steps, vectors.splat(scale_group, FLOAT, TILE_ROWS, 4 * token))
                builder.store(vectors.fma(vectors.to_float(sums[token]), scale, builder.load(total)), total)
        for token, total in enumerate(totals):
            vectors.store(builder.load(total), out, 4 * token * TILE_ROWS)
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 7), generate


@intrinsic
def _widen_halves(typing_context, isa, source, target, count):
    """Emit the conversion of `count` float16 at `source` to float32 at `target`."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        source, target, count = arguments[1:]
        for lanes, start, end in (
            (16, I64(0), builder.and_(count, I64(-16))),
            (1, builder.and_(count, I64(-16)), count),
        ):
            with cgutils.for_range_slice(builder, start, end, I64(lanes), I64) as (index, _):
                halves = vectors.load(builder.add(source, builder.mul(index, I64(2))), HALF, lanes)
                floats = builder.fpext(halves, vector(FLOAT, lanes))
                vectors.store(floats, builder.add(target, builder.mul(index, I64(4))))
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 3), generate


@numba.njit(cache=True)
def _multiply_tile(isa, kind, tile, tile_steps, pairs, offsets, scales, out, y, first_column, rows):
    """Multiply one tile with all tokens: y[:, first_column : first_column + rows]."""
    for block in range(len(scales)):
        _tile_dot(
            isa,
            tile.ctypes.data,
            tile_steps.ctypes.data,
            pairs[block].ctypes.data,
            offsets[block, kind - 1].ctypes.data,
            scales[block].ctypes.data,
            out.ctypes.data,
            scales.shape[1],
        )
        first = block * BLOCK_TOKENS
        for t in range(first, min(first + BLOCK_TOKENS, len(y))):
            for r in range(rows):
                y[t, first_column + r] = out[t - first, r]


@numba.njit(cache=True, nogil=True)
def trit_gemm(isa, words, rows, kind, steps, pairs, offsets, scales, y, first_column, thread, threads):
    """Compute a thread's share of a packed matrix times a batch.

    Args:
        isa: the instruction set.
        words: uint16, the packed rows.
        rows: how many.
        kind: their depth.
        steps: float32 [32], codebook / h, padded.
        pairs, offsets, scales: a batch as `quantize_batch` makes it.
        y: float32 [tokens, ...], out, from column `first_column` on.
        first_column: where this matrix's results begin.
        thread, threads: which of how many shares of the rows to compute.

    """
    groups = scales.shape[1]
    packed = words.reshape(rows, -1)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    turned = np.zeros((packed.shape[1], TILE_ROWS), np.uint16)
    indices = np.empty((groups, TILE_ROWS), np.uint8)
    tile = np.empty((groups, PAIRS, TILE_ROWS, 2), np.int16)
    tile_steps = np.empty((groups, TILE_ROWS), np.float32)
    out = np.empty((BLOCK_TOKENS, TILE_ROWS), np.float32)
    for number in range(tiles * thread // threads, tiles * (thread + 1) // threads):
        first = number * TILE_ROWS
        last = min(first + TILE_ROWS, rows)
        unpack_tile(packed[first:last], kind, turned, tile, indices)
        for g in range(groups):
            for r in range(TILE_ROWS):
                tile_steps[g, r] = steps[indices[g, r]]
        _multiply_tile(isa, kind, tile, tile_steps, pairs, offsets, scales, out, y, first_column + first, last - first)


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def _dot(a, b):
    total = np.float32(0.0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@numba.njit(cache=True, nogil=True)
def half_gemm(isa, halves, rows, x, y, first_column, thread, threads):
    """Compute a thread's share of a float16 matrix times a batch.

    Args:
        isa: the instruction set.
        halves: uint16 [rows * columns], the float16 weights.
        rows: how many.
        x: float32 [tokens, columns].
        y, first_column, thread, threads: as in `trit_gemm`.

    """
    columns = x.shape[1]
    row = np.empty(columns, np.float32)
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        _widen_halves(isa, halves[r * columns : (r + 1) * columns].ctypes.data, row.ctypes.data, columns)
        for t in range(len(x)):
            y[t, first_column + r] = _dot(row, x[t])
