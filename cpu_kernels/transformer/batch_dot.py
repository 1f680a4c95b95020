"""The inner loops of `gemv_batch`: a few rows times a few vectors, in registers.

A row is unpacked once for all vectors. Its levels and the steps of its groups go into a buffer that stays in the
first-level cache, in the order in which they are multiplied. Levels come as the integers of the vectors do, in units of
4 bytes: pairs of int16, or quads of 8 bits. What is then computed for a row and a vector is what `gemv` computes,
addition for addition, so that a result does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.packed_rows.extract import EXTRACT, StoredGroups
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, PAIRS, WORDS_PER_BLOCK
from cpu_kernels.simd.variants import AVX512_NO_VNNI, PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector

LANES = 16  # groups of a step; the groups behind the last whole step come as 8 and as 4
PANEL_STEPS = {16: 6, 8: 12}  # steps that are unpacked at once, for each number of bits
ROWS = 4  # rows that are unpacked at once
ROW_BYTES = 4 * PAIRS * LANES * (PANEL_STEPS[16] + 1)  # of unpacked levels; one step more: 8 and 4 groups
ROW_SCALES_BYTES = 4 * LANES * (PANEL_STEPS[8] + 1)
C1, C2, C3, C4 = ((0,), (0,) * 2, (0,) * 3, (0,) * 4)  # a number of vectors as a type, see `instruction_set`
_REST_LANES = (8, 4)


def units_of_group(bits: int) -> int:
    """Return how many units of 4 bytes the integers of a group take: 8 pairs of 16 bits, or 4 quads of 8."""
    return GROUP_SIZE * bits // 32


def tile_rows(isa: int) -> int:
    """Return for how many rows the sums stay in registers together."""
    return 4 if isa >= AVX512_NO_VNNI else 2


def parts_of_a_step(isa: int) -> int:
    """Return in how many parts 16 lanes are computed, so that each fits a register."""
    return 1 if isa >= AVX512_NO_VNNI else 2


def _rests(builder: ir.IRBuilder, rest: ir.Value, emit: Callable[[int, ir.Value], None]) -> None:
    """Call `emit` with 8 and with 4 lanes where `rest` has so many groups, and with the number of groups before."""
    for lanes in _REST_LANES:
        with builder.if_then(builder.icmp_signed("!=", builder.and_(rest, I64(lanes)), I64(0)), likely=False):
            emit(lanes, builder.and_(rest, I64(-2 * lanes)))


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
            step = StoredGroups(vectors, lanes, row, groups, builder.add(first_group, group), target, bits)
            found = vectors.lookup(table, address, EXTRACT[depth.count](step))
            vectors.store(found, builder.add(scales, place))

        bytes_per_step = LANES * GROUP_SIZE // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[depth.count]
        start = builder.mul(builder.lshr(first_group, I64(4)), I64(bytes_per_step))
        start = builder.add(builder.add(row, ahead), start)
        with cgutils.for_range(builder, steps) as loop:
            next_line = builder.add(start, builder.mul(loop.index, I64(bytes_per_step)))
            for line in range(0, bytes_per_step, 64):
                vectors.prefetch(next_line, line)
            emit(LANES, builder.shl(loop.index, I64(4)))
        done = builder.shl(steps, I64(4))
        _rests(builder, rest, lambda lanes, before: emit(lanes, builder.add(done, before)))
        return context.get_dummy_value()

    return types.void(isa, depth, integers, *[types.intp] * 9), generate


@intrinsic
def arrange_vectors(typing_context, integers, offsets, scales, strides, groups, count, out):
    """Emit a copy of some vectors in the order in which `dot_panel` reads them; addresses and numbers as integers.

    Args:
        integers: of the first vector, as an array.
        offsets, scales: where the first vector's lie.
        strides: from vector to vector of each, in bytes.
        groups: of a vector.
        count: how many vectors.
        out: for every step and each of its units, then for its offsets and its scales: [count, 16 lanes]; then the
            same of 8 and of 4 lanes for the groups behind the last step.

    """
    units = units_of_group(integers.dtype.bitwidth)

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        integers_array, *bases, strides, groups, count, out = arguments
        first = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        strides = cgutils.unpack_tuple(builder, strides)
        plane = builder.mul(groups, I64(4))
        sources = [(first, strides[0], unit) for unit in range(units)]
        sources += [(bases[0], strides[1], 0), (bases[1], strides[2], 0)]

        def copy(lanes: int, group: ir.Value) -> None:
            target = builder.add(out, builder.mul(builder.mul(group, count), I64(4 * (units + 2))))
            with cgutils.for_range(builder, count) as each:
                for number, (base, stride, unit) in enumerate(sources):
                    source = builder.add(base, builder.mul(each.index, stride))
                    source = builder.add(builder.add(source, builder.mul(group, I64(4))), builder.mul(plane, I64(unit)))
                    row = builder.add(builder.mul(count, I64(number)), each.index)
                    end = builder.add(target, builder.mul(row, I64(4 * lanes)))
                    vectors.store(vectors.load(source, I32, lanes), end)

        with cgutils.for_range(builder, builder.lshr(groups, I64(4))) as step:
            copy(LANES, builder.shl(step.index, I64(4)))
        done = builder.and_(groups, I64(-LANES))
        rest = builder.and_(groups, I64(LANES - 1))
        _rests(builder, rest, lambda lanes, before: copy(lanes, builder.add(done, before)))
        return context.get_dummy_value()

    strides_type = types.UniTuple(types.intp, 3)
    return types.void(integers, *[types.intp] * 2, strides_type, *[types.intp] * 3), generate


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
def dot_panel(typing_context, isa, chunk, integers, levels, scales, activations, steps, rest, totals, rows, add):
    """Emit unpacked rows times a few vectors; addresses and numbers as integers.

    Args:
        isa, chunk: the instruction set and the number of vectors, as types.
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
        vectors, count, tile = Vectors(builder, isa.count), chunk.count, tile_rows(isa.count)
        levels, scales, activations, steps, rest, totals, rows, add = arguments[3:]
        totals = cgutils.unpack_tuple(builder, totals)
        tiles = builder.udiv(builder.add(rows, I64(tile - 1)), I64(tile))
        with cgutils.for_range(builder, tiles) as loop:
            first = builder.mul(loop.index, I64(tile))
            own_levels = builder.add(levels, builder.mul(first, I64(ROW_BYTES)))
            own_scales = builder.add(scales, builder.mul(first, I64(ROW_SCALES_BYTES)))
            emitter = _Tile(vectors, bits, own_levels, own_scales, activations, tile, count)
            own_totals = {
                lanes: builder.add(address, builder.mul(first, I64(4 * lanes)))
                for lanes, address in zip((LANES, *_REST_LANES), totals, strict=True)
            }
            _whole_steps(vectors, emitter, tile, count, steps, own_totals[LANES], add)

            def emit_rest(lanes: int, before: ir.Value, emitter=emitter, own_totals=own_totals) -> None:
                places = _places(builder, own_totals[lanes], tile, count, lanes, lanes, 0)
                for place in places:
                    builder.store(vectors.constant(FLOAT, 0.0, lanes), place).align = 4
                emitter.add(builder.add(builder.shl(steps, I64(4)), before), lanes, 0, 1, places)

            _rests(builder, rest, emit_rest)
        return context.get_dummy_value()

    ends = types.UniTuple(types.intp, 3)
    return types.void(isa, chunk, integers, *[types.intp] * 5, ends, types.intp, types.boolean), generate


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


def _fold(vectors: Vectors, values: Sequence[ir.Value]) -> ir.Value:
    """Return the sums of 16 vectors' lanes in one vector: each the sum that `Vectors.sum` gives, to the bit."""
    builder, lanes = vectors.builder, values[0].type.count
    values, segment = list(values), lanes
    while segment > 1:
        half = segment // 2
        low = [first + k for first in range(0, 2 * lanes, segment) for k in range(half)]
        masks = [ir.Constant(vector(I32, lanes), [place + shift for place in low]) for shift in (0, half)]
        values = [
            builder.fadd(*[builder.shuffle_vector(left, right, mask) for mask in masks])
            for left, right in zip(values[::2], values[1::2], strict=True)
        ]
        segment = half
    while len(values) > 1:
        values = [vectors.join(left, right) for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@intrinsic
def sum_lanes(typing_context, isa, totals, rest, results, count):
    """Emit the sums of the totals' lanes, `count` of 16 at a time; addresses and numbers as integers.

    Args:
        isa: as a type.
        totals, rest: as in `dot_panel`.
        results: float32 [16 * count], out.
        count: how many times 16 results to compute.

    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        packed, rest, results, count = arguments[1:]
        totals = dict(zip((LANES, *_REST_LANES), cgutils.unpack_tuple(builder, packed), strict=True))
        with cgutils.for_range(builder, count) as loop:

            def folded(lanes: int, index: ir.Value = loop.index) -> ir.Value:
                address = builder.add(totals[lanes], builder.mul(index, I64(4 * 16 * lanes)))
                return _fold(vectors, [vectors.load(address, FLOAT, lanes, 4 * k * lanes) for k in range(16)])

            result = cgutils.alloca_once(builder, vector(FLOAT, 16))
            builder.store(builder.fadd(vectors.constant(FLOAT, 0.0, 16), folded(LANES)), result)

            def add_rest(lanes: int, before: ir.Value, result=result, folded=folded) -> None:
                builder.store(builder.fadd(builder.load(result), folded(lanes)), result)

            _rests(builder, rest, add_rest)
            vectors.store(builder.load(result), builder.add(results, builder.mul(loop.index, I64(64))))
        return context.get_dummy_value()

    return types.void(isa, types.UniTuple(types.intp, 3), *[types.intp] * 3), generate
