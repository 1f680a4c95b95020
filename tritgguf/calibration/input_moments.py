"""Second moments of a matrix's inputs on the calibration text, and how its output should differ.

Inputs x of the quantized model determine how the error of one column can be compensated in another. The difference d
between the wanted and the actual output, correlated with x, is what a correction of the matrix can remove: x is not the
original model's input x', and the residual stream that the output is added to may have an error too.

torch is imported inside functions because only the `verify` extra installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tritgguf.reference.process_settings import exact_matmul

if TYPE_CHECKING:
    from torch import Tensor

_HELD_OUT_FRACTION = 4
"""One of this many inputs is held out."""
_BLOCKS = 4
"""Products of columns are computed in this many blocks of columns, on and above the diagonal only: 5/8 of them."""
_SMALLEST_BLOCK = 128


class MeanMoments:
    """Means over some inputs x of a matrix W.

    Args:
        second: of x x^T, float32 [columns, columns].
        cross: of y x^T, where y [rows] is the wanted output of one matrix; or of (x' - x) x^T, for any matrix.
        of_outputs: which of them.

    """

    def __init__(self, second: Tensor, cross: Tensor, *, of_outputs: bool) -> None:
        self._second, self._cross, self._of_outputs = second, cross, of_outputs

    def take_second(self) -> Tensor:
        """Return the mean of x x^T and forget it, because it takes much memory.

        If the cross moments are those of wanted outputs, `output_error` must come before.
        """
        second, self._second = self._second, self._second.new_empty(0)
        return second

    def output_error(self, weights: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the mean of d x^T for some rows of W, float32 [rows, columns], d being its output's error."""
        chosen = weights[rows]
        if not self._of_outputs:
            return chosen @ self._cross
        with exact_matmul():  # y x^T - W x x^T is much smaller than either
            return self._cross[rows] - chosen @ self._second


class InputMoments:
    """Second moments of an input that several matrices share.

    Args:
        columns: number of columns of the inputs.
        matrix: float32 [rows, columns], if only one matrix has this input.
        with_outputs: whether `add` is given what the product with this matrix should be.

    Attributes:
        count: number of inputs that were added.
        of_one_matrix: whether only one matrix has this input, so that what it has used can be forgotten.

    """

    def __init__(self, columns: int, matrix: np.ndarray | None = None, *, with_outputs: bool = False) -> None:
        import torch

        # W x' is fewer numbers than x' if W has few rows.
        self.of_one_matrix, self._matrix = matrix is not None, None
        if matrix is not None and (with_outputs or 2 * len(matrix) < columns):
            self._matrix = torch.from_numpy(matrix)
        # Sums without the inputs that are held out; of x x^T, only the blocks on and above the diagonal are computed.
        self._second_sums = torch.zeros(columns, columns)
        self._cross_sums = torch.zeros(columns if self._matrix is None else len(self._matrix), columns)
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(
        self,
        inputs: Tensor,
        original: Tensor | None = None,
        *,
        outputs: Tensor | None = None,
        copy: bool = True,
    ) -> None:
        """Add inputs, float32 [..., columns].

        Args:
            inputs: those of the quantized model.
            original: those of the original model at the same positions; only needed without outputs.
            outputs: float32 [..., rows], what the product with the matrix should be, without bias; only with
                `with_outputs`. None means the product with the original inputs.
            copy: without it, the inputs that are held out are not copied: the caller keeps and does not change them.

        """
        x = inputs.reshape(-1, self.columns)
        if outputs is None:
            assert original is not None
            outputs = original.reshape(-1, self.columns)
            outputs = outputs - x if self._matrix is None else outputs @ self._matrix.T
        outputs = outputs.reshape(len(x), -1)
        self.count += len(x)
        fitted = len(x) - len(x) // _HELD_OUT_FRACTION
        self._cross_sums.addmm_(outputs[:fitted].T, x[:fitted])
        _add_products(self._second_sums, x[:fitted])
        self._held_out.append((x[fitted:].clone() if copy else x[fitted:], outputs[fitted:].clone()))

    @property
    def columns(self) -> int:
        """Number of columns of the inputs."""
        return self._cross_sums.shape[1]

    def mean(self, *, held_out: bool = True) -> MeanMoments:
        """Return the means over all inputs or over those not held out."""
        return self._mean(self._second_sums.clone(), self._cross_sums.clone(), held_out=held_out)

    def take_mean(self) -> MeanMoments:
        """Return the means over all inputs, without a copy of the sums; nothing can be asked for afterwards."""
        mean = self._mean(self._second_sums, self._cross_sums, held_out=True)
        self._second_sums = self._second_sums.new_empty(0)
        self._held_out.clear()
        return mean

    @property
    def are_finite(self) -> bool:
        """Whether all inputs were finite, and not so large that the second moments are not."""
        import torch

        # No second moment of two columns is larger than both of their own.
        squares = self._second_sums.diagonal() + sum(x.square().sum(0) for x, _ in self._held_out)
        return bool(torch.isfinite(squares).all())

    def _mean(self, second: Tensor, cross: Tensor, *, held_out: bool) -> MeanMoments:
        """Turn sums without the held-out inputs into means, in place."""
        for x, outputs in self._held_out if held_out else []:
            _add_products(second, x)
            cross.addmm_(outputs.T, x)
        count = max(1, self.count if held_out else self.count - self.held_out_count)
        for block in _column_blocks(len(second)):
            second[block, : block.start] = second[: block.start, block].T
        return MeanMoments(second.div_(count), cross.div_(count), of_outputs=self._matrix is not None)

    def held_out(self, weights: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the held-out inputs, float32 [n, columns], and the errors of some outputs, float32 [n, rows].

        W is float32 [rows, columns].
        """
        import torch

        x, outputs = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        chosen = weights[rows].T
        return x, outputs @ chosen if self._matrix is None else outputs[:, rows] - x @ chosen

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
