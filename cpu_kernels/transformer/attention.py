"""Grouped-query attention over pages of keys and values.

The query heads of a KV head, and several tokens of a prompt, are computed together: each vector of a page is loaded
once and multiplied with several queries. Positions are processed in tiles that do not cross page borders. Online
softmax (Milakov and Gimelshein, arXiv:1805.02867) carries the largest score and the sum of weights from tile to tile,
so only the scores of one tile are stored.

A token's result is bit-identical whatever other tokens are computed with it: tiles end at page borders, and masked
positions add exact zeros.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.transformer.attention_tile import (
    PANEL,
    SCALE_BYTES,
    largest_of,
    max_rows,
    multiply_keys,
    multiply_values,
    powers_of_two,
    product_columns,
)
from cpu_kernels.transformer.head_gates import gate_head, head_start
from cpu_kernels.transformer.kv_pages import PAGE, keys_address, scales_address, values_address

MAX_ROWS = 8  # the largest result of `max_rows`
LOG2_E = 1.4426950408889634
_QUERIES_AT_ONCE = 96  # queries of a prompt in one pass over the pages: a multiple of `max_rows`
_PREFETCH_BYTES = 4096  # how far ahead within a page
_ALL_POSITIONS = -(1 << 62)  # the lowest visible position without a window
FIRST_ROW, ROWS, SEQUENCE, POSITION = range(4)  # columns of the segments of a prompt


@numba.njit(cache=True)
def _softmax_weights(isa, scores, r, low, valid, padded, softcap, row, sums, largest, totals):
    """Convert a row's scores to softmax weights, zero outside `low` to before `valid`, and update the maximum."""
    if softcap > 0:
        for k in range(low, valid):
            scores[r, k] = softcap * np.tanh(scores[r, k] / softcap)
    for k in range(low):
        scores[r, k] = -np.inf
    for k in range(valid, padded):
        scores[r, k] = -np.inf
    address = scores.ctypes.data + 4 * PAGE * r
    new = max(largest[row], largest_of(isa, address, padded))
    if new > largest[row]:
        factor = np.float32(np.exp2(largest[row] - new))
        largest[row] = new
        totals[row] *= factor
        for k in range(sums.shape[1]):
            sums[row, k] *= factor
    totals[row] += powers_of_two(isa, address, padded, new)


@numba.njit(cache=True)
def _attend_tile(
    isa, queries, row, rows, per_token, kv, page, keys, values, next_keys, tile, end, lowest, position, softcap,
    scores, sums, largest, totals,
):  # fmt: skip
    """Compute attention of `rows` queries from `row` over positions `tile` to before `end`; see `attend_rows`.

    With the keys of a whole page its values are prefetched, and with these the keys from `next_keys` on; in a part of a
    page, what is a bit ahead.
    """
    dim, size, columns = queries.shape[1], kv.element.itemsize, product_columns(len(isa), rows)
    end = min(end, position + (row + rows - 1) // per_token + 1)
    count = end - tile
    if count <= 0 or lowest + row // per_token >= end:
        return
    padded = -(-count // PANEL) * PANEL
    after_keys, after_values = _PREFETCH_BYTES, _PREFETCH_BYTES
    if count == PAGE:
        after_keys, after_values = values - keys, next_keys - values
    tile_keys = keys + tile % PAGE * dim * size
    tile_values = values + tile % PAGE * PANEL * size
    scores_at, queries_at, sums_at = scores.ctypes.data, queries[row].ctypes.data, sums[row].ctypes.data
    for r in range(rows):
        for k in range(padded):
            scores[r, k] = np.float32(0.0)
    for c in range(0, padded, columns):
        panel = tile_keys + c // PANEL * PANEL * dim * size
        scales = scales_address(kv, page, panel) + c % PANEL * SCALE_BYTES
        panel += c % PANEL * size
        multiply_keys(
            isa, kv.element, rows, queries_at, 4 * dim, panel, dim, scores_at + 4 * c, 4 * PAGE, scales, after_keys
        )
    for r in range(rows):
        low = max(0, lowest + (row + r) // per_token - tile)
        valid = min(count, position + (row + r) // per_token + 1 - tile)
        if valid > low:
            _softmax_weights(isa, scores, r, low, valid, padded, softcap, row + r, sums, largest, totals)
        else:
            for k in range(padded):
                scores[r, k] = np.float32(0.0)
    for c in range(0, dim, columns):
        panel = tile_values + c // PANEL * PAGE * PANEL * size
        scales = scales_address(kv, page, panel)
        panel += c % PANEL * size
        multiply_values(
            isa, kv.element, rows, scores_at, 4 * PAGE, panel, count, sums_at + 4 * c, 4 * dim, scales, after_values
        )


@numba.njit(cache=True)
def attend_rows(
    isa, queries, per_token, kv, sequence, layer, head, first, lowest, position, next_keys, softcap, scores, sums,
    largest, totals,
):  # fmt: skip
    """Compute attention of queries that share a KV head.

    Args:
        isa: the instruction set.
        queries: float32 [rows, padded_dim], multiplied with log2(e) and the attention scale.
        per_token: query r sees the positions from `lowest` + r // per_token to `position` + r // per_token.
        kv: see `KeyValues`.
        sequence, layer, head: which keys and values.
        first: the position to start at: a multiple of 32, at or before max(0, lowest).
        lowest, position: the lowest and the last position that the first token sees.
        next_keys: address of the keys that are read after these, to be prefetched; 0 for none.
        softcap: float32, multiplied with log2(e); see `LayerOptions`.
        scores: float32 [MAX_ROWS, PAGE], scratch.
        sums: float32 [rows, padded_dim], out: sums of values with weights 2**(score - largest).
        largest, totals: float32 [rows], out: largest score, and sum of weights.

    """
    rows, step = len(queries), max_rows(len(isa))
    sums[:] = np.float32(0.0)
    totals[:] = np.float32(0.0)
    largest[:] = -np.inf
    tile, last = first, position + (rows - 1) // per_token
    while tile <= last:
        end = (tile // PAGE + 1) * PAGE
        page = kv.table[sequence, tile // PAGE]
        keys = keys_address(kv, sequence, layer, head, tile)
        values = values_address(kv, sequence, layer, head, tile)
        following = keys if next_keys == 0 else next_keys
        if end <= last:
            following = keys_address(kv, sequence, layer, head, end)
        for row in range(0, rows, step):
            _attend_tile(
                isa, queries, row, min(step, rows - row), per_token, kv, page, keys, values, following, tile, end,
                lowest, position, softcap, scores, sums, largest, totals,
            )  # fmt: skip
        tile = end


@numba.njit(cache=True)
def lowest_position(position, window):
    """Return the lowest position that the token at `position` sees; it may be negative."""
    return position - window + 1 if window > 0 else _ALL_POSITIONS


@numba.njit(cache=True)
def first_position(position, window):
    """Return the position to start at: a multiple of 32, at or before the lowest visible position."""
    return max(0, lowest_position(position, window)) // PANEL * PANEL


@numba.njit(cache=True)
def sink_weight(sinks, head, largest):
    """Return the weight of a head's sink beside those of scores whose largest, times log2(e), is given; 0 for none."""
    if len(sinks) == 0:
        return np.float32(0.0)
    return np.float32(np.exp2(sinks[head] * np.float32(LOG2_E) - largest))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend(isa, qkv, options, layer, kv, segments, heads, out, thread, threads):
    """Compute a thread's share of the causal attention of prompts.

    Args:
        isa: the instruction set.
        qkv: float32 [tokens, ...]; each row starts with the rotated queries, see `head_start`.
        options: see `LayerOptions`.
        layer: index of the layer.
        kv: see `KeyValues`; the keys and values of the tokens must be stored already.
        segments: int64 [segments, 4]: first row, number of rows, sequence, and position of the first row, for
            consecutive tokens of one sequence.
        heads: number of query heads, a multiple of kv_heads.
        out: float32 [tokens, heads * head_dim].
        thread, threads: which of how many shares to compute.

    """
    kv_heads, group, window = kv.kv_heads, heads // kv.kv_heads, options.windows[layer]
    dim, padded, at_once = out.shape[1] // heads, kv.padded_dim, max(1, _QUERIES_AT_ONCE // group)
    queries, sums = np.zeros((at_once * group, padded), np.float32), np.empty((at_once * group, padded), np.float32)
    largest, totals = np.empty(at_once * group, np.float32), np.empty(at_once * group, np.float32)
    scores = np.empty((MAX_ROWS, PAGE), np.float32)
    scale, softcap = options.attention_scale * np.float32(LOG2_E), options.softcap * np.float32(LOG2_E)
    done = 0  # parts of earlier segments
    for s in range(len(segments)):
        parts = -(-segments[s, ROWS] // at_once)
        start = (thread - done * kv_heads) % threads  # the threads take turns on the heads of all parts
        for item in range(start, parts * kv_heads, threads):
            part, kv_head = item // kv_heads, item % kv_heads
            before = (parts - 1 - part) * at_once  # the longest first, so that the threads finish together
            first = segments[s, FIRST_ROW] + before
            rows = min(at_once, segments[s, ROWS] - before) * group
            for r in range(rows):
                query = head_start(options, heads, kv_head * group + r % group, dim)
                for k in range(dim):
                    queries[r, k] = qkv[first + r // group, query + k] * scale
            position = segments[s, POSITION] + before
            attend_rows(
                isa, queries[:rows], group, kv, segments[s, SEQUENCE], layer, kv_head, first_position(position, window),
                lowest_position(position, window), position, 0, softcap, scores, sums[:rows], largest[:rows],
                totals[:rows],
            )  # fmt: skip
            for r in range(rows):
                head = kv_head * group + r % group
                column = head * dim
                inverse = np.float32(1.0) / (totals[r] + sink_weight(options.sinks[layer], head, largest[r]))
                for k in range(dim):
                    out[first + r // group, column + k] = sums[r, k] * inverse
                row = first + r // group
                gate_head(options, heads, head, qkv[row], out[row, column : column + dim])
        done += parts
