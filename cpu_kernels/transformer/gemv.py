"""Matrix times vector for decode, directly from packed rows or from float16 rows."""

from __future__ import annotations

from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.extract import D1, D2, D3, D4, EXTRACT, GroupLanes
from cpu_kernels.packed_rows.layout import BLOCK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector
from cpu_kernels.transformer.half_dot import dot_last_columns, multiply_half_vector

HALVES = 0  # the depth of a float16 matrix; 1 to 4 are the depths of trit matrices
_LANES = (16, 8, 4)
# Prefetch distance. Without prefetching, decode from memory ran at half the speed: the extraction fills the reorder
# buffer, so few loads are in flight.
_PREFETCH_BYTES = 8192


@intrinsic
def _trit_row_dot(typing_context, depth, isa, words, integers, offsets, scales, steps, groups):
    """Emit the dot product of one packed row and a quantized vector, float32.

    Arrays are given as addresses, but for the integers of the vector, whose type says how many bits they have.
    """
    bits = integers.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        words, integers_array, offsets, scales, steps, groups = arguments[2:]
        x = builder.ptrtoint(context.make_array(integers)(context, builder, integers_array).data, I64)
        table = [vectors.load(steps, FLOAT, 16), vectors.load(steps, FLOAT, 16, offset=64)]
        accumulators = {lanes: cgutils.alloca_once(builder, vector(FLOAT, lanes)) for lanes in _LANES}
        for lanes, accumulator in accumulators.items():
            builder.store(vectors.constant(FLOAT, 0.0, lanes), accumulator)

        def emit(first_group: ir.Value, lanes: int) -> None:
            byte_offset = builder.mul(first_group, I64(4))
            sums = vectors.load(builder.add(offsets, byte_offset), I32, lanes)
            step = GroupLanes(vectors, words, x, bits, groups, first_group, sums)
            indices = EXTRACT[depth.count](step)
            weight_steps = vectors.lookup(table, steps, indices)
            scale = builder.fmul(weight_steps, vectors.load(builder.add(scales, byte_offset), FLOAT, lanes))
            accumulator = accumulators[lanes]
            builder.store(vectors.fma(vectors.to_float(step.sums), scale, builder.load(accumulator)), accumulator)

        step_bytes = 16 * GROUP_SIZE // BLOCK_SIZE * 2 * WORDS_PER_BLOCK[depth.count]
        with cgutils.for_range(builder, builder.lshr(groups, I64(4))) as loop:
            ahead = builder.add(words, builder.mul(loop.index, I64(step_bytes)))
            for line in range(0, step_bytes, 64):
                vectors.prefetch(ahead, _PREFETCH_BYTES + line)
            emit(builder.shl(loop.index, I64(4)), 16)
        for lanes in (8, 4):
            rest = builder.and_(groups, I64(lanes))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0)), likely=False):
                emit(builder.and_(groups, I64(-2 * lanes)), lanes)
        total = FLOAT(0.0)
        for accumulator in accumulators.values():
            total = builder.fadd(total, vectors.sum(builder.load(accumulator)))
        return total

    arguments = (depth, isa, types.intp, integers, *[types.intp] * 4)
    return types.float32(*arguments), generate


@numba.njit(cache=True)
def _trit_rows(depth, isa, address, row_bytes, integers, sums, scales, steps, y, first, last):
    """Compute rows `first` to before `last` of one packed matrix."""
    row = address + first * row_bytes
    offsets, units, table = sums.ctypes.data, scales.ctypes.data, steps.ctypes.data
    for r in range(first, last):
        y[r] = _trit_row_dot(depth, isa, row, integers, offsets, units, table, len(scales))
        row += row_bytes


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
