"""Quantizing a matrix so that its output, not its weights, stays close.

Two things are known of a matrix's inputs: their second moments H, and how far the inputs that it gets in the quantized
model are from those that it got in the original one. The first say what an error costs and how later columns can make
up for it (`quantize_columns`). The second say what the matrix has to repair: with x the inputs now and x' the
original ones, W' = W + W E[(x' - x) x^T] H^-1 comes closest to the original output W x', on these inputs. Part of that
holds for them alone, so a quarter of them is held out to see which share of the repair should be made; the matrix that
is repaired so far is quantized. (The idea that a layer should correct what the layers before it lost is that of Qronos
and GPTAQ, 2025.)

torch does the large products; it is imported inside functions, because only the `verify` extra brings it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.encoding.error_feedback import quantize_columns
from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.quantization.quantized_matrix import QuantizedMatrix
from tritgguf.quantization.scale_search import searched_codebook

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.1
"""Damping of the second moments: what is added to their diagonal, as a share of the diagonal's mean."""
DAMPING_OF_FEW = 2.0
"""Extra damping, times columns/inputs: it regularizes second moments that are estimated from few inputs.

Both are measured in `docs/quality.md`.
"""
_HELD_OUT = 4
"""One of so many inputs is held out."""
_JUDGED_ROWS = 256
"""About so many rows of a matrix say which share of its repair to make."""
_COLUMNS_AT_ONCE = 128
_MOMENTS_AT_ONCE = 2048
_SOLVED_AT_ONCE = 1024


class InputMoments:
    """Second moments of the inputs that some matrices share.

    Args:
        columns: of the inputs.
        matrix: float32 [rows, columns], of the one matrix that has these inputs, if there is but one.

    Attributes:
        count: how many inputs were added.

    """

    def __init__(self, columns: int, matrix: np.ndarray | None = None) -> None:
        import torch

        # With d = x' - x: a matrix W with few rows has W d sooner than d x^T, and what is wanted in the end is W d x^T.
        self._through = torch.from_numpy(matrix) if matrix is not None and 2 * len(matrix) < columns else None
        # Sums of x x^T without the inputs held out; what lies below the blocks of the diagonal is left out.
        self._second = torch.zeros(columns, columns)
        self._shift = torch.zeros(columns if self._through is None else len(self._through), columns)
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Add inputs and the original model's inputs at the same positions, both float32 [..., columns]."""
        columns = len(self._second)
        x, x_original = inputs.reshape(-1, columns), original.reshape(-1, columns)
        difference = x_original - x
        if self._through is not None:
            difference = difference @ self._through.T
        self._shift.addmm_(difference.T, x)
        self.count += len(x)
        others = len(x) - len(x) // _HELD_OUT
        _add_products(self._second, x[:others])
        self._held_out.append((x[others:].clone(), difference[others:].clone()))

    def mean_loss(self, weights: Tensor) -> Tensor:
        """Return the mean of W (x' - x) x^T for W float32 [rows, columns]: what W's output has lost, as x sees it."""
        lost = self._shift if self._through is not None else weights @ self._shift
        return lost / max(1, self.count)

    def mean_second(self, *, held_out: bool = True) -> Tensor:
        """Return the whole mean of x x^T, float32 [columns, columns]; of all inputs, or of those not held out."""
        mean = self._second.clone()
        for x, _ in self._held_out if held_out else []:
            _add_products(mean, x)
        mean /= max(1, self.count if held_out else self.count - self.held_out_count)
        for first in range(0, len(mean), _MOMENTS_AT_ONCE):
            some = slice(first, first + _MOMENTS_AT_ONCE)
            mean[some, :first] = mean[:first, some].T
        return mean

    def held_out(self, weights: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the inputs x held out and what some rows of W lose there, W (x' - x), float32 [n, columns], [n, rows].

        W is float32 [rows, columns].
        """
        import torch

        x, difference = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        return x, difference[:, rows] if self._through is not None else difference @ weights[rows].T

    @property
    def held_out_count(self) -> int:
        """How many inputs are held out."""
        return sum(len(x) for x, _ in self._held_out)


def _add_products(second: Tensor, x: Tensor) -> None:
    """Add the sums of x x^T, for x [n, columns], on and above the blocks of the diagonal."""
    for first in range(0, len(second), _MOMENTS_AT_ONCE):
        some = slice(first, first + _MOMENTS_AT_ONCE)
        second[some, first:].addmm_(x[:, some].T, x[:, first:])


class Feedback:
    """Quantizes the matrices that share one input.

    Args:
        moments: of the input.
        damping: see `DAMPING`.
        damping_of_few: see `DAMPING_OF_FEW`.
        repairs: whether the matrices make up for the difference between original and present inputs, as far as that
            helps on inputs held out.
        in_order_of_size: whether groups are quantized in the order of their inputs' size, or as they come.

    Raises ValueError when the moments hold a number that is NaN or infinite.
    """

    def __init__(
        self,
        moments: InputMoments,
        *,
        damping: float = DAMPING,
        damping_of_few: float = DAMPING_OF_FEW,
        repairs: bool = True,
        in_order_of_size: bool = True,
    ) -> None:
        import torch

        second = moments.mean_second()
        if not bool(torch.isfinite(second).all()):
            raise ValueError("has inputs that are NaN or infinite on the calibration text")
        damping += damping_of_few * len(second) / max(1, moments.count)
        second = _damped(second, damping)
        self._moments = moments if repairs else None
        self._without_held_out: Tensor | None = None
        if repairs and moments.held_out_count:
            self._without_held_out = torch.linalg.cholesky(_damped(moments.mean_second(held_out=False), damping))
        self._importance = second.diagonal().numpy().copy()
        # Groups whose inputs are largest come first: their errors can be made up for by all the others.
        importance = second.diagonal().reshape(-1, GROUP_SIZE).mean(1)
        groups = importance.argsort(descending=True, stable=True)
        if not in_order_of_size:
            groups = torch.arange(len(importance))
        self._order = (groups[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE)).reshape(-1)
        # Squares of this size are the most that is in memory, so none is kept by a name once it is used up.
        second = second[self._order][:, self._order]
        self._factor = _factor_of_inverse(second)

    def quantize(self, weights: np.ndarray, depth: int, thread_pool: ThreadPool) -> QuantizedMatrix:
        """Quantize float32 [rows, columns]; the errors it reports are those of the weights.

        Raises ValueError for NaN or infinite weights.
        """
        import torch

        if not np.isfinite(weights).all():
            raise ValueError("has a weight that is NaN or infinite")
        target = self._repaired(torch.from_numpy(weights))
        codebook = searched_codebook(target.numpy(), self._importance, depth, thread_pool)
        offset = np.float32(level_offset(depth))
        steps = codebook / offset
        remaining = target[:, self._order].contiguous()
        rows, columns = remaining.shape
        levels, indices = np.empty((rows, columns), np.uint8), np.empty((rows, columns // GROUP_SIZE), np.uint8)
        for first in range(0, columns, _COLUMNS_AT_ONCE):
            last = min(first + _COLUMNS_AT_ONCE, columns)
            some = np.ascontiguousarray(remaining[:, first:last].numpy())
            factor = np.ascontiguousarray(self._factor[first:last, first:last].numpy())
            some_levels, errors = np.empty(some.shape, np.uint8), np.empty_like(some)
            some_indices = np.empty((rows, (last - first) // GROUP_SIZE), np.uint8)
            thread_pool.run(quantize_columns, some, factor, steps, offset, some_levels, some_indices, errors)
            levels[:, first:last] = some_levels
            indices[:, first // GROUP_SIZE : last // GROUP_SIZE] = some_indices
            remaining[:, last:].addmm_(torch.from_numpy(errors), self._factor[first:last, last:], alpha=-1)
        positions = np.argsort(self._order.numpy())
        levels, indices = levels[:, positions], indices[:, positions[::GROUP_SIZE] // GROUP_SIZE]
        quantized = QuantizedMatrix(depth, levels, indices, codebook, 0.0, 0.0)
        error = float(np.square(weights - quantized.decoded(), dtype=np.float64).sum())
        return QuantizedMatrix(
            depth, levels, indices, codebook, error, float(np.square(weights, dtype=np.float64).sum())
        )

    def _repaired(self, weights: Tensor) -> Tensor:
        """Return weights that come closer to the original output from the inputs as they are now."""
        import torch

        if self._moments is None:
            return weights
        lost = self._moments.mean_loss(weights)
        repair = torch.empty_like(weights)
        repair[:, self._order] = lost[:, self._order] @ self._factor.T @ self._factor
        return weights + self._share(weights, lost) * repair

    def _share(self, weights: Tensor, lost: Tensor) -> float:
        """Return which share of the repair comes closest on inputs that it was not fitted to, from 0 to 1.

        `lost` is the mean of W (x' - x) x^T over all inputs. Some rows are repaired without those held out, and judged
        there.
        """
        import torch

        moments = self._moments
        if moments is None or self._without_held_out is None:
            return 1.0
        rows = slice(None, None, max(1, len(weights) // _JUDGED_ROWS))
        inputs, wanted = moments.held_out(weights, rows)
        fitted = (moments.count * lost[rows] - wanted.T @ inputs) / (moments.count - len(inputs))
        repaired = inputs @ torch.cholesky_solve(fitted.T, self._without_held_out)
        size = float(repaired.square().sum())
        return min(max(float((repaired * wanted).sum()) / size, 0.0), 1.0) if size > 0 else 1.0


def _damped(second: Tensor, damping: float) -> Tensor:
    """Add a share of the diagonal's mean to it, in place, so that the matrix can be inverted; return the matrix."""
    mean = second.diagonal().mean()
    second.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return second


def _factor_of_inverse(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = matrix^-1, without the inverse.

    Backwards, the matrix has a Cholesky factor that forwards is upper triangular, matrix = A A^T; then U = A^-1.
    """
    import torch

    return _inverse_of_upper(torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1))


def _inverse_of_upper(matrix: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, by halves: torch has only a solver, which takes all columns."""
    import torch

    if len(matrix) <= _SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(matrix, torch.eye(len(matrix)), upper=True)
    half = len(matrix) // 2
    first, last = _inverse_of_upper(matrix[:half, :half]), _inverse_of_upper(matrix[half:, half:])
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ (matrix[:half, half:] @ last))
    return inverse
