"""A barrier for threads that run the same compiled function side by side.

Launching a parallel region costs 3 to 20 us, and a layer needs several; threads that stay in one function from the
first layer to the last and meet at barriers pay a fraction of a microsecond each time.
"""

from __future__ import annotations

import platform

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_SPINS_BEFORE_YIELDING = 2000
_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())
_YIELD = types.ExternalFunction("SwitchToThread" if platform.system() == "Windows" else "sched_yield", types.int32())


@intrinsic
def _add_one(typing_context, counter):
    """Add 1 to an int64 [n] array's first element, atomically; return the value before."""

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
    """Tell the processor that this is a waiting loop."""

    def generate(context, builder, signature, arguments):
        if _PAUSE is not None:
            module = builder.module
            function = module.globals.get(_PAUSE) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), _PAUSE)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(cache=True)
def wait_for_all(counter, threads):
    """Return when `threads` threads have called this with the same int64 counter.

    The counter only ever grows, so it can be used again at once. A thread that waits long lets others run, for the
    machine may have fewer cores to give than threads were started.
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
def meet(counter, times, thread, threads):
    """Wait for all threads so many times and do nothing else: what meeting costs by itself."""
    for _ in range(times):
        wait_for_all(counter, threads)
