"""Second moments of a matrix's inputs on the calibration text, and how its output should differ.

Inputs x of the quantized model determine how the error of one column can be compensated in another. The difference
between the wanted and the actual output, correlated with x, is what a correction of the matrix can remove: x is not the
original model's input x', and the residual stream that the output is added to may have an error too.

torch is imported inside functions because only the `verify` extra installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_HELD_OUT_FRACTION = 4
"""One of this many inputs is held out."""
_BLOCKS = 4
"""Products of columns are computed in this many blocks of columns, on and above the diagonal only: 5/8 of them."""
_SMALLEST_BLOCK = 128


class InputMoments:
    """Second moments of an input that several matrices share.

    Args:
        columns: number of columns of the inputs.
        matrix: float32 [rows, columns], if only one matrix has this input.
        with_stream: whether `add` is given the error of the residual stream that the matrix's output is added to.

    Attributes:
        count: number of inputs that were added.
        of_one_matrix: whether only one matrix has this input, so that what it has used can be forgotten.

    """

    def __init__(self, columns: int, matrix: np.ndarray | None = None, *, with_stream: bool = False) -> None:
        import torch

        # With d = x' - x, the result is W d x^T. For a matrix W with few rows, (W d) x^T is cheaper than W (d x^T).
        self.of_one_matrix, self._matrix = matrix is not None, None
        if matrix is not None and (with_stream or 2 * len(matrix) < columns):
            self._matrix = torch.from_numpy(matrix)
        # Sums of x x^T without the held-out inputs; only the blocks on and above the diagonal are computed.
        self._second_moments = torch.zeros(columns, columns)
        rows = columns if self._matrix is None else len(self._matrix)
        self._difference_sums = torch.zeros(rows, columns)
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(self, inputs: Tensor, original: Tensor, stream_error: Tensor | None = None, *, copy: bool = True) -> None:
        """Add inputs, and the original model's inputs at the same positions, both float32 [..., columns].

        `stream_error` is float32 [..., rows], the original model's stream minus that of the quantized model. Without
        `copy`, the inputs that are held out are not copied: the caller keeps and does not change them.
        """
        x, x_original = inputs.reshape(-1, self.columns), original.reshape(-1, self.columns)
        difference = x_original - x
        if self._matrix is not None:
            difference = difference @ self._matrix.T
        if stream_error is not None:
            difference = difference + stream_error.reshape(difference.shape)
        self._difference_sums.addmm_(difference.T, x)
        self.count += len(x)
        fitted = len(x) - len(x) // _HELD_OUT_FRACTION
        _add_products(self._second_moments, x[:fitted])
        self._held_out.append((x[fitted:].clone() if copy else x[fitted:], difference[fitted:].clone()))

    @property
    def columns(self) -> int:
        """Number of columns of the inputs."""
        return self._difference_sums.shape[1]

    def mean_output_error(self, weights: Tensor) -> Tensor:
        """Return the mean of d x^T, float32 [rows, columns], d being the difference of W's output.

        W is float32 [rows, columns]; d is W (x' - x), plus the stream's error if it was added.
        """
        sums = self._difference_sums if self._matrix is not None else weights @ self._difference_sums
        return sums / max(1, self.count)

    def mean_second_moments(self, *, held_out: bool = True) -> Tensor:
        """Return the mean of x x^T, float32 [columns, columns], over all inputs or over those not held out."""
        return self._mean(self._second_moments.clone(), held_out=held_out)

    def take_second_moments(self) -> Tensor:
        """Return the mean of x x^T over all inputs; `mean_output_error` is all that can be asked for afterwards."""
        mean = self._mean(self._second_moments, held_out=True)
        self._second_moments = mean.new_empty(0)
        self._held_out.clear()
        return mean

    @property
    def are_finite(self) -> bool:
        """Whether all inputs were finite, and not so large that the second moments are not."""
        import torch

        # No second moment of two columns is larger than both of their own.
        squares = self._second_moments.diagonal() + sum(x.square().sum(0) for x, _ in self._held_out)
        return bool(torch.isfinite(squares).all())

    def _mean(self, mean: Tensor, *, held_out: bool) -> Tensor:
        """Turn sums without the held-out inputs into a mean, in place."""
        for x, _ in self._held_out if held_out else []:
            _add_products(mean, x)
        mean /= max(1, self.count if held_out else self.count - self.held_out_count)
        for block in _column_blocks(len(mean)):
            mean[block, : block.start] = mean[: block.start, block].T
        return mean

    def held_out(self, weights: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the held-out inputs, float32 [n, columns], and the differences of some outputs, float32 [n, rows].

        W is float32 [rows, columns].
        """
        import torch

        x, difference = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        return x, difference[:, rows] if self._matrix is not None else difference @ weights[rows].T

    @property
    def held_out_count(self) -> int:
        """Number of held-out inputs."""
        return sum(len(x) for x, _ in self._held_out)


def _column_blocks(columns: int) -> list[slice]:
    """Return the blocks of columns in which products are computed."""
    size = max(-(-columns // _BLOCKS), _SMALLEST_BLOCK)
    return [slice(first, first + size) for first in range(0, columns, size)]


def _add_products(second: Tensor, x: Tensor) -> None:
    """Add the sums of x x^T, for x [n, columns], in the blocks on and above the diagonal."""
    for block in _column_blocks(len(second)):
        second[block, block.start :].addmm_(x[:, block].T, x[:, block.start :])
