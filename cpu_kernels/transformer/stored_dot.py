"""Packed rows times more than four vectors where registers are few: levels are stored and loaded again.

With the sixteen registers of AVX2 only four vectors can be multiplied with a level while it is in a register. For more
of them, four rows are unpacked into a buffer that stays in the first-level cache, in the order in which they are
multiplied: two rows by four vectors of integer sums fit the registers. The sums are those of `dot_rows`, to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import EXTRACT, StoredGroups
from cpu_kernels.packed_rows.layout import PAIRS
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector
from cpu_kernels.transformer.batch_dot import LANES, REST_LANES, ROWS, for_rests, parts_of_a_step, units_of_group

PANEL_STEPS = {16: 6, 8: 12}  # steps that are unpacked at once, for each number of bits
STORED_ROWS = 4  # rows that are unpacked at once
STORED_VECTORS = 4  # vectors that are multiplied at once
ROW_BYTES = 4 * PAIRS * LANES * (PANEL_STEPS[16] + 1)  # of unpacked levels; one step more: 8 and 4 groups
ROW_SCALES_BYTES = 4 * LANES * (PANEL_STEPS[8] + 1)
_TILE_ROWS = 2  # rows whose sums stay in registers together


@intrinsic
def unpack_panel(
    typing_context, isa, depth, integers, row, groups, first_group, steps, rest, table, levels, scales, ahead
):
    """Emit the unpacking of some steps of one packed row; addresses and numbers as integers.

    Args:
        isa, depth: as types.
        integers: those of the vectors; only their type counts.
        row, groups: where the row lies, and its length.
        first_group, steps, rest: the steps to unpack, and how many groups behind them (0, 4, 8 or 12).
        table: float32 [32], the scales of the row's matrix.
        levels: int16 [steps, 8, 16, 2], then [8, 8, 2] and [8, 4, 2] for the rest, out; or uint8 [steps, 4, 16, 4],
            then [4, 8, 4] and [4, 4, 4].
        scales: float32 [steps, 16], then [8] and [4], out.
        ahead: how many bytes ahead of the row memory is asked for.

    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        row, groups, first_group, steps, rest, address, levels, scales, ahead = arguments[3:]
        table = [vectors.load(address, FLOAT, 16), vectors.load(address, FLOAT, 16, offset=64)]

        def emit(lanes: int, group: ir.Value) -> None:
            place = builder.mul(group, I64(4))
            target = builder.add(levels, builder.mul(group, I64(4 * units_of_group(bits))))
            step = StoredGroups(vectors, lanes, row, groups, builder.add(first_group, group), target, bits, ahead)
            found = vectors.lookup(table, address, EXTRACT[depth.count](step))
            vectors.store(found, builder.add(scales, place))

        with cgutils.for_range(builder, steps) as loop:
            emit(LANES, builder.shl(loop.index, I64(4)))
        done = builder.shl(steps, I64(4))
        for_rests(builder, rest, lambda lanes, before: emit(lanes, builder.add(done, before)))
        return context.get_dummy_value()

    return types.void(isa, depth, integers, *[types.intp] * 9), generate


class _Tile:
    """Emits a few unpacked rows times a few vectors: one step of some lanes at a time."""

    def __init__(
        self,
        vectors: Vectors,
        bits: int,
        levels: ir.Value,
        scales: ir.Value,
        activations: ir.Value,
        rows: int,
        count: int,
    ) -> None:
        self._vectors, self._bits, self._rows, self._count = vectors, bits, rows, count
        self._levels, self._scales, self._activations = levels, scales, activations

    def add(self, group: ir.Value, lanes: int, part: int, parts: int, totals: Sequence[ir.Value]) -> None:
        """Add one part of the parts of a step, from `group` on, to the totals of each row and vector."""
        vectors, builder, rows, count = self._vectors, self._vectors.builder, range(self._rows), range(self._count)
        element, units = ir.IntType(self._bits), units_of_group(self._bits)
        dot = vectors.dot_pairs if self._bits == 16 else vectors.dot_quads
        levels = builder.add(self._levels, builder.mul(group, I64(4 * units)))
        scales = builder.add(self._scales, builder.mul(group, I64(4)))
        activations = builder.add(self._activations, builder.mul(group, I64(4 * (units + 2) * self._count)))
        lane, width = 4 * part * lanes, 4 * lanes * parts

        def load(number: int, c: int, element: ir.Type) -> ir.Value:
            elements = lanes * 4 // (element.width // 8 if element is not FLOAT else 4)
            return vectors.load(activations, element, elements, width * (number * self._count + c) + lane)

        def load_total(place: ir.Value) -> ir.Value:
            value = builder.load(place)
            value.align = 4
            return value

        sums = [load(units, c, I32) for _ in rows for c in count]
        weight_lanes = lanes * 32 // self._bits
        for unit in range(units):
            weights = [vectors.load(levels, element, weight_lanes, ROW_BYTES * r + width * unit + lane) for r in rows]
            for c in count:
                x = load(unit, c, element)
                for r in rows:
                    at = r * self._count + c
                    sums[at] = vectors.keep(dot(sums[at], weights[r], x))
        steps = [vectors.load(scales, FLOAT, lanes, ROW_SCALES_BYTES * r + lane) for r in rows]
        factors = [load(units + 1, c, FLOAT) for c in count]
        for (step, factor), integer, total in zip(itertools.product(steps, factors), sums, totals, strict=True):
            sum_ = vectors.fma(vectors.to_float(integer), builder.fmul(step, factor), load_total(total))
            builder.store(sum_, total).align = 4


@intrinsic
def dot_panel(typing_context, isa, integers, levels, scales, activations, steps, rest, totals, rows, add):
    """Emit unpacked rows times a few vectors; addresses and numbers as integers.

    Args:
        isa: the instruction set, as a type.
        integers: those of the vectors; only their type counts.
        levels, scales: as `unpack_panel` leaves them, for each row, ROW_BYTES and ROW_SCALES_BYTES apart.
        activations: as `arrange_vectors` leaves them, from the panel's first group on.
        steps, rest: as in `unpack_panel`.
        totals: addresses of float32 [vectors, ROWS, lanes] for 16, 8 and 4 lanes, out.
        rows: how many there are; totals of others up to ROWS may be overwritten.
        add: whether to add to the totals of 16 lanes.

    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors, count, tile = Vectors(builder, isa.count), STORED_VECTORS, _TILE_ROWS
        levels, scales, activations, steps, rest, totals, rows, add = arguments[2:]
        totals = cgutils.unpack_tuple(builder, totals)
        tiles = builder.udiv(builder.add(rows, I64(tile - 1)), I64(tile))
        with cgutils.for_range(builder, tiles) as loop:
            first = builder.mul(loop.index, I64(tile))
            own_levels = builder.add(levels, builder.mul(first, I64(ROW_BYTES)))
            own_scales = builder.add(scales, builder.mul(first, I64(ROW_SCALES_BYTES)))
            emitter = _Tile(vectors, bits, own_levels, own_scales, activations, tile, count)
            own_totals = {
                lanes: builder.add(address, builder.mul(first, I64(4 * lanes)))
                for lanes, address in zip((LANES, *REST_LANES), totals, strict=True)
            }
            _whole_steps(vectors, emitter, tile, count, steps, own_totals[LANES], add)

            def emit_rest(lanes: int, before: ir.Value, emitter=emitter, own_totals=own_totals) -> None:
                places = _places(builder, own_totals[lanes], tile, count, lanes, lanes, 0)
                for place in places:
                    builder.store(vectors.constant(FLOAT, 0.0, lanes), place).align = 4
                emitter.add(builder.add(builder.shl(steps, I64(4)), before), lanes, 0, 1, places)

            for_rests(builder, rest, emit_rest)
        return context.get_dummy_value()

    ends = types.UniTuple(types.intp, 3)
    return types.void(isa, integers, *[types.intp] * 5, ends, types.intp, types.boolean), generate


def _places(
    builder: ir.IRBuilder, totals: ir.Value, rows: int, count: int, lanes: int, part_lanes: int, part: int
) -> list[ir.Value]:
    """Return pointers to one part of the totals of every row and vector: row by row."""
    return [
        builder.inttoptr(
            builder.add(totals, I64(4 * (lanes * (c * ROWS + r) + part * part_lanes))),
            vector(FLOAT, part_lanes).as_pointer(),
        )
        for r in range(rows)
        for c in range(count)
    ]


def _whole_steps(
    vectors: Vectors, tile: _Tile, rows: int, count: int, steps: ir.Value, totals: ir.Value, add: ir.Value
) -> None:
    """Emit the steps of 16 groups, in as many parts as it takes for a vector to fit one register."""
    builder, parts = vectors.builder, parts_of_a_step(vectors.isa)
    lanes = LANES // parts
    places = [place for part in range(parts) for place in _places(builder, totals, rows, count, LANES, lanes, part)]
    with builder.if_then(builder.not_(add)):
        for place in places:
            builder.store(vectors.constant(FLOAT, 0.0, lanes), place).align = 4
    with cgutils.for_range(builder, steps) as loop:
        group = builder.shl(loop.index, I64(4))
        for part in range(parts):
            tile.add(group, lanes, part, parts, places[part * rows * count :][: rows * count])
