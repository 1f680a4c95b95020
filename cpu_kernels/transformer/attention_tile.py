"""Vector operations of attention as LLVM IR: products with cached keys or values, and softmax.

The KV cache is float32, or float16 stored as uint16, because Numba does not support float16 arithmetic, or int8 with a
float16 scale for 32 numbers (q8_0). Vectors are widened when they are loaded, and everything is computed in float32.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, register_jitable, types
from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512_NO_VNNI
from cpu_kernels.simd.vectors import FLOAT, HALF, I8, I16, I32, I64, Vectors, vector

PANEL = 32  # contiguous columns in the cache: positions of keys, dimensions of values; and numbers with one scale
SCALE_BYTES = 2  # float16
LARGEST_HALF = 65504.0
_CACHE_LINE = 64
_PREFETCH_BYTES = 4096  # how far ahead


@register_jitable
def max_rows(isa: int) -> int:
    """Return how many rows a product computes at once: as many as have their sums in registers."""
    return 8 if isa >= AVX512_NO_VNNI else 6


@register_jitable
def product_columns(isa: int) -> int:
    """Return how many columns a product computes at once."""
    return PANEL if isa >= AVX512_NO_VNNI else PANEL // 2


def lanes_of(isa: int) -> int:
    """Return the number of floats in a vector; the portable variant uses 16, which LLVM splits."""
    return 8 if isa in (AVX2, AVX2_VNNI) else 16


def emit_product(vectors: Vectors, element: ir.Type, rows: int, left, right, inner, out, scales, of_keys: bool) -> None:
    """Emit out[rows, columns] += left[rows, inner] * right[inner, columns].

    Args:
        vectors, rows: where to emit, and for how many rows, a constant.
        element: the element type of `right`: HALF, FLOAT, or I8 with scales.
        left, out: float32 matrices, as the address of the first element and the row stride in bytes, i64 each.
        right: address of the first element, i64; a row has PANEL elements.
        inner: the inner dimension, i64; a multiple of 32 for keys.
        scales: of I8, their address, i64: for keys one of each column and 32 rows of `right`, for values of each row.
        of_keys: whether `right` are keys.

    """
    builder, isa = vectors.builder, vectors.isa
    lanes, columns = lanes_of(isa), product_columns(isa)
    parts = range(0, columns, lanes)
    element_bytes, floats = {I8: 1, HALF: 2, FLOAT: 4}[element], vector(FLOAT, lanes)

    def row_address(matrix, index):
        return builder.add(matrix[0], builder.mul(index, matrix[1]))

    rows_of_left = [row_address(left, I64(row)) for row in range(rows)]
    rows_of_out = [row_address(out, I64(row)) for row in range(rows)]
    sums = [[cgutils.alloca_once(builder, vector(FLOAT, lanes)) for _ in parts] for _ in range(rows)]
    for address, row_sums in zip(rows_of_out, sums, strict=True):
        for first, total in zip(parts, row_sums, strict=True):
            builder.store(vectors.load(address, FLOAT, lanes, 4 * first), total)

    def add_row(index, scale_of_columns) -> None:
        row_of_right = row_address((right, I64(PANEL * element_bytes)), index)
        for offset in range(0, columns * element_bytes, _CACHE_LINE):
            vectors.prefetch(row_of_right, _PREFETCH_BYTES + offset, into_first_level=False)
        factors = []
        for first, scale in zip(parts, scale_of_columns, strict=True):
            factor = vectors.load(row_of_right, element, lanes, element_bytes * first)
            if element is I8:
                factor = builder.fmul(builder.sitofp(factor, floats), scale)
            factors.append(builder.fpext(factor, floats) if element is HALF else factor)
        for address, row_sums in zip(rows_of_left, sums, strict=True):
            one = vectors.splat(builder.add(address, builder.mul(index, I64(4))), FLOAT, lanes)
            for factor, total in zip(factors, row_sums, strict=True):
                builder.store(vectors.multiply_add(one, factor, builder.load(total)), total)

    if element is I8 and of_keys:
        with cgutils.for_range(builder, builder.lshr(inner, I64(5))) as block:
            of_block = row_address((scales, I64(PANEL * SCALE_BYTES)), block.index)
            halves = [vectors.load(of_block, HALF, lanes, SCALE_BYTES * first) for first in parts]
            of_columns = [builder.fpext(half, floats) for half in halves]
            with cgutils.for_range(builder, I64(PANEL)) as loop:
                add_row(builder.add(builder.mul(block.index, I64(PANEL)), loop.index), of_columns)
    else:
        with cgutils.for_range(builder, inner) as loop:
            scale = None
            if element is I8:
                of_row = row_address((scales, I64(SCALE_BYTES)), loop.index)
                scale = builder.fpext(vectors.splat(of_row, HALF, lanes), floats)
            add_row(loop.index, [scale] * len(parts))
    for address, row_sums in zip(rows_of_out, sums, strict=True):
        for first, total in zip(parts, row_sums, strict=True):
            vectors.store(builder.load(total), address, 4 * first)


def stored_element(array: types.Array) -> ir.Type:
    """Return the element type of keys and values for a cache array of this Numba type."""
    return {types.uint16: HALF, types.int8: I8}.get(array.dtype, FLOAT)


def _product(cached: types.Array, of_keys: bool):
    """Return the generator of `emit_product` for 1 to `max_rows` rows."""

    def generate(context, builder, signature, arguments):
        rows, left, left_stride, right, inner, out, out_stride, scales = arguments[2:]
        vectors = Vectors(builder, signature.args[0].count)
        done = builder.append_basic_block("done")
        choice = builder.switch(rows, done)
        for count in range(1, max_rows(vectors.isa) + 1):
            block = builder.append_basic_block(f"rows{count}")
            choice.add_case(I64(count), block)
            builder.position_at_end(block)
            element = stored_element(cached)
            matrices = (left, left_stride), right, inner, (out, out_stride)
            emit_product(vectors, element, count, *matrices, scales, of_keys)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return generate


@intrinsic
def multiply_keys(typing_context, isa, cached, rows, left, left_stride, right, inner, out, out_stride, scales):
    """Emit `emit_product` with keys; `cached` is an array with the element type of `right`."""
    return types.void(isa, cached, *[types.intp] * 8), _product(cached, True)


@intrinsic
def multiply_values(typing_context, isa, cached, rows, left, left_stride, right, inner, out, out_stride, scales):
    """Emit `emit_product` with values; `cached` is an array with the element type of `right`."""
    return types.void(isa, cached, *[types.intp] * 8), _product(cached, False)


@intrinsic
def largest_of(typing_context, isa, values, count):
    """Emit the largest of `count` float32 at address `values`; `count` is a multiple of 32, and none is NaN."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        _, values, count = arguments
        largest = cgutils.alloca_once(builder, vector(FLOAT, PANEL))
        builder.store(vectors.constant(FLOAT, -np.inf, PANEL), largest)
        with cgutils.for_range_slice(builder, I64(0), count, I64(PANEL), I64) as (index, _):
            part = vectors.load(builder.add(values, builder.mul(index, I64(4))), FLOAT, PANEL)
            before = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", part, before), part, before), largest)
        lanes, whole = PANEL, builder.load(largest)
        while lanes > 1:
            low, high = vectors.split(whole)
            whole, lanes = builder.select(builder.fcmp_ordered(">", low, high), low, high), lanes // 2
        return builder.extract_element(whole, I32(0))

    return types.float32(isa, types.intp, types.intp), generate


@intrinsic
def powers_of_two(typing_context, isa, values, count, subtracted):
    """Emit x = 2**(x - subtracted) for `count` float32 at address `values`, a multiple of 32; return their sum."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        _, values, count, subtracted = arguments
        subtracted = vectors.fill(subtracted, PANEL)
        total = cgutils.alloca_once(builder, vector(FLOAT, PANEL))
        builder.store(vectors.constant(FLOAT, 0.0, PANEL), total)
        with cgutils.for_range_slice(builder, I64(0), count, I64(PANEL), I64) as (index, _):
            address = builder.add(values, builder.mul(index, I64(4)))
            power = vectors.power_of_two(builder.fsub(vectors.load(address, FLOAT, PANEL), subtracted))
            vectors.store(power, address)
            builder.store(builder.fadd(builder.load(total), power), total)
        return vectors.sum(builder.load(total))

    return types.float32(isa, types.intp, types.intp, types.float32), generate


def emit_narrow(builder: ir.IRBuilder, stored: ir.Type, value: ir.Value) -> ir.Value:
    """Emit the conversion of a float32 to the stored type: float32, or the 16 bits of float16.

    float16 rounds to nearest, ties to even. Numbers beyond its range are clamped to the largest finite number, because
    an infinite key would make every later score of its head infinite or NaN. NaN stays NaN.
    """
    if stored is FLOAT:
        return value
    for limit, beyond in ((LARGEST_HALF, ">"), (-LARGEST_HALF, "<")):
        value = builder.select(builder.fcmp_ordered(beyond, value, FLOAT(limit)), FLOAT(limit), value)
    return builder.bitcast(builder.fptrunc(value, HALF), I16)
