"""Biases, norms and rotary position embedding (RoPE) of queries and keys."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.transformer.head_gates import head_start
from cpu_kernels.transformer.kv_pages import store_head


@numba.njit(cache=True, fastmath={"contract"})
def rotate(head, cosines, sines, interleaved, half, out):
    """Rotate `half` pairs of a head [head_dim]: (2i, 2i + 1) if interleaved, else (i, i + half); `out` may be `head`.

    Elements behind them are not written.
    """
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
def _inverse_rms(qkv, bias, first, last, epsilon):
    """Return 1 / rms of the biased elements from `first` to before `last`."""
    total = np.float32(0.0)
    for k in range(first, last):
        x = qkv[k] + bias[k]
        total += x * x
    return np.float32(1.0) / np.sqrt(total / np.float32(last - first) + epsilon)


@numba.njit(cache=True)
def joint_inverse_rms(qkv, bias, norm, heads, kv_heads, dim, options):
    """Return the inverse RMS of all queries and of all keys; zeros if there is no norm or if it is one per head."""
    if len(norm) == 0 or not options.normalizes_together:
        return np.float32(0.0), np.float32(0.0)
    middle = heads * dim
    return (
        _inverse_rms(qkv, bias, 0, middle, options.epsilon),
        _inverse_rms(qkv, bias, middle, middle + kv_heads * dim, options.epsilon),
    )


@numba.njit(cache=True)
def normalize_and_rotate_head(qkv, bias, start, norm, inverse_rms, options, cosines, sines, out):
    """Add the bias to the head that begins at `start`, normalize and rotate it.

    Args:
        qkv: float32, a token's queries, keys and values, see `head_start`.
        bias: float32, as many.
        start: index of the head's first element.
        norm: float32, weights of the norm of queries and keys, where these are in `qkv`; [0] for none.
        inverse_rms: the inverse RMS from `joint_inverse_rms`; 0 to compute this head's.
        options: see `LayerOptions`.
        cosines, sines: float32 [head_dim / 2], of the position.
        out: float32 [head_dim or more]; it may be the head itself.

    """
    dim = 2 * len(cosines)
    if len(norm) > 0 and inverse_rms == 0:
        inverse_rms = _inverse_rms(qkv, bias, start, start + dim, options.epsilon)
    for k in range(dim):
        out[k] = qkv[start + k] + bias[start + k]
    if len(norm) > 0:
        for k in range(dim):
            out[k] *= inverse_rms * norm[start + k]
    rotate(out, cosines, sines, options.interleaved, options.rotated_pairs, out)


@numba.njit(cache=True)
def _normalize_and_rotate_token(row, bias, norm, heads, kv_heads, options, cosines, sines):
    """Add a token's biases in place, and normalize and rotate its queries and keys in place."""
    dim = 2 * len(cosines)
    of_queries, of_keys = joint_inverse_rms(row, bias, norm, heads, kv_heads, dim, options)
    for h in range(heads + kv_heads):
        start = head_start(options, heads, h, dim)
        normalize_and_rotate_head(
            row, bias, start, norm, of_queries if h < heads else of_keys, options, cosines, sines,
            row[start : start + dim],
        )  # fmt: skip
    for k in range(head_start(options, heads, heads + kv_heads, dim), len(bias)):
        row[k] += bias[k]


@numba.njit(cache=True, nogil=True)
def rotate_and_store(qkv, bias, norm, options, layer, kv, heads, sequences, positions, thread, threads):
    """Add biases, normalize and rotate queries and keys, and store keys and values: a thread's share of a prompt.

    Args:
        qkv: float32 [tokens, ...], see `head_start`; modified.
        bias, norm: as in `normalize_and_rotate_head`.
        options: see `LayerOptions`.
        layer: index of the layer.
        kv: see `KeyValues`; the pages of all positions must be allocated.
        heads: number of query heads.
        sequences, positions: int64 [tokens], the sequence and the position of each token.
        thread, threads: which of how many shares of the tokens to compute; a share is consecutive tokens, because
            their keys are in the same cache lines.

    """
    rotation = options.rotations[layer]
    cosines, sines = kv.cosines[rotation], kv.sines[rotation]
    kv_heads, tokens, dim = kv.kv_heads, len(qkv), 2 * cosines.shape[1]
    for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        row, position = qkv[t], positions[t]
        if len(norm) == 0:
            # `normalize_and_rotate_head` gives the same result, but its loops are not vectorized in place.
            for k in range(len(bias)):
                row[k] += bias[k]
            for h in range(heads + kv_heads):
                start = head_start(options, heads, h, dim)
                head = row[start : start + dim]
                rotate(head, cosines[position], sines[position], options.interleaved, options.rotated_pairs, head)
        else:
            _normalize_and_rotate_token(row, bias, norm, heads, kv_heads, options, cosines[position], sines[position])
        for h in range(kv_heads):
            key = head_start(options, heads, heads + h, dim)
            value = key + kv_heads * dim
            store_head(kv, sequences[t], layer, h, position, row[key : key + dim], row[value : value + dim])
