"""The inner loops of float16 matrices: a few rows times one vector or several, in registers.

A result is 16 sums, of columns k, k + 16, k + 32 and so on, which are added at the end; the columns behind the last
whole vector are added one by one. `gemv` and `gemv_batch` share this order, so they give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, HALF, I32, I64, Vectors, vector
from cpu_kernels.transformer.batch_dot import LANES, ROWS, parts_of_a_step, vectors_at_once

_ROWS_AHEAD = 16  # how far ahead memory is asked for, for several vectors
_BYTES_AHEAD = 8192  # and for one


def _rows_at_once(vectors: int) -> int:
    """Return of how many rows the sums stay in registers together."""
    return 4 if vectors <= 2 else 2


@intrinsic
def arrange_floats(typing_context, x, x_stride, columns, count, room, out):
    """Emit a copy of some vectors in the order in which `dot_half_rows` reads them; addresses and numbers as integers.

    Args:
        x, x_stride: the first vector, and the bytes from vector to vector.
        columns: of a vector; only whole sixteens are copied.
        count: how many vectors.
        room: for how many there is room; the last one is repeated.
        out: float32 [columns / 16, room, 16], out.

    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        x, x_stride, columns, count, room, out = arguments
        last = builder.sub(count, I64(1))
        steps = builder.lshr(columns, I64(4))
        with cgutils.for_range(builder, steps) as step, cgutils.for_range(builder, room) as each:
            own = builder.select(builder.icmp_signed("<", each.index, last), each.index, last)
            source = builder.add(x, builder.mul(own, x_stride))
            floats = vectors.load(builder.add(source, builder.mul(step.index, I64(4 * LANES))), FLOAT, LANES)
            place = builder.add(builder.mul(step.index, room), each.index)
            vectors.store(floats, builder.add(out, builder.mul(place, I64(4 * LANES))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


class _HalfTile:
    """Emits a few float16 rows times a few vectors, which lie as `arrange_floats` leaves them."""

    def __init__(self, vectors: Vectors, rows: Sequence[ir.Value], count: int, lanes: int) -> None:
        """Take the addresses of the rows; `lanes` are those of a register."""
        self._vectors, self._rows, self._count, self._lanes = vectors, rows, count, lanes

    def add(
        self, first: ir.Value, steps: ir.Value, x: ir.Value, ahead: ir.Value, part: int, sums: Sequence[ir.Value]
    ) -> None:
        """Add some steps of 16 columns, from step `first` on, to the sums of each row and vector.

        x: the vectors, from step `first` on; ahead: how many bytes behind a row memory is asked for; part: which lanes
        of 16; sums: places of <lanes x float>, row by row.
        """
        builder = self._vectors.builder
        with cgutils.for_range(builder, builder.lshr(steps, I64(1))) as loop:
            step = builder.shl(loop.index, I64(1))
            if part == 0:
                for row in self._rows:
                    line = builder.add(row, builder.mul(builder.add(first, step), I64(2 * LANES)))
                    self._vectors.prefetch(builder.add(line, ahead))
            for number in range(2):
                self._step(first, builder.add(step, I64(number)), x, part, sums)
        with builder.if_then(builder.trunc(steps, ir.IntType(1))):
            self._step(first, builder.sub(steps, I64(1)), x, part, sums)

    def _step(self, first: ir.Value, step: ir.Value, x: ir.Value, part: int, sums: Sequence[ir.Value]) -> None:
        vectors, builder, lanes = self._vectors, self._vectors.builder, self._lanes
        offset = builder.mul(builder.add(first, step), I64(2 * LANES))
        packed = [vectors.load(builder.add(row, offset), HALF, lanes, 2 * part * lanes) for row in self._rows]
        weights = [builder.fpext(halves, vector(FLOAT, lanes)) for halves in packed]
        own = builder.add(x, builder.mul(step, I64(4 * LANES * self._count)))
        for c in range(self._count):
            value = vectors.load(own, FLOAT, lanes, 4 * (LANES * c + part * lanes))
            for weight, place in zip(weights, sums[c :: self._count], strict=True):
                builder.store(vectors.fma(weight, value, builder.load(place)), place)


@intrinsic
def dot_half_rows(typing_context, isa, share, matrix, place, x, totals, add):
    """Emit some columns of float16 rows times a few float32 vectors; addresses and numbers as integers.

    Args:
        isa, share: as types, see `vectors_at_once`.
        matrix: the first row, the bytes from row to row, and how many rows.
        place: first step of 16 columns, and how many.
        x: what `arrange_floats` has made of the vectors, from the first step on.
        totals: float32 [vectors, ROWS, 16], out.
        add: whether to add to the totals.

    """

    def generate(context, builder, signature, arguments):
        vectors, count = Vectors(builder, isa.count), vectors_at_once(isa.count, share.count)
        matrix, place, x, totals, add = arguments[2:]
        row, row_bytes, rows = cgutils.unpack_tuple(builder, matrix)
        first, steps = cgutils.unpack_tuple(builder, place)
        tile, parts = _rows_at_once(count), parts_of_a_step(isa.count)
        lanes = LANES // parts
        ahead = builder.mul(row_bytes, I64(_ROWS_AHEAD))
        sums = [cgutils.alloca_once(builder, vector(FLOAT, lanes)) for _ in range(tile * count)]

        last = builder.sub(rows, I64(1))
        with cgutils.for_range(builder, builder.udiv(builder.add(rows, I64(tile - 1)), I64(tile))) as loop:
            numbers = [builder.add(builder.mul(loop.index, I64(tile)), I64(r)) for r in range(tile)]
            # No row is read behind the last one: it stands in for those that are missing.
            numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
            addresses = [builder.add(row, builder.mul(n, row_bytes)) for n in numbers]
            emitter = _HalfTile(vectors, addresses, count, lanes)
            for part in range(parts):
                ends = [
                    (builder.add(totals, builder.mul(number, I64(4 * LANES))), 4 * (LANES * ROWS * c + part * lanes))
                    for number in numbers
                    for c in range(count)
                ]
                for place in sums:
                    builder.store(vectors.constant(FLOAT, 0.0, lanes), place)
                with builder.if_then(add):
                    for place, end in zip(sums, ends, strict=True):
                        builder.store(vectors.load(end[0], FLOAT, lanes, end[1]), place)
                emitter.add(first, steps, x, ahead, part, sums)
                for place, end in zip(sums, ends, strict=True):
                    vectors.store(builder.load(place), *end)
        return context.get_dummy_value()

    triple, pair = types.UniTuple(types.intp, 3), types.UniTuple(types.intp, 2)
    return types.void(isa, share, triple, pair, types.intp, types.intp, types.boolean), generate


@intrinsic
def multiply_half_vector(typing_context, isa, row, row_bytes, rows, x, steps, out):
    """Emit float16 rows times one float32 vector; addresses and numbers as integers.

    Args:
        isa: as a type.
        row, row_bytes, rows: the first row, the bytes from row to row, and how many.
        x, steps: the vector, and how many times 16 of its columns are multiplied.
        out: float32 [rows], out.

    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        row, row_bytes, rows, x, steps, out = arguments[1:]
        total = cgutils.alloca_once(builder, vector(FLOAT, LANES))

        with cgutils.for_range(builder, rows) as loop:
            builder.store(vectors.constant(FLOAT, 0.0, LANES), total)
            own = builder.add(row, builder.mul(loop.index, row_bytes))
            _HalfTile(vectors, [own], 1, LANES).add(I64(0), steps, x, I64(_BYTES_AHEAD), 0, [total])
            result = builder.fadd(FLOAT(0.0), vectors.sum(builder.load(total)))  # as `sum_lanes` begins
            end = builder.add(out, builder.mul(loop.index, I64(4)))
            builder.store(result, builder.inttoptr(end, FLOAT.as_pointer()))
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 6), generate


@intrinsic
def dot_last_columns(typing_context, row, x, first, columns):
    """Emit the sum of the products of some columns of a float16 row and a float32 vector, added one by one: float32.

    row, x: addresses; first, columns: from which column on, to before which.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        row, x, first, columns = arguments
        tail = cgutils.alloca_once(builder, FLOAT)
        builder.store(FLOAT(0.0), tail)
        with cgutils.for_range_slice(builder, first, columns, I64(1), I64) as (column, _):
            half = vectors.load(builder.add(row, builder.mul(column, I64(2))), HALF, 1)
            other = vectors.load(builder.add(x, builder.mul(column, I64(4))), FLOAT, 1)
            weight = builder.fpext(builder.extract_element(half, I32(0)), FLOAT)
            product = builder.fmul(weight, builder.extract_element(other, I32(0)))
            builder.store(builder.fadd(builder.load(tail), product), tail)
        return builder.load(tail)

    return types.float32(*[types.intp] * 4), generate
