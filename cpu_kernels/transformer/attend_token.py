"""Attention of generated tokens, with each token's positions divided into splits (flash decoding).

Several threads share a long context: each computes some splits, and `merge_splits` combines them. The splits depend on
the position alone, so a token's result is bit-identical for any number of threads and any other tokens in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.transformer.attention import (
    LOG2_E,
    MAX_ROWS,
    attend_rows,
    first_position,
    lowest_position,
    sink_weight,
)
from cpu_kernels.transformer.attention_tile import PANEL, largest_of, powers_of_two
from cpu_kernels.transformer.head_gates import head_start
from cpu_kernels.transformer.kv_pages import PAGE, keys_address, padded_dimension, store_head
from cpu_kernels.transformer.rotation import joint_inverse_rms, normalize_and_rotate_head

MAX_SPLITS = 16  # largest number of splits of one token's attention
_SHORTEST_SPLIT = 64  # positions


class Scratch(NamedTuple):
    """Scratch of the attention of generated tokens; `own` arrays have one entry per thread."""

    own_queries: np.ndarray  # float32 [threads, group + 1, padded_dim]: the queries of a KV head, and a key
    own_scores: np.ndarray  # float32 [threads, MAX_ROWS, PAGE]
    sums: np.ndarray  # float32 [tokens, kv_heads, MAX_SPLITS, group, padded_dim]: weighted sums of values
    largest: np.ndarray  # float32 [tokens, kv_heads, MAX_SPLITS, group]: largest scores
    totals: np.ndarray  # float32 [tokens, kv_heads, MAX_SPLITS, group]: sums of weights


def make_scratch(tokens: int, heads: int, kv_heads: int, head_dim: int, threads: int) -> Scratch:
    """Allocate the scratch for a batch of `tokens` tokens."""
    group, padded = heads // kv_heads, padded_dimension(head_dim)
    return Scratch(
        own_queries=np.zeros((threads, group + 1, padded), np.float32),
        own_scores=np.zeros((threads, MAX_ROWS, PAGE), np.float32),
        sums=np.zeros((tokens, kv_heads, MAX_SPLITS, group, padded), np.float32),
        largest=np.zeros((tokens, kv_heads, MAX_SPLITS, group), np.float32),
        totals=np.zeros((tokens, kv_heads, MAX_SPLITS, group), np.float32),
    )


@numba.njit(cache=True)
def _split_positions(position, window):
    """Return the first position of a token's splits, their length in positions, and their number."""
    base = first_position(position, window)
    length = _SHORTEST_SPLIT
    while length * MAX_SPLITS < position + 1 - base:
        length *= 2
    return base, length, (position - base) // length + 1


@numba.njit(cache=True)
def units_of(kv, window, position):
    """Return the number of work units of a token's attention: one per KV head and split."""
    return kv.kv_heads * _split_positions(position, window)[2]


@numba.njit(cache=True)
def store_key_value(kv, scratch, layer, qkv, bias, norm, options, sequence, position, kv_head, thread):
    """Normalize and rotate the key of one KV head, and store it and the value; arguments as in `attend_units`."""
    rotation = options.rotations[layer]
    cosines, sines = kv.cosines[rotation, position], kv.sines[rotation, position]
    queries = scratch.own_queries[thread]
    dim, group = 2 * len(cosines), len(queries) - 1
    inverse_rms_of_keys = joint_inverse_rms(qkv, bias, norm, kv.kv_heads * group, kv.kv_heads, dim, options)[1]
    start = head_start(options, kv.kv_heads * group, kv.kv_heads * group + kv_head, dim)
    key = queries[group, :dim]
    normalize_and_rotate_head(qkv, bias, start, norm, inverse_rms_of_keys, options, cosines, sines, key)
    start += kv.kv_heads * dim
    for k in range(start, start + dim):
        qkv[k] += bias[k]
    store_head(kv, sequence, layer, kv_head, position, key, qkv[start : start + dim])


@numba.njit(cache=True, nogil=True, shared=True)
def attend_units(
    isa, kv, scratch, token, layer, qkv, bias, norm, options, sequence, position, first, last, stores, thread
):
    """Compute some work units of one token's attention, which `merge_splits` combines.

    Args:
        isa: the instruction set.
        kv: see `KeyValues`; the pages up to `position` must be allocated.
        scratch: see `Scratch`.
        token: the token's index in `scratch`.
        layer: index of the layer.
        qkv: float32, the output of the matrices, see `head_start`.
        bias, norm: as in `rotate_and_store`.
        options: see `LayerOptions`.
        sequence, position: the token's sequence and position.
        first, last: the units to compute, of `units_of`: splits, KV head by KV head.
        stores: whether the unit of a head's last split stores the head's key and value first; only this unit reads
            them. If false, they must be stored already.
        thread: index of the thread, for its scratch.

    """
    rotation, window = options.rotations[layer], options.windows[layer]
    cosines, sines = kv.cosines[rotation, position], kv.sines[rotation, position]
    queries, scores = scratch.own_queries[thread], scratch.own_scores[thread]
    dim, group = 2 * len(cosines), len(queries) - 1
    inverse_rms_of_queries = joint_inverse_rms(qkv, bias, norm, kv.kv_heads * group, kv.kv_heads, dim, options)[0]
    lowest = lowest_position(position, window)
    base, length, splits = _split_positions(position, window)
    scale, softcap = options.attention_scale * np.float32(LOG2_E), options.softcap * np.float32(LOG2_E)
    prepared = -1
    for unit in range(first, last):
        kv_head, split = unit // splits, unit % splits
        if kv_head != prepared:
            for g in range(group):
                start = head_start(options, kv.kv_heads * group, kv_head * group + g, dim)
                normalize_and_rotate_head(
                    qkv, bias, start, norm, inverse_rms_of_queries, options, cosines, sines, queries[g]
                )
                for k in range(dim):
                    queries[g, k] *= scale
            prepared = kv_head
        if stores and split == splits - 1:
            store_key_value(kv, scratch, layer, qkv, bias, norm, options, sequence, position, kv_head, thread)
        begin = base + split * length
        next_keys = 0
        if unit + 1 < last:
            next_begin = base + (unit + 1) % splits * length
            next_keys = keys_address(kv, sequence, layer, (unit + 1) // splits, next_begin)
        attend_rows(
            isa, queries[:group], group, kv, sequence, layer, kv_head, begin, lowest,
            min(position, begin + length - 1), next_keys, softcap, scores, scratch.sums[token, kv_head, split],
            scratch.largest[token, kv_head, split], scratch.totals[token, kv_head, split],
        )  # fmt: skip


@numba.njit(cache=True)
def attend_token(isa, kv, scratch, layer, qkv, bias, norm, options, sequence, position, thread, threads):
    """Compute a thread's share of a single token's attention, which `merge_splits` combines; see `attend_units`."""
    units = units_of(kv, options.windows[layer], position)
    attend_units(
        isa, kv, scratch, 0, layer, qkv, bias, norm, options, sequence, position, units * thread // threads,
        units * (thread + 1) // threads, True, thread,
    )  # fmt: skip


@numba.njit(cache=True, nogil=True, shared=True, fastmath={"contract"}, error_model="numpy")
def merge_splits(isa, scratch, token, options, layer, position, head_dim, out, thread):
    """Combine the splits of a token's attention after all its units are computed.

    Args:
        isa: the instruction set.
        scratch: the results of the units.
        token: the token's index in `scratch`.
        options: see `LayerOptions`.
        layer: index of the layer.
        position: the token's position.
        head_dim: length of a head.
        out: float32 [heads * head_dim].
        thread: index of the thread, for its scratch.

    """
    _, kv_heads, _, group, _ = scratch.sums.shape
    splits = _split_positions(position, options.windows[layer])[2]
    weights = scratch.own_scores[thread, 0]
    for head in range(kv_heads * group):
        kv_head, g = head // group, head % group
        for split in range(PANEL):
            weights[split] = scratch.largest[token, kv_head, split, g] if split < splits else -np.inf
        largest = largest_of(isa, weights.ctypes.data, PANEL)
        powers_of_two(isa, weights.ctypes.data, PANEL, largest)
        total = sink_weight(options.sinks[layer], head, largest)
        row = out[head * head_dim : (head + 1) * head_dim]
        row[:] = np.float32(0.0)
        for split in range(splits):
            weight, part = weights[split], scratch.sums[token, kv_head, split, g]
            total += weight * scratch.totals[token, kv_head, split, g]
            for k in range(head_dim):
                row[k] += weight * part[k]
        for k in range(head_dim):
            row[k] /= total
