"""Everything that happens to a vector between two matrices: norms, gates, residuals and quantization to int16.

The trit kernels multiply int16 activations with one scale for each group of 16: real models have activations a
thousand times the mean, and one scale for a whole vector moves their logits by a thousandth.
"""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.layout import GROUP_SIZE, PAIRS

_LARGEST = np.float32(32767.0)


@numba.njit(cache=True, error_model="numpy")
def quantize_row(x, pairs, offsets, scales):
    """Quantize one vector to int16.

    Args:
        x: float32 [columns].
        pairs: int16 [8, groups, 2], out: plane j holds weights j and j + 8 of every group.
        offsets: int32 [4, groups], out: -h * sum of the group, for each depth.
        scales: float32 [groups], out: the value of one integer step.

    """
    for g in range(len(scales)):
        group = x[g * GROUP_SIZE : (g + 1) * GROUP_SIZE]
        largest = np.float32(0.0)
        for k in range(GROUP_SIZE):
            largest = max(largest, abs(group[k]))
        inverse = _LARGEST / largest if largest > np.float32(1e-30) else np.float32(0.0)
        scales[g] = largest / _LARGEST if largest > np.float32(1e-30) else np.float32(0.0)
        total = np.int32(0)
        for j in range(PAIRS):
            low = np.int32(np.rint(group[j] * inverse))
            high = np.int32(np.rint(group[j + PAIRS] * inverse))
            pairs[j, g, 0] = low
            pairs[j, g, 1] = high
            total += low + high
        offsets[0, g] = -total
        offsets[1, g] = -4 * total
        offsets[2, g] = -13 * total
        offsets[3, g] = -40 * total


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
def quantize_rows(x, pairs, offsets, scales, thread, threads):
    """Quantize a thread's share of a batch: `quantize_row`, with a leading dimension [tokens]."""
    for t in range(thread, len(x), threads):
        quantize_row(x[t], pairs[t], offsets[t], scales[t])


@numba.njit(cache=True, nogil=True)
def normalize_rows(x, residual, weight, epsilon, out, pairs, offsets, scales, thread, threads):
    """Add a residual, normalize and quantize a thread's share of a batch.

    Args:
        x: float32 [tokens, columns], the residual stream; `residual` is added to it in place.
        residual: float32 [tokens, columns], the last matrix's result.
        weight: float32 [columns].
        epsilon: float32.
        out: float32 [tokens, columns], the normalized vectors.
        pairs, offsets, scales: as in `quantize_rows`, out.

    """
    for t in range(thread, len(x), threads):
        normalize_row(x[t], residual[t], weight, epsilon, out[t])
        quantize_row(out[t], pairs[t], offsets[t], scales[t])


@numba.njit(cache=True, nogil=True)
def gate_rows(gate_up, out, pairs, offsets, scales, thread, threads):
    """Gate and quantize a thread's share of a batch.

    Args:
        gate_up: float32 [tokens, 2 * columns], gate first.
        out: float32 [tokens, columns].
        pairs, offsets, scales: as in `quantize_rows`, out.

    """
    columns = out.shape[1]
    for t in range(thread, len(out), threads):
        gate_row(gate_up[t, :columns], gate_up[t, columns:], out[t])
        quantize_row(out[t], pairs[t], offsets[t], scales[t])
