"""Memory read bandwidth: the upper bound of decode speed."""

from __future__ import annotations

import time

import numba
import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool

BUFFER_BYTES = 1 << 30  # more than the several hundred megabytes of a server processor's cache


@numba.njit(cache=True, nogil=True)
def read(buffer, thread, threads):
    """Return the sum of a thread's share of an int64 buffer; it wraps around."""
    total = 0
    for k in range(len(buffer) * thread // threads, len(buffer) * (thread + 1) // threads):
        total += buffer[k]
    return total


def read_bandwidth(thread_pool: ThreadPool, repetitions: int, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Return the bandwidth at which the threads read a buffer larger than any cache: bytes/s, median of repetitions."""
    buffer = np.ones(buffer_bytes // 8, np.int64)
    thread_pool.run(read, buffer[:0])  # compiles
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        thread_pool.run(read, buffer)
        times.append(time.perf_counter() - start)
    return buffer.nbytes / float(np.median(times))
