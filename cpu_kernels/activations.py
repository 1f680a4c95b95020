"""Everything that happens to a vector between two matrices: norms, gates, residuals and quantization to int16.

The trit kernels multiply int16 activations with one scale for each group of 16: real models have activations a
thousand times the mean, and one scale for a whole vector moves their logits by a thousandth.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.layout import BLOCK_TOKENS, GROUP_SIZE, PAIRS

# x, pairs, offsets, scales: what the matrix kernels take, as `quantize_row` or `quantize_batch` lays it out
VectorBuffers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_LARGEST = np.float32(32767.0)
_SMALLEST = np.float32(1e-30)  # below, a reciprocal would overflow


@numba.njit(cache=True, error_model="numpy")
def _quantize(x, pairs, offsets, scales):
    """Quantize float32 [columns] to int16: pairs [groups, 8, 2], offsets [4, groups], scales [groups]."""
    for g in range(len(scales)):
        group = x[g * GROUP_SIZE : (g + 1) * GROUP_SIZE]
        largest = np.float32(0.0)
        for k in range(GROUP_SIZE):
            largest = max(largest, abs(group[k]))
        inverse = _LARGEST / largest if largest > _SMALLEST else np.float32(0.0)
        scales[g] = largest / _LARGEST if largest > _SMALLEST else np.float32(0.0)
        total = np.int32(0)
        for j in range(PAIRS):
            low = np.int32(np.rint(group[j] * inverse))
            high = np.int32(np.rint(group[j + PAIRS] * inverse))
            pairs[g, j, 0] = low
            pairs[g, j, 1] = high
            total += low + high
        offsets[0, g] = -total
        offsets[1, g] = -4 * total
        offsets[2, g] = -13 * total
        offsets[3, g] = -40 * total


@numba.njit(cache=True)
def quantize_row(x, pairs, offsets, scales):
    """Quantize one vector to int16.

    Args:
        x: float32 [columns].
        pairs: int16 [8, groups, 2], out: plane j holds weights j and j + 8 of every group.
        offsets: int32 [4, groups], out: -h * sum of the group, for each depth.
        scales: float32 [groups], out: the value of one integer step.

    """
    _quantize(x, pairs.transpose(1, 0, 2), offsets, scales)


@numba.njit(cache=True)
def _quantize_token(t, x, pairs, offsets, scales):
    """Quantize token t of a batch into its lane of its block."""
    block, lane = t // BLOCK_TOKENS, t % BLOCK_TOKENS
    _quantize(x[t], pairs[block, :, :, lane], offsets[block, :, :, lane], scales[block, :, lane])


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def normalize_row(x, residual, weight, epsilon, out):
    """Add `residual` to `x` in place, then out = weight * x / root mean square of x; all float32 [columns]."""
    total = np.float32(0.0)
    for k in range(len(x)):
        x[k] += residual[k]
        total += x[k] * x[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + epsilon)
    for k in range(len(x)):
        out[k] = weight[k] * (x[k] * factor)


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def gate_row(gate, up, out):
    """SwiGLU: out = silu(gate) * up; all float32 [columns]."""
    for k in range(len(out)):
        out[k] = gate[k] / (np.float32(1.0) + np.exp(-gate[k])) * up[k]


@numba.njit(cache=True, nogil=True)
def quantize_batch(x, pairs, offsets, scales, thread, threads):
    """Quantize a thread's share of a batch.

    Args:
        x: float32 [tokens, columns].
        pairs: int16 [blocks, groups, 8, 8 tokens, 2], out: as in `quantize_row`, tokens in blocks of eight.
        offsets: int32 [blocks, 4, groups, 8 tokens], out.
        scales: float32 [blocks, groups, 8 tokens], out.
        thread, threads: the share: every `threads`-th token, here and below.

    """
    for t in range(thread, len(x), threads):
        _quantize_token(t, x, pairs, offsets, scales)


@numba.njit(cache=True, nogil=True)
def remainder_of_batch(x, pairs, scales, out, thread, threads):
    """Compute what quantization left out of a thread's share of a batch: out = x - quantized x.

    Args:
        x, pairs, scales: as `quantize_batch` left them.
        out: float32 [tokens, columns].
        thread, threads: the share.

    """
    for t in range(thread, len(x), threads):
        block, lane = t // BLOCK_TOKENS, t % BLOCK_TOKENS
        for g in range(scales.shape[1]):
            # In float64 the product is exact, so only the remainder itself is rounded.
            scale = np.float64(scales[block, g, lane])
            for p in range(GROUP_SIZE):
                k = g * GROUP_SIZE + p
                out[t, k] = x[t, k] - scale * pairs[block, g, p % PAIRS, lane, p // PAIRS]


@numba.njit(cache=True, nogil=True)
def normalize_batch(stream, residual, weight, epsilon, x, pairs, offsets, scales, thread, threads):
    """Add a residual, normalize and quantize a thread's share of a batch.

    Args:
        stream: float32 [tokens, columns], the residual stream; `residual` is added to it in place.
        residual: float32 [tokens, columns], the last matrix's result.
        weight: float32 [columns].
        epsilon: float32.
        x, pairs, offsets, scales: as in `quantize_batch`, all out.
        thread, threads: the share.

    """
    for t in range(thread, len(x), threads):
        normalize_row(stream[t], residual[t], weight, epsilon, x[t])
        _quantize_token(t, x, pairs, offsets, scales)


@numba.njit(cache=True, nogil=True)
def gate_batch(gate_up, x, pairs, offsets, scales, thread, threads):
    """Gate and quantize a thread's share of a batch.

    Args:
        gate_up: float32 [tokens, 2 * columns], gate first.
        x, pairs, offsets, scales: as in `quantize_batch`, all out.
        thread, threads: the share.

    """
    columns = x.shape[1]
    for t in range(thread, len(x), threads):
        gate_row(gate_up[t, :columns], gate_up[t, columns:], x[t])
        _quantize_token(t, x, pairs, offsets, scales)
