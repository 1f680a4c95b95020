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

from cpu_kernels.transformer.attention_tile import (
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
_ALL_PLACES = -(1 << 62)  # the lowest place that a token without a window sees


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
    cosines: np.ndarray  # float32 [rotations, places, head_dim / 2]
    sines: np.ndarray  # float32 [rotations, places, head_dim / 2]
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


@numba.njit(cache=True)
def _length_factor(qkv, bias, first, last, epsilon):
    """Return what brings the biased elements from `first` to before `last` to the root mean square 1."""
    total = np.float32(0.0)
    for k in range(first, last):
        x = qkv[k] + bias[k]
        total += x * x
    return np.float32(1.0) / np.sqrt(total / np.float32(last - first) + epsilon)


@numba.njit(cache=True)
def _common_factors(qkv, bias, norm, heads, kv_heads, dim, rules):
    """Return the factors of all queries and of all keys where each are one vector for the norm, else zeros."""
    if len(norm) == 0 or not rules.normalizes_together:
        return np.float32(0.0), np.float32(0.0)
    middle = heads * dim
    return (
        _length_factor(qkv, bias, 0, middle, rules.epsilon),
        _length_factor(qkv, bias, middle, middle + kv_heads * dim, rules.epsilon),
    )


@numba.njit(cache=True)
def _turned(qkv, bias, start, norm, factor, rules, cosines, sines, out):
    """Add the bias to one head, normalize and rotate it; out float32 [head_dim or more] may be the head itself.

    `norm` has the weights of all queries and keys, or none; `factor` is the norm's, or 0 for the head's own.
    """
    dim = 2 * len(cosines)
    if len(norm) > 0 and factor == 0:
        factor = _length_factor(qkv, bias, start, start + dim, rules.epsilon)
    for k in range(dim):
        out[k] = qkv[start + k] + bias[start + k]
    if len(norm) > 0:
        for k in range(dim):
            out[k] *= factor * norm[start + k]
    rotate(out, cosines, sines, rules.interleaved, out)


@numba.njit(cache=True)
def _normalize_and_rotate(row, bias, norm, heads, kv_heads, rules, cosines, sines):
    """Add biases to a token's queries, keys and values, and normalize and rotate the former two, all in place."""
    dim = 2 * len(cosines)
    of_queries, of_keys = _common_factors(row, bias, norm, heads, kv_heads, dim, rules)
    for h in range(heads + kv_heads):
        head = row[h * dim : (h + 1) * dim]
        _turned(row, bias, h * dim, norm, of_queries if h < heads else of_keys, rules, cosines, sines, head)
    for k in range((heads + kv_heads) * dim, len(bias)):
        row[k] += bias[k]


@numba.njit(cache=True, nogil=True)
def rotate_and_store(qkv, bias, norm, rules, layer, cache, heads, position, thread, threads):
    """Add biases, normalize and rotate queries and keys, and append keys and values to the cache: a thread's share.

    Args:
        qkv: float32 [tokens, (heads + 2 * kv_heads) * head_dim]; changed in place.
        bias: float32 [(heads + 2 * kv_heads) * head_dim].
        norm: float32 [(heads + kv_heads) * head_dim], weights of the queries' and the keys' norm; [0] for no norm.
        rules: see `Rules`.
        layer: which layer's part of the cache.
        cache: see `Cache`.
        heads: number of query heads.
        position: place of the first token in the cache.
        thread, threads: the share: neighbouring tokens, because their keys lie in the same cache lines.

    """
    keys, values = cache.keys[layer], cache.values[layer]
    cosines, sines = cache.cosines[rules.rotations[layer]], cache.sines[rules.rotations[layer]]
    kv_heads, tokens, dim = len(keys), len(qkv), 2 * cosines.shape[1]
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        row = qkv[t]
        place = position + t
        if len(norm) == 0:  # `_turned` would do the same, but its loops, in place, are not vectorized
            for k in range(len(bias)):
                row[k] += bias[k]
            for h in range(heads + kv_heads):
                head = row[h * dim : (h + 1) * dim]
                rotate(head, cosines[place], sines[place], rules.interleaved, head)
        else:
            _normalize_and_rotate(row, bias, norm, heads, kv_heads, rules, cosines[place], sines[place])
        for h in range(kv_heads):
            key = (heads + h) * dim
            value = key + kv_heads * dim
            _store(keys[h], values[h], place, row[key : key + dim], row[value : value + dim])


@numba.njit(cache=True)
def _weigh(isa, scores, r, low, valid, padded, softcap, row, sums, largest, totals):
    """Turn a row's scores of a tile into weights, those from `low` to before `valid`, and carry the maximum on."""
    if softcap > 0:
        for k in range(low, valid):
            scores[r, k] = softcap * np.tanh(scores[r, k] / softcap)
    for k in range(low):
        scores[r, k] = -np.inf
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
def _attend_tile(
    isa, queries, row, rows, per_token, keys, values, tile, lowest, position, softcap, scores, sums, largest, totals
):
    """Attend with `rows` queries from `row` on over the places from `tile` on; see `_attend_rows`."""
    dim, size, columns = queries.shape[1], keys.itemsize, sum_columns(len(isa))
    end = min(tile + TILE, position + (row + rows - 1) // per_token + 1)
    places = end - tile
    if places <= 0 or lowest + row // per_token >= end:
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
        low = max(0, lowest + (row + r) // per_token - tile)
        valid = min(places, position + (row + r) // per_token + 1 - tile)
        if valid > low:
            _weigh(isa, scores, r, low, valid, padded, softcap, row + r, sums, largest, totals)
        else:
            for k in range(padded):
                scores[r, k] = np.float32(0.0)
    for c in range(0, dim, columns):
        panel = tile_values + c // PANEL * panel_of_values + c % PANEL * size
        add_product(isa, values, rows, scores_at, 4 * TILE, panel, places, sums_at + 4 * c, 4 * dim)


@numba.njit(cache=True)
def _attend_rows(
    isa, queries, per_token, keys, values, first, lowest, position, softcap, scores, sums, largest, totals
):
    """Attend with queries that share a head of the cache.

    Args:
        isa: the instruction set.
        queries: float32 [rows, padded_dim], times log2(e) and the scale of scores.
        per_token: query r sees the places from `lowest` + r // per_token to `position` + r // per_token.
        keys, values: one head's, see `Cache`.
        first: a multiple of 32, where to begin: at or before the lowest place that is seen, if that is not negative.
        lowest, position: the lowest and the last place that the first token sees here.
        softcap: float32, times log2(e); see `Rules`.
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
                isa, queries, row, min(step, rows - row), per_token, keys, values, tile, lowest, position, softcap,
                scores, sums, largest, totals,
            )  # fmt: skip


@numba.njit(cache=True)
def _lowest_place(position, window):
    """Return the lowest place that the token at `position` sees, which may be negative."""
    return position - window + 1 if window > 0 else _ALL_PLACES


@numba.njit(cache=True)
def _first_place(position, window):
    """Return the place to begin with: a multiple of 32, at or before the lowest place."""
    return max(0, _lowest_place(position, window)) // PANEL * PANEL


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend(isa, qkv, rules, layer, cache, position, heads, out, thread, threads):
    """Compute a thread's share of the causal attention of new tokens over the cache.

    Args:
        isa: the instruction set.
        qkv: float32 [tokens, ...], rotated queries first in every row.
        rules: see `Rules`.
        layer: which layer's part of the cache.
        cache: see `Cache`; the new tokens are in there already.
        position: place of the first token.
        heads: number of query heads, a multiple of kv_heads.
        out: float32 [tokens, heads * head_dim].
        thread, threads: the share.

    """
    keys, values, window = cache.keys[layer], cache.values[layer], rules.windows[layer]
    kv_heads, tokens, dim, padded = len(keys), len(qkv), out.shape[1] // heads, keys.shape[2]
    group = heads // kv_heads
    at_once = max(1, _QUERIES_AT_ONCE // group)
    queries, sums = np.zeros((at_once * group, padded), np.float32), np.empty((at_once * group, padded), np.float32)
    largest, totals = np.empty(at_once * group, np.float32), np.empty(at_once * group, np.float32)
    scores = np.empty((_MOST_ROWS, TILE), np.float32)
    scale, softcap = rules.attention_scale * np.float32(_LOG2_E), rules.softcap * np.float32(_LOG2_E)
    parts = -(-tokens // at_once)
    for item in range(thread, parts * kv_heads, threads):
        part, shared = item // kv_heads, item % kv_heads
        first = (parts - 1 - part) * at_once  # the longest first, so that threads end together
        rows = min(at_once, tokens - first) * group
        for r in range(rows):
            column = (shared * group + r % group) * dim
            for k in range(dim):
                queries[r, k] = qkv[first + r // group, column + k] * scale
        place = position + first
        _attend_rows(
            isa, queries[:rows], group, keys[shared], values[shared], _first_place(place, window),
            _lowest_place(place, window), place, softcap, scores, sums[:rows], largest[:rows], totals[:rows],
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
def attend_token(isa, cache, layer, qkv, bias, norm, rules, position, thread, threads):
    """Compute a thread's share of one token's attention, which `join_spans` completes; store its key and value.

    The shares are spans of places of a head of the cache. The key and the value are stored by the thread that has
    the last span: no other one needs them.

    Args:
        isa: the instruction set.
        cache: see `Cache`; places up to `position` exist.
        layer: which layer's.
        qkv: float32 [(heads + 2 * kv_heads) * head_dim], as the matrices have left it.
        bias, norm: as in `rotate_and_store`.
        rules: see `Rules`.
        position: the token's place.
        thread, threads: the share.

    """
    keys, values, scratch = cache.keys[layer], cache.values[layer], cache.scratch
    rotation, window = rules.rotations[layer], rules.windows[layer]
    cosines, sines = cache.cosines[rotation, position], cache.sines[rotation, position]
    queries, scores = scratch.own_queries[thread], scratch.own_scores[thread]
    kv_heads, dim, group = len(keys), 2 * len(cosines), len(queries) - 1
    of_queries, of_keys = _common_factors(qkv, bias, norm, kv_heads * group, kv_heads, dim, rules)
    base, lowest = _first_place(position, window), _lowest_place(position, window)
    length = _span_length(position + 1 - base)
    spans = (position - base) // length + 1
    scale, softcap = rules.attention_scale * np.float32(_LOG2_E), rules.softcap * np.float32(_LOG2_E)
    prepared = -1
    for unit in range(kv_heads * spans * thread // threads, kv_heads * spans * (thread + 1) // threads):
        shared, span = unit // spans, unit % spans
        if shared != prepared:
            for g in range(group):
                start = (shared * group + g) * dim
                _turned(qkv, bias, start, norm, of_queries, rules, cosines, sines, queries[g])
                for k in range(dim):
                    queries[g, k] *= scale
            prepared = shared
        if span == spans - 1:
            start = (kv_heads * group + shared) * dim
            key = queries[group, :dim]
            _turned(qkv, bias, start, norm, of_keys, rules, cosines, sines, key)
            start += kv_heads * dim
            for k in range(start, start + dim):
                qkv[k] += bias[k]
            _store(keys[shared], values[shared], position, key, qkv[start : start + dim])
        begin = base + span * length
        _attend_rows(
            isa, queries[:group], group, keys[shared], values[shared], begin, lowest, min(position, begin + length - 1),
            softcap, scores, scratch.sums[shared, span], scratch.largest[shared, span], scratch.totals[shared, span],
        )  # fmt: skip


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def join_spans(isa, cache, window, position, out, thread):
    """Complete the attention of the token at `position` when all threads have done their share of `attend_token`.

    Args:
        isa: the instruction set.
        cache: what `attend_token` has worked on.
        window: the layer's, see `Rules`.
        position: the token's place.
        out: float32 [heads * head_dim].
        thread: whose scratch to use; every thread computes all of `out`.

    """
    scratch, head_dim = cache.scratch, 2 * cache.cosines.shape[2]
    kv_heads, _, group, _ = scratch.sums.shape
    base = _first_place(position, window)
    spans = (position - base) // _span_length(position + 1 - base) + 1
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
