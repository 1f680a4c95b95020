"""Kernels of the encoder v2: weights -> best scale per group -> codebook index and levels.

Each lane of a vector is a group, so sixteen groups are searched at once and no sum crosses lanes. Weights are read in
their stored type (see `as_stored`), so that no float32 copy of a matrix is needed.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import intrinsic, types
from cpu_kernels.packed_rows.layout import CODEBOOK_SIZE, GROUP_SIZE
from cpu_kernels.simd.transpose import transpose
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, HALF, I8, I16, I32, Vectors, vector

# The candidates for a group's scale: its sorted magnitudes at these indices (as in the published format).
CANDIDATES = (10, 12, 14, 15)

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # stored types of weights

_GROUPS = 16  # in one vector
_BLOCK = _GROUPS * GROUP_SIZE  # weights
_SMALLEST_SCALE = 1e-30  # the reciprocal of a smaller step could overflow
_INFINITY = 0x7F800000


def as_stored(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """Return weights as the kernels read them (float32, or uint16 bits), and their stored type.

    `weights` are float32, float16, or uint16 (the bits of bfloat16), of any shape.
    """
    types_by_dtype = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16, np.dtype(np.uint16): BFLOAT16}
    stored_type = types_by_dtype[weights.dtype]
    stored = np.ascontiguousarray(weights).view(np.float32 if stored_type == FLOAT32 else np.uint16)
    stored.flags.writeable = False  # like arrays of a mapped file, so that Numba compiles one version only
    return stored, stored_type


def _comparators(first: int, count: int, step: int = 1) -> list[tuple[int, int]]:
    """Return the comparators of Batcher's odd-even merge sort for `count` values, a power of two."""
    if count == 1:
        return []

    def merge(low: int, length: int, stride: int) -> list[tuple[int, int]]:
        double = 2 * stride
        if double >= length:
            return [(low, low + stride)]
        inner = [(k, k + stride) for k in range(low + stride, low + length - stride, double)]
        return [*merge(low, length, double), *merge(low + stride, length, double), *inner]

    half = count // 2
    return [*_comparators(first, half), *_comparators(first + half, half), *merge(first, count, step)]


def _clamped(vectors: Vectors, value: ir.Value, largest: ir.Value) -> ir.Value:
    builder = vectors.builder
    return builder.select(builder.fcmp_ordered("<", value, largest), value, largest)


@intrinsic
def _search_block(typing_context, source, offset, scales):
    """Emit the scale search of 16 groups.

    `source` is the address of float32 [16, 16], `scales` that of float32 [16], out. A group's squared errors are
    summed in the order of its weights by fused multiply-adds. Returns the largest magnitude as the bits of a float32;
    in this order infinity and NaN are the largest.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        source, offset, scales = arguments
        floats, integers = vector(FLOAT, _GROUPS), vector(I32, _GROUPS)
        sign = vectors.constant(I32, 0x7FFFFFFF, _GROUPS)
        rows = []
        for group in range(_GROUPS):
            bits = vectors.load(source, I32, GROUP_SIZE, 4 * GROUP_SIZE * group)
            rows.append(builder.bitcast(builder.and_(bits, sign), floats))
        magnitudes = transpose(vectors, rows)

        # The bits of magnitudes sort like the magnitudes, and integer minimum and maximum are single instructions.
        ordered = [builder.bitcast(magnitude, integers) for magnitude in magnitudes]
        for low, high in _comparators(0, GROUP_SIZE):
            a, b = ordered[low], ordered[high]
            ordered[low] = vectors.call(f"llvm.smin.v{_GROUPS}i32", integers, a, b)
            ordered[high] = vectors.call(f"llvm.smax.v{_GROUPS}i32", integers, a, b)

        offsets = vectors.fill(offset, _GROUPS)
        best = vectors.constant(FLOAT, 0.0, _GROUPS)
        least = vectors.constant(FLOAT, float("inf"), _GROUPS)
        for candidate in CANDIDATES:
            scale = builder.bitcast(ordered[candidate], floats)
            to_level, step = builder.fdiv(offsets, scale), builder.fneg(builder.fdiv(scale, offsets))
            error = vectors.constant(FLOAT, 0.0, _GROUPS)
            for magnitude in magnitudes:
                level = vectors.call(f"llvm.rint.v{_GROUPS}f32", floats, builder.fmul(magnitude, to_level))
                difference = vectors.fma(_clamped(vectors, level, offsets), step, magnitude)
                error = vectors.fma(difference, difference, error)
            is_scale = builder.fcmp_ordered(">", scale, vectors.constant(FLOAT, _SMALLEST_SCALE, _GROUPS))
            is_better = builder.and_(is_scale, builder.fcmp_ordered("<", error, least))
            best, least = builder.select(is_better, scale, best), builder.select(is_better, error, least)
        vectors.store(best, scales)
        return vectors.call(f"llvm.vector.reduce.smax.v{_GROUPS}i32", I32, ordered[-1])

    return types.int32(types.intp, types.float32, types.intp), generate


@intrinsic
def _round_block(typing_context, source, scales, thresholds, steps, offset, levels, indices, sums):
    """Emit the rounding of 16 groups; arguments but `offset` are addresses of arrays as in `round_to_codebook`.

    source: float32 [16, 16]; scales: float32 [16]; levels: uint8 [16, 16], out; indices: uint8 [16], out; sums:
    float32 [2, 16], out: squared errors and squared weights.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        source, scales, thresholds, steps, offset, levels, indices, sums = arguments
        floats, zeros = vector(FLOAT, _GROUPS), vectors.constant(FLOAT, 0.0, _GROUPS)
        scale = vectors.load(scales, FLOAT, _GROUPS)
        index, step = vectors.constant(I32, 0, _GROUPS), vectors.splat(steps, FLOAT, _GROUPS)
        for entry in range(1, CODEBOOK_SIZE):
            threshold = vectors.splat(thresholds, FLOAT, _GROUPS, 4 * (entry - 1))
            is_above = builder.fcmp_ordered(">", scale, threshold)
            index = builder.select(is_above, vectors.constant(I32, entry, _GROUPS), index)
            step = builder.select(is_above, vectors.splat(steps, FLOAT, _GROUPS, 4 * entry), step)
        vectors.store(builder.trunc(index, vector(I8, _GROUPS)), indices)
        is_positive = builder.fcmp_ordered(">", step, zeros)
        to_level = builder.select(is_positive, builder.fdiv(vectors.constant(FLOAT, 1.0, _GROUPS), step), zeros)

        offsets = vectors.fill(offset, GROUP_SIZE)
        lowest, error, power = builder.fneg(offsets), zeros, zeros
        for group in range(_GROUPS):
            weights = vectors.load(source, FLOAT, GROUP_SIZE, 4 * GROUP_SIZE * group)
            lanes = [group] * GROUP_SIZE
            level = builder.fmul(weights, vectors.shuffle(to_level, lanes))
            level = _clamped(vectors, vectors.call(f"llvm.rint.v{GROUP_SIZE}f32", floats, level), offsets)
            level = builder.select(builder.fcmp_ordered(">", level, lowest), level, lowest)
            difference = builder.fsub(weights, builder.fmul(level, vectors.shuffle(step, lanes)))
            error = vectors.fma(difference, difference, error)
            power = vectors.fma(weights, weights, power)
            stored = builder.fptosi(builder.fadd(level, offsets), vector(I32, GROUP_SIZE))
            vectors.store(builder.trunc(stored, vector(I8, GROUP_SIZE)), levels, GROUP_SIZE * group)
        vectors.store(error, sums)
        vectors.store(power, sums, 4 * _GROUPS)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.float32, *[types.intp] * 3), generate


def _widening(widen):
    """Return an intrinsic that converts 256 stored weights at one address to float32 at another."""

    @intrinsic
    def emit(typing_context, source, target):
        def generate(context, builder, signature, arguments):
            vectors = Vectors(builder, PORTABLE)
            for first in range(0, _BLOCK, 16):
                vectors.store(widen(vectors, arguments[0], 2 * first), arguments[1], 4 * first)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return emit


def _widened_half(vectors, address, offset):
    return vectors.builder.fpext(vectors.load(address, HALF, 16, offset), vector(FLOAT, 16))


def _widened_bfloat(vectors, address, offset):
    # bfloat16 is the upper half of a float32.
    bits = vectors.widen(vectors.load(address, I16, 16, offset))
    return vectors.builder.bitcast(vectors.shift_left(bits, 16), vector(FLOAT, 16))


_widen_halves, _widen_bfloats = _widening(_widened_half), _widening(_widened_bfloat)


@numba.njit(cache=True)
def _read_block(weights, stored_type, block, stored, widened):
    """Return the address of a block's weights as float32 [16, 16]; groups beyond the last are zeros.

    weights: 1-D; stored, widened: scratch for one block, in the stored type and in float32.
    """
    first, size = block * _BLOCK, weights.itemsize
    address = weights.ctypes.data + first * size
    if first + _BLOCK > len(weights):
        stored[:] = 0
        stored[: len(weights) - first] = weights[first:]
        address = stored.ctypes.data
    if stored_type == FLOAT32:
        return address
    if stored_type == FLOAT16:
        _widen_halves(address, widened.ctypes.data)
    else:
        _widen_bfloats(address, widened.ctypes.data)
    return widened.ctypes.data


@numba.njit(cache=True, nogil=True)
def best_candidates(weights, stored_type, offset, scales, thread, threads):
    """Choose each group's scale: the candidate with the least squared error, the first in case of a tie.

    Args:
        weights, stored_type: [rows, columns] and their stored type, from `as_stored`.
        offset: float32, h of the depth.
        scales: float32 [rows, columns / 16], out; 0 for a group of zeros.
        thread, threads: which of how many shares of the groups to compute.

    Returns:
        The largest magnitude among this thread's weights, float32; NaN if a weight is NaN or infinite.

    """
    flat, flat_scales = weights.reshape(-1), scales.reshape(-1)
    blocks = (len(flat_scales) + _GROUPS - 1) // _GROUPS
    stored, widened = np.empty(_BLOCK, weights.dtype), np.empty(_BLOCK, np.float32)
    found = np.empty(_GROUPS, np.float32)
    largest = np.zeros(1, np.int32)
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first = block * _GROUPS
        address = _read_block(flat, stored_type, block, stored, widened)
        largest[0] = max(largest[0], _search_block(address, offset, found.ctypes.data))
        last = min(first + _GROUPS, len(flat_scales))
        flat_scales[first:last] = found[: last - first]
    return largest.view(np.float32)[0] if largest[0] < _INFINITY else np.float32(np.nan)


@numba.njit(cache=True, nogil=True)
def round_to_codebook(weights, stored_type, scales, thresholds, steps, offset, levels, indices, thread, threads):
    """Round each group's scale to a codebook entry, and its weights to levels of that entry.

    Args:
        weights, stored_type: as in `best_candidates`.
        scales: float32 [rows, columns / 16], from `best_candidates`.
        thresholds: float32 [26], ascending: a scale above threshold i gets an entry after i.
        steps: float32 [27], codebook / h, as the decoder computes it.
        offset: float32, h of the depth.
        levels: uint8 [rows, columns], out: level + h.
        indices: uint8 [rows, columns / 16], out: scale indices.
        thread, threads: as in `best_candidates`.

    Returns:
        (squared error, squared weights), float64 sums over the groups of this thread.

    """
    flat, flat_scales = weights.reshape(-1), scales.reshape(-1)
    flat_levels, flat_indices = levels.reshape(-1), indices.reshape(-1)
    blocks = (len(flat_scales) + _GROUPS - 1) // _GROUPS
    stored, widened = np.empty(_BLOCK, weights.dtype), np.empty(_BLOCK, np.float32)
    wanted, sums = np.zeros(_GROUPS, np.float32), np.empty((2, _GROUPS), np.float32)
    block_levels, block_indices = np.empty(_BLOCK, np.uint8), np.empty(_GROUPS, np.uint8)
    error, power = 0.0, 0.0
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first = block * _GROUPS
        last = min(first + _GROUPS, len(flat_scales))
        wanted[: last - first] = flat_scales[first:last]
        _round_block(
            _read_block(flat, stored_type, block, stored, widened), wanted.ctypes.data, thresholds.ctypes.data,
            steps.ctypes.data, offset, block_levels.ctypes.data, block_indices.ctypes.data, sums.ctypes.data,
        )  # fmt: skip
        flat_levels[first * GROUP_SIZE : last * GROUP_SIZE] = block_levels[: (last - first) * GROUP_SIZE]
        flat_indices[first:last] = block_indices[: last - first]
        for lane in range(_GROUPS):
            error += sums[0, lane]
            power += sums[1, lane]
    return error, power
