"""Choose the levels of a quantized matrix again, group by group, given all others.

Error feedback compensates an error only in columns that are quantized later, so the last columns pay for the others.
Coordinate descent on the same output error has no such order: each group of 16 columns is quantized again for the
errors of all other groups as they are, and keeps the result where it is better. (Nair and Suggala, 2024,
"CDQuant", describe the descent for single columns and groups with fixed scales. Here the scale is chosen again too.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.encoding.refinement import SecondMoments, refine_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE
from cpu_kernels.threads.thread_pool import ThreadPool

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_COLUMNS = 128


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
    gradient = (target - decoded) @ moments
    groups = torch.stack([moments[at : at + GROUP_SIZE, at : at + GROUP_SIZE] for at in range(0, columns, GROUP_SIZE)])
    inverses = torch.linalg.inv(groups).contiguous()  # torch returns columns
    factors = torch.linalg.cholesky(inverses).mT.contiguous()
    second = SecondMoments(moments.numpy(), inverses.numpy(), factors.numpy())
    for _ in range(sweeps):
        for first in range(0, columns, _BLOCK_COLUMNS):
            last = min(first + _BLOCK_COLUMNS, columns)
            changes = np.empty((len(target), last - first), np.float32)
            thread_pool.run(refine_columns, gradient.numpy(), second, first, steps, offset, levels, indices, changes)
            gradient.addmm_(torch.from_numpy(changes), moments[first:last])
