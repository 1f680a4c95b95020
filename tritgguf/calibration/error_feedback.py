"""Quantize a matrix so that its output, not its weights, stays close to the original.

The method has two steps, both based on the inputs x of the matrix in the quantized model:

1. Correction. The inputs x differ from the original model's inputs x'. W' = W + W E[(x' - x) x^T] H^-1, with the second
   moments H = E[x x^T], minimizes the error of W' x against the original output W x'. This least-squares fit overfits
   the calibration text, so a quarter of the inputs is held out to find the best factor from 0 to 1 for the correction.
   (Qronos and GPTAQ, 2025, introduced correcting the error of earlier layers.) Where the output is added to the
   residual stream, the stream's own error is corrected with it.
2. Error feedback. W' is quantized column by column; H determines how the remaining columns compensate for the error of
   each column (`quantize_columns`). Then levels and scales are chosen once more, given all others (`refine`).

torch computes the large products. It is imported inside functions because only the `verify` extra installs it.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.encoding.error_feedback import quantize_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.input_moments import InputMoments, MeanMoments
from tritgguf.calibration.refinement import refine
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.scale_search import searched_codebook
from tritgguf.reference.process_settings import return_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.1
"""Damping added to the diagonal of the second moments, as a fraction of the diagonal's mean."""
FEW_INPUTS_DAMPING = 2.0
"""Extra damping, times columns/inputs: regularizes second moments that are estimated from few inputs.

Both are measured in `docs/quality.md`.
"""
SWEEPS = 1
"""How often all levels and scales are chosen again after error feedback (`refine`)."""
_SAMPLED_ROWS = 256
"""Approximate number of rows from which the factor of a matrix's correction is computed."""
_BLOCK_COLUMNS = 128
_SOLVE_BLOCK = 1024


class ErrorFeedback:
    """Quantizes the matrices that share one input.

    Args:
        moments: second moments of the input.
        damping: see `DAMPING`.
        few_inputs_damping: see `FEW_INPUTS_DAMPING`.
        correction: whether to correct the difference between original and quantized inputs, as far as that helps on
            held-out inputs.
        act_order: whether groups with the largest inputs are quantized first; otherwise from left to right.
        sweeps: see `SWEEPS`.

    Raises ValueError if the moments are NaN or infinite.
    """

    def __init__(
        self,
        moments: InputMoments,
        *,
        damping: float = DAMPING,
        few_inputs_damping: float = FEW_INPUTS_DAMPING,
        correction: bool = True,
        act_order: bool = True,
        sweeps: int = SWEEPS,
    ) -> None:
        if not moments.are_finite:
            raise ValueError("has inputs that are NaN or infinite on the calibration text")
        return_freed_memory()
        self._damping = damping + few_inputs_damping * moments.columns / max(1, moments.count)
        self._moments, self._correction, self._act_order, self._sweeps = moments, correction, act_order, sweeps
        self._fitted: tuple[MeanMoments, Tensor] | None = None  # without what is held out, and the factor
        self._mean: MeanMoments | None = None
        self._only_error: Tensor | None = None  # of the only matrix
        self._inputs: _OrderedInputs | None = None

    def quantize(self, weights: np.ndarray, depth: int, thread_pool: ThreadPool) -> QuantizedMatrix:
        """Quantize float32 [rows, columns]; the reported errors are those of the weights, not of the output.

        Raises ValueError for NaN or infinite weights.
        """
        import torch

        if not np.isfinite(weights).all():
            raise ValueError("has a weight that is NaN or infinite")
        target, inputs = self._corrected(torch.from_numpy(weights))
        codebook = searched_codebook(target.numpy(), inputs.importance, depth, thread_pool)
        offset = np.float32(level_offset(depth))
        steps = codebook / offset
        remaining = target[:, inputs.order].contiguous()
        rows, columns = remaining.shape
        levels, indices = np.empty((rows, columns), np.uint8), np.empty((rows, columns // GROUP_SIZE), np.uint8)
        for first in range(0, columns, _BLOCK_COLUMNS):
            last = min(first + _BLOCK_COLUMNS, columns)
            block = np.ascontiguousarray(remaining[:, first:last].numpy())
            factor = np.ascontiguousarray(inputs.factor[first:last, first:last].numpy())
            block_levels, errors = np.empty(block.shape, np.uint8), np.empty_like(block)
            block_indices = np.empty((rows, (last - first) // GROUP_SIZE), np.uint8)
            thread_pool.run(quantize_columns, block, factor, steps, offset, block_levels, block_indices, errors)
            levels[:, first:last] = block_levels
            indices[:, first // GROUP_SIZE : last // GROUP_SIZE] = block_indices
            remaining[:, last:].addmm_(torch.from_numpy(errors), inputs.factor[first:last, last:], alpha=-1)
        if self._moments.of_one_matrix:
            inputs.forget_factor()
        if self._sweeps:
            ordered = target[:, inputs.order]
            refine(ordered, inputs.second_moments, levels, indices, steps, offset, self._sweeps, thread_pool)
        original_order = np.argsort(inputs.order.numpy())
        levels, indices = levels[:, original_order], indices[:, original_order[::GROUP_SIZE] // GROUP_SIZE]
        quantized = QuantizedMatrix(depth, levels, indices, codebook, 0.0, 0.0)
        error = float(np.square(weights - quantized.decoded(), dtype=np.float64).sum())
        return QuantizedMatrix(
            depth, levels, indices, codebook, error, float(np.square(weights, dtype=np.float64).sum())
        )

    def _corrected(self, weights: Tensor) -> tuple[Tensor, _OrderedInputs]:
        """Return weights whose output for the quantized model's inputs is closer to the original output, and these."""
        import torch

        # Before the inputs that are held out are forgotten because no other matrix needs them.
        correction_factor = self._correction_factor(weights) if self._correction else 0.0
        inputs, output_error = self._prepared(weights)
        if output_error is None:
            return weights, inputs
        correction = torch.empty_like(weights)
        correction[:, inputs.order] = output_error[:, inputs.order] @ inputs.factor.T @ inputs.factor
        return weights + correction_factor * correction, inputs

    def _prepared(self, weights: Tensor) -> tuple[_OrderedInputs, Tensor | None]:
        """Return the ordered inputs, and the mean of d x^T over all of them, see `MeanMoments.output_error`.

        Without correction, None instead of this mean.
        """
        if self._mean is None or self._inputs is None:
            only = self._moments.of_one_matrix
            self._mean = self._moments.take_mean() if only else self._moments.mean()
            self._only_error = self._mean.output_error(weights) if only and self._correction else None
            self._inputs = _OrderedInputs(_damped(self._mean.take_second(), self._damping), act_order=self._act_order)
        if self._only_error is not None or not self._correction:
            return self._inputs, self._only_error
        return self._inputs, self._mean.output_error(weights)

    def _correction_factor(self, weights: Tensor) -> float:
        """Return the factor of the correction, from 0 to 1, with the smallest error on held-out inputs.

        The correction of some rows is fitted without the held-out inputs and evaluated on them.
        """
        import torch

        moments = self._moments
        if not moments.held_out_count:
            return 1.0
        rows = slice(None, None, max(1, len(weights) // _SAMPLED_ROWS))
        fitted, factor = self._fit(weights, rows)  # before the inputs that are held out are copied
        inputs, expected = moments.held_out(weights, rows)
        corrections = inputs @ torch.cholesky_solve(fitted.T, factor)
        size = float(corrections.square().sum())
        return min(max(float((corrections * expected).sum()) / size, 0.0), 1.0) if size > 0 else 1.0

    def _fit(self, weights: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the mean of d x^T for some rows without what is held out, and the Cholesky factor of these inputs."""
        import torch

        if self._fitted is not None:
            mean, factor = self._fitted
            return mean.output_error(weights, rows), factor
        mean = self._moments.mean(held_out=False)
        error = mean.output_error(weights, rows)
        factor = torch.linalg.cholesky(_damped(mean.take_second(), self._damping))
        if not self._moments.of_one_matrix:
            self._fitted = mean, factor
        return error, factor


class _OrderedInputs:
    """Second moments of an input whose columns are in the order in which they are quantized.

    Args:
        second: float32 [columns, columns], damped, in the original order; it is freed if nothing else refers to it.
        act_order: as in `ErrorFeedback`.

    Attributes:
        order: int64 [columns], the original place of each column.
        importance: float32 [columns], the diagonal in the original order.
        second_moments: float32 [columns, columns].
        factor: float32 [columns, columns], upper triangular U with U^T U the inverse of the moments.

    """

    def __init__(self, second: Tensor, *, act_order: bool) -> None:
        import torch

        self.importance = second.diagonal().numpy().copy()
        # Groups with the largest inputs come first, so that all other groups can compensate for their errors.
        importance = second.diagonal().reshape(-1, GROUP_SIZE).mean(1)
        groups = importance.argsort(descending=True, stable=True)
        if not act_order:
            groups = torch.arange(len(importance))
        self.order = (groups[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE)).reshape(-1)
        return_freed_memory()
        self.second_moments = torch.empty_like(second)
        for part in torch.arange(len(second)).split(_BLOCK_COLUMNS):  # a copy of all rows would take much memory
            self.second_moments[part] = second[self.order[part]][:, self.order]

    @cached_property
    def factor(self) -> Tensor:
        return_freed_memory()
        return _inverse_cholesky(self.second_moments)

    def forget_factor(self) -> None:
        """Free the factor's memory, which is as much as that of the moments."""
        del self.factor
        return_freed_memory()


def _damped(second: Tensor, damping: float) -> Tensor:
    """Add a fraction of the diagonal's mean to the diagonal in place, so that the matrix is invertible; return it."""
    mean = second.diagonal().mean()
    second.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return second


def _inverse_cholesky(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = matrix^-1, without computing the inverse.

    The Cholesky factor of the flipped matrix, flipped back, is upper triangular: matrix = A A^T. Then U = A^-1.
    """
    import torch

    factor = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    _invert_upper(factor)
    return factor


def _invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in place, recursively by halves.

    torch only has a triangular solver, which would not use that the right-hand side is triangular too.
    """
    import torch

    if len(matrix) <= _SOLVE_BLOCK:
        matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(len(matrix)), upper=True))
        return
    half = len(matrix) // 2
    first, last, between = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    _invert_upper(first)
    _invert_upper(last)
    between.copy_(-(first @ (between @ last)))
