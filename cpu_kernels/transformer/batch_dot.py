"""The inner loops of `gemv_batch`: packed rows times a few vectors, in registers.

A row's levels are extracted once, and each is multiplied with all vectors while it is in a register. What is computed
for a row and a vector is what `gemv` computes, addition for addition, so that a result does not depend on its
neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import EXTRACT, PackedGroups
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from cpu_kernels.simd.variants import AVX512_NO_VNNI, PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I8, I16, I32, I64, Vectors, vector

LANES = 16  # groups of a step; the groups behind the last whole step come as 8 and as 4
ROWS = 32  # rows whose totals are kept while the vectors' columns are in the first-level cache
SUMMED = 16  # totals whose lanes are added at once
_ROWS_AHEAD = 8  # how far ahead memory is asked for
# How many vectors are multiplied at once, as a share of the most that an instruction set has registers for: as a type,
# see `instruction_set`
WHOLE, HALF, QUARTER, EIGHTH = ((), (0,), (0,) * 2, (0,) * 3)
REST_LANES = (8, 4)


def vectors_at_once(isa: int, share: int = 0) -> int:
    """Return how many vectors are multiplied at once."""
    return max((8 if isa >= AVX512_NO_VNNI else 4) >> share, 1)


def units_of_group(bits: int) -> int:
    """Return how many units of 4 bytes the integers of a group take: 8 pairs of 16 bits, or 4 quads of 8."""
    return GROUP_SIZE * bits // 32


def parts_of_a_step(isa: int) -> int:
    """Return in how many parts 16 lanes are computed, so that each fits a register."""
    return 1 if isa >= AVX512_NO_VNNI else 2


def for_rests(builder: ir.IRBuilder, rest: ir.Value, emit: Callable[[int, ir.Value], None]) -> None:
    """Call `emit` with 8 and with 4 lanes where `rest` has so many groups, and with the number of groups before."""
    for lanes in REST_LANES:
        with builder.if_then(builder.icmp_signed("!=", builder.and_(rest, I64(lanes)), I64(0)), likely=False):
            emit(lanes, builder.and_(rest, I64(-2 * lanes)))


@intrinsic
def arrange_vectors(typing_context, integers, offsets, scales, strides, groups, count, room, out):
    """Emit a copy of some vectors in the order in which `dot_rows` reads them; addresses and numbers as integers.

    Args:
        integers: of the first vector, as an array.
        offsets, scales: where the first vector's lie.
        strides: from vector to vector of each, in bytes.
        groups: of a vector.
        count: how many vectors.
        room: for how many there is room; the last one is repeated.
        out: for every step and each of its units, then for its offsets and its scales: [room, 16 lanes]; then the
            same of 8 and of 4 lanes for the groups behind the last step.

    """
    units = units_of_group(integers.dtype.bitwidth)

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        integers_array, *bases, strides, groups, count, room, out = arguments
        first = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        strides = cgutils.unpack_tuple(builder, strides)
        plane = builder.mul(groups, I64(4))
        last = builder.sub(count, I64(1))
        sources = [(first, strides[0], unit) for unit in range(units)]
        sources += [(bases[0], strides[1], 0), (bases[1], strides[2], 0)]

        def copy(lanes: int, group: ir.Value) -> None:
            target = builder.add(out, builder.mul(builder.mul(group, room), I64(4 * (units + 2))))
            with cgutils.for_range(builder, room) as each:
                own = builder.select(builder.icmp_signed("<", each.index, last), each.index, last)
                for number, (base, stride, unit) in enumerate(sources):
                    source = builder.add(base, builder.mul(own, stride))
                    source = builder.add(builder.add(source, builder.mul(group, I64(4))), builder.mul(plane, I64(unit)))
                    row = builder.add(builder.mul(room, I64(number)), each.index)
                    end = builder.add(target, builder.mul(row, I64(4 * lanes)))
                    vectors.store(vectors.load(source, I32, lanes), end)

        with cgutils.for_range(builder, builder.lshr(groups, I64(4))) as step:
            copy(LANES, builder.shl(step.index, I64(4)))
        done = builder.and_(groups, I64(-LANES))
        rest = builder.and_(groups, I64(LANES - 1))
        for_rests(builder, rest, lambda lanes, before: copy(lanes, builder.add(done, before)))
        return context.get_dummy_value()

    strides_type = types.UniTuple(types.intp, 3)
    return types.void(integers, *[types.intp] * 2, strides_type, *[types.intp] * 4), generate


class _SharedLevels(PackedGroups):
    """Neighbouring groups of one row whose levels are multiplied with several vectors.

    Attributes:
        sums: the groups' integer dot products with each vector so far, <lanes x i32>.

    """

    def __init__(
        self,
        vectors: Vectors,
        row: ir.Value,
        groups: ir.Value,
        first_group: ir.Value,
        lanes: int,
        x: _Arranged,
        ahead: ir.Value,
    ) -> None:
        super().__init__(vectors, lanes, row, groups, first_group, ahead)
        self._x = x
        self._even: ir.Value | None = None
        self.sums = [x.load(x.units, c, I32) for c in range(x.count)]

    def use_levels(self, pair: int, levels: ir.Value) -> None:
        """Multiply the levels with the activations of the same elements, and add the products to `sums`."""
        if self._x.bits == 16:
            self._add(pair, levels, self.vectors.dot_pairs)
        elif pair % 2 == 0:
            self._even = levels
        else:
            self._add(pair // 2, self.join_pairs(self._even, levels), self.vectors.dot_quads)

    def _add(self, unit: int, levels: ir.Value, dot: Callable[..., ir.Value]) -> None:
        for c in range(self._x.count):
            x = self._x.load(unit, c, levels.type.element)
            self.sums[c] = self.vectors.keep(dot(self.sums[c], levels, x))


class _Arranged:
    """What `arrange_vectors` has made of a step, or a part of its lanes."""

    def __init__(
        self, vectors: Vectors, bits: int, count: int, address: ir.Value, lanes: int, part: int, parts: int
    ) -> None:
        self._vectors, self.bits, self.count, self.units = vectors, bits, count, units_of_group(bits)
        self._address, self._lanes = address, lanes
        self._first_byte, self._bytes = 4 * part * lanes, 4 * lanes * parts

    def load(self, number: int, c: int, element: ir.Type) -> ir.Value:
        """Load a unit, or the offset or scale behind the units, of one vector."""
        elements = self._lanes * {I8: 4, I16: 2}.get(element, 1)
        offset = self._bytes * (number * self.count + c) + self._first_byte
        return self._vectors.load(self._address, element, elements, offset)


class _Row:
    """Emits one packed row times a few vectors."""

    def __init__(
        self, vectors: Vectors, depth: int, bits: int, count: int, table: Sequence[ir.Value], table_address: ir.Value
    ) -> None:
        self._vectors, self._depth, self._bits, self._count = vectors, depth, bits, count
        self._table, self._table_address = table, table_address
        self._x_bytes = 4 * (units_of_group(bits) + 2) * count

    def start(
        self, row: ir.Value, groups: ir.Value, first_group: ir.Value, x: ir.Value, ahead: ir.Value, totals: ir.Value
    ) -> None:
        """Begin with a row: its address, length and first group; `ahead` is how far ahead memory is asked for."""
        self._row, self._groups, self._first_group, self._x = row, groups, first_group, x
        self._ahead, self._totals = ahead, totals

    def _places(self, lanes: int, part_lanes: int, part: int) -> list[ir.Value]:
        """Return pointers to one part of the row's total for each vector."""
        builder, start = self._vectors.builder, self._totals[lanes]
        return [
            builder.inttoptr(
                builder.add(start, I64(4 * (c * ROWS * lanes + part * part_lanes))),
                vector(FLOAT, part_lanes).as_pointer(),
            )
            for c in range(self._count)
        ]

    def _add(self, group: ir.Value, lanes: int, part: int, parts: int, totals: Sequence[ir.Value]) -> None:
        """Add one part of the parts of a step to the totals, places of <lanes x float>; `group` counts from `x` on."""
        vectors, builder = self._vectors, self._vectors.builder
        x = builder.add(self._x, builder.mul(group, I64(self._x_bytes)))
        arranged = _Arranged(vectors, self._bits, self._count, x, lanes, part, parts)
        first = builder.add(builder.add(self._first_group, group), I64(part * lanes))
        step = _SharedLevels(vectors, self._row, self._groups, first, lanes, arranged, self._ahead)
        weight_steps = vectors.lookup(self._table, self._table_address, EXTRACT[self._depth](step))
        for c, total in enumerate(totals):
            scale = builder.fmul(weight_steps, arranged.load(arranged.units + 1, c, FLOAT))
            value = builder.load(total)
            value.align = 4
            builder.store(vectors.fma(vectors.to_float(step.sums[c]), scale, value), total).align = 4

    def whole_steps(self, steps: ir.Value, add: ir.Value) -> None:
        """Emit steps of 16 groups, in as many parts as it takes for a vector to fit one register.

        Where there are registers for them, the totals stay there from step to step.
        """
        vectors, builder, count = self._vectors, self._vectors.builder, self._count
        parts = parts_of_a_step(vectors.isa)
        lanes = LANES // parts
        ends = [place for part in range(parts) for place in self._places(LANES, lanes, part)]
        places = [cgutils.alloca_once(builder, vector(FLOAT, lanes)) for _ in ends] if parts == 1 else ends
        with builder.if_else(add) as (more, at_first):
            with more:
                _copy(builder, ends, places)
            with at_first:
                _clear(vectors, places, lanes)
        with cgutils.for_range(builder, steps) as loop:
            for part in range(parts):
                some = places[part * count : (part + 1) * count]
                self._add(builder.shl(loop.index, I64(4)), lanes, part, parts, some)
        _copy(builder, places, ends)

    def rest(self, lanes: int, group: ir.Value) -> None:
        """Emit 8 or 4 groups behind the whole steps."""
        places = self._places(lanes, lanes, 0)
        _clear(self._vectors, places, lanes)
        self._add(group, lanes, 0, 1, places)


def _clear(vectors: Vectors, places: Sequence[ir.Value], lanes: int) -> None:
    for place in places:
        vectors.builder.store(vectors.constant(FLOAT, 0.0, lanes), place).align = 4


def _copy(builder: ir.IRBuilder, sources: Sequence[ir.Value], targets: Sequence[ir.Value]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not target:
            value = builder.load(source)
            value.align = 4
            builder.store(value, target).align = 4


@intrinsic
def dot_rows(typing_context, isa, depth, share, integers, matrix, place, x, totals, add):
    """Emit some columns of packed rows times a few vectors; addresses and numbers as integers.

    Args:
        isa, depth, share: as types.
        integers: those of the vectors; only their type counts.
        matrix: the first row, how many rows, the groups of a row, and the scales: float32 [32].
        place: first group, steps and rest of the columns: steps of 16 groups, then some behind them (0, 4, 8 or 12).
        x: what `arrange_vectors` has made of the vectors, from the first group on.
        totals: addresses of float32 [vectors, ROWS, lanes] for 16, 8 and 4 lanes, out.
        add: whether to add to the totals of 16 lanes.

    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors, count = Vectors(builder, isa.count), vectors_at_once(isa.count, share.count)
        matrix, place, x, totals, add = arguments[4:]
        first_row, rows, groups, address = cgutils.unpack_tuple(builder, matrix)
        first_group, steps, rest = cgutils.unpack_tuple(builder, place)
        starts = dict(zip((LANES, *REST_LANES), cgutils.unpack_tuple(builder, totals), strict=True))
        table = [vectors.load(address, FLOAT, 16), vectors.load(address, FLOAT, 16, offset=64)]
        blocks = builder.udiv(groups, I64(BLOCK_SIZE // GROUP_SIZE))
        row_bytes = builder.mul(blocks, I64(2 * WORDS_PER_BLOCK[depth.count]))
        ahead = builder.mul(row_bytes, I64(_ROWS_AHEAD))
        row = _Row(vectors, depth.count, bits, count, table, address)
        with cgutils.for_range(builder, rows) as loop:
            own = builder.add(first_row, builder.mul(loop.index, row_bytes))
            ends = {lanes: builder.add(end, builder.mul(loop.index, I64(4 * lanes))) for lanes, end in starts.items()}
            row.start(own, groups, first_group, x, ahead, ends)
            row.whole_steps(steps, add)
            done = builder.shl(steps, I64(4))
            for_rests(builder, rest, lambda lanes, before: row.rest(lanes, builder.add(done, before)))
        return context.get_dummy_value()

    numbers = [types.UniTuple(types.intp, 4), types.UniTuple(types.intp, 3), types.intp, types.UniTuple(types.intp, 3)]
    return types.void(isa, depth, share, integers, *numbers, types.boolean), generate


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
def sum_lanes(typing_context, isa, totals, rest, results):
    """Emit the sums of the lanes of 16 totals; addresses and numbers as integers.

    Args:
        isa: as a type.
        totals, rest: as in `dot_rows`.
        results: float32 [16], out.

    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        packed, rest, results = arguments[1:]
        totals = dict(zip((LANES, *REST_LANES), cgutils.unpack_tuple(builder, packed), strict=True))

        def folded(lanes: int) -> ir.Value:
            return _fold(vectors, [vectors.load(totals[lanes], FLOAT, lanes, 4 * k * lanes) for k in range(SUMMED)])

        result = cgutils.alloca_once(builder, vector(FLOAT, SUMMED))
        vectors_of_zeros = vectors.constant(FLOAT, 0.0, SUMMED)
        builder.store(builder.fadd(vectors_of_zeros, folded(LANES)), result)
        for_rests(
            builder, rest, lambda lanes, _: builder.store(builder.fadd(builder.load(result), folded(lanes)), result)
        )
        vectors.store(builder.load(result), results)
        return context.get_dummy_value()

    return types.void(isa, types.UniTuple(types.intp, 3), *[types.intp] * 2), generate
