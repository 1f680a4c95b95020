"""Does an instruction-set variant compute on this machine what it should? A flag alone does not prove that.

Compiles, or loads from the cache, the few operations that differ between the variants, runs them once on vectors of
every width, and compares with NumPy.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.simd.variants import as_type
from cpu_kernels.simd.vectors import FLOAT, I8, I16, I32, Vectors, vector

_LANES = 32  # of 16 bits, and twice as many of 8
_RADICES = (3, 9, 27, 81, 243, 729, 2187, 6561)
_WIDTHS = (32, 16, 8)


@intrinsic
def _operations(typing_context, isa, left, right, small, table, highs, sums, quads, looked_up):
    """Run every operation on 64 bytes, in vectors of all, half and a quarter; all but `isa` are addresses (int64).

    `left` and `right` are 32 lanes of 16 bits; `small` are 64 of 8 bits, to be multiplied with those of `right`.
    `highs` gets 3 x 32 16-bit, `sums` and `quads` 3 x 16 32-bit lanes, and `looked_up` 16 floats.
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        _, left, right, small, table, highs, sums, quads, looked_up = arguments
        for number, lanes in enumerate(_WIDTHS):
            zeros = ir.Constant(vector(I32, lanes // 2), None)
            for first in range(0, _LANES, lanes):
                a = vectors.load(left, I16, lanes, 2 * first)
                b = vectors.load(right, I16, lanes, 2 * first)
                place = 2 * (number * _LANES + first)
                vectors.store(vectors.multiply_high(a, _RADICES), highs, place)
                vectors.store(vectors.dot_pairs(zeros, a, b), sums, place)
                bytes_of = [vectors.load(address, I8, 2 * lanes, 2 * first) for address in (small, right)]
                vectors.store(vectors.dot_quads(zeros, *bytes_of), quads, place)
        indices = vectors.widen(vectors.load(left, I16, 16))
        indices = builder.and_(indices, vectors.constant(I32, 31, 16))
        both = [vectors.load(table, FLOAT, 16, offset) for offset in (0, 64)]
        vectors.store(vectors.lookup(both, table, indices), looked_up)
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 8), generate


@numba.njit(cache=True)
def _run(isa, left, right, small, table, highs, sums, quads, looked_up):
    """Run the operations on arrays: uint16 [32] twice, uint8 [64], float32 [32], and the outputs of `_operations`."""
    _operations(
        isa,
        left.ctypes.data,
        right.ctypes.data,
        small.ctypes.data,
        table.ctypes.data,
        highs.ctypes.data,
        sums.ctypes.data,
        quads.ctypes.data,
        looked_up.ctypes.data,
    )


@functools.cache
def failure(isa: int) -> str | None:
    """Return what is wrong with a variant that the processor's features promise, or None."""
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 1 << 16, (2, _LANES), np.uint16)
    left[:4] = right[:4] = 0x8000, 0x7FFF, 0xFFFF, 0
    small = generator.integers(0, 129, 2 * _LANES, np.uint8)
    table = np.arange(_LANES, dtype=np.float32)
    highs = np.zeros((3, _LANES), np.uint16)
    sums, quads = np.zeros((2, 3, _LANES // 2), np.int32)
    looked_up = np.zeros(16, np.float32)
    try:
        _run(as_type(isa), left, right, small, table, highs, sums, quads, looked_up)
    except Exception as error:  # whatever Numba and LLVM raise
        return f"cannot be compiled ({' '.join(str(error).split())[:60]} ...)"
    products = left.view(np.int16).astype(np.int64) * right.view(np.int16)
    right_highs = left.astype(np.uint32) * np.resize(np.array(_RADICES, np.uint32), _LANES) >> 16
    right_sums = products.reshape(-1, 2).sum(1).astype(np.int32)  # wraps around
    right_quads = (small.astype(np.int32) * right.view(np.int8)).reshape(-1, 4).sum(1)
    pairs = ((highs, right_highs), (sums, right_sums), (quads, right_quads), (looked_up, left[:16] % _LANES))
    return None if all((found == expected).all() for found, expected in pairs) else "computes wrong integers here"
