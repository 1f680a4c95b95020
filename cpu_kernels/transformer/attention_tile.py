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
_FEW_ROWS = 3  # of AVX2: so many rows of a whole panel have their sums in registers


@register_jitable
def max_rows(isa: int) -> int:
    """Return how many rows a product computes at once: as many as have their sums in registers."""
    return 8 if isa >= AVX512_NO_VNNI else 6


@register_jitable
def product_columns(isa: int, rows: int) -> int:
    """Return how many columns a product of `rows` rows computes at once: as many as have their sums in registers."""
    return PANEL if isa >= AVX512_NO_VNNI or (isa in (AVX2, AVX2_VNNI) and rows <= _FEW_ROWS) else PANEL // 2


def lanes_of(isa: int) -> int:
    """Return the number of floats in a vector; the portable variant uses 16, which LLVM splits."""
    return 8 if isa in (AVX2, AVX2_VNNI) else 16


class Product:
    """Emits out[rows, columns] += left[rows, inner] * right[inner, columns] for a constant number of rows."""

    def __init__(self, vectors: Vectors, element: ir.Type, rows: int, left, right, out, ahead) -> None:
        """Emit into `vectors`.

        Args:
            vectors: where to emit.
            element: the element type of `right`: HALF, FLOAT, or I8 with scales.
            rows: the number of rows, a constant.
            left, out: float32 matrices, as the address of the first element and the row stride in bytes, i64 each.
            right: address of the first element, i64; a row has PANEL elements.
            ahead: how many bytes behind each row of `right` to prefetch, i64.

        """
        self.vectors, self.builder, self.element = vectors, vectors.builder, element
        self.lanes, self.columns = lanes_of(vectors.isa), product_columns(vectors.isa, rows)
        self.floats = vector(FLOAT, self.lanes)
        self.right, self.ahead = right, ahead
        self.left, self.out = ([self._row(matrix, I64(row)) for row in range(rows)] for matrix in (left, out))
        self.parts = range(0, self.columns, self.lanes)
        self.sums = [[cgutils.alloca_once(self.builder, self.floats) for _ in self.parts] for _ in range(rows)]

    def _row(self, matrix, index):
        return self.builder.add(matrix[0], self.builder.mul(index, matrix[1]))

    def _places(self):
        """Return the address and offset in `out` of each sum, and the sum's part and variable."""
        for address, of_row in zip(self.out, self.sums, strict=True):
            for part, (first, total) in enumerate(zip(self.parts, of_row, strict=True)):
                yield address, 4 * first, part, total

    def _load_sums(self) -> None:
        for address, offset, _, total in self._places():
            self.builder.store(self.vectors.load(address, FLOAT, self.lanes, offset), total)

    def _store_sums(self) -> None:
        for address, offset, _, total in self._places():
            self.vectors.store(self.builder.load(total), address, offset)

    def _add_row(self, index, left) -> None:
        """Add row `index` of `right`, times one number of each row of `left`, whose addresses are given."""
        element_bytes = {I8: 1, HALF: 2, FLOAT: 4}[self.element]
        row = self._row((self.right, I64(PANEL * element_bytes)), index)
        for offset in range(0, self.columns * element_bytes, _CACHE_LINE):
            self.vectors.prefetch(self.builder.add(row, self.ahead), offset, into_first_level=False)
        ones: dict[int, ir.Value] = {}
        factors: dict[int, ir.Value] = {}
        products = [(k, part) for k in range(len(left)) for part in range(len(self.parts))]
        if len(left) < len(self.parts):  # in registers are the fewer, and one of the others
            products.sort(key=lambda product: product[1])
        for k, part in products:
            if k not in ones:
                ones[k] = self.vectors.splat(left[k], FLOAT, self.lanes)
            if part not in factors:
                factors[part] = self._widened(row, element_bytes * self.parts[part])
            total = self.sums[k][part]
            self.builder.store(self.vectors.multiply_add(ones[k], factors[part], self.builder.load(total)), total)

    def _widened(self, row, offset: int):
        numbers = self.vectors.load(row, self.element, self.lanes, offset)
        if self.element is FLOAT:
            return numbers
        return (self.builder.sitofp if self.element is I8 else self.builder.fpext)(numbers, self.floats)

    def _left(self, index):
        return [self._row((address, I64(4)), index) for address in self.left]

    def emit(self, inner) -> None:
        """Emit the product with floating-point numbers; `inner` is i64."""
        self._load_sums()
        with cgutils.for_range(self.builder, inner) as loop:
            self._add_row(loop.index, self._left(loop.index))
        self._store_sums()

    def emit_scaled_keys(self, inner, scales) -> None:
        """Emit the product with int8 keys: for 32 dimensions at a time the sums, multiplied with the positions' scales.

        Args:
            inner: the number of dimensions, i64, a multiple of 32.
            scales: address of float16 [inner / 32, PANEL], i64.

        """
        builder, vectors = self.builder, self.vectors
        with cgutils.for_range(builder, builder.lshr(inner, I64(5))) as block:
            for *_, total in self._places():
                builder.store(vectors.constant(FLOAT, 0.0, self.lanes), total)
            with cgutils.for_range(builder, I64(PANEL)) as loop:
                index = builder.add(builder.shl(block.index, I64(5)), loop.index)
                self._add_row(index, self._left(index))
            of_block = self._row((scales, I64(PANEL * SCALE_BYTES)), block.index)
            halves = [vectors.load(of_block, HALF, self.lanes, SCALE_BYTES * first) for first in self.parts]
            of_positions = [builder.fpext(half, self.floats) for half in halves]
            for address, offset, part, total in self._places():
                before = vectors.load(address, FLOAT, self.lanes, offset)
                after = vectors.multiply_add(builder.load(total), of_positions[part], before)
                vectors.store(after, address, offset)

    def emit_scaled_values(self, inner, scales) -> None:
        """Emit the product with int8 values, whose scales are multiplied with the weights, 32 positions at a time.

        Args:
            inner: the number of positions, i64. `left` and the scales are read up to the next multiple of 32.
            scales: address of float16 [inner], i64.

        """
        builder, vectors, lanes = self.builder, self.vectors, PANEL
        scaled = [cgutils.alloca_once(builder, vector(FLOAT, lanes)) for _ in self.left]
        addresses = [builder.ptrtoint(weights, I64) for weights in scaled]
        self._load_sums()
        blocks = builder.lshr(builder.add(inner, I64(lanes - 1)), I64(5))
        with cgutils.for_range(builder, blocks) as block:
            start = builder.shl(block.index, I64(5))
            of_block = vectors.load(self._row((scales, I64(SCALE_BYTES)), start), HALF, lanes)
            scale = builder.fpext(of_block, vector(FLOAT, lanes))
            for address, weights in zip(self._left(start), scaled, strict=True):
                builder.store(builder.fmul(vectors.load(address, FLOAT, lanes), scale), weights)
            left = builder.sub(inner, start)
            count = builder.select(builder.icmp_signed("<", left, I64(lanes)), left, I64(lanes))
            with cgutils.for_range(builder, count) as loop:
                weights = [self._row((address, I64(4)), loop.index) for address in addresses]
                self._add_row(builder.add(start, loop.index), weights)
        self._store_sums()


def stored_element(array: types.Array) -> ir.Type:
    """Return the element type of keys and values for a cache array of this Numba type."""
    return {types.uint16: HALF, types.int8: I8}.get(array.dtype, FLOAT)


def _product(cached: types.Array, of_keys: bool):
    """Return the generator of a product for 1 to `max_rows` rows."""

    def generate(context, builder, signature, arguments):
        rows, left, left_stride, right, inner, out, out_stride, scales, ahead = arguments[2:]
        vectors, element = Vectors(builder, signature.args[0].count), stored_element(cached)
        done = builder.append_basic_block("done")
        choice = builder.switch(rows, done)
        for count in range(1, max_rows(vectors.isa) + 1):
            block = builder.append_basic_block(f"rows{count}")
            choice.add_case(I64(count), block)
            builder.position_at_end(block)
            product = Product(vectors, element, count, (left, left_stride), right, (out, out_stride), ahead)
            if element is not I8:
                product.emit(inner)
            elif of_keys:
                product.emit_scaled_keys(inner, scales)
            else:
                product.emit_scaled_values(inner, scales)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return generate


@intrinsic
def multiply_keys(typing_context, isa, cached, rows, left, left_stride, right, inner, out, out_stride, scales, ahead):
    """Emit a product with keys, see `Product`; `cached` is an array with the element type of `right`."""
    return types.void(isa, cached, *[types.intp] * 9), _product(cached, True)


@intrinsic
def multiply_values(typing_context, isa, cached, rows, left, left_stride, right, inner, out, out_stride, scales, ahead):
    """Emit a product with values, see `Product`; `cached` is an array with the element type of `right`."""
    return types.void(isa, cached, *[types.intp] * 9), _product(cached, False)


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
