"""The attention of one token in every layer, by itself; only `bench` runs it, to tell what part of a token it takes."""

from __future__ import annotations

import numba

from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.transformer.attention import attend_token, join_spans


@numba.njit(cache=True, nogil=True)
def attend_layers(isa, cache, qkv, bias, norms, rules, position, out, counter, thread, threads):
    """Compute a thread's share of a token's attention, layer by layer, as decode does.

    Args:
        isa: the instruction set.
        cache: see `Cache`.
        qkv: float32 [(heads + 2 * kv_heads) * head_dim], the same in every layer.
        bias: float32, as long; zeros, because it is added to the value in place.
        norms: float32 [layers, (heads + kv_heads) * head_dim], or [layers, 0] for none.
        rules: see `Rules`.
        position: the token's place.
        out: float32 [threads, heads * head_dim]: every thread's copy of the last layer's result.
        counter: int64 [1], the barrier's.
        thread, threads: which of how many shares to compute.

    """
    for layer in range(len(cache.keys)):
        attend_token(isa, cache, layer, qkv, bias, norms[layer], rules, position, thread, threads)
        wait_for_all(counter, threads)
        join_spans(isa, cache, rules.windows[layer], position, out[thread], thread)
        wait_for_all(counter, threads)
