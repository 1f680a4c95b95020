"""Matrix times vector for decode, directly from packed rows or from float16 rows."""

from __future__ import annotations

from collections.abc import Sequence

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.packed_rows.extract import D1, D2, D3, D4, EXTRACT, GroupLanes, RowPair
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from cpu_kernels.simd.lookup import PairLookup
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector
from cpu_kernels.transformer.half_dot import dot_last_columns, multiply_half_vector

HALVES = 0  # the depth of a float16 matrix; 1 to 4 are the depths of trit matrices
_LANES = (16, 8, 4)
# Prefetch distance. Without prefetching, decode from memory ran at half the speed: the extraction fills the reorder
# buffer, so few loads are in flight.
_PREFETCH_BYTES = 8192


class _OneRow:
    """Emits a packed row times a vector: all lanes of its total are one vector."""

    at_once = 1

    def __init__(self, vectors: Vectors, depth: int, bits: int, x: Sequence[ir.Value], steps: ir.Value, groups: ir.Value):
        self._vectors, self._depth, self._bits = vectors, depth, bits
        self._integers, self._offsets, self._scales = x
        self._steps, self._groups = steps, groups
        self._table = [vectors.load(steps, FLOAT, 16), vectors.load(steps, FLOAT, 16, offset=64)]

    def multiply(self, rows: Sequence[ir.Value], ahead: ir.Value) -> list[ir.Value]:
        """Emit the dot products of rows at these addresses; `ahead` is where memory is asked for."""
        vectors, builder, groups = self._vectors, self._vectors.builder, self._groups
        totals = self._start()
        step_bytes = 16 * GROUP_SIZE // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[self._depth] * len(rows)
        with cgutils.for_range(builder, builder.lshr(groups, I64(4))) as loop:
            there = vectors.keep(builder.add(ahead, builder.mul(loop.index, I64(step_bytes))))
            for line in range(0, step_bytes, 64):
                vectors.prefetch(there, line)
            self._add(rows, vectors.keep(builder.shl(loop.index, I64(4))), 16)
        for lanes in (8, 4):
            rest = builder.and_(groups, I64(lanes))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0)), likely=False):
                self._add(rows, builder.and_(groups, I64(-2 * lanes)), lanes)
        return self._results()

    def _start(self): 
        self._totals = self._places(_LANES)

    def _places(self, lanes):
        result = {k: cgutils.alloca_once(self._vectors.builder, vector(FLOAT, k)) for k in lanes}
        for lanes, total in result.items():
            self._vectors.builder.store(self._vectors.constant(FLOAT, 0.0, lanes), total)
        return result

    def _results(self):
        return [self._sum([self._vectors.builder.load(total) for total in self._totals.values()])]

    def _sum(self, totals: Sequence[ir.Value]) -> ir.Value:
        result = FLOAT(0.0)
        for total in totals:
            result = self._vectors.builder.fadd(result, self._vectors.sum(total))
        return result

    def _add(self, rows: Sequence[ir.Value], group: ir.Value, lanes: int) -> None:
        """Add some groups to the totals."""
        self._add_row(rows[0], group, lanes, self._totals[lanes])

    def _add_row(self, row, group, lanes, total):
        vectors, builder = self._vectors, self._vectors.builder
        place = builder.mul(group, I64(4))
        sums = vectors.load(builder.add(self._offsets, place), I32, lanes)
        step = GroupLanes(vectors, row, self._integers, self._bits, self._groups, group, sums)
        found = vectors.lookup(self._table, self._steps, EXTRACT[self._depth](step))
        scales = vectors.load(builder.add(self._scales, place), FLOAT, lanes)
        self._add_sums(step.sums, found, scales, total)

    def _add_sums(self, sums, found, scales, total):
        vectors, builder = self._vectors, self._vectors.builder
        scale = builder.fmul(found, scales)
        builder.store(vectors.fma(vectors.to_float(sums), scale, builder.load(total)), total)


class _TwoRows(_OneRow):
    """Emits two packed rows times a vector."""

    at_once = 2

    def __init__(self, vectors: Vectors, depth: int, bits: int, x: Sequence[ir.Value], steps: ir.Value, groups: ir.Value):
        super().__init__(vectors, depth, bits, x, steps, groups)
        self._pairs = PairLookup(vectors, steps)

    def _start(self):
        # of both rows' groups 0 to 7 and 8 to 15 of a step, and of the 8 groups behind the steps; of 4 for each row
        self._wide = [self._places((16,))[16] for _ in range(3)]
        self._narrow = [self._places((4,))[4] for _ in range(2)]

    def _results(self):
        builder = self._vectors.builder
        low, high, rest = [self._vectors.split(builder.load(total)) for total in self._wide]
        return [self._sum([self._vectors.join(low[r], high[r]), rest[r], builder.load(self._narrow[r])]) for r in range(2)]

    def _add(self, rows: Sequence[ir.Value], group: ir.Value, lanes: int) -> None:
        if lanes == 4:
            for row, total in zip(rows, self._narrow, strict=True):
                self._add_row(row, group, lanes, total)
            return
        vectors, builder = self._vectors, self._vectors.builder
        done, totals = [], self._wide[:2] if lanes == 16 else self._wide[2:]
        for half in range(len(totals)):
            first = builder.add(group, I64(8 * half))
            place = builder.mul(first, I64(4))
            sums = vectors.load(builder.add(self._offsets, place), I32, 8)
            step = RowPair(vectors, rows, self._integers, self._bits, self._groups, first, vectors.join(sums, sums))
            done.append((EXTRACT[self._depth](step), step.sums, vectors.load(builder.add(self._scales, place), FLOAT, 8)))
        found = self._pairs.find([done[0][0], done[-1][0]])
        for (_, sums, scales), steps, total in zip(done, found, totals, strict=False):
            self._add_sums(sums, steps, vectors.join(scales, scales), total)


@intrinsic
def _multiply_trit_rows(typing_context, depth, isa, integers, vector_places, matrix, out):
    """Emit packed rows times a quantized vector; addresses and numbers as integers.

    Args:
        depth, isa: as types.
        integers: of the vector, as an array.
        vector_places: where the vector's offsets and scales lie, and how many groups it has.
        matrix: the first row, the bytes of a row, how many rows, and the steps.
        out: float32 [rows], out.

    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count, keep_constants=True)
        integers_array, places, matrix, out = arguments[2:]
        x = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        offsets, scales, groups = cgutils.unpack_tuple(builder, places)
        row, row_bytes, rows, steps = cgutils.unpack_tuple(builder, matrix)
        emitter = (_TwoRows if PairLookup.available(vectors) else _OneRow)(vectors, depth.count, bits, (x, offsets, scales), steps, groups)
        at_once, last = emitter.at_once, builder.sub(rows, I64(1))
        with cgutils.for_range(builder, builder.udiv(builder.add(rows, I64(at_once - 1)), I64(at_once))) as loop:
            first = builder.mul(loop.index, I64(at_once))
            # No row is read behind the last one: it stands in for those that are missing.
            numbers = [builder.add(first, I64(k)) for k in range(at_once)]
            numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
            addresses = [builder.add(row, builder.mul(n, row_bytes)) for n in numbers]
            results = emitter.multiply(addresses, builder.add(addresses[0], I64(_PREFETCH_BYTES)))
            for number, result in zip(numbers, results, strict=True):
                end = builder.add(out, builder.mul(number, I64(4)))
                builder.store(result, builder.inttoptr(end, FLOAT.as_pointer()))
        return context.get_dummy_value()

    triple, four = types.UniTuple(types.intp, 3), types.UniTuple(types.intp, 4)
    return types.void(depth, isa, integers, triple, four, types.intp), generate


@numba.njit(cache=True)
def _trit_rows(depth, isa, address, row_bytes, integers, sums, scales, steps, y, first, last):
    """Compute rows `first` to before `last` of one packed matrix."""
    x = sums.ctypes.data, scales.ctypes.data, len(scales)
    matrix = address + first * row_bytes, row_bytes, last - first, steps.ctypes.data
    _multiply_trit_rows(depth, isa, integers, x, matrix, y[first:].ctypes.data)


@numba.njit(cache=True)
def half_rows(isa, address, x, y, first, last):
    """Compute rows `first` to before `last` of one float16 matrix."""
    columns, row_bytes = len(x), 2 * len(x)
    row = address + first * row_bytes
    multiply_half_vector(isa, row, row_bytes, last - first, x.ctypes.data, columns // 16, y[first:].ctypes.data)
    if columns % 16:
        for r in range(first, last):
            y[r] += dot_last_columns(address + r * row_bytes, x.ctypes.data, columns // 16 * 16, columns)


@numba.njit(cache=True)
def multiply_rows(isa, address, depth, steps, activations, y, first, last):
    """Compute rows `first` to before `last` of one matrix times one vector.

    Args:
        isa: the instruction set, see `instruction_set`.
        address: address of the matrix's first row.
        depth: HALVES or a depth.
        steps: float32 [32], codebook / h, padded.
        activations: x, integers, offsets and scales, see `quantize_row`.
        y: float32 [rows of the matrix], out.
        first, last: the rows to compute.

    """
    x, integers, offsets, scales = activations
    blocks = len(scales) // 4
    if depth == HALVES:
        half_rows(isa, address, x, y, first, last)
    elif depth == 1:
        _trit_rows(D1, isa, address, blocks * 16, integers, offsets[0], scales, steps, y, first, last)
    elif depth == 2:
        _trit_rows(D2, isa, address, blocks * 28, integers, offsets[1], scales, steps, y, first, last)
    elif depth == 3:
        _trit_rows(D3, isa, address, blocks * 42, integers, offsets[2], scales, steps, y, first, last)
    else:
        _trit_rows(D4, isa, address, blocks * 54, integers, offsets[3], scales, steps, y, first, last)


@numba.njit(cache=True, nogil=True)
def gemv(isa, addresses, rows, depths, steps, activations, y, thread, threads):
    """Compute a thread's share of several matrices times one vector.

    Args:
        isa: the instruction set.
        addresses, rows, depths: int64 [matrices].
        steps: float32 [matrices, 32].
        activations: as in `multiply_rows`.
        y: float32 [rows of all matrices], out: the concatenated results.
        thread, threads: which of how many shares of the rows to compute.

    """
    low, high = y.size * thread // threads, y.size * (thread + 1) // threads
    start = 0
    for m in range(len(rows)):
        first, last = max(low - start, 0), min(high - start, rows[m])
        if first < last:
            out = y[start : start + rows[m]]
            multiply_rows(isa, addresses[m], depths[m], steps[m], activations, out, first, last)
        start += rows[m]
