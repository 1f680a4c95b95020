"""Matrix times vector for decode, directly from packed rows or from float16 rows."""

from __future__ import annotations

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.extract import D1, D2, D3, D4
from cpu_kernels.transformer.half_dot import dot_last_columns, multiply_half_vector
from cpu_kernels.transformer.row_dot import multiply_packed_rows

HALVES = 0  # the depth of a float16 matrix; 1 to 4 are the depths of trit matrices


@numba.njit(cache=True)
def _trit_rows(depth, isa, address, row_bytes, integers, sums, scales, steps, y, first, last):
    """Compute rows `first` to before `last` of one packed matrix."""
    x = sums.ctypes.data, scales.ctypes.data, len(scales)
    matrix = address + first * row_bytes, row_bytes, last - first, steps.ctypes.data
    multiply_packed_rows(isa, depth, integers, x, matrix, y[first:].ctypes.data)


@numba.njit(cache=True)
def half_rows(isa, address, x, y, first, last):
    """Compute rows `first` to before `last` of one float16 matrix."""
    columns, row_bytes = len(x), 2 * len(x)
    row = address + first * row_bytes
    multiply_half_vector(isa, row, row_bytes, last - first, x.ctypes.data, columns // 16, y[first:].ctypes.data)
    if columns % 16:
        for r in range(first, last):
            y[r] += dot_last_columns(address + r * row_bytes, x.ctypes.data, columns // 16 * 16, columns)


@numba.njit(cache=True, nogil=True, shared=True, any_strides=("y",))
def multiply_rows(isa, address, depth, steps, activations, y, first, last):
    """Compute rows `first` to before `last` of one matrix times one vector.

    Args:
        isa: the instruction set, see `instruction_set`.
        address: address of the matrix's first row.
        depth: HALVES or a depth.
        steps: float32 [32], codebook / h, padded.
        activations: x, integers, offsets and scales, see `quantize_row`.
        y: float32 [rows of the matrix], out.
        first, last: the rows to compute.

    """
    x, integers, offsets, scales = activations
    blocks = len(scales) // 4
    if depth == HALVES:
        half_rows(isa, address, x, y, first, last)
    elif depth == 1:
        _trit_rows(D1, isa, address, blocks * 16, integers, offsets[0], scales, steps, y, first, last)
    elif depth == 2:
        _trit_rows(D2, isa, address, blocks * 28, integers, offsets[1], scales, steps, y, first, last)
    elif depth == 3:
        _trit_rows(D3, isa, address, blocks * 42, integers, offsets[2], scales, steps, y, first, last)
    else:
        _trit_rows(D4, isa, address, blocks * 54, integers, offsets[3], scales, steps, y, first, last)


@numba.njit(cache=True, nogil=True)
def gemv(isa, addresses, rows, depths, steps, activations, y, thread, threads):
    """Compute a thread's share of several matrices times one vector.

    Args:
        isa: the instruction set.
        addresses, rows, depths: int64 [matrices].
        steps: float32 [matrices, 32].
        activations: as in `multiply_rows`.
        y: float32 [rows of all matrices], out: the concatenated results.
        thread, threads: which of how many shares of the rows to compute.

    """
    low, high = y.size * thread // threads, y.size * (thread + 1) // threads
    start = 0
    for m in range(len(rows)):
        first, last = max(low - start, 0), min(high - start, rows[m])
        if first < last:
            out = y[start : start + rows[m]]
            multiply_rows(isa, addresses[m], depths[m], steps[m], activations, out, first, last)
        start += rows[m]
