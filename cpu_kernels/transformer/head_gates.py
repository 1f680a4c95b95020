"""Gates of attention: numbers behind each query head, whose sigmoids the head's result is multiplied with."""

from __future__ import annotations

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.transformer.swiglu import multiply_sigmoid


@numba.njit(cache=True)
def head_start(options, heads, head, dim):
    """Return where a head begins in a token's row: `heads` queries, perhaps with a gate behind each; keys; values.

    Args:
        options: see `LayerOptions`.
        heads: number of query heads.
        head: counted over queries, then keys, then values.
        dim: length of a head.

    """
    if not options.gates_heads:
        return head * dim
    return 2 * head * dim if head < heads else (heads + head) * dim


@numba.njit(cache=True)
def gate_head(options, heads, head, qkv, out):
    """Multiply a query head's attention, float32 [head_dim], with the sigmoids of its gate, if there is one."""
    if options.gates_heads:
        dim = len(out)
        start = head_start(options, heads, head, dim) + dim
        multiply_sigmoid(qkv[start : start + dim], out, out)


@numba.njit(cache=True)
def gate_heads(options, dim, qkv, out):
    """Do the same for all heads of a token, float32 [heads * head_dim]."""
    heads = len(out) // dim
    for head in range(heads):
        gate_head(options, heads, head, qkv, out[head * dim : (head + 1) * dim])
