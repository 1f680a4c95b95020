"""Attention of generated tokens: the positions of each are divided into spans, so that threads share a long context.

Borders of spans depend on the position alone. So neither the number of threads nor the other tokens that are computed
at once change a bit of a token's result.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from cpu_kernels.transformer.attention import (
    LOG2_E,
    MOST_ROWS,
    attend_rows,
    first_position,
    lowest_position,
)
from cpu_kernels.transformer.attention_tile import PANEL, largest_of, powers_of_two
from cpu_kernels.transformer.kv_pages import PAGE, padded_dimension, store_head
from cpu_kernels.transformer.rotation import common_factors, rotated_head

MOST_SPLITS = 16  # parts into which the positions of one token's attention are divided at most
_SHORTEST_SPLIT = 64  # positions


class Scratch(NamedTuple):
    """Working memory of the attention of generated tokens; `own` arrays have one entry for each thread."""

    own_queries: np.ndarray  # float32 [threads, group + 1, padded_dim]: of a group of heads, and a key
    own_scores: np.ndarray  # float32 [threads, MOST_ROWS, PAGE]
    sums: np.ndarray  # float32 [tokens, kv_heads, MOST_SPLITS, group, padded_dim]: of values, weighted
    largest: np.ndarray  # float32 [tokens, kv_heads, MOST_SPLITS, group]: score
    totals: np.ndarray  # float32 [tokens, kv_heads, MOST_SPLITS, group]: of the weights


def make_scratch(tokens: int, heads: int, kv_heads: int, head_dim: int, threads: int) -> Scratch:
    """Allocate the working memory for this many tokens at once."""
    group, padded = heads // kv_heads, padded_dimension(head_dim)
    return Scratch(
        own_queries=np.zeros((threads, group + 1, padded), np.float32),
        own_scores=np.zeros((threads, MOST_ROWS, PAGE), np.float32),
        sums=np.zeros((tokens, kv_heads, MOST_SPLITS, group, padded), np.float32),
        largest=np.zeros((tokens, kv_heads, MOST_SPLITS, group), np.float32),
        totals=np.zeros((tokens, kv_heads, MOST_SPLITS, group), np.float32),
    )


@numba.njit(cache=True)
def _splits(position, window):
    """Return where the spans of a token's attention begin, how many positions one has, and how many there are."""
    base = first_position(position, window)
    length = _SHORTEST_SPLIT
    while length * MOST_SPLITS < position + 1 - base:
        length *= 2
    return base, length, (position - base) // length + 1


@numba.njit(cache=True)
def units_of(kv, window, position):
    """Return into how many units, which threads can share, a token's attention is divided."""
    return kv.kv_heads * _splits(position, window)[2]


@numba.njit(cache=True)
def store_key_value(kv, scratch, layer, qkv, bias, norm, options, sequence, position, shared, thread):
    """Rotate and store the key of one head, and its value; `qkv`, `bias` and `norm` as in `attend_units`."""
    rotation = options.rotations[layer]
    cosines, sines = kv.cosines[rotation, position], kv.sines[rotation, position]
    queries = scratch.own_queries[thread]
    dim, group = 2 * len(cosines), len(queries) - 1
    of_keys = common_factors(qkv, bias, norm, kv.kv_heads * group, kv.kv_heads, dim, options)[1]
    start = (kv.kv_heads * group + shared) * dim
    key = queries[group, :dim]
    rotated_head(qkv, bias, start, norm, of_keys, options, cosines, sines, key)
    start += kv.kv_heads * dim
    for k in range(start, start + dim):
        qkv[k] += bias[k]
    store_head(kv, sequence, layer, shared, position, key, qkv[start : start + dim])


@numba.njit(cache=True)
def attend_units(
    isa, kv, scratch, token, layer, qkv, bias, norm, options, sequence, position, first, last, stores, thread
):
    """Compute some units of one token's attention, which `merge_splits` completes.

    Args:
        isa: the instruction set.
        kv: see `KeyValues`; the pages up to `position` exist.
        scratch: see `Scratch`.
        token: the token's place in `scratch`.
        layer: which layer.
        qkv: float32 [(heads + 2 * kv_heads) * head_dim], as the matrices have left it.
        bias, norm: as in `rotate_and_store`.
        options: see `LayerOptions`.
        sequence, position: where the token stands.
        first, last: the units to compute, out of `units_of`: spans of positions, head by head.
        stores: whether the unit with a head's last span stores the head's key and value first; no other unit of the
            token needs them. Without, all keys and values are stored already.
        thread: whose scratch to use.

    """
    rotation, window = options.rotations[layer], options.windows[layer]
    cosines, sines = kv.cosines[rotation, position], kv.sines[rotation, position]
    queries, scores = scratch.own_queries[thread], scratch.own_scores[thread]
    dim, group = 2 * len(cosines), len(queries) - 1
    of_queries = common_factors(qkv, bias, norm, kv.kv_heads * group, kv.kv_heads, dim, options)[0]
    lowest = lowest_position(position, window)
    base, length, spans = _splits(position, window)
    scale, softcap = options.attention_scale * np.float32(LOG2_E), options.softcap * np.float32(LOG2_E)
    prepared = -1
    for unit in range(first, last):
        shared, span = unit // spans, unit % spans
        if shared != prepared:
            for g in range(group):
                start = (shared * group + g) * dim
                rotated_head(qkv, bias, start, norm, of_queries, options, cosines, sines, queries[g])
                for k in range(dim):
                    queries[g, k] *= scale
            prepared = shared
        if stores and span == spans - 1:
            store_key_value(kv, scratch, layer, qkv, bias, norm, options, sequence, position, shared, thread)
        begin = base + span * length
        attend_rows(
            isa, queries[:group], group, kv, sequence, layer, shared, begin, lowest,
            min(position, begin + length - 1), softcap, scores, scratch.sums[token, shared, span],
            scratch.largest[token, shared, span], scratch.totals[token, shared, span],
        )  # fmt: skip


@numba.njit(cache=True)
def attend_token(isa, kv, scratch, layer, qkv, bias, norm, options, sequence, position, thread, threads):
    """Compute a thread's share of a single token's attention, which `merge_splits` completes; see `attend_units`."""
    units = units_of(kv, options.windows[layer], position)
    attend_units(
        isa, kv, scratch, 0, layer, qkv, bias, norm, options, sequence, position, units * thread // threads,
        units * (thread + 1) // threads, True, thread,
    )  # fmt: skip


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def merge_splits(isa, scratch, token, window, position, head_dim, out, thread):
    """Complete a token's attention when all its units are computed.

    Args:
        isa: the instruction set.
        scratch: what the units were computed into.
        token: the token's place in `scratch`.
        window: the layer's, see `LayerOptions`.
        position: the token's position.
        head_dim: length of a head.
        out: float32 [heads * head_dim].
        thread: whose scratch to use.

    """
    _, kv_heads, _, group, _ = scratch.sums.shape
    spans = _splits(position, window)[2]
    weights = scratch.own_scores[thread, 0]
    for head in range(kv_heads * group):
        shared, g = head // group, head % group
        for span in range(PANEL):
            weights[span] = scratch.largest[token, shared, span, g] if span < spans else -np.inf
        powers_of_two(isa, weights.ctypes.data, PANEL, largest_of(isa, weights.ctypes.data, PANEL))
        total = np.float32(0.0)
        row = out[head * head_dim : (head + 1) * head_dim]
        row[:] = np.float32(0.0)
        for span in range(spans):
            weight, part = weights[span], scratch.sums[token, shared, span, g]
            total += weight * scratch.totals[token, shared, span, g]
            for k in range(head_dim):
                row[k] += weight * part[k]
        for k in range(head_dim):
            row[k] /= total
