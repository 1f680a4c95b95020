"""The attention of one token in every layer, by itself; only `bench` runs it, to tell what part of a token it takes."""

from __future__ import annotations

import numba

from cpu_kernels.attention import attend_head


@numba.njit(cache=True, nogil=True)
def attend_layers(queries, keys, values, places, scores, out, thread, threads):
    """Compute a thread's share of the heads, layer by layer, as decode does.

    Args:
        queries: float32 [heads, head_dim], the same in every layer.
        keys, values: [layers, kv_heads, context, head_dim], the cache.
        places: how many places of the cache are seen.
        scores: float32 [heads, context], scratch.
        out: float32 [heads, head_dim].
        thread, threads: which of how many shares of the heads to compute.

    """
    heads = len(queries)
    shared_by = heads // keys.shape[1]
    for layer in range(len(keys)):
        for h in range(heads * thread // threads, heads * (thread + 1) // threads):
            attend_head(
                queries[h], keys[layer, h // shared_by], values[layer, h // shared_by], scores[h, :places], out[h]
            )
