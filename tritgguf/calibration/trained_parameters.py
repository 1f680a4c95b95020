"""What end-to-end training changes: levels, codebooks, and the vectors of a block (norms and biases).

Levels are trained by the straight-through estimator, like those of `tuning`: a latent weight in units of its group's
step is rounded to the level. Scales and vectors are trained as factors of what they were, so that one learning rate
suits all of them. Adam (Kingma and Ba, arXiv:1412.6980) is written out, because the gradients of a block are used as
soon as they are known and never exist for the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.packed_rows.layout import GROUP_SIZE, level_offset
from tritgguf.quantization.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    from torch import Tensor

LATENT_BYTES = 14
"""Memory for each weight whose level is trained: three float32 numbers, and its level at the start and at the best."""

_MAX_OFFSET = 0.45  # largest distance of an initial latent weight from its level; below 0.5, so that it rounds to it
_CLIP_MARGIN = 1.0  # levels beyond the outermost one at which the gradient becomes zero
_DECAYS = 0.9, 0.95  # of Adam's averages of gradients and of their squares
_SMALLEST = 1e-20  # gradients of levels are about 1e-8; Adam's usual 1e-8 would dominate them


@dataclass(frozen=True)
class Rates:
    """Learning rates of one step, counted from 1: of latent weights, in levels, and of factors."""

    step: int
    level: float
    factor: float


class _Parameter:
    """A tensor that Adam trains."""

    def __init__(self, value: Tensor) -> None:
        import torch

        self.value = value
        self._mean, self._square = torch.zeros_like(value), torch.zeros_like(value)

    def update(self, gradient: Tensor, rate: float, step: int) -> None:
        """Take a step; `gradient` is overwritten."""
        first, second = _DECAYS
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (1 - second**step) ** 0.5
        size = gradient.copy_(self._square).sqrt_().div_(scale).add_(_SMALLEST)
        self.value.addcdiv_(self._mean, size, value=-rate / (1 - first**step))


class TrainedMatrix:
    """A quantized matrix in training.

    Args:
        matrix: where training starts.
        original: the original weights, float32 [rows, columns]; None if the levels stay as they are.

    """

    def __init__(self, matrix: QuantizedMatrix, original: np.ndarray | None) -> None:
        import torch

        self._start, self._offset = matrix, level_offset(matrix.depth)
        self._indices = torch.from_numpy(matrix.scale_indices.astype(np.int32))
        self._factors = _Parameter(torch.ones(len(matrix.codebook)))
        self._latent: _Parameter | None = None
        if original is not None:
            levels = torch.from_numpy(matrix.levels).float().sub_(self._offset)
            latent = torch.from_numpy(original) / self._column_steps().clamp_min(1e-30)
            self._latent = _Parameter(latent.clamp(levels - _MAX_OFFSET, levels + _MAX_OFFSET))

    def weights(self) -> Tensor:
        """Return the present weights, as they would decode: float32 [rows, columns]."""
        return self._levels().mul_(self._column_steps())

    def update(self, gradient: Tensor, rates: Rates) -> None:
        """Take a step by the gradient of the weights, float32 [rows, columns], which is overwritten."""
        levels = self._levels()
        products = (gradient * levels).reshape(*self._indices.shape, GROUP_SIZE).sum(-1).double().numpy()
        # bincount adds in the order of the groups: the same sum in every run.
        sums = np.bincount(self._start.scale_indices.ravel(), products.ravel(), len(self._start.codebook))
        steps = self._start.codebook / np.float32(self._offset)
        if self._latent is not None:
            gradient.mul_(self._column_steps())
            gradient.masked_fill_(self._latent.value.abs() > self._offset + _CLIP_MARGIN, 0.0)
            self._latent.update(gradient, rates.level, rates.step)
        self._factors.update(self._factors.value.new_tensor(sums * steps), rates.factor, rates.step)

    def quantized(self) -> QuantizedMatrix:
        """Return the present matrix; its codebook ascends. `squared_error` is still that of the start."""
        codebook = self._codebook()
        order = np.argsort(codebook, kind="stable")
        places = np.empty(len(order), np.uint8)
        places[order] = np.arange(len(order))
        levels = self._start.levels
        if self._latent is not None:
            levels = self._levels().add_(self._offset).byte().numpy()
        return replace(
            self._start, levels=levels, scale_indices=places[self._start.scale_indices], codebook=codebook[order]
        )

    def _levels(self) -> Tensor:
        import torch

        if self._latent is None:
            return torch.from_numpy(self._start.levels).float().sub_(self._offset)
        return self._latent.value.round().clamp_(-self._offset, self._offset)

    def _codebook(self) -> np.ndarray:
        factors: np.ndarray = self._factors.value.clamp_min(0.0).numpy()
        return self._start.codebook * factors

    def _column_steps(self) -> Tensor:
        import torch

        steps = torch.from_numpy(self._codebook() / np.float32(self._offset))
        return steps[self._indices].repeat_interleave(GROUP_SIZE, 1)


class TrainedVector:
    """A norm's weights or biases in training; `start` is float32 [length]."""

    def __init__(self, start: np.ndarray) -> None:
        import torch

        self._start = torch.from_numpy(start)
        self._factors = _Parameter(torch.ones(self._start.shape))

    def values(self) -> Tensor:
        """Return the present numbers, float32 [length]."""
        return self._start * self._factors.value

    def update(self, gradient: Tensor, rates: Rates) -> None:
        """Take a step by the gradient of the numbers, float32 [length]."""
        self._factors.update(gradient * self._start, rates.factor, rates.step)
