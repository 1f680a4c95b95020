"""A barrier for threads that run the same compiled function.

Launching a parallel region costs 3 to 20 us, and a layer needs several. A barrier costs a fraction of a microsecond,
so the threads stay in one function from the first layer to the last and wait at barriers instead.
"""

from __future__ import annotations

import platform

from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import external_function, intrinsic, types

_SPINS_BEFORE_YIELDING = 2000
_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())
_YIELD = external_function("SwitchToThread" if platform.system() == "Windows" else "sched_yield", "int32")


@intrinsic
def _add_one(typing_context, counter):
    """Add 1 to an int64 [n] array's first element, atomically; return the previous value."""

    def generate(context, builder, signature, arguments):
        pointer = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counter), generate


@intrinsic
def _read(typing_context, counter):
    """Read an int64 [n] array's first element, atomically."""

    def generate(context, builder, signature, arguments):
        pointer = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(counter), generate


@intrinsic
def _pause(typing_context):
    """Emit the pause instruction of spin loops, if the processor has one."""

    def generate(context, builder, signature, arguments):
        if _PAUSE is not None:
            module = builder.module
            function = module.globals.get(_PAUSE) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), _PAUSE)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(cache=True)
def wait_for_all(counter, threads):
    """Return when `threads` threads have called this with the same counter, int64 [1].

    The counter only grows, so it can be reused at once. A thread that waits long yields its core, because there may be
    fewer free cores than threads.
    """
    if threads == 1:
        return
    target = (_add_one(counter) // threads + 1) * threads
    spins = 0
    while _read(counter) < target:
        spins += 1
        if spins < _SPINS_BEFORE_YIELDING:
            _pause()
        else:
            _YIELD()


@numba.njit(cache=True, nogil=True)
def repeat_barrier(counter, repetitions, thread, threads):
    """Wait at the barrier `repetitions` times and do nothing else, to measure its cost."""
    for _ in range(repetitions):
        wait_for_all(counter, threads)
