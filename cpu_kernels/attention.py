"""Rotary embedding, key-value cache and grouped-query attention."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True)
def rotate(head, cosines, sines, interleaved, out):
    """Rotate one head [head_dim]: pairs (2i, 2i + 1) when interleaved, else (i, i + half); `out` may be `head`."""
    half = len(cosines)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        low, high = head[a], head[b]
        out[a] = low * cosines[i] - high * sines[i]
        out[b] = high * cosines[i] + low * sines[i]


@numba.njit(cache=True, nogil=True)
def rotate_and_store(qkv, bias, cosines, sines, interleaved, heads, keys, values, position, thread, threads):
    """Add biases, rotate queries and keys, and append keys and values to one layer's cache: a thread's share.

    Args:
        qkv: float32 [tokens, (heads + 2 * kv_heads) * head_dim]; the queries are rotated in place.
        bias: float32 [(heads + 2 * kv_heads) * head_dim].
        cosines, sines: float32 [context, head_dim / 2].
        interleaved: whether a head rotates pairs (2i, 2i + 1), as GGUF's `llama` does, or (i, i + half).
        heads: number of query heads.
        keys, values: float32 [kv_heads, context, head_dim], out.
        position: place of the first token in the cache.
        thread, threads: the share: every `threads`-th token.

    """
    kv_heads, _, dim = keys.shape
    for t in range(thread, len(qkv), threads):
        row = qkv[t]
        for k in range(len(bias)):
            row[k] += bias[k]
        place = position + t
        for h in range(heads + kv_heads):
            head = row[h * dim : (h + 1) * dim]
            rotate(head, cosines[place], sines[place], interleaved, head)
        for h in range(kv_heads):
            start = (heads + h) * dim
            keys[h, place] = row[start : start + dim]
            start += kv_heads * dim
            values[h, place] = row[start : start + dim]


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def attend_head(query, keys, values, scores, out):
    """Attend with one query head over the first len(scores) places of the cache."""
    dim = len(query)
    scale = np.float32(1.0 / np.sqrt(dim))
    largest = np.float32(-np.inf)
    for place in range(len(scores)):
        score = np.float32(0.0)
        for k in range(dim):
            score += query[k] * keys[place, k]
        scores[place] = score * scale
        largest = max(largest, scores[place])
    total = np.float32(0.0)
    out[:] = np.float32(0.0)
    for place in range(len(scores)):
        weight = np.exp(scores[place] - largest)
        total += weight
        for k in range(dim):
            out[k] += weight * values[place, k]
    for k in range(dim):
        out[k] /= total


@numba.njit(cache=True, nogil=True)
def attend(qkv, keys, values, position, heads, scores, out, thread, threads):
    """Compute a thread's share of the causal attention of new tokens over the cache.

    Args:
        qkv: float32 [tokens, ...], rotated queries first in every row.
        keys, values: float32 [kv_heads, context, head_dim].
        position: place of the first token.
        heads: number of query heads, a multiple of kv_heads.
        scores: float32 [threads or more, context], scratch.
        out: float32 [tokens, heads * head_dim].
        thread, threads: the share: every `threads`-th token, because later tokens look back further.

    """
    kv_heads, _, dim = keys.shape
    own_scores = scores[thread]
    for h in range(heads):
        shared = h // (heads // kv_heads)
        columns = slice(h * dim, (h + 1) * dim)
        for t in range(thread, len(qkv), threads):
            seen = own_scores[: position + t + 1]
            attend_head(qkv[t, columns], keys[shared], values[shared], seen, out[t, columns])
