"""Matrix times a few vectors: what `gemv` gives for each of them, to the bit, with every row read and unpacked once."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.packed_rows.extract import D1, D2, D3, D4
from cpu_kernels.packed_rows.layout import PAIRS
from cpu_kernels.transformer.batch_dot import (
    C1,
    C2,
    C3,
    C4,
    LANES,
    PANEL_STEPS,
    ROW_BYTES,
    ROW_SCALES_BYTES,
    ROWS,
    arrange_vectors,
    dot_panel,
    sum_lanes,
    unpack_panel,
)
from cpu_kernels.transformer.batch_dot_halves import BLOCK, SUMS, arrange_floats, dot_halves
from cpu_kernels.transformer.gemv import HALVES, half_rows, multiply_rows

_STEPS, _STEPS_OF_8_BITS = PANEL_STEPS[16], PANEL_STEPS[8]
_MOST_VECTORS = 16  # for which a row is unpacked once
_AT_ONCE = 4
_HALF_VECTORS = 8  # whose columns stay in the first-level cache while some rows of float16 pass
_HALF_ROWS = 64  # of float16, which stay in the second-level cache while all vectors pass
_ALIGNMENT = 64
# Where things lie in the scratch, in bytes
_LEVELS = 0
_SCALES = _LEVELS + ROWS * ROW_BYTES
_TOTALS = _SCALES + ROWS * ROW_SCALES_BYTES
_TOTALS_OF_8 = _TOTALS + _MOST_VECTORS * ROWS * 4 * 16
_TOTALS_OF_4 = _TOTALS_OF_8 + _MOST_VECTORS * ROWS * 4 * 8
_RESULTS = _TOTALS_OF_4 + _MOST_VECTORS * ROWS * 4 * 4
_TAILS = _RESULTS + _MOST_VECTORS * ROWS * 4
_OTHERS = _TAILS + _MOST_VECTORS * ROWS * 4
_VECTORS = _OTHERS + _MOST_VECTORS * ROWS * 4 * 16


@numba.njit(cache=True)
def scratch_floats(columns):
    """Return how many float32 a thread needs to work with, for matrices of up to so many columns."""
    vectors = _MOST_VECTORS * columns  # of float32; of integers and their scales it is less
    return (_VECTORS + 2 * _ALIGNMENT) // 4 + vectors


def scratch_for(threads: int, columns: int) -> np.ndarray:
    """Return working memory for so many threads, a row for each, and matrices of up to so many columns: float32."""
    return np.zeros((threads, scratch_floats.py_func(columns)), np.float32)


@numba.njit(cache=True)
def _unpack_rows(isa, depth, integers, row, row_bytes, rows, groups, first_group, steps, rest, table, base):
    """Unpack one panel of some rows into the scratch."""
    ahead = ROWS * row_bytes
    for r in range(rows):
        levels, scales = base + _LEVELS + r * ROW_BYTES, base + _SCALES + r * ROW_SCALES_BYTES
        if depth == 1:
            unpack_panel(isa, D1, integers, row, groups, first_group, steps, rest, table, levels, scales, ahead)
        elif depth == 2:
            unpack_panel(isa, D2, integers, row, groups, first_group, steps, rest, table, levels, scales, ahead)
        elif depth == 3:
            unpack_panel(isa, D3, integers, row, groups, first_group, steps, rest, table, levels, scales, ahead)
        else:
            unpack_panel(isa, D4, integers, row, groups, first_group, steps, rest, table, levels, scales, ahead)
        row += row_bytes


@numba.njit(cache=True)
def _group_bytes(integers):
    """Return how many bytes one group of a vector takes in the scratch: integers [..., units, groups, lanes]."""
    return 4 * (integers.shape[-3] + 2)  # with offset and scale


@numba.njit(cache=True)
def _arrange(depth, integers, offsets, units, base):
    """Copy up to 16 vectors into the scratch, four by four."""
    groups = units.shape[1]
    own_offsets = offsets[:, depth - 1]
    strides = integers.strides[0], own_offsets.strides[0], units.strides[0]
    for v in range(0, len(units), _AT_ONCE):
        out = base + _VECTORS + v * groups * _group_bytes(integers)
        own = integers[v], own_offsets[v].ctypes.data, units[v].ctypes.data
        arrange_vectors(*own, strides, groups, min(_AT_ONCE, len(units) - v), out)


@numba.njit(cache=True)
def _dot_vectors(isa, integers, groups, first_group, steps, rest, rows, base):
    """Multiply the unpacked panel with up to 16 vectors in the scratch, whose `integers` say how many and of what."""
    vectors = len(integers)
    levels, scales = base + _LEVELS, base + _SCALES
    add = first_group > 0
    for v in range(0, vectors, _AT_ONCE):
        left = vectors - v
        x = base + _VECTORS + (v * groups + min(left, _AT_ONCE) * first_group) * _group_bytes(integers)
        totals = (
            base + _TOTALS + v * ROWS * 64,
            base + _TOTALS_OF_8 + v * ROWS * 32,
            base + _TOTALS_OF_4 + v * ROWS * 16,
        )
        if left >= 4:
            dot_panel(isa, C4, integers, levels, scales, x, steps, rest, totals, rows, add)
        elif left == 3:
            dot_panel(isa, C3, integers, levels, scales, x, steps, rest, totals, rows, add)
        elif left == 2:
            dot_panel(isa, C2, integers, levels, scales, x, steps, rest, totals, rows, add)
        else:
            dot_panel(isa, C1, integers, levels, scales, x, steps, rest, totals, rows, add)


@numba.njit(cache=True)
def _aligned(scratch):
    """Return how many bytes of a scratch to skip."""
    return -scratch.ctypes.data % _ALIGNMENT


@numba.njit(cache=True)
def _trit_rows_batch(isa, address, depth, row_bytes, table, integers, groups, y, first, last, scratch):
    """Compute rows `first` to `last` of one packed matrix times the vectors in the scratch, up to 16."""
    shift = _aligned(scratch)
    base = scratch.ctypes.data + shift
    results = scratch[(shift + _RESULTS) // 4 :]
    steps, rest = groups // LANES, groups % LANES
    totals = (base + _TOTALS, base + _TOTALS_OF_8, base + _TOTALS_OF_4)
    at_once = _STEPS if integers.shape[1] == PAIRS else _STEPS_OF_8_BITS
    for start in range(first, last, ROWS):
        rows = min(ROWS, last - start)
        row = address + start * row_bytes
        for step in range(0, max(steps, 1), at_once):
            some = min(at_once, steps - step)
            own_rest = rest if step + some == steps else 0
            place = step * LANES, some, own_rest
            _unpack_rows(isa, depth, integers, row, row_bytes, rows, groups, *place, table.ctypes.data, base)
            _dot_vectors(isa, integers, groups, *place, rows, base)
        sum_lanes(isa, totals, rest, base + _RESULTS, (len(y) * ROWS + 15) // 16)
        for v in range(len(y)):
            for r in range(rows):
                y[v, start + r] = results[v * ROWS + r]


@numba.njit(cache=True)
def _dot_half_rows(isa, row, row_bytes, rows, x, base, arranged):
    """Multiply some rows of float16 with some vectors, which lie at `arranged`, too."""
    columns, stride = x.shape[1], x.strides[0]
    bytes_of_sum = columns // BLOCK * LANES * 4
    for number in range(SUMS):
        for v in range(0, len(x), _AT_ONCE):
            left, own = len(x) - v, x[v].ctypes.data
            some = arranged + (v * SUMS + number * min(left, _AT_ONCE)) * bytes_of_sum
            out = (base + _TOTALS + v * ROWS * 64, base + _OTHERS + v * ROWS * 64, base + _TAILS + v * ROWS * 4)
            if left >= 4:
                dot_halves(isa, C4, number, row, row_bytes, rows, own, stride, columns, some, out)
            elif left == 3:
                dot_halves(isa, C3, number, row, row_bytes, rows, own, stride, columns, some, out)
            elif left == 2:
                dot_halves(isa, C2, number, row, row_bytes, rows, own, stride, columns, some, out)
            else:
                dot_halves(isa, C1, number, row, row_bytes, rows, own, stride, columns, some, out)


@numba.njit(cache=True)
def _half_rows_batch(isa, address, x, y, first, last, scratch):
    """Compute rows `first` to `last` of one float16 matrix times up to 16 vectors."""
    columns, row_bytes = x.shape[1], 2 * x.shape[1]
    shift = _aligned(scratch)
    base = scratch.ctypes.data + shift
    results, tails = scratch[(shift + _RESULTS) // 4 :], scratch[(shift + _TAILS) // 4 :]
    vector_bytes = columns // BLOCK * BLOCK * 4
    for v in range(0, len(x), _AT_ONCE):
        some = base + _VECTORS + v * vector_bytes
        arrange_floats(x[v].ctypes.data, x.strides[0], columns, min(_AT_ONCE, len(x) - v), some)
    ends = (base + _TOTALS, base + _TOTALS_OF_8, base + _TOTALS_OF_4)
    for block in range(first, last, _HALF_ROWS):
        for v in range(0, len(x), _HALF_VECTORS):
            vectors = min(_HALF_VECTORS, len(x) - v)
            for start in range(block, min(block + _HALF_ROWS, last), ROWS):
                rows = min(ROWS, last - start)
                row = address + start * row_bytes
                _dot_half_rows(isa, row, row_bytes, rows, x[v : v + vectors], base, base + _VECTORS + v * vector_bytes)
                sum_lanes(isa, ends, 0, base + _RESULTS, (vectors * ROWS + 15) // 16)
                for w in range(vectors):
                    for r in range(rows):
                        y[v + w, start + r] = results[w * ROWS + r] + tails[w * ROWS + r]


@numba.njit(cache=True)
def multiply_half_rows(isa, address, x, y, first, last, scratch):
    """Compute rows `first` to `last` of one float16 matrix times some vectors.

    Args:
        isa, address: as in `multiply_rows_batch`.
        x: float32 [vectors, columns].
        y, first, last, scratch: as in `multiply_rows_batch`.

    """
    if len(x) == 1:
        half_rows(isa, address, x[0], y[0], first, last)
        return
    for v in range(0, len(x), _MOST_VECTORS):
        some = slice(v, min(v + _MOST_VECTORS, len(x)))
        _half_rows_batch(isa, address, x[some], y[some], first, last, scratch)


@numba.njit(cache=True)
def multiply_rows_batch(isa, address, depth, steps, activations, y, first, last, scratch):
    """Compute rows `first` to `last` of one matrix times some vectors: for each what `multiply_rows` gives, to the bit.

    Args:
        isa, address, depth, steps: as in `multiply_rows`.
        activations: as in `multiply_rows`, with one axis more in front: of the vectors.
        y: float32 [vectors, rows of the matrix], out; rows may lie anywhere.
        first, last: the rows to compute.
        scratch: one thread's row of `scratch_for`.

    """
    x, integers, offsets, units = activations
    groups = units.shape[1]
    if depth == HALVES:
        multiply_half_rows(isa, address, x, y, first, last, scratch)
        return
    if len(x) == 1:
        multiply_rows(isa, address, depth, steps, (x[0], integers[0], offsets[0], units[0]), y[0], first, last)
        return
    row_bytes = groups // 4 * (16 if depth == 1 else 28 if depth == 2 else 42 if depth == 3 else 54)
    base = scratch.ctypes.data + _aligned(scratch)
    for v in range(0, len(x), _MOST_VECTORS):
        some = slice(v, min(v + _MOST_VECTORS, len(x)))
        _arrange(depth, integers[some], offsets[some], units[some], base)
        _trit_rows_batch(isa, address, depth, row_bytes, steps, integers[some], groups, y[some], first, last, scratch)


@numba.njit(cache=True, nogil=True)
def gemv_batch(isa, addresses, rows, depths, steps, activations, y, scratch, thread, threads):
    """Compute a thread's share of several matrices times some vectors.

    Args:
        isa, addresses, rows, depths, steps: as in `gemv`.
        activations: as in `multiply_rows_batch`.
        y: float32 [vectors, rows of all matrices], out; the matrices' results lie side by side.
        scratch: see `scratch_for`.
        thread, threads: which of how many shares of the rows to compute.

    """
    low, high = y.shape[1] * thread // threads, y.shape[1] * (thread + 1) // threads
    start = 0
    for m in range(len(rows)):
        first, last = max(low - start, 0), min(high - start, rows[m])
        if first < last:
            out = y[:, start : start + rows[m]]
            own = scratch[thread]
            multiply_rows_batch(isa, addresses[m], depths[m], steps[m], activations, out, first, last, own)
        start += rows[m]
