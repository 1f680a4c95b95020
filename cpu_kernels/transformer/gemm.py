"""Matrix times a batch of vectors: the prefill kernels.

Sixteen packed rows at a time are unpacked into a tile that a register-tiled integer micro-kernel multiplies with
all vectors of the batch: the same int16 products and integer sums as in `gemv`, so both give the same numbers up to
the order of the float additions over the groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import D3, D4
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, BLOCK_TOKENS, GROUP_SIZE, TILE_ROWS
from cpu_kernels.packed_rows.unpack import unpack_tile
from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512, AVX512_NO_VNNI, PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I16, I32, I64, Vectors, vector
from cpu_kernels.transformer.gemv_batch import multiply_half_rows, scratch_floats

_HALVES = 2  # of a tile: vectors of 16 rows
_TILE = _HALVES * TILE_ROWS
# Vectors of rows, and tokens, whose sums stay in registers together, for each instruction set
_REGISTER_TILE = {PORTABLE: (2, 3), AVX2: (2, 3), AVX2_VNNI: (2, 3), AVX512_NO_VNNI: (2, 6), AVX512: (2, 6)}
# What is unpacked at once, so that it stays in the second-level cache while all tokens pass: 256 rows of 1,536 columns
_PANEL_TILES = 8
_PANEL_GROUPS = 96
# A number of tokens as a type, see `instruction_set`
T1, T2, T3, T4, T5, T6 = ((0,), (0,) * 2, (0,) * 3, (0,) * 4, (0,) * 5, (0,) * 6)
_DEPTH_OF_PAIRS = 3  # up to it a group's products of 8-bit numbers, added in pairs, fit 16 bits: 8 * 26 * 127


@intrinsic
def _tile_dot(
    typing_context, isa, depth, count, tile, tile_steps, integers, offsets, scales, out, token_bytes, groups, add
):
    """Emit a tile of 32 rows times tokens of a block, added to `out` or put there; addresses and numbers as integers.

    count: how many tokens, as a type; the addresses are those of the first one.

    tile int16 [2, groups, 8, 16, 2] or int8 [2, groups, 4, 16, 4], tile_steps float32 [2, groups, 16], integers int16
    [groups, 8, 6 tokens, 2] or int8 [groups, 4, 6 tokens, 4] (the array itself, for its type), offsets int32 [groups,
    6 tokens], scales float32 [groups, 6 tokens], out float32 [tokens, 32], a token every `token_bytes`.
    """
    bits = integers.dtype.bitwidth
    halves_at_once, tokens_at_once = _REGISTER_TILE[isa.count]

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        tile, tile_steps, integers_array, offsets, scales, out, token_bytes, groups, add = arguments[3:]
        x = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        for halves in _chunks(_HALVES, halves_at_once):
            for tokens in _chunks(count.count, tokens_at_once):
                places = [
                    (builder.add(out, builder.mul(token_bytes, I64(token))), 4 * half * TILE_ROWS)
                    for token in tokens
                    for half in halves
                ]
                totals = [cgutils.alloca_once(builder, vector(FLOAT, TILE_ROWS)) for _ in places]
                for total in totals:
                    builder.store(vectors.constant(FLOAT, 0.0, TILE_ROWS), total)
                with builder.if_then(add):
                    for total, place in zip(totals, places, strict=True):
                        builder.store(vectors.load(place[0], FLOAT, TILE_ROWS, place[1]), total)
                with cgutils.for_range(builder, groups) as loop:
                    group = _Group(vectors, depth.count, bits, groups, loop.index)
                    sums = group.sums(tile, x, offsets, halves, tokens)
                    group.add(sums, tile_steps, scales, halves, tokens, totals)
                for total, place in zip(totals, places, strict=True):
                    vectors.store(builder.load(total), *place)
        return context.get_dummy_value()

    numbers = [types.intp] * 5
    return types.void(isa, depth, count, types.intp, types.intp, integers, *numbers, types.boolean), generate


def _chunks(count: int, size: int) -> list[range]:
    """Cut range(count) into ranges of `size`."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class _Group:
    """Emits what happens to one group of columns in `_tile_dot`.

    All offsets within a group are constants: computed ones form a chain of additions longer than the multiplications.
    """

    def __init__(self, vectors: Vectors, depth: int, bits: int, groups: ir.Value, index: ir.Value) -> None:
        self._vectors, self._depth, self._bits = vectors, depth, bits
        self._groups, self._index = groups, index

    def _address(self, base: ir.Value, n_bytes: int, half: int = 0) -> ir.Value:
        """Return where the group's `n_bytes` lie in an array, or in a half of the tile."""
        builder = self._vectors.builder
        start = builder.mul(self._groups, I64(half * n_bytes))
        return builder.add(builder.add(base, start), builder.mul(self._index, I64(n_bytes)))

    def sums(self, tile: ir.Value, x: ir.Value, offsets: ir.Value, halves: range, tokens: range) -> list[ir.Value]:
        """Return the integer sums of the group, token by token: <16 x i32>."""
        vectors, bits = self._vectors, self._bits
        element, lanes = ir.IntType(bits), TILE_ROWS * 32 // bits
        in_pairs = bits == 8 and self._depth <= _DEPTH_OF_PAIRS and vectors.isa in (AVX2, AVX512_NO_VNNI)
        tile_bytes, x_bytes = (count * GROUP_SIZE * bits // 8 for count in (TILE_ROWS, BLOCK_TOKENS))
        tiles = [self._address(tile, tile_bytes, half) for half in halves]
        group_x, group_offsets = self._address(x, x_bytes), self._address(offsets, 4 * BLOCK_TOKENS)
        sums = [vectors.splat(group_offsets, I32, TILE_ROWS, 4 * token) for token in tokens for _ in halves]
        pairs: list[ir.Value | None] = [None] * len(sums)
        for step in range(GROUP_SIZE * bits // 32):
            weights = [vectors.load(address, element, lanes, 4 * step * TILE_ROWS) for address in tiles]
            for number, token in enumerate(tokens):
                unit = vectors.splat(group_x, I32, TILE_ROWS, 4 * (step * BLOCK_TOKENS + token))
                unit = vectors.builder.bitcast(unit, vector(element, lanes))
                for place, levels in enumerate(weights, number * len(halves)):
                    if in_pairs:
                        products = vectors.multiply_quads(levels, unit)
                        pairs[place] = products if step == 0 else vectors.builder.add(pairs[place], products)
                    elif bits == 8:
                        sums[place] = vectors.dot_quads(sums[place], levels, unit)
                    else:
                        sums[place] = vectors.dot_pairs(sums[place], levels, unit)
        if in_pairs:
            ones = vectors.constant(I16, 1, 2 * TILE_ROWS)
            return [vectors.dot_pairs(total, pair, ones) for total, pair in zip(sums, pairs, strict=True)]
        return sums

    def add(
        self,
        sums: Sequence[ir.Value],
        tile_steps: ir.Value,
        scales: ir.Value,
        halves: range,
        tokens: range,
        totals: Sequence[ir.Value],
    ) -> None:
        """Scale the sums and add them to the totals: places of <16 x float>."""
        vectors, builder = self._vectors, self._vectors.builder
        steps = [vectors.load(self._address(tile_steps, 4 * TILE_ROWS, half), FLOAT, TILE_ROWS) for half in halves]
        group_scales = self._address(scales, 4 * BLOCK_TOKENS)
        units = [vectors.splat(group_scales, FLOAT, TILE_ROWS, 4 * token) for token in tokens]
        for (unit, step), integer, total in zip(itertools.product(units, steps), sums, totals, strict=True):
            sum_ = vectors.fma(vectors.to_float(integer), builder.fmul(step, unit), builder.load(total))
            builder.store(sum_, total)


@numba.njit(cache=True)
def _multiply_tile(isa, depth, tile, tile_steps, integers, offsets, scales, out, y, first_token, add):
    """Put one tile times the tokens of one block into y [tokens, rows of the tile], or add it."""
    tokens, rows = min(BLOCK_TOKENS, len(y) - first_token), y.shape[1]
    target = y[first_token:]
    whole = rows == _TILE
    if add and not whole:
        for t in range(tokens):
            for r in range(rows):
                out[t, r] = target[t, r]
    weights = tile.ctypes.data, tile_steps.ctypes.data
    end, row = target.ctypes.data if whole else out.ctypes.data, target.strides[0] if whole else out.strides[0]
    rest = offsets.ctypes.data, scales.ctypes.data, end, row, len(scales), add
    if tokens == 6:
        _tile_dot(isa, depth, T6, *weights, integers, *rest)
    elif tokens == 5:
        _tile_dot(isa, depth, T5, *weights, integers, *rest)
    elif tokens == 4:
        _tile_dot(isa, depth, T4, *weights, integers, *rest)
    elif tokens == 3:
        _tile_dot(isa, depth, T3, *weights, integers, *rest)
    elif tokens == 2:
        _tile_dot(isa, depth, T2, *weights, integers, *rest)
    else:
        _tile_dot(isa, depth, T1, *weights, integers, *rest)
    if not whole:
        for t in range(tokens):
            for r in range(rows):
                target[t, r] = out[t, r]


@numba.njit(cache=True)
def _unpack_panel(isa, rows, kind, some, steps, turned, tile, indices, tile_steps):
    """Unpack some groups, a slice, of a panel's rows, sixteen by sixteen."""
    for start in range(0, len(rows), TILE_ROWS):
        part = rows[start : min(start + TILE_ROWS, len(rows))]
        number, half = start // _TILE, start // TILE_ROWS % _HALVES
        block = some.start * GROUP_SIZE // BLOCK_SIZE
        unpack_tile(isa, part, kind, block, steps, turned, tile[number, half], indices, tile_steps[number, half])


@numba.njit(cache=True, nogil=True)
def trit_gemm(isa, words, rows, kind, steps, integers, offsets, scales, y, first_column, thread, threads):
    """Compute a thread's share of a packed matrix times a batch.

    Args:
        isa: the instruction set.
        words: uint16, the packed rows.
        rows: how many.
        kind: their depth.
        steps: float32 [32], codebook / h, padded.
        integers, offsets, scales: a batch as `quantize_batch` makes it.
        y: float32 [tokens, ...], out, from column `first_column` on.
        first_column: where this matrix's results begin.
        thread, threads: which of how many shares of the rows to compute.

    """
    groups, blocks = scales.shape[1], len(scales)
    packed = words.reshape(rows, -1)
    tiles = (rows + _TILE - 1) // _TILE
    first, last = tiles * thread // threads * _TILE, min(tiles * (thread + 1) // threads * _TILE, rows)
    panel_rows = _TILE * _PANEL_TILES
    width = min(_PANEL_GROUPS, groups)
    out = np.zeros((BLOCK_TOKENS, _TILE), np.float32)
    turned = np.zeros(packed.shape[1] * width // groups * TILE_ROWS, np.uint16)
    indices = np.empty((width, TILE_ROWS), np.uint8)
    all_steps = np.zeros(panel_rows * width, np.float32)
    all_levels = np.zeros(panel_rows * width * integers.shape[2] * integers.shape[4], integers.dtype)
    for panel in range(first, last, panel_rows):
        end = min(panel + panel_rows, last)
        for first_group in range(0, groups, _PANEL_GROUPS):
            some = slice(first_group, min(first_group + _PANEL_GROUPS, groups))
            width = some.stop - some.start
            shape = (panel_rows // _TILE, _HALVES, width, integers.shape[2], TILE_ROWS, integers.shape[4])
            tile = all_levels[: panel_rows * width * shape[3] * shape[5]].reshape(shape)
            tile_steps = all_steps[: panel_rows * width].reshape((*shape[:3], TILE_ROWS))
            own_turned = turned[: packed.shape[1] * width // groups * TILE_ROWS]
            _unpack_panel(isa, packed[panel:end], kind, some, steps, own_turned, tile, indices[:width], tile_steps)
            for block in range(blocks):
                x, sums, units = integers[block, some], offsets[block, kind - 1, some], scales[block, some]
                for start in range(panel, end, _TILE):
                    number = (start - panel) // _TILE
                    result = y[:, first_column + start : first_column + min(start + _TILE, end)]
                    token, add = block * BLOCK_TOKENS, first_group > 0
                    arguments = (tile[number], tile_steps[number], x, sums, units, out, result, token, add)
                    if kind <= _DEPTH_OF_PAIRS:
                        _multiply_tile(isa, D3, *arguments)
                    else:
                        _multiply_tile(isa, D4, *arguments)


@numba.njit(cache=True, nogil=True)
def half_gemm(isa, halves, rows, x, y, first_column, thread, threads):
    """Compute a thread's share of a float16 matrix times a batch; each result is what `gemv` gives, to the bit.

    Args:
        isa: the instruction set.
        halves: uint16 [rows * columns], the float16 weights.
        rows: how many.
        x: float32 [tokens, columns].
        y, first_column, thread, threads: as in `trit_gemm`.

    """
    scratch = np.empty(scratch_floats(x.shape[1]), np.float32)
    first, last = rows * thread // threads, rows * (thread + 1) // threads
    out = y[:, first_column : first_column + rows]
    multiply_half_rows(isa, halves.ctypes.data, x, out, first, last, scratch)
