"""Which part of a Hugging Face tensor is a GGUF tensor: all of it or one of two halves, row by row or transposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorPart:
    """How the weights of a GGUF tensor lie in a Hugging Face tensor.

    Attributes:
        half: which half of the rows of each of its matrices they are, 0 or 1; None for all rows.
        alternates: whether the rows of the two halves alternate, instead of one half lying above the other.
        transposed: whether the rows are stored as columns.
        of_vectors: whether a row is a single number, as in the biases of a stack, [experts, rows].

    """

    half: int | None = None
    alternates: bool = False
    transposed: bool = False
    of_vectors: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part, in NumPy order; that of the whole if its rows have no halves."""
        axis = self._axis(len(stored))
        shape = list(stored)
        if self.transposed and len(shape) > 1:
            shape[-2:] = shape[:-3:-1]
        if self.half is not None and axis is not None and shape[axis] % 2 == 0:
            shape[axis] //= 2
        return tuple(shape)

    def view(self, weights: Any) -> Any:
        """Return the part of a stored array of NumPy or torch, or of some of its rows, as a view."""
        if self.transposed:
            weights = weights.swapaxes(-1, -2)
        axis = self._axis(weights.ndim)
        if self.half is None or axis is None:
            return weights
        rows = weights.shape[axis] // 2
        own = slice(self.half, None, 2) if self.alternates else slice(self.half * rows, (self.half + 1) * rows)
        return weights[..., own] if axis == -1 else weights[..., own, :]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return what is stored for the weights of all halves in order, or of the whole: contiguous."""
        axis = -1 if self.of_vectors else -2
        joined = parts[0]
        if len(parts) > 1 and self.alternates:
            shape = list(joined.shape)
            shape[axis] *= len(parts)
            joined = np.stack(parts, axis=axis).reshape(shape)
        elif len(parts) > 1:
            joined = np.concatenate(parts, axis=axis)
        return np.ascontiguousarray(joined.swapaxes(-1, -2) if self.transposed else joined)

    def _axis(self, dimensions: int) -> int | None:
        """Return the axis of the rows; None for a vector that has no halves."""
        if self.of_vectors:
            return -1
        return -2 if dimensions > 1 else None


WHOLE = TensorPart()
