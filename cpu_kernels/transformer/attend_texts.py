"""Attention of several texts that grow side by side, each with a cache of its own."""

from __future__ import annotations

import numba

from cpu_kernels.transformer.attention import Cache, attend, rotate_and_store


@numba.njit(cache=True, nogil=True)
def attend_texts(isa, qkv, bias, norm, rules, layer, caches, heads, position, out, thread, threads):
    """Append one token to each text and attend with it: a thread's share of the texts.

    Args:
        isa: the instruction set.
        qkv: float32 [texts, (heads + 2 * kv_heads) * head_dim]; changed in place.
        bias, norm, rules: as in `rotate_and_store`.
        layer: which layer's part of the caches.
        caches: see `Cache`; keys and values have an axis of texts in front.
        heads: number of query heads.
        position: place of every token in its text.
        out: float32 [texts, heads * head_dim].
        thread, threads: the share.

    """
    for text in range(thread, len(qkv), threads):
        cache = Cache(caches.keys[text], caches.values[text], caches.cosines, caches.sines, caches.scratch)
        row = qkv[text : text + 1]
        rotate_and_store(row, bias, norm, rules, layer, cache, heads, position, 0, 1)
        attend(isa, row, rules, layer, cache, position, heads, out[text : text + 1], 0, 1)
