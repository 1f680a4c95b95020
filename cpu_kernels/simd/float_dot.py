"""The dot product of float32 vectors, added up in one order wherever it is computed."""

from __future__ import annotations

from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.simd.vectors import FLOAT, I64, Vectors, vector

_LANES = 16
_SUMS = 4  # that are added up side by side


@intrinsic
def _whole_steps(typing_context, isa, left, right, steps):
    """Emit the dot product of `steps` times 16 float32 at two addresses."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, isa.count)
        left, right, steps = arguments[1:]
        sums = [cgutils.alloca_once(builder, vector(FLOAT, _LANES)) for _ in range(_SUMS)]
        for place in sums:
            builder.store(vectors.constant(FLOAT, 0.0, _LANES), place)

        def add(step: ir.Value, place: ir.Value) -> None:
            offset = builder.mul(step, I64(4 * _LANES))
            a, b = (vectors.load(builder.add(address, offset), FLOAT, _LANES) for address in (left, right))
            builder.store(vectors.fma(a, b, builder.load(place)), place)

        with cgutils.for_range(builder, builder.lshr(steps, I64(2))) as loop:
            for number, place in enumerate(sums):
                add(builder.add(builder.shl(loop.index, I64(2)), I64(number)), place)
        with cgutils.for_range_slice(builder, builder.and_(steps, I64(-_SUMS)), steps, I64(1), I64) as (step, _):
            add(step, sums[0])
        totals = [builder.load(place) for place in sums]
        return vectors.sum(builder.fadd(builder.fadd(totals[0], totals[1]), builder.fadd(totals[2], totals[3])))

    return types.float32(isa, *[types.intp] * 3), generate


@numba.njit(cache=True)
def float_dot(isa, left, right):
    """Return the dot product of two vectors, float32 [n], contiguous."""
    steps = len(left) // _LANES
    total = _whole_steps(isa, left.ctypes.data, right.ctypes.data, steps)
    for k in range(steps * _LANES, len(left)):
        total += left[k] * right[k]
    return total
