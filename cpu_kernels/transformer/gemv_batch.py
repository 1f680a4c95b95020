"""Matrix times a few vectors: what `gemv` gives for each of them, to the bit, with every row read once.

The vectors are copied into the order in which they are read, and multiplied panel by panel: so many columns that those
of all vectors stay in the first-level cache while some rows pass.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.packed_rows.extract import D1, D2, D3, D4
from cpu_kernels.packed_rows.layout import PAIRS, WORDS_PER_BLOCK
from cpu_kernels.simd.variants import AVX512_NO_VNNI
from cpu_kernels.transformer.batch_dot import (
    EIGHTH,
    HALF,
    LANES,
    QUARTER,
    ROWS,
    SUMMED,
    WHOLE,
    arrange_vectors,
    dot_rows,
    sum_lanes,
    vectors_at_once,
)
from cpu_kernels.transformer.gemv import HALVES, half_rows, multiply_rows
from cpu_kernels.transformer.half_dot import arrange_floats, dot_half_rows, dot_last_columns
from cpu_kernels.transformer.stored_dot import (
    PANEL_STEPS,
    ROW_BYTES,
    ROW_SCALES_BYTES,
    STORED_ROWS,
    STORED_VECTORS,
    dot_panel,
    unpack_panel,
)

_MOST_VECTORS = 16  # for which a row is fetched once
_PANEL_BYTES = 36 << 10  # of the vectors that are multiplied at once: they stay in the first-level cache
_HALF_PANEL_BYTES = 24 << 10  # the same of float32 vectors
_HALF_PANEL_ROWS = 16  # of float16, a power of two up to ROWS
_ALIGNMENT = 64
# Where things lie in the scratch, in bytes
_TOTALS = 0
_TOTALS_OF_8 = _TOTALS + _MOST_VECTORS * ROWS * 4 * 16
_TOTALS_OF_4 = _TOTALS_OF_8 + _MOST_VECTORS * ROWS * 4 * 8
_RESULTS = _TOTALS_OF_4 + _MOST_VECTORS * ROWS * 4 * 4
_LEVELS = _RESULTS + SUMMED * 4
_SCALES = _LEVELS + STORED_ROWS * ROW_BYTES
_VECTORS = _SCALES + STORED_ROWS * ROW_SCALES_BYTES
_STEPS, _STEPS_OF_8_BITS = PANEL_STEPS[16], PANEL_STEPS[8]
_BLOCK_BYTES = (0, *[2 * WORDS_PER_BLOCK[depth] for depth in (1, 2, 3, 4)])
_WIDE, _NARROW = vectors_at_once(AVX512_NO_VNNI), vectors_at_once(0)


@numba.njit(cache=True)
def scratch_floats(columns):
    """Return how many float32 a thread needs to work with, for matrices of up to so many columns."""
    vectors = _MOST_VECTORS * columns  # of float32; of integers and their scales it is less
    return (_VECTORS + 2 * _ALIGNMENT) // 4 + vectors


def scratch_for(threads: int, columns: int) -> np.ndarray:
    """Return working memory for so many threads, a row for each, and matrices of up to so many columns: float32."""
    return np.zeros((threads, scratch_floats.py_func(columns)), np.float32)


@numba.njit(cache=True)
def _aligned(scratch):
    """Return how many bytes of a scratch to skip."""
    return -scratch.ctypes.data % _ALIGNMENT


@numba.njit(cache=True)
def _at_once(isa):
    """Return how many vectors are multiplied at once, at most."""
    return _WIDE if len(isa) >= AVX512_NO_VNNI else _NARROW


@numba.njit(cache=True)
def _stores(isa, vectors):
    """Return whether levels of packed rows are stored for several rounds of vectors."""
    return len(isa) < AVX512_NO_VNNI and vectors > STORED_VECTORS


@numba.njit(cache=True)
def _room(at_once, vectors):
    """Return for how many vectors up to `at_once` are multiplied: for all, a half, a quarter or an eighth of these."""
    room = at_once
    while room > 1 and room // 2 >= vectors:
        room //= 2
    return room


@numba.njit(cache=True)
def _group_bytes(integers):
    """Return how many bytes one group of a vector takes in the scratch: integers [..., units, groups, lanes]."""
    return 4 * (integers.shape[-3] + 2)  # with offset and scale


@numba.njit(cache=True)
def _arrange(isa, depth, integers, offsets, units, base):
    """Copy up to 16 vectors into the scratch, as many together as are multiplied at once."""
    groups, at_once = units.shape[1], _at_once(isa)
    own_offsets = offsets[:, depth - 1]
    strides = integers.strides[0], own_offsets.strides[0], units.strides[0]
    for v in range(0, len(units), at_once):
        count = min(at_once, len(units) - v)
        out = base + _VECTORS + v * groups * _group_bytes(integers)
        own = integers[v], own_offsets[v].ctypes.data, units[v].ctypes.data
        room = STORED_VECTORS if _stores(isa, len(units)) else max(_room(at_once, count), 2)
        arrange_vectors(*own, strides, groups, count, room, out)


@numba.njit(cache=True)
def _dot_stored(isa, depth, integers, matrix, place, base):
    """Do what `_dot_vectors` does, with levels that are stored for all vectors: see `stored_dot`."""
    address, rows, groups, table = matrix
    row_bytes = groups // 4 * _BLOCK_BYTES[len(depth)]
    most = _STEPS if integers.shape[1] == PAIRS else _STEPS_OF_8_BITS
    for row in range(0, rows, STORED_ROWS):
        some = min(STORED_ROWS, rows - row)
        for step in range(0, max(place[1], 1), most):
            steps, first = min(most, place[1] - step), place[0] + step * LANES
            rest = place[2] if step + most >= place[1] else 0
            for r in range(some):
                start, levels = address + (row + r) * row_bytes, base + _LEVELS + r * ROW_BYTES
                ends = levels, base + _SCALES + r * ROW_SCALES_BYTES, STORED_ROWS * row_bytes
                unpack_panel(isa, depth, integers, start, groups, first, steps, rest, table, *ends)
            for v in range(0, len(integers), STORED_VECTORS):
                x = base + _VECTORS + (v * groups + STORED_VECTORS * first) * _group_bytes(integers)
                k = v * ROWS + row
                totals = base + _TOTALS + 64 * k, base + _TOTALS_OF_8 + 32 * k, base + _TOTALS_OF_4 + 16 * k
                dot_panel(isa, integers, base + _LEVELS, base + _SCALES, x, steps, rest, totals, some, first > 0)


@numba.njit(cache=True)
def _dot_vectors(isa, depth, integers, matrix, place, base):
    """Multiply some columns of packed rows with the vectors in the scratch; see `dot_rows`."""
    vectors, groups, at_once, first_group = len(integers), matrix[2], _at_once(isa), place[0]
    add = first_group > 0
    if _stores(isa, vectors):
        _dot_stored(isa, depth, integers, matrix, place, base)
        return
    for v in range(0, vectors, at_once):
        room = max(_room(at_once, vectors - v), 2)
        x = base + _VECTORS + (v * groups + room * first_group) * _group_bytes(integers)
        ends = (
            base + _TOTALS + v * ROWS * 64,
            base + _TOTALS_OF_8 + v * ROWS * 32,
            base + _TOTALS_OF_4 + v * ROWS * 16,
        )
        if room == at_once:
            dot_rows(isa, depth, WHOLE, integers, matrix, place, x, ends, add)
        elif room == at_once // 2:
            dot_rows(isa, depth, HALF, integers, matrix, place, x, ends, add)
        else:
            dot_rows(isa, depth, QUARTER, integers, matrix, place, x, ends, add)


@numba.njit(cache=True)
def _dot_panel(isa, depth, integers, matrix, place, base):
    """Do what `_dot_vectors` does for a depth that is no type."""
    if depth == 1:
        _dot_vectors(isa, D1, integers, matrix, place, base)
    elif depth == 2:
        _dot_vectors(isa, D2, integers, matrix, place, base)
    elif depth == 3:
        _dot_vectors(isa, D3, integers, matrix, place, base)
    else:
        _dot_vectors(isa, D4, integers, matrix, place, base)


@numba.njit(cache=True)
def _sum_totals(isa, rest, y, start, rows, scratch):
    """Add the lanes of the totals of some rows and all vectors."""
    shift = _aligned(scratch)
    base = scratch.ctypes.data + shift
    results = scratch[(shift + _RESULTS) // 4 :]
    for v in range(len(y)):
        for r in range(0, rows, SUMMED):
            k = v * ROWS + r
            ends = base + _TOTALS + 64 * k, base + _TOTALS_OF_8 + 32 * k, base + _TOTALS_OF_4 + 16 * k
            if rows - r >= SUMMED:
                sum_lanes(isa, ends, rest, y[v, start + r :].ctypes.data)
                continue
            sum_lanes(isa, ends, rest, base + _RESULTS)
            for some in range(rows - r):
                y[v, start + r + some] = results[some]


@numba.njit(cache=True)
def _trit_rows_batch(isa, address, depth, row_bytes, table, integers, groups, y, first, last, scratch):
    """Compute rows `first` to `last` of one packed matrix times the vectors in the scratch, up to 16."""
    base = scratch.ctypes.data + _aligned(scratch)
    steps, rest = groups // LANES, groups % LANES
    at_once = _room(_at_once(isa), len(y))
    panels = max(1, -(-groups * at_once * _group_bytes(integers) // _PANEL_BYTES))
    for start in range(first, last, ROWS):
        rows = min(ROWS, last - start)
        matrix = address + start * row_bytes, rows, groups, table.ctypes.data
        for panel in range(panels):
            begin, end = steps * panel // panels, steps * (panel + 1) // panels
            place = begin * LANES, end - begin, rest if panel == panels - 1 else 0
            _dot_panel(isa, depth, integers, matrix, place, base)
        _sum_totals(isa, rest, y, start, rows, scratch)


@numba.njit(cache=True)
def _dot_half_panel(isa, vectors, steps, matrix, place, base):
    """Multiply some columns of float16 rows with the vectors in the scratch; see `dot_half_rows`."""
    at_once, first = _at_once(isa), place[0]
    add = first > 0
    for v in range(0, vectors, at_once):
        room = _room(at_once, vectors - v)
        x = base + _VECTORS + (v * steps + room * first) * LANES * 4
        totals = base + _TOTALS + v * ROWS * 64
        if room == at_once:
            dot_half_rows(isa, WHOLE, matrix, place, x, totals, add)
        elif room == at_once // 2:
            dot_half_rows(isa, HALF, matrix, place, x, totals, add)
        elif room == at_once // 4:
            dot_half_rows(isa, QUARTER, matrix, place, x, totals, add)
        else:
            dot_half_rows(isa, EIGHTH, matrix, place, x, totals, add)


@numba.njit(cache=True)
def _half_rows_batch(isa, address, x, y, first, last, scratch):
    """Compute rows `first` to `last` of one float16 matrix times up to 16 vectors."""
    columns, row_bytes, vectors, at_once = x.shape[1], 2 * x.shape[1], len(x), _at_once(isa)
    base = scratch.ctypes.data + _aligned(scratch)
    steps = columns // LANES
    for v in range(0, vectors, at_once):
        count = min(at_once, vectors - v)
        some = base + _VECTORS + v * steps * LANES * 4
        arrange_floats(x[v].ctypes.data, x.strides[0], columns, count, _room(at_once, count), some)
    panels = max(1, -(-steps * LANES * 4 * _room(at_once, vectors) // _HALF_PANEL_BYTES))
    for start in range(first, last, _HALF_PANEL_ROWS):
        rows = min(_HALF_PANEL_ROWS, last - start)
        matrix = address + start * row_bytes, row_bytes, rows
        for panel in range(panels):
            begin, end = steps * panel // panels, steps * (panel + 1) // panels
            _dot_half_panel(isa, vectors, steps, matrix, (begin, end - begin), base)
        _sum_totals(isa, 0, y, start, rows, scratch)
    done = steps * LANES
    if done < columns:
        for v in range(vectors):
            for r in range(first, last):
                y[v, r] += dot_last_columns(address + r * row_bytes, x[v].ctypes.data, done, columns)


@numba.njit(cache=True, nogil=True, shared=True, any_strides=("y",))
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


@numba.njit(cache=True, nogil=True, shared=True, any_strides=("y",))
def multiply_rows_batch(isa, address, depth, steps, activations, y, first, last, scratch):
    """Compute rows `first` to `last` of one matrix times some vectors: for each what `multiply_rows` gives, to the bit.

    Args:
        isa, address, depth, steps: as in `multiply_rows`.
        activations: as in `multiply_rows`, with one axis more in front: of the vectors.
        y: float32 [vectors, rows of the matrix], out; the rows of a vector are neighbours.
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
        _arrange(isa, depth, integers[some], offsets[some], units[some], base)
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
