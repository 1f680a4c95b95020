"""The inner loops of `gemv_batch` for float16 matrices: a few rows times a few vectors, in registers.

`gemv` adds the products of columns k and k + 64 in one lane, so that a row has four sums of 16 lanes. They are computed
one after the other for a few rows and vectors; the columns of each are laid side by side first, as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, HALF, I32, I64, Vectors, vector
from cpu_kernels.transformer.batch_dot import LANES, ROWS, parts_of_a_step, tile_rows

SUMS = 4  # of 16 lanes for each row and vector
BLOCK = LANES * SUMS


@intrinsic
def arrange_floats(typing_context, x, x_stride, columns, count, out):
    """Emit a copy of some vectors in the order in which `dot_halves` reads them; addresses and numbers as integers.

    Args:
        x, x_stride: the first vector, and the bytes from vector to vector.
        columns: of a vector; only whole blocks of 64 are copied.
        count: how many vectors.
        out: float32 [4 sums, blocks, count, 16], out.

    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        x, x_stride, columns, count, out = arguments
        blocks = builder.lshr(columns, I64(6))
        with cgutils.for_range(builder, blocks) as block, cgutils.for_range(builder, count) as each:
            source = builder.add(x, builder.mul(each.index, x_stride))
            source = builder.add(source, builder.mul(block.index, I64(4 * BLOCK)))
            for number in range(SUMS):
                before = builder.add(builder.mul(blocks, I64(number)), block.index)
                place = builder.add(builder.mul(before, count), each.index)
                floats = vectors.load(source, FLOAT, LANES, 4 * LANES * number)
                vectors.store(floats, builder.add(out, builder.mul(place, I64(4 * LANES))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


class _HalfTile:
    """Emits a few rows times a few vectors."""

    def __init__(self, vectors: Vectors, rows: Sequence[ir.Value], x: Sequence[ir.Value], parts: int) -> None:
        """Take the addresses of float16 rows and of float32 vectors, for the columns behind the last block."""
        self._vectors, self._rows, self._x = vectors, rows, x
        self._parts, self._lanes = parts, LANES // parts

    def _add(self, weights: Sequence[ir.Value], values: Sequence[ir.Value], sums: Sequence[ir.Value]) -> None:
        builder, places = self._vectors.builder, iter(sums)
        for weight in weights:
            for value in values:
                place = next(places)
                builder.store(self._vectors.fma(weight, value, builder.load(place)), place)

    def sums(
        self,
        number: ir.Value,
        arranged: ir.Value,
        blocks: ir.Value,
        ahead: ir.Value,
        part: int,
        rest: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Return one part of one sum of every row and vector.

        number: of the sum; arranged: its columns of the vectors, as `arrange_floats` leaves them; blocks: of a row;
        ahead: a row further on, a quarter of which is asked for; rest: from which to which column further ones are
        added, 16 at a time.
        """
        vectors, builder, lanes = self._vectors, self._vectors.builder, self._lanes
        sums = [cgutils.alloca_once(builder, vector(FLOAT, lanes)) for _ in self._rows for _ in self._x]
        for place in sums:
            builder.store(vectors.constant(FLOAT, 0.0, lanes), place)
        first = builder.mul(number, I64(2 * LANES))
        quarter = builder.add(builder.mul(builder.mul(number, blocks), I64(2 * LANES)), ahead)
        with cgutils.for_range(builder, blocks) as loop:
            block = builder.mul(loop.index, I64(2 * BLOCK))
            for row in self._rows if part == 0 else ():
                vectors.prefetch(builder.add(builder.add(row, quarter), builder.mul(loop.index, I64(2 * LANES))))
            weights = [self._halves(row, builder.add(block, first), part) for row in self._rows]
            step = builder.add(arranged, builder.mul(loop.index, I64(4 * LANES * len(self._x))))
            values = [vectors.load(step, FLOAT, lanes, 4 * (LANES * c + part * lanes)) for c in range(len(self._x))]
            self._add(weights, values, sums)
        with cgutils.for_range_slice(builder, *rest, I64(LANES), I64) as (column, _):
            weights = [self._halves(row, builder.mul(column, I64(2)), part) for row in self._rows]
            places = [builder.add(x, builder.mul(column, I64(4))) for x in self._x]
            self._add(weights, [vectors.load(place, FLOAT, lanes, 4 * part * lanes) for place in places], sums)
        return [builder.load(place) for place in sums]

    def _halves(self, row: ir.Value, offset: ir.Value, part: int) -> ir.Value:
        """Load one part of 16 float16 of a row, as float32."""
        packed = self._vectors.load(self._vectors.builder.add(row, offset), HALF, self._lanes, 2 * part * self._lanes)
        return self._vectors.builder.fpext(packed, vector(FLOAT, self._lanes))

    def store_tails(self, first: ir.Value, end: ir.Value, tails: ir.Value) -> None:
        """Store the sums of the columns that are left, added one by one: float32 [vectors, ROWS]."""
        vectors, builder = self._vectors, self._vectors.builder
        for r, row in enumerate(self._rows):
            for c, x in enumerate(self._x):
                tail = cgutils.alloca_once(builder, FLOAT)
                builder.store(FLOAT(0.0), tail)
                with cgutils.for_range_slice(builder, first, end, I64(1), I64) as (column, _):
                    half = vectors.load(builder.add(row, builder.mul(column, I64(2))), HALF, 1)
                    other = vectors.load(builder.add(x, builder.mul(column, I64(4))), FLOAT, 1)
                    weight = builder.fpext(builder.extract_element(half, I32(0)), FLOAT)
                    product = builder.fmul(weight, builder.extract_element(other, I32(0)))
                    builder.store(builder.fadd(builder.load(tail), product), tail)
                place = builder.add(tails, I64(4 * (c * ROWS + r)))
                builder.store(builder.load(tail), builder.inttoptr(place, FLOAT.as_pointer()))


@intrinsic
def dot_halves(typing_context, isa, chunk, number, row, row_bytes, rows, x, x_stride, columns, arranged, out):
    """Emit one of the four sums of float16 rows times a few float32 vectors; addresses and numbers as integers.

    Args:
        isa, chunk: the instruction set and the number of vectors, as types.
        number: of the sum; they are to be computed in order.
        row, row_bytes, rows: the first row, the bytes from row to row, and how many, up to ROWS.
        x, x_stride: the first vector, and the bytes from vector to vector.
        columns: of a row.
        arranged: this sum's columns of the vectors, as `arrange_floats` leaves them.
        out: three addresses. Of totals, float32 [vectors, ROWS, 16]: what remains is to add the lanes; of memory of the
            same size; and of tails, float32 [vectors, ROWS]: the products of the last columns, to be added to that.

    """

    def generate(context, builder, signature, arguments):
        vectors, tile = Vectors(builder, isa.count), tile_rows(isa.count)
        number, row, row_bytes, rows, x, x_stride, columns, arranged, out = arguments[2:]
        totals, others, tails = cgutils.unpack_tuple(builder, out)
        parts, count = parts_of_a_step(isa.count), chunk.count
        last = builder.sub(rows, I64(1))
        x_of = [builder.add(x, builder.mul(x_stride, I64(c))) for c in range(count)]
        tiles = builder.udiv(builder.add(rows, I64(tile - 1)), I64(tile))
        is_first = builder.icmp_signed("==", number, I64(0))
        vectors_start, vectors_end = builder.and_(columns, I64(-BLOCK)), builder.and_(columns, I64(-LANES))
        rest = vectors_start, builder.select(is_first, vectors_end, vectors_start)
        blocks = builder.lshr(columns, I64(6))
        ahead = builder.mul(row_bytes, I64(ROWS))
        with cgutils.for_range(builder, tiles) as loop:
            first = builder.mul(loop.index, I64(tile))
            numbers = [builder.add(first, I64(r)) for r in range(tile)]
            # No row is read behind the last one: it stands in for those that are missing.
            clamped = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
            own = [builder.add(row, builder.mul(n, row_bytes)) for n in clamped]
            emitter = _HalfTile(vectors, own, x_of, parts)
            shift = builder.mul(first, I64(4 * LANES))
            for part in range(parts):
                sums = emitter.sums(number, arranged, blocks, ahead, part, rest)
                offsets = [
                    4 * (LANES * (at % count * ROWS + at // count) + part * LANES // parts) for at in range(len(sums))
                ]
                _join(vectors, number, sums, builder.add(totals, shift), builder.add(others, shift), offsets)
            with builder.if_then(is_first):
                emitter.store_tails(vectors_end, columns, builder.add(tails, builder.mul(first, I64(4))))
        return context.get_dummy_value()

    return types.void(isa, chunk, *[types.intp] * 8, types.UniTuple(types.intp, 3)), generate


def _join(
    vectors: Vectors,
    number: ir.Value,
    sums: Sequence[ir.Value],
    totals: ir.Value,
    others: ir.Value,
    offsets: Sequence[int],
) -> None:
    """Add sums to those before: (0 + 1) + (2 + 3), where the sums 2 wait in `others`."""
    builder = vectors.builder
    lanes = sums[0].type.count

    def loaded(base: ir.Value) -> list[ir.Value]:
        return [vectors.load(base, FLOAT, lanes, offset) for offset in offsets]

    def added(left: Sequence[ir.Value], right: Sequence[ir.Value]) -> list[ir.Value]:
        return [builder.fadd(*pair) for pair in zip(left, right, strict=True)]

    cases = (
        (totals, lambda: sums),
        (totals, lambda: added(loaded(totals), sums)),
        (others, lambda: sums),
        (totals, lambda: added(loaded(totals), added(loaded(others), sums))),
    )
    for case, (target, values) in enumerate(cases):
        with builder.if_then(builder.icmp_signed("==", number, I64(case))):
            for value, offset in zip(values(), offsets, strict=True):
                vectors.store(value, target, offset)
