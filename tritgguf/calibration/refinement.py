"""Choose the levels of a quantized matrix again, group by group, given all others.

Error feedback compensates an error only in columns that are quantized later, so the last columns pay for the others.
Coordinate descent on the same output error has no such order: each group of 16 columns is quantized again for the
errors of all other groups as they are, and keeps the result where it is better. (Nair and Suggala, 2024,
"CDQuant", describe the descent for single columns and groups with fixed scales. Here the scale is chosen again too.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.encoding.error_feedback import quantize_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.threads.thread_pool import ThreadPool

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_COLUMNS = 128
_SMALLEST_GAIN = 1e-5  # a part of a group's cost, above float32's rounding errors


def refine(
    target: Tensor,
    moments: Tensor,
    levels: np.ndarray,
    indices: np.ndarray,
    steps: np.ndarray,
    offset: np.float32,
    sweeps: int,
    thread_pool: ThreadPool,
) -> None:
    """Improve levels and scales in place.

    Args:
        target: float32 [rows, columns], the weights to approach.
        moments: float32 [columns, columns], damped second moments of the inputs.
        levels: uint8 [rows, columns], levels + offset.
        indices: uint8 [rows, columns / 16], scale indices.
        steps: float32 [27], codebook / offset.
        offset: the largest level.
        sweeps: how often all groups are visited.
        thread_pool: the threads to use.

    """
    import torch

    columns = len(moments)
    decoded = torch.from_numpy((levels - offset) * np.repeat(steps[indices], GROUP_SIZE, axis=1))
    # gradient = (target - decoded) moments
    gradient = (target - decoded) @ moments
    groups = torch.stack([moments[at : at + GROUP_SIZE, at : at + GROUP_SIZE] for at in range(0, columns, GROUP_SIZE)])
    inverses = torch.linalg.inv(groups)
    factors = torch.linalg.cholesky(inverses).mT.contiguous()
    for _ in range(sweeps):
        for first in range(0, columns, _BLOCK_COLUMNS):
            block = slice(first, min(first + _BLOCK_COLUMNS, columns))
            changes = torch.zeros_like(decoded[:, block])
            local = gradient[:, block].clone()
            for at in range(first, block.stop, GROUP_SIZE):
                here, group = slice(at, at + GROUP_SIZE), at // GROUP_SIZE
                inside = slice(at - first, at - first + GROUP_SIZE)
                old = decoded[:, here]
                # With the other groups fixed, this is the group's best continuous value.
                best = torch.addmm(old, local[:, inside], inverses[group])
                found, found_indices = np.empty(best.shape, np.uint8), np.empty((len(best), 1), np.uint8)
                errors = np.empty(best.shape, np.float32)
                thread_pool.run(
                    quantize_columns,
                    *(best.numpy(), factors[group].numpy(), steps, offset, found, found_indices, errors),
                )
                new = torch.from_numpy((found - offset) * steps[found_indices])
                left = best - old
                gain = (left @ groups[group] * left).sum(1) * (1 - _SMALLEST_GAIN)
                better = torch.from_numpy(np.square(errors).sum(1)) < gain
                change = torch.where(better[:, None], old - new, 0.0)
                changes[:, inside] = change
                decoded[:, here] = torch.where(better[:, None], new, old)
                local.addmm_(change, moments[here, block])
                mask = better.numpy()
                levels[mask, here], indices[mask, group] = found[mask], found_indices[mask, 0]
            gradient.addmm_(changes, moments[block])
