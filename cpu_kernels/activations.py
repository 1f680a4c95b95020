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


@numba.njit(cache=True, parallel=True)
def quantize_rows(x, pairs, offsets, scales):
    """Quantize a batch: `quantize_row` for every row, with a leading dimension [tokens]."""
    if len(x) == 1:
        quantize_row(x[0], pairs[0], offsets[0], scales[0])
    else:
        for t in numba.prange(len(x)):
            quantize_row(x[t], pairs[t], offsets[t], scales[t])


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def _normalize_row(x, weight, epsilon, out):
    total = np.float32(0.0)
    for k in range(len(x)):
        total += x[k] * x[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + epsilon)
    for k in range(len(x)):
        out[k] = weight[k] * (x[k] * factor)


@numba.njit(cache=True, parallel=True)
def normalize(x, residual, weight, epsilon, out, pairs, offsets, scales):
    """Add a residual, then root-mean-square normalize and quantize.

    Args:
        x: float32 [tokens, columns], the residual stream; `residual` is added to it in place.
        residual: float32 [tokens, columns], the last matrix's result.
        weight: float32 [columns].
        epsilon: float32.
        out: float32 [tokens, columns], the normalized vectors.
        pairs, offsets, scales: as in `quantize_rows`, out.

    """
    if len(x) == 1:
        x[0] += residual[0]
        _normalize_row(x[0], weight, epsilon, out[0])
        quantize_row(out[0], pairs[0], offsets[0], scales[0])
    else:
        for t in numba.prange(len(x)):
            x[t] += residual[t]
            _normalize_row(x[t], weight, epsilon, out[t])
            quantize_row(out[t], pairs[t], offsets[t], scales[t])


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _gate_row(gate_up, out):
    width = len(out)
    for k in range(width):
        gate = gate_up[k]
        out[k] = gate / (np.float32(1.0) + np.exp(-gate)) * gate_up[width + k]


@numba.njit(cache=True, parallel=True)
def gate(gate_up, out, pairs, offsets, scales):
    """SwiGLU, then quantize: silu(gate) * up.

    Args:
        gate_up: float32 [tokens, 2 * columns], gate first.
        out: float32 [tokens, columns].
        pairs, offsets, scales: as in `quantize_rows`, out.

    """
    if len(out) == 1:
        _gate_row(gate_up[0], out[0])
        quantize_row(out[0], pairs[0], offsets[0], scales[0])
    else:
        for t in numba.prange(len(out)):
            _gate_row(gate_up[t], out[t])
            quantize_row(out[t], pairs[t], offsets[t], scales[t])
