"""Gated activations: the product of a feed-forward's gate, after its activation, and of its other half."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I64, Vectors
from cpu_kernels.transformer.layer_options import CLAMPED_SILU, GELU

_LOG2_E = 1.4426950408889634
_SQRT_2_BY_PI = 0.7978845608028654
_MAX_EXPONENT = 126.0  # the gate's output is zero for a larger exponent of exp(-x)
_SLOPE, _BOUND = np.float32(1.702), np.float32(7.0)  # of gpt-oss


def _emit_gate(builder, arguments, inner, change=lambda builder, x, y, lanes: (x, y), *, sigmoid=False):
    """Emit out = x / (1 + exp(-inner(x))) * y for `count` float32 x of `gate` and y of `up`, given as addresses.

    `change` returns what to take for x and y. With `sigmoid` the numerator is 1.
    """
    vectors = Vectors(builder, PORTABLE)
    gate, up, out, count = arguments
    whole = builder.and_(count, I64(-GROUP_SIZE))
    for lanes, start, end in ((GROUP_SIZE, I64(0), whole), (1, whole, count)):
        with cgutils.for_range_slice(builder, start, end, I64(lanes), I64) as (index, _):
            offset = builder.shl(index, I64(2))
            x, y = (vectors.load(builder.add(address, offset), FLOAT, lanes) for address in (gate, up))
            x, y = change(builder, x, y, lanes)
            exponent = builder.fmul(inner(builder, vectors, x, lanes), vectors.constant(FLOAT, -_LOG2_E, lanes))
            zero, one = (vectors.constant(FLOAT, number, lanes) for number in (0.0, 1.0))
            closed = builder.fcmp_ordered(">", exponent, vectors.constant(FLOAT, _MAX_EXPONENT, lanes))
            power = vectors.power_of_two(builder.select(closed, zero, exponent))
            share = builder.select(closed, zero, builder.fdiv(one if sigmoid else x, builder.fadd(one, power)))
            vectors.store(builder.fmul(share, y), builder.add(out, offset))


@intrinsic
def _silu_times(typing_context, gate, up, out, count, slope, bound, shift):
    """Emit x / (1 + exp(-slope x)) * (y + shift), with x of `gate` at most `bound`, and y of `up` within +-`bound`.

    SwiGLU with silu(x) = x / (1 + exp(-x)) has slope 1, no bound (infinity) and no shift.
    """

    def generate(context, builder, signature, arguments):
        slope, bound, shift = arguments[4:]
        vectors = Vectors(builder, PORTABLE)

        def change(builder, x, y, lanes):
            most, least = (vectors.fill(limit, lanes) for limit in (bound, builder.fneg(bound)))
            # These keep what is no number.
            x, y = (builder.select(builder.fcmp_ordered(">", value, most), most, value) for value in (x, y))
            y = builder.select(builder.fcmp_ordered("<", y, least), least, y)
            return x, builder.fadd(y, vectors.fill(shift, lanes))

        def inner(builder, vectors, x, lanes):
            return builder.fmul(x, vectors.fill(slope, lanes))

        _emit_gate(builder, arguments[:4], inner, change)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, *[types.float32] * 3), generate


@intrinsic
def _gelu_times(typing_context, gate, up, out, count):
    """Emit GEGLU: gelu(x) = x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x**3)."""

    def inner(builder, vectors, x, lanes):
        square = builder.fmul(x, x)
        cubic = vectors.constant(FLOAT, 2 * _SQRT_2_BY_PI * 0.044715, lanes)
        linear = vectors.constant(FLOAT, 2 * _SQRT_2_BY_PI, lanes)
        return builder.fmul(x, builder.fadd(builder.fmul(square, cubic), linear))

    def generate(context, builder, signature, arguments):
        _emit_gate(builder, arguments, inner)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def _sigmoid_times(typing_context, gate, values, out, count):
    """Emit y / (1 + exp(-x)), with x of `gate` and y of `values`."""

    def generate(context, builder, signature, arguments):
        _emit_gate(builder, arguments, lambda builder, vectors, x, lanes: x, sigmoid=True)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@numba.njit(cache=True, nogil=True, shared=True)
def multiply_sigmoid(gate, values, out):
    """Compute sigmoid(gate) * values; all float32 [n], contiguous; they may be the same arrays."""
    _sigmoid_times(gate.ctypes.data, values.ctypes.data, out.ctypes.data, len(out))


@numba.njit(cache=True, nogil=True, shared=True)
def swiglu(gate, up, activation, out):
    """Compute a gated activation; all float32 [columns], contiguous.

    With SILU this is SwiGLU, out = silu(gate) * up; with GELU it is GEGLU, out = gelu(gate) * up. CLAMPED_SILU is that
    of gpt-oss: out = gate * sigmoid(1.702 gate) * (up + 1), with gate at most 7 and up between -7 and 7.
    """
    addresses = gate.ctypes.data, up.ctypes.data, out.ctypes.data
    if activation == GELU:
        _gelu_times(*addresses, len(out))
    elif activation == CLAMPED_SILU:
        _silu_times(*addresses, len(out), _SLOPE, _BOUND, np.float32(1.0))
    else:
        _silu_times(*addresses, len(out), np.float32(1.0), np.float32(np.inf), np.float32(0.0))
