"""Rotary embedding, the key-value cache and grouped-query attention.

Heads that share keys and values are attended with together, and so are tokens of a prompt: each vector of the cache is
multiplied with several queries once it is in a register. Places are seen in tiles; the largest score and the sum of
the weights so far are carried from tile to tile (online softmax, Milakov and Gimelshein, arXiv:1805.02867), so
scores of one tile are all that is ever stored.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from cpu_kernels.attention_tile import (
    PANEL,
    add_product,
    largest_of,
    most_rows,
    narrow,
    powers_of_two,
    sum_columns,
)

TILE = 256  # places whose scores are computed before their values are added
SPANS = 16  # parts into which the places of one token's attention are divided at most
_SHORTEST_SPAN = 64  # places
_MOST_ROWS = 8  # see `most_rows`
_QUERIES_AT_ONCE = 96  # of a prompt, in one pass over the cache: a multiple of `most_rows`
_LOG2_E = 1.4426950408889634


class Scratch(NamedTuple):
    """Working memory of one token's attention; `own` arrays have one entry for each thread."""

    own_queries: np.ndarray  # float32 [threads, group + 1, padded_dim]: of a group of heads, and a key
    own_scores: np.ndarray  # float32 [threads, most_rows, TILE]
    sums: np.ndarray  # float32 [kv_heads, SPANS, group, padded_dim]: of values, weighted
    largest: np.ndarray  # float32 [kv_heads, SPANS, group]: score
    totals: np.ndarray  # float32 [kv_heads, SPANS, group]: of the weights


class Cache(NamedTuple):
    """Keys, values and the rotation of every place.

    Keys and values are float32, or float16 as uint16. Keys lie in panels of 32 places, so that the scores of
    neighbouring places are neighbouring lanes, and values in panels of 32 dimensions, so that both are read in the
    order of the memory. A head's dimensions are padded with zeros to a multiple of 32.
    """

    keys: np.ndarray  # [layers, kv_heads, places / 32, padded_dim, 32]
    values: np.ndarray  # [layers, kv_heads, padded_dim / 32, places, 32]
    cosines: np.ndarray  # float32 [places, head_dim / 2]
    sines: np.ndarray  # float32 [places, head_dim / 2]
    scratch: Scratch


def padded_dimension(head_dim: int) -> int:
    """Return the length of a head in the cache."""
    return -(-head_dim // PANEL) * PANEL


def make_scratch(heads: int, kv_heads: int, head_dim: int, threads: int) -> Scratch:
    """Allocate the working memory of `attend_token`."""
    group, padded = heads // kv_heads, padded_dimension(head_dim)
    return Scratch(
        own_queries=np.zeros((threads, group + 1, padded), np.float32),
        own_scores=np.zeros((threads, _MOST_ROWS, TILE), np.float32),
        sums=np.zeros((kv_heads, SPANS, group, padded), np.float32),
        largest=np.zeros((kv_heads, SPANS, group), np.float32),
        totals=np.zeros((kv_heads, SPANS, group), np.float32),
    )


@numba.njit(cache=True, fastmath={"contract"})
def rotate(head, cosines, sines, interleaved, out):
    """Rotate one head [head_dim]: pairs (2i, 2i + 1) when interleaved, else (i, i + half); `out` may be `head`."""
    half = len(cosines)
    if interleaved:
        for i in range(half):
            low, high = head[2 * i], head[2 * i + 1]
            out[2 * i] = low * cosines[i] - high * sines[i]
            out[2 * i + 1] = high * cosines[i] + low * sines[i]
    else:
        for i in range(half):
            low, high = head[i], head[i + half]
            out[i] = low * cosines[i] - high * sines[i]
            out[i + half] = high * cosines[i] + low * sines[i]


@numba.njit(cache=True)
def _store(keys, values, place, key, value):
    """Store one head's key and value, float32 [head_dim], at a place of its part of the cache."""
    panel, lane = place // PANEL, place % PANEL
    for k in range(len(key)):
        keys[panel, k, lane] = narrow(keys, key[k])
    for k in range(len(value)):
        values[k // PANEL, place, k % PANEL] = narrow(values, value[k])


@numba.njit(cache=True, nogil=True)
def rotate_and_store(qkv, bias, cosines, sines, interleaved, heads, keys, values, position, thread, threads):
    """Add biases, rotate queries and keys, and append keys and values to one layer's cache: a thread's share.

    Args:
        qkv: float32 [tokens, (heads + 2 * kv_heads) * head_dim]; queries and keys are rotated in place.
        bias: float32 [(heads + 2 * kv_heads) * head_dim].
        cosines, sines, keys, values: of one layer, see `Cache`.
        interleaved: whether a head rotates pairs (2i, 2i + 1), as GGUF's `llama` does, or (i, i + half).
        heads: number of query heads.
        position: place of the first token in the cache.
        thread, threads: the share: neighbouring tokens, because their keys lie in the same cache lines.

    """
    kv_heads, tokens, dim = len(keys), len(qkv), 2 * cosines.shape[1]
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        row = qkv[t]
        for k in range(len(bias)):
            row[k] += bias[k]
        place = position + t
        for h in range(heads + kv_heads):
            head = row[h * dim : (h + 1) * dim]
            rotate(head, cosines[place], sines[place], interleaved, head)
        for h in range(kv_heads):
            key = (heads + h) * dim
            value = key + kv_heads * dim
            _store(keys[h], values[h], place, row[key : key + dim], row[value : value + dim])


@numba.njit(cache=True)
def _weigh(isa, scores, r, valid, padded, row, sums, largest, totals):
    """Turn a row's scores of a tile into weights, the first `valid` of which count, and carry the maximum on."""
    for k in range(valid, padded):
        scores[r, k] = -np.inf
    address = scores.ctypes.data + 4 * TILE * r
    new = max(largest[row], largest_of(isa, address, padded))
    if new > largest[row]:
        factor = np.float32(np.exp2(largest[row] - new))
        largest[row] = new
        totals[row] *= factor
        for k in range(sums.shape[1]):
            sums[row, k] *= factor
    totals[row] += powers_of_two(isa, address, padded, new)


@numba.njit(cache=True)
def _attend_tile(isa, queries, row, rows, per_token, keys, values, tile, position, scores, sums, largest, totals):
    """Attend with `rows` queries from `row` on over the places from `tile` on; see `_attend_rows`."""
    dim, size, columns = queries.shape[1], keys.itemsize, sum_columns(len(isa))
    end = min(tile + TILE, position + (row + rows - 1) // per_token + 1)
    places = end - tile
    if places <= 0:
        return
    padded = -(-places // PANEL) * PANEL
    tile_keys = keys.ctypes.data + tile * dim * size
    tile_values, panel_of_values = values.ctypes.data + tile * PANEL * size, values.shape[1] * PANEL * size
    scores_at, queries_at, sums_at = scores.ctypes.data, queries[row].ctypes.data, sums[row].ctypes.data
    for r in range(rows):
        for k in range(padded):
            scores[r, k] = np.float32(0.0)
    for c in range(0, padded, columns):
        panel = tile_keys + (c // PANEL * PANEL * dim + c % PANEL) * size
        add_product(isa, keys, rows, queries_at, 4 * dim, panel, dim, scores_at + 4 * c, 4 * TILE)
    for r in range(rows):
        valid = min(places, position + (row + r) // per_token + 1 - tile)
        if valid > 0:
            _weigh(isa, scores, r, valid, padded, row + r, sums, largest, totals)
        else:
            for k in range(padded):
                scores[r, k] = np.float32(0.0)
    for c in range(0, dim, columns):
        panel = tile_values + c // PANEL * panel_of_values + c % PANEL * size
        add_product(isa, values, rows, scores_at, 4 * TILE, panel, places, sums_at + 4 * c, 4 * dim)


@numba.njit(cache=True)
def _attend_rows(isa, queries, per_token, keys, values, first, position, scores, sums, largest, totals):
    """Attend with queries that share a head of the cache.

    Args:
        isa: the instruction set.
        queries: float32 [rows, padded_dim], times log2(e) / sqrt(head_dim).
        per_token: query r sees the places from `first` to `position` + r // per_token.
        keys, values: one head's, see `Cache`.
        first: a multiple of 32.
        position: place of the first token.
        scores: float32 [most_rows, TILE], scratch.
        sums: float32 [rows, padded_dim], out: of values, weighted by 2**(score - largest).
        largest, totals: float32 [rows], out: largest score, and the sum of the weights.

    """
    rows, step = len(queries), most_rows(len(isa))
    sums[:] = np.float32(0.0)
    totals[:] = np.float32(0.0)
    largest[:] = -np.inf
    for tile in range(first, position + (rows - 1) // per_token + 1, TILE):
        for row in range(0, rows, step):
            _attend_tile(
                isa, queries, row, min(step, rows - row), per_token, keys, values, tile, position, scores, sums,
                largest, totals,
            )  # fmt: skip


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend(isa, qkv, keys, values, position, heads, out, thread, threads):
    """Compute a thread's share of the causal attention of new tokens over the cache.

    Args:
        isa: the instruction set.
        qkv: float32 [tokens, ...], rotated queries first in every row.
        keys, values: one layer's, see `Cache`; those of the new tokens are in there already.
        position: place of the first token.
        heads: number of query heads, a multiple of kv_heads.
        out: float32 [tokens, heads * head_dim].
        thread, threads: the share.

    """
    kv_heads, tokens, dim, padded = len(keys), len(qkv), out.shape[1] // heads, keys.shape[2]
    group = heads // kv_heads
    at_once = max(1, _QUERIES_AT_ONCE // group)
    queries, sums = np.zeros((at_once * group, padded), np.float32), np.empty((at_once * group, padded), np.float32)
    largest, totals = np.empty(at_once * group, np.float32), np.empty(at_once * group, np.float32)
    scores = np.empty((_MOST_ROWS, TILE), np.float32)
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    parts = -(-tokens // at_once)
    for item in range(thread, parts * kv_heads, threads):
        part, shared = item // kv_heads, item % kv_heads
        first = (parts - 1 - part) * at_once  # the longest first, so that threads end together
        rows = min(at_once, tokens - first) * group
        for r in range(rows):
            column = (shared * group + r % group) * dim
            for k in range(dim):
                queries[r, k] = qkv[first + r // group, column + k] * scale
        _attend_rows(
            isa, queries[:rows], group, keys[shared], values[shared], 0, position + first, scores, sums[:rows],
            largest[:rows], totals[:rows],
        )  # fmt: skip
        for r in range(rows):
            column = (shared * group + r % group) * dim
            inverse = np.float32(1.0) / totals[r]
            for k in range(dim):
                out[first + r // group, column + k] = sums[r, k] * inverse


@numba.njit(cache=True)
def _span_length(places):
    """Return how many places a span has; it depends on nothing else, so that threads do not change a result."""
    length = _SHORTEST_SPAN
    while length * SPANS < places:
        length *= 2
    return length


@numba.njit(cache=True)
def _turned(qkv, bias, start, cosines, sines, interleaved, out):
    """Add the bias to one head and rotate it; out float32 [head_dim or more]."""
    for k in range(2 * len(cosines)):
        out[k] = qkv[start + k] + bias[start + k]
    rotate(out, cosines, sines, interleaved, out)


@numba.njit(cache=True)
def attend_token(isa, cache, layer, qkv, bias, interleaved, position, thread, threads):
    """Compute a thread's share of one token's attention, which `join_spans` completes; store its key and value.

    The shares are spans of places of a head of the cache. The key and the value are stored by the thread that has
    the last span: no other one needs them.

    Args:
        isa: the instruction set.
        cache: see `Cache`; places up to `position` exist.
        layer: which layer's.
        qkv: float32 [(heads + 2 * kv_heads) * head_dim], neither biased nor rotated.
        bias: float32, as long.
        interleaved: how heads are rotated, see `rotate`.
        position: the token's place.
        thread, threads: the share.

    """
    keys, values, scratch = cache.keys[layer], cache.values[layer], cache.scratch
    cosines, sines = cache.cosines[position], cache.sines[position]
    queries, scores = scratch.own_queries[thread], scratch.own_scores[thread]
    kv_heads, dim, group = len(keys), 2 * len(cosines), len(queries) - 1
    length = _span_length(position + 1)
    spans = position // length + 1
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    prepared = -1
    for unit in range(kv_heads * spans * thread // threads, kv_heads * spans * (thread + 1) // threads):
        shared, span = unit // spans, unit % spans
        if shared != prepared:
            for g in range(group):
                _turned(qkv, bias, (shared * group + g) * dim, cosines, sines, interleaved, queries[g])
                for k in range(dim):
                    queries[g, k] *= scale
            prepared = shared
        if span == spans - 1:
            start = (kv_heads * group + shared) * dim
            key = queries[group, :dim]
            _turned(qkv, bias, start, cosines, sines, interleaved, key)
            start += kv_heads * dim
            for k in range(start, start + dim):
                qkv[k] += bias[k]
            _store(keys[shared], values[shared], position, key, qkv[start : start + dim])
        _attend_rows(
            isa, queries[:group], group, keys[shared], values[shared], span * length,
            min(position, (span + 1) * length - 1), scores, scratch.sums[shared, span], scratch.largest[shared, span],
            scratch.totals[shared, span],
        )  # fmt: skip


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def join_spans(isa, cache, position, out, thread):
    """Complete the attention of the token at `position` when all threads have done their share of `attend_token`.

    Args:
        isa: the instruction set.
        cache: what `attend_token` has worked on.
        position: the token's place.
        out: float32 [heads * head_dim].
        thread: whose scratch to use; every thread computes all of `out`.

    """
    scratch, head_dim = cache.scratch, 2 * cache.cosines.shape[1]
    kv_heads, _, group, _ = scratch.sums.shape
    spans = position // _span_length(position + 1) + 1
    weights = scratch.own_scores[thread, 0]
    for head in range(kv_heads * group):
        shared, g = head // group, head % group
        for span in range(PANEL):
            weights[span] = scratch.largest[shared, span, g] if span < spans else -np.inf
        powers_of_two(isa, weights.ctypes.data, PANEL, largest_of(isa, weights.ctypes.data, PANEL))
        total = np.float32(0.0)
        row = out[head * head_dim : (head + 1) * head_dim]
        row[:] = np.float32(0.0)
        for span in range(spans):
            weight, part = weights[span], scratch.sums[shared, span, g]
            total += weight * scratch.totals[shared, span, g]
            for k in range(head_dim):
                row[k] += weight * part[k]
        for k in range(head_dim):
            row[k] /= total
