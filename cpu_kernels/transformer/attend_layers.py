"""The attention of one token in all layers, without the matrices; `bench` measures its share of decode with it."""

from __future__ import annotations

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.transformer.attend_token import attend_token, merge_splits
from cpu_kernels.transformer.head_gates import gate_heads
from cpu_kernels.transformer.layer_options import ATTENTION


@numba.njit(cache=True, nogil=True)
def attend_layers(isa, kv, scratch, qkv, bias, norms, options, position, out, counter, thread, threads):
    """Compute a thread's share of a token's attention in sequence 0, in all layers that have it, as decode does.

    Args:
        isa: the instruction set.
        kv, scratch: see `KeyValues` and `Scratch`.
        qkv: float32, see `head_start`, the same in every layer.
        bias: float32, as many; zeros, because it is added to the values in place.
        norms: float32 [layers, ...], see `normalize_and_rotate_head`; [layers, 0] for none.
        options: see `LayerOptions`.
        position: the token's position.
        out: float32 [threads, heads * head_dim]: every thread's copy of the last layer's result.
        counter: int64 [1], the barrier's counter.
        thread, threads: which of how many shares to compute.

    """
    head_dim = 2 * kv.cosines.shape[2]
    for layer in range(len(kv.slots)):
        if options.kinds[layer] != ATTENTION:
            continue
        attend_token(isa, kv, scratch, layer, qkv, bias, norms[layer], options, 0, position, thread, threads)
        wait_for_all(counter, threads)
        merge_splits(isa, scratch, 0, options, layer, position, head_dim, out[thread], thread)
        gate_heads(options, head_dim, qkv, out[thread])
        wait_for_all(counter, threads)
