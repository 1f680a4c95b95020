"""The inner loop of `gemv`: packed rows times one vector, in registers.

With AVX-512 it is one row at a time, with AVX2 two: registers are half as wide, so a step of 16 groups takes two of
everything, and as much is loaded for each. Both rows share what is loaded of the vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import EXTRACT
from cpu_kernels.packed_rows.group_lanes import GroupLanes, RowPair
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from cpu_kernels.simd.pair_lookup import PairLookup
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector

_LANES = 16  # groups of a step
_REST_LANES = (8, 4)  # groups behind the last whole step
_REGISTER_LANES = 8  # groups of a row that are multiplied at once, if there are two rows
_DEPTH_OF_PAIRS = 3  # up to it a group's products of 8-bit numbers, added in pairs, fit 16 bits: 8 * 26 * 127
# Prefetch distance. Without prefetching, decode from memory ran at half the speed: the extraction fills the reorder
# buffer, so few loads are in flight.
_PREFETCH_BYTES = 8192


class _Row:
    """Emits the dot product of one packed row and a quantized vector."""

    at_once = 1

    def __init__(
        self, vectors: Vectors, depth: int, bits: int, x: Sequence[ir.Value], groups: ir.Value, steps: ir.Value
    ) -> None:
        """Take the vector's integers of so many `bits`, offsets and scales, its groups, and the 32 steps: addresses."""
        self._vectors, self._depth, self._bits, self._groups, self._steps = vectors, depth, bits, groups, steps
        self._integers, self._offsets, self._scales = x
        self._table = [vectors.load(steps, FLOAT, 16), vectors.load(steps, FLOAT, 16, offset=64)]
        self._totals = {lanes: self._total(lanes) for lanes in (_LANES, *_REST_LANES)}

    def _total(self, lanes: int) -> ir.Value:
        return cgutils.alloca_once(self._vectors.builder, vector(FLOAT, lanes))

    def multiply(self, rows: Sequence[ir.Value], ahead: ir.Value) -> list[ir.Value]:
        """Emit the products of `at_once` rows at these addresses; memory is asked for from address `ahead` on."""
        vectors, builder, groups = self._vectors, self._vectors.builder, self._groups
        for total in self._totals.values():
            builder.store(ir.Constant(total.type.pointee, None), total)
        step_bytes = _LANES * GROUP_SIZE // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[self._depth] * self.at_once
        with cgutils.for_range(builder, builder.lshr(groups, I64(4))) as loop:
            there = vectors.keep(builder.add(ahead, builder.mul(loop.index, I64(step_bytes))))
            for line in range(0, step_bytes, 64):
                vectors.prefetch(there, line)
            self._add(rows, vectors.keep(builder.shl(loop.index, I64(4))), _LANES)
        for lanes in _REST_LANES:
            rest = builder.and_(groups, I64(lanes))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0)), likely=False):
                self._add(rows, builder.and_(groups, I64(-2 * lanes)), lanes)
        return self._results()

    def _add(self, rows: Sequence[ir.Value], group: ir.Value, lanes: int) -> None:
        """Add so many groups to the totals, from `group` on."""
        self._add_to(self._totals[lanes], rows[0], group, lanes)

    def _results(self) -> list[ir.Value]:
        return [self._sum([self._vectors.builder.load(total) for total in self._totals.values()])]

    def _add_to(self, total: ir.Value, row: ir.Value, group: ir.Value, lanes: int) -> None:
        sums, scales = self._offsets_and_scales(group, lanes)
        step = GroupLanes(self._vectors, row, self._integers, self._bits, self._groups, group, sums)
        found = self._vectors.lookup(self._table, self._steps, EXTRACT[self._depth](step))
        self._add_scaled(total, step.sums, found, scales)

    def _offsets_and_scales(self, group: ir.Value, lanes: int) -> tuple[ir.Value, ir.Value]:
        vectors, builder = self._vectors, self._vectors.builder
        place = builder.mul(group, I64(4))
        offsets = vectors.load(builder.add(self._offsets, place), I32, lanes)
        return offsets, vectors.load(builder.add(self._scales, place), FLOAT, lanes)

    def _add_scaled(self, total: ir.Value, sums: ir.Value, steps: ir.Value, scales: ir.Value) -> None:
        vectors, builder = self._vectors, self._vectors.builder
        factors = builder.fmul(steps, scales)
        builder.store(vectors.fma(vectors.to_float(sums), factors, builder.load(total)), total)

    def _sum(self, totals: Sequence[ir.Value]) -> ir.Value:
        """Return the sum of the lanes of a row's totals, of 16, 8 and 4 lanes: `gemv_batch` adds in this order."""
        result = FLOAT(0.0)
        for total in totals:
            result = self._vectors.builder.fadd(result, self._vectors.sum(total))
        return result


class _TwoRows(_Row):
    """Emits the dot products of two packed rows and a quantized vector; in registers their lanes are side by side.

    The totals are of both rows' groups 0 to 7 of every step, of groups 8 to 15, and of the 8 groups behind the steps;
    then of the 4 groups behind those, of each row alone.
    """

    at_once = 2

    def __init__(
        self, vectors: Vectors, depth: int, bits: int, x: Sequence[ir.Value], groups: ir.Value, steps: ir.Value
    ) -> None:
        """Take what `_Row` takes."""
        super().__init__(vectors, depth, bits, x, groups, steps)
        self._lookup = PairLookup(vectors, steps)
        lanes = (*[2 * _REGISTER_LANES] * 3, *[_REST_LANES[1]] * 2)
        self._totals = {number: self._total(count) for number, count in enumerate(lanes)}

    def _results(self) -> list[ir.Value]:
        vectors = self._vectors
        totals = [vectors.builder.load(total) for total in self._totals.values()]
        low, high, eight = (vectors.split(total) for total in totals[:3])
        return [self._sum([vectors.join(low[r], high[r]), eight[r], totals[3 + r]]) for r in range(self.at_once)]

    def _add(self, rows: Sequence[ir.Value], group: ir.Value, lanes: int) -> None:
        if lanes == _REST_LANES[1]:
            for r, row in enumerate(rows):
                self._add_to(self._totals[3 + r], row, group, lanes)
            return
        vectors, parts = self._vectors, (0, 1) if lanes == _LANES else (2,)
        sums: list[ir.Value] = []
        indices: list[ir.Value] = []
        scales = []
        for _ in parts:
            if sums:  # both parts at once are more than the registers hold
                group = vectors.keep(vectors.builder.add(group, I64(_REGISTER_LANES)), after=[sums[0], indices[0]])
            offsets, own_scales = self._offsets_and_scales(group, _REGISTER_LANES)
            both = vectors.join(offsets, offsets)
            small = self._depth <= _DEPTH_OF_PAIRS
            step = RowPair(vectors, rows, self._integers, self._bits, self._groups, group, both, small_levels=small)
            indices.append(EXTRACT[self._depth](step))
            sums.append(step.sums)
            scales.append(vectors.join(own_scales, own_scales))
        found = self._lookup.find([indices[0], indices[-1]])
        for number, *values in zip(parts, sums, found, scales, strict=False):
            self._add_scaled(self._totals[number], *values)


@intrinsic
def multiply_packed_rows(typing_context, isa, depth, integers, x, matrix, out):
    """Emit packed rows times a quantized vector; addresses and numbers as integers.

    Args:
        isa, depth: as types.
        integers: of the vector, as an array.
        x: where the vector's offsets and scales lie, and how many groups it has.
        matrix: the first row, the bytes of a row, how many rows, and the steps: float32 [32].
        out: float32 [rows], out.

    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count, keep_constants=True)
        integers_array, x, matrix, out = arguments[2:]
        first_integer = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        offsets, scales, groups = cgutils.unpack_tuple(builder, x)
        row, row_bytes, rows, steps = cgutils.unpack_tuple(builder, matrix)
        kind = _TwoRows if PairLookup.available(vectors) else _Row
        emitter = kind(vectors, depth.count, bits, (first_integer, offsets, scales), groups, steps)
        at_once, last = emitter.at_once, builder.sub(rows, I64(1))
        with cgutils.for_range(builder, builder.udiv(builder.add(rows, I64(at_once - 1)), I64(at_once))) as loop:
            numbers = [builder.add(builder.mul(loop.index, I64(at_once)), I64(k)) for k in range(at_once)]
            # No row is read behind the last one: it stands in for one that is missing.
            numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
            addresses = [builder.add(row, builder.mul(n, row_bytes)) for n in numbers]
            results = emitter.multiply(addresses, builder.add(addresses[0], I64(_PREFETCH_BYTES)))
            for number, result in zip(numbers, results, strict=True):
                place = builder.add(out, builder.mul(number, I64(4)))
                builder.store(result, builder.inttoptr(place, FLOAT.as_pointer()))
        return context.get_dummy_value()

    triple, four = types.UniTuple(types.intp, 3), types.UniTuple(types.intp, 4)
    return types.void(isa, depth, integers, triple, four, types.intp), generate
