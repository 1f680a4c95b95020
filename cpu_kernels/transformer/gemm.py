"""Matrix times a batch of vectors: the prefill kernels.

Sixteen packed rows at a time are unpacked into a tile that a register-tiled integer micro-kernel multiplies with
all vectors of the batch: the same int16 products and integer sums as in `gemv`, so both give the same numbers up to
the order of the float additions over the groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, BLOCK_TOKENS, GROUP_SIZE, TILE_ROWS
from cpu_kernels.packed_rows.unpack import unpack_tile
from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512, AVX512_NO_VNNI, NEON_DOTPROD, PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I16, I32, I64, Vectors, vector
from cpu_kernels.transformer.gemv_batch import multiply_half_rows, scratch_floats

_TILE = 2 * TILE_ROWS
_TILE_FLOATS = BLOCK_TOKENS * _TILE
# What is unpacked at once, so that it stays in the second-level cache while all tokens pass: 256 rows of 1,536 columns
_PANEL_TILES = 8
_PANEL_GROUPS = 96
_ALIGNMENT = 64
_DEPTH_OF_PAIRS = 3  # up to it a group's products of 8-bit numbers, added in pairs, fit 16 bits: 8 * 26 * 127


class _RegisterTile(NamedTuple):
    """What one loop over the groups multiplies: its sums and totals stay in registers."""

    lanes: int  # rows to a vector
    vectors: int
    tokens: int


_REGISTER_TILES = {
    PORTABLE: _RegisterTile(16, 2, 3),
    NEON_DOTPROD: _RegisterTile(4, 4, 3),
    AVX2: _RegisterTile(8, 1, 6),
    AVX2_VNNI: _RegisterTile(8, 2, 3),
    AVX512_NO_VNNI: _RegisterTile(16, 1, 6),
    AVX512: _RegisterTile(16, 2, 6),
}


@intrinsic
def _tile_dot(
    typing_context, isa, integers, tile, tile_steps, x, offsets, scales, out, token_bytes, groups, tokens, depth, add
):
    """Emit a tile of 32 rows times up to six tokens of a block, added to `out` or put there.

    All but `integers`, which gives its type, are addresses and numbers: tile int16 [2, groups, 8, 16, 2] or int8
    [2, groups, 4, 16, 4], tile_steps float32 [2, groups, 16], x int16 [groups, 8, 6 tokens, 2] or int8 [groups, 4, 6
    tokens, 4], offsets int32 [groups, 6 tokens], scales float32 [groups, 6 tokens], out float32 [tokens, 32], a token
    every `token_bytes`.
    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        operands = _Operands(*arguments[2:9])
        groups, tokens, depth, add = arguments[9:]
        kinds = [False]
        if bits == 8 and isa.count in (AVX2, AVX512_NO_VNNI):
            kinds = [True, False]
        shallow = builder.icmp_signed("<=", depth, I64(_DEPTH_OF_PAIRS))
        for in_pairs, count in itertools.product(kinds, range(1, BLOCK_TOKENS + 1)):
            chosen = builder.icmp_signed("==", tokens, I64(count))
            if len(kinds) > 1:
                chosen = builder.and_(chosen, shallow if in_pairs else builder.not_(shallow))
            with builder.if_then(chosen):
                emitter = _TileDot(Vectors(builder, isa.count), bits, operands, groups, in_pairs=in_pairs)
                emitter.emit(count, add)
        return context.get_dummy_value()

    return types.void(isa, integers, *[types.intp] * 10, types.boolean), generate


class _Operands(NamedTuple):
    """Addresses and the output's row length, see `_tile_dot`."""

    tile: ir.Value
    steps: ir.Value
    x: ir.Value
    offsets: ir.Value
    scales: ir.Value
    out: ir.Value
    token_bytes: ir.Value


class _TileDot:
    """Emits the loops of `_tile_dot` for one number of tokens."""

    def __init__(self, vectors: Vectors, bits: int, operands: _Operands, groups: ir.Value, *, in_pairs: bool) -> None:
        """Multiply integers of `bits`; if `in_pairs`, a group's products are added in 16 bits."""
        self._vectors, self._bits, self._operands, self._groups = vectors, bits, operands, groups
        self._in_pairs = in_pairs
        self._shape = _REGISTER_TILES[vectors.isa]

    def emit(self, tokens: int, add: ir.Value) -> None:
        """Emit all rows times `tokens` tokens, register tile by register tile."""
        builder, shape = self._vectors.builder, self._shape
        rows = shape.lanes * shape.vectors
        with cgutils.for_range(builder, I64(_TILE // rows)) as loop:
            starts = [
                builder.add(builder.mul(loop.index, I64(rows)), I64(shape.lanes * number))
                for number in range(shape.vectors)
            ]
            for first in range(0, tokens, shape.tokens):
                self._emit_register_tile(starts, range(first, min(first + shape.tokens, tokens)), add)

    def _emit_register_tile(self, starts: Sequence[ir.Value], tokens: range, add: ir.Value) -> None:
        """Emit the vectors of rows that begin at rows `starts` times some tokens."""
        vectors, builder, (out, token_bytes) = self._vectors, self._vectors.builder, self._operands[5:]
        places = [
            builder.add(builder.add(out, builder.mul(token_bytes, I64(token))), builder.shl(start, I64(2)))
            for token in tokens
            for start in starts
        ]
        totals = [cgutils.alloca_once(builder, vector(FLOAT, self._shape.lanes)) for _ in places]
        for total in totals:
            builder.store(vectors.constant(FLOAT, 0.0, self._shape.lanes), total)
        with builder.if_then(add):
            for total, place in zip(totals, places, strict=True):
                builder.store(vectors.load(place, FLOAT, self._shape.lanes), total)
        with cgutils.for_range(builder, self._groups) as loop:
            sums = self._sums(loop.index, starts, tokens)
            self._add(loop.index, sums, starts, tokens, totals)
        for total, place in zip(totals, places, strict=True):
            vectors.store(builder.load(total), place)

    def _address(self, base: ir.Value, n_bytes: int, group: ir.Value) -> ir.Value:
        """Return where the group's `n_bytes` lie in an array.

        All offsets within a group are constants: computed ones form a chain of additions longer than the products.
        """
        builder = self._vectors.builder
        return builder.add(base, builder.mul(group, I64(n_bytes)))

    def _row_address(self, base: ir.Value, n_bytes: int, group: ir.Value, row: ir.Value) -> ir.Value:
        """Return where a group of `n_bytes` of the rows from `row` on lies in an array of two times 16 rows."""
        builder = self._vectors.builder
        half, rest = builder.lshr(row, I64(4)), builder.and_(row, I64(TILE_ROWS - 1))
        start = builder.add(builder.mul(half, builder.mul(self._groups, I64(n_bytes))), builder.shl(rest, I64(2)))
        return self._address(builder.add(base, start), n_bytes, group)

    def _sums(self, group: ir.Value, starts: Sequence[ir.Value], tokens: range) -> list[ir.Value]:
        """Return the integer sums of a group, token by token: <lanes x i32>."""
        vectors, bits, lanes = self._vectors, self._bits, self._shape.lanes
        element, elements = ir.IntType(bits), lanes * 32 // bits
        tile_bytes, x_bytes = (count * GROUP_SIZE * bits // 8 for count in (TILE_ROWS, BLOCK_TOKENS))
        tiles = [self._row_address(self._operands.tile, tile_bytes, group, start) for start in starts]
        x = self._address(self._operands.x, x_bytes, group)
        offsets = self._address(self._operands.offsets, 4 * BLOCK_TOKENS, group)
        sums = [vectors.splat(offsets, I32, lanes, 4 * token) for token in tokens for _ in starts]
        pairs: list[ir.Value | None] = [None] * len(sums)
        for step in range(GROUP_SIZE * bits // 32):
            weights = [vectors.load(address, element, elements, 4 * step * TILE_ROWS) for address in tiles]
            for number, token in enumerate(tokens):
                unit = vectors.splat(x, I32, lanes, 4 * (step * BLOCK_TOKENS + token))
                unit = vectors.builder.bitcast(unit, vector(element, elements))
                for place, levels in enumerate(weights, number * len(starts)):
                    if self._in_pairs and step == 0:
                        pairs[place] = vectors.multiply_quads(levels, unit)
                    elif self._in_pairs:
                        products = vectors.multiply_quads(levels, unit)
                        pairs[place] = vectors.keep(vectors.builder.add(pairs[place], products))
                    else:
                        dot = vectors.dot_quads if bits == 8 else vectors.dot_pairs
                        sums[place] = vectors.keep(dot(sums[place], levels, unit))
        if self._in_pairs:
            ones = vectors.constant(I16, 1, 2 * lanes)
            return [vectors.dot_pairs(total, pair, ones) for total, pair in zip(sums, pairs, strict=True)]
        return sums

    def _add(
        self,
        group: ir.Value,
        sums: Sequence[ir.Value],
        starts: Sequence[ir.Value],
        tokens: range,
        totals: Sequence[ir.Value],
    ) -> None:
        """Scale the sums and add them to the totals: places of <lanes x float>."""
        vectors, builder, lanes = self._vectors, self._vectors.builder, self._shape.lanes
        steps = [
            vectors.load(self._row_address(self._operands.steps, 4 * TILE_ROWS, group, start), FLOAT, lanes)
            for start in starts
        ]
        scales = self._address(self._operands.scales, 4 * BLOCK_TOKENS, group)
        units = [vectors.splat(scales, FLOAT, lanes, 4 * token) for token in tokens]
        for (unit, step), integer, total in zip(itertools.product(units, steps), sums, totals, strict=True):
            sum_ = vectors.fma(vectors.to_float(integer), builder.fmul(step, unit), builder.load(total))
            builder.store(sum_, total)


@numba.njit(cache=True)
def _copy(source, target):
    """Copy [tokens, rows] into the beginning of a larger or equal array."""
    for t in range(source.shape[0]):
        for r in range(source.shape[1]):
            target[t, r] = source[t, r]


@numba.njit(cache=True)
def _unpack_panel(isa, rows, kind, some, steps, turned, tile, indices, tile_steps):
    """Unpack some groups, a slice, of a panel's rows, sixteen by sixteen."""
    for start in range(0, len(rows), TILE_ROWS):
        part = rows[start : min(start + TILE_ROWS, len(rows))]
        number = start // TILE_ROWS
        block = some.start * GROUP_SIZE // BLOCK_SIZE
        unpack_tile(isa, part, kind, block, steps, turned, tile[number], indices, tile_steps[number])


@numba.njit(cache=True)
def _multiply_panel(isa, kind, tile, tile_steps, some, integers, offsets, scales, out, y, add):
    """Put a panel times all tokens into y [tokens, rows of the panel], or add it.

    tile: [sixteens of rows, groups, ...], levels of the groups `some`, a slice; out: float32 [6 tokens, 32], scratch.
    """
    groups, tokens, rows = scales.shape[1], len(y), y.shape[1]
    first, width, row_bytes = some.start, some.stop - some.start, y.strides[0]
    tile_bytes, steps_bytes = tile.strides[0] * 2, tile_steps.strides[0] * 2
    for block in range(len(scales)):
        token = block * BLOCK_TOKENS
        count = min(BLOCK_TOKENS, tokens - token)
        x = integers.ctypes.data + block * integers.strides[0] + first * integers.strides[1]
        sums = offsets.ctypes.data + 4 * BLOCK_TOKENS * ((block * 4 + kind - 1) * groups + first)
        units = scales.ctypes.data + 4 * BLOCK_TOKENS * (block * groups + first)
        target = y.ctypes.data + token * row_bytes
        for number in range((rows + _TILE - 1) // _TILE):
            weights = tile.ctypes.data + number * tile_bytes
            steps = tile_steps.ctypes.data + number * steps_bytes
            part = y[token : token + count, number * _TILE : min((number + 1) * _TILE, rows)]
            whole = part.shape[1] == _TILE
            end, end_bytes = (target + 4 * _TILE * number, row_bytes) if whole else (out.ctypes.data, 4 * _TILE)
            if not whole and add:
                _copy(part, out)
            _tile_dot(isa, integers, weights, steps, x, sums, units, end, end_bytes, width, count, kind, add)
            if not whole:
                _copy(out[:count, : part.shape[1]], part)


@numba.njit(cache=True)
def _aligned(room):
    """Return an array from its first element on that begins at a cache line."""
    return room[-room.ctypes.data % _ALIGNMENT // room.itemsize :]


@numba.njit(cache=True, nogil=True, shared=True)
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
    groups = scales.shape[1]
    packed = words.reshape(rows, -1)
    tiles = (rows + _TILE - 1) // _TILE
    first, last = tiles * thread // threads * _TILE, min(tiles * (thread + 1) // threads * _TILE, rows)
    panel_rows = _TILE * _PANEL_TILES
    width = min(_PANEL_GROUPS, groups)
    group_levels = integers.shape[2] * TILE_ROWS * integers.shape[4]
    out = np.zeros((BLOCK_TOKENS, _TILE), np.float32)
    turned = _aligned(np.zeros(packed.shape[1] * width // groups * TILE_ROWS + _ALIGNMENT, np.uint16))
    indices = np.empty((width, TILE_ROWS), np.uint8)
    all_steps = _aligned(np.empty(panel_rows * width + _ALIGNMENT, np.float32))
    all_levels = _aligned(np.empty(panel_rows // TILE_ROWS * width * group_levels + _ALIGNMENT, integers.dtype))
    for panel in range(first, last, panel_rows):
        end = min(panel + panel_rows, last)
        for first_group in range(0, groups, _PANEL_GROUPS):
            some = slice(first_group, min(first_group + _PANEL_GROUPS, groups))
            width = some.stop - some.start
            shape = (panel_rows // TILE_ROWS, width, integers.shape[2], TILE_ROWS, integers.shape[4])
            tile = all_levels[: shape[0] * width * group_levels].reshape(shape)
            tile_steps = all_steps[: panel_rows * width].reshape((shape[0], width, TILE_ROWS))
            own_turned = turned[: packed.shape[1] * width // groups * TILE_ROWS]
            _unpack_panel(isa, packed[panel:end], kind, some, steps, own_turned, tile, indices[:width], tile_steps)
            result = y[:, first_column + panel : first_column + end]
            _multiply_panel(isa, kind, tile, tile_steps, some, integers, offsets, scales, out, result, first_group > 0)


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
