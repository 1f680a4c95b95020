"""Memory read bandwidth: the upper bound of decode speed."""

from __future__ import annotations

import statistics
import time

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import I64, Vectors, vector
from cpu_kernels.threads.thread_pool import ThreadPool

BUFFER_BYTES = 1 << 30  # more than the several hundred megabytes of a server processor's cache
_LANES, _SUMS = 8, 4  # 64 bytes, and how many of them are on their way independently
_BLOCK = _LANES * _SUMS
# How far ahead memory is asked for: some processors read fastest without, others with it. The best one counts.
BYTES_AHEAD = (0, 4096)


@intrinsic
def _sum_blocks(typing_context, start, blocks, ahead):
    """Emit the sum of some blocks of 32 int64 from an address on; memory is asked for `ahead` bytes ahead."""

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        start, blocks, ahead = arguments
        sums = [cgutils.alloca_once(builder, vector(I64, _LANES)) for _ in range(_SUMS)]
        for place in sums:
            builder.store(vectors.constant(I64, 0, _LANES), place)

        def add(ask: bool) -> None:
            with cgutils.for_range(builder, blocks) as loop:
                address = builder.add(start, builder.mul(loop.index, I64(8 * _BLOCK)))
                for number, place in enumerate(sums):
                    own = builder.add(address, I64(8 * _LANES * number))
                    if ask:
                        vectors.prefetch(builder.add(own, ahead))
                    numbers = builder.load(builder.inttoptr(own, vector(I64, _LANES).as_pointer()))
                    numbers.align = 8
                    builder.store(builder.add(builder.load(place), numbers), place)

        with builder.if_else(builder.icmp_signed("==", ahead, I64(0))) as (plain, asking):
            with plain:
                add(False)
            with asking:
                add(True)
        total: ir.Value = I64(0)
        for place in sums:
            lanes = builder.load(place)
            for lane in range(_LANES):
                total = builder.add(total, builder.extract_element(lanes, ir.IntType(32)(lane)))
        return total

    return types.int64(*[types.intp] * 3), generate


@numba.njit(cache=True, nogil=True)
def read(buffer, ahead, thread, threads):
    """Return the sum of a thread's share of an int64 buffer, which wraps around; `ahead` is one of BYTES_AHEAD."""
    blocks = len(buffer) // _BLOCK
    first, last = blocks * thread // threads, blocks * (thread + 1) // threads
    total = _sum_blocks(buffer[first * _BLOCK :].ctypes.data, last - first, ahead)
    if thread == threads - 1:
        for k in range(blocks * _BLOCK, len(buffer)):
            total += buffer[k]
    return total


def read_bandwidth(thread_pool: ThreadPool, repetitions: int, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Return the bandwidth at which the threads read a buffer larger than any cache: bytes/s.

    The buffer is read in a few ways in turns, each so many times; the best median counts.
    """
    buffer = np.ones(buffer_bytes // 8, np.int64)
    thread_pool.run(read, buffer[:0], 0)  # compiles
    seconds: dict[int, list[float]] = {ahead: [] for ahead in BYTES_AHEAD}
    for _ in range(repetitions):
        for ahead, times in seconds.items():
            start = time.perf_counter()
            thread_pool.run(read, buffer, ahead)
            times.append(time.perf_counter() - start)
    return buffer.nbytes / min(statistics.median(times) for times in seconds.values())
