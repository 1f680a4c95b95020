"""Self-test of an instruction-set variant: a feature flag alone does not prove that its instructions work.

The test compiles the few operations that differ between the variants (or loads them from the cache), runs them once on
vectors of every width, and compares the results with NumPy's.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import intrinsic, types
from cpu_kernels.simd.variants import as_type
from cpu_kernels.simd.vectors import FLOAT, I8, I16, I32, Vectors, vector

_LANES = 32  # of 16 bits, and twice as many of 8
_RADICES = (3, 9, 27, 81, 243, 729, 2187, 6561)
_WIDTHS = (32, 16, 8)


@intrinsic
def _operations(typing_context, isa, left, right, small, table, highs, sums, quads, looked_up):
    """Run every operation on 64 bytes, in vectors of 64, 32 and 16 bytes; all arguments but `isa` are addresses.

    Inputs: `left` and `right` are uint16 [32], `small` is uint8 [64] and is multiplied with the bytes of `right`.
    Outputs: `highs` is uint16 [3, 32], `sums` and `quads` are int32 [3, 16], and `looked_up` is float32 [16].
    """

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        _, left, right, small, table, highs, sums, quads, looked_up = arguments
        for number, lanes in enumerate(_WIDTHS):
            zeros = ir.Constant(vector(I32, lanes // 2), None)
            for first in range(0, _LANES, lanes):
                a = vectors.load(left, I16, lanes, 2 * first)
                b = vectors.load(right, I16, lanes, 2 * first)
                offset = 2 * (number * _LANES + first)
                vectors.store(vectors.multiply_high(a, _RADICES), highs, offset)
                vectors.store(vectors.dot_pairs(zeros, a, b), sums, offset)
                bytes_of = [vectors.load(address, I8, 2 * lanes, 2 * first) for address in (small, right)]
                vectors.store(vectors.dot_quads(zeros, *bytes_of), quads, offset)
        indices = vectors.widen(vectors.load(left, I16, 16))
        indices = builder.and_(indices, vectors.constant(I32, 31, 16))
        both = [vectors.load(table, FLOAT, 16, offset) for offset in (0, 64)]
        vectors.store(vectors.lookup(both, table, indices), looked_up)
        return context.get_dummy_value()

    return types.void(isa, *[types.intp] * 8), generate


@numba.njit(cache=True, nogil=True)
def _run(isa, left, right, small, table, highs, sums, quads, looked_up):
    """Run `_operations` on arrays; `table` is float32 [32]."""
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
    """Return why a variant fails on this processor, whose features must include the variant's; None if it passes."""
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 1 << 16, (2, _LANES), np.uint16)
    left[:4] = right[:4] = 0x8000, 0x7FFF, 0xFFFF, 0
    small = generator.integers(0, 128, 2 * _LANES, np.uint8)
    table = np.arange(_LANES, dtype=np.float32)
    highs = np.zeros((3, _LANES), np.uint16)
    sums, quads = np.zeros((2, 3, _LANES // 2), np.int32)
    looked_up = np.zeros(16, np.float32)
    try:
        _run(as_type(isa), left, right, small, table, highs, sums, quads, looked_up)
    except ImportError:  # of Numba: no instruction set works
        raise
    except Exception as error:  # whatever Numba and LLVM raise
        return f"cannot be compiled ({' '.join(str(error).split())[:60]} ...)"
    products = left.view(np.int16).astype(np.int64) * right.view(np.int16)
    expected_highs = left.astype(np.uint32) * np.resize(np.array(_RADICES, np.uint32), _LANES) >> 16
    expected_sums = products.reshape(-1, 2).sum(1).astype(np.int32)  # wraps around
    expected_quads = (small.astype(np.int32) * right.view(np.int8)).reshape(-1, 4).sum(1)
    pairs = ((highs, expected_highs), (sums, expected_sums), (quads, expected_quads), (looked_up, left[:16] % _LANES))
    return None if all((found == expected).all() for found, expected in pairs) else "computes wrong integers here"
