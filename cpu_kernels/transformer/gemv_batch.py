"""stub"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.transformer.gemv import multiply_rows


def make_row_scratch(columns: int, threads: int) -> np.ndarray:
    """Allocate."""
    return np.zeros((threads, 8), np.float32)


@numba.njit(cache=True)
def multiply_rows_batch(isa, address, kind, steps, activations, y, first, last, scratch):
    """Stub."""
    x, pairs, offsets, scales = activations
    for v in range(len(x)):
        multiply_rows(isa, address, kind, steps, (x[v], pairs[v], offsets[v], scales[v]), y[v], first, last)


@numba.njit(cache=True, nogil=True)
def gemv_batch(isa, addresses, rows, kinds, steps, activations, y, scratch, thread, threads):
    """Stub."""
    total = y.shape[1]
    low, high = total * thread // threads, total * (thread + 1) // threads
    start = 0
    for m in range(len(rows)):
        first, last = max(low - start, 0), min(high - start, rows[m])
        if first < last:
            out = y[:, start : start + rows[m]]
            multiply_rows_batch(isa, addresses[m], kinds[m], steps[m], activations, out, first, last, scratch[thread])
        start += rows[m]
